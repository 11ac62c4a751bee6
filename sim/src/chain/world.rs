//! The world: time, network, faults, and the loop that moves them.

use super::client::Client;
use super::manager::{Heartbeat, LEASE, Manager};
use super::node::{Caller, Node, Purpose};
use super::truth::{Truth, Violation};
use super::{Bytes, Tags, tags_of};
use firefly_types::{ChainVersion, ChunkId, ErrorKind, Nanos, TargetId, WireError};
use fs3_core::chain::Chain;
use fs3_core::target::{
    Action, Answer, Context, Event, Forward, Kind, Meta, Mutation, RecordPage, Resolve, TargetOptions, Token,
    Update, WriteError,
};
use fs3_storage::engine::{Done, ReadPlan};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

mod traffic;

/// A bug planted on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// In the machine.
    Machine(Mutation),
    /// Disks say that bytes are durable before they are.
    LyingDisk,
    /// The manager takes a target out of its chain that has not stopped serving.
    TakesOutUnasked,
}

/// What world.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Decides everything.
    pub seed: u64,
    /// Replicas of the chain; 0 lets the seed choose 1 to 3.
    pub targets: usize,
    /// Planted bug.
    pub mutant: Option<Mutant>,
}

impl Options {
    /// The world of `seed`, without planted bugs.
    pub fn seed(seed: u64) -> Self {
        Self { seed, targets: 0, mutant: None }
    }
}

/// How it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The first broken promise.
    pub violation: Option<Violation>,
    /// Differs for different worlds; equal for the same seed.
    pub fingerprint: u64,
    /// Events processed.
    pub events: u64,
    /// Client operations answered.
    pub operations: u64,
    /// How often interesting things happened, to prove that they were visited.
    pub reached: BTreeMap<&'static str, u64>,
}

/// Faults happen until then.
const FAULTS_END: Nanos = Nanos(4_000_000_000);
/// Clients begin operations until then.
const CLIENTS_END: Nanos = Nanos(4_500_000_000);
/// The world must be at rest by then.
const END: Nanos = Nanos(30_000_000_000);
const CLIENTS: usize = 4;
const CHUNKS: u32 = 3;

#[derive(Clone)]
enum Body {
    Forward(Forward<Bytes>),
    Token(Token),
    Resolve(Resolve),
    SyncRecords(TargetId, ChainVersion, RecordPage),
    SyncDone(TargetId, ChainVersion),
    Update(ChainVersion, Update<Bytes>),
    Read(Context, ChainVersion, ChunkId),
}

#[derive(Clone)]
enum Said {
    Answer(Answer),
    Content { version: u64, tags: Option<Tags>, dirty: bool },
}

/// What the manager says of the chain.
#[derive(Clone)]
struct Told {
    chain: Chain,
    retiring: Option<TargetId>,
    order: u64,
}

enum Happens {
    Request {
        to: usize,
        at: u64,
        from: Caller,
        body: Body,
    },
    Response {
        to: Caller,
        result: Result<Said, WireError>,
    },
    Heard {
        node: usize,
        heartbeat: Heartbeat,
    },
    Routed {
        node: usize,
        incarnation: u64,
        sent: Nanos,
        told: Told,
    },
    CallTimeout {
        node: usize,
        call: u64,
    },
    AttemptTimeout {
        client: usize,
        attempt: u64,
    },
    Batch {
        node: usize,
        epoch: u64,
    },
    Content {
        node: usize,
        epoch: u64,
        chunk: ChunkId,
        id: u64,
        plan: Option<ReadPlan>,
    },
    Tick {
        node: usize,
    },
    Beat {
        node: usize,
    },
    ManagerTick,
    /// Somebody rotates the chain, or moves it to another node.
    Operator,
    Act {
        client: usize,
    },
    Fault,
    Restart {
        node: usize,
    },
    Heal {
        node: usize,
        manager: bool,
    },
}

