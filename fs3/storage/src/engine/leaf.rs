//! A leaf of a chunk's block map: where 256 neighbouring blocks (1 MiB) of a chunk lie.
//!
//! Runs of blocks that one update wrote side by side share an entry, so a chunk that was written
//! sequentially has a map of one run and a checksum per block; only a chunk that was overwritten at
//! random has a run per block. A leaf always fits one block on disk.

use super::format::{FormatError, HOLE, MAX_VERSION, Reader, damaged};
use super::index::DIRTY;
use super::{BLOCK_BYTES, Extent};
use std::ops::Range;

/// Blocks that a leaf maps: 1 MiB, and in the worst case (a run per block) 15 bytes each on disk.
pub(super) const LEAF_BLOCKS: u32 = 256;

/// Where a block lies and what it must contain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockPtr {
    /// Number of the block in the volume.
    pub block: u32,
    /// CRC-32C of the seal (chunk, index, version) followed by the block.
    pub crc: u32,
    /// Chunk version that wrote the block.
    pub version: u64,
}

/// Neighbouring blocks of a chunk, written by one update to neighbouring blocks of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Run {
    /// First block, counted from the leaf's first.
    first: u16,
    count: u16,
    /// Where it lies in the volume.
    block: u32,
    version: u64,
}

impl Run {
    fn end(&self) -> u32 {
        u32::from(self.first) + u32::from(self.count)
    }

    fn part(&self, range: Range<u32>) -> Self {
        let block = self.block + (range.start - u32::from(self.first));
        // In bounds: both ends lie in a leaf.
        Self { first: range.start as u16, count: (range.end - range.start) as u16, block, ..*self }
    }
}

/// A part of a block map. Blocks that no run covers are holes: they read as zeros.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Leaf {
    /// By first block, without overlap.
    runs: Vec<Run>,
    /// One for each block up to the last that is not a hole; a hole's is 0.
    crcs: Vec<u32>,
}

impl Leaf {
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Bytes of memory, about.
    pub(super) fn memory(&self) -> usize {
        128 + self.runs.len() * size_of::<Run>() + self.crcs.len() * 4
    }

    pub(super) fn get(&self, index: u32) -> Option<BlockPtr> {
        let at = self.runs.partition_point(|r| r.end() <= index);
        let run = self.runs.get(at).filter(|r| u32::from(r.first) <= index)?;
        let block = run.block + (index - u32::from(run.first));
        Some(BlockPtr { block, crc: self.crcs[index as usize], version: run.version })
    }

    /// Makes the blocks of `range` holes.
    pub(super) fn clear(&mut self, range: Range<u32>) {
        let from = self.runs.partition_point(|r| r.end() <= range.start);
        let to = self.runs.partition_point(|r| u32::from(r.first) < range.end);
        if from < to {
            let (head, tail) = (self.runs[from], self.runs[to - 1]);
            let before =
                (u32::from(head.first) < range.start).then(|| head.part(u32::from(head.first)..range.start));
            let after = (tail.end() > range.end).then(|| tail.part(range.end..tail.end()));
            self.runs.splice(from..to, before.into_iter().chain(after));
        }
        let end = self.crcs.len().min(range.end as usize);
        if let Some(crcs) = self.crcs.get_mut(range.start as usize..end) {
            crcs.fill(0);
        }
        self.crcs.truncate(self.runs.last().map_or(0, |r| r.end() as usize));
    }

    /// Points the blocks from `first` on, as many as there are checksums, to neighbouring blocks of
    /// the volume.
    pub(super) fn set(&mut self, first: u32, block: u32, version: u64, crcs: &[u32]) {
        let end = first + crcs.len() as u32;
        assert!(!crcs.is_empty() && end <= LEAF_BLOCKS, "a run leaves its leaf");
        self.clear(first..end);
        let at = self.runs.partition_point(|r| u32::from(r.first) < first);
        self.runs.insert(at, Run { first: first as u16, count: crcs.len() as u16, block, version });
        if self.crcs.len() < end as usize {
            self.crcs.resize(end as usize, 0);
        }
        self.crcs[first as usize..end as usize].copy_from_slice(crcs);
    }

