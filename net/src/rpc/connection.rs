//! The client's end of one connection: matches answers to calls and owns the buffers of calls in
//! flight, whatever becomes of their callers.

use super::frame::{FrameKind, Header};
use super::{Call, Response};
use crate::buf::{Buf, BufMut};
use crate::error::{CallError, LinkError};
use crate::link::{Incoming, LinkRx, LinkTx, Outgoing, Register};
use firefly_types::{ErrorKind, WireError};
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
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
    _permit: OwnedSemaphorePermit,
}

/// How a call ended without the caller's address and method, which the caller knows.
pub(super) enum Ended {
    Remote(WireError),
    Lost(String),
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
    queue: mpsc::Sender<Outgoing>,
    next: AtomicU64,
    stop: CancellationToken,
    memory: Arc<dyn Register>,
    transport: &'static str,
}

/// A call given back because the connection was over before anything was sent.
pub(super) struct NotSent(pub(super) Call);

impl Connection {
    /// Starts the two tasks that carry the connection.
    pub(super) fn start<T: LinkTx, R: LinkRx>(tx: T, rx: R) -> Arc<Connection> {
        let (queue, queued) = mpsc::channel(MAX_IN_FLIGHT);
        let me = Arc::new(Connection {
            calls: Mutex::default(),
            permits: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            queue,
            next: AtomicU64::new(1),
            stop: CancellationToken::new(),
            memory: tx.register(),
            transport: T::NAME,
        });
        let writer = tokio::spawn(write(me.clone(), tx, queued));
        let mine = me.clone();
        tokio::spawn(async move {
            let (me, mut rx) = (mine, rx);
            let reason = tokio::select! {
                error = read(&me, &mut rx) => error.to_string(),
                () = me.stop.cancelled() => "it was closed on this side".to_owned(),
            };
            me.end(reason);
            // Both halves go before the buffers: only then can no device touch them any more.
            if let Err(e) = writer.await {
                tracing::error!(error = %e, "the writer of a connection failed");
            }
            drop(rx);
            me.release();
        });
        me
    }

    /// Whether calls can still be made.
    pub(super) fn is_live(&self) -> bool {
        !self.stop.is_cancelled()
    }

