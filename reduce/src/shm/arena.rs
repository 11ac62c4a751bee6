//! Collectives of one node through staging slots: each rank stages its input where all ranks of
//! the node read it, reduces its share of every step from all inputs in one pass, and collects
//! the others' shares. Steps are pipelined over [`SLOTS`] slots.
//!
//! Three counters per rank say how far it is; they only grow, over all operations:
//!
//! | counter | promise to the others |
//! | --- | --- |
//! | staged  | the slot's input and label are complete |
//! | reduced | the slot's output is complete |
//! | consumed | this rank reads nothing more of that step, on any rank |
//!
//! A slot is written again only when every rank has consumed its previous step.
//!
//! Cost per rank for an all-reduce of S bytes over N ranks: (N-1)/N S copied in, S read and S/N
//! written by the reduction (inputs of others from cache), S/N + (N-1)/N S copied out.

use super::ring::Doorbell;
use super::segment::{Control, SLOT_BYTES, SLOTS, Segment};
use crate::ReduceError;
use crate::dtype::{DType, ReduceOp};
use crate::header::Descriptor;
use crate::kernels::{self, Stage, Tier};
use crate::ops::exchange::OwnBlock;
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Up to this size (times ranks) every rank reduces everything: one exchange instead of two.
const WHOLE_BYTES: usize = 32 << 10;

/// The slots of all ranks of this node, as one rank sees them.
pub(crate) struct Arena {
    /// This rank's place among the ranks of its node; so are all "ranks" here, except in messages.
    rank: usize,
    /// What the group calls the ranks of this node.
    names: Vec<u32>,
    /// Indexed by place.
    segments: Vec<Arc<Segment>>,
    bells: Vec<Arc<Doorbell>>,
    /// Steps of all operations that this rank has begun.
    begun: u64,
    /// Bytes staged for others, bytes read from others, input bytes reduced.
    pub(crate) counted: Cell<Counted>,
}

/// For the statistics.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counted {
    pub(crate) staged: u64,
    pub(crate) read: u64,
    pub(crate) reduced: u64,
}

/// What an operation does with the slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// All-reduce; `whole`: every rank reduces everything.
    AllReduce { whole: bool },
    /// Reduce to a root.
    Reduce { root: usize },
    /// Reduce-scatter of equal blocks.
    ReduceScatter,
    /// All-gather of equal blocks; the output of rank i's block is `outputs[i]`.
    AllGather,
    /// Broadcast from a root.
    Broadcast { root: usize },
}

impl Mode {
    /// The mode for an all-reduce of `bytes` over `ranks`.
    pub(crate) fn all_reduce(bytes: usize, ranks: usize) -> Self {
        Self::AllReduce { whole: bytes * ranks <= WHOLE_BYTES && bytes <= SLOT_BYTES }
    }
}

/// One operation under way.
pub(crate) struct ArenaOp {
    pub(crate) mode: Mode,
    pub(crate) dtype: DType,
    pub(crate) op: ReduceOp,
    /// Elements: of the whole (all-reduce, reduce, broadcast) or of one block.
    pub(crate) count: usize,
    /// The input; for reduce-scatter N blocks, entry i for rank i; else one entry (may be null
    /// where the mode gives this rank nothing to read).
    pub(crate) inputs: Vec<*const u8>,
    /// The output; for all-gather N blocks; else one entry (null where nothing is wanted).
    pub(crate) outputs: Vec<*mut u8>,
    /// A root's own block of a broadcast that is not in place.
    pub(crate) own: Option<OwnBlock>,
    /// What is reduced is one part of a larger tree, and comes out as a partial result.
    pub(crate) part_of_tree: bool,
    first: u64,
    steps: u64,
    staged: u64,
    reduced: u64,
    collected: u64,
}

/// Elements from `start`, `len` of them.
#[derive(Clone, Copy)]
struct Range {
    start: usize,
    len: usize,
}

impl Arena {
    /// `names` are the ranks of this node, `rank` this one's place among them; `segments[i]` is that of
    /// the rank at place i, `bells` are the other ranks'.
    pub(crate) fn new(
        rank: usize,
        names: Vec<u32>,
        segments: Vec<Arc<Segment>>,
        bells: Vec<Arc<Doorbell>>,
    ) -> Self {
        Self { rank, names, segments, bells, begun: 0, counted: Cell::default() }
    }

    fn control(&self, rank: usize) -> &Control {
        self.segments[rank].control()
    }

    fn ring(&self) {
        for bell in &self.bells {
            bell.ring();
        }
    }

    fn size(&self) -> usize {
        self.segments.len()
    }

