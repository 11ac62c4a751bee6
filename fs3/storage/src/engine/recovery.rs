//! Opening a volume: the newer superblock, the pages that it leads to, and the log behind it.
//!
//! **What a power cut leaves.** A group's data and its frame are written side by side and flushed
//! once. Frame *n* + 1 and the data of its group are written only after the flush of group *n* has
//! returned. So of all frames on the medium only the last can be without (some of) its data, and
//! what is behind it was never acknowledged:
//!
//! * the frame itself is torn or missing: its checksum says so, the log ends before it;
//! * the frame is whole, data is missing: the checksums in the frame say so, since opening reads the
//!   data of the last frame. The log ends before it;
//! * both are whole: the group counts, whether or not anybody was told.
//!
//! A frame that is not valid though a later one is cannot come from a power cut: the disk has lost
//! what it said was durable, and the target does not open. Data that is missing under an earlier
//! frame is found by its checksum when it is read, like any damage.
//!
//! Opening ends with a frame of its own, flushed. It takes the place of a frame that was not
//! believed, so that this can never come to count after a second power cut, when others may have
//! been told that its updates do not exist; and it makes the last frame of before one that has a
//! successor.

use super::alloc::Allocator;
use super::buffer::AlignedBuf;
use super::checkpoint::ROOT_PAYLOAD;
use super::core::{Core, EngineError, EngineOptions, Plant, Shared};
use super::disk::Disk;
use super::format::{
    self, FormatError, Header, LogRecord, PageKind, PagePtr, PendingRecord, Reader, Superblock, damaged,
    page_crc,
};
use super::leaf::{BlockPtr, Leaf};
use super::log::{Log, read_frames};
use super::plan::is_intact;
use super::state::{LeafAt, Next, State, leaves_touched};
use super::writer::Writer;
use super::{BLOCK_BYTES, Extent};
use firefly_types::{ChunkId, lock};
use fs3_core::target::Recovered;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Both superblocks come first, then the log.
const LOG_FIRST: u32 = 2;
/// Bytes that are read or written at a time.
const STEP: usize = 1 << 20;
/// Blocks that a new volume has for data: enough for its first checkpoint.
const FIRST_BLOCKS: u64 = 64;

/// The newer of the two superblocks; `None` if nothing was ever written.
fn find_superblock<D: Disk + ?Sized>(disk: &D) -> Result<Option<Superblock>, EngineError> {
    if disk.size()? < 2 * BLOCK {
        return Ok(None);
    }
    let mut newest: Option<Superblock> = None;
    let mut broken = None;
    for slot in 0..2 {
        let mut page = AlignedBuf::zeroed(BLOCK_BYTES);
        disk.read(slot * BLOCK, &mut page)?;
        match Superblock::decode(&page) {
            Ok(found) => newest = newest.into_iter().chain(found).max_by_key(|s| s.generation),
            // A torn write of the newer one leaves the older, and the log tells if that is too old.
            Err(error) => broken = Some(error),
        }
    }
    match (newest, broken) {
        (Some(newest), _) => Ok(Some(newest)),
        (None, Some(error)) => Err(error.into()),
        (None, None) => Ok(None),
    }
}

/// Whether a volume holds no target.
pub fn is_empty<D: Disk + ?Sized>(disk: &D) -> Result<bool, EngineError> {
    Ok(find_superblock(disk)?.is_none())
}

impl<B: AsRef<[u8]>> Core<B> {
    /// Opens a target's volume, or makes it if there is none, and recovers what it holds.
    pub fn open<D: Disk + ?Sized>(
        disk: &D,
        header: Header,
        options: EngineOptions,
    ) -> Result<(Self, Recovered), EngineError> {
        let Some(superblock) = find_superblock(disk)? else { return Self::create(disk, header, options) };
        if superblock.header != header {
            let show = |h: &Header| format!("target {} of cluster {}", h.target, h.cluster);
            return Err(EngineError::Foreign { found: show(&superblock.header), wanted: show(&header) });
        }
        let (made, found) = (superblock.sector_bytes, disk.sector_bytes());
        if found > made {
            return Err(EngineError::Sector { made, found });
        }
        let mut replay = Replay::begin(disk, &superblock, options)?;
        let mut log = log_of(&superblock);
        let is_closed = replay.log(&mut log, header.seed())?;
        if !is_closed {
            // See the module: the log is closed with a frame before anything else happens.
            let mut body = Vec::new();
            LogRecord::Mark.encode(&mut body);
            let frame = format::frame(header.seed(), log.sequence, &body);
            let len = frame.len() as u64;
            let at = log.place(len, 0).ok_or_else(|| damaged("the log is full"))?;
            let mut buf = AlignedBuf::zeroed(frame.len().next_multiple_of(log.sector as usize));
            buf[..frame.len()].copy_from_slice(&frame);
            disk.write(log.offset(at), &buf)?;
            log.advance(at, len);
        }
        disk.sync()?;

        let state = replay.state;
        let recovered = state.recovered();
        let shared = Mutex::new(Shared { state, queue: VecDeque::new(), failed: None });
        let writer = Mutex::new(Writer::new(log, header.seed(), superblock.generation));
        Ok((Self { header, options, shared, writer }, recovered))
    }

