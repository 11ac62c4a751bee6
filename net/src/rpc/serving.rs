//! One connection as its server sees it: reads requests, starts their handlers, says their answers,
//! and keeps replies that wait for their grants.

use super::connection::MAX_IN_FLIGHT;
use super::frame::{FrameKind, Header, MAX_HEAD};
use super::info::{About, ConnectionInfo, INFO_METHOD};
use super::outbox::{Outbox, Say};
use super::server::Shared;
use super::{Reply, Request, SMALL};
use crate::buf::{Buf, HeadRoom, Heads};
use crate::error::LinkError;
use crate::link::{Counters, LinkRx, LinkTx, Outgoing, Permit, Window};
use bytes::Bytes;
use firefly_types::{ErrorKind, WireError, lock};
use futures::FutureExt;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// Longest message of an error.
const MAX_MESSAGE: usize = 4096;
/// A call that moves no more may be carried out by the task that reads requests.
const INLINE_BYTES: usize = 32 << 10;
/// After a stop, time for calls in flight to be answered.
const DRAIN: Duration = Duration::from_secs(5);
/// Replies that wait for their grant, of one connection: those to come included, so that a caller
/// that takes its time holds up its own bulk and nobody else's memory.
const MAX_ASKING: usize = 32;
/// Bytes of such replies of all connections, half of the default payload memory; the requests
/// beyond it wait without.
pub(super) const ASKING_BYTES: usize = 256 << 20;
/// Granularity of that count, which a semaphore keeps in 32 bits.
pub(super) const ASKING_UNIT: usize = 4 << 10;
/// What a call holds from before it is handled until its reply, if that has to ask, was sent.
#[expect(dead_code, reason = "held, not read")]
struct Asking(OwnedSemaphorePermit, OwnedSemaphorePermit);

/// The replies that wait for their grants.
#[derive(Default)]
struct Parking {
    replies: HashMap<u64, Parked>,
    /// Nobody reads grants now: the reader waits for what such replies may hold. They go without.
    closed: bool,
}

/// A reply that waits for its grant.
struct Parked {
    answer: Answer,
    reply: Reply,
    since: Instant,
}

/// One connection as its handlers see it.
pub(super) struct Serving {
    shared: Arc<Shared>,
    outbox: Arc<dyn Say>,
    /// One for each call in flight, until its answer was written.
    permits: Arc<Semaphore>,
    /// What long heads take up, in both directions, and the answers that wait for it.
    heads: Heads,
    long_waiting: AtomicUsize,
    asking: Arc<Semaphore>,
    parked: Mutex<Parking>,
    name: String,
    address: String,
    /// Both, for the service and for logs.
    peer: String,
    about: About,
}

/// Carries one connection to its end; says why it ended.
pub(super) async fn carry<T: LinkTx, R: LinkRx>(
    shared: &Arc<Shared>,
    tx: T,
    mut rx: R,
    (name, address): (String, String),
    (counters, heads): (Arc<Counters>, Heads),
    stop: CancellationToken,
) -> String {
    let peer = format!("{name} ({address})");
    let about = About { transport: T::NAME, device: tx.device(), counters, since: Instant::now() };
    tracing::debug!(%peer, transport = T::NAME, device = about.device, "connected");
    let outbox = Arc::new(Outbox::new(tx));
    let permits = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    let serving = Arc::new(Serving {
        shared: shared.clone(),
        outbox: outbox.clone(),
        permits,
        heads,
        long_waiting: AtomicUsize::new(0),
        asking: Arc::new(Semaphore::new(MAX_ASKING)),
        parked: Mutex::default(),
        name,
        address,
        peer,
        about,
    });
    let _listed = Listed::new(&serving);
    let done = CancellationToken::new();
    let (writing, written) = (outbox.clone(), done.clone());
    let mut writer = tokio::spawn(async move { writing.run(&written).await });
    let reading = async {
        loop {
            if let Err(e) = serving.take_one(&mut rx).await {
                return e;
            }
        }
    };
    let ended = |written: Result<Result<(), LinkError>, tokio::task::JoinError>| match written {
        Ok(Ok(())) => "the writer ended".to_owned(),
        Ok(Err(e)) => e.to_string(),
        Err(e) => e.to_string(),
    };
    let reason = tokio::select! {
        error = reading => Some(error.to_string()),
        written = &mut writer => Some(ended(written)),
        never = serving.watch_parked() => match never {},
        () = stop.cancelled() => None,
    };
    let reason = match reason {
        Some(reason) => reason,
        None => {
            serving.outbox.flush();
            // A permit comes back when the answer has been written: all back means all answered.
            let all = serving.while_not_reading(serving.permits.acquire_many(MAX_IN_FLIGHT as u32));
            tokio::select! {
                drained = tokio::time::timeout(DRAIN, all) => match drained {
                    Ok(_) => "this server stopped".to_owned(),
                    Err(_) => "this server stopped with calls in flight".to_owned(),
                },
                written = &mut writer => ended(written),
            }
        }
    };
    // Handlers still running finish by themselves; their answers have nowhere to go.
    done.cancel();
    drop(outbox.close().await);
    // They know this connection, which knows them.
    lock(&serving.parked).replies.clear();
    reason
}

