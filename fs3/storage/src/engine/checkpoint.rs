//! Checkpoints: the state at one point of the log, written beside the groups that go on.
//!
//! Between two groups, what changed since the last checkpoint is frozen: leaves, pages of the table
//! of chunks, pages of the bitmap, and the root (where all pages are, exactly-once records, pending
//! updates). Every page goes to a free block, never over its predecessor. Then:
//!
//! 1. write all pages, flush;
//! 2. write the superblock (the one of two that is older), flush;
//! 3. the log behind the checkpoint's point and the replaced pages are free.
//!
//! *Why this order.* The superblock must not lead to pages that a power cut takes back, so they are
//! flushed first. Until the new superblock is durable the old one counts, and replay from it reads
//! its pages and the log from its point on; so neither is reused before step 3.
//!
//! *Blocks on their way out.* A block may be marked as used in memory though nothing in the frozen
//! state leads to it: its freeing record is not durable yet, a read holds it, or it is a page that
//! this checkpoint replaces. The stored bitmap has all of these free, since a target that is opened
//! from this checkpoint has no reads and begins with the frozen state.

use super::alloc::PAGE_BLOCKS;
use super::buffer::AlignedBuf;
use super::core::{Core, Op, Plant, Shared};
use super::disk::IoKind;
use super::format::{LogRecord, PageKind, PagePtr, Superblock, page_crc};
use super::state::DirtyLeaf;
use super::writer::Writer;
use super::{BLOCK_BYTES, Extent};
use firefly_types::lock;
use std::collections::{BTreeSet, VecDeque};

/// Bytes of a block of the root that are the root's; the rest leads to the next block.
pub(super) const ROOT_PAYLOAD: usize = BLOCK_BYTES - 8;
/// Entries of a page of exactly-once records.
const RECORDS: usize = 4096;
/// Requests of a checkpoint that the disk has at a time: few, groups come first.
const IN_FLIGHT: usize = 4;
/// Bytes of one request: pages that lie side by side share one.
const REQUEST_BYTES: usize = 256 << 10;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Pages,
    PagesFlush,
    Superblock,
    SuperblockFlush,
}

/// A checkpoint on its way to the disk.
pub(super) struct Checkpoint {
    step: Step,
    todo: VecDeque<(u64, AlignedBuf)>,
    in_flight: usize,
    superblock: Superblock,
    /// Free once it is durable.
    replaced: Vec<Extent>,
}

impl Checkpoint {
    pub(super) fn completed(&mut self) {
        self.in_flight -= 1;
    }
}

/// Hands out taken blocks one by one.
struct Places(VecDeque<Extent>);

impl Places {
    fn next(&mut self) -> u32 {
        let first = self.0.front_mut().expect("as many blocks were taken as there are pages");
        let block = first.start;
        first.start += 1;
        first.count -= 1;
        if first.count == 0 {
            self.0.pop_front();
        }
        block
    }
}

/// Pages and where they go.
#[derive(Default)]
struct Pages(Vec<(u32, Vec<u8>)>);

impl Pages {
    fn put(&mut self, block: u32, kind: PageKind, mut page: Vec<u8>) -> PagePtr {
        page.resize(BLOCK_BYTES, 0);
        let crc = page_crc(kind, &page);
        self.0.push((block, page));
        PagePtr { block, crc }
    }

    /// Requests, neighbours together.
    fn requests(mut self) -> VecDeque<(u64, AlignedBuf)> {
        self.0.sort_by_key(|(block, _)| *block);
        let mut requests = VecDeque::new();
        let mut rest = &self.0[..];
        while let Some((first, _)) = rest.first() {
            let most = REQUEST_BYTES / BLOCK_BYTES;
            let run = rest.iter().take(most).zip(*first..).take_while(|((block, _), at)| block == at).count();
            let mut buf = AlignedBuf::zeroed(run * BLOCK_BYTES);
            for (out, (_, page)) in buf.chunks_exact_mut(BLOCK_BYTES).zip(&rest[..run]) {
                out.copy_from_slice(page);
            }
            requests.push_back((u64::from(*first) * BLOCK_BYTES as u64, buf));
            rest = &rest[run..];
        }
        requests
    }
}

impl<B: AsRef<[u8]>> Writer<B> {
    pub(super) fn is_checkpoint_due(&self, core: &Core<B>) -> bool {
        let cache = core.options.cache_bytes / 2;
        self.checkpoint.is_none()
            && (self.log.used() > self.log.bytes / 2
                || self.generation == 0
                || lock(&core.shared).state.dirty_bytes() > cache)
    }

