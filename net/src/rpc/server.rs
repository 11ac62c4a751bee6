//! The serving side: accepts members, bounds what each may have in flight, hands calls to the
//! service.

use super::carrier::{Carriers, Link};
use super::info::NetInfo;
use super::serving::{ASKING_BYTES, ASKING_UNIT, Serving, carry};
use super::{HANDSHAKE_TIME, Identity, NetStats, STALL_TIME, Service, drive_handshake, ended};
use crate::buf::{BufPool, Heads};
use crate::error::HandshakeError;
use crate::fabric::{Fabric, Traffic};
use crate::handshake::{self, Purpose, Responder, Terms};
use crate::link::tls::{self, Tls};
use crate::link::{Counters, LinkOptions, tcp};
use firefly_types::lock;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Connections whose peers have not proven themselves yet. Strangers cost a socket and a few
/// hundred bytes each, for `handshake_time` at most.
const MAX_HANDSHAKES: usize = 128;

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
pub(super) struct Totals {
    pub(super) bytes: Arc<Counters>,
    pub(super) calls: AtomicU64,
    pub(super) connections: AtomicU64,
    pub(super) refused: AtomicU64,
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

pub(super) struct Shared {
    carriers: Carriers,
    /// If members must use TLS.
    tls: Option<Result<Tls, HandshakeError>>,
    pub(super) identity: Identity,
    pub(super) service: Arc<dyn Service>,
    pub(super) options: ServerOptions,
    pub(super) heads: Heads,
    pub(super) totals: Arc<Totals>,
    /// Bytes of replies that wait for their grants, in units of `ASKING_UNIT`.
    pub(super) asking: Arc<Semaphore>,
    /// Connections by number, for those who ask.
    pub(super) live: Mutex<HashMap<u64, Arc<Serving>>>,
}

impl Shared {
    fn new(identity: Identity, service: Arc<dyn Service>, options: ServerOptions) -> Shared {
        let carriers = Carriers::of(&options.fabric);
        let tls = options.fabric.options().tls.then(|| Tls::new(&identity.secret));
        let (heads, totals, live) = (Heads::default(), Arc::default(), Mutex::default());
        let asking = Arc::new(Semaphore::new(ASKING_BYTES / ASKING_UNIT));
        Shared { carriers, tls, identity, service, options, heads, totals, asking, live }
    }

    pub(super) fn info(&self) -> NetInfo {
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
        Ok(_) => Responder::new(terms.clone(), handshake::nonce()),
        Err(_) => Responder::full(terms.clone()),
    };
    let shake = async {
        let begins_with_tls = tls::begins_with_tls(&stream).await.map_err(ended)?;
        match &shared.tls {
            Some(tls) if begins_with_tls => {
                let mut stream = tls.clone()?.accept(stream).await?;
                let agreed =
                    drive_handshake(&mut stream, &mut machine, Responder::wants, Responder::feed).await?;
                return Ok((agreed.name, Link::Tls(tls::split(stream, link).map_err(ended)?)));
            }
            Some(_) => machine = Responder::tls_wanted(terms),
            None if begins_with_tls => {
                tls::tell_no_tls(&mut stream).await;
                let why = "the client uses TLS and this server does not; set `tls` alike on both";
                return Err(HandshakeError::Tls(why.to_owned()));
            }
            None => {}
        }
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
        Link::Tls((tx, rx)) => carry(&shared, tx, rx, who, counts, stop).await,
        Link::Verbs((tx, rx)) => carry(&shared, tx, rx, who, counts, stop).await,
    };
    tracing::debug!(peer = %addr, %reason, "disconnected");
}

/// Serves one link made by a test, of whatever carrier.
#[cfg(test)]
pub(super) async fn serve_link<T: crate::link::LinkTx, R: crate::link::LinkRx>(
    service: Arc<dyn Service>,
    identity: Identity,
    (tx, rx): (T, R),
    peer: &str,
    stop: CancellationToken,
) -> String {
    let shared = Shared::new(identity, service, ServerOptions::default());
    carry(&Arc::new(shared), tx, rx, ("tester".into(), peer.to_owned()), Default::default(), stop).await
}
