//! A seeded world around the core: nodes that run ranks, lose connections, reboot, break and
//! outlive their leases; user code that saves, crashes, hangs or ignores requests; people who change
//! their minds; a scheduler that crashes between any two decisions.

use super::books::Books;
use crate::machine::Planted;
use crate::*;
use firefly_types::{AttemptEpoch, JobId, Nanos, NodeId, Rank};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

const SLOTS: u32 = 4;
const GPUS: u32 = 2;
const NODES: u32 = 6;
const USERS: [&str; 3] = ["ann", "bob", "eve"];

/// The policy of a seed; some change it under way.
fn policy(variant: u64) -> Policy {
    let quota = |user: &str, nodes, gpus| Quota { user: user.into(), nodes, gpus, ..Quota::default() };
    let mut policy = Policy {
        silent_after_ms: 2_000,
        agent_lease_ms: 10_000,
        orphan_lease_ms: 30_000,
        orphan_margin_ms: 3_000,
        start_timeout_ms: 20_000,
        restart_first_ms: 500,
        restart_most_ms: 8_000,
        stable_after_ms: 60_000,
        most_unstable: 12,
        finished_jobs_kept: 30,
        half_life_ms: 20_000,
        overdue_after_ms: 30_000,
        quantum_ms: 3_000,
        quantum_costs: 2,
        time_slice_ms: 6_000,
        suspend_grace_ms: 4_000,
        suspend_cost_ms: 1_000,
        avoid_ms: 30_000,
        strike_window_ms: 60_000,
        auto_cordon_window_ms: 20_000,
        maintenance_lead_ms: 5_000,
        exempt_priority: 4,
        ..Policy::default()
    };
    if variant & 1 == 1 {
        policy.quotas = vec![quota("*", Some(3), Some(8)), quota("eve", Some(2), Some(3))];
    }
    if variant & 2 == 2 {
        policy.no_progress = 1;
        policy.groups = [(String::new(), GroupPolicy { nodes: 0, standbys: 1 })].into();
    }
    if variant & 4 == 4 {
        policy.demotions = vec![Demotion { from: 3, to: 1, after_ms: 4_000 }];
        policy.teams = [(
            "t".to_owned(),
            Team { shares: 2, users: [("ann".to_owned(), 1), ("bob".to_owned(), 3)].into() },
        )]
        .into();
    }
    match variant / 8 % 5 {
        0 => policy.backfill = Backfill::Unreserved,
        1 => (policy.backfill, policy.displace) = (Backfill::Easy, Vec::new()),
        2 => {
            policy.backfill = Backfill::None;
            policy.order = vec![OrderBy::Overdue, OrderBy::Age];
            policy.borrow = false;
        }
        _ => {}
    }
    policy
}

#[derive(Clone, Debug, PartialEq)]
enum SimState {
    Held,
    Running,
    Exited(Exit),
}

#[derive(Clone, Debug)]
struct SimRank {
    state: SimState,
    stopping: bool,
    /// Asked to give way; whether it has said that it saved.
    suspending: Option<bool>,
    gpus: u64,
}

impl SimRank {
    fn over(&self) -> bool {
        matches!(self.state, SimState::Exited(_))
    }
}

#[derive(Default)]
struct SimNode {
    linked: bool,
    /// Broken agents come up without the suspend handshake.
    can_suspend: bool,
    ranks: BTreeMap<RankKey, SimRank>,
    inbox: VecDeque<Order>,
    outbox: VecDeque<RankReport>,
    sent: Vec<RankReport>,
    last_contact: Nanos,
}

/// Proof that interesting states were visited.
pub(super) type Seen = BTreeMap<&'static str, u64>;

pub(super) struct World {
    rng: ChaCha8Rng,
    core: Core,
    policy: Policy,
    variant: u64,
    planted: Option<Planted>,
    disk: BTreeMap<(u8, u64, String), Record>,
    nodes: BTreeMap<NodeId, SimNode>,
    now: Now,
    pub(super) books: Books,
    specs: BTreeMap<JobId, JobSpec>,
    keys: BTreeMap<String, JobId>,
    ever_prepared: BTreeMap<(JobId, AttemptEpoch), BTreeSet<Rank>>,
    ever_started: BTreeSet<RankKey>,
    ever_exited: BTreeSet<RankKey>,
    steps_said: u64,
    windows: u32,
    pub(super) seen: Seen,
    trace: u64,
}