    /// Freezes the state and prepares all pages. False if there is no room for them.
    pub(super) fn begin_checkpoint(&mut self, core: &Core<B>) -> bool {
        let mut shared = lock(&core.shared);
        let Shared { state, queue, .. } = &mut *shared;
        let records = self.root_records(state);
        // What the root needs beyond what is counted already, and the root's own old blocks.
        let bound = state.checkpoint_blocks() as usize
            + (records.len() + 16 + 8 * (state.index.pages() + state.alloc.pages() as usize + 8))
                .div_ceil(ROOT_PAYLOAD)
            + 4;
        if (state.alloc.available() as usize) < bound {
            return false;
        }
        let take = |alloc: &mut super::alloc::Allocator, count: usize| {
            let taken = alloc.take(count as u32, None).expect("room for all pages was found before");
            Places(taken.into())
        };
        let mut pages = Pages::default();
        let mut replaced = std::mem::take(&mut state.later);

        let dirty = state.take_all_dirty();
        let mut places = take(&mut state.alloc, dirty.len());
        for ((id, number), DirtyLeaf { leaf, was }) in dirty {
            let at = pages.put(places.next(), PageKind::Leaf(id, number), leaf.encode());
            was.into_iter().for_each(|was| Extent::add(&mut replaced, was.block));
            let slot = state.index.leaves_mut(id).and_then(|leaves| leaves.get_mut(number as usize));
            *slot.expect("a changed leaf belongs to a chunk") = at;
            state.writing.insert((id, number), (at, leaf));
        }

        let mut places = take(&mut state.alloc, state.index.dirty_pages());
        let old = state.index.write_dirty(|page| pages.put(places.next(), PageKind::Index, page));
        old.iter().for_each(|at| Extent::add(&mut replaced, at.block));

        let root_len = 16 + 8 * (state.index.pages() + state.alloc.pages() as usize) + records.len();
        let root_count = root_len.div_ceil(ROOT_PAYLOAD);
        let root_taken = take(&mut state.alloc, root_count);
        let root_extents = root_taken.0.iter().copied().collect();
        replaced.append(&mut std::mem::replace(&mut state.root, root_extents));

        // Blocks that are marked and that the frozen state does not lead to.
        let mut leaving: Vec<Extent> = state.alloc.retired().chain(replaced.iter().copied()).collect();
        for op in queue.iter() {
            if let Op::Record(_, freed) = op {
                leaving.extend(freed);
            }
        }
        let pages_of = |extents: &[Extent]| -> Vec<u32> {
            extents
                .iter()
                .flat_map(|e| e.start / PAGE_BLOCKS..=(e.start + e.count - 1) / PAGE_BLOCKS)
                .collect()
        };
        let mut changed: BTreeSet<u32> = state.alloc.take_dirty();
        changed.extend(pages_of(&leaving));
        // Writing a page of the bitmap takes a block and gives one back, which may change another.
        let (mut seen, mut taken) = (BTreeSet::new(), VecDeque::new());
        while seen.len() < changed.len() {
            let new: Vec<u32> = changed.difference(&seen).copied().collect();
            for page in &new {
                if let Some(old) = state.bitmap[*page as usize] {
                    let old = Extent { start: old.block, count: 1 };
                    changed.extend(pages_of(&[old]));
                    leaving.push(old);
                    replaced.push(old);
                }
            }
            taken.extend(take(&mut state.alloc, new.len()).0);
            seen.extend(new);
            changed.extend(state.alloc.take_dirty());
        }
        let mut places = Places(taken);
        let leak = core.options.plant == Some(Plant::LeakLeaving);
        let mut images: Vec<(u32, Vec<u8>)> = changed.iter().map(|p| (*p, state.alloc.page(*p))).collect();
        for extent in leaving.iter().filter(|_| !leak) {
            for block in extent.start..extent.start + extent.count {
                let page = block / PAGE_BLOCKS;
                if let Ok(at) = images.binary_search_by_key(&page, |(p, _)| *p) {
                    let bit = block % PAGE_BLOCKS;
                    images[at].1[bit as usize / 8] &= !(1 << (bit % 8));
                }
            }
        }
        for (page, image) in images {
            state.bitmap[page as usize] = Some(pages.put(places.next(), PageKind::Bitmap(page), image));
        }

        let mut root = Vec::with_capacity(root_len);
        root.extend((state.index.pages() as u32).to_le_bytes());
        root.extend((state.bitmap.len() as u32).to_le_bytes());
        root.extend((records.len() as u64).to_le_bytes());
        for at in state.index.places().chain(state.bitmap.iter().flatten().copied()) {
            root.extend(at.block.to_le_bytes());
            root.extend(at.crc.to_le_bytes());
        }
        root.extend(records);
        assert_eq!(root.len(), root_len, "the root is as long as was planned");
        let root_ptr = put_root(&mut pages, root_taken, &root);

        let superblock = Superblock {
            header: core.header,
            sector_bytes: self.log.sector as u32,
            generation: self.generation + 1,
            log_first: self.log.first,
            log_blocks: self.log_blocks(),
            log_offset: self.log.tail,
            log_sequence: self.log.sequence,
            root: root_ptr,
            root_bytes: root_len as u64,
        };
        if core.options.plant == Some(Plant::ForgetLogEarly) {
            (self.log.head, self.log.head_sequence) = (superblock.log_offset, superblock.log_sequence);
        }
        let todo = pages.requests();
        let step = Step::Pages;
        self.checkpoint = Some(Checkpoint { step, todo, in_flight: 0, superblock, replaced });
        true
    }

