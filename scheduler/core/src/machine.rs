//! The step machine: jobs and nodes as one value.

use crate::amount::Usage;
use crate::capacity::{Capacity, Standing};
use crate::event::{AccountRecord, Answer, Decision, Event, Now, Order, RankKey, Record, Refusal};
use crate::faults::Maintenance;
use crate::job::{EndCause, Job, JobState, RankState, Seat, Stage};
use crate::node::{Node, NodeInfo, NodeRecord};
use crate::pass::Tried;
use crate::policy::Policy;
use crate::queue::{ClassId, Dependents, Queue};
use crate::quota::Ledger;
use crate::reserve::Reservation;
use crate::timers::{Timer, Timers};
use crate::users::Users;
use firefly_types::{AttemptEpoch, JobId, Nanos, NodeId, Rank};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// The whole state of the scheduler.
#[derive(Clone, Debug)]
pub struct Core {
    pub(crate) policy: Policy,
    pub(crate) jobs: BTreeMap<JobId, Job>,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    /// Jobs that could start if there were room.
    pub(crate) queue: Queue,
    /// Pending jobs that wait for something else than room.
    pub(crate) waiting: BTreeSet<JobId>,
    /// Jobs that have an attempt which is not over, or ranks whose end is not proven: all that
    /// hold seats.
    pub(crate) active: BTreeSet<JobId>,
    /// Attempts that give way on demand.
    pub(crate) opportunistic: BTreeSet<JobId>,
    /// Jobs that span zones.
    pub(crate) crossing: BTreeSet<JobId>,
    /// Jobs of each array that hold seats.
    pub(crate) arrays: BTreeMap<JobId, u32>,
    pub(crate) dependents: Dependents,
    pub(crate) keys: BTreeMap<String, JobId>,
    pub(crate) next_job: u64,
    /// Jobs with ranks that have ended without that being persisted: it need not be, since their
    /// nodes report it again, until another job takes their slots.
    pub(crate) unsaved: BTreeSet<JobId>,
    /// Finished jobs by the time of their end, for the limit on how many are kept.
    pub(crate) finished: BTreeSet<(u64, JobId)>,
    pub(crate) capacity: Capacity,
    pub(crate) timers: Timers,
    pub(crate) users: Users,
    /// What is held against quotas.
    pub(crate) ledger: Ledger,
    /// The first blocked job of each group, as of the last pass.
    pub(crate) heads: BTreeMap<String, JobId>,
    /// What the blocked job at the head of each group waits for.
    pub(crate) reservations: BTreeMap<String, Reservation>,
    /// Classes that did not fit, and when that was tried.
    pub(crate) tried: BTreeMap<ClassId, Tried>,
    /// What users' jobs used that are no longer kept.
    pub(crate) accounts: BTreeMap<String, Usage>,
    pub(crate) windows: BTreeMap<u32, Maintenance>,
    /// Nodes that were cordoned without a person, with the time.
    pub(crate) auto_cordons: VecDeque<(Nanos, NodeId)>,
    /// Something changed that may let a job start.
    pub(crate) dirty: bool,
    #[cfg(test)]
    pub(crate) planted: Option<Planted>,
    /// Rare paths that were taken, for tests to prove that they visited them.
    #[cfg(test)]
    pub(crate) reached: BTreeMap<&'static str, u64>,
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
    RoomOvercommitted,
    SeatLeaked,
    StopForgottenOnRestart,
    QuotaOffByOne,
    ReservationLeftBehind,
    SeatReturnedTwice,
    CrossZoneUncounted,
    GangSharesNodes,
    PreemptsInVain,
    SuspendsUnable,
    HeldJobStarts,
    DependencyIgnored,
    AutoCordonUncapped,
    QuantumIgnored,
    IndexMissesRelease,
    HeadOvertaken,
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

/// Counts that a path was taken; nothing outside tests.
macro_rules! reached {
    ($core:expr, $what:literal) => {{
        #[cfg(test)]
        {
            *$core.reached.entry($what).or_default() += 1;
        }
    }};
}
pub(crate) use reached;

/// What one step gathers.
#[derive(Default)]
pub(crate) struct Out {
    pub(crate) dirty_jobs: BTreeSet<JobId>,
    pub(crate) dirty_nodes: BTreeSet<NodeId>,
    pub(crate) removed: Vec<JobId>,
    pub(crate) records: Vec<Record>,
    pub(crate) notes: Vec<(JobId, AttemptEpoch, String)>,
    pub(crate) orders: Vec<(NodeId, Order)>,
    pub(crate) answer: Option<Answer>,
}

impl Out {
    pub(crate) fn refuse(&mut self, refusal: Refusal) {
        self.answer = Some(Answer::Refused(refusal));
    }
}

impl Core {
    /// An empty cluster.
    pub fn new(policy: Policy) -> Self {
        Self {
            users: Users::new(&policy),
            policy,
            jobs: BTreeMap::new(),
            nodes: BTreeMap::new(),
            queue: Queue::default(),
            waiting: BTreeSet::new(),
            active: BTreeSet::new(),
            opportunistic: BTreeSet::new(),
            crossing: BTreeSet::new(),
            arrays: BTreeMap::new(),
            dependents: Dependents::default(),
            keys: BTreeMap::new(),
            next_job: 1,
            unsaved: BTreeSet::new(),
            finished: BTreeSet::new(),
            capacity: Capacity::default(),
            timers: Timers::default(),
            ledger: Ledger::default(),
            heads: BTreeMap::new(),
            reservations: BTreeMap::new(),
            tried: BTreeMap::new(),
            accounts: BTreeMap::new(),
            windows: BTreeMap::new(),
            auto_cordons: VecDeque::new(),
            dirty: false,
            #[cfg(test)]
            planted: None,
            #[cfg(test)]
            reached: BTreeMap::new(),
        }
    }