pub(super) type Check = Result<(), String>;

impl World {
    pub(super) fn new(seed: u64, planted: Option<Planted>) -> Self {
        let policy = policy(seed);
        let mut core = Core::new(policy.clone());
        core.planted = planted;
        // A third of the worlds cannot suspend anywhere, a third not everywhere.
        let can = |n: u32| match seed % 3 {
            0 => true,
            1 => n < NODES,
            _ => seed % 2 == 1,
        };
        let nodes = (1..=NODES).map(|n| (NodeId(n), SimNode { can_suspend: can(n), ..SimNode::default() }));
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            core,
            policy,
            variant: seed,
            planted,
            disk: BTreeMap::new(),
            nodes: nodes.collect(),
            now: Now { mono: Nanos(1_000_000_000), unix_ms: 1_000_000 },
            books: Books::default(),
            specs: BTreeMap::new(),
            keys: BTreeMap::new(),
            ever_prepared: BTreeMap::new(),
            ever_started: BTreeSet::new(),
            ever_exited: BTreeSet::new(),
            steps_said: 0,
            windows: 0,
            seen: Seen::new(),
            trace: 0xcbf2_9ce4_8422_2325,
        }
    }

    fn see(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    fn hash(&mut self, text: &str) {
        for byte in text.bytes() {
            self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// One event through the core; its decisions take effect one by one, and the scheduler may
    /// crash before any of them. Returns the answer, if it was given.
    fn step(&mut self, event: Event, may_crash: bool) -> Result<Option<Answer>, String> {
        let configured = matches!(event, Event::Configure(_));
        let decisions = self.core.step(event, self.now);
        if configured {
            self.policy = self.core.policy().clone();
        }
        self.core.check()?;
        self.books.after_step(&self.core, self.now, &decisions)?;
        let text = format!("{decisions:?}");
        self.hash(&text);
        let mut answer = None;
        let mut in_transaction = false;
        for decision in decisions {
            let persist = matches!(decision, Decision::Persist(_));
            let atomic = persist && std::mem::replace(&mut in_transaction, persist);
            if may_crash && !atomic && self.rng.random_ratio(1, 80) {
                self.crash();
                return Ok(None);
            }
            match decision {
                Decision::Persist(record) => self.persist(record)?,
                Decision::Note { .. } => {}
                Decision::Order { node, order } => self.order(node, order)?,
                Decision::Answer(a) => answer = Some(a),
            }
        }
        Ok(answer)
    }

    fn persist(&mut self, record: Record) -> Check {
        let key = match &record {
            Record::Job(job) => (0, job.id.0, String::new()),
            Record::RemoveJob(id) => (0, id.0, String::new()),
            Record::Node(node) => (1, node.id.0.into(), String::new()),
            Record::Account(account) => (2, 0, account.user.clone()),
            Record::Maintenance(window) => (3, window.id.into(), String::new()),
            Record::RemoveMaintenance(id) => (3, (*id).into(), String::new()),
        };
        match record {
            Record::RemoveJob(_) | Record::RemoveMaintenance(_) => {
                self.disk.remove(&key);
            }
            record => {
                match &record {
                    Record::Job(job) => self.books.durable(job, &mut self.seen)?,
                    Record::Node(node) => self.books.node_durable(&self.core, node, self.now)?,
                    Record::Account(account) => self.books.account_durable(account)?,
                    _ => {}
                }
                self.disk.insert(key, record);
            }
        }
        Ok(())
    }

    fn on_disk(&self, job: JobId) -> Option<&Job> {
        match self.disk.get(&(0, job.0, String::new())) {
            Some(Record::Job(job)) => Some(job),
            _ => None,
        }
    }

    /// An order leaves the scheduler: its intent must be durable by now.
    fn order(&mut self, node: NodeId, order: Order) -> Check {
        let key = order.key();
        match order {
            Order::Prepare { .. } => {
                let durable = self.on_disk(key.job).map(Job::epoch);
                if durable != Some(key.epoch) {
                    return Err(format!("{key} is ordered while {durable:?} is durable"));
                }
                if self.ever_exited.contains(&key) && self.ever_started.contains(&key) {
                    return Err(format!("{key} is ordered again after its end"));
                }
                self.books.prepared(key)?;
            }
            Order::Start { .. } => {
                // One step may open a barrier and end the attempt: its time was up.
                let attempt = self.on_disk(key.job).and_then(Job::attempt);
                if attempt.is_none_or(|a| a.epoch != key.epoch || a.running_unix_ms == 0) {
                    let stage = attempt.map(|a| (a.epoch, a.stage));
                    return Err(format!("{key} is started while {stage:?} is durable"));
                }
            }
            Order::Suspend { .. } => {
                if !self.nodes.get(&node).is_some_and(|n| n.can_suspend) {
                    return Err(format!("{node} cannot suspend and is asked to suspend {key}"));
                }
            }
            Order::Stop { .. } | Order::Forget { .. } => {}
        }
        let node = self.nodes.get_mut(&node).ok_or("an order to nobody")?;
        if node.linked {
            node.inbox.push_back(order);
        }
        Ok(())
    }

    /// The scheduler dies. What it had sent may or may not have arrived.
    fn crash(&mut self) {
        self.see("scheduler crashes");
        for (what, n) in std::mem::take(&mut self.core.reached) {
            *self.seen.entry(what).or_default() += n;
        }
        let cordoned = self.disk.values().filter_map(|r| match r {
            Record::Node(node) if node.auto_cordon_unix_ms > 0 => Some(node.id),
            _ => None,
        });
        self.books.crashed(&cordoned.collect());
        self.core = Core::restore(self.policy.clone(), self.disk.values().cloned(), self.now);
        self.core.planted = self.planted;
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for id in ids {
            self.unlink(id);
        }
    }

    fn unlink(&mut self, id: NodeId) {
        let keep = self.rng.random_bool(0.5);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.linked = false;
            // Orders that had arrived are carried out, those in flight are not.
            if !keep {
                node.inbox.clear();
            }
            node.outbox.clear();
            node.sent.clear();
        }
    }

    fn link(&mut self, id: NodeId) -> Check {
        while self.nodes[&id].inbox.front().is_some() {
            self.execute(id)?;
        }
        let node = self.nodes.get_mut(&id).ok_or("no such node")?;
        node.linked = true;
        node.outbox.clear();
        node.last_contact = self.now.mono;
        let inventory = node.ranks.iter().map(|(key, rank)| report_of(*key, rank)).collect();
        let place = |level: u32| format!("{level}");
        let info = NodeInfo {
            host: id.to_string(),
            address: "10.0.0.1".into(),
            cores: SLOTS,
            slots: SLOTS,
            memory_bytes: 1 << 30,
            gpus: GPUS,
            place: Place { zone: place(id.0 / 4), spine: String::new(), leaf: place(id.0 / 2) },
            can_suspend: node.can_suspend,
            ..NodeInfo::default()
        };
        self.step(Event::Hello { node: id, info, inventory }, true).map(|_| ())
    }

    /// The agent of `id` carries out its next order.
    fn execute(&mut self, id: NodeId) -> Check {
        let node = self.nodes.get_mut(&id).ok_or("no such node")?;
        let Some(order) = node.inbox.pop_front() else { return Ok(()) };
        let key = order.key();
        match order {
            Order::Prepare { gpus, .. } => {
                if let std::collections::btree_map::Entry::Vacant(entry) = node.ranks.entry(key) {
                    entry.insert(SimRank { state: SimState::Held, stopping: false, suspending: None, gpus });
                    self.ever_prepared.entry((key.job, key.epoch)).or_default().insert(key.rank);
                }
            }
            Order::Start { .. } => {
                if let Some(rank) = node.ranks.get_mut(&key).filter(|r| r.state == SimState::Held) {
                    rank.state = SimState::Running;
                    if !self.ever_started.insert(key) {
                        return Err(format!("{key} was started twice"));
                    }
                    let world = self.specs[&key.job].world_size() as usize;
                    let ready = self.ever_prepared.get(&(key.job, key.epoch)).map_or(0, BTreeSet::len);
                    if ready != world {
                        return Err(format!("{key} starts with {ready} of {world} ranks ready"));
                    }
                }
            }
            Order::Suspend { .. } => {
                if let Some(rank) = node.ranks.get_mut(&key) {
                    rank.suspending.get_or_insert(false);
                }
            }
            Order::Stop { .. } => match node.ranks.get_mut(&key) {
                Some(rank) => rank.stopping = true,
                None => {
                    let exit = Exit { detail: "not here".into(), ..Exit::default() };
                    node.outbox.push_back(RankReport {
                        key,
                        state: Reported::Exited(exit),
                        pid: 0,
                        master_port: 0,
                    });
                }
            },
            Order::Forget { .. } => {
                if node.ranks.get(&key).is_some_and(SimRank::over) {
                    node.ranks.remove(&key);
                }
            }
        }
        self.tell(id, key);
        self.judge()
    }

    fn tell(&mut self, id: NodeId, key: RankKey) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if let Some(rank) = node.ranks.get(&key).filter(|_| node.linked) {
            let report = report_of(key, rank);
            node.outbox.push_back(report);
        }
    }

    fn end_rank(&mut self, id: NodeId, key: RankKey, exit: Exit) {
        if let Some(rank) = self.nodes.get_mut(&id).and_then(|n| n.ranks.get_mut(&key)) {
            rank.state = SimState::Exited(exit);
            self.ever_exited.insert(key);
        }
        self.tell(id, key);
    }

    /// What the world itself must never show.
    fn judge(&mut self) -> Check {
        let mut live: BTreeMap<JobId, BTreeSet<AttemptEpoch>> = BTreeMap::new();
        for (id, node) in &self.nodes {
            let running = || node.ranks.iter().filter(|(_, r)| !r.over());
            if running().count() > SLOTS as usize {
                return Err(format!("{id} runs {} ranks in {SLOTS} slots", running().count()));
            }
            let jobs: BTreeSet<JobId> = running().map(|(k, _)| k.job).collect();
            if let Some(whole) = jobs.iter().find(|j| jobs.len() > 1 && self.specs[j].whole()) {
                return Err(format!("{id} runs {jobs:?}, although all of it is {whole}'s"));
            }
            for (key, rank) in running() {
                let shared = running().find(|(k, r)| k.job != key.job && r.gpus & rank.gpus != 0);
                if let Some((other, _)) = shared {
                    return Err(format!("{id}: {key} and {other} use one accelerator"));
                }
                if rank.state == SimState::Running {
                    live.entry(key.job).or_default().insert(key.epoch);
                }
            }
        }
        match live.into_iter().find(|(_, epochs)| epochs.len() > 1) {
            Some((job, epochs)) => Err(format!("{job} runs twice: {epochs:?}")),
            None => Ok(()),
        }
    }

    fn advance(&mut self, time: Duration) -> Check {
        self.now.mono = self.now.mono.after(time);
        self.now.unix_ms += u64::try_from(time.as_millis()).unwrap_or(0);
        let lease = Duration::from_millis(self.policy.orphan_lease_ms);
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for id in &ids {
            let node = &self.nodes[id];
            if !node.linked && self.now.mono.since(node.last_contact) > lease {
                let over: Vec<RankKey> =
                    node.ranks.iter().filter(|(_, r)| !r.over()).map(|(k, _)| *k).collect();
                for key in over {
                    let exit = Exit { signal: Some(9), detail: "orphan lease".into(), ..Exit::default() };
                    self.end_rank(*id, key, exit);
                }
            }
        }
        for id in ids {
            if self.nodes[&id].linked {
                self.step(Event::Beat { node: id }, true)?;
                let now = self.now.mono;
                if let Some(node) = self.nodes.get_mut(&id).filter(|n| n.linked) {
                    node.last_contact = now;
                }
            }
        }
        self.step(Event::Tick, true)?;
        Ok(())
    }

    fn pick_node(&mut self) -> NodeId {
        NodeId(self.rng.random_range(1..=NODES))
    }

    fn pick_rank(&mut self, id: NodeId, state: fn(&SimRank) -> bool) -> Option<RankKey> {
        let keys: Vec<RankKey> =
            self.nodes[&id].ranks.iter().filter(|(_, r)| state(r)).map(|(k, _)| *k).collect();
        (!keys.is_empty()).then(|| keys[self.rng.random_range(0..keys.len())])
    }

    fn pick_job(&mut self) -> Option<JobId> {
        let ids: Vec<JobId> = self.core.jobs().filter(|j| !j.state.is_final()).map(|j| j.id).collect();
        (!ids.is_empty()).then(|| ids[self.rng.random_range(0..ids.len())])
    }

    fn act(&mut self) -> Check {
        let id = self.pick_node();
        match self.rng.random_range(0..120) {
            0..6 => self.submit()?,
            6..12 => self.person()?,
            12..15 => self.operator(id)?,
            15..45 => self.execute(id)?,
            45..75 => self.deliver(id)?,
            75..77 => {
                // The network repeats something that was said before.
                let sent = &self.nodes[&id].sent;
                if !sent.is_empty() && self.nodes[&id].linked {
                    let report = sent[self.rng.next_u32() as usize % sent.len()].clone();
                    self.see("repeated reports");
                    self.step(Event::Rank { node: id, report }, true)?;
                }
            }
            77..82 => {
                if let Some(key) = self.pick_rank(id, |r| r.state == SimState::Running && !r.stopping) {
                    let exit = match self.rng.random_range(0..10) {
                        0 => Exit { code: Some(3), ..Exit::default() },
                        1 => Exit { signal: Some(9), ..Exit::default() },
                        _ => Exit { code: Some(0), ..Exit::default() },
                    };
                    self.end_rank(id, key, exit);
                }
            }
            82..87 => {
                if let Some(key) = self.pick_rank(id, |r| r.stopping && !r.over()) {
                    self.end_rank(id, key, Exit { signal: Some(15), ..Exit::default() });
                }
            }
            87..96 => self.give_way(id),
            96..99 => {
                // User code comes to a step.
                if let Some(key) = self.pick_rank(id, |r| r.state == SimState::Running) {
                    self.steps_said += 1;
                    let (step, saved) = (self.steps_said, self.rng.random_bool(0.5));
                    self.step(Event::Progress { job: key.job, epoch: key.epoch, step, saved }, true)?;
                }
            }
            99 => {
                if self.nodes[&id].linked {
                    self.unlink(id);
                    if self.rng.random_bool(0.7) {
                        self.step(Event::Gone { node: id }, true)?;
                    }
                }
            }
            100 => {
                // The machine reboots: nothing of its ranks is left.
                self.unlink(id);
                self.power_off(id);
                if self.rng.random_bool(0.3) {
                    self.see("fenced nodes");
                    self.step(Event::Fenced { node: id, by: "the power supply".into() }, true)?;
                } else {
                    self.step(Event::Gone { node: id }, true)?;
                }
            }
            101..106 => {
                if !self.nodes[&id].linked {
                    self.link(id)?;
                }
            }
            _ => {
                let ms = if self.rng.random_ratio(1, 12) { 12_000 } else { 400 };
                let time = Duration::from_millis(self.rng.random_range(1..ms));
                self.advance(time)?;
            }
        }
        if self.core.nodes().any(|n| !n.strays.is_empty()) {
            self.see("stray ranks");
        }
        self.judge()
    }

    fn power_off(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.inbox.clear();
            let gone = std::mem::take(&mut node.ranks);
            self.ever_exited.extend(gone.into_keys());
        }
    }

    /// User code that was asked to give way takes its next step, if it cares.
    fn give_way(&mut self, id: NodeId) {
        let Some(key) = self.pick_rank(id, |r| r.suspending.is_some() && r.state == SimState::Running) else {
            return;
        };
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(rank) = node.ranks.get_mut(&key) else { return };
        let report = |state| RankReport { key, state, pid: 1, master_port: 0 };
        match (rank.suspending, self.rng.random_range(0..4)) {
            (Some(false), 0) if node.linked => node.outbox.push_back(report(Reported::SuspendReceived)),
            (Some(false), 1) => {
                rank.suspending = Some(true);
                self.steps_said += 1;
                if node.linked {
                    node.outbox.push_back(report(Reported::Saved(self.steps_said)));
                }
            }
            (Some(true), _) => {
                let code = if self.rng.random_bool(0.5) { 85 } else { 0 };
                self.end_rank(id, key, Exit { code: Some(code), ..Exit::default() });
            }
            _ => {}
        }
    }

    /// Somebody does something with a job.
    fn person(&mut self) -> Check {
        let Some(job) = self.pick_job() else { return Ok(()) };
        let reason = "because".to_owned();
        match self.rng.random_range(0..8) {
            0..2 => {
                if self.step(Event::Stop { job, reason }, true)? == Some(Answer::Job(job)) {
                    self.books.stop_promised.insert(job);
                }
            }
            2 => {
                if self.step(Event::Hold { job, reason }, true)? == Some(Answer::Job(job)) {
                    let epoch = self.core.job(job).map_or(AttemptEpoch(0), Job::epoch);
                    self.books.held.insert(job, epoch);
                }
            }
            3 => {
                if self.step(Event::Suspend { job, reason }, true)? == Some(Answer::Job(job)) {
                    self.see("suspensions by people");
                    let epoch = self.core.job(job).map_or(AttemptEpoch(0), Job::epoch);
                    self.books.held.insert(job, epoch);
                }
            }
            4..6 => {
                let held: Vec<JobId> = self.core.jobs().filter(|j| j.hold.is_some()).map(|j| j.id).collect();
                for job in held {
                    // Whether or not the answer comes: from here on it may start.
                    self.books.held.remove(&job);
                    self.step(Event::Resume { job }, true)?;
                }
            }
            6 => {
                let priority = self.rng.random_range(0..4);
                self.step(Event::SetPriority { job, priority }, true)?;
            }
            _ => {
                let rank = self.rng.random_range(-3..3);
                self.step(Event::SetUserRank { job, rank }, true)?;
            }
        }
        Ok(())
    }

    /// Somebody does something with the site.
    fn operator(&mut self, id: NodeId) -> Check {
        match self.rng.random_range(0..10) {
            0..3 => {
                let cordon = self.rng.random_bool(0.3);
                self.step(Event::Cordon { node: id, cordon, reason: "test".into() }, true)?;
            }
            3..7 => {
                const FAULTS: [Fault; 4] = [Fault::Gpu, Fault::Network, Fault::Storage, Fault::Host];
                let fault = FAULTS[self.rng.random_range(0..FAULTS.len())];
                let critical = self.rng.random_bool(0.4);
                let evidence = "Xid 79".to_owned();
                self.see("faults of nodes");
                self.step(Event::Health { node: id, fault, critical, evidence }, true)?;
            }
            7 => {
                let from = self.now.unix_ms + self.rng.random_range(0..8_000);
                self.windows += 1;
                let window = Maintenance {
                    id: self.windows % 3,
                    nodes: [id, NodeId(1 + id.0 % NODES)].into(),
                    from_unix_ms: from,
                    until_unix_ms: from + 6_000,
                    reason: "fans".into(),
                };
                if self.core.node(id).is_some() {
                    self.step(Event::Maintain(window), true)?;
                }
            }
            8 => {
                let known = self.windows % 3;
                self.step(Event::CancelMaintenance { id: known }, true)?;
            }
            _ => {
                self.variant = self.rng.random_range(0..1_000);
                self.see("changed policies");
                self.step(Event::Configure(Box::new(policy(self.variant))), true)?;
            }
        }
        Ok(())
    }

    fn submit(&mut self) -> Check {
        let whole = self.rng.random_bool(0.5);
        let nodes = if whole { self.rng.random_range(1..=NODES) } else { 1 };
        let suspendable = self.rng.random_bool(0.7);
        let limited = self.rng.random_bool(0.3);
        let array = if self.rng.random_ratio(1, 8) { self.rng.random_range(2..5) } else { 0 };
        let mut spec = JobSpec {
            name: "job".into(),
            command: vec!["true".into()],
            user: USERS[self.rng.random_range(0..USERS.len())].into(),
            nodes,
            ranks_per_node: self.rng.random_range(1..=SLOTS),
            gpus_per_node: self.rng.random_range(0..=GPUS),
            exclusive: whole,
            priority: self.rng.random_range(0..5),
            max_restarts: self.rng.random_range(0..3),
            suspendable,
            one_zone: self.rng.random_bool(0.3),
            time_limit_ms: if limited { self.rng.random_range(6_000..60_000) } else { 0 },
            progress_timeout_ms: if self.rng.random_ratio(1, 6) { 5_000 } else { 0 },
            array,
            array_parallel: array.min(2),
            ..JobSpec::default()
        };
        if self.rng.random_ratio(1, 6)
            && let Some(job) = self.pick_job()
        {
            let after = if self.rng.random_bool(0.5) { After::Success } else { After::End };
            spec.after = vec![Dependency { job, after }];
        }
        // Some submits repeat an earlier key, as a client does that has seen no answer.
        let key = format!("k{}", self.rng.random_range(0..200));
        let answer = self.step(Event::Submit { spec, key: key.clone() }, true)?;
        if let Some(Answer::Job(id)) = answer {
            let known = *self.keys.entry(key.clone()).or_insert(id);
            if known != id && self.core.job(known).is_some() {
                return Err(format!("{key} gave {known} and then {id}"));
            }
            self.keys.insert(key, id);
        }
        // Whether or not the answer came, what is durable exists.
        for job in self.core.jobs() {
            self.specs.entry(job.id).or_insert_with(|| job.spec.clone());
        }
        Ok(())
    }

    fn deliver(&mut self, id: NodeId) -> Check {
        let Some(node) = self.nodes.get_mut(&id).filter(|n| n.linked) else { return Ok(()) };
        let Some(report) = node.outbox.pop_front() else { return Ok(()) };
        node.sent.push(report.clone());
        self.step(Event::Rank { node: id, report }, true).map(|_| ())
    }

    /// Faults are over: everything must come to its end.
    fn settle(&mut self) -> Check {
        // What can never be enough waits for ever, and is right to.
        let policy = Policy { quotas: Vec::new(), groups: BTreeMap::new(), ..policy(self.variant) };
        self.step(Event::Configure(Box::new(policy)), false)?;
        let held: Vec<JobId> = self.core.jobs().filter(|j| j.hold.is_some()).map(|j| j.id).collect();
        self.books.held.clear();
        for job in held {
            self.step(Event::Resume { job }, false)?;
        }
        // No zone will ever hold these.
        let impossible = |j: &&Job| j.spec.one_zone && j.spec.nodes > 3 && !j.state.is_final();
        let impossible: Vec<JobId> = self.core.jobs().filter(impossible).map(|j| j.id).collect();
        for job in impossible {
            self.step(Event::Stop { job, reason: "too large".into() }, false)?;
        }
        for round in 0..3_000 {
            for id in (1..=NODES).map(NodeId) {
                if self.core.node(id).is_some_and(|n| n.record.cordon.is_some()) {
                    self.step(Event::Cordon { node: id, cordon: false, reason: String::new() }, false)?;
                }
                if !self.nodes[&id].linked {
                    self.link(id)?;
                }
                while !self.nodes[&id].inbox.is_empty() {
                    self.execute(id)?;
                }
                let running: Vec<(RankKey, bool)> = self.nodes[&id]
                    .ranks
                    .iter()
                    .filter(|(_, r)| !r.over() && (r.state == SimState::Running || r.stopping))
                    .map(|(k, r)| (*k, r.stopping))
                    .collect();
                for (key, stopping) in running {
                    let code = if stopping { 143 } else { 0 };
                    self.end_rank(id, key, Exit { code: Some(code), ..Exit::default() });
                }
                while self.nodes[&id].linked && !self.nodes[&id].outbox.is_empty() {
                    self.deliver(id)?;
                }
            }
            self.advance(Duration::from_millis(1_000))?;
            // A breaker may still call for a person.
            let calls: Vec<JobId> =
                self.core.jobs().filter(|j| j.state == JobState::Held).map(|j| j.id).collect();
            for job in calls {
                self.step(Event::Resume { job }, false)?;
            }
            let done = self.core.jobs().all(|j| j.state.is_final());
            let empty = self.nodes.values().all(|n| n.ranks.is_empty());
            if done && empty && self.core.nodes().all(|n| n.used() == 0) {
                return Ok(());
            }
            self.judge().map_err(|e| format!("round {round}: {e}"))?;
        }
        let stuck: Vec<_> = self.core.jobs().filter(|j| !j.state.is_final()).map(|j| j.id).collect();
        let why: Vec<_> = stuck.iter().flat_map(|j| self.core.why(*j, self.now)).collect();
        let used: Vec<_> = self.core.nodes().map(|n| (n.record.id, n.used())).collect();
        Err(format!("not everything came to its end; slots taken {used:?}; {stuck:?}: {why:#?}"))
    }

    pub(super) fn run(mut self, steps: usize) -> Result<(u64, Seen), String> {
        for step in 0..steps {
            self.act().map_err(|e| format!("step {step}: {e}"))?;
        }
        self.settle()?;
        for (what, n) in std::mem::take(&mut self.core.reached) {
            *self.seen.entry(what).or_default() += n;
        }
        Ok((self.trace, self.seen))
    }
}

fn report_of(key: RankKey, rank: &SimRank) -> RankReport {
    let state = match &rank.state {
        SimState::Held => Reported::Prepared,
        SimState::Running => Reported::Running,
        SimState::Exited(exit) => Reported::Exited(exit.clone()),
    };
    let master_port = if key.rank.0 == 0 { 20_000 } else { 0 };
    RankReport { key, state, pid: 1, master_port }
}
