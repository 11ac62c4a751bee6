//! The pure scheduler: one event in, decisions out. No clock, socket, file or random source; the
//! daemon and the simulator drive the same [`Core`].
//!
//! # What there is
//!
//! ```text
//! site > group (pool of nodes of one kind) > zone > spine > leaf > node (GPUs, slots, cores, memory)
//! team > user > job (> array) > attempt (epoch n) > seat (what one node gives) > rank (process)
//! quota: user x group x priority -> most nodes, GPUs, cores
//! ```
//!
//! Gangs (and exclusive jobs) take whole nodes; a job on one node may take a part. A job belongs to
//! exactly one group, so that no limit on a group can be evaded by not naming it.
//!
//! # How things go
//!
//! ```text
//! job      Pending -> Starting -> Running -> Succeeded | Failed
//!          ^  |  ^       |         |  |  \--> Stopping -> Stopped
//!          |  v  |       |         |  v
//!        Held    +-------+---------+ Suspending     (a new attempt with the next epoch follows)
//! attempt  Preparing (ranks held at the barrier) -> Running [-> Suspending] -> Ending -> Ended
//! rank     Assigned -> Held -> Running -> Exited    (Lost: its node is gone, its end not proven)
//! node     ready | lost (silent) | cordoned (by a person, by faults, for maintenance)
//! ```
//!
//! Every attempt has exactly one end cause ([`EndCause`]); a table says what follows from it.
//!
//! # Who decides what
//!
//! | module | question |
//! | --- | --- |
//! | `order` | who goes first: rules that a site names and orders |
//! | `fair`, `users` | who has had how much lately |
//! | `quota` | who may hold how much |
//! | `capacity`, `pack` | what is free, and which of it to take |
//! | `pass` | who starts now, entitled or filling |
//! | `reserve` | what the first blocked job of a group waits for |
//! | `preempt`, `suspend` | who gives way, and how |
//! | `restart`, `faults` | what follows from an end, whom to blame, when to stop trying |
//! | `why` | what binds, and the smallest change that helps |
//! | `replay` | what would have been decided otherwise |
//!
//! # Promises
//!
//! Checked by [`Core::check`] after every event of every test, and from outside by the tests' own
//! books:
//!
//! * **gang**: an attempt has all of its ranks, on as many distinct nodes as the job asked for;
//! * **exclusivity**: no slot, core, byte or accelerator is given twice; a whole node is one job's;
//! * **barrier**: no rank is ordered to start before every rank of the attempt is held;
//! * **one live attempt**: the next attempt is placed only when every rank of the one before has
//!   ended, is reported absent by its own node, or has outlived its orphan lease;
//! * **quota**: entitled attempts of an owner never start beyond its quota; what runs beyond it is
//!   marked and gives way on demand;
//! * **zones**: at most `cross_zone_jobs` span zones, and only those that no zone could hold;
//! * **no preemption in vain**: nobody is displaced unless the waiting job fits on the nodes that
//!   then come free; nobody who cannot be suspended, and nobody before its quantum is over;
//! * **bounded wait**: a job that has waited `overdue_after_ms` goes before all others, oldest
//!   first, and nobody takes the nodes that the first of them waits for. Where nodes can suspend it
//!   starts one quantum and one grace later at most; elsewhere when those on its nodes end;
//! * **accounts**: what a user is charged is the sum of the intervals that its seats were held;
//! * **intent before effect**: within one step every [`Decision::Persist`] precedes every
//!   [`Decision::Order`]; a driver that makes the former durable first, those of one step as one
//!   transaction, can crash anywhere;
//! * **level, not edge**: orders may be lost with a connection; the inventory in the next hello
//!   brings node and core together again;
//! * **determinism**: the same events at the same times give the same decisions.
//!
//! # What it costs
//!
//! Every event updates indexes node by node and job by job; nothing looks at all nodes or at all
//! waiting jobs, except a changed policy and [`Core::check`]. Jobs with equal requests of one user
//! form a class that is tried once (`queue`). Time is kept by timers (`timers`); a sign of life
//! costs a look-up.

mod amount;
mod capacity;
mod event;
mod fair;
mod faults;
mod invariants;
mod job;
mod machine;
mod node;
mod order;
mod pack;
mod pass;
mod policy;
mod preempt;
mod queue;
mod quota;
mod replay;
mod report;
mod requests;
mod reserve;
mod restart;
mod spec;
mod suspend;
mod timers;
mod users;
mod why;

#[cfg(test)]
mod sim_tests;
#[cfg(test)]
mod unit_tests;

pub use amount::{Amount, Usage};
pub use event::{
    AccountRecord, Answer, Decision, Event, Now, Order, RankKey, RankReport, Record, Refusal, Reported,
};
pub use faults::{Fault, Maintenance};
pub use job::{
    Attempt, EndCause, Exit, Job, JobState, Opportunistic, RankSlot, RankState, Seat, Stage, Suspend,
    signal_name,
};
pub use machine::Core;
pub use node::{Node, NodeInfo, NodeRecord, NodeState, Place};
pub use order::OrderBy;
pub use policy::{Backfill, Demotion, GroupPolicy, Packing, Policy, Team};
pub use preempt::Displace;
pub use quota::Quota;
pub use replay::{Difference, Entry, LOG_VERSION, Outcome, Replay, Start};
pub use spec::{After, Dependency, JobSpec};
pub use why::{Binding, Change, Explanation};
