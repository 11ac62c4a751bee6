//! Reads: which leaves and blocks are wanted, and what the bytes that came must be.
//!
//! Blocks that lie close together on the volume are fetched with one request even if other blocks lie
//! between them: the allocator keeps a chunk in one place, so a chunk that was overwritten at
//! random costs a few large requests instead of one per block.

use super::BLOCK_BYTES;
use super::alloc::ReadEpoch;
use super::buffer::AlignedBuf;
use super::core::{Core, EngineError};
use super::disk::Disk;
use super::format::{PageKind, PagePtr, page_crc};
use super::leaf::{BlockPtr, LEAF_BLOCKS, Leaf};
use super::plan::is_intact;
use super::state::LeafAt;
use firefly_types::{ChunkId, lock};
use fs3_core::target::Meta;
use std::sync::Arc;

/// Blocks of others that are read along rather than begin another request. 64 KiB cost less than a
/// request does.
const GAP_BLOCKS: u32 = 16;
/// Blocks that one request fetches at most.
const REQUEST_BLOCKS: u32 = 512;

/// One version of a part of one chunk, kept from reuse while this lives.
pub struct ReadPlan {
    pub(super) id: ChunkId,
    pub(super) meta: Meta,
    pub(super) leaves: Vec<(u32, LeafAt)>,
    pub(super) believe: bool,
    pub(super) _epoch: Arc<ReadEpoch>,
}

/// Neighbouring blocks of the volume that are fetched together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fetch {
    /// First block.
    pub(super) block: u32,
    /// Blocks.
    pub(super) count: u32,
    /// Those that are wanted: index in the chunk, pointer.
    pub(super) wanted: Vec<(u32, BlockPtr)>,
}

impl Fetch {
    /// Where it lies in the volume, bytes.
    pub(super) fn offset(&self) -> u64 {
        u64::from(self.block) * BLOCK_BYTES as u64
    }

    /// Bytes to be fetched.
    pub(super) fn bytes(&self) -> usize {
        self.count as usize * BLOCK_BYTES
    }
}

impl ReadPlan {
    /// The chunk's state at that version.
    pub fn meta(&self) -> Meta {
        self.meta
    }

    /// Leaves that are on disk only.
    pub(super) fn missing(&self) -> Vec<PagePtr> {
        let at = |leaf: &LeafAt| match leaf {
            LeafAt::Page(at) => Some(*at),
            _ => None,
        };
        self.leaves.iter().filter_map(|(_, leaf)| at(leaf)).collect()
    }

    /// Takes in pages of leaves, in the order of [`ReadPlan::missing`].
    pub(super) fn supply<'a, B: AsRef<[u8]>>(
        &mut self,
        core: &Core<B>,
        pages: impl Iterator<Item = &'a [u8]>,
    ) -> Result<(), EngineError> {
        let mut missing = self.leaves.iter_mut().filter(|(_, leaf)| matches!(leaf, LeafAt::Page(_)));
        for page in pages {
            let Some((number, slot)) = missing.next() else { break };
            let LeafAt::Page(at) = *slot else { break };
            let corrupt = EngineError::CorruptMap { chunk: self.id, leaf: *number, block: at.block };
            if page_crc(PageKind::Leaf(self.id, *number), page) != at.crc {
                return Err(corrupt);
            }
            let leaf = Arc::new(Leaf::decode(page).map_err(|_| corrupt)?);
            lock(&core.shared).state.cache.put((self.id, *number), at, Arc::clone(&leaf));
            *slot = LeafAt::Loaded(leaf);
        }
        Ok(())
    }

    /// Where a block of the chunk lies; `None` for a hole.
    fn pointer(&self, index: u32) -> Option<BlockPtr> {
        let number = index / LEAF_BLOCKS;
        let first = self.leaves.first()?.0;
        match &self.leaves.get(number.checked_sub(first)? as usize)?.1 {
            LeafAt::Loaded(leaf) => leaf.get(index % LEAF_BLOCKS),
            LeafAt::Hole => None,
            LeafAt::Page(_) => unreachable!("leaves are supplied before blocks are asked for"),
        }
    }

    /// What to fetch for `length` bytes from `offset` on, which must lie within the chunk and the
    /// range that was planned.
    pub(super) fn fetches(&self, offset: usize, length: usize) -> Vec<Fetch> {
        assert!(offset + length <= self.meta.length as usize, "a read past the chunk's end");
        let blocks = (offset / BLOCK_BYTES) as u32..(offset + length).div_ceil(BLOCK_BYTES) as u32;
        let mut wanted: Vec<(u32, BlockPtr)> =
            blocks.filter_map(|index| Some((index, self.pointer(index)?))).collect();
        wanted.sort_by_key(|(_, ptr)| ptr.block);
        let mut fetches: Vec<Fetch> = Vec::new();
        for (index, ptr) in wanted {
            debug_assert!(
                fetches.last().is_none_or(|l| l.block + l.count <= ptr.block),
                "block {} twice in {:?}: {index}",
                ptr.block,
                self.id
            );
            if let Some(last) = fetches.last_mut()
                && ptr.block - (last.block + last.count) <= GAP_BLOCKS
                && ptr.block + 1 - last.block <= REQUEST_BLOCKS
            {
                last.count = ptr.block + 1 - last.block;
                last.wanted.push((index, ptr));
                continue;
            }
            fetches.push(Fetch { block: ptr.block, count: 1, wanted: vec![(index, ptr)] });
        }
        fetches
    }

    /// Checks what was fetched and puts it where it belongs in `out`, which begins at `offset` of the
    /// chunk. Every block is verified as a whole.
    pub(super) fn deliver(
        &self,
        fetch: &Fetch,
        bytes: &[u8],
        offset: usize,
        out: &mut [u8],
    ) -> Result<(), EngineError> {
        for (index, ptr) in &fetch.wanted {
            let at = (ptr.block - fetch.block) as usize * BLOCK_BYTES;
            let block = &bytes[at..at + BLOCK_BYTES];
            if !self.believe && !is_intact(self.id, *index, *ptr, block) {
                return Err(self.corrupt(*index, *ptr));
            }
            let start = *index as usize * BLOCK_BYTES;
            let from = start.max(offset);
            let to = (start + BLOCK_BYTES).min(offset + out.len());
            out[from - offset..to - offset].copy_from_slice(&block[from - start..to - start]);
        }
        Ok(())
    }

    fn corrupt(&self, index: u32, ptr: BlockPtr) -> EngineError {
        EngineError::Corrupt { chunk: self.id, index, block: ptr.block }
    }

    /// Zeros the holes of `out`, which begins at `offset` of the chunk.
    pub(super) fn fill_holes(&self, offset: usize, out: &mut [u8]) {
        let (first, last) = (offset / BLOCK_BYTES, (offset + out.len()).div_ceil(BLOCK_BYTES));
        for index in first..last {
            if self.pointer(index as u32).is_none() {
                let start = index * BLOCK_BYTES;
                let (from, to) = (start.max(offset), (start + BLOCK_BYTES).min(offset + out.len()));
                out[from - offset..to - offset].fill(0);
            }
        }
    }

    /// A fetch for each block of one that the disk could not do: to find out which it is.
    pub(super) fn apart(&self, fetch: &Fetch) -> Vec<Fetch> {
        let one = |(index, ptr): &(u32, BlockPtr)| Fetch {
            block: ptr.block,
            count: 1,
            wanted: vec![(*index, *ptr)],
        };
        fetch.wanted.iter().map(one).collect()
    }

    /// The error that says that a single block cannot be read.
    pub(super) fn unreadable(&self, fetch: &Fetch) -> EngineError {
        let (index, ptr) = fetch.wanted[0];
        self.corrupt(index, ptr)
    }
}

