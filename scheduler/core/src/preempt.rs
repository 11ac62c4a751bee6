//! Who must give way to whom.
//!
//! Rules name whom a waiting job may displace; guards hold whatever the rules say:
//!
//! * only what can be suspended, on nodes that all can suspend;
//! * never a job of `exempt_priority` or more, unless it runs opportunistically;
//! * nobody before its quantum (opportunistic attempts excepted), and nobody more often than
//!   `suspensions_per_hour`;
//! * never for a job that crashed `crash_loop` times in a row: its next crash would have cost
//!   others their work for nothing;
//! * never if the waiting job would not fit afterwards (`reserve.rs` sees to that).

use crate::event::Now;
use crate::job::{Attempt, Job, Stage, millis};
use crate::machine::{Core, planted};
use crate::users::Turn;
use firefly_types::JobId;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// One rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Displace {
    /// Whoever runs opportunistically, at once.
    Opportunistic,
    /// Whoever has a lower priority.
    LowerPriority,
    /// An overdue job displaces whoever was not overdue itself.
    Overdue,
    /// An equal of another user who has had more than its share lately, after a time slice.
    TimeSlice,
}

/// The two sides of a displacement, as far as rules look at them.
pub(crate) struct Sides<'a> {
    pub(crate) waiting: &'a Job,
    pub(crate) waiting_turn: Turn,
    pub(crate) running: &'a Job,
    pub(crate) attempt: &'a Attempt,
    pub(crate) running_turn: Turn,
    /// How long the attempt has run.
    pub(crate) ran: Duration,
    pub(crate) time_slice: Duration,
}

impl Displace {
    /// Whether the rule lets the waiting job displace the running one.
    pub(crate) fn allows(self, s: &Sides<'_>) -> bool {
        match self {
            Displace::Opportunistic => s.attempt.opportunistic.is_some(),
            Displace::LowerPriority => s.running.priority < s.waiting.priority,
            Displace::Overdue => s.waiting.overdue_since.is_some() && !s.attempt.overdue,
            Displace::TimeSlice => {
                s.running.priority <= s.waiting.priority
                    && s.running.spec.user != s.waiting.spec.user
                    && s.waiting_turn < s.running_turn
                    && s.ran >= s.time_slice
            }
        }
    }
}

/// What stands between a waiting job and the nodes that an active one holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Grip {
    /// It is leaving already.
    Leaving,
    /// It may be displaced now.
    Loose,
    /// It stays for now.
    Firm,
}

/// An active job as an obstacle.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Occupant {
    pub(crate) grip: Grip,
    /// Node-milliseconds lost by displacing it; for firm ones, a guess at how long they stay.
    pub(crate) cost: u64,
    pub(crate) job: JobId,
}

impl Core {
    /// Every active job of the waiting one's group, the cheapest to displace first.
    pub(crate) fn occupants(&self, waiting: JobId, now: Now) -> Vec<Occupant> {
        let Some(job) = self.jobs.get(&waiting) else { return Vec::new() };
        let user = self.users.known(&job.spec.user).unwrap_or(0);
        let waiting_turn = self.users.turn(user, now.mono);
        let mut all = Vec::new();
        for owner in self.active.iter().filter_map(|id| self.jobs.get(id)) {
            let Some(attempt) = owner.attempt().filter(|a| a.seats_held().next().is_some()) else { continue };
            if owner.spec.group != job.spec.group {
                continue;
            }
            let user = self.users.known(&owner.spec.user).unwrap_or(0);
            let running_turn = self.users.turn(user, now.mono);
            let grip = self.grip(job, waiting_turn, owner, attempt, running_turn, now);
            let cost = match grip {
                Grip::Leaving => 0,
                Grip::Loose => self.lost_work(owner, attempt, now),
                Grip::Firm => stays(owner, attempt, now),
            };
            all.push(Occupant { grip, cost, job: owner.id });
        }
        all.sort_unstable();
        all
    }

    fn grip(
        &self,
        waiting: &Job,
        waiting_turn: Turn,
        running: &Job,
        attempt: &Attempt,
        running_turn: Turn,
        now: Now,
    ) -> Grip {
        if matches!(attempt.stage, Stage::Suspending | Stage::Ending) {
            return Grip::Leaving;
        }
        if attempt.stage == Stage::Ended || !self.can_suspend(running, attempt) {
            // Ended with seats: their nodes are silent, and only time or proof frees them.
            return Grip::Firm;
        }
        let ran = match attempt.stage {
            Stage::Running => now.mono.since(attempt.running_since),
            _ => Duration::ZERO,
        };
        let opportunistic = attempt.opportunistic.is_some();
        let guarded = !opportunistic
            && (running.priority >= self.policy.exempt_priority
                || (ran < self.quantum(running) && !planted!(self, QuantumIgnored))
                || running.suspended_lately(now) >= self.policy.suspensions_per_hour as usize);
        if guarded || waiting.unstable >= self.policy.crash_loop {
            return Grip::Firm;
        }
        let time_slice = Duration::from_millis(self.policy.time_slice_ms);
        let sides = Sides { waiting, waiting_turn, running, attempt, running_turn, ran, time_slice };
        match self.policy.displace.iter().any(|rule| rule.allows(&sides)) {
            true => Grip::Loose,
            false => Grip::Firm,
        }
    }

