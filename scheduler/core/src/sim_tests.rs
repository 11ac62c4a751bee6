//! A seeded world around the core: nodes that run ranks, lose connections, reboot and outlive
//! their leases; a scheduler that crashes between any two decisions. The world keeps its own books
//! and judges by them.

use crate::machine::Planted;
use crate::*;
use firefly_types::{AttemptEpoch, JobId, Nanos, NodeId, Rank};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

const SLOTS: u32 = 4;
const NODES: u32 = 4;

fn policy() -> Policy {
    Policy {
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
    }
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
}

#[derive(Default)]
struct SimNode {
    linked: bool,
    ranks: BTreeMap<RankKey, SimRank>,
    inbox: VecDeque<Order>,
    outbox: VecDeque<RankReport>,
    sent: Vec<RankReport>,
    last_contact: Nanos,
}

/// Proof that interesting states were visited.
#[derive(Default, Debug, Clone, PartialEq)]
struct Seen {
    restarts: u64,
    lost: u64,
    fenced: u64,
    crashes: u64,
    strays: u64,
    succeeded: u64,
    failed: u64,
    stopped: u64,
    resent: u64,
    start_timeouts: u64,
}

struct World {
    rng: ChaCha8Rng,
    core: Core,
    planted: Option<Planted>,
    disk: BTreeMap<(u8, u64), Record>,
    nodes: BTreeMap<NodeId, SimNode>,
    now: Now,
    specs: BTreeMap<JobId, JobSpec>,
    keys: BTreeMap<String, JobId>,
    ever_prepared: BTreeMap<(JobId, AttemptEpoch), BTreeSet<Rank>>,
    ever_started: BTreeSet<RankKey>,
    ever_exited: BTreeSet<RankKey>,
    stop_promised: BTreeSet<JobId>,
    finals: BTreeMap<JobId, JobState>,
    seen: Seen,
    trace: u64,
}

type Check = Result<(), String>;