    /// Makes a new volume. The superblock comes last: it says that the rest is there.
    fn create<D: Disk + ?Sized>(
        disk: &D,
        header: Header,
        options: EngineOptions,
    ) -> Result<(Self, Recovered), EngineError> {
        let sector = disk.sector_bytes();
        // A small volume is not given to its log.
        let log_bytes = options.log_bytes.min(options.capacity_bytes / 8);
        let log_blocks = u32::try_from((log_bytes / BLOCK).max(4)).unwrap_or(u32::MAX >> 8);
        let first = u64::from(LOG_FIRST) + u64::from(log_blocks);
        let wanted = (first + FIRST_BLOCKS) * BLOCK;
        if disk.size()? < wanted {
            disk.grow(wanted)?;
        }
        // Zeros, not just room: the log must not begin with what lay here before, and writing to
        // blocks that were written once changes nothing in the file system.
        let end = first * BLOCK;
        let zeros = AlignedBuf::zeroed(STEP.min(end as usize));
        for at in (0..end).step_by(STEP) {
            disk.write(at, &zeros[..STEP.min((end - at) as usize)])?;
        }
        disk.sync()?;
        let mut state = State::new(Allocator::new(volume_blocks(disk)?), options.cache_bytes);
        if !state.alloc.mark(Extent { start: 0, count: first as u32 }) {
            return Err(damaged("the volume is too small for its log").into());
        }
        let log = Log {
            first: LOG_FIRST,
            bytes: u64::from(log_blocks) * BLOCK,
            sector: u64::from(sector),
            head: 0,
            head_sequence: 1,
            tail: 0,
            sequence: 1,
        };
        let shared = Mutex::new(Shared { state, queue: VecDeque::new(), failed: None });
        let core = Self { header, options, shared, writer: Mutex::new(Writer::new(log, header.seed(), 0)) };
        core.run(disk);
        match core.failed() {
            Some(reason) => Err(EngineError::Failed(reason)),
            None if lock(&core.writer).generation == 0 => {
                Err(EngineError::Io(std::io::ErrorKind::StorageFull.into()))
            }
            None => Ok((core, Recovered::default())),
        }
    }
}

fn log_of(superblock: &Superblock) -> Log {
    Log {
        first: superblock.log_first,
        bytes: u64::from(superblock.log_blocks) * BLOCK,
        sector: u64::from(superblock.sector_bytes),
        head: superblock.log_offset,
        head_sequence: superblock.log_sequence,
        tail: superblock.log_offset,
        sequence: superblock.log_sequence,
    }
}

fn volume_blocks<D: Disk + ?Sized>(disk: &D) -> Result<u32, EngineError> {
    Ok(u32::try_from(disk.size()? / BLOCK).unwrap_or(u32::MAX).min(super::index::DIRTY))
}

struct Replay<'a, D: ?Sized> {
    disk: &'a D,
    state: State,
    plant: Option<Plant>,
}