    /// Everything that must be durable for [`Core::restore`].
    pub fn records(&self) -> Vec<Record> {
        let jobs = self.jobs.values().map(|j| Record::Job(Box::new(j.clone())));
        let accounts = self
            .accounts
            .iter()
            .map(|(user, used)| Record::Account(AccountRecord { user: user.clone(), used: *used }));
        jobs.chain(self.nodes.values().map(|n| Record::Node(n.record.clone())))
            .chain(accounts)
            .chain(self.windows.values().map(|w| Record::Maintenance(w.clone())))
            .collect()
    }

    /// The site's policy.
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

    /// When time alone changes something next: a driver without a steady clock (the simulator)
    /// sends its next [`Event::Tick`] then.
    pub fn next_deadline(&self) -> Option<Nanos> {
        self.timers.next()
    }

    /// Jobs that could start if there were room.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// What a user's jobs have held so far, up to the last seat given back.
    pub fn used(&self, user: &str) -> Usage {
        let mut used = self.accounts.get(user).copied().unwrap_or_default();
        for job in self.jobs.values().filter(|j| j.spec.user == user) {
            used.add(&job.used);
        }
        used
    }

    /// The user's decayed usage in node-hours: what fair share goes by.
    pub fn recent_node_hours(&self, user: &str, now: Now) -> f64 {
        self.users.node_hours(user, now.mono)
    }

