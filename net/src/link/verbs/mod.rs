//! The RDMA carrier: messages by SEND, request payloads by READ, reply payloads by WRITE.
//!
//! The TCP connection over which both sides proved themselves stays open beside the queue pair: it
//! carried the addresses, and its end is how a peer's death is noticed when nothing is in flight.
//!
//! Memory: whatever a device may touch is held in [`State::work`] until its completion came, and
//! the queue pair is destroyed when the second half of the link is dropped, before anything held
//! is. So a cancelled pull or a lost connection never leaves a device writing to freed memory.
//!
//! Provisional: no credits (a sender that runs ahead is held by receiver-not-ready retries and the
//! stall timer), and a block's remote key is good as long as its registration.

use super::{Counters, Incoming, LinkOptions, LinkRx, LinkTx, Outgoing, Register, Window};
use crate::buf::{Buf, BufMut, BufPool, HeadRoom};
use crate::error::LinkError;
use crate::rpc::frame::{FrameKind, HEADER_BYTES, Header};
use crate::verbs::queue::{Piece, piece};
use crate::verbs::{Address, Device, Done, Op, Queue, QueueOptions, Rail, Remote, Request};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

/// A SEND carries up to so much of a message; longer heads take several, in order.
const SLOT: usize = 8 << 10;
/// Work requests in flight on the send side, and receives posted.
const DEPTH: usize = 64;
/// Source window and reply window follow the frame's header.
const WINDOWS: usize = 2 * 16;
const MAGIC: [u8; 8] = *b"FFRDMA1\n";
const ADDRESS_BYTES: usize = 8 + 4 + 4 + 16 + 4;
/// READs in flight at one time; every verbs device takes as many.
const READS: u8 = 4;

/// Work whose completion has not come, with the memory that the device may touch.
enum Work {
    Send { _slot: BufMut },
    Write { _from: Buf },
    Read { into: BufMut, done: oneshot::Sender<BufMut> },
}

/// A posted send-side request. `_permit` is its place in the send queue.
struct Posted {
    work: Work,
    _permit: OwnedSemaphorePermit,
}

struct State {
    /// Gone when both halves are. Declared first: destroyed before what its device may touch.
    queue: Option<Queue>,
    next: u64,
    work: HashMap<u64, Posted>,
    /// Receive slots by work id `DEPTH`-wide: 0..DEPTH.
    slots: Vec<Option<BufMut>>,
    arrived: VecDeque<(usize, usize)>,
    over: Option<String>,
    halves: usize,
}

