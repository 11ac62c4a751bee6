//! All-reduce on two levels: within each node through the slots, between the nodes' leaders over the
//! links, chunk by chunk, so that both go on at the same time.
//!
//! Each chunk is reduced to a partial result at the leader (local), all-reduced among the leaders
//! (between), and handed to the node's ranks (local). Local steps have one order on all ranks:
//! reduce 0, reduce 1, share 0, reduce 2, share 1, ...; so the leaders exchange one chunk while the
//! node reduces the next. Chosen only where [`crate::placement`] finds that this is the canonical tree.
//!
//! Between the nodes go 2 (n-1)/n of the message per node for n nodes, whatever the number of ranks on
//! a node; for 16-bit elements half of that counts double, because partial results are f32.

use super::Context;
use super::doubling::{Part, Rounds};
use super::reduce::{Slice, Wanted, WireReduce};
use crate::ReduceError;
use crate::cutoffs::Algorithm;
use crate::dtype::{DType, ReduceOp};
use crate::kernels::{self, Stage};
use crate::scratch::{Line, lines};
use crate::shm::arena::{Arena, ArenaOp, Mode};
use crate::wire::{Event, Wire};
use std::collections::VecDeque;
use std::sync::Arc;

/// Bytes of a chunk: large enough that the exchange between nodes is bound by the link, small enough
/// that the first chunk is on the wire soon.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks fit their place in part numbers.
const MOST_CHUNKS: usize = 2000;
/// Bits of a part number that belong to the exchange of one chunk.
const CHUNK_SHIFT: u32 = 20;

/// The exchange of one chunk between the leaders.
enum Between {
    Direct(WireReduce),
    Rounds(Rounds),
}

struct Running {
    chunk: usize,
    op: Between,
    /// This node's partial result.
    _partial: Vec<Line>,
}

/// See the module.
pub(crate) struct TwoLevels {
    task: Task,
    state: State,
}

#[derive(Default)]
struct State {
    chunk: usize,
    chunks: usize,
    /// Local steps to come: (whether it shares a result, chunk).
    steps: VecDeque<(bool, usize)>,
    step: Option<(bool, usize, ArenaOp)>,
    /// The partial result that the local step writes.
    partial: Vec<Line>,
    running: Vec<Running>,
    exchanged: usize,
    /// By chunk: the exchange is over.
    ready: Vec<bool>,
    begun: bool,
}

/// What is to be carried out.
pub(crate) struct Task {
    pub(crate) dtype: DType,
    pub(crate) op: ReduceOp,
    pub(crate) algorithm: Algorithm,
    /// Ranks of the group.
    pub(crate) size: usize,
    pub(crate) leaders: Arc<[u32]>,
    /// Ranks of this node.
    pub(crate) local: usize,
    /// Whether this rank leads them.
    pub(crate) leads: bool,
    pub(crate) input: *const u8,
    /// May be the input's memory.
    pub(crate) output: *mut u8,
    pub(crate) count: usize,
}

impl TwoLevels {
    pub(crate) fn new(task: Task) -> Self {
        Self { task, state: State::default() }
    }

    fn range(&self, chunk: usize) -> (usize, usize) {
        let start = chunk * self.state.chunk;
        (start, self.state.chunk.min(self.task.count - start))
    }

    pub(super) fn begin(&mut self) {
        let bytes = CHUNK_BYTES
            .max((self.task.count * self.task.dtype.size()).div_ceil(MOST_CHUNKS))
            .next_multiple_of(64);
        self.state.chunk = bytes / self.task.dtype.size();
        let chunks = self.task.count.div_ceil(self.state.chunk);
        self.state.chunks = chunks;
        self.state.ready = vec![false; chunks];
        self.state.begun = true;
        for chunk in 0..=chunks {
            if chunk < chunks {
                self.state.steps.push_back((false, chunk));
            }
            if chunk > 0 && self.task.local > 1 {
                self.state.steps.push_back((true, chunk - 1));
            }
        }
    }

