//! The judge's own books: what the core promises, computed from what it decided, not from what it
//! remembers.

use super::world::{Check, Seen};
use crate::*;
use firefly_types::{AttemptEpoch, JobId, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// What was seen so far.
#[derive(Default)]
pub(crate) struct Books {
    pub(super) stop_promised: BTreeSet<JobId>,
    /// Jobs that people hold, with the newest attempt at that time: it goes on.
    pub(super) held: BTreeMap<JobId, AttemptEpoch>,
    pub(super) finals: BTreeMap<JobId, JobState>,
    dependencies: BTreeMap<JobId, Vec<Dependency>>,
    /// Newest attempt that the books know of each job.
    epochs: BTreeMap<JobId, AttemptEpoch>,
    /// When each attempt's barrier opened, as ordered.
    running_since: BTreeMap<(JobId, AttemptEpoch), u64>,
    /// Attempts that were asked to give way.
    asked: BTreeSet<(JobId, AttemptEpoch)>,
    /// What jobs that are gone used, by user.
    gone: BTreeMap<String, Usage>,
    /// Cordons without a person: when, and which.
    cordons: Vec<(u64, NodeId)>,
}

impl Books {
    /// Judges one step of the core.
    pub(super) fn after_step(&mut self, core: &Core, now: Now, decisions: &[Decision]) -> Check {
        for decision in decisions {
            if let Decision::Order { order: Order::Start { key, .. }, .. } = decision
                && key.rank.0 == 0
            {
                self.running_since.entry((key.job, key.epoch)).or_insert(now.unix_ms);
            }
        }
        self.starts(core)?;
        self.displacements(core, now, decisions)?;
        self.zones(core)?;
        self.accounts(core)
    }

    /// New attempts of this step: within quota, gangs whole, in the zones that they may span.
    fn starts(&mut self, core: &Core) -> Check {
        let mut fresh = Vec::new();
        for job in core.jobs() {
            let epoch = job.epoch();
            if epoch.0 > 0 && self.epochs.insert(job.id, epoch) < Some(epoch) {
                fresh.push(job);
            }
        }
        for job in fresh {
            let Some(attempt) = job.attempt().filter(|a| a.stage == Stage::Preparing) else { continue };
            if attempt.opportunistic.is_some() {
                continue;
            }
            let (mut nodes, mut gpus) = (0, 0);
            for other in core.jobs() {
                let same = other.spec.user == job.spec.user
                    && other.spec.group == job.spec.group
                    && other.priority == job.priority;
                let Some(a) = other.attempt().filter(|a| same && a.opportunistic.is_none()) else { continue };
                for seat in a.seats.iter().filter(|s| s.returned_unix_ms == 0) {
                    nodes += u32::from(other.spec.whole());
                    gpus += seat.amount.gpus;
                }
            }
            let quota = core.policy().quotas.iter().rfind(|q| q.user == job.spec.user || q.user == "*");
            let own = core.policy().quotas.iter().rfind(|q| q.user == job.spec.user).or(quota);
            if let Some(q) = own
                && (q.nodes.is_some_and(|n| nodes > n) || q.gpus.is_some_and(|n| gpus > n))
            {
                return Err(format!("{} holds {nodes} nodes and {gpus} GPUs of {q}", job.spec.user));
            }
        }
        Ok(())
    }

    /// Nobody gives way in vain, or too early.
    fn displacements(&mut self, core: &Core, now: Now, decisions: &[Decision]) -> Check {
        for decision in decisions {
            let Decision::Order { order: Order::Suspend { key, .. }, .. } = decision else { continue };
            let Some(job) = core.job(key.job) else { continue };
            let Some(attempt) = job.attempt() else { continue };
            let reason = attempt.suspend.as_ref().map(|s| s.reason.as_str()).unwrap_or_default();
            let winner = reason.split(' ').next().and_then(|w| w.parse::<JobId>().ok());
            // Repeated orders after a reconnection were judged when they were first given.
            let first = attempt.suspend.as_ref().is_some_and(|s| s.since == now.mono)
                && key.rank.0 == 0
                && self.asked.insert((key.job, key.epoch));
            let Some(winner) = winner.filter(|_| first && reason.ends_with("needs its nodes")) else {
                continue;
            };
            if let Some(since) = self.running_since.get(&(key.job, key.epoch))
                && attempt.opportunistic.is_none()
                && attempt.running_since.0 > 0
                && now.unix_ms.saturating_sub(*since) < core.policy().quantum_ms
            {
                return Err(format!("{} gives way after {} ms", key.job, now.unix_ms - since));
            }
            let Some(waiting) = core.job(winner) else {
                return Err(format!("{winner} displaces and is gone"));
            };
            let held: Vec<&Node> = core.nodes().filter(|n| n.held_for == Some(winner)).collect();
            if waiting.state == JobState::Pending && held.len() != waiting.spec.nodes as usize {
                return Err(format!(
                    "{} gives way to {winner}, which has {} of {} nodes then; the heads are {:?}; {:#?}",
                    key.job,
                    held.len(),
                    waiting.spec.nodes,
                    core.heads,
                    core.why(winner, now)
                ));
            }
            for node in held.iter().filter(|_| waiting.spec.whole()) {
                for other in node.jobs().filter_map(|j| core.job(j)) {
                    let leaving =
                        other.attempt().is_some_and(|a| matches!(a.stage, Stage::Suspending | Stage::Ending));
                    if !leaving {
                        return Err(format!(
                            "{} gives way to {winner}, but {} stays on {}",
                            key.job, other.id, node.record.id
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    fn zones(&self, core: &Core) -> Check {
        let spans = |job: &&Job| {
            let seats = job.attempt().into_iter().flat_map(|a| &a.seats);
            let zones: BTreeSet<&str> = seats
                .clone()
                .filter_map(|s| core.node(s.node))
                .map(|n| n.record.info.place.zone.as_str())
                .collect();
            zones.len() > 1 && seats.into_iter().any(|s| s.returned_unix_ms == 0)
        };
        let crossing: Vec<JobId> = core.jobs().filter(spans).map(|j| j.id).collect();
        if crossing.len() > core.policy().cross_zone_jobs as usize {
            return Err(format!("{crossing:?} span zones at a time"));
        }
        Ok(())
    }

    /// What users are charged is the sum of the intervals.
    fn accounts(&mut self, core: &Core) -> Check {
        for job in core.jobs() {
            // Of older attempts the record has forgotten the seats.
            if job.attempts.first().is_some_and(|a| a.epoch.0 > 1) {
                continue;
            }
            let mut sum = Usage::default();
            for attempt in &job.attempts {
                for seat in attempt.seats.iter().filter(|s| s.returned_unix_ms > 0) {
                    let ms = seat.returned_unix_ms - attempt.started_unix_ms;
                    sum.add(&Usage::of(&seat.amount, job.spec.whole(), ms));
                }
            }
            if sum != job.used {
                return Err(format!("{} is charged {:?}, its seats say {sum:?}", job.id, job.used));
            }
        }
        Ok(())
    }

    /// The scheduler starts again from what is durable: cordons that people have lifted since are
    /// forgotten.
    pub(super) fn crashed(&mut self, durable: &BTreeSet<NodeId>) {
        self.cordons.retain(|(_, n)| durable.contains(n));
    }

    /// A user's account became durable: it never shrinks.
    pub(super) fn account_durable(&mut self, account: &AccountRecord) -> Check {
        let used = account.used;
        let before = self.gone.insert(account.user.clone(), used).unwrap_or_default();
        if used.node_ms < before.node_ms || used.slot_ms < before.slot_ms {
            return Err(format!("the account of {} has shrunk from {before:?} to {used:?}", account.user));
        }
        Ok(())
    }

    /// A node's record became durable.
    pub(super) fn node_durable(&mut self, core: &Core, node: &NodeRecord, now: Now) -> Check {
        if node.auto_cordon_unix_ms != now.unix_ms {
            return Ok(());
        }
        let policy = core.policy();
        self.cordons.retain(|(at, n)| {
            now.unix_ms.saturating_sub(*at) < policy.auto_cordon_window_ms && *n != node.id
        });
        self.cordons.push((now.unix_ms, node.id));
        let most = (core.nodes().count() * policy.auto_cordon_percent as usize / 100).max(1);
        if self.cordons.len() > most {
            return Err(format!(
                "{} nodes were cordoned without a person, {most} may be",
                self.cordons.len()
            ));
        }
        Ok(())
    }

    /// A record became durable.
    pub(super) fn durable(&mut self, job: &Job, seen: &mut Seen) -> Check {
        self.dependencies.entry(job.id).or_insert_with(|| job.spec.after.clone());
        if let Some(before) = self.finals.get(&job.id).filter(|s| **s != job.state) {
            return Err(format!("{} was {before:?} and became {:?}", job.id, job.state));
        }
        let mut see = |what| *seen.entry(what).or_default() += 1;
        if job.state.is_final() && self.finals.insert(job.id, job.state).is_none() {
            see(match job.state {
                JobState::Succeeded => "successes",
                JobState::Failed => "failures",
                _ => "stops",
            });
        }
        if job.state == JobState::Held {
            see("held jobs");
        }
        let Some(attempt) = job.attempt() else { return Ok(()) };
        if attempt.epoch.0 > 1 && attempt.stage == Stage::Preparing {
            see("restarts");
        }
        if attempt.ranks.iter().any(|r| r.state == RankState::Fenced) {
            see("fenced ranks");
        }
        if attempt.stage == Stage::Ended {
            see(match attempt.cause {
                Some(EndCause::NodeLost) => "lost nodes",
                Some(EndCause::StartTimeout) => "start timeouts",
                Some(EndCause::Suspended) => "ends by suspension",
                Some(EndCause::SuspendForced) => "ends by force",
                Some(EndCause::GpuFault | EndCause::NetworkFault) => "ends by GPU or network",
                Some(EndCause::StorageFault | EndCause::HostFault) => "ends by storage or host",
                Some(EndCause::Hang) => "hangs",
                Some(EndCause::TimeLimit) => "time limits",
                Some(EndCause::RankFailed) => "failed ranks",
                Some(EndCause::Completed | EndCause::Stopped) | None => "other ends",
            });
        }
        Ok(())
    }

    /// A rank of this job is ordered to prepare.
    pub(super) fn prepared(&self, key: RankKey) -> Check {
        let job = key.job;
        if self.stop_promised.contains(&job) {
            return Err(format!("{job} is prepared although it was stopped"));
        }
        if self.held.get(&job).is_some_and(|epoch| key.epoch > *epoch) {
            return Err(format!("{job} is prepared although it is held"));
        }
        for d in self.dependencies.get(&job).into_iter().flatten() {
            match self.finals.get(&d.job) {
                None => return Err(format!("{job} is prepared before the end of {}", d.job)),
                Some(JobState::Succeeded) => {}
                Some(state) if d.after == After::Success => {
                    return Err(format!("{job} is prepared although {} is {state:?}", d.job));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}
