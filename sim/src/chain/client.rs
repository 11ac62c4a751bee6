//! A client: one operation at a time on each of its lanes, retried under the same sequence number
//! until it is answered.

use super::truth::Effect;
use super::{Bytes, SLOT_BYTES, SLOTS, View, chunk, slot_bytes};
use firefly_types::{AttemptEpoch, ChunkId, ClientId, JobId, SessionEpoch};
use fs3_core::target::{Context, Kind, Update, payload_crc};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

#[derive(Clone, Debug)]
pub(super) enum Operation {
    Read,
    Update(Effect),
}

/// What is under way.
#[derive(Clone, Debug)]
pub(super) struct Current {
    pub(super) chunk: ChunkId,
    pub(super) operation: Operation,
    /// What had been shown of the chunk when it began; for reads, when the attempt began.
    pub(super) shown: u64,
    pub(super) attempt: u64,
    /// A replica said that only the tail knows.
    pub(super) ask_tail: bool,
}

pub(super) struct Client {
    pub(super) id: usize,
    pub(super) view: View,
    pub(super) current: Option<Current>,
    sequence: u64,
    pub(super) attempts: u64,
    pub(super) finished: u64,
}

impl Client {
    pub(super) fn new(id: usize) -> Self {
        Self { id, view: View::default(), current: None, sequence: 0, attempts: 0, finished: 0 }
    }

    /// Chooses what to do next.
    pub(super) fn begin(&mut self, rng: &mut ChaCha8Rng, chunks: u32) -> ChunkId {
        let chunk = chunk(rng.random_range(0..chunks));
        self.sequence += 1;
        let slot = rng.random_range(0..SLOTS);
        let operation = match rng.random_range(0..100) {
            0..45 => Operation::Read,
            45..85 => {
                Operation::Update(Effect::Write { slot, tag: ((self.id as u64 + 1) << 32) + self.sequence })
            }
            85..90 => Operation::Update(Effect::Punch { slot }),
            90..96 => Operation::Update(Effect::Truncate { slots: slot + 1 }),
            _ => Operation::Update(Effect::Remove),
        };
        self.current = Some(Current { chunk, operation, shown: 0, attempt: 0, ask_tail: false });
        chunk
    }

    pub(super) fn context(&self) -> Context {
        Context {
            client: ClientId(self.id as u64 + 1),
            session_epoch: SessionEpoch(1),
            channel: 0,
            sequence: self.sequence,
            attempt: AttemptEpoch(0),
            job: JobId(0),
        }
    }

    pub(super) fn update(&self, chunk: ChunkId, effect: Effect) -> Update<Bytes> {
        let slots = |n: usize| (n * SLOT_BYTES) as u32;
        let (kind, offset, length, payload) = match effect {
            Effect::Write { slot, tag } => (Kind::Write, slots(slot), slots(1), Some(slot_bytes(tag))),
            Effect::Punch { slot } => (Kind::Punch, slots(slot), slots(1), None),
            Effect::Truncate { slots: n } => (Kind::Truncate, 0, slots(n), None),
            Effect::Remove => (Kind::Remove, 0, 0, None),
        };
        Update {
            context: self.context(),
            chunk,
            kind,
            offset,
            length,
            crc: payload.as_ref().map_or(0, |p| payload_crc(p)),
            chunk_bytes: slots(SLOTS),
            payload: payload.map(|p| Bytes(p.into())),
        }
    }
}