struct Shared {
    device: Arc<Device>,
    state: Mutex<State>,
    arrival: Notify,
    places: Arc<Semaphore>,
    slots: BufPool,
    stop: CancellationToken,
    counters: Arc<Counters>,
    stall: Duration,
    events: AtomicUsize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, reason: String) {
        self.lock().over.get_or_insert(reason);
        self.stop.cancel();
    }

    fn ended(&self, state: &State) -> LinkError {
        let reason = state.over.clone().unwrap_or_else(|| "the link was closed on this side".into());
        LinkError::Device { device: self.device.name().to_owned(), what: "moving bytes", reason }
    }

    /// Waits for a place in the send queue. None coming free means that the peer's device or the
    /// path is stuck.
    async fn place(&self) -> Result<OwnedSemaphorePermit, LinkError> {
        let place = tokio::select! {
            place = tokio::time::timeout(self.stall, self.places.clone().acquire_owned()) => place,
            () = self.stop.cancelled() => return Err(self.ended(&self.lock())),
        };
        match place {
            Ok(place) => Ok(place.expect("the semaphore is never closed")),
            Err(_) => {
                self.end(format!("no work was completed for {:?}", self.stall));
                Err(LinkError::Stalled(self.stall))
            }
        }
    }

    /// Posts work and holds its memory. `local` describes memory that `work` owns.
    fn post(&self, op: Op, local: Piece, work: Work, permit: OwnedSemaphorePermit) -> Result<(), LinkError> {
        let mut state = self.lock();
        let id = state.next;
        state.next += 1;
        let request = Request { id, op, signaled: true, inline: false };
        match (&state.over, &state.queue) {
            // SAFETY: the memory is owned by `work`, which stays in the table until the completion
            // was polled or the queue destroyed (see `State`).
            (None, Some(queue)) => unsafe { queue.post(&request, &[local])? },
            _ => return Err(self.ended(&state)),
        }
        state.work.insert(id, Posted { work, _permit: permit });
        Ok(())
    }

    /// Gives receive slot `index` to the device.
    fn post_slot(&self, state: &mut State, index: usize, slot: BufMut) -> Result<(), LinkError> {
        let keys = self.device.keys_of_mut(&slot)?;
        let into = piece(slot.as_ptr(), SLOT, keys.local);
        let Some(queue) = &state.queue else { return Err(self.ended(state)) };
        // SAFETY: the slot is kept in `slots`, untouched, until its completion was polled.
        unsafe { queue.post_recv(index as u64, Some(into))? };
        state.slots[index] = Some(slot);
        Ok(())
    }

    /// Takes completions and wakes whom they concern.
    fn pump(&self) -> Result<(), LinkError> {
        let mut state = self.lock();
        let mut completions = Vec::new();
        let Some(queue) = &state.queue else { return Err(LinkError::Closed) };
        self.events.fetch_add(queue.take_events(), Ordering::Relaxed);
        queue.arm()?;
        while queue.poll(&mut completions)? > 0 {}
        let mut failed = None;
        for completion in completions {
            let id = completion.id;
            match completion.result {
                Err(error) => {
                    // The first failure is the cause; the rest were flushed because of it. A READ's
                    // memory is let go here: the queue pair has failed and moves nothing more.
                    let what = match state.work.remove(&id).map(|p| p.work) {
                        Some(Work::Read { .. }) => "READ",
                        Some(Work::Write { .. }) => "WRITE",
                        Some(Work::Send { .. }) => "SEND",
                        None => "receiving",
                    };
                    let device = self.device.name().to_owned();
                    failed.get_or_insert(LinkError::Work { device, what, error });
                }
                Ok(Done::Received { len }) => {
                    state.arrived.push_back((id as usize, len as usize));
                    self.counters.add_received(len as usize);
                    self.arrival.notify_one();
                }
                Ok(Done::Written { .. }) => {
                    return Err(LinkError::Protocol("a WRITE with immediate, which RPC does not use".into()));
                }
                Ok(Done::Request) => {
                    let Some(posted) = state.work.remove(&id) else { continue };
                    match posted.work {
                        Work::Read { into, done } => {
                            self.counters.add_received(into.len());
                            // The puller may be gone; the buffer goes back to its pool then.
                            let _ = done.send(into);
                        }
                        Work::Send { .. } | Work::Write { .. } => {}
                    }
                }
            }
        }
        failed.map_or(Ok(()), Err)
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
            let mut state = self.lock();
            state.work.clear();
            state.slots.clear();
        }
    }
}

/// Moves completions until the link ends.
async fn pump(shared: Arc<Shared>, events: AsyncFd<OwnedFd>) {
    loop {
        let ready = tokio::select! {
            ready = events.readable() => ready,
            () = shared.stop.cancelled() => return,
        };
        let pumped = match ready {
            Ok(mut guard) => {
                guard.clear_ready();
                shared.pump()
            }
            Err(e) => Err(LinkError::Io(e)),
        };
        if let Err(e) = pumped {
            shared.end(e.to_string());
            return;
        }
    }
}

