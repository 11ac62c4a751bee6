//! Faults of nodes and what follows: whom to blame, whom to keep away, when to stop trusting the
//! alarm; maintenance; the breakers of loops.

use crate::event::{Answer, Now, Record, Refusal};
use crate::job::{EndCause, Job, RankState, Stage};
use crate::machine::{Core, Out, planted, reached};
use crate::node::Node;
use crate::timers::Timer;
use firefly_types::{AttemptEpoch, JobId, NodeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;

/// What a check of a node found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// An accelerator.
    Gpu,
    /// A link or an adapter.
    Network,
    /// A mount or a disk.
    Storage,
    /// Anything else of the machine.
    Host,
}

impl Fault {
    /// What it means for an attempt on the node.
    pub fn cause(self) -> EndCause {
        match self {
            Fault::Gpu => EndCause::GpuFault,
            Fault::Network => EndCause::NetworkFault,
            Fault::Storage => EndCause::StorageFault,
            Fault::Host => EndCause::HostFault,
        }
    }
}

/// Nodes set aside for a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maintenance {
    /// Names the window.
    pub id: u32,
    /// Which nodes.
    pub nodes: BTreeSet<NodeId>,
    /// Milliseconds since 1970.
    pub from_unix_ms: u64,
    /// Milliseconds since 1970.
    pub until_unix_ms: u64,
    /// Why.
    pub reason: String,
}

impl Core {
    pub(crate) fn cordon(&mut self, id: NodeId, cordon: bool, reason: String, out: &mut Out) {
        let Some(node) = self.nodes.get_mut(&id) else { return out.refuse(Refusal::NoNode(id)) };
        node.record.cordon = cordon.then_some(reason);
        node.record.auto_cordon_unix_ms = 0;
        if !cordon {
            // A person trusts it again.
            node.strikes.clear();
        }
        out.dirty_nodes.insert(id);
        out.answer = Some(Answer::Node(id));
        self.reindex(id);
    }

    pub(crate) fn health(
        &mut self,
        id: NodeId,
        fault: Fault,
        critical: bool,
        evidence: &str,
        now: Now,
        out: &mut Out,
    ) {
        let Some(node) = self.nodes.get(&id) else { return out.refuse(Refusal::NoNode(id)) };
        out.answer = Some(Answer::Node(id));
        let jobs: Vec<JobId> = node.jobs().collect();
        let reason = format!("{fault:?} fault of {id}: {evidence}");
        if !critical {
            // Without a job it is one more look at the same thing: strikes count by job.
            for job in jobs {
                self.blame(id, job, &reason, now, out);
            }
            return;
        }
        for job in jobs {
            self.blame(id, job, &reason, now, out);
            self.begin_end(job, fault.cause(), reason.clone(), now, out);
        }
        self.auto_cordon(id, &reason, now, out);
    }

    /// Nothing runs on the node: what we thought of it is over.
    pub(crate) fn fenced(&mut self, id: NodeId, by: &str, now: Now, out: &mut Out) {
        let Some(node) = self.nodes.get_mut(&id) else { return out.refuse(Refusal::NoNode(id)) };
        node.connected = false;
        node.heard = false;
        node.strays.clear();
        out.answer = Some(Answer::Node(id));
        self.reindex(id);
        for (job, rank) in self.ranks_on(id) {
            let Some(owner) = self.jobs.get(&job) else { continue };
            let (key, stage) = (owner.key_of(rank), owner.attempt().map(|a| a.stage));
            self.set_state(key, RankState::Fenced, now, out);
            match stage {
                Some(Stage::Ended) | None => {}
                Some(Stage::Ending) => self.end_if_over(job, now, out),
                _ => {
                    let reason = format!("{id} is off, says {by}; rank {} ran there", rank.0);
                    self.blame(id, job, &reason, now, out);
                    self.begin_end(job, EndCause::NodeLost, reason, now, out);
                }
            }
        }
    }

