//! The RDMA carrier: messages by SEND, request payloads by READ, reply payloads by WRITE.
//!
//! The TCP connection over which both sides proved themselves stays open beside the queue pair: it
//! carried the negotiation, and its end is how a peer's death is noticed when nothing is in flight.
//!
//! What one call costs in steady state, with a head that fits inline (asserted by
//! `tests::each_call_costs_what_is_documented`):
//!
//! | call | client posts | server posts | completions | registrations | payload bytes copied |
//! | --- | --- | --- | --- | --- | --- |
//! | without payload | 1 SEND | 1 SEND | 1 + 2 | 0 | 0 |
//! | write 1 MiB | 1 SEND | 1 READ, 1 SEND | 1 + 3 | 0 | 0 |
//! | read 1 MiB | 1 SEND | 1 WRITE, 1 SEND | 1 + 2 | 0 | 0 |
//!
//! A request's SEND asks for no completion (one in [`SIGNAL_EVERY`] does, so that the send queue
//! drains); a reply's does, because a stopping server must know that its answers are out, and it
//! covers the WRITE before it. Credits travel within the messages.
//!
//! Memory: whatever a device may touch is held in [`State::posted`] until its completion (or a
//! later one) came, and the queue pair is destroyed when the second half of the link is dropped,
//! before anything held is. So a cancelled pull or a lost connection never leaves a device writing
//! to freed memory.

mod connect;
mod credits;
mod wire;

pub(crate) use connect::Draft;

use super::{Counters, Incoming, LinkOptions, LinkRx, LinkTx, Outgoing, Permit, Register, Window};
use crate::buf::{Buf, BufMut, HeadRoom, Heads};
use crate::error::LinkError;
use crate::link::tcp::Pulse;
use crate::rpc::frame::FrameKind;
use crate::verbs::queue::{Piece, piece};
use crate::verbs::slab::Slab;
use crate::verbs::{Completion, Device, Done, Op, Queue, Rail, Remote, Request};
use bytes::Bytes;
use credits::Credits;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use wire::{Kind, MESSAGE_HEADER, PART_HEADER};

/// Bytes that a SEND carries at most; longer messages take several, in order. A page: the heads of
/// file data and metadata fit, and a link's slots stay small.
const SLOT: usize = 4 << 10;
/// Receives posted, and so the messages that a peer may send ahead.
const RECEIVES: usize = 64;
/// Slots for messages that are too long to go inline.
const SEND_SLOTS: usize = 32;
/// Send-side requests in flight.
const SENDS: usize = 128;
/// Of these, for grants that travel alone: two can be due before the first has completed.
const GRANT_SENDS: usize = 2;
/// One request in so many asks for its completion. Far below `SENDS` and `SEND_SLOTS`: whoever waits
/// for room can rely on a completion being due.
const SIGNAL_EVERY: u32 = 16;
/// Bytes to carry inline if the device can: a request with a usual head.
const INLINE: usize = 256;
/// A payload may take its link's stall time and a second for each of so many bytes, as on TCP.
const SLOWEST: u64 = 1 << 20;

/// What the memory of a request in flight is.
enum Work {
    /// Carried inline.
    Nothing,
    /// A slot of the slab. With a reply, what bounds replies in flight.
    Slot(usize),
    Write {
        _from: Buf,
    },
    Read {
        into: BufMut,
        done: oneshot::Sender<BufMut>,
    },
}

/// A send-side request whose completion has not come.
struct Posted {
    id: u64,
    work: Work,
    _permit: Option<Permit>,
}

struct State {
    /// Gone when both halves are. Declared first: destroyed before what its device may touch.
    queue: Option<Queue>,
    /// Slots: `RECEIVES` to receive into, then `SEND_SLOTS` to send from.
    slab: Slab,
    credits: Credits,
    next: u64,
    /// In the order in which they complete.
    posted: VecDeque<Posted>,
    unsignaled: u32,
    free: Vec<usize>,
    /// Parts of messages: slot and length.
    arrived: VecDeque<(usize, usize)>,
    /// Probes that came while the link is being made; afterwards they are not allowed.
    probes: Option<VecDeque<u64>>,
    over: Option<Arc<LinkError>>,
    halves: usize,
}

