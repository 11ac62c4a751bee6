//! The step machine: jobs and nodes as one value.

use crate::event::{Answer, Decision, Event, Now, Order, RankKey, Record, Refusal};
use crate::job::{EndCause, Job, JobState, RankState, Stage};
use crate::node::{Node, NodeInfo, NodeRecord};
use crate::policy::Policy;
use crate::spec::JobSpec;
use firefly_types::{AttemptEpoch, JobId, Nanos, NodeId, Rank};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// The whole state of the scheduler.
#[derive(Clone, Debug)]
pub struct Core {
    pub(crate) policy: Policy,
    pub(crate) jobs: BTreeMap<JobId, Job>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    /// Jobs that wait, in the order in which they are served.
    pub(crate) pending: BTreeSet<(Reverse<i32>, JobId)>,
    /// Jobs that have an attempt which is not over, or ranks whose end is not proven.
    pub(crate) active: BTreeSet<JobId>,
    pub(crate) keys: BTreeMap<String, JobId>,
    pub(crate) next_job: u64,
    /// Jobs with ranks that have ended without that being persisted: it need not be, since their
    /// nodes report it again, until another job takes their slots.
    pub(crate) unsaved: BTreeSet<JobId>,
    /// Finished jobs, for the limit on how many are kept.
    pub(crate) finished: BTreeSet<JobId>,
    #[cfg(test)]
    pub(crate) planted: Option<Planted>,
}

/// Faults that tests plant, to prove that their checkers would find them.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planted {
    PartialGang,
    BarrierOpensEarly,
    StaleEpochAccepted,
    FenceIgnored,
    OrderBeforePersist,
    SlotsOvercommitted,
    SlotLeaked,
    StopForgottenOnRestart,
}

/// Whether a test planted this fault; always false outside tests.
macro_rules! planted {
    ($core:expr, $fault:ident) => {{
        #[cfg(test)]
        let planted = $core.planted == Some(crate::machine::Planted::$fault);
        #[cfg(not(test))]
        let planted = false;
        planted
    }};
}
pub(crate) use planted;

/// What one step gathers.
#[derive(Default)]
pub(crate) struct Out {
    pub(crate) dirty_jobs: BTreeSet<JobId>,
    pub(crate) dirty_nodes: BTreeSet<NodeId>,
    pub(crate) removed: Vec<JobId>,
    pub(crate) notes: Vec<(JobId, AttemptEpoch, String)>,
    pub(crate) orders: Vec<(NodeId, Order)>,
    pub(crate) answer: Option<Answer>,
}

