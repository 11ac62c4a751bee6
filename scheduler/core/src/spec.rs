//! What a user asks for, and the limits on it.

use crate::amount::Amount;
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
/// Longest time between SIGTERM and SIGKILL, and for a save when suspended: one hour.
pub(crate) const MOST_GRACE_MS: u32 = 3_600_000;
/// Most jobs of one array: each is a job of its own, and all are recorded in one step.
pub(crate) const MOST_ARRAY: u32 = 10_000;
/// Most jobs that one can wait for.
pub(crate) const MOST_DEPENDENCIES: usize = 256;
/// Most accelerators of one node: their set is one word.
pub(crate) const MOST_GPUS: u32 = 64;

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

/// When a job that waits for another may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum After {
    /// The other one succeeded; if it ends otherwise, this one fails.
    Success,
    /// The other one ended, however.
    End,
}

/// Waits for another job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dependency {
    /// Which.
    pub job: JobId,
    /// For what.
    pub after: After,
}

/// What to run and on how much. Zero or empty: no demand, no limit, the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
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
    /// Pool of nodes of one kind. Nodes without a group form the pool of the empty name.
    pub group: String,
    /// Accelerators on each node. Only jobs on one shared node ask for parts: gangs and exclusive
    /// jobs get whole nodes, and these are least demands on each.
    pub gpus_per_node: u32,
    /// Cores on each node.
    pub cores_per_node: u32,
    /// Memory on each node.
    pub memory_per_node_bytes: u64,
    /// A whole node for a job of one node. Gangs always take whole nodes.
    pub exclusive: bool,
    /// The job takes part in the suspend handshake: it saves when asked and goes on from there.
    pub suspendable: bool,
    /// Milliseconds it may take to save when suspended; 0: the site's default.
    pub suspend_grace_ms: u32,
    /// Milliseconds of running, over all attempts, after which the job is ended; 0: none.
    pub time_limit_ms: u64,
    /// Milliseconds without progress after which the attempt counts as hung; 0: not watched.
    pub progress_timeout_ms: u64,
    /// Never on nodes of several zones, even if the site would allow it.
    pub one_zone: bool,
    /// The user's own order: lower goes first among the user's jobs.
    pub user_rank: i32,
    /// Jobs that must end first.
    pub after: Vec<Dependency>,
    /// Submits so many equal jobs; 0 and 1: one.
    pub array: u32,
    /// Most jobs of the array that run at a time; 0: all.
    pub array_parallel: u32,
    /// Milliseconds that the job is expected to run. Only the order `shortest` reads it.
    pub hint_ms: u64,
}

impl JobSpec {
    /// Ranks in all.
    pub fn world_size(&self) -> u32 {
        self.nodes.saturating_mul(self.ranks_per_node)
    }

    /// What it needs on each of its nodes.
    pub fn request(&self) -> Amount {
        Amount {
            gpus: self.gpus_per_node,
            slots: self.ranks_per_node,
            cores: self.cores_per_node,
            memory_bytes: self.memory_per_node_bytes,
        }
    }

    /// Whether it takes whole nodes.
    pub fn whole(&self) -> bool {
        self.nodes > 1 || self.exclusive
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
        self.validate_policy()
    }

    /// Demands, limits and relations that contradict each other.
    fn validate_policy(&self) -> Result<(), Refusal> {
        let refuse = |what: String| Err(Refusal::Invalid(what));
        let names = [("group", &self.group), ("user", &self.user)];
        for (what, name) in names {
            if name.len() > 255 || name.chars().any(char::is_control) || name == "*" {
                return refuse(format!("{name:?} cannot be a {what}'s name"));
            }
        }
        if self.gpus_per_node > MOST_GPUS {
            return refuse(format!(
                "{} GPUs on a node are beyond the limit of {MOST_GPUS}",
                self.gpus_per_node
            ));
        }
        if self.suspend_grace_ms > MOST_GRACE_MS {
            return refuse(format!(
                "a grace of {} ms for a save is beyond the limit of {MOST_GRACE_MS}",
                self.suspend_grace_ms
            ));
        }
        if self.suspend_grace_ms > 0 && !self.suspendable {
            return refuse("a grace for saving without `suspendable`: say which of both is meant".into());
        }
        let limit = self.time_limit_ms;
        for (what, ms) in [
            ("the grace for a save", u64::from(self.suspend_grace_ms)),
            ("the progress timeout", self.progress_timeout_ms),
        ] {
            if limit > 0 && ms >= limit {
                return refuse(format!(
                    "{what} of {ms} ms is not shorter than the time limit of {limit} ms: it could never matter"
                ));
            }
        }
        if self.array > MOST_ARRAY {
            return refuse(format!("an array of {} jobs is beyond the limit of {MOST_ARRAY}", self.array));
        }
        if self.array_parallel > self.array.max(1) {
            return refuse(format!(
                "{} of an array of {} jobs cannot run at a time",
                self.array_parallel, self.array
            ));
        }
        if self.after.len() > MOST_DEPENDENCIES {
            return refuse(format!(
                "{} dependencies are beyond the limit of {MOST_DEPENDENCIES}",
                self.after.len()
            ));
        }
        Ok(())
    }
}
