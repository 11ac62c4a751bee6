//! How attempts end and what follows.

use crate::event::{Now, Order, RankKey};
use crate::job::{EndCause, JobState, RankState, Stage, millis};
use crate::machine::{Core, Out, is_busy, planted, reached};
use crate::spec::After;
use firefly_types::{JobId, NodeId};
use std::time::Duration;

/// What follows from a cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The job is over.
    Final(JobState),
    /// It failed by itself: try again if `max_restarts` allows.
    Own,
    /// Something else failed: try again, before its equals.
    Foreign,
    /// Nothing failed: it goes on when its turn comes.
    Later,
}

/// The table: cause to consequence.
pub(crate) fn verdict(cause: EndCause) -> Verdict {
    match cause {
        EndCause::Completed => Verdict::Final(JobState::Succeeded),
        EndCause::Stopped => Verdict::Final(JobState::Stopped),
        EndCause::TimeLimit => Verdict::Final(JobState::Failed),
        EndCause::RankFailed | EndCause::Hang => Verdict::Own,
        EndCause::NodeLost
        | EndCause::StartTimeout
        | EndCause::GpuFault
        | EndCause::NetworkFault
        | EndCause::StorageFault
        | EndCause::HostFault => Verdict::Foreign,
        EndCause::Suspended | EndCause::SuspendForced => Verdict::Later,
    }
}

impl Core {
    /// Ends the newest attempt: the first cause stands, every rank that may still run is stopped.
    pub(crate) fn begin_end(&mut self, id: JobId, cause: EndCause, reason: String, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let grace = Duration::from_millis(job.spec.grace_ms.into());
        let Some(attempt) = job.attempts.last_mut() else { return };
        if matches!(attempt.stage, Stage::Preparing | Stage::Running | Stage::Suspending) {
            let ran = match attempt.stage {
                Stage::Preparing => Duration::ZERO,
                _ => now.mono.since(attempt.running_since),
            };
            job.ran_ms += millis(ran);
            if matches!(verdict(cause), Verdict::Own | Verdict::Foreign) {
                let stable = ran >= Duration::from_millis(self.policy.stable_after_ms);
                job.unstable = if stable { 1 } else { job.unstable.saturating_add(1) };
                // Only a job that tells of its steps can be seen not to come forward.
                if attempt.step > 0 {
                    job.no_progress = job.no_progress.saturating_add(1);
                }
            }
            // What did not give way in time gets no second grace.
            let grace = if cause == EndCause::SuspendForced { Duration::ZERO } else { grace };
            attempt.stage = Stage::Ending;
            attempt.since = now.mono;
            attempt.cause = Some(cause);
            attempt.end_reason = reason;
            job.version += 1;
            let epoch = attempt.epoch;
            for slot in attempt.ranks.iter().filter(|r| r.state.is_live()) {
                let key = RankKey { job: id, epoch, rank: slot.rank };
                out.orders.push((slot.node, Order::Stop { key, grace }));
            }
            out.dirty_jobs.insert(id);
        }
        self.end_if_over(id, now, out);
    }

    /// Closes the attempt once no rank can still run, and decides what follows.
    pub(crate) fn end_if_over(&mut self, id: JobId, now: Now, out: &mut Out) {
        let forget_stop = planted!(self, StopForgottenOnRestart);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(attempt) = job.attempts.last_mut() else { return };
        if attempt.stage != Stage::Ending || !attempt.is_over() {
            return;
        }
        attempt.stage = Stage::Ended;
        attempt.ended_unix_ms = now.unix_ms;
        job.version += 1;
        let epoch = attempt.epoch;
        for slot in attempt.ranks.iter().filter(|r| matches!(r.state, RankState::Exited(_))) {
            let key = RankKey { job: id, epoch, rank: slot.rank };
            out.orders.push((slot.node, Order::Forget { key }));
        }
        out.notes.push((id, epoch, format!("attempt {} ended: {}", epoch.0, attempt.end_reason)));
        out.dirty_jobs.insert(id);
        let cause = attempt.cause.unwrap_or(EndCause::RankFailed);
        let evidence = attempt.end_reason.clone();
        let was_asked = attempt.suspend.is_some();
        // A person's wish wins over every restart.
        if let Some(reason) = job.stop.clone().filter(|_| cause != EndCause::Completed && !forget_stop) {
            return self.finish(id, JobState::Stopped, reason, now, out);
        }
        job.recovering = false;
        let (mut delay, reason) = (Duration::ZERO, format!("attempt {} ended: {evidence}", epoch.0));
        match verdict(cause) {
            Verdict::Final(state) => return self.finish(id, state, evidence, now, out),
            Verdict::Own if job.failures >= job.spec.max_restarts => {
                let reason = match job.spec.max_restarts {
                    0 => evidence,
                    n => format!("{evidence} (all {n} restarts are used up)"),
                };
                return self.finish(id, JobState::Failed, reason, now, out);
            }
            Verdict::Own => {
                job.failures += 1;
                delay = self.policy.restart_delay(job.unstable);
            }
            Verdict::Foreign if job.unstable >= self.policy.most_unstable => {
                let reason = format!("{evidence} ({} attempts in a row came to nothing)", job.unstable);
                return self.finish(id, JobState::Failed, reason, now, out);
            }
            Verdict::Foreign => {
                job.recovering = true;
                delay = self.policy.restart_delay(job.unstable);
            }
            Verdict::Later => {}
        }
        if verdict(cause) != Verdict::Later
            && self.policy.no_progress > 0
            && job.no_progress >= self.policy.no_progress
        {
            reached!(self, "no-progress breakers");
            job.hold = Some(format!(
                "{} attempts in a row ended without a new saved step; the last: {evidence}. Mend it, then `ff job resume {id}`",
                job.no_progress
            ));
        }
        job.state = JobState::Pending;
        job.delay_ms = millis(delay);
        job.not_before = now.mono.after(delay);
        job.reason = reason;
        if verdict(cause) == Verdict::Later && was_asked {
            self.suspended(id, now);
        }
        self.settle(id);
        self.enqueue(id, now, out);
    }

