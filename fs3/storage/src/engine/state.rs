//! What a target holds: what the log's records add up to. Replay and the live engine use the same
//! transitions.

use super::Extent;
use super::alloc::Allocator;
use super::cache::{LeafCache, LeafKey};
use super::format::{Change, FormatError, HOLE, PagePtr, PendingRecord, damaged};
use super::index::{DIRTY, DIRTY_LEAF, Entry, Index, Map, NO_LEAF, blocks_of, leaves_of};
use super::leaf::{LEAF_BLOCKS, Leaf};
use firefly_types::ChunkId;
use fs3_core::target::{Meta, RecordPage, Records, Recovered, RecoveredPending};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// Where a leaf is.
#[derive(Clone)]
pub(super) enum LeafAt {
    /// All holes.
    Hole,
    /// In memory.
    Loaded(Arc<Leaf>),
    /// On disk.
    Page(PagePtr),
}

/// A leaf that the last checkpoint does not have.
pub(super) struct DirtyLeaf {
    pub(super) leaf: Arc<Leaf>,
    /// Where the last checkpoint has its predecessor.
    pub(super) was: Option<PagePtr>,
}

/// A version beside the committed one.
#[derive(Clone, Debug)]
pub(super) struct Next {
    pub(super) record: PendingRecord,
    /// The leaves that it changes, as they will be.
    leaves: Vec<(u32, Arc<Leaf>)>,
    /// Blocks of the volume that only it holds.
    pub(super) fresh: Vec<Extent>,
    /// Blocks that only the committed version holds.
    pub(super) replaced: Vec<Extent>,
}

/// Leaves of the committed map that a record changes or drops: those must be at hand to apply it.
pub(super) fn leaves_touched(record: &PendingRecord, base: &Entry) -> BTreeSet<u32> {
    let old = base.leaves().len() as u32;
    if record.removes || record.whole {
        return (0..old).collect();
    }
    let mut touched = BTreeSet::new();
    for change in &record.changes {
        let last = (change.first + change.count - 1) / LEAF_BLOCKS;
        touched.extend((change.first / LEAF_BLOCKS..=last).filter(|leaf| *leaf < old));
    }
    if record.length < base.length {
        // The leaf that is cut, and those behind it.
        touched.extend(blocks_of(record.length) / LEAF_BLOCKS..old);
    }
    touched
}

impl Next {
    /// Applies a record to the committed map; `leaf` gives the leaves that [`leaves_touched`] names.
    pub(super) fn new(record: PendingRecord, base: &Entry, leaf: impl Fn(u32) -> Arc<Leaf>) -> Self {
        let inline = match &base.map {
            Map::Block(Some(ptr)) => {
                let mut leaf = Leaf::default();
                leaf.set(0, ptr.block, ptr.version, &[ptr.crc]);
                Some(Arc::new(leaf))
            }
            _ => None,
        };
        let old_leaves = base.leaves().len().max(usize::from(inline.is_some())) as u32;
        let old = |number: u32| match (&inline, number) {
            (Some(inline), 0) => Arc::clone(inline),
            _ if number < old_leaves => leaf(number),
            _ => Arc::default(),
        };
        let length = if record.removes { 0 } else { record.length };
        let blocks = blocks_of(length);
        let mut touched = leaves_touched(&record, base);
        touched.extend(
            record.changes.iter().flat_map(|c| c.first / LEAF_BLOCKS..=(c.first + c.count - 1) / LEAF_BLOCKS),
        );
        // A chunk of one block has its pointer in the table: it moves when the chunk grows.
        touched.extend(
            (inline.is_some() && (blocks > 1 || record.whole || record.removes || blocks == 0)).then_some(0),
        );
        let (mut leaves, mut fresh, mut replaced) = (Vec::new(), Vec::new(), Vec::new());
        for number in touched {
            let begin = number * LEAF_BLOCKS;
            let before = old(number);
            let mut after = if record.whole || begin >= blocks { Leaf::default() } else { (*before).clone() };
            if begin < blocks && blocks < begin + LEAF_BLOCKS {
                after.clear(blocks - begin..LEAF_BLOCKS);
            }
            for change in &record.changes {
                let from = change.first.max(begin);
                let to = (change.first + change.count).min(begin + LEAF_BLOCKS);
                if from < to {
                    apply(&mut after, change, from, to, record.version);
                }
            }
            before.blocks_without(&after, &mut replaced);
            if begin < blocks {
                leaves.push((number, Arc::new(after)));
            }
        }
        for change in record.changes.iter().filter(|c| c.block != HOLE) {
            fresh.push(Extent { start: change.block, count: change.count });
        }
        Self { record, leaves, fresh, replaced }
    }

