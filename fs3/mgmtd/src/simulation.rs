//! A seeded world around [`ManagerState`]: storage processes with drifting clocks that crash, freeze
//! and start anew, a network that delays and loses, a manager that pauses and restarts from what it
//! wrote. The checks know the truth that no process knows.

use crate::event::{Event, Heartbeat, Order, Reply, Role, TargetStatus, Write};
use crate::state::{ManagerState, Tables};
use crate::{MgmtdSettings, bootstrap, persist};
use firefly_store::{Kv, MemKv};
use firefly_types::{ChainId, ChainVersion, ClusterId, Incarnation, Nanos, NodeId, RoutingVersion, TargetId};
use fs3_core::chain::{Chain, LocalState, PublicState};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

/// One step of the world.
const STEP_MS: u64 = 10;

/// What a process acts on.
#[derive(Default)]
struct View {
    version: RoutingVersion,
    chains: BTreeMap<ChainId, Chain>,
    incarnations: BTreeMap<NodeId, Incarnation>,
    owners: BTreeMap<TargetId, (NodeId, ChainId)>,
    /// Asked to stop serving.
    retiring: BTreeSet<TargetId>,
}

impl View {
    fn of(state: &ManagerState) -> Rc<Self> {
        Rc::new(Self {
            version: state.routing_version(),
            chains: state.chains.iter().map(|(id, entry)| (*id, entry.chain.clone())).collect(),
            incarnations: state.nodes.iter().map(|(id, node)| (*id, node.incarnation)).collect(),
            owners: state.owners.clone(),
            retiring: state
                .chains
                .values()
                .filter_map(|e| e.moving.filter(|m| m.retiring))
                .map(|m| m.from)
                .collect(),
        })
    }
}

struct Process {
    node: NodeId,
    incarnation: Incarnation,
    is_down: bool,
    frozen_until: u64,
    unreachable_until: u64,
    /// Its clock's milliseconds for each real 1000.
    rate: u64,
    lease_until: u64,
    next_beat: u64,
    view: Rc<View>,
    view_on_its_way: bool,
    synced_at: BTreeMap<TargetId, ChainVersion>,
}

impl Process {
    fn clock(&self, now: u64) -> u64 {
        now * self.rate / 1000
    }

    fn runs(&self, now: u64) -> bool {
        !self.is_down && now >= self.frozen_until
    }

    fn role_of(&self, target: TargetId, chain: ChainId) -> Option<PublicState> {
        let is_named = self.view.incarnations.get(&self.node) == Some(&self.incarnation);
        let stays = is_named && !self.view.retiring.contains(&target);
        self.view.chains.get(&chain)?.state_of(target).filter(|_| stays)
    }

    fn may_serve(&self, target: TargetId, chain: ChainId, now: u64) -> bool {
        self.runs(now)
            && self.clock(now) < self.lease_until
            && self.role_of(target, chain) == Some(PublicState::Serving)
    }
}

enum Message {
    Beat { from: usize, sent: u64, beat: Heartbeat },
    Lease { to: usize, incarnation: Incarnation, sent: u64, lease: Duration },
    Table { to: usize, incarnation: Incarnation, view: Rc<View> },
}

struct World {
    rng: ChaCha8Rng,
    settings: MgmtdSettings,
    kv: MemKv,
    runtime: tokio::runtime::Runtime,
    manager: ManagerState,
    manager_away_until: u64,
    now: u64,
    processes: Vec<Process>,
    messages: Vec<(u64, Message)>,
    held: BTreeMap<TargetId, BTreeSet<u32>>,
    acknowledged: BTreeMap<ChainId, BTreeSet<u32>>,
    writes: u32,
    is_calm: bool,
    visited: BTreeMap<&'static str, u32>,
}

