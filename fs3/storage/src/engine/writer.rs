//! Groups: everything that waits, made durable together with one flush.
//!
//! A group goes through these steps; each waits for the disk requests of the one before:
//!
//! 1. *load* the leaves of block maps that its operations change,
//! 2. *read* old blocks of which a part stays,
//! 3. make *room*: grow the volume if free blocks are few,
//! 4. *compose* new blocks and write them, and behind the last of them the log frame,
//! 5. *flush* once everything is written,
//! 6. publish: operations take effect, freed blocks are retired.
//!
//! One group is under way at a time; a checkpoint may run beside it (`checkpoint`).

use super::buffer::{AlignedBuf, Spare};
use super::checkpoint::Checkpoint;
use super::core::{Core, Done, Op, Plant, Shared};
use super::disk::{Completion, Io, IoKind};
use super::format::{self, LogRecord, MAX_VERSION, PageKind, PagePtr, page_crc};
use super::leaf::Leaf;
use super::log::Log;
use super::plan::{Base, Plan, WriteOp, is_intact, plan};
use super::state::{LeafAt, Next};
use super::{BLOCK_BYTES, Extent};
use firefly_types::{ChunkId, lock};
use fs3_core::target::{RecordPage, WriteError};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::Arc;

/// Bytes that one call of `poll` composes: what it returns is on its way to the disk while the next
/// call composes more.
const COMPOSE_BYTES: usize = 1 << 20;
/// Operations that one group takes.
const GROUP_OPS: usize = 8192;
/// Free blocks that a checkpoint may need beyond what is counted.
const SPARE_BLOCKS: u32 = 16;

/// A write on its way.
struct Work<B> {
    op: WriteOp<B>,
    base: Base,
    plan: Option<Plan>,
    old: BTreeMap<u32, AlignedBuf>,
    fate: Fate,
}

enum Fate {
    Open,
    Next(Box<Next>),
    Refused(WriteError),
    /// A block that stays in part is corrupt.
    Corrupt(u32),
}

enum Item<B> {
    Write(Box<Work<B>>),
    Record(LogRecord, Vec<Extent>),
    Remove(Vec<(ChunkId, BTreeMap<u32, Arc<Leaf>>)>),
    Flush(u64, RecordPage),
    Mark,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Idle,
    Loading,
    Reading,
    Growing,
    Composing(usize),
    Writing,
    Flushing,
}

/// Who waits for a disk request.
enum Waits {
    Leaf {
        item: usize,
        part: usize,
        number: u32,
        at: PagePtr,
    },
    Old {
        item: usize,
        index: u32,
    },
    /// Bytes asked for, and the fewest that would do.
    Grow(u64, u64),
    Group,
    Checkpoint,
}

struct Frame {
    at: u64,
    len: u64,
}

pub(super) struct Writer<B> {
    pub(super) log: Log,
    pub(super) seed: u32,
    pub(super) checkpoint: Option<Checkpoint>,
    /// Number of the last durable checkpoint.
    pub(super) generation: u64,
    step: Step,
    items: Vec<Item<B>>,
    body: Vec<u8>,
    frame: Option<Frame>,
    /// Pages that a checkpoint may have to write on account of the group.
    group_pages: u32,
    /// Requests of the group's step that the disk has.
    outstanding: usize,
    waits: HashMap<u64, Waits>,
    next_io: u64,
    out: Vec<Io>,
    done: Vec<Done<B>>,
    pub(super) spare: Spare,
    /// The volume cannot grow: asked once per group that lacks room.
    pub(super) full: bool,
}

impl<B: AsRef<[u8]>> Writer<B> {
    pub(super) fn new(log: Log, seed: u32, generation: u64) -> Self {
        Self {
            log,
            seed,
            checkpoint: None,
            generation,
            step: Step::Idle,
            items: Vec::new(),
            body: Vec::new(),
            frame: None,
            group_pages: 0,
            outstanding: 0,
            waits: HashMap::new(),
            next_io: 1,
            out: Vec::new(),
            done: Vec::new(),
            spare: Spare::default(),
            full: false,
        }
    }

