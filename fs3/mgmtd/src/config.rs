//! What a manager is told, and the inequalities between its times.

use crate::MgmtdError;
use firefly_net::rpc::Identity;
use firefly_types::{Backoff, ByteSize, NodeId};
use fs3_core::placement;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Everything that [`crate::serve`] needs.
#[derive(Clone, Debug)]
pub struct MgmtdConfig {
    /// Where gRPC is answered. Port 0 lets the system choose; `ff up` binds loopback only.
    pub listen: SocketAddr,
    /// Folder of the manager's store.
    pub data_dir: PathBuf,
    /// The cluster and its secret.
    pub identity: Identity,
    /// What the cluster looks like and how quickly it reacts.
    pub settings: MgmtdSettings,
}

/// The part of the configuration that stands in a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MgmtdSettings {
    /// Ids of the storage nodes that the cluster is founded with. Chains are laid over them at the
    /// first start; a later change of this list is refused. Nodes join and leave a running cluster
    /// by `ff fs node add` and `remove`.
    pub storage_nodes: Vec<NodeId>,
    /// Replicas of each chunk (targets per chain). Default 2, or 1 on a single node. Fixed at the
    /// first start.
    #[serde(default)]
    pub replication: Option<u32>,
    /// Chains that each storage node heads. Default: enough that the loss of a node spreads evenly
    /// over the others ([`placement::default_chains_per_node`]). Fixed at the first start.
    #[serde(default)]
    pub chains_per_node: Option<u32>,
    /// Serving replicas below which a chain refuses writes. Default min(2, replication).
    ///
    /// With the default, data acknowledged is always on two disks, but with replication 2 the loss
    /// of one server makes its chains read-only until the server is back and filled. With 1, chains
    /// stay writable *degraded*: what is written meanwhile is on one disk only until the chain has
    /// healed, and the loss of that disk in that time loses it. `ff up` passes 1, since all of its
    /// servers stand on one machine and one disk anyway.
    #[serde(default)]
    pub min_write_replicas: Option<u32>,
    /// Targets that a node takes in at a time when chains are moved, rebuilt or rebalanced. Default
    /// 1: clients come first. Each reads from one other node and copies four chunks at a time.
    #[serde(default = "default_intake")]
    pub moves_per_node: u32,
    /// Chunk size of new files. Default 1 MiB: large enough to stream, small enough to spread a file.
    #[serde(default = "default_chunk")]
    pub chunk_bytes: ByteSize,
    /// The times. Defaults bring service back within 5 s of the loss of a server.
    #[serde(default)]
    pub timing: Timing,
}

fn default_intake() -> u32 {
    1
}

fn default_chunk() -> ByteSize {
    ByteSize(1 << 20)
}

impl MgmtdSettings {
    /// Defaults for a cluster of these storage nodes.
    pub fn new(storage_nodes: Vec<NodeId>) -> Self {
        Self {
            storage_nodes,
            replication: None,
            chains_per_node: None,
            min_write_replicas: None,
            moves_per_node: default_intake(),
            chunk_bytes: default_chunk(),
            timing: Timing::default(),
        }
    }

    /// Replicas of each chunk.
    pub fn effective_replication(&self) -> u32 {
        self.replication.unwrap_or_else(|| 2.min(self.storage_nodes.len() as u32))
    }

    /// Serving replicas that a write needs.
    pub fn effective_min_write_replicas(&self) -> u32 {
        self.min_write_replicas.unwrap_or_else(|| 2.min(self.effective_replication()))
    }

    /// Chains that each node heads.
    pub fn effective_chains_per_node(&self) -> u32 {
        let nodes = self.storage_nodes.len();
        let targets_at_one = (nodes as u64 * u64::from(self.effective_replication())).max(1);
        let most = (crate::MAX_TARGETS / targets_at_one).max(1);
        self.chains_per_node.unwrap_or(
            placement::default_chains_per_node(nodes, self.effective_replication() as usize)
                .min(most as usize) as u32,
        )
    }

