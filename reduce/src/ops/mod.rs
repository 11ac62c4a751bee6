//! Collectives as small state machines: each posts transfers, and is told what happened to them.

pub(crate) mod doubling;
pub(crate) mod exchange;
pub(crate) mod levels;
pub(crate) mod reduce;

use crate::ReduceError;
use crate::header::Descriptor;
use crate::kernels::Tier;
use crate::scratch::Scratch;
use crate::shm::arena::{Arena, ArenaOp};
use crate::wire::{Event, Wire};
use doubling::Rounds;
use exchange::Exchange;
use levels::TwoLevels;
use reduce::WireReduce;

/// What a running collective may use.
pub(crate) struct Context<'a> {
    pub(crate) wire: &'a mut Wire,
    pub(crate) arena: Option<&'a mut Arena>,
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) rank: u32,
    pub(crate) size: u32,
    pub(crate) tier: Tier,
    pub(crate) sequence: u64,
    pub(crate) descriptor: Descriptor,
    /// Input bytes reduced, for the statistics.
    pub(crate) reduced_bytes: &'a mut u64,
}

/// How a collective is carried out.
pub(crate) enum Body {
    Exchange(Exchange),
    Reduce(Box<WireReduce>),
    Arena(ArenaOp),
    // Boxed: they are large, and most operations are others.
    Rounds(Box<Rounds>),
    Levels(Box<TwoLevels>),
}

// SAFETY: the raw pointers are memory of a submitted operation, handed over with it.
unsafe impl Send for Body {}

impl Body {
    /// Called once, when all earlier collectives of the group are complete here.
    pub(crate) fn begin(&mut self, cx: &mut Context<'_>) {
        match self {
            Self::Exchange(op) => op.begin(cx),
            Self::Reduce(op) => op.begin(cx),
            Self::Rounds(op) => op.begin(cx),
            Self::Levels(op) => op.begin(),
            Self::Arena(op) => op.begin(cx.arena.as_mut().expect("chosen only where there is an arena")),
        }
    }

    pub(crate) fn event(&mut self, event: Event) {
        match self {
            Self::Exchange(op) => op.event(event),
            Self::Reduce(op) => op.event(event),
            Self::Rounds(op) => op.event(event),
            Self::Levels(op) => op.event(event),
            Self::Arena(_) => {}
        }
    }

    /// Does what can be done; whether anything happened.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Result<bool, ReduceError> {
        match self {
            Self::Exchange(op) => Ok(op.poll(cx)),
            Self::Reduce(op) => Ok(op.poll(cx)),
            Self::Rounds(op) => Ok(op.poll(cx)),
            Self::Levels(op) => op.poll(cx),
            Self::Arena(op) => {
                let arena = cx.arena.as_ref().expect("chosen only where there is an arena");
                op.poll(arena, cx.sequence, &cx.descriptor, cx.tier)
            }
        }
    }

    pub(crate) fn done(&self) -> bool {
        match self {
            Self::Exchange(op) => op.done(),
            Self::Reduce(op) => op.done(),
            Self::Rounds(op) => op.done(),
            Self::Levels(op) => op.done(),
            Self::Arena(op) => op.done(),
        }
    }

    /// Ranks that this one waits for.
    pub(crate) fn missing(&self, wire: &Wire, arena: Option<&Arena>, sequence: u64) -> Vec<u32> {
        match self {
            Self::Exchange(_) | Self::Rounds(_) => wire.waiting_for(sequence),
            Self::Levels(op) => op.missing(wire, arena, sequence),
            Self::Reduce(op) => op.missing(wire, sequence),
            Self::Arena(op) => arena.map(|a| op.missing(a)).unwrap_or_default(),
        }
    }
}