    pub(super) fn log_blocks(&self) -> u32 {
        (self.log.bytes / BLOCK_BYTES as u64) as u32
    }

    pub(super) fn is_busy(&self) -> bool {
        self.step != Step::Idle || self.checkpoint.is_some() || !self.done.is_empty()
    }

    pub(super) fn take_done(&mut self) -> Vec<Done<B>> {
        std::mem::take(&mut self.done)
    }

    fn ask(&mut self, kind: IoKind, waits: Waits) {
        let id = self.next_io;
        self.next_io += 1;
        if !matches!(waits, Waits::Checkpoint) {
            self.outstanding += 1;
        }
        self.waits.insert(id, waits);
        self.out.push(Io { id, kind });
    }

    pub(super) fn ask_for_checkpoint(&mut self, kind: IoKind) {
        self.ask(kind, Waits::Checkpoint);
    }

    pub(super) fn poll(&mut self, core: &Core<B>, eager: bool) -> Vec<Io> {
        loop {
            self.pump_group(core, eager);
            // The end of a checkpoint may be what a group waits for.
            if !self.pump_checkpoint(core) {
                return std::mem::take(&mut self.out);
            }
        }
    }

    fn pump_group(&mut self, core: &Core<B>, eager: bool) {
        loop {
            if core.failed().is_some() {
                self.give_up(core);
                break;
            }
            if self.step == Step::Idle {
                if self.is_checkpoint_due(core) && self.begin_checkpoint(core) {
                    continue;
                }
                if !self.begin_group(core, eager) {
                    break;
                }
                continue;
            }
            if let Step::Composing(at) = self.step {
                if self.compose(core, at) {
                    // The disk has something to do; the rest follows with the next call.
                    break;
                }
                continue;
            }
            if self.outstanding > 0 {
                break;
            }
            match self.step {
                Step::Loading => self.read_old(),
                Step::Reading => self.make_room(core),
                Step::Growing => self.step = Step::Composing(0),
                Step::Writing => {
                    self.step = Step::Flushing;
                    if core.options.plant != Some(Plant::SkipSync) {
                        self.ask(IoKind::Sync, Waits::Group);
                    }
                }
                Step::Flushing => self.publish(core),
                Step::Idle | Step::Composing(_) => {}
            }
        }
    }

