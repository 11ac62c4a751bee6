//! Giving way: ask all ranks to save, wait for their ends, measure what it cost.
//!
//! ```text
//! Running -> Suspending (ranks: asked -> received -> saved) -> Ended: Suspended
//!                 \-- grace over --> Ending (SIGKILL) -------> Ended: SuspendForced
//! ```
//!
//! An exit in the grace counts as a suspension only if a rank acknowledged the request or exited
//! with the agreed code: a crash at that moment is a crash, and the end of the work its end.

use crate::event::{Now, Order, RankKey, Refusal};
use crate::job::{EndCause, Exit, Job, JobState, Stage, Suspend, millis};
use crate::machine::{Core, Out, reached};
use crate::{Answer, RankState};
use firefly_types::{AttemptEpoch, JobId};
use std::time::Duration;

/// Window of the limit on suspensions.
const HOUR_MS: u64 = 3_600_000;

impl Job {
    /// Suspensions within the last hour.
    pub(crate) fn suspended_lately(&self, now: Now) -> usize {
        self.suspended_unix_ms.iter().filter(|at| now.unix_ms.saturating_sub(**at) < HOUR_MS).count()
    }

    /// Takes a new measurement of the cost of a suspension into the smoothed value.
    pub(crate) fn measure_suspend_cost(&mut self, ms: u64) {
        let ms = ms.max(1);
        self.suspend_cost_ms =
            if self.suspend_cost_ms == 0 { ms } else { (3 * self.suspend_cost_ms + ms).div_ceil(4) };
    }
}

impl Core {
    /// Time that the job has to save.
    pub(crate) fn suspend_grace(&self, job: &Job) -> Duration {
        let own = job.spec.suspend_grace_ms;
        Duration::from_millis(u64::from(if own > 0 { own } else { self.policy.suspend_grace_ms }))
    }

    /// A person's wish: the job gives its nodes back and is held.
    pub(crate) fn suspend_for_person(&mut self, id: JobId, reason: String, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get(&id) else { return out.refuse(Refusal::NoJob(id)) };
        let reason = if reason.is_empty() { "suspended by a person".to_owned() } else { reason };
        match job.state {
            JobState::Pending | JobState::Held => return self.hold(id, reason, now, out),
            JobState::Running | JobState::Suspending => {}
            _ => {
                let what = format!("{id} does not run: `ff job hold` keeps it from starting");
                return out.refuse(Refusal::NotNow(what));
            }
        }
        let attempt = job.attempt().filter(|a| matches!(a.stage, Stage::Running | Stage::Suspending));
        let Some(attempt) = attempt else {
            return out.refuse(Refusal::NotNow(format!("{id} is being ended already")));
        };
        if !self.can_suspend(job, attempt) {
            let who = if job.spec.suspendable { "the agents of its nodes do" } else { "the job does" };
            return out.refuse(Refusal::NotNow(format!(
                "{id} cannot be suspended: {who} not take part in the suspend handshake; `ff job stop` ends it"
            )));
        }
        if attempt.stage == Stage::Running {
            self.suspend(id, reason.clone(), true, now, out);
        } else if let Some(suspend) =
            self.jobs.get_mut(&id).and_then(|j| j.attempts.last_mut()).and_then(|a| a.suspend.as_mut())
        {
            suspend.hold = true;
        }
        if let Some(job) = self.jobs.get_mut(&id) {
            job.hold = Some(reason);
        }
        out.dirty_jobs.insert(id);
        out.answer = Some(Answer::Job(id));
    }

    /// Asks a running attempt to save and give its nodes back.
    pub(crate) fn suspend(&mut self, id: JobId, reason: String, hold: bool, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(attempt) = job.attempts.last_mut().filter(|a| a.stage == Stage::Running) else { return };
        reached!(self, "suspensions");
        attempt.stage = Stage::Suspending;
        attempt.since = now.mono;
        attempt.suspend =
            Some(Suspend { reason: reason.clone(), hold, received: false, saved: None, since: now.mono });
        job.state = JobState::Suspending;
        job.reason.clone_from(&reason);
        job.version += 1;
        let epoch = attempt.epoch;
        out.notes.push((id, epoch, format!("attempt {} is asked to give way: {reason}", epoch.0)));
        out.dirty_jobs.insert(id);
        let Some(job) = self.jobs.get(&id) else { return };
        let grace = self.suspend_grace(job);
        for slot in job.attempt().into_iter().flat_map(|a| &a.ranks).filter(|r| r.state.is_live()) {
            let key = RankKey { job: id, epoch, rank: slot.rank };
            out.orders.push((slot.node, Order::Suspend { key, grace }));
        }
        self.watch_attempt(id, now);
    }

