//! Reductions over links: every rank owns one slice, receives the others' contributions to it
//! piece by piece, reduces each piece along the canonical tree in one pass, and sends the result
//! where it is wanted (direct exchange).
//!
//! Cost per rank for an all-reduce of S bytes over N ranks: 2 (N-1)/N S each way, the least that
//! is possible, in two rounds; 2 (N-1) messages per piece. With L ranks per node it sends L times
//! what a two-level scheme would send between nodes: the price of a tree that does not depend on
//! placement when a node's ranks are no subtree of it.

use super::Context;
use crate::dtype::{DType, ReduceOp};
use crate::kernels;
use crate::wire::{Event, Wire};

/// Marks the parts that carry results.
const RESULT: u32 = 1 << 31;
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
    dtype: DType,
    op: ReduceOp,
    slices: Vec<Slice>,
    wanted: Wanted,
    /// Elements of a piece.
    piece: usize,
    staging: *mut u8,
    /// Results that only pass through this rank on their way to the root; null if there are none.
    passing: *mut u8,
    me: usize,
    factors: Vec<f64>,
    /// Contributions to the own slice that each rank has sent, in pieces.
    contributed: Vec<usize>,
    /// Results that each rank has sent, in pieces.
    results: Vec<usize>,
    next: usize,
    outstanding: usize,
    begun: bool,
}

impl WireReduce {
    pub(crate) fn new(dtype: DType, op: ReduceOp, slices: Vec<Slice>, wanted: Wanted) -> Self {
        let ranks = slices.len();
        // Depends on the group's size and the type alone: all ranks cut alike.
        let piece_bytes = (STAGING_BYTES / WINDOW / ranks.max(1)).clamp(16 << 10, 512 << 10) & !63;
        Self {
            dtype,
            op,
            slices,
            wanted,
            piece: piece_bytes / dtype.size(),
            staging: std::ptr::null_mut(),
            passing: std::ptr::null_mut(),
            me: 0,
            factors: vec![op.factor(); ranks],
            contributed: vec![0; ranks],
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
        (self.piece * self.dtype.size()).next_multiple_of(64)
    }

    /// Staging of `rank`'s contribution to piece `piece` of the own slice.
    fn place(&self, rank: usize, piece: usize) -> *mut u8 {
        let index = (piece % WINDOW) * self.slices.len() + rank;
        // SAFETY: begin() took WINDOW * ranks strides.
        unsafe { self.staging.add(index * self.stride()) }
    }

    pub(super) fn begin(&mut self, cx: &mut Context<'_>) {
        let (me, ranks) = (cx.rank as usize, self.slices.len());
        self.begun = true;
        self.me = me;
        let window = WINDOW * ranks * self.stride();
        let slice = self.slices[me];
        let passing = if slice.output.is_null() { slice.count * self.dtype.size() } else { 0 };
        self.staging = cx.scratch.take(window + passing);
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
                let ptr = unsafe { self.slices[rank].output.add(start * self.dtype.size()) };
                let part = RESULT | piece as u32;
                let bytes = len * self.dtype.size();
                cx.wire.recv(rank as u32, cx.sequence, part, cx.descriptor, ptr, bytes);
                self.outstanding += 1;
            }
        }
        let extra = self.op.factor().to_bits();
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
                let ptr = unsafe { self.slices[rank].input.add(start * self.dtype.size()) };
                let bytes = len * self.dtype.size();
                cx.wire.send(rank as u32, cx.sequence, piece as u32, cx.descriptor, extra, ptr, bytes);
                self.outstanding += 1;
            }
        }
    }

    /// Posts staging for every rank's contribution to `piece` of the own slice.
    fn expect(&mut self, cx: &mut Context<'_>, piece: usize) {
        let me = cx.rank as usize;
        let bytes = self.range(me, piece).1 * self.dtype.size();
        for rank in (0..self.slices.len()).filter(|&r| r != me) {
            let ptr = self.place(rank, piece);
            cx.wire.recv(rank as u32, cx.sequence, piece as u32, cx.descriptor, ptr, bytes);
            self.outstanding += 1;
        }
    }

    pub(super) fn event(&mut self, event: Event) {
        match event {
            Event::Sent { .. } => self.outstanding -= 1,
            Event::Received { peer, part, extra, .. } => {
                self.outstanding -= 1;
                if part & RESULT != 0 {
                    self.results[peer as usize] += 1;
                } else {
                    self.contributed[peer as usize] += 1;
                    self.factors[peer as usize] = f64::from_bits(extra);
                }
            }
            Event::P2pSent { .. } | Event::P2pReceived { .. } => {}
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        let me = cx.rank as usize;
        let mut moved = false;
        // Contributions of one rank arrive in order, because links are ordered and pieces are
        // posted in order.
        while self.next < self.pieces(me)
            && (0..self.slices.len()).all(|r| r == me || self.contributed[r] > self.next)
        {
            self.reduce_piece(cx);
            moved = true;
        }
        moved
    }

    fn reduce_piece(&mut self, cx: &mut Context<'_>) {
        let me = cx.rank as usize;
        let piece = self.next;
        let (start, len) = self.range(me, piece);
        let size = self.dtype.size();
        let slice = self.slices[me];
        // SAFETY: inside the slice's input and, if there is one, output.
        let own = unsafe { slice.input.add(start * size) };
        let srcs: Vec<*const u8> = (0..self.slices.len())
            .map(|r| if r == me { own } else { self.place(r, piece).cast_const() })
            .collect();
        let dst = if slice.output.is_null() {
            // SAFETY: inside the block that begin() took for a slice without an output.
            unsafe { self.passing.add(start * size) }
        } else {
            // SAFETY: as above.
            unsafe { slice.output.add(start * size) }
        };
        // SAFETY: the sources hold len elements: staging fully received, own input as submitted;
        // dst is staging of its own or the output, equal to the own input or apart from it.
        unsafe { kernels::reduce(cx.tier, self.dtype, self.op, dst, &srcs, &self.factors, len) };
        *cx.reduced_bytes += (srcs.len() * len * size) as u64;
        let part = RESULT | piece as u32;
        let (sequence, descriptor) = (cx.sequence, cx.descriptor);
        let ranks = self.slices.len();
        match self.wanted {
            Wanted::ByAll => {
                for rank in (1..ranks).map(|d| (me + d) % ranks) {
                    cx.wire.send(rank as u32, sequence, part, descriptor, 0, dst, len * size);
                    self.outstanding += 1;
                }
            }
            Wanted::By(root) if root as usize != me => {
                cx.wire.send(root, sequence, part, descriptor, 0, dst, len * size);
                self.outstanding += 1;
            }
            Wanted::By(_) | Wanted::ByOwner => {}
        }
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
        let me = wire.rank() as usize;
        if self.next < self.pieces(me) {
            let blamed: Vec<u32> = (0..self.slices.len() as u32)
                .filter(|&r| r as usize != me && self.contributed[r as usize] <= self.next)
                .collect();
            if !blamed.is_empty() {
                return blamed;
            }
        }
        waiting
    }
}