struct World {
    target_options: TargetOptions,
    rng: ChaCha8Rng,
    now: Nanos,
    queue: BinaryHeap<Reverse<(Nanos, u64)>>,
    events: BTreeMap<u64, Happens>,
    counter: u64,
    nodes: Vec<Node>,
    manager: Manager,
    clients: Vec<Client>,
    truth: Truth,
    /// Nodes cut off from other nodes and clients, and from the manager.
    cut: Vec<bool>,
    cut_manager: Vec<bool>,
    /// The manager does not treat a new incarnation as the death of the old one.
    ignores_restarts: bool,
    /// Nodes whose disks take their time.
    slow: Vec<bool>,
    /// Writes that take effect when they are durable: (node, epoch, id).
    at_once: BTreeSet<(usize, u64, u64)>,
    /// Removals among them: (node, chunk, version).
    removals: Vec<(usize, ChunkId, u64)>,
    reached: BTreeMap<&'static str, u64>,
    processed: u64,
}

/// Runs the world of these options to its end or its first broken promise.
pub fn run(options: Options) -> Outcome {
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let targets =
        if options.targets > 0 { options.targets } else { [1, 2, 2, 3, 3, 3][rng.random_range(0..6)] };
    let mutation = match options.mutant {
        Some(Mutant::Machine(mutation)) => Some(mutation),
        _ => None,
    };
    let lying = options.mutant == Some(Mutant::LyingDisk);
    let ignores_restarts = rng.random_bool(0.5);
    // Some worlds have nodes to move to.
    let nodes = targets + rng.random_range(0..3);
    let slow = (0..nodes).map(|_| rng.random_bool(0.3)).collect();
    let mut manager = Manager::new(targets, nodes);
    manager.takes_out_unasked = options.mutant == Some(Mutant::TakesOutUnasked);
    let mut world = World {
        target_options: TargetOptions {
            retry: Duration::from_millis(30),
            resolve: Duration::from_millis(80),
            mutation,
            ..TargetOptions::default()
        },
        rng,
        now: Nanos::ZERO,
        queue: BinaryHeap::new(),
        events: BTreeMap::new(),
        counter: 0,
        nodes: (0..nodes).map(|id| Node::new(id, lying)).collect(),
        manager,
        clients: (0..CLIENTS).map(Client::new).collect(),
        truth: Truth::default(),
        cut: vec![false; nodes],
        cut_manager: vec![false; nodes],
        ignores_restarts,
        slow,
        at_once: BTreeSet::new(),
        removals: Vec::new(),
        reached: BTreeMap::new(),
        processed: 0,
    };
    world.start();
    world.run();
    let operations = world.clients.iter().map(|c| c.finished).sum();
    *world.reached.entry("commits").or_default() += world.truth.commits;
    *world.reached.entry("chain changes").or_default() += world.manager.changes;
    for (what, count) in std::mem::take(&mut world.manager.reached) {
        *world.reached.entry(what).or_default() += count;
    }
    let last: u64 = world.rng.random();
    Outcome {
        violation: world.truth.violation.clone(),
        fingerprint: world.truth.fingerprint().wrapping_add(world.now.0).wrapping_add(last),
        events: world.processed,
        operations,
        reached: world.reached,
    }
}

impl World {
    fn at(&mut self, delay: Duration, what: Happens) {
        self.counter += 1;
        self.queue.push(Reverse((self.now.after(delay), self.counter)));
        self.events.insert(self.counter, what);
    }

    fn micros(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(self.rng.random_range(from..to))
    }

    fn reach(&mut self, what: &'static str) {
        *self.reached.entry(what).or_default() += 1;
    }

    fn start(&mut self) {
        for node in 0..self.nodes.len() {
            self.at(Duration::ZERO, Happens::Beat { node });
            self.at(Duration::from_millis(1), Happens::Tick { node });
        }
        for client in 0..CLIENTS {
            let delay = self.micros(1000, 20_000);
            self.at(delay, Happens::Act { client });
        }
        self.at(Duration::from_millis(1), Happens::ManagerTick);
        self.at(Duration::from_millis(300), Happens::Fault);
        self.at(Duration::from_millis(200), Happens::Operator);
    }

