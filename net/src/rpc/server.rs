//! The serving side: accepts members, bounds what each may have in flight, hands calls to the
//! service.

use super::carrier::{Carriers, Link};
use super::connection::MAX_IN_FLIGHT;
use super::frame::{FrameKind, Header, MAX_HEAD};
use super::info::{About, ConnectionInfo, INFO_METHOD, NetInfo};
use super::outbox::{Outbox, Say};
use super::{
    HANDSHAKE_TIME, Identity, NetStats, Reply, Request, SMALL, STALL_TIME, Service, drive_handshake,
};
use crate::buf::{Buf, BufPool, HeadRoom, Heads};
use crate::error::{HandshakeError, LinkError};
use crate::fabric::{Fabric, Traffic};
use crate::handshake::{self, Purpose, Responder, Terms};
use crate::link::{Counters, LinkOptions, LinkRx, LinkTx, Outgoing, Permit, tcp};
use bytes::Bytes;
use firefly_types::{ErrorKind, WireError, lock};
use futures::FutureExt;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// Connections whose peers have not proven themselves yet. Strangers cost a socket and a few
/// hundred bytes each, for `handshake_time` at most.
const MAX_HANDSHAKES: usize = 128;
/// Longest message of an error.
const MAX_MESSAGE: usize = 4096;
/// A call that moves no more may be carried out by the task that reads requests.
const INLINE_BYTES: usize = 32 << 10;
/// After a stop, time for calls in flight to be answered.
const DRAIN: Duration = Duration::from_secs(5);

/// What a server can be told.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Memory for payloads of requests, in use and cached; callers wait beyond it. Default 512 MiB.
    pub pool: BufPool,
    /// Connections of members at one time; more are refused. Default 16384: four of each of four
    /// thousand processes.
    pub max_connections: usize,
    /// Time for a client to prove itself. Default 5 s.
    pub handshake_time: Duration,
    /// A client that moves no byte of a message that has begun for so long is given up. Default
    /// 15 s.
    pub stall_time: Duration,
    /// Longest time that a reply waits for its client's grant, holding its memory. Default 10 s: a
    /// client grants in the order in which replies get ready, so it waits for those before it, and
    /// no longer than their callers do.
    pub grant_time: Duration,
    /// What the answers are for, which decides how their packets are marked. Default control.
    pub traffic: Traffic,
    /// How peers are reached. Default: the process's.
    pub fabric: Fabric,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            pool: BufPool::new(512 << 20),
            max_connections: 16384,
            handshake_time: HANDSHAKE_TIME,
            stall_time: STALL_TIME,
            grant_time: Duration::from_secs(10),
            traffic: Traffic::Control,
            fabric: Fabric::shared(),
        }
    }
}

#[derive(Default)]
struct Totals {
    bytes: Arc<Counters>,
    calls: AtomicU64,
    connections: AtomicU64,
    refused: AtomicU64,
}

/// A handle on a server's counters that outlives [`Server::run`] taking the server.
#[derive(Clone)]
pub struct ServerStats(Arc<Totals>);

impl ServerStats {
    /// Counters since the start.
    pub fn get(&self) -> NetStats {
        NetStats {
            bytes_sent: self.0.bytes.sent.load(Ordering::Relaxed),
            bytes_received: self.0.bytes.received.load(Ordering::Relaxed),
            bytes_copied: self.0.bytes.copied.load(Ordering::Relaxed),
            calls: self.0.calls.load(Ordering::Relaxed),
            connections: self.0.connections.load(Ordering::Relaxed),
            refused: self.0.refused.load(Ordering::Relaxed),
        }
    }
}

struct Shared {
    carriers: Carriers,
    identity: Identity,
    service: Arc<dyn Service>,
    options: ServerOptions,
    heads: Heads,
    totals: Arc<Totals>,
    /// Bytes of replies that wait for their grants, in units of `ASKING_UNIT`.
    asking: Arc<Semaphore>,
    /// Connections by number, for those who ask.
    live: Mutex<HashMap<u64, Arc<Serving>>>,
}

impl Shared {
    fn new(identity: Identity, service: Arc<dyn Service>, options: ServerOptions) -> Shared {
        let carriers = Carriers::of(&options.fabric);
        let (heads, totals, live) = (Heads::default(), Arc::default(), Mutex::default());
        let asking = Arc::new(Semaphore::new(ASKING_BYTES / ASKING_UNIT));
        Shared { carriers, identity, service, options, heads, totals, asking, live }
    }

    fn info(&self) -> NetInfo {
        let connections = lock(&self.live).values().map(|serving| serving.info()).collect();
        let stats = ServerStats(self.totals.clone()).get();
        NetInfo::new(&self.identity.name, &self.options.fabric, connections, stats)
    }
}

/// Serves calls on one address.
pub struct Server {
    listener: std::net::TcpListener,
    shared: Arc<Shared>,
}

impl Server {
    /// Listens on `addr` (port 0 takes a free one) with default options. Nothing is accepted
    /// before [`Server::run`].
    pub fn bind(addr: SocketAddr, identity: Identity, service: Arc<dyn Service>) -> io::Result<Server> {
        Server::bind_with(addr, identity, service, ServerOptions::default())
    }