    pub(super) fn complete(&mut self, core: &Core<B>, completion: Completion) {
        let Completion { id, buf, result } = completion;
        let Some(waits) = self.waits.remove(&id) else { return };
        if !matches!(waits, Waits::Checkpoint) {
            self.outstanding -= 1;
        }
        match (waits, result) {
            (Waits::Leaf { item, part, number, at }, Ok(())) => {
                let buf = buf.expect("a read gives its buffer back");
                self.loaded(core, item, part, number, at, &buf);
                self.spare.put(buf);
            }
            (Waits::Leaf { item, part, number, at }, Err(error)) => {
                let chunk = self.chunk_of(item, part);
                core.end(&format!(
                    "leaf {number} of chunk {chunk} (block {}) cannot be read: {error}",
                    at.block
                ));
            }
            (Waits::Old { item, index }, result) => {
                // What cannot be read is as good as corrupt: another replica has it.
                let buf = buf.filter(|_| result.is_ok());
                let Item::Write(work) = &mut self.items[item] else { return };
                let ptr = work.base.get(index);
                let chunk = work.op.update.chunk;
                let intact = |buf: &AlignedBuf| {
                    ptr.is_some_and(|ptr| core.believes() || is_intact(chunk, index, ptr, buf))
                };
                match buf.filter(intact) {
                    Some(buf) => {
                        work.old.insert(index, buf);
                    }
                    None => work.fate = Fate::Corrupt(index),
                }
            }
            (Waits::Grow(len, _), Ok(())) => {
                let mut shared = lock(&core.shared);
                let state = &mut shared.state;
                state.alloc.grow(u32::try_from(len / BLOCK_BYTES as u64).unwrap_or(u32::MAX));
                let pages = state.alloc.pages() as usize;
                state.bitmap.resize(pages, None);
            }
            (Waits::Grow(len, least), Err(error)) if error.kind() == io::ErrorKind::StorageFull => {
                if len > least {
                    // The step is for comfort: a disk with less room is used up all the same.
                    let have = u64::from(lock(&core.shared).state.alloc.blocks());
                    let less = have + (len / BLOCK_BYTES as u64 - have) / 2;
                    let len = (less * BLOCK_BYTES as u64).max(least);
                    self.ask(IoKind::Grow(len), Waits::Grow(len, least));
                } else {
                    self.full = true;
                }
            }
            (Waits::Grow(len, _), Err(error)) => {
                core.end(&format!("the volume cannot be extended to {len} bytes: {error}"));
            }
            (Waits::Group, Ok(())) => buf.into_iter().for_each(|buf| self.spare.put(buf)),
            (Waits::Checkpoint, Ok(())) => {
                buf.into_iter().for_each(|buf| self.spare.put(buf));
                if let Some(checkpoint) = &mut self.checkpoint {
                    checkpoint.completed();
                }
            }
            // Never again: after a failed write or flush nobody knows what is on the medium.
            (Waits::Group, Err(error)) => core.end(&format!("a write or flush failed: {error}")),
            (Waits::Checkpoint, Err(error)) => {
                core.end(&format!("a write or flush of a checkpoint failed: {error}"));
            }
        }
    }

    /// Takes as many operations as a group may have. False if there is nothing to begin with.
    fn begin_group(&mut self, core: &Core<B>, eager: bool) -> bool {
        // A frame takes less than this, so that a checkpoint finds the log half free.
        let frame_limit = self.log.bytes / 8;
        if self.log.place(frame_limit, frame_limit).is_none() && self.checkpoint.is_some() {
            // The checkpoint that runs makes room.
            return false;
        }
        let mut shared = lock(&core.shared);
        let urgent = shared.queue.iter().any(|op| !matches!(op, Op::Record(..)));
        if shared.queue.is_empty() || !(urgent || eager) {
            return false;
        }
        let (mut bytes, mut frame) = (0, 0u64);
        let mut chunks = HashSet::new();
        while let Some(op) = shared.queue.front() {
            if let Op::Write(write) = op {
                bytes += write.payload().len();
                frame += 128 + 16 * u64::from(write.blocks());
                // At most one version of a chunk at a time.
                if !chunks.insert(write.update.chunk) {
                    break;
                }
            } else {
                frame += match op {
                    Op::Remove(chunks) => 17 * chunks.len() as u64,
                    Op::Flush { page, .. } => {
                        64 + 32 * (page.channels.len() + page.sessions.len() + page.attempts.len()) as u64
                    }
                    _ => 32,
                };
            }
            let first = self.items.is_empty();
            if !first
                && (bytes > core.options.group_bytes || frame > frame_limit || self.items.len() >= GROUP_OPS)
            {
                break;
            }
            let Some(op) = shared.queue.pop_front() else { break };
            let number = self.items.len();
            let item = self.begin_item(&mut shared, op, number);
            self.items.push(item);
        }
        self.step = Step::Loading;
        true
    }

