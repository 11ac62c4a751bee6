//! The client's end of one connection: matches answers to calls and owns the buffers of calls in
//! flight, whatever becomes of their callers.

use super::frame::{FrameKind, Header};
use super::incast::{Incast, Place, Tokens};
use super::info::About;
use super::outbox::{Outbox, Say};
use super::{Call, Response, SMALL};
use crate::buf::{Buf, BufMut};
use crate::error::{CallError, LinkError};
use crate::link::{Counters, Incoming, LinkRx, LinkTx, Outgoing, Register};
use bytes::Bytes;
use firefly_types::{ErrorKind, WireError};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// Calls in flight on one connection, abandoned ones included; more wait their turn.
pub(crate) const MAX_IN_FLIGHT: usize = 256;
/// Abandoned calls (timed out or dropped) whose answers have not come. At this number the peer is
/// not answering any more, and destroying the connection frees their buffers.
pub(super) const MAX_QUARANTINED: usize = MAX_IN_FLIGHT / 2;
/// Longest time that an abandoned call holds its buffers before the connection is destroyed to
/// free them. Longer than a fail-over of the server's own dependencies.
const MAX_QUARANTINE: Duration = Duration::from_secs(30);

/// A call whose answer has not come. It owns what the peer may still touch.
struct InFlight {
    recv: Option<BufMut>,
    /// An RDMA peer reads it at any time before it answers.
    _send: Option<Buf>,
    answer: oneshot::Sender<Result<Response, Ended>>,
    abandoned: Option<Instant>,
    turn: Turn,
    _load: Load,
    _permit: OwnedSemaphorePermit,
}

/// How a call ended without the caller's address and method, which the caller knows.
pub(super) enum Ended {
    /// The server's own answer.
    Remote(WireError),
    /// The connection ended after the call was, or may have been, sent.
    Lost(String),
    /// The connection ended before: here is the call again.
    NotSent(Box<Call>),
}