impl World {
    fn new(seed: u64, nodes: u32, replication: u32) -> Self {
        let mut settings = MgmtdSettings::new((3..3 + nodes).map(NodeId).collect());
        settings.replication = Some(replication);
        settings.timing.rebuild_after_ms = 6000;
        settings.timing.rotate_ms = 300;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let kv = MemKv::new();
        let first = || bootstrap::first_tables(&settings);
        let tables = runtime.block_on(persist::load_or_create(&kv, ClusterId(1), &settings, first)).unwrap();
        let first_targets: Vec<TargetId> = tables.owners.keys().copied().collect();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let processes = settings
            .storage_nodes
            .iter()
            .map(|&node| Process {
                node,
                incarnation: Incarnation(rng.random_range(1..u64::MAX)),
                is_down: false,
                frozen_until: 0,
                unreachable_until: 0,
                rate: rng.random_range(995..=1005),
                lease_until: 0,
                next_beat: 0,
                view: Rc::default(),
                view_on_its_way: false,
                synced_at: BTreeMap::new(),
            })
            .collect();
        Self {
            manager: ManagerState::new(settings.clone(), tables, Nanos(1)),
            rng,
            settings,
            kv,
            runtime,
            manager_away_until: 0,
            now: 0,
            processes,
            messages: Vec::new(),
            held: first_targets.into_iter().map(|t| (t, BTreeSet::new())).collect(),
            acknowledged: BTreeMap::new(),
            writes: 0,
            is_calm: false,
            visited: BTreeMap::new(),
        }
    }

    fn saw(&mut self, what: &'static str) {
        *self.visited.entry(what).or_default() += 1;
    }

    fn manager_time(&self) -> Nanos {
        Nanos(1).after(Duration::from_millis(self.now))
    }

    fn decide(&mut self, event: Event) -> Result<Reply, firefly_types::WireError> {
        let before = self.manager.tables();
        let decisions = self.manager.step(event, self.manager_time());
        let mut txn = self.kv.begin();
        persist::write(&self.manager, &decisions.writes, &mut txn);
        self.runtime.block_on(txn.commit()).unwrap();
        let after = self.manager.tables();
        // Versions grow when and only when something is published.
        let grew = after.routing_version > before.routing_version;
        assert_eq!(grew, decisions.publishes);
        assert!(before.routing_version <= after.routing_version);
        assert_eq!(
            after.chains != before.chains,
            decisions.writes.iter().any(|w| matches!(w, Write::Chain(_)))
        );
        for (id, entry) in &after.chains {
            let (old, new) = (before.chains[id].chain.members.clone(), entry.chain.members.clone());
            if new.len() > old.len() {
                self.saw("moves begun");
            } else if new.len() < old.len() {
                self.saw("moves ended");
            } else if new != old && entry.chain.in_state(PublicState::Serving).count() == new.len() {
                let whole = old.iter().all(|m| m.state == PublicState::Serving);
                self.saw(if whole { "rotations" } else { "chains whole again" });
            }
            if entry.chain.in_state(PublicState::Serving).count() > 1
                && before.chains[id].chain.in_state(PublicState::LastSrv).next().is_some()
                && !before.chains[id].chain.is_new()
            {
                self.saw("reunions");
            }
            if entry.moving.is_some_and(|m| m.retiring)
                && !before.chains[id].moving.is_some_and(|m| m.retiring)
            {
                self.saw("targets asked to stop");
            }
            assert_eq!(entry.chain.check(), Ok(()), "{id}");
            assert!(entry.chain.version >= before.chains[id].chain.version);
        }
        decisions.reply
    }

    /// Nothing lives but what was written.
    fn restart_manager(&mut self) {
        let load = persist::load_or_create(&self.kv, ClusterId(1), &self.settings, || Ok(Tables::default()));
        let tables = self.runtime.block_on(load).unwrap();
        assert_eq!(tables, self.manager.tables(), "a decision was published and not written");
        self.manager = ManagerState::new(self.settings.clone(), tables, self.manager_time());
    }

    fn send(&mut self, message: Message) {
        let slow = self.rng.random_bool(0.02) && !self.is_calm;
        let delay = self.rng.random_range(0..if slow { 3000 } else { 30 });
        if self.is_calm || !self.rng.random_bool(0.02) {
            self.messages.push((self.now + delay, message));
        }
    }

    fn step(&mut self) {
        self.now += STEP_MS;
        if !self.is_calm {
            self.misfortune();
        }
        if self.now >= self.manager_away_until {
            self.decide(Event::Tick).unwrap();
        }
        self.deliver();
        self.check_fences();
        for p in 0..self.processes.len() {
            self.act(p);
        }
        self.write_somewhere();
        self.check_data();
    }

