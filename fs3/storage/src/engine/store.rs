//! The engine itself: batches of updates in, durable results out; reads beside.

use super::BLOCK_BYTES;
use super::alloc::{Allocator, ReadEpoch};
use super::buffer::{AlignedBuf, is_aligned};
use super::disk::Disk;
use super::format::{self, FormatError, HOLE, Header, LogRecord, PREAMBLE};
use super::image::{Chunk, Image, Next};
use super::recovery::{begin_log, log_name, recover, snapshot_name, write_snapshot};
use super::write::{WriteOp, plan, verify};
use firefly_types::{ChunkId, ErrorKind, lock};
use fs3_core::target::{Meta, RecordPage, Recovered, Update, WriteError};
use std::io;
use std::sync::{Arc, Mutex};

/// Payload bytes that one batch takes at most: bounds the latency that a flush adds.
const BATCH_BYTES: usize = 32 << 20;

/// Why the engine could not do something.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The disk said no. The target is lost until it is opened again.
    #[error("disk error: {0}")]
    Io(io::Error),
    /// A block is not what its pointer says. Another replica has it.
    #[error("block {index} of chunk {chunk} (block {block} of the data file) fails its checksum")]
    Corrupt {
        /// Which chunk.
        chunk: ChunkId,
        /// Which block of the chunk.
        index: u32,
        /// Which block of the data file.
        block: u32,
    },
    /// Header, log or snapshot are not what they should be.
    #[error("the target's files cannot be used: {0}")]
    Format(#[from] FormatError),
    /// The folder belongs to something else.
    #[error("the folder holds {found}, not {wanted}: check the configuration")]
    Foreign {
        /// What the header says.
        found: String,
        /// What was asked for.
        wanted: String,
    },
    /// An earlier write or flush failed.
    #[error("the target is out of use: {0}")]
    Failed(String),
}

/// An operation of a batch and, if it wrote, the chunk's next state and the blocks it took.
type Kept<B> = (Op<B>, Option<(Next, Vec<u32>)>);

impl EngineError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Corrupt { .. } | Self::Format(FormatError::Damaged(_)) => ErrorKind::Corrupt,
            Self::Format(FormatError::TooNew { .. }) => ErrorKind::Unsupported,
            Self::Foreign { .. } => ErrorKind::InvalidArgument,
            Self::Io(_) | Self::Failed(_) => ErrorKind::Unavailable,
        }
    }
}

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Most bytes of blocks. Default: no limit but the disk's.
    pub capacity_bytes: u64,
    /// The data file grows by this: few, large extents.
    pub grow_bytes: u64,
    /// A snapshot is taken when the log is longer: bounds recovery to a second or so.
    pub log_bytes: u64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { capacity_bytes: u64::MAX, grow_bytes: 64 << 20, log_bytes: 64 << 20 }
    }
}

/// Room.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Bytes in blocks that hold something.
    pub used_bytes: u64,
    /// Bytes that blocks could hold.
    pub capacity_bytes: u64,
    /// A power cut empties the disk.
    pub is_volatile: bool,
}

/// The end of something that was submitted.
#[derive(Debug)]
pub enum Done<B> {
    /// A write is durable, or had no effect.
    Written {
        /// Which chunk.
        chunk: ChunkId,
        /// As submitted.
        id: u64,
        /// The chunk's next state.
        result: Result<Meta, WriteError>,
    },
    /// A block that the write builds on is corrupt: repair it and submit the write again.
    Corrupt {
        /// As submitted.
        id: u64,
        /// As submitted.
        base: u64,
        /// As submitted.
        version: u64,
        /// As submitted.
        update: Update<B>,
        /// As submitted.
        at_once: bool,
        /// Which block of the chunk.
        index: u32,
    },
    /// A flush is durable, or the disk failed.
    Flushed {
        /// As submitted.
        id: u64,
        /// Durable.
        ok: bool,
    },
}

enum Op<B> {
    Write(WriteOp<B>),
    /// Took effect in memory already; the blocks are free once the record is durable.
    Record(LogRecord, Vec<u32>),
    Flush {
        id: u64,
        remove: Vec<ChunkId>,
        page: RecordPage,
    },
}

struct State<B> {
    image: Image,
    alloc: Allocator,
    queue: Vec<Op<B>>,
    failed: Option<String>,
}

/// Where the next frame goes.
pub(super) struct LogState {
    pub(super) generation: u64,
    pub(super) sequence: u64,
    pub(super) len: u64,
}