    /// Index and pointer of every block that is not a hole.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (u32, BlockPtr)> + '_ {
        self.runs.iter().flat_map(move |run| {
            (0..u32::from(run.count)).map(move |i| {
                let index = u32::from(run.first) + i;
                let ptr =
                    BlockPtr { block: run.block + i, crc: self.crcs[index as usize], version: run.version };
                (index, ptr)
            })
        })
    }

    /// What `self` holds of the volume and `next` does not, place by place: a block never moves
    /// within a map.
    pub(super) fn blocks_without(&self, next: &Leaf, freed: &mut Vec<Extent>) {
        for (index, ptr) in self.blocks() {
            if next.get(index).map(|p| p.block) != Some(ptr.block) {
                Extent::add(freed, ptr.block);
            }
        }
    }

    /// At most [`BLOCK_BYTES`]: number of runs (2), for each run its length less one (1), its place
    /// (4; a stretch of holes has `HOLE`) and version (6), then the checksums of all but holes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; 2];
        let put = |out: &mut Vec<u8>, count: u32, block: u32, version: u64| {
            out.push((count - 1) as u8);
            out.extend(block.to_le_bytes());
            out.extend(&version.to_le_bytes()[..6]);
        };
        let (mut at, mut runs) = (0, 0u16);
        for run in &self.runs {
            if u32::from(run.first) > at {
                put(&mut out, u32::from(run.first) - at, HOLE, 0);
                runs += 1;
            }
            put(&mut out, u32::from(run.count), run.block, run.version);
            at = run.end();
            runs += 1;
        }
        out[..2].copy_from_slice(&runs.to_le_bytes());
        out.extend(self.blocks().flat_map(|(_, ptr)| ptr.crc.to_le_bytes()));
        assert!(out.len() <= BLOCK_BYTES, "a leaf of {} bytes", out.len());
        out
    }

    /// Reads it back; bytes behind it are ignored.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader(bytes);
        let count = reader.u16()?;
        let mut leaf = Leaf::default();
        let mut at = 0u32;
        for _ in 0..count {
            let len = u32::from(reader.u8()?) + 1;
            let (block, version) = (reader.u32()?, reader.u48()?);
            if at + len > LEAF_BLOCKS || version > MAX_VERSION {
                return Err(damaged("the runs of a map leave their leaf"));
            }
            if block != HOLE {
                if block.checked_add(len).is_none_or(|end| end > DIRTY) {
                    return Err(damaged("a run of a map leaves the volume"));
                }
                leaf.runs.push(Run { first: at as u16, count: len as u16, block, version });
            }
            at += len;
        }
        leaf.crcs = vec![0; leaf.runs.last().map_or(0, |r| r.end() as usize)];
        for run in &leaf.runs {
            for crc in &mut leaf.crcs[usize::from(run.first)..run.end() as usize] {
                *crc = reader.u32()?;
            }
        }
        Ok(leaf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against the plain way: a pointer for each place.
        #[test]
        fn a_leaf_is_a_map(
            steps in proptest::collection::vec((0u32..256, 1u32..256, any::<bool>()), 1..60)
        ) {
            let mut plain: Vec<Option<BlockPtr>> = vec![None; 256];
            let mut leaf = Leaf::default();
            for (n, (first, len, set)) in steps.into_iter().enumerate() {
                let end = (first + len).min(256);
                let old = leaf.clone();
                if set {
                    let block = n as u32 * 1000;
                    let crcs: Vec<u32> = (first..end).map(|i| i * 7 + n as u32).collect();
                    leaf.set(first, block, n as u64, &crcs);
                    for i in first..end {
                        let (at, crc) = (i - first, crcs[(i - first) as usize]);
                        plain[i as usize] = Some(BlockPtr { block: block + at, crc, version: n as u64 });
                    }
                } else {
                    leaf.clear(first..end);
                    plain[first as usize..end as usize].fill(None);
                }
                for (i, expected) in plain.iter().enumerate() {
                    prop_assert_eq!(leaf.get(i as u32), *expected);
                }
                prop_assert_eq!(&Leaf::decode(&leaf.encode()).unwrap(), &leaf);
                let mut freed = Vec::new();
                old.blocks_without(&leaf, &mut freed);
                let gone = old.blocks().filter(|(i, p)| leaf.get(*i).map(|n| n.block) != Some(p.block));
                prop_assert_eq!(freed.iter().map(|e| e.count as usize).sum::<usize>(), gone.count());
            }
        }

        #[test]
        fn any_bytes_are_a_leaf_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Leaf::decode(&bytes);
        }
    }

    #[test]
    fn the_worst_leaf_fits_a_block() {
        let mut leaf = Leaf::default();
        for i in 0..LEAF_BLOCKS {
            leaf.set(i, i * 2, MAX_VERSION, &[1]);
        }
        assert_eq!(leaf.encode().len(), 2 + 256 * 15);
        assert_eq!(Leaf::decode(&leaf.encode()).unwrap(), leaf);
    }
}
