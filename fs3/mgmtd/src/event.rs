//! What happens to a manager and what it decides: the vocabulary of [`crate::ManagerState`].

use firefly_types::{
    AttemptEpoch, ChainId, ChainVersion, ClientId, Incarnation, JobId, NodeId, RoutingVersion, SessionEpoch,
    TargetId, WireError,
};
use fs3_core::chain::LocalState;
use fs3_core::worker::Status;
use std::collections::BTreeMap;
use std::time::Duration;

/// What a node does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Holds targets.
    Storage,
    /// Serves the namespace.
    Meta,
}

/// One target as its node sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TargetStatus {
    /// Its own view.
    pub local: LocalState,
    /// Chain version for which its filling has finished; zero if none.
    pub synced_at: ChainVersion,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Bytes in all.
    pub capacity_bytes: u64,
    /// Why it is offline.
    pub reason: String,
    /// On memory that a power cut empties.
    pub is_volatile: bool,
    /// How far its scrub is.
    pub scrub: ScrubProgress,
}

/// One target's part of a scrub.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ScrubProgress {
    /// Which pass; zero if none has begun here.
    pub pass: u64,
    /// All has been checked.
    pub done: bool,
    /// Chunks that were checked.
    pub chunks_checked: u64,
    /// Of so many.
    pub chunks_total: u64,
    /// Bytes that were checked.
    pub bytes_checked: u64,
    /// Blocks put right from another replica.
    pub blocks_repaired: u64,
    /// Chunks with blocks that no replica could put right.
    pub chunks_bad: u64,
}

/// A node says that it lives. Validated: ids and incarnation are not zero, the address parses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Heartbeat {
    /// Who.
    pub node: NodeId,
    /// What it does.
    pub role: Role,
    /// Which start of its process.
    pub incarnation: Incarnation,
    /// Where its net service answers.
    pub address: String,
    /// Its targets, all that it knows of; one that it has never reported counts as offline.
    pub targets: BTreeMap<TargetId, TargetStatus>,
    /// The routing version that it acts on.
    pub routing_version: RoutingVersion,
}

/// What happens to a manager.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// Time passes. Comes at least every [`crate::Timing::tick`].
    Tick,
    /// A node says that it lives.
    Heartbeat(Heartbeat),
    /// It is certain that a node's process has ended.
    Ended {
        /// Whose.
        node: NodeId,
        /// Which start of it.
        incarnation: Incarnation,
    },
    /// An operator's order.
    Order(Order),
    /// A client wants a session.
    OpenSession {
        /// Which client; `None` asks for a new id.
        client: Option<ClientId>,
        /// For people.
        description: String,
        /// The job whose process the client is, and which attempt.
        job: Option<(JobId, AttemptEpoch)>,
    },
    /// A client prolongs its session.
    RenewSession {
        /// Which client.
        client: ClientId,
        /// Which session of it.
        epoch: SessionEpoch,
    },
    /// A client ends its session.
    CloseSession {
        /// Which client.
        client: ClientId,
        /// Which session of it.
        epoch: SessionEpoch,
    },
}

/// What an operator may want. The order is durable when it is answered; workers carry it out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// A storage node joins.
    AddNode(NodeId),
    /// A storage node that holds nothing leaves.
    RemoveNode(NodeId),
    /// A node's targets are moved elsewhere, and it gets no new ones.
    DrainNode(NodeId),
    /// The node is used again.
    UndrainNode(NodeId),
    /// A target is moved to another node.
    DrainTarget(TargetId),
    /// A target is replaced by a new one on the same node.
    ReplaceTarget(TargetId),
    /// Targets are spread evenly over the nodes, or no longer.
    Rebalance {
        /// Begin, or stop.
        start: bool,
    },
    /// Everything stored is checked, or no longer.
    Scrub {
        /// Begin a pass, or stop.
        start: bool,
        /// Bytes per second and node; zero is the default.
        rate_bytes: u64,
    },
}

/// The answer to whoever caused the event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// Nothing to say.
    Done,
    /// To a heartbeat.
    Lease {
        /// Newest routing version, this event's changes included.
        routing_version: RoutingVersion,
        /// Right to serve from the sending of the heartbeat; zero gives none.
        lease: Duration,
    },
    /// To an order: what is going to happen.
    Accepted(String),
    /// A session was opened or prolonged.
    Session {
        /// Whose.
        client: ClientId,
        /// Which.
        epoch: SessionEpoch,
    },
}

/// A record of the state that changed and must be durable before anybody learns of the decision.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Write {
    /// The versions and counters.
    Counters,
    /// One chain.
    Chain(ChainId),
    /// One node.
    Node(NodeId),
    /// One session, or its absence.
    Session(ClientId),
    /// One target that was taken out for good, or that its node has removed.
    Grave(TargetId),
    /// What was ordered and takes long.
    Tasks,
}

/// A background worker, for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WorkerReport {
    /// Its name.
    pub name: &'static str,
    /// How far it is.
    pub status: Status,
    /// What bounds it.
    pub throttle: String,
}

/// What a manager decides on one event.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decisions {
    /// Records to make durable, all together, before anything else. Sorted, each once.
    pub writes: Vec<Write>,
    /// A new routing table is to be published once the writes are durable.
    pub publishes: bool,
    /// The answer, once the writes are durable.
    pub reply: Result<Reply, WireError>,
    /// What a person should be able to read later.
    pub notes: Vec<String>,
}