    /// Listens on `addr` with these options.
    pub fn bind_with(
        addr: SocketAddr,
        identity: Identity,
        service: Arc<dyn Service>,
        options: ServerOptions,
    ) -> io::Result<Server> {
        // std sets SO_REUSEADDR, so a restarted server gets its port back at once.
        let listener = std::net::TcpListener::bind(addr)?;
        listener.set_nonblocking(true)?;
        Ok(Server { listener, shared: Arc::new(Shared::new(identity, service, options)) })
    }

    /// The address that clients dial.
    pub fn local_addr(&self) -> SocketAddr {
        self.listener.local_addr().expect("a bound socket has an address")
    }

    /// The memory that payloads of requests are received into.
    pub fn pool(&self) -> &BufPool {
        &self.shared.options.pool
    }

    #[cfg(test)]
    pub(super) fn heads(&self) -> Heads {
        self.shared.heads.clone()
    }

    /// A handle on the counters.
    pub fn stats(&self) -> ServerStats {
        ServerStats(self.shared.totals.clone())
    }

    /// Serves until `stop` is cancelled, then answers what is in flight (for a few seconds at
    /// most) and returns. Needs a tokio runtime.
    pub async fn run(self, stop: CancellationToken) {
        let Server { listener, shared } = self;
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(e) => {
                tracing::error!(error = %e, "cannot serve on the listening socket");
                return;
            }
        };
        let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        let members = Arc::new(Semaphore::new(shared.options.max_connections));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                () = stop.cancelled() => break,
            };
            match accepted {
                Ok((stream, addr)) => {
                    // Over the limit the newest waits unread in the kernel: those before it either
                    // prove themselves or are closed within `handshake_time`.
                    let room = tokio::select! {
                        room = handshakes.clone().acquire_owned() => room.expect("never closed"),
                        () = stop.cancelled() => break,
                    };
                    connections.spawn(serve(
                        shared.clone(),
                        stream,
                        addr,
                        room,
                        members.clone(),
                        stop.clone(),
                    ));
                }
                Err(e) => {
                    // Out of descriptors, or the peer was gone already. Accepting again at once
                    // would spin.
                    tracing::warn!(error = %e, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        drop(listener);
        while connections.join_next().await.is_some() {}
    }
}

async fn serve(
    shared: Arc<Shared>,
    mut stream: TcpStream,
    addr: SocketAddr,
    room: OwnedSemaphorePermit,
    members: Arc<Semaphore>,
    stop: CancellationToken,
) {
    let ServerOptions { handshake_time, stall_time, .. } = shared.options.clone();
    let Identity { cluster, secret, .. } = &shared.identity;
    let terms = Terms::new(*cluster, secret, Purpose::Rpc);
    let refuse = |error: HandshakeError| {
        shared.totals.refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(peer = %addr, reason = %error, "refused a connection");
    };
    let member = members.try_acquire_owned();
    let (counters, heads) = (Counters::part_of(&shared.totals.bytes), shared.heads.of_connection());
    let link = LinkOptions {
        counters: counters.clone(),
        stall: stall_time,
        heads: heads.clone(),
        class: shared.options.fabric.options().class(shared.options.traffic),
    };
    if let Err(e) = tcp::configure(&stream, &link) {
        return refuse(HandshakeError::Ended(e.to_string()));
    }
    let mut machine = match &member {
        Ok(_) => Responder::new(terms, handshake::nonce()),
        Err(_) => Responder::full(terms),
    };
    let shake = async {
        let agreed = drive_handshake(&mut stream, &mut machine, Responder::wants, Responder::feed).await?;
        let made = shared.carriers.answer(&agreed.hello, stream, link).await?;
        Ok((agreed.name, made.link))
    };
    let shaken = tokio::select! {
        shaken = tokio::time::timeout(handshake_time, shake) => shaken,
        () = stop.cancelled() => return,
    };
    let (name, link) = match shaken.unwrap_or(Err(HandshakeError::TimedOut)) {
        Ok(done) => done,
        Err(error) => return refuse(error),
    };
    drop(room);
    let (who, counts) = ((name, addr.to_string()), (counters, heads));
    let reason = match link {
        Link::Tcp((tx, rx)) => carry(&shared, tx, rx, who, counts, stop).await,
        Link::Verbs((tx, rx)) => carry(&shared, tx, rx, who, counts, stop).await,
    };
    tracing::debug!(peer = %addr, %reason, "disconnected");
}

/// Replies that wait for their grant, of one connection: those to come included, so that a caller
/// that takes its time holds up its own bulk and nobody else's memory.
const MAX_ASKING: usize = 32;
/// Bytes of such replies of all connections, half of the default payload memory; the requests
/// beyond it wait without.
const ASKING_BYTES: usize = 256 << 20;
/// Granularity of that count, which a semaphore keeps in 32 bits.
const ASKING_UNIT: usize = 4 << 10;
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
struct Serving {
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
async fn carry<T: LinkTx, R: LinkRx>(
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
    fn info(&self) -> ConnectionInfo {
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
    window: Option<crate::link::Window>,
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

/// Serves one link made by a test, of whatever carrier.
#[cfg(test)]
pub(super) async fn serve_link<T: LinkTx, R: LinkRx>(
    service: Arc<dyn Service>,
    identity: Identity,
    (tx, rx): (T, R),
    peer: &str,
    stop: CancellationToken,
) -> String {
    let shared = Shared::new(identity, service, ServerOptions::default());
    carry(&Arc::new(shared), tx, rx, ("tester".into(), peer.to_owned()), Default::default(), stop).await
}