/// Where the reply stands with [`Incast`].
enum Turn {
    /// It may come at any time; what is held bounds how much does.
    Free(#[expect(dead_code, reason = "held, not read")] Option<Tokens>),
    /// The server will ask.
    Asked,
    /// The server has asked.
    InLine(#[expect(dead_code, reason = "held, not read")] Place),
}

/// Bytes that a call moves, counted to its lane while it is in flight.
struct Load(Arc<AtomicUsize>, usize);

impl Load {
    fn new(lane: &Arc<AtomicUsize>, bytes: usize) -> Load {
        lane.fetch_add(bytes, Ordering::Relaxed);
        Load(lane.clone(), bytes)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Calls {
    in_flight: HashMap<u64, InFlight>,
    quarantined: usize,
    /// Why the connection is over; no call is added any more.
    over: Option<String>,
}

/// One live (or just ended) connection to a server.
pub(super) struct Connection {
    calls: Mutex<Calls>,
    permits: Arc<Semaphore>,
    outbox: Arc<dyn Say>,
    next: AtomicU64,
    load: Arc<AtomicUsize>,
    stop: CancellationToken,
    memory: Arc<dyn Register>,
    pub(super) about: About,
    incast: Option<Arc<Incast>>,
    device_failed: AtomicBool,
    retired: AtomicBool,
}

impl Connection {
    /// Starts the tasks that carry the connection. `counters` are the link's; without `incast` the
    /// server does not know of grants.
    pub(super) fn start<T: LinkTx, R: LinkRx>(
        tx: T,
        mut rx: R,
        counters: Arc<Counters>,
        incast: Option<Arc<Incast>>,
    ) -> Arc<Connection> {
        let (memory, device) = (tx.register(), tx.device());
        let outbox = Arc::new(Outbox::new(tx));
        let me = Arc::new(Connection {
            calls: Mutex::default(),
            permits: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            outbox: outbox.clone(),
            next: AtomicU64::new(1),
            load: Arc::default(),
            stop: CancellationToken::new(),
            memory,
            about: About { transport: T::NAME, device, counters, since: Instant::now() },
            incast,
            device_failed: AtomicBool::new(false),
            retired: AtomicBool::new(false),
        });
        let (mine, writing) = (me.clone(), outbox.clone());
        let writer = tokio::spawn(async move {
            tokio::select! {
                written = writing.run(&mine.stop) => if let Err(error) = written { mine.fail(&error) },
                () = mine.watch_quarantine() => {}
            }
        });
        let mine = me.clone();
        tokio::spawn(async move {
            tokio::select! {
                error = read(&mine, &mut rx) => mine.fail(&error),
                () = mine.stop.cancelled() => {}
            }
            if let Err(e) = writer.await {
                tracing::error!(error = %e, "the writer of a connection failed");
            }
            // Both halves go before the buffers: only then can no device touch them any more.
            let unsent = outbox.close().await;
            drop(rx);
            mine.release(unsent);
        });
        me
    }

    /// Whether calls can still be made.
    pub(super) fn is_live(&self) -> bool {
        !self.stop.is_cancelled()
    }

    /// Whether it ended because of this side's device, not because of the peer.
    pub(super) fn device_failed(&self) -> bool {
        self.device_failed.load(Ordering::Relaxed)
    }

    /// Why it is over, if it is.
    pub(super) fn over(&self) -> Option<String> {
        self.lock().over.clone()
    }

    /// Bytes that calls in flight move.
    pub(super) fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Calls in flight, abandoned ones included.
    pub(super) fn in_flight(&self) -> usize {
        self.lock().in_flight.len()
    }

    /// Ends the connection; calls in flight fail.
    pub(super) fn close(&self, reason: &str) {
        self.end(reason.to_owned());
    }

    /// Ends the connection when its last answer has come: another took its place.
    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
        let idle = self.lock().in_flight.is_empty();
        if idle {
            self.end("another connection took its place".into());
        }
    }

    /// Bytes of receive memory held for callers that are gone.
    pub(super) fn quarantined_bytes(&self) -> usize {
        let calls = self.lock();
        let abandoned = calls.in_flight.values().filter(|c| c.abandoned.is_some());
        abandoned.filter_map(|c| c.recv.as_ref()).map(BufMut::capacity).sum()
    }

    /// Makes one call. Dropping the future abandons the call, whose buffers stay here. The caller
    /// applies the timeout.
    pub(super) async fn call(&self, call: Call) -> Result<Response, Ended> {
        let load = Load::new(&self.load, call.bytes());
        let permit = match self.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => tokio::select! {
                permit = self.permits.clone().acquire_owned() => permit.expect("the semaphore is never closed"),
                () = self.stop.cancelled() => return Err(Ended::NotSent(Box::new(call))),
            },
        };
        let timeout = call.timeout;
        let (abandon, answered) = self.begin(call, load, permit)?;
        let answer = answered.await;
        // Answered: it is not in flight any more.
        std::mem::forget(abandon);
        match answer {
            Ok(Err(Ended::NotSent(back))) => Err(Ended::NotSent(Box::new(Call { timeout, ..*back }))),
            Ok(answer) => answer,
            // Dropped in the middle of its answer, because the connection is ending.
            Err(_) => {
                self.stop.cancelled().await;
                Err(Ended::Lost(self.over().unwrap_or_default()))
            }
        }
    }

    /// Sends the request. Nothing here waits, so a dropped future never leaves a call half-way.
    fn begin(&self, mut call: Call, load: Load, permit: OwnedSemaphorePermit) -> Result<Begun<'_>, Ended> {
        let window = match call.recv.as_mut().map(|buf| self.memory.window(buf)).transpose() {
            Ok(window) => window.flatten(),
            Err(e) => return Err(Ended::Remote(WireError::new(e.kind(), e.to_string()))),
        };
        let turn = match (&self.incast, call.recv.as_ref().map_or(0, BufMut::capacity)) {
            (Some(incast), bytes) if bytes > SMALL => {
                incast.try_take(bytes).map_or(Turn::Asked, |tokens| Turn::Free(Some(tokens)))
            }
            _ => Turn::Free(None),
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let header = Header {
            kind: FrameKind::Request,
            call: id,
            method: call.method,
            head_len: call.head.len() as u32,
            payload_len: call.send.as_ref().map_or(0, |b| b.len()) as u32,
            aux: call.recv.as_ref().map_or(0, BufMut::capacity).min(super::MAX_PAYLOAD) as u32,
            ask: matches!(turn, Turn::Asked),
        };
        let (answer, answered) = oneshot::channel();
        {
            let mut calls = self.lock();
            if calls.over.is_some() {
                return Err(Ended::NotSent(Box::new(call)));
            }
            let in_flight = InFlight {
                recv: call.recv.take(),
                _send: call.send.clone(),
                answer,
                abandoned: None,
                turn,
                _load: load,
                _permit: permit,
            };
            calls.in_flight.insert(id, in_flight);
        }
        let request = Outgoing { header, head: call.head, payload: call.send, window, permit: None };
        if let Err(request) = self.outbox.say(request) {
            self.not_sent(*request);
        }
        Ok((AbandonOnDrop { connection: self, id }, answered))
    }

    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, reason: String) {
        self.lock().over.get_or_insert(reason);
        self.stop.cancel();
    }

    fn fail(&self, error: &LinkError) {
        if error.is_of_the_device() && self.is_live() {
            self.device_failed.store(true, Ordering::Relaxed);
        }
        self.end(error.to_string());
    }

    /// Gives a call that the peer has certainly not seen back to its caller.
    fn not_sent(&self, request: Outgoing) {
        if request.header.kind != FrameKind::Request {
            return;
        }
        let Some(call) = self.take(request.header.call) else { return };
        let back = Call {
            method: request.header.method,
            head: request.head,
            send: request.payload,
            recv: call.recv,
            timeout: Duration::ZERO,
        };
        // The caller may be gone; then nobody wants to know.
        let _ = call.answer.send(Err(Ended::NotSent(Box::new(back))));
    }

    /// Fails all calls and frees their buffers; the link is destroyed by now.
    fn release(&self, unsent: Vec<Outgoing>) {
        for request in unsent {
            self.not_sent(request);
        }
        let (lost, reason) = {
            let mut calls = self.lock();
            calls.quarantined = 0;
            (std::mem::take(&mut calls.in_flight), calls.over.clone().unwrap_or_default())
        };
        for (_, call) in lost {
            let _ = call.answer.send(Err(Ended::Lost(reason.clone())));
        }
    }

    /// The caller is gone. Its buffers stay until the answer comes.
    fn abandon(&self, id: u64) {
        let (too_many, turn) = {
            let mut calls = self.lock();
            let Some(call) = calls.in_flight.get_mut(&id) else { return };
            call.abandoned = Some(Instant::now());
            // Its reply may still come, but no other waits for it.
            let turn = match &call.turn {
                Turn::Asked => None,
                Turn::Free(_) | Turn::InLine(_) => Some(std::mem::replace(&mut call.turn, Turn::Free(None))),
            };
            calls.quarantined += 1;
            (calls.quarantined >= MAX_QUARANTINED, turn)
        };
        if let Some(Turn::InLine(_)) = turn {
            self.say_grant(id, false);
        }
        drop(turn);
        if too_many {
            self.end(format!("{MAX_QUARANTINED} calls in a row were given up unanswered"));
        }
    }

    /// The reply to `id` is there and asks to be sent.
    fn ready(self: &Arc<Self>, id: u64, bytes: usize) -> Result<(), LinkError> {
        let Some(incast) = &self.incast else {
            return Err(LinkError::Protocol("a reply asks in a protocol that knows no grants".into()));
        };
        let wanted = {
            let mut calls = self.lock();
            match calls.in_flight.get_mut(&id) {
                Some(call) if matches!(call.turn, Turn::Asked) => {
                    let wanted = call.abandoned.is_none();
                    call.turn =
                        if wanted { Turn::InLine(incast.wait(self, id, bytes)) } else { Turn::Free(None) };
                    wanted
                }
                _ => return Err(LinkError::Protocol(format!("a reply to call {id} asks, which need not"))),
            }
        };
        if wanted {
            incast.grant();
        } else {
            self.say_grant(id, false);
        }
        Ok(())
    }

    /// The reply to `id` may come.
    pub(super) fn granted(&self, id: u64, tokens: Tokens) {
        let place = {
            let mut calls = self.lock();
            match calls.in_flight.get_mut(&id) {
                Some(call) if matches!(call.turn, Turn::InLine(_)) => {
                    std::mem::replace(&mut call.turn, Turn::Free(Some(tokens)))
                }
                // It was given up or answered meanwhile, and so told.
                _ => {
                    drop(calls);
                    return drop(tokens);
                }
            }
        };
        self.say_grant(id, true);
        drop(place);
    }

    fn say_grant(&self, call: u64, send: bool) {
        let header = Header {
            kind: FrameKind::Grant,
            call,
            method: 0,
            head_len: 0,
            payload_len: 0,
            aux: u32::from(send),
            ask: false,
        };
        // Fails only if the connection is over, and with it the call.
        let _ = self.outbox.say(Outgoing {
            header,
            head: Bytes::new(),
            payload: None,
            window: None,
            permit: None,
        });
    }

    /// Ends the connection when a call that was given up holds its buffers for too long.
    async fn watch_quarantine(&self) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let calls = self.lock();
            let is_overdue = |c: &InFlight| c.abandoned.is_some_and(|since| since.elapsed() > MAX_QUARANTINE);
            let overdue = calls.quarantined > 0 && calls.in_flight.values().any(is_overdue);
            drop(calls);
            if overdue {
                return self
                    .end(format!("a call that was given up stayed unanswered for {MAX_QUARANTINE:?}"));
            }
        }
    }

    fn take(&self, id: u64) -> Option<InFlight> {
        let mut calls = self.lock();
        let call = calls.in_flight.remove(&id)?;
        if call.abandoned.is_some() {
            calls.quarantined -= 1;
        }
        Some(call)
    }
}