/// The chunks of one target.
pub struct Engine<D, B> {
    disk: D,
    options: EngineOptions,
    state: Mutex<State<B>>,
    /// Held by the one batch that runs.
    log: Mutex<LogState>,
}

/// One version of one chunk, kept from reuse while this lives.
pub struct ReadPlan {
    id: ChunkId,
    chunk: Arc<Chunk>,
    meta: Meta,
    _epoch: Arc<ReadEpoch>,
}

impl ReadPlan {
    /// The chunk's state at that version.
    pub fn meta(&self) -> Meta {
        self.meta
    }
}

impl<D: Disk, B: AsRef<[u8]>> Engine<D, B> {
    /// Opens a target's files, or makes them if there are none, and recovers what they hold.
    pub fn open(disk: D, header: Header, options: EngineOptions) -> Result<(Self, Recovered), EngineError> {
        let mut log = LogState { generation: 1, sequence: 0, len: PREAMBLE as u64 };
        let mut image = Image::default();
        match disk.read_file("header").map_err(EngineError::Io)? {
            None => {
                // The header comes last: it says that the rest is there.
                begin_log(&disk, 1)?;
                write_snapshot(&disk, 1, &image)?;
                disk.write_file("header", &header.encode()).map_err(EngineError::Io)?;
            }
            Some(bytes) => {
                let found = Header::decode(&bytes)?;
                if found != header {
                    let show = |h: &Header| format!("target {} of cluster {}", h.target, h.cluster);
                    return Err(EngineError::Foreign { found: show(&found), wanted: show(&header) });
                }
                (image, log) = recover(&disk)?;
            }
        }
        let blocks = disk.data_len().map_err(EngineError::Io)? / BLOCK_BYTES as u64;
        let mut alloc = Allocator::new(u32::try_from(blocks).unwrap_or(HOLE - 1));
        for block in image.used_blocks() {
            if !alloc.mark(block) {
                let why = format!("block {block} is used twice or lies outside the data file");
                return Err(FormatError::Damaged(why).into());
            }
        }
        let recovered = image.recovered();
        let state = State { image, alloc, queue: Vec::new(), failed: None };
        Ok((Self { disk, options, state: Mutex::new(state), log: Mutex::new(log) }, recovered))
    }

    /// Queues a write for the next batch.
    pub fn write(&self, id: u64, base: u64, version: u64, update: Update<B>, at_once: bool) {
        lock(&self.state).queue.push(Op::Write(WriteOp { id, base, version, update, at_once }));
    }

    /// The pending version is what readers get from now on; the record follows with the next batch.
    pub fn commit(&self, chunk: ChunkId, version: u64) {
        let mut state = lock(&self.state);
        let freed = state.image.commit(chunk, version);
        state.queue.push(Op::Record(LogRecord::Commit { chunk, version }, freed));
    }

    /// The pending version is forgotten; the record follows with the next batch.
    pub fn drop_pending(&self, chunk: ChunkId, version: u64) {
        let mut state = lock(&self.state);
        let freed = state.image.drop_pending(chunk, version);
        state.queue.push(Op::Record(LogRecord::Drop { chunk, version }, freed));
    }

    /// Queues removals and records for the next batch.
    pub fn flush(&self, id: u64, remove: Vec<ChunkId>, page: RecordPage) {
        lock(&self.state).queue.push(Op::Flush { id, remove, page });
    }

    /// Whether something waits for a batch.
    pub fn has_work(&self) -> bool {
        !lock(&self.state).queue.is_empty()
    }

    /// Runs one batch: data, flush, one log frame, flush. One caller at a time; others wait.
    pub fn run_batch(&self) -> Vec<Done<B>> {
        let mut log = lock(&self.log);
        let (ops, failed) = {
            let mut state = lock(&self.state);
            let mut bytes = 0;
            let size = |op: &Op<B>| match op {
                Op::Write(w) => w.update.payload.as_ref().map_or(0, |p| p.as_ref().len()),
                _ => 0,
            };
            let fits = state.queue.iter().take_while(|op| {
                let first = bytes == 0;
                bytes += size(op);
                first || bytes <= BATCH_BYTES
            });
            let count = fits.count();
            (state.queue.drain(..count).collect::<Vec<_>>(), state.failed.clone())
        };
        if failed.is_some() {
            return ops.into_iter().filter_map(failure).collect();
        }
        if ops.is_empty() {
            return Vec::new();
        }
        let mut done = Vec::new();
        match self.batch(&mut log, ops, &mut done) {
            Ok(()) => {}
            Err((error, rest)) => {
                // Never again: after a failed flush nobody knows what is on the medium.
                lock(&self.state).failed = Some(error.to_string());
                done.extend(rest.into_iter().filter_map(failure));
            }
        }
        done
    }

