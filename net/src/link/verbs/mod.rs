//! The RDMA carrier: messages by SEND, request payloads by READ, reply payloads by WRITE.
//!
//! The TCP connection over which both sides proved themselves stays open beside the queue pair: it
//! carried the negotiation, and its end is how a peer's death is noticed when nothing is in flight.
//!
//! What one call costs in steady state, with a head that fits inline (asserted by
//! `tests::each_call_costs_what_is_documented`):
//!
//! | call | client posts | server posts | completions at client + server | registrations | payload bytes copied |
//! | --- | --- | --- | --- | --- | --- |
//! | without payload | 1 SEND | 1 SEND | 1 + 2 | 0 | 0 |
//! | write 1 MiB | 1 SEND | 1 READ, 1 SEND | 1 + 3 | 0 | 0 |
//! | read 1 MiB | 1 SEND | 1 WRITE, 1 SEND | 1 + 2 | 0 | 0 |
//!
//! A request asks for no completion of its own (one in [`SIGNAL_EVERY`] does, so that the send
//! queue drains); a reply's SEND does, because a stopping server must know that its answers are
//! out, and it covers the WRITE before it. Credits travel within the messages.
//!
//! # Who may touch what, and until when
//!
//! * The peer reaches the memory of a call by its block's key, which is good as long as the
//!   registration: that a right ends with its call is the peer's discipline, as on most RDMA
//!   stores, and what a late answer may still touch is in quarantine (below).
//! * With [`crate::NetOptions::memory_windows`] it is enforced: the key is a memory window's (of
//!   type 2), good on this queue pair only, and the answer's SEND takes it back on arrival; with two
//!   windows, this side takes back the other one before the caller has its memory again. What a
//!   peer's device does with an old key is refused. Each payload then costs one request more (a
//!   bind, without a completion). It is not the default, because it stands and falls with the
//!   driver: Soft-RoCE of Linux 6.12 does a bind again when an earlier packet was lost, and ends
//!   the connection over it.
//! * A call that timed out or was dropped keeps its memory until the answer came or the queue pair
//!   was destroyed, with windows and without. Taking its window back at once would free the memory
//!   sooner, but an honest peer that is merely late would then lose the whole connection to the
//!   refusal.
//! * What this side's own work touches is held in [`State::posted`] until its completion (or a
//!   later one) came, and the queue pair is destroyed when the second half of the link is dropped,
//!   before anything held is. So a cancelled pull or a lost connection never leaves a device
//!   writing to freed memory.
//! * Slots for messages are registered for this side only. All registrations ask for relaxed
//!   ordering ([`crate::verbs::Region::new`] says why that is safe).

mod connect;
mod credits;
mod rx;
mod tx;
mod wire;

pub(crate) use connect::Draft;
pub(crate) use rx::VerbsRx;
pub(crate) use tx::VerbsTx;