    fn misfortune(&mut self) {
        let p = self.rng.random_range(0..self.processes.len());
        let now = self.now;
        match self.rng.random_range(0..3000) {
            0..6 => {
                let process = &mut self.processes[p];
                if process.is_down {
                    process.is_down = false;
                } else {
                    process.is_down = true;
                    process.incarnation = Incarnation(self.rng.random_range(1..u64::MAX));
                    process.lease_until = 0;
                    process.view = Rc::default();
                    process.view_on_its_way = false;
                    process.next_beat = 0;
                    process.synced_at.clear();
                }
            }
            6..9 => self.processes[p].frozen_until = now + self.rng.random_range(100..6000),
            9..12 => self.processes[p].unreachable_until = now + self.rng.random_range(100..8000),
            12..14 => {
                self.manager_away_until = now + self.rng.random_range(10..5000);
                self.saw("manager paused");
            }
            14..16 => {
                self.manager_away_until = now + self.rng.random_range(10..5000);
                self.restart_manager();
                self.saw("manager restarted");
            }
            16 => {
                // Everything goes at once.
                for process in &mut self.processes {
                    process.unreachable_until = now + 4000;
                }
                self.saw("total outage");
            }
            17..22 => {
                // Operators: drain, take back, spread, move a single one.
                let node = self.processes[p].node;
                let targets: Vec<TargetId> = self.manager.owners.keys().copied().collect();
                let target = targets[self.rng.random_range(0..targets.len())];
                let order = match self.rng.random_range(0..5) {
                    0 => Order::DrainNode(node),
                    1 => Order::UndrainNode(node),
                    2 => Order::DrainTarget(target),
                    3 => Order::ReplaceTarget(target),
                    _ => Order::Rebalance { start: true },
                };
                if now >= self.manager_away_until {
                    let accepted = self.decide(Event::Order(order)).is_ok();
                    self.saw(if accepted { "orders accepted" } else { "orders refused" });
                }
            }
            _ => {}
        }
    }

    fn deliver(&mut self) {
        let due: Vec<_> = self.messages.extract_if(.., |(at, _)| *at <= self.now).map(|(_, m)| m).collect();
        for message in due {
            match message {
                Message::Beat { from, sent, beat } => {
                    if self.now < self.manager_away_until {
                        // It waits in the socket.
                        self.messages.push((self.manager_away_until, Message::Beat { from, sent, beat }));
                        continue;
                    }
                    let incarnation = beat.incarnation;
                    match self.decide(Event::Heartbeat(beat)) {
                        Ok(Reply::Lease { lease, .. }) => {
                            if lease.is_zero() {
                                self.saw("lease withheld");
                            }
                            self.send(Message::Lease { to: from, incarnation, sent, lease });
                        }
                        Ok(other) => panic!("{other:?}"),
                        Err(_) => self.saw("heartbeat refused"),
                    }
                }
                Message::Lease { to, incarnation, sent, lease } => {
                    let process = &mut self.processes[to];
                    if process.incarnation == incarnation && !process.is_down {
                        process.lease_until = process
                            .lease_until
                            .max(sent + lease.as_millis() as u64 * u64::from(!lease.is_zero()));
                    }
                }
                Message::Table { to, incarnation, view } => {
                    let process = &mut self.processes[to];
                    if process.incarnation == incarnation && !process.is_down {
                        process.view_on_its_way = false;
                        if view.version > process.view.version {
                            process.view = view;
                        }
                    }
                }
            }
        }
    }

    fn act(&mut self, p: usize) {
        let now = self.now;
        let process = &self.processes[p];
        if !process.runs(now) || now < process.unreachable_until {
            return;
        }
        let (node, incarnation, sent) = (process.node, process.incarnation, process.clock(now));
        if sent >= process.next_beat {
            let known = process.view.version;
            // A process that has read no table yet does not know its targets.
            let targets = process.view.owners.iter().filter(|(_, (owner, _))| *owner == node && known.0 > 0);
            let status = |t: &TargetId| {
                let synced_at = process.synced_at.get(t).copied().unwrap_or(ChainVersion(0));
                let local = match (process.view.retiring.contains(t), synced_at.0 > 0) {
                    (true, _) => LocalState::Offline,
                    (false, true) => LocalState::UpToDate,
                    (false, false) => LocalState::Online,
                };
                TargetStatus {
                    local,
                    synced_at,
                    used_bytes: 0,
                    capacity_bytes: 0,
                    reason: String::new(),
                    is_volatile: false,
                    scrub: Default::default(),
                }
            };
            let beat = Heartbeat {
                node,
                role: Role::Storage,
                incarnation,
                address: format!("127.0.0.1:{}", node.0),
                targets: targets.map(|(t, _)| (*t, status(t))).collect(),
                routing_version: known,
            };
            self.processes[p].next_beat = sent + 500;
            self.send(Message::Beat { from: p, sent, beat });
        }
        let process = &mut self.processes[p];
        let is_behind =
            process.view.version < self.manager.routing_version() && now >= self.manager_away_until;
        if is_behind && !process.view_on_its_way {
            process.view_on_its_way = true;
            let view = View::of(&self.manager);
            self.messages
                .push((now + self.rng.random_range(5..200), Message::Table { to: p, incarnation, view }));
        }
        self.fill(p);
    }

