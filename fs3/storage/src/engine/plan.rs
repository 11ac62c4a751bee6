//! From an update to new blocks: what must be read, composed and written, and what the log says.

use super::buffer::AlignedBuf;
use super::format::{Change, HOLE, PendingRecord, seal};
use super::index::{Entry, Map, blocks_of};
use super::leaf::{BlockPtr, LEAF_BLOCKS, Leaf};
use super::{BLOCK_BYTES, Extent};
use firefly_types::ChunkId;
use fs3_core::target::{Digest, Kind, Update, ZERO_UNIT_CRC, bind, unbind};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Blocks that one request writes at most: the disk works on one while the next is composed.
const REQUEST_BLOCKS: u32 = 256;

/// A write that waits for its turn.
#[derive(Debug)]
pub(super) struct WriteOp<B> {
    pub(super) id: u64,
    pub(super) base: u64,
    pub(super) version: u64,
    pub(super) update: Update<B>,
    pub(super) at_once: bool,
}

impl<B: AsRef<[u8]>> WriteOp<B> {
    pub(super) fn payload(&self) -> &[u8] {
        self.update.payload.as_ref().map_or(&[], |p| p.as_ref())
    }

    /// Blocks that it writes at most.
    pub(super) fn blocks(&self) -> u32 {
        (self.payload().len() / BLOCK_BYTES) as u32 + 2
    }

    /// Leaves of the committed map that planning it needs.
    pub(super) fn leaves_needed(&self, base: &Entry) -> Range<u32> {
        let all = base.leaves().len() as u32;
        let update = &self.update;
        let (from, len) = match update.kind {
            Kind::Write => (update.offset, self.payload().len() as u32),
            Kind::Punch => (update.offset, update.length),
            Kind::Truncate if update.length >= base.length => return 0..0,
            // Blocks are freed, or a checksum is summed up anew.
            Kind::Truncate | Kind::Replace | Kind::Remove => return 0..all,
        };
        let bytes = LEAF_BLOCKS * BLOCK_BYTES as u32;
        let end = (u64::from(from) + u64::from(len)).div_ceil(u64::from(bytes));
        (from / bytes).min(all)..(end.min(u64::from(all)) as u32)
    }
}

/// The committed version that an update builds on, with the leaves that it needs.
pub(super) struct Base {
    pub(super) entry: Entry,
    pub(super) leaves: BTreeMap<u32, Arc<Leaf>>,
}

impl Base {
    pub(super) fn get(&self, index: u32) -> Option<BlockPtr> {
        match &self.entry.map {
            Map::Block(ptr) => ptr.filter(|_| index == 0),
            _ => self.leaves.get(&(index / LEAF_BLOCKS)).and_then(|leaf| leaf.get(index % LEAF_BLOCKS)),
        }
    }
}

/// One block to be composed anew.
#[derive(Debug)]
pub(super) struct Edit {
    pub(super) index: u32,
    /// Content to start from, if any of it stays.
    pub(super) old: Option<BlockPtr>,
    /// Bytes of the block that become zero.
    zero: Range<usize>,
    /// Bytes of the block that the payload gives, and from where in it.
    fill: Range<usize>,
    from: usize,
}

/// What one update does to the map.
#[derive(Debug)]
pub(super) struct Plan {
    length: u32,
    whole: bool,
    removes: bool,
    pub(super) edits: Vec<Edit>,
    /// Blocks that become holes.
    holes: Vec<u32>,
}

/// Plans an update on top of `base`.
pub(super) fn plan<B: AsRef<[u8]>>(base: &Base, op: &WriteOp<B>) -> Plan {
    let update = &op.update;
    let payload = op.payload();
    let had = base.entry.length as usize;
    let mut plan = Plan {
        length: base.entry.length,
        whole: false,
        removes: false,
        edits: Vec::new(),
        holes: Vec::new(),
    };
    let zeroing = |index: u32, zero: Range<usize>| {
        base.get(index).map(|old| Edit { index, old: Some(old), zero, fill: 0..0, from: 0 })
    };
    match update.kind {
        Kind::Write => {
            let (from, to) = (update.offset as usize, update.offset as usize + payload.len());
            plan.length = plan.length.max(to as u32);
            for index in from / BLOCK_BYTES..to.div_ceil(BLOCK_BYTES) {
                let start = index * BLOCK_BYTES;
                let fill = from.max(start) - start..to.min(start + BLOCK_BYTES) - start;
                // Bytes past the chunk's end are zeros, so only bytes before it need be kept.
                let held = had.saturating_sub(start).min(BLOCK_BYTES);
                let keeps = fill.start > 0 || fill.end < held;
                let index = index as u32;
                let old = if keeps { base.get(index) } else { None };
                plan.edits.push(Edit { index, old, zero: 0..0, from: start + fill.start - from, fill });
            }
        }
        Kind::Truncate => {
            plan.length = update.length;
            let (index, cut) = (update.length as usize / BLOCK_BYTES, update.length as usize % BLOCK_BYTES);
            if update.length < base.entry.length && cut != 0 {
                plan.edits.extend(zeroing(index as u32, cut..BLOCK_BYTES));
            }
        }
        Kind::Punch => {
            let from = update.offset.min(base.entry.length) as usize;
            let to = (from + update.length as usize).min(had);
            for index in from / BLOCK_BYTES..to.div_ceil(BLOCK_BYTES) {
                let start = index * BLOCK_BYTES;
                let zero = from.max(start) - start..to.min(start + BLOCK_BYTES) - start;
                if zero.start > 0 || start + zero.end < had.min(start + BLOCK_BYTES) {
                    plan.edits.extend(zeroing(index as u32, zero));
                } else if base.get(index as u32).is_some() {
                    plan.holes.push(index as u32);
                }
            }
        }
        Kind::Replace => {
            plan.whole = true;
            plan.length = payload.len() as u32;
            for (index, block) in payload.chunks(BLOCK_BYTES).enumerate() {
                // Holes stay holes on the replica.
                if block.iter().any(|b| *b != 0) {
                    let (fill, from) = (0..block.len(), index * BLOCK_BYTES);
                    plan.edits.push(Edit { index: index as u32, old: None, zero: 0..0, fill, from });
                }
            }
        }
        Kind::Remove => {
            plan.removes = true;
            plan.length = 0;
        }
    }
    plan
}