    /// Refuses what cannot work.
    pub fn check(&self) -> Result<(), MgmtdError> {
        let (k, least) = (self.effective_replication(), self.effective_min_write_replicas());
        if least == 0 || least > k {
            return Err(MgmtdError::Config(format!(
                "min_write_replicas is {least}; choose 1 to {k}, the replication"
            )));
        }
        if !(1..=64).contains(&self.moves_per_node) {
            return Err(MgmtdError::Config(format!(
                "moves_per_node is {}; choose 1 to 64",
                self.moves_per_node
            )));
        }
        let chunk = self.chunk_bytes;
        if !chunk.0.is_power_of_two() || !(4 << 10..=64 << 20).contains(&chunk.0) {
            return Err(MgmtdError::Config(format!(
                "chunk_bytes is {chunk}; choose a power of two from 4KiB to 64MiB"
            )));
        }
        let targets =
            self.storage_nodes.len() as u64 * u64::from(self.effective_chains_per_node()) * u64::from(k);
        if targets > crate::MAX_TARGETS {
            return Err(MgmtdError::Config(format!(
                "{targets} targets would be made; at most {} are managed: lower chains_per_node",
                crate::MAX_TARGETS
            )));
        }
        self.timing.check()
    }
}

/// How quickly the manager reacts. All in milliseconds; a change needs a restart of the manager
/// only, since nodes are told with each heartbeat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timing {
    /// Servers send a heartbeat this often. Default 500.
    pub heartbeat_ms: u32,
    /// A heartbeat gives the right to serve for this long, counted on the server from sending it.
    /// Default 2000: three heartbeats may be lost before anybody stops serving.
    pub lease_ms: u32,
    /// Waited beyond the lease, for the drift between two clocks, before a silent server is
    /// replaced. Default 500.
    pub margin_ms: u32,
    /// After a restart the manager renews leases at once, but changes no chain for this long plus
    /// one lease: every server must have had the time to find it. Default 1000.
    pub takeover_ms: u32,
    /// A new chain starts when all of its servers have come, or after this long with those that
    /// have. Default 15000.
    pub bootstrap_ms: u32,
    /// A client's session ends when it has not been renewed for this long. Default 30000: longer
    /// than any pause of a healthy client, because a client that loses its session loses what it
    /// has open.
    pub session_ms: u32,
    /// A chain whose last serving set went away starts again when all of that set have come back,
    /// or this long after the first with those that have; who comes later is filled. Default 1500:
    /// servers that start together after an outage need not copy anything.
    pub reunite_ms: u32,
    /// Between two chains that are turned back to their preferred order. Default 1000: each turn
    /// makes the clients of that chain ask again.
    pub rotate_ms: u32,
    /// A target that has been out for longer is rebuilt on another node. Default 600000 (10 min):
    /// longer than a restart or a repair of its server, since all of its data is copied.
    pub rebuild_after_ms: u32,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat_ms: 500,
            lease_ms: 2000,
            margin_ms: 500,
            takeover_ms: 1000,
            bootstrap_ms: 15_000,
            session_ms: 30_000,
            reunite_ms: 1500,
            rotate_ms: 1000,
            rebuild_after_ms: 600_000,
        }
    }
}

impl Timing {
    /// The lease.
    pub fn lease(&self) -> Duration {
        ms(self.lease_ms)
    }

    /// Silence after which a server is replaced.
    pub fn dead_after(&self) -> Duration {
        ms(self.lease_ms) + ms(self.margin_ms)
    }

    /// After a restart, nothing is promoted or demoted for this long.
    pub fn settle(&self) -> Duration {
        ms(self.takeover_ms) + ms(self.lease_ms)
    }

    /// How often the manager looks at its clock.
    pub fn tick(&self) -> Duration {
        ms((self.heartbeat_ms / 4).clamp(5, 250))
    }

    /// The longest from the loss of a server to the publication of chains without it.
    pub fn failover(&self) -> Duration {
        self.dead_after() + self.tick()
    }

    /// The longest from a restart of everything to chains that serve.
    pub fn restart(&self) -> Duration {
        self.settle() + ms(self.reunite_ms) + self.tick()
    }

