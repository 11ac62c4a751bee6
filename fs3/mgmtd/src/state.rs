//! The manager's decisions as a value: events and the time go in, decisions come out. No clock, no
//! store, no socket; the driver ([`crate::serve`]) makes the writes durable and then publishes.

use crate::config::{MgmtdSettings, Timing};
use crate::event::{Decisions, Event, Heartbeat, Reply, Role, TargetStatus, Write};
use crate::moves::Move;
use crate::sessions::{Session, Sessions};
use firefly_types::{
    ChainId, ClientId, ErrorKind, Incarnation, Nanos, NodeId, RoutingVersion, TargetId, WireError,
};
use fs3_core::chain::{Chain, PublicState, Report, next_chain};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Meta servers at most.
const MAX_META_NODES: usize = 256;
/// Pauses of the manager that excuse one silence.
const MAX_PAUSES: u32 = 3;
/// Starts of one node's process that are remembered as over.
const MAX_RETIRED: usize = 16;

/// A chain and the order that the placement prefers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChainEntry {
    /// As published.
    pub chain: Chain,
    /// The order that the chain is turned back to when all of its members serve. While a target
    /// takes another's place, the new one stands in it and the old one behind.
    pub preferred: Vec<TargetId>,
    /// A target on its way in, and the one that goes for it.
    pub moving: Option<Move>,
}

/// What is durable of a node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeEntry {
    /// What it does.
    pub role: Role,
    /// Where it answers; empty before its first heartbeat.
    pub address: String,
    /// Whether it counts as living.
    pub alive: bool,
    /// The start of its process whose targets the chains are about; zero before its first
    /// heartbeat. A process serves only while it finds its own number here.
    pub incarnation: Incarnation,
    /// Starts that are over; a late message of theirs is refused. Newest last.
    pub retired: Vec<Incarnation>,
    /// Its targets are moved elsewhere, and it gets no new ones.
    pub draining: bool,
}

/// What operators have ordered and takes long.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tasks {
    /// Targets are being spread evenly over the nodes.
    pub rebalancing: bool,
    /// Moves that the rebalancing has begun since it was ordered.
    pub rebalance_moves: u64,
    /// The newest scrub; zero if there was none.
    pub scrub_pass: u64,
    /// It goes on.
    pub scrubbing: bool,
    /// Bytes per second and node.
    pub scrub_rate: u64,
}

/// What is not durable of a node.
#[derive(Clone, Debug)]
pub(crate) struct Contact {
    /// The newest start of its process; differs from the published one until the chains have
    /// taken it in.
    pub(crate) incarnation: Incarnation,
    heard: Nanos,
    /// Grace given since then for the manager's own pauses, and how many those were.
    grace: Duration,
    pauses: u32,
    pub(crate) targets: BTreeMap<TargetId, TargetStatus>,
    /// It gets no lease before it acts on this routing version: there, one of its targets stopped
    /// serving.
    fence: RoutingVersion,
}

/// Everything that is durable.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tables {
    /// Of the published routing table.
    pub routing_version: RoutingVersion,
    /// The next new client's id.
    pub next_client: u64,
    /// The next session's epoch.
    pub next_epoch: u64,
    /// The next new target's id; ids are never used again.
    pub next_target: u32,
    /// Replicas of each chunk.
    pub replication: u32,
    /// All chains.
    pub chains: BTreeMap<ChainId, ChainEntry>,
    /// Where each target is.
    pub owners: BTreeMap<TargetId, (NodeId, ChainId)>,
    /// All nodes.
    pub nodes: BTreeMap<NodeId, NodeEntry>,
    /// Open sessions.
    pub sessions: BTreeMap<ClientId, Session>,
    /// Targets that were taken out of their chains for good, until their nodes have removed them.
    pub graves: BTreeMap<TargetId, NodeId>,
    /// What operators have ordered.
    pub tasks: Tasks,
}

