//! Jobs, their attempts and the ranks of those.

use crate::event::RankKey;
use crate::spec::JobSpec;
use firefly_types::{AttemptEpoch, JobId, Nanos, NodeId, Rank};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Attempts whose details a job keeps; older ones are only counted. Bounds the job's record.
pub(crate) const ATTEMPTS_KEPT: usize = 16;
/// Ranks beyond which only the newest attempt keeps them.
pub(crate) const RANKS_KEPT: usize = 64;
/// Bytes of an exit's detail that are kept.
pub(crate) const DETAIL_BYTES: usize = 300;

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobState {
    /// Waits for nodes, for the delay of a restart or for proof that its last attempt is over.
    Pending,
    /// Placed; ranks are being prepared and held.
    Starting,
    /// User code runs (or its remains are being ended before a restart).
    Running,
    /// Being ended at a person's wish.
    Stopping,
    /// Every rank exited with 0.
    Succeeded,
    /// Failed for good.
    Failed,
    /// Ended by a person.
    Stopped,
}

impl JobState {
    /// Whether nothing can follow.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Stopped)
    }
}

/// A job as its user sees it; restarts do not change its id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Identity, never reused.
    pub id: JobId,
    /// What was asked.
    pub spec: JobSpec,
    /// Idempotency key, may be empty.
    pub key: String,
    /// Where it stands.
    pub state: JobState,
    /// Newest last; the newest alone may have ranks that are not over.
    pub attempts: Vec<Attempt>,
    /// Failures that count against `max_restarts`.
    pub failures: u32,
    /// Attempts in a row that did not become stable.
    pub unstable: u32,
    /// When submitted.
    pub submitted_unix_ms: u64,
    /// When it came to its end, or 0.
    pub ended_unix_ms: u64,
    /// Why it is where it is, or empty.
    pub reason: String,
    /// A person's wish to end it, with the reason: an intent that outlives every restart.
    pub stop: Option<String>,
    /// Grows with every visible change.
    pub version: u64,
    /// Delay before the next attempt.
    pub delay_ms: u64,
    /// When the delay is over; after a restart of the scheduler it starts again.
    #[serde(skip)]
    pub not_before: Nanos,
}

impl Job {
    /// The newest attempt.
    pub fn attempt(&self) -> Option<&Attempt> {
        self.attempts.last()
    }

    /// Epoch of the newest attempt, 0 before the first.
    pub fn epoch(&self) -> AttemptEpoch {
        self.attempt().map_or(AttemptEpoch(0), |a| a.epoch)
    }

    /// Ranks of the last attempt whose end is not proven.
    pub fn unproven(&self) -> impl Iterator<Item = &RankSlot> {
        self.attempt().into_iter().flat_map(|a| &a.ranks).filter(|r| r.state == RankState::Lost)
    }
}

/// One try to run a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// Its number, from 1.
    pub epoch: AttemptEpoch,
    /// Where it stands.
    pub stage: Stage,
    /// When placed.
    pub started_unix_ms: u64,
    /// When the barrier opened, or 0.
    pub running_unix_ms: u64,
    /// When its last rank was over, or 0.
    pub ended_unix_ms: u64,
    /// What ended it.
    pub cause: Option<EndCause>,
    /// The same for people, with evidence.
    pub end_reason: String,
    /// Port for the rendezvous on the node of rank 0.
    pub master_port: u16,
    /// By rank.
    pub ranks: Vec<RankSlot>,
    /// Since when it is in this stage; after a restart of the scheduler it starts again.
    #[serde(skip)]
    pub since: Nanos,
}

impl Attempt {
    /// Whether every rank is over or lost.
    pub fn is_over(&self) -> bool {
        self.ranks.iter().all(|r| !r.state.is_live())
    }

    /// Node of rank 0.
    pub fn master(&self) -> NodeId {
        self.ranks.first().map_or(NodeId(0), |r| r.node)
    }
}

/// Stages of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// Ranks are being made ready and held.
    Preparing,
    /// The barrier is open.
    Running,
    /// Something ended it; the remaining ranks are being stopped.
    Ending,
    /// Every rank is over or lost.
    Ended,
}

/// What ended an attempt: the table in `restart.rs` says what follows from each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndCause {
    /// Every rank exited with 0.
    Completed,
    /// A rank died or failed.
    RankFailed,
    /// A node was silent for too long, or came back without its ranks.
    NodeLost,
    /// Not all ranks were ready in time.
    StartTimeout,
    /// A person.
    Stopped,
}

/// One process of an attempt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankSlot {
    /// Index in the job.
    pub rank: Rank,
    /// Where.
    pub node: NodeId,
    /// Where it stands.
    pub state: RankState,
    /// Process id, 0 if unknown.
    pub pid: u32,
}

/// States of a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RankState {
    /// Ordered to prepare.
    Assigned,
    /// Held at the barrier.
    Held,
    /// User code runs.
    Running,
    /// Over.
    Exited(Exit),
    /// Its node is gone and its end is not proven: it still occupies its slot.
    Lost,
    /// Was lost; now provably over.
    Fenced,
}

impl RankState {
    /// Whether the rank is expected to run or be stopped.
    pub fn is_live(&self) -> bool {
        matches!(self, Self::Assigned | Self::Held | Self::Running)
    }

    /// Whether the rank takes a slot of its node.
    pub fn occupies(&self) -> bool {
        self.is_live() || *self == Self::Lost
    }
}

/// How a process ended. Neither code nor signal: it never ran, `detail` says why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code.
    pub code: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// What else is known.
    pub detail: String,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.signal, self.code) {
            (Some(signal), _) => write!(f, "was ended by signal {signal} ({})", signal_name(signal))?,
            (None, Some(code)) => write!(f, "exited with code {code}")?,
            (None, None) => return write!(f, "ended: {}", self.detail),
        }
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}

/// Name of a Linux signal.
pub fn signal_name(signal: i32) -> &'static str {
    const NAMES: [&str; 31] = [
        "SIGHUP",
        "SIGINT",
        "SIGQUIT",
        "SIGILL",
        "SIGTRAP",
        "SIGABRT",
        "SIGBUS",
        "SIGFPE",
        "SIGKILL",
        "SIGUSR1",
        "SIGSEGV",
        "SIGUSR2",
        "SIGPIPE",
        "SIGALRM",
        "SIGTERM",
        "SIGSTKFLT",
        "SIGCHLD",
        "SIGCONT",
        "SIGSTOP",
        "SIGTSTP",
        "SIGTTIN",
        "SIGTTOU",
        "SIGURG",
        "SIGXCPU",
        "SIGXFSZ",
        "SIGVTALRM",
        "SIGPROF",
        "SIGWINCH",
        "SIGIO",
        "SIGPWR",
        "SIGSYS",
    ];
    usize::try_from(signal - 1).ok().and_then(|i| NAMES.get(i)).unwrap_or(&"unknown")
}

impl Job {
    /// The key of one of the newest attempt's ranks.
    pub(crate) fn key_of(&self, rank: Rank) -> RankKey {
        RankKey { job: self.id, epoch: self.epoch(), rank }
    }
}
