//! The serving side: accepts members, bounds what each may have in flight, hands calls to the
//! service.

use super::carrier::{Carriers, Link};
use super::connection::MAX_IN_FLIGHT;
use super::frame::{FrameKind, Header, MAX_HEAD};
use super::{HANDSHAKE_TIME, Identity, NetStats, Reply, Request, STALL_TIME, Service, drive_handshake};
use crate::buf::{BufPool, Heads};
use crate::error::{HandshakeError, LinkError};
use crate::fabric::{Class, Fabric};
use crate::handshake::{self, Purpose, Responder, Terms};
use crate::link::{Counters, LinkOptions, LinkRx, LinkTx, Outgoing, tcp};
use bytes::Bytes;
use firefly_types::{ErrorKind, WireError};
use futures::FutureExt;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Connections whose peers have not proven themselves yet. Strangers cost a socket and a few
/// hundred bytes each, for `handshake_time` at most.
const MAX_HANDSHAKES: usize = 128;
/// Longest message of an error.
const MAX_MESSAGE: usize = 4096;
/// After a stop, time for calls in flight to be answered.
const DRAIN: Duration = Duration::from_secs(5);

/// What a server can be told.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Memory for payloads of requests, in use and cached; callers wait beyond it. Default 512 MiB.
    pub pool: BufPool,
    /// Members connected at one time; more are refused. Default 4096.
    pub max_connections: usize,
    /// Time for a client to prove itself. Default 5 s.
    pub handshake_time: Duration,
    /// A client that moves no byte of a message that has begun for so long is given up. Default
    /// 15 s.
    pub stall_time: Duration,
    /// How peers are reached. Default: the process's.
    pub fabric: Fabric,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            pool: BufPool::new(512 << 20),
            max_connections: 4096,
            handshake_time: HANDSHAKE_TIME,
            stall_time: STALL_TIME,
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
    totals: Arc<Totals>,
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
        let carriers = Carriers::of(&options.fabric);
        let shared = Shared { carriers, identity, service, options, totals: Arc::default() };
        Ok(Server { listener, shared: Arc::new(shared) })
    }

    /// The address that clients dial.
    pub fn local_addr(&self) -> SocketAddr {
        self.listener.local_addr().expect("a bound socket has an address")
    }

    /// The memory that payloads of requests are received into.
    pub fn pool(&self) -> &BufPool {
        &self.shared.options.pool
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
    let link = LinkOptions {
        counters: shared.totals.bytes.clone(),
        stall: stall_time,
        heads: Heads::default(),
        class: Class::default(),
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
    shared.totals.connections.fetch_add(1, Ordering::Relaxed);
    let peer = format!("{name} ({addr})");
    let reason = match link {
        Link::Tcp((tx, rx)) => carry(&shared, tx, rx, &peer, stop).await,
        Link::Verbs((tx, rx)) => carry(&shared, tx, rx, &peer, stop).await,
    };
    tracing::debug!(%peer, %reason, "disconnected");
}

/// Carries one connection to its end; says why it ended.
async fn carry<T: LinkTx, R: LinkRx>(
    shared: &Arc<Shared>,
    tx: T,
    mut rx: R,
    peer: &str,
    stop: CancellationToken,
) -> String {
    tracing::debug!(%peer, transport = T::NAME, "connected");
    let permits = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    // One place for each call in flight: a handler never waits to queue its answer.
    let (answers, queued) = mpsc::channel(MAX_IN_FLIGHT);
    let mut writer = tokio::spawn(write(tx, queued));
    let reading = async {
        loop {
            if let Err(e) = take_one(shared, &mut rx, peer, &permits, &answers).await {
                return e;
            }
        }
    };
    let ended = tokio::select! {
        error = reading => Some(error.to_string()),
        written = &mut writer => Some(match written {
            Ok(Err(e)) => e.to_string(),
            Ok(Ok(())) => "the writer ended".into(),
            Err(e) => e.to_string(),
        }),
        () = stop.cancelled() => None,
    };
    let Some(reason) = ended else {
        // A permit comes back when the answer has been written: all back means all answered.
        let all = permits.acquire_many(MAX_IN_FLIGHT as u32);
        let drained = tokio::select! {
            drained = tokio::time::timeout(DRAIN, all) => drained.is_ok(),
            _ = &mut writer => false,
        };
        writer.abort();
        return if drained {
            "this server stopped".into()
        } else {
            "this server stopped with calls in flight".into()
        };
    };
    // Handlers still running finish by themselves; their answers have nowhere to go.
    writer.abort();
    reason
}

async fn write<T: LinkTx>(mut tx: T, mut queued: mpsc::Receiver<Outgoing>) -> Result<(), LinkError> {
    let mut batch = VecDeque::new();
    while let Some(first) = queued.recv().await {
        batch.push_back(first);
        while batch.len() < 32 {
            match queued.try_recv() {
                Ok(more) => batch.push_back(more),
                Err(_) => break,
            }
        }
        tx.send(&mut batch).await?;
    }
    Ok(())
}

/// Reads one request, receives its payload and starts its handler.
async fn take_one<R: LinkRx>(
    shared: &Arc<Shared>,
    rx: &mut R,
    peer: &str,
    permits: &Arc<Semaphore>,
    answers: &mpsc::Sender<Outgoing>,
) -> Result<(), LinkError> {
    // Waiting here before reading pushes back on a peer that asks faster than it is served or
    // does not read its answers.
    let permit = permits.clone().acquire_owned().await.expect("the semaphore is never closed");
    let incoming = rx.recv().await?;
    let Header { kind, call, method, payload_len, aux, .. } = incoming.header;
    if kind != FrameKind::Request {
        return Err(LinkError::Protocol(format!("a client sent a frame of kind {kind:?}")));
    }
    shared.totals.calls.fetch_add(1, Ordering::Relaxed);
    let len = payload_len as usize;
    let limit = shared.service.payload_limit(method);
    let answer = Answer {
        answers: answers.clone(),
        call,
        reply_capacity: aux as usize,
        window: incoming.window,
        permit,
    };
    if len > limit {
        rx.skip(&incoming).await?;
        let message = format!("method {method} takes payloads of up to {limit} bytes, this one has {len}");
        answer.send(Err(WireError::new(ErrorKind::TooLarge, message)));
        return Ok(());
    }
    let mut payload = None;
    if len > 0 {
        let buf = shared.options.pool.alloc(len).await;
        payload = Some(rx.pull(&incoming, buf).await?);
    }
    let request = Request {
        method,
        head: incoming.head,
        payload,
        reply_capacity: answer.reply_capacity,
        peer: peer.to_owned(),
    };
    let service = shared.service.clone();
    tokio::spawn(async move {
        let peer = request.peer.clone();
        let handled = AssertUnwindSafe(service.handle(request)).catch_unwind().await;
        answer.send(handled.unwrap_or_else(|_| {
            tracing::error!(%peer, method, "the handler of a call panicked");
            let message = format!("the server failed while handling method {method}; see its log");
            Err(WireError::new(ErrorKind::Internal, message))
        }));
    });
    Ok(())
}

/// The right and duty to answer one call.
struct Answer {
    answers: mpsc::Sender<Outgoing>,
    call: u64,
    reply_capacity: usize,
    window: Option<crate::link::Window>,
    permit: OwnedSemaphorePermit,
}

impl Answer {
    fn send(self, result: Result<Reply, WireError>) {
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
        let (kind, head, payload, aux) = match result {
            Ok(reply) => (FrameKind::Reply, reply.head, reply.data.filter(|d| !d.is_empty()), 0),
            Err(e) => {
                let mut message = e.message;
                let cut = (0..=MAX_MESSAGE).rev().find(|n| message.is_char_boundary(*n)).unwrap_or(0);
                message.truncate(cut);
                (FrameKind::Error, Bytes::from(message), None, u32::from(e.kind.code()))
            }
        };
        let payload_len = payload.as_ref().map_or(0, |p| p.len()) as u32;
        let header =
            Header { kind, call: self.call, method: 0, head_len: head.len() as u32, payload_len, aux };
        // Fails only if the connection is gone, and then nobody wants the answer.
        let _ = self.answers.try_send(Outgoing {
            header,
            head,
            payload,
            window: self.window,
            permit: Some(self.permit),
        });
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
    let (options, totals, carriers) = (ServerOptions::default(), Arc::default(), Carriers::default());
    let shared = Shared { carriers, identity, service, options, totals };
    carry(&Arc::new(shared), tx, rx, peer, stop).await
}
