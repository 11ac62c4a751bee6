//! How attempts end and what follows.

use crate::event::{Now, Order, RankKey};
use crate::job::{EndCause, Job, JobState, RankState, Stage};
use crate::machine::{Core, Out, planted};
use firefly_types::{JobId, NodeId};
use std::cmp::Reverse;
use std::time::Duration;

/// What follows from a cause.
enum Verdict {
    Final(JobState),
    /// Try again if the limits allow; `counts`: against `max_restarts`.
    Again {
        counts: bool,
    },
}

fn verdict(cause: EndCause) -> Verdict {
    match cause {
        EndCause::Completed => Verdict::Final(JobState::Succeeded),
        EndCause::Stopped => Verdict::Final(JobState::Stopped),
        EndCause::RankFailed => Verdict::Again { counts: true },
        EndCause::NodeLost | EndCause::StartTimeout => Verdict::Again { counts: false },
    }
}

impl Core {
    /// Ends the newest attempt: the first cause stands, every rank that may still run is stopped.
    pub(crate) fn begin_end(&mut self, id: JobId, cause: EndCause, reason: String, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let grace = Duration::from_millis(job.spec.grace_ms.into());
        let Some(attempt) = job.attempts.last_mut() else { return };
        if matches!(attempt.stage, Stage::Preparing | Stage::Running) {
            let ran =
                if attempt.stage == Stage::Running { now.mono.since(attempt.since) } else { Duration::ZERO };
            job.unstable = if ran >= Duration::from_millis(self.policy.stable_after_ms) {
                1
            } else {
                job.unstable.saturating_add(1)
            };
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
        // A person's wish wins over every restart.
        if let Some(reason) = job.stop.clone().filter(|_| cause != EndCause::Completed && !forget_stop) {
            return self.finish(id, JobState::Stopped, reason, now, out);
        }
        let counts = match verdict(cause) {
            Verdict::Final(state) => return self.finish(id, state, evidence, now, out),
            Verdict::Again { counts } => counts,
        };
        if counts && job.failures >= job.spec.max_restarts {
            let reason = match job.spec.max_restarts {
                0 => evidence,
                n => format!("{evidence} (all {n} restarts are used up)"),
            };
            return self.finish(id, JobState::Failed, reason, now, out);
        }
        if !counts && job.unstable >= self.policy.most_unstable {
            let reason = format!("{evidence} ({} attempts in a row came to nothing)", job.unstable);
            return self.finish(id, JobState::Failed, reason, now, out);
        }
        let delay = self.policy.restart_delay(job.unstable);
        job.failures += u32::from(counts);
        job.state = JobState::Pending;
        job.delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        job.not_before = now.mono.after(delay);
        job.reason = format!("attempt {} ended: {evidence}", epoch.0);
        self.pending.insert((Reverse(job.spec.priority), id));
        self.settle(id);
    }

    /// Ends a job for good.
    pub(crate) fn finish(&mut self, id: JobId, state: JobState, reason: String, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        self.pending.remove(&(Reverse(job.spec.priority), id));
        let verb = match state {
            JobState::Succeeded => "succeeded",
            JobState::Stopped => "was stopped",
            _ => "failed",
        };
        out.notes.push((id, job.epoch(), format!("job {id} {verb}: {reason}")));
        job.state = state;
        job.reason = reason;
        job.ended_unix_ms = now.unix_ms;
        job.version += 1;
        self.finished.insert(id);
        out.dirty_jobs.insert(id);
        self.settle(id);
    }

    /// Drops the job from the active ones when nothing of it is left on any node.
    pub(crate) fn settle(&mut self, id: JobId) {
        let busy = |job: &Job| {
            matches!(job.state, JobState::Starting | JobState::Running | JobState::Stopping)
                || job.unproven().next().is_some()
        };
        if !self.jobs.get(&id).is_some_and(busy) {
            self.active.remove(&id);
        }
    }

    /// A node has been silent for its whole lease: its ranks are lost.
    pub(crate) fn lose_node(&mut self, node: NodeId, silence: Duration, now: Now, out: &mut Out) {
        let ranks: Vec<_> =
            self.nodes.get(&node).map(|n| n.ranks.iter().copied().collect()).unwrap_or_default();
        for (id, rank) in ranks {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            let Some(attempt) = job.attempts.last_mut() else { continue };
            let Some(slot) = attempt.ranks.get_mut(rank.0 as usize).filter(|s| s.state.is_live()) else {
                continue;
            };
            slot.state = RankState::Lost;
            job.version += 1;
            out.dirty_jobs.insert(id);
            let reason =
                format!("{node} has been silent for {} s; rank {} ran there", silence.as_secs(), rank.0);
            self.begin_end(id, EndCause::NodeLost, reason, now, out);
        }
    }

    /// A node has been silent for so long that its shims have ended what they held.
    pub(crate) fn fence_node(&mut self, node: NodeId, _now: Now, out: &mut Out) {
        let ranks: Vec<_> =
            self.nodes.get(&node).map(|n| n.ranks.iter().copied().collect()).unwrap_or_default();
        for (id, rank) in ranks {
            let Some(job) = self.jobs.get(&id) else { continue };
            let key = job.key_of(rank);
            if job.unproven().any(|s| s.rank == rank) {
                self.set_state(key, RankState::Fenced, out);
            }
        }
    }
}