    fn run(&mut self) {
        while let Some(Reverse((time, id))) = self.queue.pop() {
            let Some(event) = self.events.remove(&id) else { continue };
            self.now = time;
            self.processed += 1;
            self.happen(event);
            if self.truth.violation.is_some() {
                return;
            }
            if self.processed.is_multiple_of(64) && self.now > CLIENTS_END && self.at_rest() {
                return self.check_rest();
            }
            if self.now > END {
                let busy: Vec<String> = self.nodes.iter().map(|n| self.describe(n)).collect();
                let waiting: Vec<_> = self.clients.iter().filter_map(|c| c.current.clone()).collect();
                return self.truth.fail(
                    "without faults the world comes to rest",
                    format!("chain {:?}; nodes {busy:?}; clients wait for {waiting:?}", self.manager.chain),
                );
            }
        }
    }

    fn describe(&self, node: &Node) -> String {
        let state = node
            .open
            .as_ref()
            .map(|o| (o.target.chain().cloned(), o.target.busy_chunks(), o.engine.has_work()));
        format!("{} up {} offline {:?} {state:?}", node.id, node.up, node.offline)
    }

    fn at_rest(&self) -> bool {
        let quiet = |n: &Node| {
            n.up && n.open.as_ref().is_some_and(|o| o.target.busy_chunks() == 0 && !o.engine.has_work())
        };
        self.clients.iter().all(|c| c.current.is_none())
            && self.manager.is_whole()
            && self.manager.serving().iter().all(|n| quiet(&self.nodes[*n]))
    }

    fn check_rest(&mut self) {
        for chunk in self.truth.chunks() {
            for node in self.manager.serving() {
                match self.content(node, chunk, false) {
                    Ok(held) => self.truth.at_rest(node, chunk, held.map(|(m, tags)| (m.version, tags))),
                    Err(why) => self.truth.fail("stored chunks can be read", why),
                }
            }
        }
        self.reach("came to rest");
    }

    /// What a node's engine holds of a chunk.
    fn content(&self, node: usize, chunk: ChunkId, pending: bool) -> Result<Option<(Meta, Tags)>, String> {
        let Some(open) = &self.nodes[node].open else { return Ok(None) };
        let Some(mut plan) = open.engine.plan_read(chunk, pending, 0..u32::MAX) else { return Ok(None) };
        let meta = plan.meta();
        let mut bytes = vec![0; meta.length as usize];
        let complain = |e: String| format!("target {node} chunk {chunk} {meta:?}: {e}");
        let disk = &self.nodes[node].disk;
        open.engine.read(disk, &mut plan, 0, &mut bytes).map_err(|e| complain(e.to_string()))?;
        tags_of(&bytes).map(|tags| Some((meta, tags))).map_err(complain)
    }

    // ---- network ----

    /// Loses, delays, reorders and repeats. `copies` are made by the caller, since not all can be.
    fn transit(&mut self, cut: bool) -> Vec<Duration> {
        let faulty = self.now < FAULTS_END;
        if cut || (faulty && self.rng.random_bool(0.02)) {
            return Vec::new();
        }
        let copies = if faulty && self.rng.random_bool(0.02) { 2 } else { 1 };
        (0..copies)
            .map(|_| match faulty && self.rng.random_bool(0.03) {
                true => self.micros(2000, 200_000),
                false => self.micros(100, 2000),
            })
            .collect()
    }

    fn call(&mut self, node: usize, to: TargetId, body: Body, purpose: Purpose) {
        let call = self.nodes[node].next();
        let incarnation = self.nodes[node].incarnation;
        self.nodes[node].calls.insert(call, purpose);
        let to = to.0 as usize;
        let cut = self.cut[node] || self.cut[to];
        for delay in self.transit(cut) {
            let from = Caller::Node { node, incarnation, call };
            let at = self.nodes[to].incarnation;
            self.at(delay, Happens::Request { to, at, from, body: body.clone() });
        }
        self.at(Duration::from_millis(250), Happens::CallTimeout { node, call });
    }

