//! The receiving half: messages put together from their parts, payloads pulled.

use super::wire::{self, MESSAGE_HEADER, PART_HEADER};
use super::{Half, How, SLOWEST, Shared, Work};
use crate::buf::{BufMut, HeadRoom};
use crate::error::LinkError;
use crate::link::{Incoming, LinkRx};
use crate::rpc::frame::FrameKind;
use crate::verbs::queue::piece;
use crate::verbs::{Op, Remote};
use bytes::Bytes;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Receives from a queue pair.
pub(crate) struct VerbsRx {
    pub(super) half: Half,
}

impl VerbsRx {
    /// The bytes of the next part; its slot goes back to the device.
    async fn part(&mut self, out: &mut Vec<u8>) -> Result<(), LinkError> {
        let shared = &self.half.0;
        loop {
            {
                let mut state = shared.lock();
                if let Some((index, len)) = state.arrived.pop_front() {
                    // SAFETY: it arrived, and is posted again only below.
                    out.extend_from_slice(unsafe { &state.slab.read(index, len)[PART_HEADER..] });
                    return shared.give_back(&mut state, index);
                }
                if state.over.is_some() {
                    return Err(shared.ended(&state));
                }
            }
            tokio::select! {
                biased;
                () = shared.arrival.notified() => {}
                () = shared.stop.cancelled() => {}
            }
        }
    }
}

impl LinkRx for VerbsRx {
    fn is_ahead(&self) -> bool {
        !self.half.0.lock().arrived.is_empty()
    }

    async fn recv(&mut self) -> Result<Incoming, LinkError> {
        let mut bytes = Vec::new();
        self.part(&mut bytes).await?;
        let (header, source, window) = wire::decode_message(&bytes)?;
        let head_len = header.head_len as usize;
        let total = MESSAGE_HEADER + head_len;
        let mut room = HeadRoom::default();
        if head_len > 0 {
            // What the peer sends meanwhile stays in the slots, of which there are few.
            room = self.half.0.heads.take(head_len).await;
            bytes.reserve_exact(total.saturating_sub(bytes.len()));
        }
        while bytes.len() < total {
            self.part(&mut bytes).await?;
        }
        if bytes.len() != total {
            return Err(LinkError::Protocol("a message is longer than its header says".into()));
        }
        let shared = self.half.0.clone();
        if header.kind != FrameKind::Request {
            shared.end_call(header.call).await?;
        } else if let Some(source) = source {
            let mut state = shared.lock();
            if state.invalidate_theirs {
                state.sources.insert(header.call, source.key);
            }
        }
        let head = Bytes::from(bytes).slice(MESSAGE_HEADER..);
        Ok(Incoming { header, head, source, window, room })
    }

    async fn pull(&mut self, from: &Incoming, into: BufMut) -> Result<BufMut, LinkError> {
        let shared = self.half.0.clone();
        let Some(source) = from.source.filter(|w| w.len as usize == into.len()) else {
            return Err(LinkError::Protocol("nothing to pull".into()));
        };
        let len = into.len();
        let local = piece(into.as_ptr(), len, shared.device().keys_of_mut(&into)?.local);
        let patience = shared.stall + Duration::from_micros(len as u64 * 1_000_000 / SLOWEST);
        let deadline = Instant::now() + patience;
        let stalled = || {
            shared.end(LinkError::Stalled(patience));
            shared.ended(&shared.lock())
        };
        let (done, mut pulled) = oneshot::channel();
        let mut work = Some(Work::Read { into, done });
        while let Some(mine) = work.take() {
            let room = shared.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            {
                let mut state = shared.lock();
                if state.over.is_some() {
                    return Err(shared.ended(&state));
                }
                if Shared::has_room(&state, 1) {
                    let from = Op::Read(Remote { address: source.address, key: source.key });
                    let how = How { signaled: true, ..How::default() };
                    shared.post(&mut state, from, Some(local), mine, how)?;
                    break;
                }
            }
            work = Some(mine);
            tokio::select! {
                () = room => {}
                () = shared.stop.cancelled() => {}
                () = tokio::time::sleep_until(deadline) => return Err(stalled()),
            }
        }
        tokio::select! {
            biased;
            got = &mut pulled => got.map_err(|_| shared.ended(&shared.lock())),
            () = shared.stop.cancelled() => Err(shared.ended(&shared.lock())),
            () = tokio::time::sleep_until(deadline) => Err(stalled()),
        }
    }

    async fn land(&mut self, _reply: &Incoming, into: &mut BufMut) -> Result<(), LinkError> {
        // The WRITE came before the SEND on the same queue pair (RC ordering).
        self.half.0.counters.add_received(into.len());
        Ok(())
    }

    async fn skip(&mut self, _from: &Incoming) -> Result<(), LinkError> {
        // What is not read was never moved.
        Ok(())
    }
}
