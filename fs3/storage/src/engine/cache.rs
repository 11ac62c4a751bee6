//! Leaves of block maps that were read or written lately, bounded in bytes.

use super::format::PagePtr;
use super::leaf::Leaf;
use firefly_types::ChunkId;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Which leaf of which chunk.
pub(super) type LeafKey = (ChunkId, u32);

struct Slot {
    at: PagePtr,
    leaf: Arc<Leaf>,
    /// Asked for since the hand passed.
    used: bool,
}

/// Second chance: a hand goes round and drops what was not asked for since its last visit. Good
/// enough against scans, and a hit costs one flag.
pub(super) struct LeafCache {
    slots: HashMap<LeafKey, Slot>,
    hand: VecDeque<LeafKey>,
    bytes: usize,
    limit: usize,
}

impl LeafCache {
    pub(super) fn new(limit: usize) -> Self {
        Self { slots: HashMap::new(), hand: VecDeque::new(), bytes: 0, limit }
    }

    /// The leaf that lies at `at`. Another version of it does not count: a read that began before
    /// an update may have brought that in.
    pub(super) fn get(&mut self, key: LeafKey, at: PagePtr) -> Option<Arc<Leaf>> {
        let slot = self.slots.get_mut(&key).filter(|slot| slot.at == at)?;
        slot.used = true;
        Some(Arc::clone(&slot.leaf))
    }

    pub(super) fn put(&mut self, key: LeafKey, at: PagePtr, leaf: Arc<Leaf>) {
        self.bytes += leaf.memory();
        match self.slots.insert(key, Slot { at, leaf, used: false }) {
            Some(old) => self.bytes -= old.leaf.memory(),
            None => self.hand.push_back(key),
        }
        while self.bytes > self.limit {
            let Some(key) = self.hand.pop_front() else { break };
            match self.slots.get_mut(&key) {
                Some(slot) if slot.used => {
                    slot.used = false;
                    self.hand.push_back(key);
                }
                Some(_) => self.forget(key),
                None => {}
            }
        }
    }

    fn forget(&mut self, key: LeafKey) {
        if let Some(old) = self.slots.remove(&key) {
            self.bytes -= old.leaf.memory();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firefly_types::{DataId, Generation};

    #[test]
    fn it_stays_in_bounds_and_keeps_what_is_asked_for() {
        let mut leaf = Leaf::default();
        leaf.set(0, 1, 1, &[0; 256]);
        let leaf = Arc::new(leaf);
        let mut cache = LeafCache::new(10 * leaf.memory());
        let at = |n| PagePtr { block: n, crc: 0 };
        let key = |n| (ChunkId { data: DataId(1), generation: Generation(0), index: n }, 0);
        for n in 0..100 {
            cache.put(key(n), at(n), Arc::clone(&leaf));
            assert!(cache.get(key(0), at(0)).is_some(), "dropped after {n}");
            assert!(cache.bytes <= cache.limit && cache.slots.len() <= 10);
        }
        assert!(cache.get(key(1), at(1)).is_none());
        assert!(cache.get(key(0), at(1)).is_none());
    }
}