    fn respond(&mut self, from: usize, to: Caller, result: Result<Said, WireError>) {
        let cut = self.cut[from] || matches!(to, Caller::Node { node, .. } if self.cut[node]);
        for delay in self.transit(cut) {
            self.at(delay, Happens::Response { to, result: result.clone() });
        }
    }

    // ---- events ----

    fn happen(&mut self, event: Happens) {
        match event {
            Happens::Request { to, at, from, body } => {
                // A connection ends with the process at its other end, and with it what is in it.
                if self.nodes[to].incarnation == at {
                    self.request(to, from, body);
                }
            }
            Happens::Response { to: Caller::Node { node, incarnation, call }, result } => {
                if self.nodes[node].incarnation == incarnation {
                    self.answered(node, call, result);
                }
            }
            Happens::Response { to: Caller::Client { client, attempt }, result } => {
                self.client_answered(client, attempt, result);
            }
            Happens::CallTimeout { node, call } => {
                let late = WireError::new(ErrorKind::Timeout, "no answer in time");
                self.answered(node, call, Err(late));
            }
            Happens::Heard { node, mut heartbeat } => {
                let incarnation = heartbeat.incarnation;
                if self.ignores_restarts {
                    heartbeat.incarnation = 1;
                }
                // What does not count as a sign of life gets no lease either.
                let mut sent = Nanos::ZERO;
                if heartbeat.report.is_some() || !self.ignores_restarts {
                    self.manager.hear(node, &heartbeat, self.now);
                    sent = heartbeat.sent;
                }
                // The first word is one, not zero: a node has been told nothing before.
                let order = self.manager.changes + 1;
                let (chain, retiring) = (self.manager.chain.clone(), self.manager.retiring);
                let told = Told { chain, retiring, order };
                for delay in self.transit(self.cut_manager[node]) {
                    let told = told.clone();
                    self.at(delay, Happens::Routed { node, incarnation, sent, told });
                }
            }
            Happens::Routed { node, incarnation, sent, told } => self.routed(node, incarnation, sent, &told),
            Happens::Batch { node, epoch } => self.batch(node, epoch),
            Happens::Content { node, epoch, chunk, id, plan } => {
                self.content_read(node, epoch, chunk, id, plan)
            }
            Happens::Tick { node } => {
                self.at(self.target_options.tick, Happens::Tick { node });
                self.step(node, Event::Tick);
            }
            Happens::Beat { node } => {
                let delay = self.micros(20_000, 40_000);
                self.at(delay, Happens::Beat { node });
                if self.nodes[node].up {
                    let heartbeat = self.nodes[node].heartbeat(self.now);
                    for delay in self.transit(self.cut_manager[node]) {
                        let heartbeat = heartbeat.clone();
                        self.at(delay, Happens::Heard { node, heartbeat });
                    }
                }
            }
            Happens::ManagerTick => {
                self.at(Duration::from_millis(10), Happens::ManagerTick);
                self.manager.settle(self.now);
            }
            Happens::Operator => self.operate(),
            Happens::Act { client } => self.act(client),
            Happens::AttemptTimeout { client, attempt } => {
                let client = &mut self.clients[client];
                if client.current.as_ref().is_some_and(|c| c.attempt == attempt) {
                    let id = client.id;
                    if self.now < FAULTS_END && self.rng.random_bool(0.1) {
                        self.give_up(id);
                    } else {
                        self.try_again(id);
                    }
                }
            }
            Happens::Fault => self.fault(),
            Happens::Restart { node } => {
                if !self.nodes[node].up {
                    self.nodes[node].restart();
                }
            }
            Happens::Heal { node, manager } => {
                if manager {
                    self.cut_manager[node] = false;
                } else {
                    self.cut[node] = false;
                }
            }
        }
    }

