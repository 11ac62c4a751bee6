//! Counts every block that something leads to, and compares with the allocator.

use super::Extent;
use super::alloc::Allocator;
use super::core::{Core, EngineError, Op};
use super::disk::Disk;
use super::index::Map;
use super::leaf::Leaf;
use super::state::LeafAt;
use firefly_types::lock;

/// What the blocks of a volume hold, in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Audit {
    /// Content of committed chunks.
    pub data: u32,
    /// Content of pending versions.
    pub pending: u32,
    /// Leaves of block maps in the last checkpoint.
    pub leaves: u32,
    /// The rest of the last checkpoint: table of chunks, bitmap, root.
    pub tables: u32,
    /// Free as soon as a record or a checkpoint is durable, or a read ends.
    pub leaving: u32,
}

impl<B: AsRef<[u8]>> Core<B> {
    /// Reads the maps of all chunks and checks that exactly the blocks that something leads to are
    /// marked as used, each once. Nothing may be under way.
    pub fn audit<D: Disk + ?Sized>(&self, disk: &D) -> Result<Audit, EngineError> {
        let wrong = |what: String| EngineError::Format(super::format::damaged(what));
        assert!(!lock(&self.writer).is_busy(), "an audit while something is under way");
        let log = lock(&self.writer).log_blocks();
        let chunks: Vec<_> = {
            let shared = lock(&self.shared);
            shared.state.index.iter().map(|(id, entry)| (id, entry.clone())).collect()
        };
        let (mut audit, mut all) = (Audit::default(), vec![Extent { start: 0, count: log + 2 }]);
        let mut count = |into: &mut u32, extents: &[Extent]| {
            *into += extents.iter().map(|e| e.count).sum::<u32>();
            all.extend(extents);
        };
        for (id, entry) in chunks {
            let mut data = Vec::new();
            if let Map::Block(Some(ptr)) = &entry.map {
                Extent::add(&mut data, ptr.block);
            }
            let mut plan =
                self.plan_read(id, false, 0..entry.length).ok_or_else(|| wrong(format!("{id} is gone")))?;
            self.load_leaves(disk, &mut plan)?;
            for (_, leaf) in plan.leaves.iter().filter(|_| !matches!(entry.map, Map::Block(_))) {
                if let LeafAt::Loaded(leaf) = leaf {
                    leaf.blocks_without(&Leaf::default(), &mut data);
                }
            }
            count(&mut audit.data, &data);
        }
        let mut shared = lock(&self.shared);
        let state = &mut shared.state;
        state.alloc.available();
        let place = |block| [Extent { start: block, count: 1 }];
        for (id, entry) in state.index.iter() {
            for (number, at) in entry.leaves().iter().enumerate() {
                match at.block {
                    super::format::HOLE => {}
                    super::index::DIRTY => {
                        let was = state.dirty[&(id, number as u32)].was;
                        was.iter().for_each(|at| count(&mut audit.leaves, &place(at.block)));
                    }
                    block => count(&mut audit.leaves, &place(block)),
                }
            }
        }
        for at in state.index.stored().chain(state.bitmap.iter().flatten().copied()) {
            count(&mut audit.tables, &place(at.block));
        }
        count(&mut audit.tables, &state.root);
        state.pending.values().for_each(|next| count(&mut audit.pending, &next.fresh));
        count(&mut audit.leaving, &state.later);
        let retired: Vec<Extent> = state.alloc.retired().collect();
        count(&mut audit.leaving, &retired);
        let mut alloc = Allocator::new(state.alloc.blocks());
        for op in &shared.queue {
            if let Op::Record(_, freed) = op {
                count(&mut audit.leaving, freed);
            }
        }
        for extent in all {
            if !alloc.mark(extent) {
                return Err(wrong(format!("{extent:?} is used twice or lies outside the volume")));
            }
        }
        match shared.state.alloc.difference(&alloc) {
            None => Ok(audit),
            Some(block) => Err(wrong(format!(
                "block {block} is marked as used and nothing leads to it, or the other way round: {audit:?}"
            ))),
        }
    }
}
