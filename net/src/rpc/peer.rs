//! The lanes to one server: dialled when needed, again when lost, and each call given the best of
//! those that live.

use super::carrier::{Carriers, Link, Made, Want};
use super::connection::Connection;
use super::incast::Incast;
use super::info::PeerInfo;
use super::lanes::{Class, Plan};
use super::{ClientOptions, Identity, drive_handshake, ended};
use crate::buf::Heads;
use crate::error::{CallError, HandshakeError};
use crate::handshake::{self, Agreed, Initiator, Purpose, Terms};
use crate::link::tls::{self, Tls};
use crate::link::{Counters, LinkOptions, tcp};
use firefly_types::{Backoff, lock};
use rand::RngExt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest pause between two tries to bring a lost lane back while others carry its calls.
const RELANE: Backoff =
    Backoff { first: Duration::from_millis(50), most: Duration::from_secs(5), total: Duration::MAX };

/// Makes connections.
pub(super) struct Dialer {
    pub(super) carriers: Carriers,
    pub(super) identity: Identity,
    pub(super) options: ClientOptions,
    /// If members are reached by TLS.
    pub(super) tls: Option<Result<Tls, HandshakeError>>,
    pub(super) heads: Heads,
    pub(super) incast: Arc<Incast>,
    pub(super) counters: Arc<Counters>,
    pub(super) connections: AtomicU64,
    pub(super) refused: AtomicU64,
}

impl Dialer {
    /// Connects to `peer` as `want` says. Says with the connection why it is TCP if a rail was
    /// wanted: it does not reach the server.
    async fn dial(&self, peer: &str, want: Want) -> Result<(Arc<Connection>, Option<String>), CallError> {
        let unreachable = |source| CallError::Unreachable { peer: peer.to_owned(), source };
        let mut stream = tokio::time::timeout(self.options.connect_time, TcpStream::connect(peer))
            .await
            .map_err(|_| unreachable(io::ErrorKind::TimedOut.into()))?
            .map_err(unreachable)?;
        let counters = Counters::part_of(&self.counters);
        let link = LinkOptions {
            counters: counters.clone(),
            stall: self.options.stall_time,
            heads: self.heads.of_connection(),
            class: self.options.fabric.options().class(self.options.traffic),
        };
        tcp::configure(&stream, &link).map_err(unreachable)?;
        let Identity { cluster, secret, name } = &self.identity;
        let terms = Terms::new(*cluster, secret, Purpose::Rpc);
        let plan = self.carriers.plan(want, &stream);
        let (mut machine, hello) = Initiator::start(terms, name, plan.hello(), handshake::nonce());
        let shake = async {
            let Some(tls) = &self.tls else {
                let agreed = greet(&mut stream, &hello, &mut machine).await?;
                return Ok((agreed.version, plan.dial(stream, link).await?));
            };
            let mut stream = tls.clone()?.connect(stream).await?;
            let agreed = greet(&mut stream, &hello, &mut machine).await?;
            let link = tls::split(stream, link).map_err(|e| HandshakeError::Ended(e.to_string()))?;
            Ok((agreed.version, Made { link: Link::Tls(link), why_tcp: None }))
        };
        let dialled = tokio::time::timeout(self.options.handshake_time, shake)
            .await
            .unwrap_or(Err(HandshakeError::TimedOut));
        let (version, Made { link, why_tcp }) = match dialled {
            Ok(dialled) => dialled,
            // A server that goes away meanwhile is no stranger; ask again later.
            Err(HandshakeError::Ended(reason)) => {
                return Err(unreachable(io::Error::new(io::ErrorKind::ConnectionReset, reason)));
            }
            Err(reason) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return Err(CallError::Refused { peer: peer.to_owned(), reason });
            }
        };
        self.connections.fetch_add(1, Ordering::Relaxed);
        // A server of an older release sends its replies unasked, and they are not counted.
        let incast = (version >= handshake::VERSION_GRANTS).then(|| self.incast.clone());
        let connection = match link {
            Link::Tcp((tx, rx)) => Connection::start(tx, rx, counters, incast),
            Link::Tls((tx, rx)) => Connection::start(tx, rx, counters, incast),
            Link::Verbs((tx, rx)) => Connection::start(tx, rx, counters, incast),
        };
        Ok((connection, why_tcp))
    }
}

/// The client's side of a handshake on any stream.
async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    hello: &[u8],
    machine: &mut Initiator,
) -> Result<Agreed, HandshakeError> {
    stream.write_all(hello).await.map_err(ended)?;
    stream.flush().await.map_err(ended)?;
    drive_handshake(stream, machine, Initiator::wants, Initiator::feed).await
}

/// One connection of a lane and what it was dialled for.
#[derive(Clone)]
pub(super) struct Current {
    pub(super) want: Want,
    pub(super) connection: Arc<Connection>,
}