/// Makes a link of a connected, authenticated stream and a device: both sides call it.
pub(crate) async fn connect(
    mut side: TcpStream,
    rail: &Rail,
    link: LinkOptions,
) -> Result<(VerbsTx, VerbsRx), LinkError> {
    let LinkOptions { counters, stall, class, .. } = link;
    let device = rail.device.clone();
    let refused = |reason| LinkError::Device { device: rail.name(), what: "using its port", reason };
    let port = rail.port().map_err(refused)?;
    let options = QueueOptions {
        sends: DEPTH as u32,
        receives: DEPTH as u32,
        reads: READS,
        class,
        // Provisional: no credits.
        rnr_retries: 7,
        ..Default::default()
    };
    let queue = Queue::new(&device, &port, &options)?;
    let ours = queue.address();
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            queue: Some(queue),
            next: DEPTH as u64,
            work: HashMap::new(),
            slots: (0..DEPTH).map(|_| None).collect(),
            arrived: VecDeque::new(),
            over: None,
            halves: 2,
        }),
        arrival: Notify::new(),
        places: Arc::new(Semaphore::new(DEPTH)),
        slots: BufPool::new(2 * DEPTH * SLOT),
        stop: CancellationToken::new(),
        counters,
        stall,
        events: AtomicUsize::new(0),
        device,
    });
    let (tx, rx) = (Half(shared.clone()), Half(shared.clone()));
    let events = {
        let mut state = shared.lock();
        for index in 0..DEPTH {
            // Half of the pool; the sending slots come from the other half.
            let Some(slot) = shared.slots.try_alloc(SLOT) else { return Err(shared.ended(&state)) };
            shared.post_slot(&mut state, index, slot)?;
        }
        let Some(queue) = &state.queue else { return Err(shared.ended(&state)) };
        queue.events()?
    };

    let mut hello = MAGIC.to_vec();
    hello.extend_from_slice(&ours.qp.to_le_bytes());
    hello.extend_from_slice(&ours.psn.to_le_bytes());
    hello.extend_from_slice(&ours.gid);
    hello.extend_from_slice(&ours.mtu.to_le_bytes());
    side.write_all(&hello).await?;
    let mut theirs = [0; ADDRESS_BYTES];
    side.read_exact(&mut theirs).await?;
    let peer = parse_address(&theirs)?;
    if let Some(queue) = &shared.lock().queue {
        queue.connect(&peer)?;
    }
    // Nobody sends before the other side can receive.
    side.write_all(&[1]).await?;
    side.read_exact(&mut [0]).await?;

    // SAFETY: the descriptor is owned by the `AsyncFd` and stays open until it is dropped.
    let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) };
    let events = events.map_err(std::io::Error::from)?;
    tokio::spawn(pump(shared.clone(), events));
    let (read, write) = side.into_split();
    Ok((VerbsTx { half: tx, _side: write }, VerbsRx { half: rx, side: read }))
}

fn parse_address(bytes: &[u8; ADDRESS_BYTES]) -> Result<Address, LinkError> {
    let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let mut gid = [0; 16];
    gid.copy_from_slice(&bytes[16..32]);
    let peer = Address { qp: u32_at(8), psn: u32_at(12), gid, lid: 0, mtu: u32_at(32), reads: READS };
    if bytes[..8] != MAGIC || peer.qp > 0xFF_FFFF || !(1..=5).contains(&peer.mtu) {
        return Err(LinkError::Protocol("an RDMA address is malformed".into()));
    }
    Ok(peer)
}

/// Counts towards the two halves whose drop destroys the queue pair.
struct Half(Arc<Shared>);

impl Drop for Half {
    fn drop(&mut self) {
        self.0.drop_half();
    }
}