/// Blocks of the volume for the edits, with their new content, side by side where they can be.
pub(super) struct Composed {
    pub(super) record: PendingRecord,
    /// (first block in the volume, bytes).
    pub(super) writes: Vec<(u32, AlignedBuf)>,
}

impl Plan {
    /// Leaves that change, at most.
    pub(super) fn leaves_changed(&self, base: &Base) -> usize {
        let mut leaves = self.edits.iter().map(|e| e.index / LEAF_BLOCKS).collect::<Vec<_>>();
        leaves.dedup();
        leaves.len() + base.leaves.len() + 1
    }

    /// Where the new blocks should be close to.
    pub(super) fn near(&self, base: &Base) -> Option<u32> {
        let edit = self.edits.first()?;
        let beside = |index: u32| base.get(index).map(|ptr| ptr.block);
        beside(edit.index).or_else(|| beside(edit.index.checked_sub(1)?))
    }

    /// Composes the new blocks into the `taken` ones. `old` gives what was read of old blocks,
    /// `buffer` memory.
    pub(super) fn compose<B: AsRef<[u8]>>(
        &self,
        base: &Base,
        op: &WriteOp<B>,
        taken: &[Extent],
        old: &BTreeMap<u32, AlignedBuf>,
        mut buffer: impl FnMut(usize) -> AlignedBuf,
    ) -> Composed {
        let chunk = op.update.chunk;
        let payload = op.payload();
        let units = blocks_of(self.length);
        let mut digest = self.digest_before_edits(chunk, base);
        let mut changes: Vec<Change> = Vec::new();
        for index in &self.holes {
            match changes.last_mut() {
                Some(run) if run.first + run.count == *index => run.count += 1,
                _ => changes.push(Change { first: *index, count: 1, block: HOLE, crcs: Vec::new() }),
            }
        }
        let mut writes = Vec::new();
        let mut edits = self.edits.iter();
        for extent in taken.iter().flat_map(|extent| extent.pieces(REQUEST_BLOCKS)) {
            let mut out = buffer(extent.count as usize * BLOCK_BYTES);
            for (i, bytes) in out.as_chunks_mut::<BLOCK_BYTES>().0.iter_mut().enumerate() {
                let edit = edits.next().expect("as many blocks were taken as there are edits");
                if let Some(old) = old.get(&edit.index) {
                    bytes.copy_from_slice(old);
                    bytes[edit.zero.clone()].fill(0);
                } else {
                    bytes[..edit.fill.start].fill(0);
                    bytes[edit.fill.end..].fill(0);
                }
                bytes[edit.fill.clone()].copy_from_slice(&payload[edit.from..edit.from + edit.fill.len()]);
                let plain = crc32c::crc32c(bytes);
                let crc = bind(&seal(chunk, edit.index, op.version), plain);
                let before = match self.whole {
                    true => *ZERO_UNIT_CRC,
                    false => plain_crc(chunk, edit.index, base.get(edit.index)),
                };
                digest.replace(units - 1 - edit.index, before, plain);
                let block = extent.start + i as u32;
                match changes.last_mut() {
                    Some(run)
                        if run.block != HOLE
                            && run.first + run.count == edit.index
                            && run.block + run.count == block =>
                    {
                        run.count += 1;
                        run.crcs.push(crc);
                    }
                    _ => changes.push(Change { first: edit.index, count: 1, block, crcs: vec![crc] }),
                }
            }
            writes.push((extent.start, out));
        }
        changes.sort_by_key(|c| c.first);
        let record = PendingRecord {
            chunk,
            base: op.base,
            version: op.version,
            length: self.length,
            digest: digest.finish(),
            removes: self.removes,
            at_once: op.at_once,
            whole: self.whole,
            context: op.update.context,
            changes,
        };
        Composed { record, writes }
    }

    /// The checksum of the chunk as if the edited blocks stayed as they are.
    fn digest_before_edits(&self, chunk: ChunkId, base: &Base) -> Digest {
        let (had, has) = (blocks_of(base.entry.length), blocks_of(self.length));
        let mut digest = Digest::default();
        if self.whole || self.removes {
            digest.push_zeros(has);
        } else if has < had {
            (0..has).for_each(|i| digest.push(plain_crc(chunk, i, base.get(i))));
        } else {
            digest = Digest::resume(base.entry.digest);
            digest.push_zeros(has - had);
            for index in &self.holes {
                digest.replace(has - 1 - index, plain_crc(chunk, *index, base.get(*index)), *ZERO_UNIT_CRC);
            }
        }
        digest
    }
}

/// CRC-32C of a block's content alone.
fn plain_crc(chunk: ChunkId, index: u32, ptr: Option<BlockPtr>) -> u32 {
    ptr.map_or(*ZERO_UNIT_CRC, |ptr| unbind(&seal(chunk, index, ptr.version), ptr.crc))
}

/// Whether a block is what its pointer says.
pub(super) fn is_intact(chunk: ChunkId, index: u32, ptr: BlockPtr, block: &[u8]) -> bool {
    bind(&seal(chunk, index, ptr.version), crc32c::crc32c(block)) == ptr.crc
}
