//! The chunks in memory: what the log's records add up to. Replay and the live engine use the
//! same transitions.

use super::BLOCK_BYTES;
use super::format::{BlockPtr, FormatError, HOLE, LogRecord, NO_BLOCK, seal};
use firefly_types::ChunkId;
use fs3_core::target::{
    Context, Digest, Meta, RecordPage, Records, Recovered, RecoveredPending, ZERO_UNIT_CRC, unbind,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// One version of one chunk.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Chunk {
    pub(super) version: u64,
    pub(super) length: u32,
    pub(super) map: Vec<BlockPtr>,
}

impl Chunk {
    /// The map cut or extended with holes to `length`.
    pub(super) fn resized_map(&self, length: u32) -> Vec<BlockPtr> {
        let mut map = self.map.clone();
        map.resize(length.div_ceil(BLOCK_BYTES as u32) as usize, NO_BLOCK);
        map
    }

    pub(super) fn meta(&self, id: ChunkId) -> Meta {
        let mut digest = Digest::default();
        for (index, ptr) in self.map.iter().enumerate() {
            digest.push(if ptr.block == HOLE {
                *ZERO_UNIT_CRC
            } else {
                unbind(&seal(id, index as u32, ptr.version), ptr.crc)
            });
        }
        Meta { version: self.version, length: self.length, digest: digest.finish() }
    }

    fn blocks(&self) -> impl Iterator<Item = u32> + '_ {
        self.map.iter().map(|p| p.block).filter(|b| *b != HOLE)
    }

    /// Blocks of `self` that `other` does not have, position by position (a block never moves
    /// within a map).
    fn blocks_without(&self, other: &Chunk) -> Vec<u32> {
        let kept = |index: usize| other.map.get(index).map(|p| p.block);
        self.map
            .iter()
            .enumerate()
            .filter(|(index, p)| p.block != HOLE && kept(*index) != Some(p.block))
            .map(|(_, p)| p.block)
            .collect()
    }
}

#[derive(Clone, PartialEq, Debug)]
pub(super) struct Next {
    pub(super) chunk: Arc<Chunk>,
    pub(super) base: u64,
    pub(super) removes: bool,
    pub(super) context: Context,
}

#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Entry {
    pub(super) committed: Option<Arc<Chunk>>,
    pub(super) pending: Option<Next>,
}

/// Everything that a target holds.
#[derive(Default)]
pub(super) struct Image {
    pub(super) chunks: BTreeMap<ChunkId, Entry>,
    pub(super) records: Records,
    pub(super) version_floor: u64,
}

/// Each transition returns the blocks that nothing points to any more.
impl Image {
    pub(super) fn set_pending(&mut self, id: ChunkId, next: Next) -> Vec<u32> {
        let entry = self.chunks.entry(id).or_default();
        let empty = Chunk::default();
        let old = entry.pending.replace(next);
        let base = entry.committed.as_deref().unwrap_or(&empty);
        old.map(|old| old.chunk.blocks_without(base)).unwrap_or_default()
    }

    pub(super) fn drop_pending(&mut self, id: ChunkId, version: u64) -> Vec<u32> {
        let Some(entry) = self.chunks.get_mut(&id) else { return Vec::new() };
        let Some(next) = entry.pending.take_if(|n| n.chunk.version == version) else { return Vec::new() };
        let empty = Chunk::default();
        let freed = next.chunk.blocks_without(entry.committed.as_deref().unwrap_or(&empty));
        self.tidy(id);
        freed
    }

    pub(super) fn commit(&mut self, id: ChunkId, version: u64) -> Vec<u32> {
        let Some(entry) = self.chunks.get_mut(&id) else { return Vec::new() };
        let Some(next) = entry.pending.take_if(|n| n.chunk.version == version) else { return Vec::new() };
        self.set_committed(id, next)
    }

    /// `next` takes effect at once.
    pub(super) fn set_committed(&mut self, id: ChunkId, next: Next) -> Vec<u32> {
        let entry = self.chunks.entry(id).or_default();
        let length = if next.removes { 0 } else { next.chunk.length };
        self.records.commit(&next.context, next.chunk.version, length);
        let empty = Chunk::default();
        let old = entry.committed.take();
        // A pending version (there is none in normal operation) would refer to the old map.
        let mut freed = match entry.pending.take() {
            Some(lost) => lost.chunk.blocks_without(old.as_deref().unwrap_or(&empty)),
            None => Vec::new(),
        };
        if next.removes {
            self.version_floor = self.version_floor.max(next.chunk.version);
            freed.extend(old.iter().flat_map(|c| c.blocks()));
        } else {
            freed.extend(old.map(|c| c.blocks_without(&next.chunk)).unwrap_or_default());
            entry.committed = Some(next.chunk);
        }
        self.tidy(id);
        freed
    }