fn put_window(out: &mut Vec<u8>, window: Option<Window>) {
    let Window { address, key, len } = window.unwrap_or_default();
    out.extend_from_slice(&address.to_le_bytes());
    out.extend_from_slice(&key.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
}

fn get_window(bytes: &[u8]) -> Option<Window> {
    let mut fields = [0; 16];
    fields.copy_from_slice(bytes);
    let u32_at = |at: usize| u32::from_le_bytes([fields[at], fields[at + 1], fields[at + 2], fields[at + 3]]);
    let (low, high) = (u64::from(u32_at(0)), u64::from(u32_at(4)));
    let window = Window { address: high << 32 | low, key: u32_at(8), len: u32_at(12) };
    (window.len > 0).then_some(window)
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
    /// Its end tells the peer.
    _side: OwnedWriteHalf,
}

impl VerbsTx {
    #[cfg(test)]
    fn shared(&self) -> Arc<Shared> {
        self.half.0.clone()
    }

    /// One message, without its payload, in as many SENDs as it needs.
    async fn message(&self, message: &Outgoing, source: Option<Window>) -> Result<(), LinkError> {
        let shared = &self.half.0;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + WINDOWS + message.head.len());
        bytes.extend_from_slice(&message.header.encode());
        put_window(&mut bytes, source);
        // A reply's window is the peer's own business already.
        put_window(&mut bytes, message.window.filter(|_| message.header.kind == FrameKind::Request));
        bytes.extend_from_slice(&message.head);
        for part in bytes.chunks(SLOT) {
            let permit = shared.place().await?;
            let Some(mut slot) = shared.slots.try_alloc(SLOT) else {
                return Err(LinkError::Protocol("more sends in flight than places in the queue".into()));
            };
            slot.set_len(part.len());
            slot.copy_from_slice(part);
            let local = piece(slot.as_ptr(), part.len(), shared.device.keys_of_mut(&slot)?.local);
            shared.post(Op::Send, local, Work::Send { _slot: slot }, permit)?;
            shared.counters.add_sent(part.len());
        }
        Ok(())
    }

    /// A reply's payload into the caller's window. The SEND that follows on the same queue pair
    /// arrives after it.
    async fn push(&self, payload: &Buf, window: Option<Window>) -> Result<(), LinkError> {
        let shared = &self.half.0;
        let window = window.filter(|w| w.len as usize >= payload.len());
        let Some(window) = window else {
            return Err(LinkError::Protocol("a reply's payload without a window that takes it".into()));
        };
        let keys = shared.device.keys_of(payload)?;
        let permit = shared.place().await?;
        let local = piece(payload.as_ptr(), payload.len(), keys.local);
        let work = Work::Write { _from: payload.clone() };
        let into = Remote { address: window.address, key: window.key };
        shared.post(Op::Write(into), local, work, permit)?;
        shared.counters.add_sent(payload.len());
        Ok(())
    }
}

impl LinkTx for VerbsTx {
    const NAME: &'static str = "rdma";

    fn device(&self) -> Option<String> {
        Some(self.half.0.device.name().to_owned())
    }

    fn register(&self) -> Arc<dyn Register> {
        Arc::new(Memory(self.half.0.device.clone()))
    }

    async fn send(&mut self, batch: &mut VecDeque<Outgoing>) -> Result<(), LinkError> {
        while let Some(message) = batch.front() {
            let payload = message.payload.as_ref().filter(|p| !p.is_empty());
            let source = match payload {
                Some(payload) if message.header.kind == FrameKind::Request => {
                    let keys = self.half.0.device.keys_of(payload)?;
                    let (address, len) = (payload.as_ptr() as u64, payload.len() as u32);
                    Some(Window { address, key: keys.remote, len })
                }
                Some(payload) => {
                    self.push(payload, message.window).await?;
                    None
                }
                None => None,
            };
            self.message(message, source).await?;
            batch.pop_front();
        }
        Ok(())
    }
}

/// Receives from a queue pair.
pub(crate) struct VerbsRx {
    half: Half,
    side: OwnedReadHalf,
}

