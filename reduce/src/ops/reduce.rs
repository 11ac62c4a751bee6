//! Reductions over links: every rank owns one slice, receives the others' contributions to it
//! piece by piece, reduces each piece along the canonical tree in one pass, and sends the result
//! where it is wanted (direct exchange).
//!
//! Cost per rank for an all-reduce of S bytes over N ranks: 2 (N-1)/N S each way, the least that
//! is possible, in two rounds; 2 (N-1) messages per piece. With L ranks per node it sends L times
//! what two levels ([`super::levels`]) send between nodes: the price of a tree that does not depend on
//! placement where a node's ranks are no subtree of it.

use super::Context;
use crate::kernels::{self, Stage};
use crate::scratch::{Line, lines};
use crate::wire::{Event, Wire};
use std::sync::Arc;

/// Marks the parts that carry results.
pub(super) const RESULT: u32 = 1 << 19;
/// Pieces of the own slice under way at once: one is reduced while the next arrive.
const WINDOW: usize = 3;
/// All contributions under way fit in about this much.
const STAGING_BYTES: usize = 8 << 20;

/// What one rank's slice is to this rank.
#[derive(Clone, Copy)]
pub(crate) struct Slice {
    /// This rank's contribution.
    pub(crate) input: *const u8,
    /// Where the result goes here; null if it is not wanted here.
    pub(crate) output: *mut u8,
    /// Elements.
    pub(crate) count: usize,
}

/// Who wants the results.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Every rank (all-reduce).
    ByAll,
    /// One rank (reduce).
    By(u32),
    /// Each rank its own slice (reduce-scatter).
    ByOwner,
}

/// See the module.
pub(crate) struct WireReduce {
    stage: Stage,
    /// Of this rank's contribution.
    factor: f64,
    /// The ranks that take part, in the order of the tree; indices below are places in it.
    members: Arc<[u32]>,
    /// Comes before all part numbers.
    base: u32,
    slices: Vec<Slice>,
    wanted: Wanted,
    /// Elements of a piece.
    piece: usize,
    staging: *mut u8,
    /// Where staging is, if not in the group's scratch.
    memory: Vec<Line>,
    /// Results that only pass through this rank on their way to the root; null if there are none.
    passing: *mut u8,
    me: usize,
    factors: Vec<f64>,
    /// Which contributions to the pieces under way have come, by (piece, member) as staging. A small
    /// last piece is sent at once, and overtakes a large one that waits to be asked for.
    contributed: Vec<bool>,
    /// Results that each rank has sent, in pieces.
    results: Vec<usize>,
    next: usize,
    outstanding: usize,
    begun: bool,
}

impl WireReduce {
    /// `slices` are the members', in their order; outputs hold elements of `stage.to`.
    pub(crate) fn new(
        stage: Stage,
        factor: f64,
        members: Arc<[u32]>,
        base: u32,
        slices: Vec<Slice>,
        wanted: Wanted,
    ) -> Self {
        let ranks = slices.len();
        // Depends on the group's size and the type alone: all ranks cut alike.
        let piece_bytes = (STAGING_BYTES / WINDOW / ranks.max(1)).clamp(16 << 10, 512 << 10) & !63;
        Self {
            stage,
            factor,
            members,
            base,
            slices,
            wanted,
            piece: piece_bytes / stage.from.size(),
            staging: std::ptr::null_mut(),
            memory: Vec::new(),
            passing: std::ptr::null_mut(),
            me: 0,
            factors: vec![factor; ranks],
            contributed: vec![false; WINDOW * ranks],
            results: vec![0; ranks],
            next: 0,
            outstanding: 0,
            begun: false,
        }
    }

    fn pieces(&self, rank: usize) -> usize {
        self.slices[rank].count.div_ceil(self.piece)
    }

    /// Offset and length of a piece of rank's slice, in elements.
    fn range(&self, rank: usize, piece: usize) -> (usize, usize) {
        let start = piece * self.piece;
        (start, self.piece.min(self.slices[rank].count - start))
    }

    fn stride(&self) -> usize {
        (self.piece * self.stage.from.size()).next_multiple_of(64)
    }

    /// Staging of `rank`'s contribution to piece `piece` of the own slice.
    fn place(&self, rank: usize, piece: usize) -> *mut u8 {
        let index = (piece % WINDOW) * self.slices.len() + rank;
        // SAFETY: begin() took WINDOW * ranks strides.
        unsafe { self.staging.add(index * self.stride()) }
    }

