//! Collectives that only move blocks, all at once and directly: broadcast, all-gather, gather,
//! scatter, all-to-all, barrier; and the small reductions, which gather every input and reduce it
//! on each rank that wants the result.
//!
//! Cost: one message per ordered pair that has a block to move, one round.

use super::Context;
use crate::dtype::{DType, ReduceOp};
use crate::kernels;
use crate::wire::Event;

/// A block and the rank it goes to or comes from.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    pub(crate) peer: u32,
    pub(crate) ptr: *mut u8,
    pub(crate) len: usize,
}

/// A block that stays on this rank.
#[derive(Clone, Copy)]
pub(crate) struct OwnBlock {
    pub(crate) from: *const u8,
    pub(crate) to: *mut u8,
    pub(crate) len: usize,
}

impl OwnBlock {
    pub(crate) fn copy(&self) {
        if self.from != self.to.cast_const() && self.len > 0 {
            // SAFETY: both hold len bytes by the operation's promise. `copy` rather than
            // `copy_nonoverlapping`: a caller's mistake then gives wrong data, not undefined
            // behaviour.
            unsafe { std::ptr::copy(self.from, self.to, self.len) };
        }
    }
}

/// Reduction of gathered inputs.
pub(crate) struct Finish {
    pub(crate) dtype: DType,
    pub(crate) op: ReduceOp,
    pub(crate) count: usize,
    pub(crate) input: *const u8,
    pub(crate) output: *mut u8,
}

/// See the module.
pub(crate) struct Exchange {
    sends: Vec<Block>,
    recvs: Vec<Block>,
    own: Option<OwnBlock>,
    /// Receives go to scratch, one block per rank, and are reduced at the end.
    finish: Option<Finish>,
    outstanding: usize,
    factors: Vec<f64>,
    finished: bool,
}

impl Exchange {
    pub(crate) fn new(
        sends: Vec<Block>,
        recvs: Vec<Block>,
        own: Option<OwnBlock>,
        finish: Option<Finish>,
    ) -> Self {
        Self { sends, recvs, own, finish, outstanding: 0, factors: Vec::new(), finished: false }
    }

    pub(super) fn begin(&mut self, cx: &mut Context<'_>) {
        let (sequence, descriptor) = (cx.sequence, cx.descriptor);
        let extra = self.finish.as_ref().map_or(1.0, |f| f.op.factor()).to_bits();
        if let Some(own) = self.own.take() {
            own.copy();
        }
        if let Some(finish) = &self.finish {
            let bytes = finish.count * finish.dtype.size();
            let stride = bytes.next_multiple_of(64);
            let base = cx.scratch.take(stride * cx.size as usize);
            for recv in &mut self.recvs {
                // SAFETY: one stride per rank was taken.
                recv.ptr = unsafe { base.add(recv.peer as usize * stride) };
                recv.len = bytes;
            }
            self.factors = vec![finish.op.factor(); cx.size as usize];
        }
        self.outstanding = self.sends.len() + self.recvs.len();
        for recv in &self.recvs {
            cx.wire.recv(recv.peer, sequence, 0, descriptor, recv.ptr, recv.len);
        }
        for send in &self.sends {
            cx.wire.send(send.peer, sequence, 0, descriptor, extra, send.ptr, send.len);
        }
    }

    pub(super) fn event(&mut self, event: Event) {
        match event {
            Event::Sent { .. } => self.outstanding -= 1,
            Event::Received { peer, extra, .. } => {
                self.outstanding -= 1;
                if let Some(factor) = self.factors.get_mut(peer as usize) {
                    *factor = f64::from_bits(extra);
                }
            }
            Event::P2pSent { .. } | Event::P2pReceived { .. } => {}
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        if self.outstanding > 0 || self.finished {
            return false;
        }
        self.finished = true;
        if let Some(finish) = &self.finish
            && !finish.output.is_null()
        {
            let mut srcs = vec![finish.input; cx.size as usize];
            for recv in &self.recvs {
                srcs[recv.peer as usize] = recv.ptr;
            }
            // SAFETY: every source holds count elements: own input and output as submitted (equal
            // or apart), the others in scratch, fully received.
            unsafe {
                kernels::reduce(
                    cx.tier,
                    finish.dtype,
                    finish.op,
                    finish.output,
                    &srcs,
                    &self.factors,
                    finish.count,
                );
            }
            *cx.reduced_bytes += (srcs.len() * finish.count * finish.dtype.size()) as u64;
        }
        true
    }

    pub(super) fn done(&self) -> bool {
        self.finished
    }
}