    pub(super) fn event(&mut self, event: Event) {
        let (Event::Sent { part, .. } | Event::Received { part, .. }) = event else { return };
        let chunk = (part >> CHUNK_SHIFT) as usize - 1;
        let running = self.state.running.iter_mut().find(|r| r.chunk == chunk);
        match &mut running.expect("an exchange ends after its last transfer").op {
            Between::Direct(op) => op.event(event),
            Between::Rounds(op) => op.event(event),
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Result<bool, ReduceError> {
        let mut moved = false;
        loop {
            let again = self.poll_local(cx)? | self.poll_between(cx);
            moved |= again;
            if !again {
                return Ok(moved);
            }
        }
    }

    fn poll_local(&mut self, cx: &mut Context<'_>) -> Result<bool, ReduceError> {
        if self.state.step.is_none() {
            let Some(&(shares, chunk)) = self.state.steps.front() else { return Ok(false) };
            if shares && self.task.leads && !self.state.ready[chunk] {
                return Ok(false);
            }
            self.state.steps.pop_front();
            if self.task.local == 1 {
                self.reduce_alone(cx, chunk);
                return Ok(true);
            }
            let mut op = if shares { self.share(chunk) } else { self.reduce(chunk) };
            op.begin(cx.arena.as_mut().expect("ranks of one node have slots"));
            self.state.step = Some((shares, chunk, op));
        }
        let (shares, chunk, op) = self.state.step.as_mut().expect("set above");
        let arena = cx.arena.as_ref().expect("ranks of one node have slots");
        let moved = op.poll(arena, cx.sequence, &cx.descriptor, cx.tier)?;
        if op.done() {
            let (shares, chunk) = (*shares, *chunk);
            self.state.step = None;
            if !shares && self.task.leads {
                let partial = std::mem::take(&mut self.state.partial);
                self.exchange(cx, chunk, partial);
            }
            return Ok(true);
        }
        Ok(moved)
    }

    /// The node's partial result of a chunk, at the leader.
    fn reduce(&mut self, chunk: usize) -> ArenaOp {
        let (start, len) = self.range(chunk);
        // SAFETY: inside the input.
        let input = unsafe { self.task.input.add(start * self.task.dtype.size()) };
        let output = if self.task.leads {
            self.state.partial = lines(len * kernels::partial(self.task.dtype).size());
            self.state.partial.as_mut_ptr().cast()
        } else {
            std::ptr::null_mut()
        };
        let mut op = ArenaOp::new(
            Mode::Reduce { root: 0 },
            self.task.dtype,
            self.task.op,
            len,
            vec![input],
            vec![output],
        );
        op.part_of_tree = true;
        op
    }

    /// A rank that is alone on its node has the node's partial result in its input.
    fn reduce_alone(&mut self, cx: &mut Context<'_>, chunk: usize) {
        let (start, len) = self.range(chunk);
        let mut partial = lines(len * kernels::partial(self.task.dtype).size());
        // SAFETY: the input holds the chunk, the new memory its partial results.
        unsafe {
            let input = self.task.input.add(start * self.task.dtype.size());
            let stage = Stage::leaves(self.task.dtype, self.task.op);
            let factors = [self.task.op.factor()];
            kernels::reduce_stage(cx.tier, stage, partial.as_mut_ptr().cast(), &[input], &factors, len);
        }
        self.exchange(cx, chunk, partial);
    }

    /// The leader's result of a chunk, to all ranks of the node.
    fn share(&self, chunk: usize) -> ArenaOp {
        let (start, len) = self.range(chunk);
        // SAFETY: inside the output.
        let output = unsafe { self.task.output.add(start * self.task.dtype.size()) };
        let mode = Mode::Broadcast { root: 0 };
        ArenaOp::new(mode, self.task.dtype, ReduceOp::Sum, len, vec![output.cast_const()], vec![output])
    }

    fn exchange(&mut self, cx: &mut Context<'_>, chunk: usize, partial: Vec<Line>) {
        let (start, count) = self.range(chunk);
        let root = Stage::root(self.task.dtype, self.task.op, self.task.size);
        let input: *const u8 = partial.as_ptr().cast();
        // SAFETY: inside the output.
        let output = unsafe { self.task.output.add(start * self.task.dtype.size()) };
        // 0 is a whole operation's.
        let base = (chunk as u32 + 1) << CHUNK_SHIFT;
        let members = self.task.leaders.clone();
        let inner = Stage::inner(self.task.dtype, self.task.op);
        let part = Part { inner, root, members: members.clone(), base, input, output, count };
        let mut op = match self.task.algorithm {
            Algorithm::Gather | Algorithm::Doubling => Between::Rounds(Rounds::doubling(part)),
            Algorithm::Halving if members.len().is_power_of_two() => Between::Rounds(Rounds::halving(part)),
            _ => {
                let slices = slices(&root, members.len(), input, output, count);
                Between::Direct(WireReduce::new(root, 1.0, members, base, slices, Wanted::ByAll))
            }
        };
        match &mut op {
            Between::Direct(op) => op.begin(cx),
            Between::Rounds(op) => op.begin(cx),
        }
        self.state.running.push(Running { chunk, op, _partial: partial });
    }

    fn poll_between(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        let state = &mut self.state;
        let (ready, exchanged) = (&mut state.ready, &mut state.exchanged);
        state.running.retain_mut(|running| {
            let (polled, done) = match &mut running.op {
                Between::Direct(op) => (op.poll(cx), op.done()),
                Between::Rounds(op) => (op.poll(cx), op.done()),
            };
            moved |= polled | done;
            if done {
                ready[running.chunk] = true;
                *exchanged += 1;
            }
            !done
        });
        moved
    }

    pub(super) fn done(&self) -> bool {
        let state = &self.state;
        state.begun
            && state.steps.is_empty()
            && state.step.is_none()
            && (!self.task.leads || state.exchanged == state.chunks)
    }

    pub(super) fn missing(&self, wire: &Wire, arena: Option<&Arena>, sequence: u64) -> Vec<u32> {
        if let (Some((_, _, op)), Some(arena)) = (&self.state.step, arena) {
            let missing = op.missing(arena);
            if !missing.is_empty() {
                return missing;
            }
        }
        wire.waiting_for(sequence)
    }
}

/// One slice per leader, whole cache lines of the partial type except the last.
fn slices(root: &Stage, leaders: usize, input: *const u8, output: *mut u8, count: usize) -> Vec<Slice> {
    let line = 64 / root.from.size();
    let lines = count.div_ceil(line);
    let at = |i: usize| ((lines * i / leaders) * line).min(count);
    (0..leaders)
        .map(|i| {
            let (from, to) = (at(i), at(i + 1));
            // SAFETY: inside the partial results and the output, which hold count elements.
            unsafe {
                Slice {
                    input: input.add(from * root.from.size()),
                    output: output.add(from * root.to.size()),
                    count: to - from,
                }
            }
        })
        .collect()
}