/// The manager as a value.
#[derive(Debug)]
pub struct ManagerState {
    pub(crate) timing: Timing,
    pub(crate) settings: MgmtdSettings,
    pub(crate) routing_version: RoutingVersion,
    pub(crate) chains: BTreeMap<ChainId, ChainEntry>,
    pub(crate) owners: BTreeMap<TargetId, (NodeId, ChainId)>,
    pub(crate) nodes: BTreeMap<NodeId, NodeEntry>,
    pub(crate) contacts: BTreeMap<NodeId, Contact>,
    pub(crate) sessions: Sessions,
    pub(crate) next_target: u32,
    pub(crate) replication: u32,
    /// With the routing version that says so: a node that acts on it has removed the target.
    pub(crate) graves: BTreeMap<TargetId, (NodeId, RoutingVersion)>,
    pub(crate) tasks: Tasks,
    /// Chains in which a target takes another's place.
    pub(crate) moving: BTreeSet<ChainId>,
    /// Since when targets are out, as far as this manager knows: after a restart they get their time
    /// again.
    pub(crate) out_since: BTreeMap<TargetId, Nanos>,
    /// Since when chains wait for the rest of their last serving set.
    pub(crate) reunions: BTreeMap<ChainId, Nanos>,
    /// Nodes that failed to take a chain's target in, and when: another is tried first.
    pub(crate) failed_moves: BTreeMap<(ChainId, NodeId), Nanos>,
    /// When workers look next, and when the next chain may be turned.
    pub(crate) works_at: Nanos,
    pub(crate) rotates_at: Nanos,
    /// Nothing is promoted or demoted before.
    settles_at: Nanos,
    /// New chains wait for all of their servers until then.
    pub(crate) bootstraps_until: Nanos,
    /// The time of the step under way or of the last one.
    pub(crate) now: Nanos,
    /// Chains to look at: something about their targets has changed.
    pub(crate) dirty: BTreeSet<ChainId>,
}

impl ManagerState {
    /// Takes over `tables`. If any chain has ever served, an earlier manager may have given leases
    /// out, and the takeover wait applies.
    pub fn new(settings: MgmtdSettings, tables: Tables, now: Nanos) -> Self {
        let timing = settings.timing.clone();
        let is_fresh = tables.chains.values().all(|c| c.chain.is_new());
        let settles_at = if is_fresh { now } else { now.after(timing.settle()) };
        // Those that live have not been heard by this manager, but may hold a lease. The fence is
        // not durable, so everybody has to show that they have read the newest table.
        let contact = |node: &NodeEntry| Contact {
            incarnation: node.incarnation,
            heard: now,
            grace: Duration::ZERO,
            pauses: 0,
            targets: BTreeMap::new(),
            fence: tables.routing_version,
        };
        Self {
            contacts: tables.nodes.iter().map(|(id, node)| (*id, contact(node))).collect(),
            sessions: Sessions::restore(
                crate::config::ms(timing.session_ms),
                tables.sessions,
                tables.next_client.max(1),
                tables.next_epoch.max(1),
                now,
            ),
            routing_version: RoutingVersion(tables.routing_version.0.max(1)),
            dirty: tables.chains.keys().copied().collect(),
            moving: tables.chains.iter().filter(|(_, e)| e.moving.is_some()).map(|(id, _)| *id).collect(),
            out_since: tables
                .chains
                .values()
                .flat_map(|e| e.chain.in_state(PublicState::Offline))
                .map(|t| (t, now))
                .collect(),
            graves: tables.graves.into_iter().map(|(t, n)| (t, (n, tables.routing_version))).collect(),
            next_target: tables.next_target.max(tables.owners.keys().last().map_or(1, |t| t.0 + 1)),
            replication: tables.replication,
            tasks: tables.tasks,
            reunions: BTreeMap::new(),
            failed_moves: BTreeMap::new(),
            works_at: now,
            rotates_at: now,
            chains: tables.chains,
            owners: tables.owners,
            nodes: tables.nodes,
            settles_at,
            bootstraps_until: now.after(crate::config::ms(timing.bootstrap_ms)),
            now,
            timing,
            settings,
        }
    }

    /// Of the published routing table.
    pub fn routing_version(&self) -> RoutingVersion {
        self.routing_version
    }

    /// Everything that is durable once the writes of all decisions so far are.
    pub fn tables(&self) -> Tables {
        Tables {
            routing_version: self.routing_version,
            next_client: self.sessions.next_client,
            next_epoch: self.sessions.next_epoch,
            next_target: self.next_target,
            replication: self.replication,
            chains: self.chains.clone(),
            owners: self.owners.clone(),
            nodes: self.nodes.clone(),
            sessions: self.sessions.durable(),
            graves: self.graves.iter().map(|(t, (n, _))| (*t, *n)).collect(),
            tasks: self.tasks,
        }
    }

