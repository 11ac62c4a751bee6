//! The meta server towards the cluster manager: says that it lives and where, and learns how new
//! files are laid out.

use crate::layout::ClusterLayout;
use crate::meta::Meta;
use firefly_proto::dial::{self, Authenticated};
use firefly_proto::mgmtd::manager_client::ManagerClient;
use firefly_proto::mgmtd::{GetRoutingRequest, HeartbeatRequest, NodeRole};
use firefly_types::{Backoff, ClusterSecret, NodeId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Longest wait for a short answer.
const ANSWER: Duration = Duration::from_secs(3);
/// How long the manager may hold a question for a newer routing table.
const LONG_POLL: Duration = Duration::from_secs(10);
/// Heartbeat interval until the manager says one.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);
/// Formats that this release understands, as the manager compares them.
const FORMAT_VERSION: u32 = 1;

/// A lazily connected manager.
#[derive(Clone)]
pub(crate) struct Manager {
    client: ManagerClient<Authenticated>,
}

/// What the heartbeats say.
pub(crate) struct Myself {
    pub(crate) node: NodeId,
    pub(crate) incarnation: u64,
    pub(crate) address: String,
}

impl Manager {
    pub(crate) fn new(address: &str, secret: &ClusterSecret) -> Result<Self, tonic::transport::Error> {
        let channel = dial::endpoint(address)?
            .connect_timeout(Duration::from_secs(2))
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(3))
            .connect_lazy();
        Ok(Self { client: dial::manager(channel, secret) })
    }

    /// Heartbeats until `stop`. `routing` is the version that [`Manager::follow_routing`] has applied.
    pub(crate) async fn heartbeat(
        mut self,
        myself: Myself,
        routing: Arc<AtomicU64>,
        stop: CancellationToken,
    ) {
        let mut interval = FIRST_INTERVAL;
        let mut trouble = Trouble::default();
        loop {
            let mut request = tonic::Request::new(HeartbeatRequest {
                node_id: myself.node.get(),
                role: NodeRole::Meta as i32,
                incarnation: myself.incarnation,
                address: myself.address.clone(),
                targets: Vec::new(),
                routing_version: routing.load(Ordering::Relaxed),
                format_version: FORMAT_VERSION,
                // A meta server holds nothing that must be fenced: no proof of its end is needed.
                process: None,
            });
            request.set_timeout(ANSWER);
            let sent = self.client.heartbeat(request);
            let answer = tokio::select! {
                answer = tokio::time::timeout(ANSWER, sent) => answer,
                () = stop.cancelled() => return,
            };
            let wait = match answer {
                Ok(Ok(reply)) => {
                    trouble.over("the manager hears this meta server again");
                    let asked = Duration::from_millis(reply.into_inner().interval_ms.into());
                    interval = asked.clamp(Duration::from_millis(10), Duration::from_secs(60));
                    interval
                }
                Ok(Err(status)) => trouble.again("heartbeat", status.message()).min(interval),
                Err(_) => trouble.again("heartbeat", "no answer in time").min(interval),
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Keeps the layout of new files as the manager's routing table says, until `stop`.
    pub(crate) async fn follow_routing(
        mut self,
        meta: Arc<Meta>,
        applied: Arc<AtomicU64>,
        stop: CancellationToken,
    ) {
        let mut known = 0;
        let mut trouble = Trouble::default();
        loop {
            let wait_ms = if known == 0 { 0 } else { LONG_POLL.as_millis() as u32 };
            let limit = Duration::from_millis(wait_ms.into()) + ANSWER;
            let mut request = tonic::Request::new(GetRoutingRequest { known_version: known, wait_ms });
            request.set_timeout(limit);
            let sent = self.client.get_routing(request);
            let answer = tokio::select! {
                answer = tokio::time::timeout(limit, sent) => answer,
                () = stop.cancelled() => return,
            };
            let wait = match answer {
                Ok(Ok(reply)) => {
                    trouble.over("the routing table comes again");
                    let table = reply.into_inner();
                    let is_new = table.version != known;
                    known = table.version;
                    applied.store(known, Ordering::Relaxed);
                    let layout =
                        ClusterLayout { chunk_bytes: table.chunk_bytes, stripe_chains: table.stripe_chains };
                    let is_ready = !layout.stripe_chains.is_empty();
                    meta.set_layout(layout);
                    // A manager that answers at once with the same table must not be asked in a
                    // tight loop.
                    if is_new && is_ready { Duration::ZERO } else { Duration::from_millis(100) }
                }
                Ok(Err(status)) => trouble.again("routing table", status.message()),
                Err(_) => trouble.again("routing table", "no answer in time"),
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.cancelled() => return,
            }
        }
    }
}

/// Says once that the manager is away, and once that it is back.
struct Trouble {
    since: Instant,
    attempts: u32,
}

impl Default for Trouble {
    fn default() -> Self {
        Self { since: Instant::now(), attempts: 0 }
    }
}

impl Trouble {
    fn again(&mut self, wanted: &str, why: &str) -> Duration {
        if self.attempts == 0 {
            self.since = Instant::now();
            tracing::warn!(wanted, why, "the manager does not answer; trying on");
        }
        self.attempts = self.attempts.saturating_add(1);
        // A server never gives up on its manager: only the growth of the delay is taken.
        Backoff::CLUSTER.delay(self.attempts, Duration::ZERO, 1.0).unwrap_or(Backoff::CLUSTER.most)
    }

    fn over(&mut self, what: &str) {
        if self.attempts > 0 {
            tracing::info!(after = ?self.since.elapsed(), "{what}");
        }
        self.attempts = 0;
    }
}