/// What one link has done.
#[derive(Debug, Default)]
pub(crate) struct LinkWork {
    pub(crate) sends: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) inline: AtomicU64,
    pub(crate) completions: AtomicU64,
    pub(crate) events: AtomicU64,
    /// SENDs that carried nothing but credits.
    pub(crate) grants: AtomicU64,
    /// Messages that had to wait for credits or for room in the send queue.
    pub(crate) waits: AtomicU64,
}

struct Shared {
    rail: Arc<Rail>,
    state: Mutex<State>,
    /// A part has arrived, or the link is over.
    arrival: Notify,
    /// There are more credits, or more room in the send queue.
    room: Notify,
    stop: CancellationToken,
    counters: Arc<Counters>,
    work: LinkWork,
    heads: Heads,
    stall: Duration,
    inline_limit: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn device(&self) -> &Arc<Device> {
        &self.rail.device
    }

    /// Ends the link; the first reason counts.
    fn end(&self, reason: LinkError) {
        self.lock().over.get_or_insert_with(|| Arc::new(reason));
        self.stop.cancel();
    }

    fn ended(&self, state: &State) -> LinkError {
        match &state.over {
            Some(reason) => LinkError::Over(reason.clone()),
            None => LinkError::Protocol("the link was closed on this side".into()),
        }
    }

    fn device_says(&self, what: &'static str, reason: String) -> LinkError {
        LinkError::Device { device: self.rail.name(), what, reason }
    }

    /// Posts a request if the send queue has room. `pieces` describe memory that `work` owns.
    fn post(&self, state: &mut State, op: Op, local: Piece, work: Work, how: How) -> Result<(), LinkError> {
        let id = state.next;
        let signaled = how.signaled || state.unsignaled + 1 >= SIGNAL_EVERY;
        let request = Request { id, op, signaled, inline: how.inline };
        match (&state.over, &state.queue) {
            // SAFETY: the memory is owned by `work`, which stays in `posted` until the completion
            // of this or a later request was polled, or the queue destroyed (see `State`); or it
            // was copied while posting.
            (None, Some(queue)) => unsafe { queue.post(&request, &[local])? },
            _ => return Err(self.ended(state)),
        }
        state.next += 1;
        state.unsignaled = if signaled { 0 } else { state.unsignaled + 1 };
        let counter = match op {
            Op::Send => &self.work.sends,
            Op::Write(_) | Op::WriteImm(..) => &self.work.writes,
            Op::Read(_) => &self.work.reads,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.work.inline.fetch_add(u64::from(how.inline), Ordering::Relaxed);
        self.counters.add_sent(if matches!(op, Op::Read(_)) { 0 } else { local.length as usize });
        state.posted.push_back(Posted { id, work, _permit: how.permit });
        Ok(())
    }

    /// Sends one part, inline if it is short enough. There must be room and, but for a probe, a
    /// credit must have been taken.
    fn send_part(&self, state: &mut State, kind: Kind, bytes: [&[u8]; 2], how: How) -> Result<(), LinkError> {
        let header = wire::part_header(kind, state.credits.grant());
        let pieces = [&header[..], bytes[0], bytes[1]];
        let len = pieces.iter().map(|p| p.len()).sum();
        let copy = |to: &mut [u8]| {
            let mut at = 0;
            for piece in pieces {
                to[at..at + piece.len()].copy_from_slice(piece);
                at += piece.len();
            }
        };
        if len <= self.inline_limit.min(INLINE) {
            let mut short = [0; INLINE];
            copy(&mut short);
            let how = How { inline: true, ..how };
            return self.post(state, Op::Send, piece(short.as_ptr(), len, 0), Work::Nothing, how);
        }
        let Some(slot) = state.free.pop() else {
            return Err(LinkError::Protocol("no slot to send from, although room was checked".into()));
        };
        // SAFETY: a free slot is not posted.
        copy(unsafe { state.slab.write(slot) });
        let local = state.slab.piece(slot, len);
        self.post(state, Op::Send, local, Work::Slot(slot), how)
    }

    /// Whether another request may be posted, of which one slot may be needed.
    fn has_room(state: &State) -> bool {
        state.posted.len() < SENDS - GRANT_SENDS && !state.free.is_empty()
    }

    /// Gives receive slot `index` to the device (again).
    fn post_slot(&self, state: &State, index: usize) -> Result<(), LinkError> {
        let Some(queue) = &state.queue else { return Err(self.ended(state)) };
        // SAFETY: the slab outlives the queue, and the slot is left alone until its completion.
        unsafe { queue.post_recv(index as u64, Some(state.slab.piece(index, SLOT))) }
    }

    /// Posts a slot that was read, and tells the peer if it is time to.
    fn give_back(&self, state: &mut State, index: usize) -> Result<(), LinkError> {
        if state.over.is_some() {
            // What had arrived is still handed out; nothing more will come.
            return Ok(());
        }
        self.post_slot(state, index)?;
        state.credits.reposted();
        self.grant(state)
    }

    fn grant(&self, state: &mut State) -> Result<(), LinkError> {
        if state.posted.len() < SENDS && state.over.is_none() && state.credits.take_for_grant() {
            self.work.grants.fetch_add(1, Ordering::Relaxed);
            self.send_part(state, Kind::Grant, [&[], &[]], How::default())?;
        }
        Ok(())
    }

    /// Takes completions and wakes whom they concern: polls until there is nothing, arms, and looks
    /// once more for what came in between.
    fn pump(&self) -> Result<(), LinkError> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(queue) = &state.queue else { return Err(LinkError::Closed) };
        let events = queue.take_events();
        let mut completions = Vec::new();
        while queue.poll(&mut completions)? > 0 {}
        queue.arm()?;
        while queue.poll(&mut completions)? > 0 {}
        self.work.events.fetch_add(events as u64, Ordering::Relaxed);
        self.work.completions.fetch_add(completions.len() as u64, Ordering::Relaxed);
        // The first failure is the cause; the rest were flushed because of it.
        let mut failed = Ok(());
        for completion in completions {
            let done = self.completed(state, &completion);
            if failed.is_ok() {
                failed = done;
            }
        }
        failed
    }