    /// The inequalities that the fences rest on.
    pub fn check(&self) -> Result<(), MgmtdError> {
        let wrong = |what: String| Err(MgmtdError::Config(what));
        if self.heartbeat_ms < 10 || self.lease_ms > 60_000 || self.session_ms > 3_600_000 {
            return wrong(
                "heartbeat_ms must be at least 10, lease_ms at most 60000, session_ms at most 3600000".into(),
            );
        }
        if self.lease_ms < 3 * self.heartbeat_ms {
            return wrong(format!(
                "lease_ms is {}, below three times heartbeat_ms ({}): one lost heartbeat would stop a server",
                self.lease_ms, self.heartbeat_ms
            ));
        }
        // Two quartz clocks drift apart by at most some 200 ppm; 1 % leaves room for coarse timers.
        if self.margin_ms < 10 + self.lease_ms / 100 {
            return wrong(format!(
                "margin_ms is {}, below 10 plus 1 % of lease_ms: clock drift could let two chains serve",
                self.margin_ms
            ));
        }
        if self.takeover_ms < self.margin_ms {
            return wrong(format!(
                "takeover_ms is {}, below margin_ms ({}): a restarted manager would judge sooner than a running one",
                self.takeover_ms, self.margin_ms
            ));
        }
        let longest = self.restart().max(self.failover());
        if 2 * longest > Backoff::CLUSTER.total {
            return wrong(format!(
                "a fail-over may take {longest:?} (lease_ms + margin_ms, or takeover_ms + lease_ms + reunite_ms after \
                 a restart), and clients give up after {:?}: it must be less than half of that",
                Backoff::CLUSTER.total
            ));
        }
        if ms(self.rebuild_after_ms) < longest {
            return wrong(format!(
                "rebuild_after_ms is {}, below the longest fail-over ({longest:?}): targets would be rebuilt that \
                 are about to return",
                self.rebuild_after_ms
            ));
        }
        if ms(self.session_ms) < 2 * longest {
            return wrong(format!(
                "session_ms is {}, below twice the longest fail-over ({longest:?}): clients would lose their \
                 sessions in one",
                self.session_ms
            ));
        }
        Ok(())
    }
}

pub(crate) fn ms(n: u32) -> Duration {
    Duration::from_millis(u64::from(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_bring_service_back_within_five_seconds() {
        let timing = Timing::default();
        timing.check().unwrap();
        assert!(timing.failover() + ms(1000) < Duration::from_secs(5));
        assert!(timing.restart() < Duration::from_secs(5));
    }

    #[test]
    fn broken_inequalities_are_refused_with_the_name_of_the_knob() {
        let refused = |change: fn(&mut MgmtdSettings), name: &str| {
            let mut settings = MgmtdSettings::new(vec![NodeId(3), NodeId(4), NodeId(5)]);
            change(&mut settings);
            let message = settings.check().unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
        };
        refused(|s| s.timing.lease_ms = 1400, "lease_ms");
        refused(|s| s.timing.margin_ms = 20, "margin_ms");
        refused(|s| s.timing.heartbeat_ms = 1, "heartbeat_ms");
        refused(|s| s.timing.takeover_ms = 400, "takeover_ms");
        refused(|s| s.timing.session_ms = 4000, "session_ms");
        refused(|s| s.timing.reunite_ms = 20_000, "reunite_ms");
        refused(|s| s.timing.rebuild_after_ms = 4000, "rebuild_after_ms");
        refused(|s| s.moves_per_node = 0, "moves_per_node");
        refused(|s| s.min_write_replicas = Some(3), "min_write_replicas");
        refused(|s| s.min_write_replicas = Some(0), "min_write_replicas");
        refused(|s| s.chunk_bytes = ByteSize(3000), "chunk_bytes");
    }

    #[test]
    fn write_replicas_default_to_two_of_two_and_one_of_one() {
        let of = |nodes: u32| MgmtdSettings::new((1..=nodes).map(NodeId).collect());
        assert_eq!((of(1).effective_replication(), of(1).effective_min_write_replicas()), (1, 1));
        assert_eq!((of(3).effective_replication(), of(3).effective_min_write_replicas()), (2, 2));
        of(1).check().unwrap();
        of(3).check().unwrap();
        of(4000).check().unwrap();
    }
}
