//! The calling side: one connection per server, made when needed and again when lost.

use super::carrier::{Carriers, Link, Want};
use super::connection::{Connection, NotSent};
use super::frame::{MAX_HEAD, MAX_PAYLOAD};
use super::{Call, HANDSHAKE_TIME, Identity, NetStats, Response, STALL_TIME, drive_handshake};
use crate::buf::{BufPool, Heads};
use crate::error::{CallError, HandshakeError};
use crate::fabric::{Class, Fabric};
use crate::handshake::{self, Initiator, Purpose, Terms};
use crate::link::{Counters, LinkOptions, tcp};
use firefly_types::lock;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpStream;

/// Addresses remembered; ended connections beyond it are forgotten.
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
            fabric: Fabric::shared(),
        }
    }
}

#[derive(Default)]
struct Slot {
    current: Mutex<Option<Arc<Connection>>>,
    /// Held while connecting, so that callers wait for one attempt instead of each making one.
    connecting: tokio::sync::Mutex<()>,
}

struct Inner {
    carriers: Carriers,
    identity: Identity,
    options: ClientOptions,
    pool: BufPool,
    slots: Mutex<HashMap<String, Arc<Slot>>>,
    counters: Arc<Counters>,
    calls: AtomicU64,
    connections: AtomicU64,
    refused: AtomicU64,
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

    /// A client with these options.
    pub fn with_options(identity: Identity, options: ClientOptions) -> Client {
        let pool = BufPool::new(options.pool_bytes);
        Client::with_pool(identity, options, pool)
    }

    /// A client that takes payload memory from `pool`.
    pub fn with_pool(identity: Identity, options: ClientOptions, pool: BufPool) -> Client {
        let carriers = Carriers::of(&options.fabric);
        Client {
            inner: Arc::new(Inner {
                carriers,
                identity,
                options,
                pool,
                slots: Mutex::default(),
                counters: Arc::default(),
                calls: AtomicU64::new(0),
                connections: AtomicU64::new(0),
                refused: AtomicU64::new(0),
            }),
        }
    }

    /// Memory for payloads of calls.
    pub fn pool(&self) -> &BufPool {
        &self.inner.pool
    }

    /// Counters since the start.
    pub fn stats(&self) -> NetStats {
        let inner = &self.inner;
        NetStats {
            bytes_sent: inner.counters.sent.load(Ordering::Relaxed),
            bytes_received: inner.counters.received.load(Ordering::Relaxed),
            calls: inner.calls.load(Ordering::Relaxed),
            connections: inner.connections.load(Ordering::Relaxed),
            refused: inner.refused.load(Ordering::Relaxed),
        }
    }

    /// Receive memory still held for calls that timed out or were dropped.
    pub fn quarantined_bytes(&self) -> usize {
        let slots: Vec<Arc<Slot>> = lock(&self.inner.slots).values().cloned().collect();
        slots.iter().filter_map(|s| lock(&s.current).clone()).map(|c| c.quarantined_bytes()).sum()
    }

