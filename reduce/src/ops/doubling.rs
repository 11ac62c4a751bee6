//! All-reduce by recursive doubling and by halving and doubling, along the canonical tree.
//!
//! Blocks of 2^k members are the subtrees of height k. In round k of the doubling, every member of a
//! block gets the partial result of the sibling block and combines the two, the lower block's on the
//! left. A last block may have fewer members than its sibling: each of its members then gives its
//! result to several of the sibling's. A block without a sibling passes.
//!
//! Halving does the same with pairs at distance 2^k, each of which keeps one half of what it still
//! has; then the results are gathered in the opposite order. It needs a power of two of members.
//!
//! Cost of S bytes over n members: doubling log2 n rounds, S log2 n bytes each way; halving 2 log2 n
//! rounds, 2 (n-1)/n S bytes each way. Partial results of 16-bit elements are f32: twice the bytes.

use super::Context;
use crate::kernels::{self, Stage};
use crate::scratch::{Line, lines};
use crate::wire::Event;
use std::sync::Arc;

/// Marks the rounds that gather results.
const GATHER: u32 = 1 << 8;

/// What both schemes work on.
pub(crate) struct Part {
    /// Inner stages; from and to are the same type.
    pub(crate) inner: Stage,
    /// The last stage.
    pub(crate) root: Stage,
    /// The ranks that take part, in the order of the tree.
    pub(crate) members: Arc<[u32]>,
    /// Comes before all part numbers.
    pub(crate) base: u32,
    /// This member's contribution, of `inner.from`; only read.
    pub(crate) input: *const u8,
    /// The result, of `root.to`; may be the input's memory if the types are equal.
    pub(crate) output: *mut u8,
    /// Elements.
    pub(crate) count: usize,
}

/// See the module.
pub(crate) struct Rounds {
    part: Part,
    halving: bool,
    me: usize,
    /// Three blocks of the partial type: two results in turn, and what comes in.
    memory: Vec<Line>,
    round: u32,
    /// In the gathering rounds of halving.
    gathering: bool,
    posted: bool,
    outstanding: usize,
    /// Elements that this member still has (halving).
    from: usize,
    len: usize,
    begun: bool,
    finished: bool,
}

impl Rounds {
    pub(crate) fn doubling(part: Part) -> Self {
        Self::new(part, false)
    }

    /// For a power of two of members.
    pub(crate) fn halving(part: Part) -> Self {
        assert!(part.members.len().is_power_of_two());
        Self::new(part, true)
    }

    fn new(part: Part, halving: bool) -> Self {
        assert!(part.members.len() > 1, "a reduction over one member is none");
        let len = part.count;
        Self {
            part,
            halving,
            me: 0,
            memory: Vec::new(),
            round: 0,
            gathering: false,
            posted: false,
            outstanding: 0,
            from: 0,
            len,
            begun: false,
            finished: false,
        }
    }

    fn size(&self) -> usize {
        self.part.inner.from.size()
    }

    fn block_bytes(&self) -> usize {
        (self.part.count * self.size()).next_multiple_of(64)
    }

    fn block(&mut self, index: usize) -> *mut u8 {
        let at = index * self.block_bytes();
        // SAFETY: begin() took three blocks.
        unsafe { self.memory.as_mut_ptr().cast::<u8>().add(at) }
    }

    /// The result of the rounds before `round`.
    fn current(&mut self) -> *const u8 {
        // The input until something was combined: every member combines in the last round, and a
        // member that passed a round has moved its result along with it.
        if self.round == 0 { self.part.input } else { self.block((self.round as usize - 1) % 2) }
    }

    pub(super) fn begin(&mut self, cx: &mut Context<'_>) {
        self.begun = true;
        self.me = self.part.members.iter().position(|&r| r == cx.rank).expect("this rank takes part");
        self.memory = lines(3 * self.block_bytes());
    }

    pub(super) fn event(&mut self, event: Event) {
        if matches!(event, Event::Sent { .. } | Event::Received { .. }) {
            self.outstanding -= 1;
        }
    }

    fn members(&self) -> usize {
        self.part.members.len()
    }

    /// The members of the block of `index` at height `k`: first, number.
    fn block_of(&self, index: usize, k: u32) -> (usize, usize) {
        let first = index << k;
        (first, (1usize << k).min(self.members().saturating_sub(first)))
    }

    /// Whom this member sends its result to in round k, and whose it gets.
    fn partners(&self, k: u32) -> (Vec<usize>, Option<usize>) {
        let mine = self.me >> k;
        let (_, size) = self.block_of(mine, k);
        let (sibling, siblings) = self.block_of(mine ^ 1, k);
        if siblings == 0 {
            return (Vec::new(), None);
        }
        let offset = self.me & ((1 << k) - 1);
        let to = (0..siblings).filter(|o| o % size == offset).map(|o| sibling + o).collect();
        (to, Some(sibling + offset % siblings))
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        if self.finished || !self.begun {
            return false;
        }
        let mut moved = false;
        while !self.finished {
            if !self.posted {
                if self.halving {
                    self.post_half(cx)
                } else {
                    self.post_whole(cx)
                }
                self.posted = true;
                moved = true;
            }
            if self.outstanding > 0 {
                return moved;
            }
            if self.halving {
                self.combine_half(cx)
            } else {
                self.combine_whole(cx)
            }
            self.posted = false;
            moved = true;
        }
        moved
    }