    fn routed(&mut self, node: usize, incarnation: u64, sent: Nanos, told: &Told) {
        let me = &mut self.nodes[node];
        if !me.up || me.incarnation != incarnation {
            return;
        }
        me.lease_until = sent.after(LEASE).max(me.lease_until);
        let lease = me.lease_until;
        match me.apply(&told.chain, told.retiring, told.order, self.target_options) {
            Err(why) => {
                self.truth.fail("a target's disk can be opened", format!("target {node}: {why}"));
            }
            Ok(view) => {
                self.watch_opened(node);
                self.step(node, Event::Lease(lease));
                if let Some(view) = view {
                    self.step(node, Event::Chain(view));
                }
            }
        }
    }

    fn request(&mut self, to: usize, from: Caller, body: Body) {
        if !self.nodes[to].up {
            return;
        }
        if self.nodes[to].open.is_none() {
            let refusal = WireError::new(ErrorKind::Unavailable, "the target is not open");
            return self.respond(to, from, Err(refusal));
        }
        if let Body::Read(context, version, chunk) = body {
            let result = self.read(to, &context, version, chunk);
            return self.respond(to, from, result);
        }
        let reply = self.nodes[to].next();
        self.nodes[to].callers.insert(reply, from);
        let event = match body {
            Body::Forward(forward) => Event::Forward { reply, forward },
            Body::Token(token) => Event::Token { reply, token },
            Body::Resolve(query) => Event::Resolve { reply, query },
            Body::SyncRecords(from, chain_version, page) => {
                Event::SyncRecords { reply, from, chain_version, page }
            }
            Body::SyncDone(from, chain_version) => Event::SyncDone { reply, from, chain_version },
            Body::Update(chain_version, update) => Event::Update { reply, chain_version, update },
            Body::Read(..) => return,
        };
        self.step(to, event);
    }

    fn read(
        &mut self,
        node: usize,
        context: &Context,
        version: ChainVersion,
        chunk: ChunkId,
    ) -> Result<Said, WireError> {
        let now = self.now;
        let Some(open) = &mut self.nodes[node].open else {
            return Err(WireError::new(ErrorKind::Unavailable, "not open"));
        };
        let grant = match open.target.read(context, version, chunk, now) {
            Ok(grant) => grant,
            Err(refusal) => {
                if refusal.message.contains("being settled") {
                    self.reach("reads refused until settled");
                }
                return Err(refusal);
            }
        };
        let held = match self.content(node, chunk, false) {
            Ok(held) => held,
            Err(why) => {
                self.truth.fail("stored chunks can be read", why.clone());
                return Err(WireError::new(ErrorKind::Corrupt, why));
            }
        };
        if held.as_ref().map(|(m, _)| *m) != grant.meta {
            let detail = format!("target {node} chunk {chunk}: {:?} and {held:?}", grant.meta);
            self.truth.fail("machine and engine agree", detail);
        }
        if grant.dirty {
            self.reach("dirty reads");
        }
        let (version, tags) = held.map_or((0, None), |(m, tags)| (m.version, Some(tags)));
        Ok(Said::Content { version, tags, dirty: grant.dirty })
    }

    fn answered(&mut self, node: usize, call: u64, result: Result<Said, WireError>) {
        let Some(purpose) = self.nodes[node].calls.remove(&call) else { return };
        let answer = result.and_then(|said| match said {
            Said::Answer(answer) => Ok(answer),
            Said::Content { .. } => Err(WireError::new(ErrorKind::Internal, "not asked for")),
        });
        let event = match purpose {
            Purpose::Forward { chunk, stamp } => {
                let result = answer.and_then(|a| match a {
                    Answer::Updated(meta) => Ok(meta),
                    _ => Err(WireError::new(ErrorKind::Internal, "not asked for")),
                });
                Event::ForwardAnswer { chunk, stamp, result }
            }
            Purpose::Token { chunk, stamp } => Event::TokenAnswer { chunk, stamp, delivered: answer.is_ok() },
            Purpose::Resolve { chunk, touch } => match answer {
                Ok(Answer::Resolved(resolution)) => Event::ResolveAnswer { chunk, touch, resolution },
                _ => return,
            },
            Purpose::Sync { id } => Event::SyncAnswer { id, accepted: answer.is_ok() },
        };
        self.step(node, event);
    }