    pub(super) fn remove(&mut self, id: ChunkId) -> Vec<u32> {
        let Some(entry) = self.chunks.remove(&id) else { return Vec::new() };
        let empty = Chunk::default();
        let mut freed = Vec::new();
        if let Some(next) = &entry.pending {
            freed = next.chunk.blocks_without(entry.committed.as_deref().unwrap_or(&empty));
        }
        if let Some(old) = &entry.committed {
            self.version_floor = self.version_floor.max(old.version);
            freed.extend(old.blocks());
        }
        freed
    }

    pub(super) fn merge(&mut self, page: &RecordPage) {
        self.records.merge(page);
        self.version_floor = self.version_floor.max(page.version_floor);
    }

    fn tidy(&mut self, id: ChunkId) {
        if self.chunks.get(&id).is_some_and(|e| e.committed.is_none() && e.pending.is_none()) {
            self.chunks.remove(&id);
        }
    }

    /// Applies a record read from disk.
    pub(super) fn replay(&mut self, record: LogRecord) -> Result<(), FormatError> {
        match record {
            LogRecord::Pending { chunk: id, base, version, length, removes, at_once, context, changes } => {
                let committed = self.chunks.get(&id).and_then(|e| e.committed.clone()).unwrap_or_default();
                if !at_once && committed.version != base {
                    return Err(FormatError::Damaged(format!(
                        "update {version} of chunk {id} builds on {base}, but {} is committed",
                        committed.version
                    )));
                }
                let mut map = committed.resized_map(length);
                for (index, ptr) in changes {
                    map[index as usize] = ptr;
                }
                let chunk = Arc::new(Chunk { version, length, map });
                let next = Next { chunk, base, removes, context };
                if at_once {
                    self.set_committed(id, next);
                } else {
                    self.set_pending(id, next);
                }
            }
            LogRecord::Commit { chunk, version } => {
                self.commit(chunk, version);
            }
            LogRecord::Drop { chunk, version } => {
                self.drop_pending(chunk, version);
            }
            LogRecord::Remove { chunk } => {
                self.remove(chunk);
            }
            LogRecord::Page(page) => self.merge(&page),
            LogRecord::Chunk { chunk, version, length, map } => {
                let committed = Some(Arc::new(Chunk { version, length, map }));
                self.chunks.insert(chunk, Entry { committed, pending: None });
            }
            LogRecord::End { .. } => {}
        }
        Ok(())
    }

    /// The records that recreate this image.
    pub(super) fn snapshot(&self) -> impl Iterator<Item = LogRecord> + '_ {
        let pages = self.records.pages(4096, self.version_floor).into_iter().map(LogRecord::Page);
        let chunks = self.chunks.iter().flat_map(|(id, entry)| {
            let committed = entry.committed.iter().map(|c| LogRecord::Chunk {
                chunk: *id,
                version: c.version,
                length: c.length,
                map: c.map.clone(),
            });
            let base = entry.committed.clone().unwrap_or_default();
            let pending = entry.pending.iter().map(move |n| n.record(*id, &base, false));
            committed.chain(pending)
        });
        pages.chain(chunks)
    }

    /// Every block that something points to, for the allocator; shared ones once.
    pub(super) fn used_blocks(&self) -> Vec<u32> {
        let empty = Chunk::default();
        let mut used = Vec::new();
        for entry in self.chunks.values() {
            let committed = entry.committed.as_deref().unwrap_or(&empty);
            used.extend(committed.blocks());
            if let Some(next) = &entry.pending {
                used.extend(next.chunk.blocks_without(committed));
            }
        }
        used
    }

    pub(super) fn recovered(&self) -> Recovered {
        let mut out = Recovered::default();
        for (id, entry) in &self.chunks {
            if let Some(chunk) = &entry.committed {
                out.committed.push((*id, chunk.meta(*id)));
            }
            if let Some(next) = &entry.pending {
                out.pending.push(RecoveredPending {
                    chunk: *id,
                    base: next.base,
                    meta: next.meta(*id),
                    removes: next.removes,
                    context: next.context,
                });
            }
        }
        out.records = self.records.pages(usize::MAX, self.version_floor).swap_remove(0);
        out
    }
}

impl Next {
    pub(super) fn meta(&self, id: ChunkId) -> Meta {
        if self.removes {
            return Meta { version: self.chunk.version, ..Meta::default() };
        }
        self.chunk.meta(id)
    }

    /// The log record: differences from the committed map.
    pub(super) fn record(&self, id: ChunkId, base: &Chunk, at_once: bool) -> LogRecord {
        let resized = base.resized_map(self.chunk.length);
        let changes = self.chunk.map.iter().zip(&resized).enumerate().filter(|(_, (new, old))| new != old);
        LogRecord::Pending {
            chunk: id,
            base: self.base,
            version: self.chunk.version,
            length: self.chunk.length,
            removes: self.removes,
            at_once,
            context: self.context,
            changes: changes.map(|(index, (new, _))| (index as u32, *new)).collect(),
        }
    }
}
