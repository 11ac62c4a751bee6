//! What shall happen by time alone. Timers are hints: each is checked against the state when it
//! fires, and one whose reason is gone does nothing, so nobody needs to take any back.

use firefly_types::{AttemptEpoch, JobId, Nanos, NodeId};
use std::collections::BTreeSet;

/// What a timer is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// A node may have been silent for too long.
    Silence(NodeId),
    /// Ranks may not be ready in time.
    Start(JobId, AttemptEpoch),
    /// The delay of a restart is over.
    Delay(JobId),
    /// A job may have waited beyond the bound.
    Overdue(JobId),
    /// An attempt may have used up its job's time.
    Limit(JobId, AttemptEpoch),
    /// An attempt may have made no progress for too long.
    Progress(JobId, AttemptEpoch),
    /// A job may be demoted.
    Demotion(JobId, AttemptEpoch),
    /// A suspended attempt should have ended.
    Suspend(JobId, AttemptEpoch),
    /// An attempt may be displaced from now on.
    Quantum(JobId, AttemptEpoch),
    /// A job need no longer avoid some node, or may give way again.
    Memory(JobId),
    /// A maintenance window opens, comes near or closes.
    Maintenance(u32),
}

/// The timers, by time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timers(BTreeSet<(Nanos, Timer)>);

impl Timers {
    pub(crate) fn set(&mut self, at: Nanos, timer: Timer) {
        self.0.insert((at, timer));
    }

    /// When the next one is due.
    pub(crate) fn next(&self) -> Option<Nanos> {
        self.0.first().map(|(at, _)| *at)
    }

    /// The next one that is due, and when it was.
    pub(crate) fn pop(&mut self, now: Nanos) -> Option<(Nanos, Timer)> {
        if self.next()? > now {
            return None;
        }
        self.0.pop_first()
    }
}