impl Core {
    /// An empty cluster.
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            jobs: BTreeMap::new(),
            nodes: BTreeMap::new(),
            pending: BTreeSet::new(),
            active: BTreeSet::new(),
            keys: BTreeMap::new(),
            next_job: 1,
            unsaved: BTreeSet::new(),
            finished: BTreeSet::new(),
            #[cfg(test)]
            planted: None,
        }
    }

    /// The state after a restart, from everything that was persisted. Nodes count as heard now:
    /// each gets a full lease to come back with its ranks.
    pub fn restore(policy: Policy, records: impl IntoIterator<Item = Record>, now: Now) -> Self {
        let mut core = Self::new(policy);
        for record in records {
            match record {
                Record::Job(job) => {
                    core.jobs.insert(job.id, *job);
                }
                Record::Node(node) => {
                    core.nodes.insert(node.id, Node::new(node, now.mono));
                }
                Record::RemoveJob(id) => {
                    core.jobs.remove(&id);
                }
            }
        }
        for job in core.jobs.values_mut() {
            core.next_job = core.next_job.max(job.id.0 + 1);
            if !job.key.is_empty() {
                core.keys.insert(job.key.clone(), job.id);
            }
            job.not_before = now.mono.after(Duration::from_millis(job.delay_ms));
            if let Some(attempt) = job.attempts.last_mut() {
                attempt.since = now.mono;
                for slot in attempt.ranks.iter().filter(|r| r.state.occupies()) {
                    let node =
                        core.nodes.entry(slot.node).or_insert_with(|| unknown_node(slot.node, now.mono));
                    node.ranks.insert((job.id, slot.rank));
                    core.active.insert(job.id);
                }
            }
            match job.state {
                JobState::Pending => {
                    core.pending.insert((Reverse(job.spec.priority), job.id));
                }
                state if state.is_final() => {
                    core.finished.insert(job.id);
                }
                _ => {
                    core.active.insert(job.id);
                }
            }
        }
        core
    }

    /// Everything that must be durable for [`Core::restore`].
    pub fn records(&self) -> Vec<Record> {
        let jobs = self.jobs.values().map(|j| Record::Job(Box::new(j.clone())));
        jobs.chain(self.nodes.values().map(|n| Record::Node(n.record.clone()))).collect()
    }

    /// The knobs.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// A job.
    pub fn job(&self, id: JobId) -> Option<&Job> {
        self.jobs.get(&id)
    }

    /// All jobs, oldest first.
    pub fn jobs(&self) -> impl DoubleEndedIterator<Item = &Job> {
        self.jobs.values()
    }

    /// The newest job of that name.
    pub fn job_named(&self, name: &str) -> Option<&Job> {
        self.jobs.values().rev().find(|j| j.spec.name == name)
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// Takes one event. The decisions come in the order in which they must take effect.
    pub fn step(&mut self, event: Event, now: Now) -> Vec<Decision> {
        let mut out = Out::default();
        match event {
            Event::Submit { spec, key } => self.submit(spec, key, now, &mut out),
            Event::Stop { job, reason } => self.stop(job, reason, now, &mut out),
            Event::Cordon { node, cordon, reason } => self.cordon(node, cordon, reason, &mut out),
            Event::Hello { node, info, inventory } => self.hello(node, info, &inventory, now, &mut out),
            Event::Beat { node } => self.heard(node, now),
            Event::Gone { node } => {
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.connected = false;
                }
            }
            Event::Rank { node, report } => {
                self.heard(node, now);
                self.report(node, &report, false, now, &mut out);
            }
            Event::Tick => {}
        }
        self.expire(now, &mut out);
        self.place(now, &mut out);
        self.collect(out)
    }

    fn collect(&mut self, mut out: Out) -> Vec<Decision> {
        while self.finished.len() > self.policy.finished_jobs_kept.max(1) {
            // A finished job with ranks whose end is unproven still accounts for their slots.
            let Some(&oldest) = self.finished.iter().find(|id| !self.active.contains(id)) else { break };
            self.finished.remove(&oldest);
            if let Some(job) = self.jobs.remove(&oldest) {
                self.keys.remove(&job.key);
            }
            out.dirty_jobs.remove(&oldest);
            out.removed.push(oldest);
        }
        let mut decisions = Vec::new();
        for id in &out.dirty_nodes {
            decisions.extend(self.nodes.get(id).map(|n| Decision::Persist(Record::Node(n.record.clone()))));
        }
        for id in &out.dirty_jobs {
            self.unsaved.remove(id);
            decisions.extend(self.jobs.get(id).map(|j| Decision::Persist(Record::Job(Box::new(j.clone())))));
        }
        decisions.extend(out.removed.into_iter().map(|id| Decision::Persist(Record::RemoveJob(id))));
        decisions.extend(out.notes.into_iter().map(|(job, epoch, text)| Decision::Note { job, epoch, text }));
        let orders = out.orders.into_iter().map(|(node, order)| Decision::Order { node, order });
        if planted!(self, OrderBeforePersist) {
            let persists = std::mem::replace(&mut decisions, orders.collect());
            decisions.extend(persists);
        } else {
            decisions.extend(orders);
        }
        decisions.extend(out.answer.map(Decision::Answer));
        decisions
    }

    fn submit(&mut self, spec: JobSpec, key: String, now: Now, out: &mut Out) {
        if let Some(&id) = self.keys.get(&key).filter(|_| !key.is_empty()) {
            out.answer = Some(Answer::Job(id));
            return;
        }
        let refusal = if key.len() > 256 {
            Some(Refusal::Invalid("an idempotency key has at most 256 bytes".into()))
        } else {
            spec.validate().err()
        };
        if let Some(refusal) = refusal {
            out.answer = Some(Answer::Refused(refusal));
            return;
        }
        let id = JobId(self.next_job);
        self.next_job += 1;
        if !key.is_empty() {
            self.keys.insert(key.clone(), id);
        }
        self.pending.insert((Reverse(spec.priority), id));
        let job = Job {
            id,
            spec,
            key,
            state: JobState::Pending,
            attempts: Vec::new(),
            failures: 0,
            unstable: 0,
            submitted_unix_ms: now.unix_ms,
            ended_unix_ms: 0,
            reason: String::new(),
            stop: None,
            version: 1,
            delay_ms: 0,
            not_before: now.mono,
        };
        self.jobs.insert(id, job);
        out.dirty_jobs.insert(id);
        out.answer = Some(Answer::Job(id));
    }

    fn stop(&mut self, id: JobId, reason: String, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get_mut(&id) else {
            out.answer = Some(Answer::Refused(Refusal::NoJob(id)));
            return;
        };
        out.answer = Some(Answer::Job(id));
        if job.state.is_final() || job.stop.is_some() {
            return;
        }
        let reason = if reason.is_empty() { "stopped by a person".to_owned() } else { reason };
        job.stop = Some(reason.clone());
        out.dirty_jobs.insert(id);
        if job.state == JobState::Pending {
            self.finish(id, JobState::Stopped, reason, now, out);
            return;
        }
        job.state = JobState::Stopping;
        job.reason.clone_from(&reason);
        job.version += 1;
        self.begin_end(id, EndCause::Stopped, reason, now, out);
    }

    fn cordon(&mut self, id: NodeId, cordon: bool, reason: String, out: &mut Out) {
        let Some(node) = self.nodes.get_mut(&id) else {
            out.answer = Some(Answer::Refused(Refusal::NoNode(id)));
            return;
        };
        node.record.cordon = cordon.then_some(reason);
        out.dirty_nodes.insert(id);
        out.answer = Some(Answer::Node(id));
    }

    fn heard(&mut self, id: NodeId, now: Now) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.last_heard = node.last_heard.max(now.mono);
            node.connected = true;
        }
    }

    /// Brings what we think of a node and what it says together.
    fn hello(
        &mut self,
        id: NodeId,
        info: NodeInfo,
        inventory: &[crate::event::RankReport],
        now: Now,
        out: &mut Out,
    ) {
        let fresh = NodeRecord { id, info: NodeInfo::default(), cordon: None };
        let node = self.nodes.entry(id).or_insert_with(|| Node::new(fresh, now.mono));
        if node.record.info != info {
            node.record.info = info;
            out.dirty_nodes.insert(id);
        }
        self.heard(id, now);
        let reported: BTreeSet<RankKey> = inventory.iter().map(|r| r.key).collect();
        if let Some(node) = self.nodes.get_mut(&id) {
            // Strays that the node no longer knows are over.
            node.strays.retain(|key| reported.contains(key));
        }
        let ours: Vec<(JobId, Rank)> =
            self.nodes.get(&id).map(|n| n.ranks.iter().copied().collect()).unwrap_or_default();
        for (job, rank) in ours {
            let Some(key) = self.jobs.get(&job).map(|j| j.key_of(rank)) else { continue };
            if !reported.contains(&key) {
                self.absent(id, key, now, out);
            }
        }
        for report in inventory {
            self.report(id, report, true, now, out);
        }
    }

    /// What happens by time alone.
    fn expire(&mut self, now: Now, out: &mut Out) {
        let lease = Duration::from_millis(self.policy.agent_lease_ms);
        let start_timeout = Duration::from_millis(self.policy.start_timeout_ms);
        let fence = self.policy.fence();
        let silent: Vec<(NodeId, Duration)> = self
            .nodes
            .iter()
            .filter(|(_, n)| !n.ranks.is_empty() && n.silent(now.mono) >= lease)
            .map(|(id, n)| (*id, n.silent(now.mono)))
            .collect();
        for (id, silence) in silent {
            self.lose_node(id, silence, now, out);
            if silence >= fence {
                self.fence_node(id, now, out);
            }
        }
        let late: Vec<(JobId, String)> =
            self.active
                .iter()
                .filter_map(|id| {
                    let attempt = self.jobs.get(id)?.attempt()?;
                    let slot = attempt.ranks.iter().find(|r| r.state == RankState::Assigned);
                    (attempt.stage == Stage::Preparing && now.mono.since(attempt.since) >= start_timeout)
                        .then(|| {
                            let who = slot.map_or("the port of rank 0".to_owned(), |s| {
                                format!("rank {} on {}", s.rank.0, s.node)
                            });
                            (*id, format!("{who} was not ready within {} s", start_timeout.as_secs()))
                        })
                })
                .collect();
        for (id, reason) in late {
            self.begin_end(id, EndCause::StartTimeout, reason, now, out);
        }
    }
}

/// Stands in for a node that a job's record names but that has no record itself.
fn unknown_node(id: NodeId, now: Nanos) -> Node {
    Node::new(NodeRecord { id, info: NodeInfo::default(), cordon: None }, now)
}