impl<B: AsRef<[u8]>> Core<B> {
    /// Fills `out` from `offset` on, one request after the other.
    pub fn read<D: Disk + ?Sized>(
        &self,
        disk: &D,
        plan: &mut ReadPlan,
        offset: usize,
        out: &mut [u8],
    ) -> Result<(), EngineError> {
        self.check_open()?;
        self.load_leaves(disk, plan)?;
        plan.fill_holes(offset, out);
        for fetch in plan.fetches(offset, out.len()) {
            let mut buf = AlignedBuf::zeroed(fetch.bytes());
            if disk.read(fetch.offset(), &mut buf).is_ok() {
                plan.deliver(&fetch, &buf, offset, out)?;
                continue;
            }
            for fetch in plan.apart(&fetch) {
                let mut buf = AlignedBuf::zeroed(fetch.bytes());
                disk.read(fetch.offset(), &mut buf).map_err(|_| plan.unreadable(&fetch))?;
                plan.deliver(&fetch, &buf, offset, out)?;
            }
        }
        Ok(())
    }

    pub(super) fn load_leaves<D: Disk + ?Sized>(
        &self,
        disk: &D,
        plan: &mut ReadPlan,
    ) -> Result<(), EngineError> {
        for at in plan.missing() {
            let mut page = AlignedBuf::zeroed(BLOCK_BYTES);
            disk.read(u64::from(at.block) * BLOCK_BYTES as u64, &mut page)?;
            plan.supply(self, std::iter::once(&page[..]))?;
        }
        Ok(())
    }

    pub(super) fn check_open(&self) -> Result<(), EngineError> {
        match self.failed() {
            Some(reason) => Err(EngineError::Failed(reason)),
            None => Ok(()),
        }
    }

    /// Puts a block right with bytes from another replica. They are proven by the pointer, so it
    /// does not matter who sent them; anything else is refused.
    pub fn repair<D: Disk + ?Sized>(
        &self,
        disk: &D,
        plan: &mut ReadPlan,
        index: u32,
        bytes: &[u8],
    ) -> Result<(), EngineError> {
        self.load_leaves(disk, plan)?;
        let nowhere = EngineError::Corrupt { chunk: plan.id, index, block: super::format::HOLE };
        let ptr = plan.pointer(index).ok_or(nowhere)?;
        let mut block = AlignedBuf::zeroed(BLOCK_BYTES);
        let fits = bytes.len().min(BLOCK_BYTES);
        block[..fits].copy_from_slice(&bytes[..fits]);
        if !is_intact(plan.id, index, ptr, &block) {
            return Err(plan.corrupt(index, ptr));
        }
        self.check_open()?;
        // In place: what lies there is worthless, and a torn repair shows as corrupt again.
        Ok(disk.write(u64::from(ptr.block) * BLOCK_BYTES as u64, &block)?)
    }
}