    /// A chain as published.
    pub fn chain(&self, id: ChainId) -> Option<&Chain> {
        self.chains.get(&id).map(|entry| &entry.chain)
    }

    /// What is durable of a session.
    pub fn session(&self, client: ClientId) -> Option<&Session> {
        self.sessions.get(client)
    }

    /// Takes in one event. `now` never runs backwards.
    pub fn step(&mut self, event: Event, now: Nanos) -> Decisions {
        let mut work = Work::default();
        self.forgive_own_pause(now);
        self.now = now;
        let is_tick = event == Event::Tick;
        let reply = match event {
            Event::Tick => Ok(Reply::Done),
            Event::Order(order) => self.order(order, &mut work).map(Reply::Accepted),
            Event::Ended { node, incarnation } => {
                self.ended(node, incarnation, &mut work);
                Ok(Reply::Done)
            }
            Event::Heartbeat(heartbeat) => self.heartbeat(heartbeat, now, &mut work),
            Event::OpenSession { client, description, job } => {
                self.sessions.open(client, description, job, now).map(|(client, epoch, ended)| {
                    work.writes.insert(Write::Counters);
                    work.writes.insert(Write::Session(client));
                    for old in ended {
                        work.note(format!("session of {old} ended: a newer attempt of its job has started"));
                        work.writes.insert(Write::Session(old));
                    }
                    Reply::Session { client, epoch }
                })
            }
            Event::RenewSession { client, epoch } => {
                self.sessions.renew(client, epoch, now).map(|()| Reply::Session { client, epoch })
            }
            Event::CloseSession { client, epoch } => {
                if self.sessions.close(client, epoch) {
                    work.writes.insert(Write::Session(client));
                }
                Ok(Reply::Done)
            }
        };
        if now >= self.settles_at {
            self.take_in_restarts(&mut work);
            self.bury_the_silent(now, &mut work);
            self.advance_chains(&mut work);
            self.go_on_moving(&mut work);
            if is_tick {
                self.run_workers(&mut work);
            }
            for (client, session) in self.sessions.expire(now) {
                work.note(format!("session of {client} ({}) ran out", session.description));
                work.writes.insert(Write::Session(client));
            }
        }
        self.conclude(reply, work)
    }

    /// If the manager itself did not run for a while, the silence of others proves nothing: what
    /// they sent may still stand in its sockets. Each gets that time back, but for a few pauses only,
    /// so that a manager on an overloaded machine still finds the dead.
    fn forgive_own_pause(&mut self, now: Nanos) {
        let pause = now.since(self.now);
        if pause <= crate::config::ms(self.timing.heartbeat_ms) {
            return;
        }
        for contact in self.contacts.values_mut() {
            if contact.pauses < MAX_PAUSES {
                contact.grace += pause;
                contact.pauses += 1;
            }
        }
        self.sessions.grant_grace(pause);
    }