    /// A target that is being filled now and then is done, if its source serves in the same view.
    fn fill(&mut self, p: usize) {
        let (node, version) = (self.processes[p].node, self.processes[p].view.version);
        let view = self.processes[p].view.clone();
        let own: Vec<_> =
            view.owners.iter().filter(|(_, (owner, _))| *owner == node).map(|(t, o)| (*t, o.1)).collect();
        for (target, chain) in own {
            if version.0 == 0 || self.processes[p].role_of(target, chain) != Some(PublicState::Syncing) {
                continue;
            }
            let chain = &self.processes[p].view.chains[&chain];
            let Some(source) = chain.in_state(PublicState::Serving).last() else { continue };
            if !self.accepts(source, chain.id, chain.version, PublicState::Serving)
                || !self.rng.random_bool(0.02)
            {
                continue;
            }
            let version = chain.version;
            self.held.insert(target, self.held[&source].clone());
            self.processes[p].synced_at.insert(target, version);
            self.saw("filled");
        }
    }

    /// Whether the process of `target` would do its part of an update under this chain version.
    fn accepts(&self, target: TargetId, chain: ChainId, version: ChainVersion, state: PublicState) -> bool {
        // A target that the manager has taken out is still where it was for those who have not read so.
        let owner = |p: &Process| p.view.owners.get(&target).map(|(owner, _)| *owner);
        let Some(owner) = self.processes.iter().find_map(owner) else { return false };
        let process = self.processes.iter().find(|p| p.node == owner).unwrap();
        let same_version = process.view.chains.get(&chain).is_some_and(|c| c.version == version);
        let is_in_time = process.runs(self.now)
            && self.now >= process.unreachable_until
            && process.clock(self.now) < process.lease_until;
        is_in_time && same_version && process.role_of(target, chain) == Some(state)
    }

    /// A client with some process's view writes to a chain; acknowledged if every member that takes
    /// writes in that view does.
    fn write_somewhere(&mut self) {
        let p = self.rng.random_range(0..self.processes.len());
        let view = self.processes[p].view.clone();
        if view.chains.is_empty() {
            return;
        }
        let chain = view.chains.values().nth(self.rng.random_range(0..view.chains.len())).unwrap();
        let serving: Vec<_> = chain.in_state(PublicState::Serving).collect();
        let syncing: Vec<_> = chain.in_state(PublicState::Syncing).collect();
        let takes = |t: &TargetId, state| self.accepts(*t, chain.id, chain.version, state);
        if serving.is_empty()
            || !serving.iter().all(|t| takes(t, PublicState::Serving))
            || !syncing.iter().all(|t| takes(t, PublicState::Syncing))
        {
            return;
        }
        self.writes += 1;
        for target in serving.iter().chain(&syncing) {
            self.held.entry(*target).or_default().insert(self.writes);
        }
        self.acknowledged.entry(chain.id).or_default().insert(self.writes);
    }

    /// Whoever may serve a target by what it knows is also serving by what was published last.
    fn check_fences(&mut self) {
        let seen = self.processes.iter().flat_map(|p| p.view.owners.iter().map(move |o| (p, o)));
        for (process, (target, (_, chain))) in seen.filter(|(p, (_, (owner, _)))| p.node == *owner) {
            if process.may_serve(*target, *chain, self.now) {
                let published = self.manager.chain(*chain).unwrap().state_of(*target);
                assert_eq!(
                    published,
                    Some(PublicState::Serving),
                    "at {} ms {target} serves by table {} and lease until {}, after it was replaced",
                    self.now,
                    process.view.version,
                    process.lease_until
                );
            }
        }
    }