    /// The order that a rank of a suspending attempt has outstanding.
    pub(crate) fn suspend_order(&self, key: RankKey) -> Option<Order> {
        let grace = self.suspend_grace(self.jobs.get(&key.job)?);
        Some(Order::Suspend { key, grace })
    }

    /// Whether a rank's end within the grace is part of giving way.
    pub(crate) fn is_suspension(&self, job: &Job, exit: &Exit) -> bool {
        let Some(suspend) = job.attempt().and_then(|a| a.suspend.as_ref()) else { return false };
        let agreed = exit.code == Some(self.policy.suspended_exit_code);
        let acked = suspend.received || suspend.saved.is_some();
        exit.signal.is_none() && (agreed || (acked && exit.code == Some(0)))
    }

    /// A rank of a suspending attempt is over.
    pub(crate) fn exited_suspending(
        &mut self,
        id: JobId,
        exit: &Exit,
        reason: String,
        now: Now,
        out: &mut Out,
    ) {
        let Some(job) = self.jobs.get(&id) else { return };
        let success = exit.code == Some(0) && exit.signal.is_none();
        if !success && !self.is_suspension(job, exit) {
            return self.begin_end(id, EndCause::RankFailed, reason, now, out);
        }
        let Some(attempt) = job.attempt().filter(|a| a.is_over()) else { return };
        let gave_way = attempt.ranks.iter().any(|r| match &r.state {
            RankState::Exited(exit) => self.is_suspension(job, exit),
            _ => false,
        });
        let why = attempt.suspend.as_ref().map(|s| s.reason.clone()).unwrap_or_default();
        if gave_way {
            self.begin_end(id, EndCause::Suspended, why, now, out);
        } else {
            // It had come to its end by itself.
            self.begin_end(id, EndCause::Completed, "every rank exited with code 0".into(), now, out);
        }
    }

    /// The grace is over.
    pub(crate) fn suspend_timeout(&mut self, id: JobId, epoch: AttemptEpoch, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get(&id).filter(|j| j.epoch() == epoch) else { return };
        let Some(attempt) = job.attempt().filter(|a| a.stage == Stage::Suspending) else { return };
        let Some(suspend) = &attempt.suspend else { return };
        let grace = self.suspend_grace(job);
        if now.mono.since(suspend.since) < grace {
            return self.watch_attempt(id, now);
        }
        reached!(self, "forced suspensions");
        let came = match (suspend.received, suspend.saved) {
            (_, Some(step)) => format!("step {step} was saved"),
            (true, None) => "the request was seen, nothing was saved".into(),
            (false, None) => "the request was not even seen".into(),
        };
        let reason = format!("{}; not over after {} ms: {came}", suspend.reason, grace.as_millis());
        self.begin_end(id, EndCause::SuspendForced, reason, now, out);
    }

    /// An attempt that was asked to give way is over: remember when, and what it cost.
    pub(crate) fn suspended(&mut self, id: JobId, now: Now) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.suspensions += 1;
        job.suspended_unix_ms.retain(|at| now.unix_ms.saturating_sub(*at) < HOUR_MS);
        job.suspended_unix_ms.push(now.unix_ms);
        let since = job.attempt().and_then(|a| a.suspend.as_ref()).map(|s| s.since);
        job.half_cost_ms = since.map(|s| millis(now.mono.since(s)));
        // In an hour it may give way again.
        let at = now.mono.after(Duration::from_millis(HOUR_MS));
        self.timers.set(at, crate::timers::Timer::Memory(id));
    }
}