    /// One step of a node's machine, with everything that it asks for.
    fn step(&mut self, node: usize, event: Event<Bytes>) {
        if !self.nodes[node].up {
            return;
        }
        let actions = self.nodes[node].step(event, self.now);
        for action in actions {
            self.carry_out(node, action);
        }
    }

    fn carry_out(&mut self, node: usize, action: Action<Bytes>) {
        let Some(open) = &self.nodes[node].open else { return };
        match action {
            Action::Write { id, base, version, update, commit } => {
                // The removal of what never was: reported, not asked for by anybody.
                let is_absence = update.kind == Kind::Remove && update.context.client.0 == 0;
                if commit && !is_absence {
                    self.at_once.insert((node, self.nodes[node].epoch, id));
                    if update.kind == Kind::Remove {
                        self.removals.push((node, update.chunk, version));
                    }
                }
                open.engine.write(id, base, version, update, commit);
                self.plan_batch(node, false);
            }
            Action::Commit { chunk, version } => {
                open.engine.commit(chunk, version);
                self.plan_batch(node, true);
                match self.content(node, chunk, false) {
                    Ok(held) => {
                        if held.as_ref().is_some_and(|(m, _)| m.version != version) {
                            let detail = format!("target {node} committed {version}, holds {held:?}");
                            self.truth.fail("machine and engine agree", detail);
                        }
                        self.truth.committed(node, chunk, version, held.map(|(_, tags)| tags));
                    }
                    Err(why) => self.truth.fail("stored chunks can be read", why),
                }
            }
            Action::Drop { chunk, version } => {
                open.engine.drop_pending(chunk, version);
                self.plan_batch(node, true);
                self.reach("pending updates dropped");
            }
            Action::Flush { id, remove, page } => {
                open.engine.flush(id, remove, page);
                self.plan_batch(node, false);
            }
            Action::Read { id, chunk, pending } => {
                let plan = open.engine.plan_read(chunk, pending, 0..u32::MAX);
                let epoch = self.nodes[node].epoch;
                let delay = self.micros(50, 3000);
                self.at(delay, Happens::Content { node, epoch, chunk, id, plan });
            }
            Action::Reply { reply, result } => {
                if let Some(caller) = self.nodes[node].callers.remove(&reply) {
                    self.respond(node, caller, result.map(Said::Answer));
                }
            }
            Action::Forward { to, forward, .. } => {
                let purpose = Purpose::Forward { chunk: forward.update.chunk, stamp: forward.stamp };
                self.call(node, to, Body::Forward(forward), purpose);
            }
            Action::Token { to, token } => {
                let purpose = Purpose::Token { chunk: token.chunk, stamp: token.stamp };
                self.call(node, to, Body::Token(token), purpose);
            }
            Action::Resolve { to, query, touch } => {
                self.reach("questions about pending updates");
                self.call(node, to, Body::Resolve(query), Purpose::Resolve { chunk: query.chunk, touch });
            }
            Action::SyncRecords { id, to, chain_version, page } => {
                let from = TargetId(node as u32);
                self.call(node, to, Body::SyncRecords(from, chain_version, page), Purpose::Sync { id });
            }
            Action::SyncDone { id, to, chain_version } => {
                let from = TargetId(node as u32);
                self.call(node, to, Body::SyncDone(from, chain_version), Purpose::Sync { id });
            }
            Action::Synced(version) => {
                self.nodes[node].synced_at = version;
                self.reach("targets filled");
            }
            Action::Offline(reason) => {
                self.truth.fail("no target has to go offline", format!("target {node}: {reason}"));
                self.nodes[node].offline = Some(reason);
            }
        }
    }

    fn plan_batch(&mut self, node: usize, lazy: bool) {
        let epoch = self.nodes[node].epoch;
        let delay = match lazy {
            true => self.micros(5000, 40_000),
            false if self.slow[node] => self.micros(1000, 30_000),
            false => self.micros(100, 3000),
        };
        self.at(delay, Happens::Batch { node, epoch });
    }