    /// A read from any target that may serve finds every acknowledged write.
    fn check_data(&self) {
        if !self.now.is_multiple_of(100) {
            return;
        }
        let seen = self.processes.iter().flat_map(|p| p.view.owners.iter().map(move |o| (p, o)));
        for (process, (target, (_, chain))) in seen.filter(|(p, (_, (owner, _)))| p.node == *owner) {
            let Some(acknowledged) = self.acknowledged.get(chain) else { continue };
            if process.may_serve(*target, *chain, self.now) {
                let none = BTreeSet::new();
                let held = self.held.get(target).unwrap_or(&none);
                let lost: Vec<_> = acknowledged.difference(held).take(3).collect();
                assert!(lost.is_empty(), "at {} ms {target} of {chain} serves without {lost:?}", self.now);
            }
        }
    }

    fn note_states(&mut self) {
        for entry in self.manager.tables().chains.values() {
            for member in &entry.chain.members {
                self.saw(match member.state {
                    PublicState::Serving => "serving",
                    PublicState::LastSrv => "lastsrv",
                    PublicState::Syncing => "syncing",
                    PublicState::Waiting => "waiting",
                    PublicState::Offline => "offline",
                });
            }
        }
    }
}

fn live(seed: u64) -> BTreeMap<&'static str, u32> {
    let (nodes, replication) = [(3, 2), (3, 3), (4, 2), (2, 2)][seed as usize % 4];
    let mut world = World::new(seed, nodes, replication);
    for step in 0..4500 {
        world.step();
        if step % 100 == 0 {
            world.note_states();
        }
    }
    // Then everything works again, and the cluster must heal completely.
    world.is_calm = true;
    world.manager_away_until = 0;
    for process in &mut world.processes {
        (process.is_down, process.frozen_until, process.unreachable_until) = (false, 0, 0);
        process.view_on_its_way = false;
    }
    for process in 0..world.processes.len() {
        let node = world.processes[process].node;
        world.decide(Event::Order(Order::UndrainNode(node))).unwrap();
    }
    for _ in 0..6000 {
        world.step();
    }
    for (id, entry) in &world.manager.tables().chains {
        let is_whole = entry.chain.members.len() == replication as usize
            && entry.chain.members.iter().all(|m| m.state == PublicState::Serving)
            && entry.chain.members.iter().map(|m| m.target).eq(entry.preferred.iter().copied());
        assert!(is_whole, "seed {seed}: {id} has not healed in 60 s: {entry:?}");
    }
    let graves = world.manager.tables().graves;
    assert!(graves.is_empty(), "seed {seed}: {graves:?} were not cleared");
    assert!(world.writes > 200, "seed {seed}: only {} writes went through", world.writes);
    let owners = world.manager.tables().owners;
    let healed = owners.iter().filter(|(t, (owner, chain))| {
        let process = world.processes.iter().find(|p| p.node == *owner).unwrap();
        process.may_serve(**t, *chain, world.now)
    });
    assert_eq!(healed.count(), owners.len(), "seed {seed}: not every target serves");
    world.visited
}

#[test]
fn no_fence_breaks_and_nothing_acknowledged_is_lost() {
    let mut visited: BTreeMap<&'static str, u32> = BTreeMap::new();
    for seed in 0..60 {
        println!("seed {seed}");
        for (what, n) in live(seed) {
            *visited.entry(what).or_default() += n;
        }
    }
    println!("{visited:?}");
    for what in [
        "serving",
        "lastsrv",
        "syncing",
        "waiting",
        "offline",
        "filled",
        "lease withheld",
        "heartbeat refused",
        "manager paused",
        "manager restarted",
        "total outage",
        "orders accepted",
        "moves begun",
        "moves ended",
        "targets asked to stop",
        "rotations",
        "reunions",
    ] {
        assert!(visited.get(what).is_some_and(|n| *n >= 2), "{what:?} hardly ever happened: {visited:?}");
    }
}

/// Paste a failing seed here.
#[test]
fn one_seed() {
    live(1);
}

#[test]
fn the_same_seed_is_the_same_life() {
    assert_eq!(live(7), live(7));
}