#[derive(Default)]
struct LaneState {
    current: Option<Current>,
    /// Tries that failed in a row, since when another one may be made, and why the last failed.
    failures: u32,
    retry_at: Option<Instant>,
    failure: Option<(u64, CallError)>,
    /// Whether it ever lived: a lane that was lost is stood in for, a new one is waited for.
    known: bool,
}

#[derive(Default)]
struct Lane {
    state: Mutex<LaneState>,
    /// Held while dialling, so that callers wait for one try instead of each making one.
    dialling: tokio::sync::Mutex<()>,
    tries: AtomicU64,
}

/// One server, and what leads to it.
pub(super) struct Peer {
    pub(super) address: String,
    dialer: Arc<Dialer>,
    plan: Mutex<Plan>,
    lanes: Vec<Lane>,
    closed: AtomicBool,
}

impl Peer {
    pub(super) fn new(address: &str, dialer: Arc<Dialer>) -> Peer {
        let fabric = &dialer.options.fabric;
        let transport = fabric.options().transport;
        let tcp_lanes = dialer.options.tcp_lanes;
        let (rails, why_none) = dialer.carriers.rails_to(address);
        let plan = Plan::new(transport, rails, why_none, tcp_lanes);
        let lanes = (0..plan.most_lanes()).map(|_| Lane::default()).collect();
        Peer {
            address: address.to_owned(),
            dialer,
            plan: Mutex::new(plan),
            lanes,
            closed: AtomicBool::new(false),
        }
    }

    /// Tries of a call before its caller is told that each new connection ends at once.
    pub(super) fn tries(&self) -> usize {
        self.lanes.len() + 2
    }

    pub(super) fn info(&self) -> PeerInfo {
        let live = self.live().into_iter().map(|Current { connection, .. }| {
            connection.about.info("", &self.address, connection.in_flight())
        });
        PeerInfo {
            address: self.address.clone(),
            connections: live.collect(),
            why_not_rdma: lock(&self.plan).why_not(),
        }
    }

    /// The connections that live, lane by lane.
    pub(super) fn live(&self) -> Vec<Current> {
        (0..self.lanes.len()).filter_map(|lane| self.current(lane)).collect()
    }

    pub(super) fn is_live(&self) -> bool {
        (0..self.lanes.len()).any(|lane| self.current(lane).is_some())
    }

    /// Ends all connections. With `for_good`, no other is made.
    pub(super) fn close(&self, reason: &str, for_good: bool) {
        self.closed.fetch_or(for_good, Ordering::SeqCst);
        for lane in &self.lanes {
            if let Some(current) = lock(&lane.state).current.take() {
                current.connection.close(reason);
            }
        }
    }

    /// The connection of `lane` if it lives.
    fn current(&self, lane: usize) -> Option<Current> {
        let mut state = lock(&self.lanes[lane].state);
        let current = state.current.as_ref()?;
        if current.connection.is_live() {
            return Some(current.clone());
        }
        let ended = state.current.take()?;
        drop(state);
        if let (Want::Rail(rail), true) = (ended.want, ended.connection.device_failed()) {
            let why = ended.connection.over().unwrap_or_default();
            tracing::warn!(peer = self.address, rail, %why, "a rail failed; its calls go another way");
            lock(&self.plan).failed(rail, why, Instant::now(), jitter());
        }
        None
    }

    /// A live connection for a call of `class`, dialled if there is none.
    pub(super) async fn connection(self: &Arc<Self>, class: Class) -> Result<Arc<Connection>, CallError> {
        let now = Instant::now();
        let lanes = lock(&self.plan).lanes(class, now);
        let live = lanes.clone().filter_map(|lane| Some((lane, self.current(lane)?)));
        if let Some((lane, current)) = live.min_by_key(|(_, c)| c.connection.load()) {
            if class == Class::Bulk && current.connection.load() > 0 {
                // All that live are busy: one more may carry the next call.
                if let Some(idle) = lanes.clone().find(|lane| self.is_due(*lane, now)) {
                    self.dial_aside(idle);
                }
            }
            if lock(&self.plan).want(lane, now).is_ok_and(|want| want != current.want) {
                self.dial_aside(lane);
            }
            return Ok(current.connection);
        }
        let lane = lanes.clone().find(|lane| self.is_due(*lane, now)).unwrap_or(lanes.start);
        let spare = || self.live().into_iter().min_by_key(|c| c.connection.load()).map(|c| c.connection);
        let known = lock(&self.lanes[lane].state).known;
        if let Some(spare) = spare().filter(|_| known) {
            // A lane was lost: the others stand in while it comes back.
            if self.is_due(lane, now) {
                self.dial_aside(lane);
            }
            return Ok(spare);
        }
        match self.dial(lane).await {
            Ok(connection) => Ok(connection),
            Err(error) => spare().ok_or(error),
        }
    }

