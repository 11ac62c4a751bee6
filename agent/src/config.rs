//! The agent's configuration.

use firefly_types::{ClusterSecret, NodeId};
use std::path::PathBuf;

/// How to run an agent.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// This node's id among the scheduler's nodes.
    pub node_id: NodeId,
    /// gRPC address of the scheduler, "ip:port".
    pub scheduler: String,
    /// Folder for the state of ranks; survives the agent. One agent per folder.
    pub state_dir: PathBuf,
    /// Address at which ranks of this node can be reached by ranks of others (no port).
    pub address: String,
    /// Membership.
    pub secret: ClusterSecret,
    /// Ranks that the node takes. `None`: one per core.
    pub slots: Option<u32>,
    /// Command that runs a shim; it gets `--dir DIR` appended. Empty: this program with the
    /// argument `shim`.
    pub shim_command: Vec<String>,
}

impl AgentConfig {
    /// With defaults for everything that can be found out.
    pub fn new(node_id: NodeId, scheduler: String, state_dir: PathBuf, secret: ClusterSecret) -> Self {
        Self {
            node_id,
            scheduler,
            state_dir,
            address: "127.0.0.1".into(),
            secret,
            slots: None,
            shim_command: Vec::new(),
        }
    }
}