impl VerbsRx {
    /// The next SEND's bytes; its slot goes back to the device.
    async fn part(&mut self, out: &mut Vec<u8>) -> Result<(), LinkError> {
        let shared = &self.half.0;
        loop {
            {
                let mut state = shared.lock();
                if let Some((index, len)) = state.arrived.pop_front() {
                    let slot = state.slots.get_mut(index).and_then(Option::take);
                    let Some(mut slot) = slot.filter(|_| len <= SLOT) else {
                        return Err(LinkError::Protocol("a receive that was not posted".into()));
                    };
                    slot.set_len(SLOT);
                    out.extend_from_slice(&slot[..len]);
                    return shared.post_slot(&mut state, index, slot);
                }
                if state.over.is_some() {
                    return Err(shared.ended(&state));
                }
            }
            let mut byte = [0];
            tokio::select! {
                biased;
                () = shared.arrival.notified() => {}
                () = shared.stop.cancelled() => {}
                got = self.side.read(&mut byte) => match got {
                    Ok(0) => return Err(LinkError::Closed),
                    Ok(_) => return Err(LinkError::Protocol("bytes beside the queue pair".into())),
                    Err(e) => return Err(e.into()),
                },
            }
        }
    }
}

impl LinkRx for VerbsRx {
    async fn recv(&mut self) -> Result<Incoming, LinkError> {
        let mut bytes = Vec::new();
        self.part(&mut bytes).await?;
        if bytes.len() < HEADER_BYTES + WINDOWS {
            return Err(LinkError::Protocol(format!("a message of {} bytes", bytes.len())));
        }
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&bytes[..HEADER_BYTES]);
        let header = Header::decode(&header)?;
        let total = HEADER_BYTES + WINDOWS + header.head_len as usize;
        while bytes.len() < total {
            let before = bytes.len();
            self.part(&mut bytes).await?;
            if bytes.len() == before {
                return Err(LinkError::Protocol("an empty part of a message".into()));
            }
        }
        if bytes.len() != total {
            return Err(LinkError::Protocol("a message is longer than its header says".into()));
        }
        let source = get_window(&bytes[HEADER_BYTES..HEADER_BYTES + 16]);
        let window = get_window(&bytes[HEADER_BYTES + 16..HEADER_BYTES + WINDOWS]);
        let offered = source.map_or(0, |w| w.len);
        if header.kind == FrameKind::Request && offered != header.payload_len {
            let what = format!("a payload of {} bytes in a window of {offered}", header.payload_len);
            return Err(LinkError::Protocol(what));
        }
        let head = Bytes::from(bytes).slice(HEADER_BYTES + WINDOWS..);
        Ok(Incoming { header, head, source, window, room: HeadRoom::default() })
    }

    async fn pull(&mut self, from: &Incoming, into: BufMut) -> Result<BufMut, LinkError> {
        let shared = &self.half.0;
        let Some(source) = from.source.filter(|w| w.len as usize == into.len()) else {
            return Err(LinkError::Protocol("nothing to pull".into()));
        };
        let local = piece(into.as_ptr(), into.len(), shared.device.keys_of_mut(&into)?.local);
        let permit = shared.place().await?;
        let (done, pulled) = oneshot::channel();
        let work = Work::Read { into, done };
        let from = Remote { address: source.address, key: source.key };
        shared.post(Op::Read(from), local, work, permit)?;
        match tokio::time::timeout(shared.stall, pulled).await {
            Ok(Ok(buf)) => Ok(buf),
            Ok(Err(_)) => {
                shared.stop.cancelled().await;
                Err(shared.ended(&shared.lock()))
            }
            Err(_) => {
                shared.end("a READ was not completed in time".into());
                Err(LinkError::Stalled(shared.stall))
            }
        }
    }

    async fn land(&mut self, _reply: &Incoming, _into: &mut BufMut) -> Result<(), LinkError> {
        // The WRITE came before the SEND on the same queue pair (RC ordering).
        Ok(())
    }

    async fn skip(&mut self, _from: &Incoming) -> Result<(), LinkError> {
        // What is not read was never moved.
        Ok(())
    }
}

#[cfg(test)]
mod tests;
