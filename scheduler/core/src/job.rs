//! Jobs, their attempts and the ranks of those.

use crate::amount::{Amount, Usage};
use crate::event::RankKey;
use crate::spec::{Dependency, JobSpec};
use firefly_types::{AttemptEpoch, JobId, Nanos, NodeId, Rank};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
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
    /// Waits: for nodes, for quota, for another job, for the delay of a restart or for proof that
    /// its last attempt is over.
    Pending,
    /// Waits for a person, who held or suspended it, or whom a breaker calls.
    Held,
    /// Placed; ranks are being prepared and held.
    Starting,
    /// User code runs (or its remains are being ended before a restart).
    Running,
    /// Asked to save and give its nodes back; it goes on later.
    Suspending,
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
    /// A wish to hold it, with the reason: it is held as soon as it is pending.
    #[serde(default)]
    pub hold: Option<String>,
    /// Priority that counts: the one asked for, or less after a demotion.
    #[serde(default)]
    pub priority: i32,
    /// Jobs that it still waits for.
    #[serde(default)]
    pub waits_for: Vec<Dependency>,
    /// Its array: id of the first job, and its index.
    #[serde(default)]
    pub array: Option<(JobId, u32)>,
    /// What it has held, over all attempts, up to the last seat given back.
    #[serde(default)]
    pub used: Usage,
    /// Milliseconds that user code has run, over all ended attempts.
    #[serde(default)]
    pub ran_ms: u64,
    /// Since when it could have started, milliseconds since 1970; 0: it could not, or runs.
    #[serde(default)]
    pub waiting_unix_ms: u64,
    /// Its last attempt was ended by a fault that is not its own: it goes before its equals and
    /// may use standbys.
    #[serde(default)]
    pub recovering: bool,
    /// Times that it was suspended.
    #[serde(default)]
    pub suspensions: u32,
    /// When it was suspended lately, milliseconds since 1970: bounds how often.
    #[serde(default)]
    pub suspended_unix_ms: Vec<u64>,
    /// Measured milliseconds of suspending and starting again, smoothed; 0: not measured.
    #[serde(default)]
    pub suspend_cost_ms: u64,
    /// Highest step that it has reported as saved.
    #[serde(default)]
    pub saved_step: u64,
    /// Attempts in a row that ended without a new saved step, once it reports steps.
    #[serde(default)]
    pub no_progress: u32,
    /// Nodes that it is kept away from, until when (milliseconds since 1970).
    #[serde(default)]
    pub avoid: BTreeMap<NodeId, u64>,
    /// Grows with every visible change.
    pub version: u64,
    /// Delay before the next attempt.
    pub delay_ms: u64,
    /// When the delay is over; after a restart of the scheduler it starts again.
    #[serde(skip)]
    pub not_before: Nanos,
    /// Since when its wait has exceeded the site's bound.
    #[serde(skip)]
    pub overdue_since: Option<Nanos>,
    /// When it was suspended before the start under way: the second half of the cost is measured
    /// from placing to running.
    #[serde(skip)]
    pub half_cost_ms: Option<u64>,
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
        let attempt = self.attempt().filter(|a| a.tally.lost > 0);
        attempt.into_iter().flat_map(|a| &a.ranks).filter(|r| r.state == RankState::Lost)
    }

    /// Milliseconds that user code has run, the attempt under way included.
    pub(crate) fn ran(&self, now: Nanos) -> u64 {
        let running = self.attempt().filter(|a| matches!(a.stage, Stage::Running | Stage::Suspending));
        self.ran_ms + running.map_or(0, |a| millis(now.since(a.running_since)))
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
    /// By node of the gang, in the order of ranks.
    #[serde(default)]
    pub seats: Vec<Seat>,
    /// Why it must give way on demand, if so.
    #[serde(default)]
    pub opportunistic: Option<Opportunistic>,
    /// Whether it was overdue when placed: it is not displaced for being in the way of another.
    #[serde(default)]
    pub overdue: bool,
    /// Highest step heard of.
    #[serde(default)]
    pub step: u64,
    /// By rank.
    pub ranks: Vec<RankSlot>,
    /// Since when it is in this stage; after a restart of the scheduler it starts again.
    #[serde(skip)]
    pub since: Nanos,
    /// When its barrier opened.
    #[serde(skip)]
    pub running_since: Nanos,
    /// Last checkpoint (or the start of running): what would be lost counts from here.
    #[serde(skip)]
    pub saved_at: Nanos,
    /// Last sign of progress.
    #[serde(skip)]
    pub progress_at: Nanos,
    /// The suspend handshake.
    #[serde(default)]
    pub suspend: Option<Suspend>,
    /// Ranks by state, so that no report costs a look at all of them.
    #[serde(skip)]
    pub(crate) tally: Tally,
}