    /// Ends a job for good, and with it those that needed its success.
    pub(crate) fn finish(&mut self, id: JobId, state: JobState, reason: String, now: Now, out: &mut Out) {
        self.finish_one(id, state, reason, now, out);
        // Chains can be long: no recursion.
        let mut ended = vec![(id, state)];
        while let Some((other, state)) = ended.pop() {
            for id in self.dependents.take(other) {
                let Some(job) = self.jobs.get_mut(&id).filter(|j| !j.state.is_final()) else { continue };
                let needed = job.waits_for.iter().any(|d| d.job == other && d.after == After::Success);
                if needed && state != JobState::Succeeded {
                    reached!(self, "failed dependencies");
                    let reason = format!("it needed {other} to succeed, and that did not happen");
                    self.finish_one(id, JobState::Failed, reason, now, out);
                    ended.push((id, JobState::Failed));
                } else {
                    job.waits_for.retain(|d| d.job != other);
                    job.version += 1;
                    out.dirty_jobs.insert(id);
                    self.enqueue(id, now, out);
                }
            }
        }
    }

    fn finish_one(&mut self, id: JobId, state: JobState, reason: String, now: Now, out: &mut Out) {
        self.queue.remove(id);
        self.waiting.remove(&id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let verb = match state {
            JobState::Succeeded => "succeeded",
            JobState::Stopped => "was stopped",
            _ => "failed",
        };
        out.notes.push((id, job.epoch(), format!("job {id} {verb}: {reason}")));
        job.state = state;
        job.reason = reason;
        job.ended_unix_ms = now.unix_ms;
        job.waits_for.clear();
        job.hold = None;
        job.version += 1;
        self.finished.insert((now.unix_ms, id));
        out.dirty_jobs.insert(id);
        self.settle(id);
        self.dirty = true;
    }

    /// Drops the job from the active ones when nothing of it is left on any node.
    pub(crate) fn settle(&mut self, id: JobId) {
        if !self.jobs.get(&id).is_some_and(is_busy) {
            self.active.remove(&id);
        }
    }

    /// A node has been silent for its whole lease: its ranks are lost.
    pub(crate) fn lose_node(&mut self, node: NodeId, silence: Duration, now: Now, out: &mut Out) {
        for (id, rank) in self.ranks_on(node) {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            let Some(attempt) = job.attempts.last_mut() else { continue };
            let Some(slot) = attempt.ranks.get(rank.0 as usize).filter(|s| s.state.is_live()) else {
                continue;
            };
            let rank = slot.rank;
            attempt.set(rank, RankState::Lost);
            job.version += 1;
            out.dirty_jobs.insert(id);
            let reason =
                format!("{node} has been silent for {} s; rank {} ran there", silence.as_secs(), rank.0);
            self.blame(node, id, &reason, now, out);
            self.begin_end(id, EndCause::NodeLost, reason, now, out);
        }
    }

    /// A node has been silent for so long that its shims have ended what they held.
    pub(crate) fn fence_node(&mut self, node: NodeId, now: Now, out: &mut Out) {
        for (id, rank) in self.ranks_on(node) {
            let Some(job) = self.jobs.get(&id) else { continue };
            let key = job.key_of(rank);
            if job.unproven().any(|s| s.rank == rank) {
                self.set_state(key, RankState::Fenced, now, out);
            }
        }
    }
}
