//! The manager's decisions as a value: events and the time go in, decisions come out. No clock, no
//! store, no socket; the driver ([`crate::serve`]) makes the writes durable and then publishes.

use crate::config::{MgmtdSettings, Timing};
use crate::event::{Decisions, Event, Heartbeat, Reply, Role, TargetStatus, Write};
use crate::sessions::{Session, Sessions};
use firefly_types::{
    ChainId, ClientId, ErrorKind, Incarnation, Nanos, NodeId, RoutingVersion, TargetId, WireError,
};
use fs3_core::chain::{Chain, PublicState, Report, next_chain, start_chain};
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
    /// The first of these that serves should be the head.
    pub preferred: Vec<TargetId>,
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
}

/// What is not durable of a node.
#[derive(Clone, Debug)]
struct Contact {
    /// The newest start of its process; differs from the published one until the chains have
    /// taken it in.
    incarnation: Incarnation,
    heard: Nanos,
    /// Grace given since then for the manager's own pauses, and how many those were.
    grace: Duration,
    pauses: u32,
    targets: BTreeMap<TargetId, TargetStatus>,
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
    /// All chains.
    pub chains: BTreeMap<ChainId, ChainEntry>,
    /// Where each target is.
    pub owners: BTreeMap<TargetId, (NodeId, ChainId)>,
    /// All nodes.
    pub nodes: BTreeMap<NodeId, NodeEntry>,
    /// Open sessions.
    pub sessions: BTreeMap<ClientId, Session>,
}

/// The manager as a value.
#[derive(Debug)]
pub struct ManagerState {
    timing: Timing,
    pub(crate) settings: MgmtdSettings,
    pub(crate) routing_version: RoutingVersion,
    pub(crate) chains: BTreeMap<ChainId, ChainEntry>,
    pub(crate) owners: BTreeMap<TargetId, (NodeId, ChainId)>,
    pub(crate) nodes: BTreeMap<NodeId, NodeEntry>,
    contacts: BTreeMap<NodeId, Contact>,
    pub(crate) sessions: Sessions,
    /// Nothing is promoted or demoted before.
    settles_at: Nanos,
    /// New chains wait for all of their servers until then.
    bootstraps_until: Nanos,
    stepped: Nanos,
    /// Chains to look at: something about their targets has changed.
    dirty: BTreeSet<ChainId>,
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
            chains: tables.chains,
            owners: tables.owners,
            nodes: tables.nodes,
            settles_at,
            bootstraps_until: now.after(crate::config::ms(timing.bootstrap_ms)),
            stepped: now,
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
            chains: self.chains.clone(),
            owners: self.owners.clone(),
            nodes: self.nodes.clone(),
            sessions: self.sessions.durable(),
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
        let reply = match event {
            Event::Tick => Ok(Reply::Done),
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
            self.advance_chains(now, &mut work);
            for (client, session) in self.sessions.expire(now) {
                work.note(format!("session of {client} ({}) ran out", session.description));
                work.writes.insert(Write::Session(client));
            }
        }
        self.stepped = now;
        self.conclude(reply, work)
    }

    /// If the manager itself did not run for a while, the silence of others proves nothing: what
    /// they sent may still stand in its sockets. Each gets that time back, but for a few pauses only,
    /// so that a manager on an overloaded machine still finds the dead.
    fn forgive_own_pause(&mut self, now: Nanos) {
        let pause = now.since(self.stepped);
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

    fn heartbeat(&mut self, beat: Heartbeat, now: Nanos, work: &mut Work) -> Result<Reply, WireError> {
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
                    "{id} is not among the storage nodes of this cluster; they are fixed when it is made"
                ),
            );
        } else if self.nodes.values().filter(|n| n.role == Role::Meta).count() >= MAX_META_NODES {
            return refuse(ErrorKind::Unavailable, format!("{MAX_META_NODES} meta servers are the limit"));
        }
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
                node.retired.push(contact.incarnation);
                let excess = node.retired.len().saturating_sub(MAX_RETIRED);
                node.retired.drain(..excess);
                work.writes.insert(Write::Node(id));
            }
            contact.incarnation = beat.incarnation;
            contact.targets.clear();
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
            if !chain.is_new()
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

    fn advance_chains(&mut self, now: Nanos, work: &mut Work) {
        for id in std::mem::take(&mut self.dirty) {
            let Some(entry) = self.chains.get(&id) else { continue };
            let chain = &entry.chain;
            let next = if chain.is_new() {
                let all_up =
                    chain.members.iter().all(|m| self.report(m.target).local != Report::SILENT.local);
                if !all_up && now < self.bootstraps_until {
                    // Looked at again with the next tick.
                    work.later.insert(id);
                    continue;
                }
                let next = start_chain(chain, |t| self.report(t));
                if next.is_none() {
                    work.later.insert(id);
                }
                next
            } else {
                next_chain(chain, |t| self.report(t))
            };
            if let Some(next) = next {
                self.adopt(next, work);
            }
        }
        self.dirty.append(&mut work.later);
    }

    /// What counts as known about a target now.
    fn report(&self, target: TargetId) -> Report {
        let known = || {
            let (owner, _) = self.owners.get(&target)?;
            let (node, contact) = (self.nodes.get(owner)?, self.contacts.get(owner)?);
            let counts = node.alive && node.incarnation == contact.incarnation;
            let status = contact.targets.get(&target).filter(|_| counts)?;
            Some(Report { local: status.local, synced_at: status.synced_at })
        };
        known().unwrap_or(Report::SILENT)
    }

    fn adopt(&mut self, next: Chain, work: &mut Work) {
        debug_assert_eq!(next.check(), Ok(()));
        let id = next.id;
        let Some(entry) = self.chains.get_mut(&id) else { return };
        for target in entry.chain.in_state(PublicState::Serving) {
            if next.state_of(target) != Some(PublicState::Serving)
                && let Some((owner, _)) = self.owners.get(&target)
            {
                work.fenced.insert(*owner);
            }
        }
        work.note(format!("{id} {} -> {}", show(&entry.chain), show(&next)));
        entry.chain = next;
        work.writes.insert(Write::Chain(id));
        work.publishes = true;
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
        Self { role, address: String::new(), alive: false, incarnation: Incarnation(0), retired: Vec::new() }
    }
}

/// What one step has brought about so far.
#[derive(Default)]
struct Work {
    writes: BTreeSet<Write>,
    publishes: bool,
    notes: Vec<String>,
    fenced: BTreeSet<NodeId>,
    later: BTreeSet<ChainId>,
    /// The node whose heartbeat is answered, and the version that it acts on.
    answers: Option<(NodeId, RoutingVersion)>,
}

impl Work {
    fn note(&mut self, note: String) {
        self.notes.push(note);
    }
}

fn chains_of(
    owners: &BTreeMap<TargetId, (NodeId, ChainId)>,
    node: NodeId,
) -> impl Iterator<Item = ChainId> + '_ {
    owners.values().filter(move |(owner, _)| *owner == node).map(|(_, chain)| *chain)
}

fn show(chain: &Chain) -> String {
    let member = |m: &fs3_core::chain::Member| format!("{} {:?}", m.target, m.state).to_lowercase();
    let members: Vec<_> = chain.members.iter().map(member).collect();
    format!("{}: {}", chain.version, members.join(", "))
}
