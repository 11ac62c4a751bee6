//! The sending half: a request names its memory and is sent, a reply pushes its payload first.

use super::wire::{self, Kind, MESSAGE_HEADER, PART_HEADER};
use super::{Half, How, SLOT, Shared, Work};
use crate::buf::BufMut;
use crate::error::LinkError;
use crate::link::{LinkTx, Outgoing, Register, Window};
use crate::rpc::frame::FrameKind;
use crate::verbs::queue::{WindowAccess, piece};
use crate::verbs::{Device, Op, Remote};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

struct Memory(Arc<Device>);

impl Register for Memory {
    fn window(&self, buf: &mut BufMut) -> Result<Option<Window>, LinkError> {
        let keys = self.0.keys_of_mut(buf)?;
        let len = u32::try_from(buf.capacity()).unwrap_or(u32::MAX);
        Ok(Some(Window { address: buf.as_ptr() as u64, key: self.0.key_of(keys), len }))
    }
}

/// Sends on a queue pair.
pub(crate) struct VerbsTx {
    pub(super) half: Half,
    /// Bytes of the first message that are already sent, and whether its payload was pushed.
    pub(super) begun: usize,
    pub(super) pushed: bool,
    /// What the first message, a request, tells the peer of its payload and of the reply's place.
    pub(super) named: Option<[Option<Window>; 2]>,
}

impl VerbsTx {
    /// Sends what there is room for of the first message; says whether that was all of it.
    fn step(&mut self, batch: &mut VecDeque<Outgoing>) -> Result<bool, LinkError> {
        let Some(message) = batch.front_mut() else { return Ok(true) };
        let shared = &self.half.0;
        let request = message.header.kind == FrameKind::Request;
        let payload = message.payload.as_ref().filter(|p| !p.is_empty());
        // Outside of the lock: the first use of a block registers it.
        let keys = payload.map(|p| shared.device().keys_of(p)).transpose()?;
        let payload = payload.zip(keys);
        let mut state = shared.lock();
        if state.over.is_some() {
            return Err(shared.ended(&state));
        }
        if let (false, false, Some((payload, keys))) = (request, self.pushed, payload) {
            // A reply's payload goes into the caller's window. The SEND that follows on the same
            // queue pair arrives after it.
            let Some(window) = message.window.filter(|w| w.len as usize >= payload.len()) else {
                return Err(LinkError::Protocol("a reply's payload without a window that takes it".into()));
            };
            if !Shared::has_room(&state, 1) {
                return Ok(false);
            }
            let into = Remote { address: window.address, key: window.key };
            let local = piece(payload.as_ptr(), payload.len(), keys.local);
            let work = Work::Write { _from: payload.clone() };
            shared.post(&mut state, Op::Write(into), Some(local), work, How::default())?;
            self.pushed = true;
        }
        let named = match self.named {
            Some(named) => named,
            // A reply's window is the peer's own business already.
            None if !request => [None; 2],
            None => {
                if !Shared::has_room(&state, 2) {
                    return Ok(false);
                }
                let source = payload.map(|(payload, keys)| Window {
                    address: payload.as_ptr() as u64,
                    key: shared.device().key_of(keys),
                    len: payload.len() as u32,
                });
                let mut name = |window: Option<Window>, access| {
                    window.map(|w| shared.name(&mut state, message.header.call, w, access)).transpose()
                };
                [name(source, WindowAccess::Read)?, name(message.window, WindowAccess::Write)?]
            }
        };
        self.named = Some(named);
        let [source, window] = named;
        let start = wire::message_header(&message.header, source, window);
        let total = MESSAGE_HEADER + message.head.len();
        while self.begun < total {
            if !Shared::has_room(&state, 1) || !state.credits.take() {
                return Ok(false);
            }
            let len = (total - self.begun).min(SLOT - PART_HEADER);
            let end = self.begun + len;
            let first = &start[self.begun.min(MESSAGE_HEADER)..end.min(MESSAGE_HEADER)];
            let second =
                &message.head[self.begun.saturating_sub(MESSAGE_HEADER)..end.saturating_sub(MESSAGE_HEADER)];
            let last = end == total;
            let permit = if last { message.permit.take() } else { None };
            let mut how = How { signaled: last && !request, permit, ..How::default() };
            if last && !request && state.invalidate_theirs {
                // The answer takes back a right that the call gave; the client takes back the other
                // one, if there are two.
                let source = state.sources.remove(&message.header.call);
                how.invalidate = message.window.map(|w| w.key).or(source);
            }
            shared.send_part(&mut state, Kind::Part, [first, second], how)?;
            self.begun = end;
        }
        drop(state);
        // The peer's READ moves it.
        shared.counters.add_sent(source.map_or(0, |w| w.len as usize));
        (self.begun, self.pushed, self.named) = (0, false, None);
        batch.pop_front();
        Ok(true)
    }
}

impl LinkTx for VerbsTx {
    const NAME: &'static str = "rdma";

    fn device(&self) -> Option<String> {
        Some(self.half.0.rail.name())
    }

    fn register(&self) -> Arc<dyn Register> {
        Arc::new(Memory(self.half.0.device().clone()))
    }

    fn try_send(&mut self, batch: &mut VecDeque<Outgoing>) -> Result<(), LinkError> {
        while !batch.is_empty() && self.step(batch)? {}
        Ok(())
    }

    async fn send(&mut self, batch: &mut VecDeque<Outgoing>) -> Result<(), LinkError> {
        let shared = self.half.0.clone();
        while !batch.is_empty() {
            let room = shared.room.notified();
            tokio::pin!(room);
            // Before looking, so that what comes free meanwhile is not missed.
            room.as_mut().enable();
            if self.step(batch)? {
                continue;
            }
            shared.work.waits.fetch_add(1, Ordering::Relaxed);
            tokio::select! {
                () = room => {}
                () = shared.stop.cancelled() => {}
                () = tokio::time::sleep(shared.stall) => {
                    // Neither a credit nor a completion: the peer or the path is stuck.
                    shared.end(LinkError::Stalled(shared.stall));
                }
            }
        }
        Ok(())
    }
}