    /// Whether `lane` is down and may be dialled in passing.
    fn is_due(&self, lane: usize, now: Instant) -> bool {
        self.current(lane).is_none() && lock(&self.lanes[lane].state).retry_at.is_none_or(|at| at <= now)
    }

    /// Dials `lane` while nobody waits for it.
    fn dial_aside(self: &Arc<Self>, lane: usize) {
        if self.lanes[lane].dialling.try_lock().is_err() {
            return;
        }
        let me = self.clone();
        tokio::spawn(async move {
            if let Err(error) = me.dial(lane).await {
                tracing::debug!(peer = me.address, lane, %error, "a lane is not there yet");
            }
        });
    }

    /// Dials `lane` unless somebody just did.
    async fn dial(&self, number: usize) -> Result<Arc<Connection>, CallError> {
        let lane = &self.lanes[number];
        let came = lane.tries.load(Ordering::SeqCst);
        let _one = lane.dialling.lock().await;
        let mut old = self.current(number);
        if let Some(current) = &old
            && lock(&self.plan).want(number, Instant::now()).is_ok_and(|want| want == current.want)
        {
            return Ok(current.connection.clone());
        }
        if let Some((_, error)) = lock(&lane.state).failure.as_ref().filter(|(n, _)| *n > came) {
            return Err(copy(error));
        }
        let this = lane.tries.fetch_add(1, Ordering::SeqCst) + 1;
        let dialled = self.dial_by_plan(number).await;
        let mut state = lock(&lane.state);
        match dialled {
            Ok(current) if self.closed.load(Ordering::SeqCst) => {
                current.connection.close("the client was dropped");
                Ok(current.connection)
            }
            Ok(current) => {
                if let Some(old) = old.take_if(|old| old.want == current.want) {
                    current.connection.close("it is no better than the one before");
                    return Ok(old.connection);
                }
                // One that stood in ends when its last answer has come: nothing new goes to it.
                *state = LaneState { known: true, current: Some(current.clone()), ..LaneState::default() };
                drop(state);
                if let Some(old) = old.take() {
                    old.connection.retire();
                }
                Ok(current.connection)
            }
            Err(error) => {
                state.failures += 1;
                let pause = RELANE.delay(state.failures, Duration::ZERO, jitter()).unwrap_or(RELANE.most);
                state.retry_at = Some(Instant::now() + pause);
                state.failure = Some((this, copy(&error)));
                Err(error)
            }
        }
    }

    /// Tries the ways that the plan knows until one works or there is no other.
    async fn dial_by_plan(&self, lane: usize) -> Result<Current, CallError> {
        loop {
            let wanted = lock(&self.plan).want(lane, Instant::now());
            let want = wanted.map_err(|why| self.no_way(why))?;
            match (self.dialer.dial(&self.address, want).await, want) {
                (Ok((connection, None)), Want::Rail(rail)) => {
                    lock(&self.plan).worked(rail);
                    return Ok(Current { want, connection });
                }
                (Ok((connection, Some(why))), Want::Rail(rail)) => {
                    tracing::info!(peer = self.address, rail, %why, "a rail does not reach a server");
                    let next = {
                        let mut plan = lock(&self.plan);
                        plan.failed(rail, why.clone(), Instant::now(), jitter());
                        plan.want(lane, Instant::now())
                    };
                    if next == Ok(Want::Tcp) {
                        return Ok(Current { want: Want::Tcp, connection });
                    }
                    connection.close(&why);
                }
                (Ok((connection, _)), Want::Tcp) => return Ok(Current { want, connection }),
                (
                    Err(CallError::Refused { reason: HandshakeError::Rail { reason, .. }, .. }),
                    Want::Rail(rail),
                ) => {
                    tracing::warn!(peer = self.address, rail, %reason, "a rail does not reach a server");
                    lock(&self.plan).failed(rail, reason, Instant::now(), jitter());
                }
                (Err(error), _) => return Err(error),
            }
        }
    }

    fn no_way(&self, reason: String) -> CallError {
        let reason = HandshakeError::Rail { device: "any".into(), reason };
        CallError::Refused { peer: self.address.clone(), reason }
    }
}

fn jitter() -> f64 {
    rand::rng().random()
}

/// The same error for another caller that waited for the same try.
fn copy(error: &CallError) -> CallError {
    match error {
        CallError::Refused { peer, reason } => {
            CallError::Refused { peer: peer.clone(), reason: reason.clone() }
        }
        CallError::Unreachable { peer, source } => CallError::Unreachable {
            peer: peer.clone(),
            source: io::Error::new(source.kind(), source.to_string()),
        },
        other => CallError::Unreachable { peer: String::new(), source: io::Error::other(other.to_string()) },
    }
}
