//! What the core is told, and what it answers.

use crate::amount::Usage;
use crate::faults::{Fault, Maintenance};
use crate::job::{Exit, Job};
use crate::node::{NodeInfo, NodeRecord};
use crate::policy::Policy;
use crate::spec::JobSpec;
use firefly_types::{AttemptEpoch, ErrorKind, JobId, Nanos, NodeId, Rank};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The time of an event, on two clocks: leases and delays use the monotonic one, what people read
/// the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Now {
    /// Monotonic; counts suspend.
    #[serde(with = "nanos")]
    pub mono: Nanos,
    /// Milliseconds since 1970.
    pub unix_ms: u64,
}

/// `Nanos` is a point on some process's clock and has no general encoding; an event log belongs to
/// one process.
mod nanos {
    use firefly_types::Nanos;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(n: &Nanos, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(n.0)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Nanos, D::Error> {
        u64::deserialize(d).map(Nanos)
    }
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reported {
    /// Held at the barrier.
    Prepared,
    /// User code runs.
    Running,
    /// User code has seen that it shall give way.
    SuspendReceived,
    /// User code has saved this step and is about to exit.
    Saved(u64),
    /// Over.
    Exited(Exit),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Somebody wants a job to save, give its nodes back and wait.
    Suspend {
        /// Which.
        job: JobId,
        /// Why.
        reason: String,
    },
    /// Somebody wants a job not to start (again).
    Hold {
        /// Which.
        job: JobId,
        /// Why.
        reason: String,
    },
    /// Somebody wants a held job to go on.
    Resume {
        /// Which.
        job: JobId,
    },
    /// Somebody changes a job's priority.
    SetPriority {
        /// Which.
        job: JobId,
        /// New.
        priority: i32,
    },
    /// Somebody reorders jobs of their own.
    SetUserRank {
        /// Which.
        job: JobId,
        /// New; lower goes first.
        rank: i32,
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
    /// User code has come to a step.
    Progress {
        /// Which job.
        job: JobId,
        /// Which attempt.
        epoch: AttemptEpoch,
        /// How far.
        step: u64,
        /// Whether the step is saved: nothing before it can be lost.
        saved: bool,
    },
    /// A check of a node has found a fault.
    Health {
        /// Which.
        node: NodeId,
        /// What kind.
        fault: Fault,
        /// It must not be used any more; otherwise it is a warning.
        critical: bool,
        /// What was seen.
        evidence: String,
    },
    /// A node is provably off (an operator or its power supply says so): nothing on it runs.
    Fenced {
        /// Which.
        node: NodeId,
        /// Who says so.
        by: String,
    },
    /// Nodes are set aside for a time.
    Maintain(Maintenance),
    /// The window is dropped.
    CancelMaintenance {
        /// Which.
        id: u32,
    },
    /// The site's policy changes.
    Configure(Box<Policy>),
    /// Time has passed.
    Tick,
}

/// What to do. In this order within one step: persist, note, order, answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// What a user's jobs used that are no longer kept.
    Account(AccountRecord),
    /// A maintenance window.
    Maintenance(Maintenance),
    /// The window is over.
    RemoveMaintenance(u32),
}

/// What a user's jobs used that are no longer kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountRecord {
    /// Whose.
    pub user: String,
    /// How much.
    pub used: Usage,
}

/// What a node shall do. Every order can be repeated without harm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Make the rank ready and hold it at the barrier.
    Prepare {
        /// Which.
        key: RankKey,
        /// Index of the node in the gang.
        node_rank: u32,
        /// Index of the rank on its node.
        local_rank: u32,
        /// The node's accelerators that are the job's, as a set of bits.
        gpus: u64,
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
    /// Ask it to save and exit.
    Suspend {
        /// Which.
        key: RankKey,
        /// Time that it has.
        grace: Duration,
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
            | Order::Suspend { key, .. }
            | Order::Stop { key, .. }
            | Order::Forget { key } => key,
        }
    }
}

/// Answer to a person's event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Done or under way, for this job.
    Job(JobId),
    /// Done for this node.
    Node(NodeId),
    /// Done for the site.
    Site,
    /// Not done.
    Refused(Refusal),
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
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
    /// No such pool of nodes.
    #[error("no group {group:?}: there are {known}")]
    NoGroup {
        /// What was asked.
        group: String,
        /// What there is.
        known: String,
    },
    /// More than the site has, even when all of it is there.
    #[error("the job wants {wanted}, {owner} has {most} when all of it is there: ask for less")]
    TooLarge {
        /// What was asked.
        wanted: String,
        /// Who has too little.
        owner: String,
        /// How much it has.
        most: String,
    },
    /// The quota can never be enough.
    #[error(
        "the job wants {wanted}, the quota of {owner} is {most}, and this site does not lend: ask for less, or for more quota"
    )]
    BeyondQuota {
        /// What was asked.
        wanted: String,
        /// Whose quota.
        owner: String,
        /// How much it is.
        most: String,
    },
    /// What was asked is impossible in the job's present state.
    #[error("{0}")]
    NotNow(String),
    /// No such window.
    #[error("no maintenance window {0}")]
    NoMaintenance(u32),
}

impl Refusal {
    /// For programs.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Refusal::Invalid(_) | Refusal::TooLarge { .. } | Refusal::BeyondQuota { .. } => {
                ErrorKind::InvalidArgument
            }
            Refusal::NotNow(_) => ErrorKind::Unsupported,
            Refusal::NoJob(_) | Refusal::NoNode(_) | Refusal::NoGroup { .. } | Refusal::NoMaintenance(_) => {
                ErrorKind::NotFound
            }
        }
    }
}