use super::{Counters, LinkOptions, Permit, Window};
use crate::buf::{Buf, BufMut, Heads};
use crate::error::LinkError;
use crate::link::tcp::Pulse;
use crate::rpc::frame::FrameKind;
use crate::verbs::queue::{Piece, WindowAccess, piece};
use crate::verbs::slab::Slab;
use crate::verbs::{Completion, Device, Done, MemoryWindow, Op, Queue, Rail, Request};
use credits::Credits;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;
use wire::{Kind, PART_HEADER};

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
    /// A slot of the slab.
    Slot(usize),
    /// The key of a window that is being taken back.
    Window(u32),
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
    /// Windows without a key now. They and `bound` go before the queue.
    free_windows: Vec<MemoryWindow>,
    /// Windows by the key that the peer was given.
    bound: HashMap<u32, MemoryWindow>,
    /// Keys given to the peer for each call of this side's.
    calls: HashMap<u64, [Option<u32>; 2]>,
    /// The peer's key for each of its calls with a payload, to be set free by the answer.
    sources: HashMap<u64, u32>,
    /// Whether the peer's keys are windows, which SENDs of this side's can set free.
    invalidate_theirs: bool,
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
    pub(crate) binds: AtomicU64,
    pub(crate) invalidations: AtomicU64,
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
    /// Peers are given keys of windows, good for one call.
    windows: bool,
    /// Both halves are gone.
    gone: CancellationToken,
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
    fn post(
        &self,
        state: &mut State,
        op: Op,
        local: Option<Piece>,
        work: Work,
        how: How,
    ) -> Result<(), LinkError> {
        let id = state.next;
        let signaled = how.signaled || state.unsignaled + 1 >= SIGNAL_EVERY;
        let request = Request { id, op, signaled, inline: how.inline };
        match (&state.over, &state.queue) {
            // SAFETY: the memory is owned by `work`, which stays in `posted` until the completion
            // of this or a later request was polled, or the queue destroyed (see `State`); or it
            // was copied while posting.
            (None, Some(queue)) => unsafe { queue.post(&request, local.as_slice())? },
            _ => return Err(self.ended(state)),
        }
        let bytes = local.map_or(0, |p| p.length as usize);
        let counter = match op {
            Op::Send | Op::SendInvalidate(_) => &self.work.sends,
            Op::Write(_) | Op::WriteImm(..) => &self.work.writes,
            Op::Read(_) => &self.work.reads,
            Op::Invalidate(_) => &self.work.invalidations,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.work.inline.fetch_add(u64::from(how.inline), Ordering::Relaxed);
        self.counters.add_sent(if matches!(op, Op::Read(_)) { 0 } else { bytes });
        Self::posted(state, signaled, Posted { id, work, _permit: how.permit });
        Ok(())
    }

    /// Accounts for a request that the device has taken.
    fn posted(state: &mut State, signaled: bool, posted: Posted) {
        state.next += 1;
        state.unsignaled = if signaled { 0 } else { state.unsignaled + 1 };
        state.posted.push_back(posted);
    }

    /// What to tell the peer so that it can reach `window` for the time of `call`: the same with
    /// the key of a window bound to it. There must be room for a request.
    fn name(
        &self,
        state: &mut State,
        call: u64,
        window: Window,
        access: WindowAccess,
    ) -> Result<Window, LinkError> {
        if !self.windows {
            return Ok(window);
        }
        let mut memory = match state.free_windows.pop() {
            Some(memory) => memory,
            None => MemoryWindow::new(self.device())?,
        };
        let (id, signaled) = (state.next, state.unsignaled + 1 >= SIGNAL_EVERY);
        let place = (window.address, u64::from(window.len), window.key);
        let key = match (&state.over, &state.queue) {
            // SAFETY: the connection owns the memory of a call in flight until its answer came,
            // which `recv` hands out only once the window is free, or the queue was destroyed.
            (None, Some(queue)) => unsafe { queue.bind(id, signaled, &mut memory, place, access)? },
            _ => return Err(self.ended(state)),
        };
        self.work.binds.fetch_add(1, Ordering::Relaxed);
        Self::posted(state, signaled, Posted { id, work: Work::Nothing, _permit: None });
        state.bound.insert(key, memory);
        state.calls.entry(call).or_default()[usize::from(access == WindowAccess::Write)] = Some(key);
        Ok(Window { key, ..window })
    }

    /// Sends one part, inline if it is short enough. There must be room and, but for a probe, a
    /// credit must have been taken.
    fn send_part(&self, state: &mut State, kind: Kind, bytes: [&[u8]; 2], how: How) -> Result<(), LinkError> {
        let op = how.invalidate.map_or(Op::Send, Op::SendInvalidate);
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
            let local = piece(short.as_ptr(), len, 0);
            return self.post(state, op, Some(local), Work::Nothing, how);
        }
        let Some(slot) = state.free.pop() else {
            return Err(LinkError::Protocol("no slot to send from, although room was checked".into()));
        };
        // SAFETY: a free slot is not posted.
        copy(unsafe { state.slab.write(slot) });
        let local = state.slab.piece(slot, len);
        self.post(state, op, Some(local), Work::Slot(slot), how)
    }

    /// Whether `requests` may be posted, of which one may need a slot.
    fn has_room(state: &State, requests: usize) -> bool {
        state.posted.len() + requests <= SENDS - GRANT_SENDS && !state.free.is_empty()
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
        // A key that is no window's of ours was refused by the device already.
        if let Some(window) = completion.invalidated.and_then(|key| state.bound.remove(&key)) {
            state.free_windows.push(window);
        }
        match completion.result {
            Err(error) => {
                let what = match state.posted.iter().find(|p| p.id == id).map(|p| &p.work) {
                    Some(Work::Read { .. }) => "READ",
                    Some(Work::Write { .. }) => "WRITE",
                    Some(Work::Slot(_) | Work::Nothing) => "SEND",
                    Some(Work::Window(_)) => "taking back a memory window",
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
                        Work::Window(key) => {
                            if let Some(window) = state.bound.remove(&key) {
                                state.free_windows.push(window);
                            }
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

    /// Takes back the rights that the peer was given for `call`, whose answer came: when this
    /// returns, no key reaches the call's memory any more.
    async fn end_call(&self, call: u64) -> Result<(), LinkError> {
        let keys = self.lock().calls.remove(&call).into_iter().flatten().flatten();
        for key in keys {
            let mut asked = false;
            loop {
                let room = self.room.notified();
                tokio::pin!(room);
                room.as_mut().enable();
                {
                    let mut state = self.lock();
                    if !state.bound.contains_key(&key) {
                        break;
                    }
                    if state.over.is_some() {
                        return Err(self.ended(&state));
                    }
                    if !asked && Self::has_room(&state, 1) {
                        let how = How { signaled: true, ..How::default() };
                        self.post(&mut state, Op::Invalidate(key), None, Work::Window(key), how)?;
                        asked = true;
                    }
                }
                tokio::select! {
                    () = room => {}
                    () = self.stop.cancelled() => {}
                    () = tokio::time::sleep(self.stall) => self.end(LinkError::Stalled(self.stall)),
                }
            }
        }
        Ok(())
    }

    fn drop_half(&self) {
        let last = {
            let mut state = self.lock();
            state.halves -= 1;
            (state.halves == 0).then(|| {
                let windows = (std::mem::take(&mut state.bound), std::mem::take(&mut state.free_windows));
                (windows, state.queue.take())
            })
        };
        if let Some((windows, queue)) = last {
            self.stop.cancel();
            // In this order; see `MemoryWindow`.
            drop(windows);
            drop(queue);
            // Now no device touches any of it.
            self.lock().posted.clear();
            self.gone.cancel();
        }
    }
}

/// Whether a message of this kind is the last of its call, after which the peer's rights end.
fn ends_call(kind: FrameKind) -> bool {
    matches!(kind, FrameKind::Reply | FrameKind::Error)
}

/// How a request is posted.
#[derive(Default)]
struct How {
    signaled: bool,
    inline: bool,
    /// Held until it has completed.
    permit: Option<Permit>,
    /// The peer's window that a SEND sets free.
    invalidate: Option<u32>,
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
            () = shared.stop.cancelled() => {
                shared.gone.cancelled().await;
                return;
            }
        };
        if let Err(e) = pumped {
            shared.end(e);
            // The peer's device is telling it the same in its own words; the end of this connection
            // would overtake them.
            shared.gone.cancelled().await;
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

#[cfg(test)]
mod tests;