    pub(super) fn meta(&self) -> Meta {
        let record = &self.record;
        match record.removes {
            true => Meta { version: record.version, ..Meta::default() },
            false => Meta { version: record.version, length: record.length, digest: record.digest },
        }
    }

    pub(super) fn leaf_count(&self) -> usize {
        self.leaves.len()
    }
}

fn apply(leaf: &mut Leaf, change: &Change, from: u32, to: u32, version: u64) {
    let begin = from / LEAF_BLOCKS * LEAF_BLOCKS;
    if change.block == HOLE {
        leaf.clear(from - begin..to - begin);
    } else {
        let skip = from - change.first;
        let crcs = &change.crcs[skip as usize..(to - change.first) as usize];
        leaf.set(from - begin, change.block + skip, version, crcs);
    }
}

/// Everything that a target holds.
pub(super) struct State {
    pub(super) index: Index,
    pub(super) dirty: BTreeMap<LeafKey, DirtyLeaf>,
    dirty_bytes: usize,
    /// Leaves that the running checkpoint writes: where they will be.
    pub(super) writing: HashMap<LeafKey, (PagePtr, Arc<Leaf>)>,
    pub(super) cache: LeafCache,
    pub(super) pending: BTreeMap<ChunkId, Next>,
    /// Leaves that they change, all together.
    pending_leaves: usize,
    pub(super) records: Records,
    pub(super) version_floor: u64,
    pub(super) alloc: Allocator,
    /// Pages of the last checkpoint that the state no longer needs. Replay needs them until the
    /// next checkpoint is durable.
    pub(super) later: Vec<Extent>,
    /// Where the last checkpoint has the pages of the bitmap, and its root.
    pub(super) bitmap: Vec<Option<PagePtr>>,
    pub(super) root: Vec<Extent>,
}

impl State {
    pub(super) fn new(alloc: Allocator, cache_bytes: usize) -> Self {
        Self {
            index: Index::default(),
            dirty: BTreeMap::new(),
            dirty_bytes: 0,
            writing: HashMap::new(),
            cache: LeafCache::new(cache_bytes),
            pending: BTreeMap::new(),
            pending_leaves: 0,
            records: Records::default(),
            version_floor: 0,
            bitmap: vec![None; alloc.pages() as usize],
            alloc,
            later: Vec::new(),
            root: Vec::new(),
        }
    }

    pub(super) fn dirty_bytes(&self) -> usize {
        self.dirty_bytes
    }

    /// Where a leaf of a committed chunk is.
    pub(super) fn leaf(&mut self, id: ChunkId, number: u32) -> LeafAt {
        let Some(entry) = self.index.get(id) else { return LeafAt::Hole };
        if let (Map::Block(Some(ptr)), 0) = (&entry.map, number) {
            let mut leaf = Leaf::default();
            leaf.set(0, ptr.block, ptr.version, &[ptr.crc]);
            return LeafAt::Loaded(Arc::new(leaf));
        }
        let at = entry.leaves().get(number as usize).copied().unwrap_or(NO_LEAF);
        match at.block {
            HOLE => LeafAt::Hole,
            DIRTY => LeafAt::Loaded(Arc::clone(&self.dirty[&(id, number)].leaf)),
            _ => self.leaf_page(id, number, at),
        }
    }

