//! The fs3 storage server: the chunk engine, and the replication service around the machine of
//! `fs3_core::target`.
//!
//! * [`engine`] keeps chunks on one disk: redirect on write, checksums in the map, group commit.
//! * `host` runs one target: machine and engine, a disk thread, the calls along the chain.
//! * `node` has the targets of one node and follows the routing table.
//! * [`serve`] starts it all: the net service, heartbeats, routing.
//!
//! Invariants:
//!
//! * nothing is acknowledged before it is durable on every serving replica (`fs3_core::target`);
//! * nothing is served without a lease, counted from the sending of the heartbeat on
//!   CLOCK_BOOTTIME, and under the chain version that the caller believes in;
//! * a target that the chain went on without is emptied before it returns.

mod clock;
pub mod engine;
mod host;
mod manager;
mod node;
mod scrub;
mod serve;
mod service;
mod wire;

pub use serve::{Running, ServeError, StorageConfig, serve};