    fn begin_item(&mut self, shared: &mut Shared<B>, op: Op<B>, item: usize) -> Item<B> {
        match op {
            Op::Write(op) => {
                let entry = shared.state.index.get(op.update.chunk).cloned().unwrap_or_default();
                debug_assert!(
                    op.at_once || entry.version == op.base,
                    "a write on a base that is not committed"
                );
                let mut fate = Fate::Open;
                if op.version > MAX_VERSION {
                    fate = Fate::Refused(WriteError::Failed);
                }
                let mut leaves = BTreeMap::new();
                for number in op.leaves_needed(&entry) {
                    if let Some(leaf) = self.load(shared, item, 0, op.update.chunk, number) {
                        leaves.insert(number, leaf);
                    }
                }
                let base = Base { entry, leaves };
                Item::Write(Box::new(Work { op, base, plan: None, old: BTreeMap::new(), fate }))
            }
            Op::Record(record, freed) => Item::Record(record, freed),
            Op::Remove(chunks) => {
                let mut parts = Vec::new();
                for (part, chunk) in chunks.into_iter().enumerate() {
                    let count = shared.state.index.get(chunk).map_or(0, |e| e.leaves().len() as u32);
                    let leaves = (0..count)
                        .filter_map(|n| Some((n, self.load(shared, item, part, chunk, n)?)))
                        .collect();
                    parts.push((chunk, leaves));
                }
                Item::Remove(parts)
            }
            Op::Flush { id, page } => Item::Flush(id, page),
            Op::Close => Item::Mark,
        }
    }

    /// A leaf from memory, or `None` and a request for it.
    fn load(
        &mut self,
        shared: &mut Shared<B>,
        item: usize,
        part: usize,
        chunk: ChunkId,
        number: u32,
    ) -> Option<Arc<Leaf>> {
        match shared.state.leaf(chunk, number) {
            LeafAt::Hole => Some(Arc::default()),
            LeafAt::Loaded(leaf) => Some(leaf),
            LeafAt::Page(at) => {
                let buf = self.spare.take(BLOCK_BYTES);
                let offset = u64::from(at.block) * BLOCK_BYTES as u64;
                self.ask(IoKind::Read { offset, buf }, Waits::Leaf { item, part, number, at });
                None
            }
        }
    }

    fn chunk_of(&self, item: usize, part: usize) -> ChunkId {
        match &self.items[item] {
            Item::Write(work) => work.op.update.chunk,
            Item::Remove(parts) => parts[part].0,
            _ => unreachable!("only writes and removals load leaves"),
        }
    }

    fn loaded(&mut self, core: &Core<B>, item: usize, part: usize, number: u32, at: PagePtr, page: &[u8]) {
        let chunk = self.chunk_of(item, part);
        let decoded = match page_crc(PageKind::Leaf(chunk, number), page) == at.crc {
            true => Leaf::decode(page).map_err(|e| e.to_string()),
            false => Err("it fails its checksum".to_owned()),
        };
        let leaf = match decoded {
            Ok(leaf) => Arc::new(leaf),
            Err(why) => {
                // Nothing tells which blocks the chunk has: the target cannot go on with it.
                return core.end(&format!("leaf {number} of chunk {chunk} (block {}): {why}", at.block));
            }
        };
        lock(&core.shared).state.cache.put((chunk, number), at, Arc::clone(&leaf));
        match &mut self.items[item] {
            Item::Write(work) => work.base.leaves.insert(number, leaf),
            Item::Remove(parts) => parts[part].1.insert(number, leaf),
            _ => None,
        };
    }

    fn read_old(&mut self) {
        let mut wanted = Vec::new();
        for (item, entry) in self.items.iter_mut().enumerate() {
            let Item::Write(work) = entry else { continue };
            if matches!(work.fate, Fate::Open) {
                let plan = plan(&work.base, &work.op);
                wanted.extend(plan.edits.iter().filter_map(|e| Some((item, e.index, e.old?.block))));
                work.plan = Some(plan);
            }
        }
        for (item, index, block) in wanted {
            let buf = self.spare.take(BLOCK_BYTES);
            let offset = u64::from(block) * BLOCK_BYTES as u64;
            self.ask(IoKind::Read { offset, buf }, Waits::Old { item, index });
        }
        self.step = Step::Reading;
    }