    /// What carries the connection to `peer` ("tcp", "rdma"), if there is one.
    pub fn transport(&self, peer: &str) -> Option<&'static str> {
        let slot = lock(&self.inner.slots).get(peer).cloned()?;
        let current = lock(&slot.current);
        current.as_ref().filter(|c| c.is_live()).map(|c| c.transport())
    }

    /// Ends the connection to `peer`, if there is one: calls in flight fail, quarantined buffers
    /// come free, the next call connects anew.
    pub fn disconnect(&self, peer: &str) {
        let slot = lock(&self.inner.slots).get(peer).cloned();
        if let Some(connection) = slot.and_then(|s| lock(&s.current).take()) {
            connection.close("it was closed on this side");
        }
    }

    /// Makes one call to `peer` ("ip:port") and waits for its answer.
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
        // A cached connection may turn out to be over before anything was sent; then a new one is
        // tried. More than a few in a row means that the server accepts and closes.
        for _ in 0..3 {
            let connection = self.connection(peer).await?;
            match connection.call(call).await {
                Ok(answer) => return answer.map_err(|ended| ended.into_error(peer)),
                Err(NotSent(back)) => call = back,
            }
        }
        let reason = "the server ends each new connection at once".to_owned();
        Err(CallError::Disconnected { peer: peer.to_owned(), reason })
    }

    async fn connection(&self, peer: &str) -> Result<Arc<Connection>, CallError> {
        let slot = self.slot(peer);
        let live = || lock(&slot.current).as_ref().filter(|c| c.is_live()).cloned();
        if let Some(connection) = live() {
            return Ok(connection);
        }
        let _one_at_a_time = slot.connecting.lock().await;
        if let Some(connection) = live() {
            return Ok(connection);
        }
        let connection = self.connect(peer).await?;
        *lock(&slot.current) = Some(connection.clone());
        Ok(connection)
    }

    fn slot(&self, peer: &str) -> Arc<Slot> {
        let mut slots = lock(&self.inner.slots);
        if let Some(slot) = slots.get(peer) {
            return slot.clone();
        }
        if slots.len() >= MAX_PEERS {
            slots.retain(|_, s| {
                Arc::strong_count(s) > 1 || lock(&s.current).as_ref().is_some_and(|c| c.is_live())
            });
        }
        slots.entry(peer.to_owned()).or_default().clone()
    }

    async fn connect(&self, peer: &str) -> Result<Arc<Connection>, CallError> {
        let inner = &self.inner;
        let unreachable = |source| CallError::Unreachable { peer: peer.to_owned(), source };
        let mut stream = tokio::time::timeout(inner.options.connect_time, TcpStream::connect(peer))
            .await
            .map_err(|_| unreachable(std::io::ErrorKind::TimedOut.into()))?
            .map_err(unreachable)?;

        let want = if inner.carriers.rails() > 0 { Want::Rail(0) } else { Want::Tcp };
        let link = LinkOptions {
            counters: inner.counters.clone(),
            stall: inner.options.stall_time,
            heads: Heads::default(),
            class: Class::default(),
        };
        tcp::configure(&stream, &link).map_err(unreachable)?;
        let plan = inner.carriers.plan(want, &stream);
        let Identity { cluster, secret, name } = &inner.identity;
        let terms = Terms::new(*cluster, secret, Purpose::Rpc);
        let (mut machine, hello) = Initiator::start(terms, name, plan.hello(), handshake::nonce());
        let shake = async {
            use tokio::io::AsyncWriteExt;
            stream.write_all(&hello).await.map_err(|e| HandshakeError::Ended(e.to_string()))?;
            drive_handshake(&mut stream, &mut machine, Initiator::wants, Initiator::feed).await?;
            plan.dial(stream, link).await
        };
        let dialled = tokio::time::timeout(inner.options.handshake_time, shake)
            .await
            .unwrap_or(Err(HandshakeError::TimedOut));
        let link = match dialled {
            Ok(made) => {
                if let Some(why) = made.why_tcp {
                    tracing::debug!(%peer, %why, "reached by TCP");
                }
                made.link
            }
            // A server that goes away meanwhile is no stranger; ask again later.
            Err(HandshakeError::Ended(reason)) => {
                return Err(unreachable(std::io::Error::new(std::io::ErrorKind::ConnectionReset, reason)));
            }
            Err(reason) => {
                inner.refused.fetch_add(1, Ordering::Relaxed);
                return Err(CallError::Refused { peer: peer.to_owned(), reason });
            }
        };
        inner.connections.fetch_add(1, Ordering::Relaxed);
        Ok(match link {
            Link::Tcp((tx, rx)) => Connection::start(tx, rx),
            Link::Verbs((tx, rx)) => Connection::start(tx, rx),
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The tasks of a connection hold it, so it would outlive its client.
        for slot in lock(&self.slots).values() {
            if let Some(connection) = lock(&slot.current).take() {
                connection.close("the client was dropped");
            }
        }
    }
}
