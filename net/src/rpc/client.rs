//! The calling side: a few connections to each server, made when needed and again when lost.

use super::carrier::Carriers;
use super::connection::Ended;
use super::frame::{MAX_HEAD, MAX_PAYLOAD};
use super::incast::Incast;
use super::info::{INFO_METHOD, NetInfo, PeerInfo};
use super::lanes::Class;
use super::peer::{Dialer, Peer};
use super::{Call, HANDSHAKE_TIME, Identity, NetStats, Response, SMALL, STALL_TIME};
use crate::buf::{BufPool, Heads};
use crate::error::CallError;
use crate::fabric::{Fabric, Traffic};
use crate::link::tls::Tls;
use bytes::Bytes;
use firefly_types::{ErrorKind, WireError, lock};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Addresses remembered; those without a live connection are forgotten beyond it.
const MAX_PEERS: usize = 1024;

/// What a client can be told.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Bytes of payload memory, in use and cached. Default 512 MiB: 128 chunks of 4 MiB in flight.
    pub pool_bytes: usize,
    /// Longest time to reach a server before the call fails as unreachable, within the call's own
    /// timeout. Default 5 s: outlasts two lost SYNs.
    pub connect_time: Duration,
    /// Time for a server to prove itself. Default 5 s.
    pub handshake_time: Duration,
    /// A server that moves no byte of a message that has begun for so long is given up. Default
    /// 15 s.
    pub stall_time: Duration,
    /// Connections for bulk to a server that is reached by TCP, beside the one for small calls; made
    /// as calls need them. Default 2: see `docs/benchmarks.md`. With RDMA there is one for each rail.
    pub tcp_lanes: usize,
    /// Bytes of replies on their way to this client from all servers together, those to small calls
    /// not counted; a reply beyond it waits at its server until others have landed. Default 64 MiB:
    /// what 200 Gb/s carry in 2.5 ms, so that the wire never idles for a grant, and what a switch's
    /// shared buffer holds. A reply larger than that goes alone.
    pub reply_bytes: usize,
    /// What the calls are for, which decides how their packets are marked. Default control.
    pub traffic: Traffic,
    /// How peers are reached. Default: the process's.
    pub fabric: Fabric,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            pool_bytes: 512 << 20,
            connect_time: Duration::from_secs(5),
            handshake_time: HANDSHAKE_TIME,
            stall_time: STALL_TIME,
            tcp_lanes: 2,
            reply_bytes: 64 << 20,
            traffic: Traffic::Control,
            fabric: Fabric::shared(),
        }
    }
}

struct Inner {
    dialer: Arc<Dialer>,
    pool: BufPool,
    peers: Mutex<HashMap<String, Arc<Peer>>>,
    calls: AtomicU64,
}

/// Makes calls to any server of the cluster. Cloning shares connections and pool.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

impl Client {
    /// A client with default options. Connections are made by the first call to each address.
    pub fn new(identity: Identity) -> Client {
        Client::with_options(identity, ClientOptions::default())
    }

    /// A client with default options for one kind of traffic.
    pub fn of(identity: Identity, traffic: Traffic) -> Client {
        Client::with_options(identity, ClientOptions { traffic, ..ClientOptions::default() })
    }

    /// A client with these options.
    pub fn with_options(identity: Identity, options: ClientOptions) -> Client {
        let pool = BufPool::new(options.pool_bytes);
        Client::with_pool(identity, options, pool)
    }

    /// A client that takes payload memory from `pool`.
    pub fn with_pool(identity: Identity, options: ClientOptions, pool: BufPool) -> Client {
        let incast = Incast::new(options.reply_bytes);
        let dialer = Dialer {
            tls: options.fabric.options().tls.then(|| Tls::new(&identity.secret)),
            incast,
            carriers: Carriers::of(&options.fabric),
            identity,
            options,
            heads: Heads::default(),
            counters: Arc::default(),
            connections: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        };
        let (peers, calls) = (Mutex::default(), AtomicU64::new(0));
        Client { inner: Arc::new(Inner { dialer: Arc::new(dialer), pool, peers, calls }) }
    }

    /// Memory for payloads of calls.
    pub fn pool(&self) -> &BufPool {
        &self.inner.pool
    }

    /// Counters since the start.
    pub fn stats(&self) -> NetStats {
        let (inner, dialer) = (&self.inner, &self.inner.dialer);
        NetStats {
            bytes_sent: dialer.counters.sent.load(Ordering::Relaxed),
            bytes_received: dialer.counters.received.load(Ordering::Relaxed),
            bytes_copied: dialer.counters.copied.load(Ordering::Relaxed),
            calls: inner.calls.load(Ordering::Relaxed),
            connections: dialer.connections.load(Ordering::Relaxed),
            refused: dialer.refused.load(Ordering::Relaxed),
        }
    }

    fn known(&self) -> Vec<Arc<Peer>> {
        lock(&self.inner.peers).values().cloned().collect()
    }

