//! The fs3 cluster manager: membership, leases, chain tables, client sessions.
//!
//! [`ManagerState`] decides: events and the time go in, decisions come out. [`serve`] is the thin
//! driver around it, with gRPC in front and a `firefly_store` behind.
//!
//! Invariants:
//!
//! * A decision is durable before anybody can see it: routing versions, chain versions, epochs and
//!   client ids never go back, over any restart.
//! * A target that stopped serving cannot serve by an older table. The manager replaces it only
//!   after the lease that it gave has run out (counted from receipt, which is later than the
//!   sending that the server counts from), or when a new start of its process proves the old one
//!   dead; and the server gets no lease again before it acts on the table without it.
//! * A heartbeat of a process that has been replaced is refused for good.
//! * After a restart the manager renews leases at once, but promotes and demotes nothing until every
//!   server has had the time to find it, and until leases given before have run out.
//! * When the manager itself was paused, silence in that time proves nothing.
//!
//! What a server must do in return: serve only while its lease runs (a lease of zero extends nothing;
//! a new process gets none before the table has taken it in) and only targets that the table it acts
//! on shows as serving; report all of its targets with every heartbeat; empty a target before it is
//! filled; keep the data of one that is serving or lastsrv; report the end of filling with the chain
//! version that it was made under, and fill again if the chain has changed meanwhile.
//!
//! Writes with few replicas: a chain with fewer serving targets than `min_write_replicas` refuses
//! writes. See [`MgmtdSettings::min_write_replicas`] for what 1 instead of 2 means with two replicas.
//!
//! Background work (`workers`): whole chains are turned back to their preferred order; targets that
//! have been out for `rebuild_after_ms` are rebuilt on other nodes; nodes are drained, targets spread
//! evenly, everything scrubbed when an operator orders it. A target takes another's place by `moves`.
//!
//! Not here yet: keeping the data of targets over a restart of their process while another replica
//! serves (they are filled anew), and a second manager.

pub mod bootstrap;
mod chains;
mod config;
mod error;
mod event;
mod moves;
#[cfg(test)]
mod ops_tests;
mod orders;
mod persist;
mod server;
mod sessions;
#[cfg(test)]
mod simulation;
mod state;
#[cfg(test)]
mod state_tests;
mod wire;
mod workers;

pub use config::{MgmtdConfig, MgmtdSettings, Timing};
pub use error::MgmtdError;
pub use event::{
    Decisions, Event, Heartbeat, Order, Reply, Role, ScrubProgress, TargetStatus, WorkerReport, Write,
};
pub use moves::{Cause, Move};
pub use server::{Running, serve};
pub use sessions::{MAX_SESSIONS, Session};
pub use state::{ChainEntry, ManagerState, NodeEntry, Tables, Tasks};

/// Targets in a cluster at most: the first tables are one transaction, and a routing table, reasons
/// included, stays below the 4 MiB that gRPC takes by default.
pub const MAX_TARGETS: u64 = 16_384;