    /// The leaf that lies, or will lie, at `at`.
    pub(super) fn leaf_page(&mut self, id: ChunkId, number: u32, at: PagePtr) -> LeafAt {
        if let Some((_, leaf)) = self.writing.get(&(id, number)).filter(|(place, _)| *place == at) {
            return LeafAt::Loaded(Arc::clone(leaf));
        }
        self.cache.get((id, number), at).map_or(LeafAt::Page(at), LeafAt::Loaded)
    }

    /// Where the leaf of a chunk's pending version is.
    pub(super) fn pending_leaf(&mut self, id: ChunkId, number: u32) -> LeafAt {
        let Some(next) = self.pending.get(&id) else { return LeafAt::Hole };
        if let Ok(at) = next.leaves.binary_search_by_key(&number, |(n, _)| *n) {
            return LeafAt::Loaded(Arc::clone(&next.leaves[at].1));
        }
        if next.record.whole { LeafAt::Hole } else { self.leaf(id, number) }
    }

    fn put_dirty(&mut self, key: LeafKey, leaf: Arc<Leaf>, was: Option<PagePtr>) {
        self.dirty_bytes += leaf.memory();
        self.dirty.insert(key, DirtyLeaf { leaf, was });
    }

    fn take_dirty(&mut self, key: LeafKey) -> Option<DirtyLeaf> {
        let old = self.dirty.remove(&key)?;
        self.dirty_bytes -= old.leaf.memory();
        Some(old)
    }

    /// All changed leaves; a checkpoint writes them.
    pub(super) fn take_all_dirty(&mut self) -> BTreeMap<LeafKey, DirtyLeaf> {
        self.dirty_bytes = 0;
        std::mem::take(&mut self.dirty)
    }

    /// Forgets the leaf; where the last checkpoint has it, if it has.
    fn unlink(&mut self, key: LeafKey, at: PagePtr) -> Option<PagePtr> {
        match at.block {
            HOLE => None,
            DIRTY => self.take_dirty(key).and_then(|d| d.was),
            _ => Some(at),
        }
    }

    fn drop_leaf(&mut self, key: LeafKey, at: PagePtr) {
        if let Some(at) = self.unlink(key, at) {
            Extent::add(&mut self.later, at.block);
        }
    }

    // Each transition returns the blocks that nothing points to any more.

    fn take_pending(&mut self, id: ChunkId) -> Option<Next> {
        let next = self.pending.remove(&id)?;
        self.pending_leaves -= next.leaves.len();
        Some(next)
    }

    pub(super) fn set_pending(&mut self, next: Next) -> Vec<Extent> {
        let freed = self.take_pending(next.record.chunk).map(|old| old.fresh).unwrap_or_default();
        self.pending_leaves += next.leaves.len();
        self.pending.insert(next.record.chunk, next);
        freed
    }

    pub(super) fn drop_pending(&mut self, id: ChunkId, version: u64) -> Vec<Extent> {
        match self.pending.get(&id) {
            Some(next) if next.record.version == version => {}
            _ => return Vec::new(),
        }
        self.take_pending(id).map(|old| old.fresh).unwrap_or_default()
    }

    pub(super) fn commit(&mut self, id: ChunkId, version: u64) -> Vec<Extent> {
        match self.pending.get(&id) {
            Some(next) if next.record.version == version => {}
            _ => return Vec::new(),
        }
        self.take_pending(id).map(|next| self.set_committed(next)).unwrap_or_default()
    }