    /// Takes one event. The decisions come in the order in which they must take effect.
    pub fn step(&mut self, event: Event, now: Now) -> Vec<Decision> {
        let mut out = Out::default();
        match event {
            Event::Submit { spec, key } => self.submit(spec, key, now, &mut out),
            Event::Stop { job, reason } => self.stop(job, reason, now, &mut out),
            Event::Suspend { job, reason } => self.suspend_for_person(job, reason, now, &mut out),
            Event::Hold { job, reason } => self.hold(job, reason, now, &mut out),
            Event::Resume { job } => self.resume(job, now, &mut out),
            Event::SetPriority { job, priority } => {
                self.reorder(job, now, &mut out, |j| j.priority = priority);
            }
            Event::SetUserRank { job, rank } => {
                self.reorder(job, now, &mut out, |j| j.spec.user_rank = rank);
            }
            Event::Cordon { node, cordon, reason } => self.cordon(node, cordon, reason, &mut out),
            Event::Hello { node, info, inventory } => self.hello(node, info, &inventory, now, &mut out),
            Event::Beat { node } => self.sign_of_life(node, now, &mut out),
            Event::Gone { node } => {
                if let Some(n) = self.nodes.get_mut(&node) {
                    n.connected = false;
                    self.reindex(node);
                }
            }
            Event::Rank { node, report } => {
                self.sign_of_life(node, now, &mut out);
                self.report(node, &report, false, now, &mut out);
            }
            Event::Progress { job, epoch, step, saved } => {
                self.progress(job, epoch, step, saved, now, &mut out);
            }
            Event::Health { node, fault, critical, evidence } => {
                self.health(node, fault, critical, &evidence, now, &mut out);
            }
            Event::Fenced { node, by } => self.fenced(node, &by, now, &mut out),
            Event::Maintain(window) => self.maintain(window, now, &mut out),
            Event::CancelMaintenance { id } => self.cancel_maintenance(id, &mut out),
            Event::Configure(policy) => self.configure(*policy, now, &mut out),
            Event::Tick => {}
        }
        self.expire(now, &mut out);
        self.pass(now, &mut out);
        self.collect(out)
    }

