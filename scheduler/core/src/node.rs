//! Nodes: what they have, what is on them, when they were last heard.

use crate::event::RankKey;
use crate::policy::Policy;
use firefly_types::{JobId, Nanos, NodeId, Rank};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;

/// What a node says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Host name.
    pub host: String,
    /// Address at which its ranks listen.
    pub address: String,
    /// Processor cores.
    pub cores: u32,
    /// Ranks that it takes; by default one per core.
    pub slots: u32,
    /// Memory.
    pub memory_bytes: u64,
    /// Accelerators.
    pub gpus: u32,
}

/// What is kept of a node over restarts of the scheduler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Which.
    pub id: NodeId,
    /// As last told.
    pub info: NodeInfo,
    /// Why it gets no new ranks, if so.
    pub cordon: Option<String>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// What is kept.
    pub record: NodeRecord,
    /// Whether its stream is open.
    pub connected: bool,
    /// Last sign of life (or the start of this scheduler).
    pub last_heard: Nanos,
    /// Ranks of ours that take a slot.
    pub ranks: BTreeSet<(JobId, Rank)>,
    /// Ranks that run there although no attempt of ours has them: they take slots until they
    /// are gone.
    pub strays: BTreeSet<RankKey>,
}

/// As people see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Gets new ranks.
    Ready,
    /// Not connected, or silent.
    Lost,
    /// Set aside by a person.
    Cordoned,
}

impl Node {
    pub(crate) fn new(record: NodeRecord, now: Nanos) -> Self {
        Self { record, connected: false, last_heard: now, ranks: BTreeSet::new(), strays: BTreeSet::new() }
    }

    /// Time since the last sign of life.
    pub fn silent(&self, now: Nanos) -> Duration {
        now.since(self.last_heard)
    }

    /// Whether it is reachable: only then is placing ranks on it worth while.
    pub fn is_up(&self, now: Nanos, policy: &Policy) -> bool {
        self.connected && self.silent(now) < Duration::from_millis(policy.silent_after_ms)
    }

    /// As people see it.
    pub fn state(&self, now: Nanos, policy: &Policy) -> NodeState {
        if self.record.cordon.is_some() {
            NodeState::Cordoned
        } else if self.is_up(now, policy) {
            NodeState::Ready
        } else {
            NodeState::Lost
        }
    }

    /// Slots taken.
    pub fn used(&self) -> u32 {
        u32::try_from(self.ranks.len() + self.strays.len()).unwrap_or(u32::MAX)
    }

    /// Slots left.
    pub fn free(&self) -> u32 {
        self.record.info.slots.saturating_sub(self.used())
    }
}
