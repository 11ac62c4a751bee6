//! What the core is told, and what it answers.

use crate::job::{Exit, Job};
use crate::node::{NodeInfo, NodeRecord};
use crate::spec::JobSpec;
use firefly_types::{AttemptEpoch, ErrorKind, JobId, Nanos, NodeId, Rank};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The time of an event, on two clocks: leases and delays use the monotonic one, what people read
/// the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Monotonic; counts suspend.
    pub mono: Nanos,
    /// Milliseconds since 1970.
    pub unix_ms: u64,
}

/// Names one process of one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RankKey {
    /// Job.
    pub job: JobId,
    /// Attempt.
    pub epoch: AttemptEpoch,
    /// Process.
    pub rank: Rank,
}

impl std::fmt::Display for RankKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.job, self.epoch, self.rank)
    }
}

/// What a node says about one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankReport {
    /// Which.
    pub key: RankKey,
    /// Where it stands.
    pub state: Reported,
    /// Its process, 0 before it started.
    pub pid: u32,
    /// The port that rank 0 keeps for the job's rendezvous; 0 from other ranks.
    pub master_port: u16,
}

/// States in which a node can report a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reported {
    /// Held at the barrier.
    Prepared,
    /// User code runs.
    Running,
    /// Over.
    Exited(Exit),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody wants a job.
    Submit {
        /// What.
        spec: JobSpec,
        /// The same key gives the same job; empty for none.
        key: String,
    },
    /// Somebody wants a job to end.
    Stop {
        /// Which.
        job: JobId,
        /// Why, for the record.
        reason: String,
    },
    /// A node shall (or shall again) get new ranks.
    Cordon {
        /// Which.
        node: NodeId,
        /// True: no new ranks.
        cordon: bool,
        /// Why.
        reason: String,
    },
    /// A node has connected.
    Hello {
        /// Which.
        node: NodeId,
        /// What it has.
        info: NodeInfo,
        /// Every rank that it knows, running or ended but not yet forgotten.
        inventory: Vec<RankReport>,
    },
    /// A sign of life.
    Beat {
        /// Whose.
        node: NodeId,
    },
    /// A node's connection broke.
    Gone {
        /// Whose.
        node: NodeId,
    },
    /// News about one rank.
    Rank {
        /// From whom.
        node: NodeId,
        /// What.
        report: RankReport,
    },
    /// Time has passed.
    Tick,
}

/// What to do. In this order within one step: persist, note, order, answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Make this durable before any later decision of the step takes effect. The records of one
    /// step are one transaction: a slot that one job gives up may be taken by another.
    Persist(Record),
    /// Tell the job's log.
    Note {
        /// Whose log.
        job: JobId,
        /// Attempt that the line is about.
        epoch: AttemptEpoch,
        /// One line.
        text: String,
    },
    /// Tell a node, if it is connected; otherwise its next hello brings the order again.
    Order {
        /// Whom.
        node: NodeId,
        /// What.
        order: Order,
    },
    /// To whoever sent the event.
    Answer(Answer),
}

/// A durable fact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Record {
    /// A job's whole state replaces the one before.
    Job(Box<Job>),
    /// A node's.
    Node(NodeRecord),
    /// The job is no longer kept.
    RemoveJob(JobId),
}

/// What a node shall do. Every order can be repeated without harm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Make the rank ready and hold it at the barrier.
    Prepare {
        /// Which.
        key: RankKey,
        /// Index of the node in the gang.
        node_rank: u32,
        /// Index of the rank on its node.
        local_rank: u32,
    },
    /// Open the barrier.
    Start {
        /// Which.
        key: RankKey,
        /// Node of rank 0.
        master: NodeId,
        /// Port kept for the job on it.
        master_port: u16,
    },
    /// End it: SIGTERM, then SIGKILL after the grace.
    Stop {
        /// Which.
        key: RankKey,
        /// Time in between.
        grace: Duration,
    },
    /// Its end is recorded: its files may go.
    Forget {
        /// Which.
        key: RankKey,
    },
}

impl Order {
    /// Whom the order is about.
    pub fn key(&self) -> RankKey {
        match *self {
            Order::Prepare { key, .. }
            | Order::Start { key, .. }
            | Order::Stop { key, .. }
            | Order::Forget { key } => key,
        }
    }
}

/// Answer to a person's event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done or under way, for this job.
    Job(JobId),
    /// Done for this node.
    Node(NodeId),
    /// Not done.
    Refused(Refusal),
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The request makes no sense on any cluster.
    #[error("{0}")]
    Invalid(String),
    /// No such job.
    #[error("no job {0}: `ff job ls --all` lists them")]
    NoJob(JobId),
    /// No such node.
    #[error("no node {0}: `ff node ls` lists them")]
    NoNode(NodeId),
}

impl Refusal {
    /// For programs.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Refusal::Invalid(_) => ErrorKind::InvalidArgument,
            Refusal::NoJob(_) | Refusal::NoNode(_) => ErrorKind::NotFound,
        }
    }
}