/// Why an attempt must give way on demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Opportunistic {
    /// Its owner's quota was used up.
    OverQuota,
    /// It fills nodes that a job ahead of it waits for, or standbys.
    Fill,
}

/// What one node of a gang gives to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// Which node.
    pub node: NodeId,
    /// How much of it.
    pub amount: Amount,
    /// Thousandths of the node that others cannot use.
    pub milli: u64,
    /// Which accelerators, as a set of bits.
    pub gpus: u64,
    /// Milliseconds since 1970 when it was given back, or 0.
    pub returned_unix_ms: u64,
}

/// How far a suspension has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspend {
    /// On whose behalf.
    pub reason: String,
    /// A person asked: the job is held afterwards.
    pub hold: bool,
    /// A rank has seen the request.
    pub received: bool,
    /// A rank has saved, at this step.
    pub saved: Option<u64>,
    /// When it was asked.
    #[serde(skip)]
    pub since: Nanos,
}

/// Ranks of an attempt by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) assigned: u32,
    pub(crate) live: u32,
    pub(crate) lost: u32,
}

impl Attempt {
    /// Whether every rank is over or lost.
    pub fn is_over(&self) -> bool {
        self.tally.live == 0
    }

    /// Changes a rank's state and the tally with it.
    pub(crate) fn set(&mut self, rank: Rank, state: RankState) {
        let Some(slot) = self.ranks.get_mut(rank.0 as usize) else { return };
        let count = |tally: &mut Tally, state: &RankState, by: i64| {
            let change = |n: &mut u32, is: bool| {
                if is {
                    *n = u32::try_from(i64::from(*n) + by).unwrap_or(0);
                }
            };
            change(&mut tally.assigned, *state == RankState::Assigned);
            change(&mut tally.live, state.is_live());
            change(&mut tally.lost, *state == RankState::Lost);
        };
        count(&mut self.tally, &slot.state, -1);
        count(&mut self.tally, &state, 1);
        slot.state = state;
    }

    /// The tally from the ranks themselves.
    pub(crate) fn counted(&self) -> Tally {
        let of = |is: fn(&RankState) -> bool| {
            u32::try_from(self.ranks.iter().filter(|r| is(&r.state)).count()).unwrap_or(u32::MAX)
        };
        Tally {
            assigned: of(|s| *s == RankState::Assigned),
            live: of(RankState::is_live),
            lost: of(|s| *s == RankState::Lost),
        }
    }

    /// Seats not given back.
    pub(crate) fn seats_held(&self) -> impl Iterator<Item = &Seat> {
        self.seats.iter().filter(|s| s.returned_unix_ms == 0)
    }

    /// Ranks on each seat.
    pub(crate) fn ranks_of_seat(&self, seat: usize) -> std::ops::Range<usize> {
        let each = self.ranks.len() / self.seats.len().max(1);
        seat * each..(seat + 1) * each
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
    /// Asked to save and exit.
    Suspending,
    /// Something ended it; the remaining ranks are being stopped.
    Ending,
    /// Every rank is over or lost.
    Ended,
}

/// What ended an attempt: exactly one. The table in `restart.rs` says what follows from each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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
    /// It gave its nodes back: it acknowledged the request, or exited with the agreed code.
    Suspended,
    /// It was asked to give its nodes back and did not in time.
    SuspendForced,
    /// An accelerator of its broke.
    GpuFault,
    /// The network of a node of its broke.
    NetworkFault,
    /// The storage of a node of its broke.
    StorageFault,
    /// A node of its broke in another way.
    HostFault,
    /// No progress for too long.
    Hang,
    /// It ran as long as it may.
    TimeLimit,
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

/// Whole milliseconds of a duration.
pub(crate) fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
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