    fn collect(&mut self, mut out: Out) -> Vec<Decision> {
        while self.finished.len() > self.policy.finished_jobs_kept.max(1) {
            // A finished job with ranks whose end is unproven still accounts for their slots.
            let Some(&entry) = self.finished.iter().find(|(_, id)| !self.active.contains(id)) else { break };
            self.finished.remove(&entry);
            let oldest = entry.1;
            if let Some(job) = self.jobs.remove(&oldest) {
                self.keys.remove(&job.key);
                // In the same transaction: what it used moves to its user's account.
                let used = self.accounts.entry(job.spec.user.clone()).or_default();
                used.add(&job.used);
                let record = AccountRecord { user: job.spec.user, used: *used };
                out.records.push(Record::Account(record));
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
        decisions.extend(out.records.into_iter().map(Decision::Persist));
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

    /// Brings the index of free capacity up to date with one node. Whoever changes a node calls it.
    pub(crate) fn reindex(&mut self, id: NodeId) {
        let standing = self.nodes.get(&id).and_then(Standing::of);
        if standing.is_none()
            && let Some(owner) = self.nodes.get(&id).and_then(|n| n.held_for)
        {
            // What the blocked job waits for is gone: it looks for something else.
            for reservation in self.reservations.values_mut().filter(|r| r.job == owner) {
                reservation.stale = true;
            }
        }
        let before = self.capacity.generation;
        self.capacity.set(id, standing);
        self.dirty |= self.capacity.generation != before;
    }

    /// A node is heard on a stream that never broke. If it had been silent for so long that its
    /// ranks were given up, it has not been told: without a hello nothing else would bring it up.
    fn sign_of_life(&mut self, id: NodeId, now: Now, out: &mut Out) {
        let was_silent = self.nodes.get(&id).is_some_and(|n| !n.heard);
        self.heard(id, now);
        if !was_silent {
            return;
        }
        for (job, rank) in self.ranks_on(id) {
            let Some(owner) = self.jobs.get(&job) else { continue };
            if owner.unproven().any(|s| s.rank == rank) {
                reached!(self, "lost ranks stopped later");
                let order = Order::Stop { key: owner.key_of(rank), grace: Duration::ZERO };
                out.orders.push((id, order));
            }
        }
    }

    pub(crate) fn heard(&mut self, id: NodeId, now: Now) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.last_heard = node.last_heard.max(now.mono);
        if !node.connected || !node.heard {
            (node.connected, node.heard) = (true, true);
            let at = node.last_heard.after(Duration::from_millis(self.policy.silent_after_ms));
            self.look_at(id, at);
            self.reindex(id);
        }
    }

    /// Sets a node's timer.
    pub(crate) fn look_at(&mut self, id: NodeId, at: Nanos) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.look_at = at;
            self.timers.set(at, Timer::Silence(id));
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
        let fresh = fresh_record(id);
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
        for (job, rank) in self.ranks_on(id) {
            let Some(key) = self.jobs.get(&job).map(|j| j.key_of(rank)) else { continue };
            if !reported.contains(&key) {
                self.absent(id, key, now, out);
            }
        }
        for report in inventory {
            self.report(id, report, true, now, out);
        }
        self.reindex(id);
    }

    /// Ranks of ours that occupy a node.
    pub(crate) fn ranks_on(&self, id: NodeId) -> Vec<(JobId, Rank)> {
        let Some(node) = self.nodes.get(&id) else { return Vec::new() };
        let mut ranks = Vec::new();
        for (job, (seat, _)) in &node.seats {
            let Some(attempt) = self.jobs.get(job).and_then(Job::attempt) else { continue };
            let slots = attempt.ranks.get(attempt.ranks_of_seat(*seat as usize)).unwrap_or_default();
            ranks.extend(slots.iter().filter(|r| r.state.occupies()).map(|r| (*job, r.rank)));
        }
        ranks
    }

    /// What happens by time alone.
    fn expire(&mut self, now: Now, out: &mut Out) {
        while let Some((at, timer)) = self.timers.pop(now.mono) {
            match timer {
                Timer::Silence(node) => {
                    if self.nodes.get(&node).is_some_and(|n| n.look_at == at) {
                        self.silence(node, now, out);
                    }
                }
                Timer::Start(job, epoch) => self.start_timeout(job, epoch, now, out),
                Timer::Delay(job) | Timer::Memory(job) => {
                    self.enqueue(job, now, out);
                    self.dirty = true;
                }
                Timer::Overdue(job) => self.overdue(job, now),
                Timer::Limit(job, epoch) => self.time_limit(job, epoch, now, out),
                Timer::Progress(job, epoch) => self.progress_timeout(job, epoch, now, out),
                Timer::Demotion(job, epoch) => self.demote(job, epoch, now, out),
                Timer::Suspend(job, epoch) => self.suspend_timeout(job, epoch, now, out),
                Timer::Quantum(job, epoch) => self.quantum_over(job, epoch),
                Timer::Maintenance(id) => self.window_timer(id, now, out),
            }
        }
    }

    /// A node may have been silent for too long. One timer follows each node; signs of life in
    /// between only move the time at which it looks again.
    fn silence(&mut self, id: NodeId, now: Now, out: &mut Out) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let silence = node.silent(now.mono);
        let shown = Duration::from_millis(self.policy.silent_after_ms);
        let lease = Duration::from_millis(self.policy.agent_lease_ms);
        let fence = self.policy.fence();
        if silence >= shown && node.heard {
            node.heard = false;
            self.reindex(id);
        }
        if silence >= lease {
            self.lose_node(id, silence, now, out);
        }
        if silence >= fence {
            self.fence_node(id, now, out);
        }
        let next = [shown, lease, fence].into_iter().filter(|d| *d > silence).min();
        if let (Some(next), Some(node)) = (next, self.nodes.get(&id)) {
            self.look_at(id, node.last_heard.after(next));
        }
    }

    fn start_timeout(&mut self, id: JobId, epoch: AttemptEpoch, now: Now, out: &mut Out) {
        let Some(attempt) = self.jobs.get(&id).and_then(Job::attempt) else { return };
        if attempt.epoch != epoch || attempt.stage != Stage::Preparing {
            return;
        }
        let timeout = Duration::from_millis(self.policy.start_timeout_ms);
        let late = attempt.ranks.iter().find(|r| r.state == RankState::Assigned);
        let (who, node) = match late {
            Some(slot) => (format!("rank {} on {}", slot.rank.0, slot.node), slot.node),
            None => ("the port of rank 0".to_owned(), attempt.master()),
        };
        let reason = format!("{who} was not ready within {} s", timeout.as_secs());
        self.blame(node, id, &reason, now, out);
        self.begin_end(id, EndCause::StartTimeout, reason, now, out);
    }