impl<'a, D: Disk + ?Sized> Replay<'a, D> {
    /// Reads what the superblock leads to.
    fn begin(disk: &'a D, superblock: &Superblock, options: EngineOptions) -> Result<Self, EngineError> {
        let state = State::new(Allocator::new(volume_blocks(disk)?), options.cache_bytes);
        let mut replay = Self { disk, state, plant: options.plant };
        let root = replay.root(superblock)?;
        let mut reader = Reader(&root);
        let (index, bitmap) = (reader.u32()?, reader.u32()?);
        let records = reader.u64()?;
        let expected = 16 + 8 * (u64::from(index) + u64::from(bitmap)) + records;
        if expected != root.len() as u64 || bitmap > replay.state.alloc.pages() {
            return Err(damaged("the root of the checkpoint does not add up, or the volume was cut").into());
        }
        let places = (0..index).map(|_| reader.page()).collect::<Result<Vec<_>, _>>()?;
        replay.pages(&places, |_| PageKind::Index, |state, at, _, page| state.index.load(at, page))?;
        let places = (0..bitmap).map(|_| reader.page()).collect::<Result<Vec<_>, _>>()?;
        replay.pages(&places, PageKind::Bitmap, |state, at, number, page| {
            state.bitmap[number as usize] = Some(at);
            match state.alloc.load(number, page) {
                true => Ok(()),
                false => Err(damaged("the bitmap names blocks outside the volume")),
            }
        })?;
        for record in LogRecord::decode_all(reader.0)? {
            match record {
                // Its blocks are marked already: the bitmap is of the same moment.
                LogRecord::Pending(record) => {
                    let next = replay.next(record)?;
                    replay.state.set_pending(next);
                }
                LogRecord::Page(page) => replay.state.merge(&page),
                _ => return Err(damaged("the root holds a record that does not belong there").into()),
            }
        }
        // Everything loaded is as on disk.
        if bitmap == replay.state.alloc.pages() {
            replay.state.alloc.take_dirty();
        }
        Ok(replay)
    }

    fn page(&self, at: PagePtr, kind: PageKind) -> Result<AlignedBuf, EngineError> {
        let mut page = AlignedBuf::zeroed(BLOCK_BYTES);
        self.disk.read(u64::from(at.block) * BLOCK, &mut page)?;
        if page_crc(kind, &page) != at.crc {
            let what = format!("{kind:?} in block {} of the volume fails its checksum", at.block);
            return Err(damaged(what).into());
        }
        Ok(page)
    }

    /// Reads pages, neighbours with one request.
    fn pages(
        &mut self,
        places: &[PagePtr],
        kind: impl Fn(u32) -> PageKind,
        mut take: impl FnMut(&mut State, PagePtr, u32, &[u8]) -> Result<(), FormatError>,
    ) -> Result<(), EngineError> {
        let mut buf = AlignedBuf::zeroed(STEP.min(places.len() * BLOCK_BYTES));
        let mut number = 0;
        while number < places.len() {
            let rest = &places[number..];
            let run = rest.iter().zip(rest[0].block..).take(STEP / BLOCK_BYTES);
            let run = run.take_while(|(at, block)| at.block == *block).count();
            let bytes = &mut buf[..run * BLOCK_BYTES];
            self.disk.read(u64::from(rest[0].block) * BLOCK, bytes)?;
            for (page, at) in bytes.chunks_exact(BLOCK_BYTES).zip(&rest[..run]) {
                let kind = kind(number as u32);
                if page_crc(kind, page) != at.crc {
                    let what = format!("{kind:?} in block {} of the volume fails its checksum", at.block);
                    return Err(damaged(what).into());
                }
                take(&mut self.state, *at, number as u32, page)?;
                number += 1;
            }
        }
        Ok(())
    }

    fn root(&mut self, superblock: &Superblock) -> Result<Vec<u8>, EngineError> {
        if superblock.root_bytes > self.disk.size()? {
            return Err(damaged("the root is longer than the volume").into());
        }
        let mut root = Vec::new();
        let mut at = superblock.root;
        while (root.len() as u64) < superblock.root_bytes {
            let page = self.page(at, PageKind::Root)?;
            Extent::add(&mut self.state.root, at.block);
            let mut reader = Reader(&page);
            at = reader.page()?;
            let left = (superblock.root_bytes - root.len() as u64).min(ROOT_PAYLOAD as u64);
            root.extend(reader.take(left as usize)?);
        }
        Ok(root)
    }