    fn exchange(
        &mut self,
        cx: &mut Context<'_>,
        part: u32,
        send: (&[usize], *const u8, usize),
        recv: (usize, *mut u8, usize),
    ) {
        let part = self.part.base | part;
        let (from, into, bytes) = recv;
        cx.wire.recv(self.part.members[from], cx.sequence, part, cx.descriptor, into, bytes);
        let (to, ptr, bytes) = send;
        for &member in to {
            cx.wire.send(self.part.members[member], cx.sequence, part, cx.descriptor, 0, ptr, bytes);
        }
        self.outstanding += 1 + to.len();
    }

    fn post_whole(&mut self, cx: &mut Context<'_>) {
        let (to, from) = self.partners(self.round);
        let Some(from) = from else { return };
        let (bytes, current, incoming) = (self.part.count * self.size(), self.current(), self.block(2));
        self.exchange(cx, self.round, (&to, current, bytes), (from, incoming, bytes));
    }

    fn combine_whole(&mut self, cx: &mut Context<'_>) {
        let last = 2usize << self.round >= self.members();
        let (current, incoming) = (self.current(), self.block(2).cast_const());
        let target = self.block(self.round as usize % 2);
        let bytes = self.part.count * self.size();
        if self.partners(self.round).1.is_none() {
            // SAFETY: both hold count elements; the block of the round before and the input are apart
            // from this round's block.
            unsafe { std::ptr::copy_nonoverlapping(current, target, bytes) };
        } else {
            let lower = self.me >> self.round & 1 == 0;
            let srcs = if lower { [current, incoming] } else { [incoming, current] };
            let (stage, dst) =
                if last { (self.part.root, self.part.output) } else { (self.part.inner, target) };
            // SAFETY: the sources hold count partial results, fully received; dst is a block of its own
            // or the output, which is equal to the input or apart from it.
            unsafe { kernels::reduce_stage(cx.tier, stage, dst, &srcs, &[], self.part.count) };
            *cx.reduced_bytes += 2 * bytes as u64;
        }
        self.round += 1;
        self.finished = last;
    }

    /// This member's half of what it has, and its partner's: (from, len) each.
    fn halves(&self) -> ((usize, usize), (usize, usize)) {
        let line = 64 / self.size().min(64);
        let first = (self.len / 2).next_multiple_of(line).min(self.len);
        let (a, b) = ((self.from, first), (self.from + first, self.len - first));
        if self.me >> self.round & 1 == 0 { (a, b) } else { (b, a) }
    }

    fn post_half(&mut self, cx: &mut Context<'_>) {
        let partner = self.me ^ 1 << self.round;
        if self.gathering {
            let size = self.part.root.to.size();
            let (mine, theirs) = self.halves_of(self.round);
            // SAFETY: both ranges lie inside the output.
            let (ptr, into) =
                unsafe { (self.part.output.add(mine.0 * size), self.part.output.add(theirs.0 * size)) };
            let send = (&[partner][..], ptr.cast_const(), mine.1 * size);
            return self.exchange(cx, GATHER | self.round, send, (partner, into, theirs.1 * size));
        }
        let size = self.size();
        let (mine, theirs) = self.halves();
        let (current, incoming) = (self.current(), self.block(2));
        // SAFETY: inside the blocks.
        let (ptr, into) = unsafe { (current.add(theirs.0 * size), incoming.add(mine.0 * size)) };
        self.exchange(cx, self.round, (&[partner], ptr, theirs.1 * size), (partner, into, mine.1 * size));
    }

    /// As [`Rounds::halves`], for a round of the way back.
    fn halves_of(&self, round: u32) -> ((usize, usize), (usize, usize)) {
        let mut again = (0, self.part.count);
        let mut both = (again, again);
        for k in 0..=round {
            let line = 64 / self.size().min(64);
            let first = (again.1 / 2).next_multiple_of(line).min(again.1);
            let (a, b) = ((again.0, first), (again.0 + first, again.1 - first));
            both = if self.me >> k & 1 == 0 { (a, b) } else { (b, a) };
            again = both.0;
        }
        both
    }

    fn combine_half(&mut self, cx: &mut Context<'_>) {
        let rounds = self.members().trailing_zeros();
        if self.gathering {
            if self.round == 0 {
                self.finished = true;
            } else {
                self.round -= 1;
            }
            return;
        }
        let size = self.size();
        let (mine, _) = self.halves();
        let last = self.round + 1 == rounds;
        let (current, incoming) = (self.current(), self.block(2).cast_const());
        let target = self.block(self.round as usize % 2);
        // SAFETY: inside the blocks and, for the last round, the output.
        let (current, incoming) = unsafe { (current.add(mine.0 * size), incoming.add(mine.0 * size)) };
        let lower = self.me >> self.round & 1 == 0;
        let srcs = if lower { [current, incoming] } else { [incoming, current] };
        // SAFETY: as above.
        let (stage, dst) = unsafe {
            if last {
                (self.part.root, self.part.output.add(mine.0 * self.part.root.to.size()))
            } else {
                (self.part.inner, target.add(mine.0 * size))
            }
        };
        // SAFETY: as in combine_whole; ranges of both members are apart.
        unsafe { kernels::reduce_stage(cx.tier, stage, dst, &srcs, &[], mine.1) };
        *cx.reduced_bytes += 2 * (mine.1 * size) as u64;
        (self.from, self.len) = mine;
        if last {
            self.gathering = true;
        } else {
            self.round += 1;
        }
    }

    pub(super) fn done(&self) -> bool {
        self.finished
    }
}
