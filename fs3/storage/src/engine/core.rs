//! The engine as a value: operations and disk completions in, disk requests and results out.

use super::alloc::{PAGE_BLOCKS, ReadEpoch};
use super::disk::{Completion, Disk, Io};
use super::format::{FormatError, Header, LogRecord};
use super::index::{DIRTY, leaves_of};
use super::leaf::LEAF_BLOCKS;
use super::plan::WriteOp;
use super::read::ReadPlan;
use super::state::{LeafAt, State};
use super::writer::Writer;
use super::{BLOCK_BYTES, Extent};
use firefly_types::{ChunkId, ErrorKind, lock};
use fs3_core::target::{RecordPage, Update, WriteError};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Chunks that one log record removes at most: bounds the leaves that must be in memory for it.
const REMOVE_STEP: usize = 64;

/// Why the engine could not do something.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The disk said no. The target is lost until it is opened again.
    #[error("disk error: {0}")]
    Io(#[from] io::Error),
    /// A block is not what its pointer says. Another replica has it.
    #[error("block {index} of chunk {chunk} (block {block} of the volume) fails its checksum")]
    Corrupt {
        /// Which chunk.
        chunk: ChunkId,
        /// Which block of the chunk.
        index: u32,
        /// Which block of the volume.
        block: u32,
    },
    /// A part of a chunk's map is not what its pointer says: nothing tells where the blocks are.
    #[error("the map of chunk {chunk} fails its checksum (leaf {leaf}, block {block} of the volume)")]
    CorruptMap {
        /// Which chunk.
        chunk: ChunkId,
        /// Which part of its map: 1 MiB of the chunk each.
        leaf: u32,
        /// Which block of the volume.
        block: u32,
    },
    /// What lies on the volume is not what it should be.
    #[error("the target's volume cannot be used: {0}")]
    Format(#[from] FormatError),
    /// The volume belongs to something else.
    #[error("the volume is that of {found}, not of {wanted}: check the configuration")]
    Foreign {
        /// What the superblock says.
        found: String,
        /// What was asked for.
        wanted: String,
    },
    /// The disk's sectors are larger than when the volume was made.
    #[error(
        "the volume was made on a disk with sectors of {made} bytes and lies on one with {found}: a torn \
         sector could take acknowledged data with it; copy it to a disk like the first, or remove the \
         folder and let the chain fill the target again"
    )]
    Sector {
        /// When it was made, bytes.
        made: u32,
        /// Now, bytes.
        found: u32,
    },
    /// An earlier write or flush failed.
    #[error("the target is out of use: {0}")]
    Failed(String),
}

impl EngineError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Corrupt { .. } | Self::CorruptMap { .. } | Self::Format(FormatError::Damaged(_)) => {
                ErrorKind::Corrupt
            }
            Self::Format(_) | Self::Sector { .. } => ErrorKind::Unsupported,
            Self::Foreign { .. } => ErrorKind::InvalidArgument,
            Self::Io(_) | Self::Failed(_) => ErrorKind::Unavailable,
        }
    }
}

/// Planted bugs, so that tests can prove that they would see them. Never set in a server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plant {
    /// A block's checksum stands beside the block instead of in its parent, so what a lost or
    /// misdirected write left behind vouches for itself.
    ChecksumBesideBlock,
    /// A group is acknowledged without a flush.
    SkipSync,
    /// The last frame of the log is believed without a look at its data.
    BelieveTail,
    /// A damaged frame ends the log even if there are later ones.
    IgnoreLaterFrames,
    /// Pages of the last checkpoint are reused before the next one is durable.
    ReusePages,
    /// Blocks are reused before the record that frees them is durable.
    ReuseUnrecorded,
    /// Blocks are reused while reads that began before hold them.
    ReuseUnderReads,
    /// The superblock is written without waiting for the pages that it leads to.
    SuperblockFirst,
    /// Log space is reused before the checkpoint that frees it is durable.
    ForgetLogEarly,
    /// A checkpoint stores blocks as used that nothing leads to.
    LeakLeaving,
}