    fn batch(&mut self, node: usize, epoch: u64) {
        if !self.nodes[node].up || self.nodes[node].epoch != epoch {
            return;
        }
        let dies = self.now < FAULTS_END && self.rng.random_bool(0.003);
        if dies {
            let after = self.rng.random_range(0..8);
            self.nodes[node].disk.fail_after(Some(after));
        }
        let Some(open) = &self.nodes[node].open else { return };
        // The disk carries requests out in any order that the engine leaves open.
        let (disk, rng) = (&self.nodes[node].disk, &mut self.rng);
        let done = open.engine.run_in_order(disk, |n| rng.random_range(0..n));
        if dies {
            self.reach("crashes within a batch");
            return self.crash(node);
        }
        for done in done {
            match done {
                Done::Written { chunk, id, result } => {
                    self.watch_written(node, id, chunk, result);
                    self.step(node, Event::Written { chunk, id, result });
                }
                Done::Flushed { id, ok } => self.step(node, Event::Flushed { id, ok }),
                Done::Corrupt { update, index, .. } => {
                    let detail = format!("target {node} chunk {} block {index}", update.chunk);
                    self.truth.fail("stored chunks can be read", detail);
                }
            }
        }
    }

    /// What was found on disk counts as committed too: the crash may have come between a target's
    /// write and anybody hearing of it.
    fn watch_opened(&mut self, node: usize) {
        if std::mem::take(&mut self.nodes[node].wiped) {
            // The absence of what was wiped tells nothing.
            self.removals.retain(|(by, ..)| *by != node);
        }
        if !std::mem::take(&mut self.nodes[node].opened) {
            return;
        }
        let Some(open) = &self.nodes[node].open else { return };
        let found: Vec<(ChunkId, Meta)> = open.target.committed().iter().map(|(c, m)| (*c, *m)).collect();
        // A removal leaves nothing to be found; the chunk's absence tells that it took effect.
        let mine: Vec<_> = self.removals.extract_if(.., |(by, ..)| *by == node).collect();
        for (_, chunk, version) in mine {
            if !found.iter().any(|(c, _)| *c == chunk) && self.truth.is_after_all(chunk, version) {
                self.truth.committed(node, chunk, version, None);
            }
        }
        for (chunk, meta) in found {
            match self.content(node, chunk, false) {
                Ok(held) => self.truth.committed(node, chunk, meta.version, held.map(|(_, tags)| tags)),
                Err(why) => self.truth.fail("stored chunks can be read", why),
            }
        }
    }

    /// A target that is being filled commits as it writes.
    fn watch_written(&mut self, node: usize, id: u64, chunk: ChunkId, result: Result<Meta, WriteError>) {
        let (Ok(written), true) = (result, self.at_once.remove(&(node, self.nodes[node].epoch, id))) else {
            return;
        };
        match self.content(node, chunk, false) {
            Ok(held) => self.truth.committed(node, chunk, written.version, held.map(|(_, tags)| tags)),
            Err(why) => self.truth.fail("stored chunks can be read", why),
        }
    }

    fn content_read(&mut self, node: usize, epoch: u64, chunk: ChunkId, id: u64, plan: Option<ReadPlan>) {
        if !self.nodes[node].up || self.nodes[node].epoch != epoch {
            return;
        }
        let Some(open) = &self.nodes[node].open else { return };
        let mut content = None;
        if let Some(mut plan) = plan {
            let mut bytes = vec![0; plan.meta().length as usize];
            let disk = &self.nodes[node].disk;
            if let Err(error) = open.engine.read(disk, &mut plan, 0, &mut bytes) {
                let detail = format!("target {node} chunk {chunk}: {error}");
                return self.truth.fail("stored chunks can be read", detail);
            }
            content = Some((plan.meta(), Bytes(bytes.into())));
        }
        self.step(node, Event::Content { chunk, id, content });
    }
}