    fn completed(&self, state: &mut State, completion: &Completion) -> Result<(), LinkError> {
        let id = completion.id;
        match completion.result {
            Err(error) => {
                let what = match state.posted.iter().find(|p| p.id == id).map(|p| &p.work) {
                    Some(Work::Read { .. }) => "READ",
                    Some(Work::Write { .. }) => "WRITE",
                    Some(Work::Slot(_) | Work::Nothing) => "SEND",
                    None => "receiving",
                };
                Err(LinkError::Work { device: self.rail.name(), what, error })
            }
            Ok(Done::Received { len }) => self.received(state, id as usize, len as usize),
            Ok(Done::Written { .. }) => {
                Err(LinkError::Protocol("a WRITE with immediate, which RPC does not use".into()))
            }
            Ok(Done::Request) => {
                while state.posted.front().is_some_and(|p| p.id <= id) {
                    let Some(posted) = state.posted.pop_front() else { break };
                    match posted.work {
                        Work::Slot(slot) => state.free.push(slot),
                        Work::Read { into, done } => {
                            self.counters.add_received(into.len());
                            // The puller may be gone; the buffer goes back to its pool then.
                            let _ = done.send(into);
                        }
                        Work::Nothing | Work::Write { .. } => {}
                    }
                }
                self.room.notify_waiters();
                self.grant(state)
            }
        }
    }

    /// A SEND arrived in slot `index`.
    fn received(&self, state: &mut State, index: usize, len: usize) -> Result<(), LinkError> {
        if index >= RECEIVES || len > SLOT {
            return Err(LinkError::Protocol("a receive that was not posted".into()));
        }
        self.counters.add_received(len);
        // SAFETY: its completion was polled, and it was not posted again.
        let bytes = unsafe { state.slab.read(index, len) };
        let (kind, grant) = wire::decode_part(bytes)?;
        if kind == Kind::Probe {
            let mut probe = [0; 8];
            probe.copy_from_slice(&bytes[PART_HEADER..]);
            let Some(probes) = &mut state.probes else {
                return Err(LinkError::Protocol("a probe on a link that is in use".into()));
            };
            probes.push_back(u64::from_le_bytes(probe));
            // Beside the credits: both sides have one, and all receives are posted again after it.
            return self.post_slot(state, index);
        }
        state.credits.came(grant).map_err(|e| LinkError::Protocol(e.to_string()))?;
        self.room.notify_waiters();
        if kind == Kind::Grant {
            return self.give_back(state, index);
        }
        state.arrived.push_back((index, len));
        self.arrival.notify_one();
        // With the new credits a grant may go that had none before.
        self.grant(state)
    }