    pub(super) fn begin(&mut self, cx: &mut Context<'_>) {
        let ranks = self.slices.len();
        let me = self.members.iter().position(|&r| r == cx.rank).expect("this rank takes part");
        self.begun = true;
        self.me = me;
        let (from, to) = (self.stage.from.size(), self.stage.to.size());
        let window = WINDOW * ranks * self.stride();
        let slice = self.slices[me];
        let passing = if slice.output.is_null() { slice.count * to } else { 0 };
        // The scratch is for one operation at a time; of parts of one there may be several.
        self.staging = if self.base == 0 {
            cx.scratch.take(window + passing)
        } else {
            self.memory = lines(window + passing);
            self.memory.as_mut_ptr().cast()
        };
        if passing > 0 {
            // SAFETY: window + passing bytes were taken.
            self.passing = unsafe { self.staging.add(window) };
        }
        for piece in 0..self.pieces(me).min(WINDOW) {
            self.expect(cx, piece);
        }
        // Results land where they belong; each is sent only after this rank's contribution to it
        // was received, so an in-place all-reduce never overwrites what is still to be sent.
        for rank in (0..ranks).filter(|&r| r != me && !self.slices[r].output.is_null()) {
            for piece in 0..self.pieces(rank) {
                let (start, len) = self.range(rank, piece);
                // SAFETY: inside the slice's output.
                let ptr = unsafe { self.slices[rank].output.add(start * to) };
                let part = self.base | RESULT | piece as u32;
                cx.wire.recv(self.members[rank], cx.sequence, part, cx.descriptor, ptr, len * to);
                self.outstanding += 1;
            }
        }
        let extra = self.factor.to_bits();
        let most = (0..ranks).map(|r| self.pieces(r)).max().unwrap_or(0);
        // Piece by piece over the peers, each rank starting with its successor, so that no rank
        // is everybody's first target.
        for piece in 0..most {
            for rank in (1..ranks).map(|d| (me + d) % ranks) {
                if piece >= self.pieces(rank) {
                    continue;
                }
                let (start, len) = self.range(rank, piece);
                // SAFETY: inside the slice's input.
                let ptr = unsafe { self.slices[rank].input.add(start * from) };
                let part = self.base | piece as u32;
                cx.wire.send(self.members[rank], cx.sequence, part, cx.descriptor, extra, ptr, len * from);
                self.outstanding += 1;
            }
        }
    }

    /// Posts staging for every rank's contribution to `piece` of the own slice.
    fn expect(&mut self, cx: &mut Context<'_>, piece: usize) {
        let me = self.me;
        let bytes = self.range(me, piece).1 * self.stage.from.size();
        for rank in (0..self.slices.len()).filter(|&r| r != me) {
            let ptr = self.place(rank, piece);
            let part = self.base | piece as u32;
            cx.wire.recv(self.members[rank], cx.sequence, part, cx.descriptor, ptr, bytes);
            self.outstanding += 1;
        }
    }

    pub(super) fn event(&mut self, event: Event) {
        match event {
            Event::Sent { .. } => self.outstanding -= 1,
            Event::Received { peer, part, extra, .. } => {
                self.outstanding -= 1;
                let place = self.members.iter().position(|&r| r == peer).expect("only members send");
                if part & RESULT != 0 {
                    self.results[place] += 1;
                } else {
                    let piece = (part & (RESULT - 1)) as usize;
                    let row = (piece % WINDOW) * self.members.len();
                    self.contributed[row + place] = true;
                    self.factors[place] = f64::from_bits(extra);
                }
            }
            Event::P2pSent { .. } | Event::P2pReceived { .. } => {}
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        let me = self.me;
        let mut moved = false;
        while self.next < self.pieces(me) && (0..self.slices.len()).all(|r| self.has(r)) {
            self.reduce_piece(cx);
            moved = true;
        }
        moved
    }

    /// Whether a member's contribution to the next piece is there.
    fn has(&self, member: usize) -> bool {
        member == self.me || self.contributed[(self.next % WINDOW) * self.members.len() + member]
    }

    fn reduce_piece(&mut self, cx: &mut Context<'_>) {
        let me = self.me;
        let piece = self.next;
        let (start, len) = self.range(me, piece);
        let (from, to) = (self.stage.from.size(), self.stage.to.size());
        let slice = self.slices[me];
        // SAFETY: inside the slice's input and, if there is one, output.
        let own = unsafe { slice.input.add(start * from) };
        let srcs: Vec<*const u8> = (0..self.slices.len())
            .map(|r| if r == me { own } else { self.place(r, piece).cast_const() })
            .collect();
        let dst = if slice.output.is_null() {
            // SAFETY: inside the block that begin() took for a slice without an output.
            unsafe { self.passing.add(start * to) }
        } else {
            // SAFETY: as above.
            unsafe { slice.output.add(start * to) }
        };
        // SAFETY: the sources hold len elements: staging fully received, own input as submitted;
        // dst is staging of its own or the output, equal to the own input or apart from it.
        unsafe { kernels::reduce_stage(cx.tier, self.stage, dst, &srcs, &self.factors, len) };
        *cx.reduced_bytes += (srcs.len() * len * from) as u64;
        let part = self.base | RESULT | piece as u32;
        let (sequence, descriptor) = (cx.sequence, cx.descriptor);
        let ranks = self.slices.len();
        match self.wanted {
            Wanted::ByAll => {
                for rank in (1..ranks).map(|d| (me + d) % ranks) {
                    cx.wire.send(self.members[rank], sequence, part, descriptor, 0, dst, len * to);
                    self.outstanding += 1;
                }
            }
            Wanted::By(root) if root as usize != me => {
                cx.wire.send(root, sequence, part, descriptor, 0, dst, len * to);
                self.outstanding += 1;
            }
            Wanted::By(_) | Wanted::ByOwner => {}
        }
        let row = (piece % WINDOW) * ranks;
        self.contributed[row..row + ranks].fill(false);
        self.next += 1;
        if piece + WINDOW < self.pieces(me) {
            self.expect(cx, piece + WINDOW);
        }
    }

    pub(super) fn done(&self) -> bool {
        self.begun && self.outstanding == 0 && self.next == self.pieces(self.me)
    }

    pub(super) fn missing(&self, wire: &Wire, sequence: u64) -> Vec<u32> {
        let waiting = wire.waiting_for(sequence);
        // Who has not contributed is to blame; who has not sent a result may itself wait.
        let me = self.me;
        if self.next < self.pieces(me) {
            let blamed: Vec<u32> =
                (0..self.slices.len()).filter(|&r| !self.has(r)).map(|r| self.members[r]).collect();
            if !blamed.is_empty() {
                return blamed;
            }
        }
        waiting
    }
}