    /// A node did a job harm: the job stays away from it for a while, and a node that harms several
    /// jobs is set aside.
    pub(crate) fn blame(&mut self, id: NodeId, job: JobId, reason: &str, now: Now, out: &mut Out) {
        let until = now.unix_ms.saturating_add(self.policy.avoid_ms);
        if let Some(owner) = self.jobs.get_mut(&job) {
            owner.avoid.retain(|_, until| *until > now.unix_ms);
            owner.avoid.insert(id, until);
            while owner.avoid.len() > self.policy.most_avoided {
                let Some(oldest) = owner.avoid.iter().min_by_key(|(_, u)| **u).map(|(n, _)| *n) else {
                    break;
                };
                owner.avoid.remove(&oldest);
            }
            out.dirty_jobs.insert(job);
            let at = now.mono.after(Duration::from_millis(self.policy.avoid_ms));
            self.timers.set(at, Timer::Memory(job));
        }
        let window = Duration::from_millis(self.policy.strike_window_ms);
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.strikes.retain(|(at, other)| now.mono.since(*at) < window && *other != job);
        node.strikes.push((now.mono, job));
        if node.strikes.len() >= self.policy.strikes && self.policy.strikes > 0 {
            let reason = format!("{} jobs came to harm here; the last: {reason}", node.strikes.len());
            self.auto_cordon(id, &reason, now, out);
        }
    }

    /// Sets a node aside without a person, within limits: many alarms at a time mean that the
    /// checker or the switch is broken, not the nodes.
    fn auto_cordon(&mut self, id: NodeId, reason: &str, now: Now, out: &mut Out) {
        let window = Duration::from_millis(self.policy.auto_cordon_window_ms);
        while self.auto_cordons.front().is_some_and(|(at, _)| now.mono.since(*at) >= window) {
            self.auto_cordons.pop_front();
        }
        let Some(node) = self.nodes.get(&id).filter(|n| n.record.cordon.is_none()) else { return };
        let same_group = |n: &Node| n.record.info.group == node.record.info.group;
        let same_leaf = |n: &Node| same_group(n) && n.record.info.place == node.record.info.place;
        let cordoned = |same: &dyn Fn(&Node) -> bool| {
            self.auto_cordons.iter().filter(|(_, n)| self.nodes.get(n).is_some_and(same)).count()
        };
        let most = |percent: u32, same: &dyn Fn(&Node) -> bool| {
            let all = self.nodes.values().filter(|n| same(n)).count();
            (all * percent as usize / 100).max(1)
        };
        let within = cordoned(&same_group) < most(self.policy.auto_cordon_percent, &same_group)
            && cordoned(&same_leaf) < most(self.policy.auto_cordon_leaf_percent, &same_leaf);
        if !within && !planted!(self, AutoCordonUncapped) {
            reached!(self, "capped cordons");
            return;
        }
        reached!(self, "auto cordons");
        if let Some(node) = self.nodes.get_mut(&id) {
            node.record.cordon = Some(reason.to_owned());
            node.record.auto_cordon_unix_ms = now.unix_ms.max(1);
        }
        self.auto_cordons.push_back((now.mono, id));
        out.dirty_nodes.insert(id);
        self.reindex(id);
    }