    /// `next` takes effect at once.
    pub(super) fn set_committed(&mut self, next: Next) -> Vec<Extent> {
        let Next { record, leaves, replaced, .. } = next;
        let id = record.chunk;
        let mut freed = replaced;
        // A pending version (there is none in normal operation) would refer to the old map.
        freed.extend(self.take_pending(id).map(|lost| lost.fresh).unwrap_or_default());
        self.records.commit(&record.context, record.version, if record.removes { 0 } else { record.length });
        if record.removes {
            self.version_floor = self.version_floor.max(record.version);
            self.forget(id);
            return freed;
        }
        let old = self.index.get(id).cloned().unwrap_or_default();
        let kept: &[PagePtr] = if record.whole { &[] } else { old.leaves() };
        let mut map = Entry::map_for(record.length, kept);
        let stay = if record.whole || matches!(map, Map::Block(_)) { 0 } else { leaves_of(record.length) };
        for (number, at) in old.leaves().iter().enumerate().skip(stay as usize) {
            self.drop_leaf((id, number as u32), *at);
        }
        let mut entry = Entry { version: record.version, length: record.length, digest: record.digest, map };
        if blocks_of(record.length) <= 1 {
            // An untouched pointer stays, if the chunk had just one block before.
            map = match (&old.map, leaves.first()) {
                (_, Some((_, leaf))) => Map::Block(leaf.get(0)),
                (Map::Block(ptr), None) if !record.whole && record.length > 0 => Map::Block(*ptr),
                _ => Map::Block(None),
            };
            entry.map = map;
        } else {
            for (number, leaf) in leaves {
                let key = (id, number);
                let slot = &mut entry.leaves_mut()[number as usize];
                let at = std::mem::replace(slot, if leaf.is_empty() { NO_LEAF } else { DIRTY_LEAF });
                let was = self.unlink(key, at);
                if leaf.is_empty() {
                    was.into_iter().for_each(|at| Extent::add(&mut self.later, at.block));
                } else {
                    self.put_dirty(key, leaf, was);
                }
            }
        }
        self.index.set(id, entry);
        freed
    }

    fn forget(&mut self, id: ChunkId) {
        if let Some(old) = self.index.remove(id) {
            for (number, at) in old.leaves().iter().enumerate() {
                self.drop_leaf((id, number as u32), *at);
            }
        }
    }

    /// Removes a chunk whose leaves are given.
    pub(super) fn remove(&mut self, id: ChunkId, leaves: &BTreeMap<u32, Arc<Leaf>>) -> Vec<Extent> {
        let mut freed = self.take_pending(id).map(|next| next.fresh).unwrap_or_default();
        let Some(entry) = self.index.get(id) else { return freed };
        self.version_floor = self.version_floor.max(entry.version);
        if let Map::Block(Some(ptr)) = &entry.map {
            Extent::add(&mut freed, ptr.block);
        }
        let nothing = Leaf::default();
        leaves.values().for_each(|leaf| leaf.blocks_without(&nothing, &mut freed));
        self.forget(id);
        freed
    }

    pub(super) fn merge(&mut self, page: &RecordPage) {
        self.records.merge(page);
        self.version_floor = self.version_floor.max(page.version_floor);
    }

    /// Checks that a record read from disk fits what came before it.
    pub(super) fn check_base(&self, record: &PendingRecord) -> Result<(), FormatError> {
        let committed = self.index.get(record.chunk).map_or(0, |e| e.version);
        if !record.at_once && committed != record.base {
            return Err(damaged(format!(
                "update {} of chunk {} builds on {}, but {committed} is committed",
                record.version, record.chunk, record.base
            )));
        }
        Ok(())
    }

    /// Blocks that a checkpoint could need at most, beyond its root.
    pub(super) fn checkpoint_blocks(&self) -> u32 {
        // A pending chunk that is new may split a page of the table.
        let index = self.index.pages() + self.pending.len() + 1;
        (self.dirty.len() + self.pending_leaves + index) as u32 + self.alloc.pages()
    }

    pub(super) fn recovered(&self) -> Recovered {
        let committed = self.index.iter().map(|(id, entry)| (id, entry.meta())).collect();
        let pending = self.pending.iter().map(|(id, next)| RecoveredPending {
            chunk: *id,
            base: next.record.base,
            meta: next.meta(),
            removes: next.record.removes,
            context: next.record.context,
        });
        Recovered {
            committed,
            pending: pending.collect(),
            records: self.records.pages(usize::MAX, self.version_floor).swap_remove(0),
        }
    }
}
