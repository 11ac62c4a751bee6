//! Nodes: what they have, where they stand, what is on them, when they were last heard.

use crate::amount::Amount;
use crate::event::RankKey;
use firefly_types::{JobId, Nanos, NodeId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Where a node stands in the network's tree. Unknown levels are empty: one zone, one spine, one
/// leaf.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Place {
    /// One fat tree; few links join zones.
    pub zone: String,
    /// Group of leaves.
    pub spine: String,
    /// Switch that the node is on.
    pub leaf: String,
}

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
    /// Accelerators; more than 64 count as 64.
    pub gpus: u32,
    /// Pool of nodes of one kind.
    #[serde(default)]
    pub group: String,
    /// Where it stands.
    #[serde(default)]
    pub place: Place,
    /// Whether its agent carries out the suspend handshake. What it cannot do is never decided.
    #[serde(default)]
    pub can_suspend: bool,
}

impl NodeInfo {
    /// All that it has.
    pub fn amount(&self) -> Amount {
        Amount {
            gpus: self.gpus.min(crate::spec::MOST_GPUS),
            slots: self.slots,
            cores: self.cores,
            memory_bytes: self.memory_bytes,
        }
    }
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
    /// When the scheduler cordoned it by itself; 0: a person did, or nobody.
    #[serde(default)]
    pub auto_cordon_unix_ms: u64,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// What is kept.
    pub record: NodeRecord,
    /// Whether its stream is open.
    pub connected: bool,
    /// Whether it was heard in time. Changes by a sign of life and by its timer only, so that the
    /// index of free capacity need not look at the clock.
    pub(crate) heard: bool,
    /// When its timer looks at it next: of several, only that one counts.
    pub(crate) look_at: Nanos,
    /// Last sign of life (or the start of this scheduler).
    pub last_heard: Nanos,
    /// What each job holds here: index of the seat in the job's newest attempt, and the amount.
    pub(crate) seats: BTreeMap<JobId, (u32, Amount)>,
    /// Sum of the seats.
    pub(crate) taken: Amount,
    /// Accelerators that seats hold.
    pub(crate) gpus_taken: u64,
    /// The job that has the whole node, if one has.
    pub(crate) whole: Option<JobId>,
    /// The blocked job that waits for this node.
    pub(crate) held_for: Option<JobId>,
    /// Open maintenance windows.
    pub(crate) maintenance: BTreeSet<u32>,
    /// Ranks that run there although no attempt of ours has them: the node gets no new ranks until
    /// they are gone.
    pub strays: BTreeSet<RankKey>,
    /// When faults or failures pointed at it, with the job they happened to.
    pub(crate) strikes: Vec<(Nanos, JobId)>,
}

/// As people see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Gets new ranks.
    Ready,
    /// Not connected, or silent.
    Lost,
    /// Set aside by a person, by faults or for maintenance.
    Cordoned,
}

impl Node {
    pub(crate) fn new(record: NodeRecord, now: Nanos) -> Self {
        Self {
            record,
            connected: false,
            heard: false,
            look_at: now,
            last_heard: now,
            seats: BTreeMap::new(),
            taken: Amount::default(),
            gpus_taken: 0,
            whole: None,
            held_for: None,
            maintenance: BTreeSet::new(),
            strays: BTreeSet::new(),
            strikes: Vec::new(),
        }
    }

    /// Time since the last sign of life.
    pub fn silent(&self, now: Nanos) -> Duration {
        now.since(self.last_heard)
    }

    /// As people see it.
    pub fn state(&self) -> NodeState {
        if self.record.cordon.is_some() || !self.maintenance.is_empty() {
            NodeState::Cordoned
        } else if self.connected && self.heard {
            NodeState::Ready
        } else {
            NodeState::Lost
        }
    }

    /// Whether it gets new ranks.
    pub fn in_service(&self) -> bool {
        self.state() == NodeState::Ready
    }

    /// Jobs on it.
    pub fn jobs(&self) -> impl Iterator<Item = JobId> {
        self.seats.keys().copied()
    }

    /// Slots taken, strays included.
    pub fn used(&self) -> u32 {
        self.taken.slots.saturating_add(u32::try_from(self.strays.len()).unwrap_or(u32::MAX))
    }

    /// What is left for jobs that share it.
    pub fn free(&self) -> Amount {
        // Of a stray nobody knows what it holds beyond its slot: nothing joins it.
        if self.whole.is_some() || !self.strays.is_empty() {
            return Amount::default();
        }
        self.record.info.amount().minus(&self.taken)
    }

    /// Whether nothing is on it.
    pub fn idle(&self) -> bool {
        self.seats.is_empty() && self.strays.is_empty()
    }

    pub(crate) fn take(&mut self, job: JobId, seat: u32, amount: Amount, gpus: u64, whole: bool) {
        self.seats.insert(job, (seat, amount));
        self.taken = self.taken.plus(&amount);
        self.gpus_taken |= gpus;
        if whole {
            self.whole = Some(job);
        }
    }

    pub(crate) fn give_back(&mut self, job: JobId, gpus: u64) {
        if let Some((_, amount)) = self.seats.remove(&job) {
            self.taken = self.taken.minus(&amount);
            self.gpus_taken &= !gpus;
        }
        if self.whole == Some(job) {
            self.whole = None;
        }
    }
}