    /// Blocks that must stay free so that a checkpoint always succeeds.
    pub(super) fn reserve(&self, shared: &Shared<B>) -> u32 {
        let root: u32 = shared.state.root.iter().map(|e| e.count).sum();
        let log = (self.log.used() / BLOCK_BYTES as u64) as u32;
        shared.state.checkpoint_blocks() + self.group_pages + 2 * root + log + SPARE_BLOCKS
    }

    fn make_room(&mut self, core: &Core<B>) {
        self.step = Step::Composing(0);
        self.full = false;
        let (mut wanted, mut pages) = (0, 0);
        for item in &self.items {
            let Item::Write(work) = item else { continue };
            let Some(plan) = &work.plan else { continue };
            wanted += plan.edits.len() as u64;
            pages += plan.leaves_changed(&work.base) as u64 + 1;
        }
        if wanted == 0 {
            return;
        }
        let mut shared = lock(&core.shared);
        let reserve = u64::from(self.reserve(&shared)) + pages;
        let state = &mut shared.state;
        let short = (wanted + reserve).saturating_sub(u64::from(state.alloc.available()));
        if short == 0 {
            return;
        }
        let have = u64::from(state.alloc.blocks());
        let step = (core.options.grow_bytes / BLOCK_BYTES as u64).max(short);
        let want = (have + step).min(u64::from(core.most_blocks()));
        if want > have {
            self.step = Step::Growing;
            let bytes = |blocks: u64| blocks * BLOCK_BYTES as u64;
            let (len, least) = (bytes(want), bytes(want.min(have + short)));
            self.ask(IoKind::Grow(len), Waits::Grow(len, least));
        } else {
            self.full = true;
        }
    }

    /// Composes items from `at` on. True if the disk got something to do and more is left.
    fn compose(&mut self, core: &Core<B>, mut at: usize) -> bool {
        let mut bytes = 0;
        while at < self.items.len() {
            if bytes >= COMPOSE_BYTES {
                self.step = Step::Composing(at);
                return true;
            }
            bytes += self.compose_item(core, at);
            at += 1;
        }
        if self.body.is_empty() {
            self.step = Step::Flushing;
            return false;
        }
        let frame = format::frame(self.seed, self.log.sequence, &self.body);
        let len = frame.len() as u64;
        // What stays free is for the frames of openings, should one power cut follow another.
        let Some(place) = self.log.place(len, self.log.bytes / 16) else {
            core.end("the log has no room for a group: no checkpoint could be written, the disk is full");
            return false;
        };
        let mut buf = self.spare.take(frame.len().next_multiple_of(self.log.sector as usize));
        buf[..frame.len()].copy_from_slice(&frame);
        buf[frame.len()..].fill(0);
        self.frame = Some(Frame { at: place, len });
        self.ask(IoKind::Write { offset: self.log.offset(place), buf }, Waits::Group);
        self.step = Step::Writing;
        false
    }

    /// Bytes that it gave to the disk.
    fn compose_item(&mut self, core: &Core<B>, at: usize) -> usize {
        let reserve = self.reserve(&lock(&core.shared));
        let work = match &mut self.items[at] {
            Item::Write(work) => work,
            Item::Record(record, _) => {
                record.encode(&mut self.body);
                return 0;
            }
            Item::Remove(parts) => {
                for (chunk, _) in parts.iter() {
                    LogRecord::Remove { chunk: *chunk }.encode(&mut self.body);
                }
                return 0;
            }
            Item::Flush(_, page) => {
                LogRecord::Page(page.clone()).encode(&mut self.body);
                return 0;
            }
            Item::Mark => {
                LogRecord::Mark.encode(&mut self.body);
                return 0;
            }
        };
        let (Fate::Open, Some(plan)) = (&work.fate, &work.plan) else { return 0 };
        let count = plan.edits.len() as u32;
        let taken = {
            let mut shared = lock(&core.shared);
            let alloc = &mut shared.state.alloc;
            // Removals must go through on a full disk: they need no block and give some back.
            if count > 0 && alloc.available() < count + reserve {
                None
            } else {
                alloc.take(count, plan.near(&work.base))
            }
        };
        let Some(taken) = taken else {
            work.fate = Fate::Refused(WriteError::NoSpace);
            return 0;
        };
        let spare = &mut self.spare;
        let composed = plan.compose(&work.base, &work.op, &taken, &work.old, |len| spare.take(len));
        LogRecord::Pending(composed.record.clone()).encode(&mut self.body);
        let leaf = |number: u32| work.base.leaves.get(&number).cloned().unwrap_or_default();
        let next = Next::new(composed.record, &work.base.entry, leaf);
        self.group_pages += next.leaf_count() as u32 + 1;
        work.fate = Fate::Next(Box::new(next));
        work.old.clear();
        let mut bytes = 0;
        for (block, buf) in composed.writes {
            bytes += buf.len();
            let offset = u64::from(block) * BLOCK_BYTES as u64;
            self.ask(IoKind::Write { offset, buf }, Waits::Group);
        }
        bytes
    }