    fn drop_half(&self) {
        let queue = {
            let mut state = self.lock();
            state.halves -= 1;
            (state.halves == 0).then(|| state.queue.take()).flatten()
        };
        if let Some(queue) = queue {
            self.stop.cancel();
            drop(queue);
            // Now no device touches any of it.
            self.lock().posted.clear();
        }
    }
}

/// How a request is posted.
#[derive(Default)]
struct How {
    signaled: bool,
    inline: bool,
    /// Held until it has completed.
    permit: Option<Permit>,
}

/// Moves completions until the link ends, and watches all that can end it.
async fn pump(shared: Arc<Shared>, events: AsyncFd<OwnedFd>, mut side: TcpStream) {
    let mut pulse = Pulse::new();
    let mut byte = [0];
    loop {
        let pumped = tokio::select! {
            ready = events.readable() => match ready {
                Ok(mut guard) => {
                    guard.clear_ready();
                    shared.pump()
                }
                Err(e) => Err(LinkError::Io(e)),
            },
            // What had arrived before the peer closed still counts.
            got = side.read(&mut byte) => shared.pump().and(Err(match got {
                Ok(0) => LinkError::Closed,
                Ok(_) => LinkError::Protocol("bytes beside the queue pair".into()),
                Err(e) => e.into(),
            })),
            () = pulse.due() => pulse.check(side.as_fd()),
            reason = shared.rail.until_down() => Err(shared.device_says("carrying the connection", reason)),
            () = shared.stop.cancelled() => return,
        };
        if let Err(e) = pumped {
            shared.end(e);
            return;
        }
    }
}

/// Counts towards the two halves whose drop destroys the queue pair.
struct Half(Arc<Shared>);

impl Drop for Half {
    fn drop(&mut self) {
        self.0.drop_half();
    }
}

struct Memory(Arc<Device>);

impl Register for Memory {
    fn window(&self, buf: &mut BufMut) -> Result<Option<Window>, LinkError> {
        let keys = self.0.keys_of_mut(buf)?;
        let len = u32::try_from(buf.capacity()).unwrap_or(u32::MAX);
        Ok(Some(Window { address: buf.as_ptr() as u64, key: keys.remote, len }))
    }
}

/// Sends on a queue pair.
pub(crate) struct VerbsTx {
    half: Half,
    /// Bytes of the first message that are already sent, and whether its payload was pushed.
    begun: usize,
    pushed: bool,
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
            if !Shared::has_room(&state) {
                return Ok(false);
            }
            let into = Remote { address: window.address, key: window.key };
            let local = piece(payload.as_ptr(), payload.len(), keys.local);
            let work = Work::Write { _from: payload.clone() };
            shared.post(&mut state, Op::Write(into), local, work, How::default())?;
            self.pushed = true;
        }
        let source = payload.filter(|_| request).map(|(payload, keys)| Window {
            address: payload.as_ptr() as u64,
            key: keys.remote,
            len: payload.len() as u32,
        });
        // A reply's window is the peer's own business already.
        let start = wire::message_header(&message.header, source, message.window.filter(|_| request));
        let total = MESSAGE_HEADER + message.head.len();
        while self.begun < total {
            if !Shared::has_room(&state) || !state.credits.take() {
                return Ok(false);
            }
            let len = (total - self.begun).min(SLOT - PART_HEADER);
            let end = self.begun + len;
            let first = &start[self.begun.min(MESSAGE_HEADER)..end.min(MESSAGE_HEADER)];
            let second =
                &message.head[self.begun.saturating_sub(MESSAGE_HEADER)..end.saturating_sub(MESSAGE_HEADER)];
            let last = end == total;
            let permit = if last { message.permit.take() } else { None };
            let how = How { signaled: last && !request, inline: false, permit };
            shared.send_part(&mut state, Kind::Part, [first, second], how)?;
            self.begun = end;
        }
        drop(state);
        // The peer's READ moves it.
        shared.counters.add_sent(source.map_or(0, |w| w.len as usize));
        (self.begun, self.pushed) = (0, false);
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

/// Receives from a queue pair.
pub(crate) struct VerbsRx {
    half: Half,
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
                if Shared::has_room(&state) {
                    let from = Op::Read(Remote { address: source.address, key: source.key });
                    let how = How { signaled: true, ..How::default() };
                    shared.post(&mut state, from, local, mine, how)?;
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

#[cfg(test)]
mod tests;
