//! Which blocks of the data file are free.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

/// Held by a read for as long as it may touch blocks.
pub(super) struct ReadEpoch;

/// Next-fit bitmap. Rebuilt from the maps at start, so it is never stored.
pub(super) struct Allocator {
    /// One bit per block, set if used.
    bits: Vec<u64>,
    blocks: u32,
    used: u32,
    cursor: u32,
    /// Freed blocks that reads may still hold, with the reads that may.
    retired: VecDeque<(Weak<ReadEpoch>, Vec<u32>)>,
    epoch: Arc<ReadEpoch>,
}

impl Allocator {
    pub(super) fn new(blocks: u32) -> Self {
        let words = (blocks as usize).div_ceil(64);
        Self {
            bits: vec![0; words],
            blocks,
            used: 0,
            cursor: 0,
            retired: VecDeque::new(),
            epoch: Arc::new(ReadEpoch),
        }
    }

    pub(super) fn blocks(&self) -> u32 {
        self.blocks
    }

    pub(super) fn used(&self) -> u32 {
        self.used
    }

    pub(super) fn epoch(&self) -> Arc<ReadEpoch> {
        Arc::clone(&self.epoch)
    }

    pub(super) fn grow(&mut self, blocks: u32) {
        self.blocks = blocks.max(self.blocks);
        self.bits.resize((self.blocks as usize).div_ceil(64), 0);
    }

    /// Marks a block that a map points to. False if it is out of range or taken.
    pub(super) fn mark(&mut self, block: u32) -> bool {
        let (word, bit) = (block as usize / 64, 1u64 << (block % 64));
        if block >= self.blocks || self.bits[word] & bit != 0 {
            return false;
        }
        self.bits[word] |= bit;
        self.used += 1;
        true
    }

    /// Takes `count` blocks, neighbours where possible; all or none.
    pub(super) fn take(&mut self, count: u32) -> Option<Vec<u32>> {
        self.reclaim();
        if self.blocks - self.used < count {
            return None;
        }
        let mut taken = Vec::with_capacity(count as usize);
        let mut at = self.cursor;
        while taken.len() < count as usize {
            if at >= self.blocks {
                at = 0;
            }
            if at.is_multiple_of(64) && self.bits[at as usize / 64] == u64::MAX {
                at += 64;
                continue;
            }
            if self.mark(at) {
                taken.push(at);
            }
            at += 1;
        }
        self.cursor = at;
        Some(taken)
    }

    /// Gives back blocks that nothing on disk points to and that nobody has ever read.
    pub(super) fn give_back(&mut self, blocks: &[u32]) {
        for block in blocks {
            let (word, bit) = (*block as usize / 64, 1u64 << (block % 64));
            debug_assert!(self.bits[word] & bit != 0, "block {block} is freed twice");
            self.bits[word] &= !bit;
            self.used -= 1;
        }
    }

    /// Frees blocks once the reads that began before have ended.
    pub(super) fn retire(&mut self, blocks: Vec<u32>) {
        if blocks.is_empty() {
            return;
        }
        let old = std::mem::replace(&mut self.epoch, Arc::new(ReadEpoch));
        self.retired.push_back((Arc::downgrade(&old), blocks));
    }

    fn reclaim(&mut self) {
        // In order: an early epoch's reads may hold what a later one freed.
        while self.retired.front().is_some_and(|(epoch, _)| epoch.strong_count() == 0) {
            if let Some((_, blocks)) = self.retired.pop_front() {
                self.give_back(&blocks);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_back_only_after_older_reads_ended() {
        let mut alloc = Allocator::new(4);
        let taken = alloc.take(4).unwrap();
        assert!(alloc.take(1).is_none());
        let read = alloc.epoch();
        alloc.retire(taken[..2].to_vec());
        alloc.retire(taken[2..].to_vec());
        assert!(alloc.take(1).is_none());
        drop(read);
        assert_eq!(alloc.take(4).unwrap().len(), 4);
    }
}
