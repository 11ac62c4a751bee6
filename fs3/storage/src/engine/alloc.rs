//! Which blocks of the volume are free.
//!
//! * **Neighbours stay neighbours.** An overwrite of a few blocks takes free ones close to those that
//!   it replaces; a large write takes a stretch and leaves a little free behind it for such
//!   overwrites. So a chunk that was overwritten at random still lies in one place, in another
//!   order, and is read with few large requests.
//! * **A freed block waits** until nothing on disk or in memory leads to it: the caller retires it
//!   when the record that frees it is durable, and reads that began before hold it for as long as
//!   they last.
//! * Bitmap pages that changed are remembered, so that a checkpoint writes only those.

use super::Extent;
use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Weak};

/// Blocks that one page of the bitmap covers: 128 MiB of the volume.
pub(super) const PAGE_BLOCKS: u32 = 8 * super::BLOCK_BYTES as u32;
const PAGE_WORDS: usize = PAGE_BLOCKS as usize / 64;
/// How far from the old block a new one is looked for: about the megabyte to either side.
const NEAR_WORDS: usize = 6;
/// A write of fewer blocks goes near what it replaces; a larger one is a stretch by itself.
pub(super) const SMALL: u32 = 16;
/// One block in so many is left free behind a stretch.
const SLACK: u32 = 64;
/// Words of the bitmap that the search for a whole stretch looks at before it takes pieces.
const SEARCH_WORDS: usize = 64 << 10;

/// Held by a read for as long as it may touch blocks.
pub(super) struct ReadEpoch;

/// A bitmap with a bit set for every used block.
pub(super) struct Allocator {
    bits: Vec<u64>,
    blocks: u32,
    used: u32,
    /// Free blocks of each page.
    free: Vec<u32>,
    cursor: u32,
    /// Freed blocks that reads may still hold, with the reads that may.
    retired: VecDeque<(Weak<ReadEpoch>, Vec<Extent>)>,
    epoch: Arc<ReadEpoch>,
    dirty: BTreeSet<u32>,
}

impl Allocator {
    pub(super) fn new(blocks: u32) -> Self {
        let mut new = Self {
            bits: Vec::new(),
            blocks: 0,
            used: 0,
            free: Vec::new(),
            cursor: 0,
            retired: VecDeque::new(),
            epoch: Arc::new(ReadEpoch),
            dirty: BTreeSet::new(),
        };
        new.grow(blocks);
        new
    }

    pub(super) fn blocks(&self) -> u32 {
        self.blocks
    }

    pub(super) fn pages(&self) -> u32 {
        self.blocks.div_ceil(PAGE_BLOCKS)
    }

    pub(super) fn used(&self) -> u32 {
        self.used
    }

    /// Free now: blocks that are retired and no longer read count, others do not.
    pub(super) fn available(&mut self) -> u32 {
        self.reclaim();
        self.blocks - self.used
    }

    pub(super) fn epoch(&self) -> Arc<ReadEpoch> {
        Arc::clone(&self.epoch)
    }

    /// The volume has `blocks` blocks now.
    pub(super) fn grow(&mut self, blocks: u32) {
        let old = self.blocks;
        if blocks <= old {
            return;
        }
        self.blocks = blocks;
        self.bits.resize((blocks as usize).div_ceil(64), 0);
        self.free.resize(self.pages() as usize, 0);
        for page in old / PAGE_BLOCKS..self.pages() {
            let (from, to) = (page * PAGE_BLOCKS, (page + 1) * PAGE_BLOCKS);
            self.free[page as usize] += to.min(blocks) - from.max(old).min(to);
            self.dirty.insert(page);
        }
    }

    fn bit(block: u32) -> (usize, u64) {
        (block as usize / 64, 1 << (block % 64))
    }

    fn is_used(&self, block: u32) -> bool {
        let (word, bit) = Self::bit(block);
        self.bits[word] & bit != 0
    }

    /// Marks blocks as used. False, with nothing changed, if they are out of range or taken.
    pub(super) fn mark(&mut self, extent: Extent) -> bool {
        let Some(end) = extent.start.checked_add(extent.count).filter(|end| *end <= self.blocks) else {
            return false;
        };
        if (extent.start..end).any(|block| self.is_used(block)) {
            return false;
        }
        for block in extent.start..end {
            let (word, bit) = Self::bit(block);
            self.bits[word] |= bit;
            self.free[(block / PAGE_BLOCKS) as usize] -= 1;
            self.dirty.insert(block / PAGE_BLOCKS);
        }
        self.used += extent.count;
        true
    }