    fn count(&self, staged: usize, read: usize, reduced: usize) {
        let mut counted = self.counted.get();
        counted.staged += staged as u64;
        counted.read += read as u64;
        counted.reduced += reduced as u64;
        self.counted.set(counted);
    }

    fn others(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.size()).filter(|&r| r != self.rank)
    }
}

impl ArenaOp {
    pub(crate) fn new(
        mode: Mode,
        dtype: DType,
        op: ReduceOp,
        count: usize,
        inputs: Vec<*const u8>,
        outputs: Vec<*mut u8>,
    ) -> Self {
        Self {
            mode,
            dtype,
            op,
            count,
            inputs,
            outputs,
            own: None,
            part_of_tree: false,
            first: 0,
            steps: 0,
            staged: 0,
            reduced: 0,
            collected: 0,
        }
    }

    /// Elements per step: of the whole, or of one block. A multiple of 64 bytes.
    fn stride(&self, ranks: usize) -> usize {
        let bytes = match self.mode {
            Mode::ReduceScatter => (SLOT_BYTES / ranks) & !63,
            _ => SLOT_BYTES,
        };
        // The output half holds as many elements as the input half, in the type they come out in.
        bytes / self.dtype.size().max(self.tree_stage(ranks).to.size())
    }

    fn tree_stage(&self, ranks: usize) -> Stage {
        if self.part_of_tree {
            Stage::leaves(self.dtype, self.op)
        } else {
            Stage::whole(self.dtype, self.op, ranks)
        }
    }

    /// Whether blocks of this many ranks fit the slots at all.
    pub(crate) fn fits(ranks: usize) -> bool {
        ranks * 64 <= SLOT_BYTES
    }

    pub(crate) fn begin(&mut self, arena: &mut Arena) {
        if let Some(own) = self.own.take() {
            own.copy();
        }
        let stride = self.stride(arena.size());
        self.steps = self.count.div_ceil(stride) as u64;
        self.first = arena.begun;
        arena.begun += self.steps;
    }

    pub(crate) fn done(&self) -> bool {
        self.collected == self.steps
    }

    /// Elements of step `i`.
    fn range(&self, i: u64, ranks: usize) -> Range {
        let stride = self.stride(ranks);
        let start = i as usize * stride;
        Range { start, len: stride.min(self.count - start) }
    }

    /// Rank's share of a step's elements. Shares are whole cache lines, except the last.
    fn share(&self, range: Range, rank: usize, ranks: usize) -> Range {
        let line = 64 / self.dtype.size().min(64);
        let lines = range.len.div_ceil(line);
        let (each, more) = (lines / ranks, lines % ranks);
        let from = (rank * each + rank.min(more)) * line;
        let to = from + (each + usize::from(rank < more)) * line;
        let (from, to) = (from.min(range.len), to.min(range.len));
        Range { start: from, len: to - from }
    }

    /// Advances by at most one step in each stage; whether anything happened.
    pub(crate) fn poll(
        &mut self,
        arena: &Arena,
        sequence: u64,
        descriptor: &Descriptor,
        tier: Tier,
    ) -> Result<bool, ReduceError> {
        let mut moved = false;
        if self.staged < self.steps && self.slot_free(arena) {
            self.stage(arena, sequence, descriptor);
            moved = true;
        }
        if self.reduced < self.staged && self.inputs_ready(arena) {
            self.reduce(arena, sequence, descriptor, tier)?;
            moved = true;
        }
        if self.collected < self.reduced && self.outputs_ready(arena) {
            self.collect(arena);
            moved = true;
        }
        Ok(moved)
    }

    fn slot_free(&self, arena: &Arena) -> bool {
        let step = self.first + self.staged;
        let Some(previous) = step.checked_sub(SLOTS as u64) else { return true };
        arena.others().all(|r| arena.control(r).consumed.0.load(Ordering::Acquire) > previous)
    }

    /// Which ranks' input the next reduction reads.
    fn reads_input_of(&self, arena: &Arena, rank: usize) -> bool {
        match self.mode {
            Mode::Broadcast { root } => rank == root && arena.rank != root,
            _ => true,
        }
    }

    fn inputs_ready(&self, arena: &Arena) -> bool {
        let step = self.first + self.reduced;
        arena.others().all(|r| {
            !self.reads_input_of(arena, r) || arena.control(r).staged.0.load(Ordering::Acquire) > step
        })
    }

    fn reads_output_of(&self, arena: &Arena, rank: usize) -> bool {
        let _ = rank;
        match self.mode {
            Mode::AllReduce { whole } => !whole,
            Mode::Reduce { root } => arena.rank == root,
            _ => false,
        }
    }