    #[allow(clippy::type_complexity, reason = "used once, right above")]
    fn batch(
        &self,
        log: &mut LogState,
        ops: Vec<Op<B>>,
        done: &mut Vec<Done<B>>,
    ) -> Result<(), (EngineError, Vec<Op<B>>)> {
        let mut body = Vec::new();
        // What takes effect once the frame is durable, in order.
        let mut kept: Vec<Kept<B>> = Vec::new();
        let mut wrote = false;
        let mut ops = ops.into_iter();
        while let Some(op) = ops.next() {
            match op {
                Op::Write(write) => {
                    let base = self.base_of(&write);
                    let planned = match self.plan(&base, &write) {
                        Ok(planned) => planned,
                        Err(error) => return Err((error, rest(kept, Op::Write(write), ops))),
                    };
                    let Some(plan) = planned else {
                        let (chunk, id) = (write.update.chunk, write.id);
                        done.push(Done::Written { chunk, id, result: Err(WriteError::NoSpace) });
                        continue;
                    };
                    let blocks = plan.blocks.clone();
                    match plan.execute(&self.disk, &write) {
                        Ok(next) => {
                            wrote |= !blocks.is_empty();
                            next.record(write.update.chunk, &base, write.at_once).encode(&mut body);
                            kept.push((Op::Write(write), Some((next, blocks))));
                        }
                        Err(EngineError::Corrupt { index, .. }) => {
                            lock(&self.state).alloc.give_back(&blocks);
                            let WriteOp { id, base, version, update, at_once } = write;
                            done.push(Done::Corrupt { id, base, version, update, at_once, index });
                        }
                        Err(error) => return Err((error, rest(kept, Op::Write(write), ops))),
                    }
                }
                Op::Record(record, freed) => {
                    record.encode(&mut body);
                    kept.push((Op::Record(record, freed), None));
                }
                Op::Flush { id, remove, page } => {
                    for chunk in &remove {
                        LogRecord::Remove { chunk: *chunk }.encode(&mut body);
                    }
                    LogRecord::Page(page.clone()).encode(&mut body);
                    kept.push((Op::Flush { id, remove, page }, None));
                }
            }
        }
        if kept.is_empty() {
            return Ok(());
        }
        let mut frame = Vec::with_capacity(body.len() + 32);
        format::put_frame(&mut frame, log.generation, log.sequence, &body);
        let name = log_name(log.generation);
        let appended = match if wrote { self.disk.sync_data() } else { Ok(()) } {
            Ok(()) => self.disk.append_file(&name, &frame),
            Err(error) => Err(io::Error::other(error)),
        };
        match appended {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                self.undo_for_lack_of_room(kept, done);
                return Ok(());
            }
            Err(error) => return Err((EngineError::Io(error), strip(kept))),
        }
        if let Err(error) = self.disk.sync_file(&name) {
            return Err((EngineError::Io(error), strip(kept)));
        }
        log.sequence += 1;
        log.len += frame.len() as u64;
        self.publish(kept, done);
        if log.len > self.options.log_bytes
            && let Err(error) = self.compact(log)
        {
            lock(&self.state).failed = Some(error.to_string());
        }
        Ok(())
    }

    fn base_of(&self, write: &WriteOp<B>) -> Arc<Chunk> {
        let state = lock(&self.state);
        let committed = state.image.chunks.get(&write.update.chunk).and_then(|e| e.committed.clone());
        let base = committed.unwrap_or_default();
        debug_assert!(write.at_once || base.version == write.base, "a write on a base that is not committed");
        base
    }

    fn plan(&self, base: &Chunk, write: &WriteOp<B>) -> Result<Option<super::write::Plan>, EngineError> {
        let mut state = lock(&self.state);
        loop {
            if let Some(plan) = plan(base, write, &mut state.alloc) {
                return Ok(Some(plan));
            }
            let have = u64::from(state.alloc.blocks()) * BLOCK_BYTES as u64;
            let limit = self.options.capacity_bytes.min(u64::from(HOLE - 1) * BLOCK_BYTES as u64);
            let want = (have + self.options.grow_bytes).min(limit / BLOCK_BYTES as u64 * BLOCK_BYTES as u64);
            if want <= have {
                return Ok(None);
            }
            match self.disk.grow_data(want) {
                Ok(()) => state.alloc.grow((want / BLOCK_BYTES as u64) as u32),
                Err(error) if error.kind() == io::ErrorKind::StorageFull => return Ok(None),
                Err(error) => return Err(EngineError::Io(error)),
            }
        }
    }

    /// The log has no room: nothing of the batch happened. Its writes are refused; what took
    /// effect in memory waits for room.
    fn undo_for_lack_of_room(&self, kept: Vec<Kept<B>>, done: &mut Vec<Done<B>>) {
        let mut state = lock(&self.state);
        let mut waiting = Vec::new();
        for (op, written) in kept {
            match op {
                Op::Write(write) => {
                    state.alloc.give_back(&written.map(|(_, blocks)| blocks).unwrap_or_default());
                    let (chunk, id) = (write.update.chunk, write.id);
                    done.push(Done::Written { chunk, id, result: Err(WriteError::NoSpace) });
                }
                record @ Op::Record(..) => waiting.push(record),
                Op::Flush { id, .. } => done.push(Done::Flushed { id, ok: false }),
            }
        }
        waiting.append(&mut state.queue);
        state.queue = waiting;
    }

    fn publish(&self, kept: Vec<Kept<B>>, done: &mut Vec<Done<B>>) {
        let mut state = lock(&self.state);
        for (op, written) in kept {
            match (op, written) {
                (Op::Write(write), Some((next, _))) => {
                    let chunk = write.update.chunk;
                    let meta = next.meta(chunk);
                    let freed = if write.at_once {
                        state.image.set_committed(chunk, next)
                    } else {
                        state.image.set_pending(chunk, next)
                    };
                    state.alloc.retire(freed);
                    done.push(Done::Written { chunk, id: write.id, result: Ok(meta) });
                }
                (Op::Write(_), None) => {}
                (Op::Record(_, freed), _) => state.alloc.retire(freed),
                (Op::Flush { id, remove, page }, _) => {
                    for chunk in remove {
                        let freed = state.image.remove(chunk);
                        state.alloc.retire(freed);
                    }
                    state.image.merge(&page);
                    done.push(Done::Flushed { id, ok: true });
                }
            }
        }
    }

    /// Begins a new log behind a snapshot. Order: the new log exists before the snapshot that
    /// needs it, and the old pair goes last.
    fn compact(&self, log: &mut LogState) -> Result<(), EngineError> {
        let next = log.generation + 1;
        let mut state = lock(&self.state);
        // Queued records took effect in the image already; the snapshot has them, and they find
        // nothing to do when they are replayed from the new log.
        let attempt =
            begin_log(&self.disk, next).and_then(|()| write_snapshot(&self.disk, next, &state.image));
        match attempt {
            Ok(()) => {}
            // No room for a snapshot now: the old log goes on, and the next batch tries again.
            Err(EngineError::Io(e)) if e.kind() == io::ErrorKind::StorageFull => return Ok(()),
            Err(error) => {
                state.failed = Some(error.to_string());
                return Err(error);
            }
        }
        drop(state);
        let old = log.generation;
        *log = LogState { generation: next, sequence: 0, len: PREAMBLE as u64 };
        for name in [log_name(old), snapshot_name(old)] {
            self.disk.remove_file(&name).map_err(EngineError::Io)?;
        }
        Ok(())
    }

    /// Takes hold of a chunk's committed or pending version for reading.
    pub fn plan_read(&self, id: ChunkId, pending: bool) -> Option<ReadPlan> {
        let state = lock(&self.state);
        let entry = state.image.chunks.get(&id)?;
        let chunk = match (pending, &entry.pending) {
            (true, Some(next)) => Arc::clone(&next.chunk),
            (true, None) => return None,
            (false, _) => Arc::clone(entry.committed.as_ref()?),
        };
        let epoch = state.alloc.epoch();
        drop(state);
        let meta = chunk.meta(id);
        Some(ReadPlan { id, chunk, meta, _epoch: epoch })
    }

    /// Fills `out` from `offset` on; the range must lie within the chunk. Every block that is
    /// touched is verified as a whole.
    pub fn read(&self, plan: &ReadPlan, offset: usize, out: &mut [u8]) -> Result<(), EngineError> {
        if let Some(reason) = &lock(&self.state).failed {
            return Err(EngineError::Failed(reason.clone()));
        }
        assert!(offset + out.len() <= plan.chunk.length as usize, "a read past the chunk's end");
        let map = &plan.chunk.map;
        let mut at = offset;
        let mut left = out;
        while !left.is_empty() {
            let first = at / BLOCK_BYTES;
            let last = (at + left.len() - 1) / BLOCK_BYTES;
            let begins = map[first].block;
            let follows = |i: usize| match begins {
                HOLE => map[i].block == HOLE,
                block => u64::from(map[i].block) == u64::from(block) + (i - first) as u64,
            };
            let run = (first..=last).take_while(|i| follows(*i)).count();
            let skip = at - first * BLOCK_BYTES;
            let take = (run * BLOCK_BYTES - skip).min(left.len());
            let (here, behind) = left.split_at_mut(take);
            if begins == HOLE {
                here.fill(0);
            } else {
                let from = u64::from(begins) * BLOCK_BYTES as u64;
                if take == run * BLOCK_BYTES && is_aligned(here) {
                    self.read_blocks(plan, first, from, here)?;
                } else {
                    let mut scratch = AlignedBuf::zeroed(run * BLOCK_BYTES);
                    self.read_blocks(plan, first, from, &mut scratch)?;
                    here.copy_from_slice(&scratch[skip..skip + take]);
                }
            }
            at += take;
            left = behind;
        }
        Ok(())
    }

    fn read_blocks(
        &self,
        plan: &ReadPlan,
        first: usize,
        from: u64,
        out: &mut [u8],
    ) -> Result<(), EngineError> {
        if self.disk.read_data(from, out).is_err() {
            // One of them cannot be read; find out which by reading them one by one.
            for (i, block) in out.chunks_exact_mut(BLOCK_BYTES).enumerate() {
                let at = from + (i * BLOCK_BYTES) as u64;
                let (index, number) = ((first + i) as u32, (at / BLOCK_BYTES as u64) as u32);
                let corrupt = EngineError::Corrupt { chunk: plan.id, index, block: number };
                self.disk.read_data(at, block).map_err(|_| corrupt)?;
            }
        }
        for (i, block) in out.chunks_exact(BLOCK_BYTES).enumerate() {
            let index = first + i;
            verify(plan.id, index as u32, plan.chunk.map[index], block)?;
        }
        Ok(())
    }

    /// Puts a block right with bytes from another replica. They are proven by the pointer, so it
    /// does not matter who sent them; anything else is refused.
    pub fn repair(&self, plan: &ReadPlan, index: u32, bytes: &[u8]) -> Result<(), EngineError> {
        let ptr = plan.chunk.map.get(index as usize).copied().unwrap_or(format::NO_BLOCK);
        let mut block = AlignedBuf::zeroed(BLOCK_BYTES);
        let fits = bytes.len().min(BLOCK_BYTES);
        block[..fits].copy_from_slice(&bytes[..fits]);
        verify(plan.id, index, ptr, &block)?;
        if let Some(reason) = &lock(&self.state).failed {
            return Err(EngineError::Failed(reason.clone()));
        }
        // In place: what lies there is worthless, and a torn repair shows as corrupt again.
        self.disk.write_data(u64::from(ptr.block) * BLOCK_BYTES as u64, &block).map_err(EngineError::Io)
    }

    /// Room used and left.
    pub fn usage(&self) -> Usage {
        let free = self.disk.free_bytes();
        let state = lock(&self.state);
        let block = BLOCK_BYTES as u64;
        let have = u64::from(state.alloc.blocks()) * block;
        Usage {
            used_bytes: u64::from(state.alloc.used()) * block,
            capacity_bytes: have.saturating_add(free).min(self.options.capacity_bytes),
            is_volatile: self.disk.is_volatile(),
        }
    }

    /// Ends it: nothing is written or read from now on.
    pub fn close(&self) {
        lock(&self.state).failed.get_or_insert_with(|| "it is closed".to_owned());
    }

    /// Why nothing works any more, if so.
    pub fn failed(&self) -> Option<String> {
        lock(&self.state).failed.clone()
    }

    /// The disk under it.
    pub fn disk(&self) -> &D {
        &self.disk
    }
}

fn failure<B>(op: Op<B>) -> Option<Done<B>> {
    match op {
        Op::Write(w) => {
            Some(Done::Written { chunk: w.update.chunk, id: w.id, result: Err(WriteError::Failed) })
        }
        Op::Flush { id, .. } => Some(Done::Flushed { id, ok: false }),
        Op::Record(..) => None,
    }
}

fn strip<B, T>(kept: Vec<(Op<B>, T)>) -> Vec<Op<B>> {
    kept.into_iter().map(|(op, _)| op).collect()
}

fn rest<B, T>(kept: Vec<(Op<B>, T)>, current: Op<B>, ops: impl Iterator<Item = Op<B>>) -> Vec<Op<B>> {
    strip(kept).into_iter().chain([current]).chain(ops).collect()
}
