//! From an update to new blocks: what must be read, composed and written.

use super::BLOCK_BYTES;
use super::alloc::Allocator;
use super::buffer::AlignedBuf;
use super::disk::Disk;
use super::format::{BlockPtr, HOLE, NO_BLOCK, seal};
use super::image::{Chunk, Next};
use super::store::EngineError;
use firefly_types::ChunkId;
use fs3_core::target::{Kind, Update, bind};
use std::ops::Range;
use std::sync::Arc;

/// A write that waits for its turn.
pub(super) struct WriteOp<B> {
    pub(super) id: u64,
    pub(super) base: u64,
    pub(super) version: u64,
    pub(super) update: Update<B>,
    pub(super) at_once: bool,
}

/// One block to be composed anew.
struct Edit {
    index: u32,
    /// Content to start from, if any of it stays.
    old: Option<BlockPtr>,
    /// Bytes of the block that become zero.
    zero: Range<usize>,
    /// Bytes of the block that the payload gives, and from where in it.
    fill: Range<usize>,
    from: usize,
}

/// What one update does to the map.
pub(super) struct Plan {
    chunk: ChunkId,
    next: Chunk,
    edits: Vec<Edit>,
    /// Newly taken, one for each edit.
    pub(super) blocks: Vec<u32>,
}

/// Plans an update on top of `base`; takes its blocks. `None`: no room.
pub(super) fn plan<B: AsRef<[u8]>>(base: &Chunk, op: &WriteOp<B>, alloc: &mut Allocator) -> Option<Plan> {
    let update = &op.update;
    let payload = update.payload.as_ref().map_or(0, |p| p.as_ref().len());
    let mut next = Chunk { version: op.version, length: base.length, map: base.map.clone() };
    let mut edits = Vec::new();
    match update.kind {
        Kind::Write => {
            let (from, to) = (update.offset as usize, update.offset as usize + payload);
            next.length = next.length.max(to as u32);
            next.map = base.resized_map(next.length);
            for index in from / BLOCK_BYTES..to.div_ceil(BLOCK_BYTES) {
                let start = index * BLOCK_BYTES;
                let fill = from.max(start) - start..to.min(start + BLOCK_BYTES) - start;
                // Bytes past the chunk's end are zeros, so only bytes before it need be kept.
                let held = (base.length as usize).saturating_sub(start).min(BLOCK_BYTES);
                let keeps = fill.start > 0 || fill.end < held;
                let old = next.map[index];
                edits.push(Edit {
                    index: index as u32,
                    old: (keeps && old.block != HOLE).then_some(old),
                    zero: 0..0,
                    from: start + fill.start - from,
                    fill,
                });
            }
        }
        Kind::Truncate => {
            next.length = update.length;
            next.map = base.resized_map(next.length);
            let cut = update.length as usize % BLOCK_BYTES;
            if update.length < base.length && cut != 0 {
                edits.extend(zeroing(&next.map, update.length as usize / BLOCK_BYTES, cut..BLOCK_BYTES));
            }
        }
        Kind::Punch => {
            let from = update.offset.min(base.length) as usize;
            let to = (from + update.length as usize).min(base.length as usize);
            for index in from / BLOCK_BYTES..to.div_ceil(BLOCK_BYTES) {
                let start = index * BLOCK_BYTES;
                let zero = from.max(start) - start..to.min(start + BLOCK_BYTES) - start;
                if zero.start == 0 && start + zero.end >= (base.length as usize).min(start + BLOCK_BYTES) {
                    next.map[index] = NO_BLOCK;
                } else {
                    edits.extend(zeroing(&next.map, index, zero));
                }
            }
        }
        Kind::Replace => {
            let bytes = update.payload.as_ref().map_or(&[][..], |p| p.as_ref());
            next.length = payload as u32;
            next.map = vec![NO_BLOCK; payload.div_ceil(BLOCK_BYTES)];
            for (index, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
                // Holes stay holes on the replica.
                if block.iter().any(|b| *b != 0) {
                    let (fill, from) = (0..block.len(), index * BLOCK_BYTES);
                    edits.push(Edit { index: index as u32, old: None, zero: 0..0, fill, from });
                }
            }
        }
        Kind::Remove => {
            next.length = 0;
            next.map = Vec::new();
        }
    }
    let blocks = alloc.take(edits.len() as u32)?;
    Some(Plan { chunk: update.chunk, next, edits, blocks })
}

fn zeroing(map: &[BlockPtr], index: usize, zero: Range<usize>) -> Option<Edit> {
    let old = map.get(index).copied().filter(|p| p.block != HOLE)?;
    Some(Edit { index: index as u32, old: Some(old), zero, fill: 0..0, from: 0 })
}

impl Plan {
    /// Reads what stays of old blocks, composes the new ones and writes them (not yet durable).
    pub(super) fn execute<B: AsRef<[u8]>, D: Disk>(
        mut self,
        disk: &D,
        op: &WriteOp<B>,
    ) -> Result<Next, EngineError> {
        let payload = op.update.payload.as_ref().map_or(&[][..], |p| p.as_ref());
        let mut buffer = AlignedBuf::zeroed(self.edits.len() * BLOCK_BYTES);
        for ((edit, block), out) in
            self.edits.iter().zip(&self.blocks).zip(buffer.chunks_exact_mut(BLOCK_BYTES))
        {
            if let Some(old) = edit.old {
                let (chunk, index, block) = (self.chunk, edit.index, old.block);
                // A block that cannot be read is as good as a corrupt one: another replica has it.
                disk.read_data(u64::from(block) * BLOCK_BYTES as u64, out)
                    .map_err(|_| EngineError::Corrupt { chunk, index, block })?;
                verify(self.chunk, edit.index, old, out)?;
            }
            out[edit.zero.clone()].fill(0);
            out[edit.fill.clone()].copy_from_slice(&payload[edit.from..edit.from + edit.fill.len()]);
            let crc = bind(&seal(self.chunk, edit.index, op.version), crc32c::crc32c(out));
            self.next.map[edit.index as usize] = BlockPtr { block: *block, crc, version: op.version };
        }
        let mut done = 0;
        while done < self.blocks.len() {
            let run = self.blocks[done..].windows(2).take_while(|w| w[1] == w[0] + 1).count() + 1;
            let bytes = &buffer[done * BLOCK_BYTES..(done + run) * BLOCK_BYTES];
            disk.write_data(u64::from(self.blocks[done]) * BLOCK_BYTES as u64, bytes)
                .map_err(EngineError::Io)?;
            done += run;
        }
        Ok(Next {
            chunk: Arc::new(self.next),
            base: op.base,
            removes: op.update.kind == Kind::Remove,
            context: op.update.context,
        })
    }
}

/// Checks a block against the pointer that led to it.
pub(super) fn verify(chunk: ChunkId, index: u32, ptr: BlockPtr, block: &[u8]) -> Result<(), EngineError> {
    if bind(&seal(chunk, index, ptr.version), crc32c::crc32c(block)) == ptr.crc {
        return Ok(());
    }
    Err(EngineError::Corrupt { chunk, index, block: ptr.block })
}