    fn outputs_ready(&self, arena: &Arena) -> bool {
        let step = self.first + self.collected;
        arena.others().all(|r| {
            !self.reads_output_of(arena, r) || arena.control(r).reduced.0.load(Ordering::Acquire) > step
        })
    }

    /// Ranks that this one waits for.
    pub(crate) fn missing(&self, arena: &Arena) -> Vec<u32> {
        let behind = |counter: fn(&Control) -> u64, step: u64, reads: &dyn Fn(usize) -> bool| {
            arena
                .others()
                .filter(|&r| reads(r) && counter(arena.control(r)) <= step)
                .map(|r| arena.names[r])
                .collect::<Vec<_>>()
        };
        if self.reduced < self.staged {
            let missing = behind(|c| c.staged.0.load(Ordering::Acquire), self.first + self.reduced, &|r| {
                self.reads_input_of(arena, r)
            });
            if !missing.is_empty() {
                return missing;
            }
        }
        if self.collected < self.reduced {
            let missing =
                behind(|c| c.reduced.0.load(Ordering::Acquire), self.first + self.collected, &|r| {
                    self.reads_output_of(arena, r)
                });
            if !missing.is_empty() {
                return missing;
            }
        }
        match (self.first + self.staged).checked_sub(SLOTS as u64) {
            Some(previous) if self.staged < self.steps => {
                behind(|c| c.consumed.0.load(Ordering::Acquire), previous, &|_| true)
            }
            _ => Vec::new(),
        }
    }

    fn stage(&mut self, arena: &Arena, sequence: u64, descriptor: &Descriptor) {
        let step = self.first + self.staged;
        let ranks = arena.size();
        let range = self.range(self.staged, ranks);
        let size = self.dtype.size();
        let mine = &arena.segments[arena.rank];
        mine.control().labels[step as usize % SLOTS].set(sequence, descriptor, self.op.factor());
        let slot = mine.slot_input(step);
        // Copies `range` of `input` to `at` elements into the slot.
        let copy = |input: *const u8, from: usize, at: usize, len: usize| {
            // SAFETY: from + len <= count elements of a submitted operation's input; at + len is
            // at most the slot's size by `stride`; every reader has consumed the slot's last step.
            unsafe {
                std::ptr::copy_nonoverlapping(input.add(from * size), slot.add(at * size), len * size);
            }
            arena.count(len * size, 0, 0);
        };
        match self.mode {
            Mode::AllReduce { whole: true } | Mode::AllGather => {
                copy(self.inputs[0], range.start, 0, range.len);
            }
            Mode::Broadcast { root } => {
                if root == arena.rank {
                    copy(self.inputs[0], range.start, 0, range.len);
                }
            }
            Mode::AllReduce { whole: false } | Mode::Reduce { .. } => {
                // All but the own share, which is reduced straight from the user's memory.
                let own = self.share(range, arena.rank, ranks);
                copy(self.inputs[0], range.start, 0, own.start);
                let after = own.start + own.len;
                copy(self.inputs[0], range.start + after, after, range.len - after);
            }
            Mode::ReduceScatter => {
                let stride = self.stride(ranks);
                for r in arena.others() {
                    copy(self.inputs[r], range.start, r * stride, range.len);
                }
            }
        }
        self.staged += 1;
        mine.control().staged.0.store(step + 1, Ordering::Release);
        arena.ring();
    }

    fn check_label(
        &self,
        arena: &Arena,
        rank: usize,
        sequence: u64,
        descriptor: &Descriptor,
    ) -> Result<f64, ReduceError> {
        let step = self.first + self.reduced;
        let (theirs, their_descriptor, factor) = arena.control(rank).labels[step as usize % SLOTS].get();
        if theirs != sequence || their_descriptor != *descriptor {
            return Err(ReduceError::Mismatch {
                detail: format!(
                    "ranks disagree about operation {sequence}: rank {} issued {descriptor}, rank {} issued \
                     {their_descriptor} as its operation {theirs}; all ranks must issue the same collectives in \
                     the same order",
                    arena.names[arena.rank], arena.names[rank]
                ),
            });
        }
        Ok(factor)
    }