    /// Whether the attempt can be asked to give way at all.
    pub(crate) fn can_suspend(&self, job: &Job, attempt: &Attempt) -> bool {
        let nodes_can = || {
            attempt.seats_held().all(|s| self.nodes.get(&s.node).is_some_and(|n| n.record.info.can_suspend))
        };
        job.spec.suspendable && (nodes_can() || planted!(self, SuspendsUnable))
    }

    /// Time that an attempt may run at least.
    pub(crate) fn quantum(&self, job: &Job) -> Duration {
        let cost = self.suspend_cost_ms(job);
        let adaptive = cost.saturating_mul(self.policy.quantum_costs.into());
        Duration::from_millis(adaptive.max(self.policy.quantum_ms))
    }

    /// What a suspension of the job costs, measured or assumed.
    pub(crate) fn suspend_cost_ms(&self, job: &Job) -> u64 {
        if job.suspend_cost_ms > 0 { job.suspend_cost_ms } else { self.policy.suspend_cost_ms }
    }

    /// Node-milliseconds that displacing the attempt loses: work since the last checkpoint, and
    /// the cost of coming back.
    pub(crate) fn lost_work(&self, job: &Job, attempt: &Attempt, now: Now) -> u64 {
        let unsaved = match attempt.stage {
            Stage::Running => millis(now.mono.since(attempt.saved_at)),
            _ => 0,
        };
        let each = unsaved.saturating_add(self.suspend_cost_ms(job));
        let milli: u64 = attempt.seats_held().map(|s| s.milli).sum();
        each.saturating_mul(milli) / 1_000
    }
}

/// How long a job will stay: what is left of its limit, or as long again as it has run.
fn stays(job: &Job, attempt: &Attempt, now: Now) -> u64 {
    match job.spec.time_limit_ms {
        0 => millis(now.mono.since(attempt.running_since)),
        limit => limit.saturating_sub(job.ran(now.mono)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Policy;
    use crate::spec::JobSpec;
    use crate::unit_tests::Bench;

    #[test]
    fn each_rule_by_itself() {
        let mut b = Bench::with(Policy::default(), &[1, 1]);
        let of = |user: &str, priority| JobSpec {
            user: user.into(),
            priority,
            ..crate::unit_tests::spec(1, 1, 0, 0)
        };
        let (one, two) = (b.submit_spec(of("a", 1)), b.submit_spec(of("b", 2)));
        let (low, high) = (b.core.job(one).unwrap().clone(), b.core.job(two).unwrap().clone());
        let attempt = low.attempt().unwrap().clone();
        let sides = |waiting, running, attempt, ran| Sides {
            waiting,
            waiting_turn: (0, 1),
            running,
            attempt,
            running_turn: (0, 2),
            ran: Duration::from_secs(ran),
            time_slice: Duration::from_secs(100),
        };
        use Displace::{LowerPriority, Opportunistic, Overdue, TimeSlice};
        assert!(LowerPriority.allows(&sides(&high, &low, &attempt, 0)));
        assert!(!LowerPriority.allows(&sides(&low, &high, &attempt, 0)));
        assert!(!LowerPriority.allows(&sides(&low, &low, &attempt, 0)));
        assert!(!Opportunistic.allows(&sides(&high, &low, &attempt, 0)));
        let filler = Attempt { opportunistic: Some(crate::Opportunistic::Fill), ..attempt.clone() };
        assert!(Opportunistic.allows(&sides(&low, &high, &filler, 0)), "whatever the priorities");
        assert!(TimeSlice.allows(&sides(&high, &low, &attempt, 100)));
        assert!(!TimeSlice.allows(&sides(&high, &low, &attempt, 99)), "not before its slice is over");
        assert!(!TimeSlice.allows(&sides(&low, &low, &attempt, 100)), "not the same user's");
        assert!(!TimeSlice.allows(&sides(&low, &high, &attempt, 100)), "not a higher priority");
        let mut fair = sides(&high, &low, &attempt, 100);
        fair.waiting_turn = (0, 3);
        assert!(!TimeSlice.allows(&fair), "not for one who has had more");
        assert!(!Overdue.allows(&sides(&high, &low, &attempt, 0)));
        let high = Job { overdue_since: Some(firefly_types::Nanos(1)), ..high.clone() };
        assert!(Overdue.allows(&sides(&high, &low, &attempt, 0)));
        let privileged = Attempt { overdue: true, ..attempt.clone() };
        assert!(!Overdue.allows(&sides(&high, &low, &privileged, 0)), "its turn was owed to it");
    }
}