    /// Frees blocks that nothing on disk points to and that nobody has ever read.
    pub(super) fn give_back(&mut self, extents: &[Extent]) {
        for extent in extents {
            for block in extent.start..extent.start + extent.count {
                let (word, bit) = Self::bit(block);
                assert!(self.bits[word] & bit != 0, "block {block} is freed twice");
                self.bits[word] &= !bit;
                self.free[(block / PAGE_BLOCKS) as usize] += 1;
                self.dirty.insert(block / PAGE_BLOCKS);
            }
            self.used -= extent.count;
        }
    }

    /// Frees blocks once the reads that began before have ended.
    pub(super) fn retire(&mut self, extents: Vec<Extent>) {
        if extents.is_empty() {
            return;
        }
        let old = std::mem::replace(&mut self.epoch, Arc::new(ReadEpoch));
        self.retired.push_back((Arc::downgrade(&old), extents));
    }

    fn reclaim(&mut self) {
        // In order: an early epoch's reads may hold what a later one freed.
        while self.retired.front().is_some_and(|(epoch, _)| epoch.strong_count() == 0) {
            if let Some((_, extents)) = self.retired.pop_front() {
                self.give_back(&extents);
            }
        }
    }

    /// Takes `count` blocks; all or none. A few go near `near`; many, or few that find no room
    /// there, go where the last stretch ended.
    pub(super) fn take(&mut self, count: u32, near: Option<u32>) -> Option<Vec<Extent>> {
        if self.available() < count {
            return None;
        }
        let mut taken = Vec::new();
        let mut left = count;
        if let Some(near) = near.filter(|n| count <= SMALL && *n < self.blocks) {
            let middle = near as usize / 64;
            let last = (middle + NEAR_WORDS).min(self.bits.len() - 1);
            left -= self.take_bits(middle..last + 1, left, &mut taken);
            left -= self.take_bits(middle.saturating_sub(NEAR_WORDS)..middle, left, &mut taken);
        }
        if left > SMALL {
            while left > 0 {
                let Some(run) = self.find_stretch(left.min(PAGE_BLOCKS)) else { break };
                let extent = Extent { start: run, count: left.min(PAGE_BLOCKS) };
                assert!(self.mark(extent), "a stretch was free when it was found");
                taken.push(extent);
                left -= extent.count;
                self.cursor = (run + extent.count + extent.count.div_ceil(SLACK)).min(self.blocks);
            }
        }
        if left > 0 {
            let from = self.cursor as usize / 64;
            left -= self.take_bits(from..self.bits.len(), left, &mut taken);
            if let Some(last) = taken.last() {
                self.cursor = last.start + last.count;
            }
            left -= self.take_bits(0..from, left, &mut taken);
        }
        assert_eq!(left, 0, "as many blocks as were counted are free");
        Some(taken)
    }

    /// Takes up to `count` free blocks from these words; how many it took.
    fn take_bits(&mut self, words: Range<usize>, count: u32, taken: &mut Vec<Extent>) -> u32 {
        let mut left = count;
        let mut word = words.start;
        while word < words.end && left > 0 {
            if self.free[word / PAGE_WORDS] == 0 {
                word = (word / PAGE_WORDS + 1) * PAGE_WORDS;
                continue;
            }
            let mut free = !self.bits[word];
            while free != 0 && left > 0 {
                let block = word as u32 * 64 + free.trailing_zeros();
                free &= free - 1;
                if block < self.blocks && self.mark(Extent { start: block, count: 1 }) {
                    Extent::add(taken, block);
                    left -= 1;
                }
            }
            word += 1;
        }
        count - left
    }

    /// A free stretch of `count` blocks from the cursor on, within a bounded search.
    fn find_stretch(&self, count: u32) -> Option<u32> {
        let mut budget = SEARCH_WORDS;
        for (from, to) in [(self.cursor, self.blocks), (0, self.cursor)] {
            let mut at = from;
            let mut begin = from;
            while at < to && budget > 0 {
                if at.is_multiple_of(64) && to - at >= 64 {
                    budget -= 1;
                    match self.bits[at as usize / 64] {
                        0 => at += 64,
                        u64::MAX => {
                            at += 64;
                            begin = at;
                        }
                        word => {
                            // Free blocks at the word's low end still belong to the stretch.
                            if at - begin + word.trailing_zeros() >= count {
                                return Some(begin);
                            }
                            for bit in 0..64 {
                                if word >> bit & 1 != 0 {
                                    begin = at + bit + 1;
                                } else if at + bit + 1 - begin >= count {
                                    return Some(begin);
                                }
                            }
                            at += 64;
                        }
                    }
                } else {
                    if self.is_used(at) {
                        begin = at + 1;
                    }
                    at += 1;
                }
                if at - begin >= count {
                    return Some(begin);
                }
            }
        }
        None
    }