    /// Replays the log and moves its tail to where it goes on. True if its last frame closes it: then
    /// openings that are cut short one after the other do not fill it up.
    fn log(&mut self, log: &mut Log, seed: u32) -> Result<bool, EngineError> {
        let mut ring = AlignedBuf::zeroed(log.bytes as usize);
        for (i, part) in ring.chunks_mut(STEP).enumerate() {
            self.disk.read(log.offset((i * STEP) as u64), part)?;
        }
        let ignore = self.plant == Some(Plant::IgnoreLaterFrames);
        let frames = read_frames(&ring, log, seed, ignore)?;
        (log.tail, log.sequence) = (frames.tail, log.head_sequence + frames.found.len() as u64);
        let count = frames.found.len();
        let mut is_closed = false;
        for (number, (offset, body)) in frames.found.into_iter().enumerate() {
            let records = LogRecord::decode_all(&body)?;
            let is_last = number + 1 == count;
            if is_last && self.plant != Some(Plant::BelieveTail) && !self.is_data_there(&records) {
                // Never acknowledged. Its place is taken by the frame that closes the log.
                (log.tail, log.sequence) = (offset, log.sequence - 1);
                break;
            }
            is_closed = is_last && records == [LogRecord::Mark];
            for record in records {
                self.apply(record)?;
            }
        }
        Ok(is_closed)
    }

    /// Whether the data of a frame's updates is on the medium.
    fn is_data_there(&self, records: &[LogRecord]) -> bool {
        let mut buf = AlignedBuf::zeroed(0);
        let pending = records.iter().filter_map(|r| match r {
            LogRecord::Pending(record) => Some(record),
            _ => None,
        });
        for record in pending {
            for change in &record.changes {
                for (part, crcs) in change.crcs.chunks(STEP / BLOCK_BYTES).enumerate() {
                    let skip = (part * STEP / BLOCK_BYTES) as u32;
                    if buf.len() < crcs.len() * BLOCK_BYTES {
                        buf = AlignedBuf::zeroed(crcs.len() * BLOCK_BYTES);
                    }
                    let bytes = &mut buf[..crcs.len() * BLOCK_BYTES];
                    if self.disk.read(u64::from(change.block + skip) * BLOCK, bytes).is_err() {
                        return false;
                    }
                    for (i, (crc, block)) in crcs.iter().zip(bytes.chunks_exact(BLOCK_BYTES)).enumerate() {
                        let i = skip + i as u32;
                        let ptr = BlockPtr { block: change.block + i, crc: *crc, version: record.version };
                        if !is_intact(record.chunk, change.first + i, ptr, block) {
                            return false;
                        }
                    }
                }
            }
        }
        true
    }

    fn leaf(&mut self, id: ChunkId, number: u32) -> Result<Arc<Leaf>, EngineError> {
        Ok(match self.state.leaf(id, number) {
            LeafAt::Hole => Arc::default(),
            LeafAt::Loaded(leaf) => leaf,
            LeafAt::Page(at) => {
                let leaf = Arc::new(Leaf::decode(&self.page(at, PageKind::Leaf(id, number))?)?);
                self.state.cache.put((id, number), at, Arc::clone(&leaf));
                leaf
            }
        })
    }

    fn next(&mut self, record: PendingRecord) -> Result<Next, EngineError> {
        self.state.check_base(&record)?;
        let base = self.state.index.get(record.chunk).cloned().unwrap_or_default();
        let mut leaves = BTreeMap::new();
        for number in leaves_touched(&record, &base) {
            leaves.insert(number, self.leaf(record.chunk, number)?);
        }
        Ok(Next::new(record, &base, |number| leaves.get(&number).cloned().unwrap_or_default()))
    }

    fn apply(&mut self, record: LogRecord) -> Result<(), EngineError> {
        let freed = match record {
            LogRecord::Pending(record) => {
                let next = self.next(record)?;
                for extent in &next.fresh {
                    if !self.state.alloc.mark(*extent) {
                        let what = format!("blocks {extent:?} are used twice or lie outside the volume");
                        return Err(damaged(what).into());
                    }
                }
                if next.record.at_once {
                    self.state.set_committed(next)
                } else {
                    self.state.set_pending(next)
                }
            }
            LogRecord::Commit { chunk, version } => self.state.commit(chunk, version),
            LogRecord::Drop { chunk, version } => self.state.drop_pending(chunk, version),
            LogRecord::Remove { chunk } => {
                let count = self.state.index.get(chunk).map_or(0, |e| e.leaves().len() as u32);
                let mut leaves = BTreeMap::new();
                for number in 0..count {
                    leaves.insert(number, self.leaf(chunk, number)?);
                }
                self.state.remove(chunk, &leaves)
            }
            LogRecord::Page(page) => {
                self.state.merge(&page);
                Vec::new()
            }
            LogRecord::Mark => Vec::new(),
        };
        self.state.alloc.give_back(&freed);
        Ok(())
    }
}
