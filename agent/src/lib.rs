//! The node agent and the per-rank shim.
//!
//! ```text
//! scheduler <== one gRPC stream ==> agent --- files and two fifos ---> shim --> rank
//!               (orders, reports, logs)        (state_dir/ranks/…)    (one each)
//! ```
//!
//! The agent ([`serve`]) carries orders down and reports and log lines up; it can die at any time.
//! Everything a rank needs lives in its shim ([`shim_main`]), a small process in a session of its
//! own: the barrier, the user's command, its output, its end.
//!
//! Invariants:
//!
//! * a scheduler outage or the death of the agent ends no rank; a new agent adopts what runs;
//! * one shim per rank: it holds an exclusive file lock for its life, and who holds the lock is
//!   alive — no process ids are trusted for that;
//! * a rank is ended by its shim when nobody has relayed a sign of life of the scheduler for the
//!   orphan lease, so that a cut-off node cannot run an attempt for ever;
//! * a rank's end is on disk before it is reported, and is kept until the scheduler has it;
//! * an order of an attempt that is over, or older than one seen here, is refused;
//! * no descendant of a rank outlives its shim in ordinary ends (the shim is their reaper).
//!
//! Not here yet: cgroups, device and core binding, health checks.

mod agent;
mod config;
mod error;
mod files;
mod logs;
mod rank;
mod shim;
mod spool;
mod stream;
mod sys;
mod user;

pub use agent::{Running, serve};
pub use config::AgentConfig;
pub use error::AgentError;
pub use shim::shim_main;