    /// What carries it.
    pub(super) fn transport(&self) -> &'static str {
        self.transport
    }

    /// Ends the connection; calls in flight fail.
    pub(super) fn close(&self, reason: &str) {
        self.end(reason.to_owned());
    }

    /// Bytes of receive memory held for callers that are gone.
    pub(super) fn quarantined_bytes(&self) -> usize {
        let calls = self.lock();
        let abandoned = calls.in_flight.values().filter(|c| c.abandoned.is_some());
        abandoned.filter_map(|c| c.recv.as_ref()).map(BufMut::capacity).sum()
    }

    /// Makes one call. Dropping the future abandons the call, whose buffers stay here. The caller
    /// applies the timeout.
    pub(super) async fn call(&self, mut call: Call) -> Result<Result<Response, Ended>, NotSent> {
        let permit = tokio::select! {
            permit = self.permits.clone().acquire_owned() => permit.expect("the semaphore is never closed"),
            () = self.stop.cancelled() => return Err(NotSent(call)),
        };
        // From here to the queue nothing waits, so the future cannot be dropped half-way.
        let Ok(slot) = self.queue.try_reserve() else { return Err(NotSent(call)) };
        let window = match call.recv.as_mut().map(|buf| self.memory.window(buf)).transpose() {
            Ok(window) => window.flatten(),
            Err(e) => return Ok(Err(Ended::Remote(WireError::new(e.kind(), e.to_string())))),
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let header = Header {
            kind: FrameKind::Request,
            call: id,
            method: call.method,
            head_len: call.head.len() as u32,
            payload_len: call.send.as_ref().map_or(0, |b| b.len()) as u32,
            aux: call.recv.as_ref().map_or(0, BufMut::capacity).min(super::MAX_PAYLOAD) as u32,
        };
        let (answer, answered) = oneshot::channel();
        {
            let mut calls = self.lock();
            if calls.over.is_some() {
                return Err(NotSent(call));
            }
            let recv = call.recv.take();
            let in_flight =
                InFlight { recv, _send: call.send.clone(), answer, abandoned: None, _permit: permit };
            calls.in_flight.insert(id, in_flight);
        }
        let _abandon = AbandonOnDrop { connection: self, id };
        slot.send(Outgoing { header, head: call.head, payload: call.send, window, permit: None });
        match answered.await {
            Ok(answer) => Ok(answer),
            // Dropped in the middle of its answer, because the connection is ending.
            Err(_) => {
                self.stop.cancelled().await;
                Ok(Err(Ended::Lost(self.lock().over.clone().unwrap_or_default())))
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, reason: String) {
        self.lock().over.get_or_insert(reason);
        self.stop.cancel();
    }

    /// Fails all calls and frees their buffers; the link is destroyed by now.
    fn release(&self) {
        let (lost, reason) = {
            let mut calls = self.lock();
            calls.quarantined = 0;
            (std::mem::take(&mut calls.in_flight), calls.over.clone().unwrap_or_default())
        };
        for (_, call) in lost {
            // The caller may be gone; then nobody wants to know.
            let _ = call.answer.send(Err(Ended::Lost(reason.clone())));
        }
    }

    /// The caller is gone. Its buffers stay until the answer comes.
    fn abandon(&self, id: u64) {
        let too_many = {
            let mut calls = self.lock();
            let Some(call) = calls.in_flight.get_mut(&id) else { return };
            call.abandoned = Some(Instant::now());
            calls.quarantined += 1;
            calls.quarantined >= MAX_QUARANTINED
        };
        if too_many {
            self.end(format!("{MAX_QUARANTINED} calls in a row were given up unanswered"));
        }
    }

    fn check_quarantine(&self) {
        let overdue = {
            let calls = self.lock();
            calls.quarantined > 0
                && calls
                    .in_flight
                    .values()
                    .any(|c| c.abandoned.is_some_and(|since| since.elapsed() > MAX_QUARANTINE))
        };
        if overdue {
            self.end(format!("a call that was given up stayed unanswered for {MAX_QUARANTINE:?}"));
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

struct AbandonOnDrop<'a> {
    connection: &'a Connection,
    id: u64,
}

impl Drop for AbandonOnDrop<'_> {
    fn drop(&mut self) {
        // Does nothing for a call that was answered: it is not in flight any more.
        self.connection.abandon(self.id);
    }
}

async fn write<T: LinkTx>(me: Arc<Connection>, mut tx: T, mut queued: mpsc::Receiver<Outgoing>) {
    let mut batch = VecDeque::new();
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            first = queued.recv() => match first {
                Some(first) => batch.push_back(first),
                None => return,
            },
            _ = tick.tick() => {
                me.check_quarantine();
                continue;
            }
            () = me.stop.cancelled() => return,
        }
        // Small calls that were made together travel together.
        while batch.len() < 32 {
            match queued.try_recv() {
                Ok(more) => batch.push_back(more),
                Err(_) => break,
            }
        }
        let sent = tokio::select! {
            sent = tx.send(&mut batch) => sent,
            () = me.stop.cancelled() => return,
        };
        if let Err(e) = sent {
            me.end(e.to_string());
            return;
        }
    }
}

/// Reads answers until the link ends.
async fn read<R: LinkRx>(me: &Connection, rx: &mut R) -> LinkError {
    loop {
        if let Err(e) = read_one(me, rx).await {
            return e;
        }
    }
}

async fn read_one<R: LinkRx>(me: &Connection, rx: &mut R) -> Result<(), LinkError> {
    let broken = |what: String| Err(LinkError::Protocol(what));
    let incoming = rx.recv().await?;
    let Header { kind, call: id, payload_len, aux, .. } = incoming.header;
    if kind == FrameKind::Request {
        return broken("a server sent a request".into());
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
    let _ = call.answer.send(Ok(Response { head: incoming.head, data: call.recv }));
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
        match self {
            Ended::Remote(e) => CallError::Remote(e),
            Ended::Lost(reason) => CallError::Disconnected { peer: peer.to_owned(), reason },
        }
    }
}
