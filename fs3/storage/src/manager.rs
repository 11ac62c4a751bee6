//! The node's conversation with the cluster manager: heartbeats, which bring the lease, and the
//! routing table.

use crate::StorageConfig;
use crate::clock::now;
use crate::node::Node;
use firefly_proto::dial::{self, Authenticated};
use firefly_proto::mgmtd::manager_client::ManagerClient;
use firefly_proto::mgmtd::{self as pb, NodeRole};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

type Manager = ManagerClient<Authenticated>;

/// Before the manager has said how often, and after an error.
const RETRY: Duration = Duration::from_millis(200);
/// No heartbeat waits longer for its answer, before the manager has said how often it wants one.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(2);
const ROUTING_WAIT: Duration = Duration::from_secs(10);

/// A connection that is made when it is first used, and again when lost.
pub(crate) fn connect(config: &StorageConfig) -> Result<Manager, tonic::transport::Error> {
    let channel = dial::endpoint(&config.manager)?
        .connect_timeout(Duration::from_secs(1))
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(2))
        .connect_lazy();
    Ok(dial::manager(channel, &config.identity.secret))
}

/// Sends heartbeats until stopped.
pub(crate) async fn heartbeats(
    node: Arc<Node>,
    node_id: u32,
    address: SocketAddr,
    mut manager: Manager,
    stop: CancellationToken,
) {
    let process = firefly_proto::process::of_self();
    // The answer to one that is lost must not be waited for until the lease is over.
    let mut patience = HEARTBEAT_TIMEOUT;
    loop {
        let request = pb::HeartbeatRequest {
            node_id,
            role: NodeRole::Storage.into(),
            incarnation: node.incarnation,
            address: address.to_string(),
            targets: node.reports(),
            routing_version: node.routing_version(),
            format_version: crate::engine::FORMAT_VERSION,
            process: process.clone(),
        };
        // The lease runs from here, not from the answer: the manager may count from no later.
        let sent = now();
        let wait = match tokio::time::timeout(patience, manager.heartbeat(request)).await {
            Ok(Ok(reply)) => {
                let reply = reply.into_inner();
                // Only on what the manager has published so far: a process that has just started may
                // hold an older table, in which targets serve that are out by now. The newer table
                // is on its way and wakes the next heartbeat.
                if node.routing_version() >= reply.routing_version {
                    node.extend_lease(sent.after(Duration::from_millis(reply.lease_ms.into())));
                }
                let interval = Duration::from_millis(reply.interval_ms.max(10).into());
                // The manager asserts that a lease is at least three intervals.
                patience = HEARTBEAT_TIMEOUT.min(2 * interval);
                interval
            }
            Ok(Err(status)) => {
                tracing::warn!(%status, "the manager refused a heartbeat or is away");
                RETRY
            }
            Err(_) => {
                tracing::warn!("the manager does not answer heartbeats");
                RETRY
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = node.wake_report.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Follows the routing table until stopped.
pub(crate) async fn routing(node: Arc<Node>, mut manager: Manager, stop: CancellationToken) {
    loop {
        let request = pb::GetRoutingRequest {
            known_version: node.routing_version(),
            wait_ms: ROUTING_WAIT.as_millis() as u32,
        };
        let limit = ROUTING_WAIT + Duration::from_secs(2);
        let answer = tokio::select! {
            () = stop.cancelled() => return,
            answer = tokio::time::timeout(limit, manager.get_routing(request)) => answer,
        };
        match answer {
            Ok(Ok(table)) => {
                let (node, table) = (Arc::clone(&node), table.into_inner());
                let applied = tokio::task::spawn_blocking(move || node.apply(&table)).await;
                if let Err(error) = applied {
                    tracing::error!(%error, "a routing table could not be applied");
                }
                continue;
            }
            Ok(Err(status)) => tracing::warn!(%status, "the manager gave no routing table"),
            Err(_) => tracing::warn!("the manager does not answer"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}