/// A connection is listed while this lives.
struct Listed(Arc<Shared>, u64);

impl Listed {
    fn new(serving: &Arc<Serving>) -> Listed {
        let shared = serving.shared.clone();
        let number = shared.totals.connections.fetch_add(1, Ordering::Relaxed);
        lock(&shared.live).insert(number, serving.clone());
        Listed(shared, number)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        lock(&self.0.live).remove(&self.1);
    }
}

impl Serving {
    pub(super) fn info(&self) -> ConnectionInfo {
        // The reader holds one, for the call that it waits for or, if this is asked by a call on
        // this very connection, for that one.
        let taken = MAX_IN_FLIGHT - self.permits.available_permits();
        self.about.info(&self.name, &self.address, taken.saturating_sub(1))
    }

    /// Reads one request, receives its payload and carries it out or starts to.
    async fn take_one<R: LinkRx>(self: &Arc<Self>, rx: &mut R) -> Result<(), LinkError> {
        // Answers to requests that came together leave together, before this task waits.
        if !rx.is_ahead() {
            self.outbox.flush();
        }
        // Waiting here before reading pushes back on a peer that asks faster than it is served or
        // does not read its answers.
        let permit = match self.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                let permit = self.permits.clone().acquire_owned();
                self.while_not_reading(permit).await.expect("the semaphore is never closed")
            }
        };
        if self.long_waiting.load(Ordering::Relaxed) > 0 {
            // In line behind the answers that wait to be sent: a peer that does not read them gets
            // no more of them made.
            drop(self.while_not_reading(self.heads.take_some()).await);
        }
        let incoming = rx.recv().await?;
        let Header { kind, call, method, payload_len, aux, .. } = incoming.header;
        match kind {
            FrameKind::Request => {}
            FrameKind::Grant => {
                self.granted(call, aux == 1);
                return Ok(());
            }
            other => return Err(LinkError::Protocol(format!("a client sent a frame of kind {other:?}"))),
        }
        self.shared.totals.calls.fetch_add(1, Ordering::Relaxed);
        let len = payload_len as usize;
        let limit = if method == INFO_METHOD { 0 } else { self.shared.service.payload_limit(method) };
        let mut answer = Answer {
            serving: self.clone(),
            call,
            reply_capacity: aux as usize,
            window: incoming.window,
            asking: None,
            permit,
        };
        if len > limit {
            rx.skip(&incoming).await?;
            let message =
                format!("method {method} takes payloads of up to {limit} bytes, this one has {len}");
            answer.send(Err(WireError::new(ErrorKind::TooLarge, message)), false);
            return Ok(());
        }
        let mut payload = None;
        if len > 0 {
            let pool = &self.shared.options.pool;
            let buf = match pool.try_alloc(len) {
                Some(buf) => buf,
                None => self.while_not_reading(pool.alloc(len)).await,
            };
            payload = Some(rx.pull(&incoming, buf).await?);
        }
        if method == INFO_METHOD {
            let told = serde_json::to_vec(&self.shared.info());
            let told = told.map_err(|e| WireError::new(ErrorKind::Internal, e.to_string()));
            answer.send(told.map(Reply::head), false);
            return Ok(());
        }
        let bulk = len.max(answer.reply_capacity) > INLINE_BYTES;
        let request = Request {
            method,
            head: incoming.head,
            payload,
            reply_capacity: answer.reply_capacity,
            peer: self.peer.clone(),
        };
        let (service, room) = (self.shared.service.clone(), incoming.room);
        let mut handling = Box::pin(async move {
            let peer = request.peer.clone();
            let handled = AssertUnwindSafe(service.handle(request)).catch_unwind().await;
            drop(room);
            handled.unwrap_or_else(|_| {
                tracing::error!(%peer, method, "the handler of a call panicked");
                let message = format!("the server failed while handling method {method}; see its log");
                Err(WireError::new(ErrorKind::Internal, message))
            })
        });
        // Many small calls are answered without waiting for anything: a task for each would cost
        // more than they do. One that does wait, or moves much, must not hold up the next.
        if !bulk && let Poll::Ready(result) = futures::poll!(&mut handling) {
            answer.send(result, false);
            return Ok(());
        }
        let asks = incoming.header.ask;
        let me = self.clone();
        tokio::spawn(async move {
            if asks {
                answer.asking = Some(me.ask(answer.reply_capacity).await);
            }
            answer.send(handling.await, true);
        });
        Ok(())
    }

    /// Waits for memory or for calls in flight to end. The grants that replies of this connection
    /// wait for are behind what the reader waits with, and the replies may hold the very thing that
    /// it waits for: so they go ungranted. Too many bytes at the client's door for a moment are
    /// better than a deadlock.
    async fn while_not_reading<T>(self: &Arc<Self>, wait: impl Future<Output = T>) -> T {
        self.outbox.flush();
        let parked: Vec<Parked> = {
            let mut parking = lock(&self.parked);
            parking.closed = true;
            parking.replies.drain().map(|(_, parked)| parked).collect()
        };
        for Parked { answer, reply, .. } in parked {
            answer.push(reply);
        }
        let got = wait.await;
        lock(&self.parked).closed = false;
        got
    }

    /// Waits until another reply may wait for its grant.
    async fn ask(&self, bytes: usize) -> Asking {
        let units = bytes.min(ASKING_BYTES).div_ceil(ASKING_UNIT) as u32;
        let ours = self.asking.clone().acquire_owned().await;
        let all = self.shared.asking.clone().acquire_many_owned(units).await;
        Asking(ours.expect("the semaphore is never closed"), all.expect("the semaphore is never closed"))
    }

    /// Tells the caller that a reply is there, and keeps it until the caller grants it.
    fn park(self: &Arc<Self>, answer: Answer, reply: Reply) {
        let (call, bytes) = (answer.call, reply.data.as_ref().map_or(0, |d| d.len()));
        {
            let mut parking = lock(&self.parked);
            if parking.closed {
                drop(parking);
                return answer.push(reply);
            }
            parking.replies.insert(call, Parked { answer, reply, since: Instant::now() });
        }
        let header = Header { kind: FrameKind::Ready, aux: bytes as u32, ..answer_header(call) };
        let ready = Outgoing { header, head: Bytes::new(), payload: None, window: None, permit: None };
        if self.outbox.say(ready).is_err() {
            // The connection is gone, and may have been cleared before this came.
            lock(&self.parked).replies.remove(&call);
        }
    }

    fn granted(&self, call: u64, send: bool) {
        // None: it timed out just now, and the caller will read that.
        let Some(Parked { answer, reply, .. }) = lock(&self.parked).replies.remove(&call) else { return };
        match send {
            true => answer.push(reply),
            false => answer.refuse(WireError::new(ErrorKind::Timeout, "the caller has given up"), true),
        }
    }

    /// Answers those of the replies that wait for their grants with an error.
    fn unpark(&self, which: impl Fn(&Parked) -> bool, why: &str) {
        let gone: Vec<Parked> = {
            let mut parking = lock(&self.parked);
            parking.replies.extract_if(|_, parked| which(parked)).map(|(_, parked)| parked).collect()
        };
        for Parked { answer, .. } in gone {
            let message = format!("the reply was there, but its caller did not take it: {why}");
            answer.refuse(WireError::new(ErrorKind::Timeout, message), true);
        }
    }

    /// Gives up replies whose grants do not come.
    async fn watch_parked(&self) -> std::convert::Infallible {
        let most = self.shared.options.grant_time;
        let mut tick = tokio::time::interval((most / 10).max(Duration::from_millis(1)));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.unpark(|parked| parked.since.elapsed() > most, &format!("no grant in {most:?}"));
        }
    }
}

