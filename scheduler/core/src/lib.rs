//! The pure scheduler: one event in, decisions out. No clock, socket, file or random source; the
//! daemon and the simulator drive the same [`Core`].
//!
//! ```text
//! job      Pending -> Starting -> Running -> Succeeded | Failed
//!             ^          |           |  \--> Stopping -> Stopped
//!             \----------+-----------/   (restart: a new attempt with the next epoch)
//! attempt  Preparing (ranks held at the barrier) -> Running -> Ending -> Ended
//! rank     Assigned -> Held -> Running -> Exited   (Lost: its node is gone, its end not proven)
//! ```
//!
//! Invariants, checked by [`Core::check`] after every event of every test:
//!
//! * **gang**: an attempt has all of its ranks, on as many distinct nodes as the job asked for;
//! * **barrier**: no rank is ordered to start before every rank of the attempt is held;
//! * **one live attempt**: the next attempt is placed only when every rank of the one before has
//!   ended, is reported absent by its own node, or has outlived its orphan lease;
//! * **exact slots**: a node's ranks never exceed its slots, and every slot is given back once;
//! * **intent before effect**: within one step every [`Decision::Persist`] precedes every
//!   [`Decision::Order`]; a driver that makes the former durable first, those of one step as one
//!   transaction, can crash anywhere;
//! * **level, not edge**: orders may be lost with a connection; the inventory in the next hello
//!   brings node and core together again.
//!
//! Order of jobs: priority, then submission. A job that does not fit now, but would on the
//! nodes that are up, holds back those behind it (so large jobs cannot starve); one that could
//! not fit even on empty nodes holds back nobody. There is no backfill and no preemption yet.

mod event;
mod invariants;
mod job;
mod machine;
mod node;
mod place;
mod policy;
mod report;
mod restart;
mod spec;
mod why;

#[cfg(test)]
mod sim_tests;
#[cfg(test)]
mod unit_tests;

pub use event::{Answer, Decision, Event, Now, Order, RankKey, RankReport, Record, Refusal, Reported};
pub use job::{Attempt, EndCause, Exit, Job, JobState, RankSlot, RankState, Stage, signal_name};
pub use machine::Core;
pub use node::{Node, NodeInfo, NodeState};
pub use policy::Policy;
pub use spec::JobSpec;