    fn publish(&mut self, core: &Core<B>) {
        if let Some(Frame { at, len }) = self.frame.take() {
            self.log.advance(at, len);
        }
        let mut shared = lock(&core.shared);
        let state = &mut shared.state;
        for item in self.items.drain(..) {
            let freed = match item {
                Item::Write(work) => {
                    let Work { op: WriteOp { id, base, version, update, at_once }, fate, .. } = *work;
                    let chunk = update.chunk;
                    match fate {
                        Fate::Next(next) => {
                            self.done.push(Done::Written { chunk, id, result: Ok(next.meta()) });
                            if at_once { state.set_committed(*next) } else { state.set_pending(*next) }
                        }
                        Fate::Corrupt(index) => {
                            self.done.push(Done::Corrupt { id, base, version, update, at_once, index });
                            Vec::new()
                        }
                        Fate::Refused(why) => {
                            self.done.push(Done::Written { chunk, id, result: Err(why) });
                            Vec::new()
                        }
                        Fate::Open => unreachable!("every write was composed"),
                    }
                }
                Item::Record(_, freed) => freed,
                Item::Remove(parts) => {
                    parts.into_iter().flat_map(|(chunk, leaves)| state.remove(chunk, &leaves)).collect()
                }
                Item::Flush(id, page) => {
                    state.merge(&page);
                    self.done.push(Done::Flushed { id, ok: true });
                    Vec::new()
                }
                Item::Mark => Vec::new(),
            };
            if core.options.plant == Some(Plant::ReuseUnderReads) {
                state.alloc.give_back(&freed);
            } else {
                state.alloc.retire(freed);
            }
            if core.options.plant == Some(Plant::ReusePages) {
                let pages = std::mem::take(&mut state.later);
                state.alloc.retire(pages);
            }
        }
        self.body.clear();
        self.group_pages = 0;
        self.step = Step::Idle;
    }

    /// The target has failed: nobody waits any longer.
    fn give_up(&mut self, core: &Core<B>) {
        let failed = |op: WriteOp<B>| Done::Written {
            chunk: op.update.chunk,
            id: op.id,
            result: Err(WriteError::Failed),
        };
        for item in self.items.drain(..) {
            match item {
                Item::Write(work) => self.done.push(failed(work.op)),
                Item::Flush(id, _) => self.done.push(Done::Flushed { id, ok: false }),
                _ => {}
            }
        }
        let queue = std::mem::take(&mut lock(&core.shared).queue);
        for op in queue {
            match op {
                Op::Write(op) => self.done.push(failed(op)),
                Op::Flush { id, .. } => self.done.push(Done::Flushed { id, ok: false }),
                _ => {}
            }
        }
        self.step = Step::Idle;
        self.checkpoint = None;
        self.waits.clear();
        self.outstanding = 0;
        self.out.clear();
        self.body.clear();
        self.frame = None;
    }
}