/// The header of an answer without anything.
fn answer_header(call: u64) -> Header {
    Header { kind: FrameKind::Reply, call, method: 0, head_len: 0, payload_len: 0, aux: 0, ask: false }
}

/// The right and duty to answer one call.
struct Answer {
    serving: Arc<Serving>,
    call: u64,
    reply_capacity: usize,
    window: Option<Window>,
    /// If a reply with much payload has to ask before it is sent.
    asking: Option<Asking>,
    permit: OwnedSemaphorePermit,
}

impl Answer {
    /// Answers. With `now`, at once; otherwise the reader's next flush does. An answer with a long
    /// head waits for room in a task of its own.
    fn send(self, result: Result<Reply, WireError>, now: bool) {
        let result = result.and_then(|reply| {
            let (head, data) = (reply.head.len(), reply.data.as_ref().map_or(0, |d| d.len()));
            if head > MAX_HEAD {
                let message = format!("the reply's head has {head} bytes, the limit is {MAX_HEAD}");
                return Err(WireError::new(ErrorKind::TooLarge, message));
            }
            if data > self.reply_capacity {
                let message = format!(
                    "the reply's payload has {data} bytes, the caller's buffer takes {}; ask for less or give a larger one",
                    self.reply_capacity
                );
                return Err(WireError::new(ErrorKind::TooLarge, message));
            }
            Ok(reply)
        });
        match result {
            Err(error) => self.refuse(error, now),
            Ok(reply) if self.asking.is_some() && reply.data.as_ref().is_some_and(|d| d.len() > SMALL) => {
                self.serving.clone().park(self, reply);
            }
            Ok(Reply { head, data }) => {
                let payload = data.filter(|d| !d.is_empty());
                let payload_len = payload.as_ref().map_or(0, |p| p.len()) as u32;
                let header = Header { head_len: head.len() as u32, payload_len, ..answer_header(self.call) };
                self.say(header, head, payload, now);
            }
        }
    }