impl World {
    fn new(seed: u64, planted: Option<Planted>) -> Self {
        let mut core = Core::new(policy());
        core.planted = planted;
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            core,
            planted,
            disk: BTreeMap::new(),
            nodes: (1..=NODES).map(|n| (NodeId(n), SimNode::default())).collect(),
            now: Now { mono: Nanos(1_000_000_000), unix_ms: 1_000_000 },
            specs: BTreeMap::new(),
            keys: BTreeMap::new(),
            ever_prepared: BTreeMap::new(),
            ever_started: BTreeSet::new(),
            ever_exited: BTreeSet::new(),
            stop_promised: BTreeSet::new(),
            finals: BTreeMap::new(),
            seen: Seen::default(),
            trace: 0xcbf2_9ce4_8422_2325,
        }
    }

    fn hash(&mut self, text: &str) {
        for byte in text.bytes() {
            self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// One event through the core; its decisions take effect one by one, and the scheduler may
    /// crash before any of them. Returns the answer, if it was given.
    fn step(&mut self, event: Event, may_crash: bool) -> Result<Option<Answer>, String> {
        let decisions = self.core.step(event, self.now);
        self.core.check()?;
        let text = format!("{decisions:?}");
        self.hash(&text);
        let mut answer = None;
        let mut in_transaction = false;
        for decision in decisions {
            let persist = matches!(decision, Decision::Persist(_));
            let atomic = persist && std::mem::replace(&mut in_transaction, persist);
            if may_crash && !atomic && self.rng.random_ratio(1, 60) {
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
            Record::Job(job) => (0, job.id.0),
            Record::Node(node) => (1, node.id.0.into()),
            Record::RemoveJob(id) => {
                self.disk.remove(&(0, id.0));
                return Ok(());
            }
        };
        if let Record::Job(job) = &record {
            if let Some(before) = self.finals.get(&job.id).filter(|s| **s != job.state) {
                return Err(format!("{} was {before:?} and became {:?}", job.id, job.state));
            }
            if job.state.is_final() && self.finals.insert(job.id, job.state).is_none() {
                match job.state {
                    JobState::Succeeded => self.seen.succeeded += 1,
                    JobState::Failed => self.seen.failed += 1,
                    _ => self.seen.stopped += 1,
                }
            }
            if let Some(attempt) = job.attempt() {
                self.seen.lost += u64::from(attempt.cause == Some(EndCause::NodeLost));
                self.seen.start_timeouts += u64::from(attempt.cause == Some(EndCause::StartTimeout));
                self.seen.restarts += u64::from(attempt.epoch.0 > 1 && attempt.stage == Stage::Preparing);
                self.seen.fenced += u64::from(attempt.ranks.iter().any(|r| r.state == RankState::Fenced));
            }
        }
        self.disk.insert(key, record);
        Ok(())
    }

    fn on_disk(&self, job: JobId) -> Option<&Job> {
        match self.disk.get(&(0, job.0)) {
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
                if self.stop_promised.contains(&key.job) {
                    return Err(format!("{key} is prepared although the job was stopped"));
                }
            }
            Order::Start { .. } => {
                let stage = self.on_disk(key.job).and_then(Job::attempt).map(|a| (a.epoch, a.stage));
                if stage != Some((key.epoch, Stage::Running)) {
                    return Err(format!("{key} is started while {stage:?} is durable"));
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
        self.seen.crashes += 1;
        self.core = Core::restore(policy(), self.disk.values().cloned(), self.now);
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
        let info = NodeInfo {
            host: id.to_string(),
            address: "10.0.0.1".into(),
            cores: SLOTS,
            slots: SLOTS,
            memory_bytes: 1,
            gpus: 0,
        };
        self.step(Event::Hello { node: id, info, inventory }, true).map(|_| ())
    }

    /// The agent of `id` carries out its next order.
    fn execute(&mut self, id: NodeId) -> Check {
        let node = self.nodes.get_mut(&id).ok_or("no such node")?;
        let Some(order) = node.inbox.pop_front() else { return Ok(()) };
        let key = order.key();
        match order {
            Order::Prepare { .. } => {
                if let std::collections::btree_map::Entry::Vacant(entry) = node.ranks.entry(key) {
                    entry.insert(SimRank { state: SimState::Held, stopping: false });
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
                let gone = node.ranks.get(&key).is_some_and(|r| matches!(r.state, SimState::Exited(_)));
                if gone {
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
            let running = node.ranks.values().filter(|r| !matches!(r.state, SimState::Exited(_))).count();
            if running > SLOTS as usize {
                return Err(format!("{id} runs {running} ranks in {SLOTS} slots"));
            }
            for (key, rank) in &node.ranks {
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
        let lease = Duration::from_millis(policy().orphan_lease_ms);
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for id in &ids {
            let node = &self.nodes[id];
            if !node.linked && self.now.mono.since(node.last_contact) > lease {
                let over: Vec<RankKey> = node
                    .ranks
                    .iter()
                    .filter(|(_, r)| !matches!(r.state, SimState::Exited(_)))
                    .map(|(k, _)| *k)
                    .collect();
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

    fn act(&mut self) -> Check {
        let id = self.pick_node();
        match self.rng.random_range(0..100) {
            0..5 => self.submit()?,
            5..7 => {
                let Some(job) = self.pick_job() else { return Ok(()) };
                let was_final = self.core.job(job).is_some_and(|j| j.state.is_final());
                let event = Event::Stop { job, reason: "because".into() };
                if self.step(event, true)? == Some(Answer::Job(job)) && !was_final {
                    self.stop_promised.insert(job);
                }
            }
            7..40 => self.execute(id)?,
            40..70 => self.deliver(id)?,
            70..73 => {
                // The network repeats something that was said before.
                let sent = &self.nodes[&id].sent;
                if !sent.is_empty() && self.nodes[&id].linked {
                    let report = sent[self.rng.next_u32() as usize % sent.len()].clone();
                    self.seen.resent += 1;
                    self.step(Event::Rank { node: id, report }, true)?;
                }
            }
            73..78 => {
                if let Some(key) = self.pick_rank(id, |r| r.state == SimState::Running && !r.stopping) {
                    let exit = match self.rng.random_range(0..10) {
                        0 => Exit { code: Some(3), ..Exit::default() },
                        1 => Exit { signal: Some(9), ..Exit::default() },
                        _ => Exit { code: Some(0), ..Exit::default() },
                    };
                    self.end_rank(id, key, exit);
                }
            }
            78..83 => {
                if let Some(key) =
                    self.pick_rank(id, |r| r.stopping && !matches!(r.state, SimState::Exited(_)))
                {
                    self.end_rank(id, key, Exit { signal: Some(15), ..Exit::default() });
                }
            }
            83 => {
                if self.nodes[&id].linked {
                    self.unlink(id);
                    if self.rng.random_bool(0.7) {
                        self.step(Event::Gone { node: id }, true)?;
                    }
                }
            }
            84 => {
                // The machine reboots: nothing of its ranks is left.
                self.unlink(id);
                self.step(Event::Gone { node: id }, true)?;
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.inbox.clear();
                    let gone = std::mem::take(&mut node.ranks);
                    self.ever_exited.extend(gone.into_keys());
                }
            }
            85..89 => {
                if !self.nodes[&id].linked {
                    self.link(id)?;
                }
            }
            89 => {
                let cordon = self.rng.random_bool(0.4);
                self.step(Event::Cordon { node: id, cordon, reason: "test".into() }, true)?;
            }
            _ => {
                let ms = if self.rng.random_ratio(1, 12) { 12_000 } else { 400 };
                let time = Duration::from_millis(self.rng.random_range(1..ms));
                self.advance(time)?;
            }
        }
        self.seen.strays += u64::from(self.core.nodes.values().any(|n| !n.strays.is_empty()));
        self.judge()
    }

    fn submit(&mut self) -> Check {
        let spec = JobSpec {
            name: "job".into(),
            command: vec!["true".into()],
            nodes: self.rng.random_range(1..=NODES),
            ranks_per_node: self.rng.random_range(1..=SLOTS),
            priority: self.rng.random_range(0..3),
            max_restarts: self.rng.random_range(0..3),
            ..JobSpec::default()
        };
        // Some submits repeat an earlier key, as a client does that has seen no answer.
        let key = format!("k{}", self.rng.random_range(0..200));
        let answer = self.step(Event::Submit { spec: spec.clone(), key: key.clone() }, true)?;
        if let Some(Answer::Job(id)) = answer {
            let known = *self.keys.entry(key.clone()).or_insert(id);
            if known != id && self.core.job(known).is_some() {
                return Err(format!("{key} gave {known} and then {id}"));
            }
            self.keys.insert(key, id);
        }
        // Whether or not the answer came, what is durable exists.
        for job in self.core.jobs.values() {
            self.specs.entry(job.id).or_insert_with(|| job.spec.clone());
        }
        Ok(())
    }

    fn pick_job(&mut self) -> Option<JobId> {
        let ids: Vec<JobId> = self.core.jobs.keys().copied().collect();
        (!ids.is_empty()).then(|| ids[self.rng.random_range(0..ids.len())])
    }

    fn deliver(&mut self, id: NodeId) -> Check {
        let Some(node) = self.nodes.get_mut(&id).filter(|n| n.linked) else { return Ok(()) };
        let Some(report) = node.outbox.pop_front() else { return Ok(()) };
        node.sent.push(report.clone());
        self.step(Event::Rank { node: id, report }, true).map(|_| ())
    }

    /// Faults are over: everything must come to its end.
    fn settle(&mut self) -> Check {
        for id in (1..=NODES).map(NodeId) {
            self.step(Event::Cordon { node: id, cordon: false, reason: String::new() }, false)?;
        }
        for round in 0..3_000 {
            for id in (1..=NODES).map(NodeId) {
                if !self.nodes[&id].linked {
                    self.link(id)?;
                }
                while !self.nodes[&id].inbox.is_empty() {
                    self.execute(id)?;
                }
                for (key, stopping) in self.nodes[&id]
                    .ranks
                    .iter()
                    .filter(|(_, r)| r.state == SimState::Running || r.stopping)
                    .filter(|(_, r)| !matches!(r.state, SimState::Exited(_)))
                    .map(|(k, r)| (*k, r.stopping))
                    .collect::<Vec<_>>()
                {
                    let code = if stopping { 143 } else { 0 };
                    self.end_rank(id, key, Exit { code: Some(code), ..Exit::default() });
                }
                while self.nodes[&id].linked && !self.nodes[&id].outbox.is_empty() {
                    self.deliver(id)?;
                }
            }
            self.advance(Duration::from_millis(1_000))?;
            let done = self.core.jobs.values().all(|j| j.state.is_final());
            let empty = self.nodes.values().all(|n| n.ranks.is_empty());
            if done && empty && self.core.nodes.values().all(|n| n.used() == 0) {
                return Ok(());
            }
            self.judge().map_err(|e| format!("round {round}: {e}"))?;
        }
        let stuck: Vec<_> = self.core.jobs.values().filter(|j| !j.state.is_final()).collect();
        let used: Vec<_> = self.core.nodes.values().map(|n| (n.record.id, n.used())).collect();
        Err(format!("not everything came to its end; slots taken {used:?}; jobs {stuck:?}"))
    }

    fn run(mut self, steps: usize) -> Result<(u64, Seen), String> {
        for step in 0..steps {
            self.act().map_err(|e| format!("step {step}: {e}"))?;
        }
        self.settle()?;
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

fn seeds() -> std::ops::Range<u64> {
    let first = std::env::var("FIREFLY_SEED").ok().and_then(|s| s.parse().ok());
    first.map_or(0..150, |s| s..s + 1)
}

#[test]
fn no_history_of_faults_breaks_a_promise() {
    let mut all = Seen::default();
    for seed in seeds() {
        let (_, seen) = World::new(seed, None)
            .run(1_500)
            .unwrap_or_else(|e| panic!("FIREFLY_SEED={seed} replays it: {e}"));
        all.restarts += seen.restarts;
        all.lost += seen.lost;
        all.fenced += seen.fenced;
        all.crashes += seen.crashes;
        all.strays += seen.strays;
        all.succeeded += seen.succeeded;
        all.failed += seen.failed;
        all.stopped += seen.stopped;
        all.resent += seen.resent;
        all.start_timeouts += seen.start_timeouts;
    }
    println!("{all:?}");
    if std::env::var("FIREFLY_SEED").is_err() {
        for (what, count) in [
            ("restarts", all.restarts),
            ("lost nodes", all.lost),
            ("fenced ranks", all.fenced),
            ("scheduler crashes", all.crashes),
            ("stray ranks", all.strays),
            ("successes", all.succeeded),
            ("failures", all.failed),
            ("stops", all.stopped),
            ("repeated reports", all.resent),
            ("start timeouts", all.start_timeouts),
        ] {
            assert!(count > 0, "no seed ever visited: {what}");
        }
    }
}

#[test]
fn every_planted_fault_is_found() {
    for fault in [
        Planted::PartialGang,
        Planted::BarrierOpensEarly,
        Planted::StaleEpochAccepted,
        Planted::FenceIgnored,
        Planted::OrderBeforePersist,
        Planted::SlotsOvercommitted,
        Planted::SlotLeaked,
        Planted::StopForgottenOnRestart,
    ] {
        let found =
            (0..200).find_map(|seed| World::new(seed, Some(fault)).run(1_500).err().map(|what| (seed, what)));
        let (seed, what) = found.unwrap_or_else(|| panic!("{fault:?} went unnoticed"));
        println!("{fault:?} found by seed {seed}: {}", &what[..what.len().min(150)]);
    }
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in [3, 99] {
        let run = || World::new(seed, None).run(1_000).unwrap();
        assert_eq!(run(), run(), "seed {seed}");
    }
}