/// A call on its way, and where its answer comes.
type Begun<'a> = (AbandonOnDrop<'a>, oneshot::Receiver<Result<Response, Ended>>);

struct AbandonOnDrop<'a> {
    connection: &'a Connection,
    id: u64,
}

impl Drop for AbandonOnDrop<'_> {
    fn drop(&mut self) {
        self.connection.abandon(self.id);
    }
}

/// Reads answers until the link ends.
async fn read<R: LinkRx>(me: &Arc<Connection>, rx: &mut R) -> LinkError {
    loop {
        if let Err(e) = read_one(me, rx).await {
            return e;
        }
        if me.retired.load(Ordering::SeqCst) {
            me.retire();
        }
    }
}

async fn read_one<R: LinkRx>(me: &Arc<Connection>, rx: &mut R) -> Result<(), LinkError> {
    let broken = |what: String| Err(LinkError::Protocol(what));
    let incoming = rx.recv().await?;
    let Header { kind, call: id, payload_len, aux, .. } = incoming.header;
    match kind {
        FrameKind::Reply | FrameKind::Error => {}
        FrameKind::Ready => return me.ready(id, aux as usize),
        FrameKind::Request | FrameKind::Grant => return broken(format!("a server sent a {kind:?}")),
    }
    let Some(mut call) = me.take(id) else {
        return broken(format!("an answer to call {id}, which is not in flight"));
    };
    if kind == FrameKind::Error {
        let message = String::from_utf8_lossy(&incoming.head).into_owned();
        let error = WireError { kind: ErrorKind::from_code(aux as u16), message };
        let _ = call.answer.send(Err(Ended::Remote(error)));
        return Ok(());
    }
    if let Err(e) = land(rx, &incoming, payload_len as usize, call.recv.as_mut()).await {
        // The peer is not to be trusted with this memory any more, nor to have let go of it: it
        // stays until the link is destroyed.
        me.lock().in_flight.insert(id, InFlight { abandoned: None, ..call });
        return Err(e);
    }
    // If the caller is gone the answer is dropped here, and with it the buffer: the peer is done
    // with it.
    let InFlight { answer, recv, .. } = call;
    let _ = answer.send(Ok(Response { head: incoming.head, data: recv }));
    Ok(())
}

/// Completes a reply's payload in the caller's buffer.
async fn land<R: LinkRx>(
    rx: &mut R,
    incoming: &Incoming,
    len: usize,
    buf: Option<&mut BufMut>,
) -> Result<(), LinkError> {
    match buf {
        Some(buf) if len <= buf.capacity() => {
            buf.set_len(len);
            if len > 0 { rx.land(incoming, buf).await } else { Ok(()) }
        }
        None if len == 0 => Ok(()),
        room => {
            let room = room.map_or(0, |b| b.capacity());
            Err(LinkError::Protocol(format!("a payload of {len} bytes for a buffer of {room}")))
        }
    }
}

impl Ended {
    pub(super) fn into_error(self, peer: &str) -> CallError {
        let lost = |reason| CallError::Disconnected { peer: peer.to_owned(), reason };
        match self {
            Ended::Remote(e) => CallError::Remote(e),
            Ended::Lost(reason) => lost(reason),
            Ended::NotSent(_) => lost("every connection ended before the call was sent".to_owned()),
        }
    }
}