    /// Changes a rank's state, and gives its node's seat back when the last rank on it is over.
    pub(crate) fn set_state(&mut self, key: RankKey, state: RankState, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get_mut(&key.job) else { return };
        job.version += 1;
        let Some(attempt) = job.attempts.last_mut() else { return };
        let Some(slot) = attempt.ranks.get(key.rank.0 as usize) else { return };
        let proven = slot.state == RankState::Lost && state == RankState::Fenced;
        let over = !state.occupies();
        attempt.set(key.rank, state);
        if over {
            let each = (attempt.ranks.len() / attempt.seats.len().max(1)).max(1);
            let seat = key.rank.0 as usize / each;
            let slots = attempt.ranks.get(attempt.ranks_of_seat(seat)).unwrap_or_default();
            if slots.iter().all(|r| !r.state.occupies()) {
                self.return_seat(key.job, seat, now);
            }
            self.unsaved.insert(key.job);
        }
        if proven {
            // Otherwise a restart of the scheduler would wait for the proof again.
            out.dirty_jobs.insert(key.job);
            self.settle(key.job);
            self.enqueue(key.job, now, out);
        }
    }

    /// A node of a gang is free again: the books of node, user and quota say so at once.
    fn return_seat(&mut self, id: JobId, index: usize, now: Now) {
        let (leak, miss) = (planted!(self, SeatLeaked), planted!(self, IndexMissesRelease));
        let twice = planted!(self, SeatReturnedTwice);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let whole = job.spec.whole();
        let owner = crate::quota::Owner::of(job);
        let Some(attempt) = job.attempts.last_mut() else { return };
        let started = attempt.started_unix_ms;
        let entitled = attempt.opportunistic.is_none();
        let Some(seat) = attempt.seats.get_mut(index).filter(|s| s.returned_unix_ms == 0) else { return };
        // A clock that was set back charges nothing.
        seat.returned_unix_ms = now.unix_ms.max(started).max(1);
        let held_ms = seat.returned_unix_ms.saturating_sub(started);
        let Seat { node, amount, milli, gpus, .. } = seat.clone();
        let last = attempt.seats_held().next().is_none();
        job.used.add(&Usage::of(&amount, whole, held_ms));
        if twice {
            job.used.add(&Usage::of(&amount, whole, held_ms));
        }
        if let Some(user) = self.users.known(&owner.user) {
            self.users.give_back(user, milli, now.mono);
        }
        if entitled {
            self.ledger.release(&owner, crate::pass::held_by_seat(&amount, whole));
        }
        if !leak && let Some(node) = self.nodes.get_mut(&node) {
            node.give_back(id, gpus);
        }
        if !miss {
            self.reindex(node);
        }
        if last {
            self.opportunistic.remove(&id);
            self.crossing.remove(&id);
            if let Some((first, _)) = self.jobs.get(&id).and_then(|j| j.array)
                && let Some(n) = self.arrays.get_mut(&first)
            {
                *n = n.saturating_sub(1);
                if *n == 0 {
                    self.arrays.remove(&first);
                }
            }
            // A limit of the array, or on jobs across zones, may have held others back.
            self.capacity.generation += 1;
        }
        self.dirty = true;
    }
}

/// The record of a node that nothing is known of.
pub(crate) fn fresh_record(id: NodeId) -> NodeRecord {
    NodeRecord { id, info: NodeInfo::default(), cordon: None, auto_cordon_unix_ms: 0 }
}

/// Whether a job has anything left on any node.
pub(crate) fn is_busy(job: &Job) -> bool {
    matches!(job.state, JobState::Starting | JobState::Running | JobState::Suspending | JobState::Stopping)
        || job.attempt().is_some_and(|a| a.tally.lost > 0)
}