    /// Receive memory still held for calls that timed out or were dropped.
    pub fn quarantined_bytes(&self) -> usize {
        let live = self.known().into_iter().flat_map(|peer| peer.live());
        live.map(|current| current.connection.quarantined_bytes()).sum()
    }

    /// What carries the connections to `peer` ("rdma", "tcp", "tls"), if there is one: "rdma" only if all
    /// of them use it.
    pub fn transport(&self, peer: &str) -> Option<&'static str> {
        let peer = lock(&self.inner.peers).get(peer).cloned()?;
        peer.live().into_iter().map(|current| current.connection.about.transport).max()
    }

    /// The servers that this client knows, and what leads to each.
    pub fn peers(&self) -> Vec<PeerInfo> {
        let mut peers: Vec<PeerInfo> = self.known().iter().map(|peer| peer.info()).collect();
        peers.sort_by(|a, b| a.address.cmp(&b.address));
        peers
    }

    #[cfg(test)]
    pub(super) fn incast(&self) -> &Arc<Incast> {
        &self.inner.dialer.incast
    }

    /// What this process has to reach its peers by.
    pub fn fabric_report(&self) -> crate::FabricReport {
        self.inner.dialer.options.fabric.report()
    }

    /// Asks the server at `peer` about its network, whatever its service is.
    ///
    /// # Errors
    /// As [`Client::call`]; a server that does not know the method answers
    /// [`ErrorKind::Unsupported`](firefly_types::ErrorKind::Unsupported) or refuses it by its own rules.
    pub async fn info(&self, peer: &str, timeout: Duration) -> Result<NetInfo, CallError> {
        let call = Call { method: INFO_METHOD, head: Bytes::new(), send: None, recv: None, timeout };
        let head = self.call(peer, call).await?.head;
        serde_json::from_slice(&head).map_err(|e| {
            let message = format!("{peer} says about its network what is not understood: {e}");
            CallError::Remote(WireError::new(ErrorKind::Unsupported, message))
        })
    }

    /// Ends the connections to `peer`, if there are any: calls in flight fail, quarantined buffers
    /// come free, the next call connects anew.
    pub fn disconnect(&self, peer: &str) {
        let peer = lock(&self.inner.peers).get(peer).cloned();
        if let Some(peer) = peer {
            peer.close("it was closed on this side", false);
        }
    }

    /// Makes one call to `peer` ("ip:port") and waits for its answer.
    ///
    /// Calls of up to 16 KiB have a connection of their own; larger ones go to whichever of the
    /// others has the least to do. A call that was not sent when its connection ended goes another
    /// way by itself; one that was sent ends as [`CallError::Disconnected`].
    ///
    /// # Errors
    /// See [`CallError`]. After a timeout, and when the future is dropped, the receive buffer stays
    /// with the connection until the answer came or the connection is destroyed: memory that a
    /// late answer can still reach is never handed out again.
    pub async fn call(&self, peer: &str, call: Call) -> Result<Response, CallError> {
        for (what, len, limit) in [
            ("head", call.head.len(), MAX_HEAD),
            ("payload", call.send.as_ref().map_or(0, |b| b.len()), MAX_PAYLOAD),
        ] {
            if len > limit {
                return Err(CallError::TooLarge { what, len, limit });
            }
        }
        self.inner.calls.fetch_add(1, Ordering::Relaxed);
        let (method, after) = (call.method, call.timeout);
        match tokio::time::timeout(after, self.attempt(peer, call)).await {
            Ok(result) => result,
            Err(_) => Err(CallError::Timeout { peer: peer.to_owned(), method, after }),
        }
    }

    async fn attempt(&self, peer: &str, mut call: Call) -> Result<Response, CallError> {
        let class = if call.bytes() <= SMALL { Class::Small } else { Class::Bulk };
        let way = self.peer(peer);
        // A connection may turn out to be over before anything was sent; then another one is
        // tried. More than a few in a row means that the server accepts and closes.
        for _ in 0..way.tries() {
            match way.connection(class).await?.call(call).await {
                Err(Ended::NotSent(back)) => call = *back,
                answer => return answer.map_err(|ended| ended.into_error(peer)),
            }
        }
        let reason = "the server ends each new connection at once".to_owned();
        Err(CallError::Disconnected { peer: peer.to_owned(), reason })
    }

    fn peer(&self, address: &str) -> Arc<Peer> {
        let mut peers = lock(&self.inner.peers);
        if let Some(peer) = peers.get(address) {
            return peer.clone();
        }
        if peers.len() >= MAX_PEERS {
            peers.retain(|_, peer| Arc::strong_count(peer) > 1 || peer.is_live());
        }
        let peer = Arc::new(Peer::new(address, self.inner.dialer.clone()));
        peers.insert(address.to_owned(), peer.clone());
        peer
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The tasks of a connection hold it, so it would outlive its client.
        for peer in lock(&self.peers).values() {
            peer.close("the client was dropped", true);
        }
    }
}