    pub(crate) fn progress(
        &mut self,
        id: JobId,
        epoch: AttemptEpoch,
        step: u64,
        saved: bool,
        now: Now,
        out: &mut Out,
    ) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(attempt) = job.attempts.last_mut().filter(|a| a.epoch == epoch) else { return };
        if !matches!(attempt.stage, Stage::Running | Stage::Suspending) {
            return;
        }
        if step > attempt.step {
            attempt.step = step;
            attempt.progress_at = now.mono;
        }
        if saved {
            attempt.saved_at = now.mono;
            if let Some(suspend) = &mut attempt.suspend {
                suspend.saved = Some(step);
            }
            if step > job.saved_step {
                job.saved_step = step;
                job.no_progress = 0;
                out.dirty_jobs.insert(id);
            }
        }
    }

    pub(crate) fn progress_timeout(&mut self, id: JobId, epoch: AttemptEpoch, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get(&id) else { return };
        let Some(attempt) = job.attempt().filter(|a| a.epoch == epoch && a.stage == Stage::Running) else {
            return;
        };
        let limit = Duration::from_millis(job.spec.progress_timeout_ms);
        if limit.is_zero() {
            return;
        }
        if now.mono.since(attempt.progress_at) < limit {
            return self.watch_attempt(id, now);
        }
        let reason = format!("no progress for {} s after step {}", limit.as_secs(), attempt.step);
        self.begin_end(id, EndCause::Hang, reason, now, out);
    }

    pub(crate) fn time_limit(&mut self, id: JobId, epoch: AttemptEpoch, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get(&id).filter(|j| j.epoch() == epoch) else { return };
        let running = job.attempt().is_some_and(|a| matches!(a.stage, Stage::Running | Stage::Suspending));
        let limit = job.spec.time_limit_ms;
        if running && limit > 0 && job.ran(now.mono) >= limit {
            let reason = format!("it ran for its whole time limit of {limit} ms");
            self.begin_end(id, EndCause::TimeLimit, reason, now, out);
        }
    }

    pub(crate) fn demote(&mut self, id: JobId, epoch: AttemptEpoch, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get(&id).filter(|j| j.epoch() == epoch && !j.state.is_final()) else {
            return;
        };
        let ran = job.ran(now.mono);
        let rule =
            self.policy.demotions.iter().find(|r| r.from == job.priority && ran >= r.after_ms).copied();
        if let Some(rule) = rule {
            reached!(self, "demotions");
            let text = format!("its priority is {} from now on: it has run for {ran} ms", rule.to);
            out.notes.push((id, epoch, text));
            self.change_order(id, now, out, |j| j.priority = rule.to);
            self.watch_attempt(id, now);
        }
    }

    pub(crate) fn maintain(&mut self, window: Maintenance, now: Now, out: &mut Out) {
        if window.until_unix_ms <= window.from_unix_ms || window.until_unix_ms <= now.unix_ms {
            let what = "a maintenance window must end after it begins, and in the future";
            return out.refuse(Refusal::Invalid(what.into()));
        }
        if let Some(unknown) = window.nodes.iter().find(|n| !self.nodes.contains_key(n)) {
            return out.refuse(Refusal::NoNode(*unknown));
        }
        let id = window.id;
        self.close_window(id);
        self.windows.insert(id, window.clone());
        out.records.push(Record::Maintenance(window));
        out.answer = Some(Answer::Site);
        self.window_timer(id, now, out);
    }

    pub(crate) fn cancel_maintenance(&mut self, id: u32, out: &mut Out) {
        if self.windows.remove(&id).is_none() {
            return out.refuse(Refusal::NoMaintenance(id));
        }
        self.close_window(id);
        out.records.push(Record::RemoveMaintenance(id));
        out.answer = Some(Answer::Site);
        self.forget_tries();
    }

    fn close_window(&mut self, id: u32) {
        let nodes: Vec<NodeId> =
            self.nodes.values().filter(|n| n.maintenance.contains(&id)).map(|n| n.record.id).collect();
        for node in nodes {
            if let Some(n) = self.nodes.get_mut(&node) {
                n.maintenance.remove(&id);
            }
            self.reindex(node);
        }
    }

    /// A window comes near, opens or closes.
    pub(crate) fn window_timer(&mut self, id: u32, now: Now, out: &mut Out) {
        let Some(window) = self.windows.get(&id).cloned() else { return };
        let lead = window.from_unix_ms.saturating_sub(self.policy.maintenance_lead_ms);
        let edges = [lead, window.from_unix_ms, window.until_unix_ms];
        if let Some(next) = edges.into_iter().find(|at| *at > now.unix_ms) {
            let at = now.mono.after(Duration::from_millis(next - now.unix_ms));
            self.timers.set(at, Timer::Maintenance(id));
        }
        self.forget_tries();
        if now.unix_ms >= window.until_unix_ms {
            self.windows.remove(&id);
            self.close_window(id);
            out.records.push(Record::RemoveMaintenance(id));
        } else if now.unix_ms >= window.from_unix_ms {
            reached!(self, "maintenance windows");
            for node in &window.nodes {
                let Some(n) = self.nodes.get_mut(node).filter(|n| !n.maintenance.contains(&id)) else {
                    continue;
                };
                n.maintenance.insert(id);
                let jobs: Vec<JobId> = n.jobs().collect();
                self.reindex(*node);
                for job in jobs {
                    let can = self
                        .jobs
                        .get(&job)
                        .is_some_and(|j| j.attempt().is_some_and(|a| self.can_suspend(j, a)));
                    // The others finish first: the window opens for them when they end.
                    if can {
                        let reason = format!("maintenance of {node}: {}", window.reason);
                        self.suspend(job, reason, false, now, out);
                    }
                }
            }
        }
    }

    /// Nodes on which the job could run into a maintenance window that it cannot give way to.
    pub(crate) fn closing_nodes(&self, job: &Job, now: Now) -> BTreeSet<NodeId> {
        let mut closing = BTreeSet::new();
        for window in self.windows.values() {
            let near = now.unix_ms.saturating_add(self.policy.maintenance_lead_ms) >= window.from_unix_ms;
            let left = job.spec.time_limit_ms.saturating_sub(job.ran_ms);
            let in_time =
                job.spec.time_limit_ms > 0 && now.unix_ms.saturating_add(left) <= window.from_unix_ms;
            if near && !in_time {
                closing.extend(window.nodes.iter().filter(|n| {
                    let can = self.nodes.get(n).is_some_and(|n| n.record.info.can_suspend);
                    !(can && job.spec.suspendable)
                }));
            }
        }
        closing
    }
}