/// Sizes.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Most bytes of the volume. Default: no limit but the disk's.
    pub capacity_bytes: u64,
    /// The volume grows by this: few, large extents of the file system.
    pub grow_bytes: u64,
    /// The log, fixed when the volume is made. A checkpoint begins when half of it is used, so this
    /// bounds recovery to a few seconds; the larger, the more updates share a page of a checkpoint.
    pub log_bytes: u64,
    /// Memory for leaves of block maps. A leaf is about 1 KiB for a MiB that was written at once, and
    /// up to 5 KiB for one overwritten at random. A checkpoint begins when half of it has changed.
    pub cache_bytes: usize,
    /// Payload that one group takes at most: bounds the latency that its flush adds.
    pub group_bytes: usize,
    /// For negative controls.
    pub plant: Option<Plant>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            capacity_bytes: u64::MAX,
            grow_bytes: 256 << 20,
            log_bytes: 32 << 20,
            cache_bytes: 64 << 20,
            group_bytes: 32 << 20,
            plant: None,
        }
    }
}

/// Room.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Bytes in blocks that hold something: data, maps, tables; not the log.
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
        result: Result<fs3_core::target::Meta, WriteError>,
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

/// What waits for a group.
pub(super) enum Op<B> {
    Write(WriteOp<B>),
    /// Took effect in memory already; the blocks are free once the record is durable.
    Record(LogRecord, Vec<Extent>),
    Remove(Vec<ChunkId>),
    Flush {
        id: u64,
        page: RecordPage,
    },
    /// The last one.
    Close,
}

pub(super) struct Shared<B> {
    pub(super) state: State,
    pub(super) queue: VecDeque<Op<B>>,
    pub(super) failed: Option<String>,
}

/// The chunks of one target, without a disk: whoever drives it carries out what [`Core::poll`]
/// returns, in any order, and says so with [`Core::complete`].
pub struct Core<B> {
    pub(super) header: Header,
    pub(super) options: EngineOptions,
    /// What readers and submitters see; held for moments.
    pub(super) shared: Mutex<Shared<B>>,
    /// The group and the checkpoint that run; held by the one who drives.
    pub(super) writer: Mutex<Writer<B>>,
}

impl<B: AsRef<[u8]>> Core<B> {
    /// Queues a write for the next group.
    pub fn write(&self, id: u64, base: u64, version: u64, update: Update<B>, at_once: bool) {
        lock(&self.shared).queue.push_back(Op::Write(WriteOp { id, base, version, update, at_once }));
    }

    /// The pending version is what readers get from now on; the record follows with the next group.
    pub fn commit(&self, chunk: ChunkId, version: u64) {
        let mut shared = lock(&self.shared);
        let freed = shared.state.commit(chunk, version);
        self.queue_record(&mut shared, LogRecord::Commit { chunk, version }, freed);
    }

    /// The pending version is forgotten; the record follows with the next group.
    pub fn drop_pending(&self, chunk: ChunkId, version: u64) {
        let mut shared = lock(&self.shared);
        let freed = shared.state.drop_pending(chunk, version);
        self.queue_record(&mut shared, LogRecord::Drop { chunk, version }, freed);
    }

    fn queue_record(&self, shared: &mut Shared<B>, record: LogRecord, mut freed: Vec<Extent>) {
        if self.options.plant == Some(Plant::ReuseUnrecorded) {
            shared.state.alloc.retire(std::mem::take(&mut freed));
        }
        shared.queue.push_back(Op::Record(record, freed));
    }

    /// Queues removals and records for the next groups.
    pub fn flush(&self, id: u64, remove: Vec<ChunkId>, page: RecordPage) {
        let mut shared = lock(&self.shared);
        for part in remove.chunks(REMOVE_STEP) {
            shared.queue.push_back(Op::Remove(part.to_vec()));
        }
        shared.queue.push_back(Op::Flush { id, page });
    }

    /// Whether something waits for the disk.
    pub fn has_work(&self) -> bool {
        let queued = {
            let shared = lock(&self.shared);
            !shared.queue.is_empty() && shared.failed.is_none()
        };
        queued || lock(&self.writer).is_busy()
    }

    /// Whether somebody waits for what is queued: records of commits alone are no reason to hurry.
    pub fn is_urgent(&self) -> bool {
        let shared = lock(&self.shared);
        shared.queue.iter().any(|op| !matches!(op, Op::Record(..)))
    }

    /// What the disk should do now. Group and checkpoint go on as completions come in. With
    /// `eager`, records that nobody waits for begin a group too.
    pub fn poll(&self, eager: bool) -> Vec<Io> {
        lock(&self.writer).poll(self, eager)
    }

    /// Takes in what the disk did.
    pub fn complete(&self, completion: Completion) {
        lock(&self.writer).complete(self, completion);
    }

