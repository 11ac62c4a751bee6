//! The scheduler daemon: gRPC, persistence and logs around `scheduler-core`.
//!
//! ```text
//! people ── Scheduler ──┐                    ┌── journal (firefly-store)
//!                       ├─▶ actor: owns Core ┤
//! agents ─ AgentGateway ┘      one task      └── orders to agents, notes to job logs
//!         └─ log lines ─▶ job logs (files)
//! ```
//!
//! Invariants:
//!
//! * one task owns the core; every event passes through it, in order;
//! * what a batch of events decided is durable before any of its orders leaves and before anybody
//!   gets an answer; if that fails the daemon stops, because what it would go on with is in
//!   memory only;
//! * only the newest stream of a node is listened to; an older one is closed;
//! * a log line of a rank is kept once, however often its node sends it (positions tell), and a
//!   job's log never exceeds its limit.
//!
//! Not here yet: more than one scheduler (the store's group has one member), users and quotas.

mod actor;
mod config;
mod convert;
mod error;
mod gateway;
mod journal;
mod logs;
mod server;
mod service;

pub use config::SchedulerConfig;
pub use error::SchedulerError;
pub use scheduler_core::Policy;
pub use server::{Running, serve};
