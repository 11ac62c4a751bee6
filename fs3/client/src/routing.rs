//! The routing table as the client uses it, kept fresh by a long poll of the manager.

use crate::manager::Manager;
use crate::stats::{Stats, add};
use firefly_proto::mgmtd::{NodeRole, PublicState, RoutingTable};
use firefly_types::{Backoff, ChainId, TargetId};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long the manager may hold a poll when nothing changes: the price of a dead connection that
/// looks alive.
const POLL_WAIT: Duration = Duration::from_secs(10);

/// A routing table with its look-ups.
#[derive(Debug, Default)]
pub struct Routing {
    table: RoutingTable,
    chains: HashMap<ChainId, Chain>,
    meta: Vec<String>,
}

/// One chain: only the targets that serve, head first, tail last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Version that requests carry.
    pub version: u64,
    /// Targets that serve reads and writes.
    pub serving: Vec<Replica>,
}

/// A target and where it answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// The target.
    pub target: TargetId,
    /// Address of its node, "ip:port".
    pub address: String,
}

impl Routing {
    fn new(table: RoutingTable) -> Self {
        let nodes: HashMap<u32, &str> = table.nodes.iter().map(|n| (n.node_id, n.address.as_str())).collect();
        let owner: HashMap<u32, u32> = table.targets.iter().map(|t| (t.target_id, t.node_id)).collect();
        let replica = |target: &u32| {
            let address = nodes.get(owner.get(target)?)?;
            (!address.is_empty())
                .then(|| Replica { target: TargetId(*target), address: (*address).to_owned() })
        };
        let chains = table
            .chains
            .iter()
            .map(|chain| {
                let serving = chain
                    .targets
                    .iter()
                    .zip(chain.states())
                    .filter(|(_, state)| *state == PublicState::Serving)
                    .filter_map(|(target, _)| replica(target))
                    .collect();
                (ChainId(chain.chain_id), Chain { version: chain.version, serving })
            })
            .collect();
        let mut meta: Vec<_> = table
            .nodes
            .iter()
            .filter(|n| n.role() == NodeRole::Meta && !n.address.is_empty())
            .map(|n| (!n.alive, n.node_id, n.address.clone()))
            .collect();
        meta.sort();
        let meta = meta.into_iter().map(|(_, _, address)| address).collect();
        Self { table, chains, meta }
    }

    /// Version of the table, 0 before the first one arrived.
    pub fn version(&self) -> u64 {
        self.table.version
    }

    /// The table as the manager sent it.
    pub fn table(&self) -> &RoutingTable {
        &self.table
    }

    /// A chain by its id.
    pub fn chain(&self, id: ChainId) -> Option<&Chain> {
        self.chains.get(&id)
    }

    /// Addresses of meta servers, those that live first.
    pub fn meta_servers(&self) -> &[String] {
        &self.meta
    }
}

/// The newest routing table, shared by everything in a client.
#[derive(Clone)]
pub struct RoutingCache {
    newest: watch::Receiver<Arc<Routing>>,
}

impl RoutingCache {
    /// Starts polling; returns once the first table is there, or with the manager's refusal.
    pub(crate) async fn start(
        manager: Manager,
        stats: Arc<Stats>,
        stop: CancellationToken,
    ) -> Result<Self, crate::FsError> {
        let first = manager.routing_patiently().await?;
        add(&stats.routing_updates, 1);
        let (sender, newest) = watch::channel(Arc::new(Routing::new(first)));
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = poll(manager, sender, stats) => {}
            }
        });
        Ok(Self { newest })
    }

    /// The newest table.
    pub fn current(&self) -> Arc<Routing> {
        self.newest.borrow().clone()
    }

    /// Waits until a table newer than `version` arrives, at most `most`.
    pub async fn wait_newer(&self, version: u64, most: Duration) {
        let mut newest = self.newest.clone();
        // Both outcomes mean the same to the caller: look again.
        let _ = tokio::time::timeout(most, newest.wait_for(|r| r.version() > version)).await;
    }
}

async fn poll(manager: Manager, sender: watch::Sender<Arc<Routing>>, stats: Arc<Stats>) {
    let mut failures = 0;
    loop {
        let known = sender.borrow().version();
        match manager.routing(known, POLL_WAIT).await {
            Ok(table) => {
                failures = 0;
                // A manager that lost its state would send an older one: never go back.
                if table.version > known {
                    tracing::debug!(version = table.version, "new routing table");
                    add(&stats.routing_updates, 1);
                    sender.send_replace(Arc::new(Routing::new(table)));
                }
            }
            Err(error) => {
                failures += 1;
                if failures == 1 {
                    tracing::warn!(%error, "the manager does not answer; going on with routing {known}");
                }
                let delay = Backoff::CLUSTER
                    .delay(failures, Duration::ZERO, rand::random())
                    .unwrap_or(Backoff::CLUSTER.most);
                tokio::time::sleep(delay).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firefly_proto::mgmtd::{ChainInfo, NodeInfo, TargetInfo};

    #[test]
    fn only_serving_targets_with_an_address_are_offered_in_chain_order() {
        let node = |node_id, role: NodeRole, address: &str, alive| NodeInfo {
            node_id,
            role: role.into(),
            address: address.into(),
            alive,
            ..Default::default()
        };
        let target = |target_id, node_id| TargetInfo { target_id, node_id, ..Default::default() };
        let states = [PublicState::Serving, PublicState::Serving, PublicState::Syncing, PublicState::Serving];
        let routing = Routing::new(RoutingTable {
            version: 7,
            nodes: vec![
                node(1, NodeRole::Storage, "a:1", true),
                node(2, NodeRole::Storage, "b:1", true),
                node(3, NodeRole::Meta, "m:dead", false),
                node(4, NodeRole::Meta, "m:live", true),
            ],
            targets: vec![target(20, 2), target(10, 1), target(30, 2), target(40, 99)],
            chains: vec![ChainInfo {
                chain_id: 5,
                version: 3,
                targets: vec![20, 10, 30, 40],
                states: states.map(i32::from).to_vec(),
                ..Default::default()
            }],
            ..Default::default()
        });
        let chain = routing.chain(ChainId(5)).unwrap();
        let order: Vec<_> = chain.serving.iter().map(|r| (r.target.get(), r.address.as_str())).collect();
        assert_eq!(order, [(20, "b:1"), (10, "a:1")]);
        assert_eq!(chain.version, 3);
        assert_eq!(routing.meta_servers(), ["m:live", "m:dead"]);
        assert!(routing.chain(ChainId(6)).is_none());
    }
}