    fn heartbeat(&mut self, mut beat: Heartbeat, now: Nanos, work: &mut Work) -> Result<Reply, WireError> {
        let refuse = |kind, message: String| Err(WireError::new(kind, message));
        let id = beat.node;
        if let Some(node) = self.nodes.get(&id) {
            if node.role != beat.role {
                return refuse(
                    ErrorKind::InvalidArgument,
                    format!("{id} is a {:?} node; this process says {:?}", node.role, beat.role),
                );
            }
        } else if beat.role == Role::Storage {
            return refuse(
                ErrorKind::NotFound,
                format!(
                    "{id} is not among the storage nodes of this cluster: add it with `ff fs node add {id}`"
                ),
            );
        } else if self.nodes.values().filter(|n| n.role == Role::Meta).count() >= MAX_META_NODES {
            return refuse(ErrorKind::Unavailable, format!("{MAX_META_NODES} meta servers are the limit"));
        }
        // What was taken out may still be spoken of by a node that has not read so.
        let graves = &self.graves;
        beat.targets.retain(|t, _| graves.get(t).is_none_or(|(node, _)| *node != id));
        let foreign = beat.targets.keys().find(|t| self.owners.get(t).is_none_or(|(owner, _)| *owner != id));
        if let Some(target) = foreign {
            return refuse(
                ErrorKind::InvalidArgument,
                format!("{target} is not on {id}: read the routing table first"),
            );
        }

        let node = self.nodes.entry(id).or_insert_with(|| NodeEntry::new(beat.role));
        let contact = self.contacts.entry(id).or_insert_with(|| Contact {
            incarnation: node.incarnation,
            heard: now,
            grace: Duration::ZERO,
            pauses: 0,
            targets: BTreeMap::new(),
            fence: RoutingVersion(0),
        });
        if node.retired.contains(&beat.incarnation) {
            return refuse(
                ErrorKind::Stale,
                format!("another process has started as {id} since; this one is over and must exit"),
            );
        }
        if beat.incarnation != contact.incarnation {
            if contact.incarnation != Incarnation(0) {
                node.retire(contact.incarnation);
                work.writes.insert(Write::Node(id));
            }
            contact.incarnation = beat.incarnation;
            contact.targets.clear();
        }
        // A node has removed its dead when it acts on the table that names them.
        let removed = |(_, (node, since)): &(&TargetId, &(NodeId, RoutingVersion))| {
            *node == id && beat.routing_version >= *since
        };
        let removed: Vec<TargetId> = self.graves.iter().filter(removed).map(|(t, _)| *t).collect();
        for target in removed {
            self.graves.remove(&target);
            work.writes.insert(Write::Grave(target));
            work.publishes = true;
        }
        contact.heard = now;
        (contact.grace, contact.pauses) = (Duration::ZERO, 0);
        if node.address != beat.address {
            node.address = beat.address;
            work.writes.insert(Write::Node(id));
            work.publishes = true;
        }
        let is_changed = |(target, status): &(&TargetId, &TargetStatus)| {
            contact
                .targets
                .get(*target)
                .is_none_or(|old| old.local != status.local || old.synced_at != status.synced_at)
        };
        let changed: Vec<TargetId> = beat.targets.iter().filter(is_changed).map(|(t, _)| *t).collect();
        self.dirty.extend(changed.iter().filter_map(|t| self.owners.get(t)).map(|(_, chain)| *chain));
        // A target that is missing is no news: a heartbeat from before the node had read the table
        // may arrive after one from later.
        contact.targets.extend(beat.targets);
        if !node.alive && node.incarnation == contact.incarnation {
            node.alive = true;
            work.note(format!("{id} is back"));
            work.writes.insert(Write::Node(id));
            work.publishes = true;
            self.dirty.extend(chains_of(&self.owners, id));
        }
        work.answers = Some((id, beat.routing_version));
        Ok(Reply::Done)
    }

    /// Somebody has seen for certain that the process is over. Its last heartbeats may still stand in
    /// the sockets.
    fn ended(&mut self, id: NodeId, incarnation: Incarnation, work: &mut Work) {
        let (Some(node), Some(contact)) = (self.nodes.get_mut(&id), self.contacts.get(&id)) else { return };
        let is_current = node.incarnation == incarnation && contact.incarnation == incarnation;
        if self.now < self.settles_at || !node.alive || !is_current {
            return;
        }
        node.alive = false;
        node.retire(incarnation);
        work.note(format!("{id}: its process has ended"));
        work.writes.insert(Write::Node(id));
        work.publishes = true;
        self.dirty.extend(chains_of(&self.owners, id));
    }

    /// Processes that have started anew. Each of them proves that the process before is dead, so
    /// its targets leave their chains at once, and come in again as those of the new process. All
    /// that have started leave in one step: after an outage of everything, each member of the last
    /// serving set stays complete, whichever comes first.
    fn take_in_restarts(&mut self, work: &mut Work) {
        let started: BTreeMap<NodeId, Incarnation> = self
            .contacts
            .iter()
            .filter(|(id, c)| self.nodes.get(id).is_some_and(|n| n.incarnation != c.incarnation))
            .map(|(id, c)| (*id, c.incarnation))
            .collect();
        let mut left = BTreeSet::new();
        for (id, incarnation) in &started {
            let Some(node) = self.nodes.get_mut(id) else { continue };
            let was_there = node.incarnation != Incarnation(0);
            node.incarnation = *incarnation;
            node.alive = true;
            work.note(format!(
                "{id} has {}",
                if was_there { "started anew" } else { "come for the first time" }
            ));
            work.writes.insert(Write::Node(*id));
            work.publishes = true;
            self.dirty.extend(chains_of(&self.owners, *id));
            if was_there {
                left.extend(chains_of(&self.owners, *id));
            }
        }
        for id in left {
            let is_gone =
                |t: TargetId| self.owners.get(&t).is_some_and(|(owner, _)| started.contains_key(owner));
            let report = |t| if is_gone(t) { Report::SILENT } else { self.report(t) };
            let chain = &self.chains[&id].chain;
            // A chain that nobody serves has nobody to lose, and may wait for a reunion.
            if !chain.is_new()
                && chain.in_state(PublicState::Serving).next().is_some()
                && let Some(next) = next_chain(chain, report)
            {
                self.adopt(next, work);
            }
        }
    }