    /// Exactly-once records and pending updates, as records of the log.
    fn root_records(&self, state: &super::state::State) -> Vec<u8> {
        let mut out = Vec::new();
        for page in state.records.pages(RECORDS, state.version_floor) {
            LogRecord::Page(page).encode(&mut out);
        }
        for next in state.pending.values() {
            LogRecord::Pending(next.record.clone()).encode(&mut out);
        }
        out
    }

    /// Gives the disk what may be asked of it now. True if the checkpoint has ended.
    pub(super) fn pump_checkpoint(&mut self, core: &Core<B>) -> bool {
        loop {
            let Some(checkpoint) = &mut self.checkpoint else { return false };
            if checkpoint.step == Step::Pages
                && checkpoint.in_flight < IN_FLIGHT
                && let Some((offset, buf)) = checkpoint.todo.pop_front()
            {
                checkpoint.in_flight += 1;
                self.ask_for_checkpoint(IoKind::Write { offset, buf });
                continue;
            }
            if checkpoint.in_flight > 0 {
                return false;
            }
            let next = match checkpoint.step {
                Step::Pages if core.options.plant == Some(Plant::SuperblockFirst) => Step::Superblock,
                Step::Pages => Step::PagesFlush,
                Step::PagesFlush => Step::Superblock,
                Step::Superblock => Step::SuperblockFlush,
                Step::SuperblockFlush => {
                    self.end_checkpoint(core);
                    return true;
                }
            };
            checkpoint.step = next;
            checkpoint.in_flight = 1;
            let kind = match next {
                Step::Superblock => {
                    let bytes = checkpoint.superblock.encode();
                    let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
                    buf[..bytes.len()].copy_from_slice(&bytes);
                    let slot = checkpoint.superblock.generation % 2;
                    IoKind::Write { offset: slot * BLOCK_BYTES as u64, buf }
                }
                _ => IoKind::Sync,
            };
            self.ask_for_checkpoint(kind);
        }
    }

    fn end_checkpoint(&mut self, core: &Core<B>) {
        let Some(checkpoint) = self.checkpoint.take() else { return };
        let mut shared = lock(&core.shared);
        let state = &mut shared.state;
        // A read that planned with the old pages holds them by its epoch.
        state.alloc.retire(checkpoint.replaced);
        for (key, (at, leaf)) in std::mem::take(&mut state.writing) {
            state.cache.put(key, at, leaf);
        }
        self.generation = checkpoint.superblock.generation;
        self.log.head = checkpoint.superblock.log_offset;
        self.log.head_sequence = checkpoint.superblock.log_sequence;
    }
}

/// The root in its blocks, each leading to the next: the last is made first.
fn put_root(pages: &mut Pages, mut places: Places, root: &[u8]) -> PagePtr {
    let parts: Vec<&[u8]> = root.chunks(ROOT_PAYLOAD).collect();
    let blocks: Vec<u32> = parts.iter().map(|_| places.next()).collect();
    let mut next = PagePtr { block: 0, crc: 0 };
    for (part, block) in parts.into_iter().zip(blocks).rev() {
        let mut page = next.block.to_le_bytes().to_vec();
        page.extend(next.crc.to_le_bytes());
        page.extend(part);
        next = pages.put(block, PageKind::Root, page);
    }
    next
}
