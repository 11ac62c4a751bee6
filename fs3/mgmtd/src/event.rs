//! What happens to a manager and what it decides: the vocabulary of [`crate::ManagerState`].

use firefly_types::{
    AttemptEpoch, ChainId, ChainVersion, ClientId, Incarnation, JobId, NodeId, RoutingVersion, SessionEpoch,
    TargetId, WireError,
};
use fs3_core::chain::LocalState;
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