    /// Blocks that are marked though the state no longer leads to them: reads hold them.
    pub(super) fn retired(&self) -> impl Iterator<Item = Extent> + '_ {
        self.retired.iter().flat_map(|(_, extents)| extents.iter().copied())
    }

    /// The pages that changed since this was asked last.
    pub(super) fn take_dirty(&mut self) -> BTreeSet<u32> {
        std::mem::take(&mut self.dirty)
    }

    /// A block that is used in one and not in the other.
    pub(super) fn difference(&self, other: &Self) -> Option<u32> {
        let at = self.bits.iter().zip(&other.bits).position(|(a, b)| a != b)?;
        Some(at as u32 * 64 + (self.bits[at] ^ other.bits[at]).trailing_zeros())
    }

    /// One page of the bitmap as it is stored: bit 0 of byte 0 is its first block.
    pub(super) fn page(&self, page: u32) -> Vec<u8> {
        let from = page as usize * PAGE_WORDS;
        let words = self.bits.iter().skip(from).take(PAGE_WORDS);
        let mut out: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        out.resize(super::BLOCK_BYTES, 0);
        out
    }

    /// Takes over a stored page. False if it names blocks outside the volume.
    pub(super) fn load(&mut self, page: u32, bytes: &[u8]) -> bool {
        for (i, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let word = u64::from_le_bytes(*word);
            if word == 0 {
                continue;
            }
            let at = page as usize * PAGE_WORDS + i;
            let within = (self.blocks as usize).saturating_sub(at * 64);
            if within < 64 && word >> within != 0 {
                return false;
            }
            self.bits[at] = word;
            self.used += word.count_ones();
            self.free[page as usize] -= word.count_ones();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn count(extents: &[Extent]) -> u32 {
        extents.iter().map(|e| e.count).sum()
    }

    #[test]
    fn blocks_come_back_only_after_older_reads_ended() {
        let mut alloc = Allocator::new(4);
        let taken = alloc.take(4, None).unwrap();
        assert!(alloc.take(1, None).is_none());
        let read = alloc.epoch();
        alloc.retire(vec![Extent { start: taken[0].start, count: 2 }]);
        alloc.retire(vec![Extent { start: taken[0].start + 2, count: 2 }]);
        assert!(alloc.take(1, None).is_none());
        drop(read);
        assert_eq!(count(&alloc.take(4, None).unwrap()), 4);
    }

    #[test]
    fn an_overwrite_stays_near_what_it_replaces() {
        let mut alloc = Allocator::new(1 << 20);
        let stretches: Vec<u32> = (0..64).map(|_| alloc.take(256, None).unwrap()[0].start).collect();
        for start in &stretches {
            let near = alloc.take(1, Some(start + 100)).unwrap()[0].start;
            assert!(near.abs_diff(*start) < 300, "{near} for {start}");
        }
    }

    proptest! {
        /// Whatever is taken was free, counts add up, and a stored bitmap reads back the same.
        #[test]
        fn nothing_is_given_twice(
            steps in proptest::collection::vec((1u32..600, any::<bool>(), any::<u32>()), 1..80)
        ) {
            let blocks = PAGE_BLOCKS + 1000;
            let mut alloc = Allocator::new(blocks);
            let mut held: Vec<Vec<Extent>> = Vec::new();
            let mut model = BTreeSet::new();
            for (n, give, at) in steps {
                if give && !held.is_empty() {
                    let back = held.swap_remove(at as usize % held.len());
                    for e in &back {
                        (e.start..e.start + e.count).for_each(|b| { model.remove(&b); });
                    }
                    alloc.retire(back);
                } else if let Some(taken) = alloc.take(n, Some(at % blocks)) {
                    prop_assert_eq!(count(&taken), n);
                    for e in &taken {
                        for b in e.start..e.start + e.count {
                            prop_assert!(b < blocks && model.insert(b), "block {} was taken", b);
                        }
                    }
                    held.push(taken);
                }
                let available = alloc.available();
                prop_assert_eq!(alloc.used() as usize, model.len());
                prop_assert_eq!(available + alloc.used(), blocks);
            }
            let mut copy = Allocator::new(blocks);
            for page in 0..alloc.pages() {
                prop_assert!(copy.load(page, &alloc.page(page)));
            }
            prop_assert_eq!((&copy.bits, copy.used, &copy.free), (&alloc.bits, alloc.used, &alloc.free));
        }
    }
}