    fn bury_the_silent(&mut self, now: Nanos, work: &mut Work) {
        let dead_after = self.timing.dead_after();
        for (id, node) in self.nodes.iter_mut().filter(|(_, n)| n.alive) {
            let Some(contact) = self.contacts.get(id) else { continue };
            let silence = now.since(contact.heard);
            if silence > dead_after + contact.grace {
                node.alive = false;
                work.note(format!("{id} is given up after {} ms of silence", silence.as_millis()));
                work.writes.insert(Write::Node(*id));
                work.publishes = true;
                self.dirty.extend(chains_of(&self.owners, *id));
            }
        }
    }

    fn conclude(&mut self, reply: Result<Reply, WireError>, mut work: Work) -> Decisions {
        if work.publishes {
            self.routing_version = RoutingVersion(self.routing_version.0 + 1);
            work.writes.insert(Write::Counters);
        }
        for node in work.fenced {
            if let Some(contact) = self.contacts.get_mut(&node) {
                contact.fence = self.routing_version;
            }
        }
        for target in work.buried {
            if let Some((_, since)) = self.graves.get_mut(&target) {
                *since = self.routing_version;
            }
        }
        let reply = reply.map(|reply| match work.answers {
            None => reply,
            Some((id, acts_on)) => Reply::Lease {
                routing_version: self.routing_version,
                lease: if self.may_serve(id, acts_on) { self.timing.lease() } else { Duration::ZERO },
            },
        });
        Decisions {
            writes: work.writes.into_iter().collect(),
            publishes: work.publishes,
            reply,
            notes: work.notes,
        }
    }

    /// A lease is for the process that the table names, and only once it acts on the table in
    /// which it last lost a target: else it could serve by the table before.
    fn may_serve(&self, id: NodeId, acts_on: RoutingVersion) -> bool {
        match (self.nodes.get(&id), self.contacts.get(&id)) {
            (Some(node), Some(contact)) => {
                node.alive && node.incarnation == contact.incarnation && acts_on >= contact.fence
            }
            _ => false,
        }
    }

    /// Silence and target reports, for the routing table.
    pub(crate) fn heard_of(&self, id: NodeId, now: Nanos) -> Option<Duration> {
        self.contacts.get(&id).map(|c| now.since(c.heard))
    }

    pub(crate) fn target_status(&self, target: TargetId) -> Option<&TargetStatus> {
        let (owner, _) = self.owners.get(&target)?;
        self.contacts.get(owner)?.targets.get(&target)
    }
}

impl NodeEntry {
    /// A node that has not been heard yet.
    pub fn new(role: Role) -> Self {
        Self {
            role,
            address: String::new(),
            alive: false,
            incarnation: Incarnation(0),
            retired: Vec::new(),
            draining: false,
        }
    }

    fn retire(&mut self, incarnation: Incarnation) {
        if !self.retired.contains(&incarnation) {
            self.retired.push(incarnation);
            let excess = self.retired.len().saturating_sub(MAX_RETIRED);
            self.retired.drain(..excess);
        }
    }
}

/// What one step has brought about so far.
#[derive(Default)]
pub(crate) struct Work {
    pub(crate) writes: BTreeSet<Write>,
    pub(crate) publishes: bool,
    notes: Vec<String>,
    pub(crate) fenced: BTreeSet<NodeId>,
    pub(crate) later: BTreeSet<ChainId>,
    /// Targets taken out for good.
    pub(crate) buried: BTreeSet<TargetId>,
    /// The node whose heartbeat is answered, and the version that it acts on.
    answers: Option<(NodeId, RoutingVersion)>,
}

impl Work {
    pub(crate) fn note(&mut self, note: String) {
        self.notes.push(note);
    }
}

pub(crate) fn chains_of(
    owners: &BTreeMap<TargetId, (NodeId, ChainId)>,
    node: NodeId,
) -> impl Iterator<Item = ChainId> + '_ {
    owners.values().filter(move |(owner, _)| *owner == node).map(|(_, chain)| *chain)
}