    /// What has ended since this was asked last.
    pub fn take_done(&self) -> Vec<Done<B>> {
        lock(&self.writer).take_done()
    }

    /// Drives the engine until nothing is left to do, each request at once and in order.
    pub fn run<D: Disk + ?Sized>(&self, disk: &D) -> Vec<Done<B>> {
        self.run_in_order(disk, |_| 0)
    }

    /// As [`Core::run`], but `choose(n)` says which of n requests the disk carries out next.
    pub fn run_in_order<D: Disk + ?Sized>(
        &self,
        disk: &D,
        mut choose: impl FnMut(usize) -> usize,
    ) -> Vec<Done<B>> {
        let mut waiting = VecDeque::new();
        loop {
            waiting.extend(self.poll(true));
            let next = if waiting.is_empty() { None } else { waiting.remove(choose(waiting.len())) };
            match next {
                Some(io) => self.complete(io.perform(disk)),
                None => return self.take_done(),
            }
        }
    }

    /// Takes hold of a part of a chunk's committed or pending version for reading.
    pub fn plan_read(&self, id: ChunkId, pending: bool, range: Range<u32>) -> Option<ReadPlan> {
        let mut shared = lock(&self.shared);
        let state = &mut shared.state;
        let meta = match (pending, state.pending.get(&id)) {
            (true, next) => next?.meta(),
            (false, _) => state.index.get(id)?.meta(),
        };
        let range = range.start..range.end.min(meta.length);
        let bytes = LEAF_BLOCKS * BLOCK_BYTES as u32;
        let last = if range.is_empty() { 0 } else { range.end.div_ceil(bytes).min(leaves_of(meta.length)) };
        let leaves: Vec<(u32, LeafAt)> = (range.start / bytes..last)
            .map(|number| {
                let leaf = if pending { state.pending_leaf(id, number) } else { state.leaf(id, number) };
                (number, leaf)
            })
            .collect();
        let epoch = match self.options.plant {
            Some(Plant::ReuseUnderReads) => Arc::new(ReadEpoch),
            _ => state.alloc.epoch(),
        };
        Some(ReadPlan { id, meta, leaves, believe: self.believes(), _epoch: epoch })
    }

    /// Whether blocks vouch for themselves: a planted bug.
    pub(super) fn believes(&self) -> bool {
        self.options.plant == Some(Plant::ChecksumBesideBlock)
    }

    /// Small requests of groups use this memory.
    pub(super) fn use_arena(&self, arena: Arc<super::buffer::Arena>) {
        lock(&self.writer).spare.arena = Some(arena);
    }

    /// Room used and left on `disk`.
    pub fn usage<D: Disk + ?Sized>(&self, disk: &D) -> Usage {
        let free = disk.free_bytes();
        let log = lock(&self.writer).log_blocks();
        let shared = lock(&self.shared);
        let block = BLOCK_BYTES as u64;
        let alloc = &shared.state.alloc;
        Usage {
            used_bytes: u64::from(alloc.used().saturating_sub(log + 2)) * block,
            capacity_bytes: (u64::from(alloc.blocks()) * block)
                .saturating_add(free)
                .min(self.options.capacity_bytes)
                .min(u64::from(DIRTY) * block)
                .saturating_sub(u64::from(log + 2) * block),
            is_volatile: disk.is_volatile(),
        }
    }

    /// Asks for a last record behind everything, so that the log's end is not taken for a torn one.
    pub fn close(&self) {
        lock(&self.shared).queue.push_back(Op::Close);
    }

    /// Nothing is written or read from now on, for this reason unless there is one already.
    pub fn end(&self, reason: &str) {
        lock(&self.shared).failed.get_or_insert_with(|| reason.to_owned());
    }

    /// Why nothing works any more, if so.
    pub fn failed(&self) -> Option<String> {
        lock(&self.shared).failed.clone()
    }

    /// Number of committed chunks.
    pub fn chunks(&self) -> usize {
        lock(&self.shared).state.index.chunks()
    }

    /// Blocks that the volume may have.
    pub(super) fn most_blocks(&self) -> u32 {
        let most = self.options.capacity_bytes / BLOCK_BYTES as u64;
        // Whole pages of the bitmap below the reserved numbers.
        u32::try_from(most).unwrap_or(u32::MAX).min(DIRTY / PAGE_BLOCKS * PAGE_BLOCKS)
    }
}