    fn reduce(
        &mut self,
        arena: &Arena,
        sequence: u64,
        descriptor: &Descriptor,
        tier: Tier,
    ) -> Result<(), ReduceError> {
        let step = self.first + self.reduced;
        let ranks = arena.size();
        let range = self.range(self.reduced, ranks);
        let size = self.dtype.size();
        let mut factors = Vec::with_capacity(ranks);
        for r in 0..ranks {
            let factor = if r == arena.rank {
                self.op.factor()
            } else if self.reads_input_of(arena, r) {
                self.check_label(arena, r, sequence, descriptor)?
            } else {
                1.0
            };
            factors.push(factor);
        }
        // Where each rank's input of `at` elements into the slot lies; own input at `own`.
        let sources = |at: usize, own: *const u8| -> Vec<*const u8> {
            (0..ranks)
                .map(|r| {
                    if r == arena.rank {
                        return own;
                    }
                    // SAFETY: at is inside the slot.
                    unsafe { arena.segments[r].slot_input(step).add(at * size).cast_const() }
                })
                .collect()
        };
        // SAFETY: ranges lie inside the user's buffers.
        let user = |ptr: *const u8, at: usize| unsafe { ptr.add(at * size) };
        match self.mode {
            Mode::AllReduce { whole: true } => {
                let srcs = sources(0, user(self.inputs[0], range.start));
                let dst = user(self.outputs[0], range.start).cast_mut();
                // SAFETY: all sources hold range.len elements: slots as staged, own input as
                // submitted; dst is the output, equal to the own input or apart from it.
                unsafe { kernels::reduce(tier, self.dtype, self.op, dst, &srcs, &factors, range.len) };
                arena.count(0, (ranks - 1) * range.len * size, ranks * range.len * size);
            }
            Mode::AllReduce { whole: false } | Mode::Reduce { .. } => {
                let share = self.share(range, arena.rank, ranks);
                let srcs = sources(share.start, user(self.inputs[0], range.start + share.start));
                let slot = arena.segments[arena.rank].slot_output(step);
                let stage = self.tree_stage(ranks);
                // SAFETY: as above; dst is this rank's output slot, whose last readers are done.
                unsafe { kernels::reduce_stage(tier, stage, slot, &srcs, &factors, share.len) };
                arena.count(0, (ranks - 1) * share.len * size, ranks * share.len * size);
                let wanted = self.mode == (Mode::AllReduce { whole: false })
                    || self.mode == (Mode::Reduce { root: arena.rank });
                if wanted {
                    // SAFETY: both hold share.len elements of the type that comes out.
                    unsafe {
                        let dst = self.outputs[0].add((range.start + share.start) * stage.to.size());
                        std::ptr::copy_nonoverlapping(slot, dst, share.len * stage.to.size());
                    }
                }
            }
            Mode::ReduceScatter => {
                let at = arena.rank * self.stride(ranks);
                let srcs = sources(at, user(self.inputs[arena.rank], range.start));
                let dst = user(self.outputs[0], range.start).cast_mut();
                // SAFETY: as above.
                unsafe { kernels::reduce(tier, self.dtype, self.op, dst, &srcs, &factors, range.len) };
                arena.count(0, (ranks - 1) * range.len * size, ranks * range.len * size);
            }
            Mode::AllGather | Mode::Broadcast { .. } => {
                for r in 0..ranks {
                    let dst = match self.mode {
                        Mode::AllGather => self.outputs[r],
                        _ => self.outputs[0],
                    };
                    let own_input = r == arena.rank;
                    if !self.reads_input_of(arena, r) || (own_input && self.mode != Mode::AllGather) {
                        continue;
                    }
                    let src = if own_input {
                        user(self.inputs[0], range.start)
                    } else {
                        arena.segments[r].slot_input(step).cast_const()
                    };
                    let dst = user(dst, range.start).cast_mut();
                    if src != dst.cast_const() {
                        // SAFETY: both hold range.len elements; an own block in place is skipped.
                        unsafe { std::ptr::copy_nonoverlapping(src, dst, range.len * size) };
                    }
                    if !own_input {
                        arena.count(0, range.len * size, 0);
                    }
                }
            }
        }
        self.reduced += 1;
        arena.control(arena.rank).reduced.0.store(step + 1, Ordering::Release);
        if matches!(self.mode, Mode::AllReduce { whole: false } | Mode::Reduce { .. }) {
            arena.ring();
        }
        Ok(())
    }

    fn collect(&mut self, arena: &Arena) {
        let step = self.first + self.collected;
        let ranks = arena.size();
        let range = self.range(self.collected, ranks);
        let size = self.tree_stage(ranks).to.size();
        for r in arena.others() {
            if !self.reads_output_of(arena, r) {
                continue;
            }
            let share = self.share(range, r, ranks);
            // SAFETY: the share lies inside the user's output and inside the slot, whose owner has
            // published it.
            unsafe {
                let dst = self.outputs[0].add((range.start + share.start) * size);
                let src = arena.segments[r].slot_output(step);
                std::ptr::copy_nonoverlapping(src.cast_const(), dst, share.len * size);
            }
            arena.count(0, share.len * size, 0);
        }
        self.collected += 1;
        arena.control(arena.rank).consumed.0.store(step + 1, Ordering::Release);
        arena.ring();
    }
}