    /// Sends a reply that was checked and granted.
    fn push(self, reply: Reply) {
        let asked = Answer { asking: None, ..self };
        asked.send(Ok(reply), true);
    }

    fn refuse(self, error: WireError, now: bool) {
        let mut message = error.message;
        let cut = (0..=MAX_MESSAGE).rev().find(|n| message.is_char_boundary(*n)).unwrap_or(0);
        message.truncate(cut);
        let header = Header {
            kind: FrameKind::Error,
            head_len: message.len() as u32,
            aux: u32::from(error.kind.code()),
            ..answer_header(self.call)
        };
        self.say(header, Bytes::from(message), None, now);
    }

    fn say(self, header: Header, head: Bytes, payload: Option<Buf>, now: bool) {
        let serving = self.serving.clone();
        let Some(room) = serving.heads.try_take(head.len()) else {
            serving.long_waiting.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(async move {
                let room = serving.heads.take(head.len()).await;
                serving.long_waiting.fetch_sub(1, Ordering::Relaxed);
                self.say_in(room, header, head, payload, true);
            });
            return;
        };
        self.say_in(room, header, head, payload, now);
    }

    fn say_in(self, room: HeadRoom, header: Header, head: Bytes, payload: Option<Buf>, now: bool) {
        let permit = Some(Permit { _call: self.permit, _room: room });
        let answer = Outgoing { header, head, payload, window: self.window, permit };
        let outbox = &self.serving.outbox;
        // Fails only if the connection is gone, and then nobody wants the answer.
        let _ = if now { outbox.say(answer) } else { outbox.queue(answer) };
    }
}
