//! What a user asks for, and the limits on it.

use crate::event::Refusal;
use firefly_types::JobId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most nodes of one job.
pub(crate) const MOST_NODES: u32 = 16_384;
/// Most ranks of one job on one node.
pub(crate) const MOST_RANKS_PER_NODE: u32 = 1_024;
/// Most ranks of one job: bounds the record that a job keeps.
pub(crate) const MOST_RANKS: u32 = 8_192;
/// Bytes of command, environment and working directory together: they are part of the job's record.
pub(crate) const MOST_TEXT_BYTES: usize = 64 << 10;
/// Longest time between SIGTERM and SIGKILL: one hour.
pub(crate) const MOST_GRACE_MS: u32 = 3_600_000;

/// Variables that the launcher sets: a job that sets them itself would not find its peers.
const RESERVED: [&str; 14] = [
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "FIREFLY_NODE_ID",
    "FIREFLY_JOB_ID",
    "FIREFLY_EPOCH",
    "FIREFLY_JOB_SECRET",
];

/// What to run and on how much.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// For people; several jobs may have one name.
    pub name: String,
    /// Program and arguments; never passed through a shell.
    pub command: Vec<String>,
    /// Added to the environment of every rank.
    pub env: BTreeMap<String, String>,
    /// Absolute, or empty for the user's home.
    pub working_directory: String,
    /// Gang size in nodes.
    pub nodes: u32,
    /// Ranks (slots) on each node.
    pub ranks_per_node: u32,
    /// Higher goes first.
    pub priority: i32,
    /// Restarts allowed after failures of the job itself.
    pub max_restarts: u32,
    /// User to run as.
    pub uid: u32,
    /// Group to run as.
    pub gid: u32,
    /// Name of the user; empty runs the job as the agent's own user.
    pub user: String,
    /// Milliseconds between SIGTERM and SIGKILL.
    pub grace_ms: u32,
}

impl JobSpec {
    /// Ranks in all.
    pub fn world_size(&self) -> u32 {
        self.nodes.saturating_mul(self.ranks_per_node)
    }

    /// Refuses what could never run, on any cluster.
    pub fn validate(&self) -> Result<(), Refusal> {
        let refuse = |what: String| Err(Refusal::Invalid(what));
        if self.command.is_empty() || self.command[0].is_empty() {
            return refuse("a job needs a command: `ff run -- python train.py`".into());
        }
        if self.nodes == 0 || self.ranks_per_node == 0 {
            return refuse("a job needs at least one node and one rank per node".into());
        }
        if self.nodes > MOST_NODES
            || self.ranks_per_node > MOST_RANKS_PER_NODE
            || self.world_size() > MOST_RANKS
        {
            return refuse(format!(
                "{} nodes with {} ranks each are beyond the limits ({MOST_NODES} nodes, {MOST_RANKS_PER_NODE} ranks per node, {MOST_RANKS} ranks)",
                self.nodes, self.ranks_per_node
            ));
        }
        if self.name.len() > 255 || self.name.chars().any(char::is_control) {
            return refuse("a job's name has at most 255 bytes and no control characters".into());
        }
        if self.name.parse::<JobId>().is_ok() {
            return refuse(format!("the name {:?} reads like a job id: choose another", self.name));
        }
        if !self.working_directory.is_empty() && !self.working_directory.starts_with('/') {
            return refuse(format!("working directory {:?} is not absolute", self.working_directory));
        }
        let text = self.command.iter().map(String::len).sum::<usize>()
            + self.env.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>()
            + self.working_directory.len();
        if text > MOST_TEXT_BYTES {
            return refuse(format!(
                "command and environment have {text} bytes, the limit is {MOST_TEXT_BYTES}"
            ));
        }
        let parts = self.command.iter().chain(self.env.keys()).chain(self.env.values());
        if parts.chain([&self.working_directory, &self.user]).any(|s| s.contains('\0')) {
            return refuse("command and environment cannot contain NUL bytes".into());
        }
        for key in self.env.keys() {
            if key.is_empty() || key.contains('=') {
                return refuse(format!("{key:?} cannot name an environment variable"));
            }
            if RESERVED.contains(&key.as_str()) {
                return refuse(format!("{key} is set by the launcher for each rank: do not set it"));
            }
        }
        if self.grace_ms > MOST_GRACE_MS {
            return refuse(format!("a grace of {} ms is beyond the limit of {MOST_GRACE_MS}", self.grace_ms));
        }
        Ok(())
    }
}
