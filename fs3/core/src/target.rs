//! The replication target: one replica of one chain, as a value.
//!
//! `step(event, now)` takes what arrived (requests, answers, disk completions, chain changes, time)
//! and returns what to do (disk writes, messages, replies). No thread, clock, socket or file is
//! inside; the storage server and the simulator drive the same machine.
//!
//! Protocol (chain replication with apportioned queries: van Renesse & Schneider 2004, Terrace &
//! Freedman 2009), with these additions:
//!
//! * **One pending update per chunk.** It holds the chunk's lock; later updates queue, bounded.
//! * **Parallel forwarding.** The head forwards an update while it writes its own copy. The
//!   *prefix-durable token* follows: a hop passes it on once it has the token itself and its own
//!   copy is durable. The tail commits on token + own durability, so nothing is ever readable that
//!   some predecessor could still lose. The token carries the predecessor's chunk checksum, so
//!   replicas are compared before anything is committed.
//! * **Pending is durable, commitment is not waited for.** An acknowledged update is durable as
//!   pending on every serving replica; the commit record follows lazily. A replica that restarts
//!   finds such updates pending and does not know whether they were committed: it serves them
//!   neither way until they are resolved (`Pending::may_be_committed`).
//! * **Every pending update ends.** The head re-drives what it has. Everybody else asks the
//!   predecessor (*resolve*): committed there, still pending there, or unknown there, which means
//!   that no replica can have committed it, so it is dropped.
//! * **Stamps.** Each forward carries (incarnation, sequence) of its sender; an older one than has
//!   been seen is refused, and a token names the stamp of the forward that it belongs to. So a
//!   message that was delayed across a retry or a restart does no harm.
//! * **Exactly-once.** The record (client, channel, sequence) → result is written with the data on
//!   every replica and travels with resync.
//!
//! Invariants (checked by `sim`): an acknowledged update is durable on every serving replica; a
//! version that was readable never vanishes; replicas at rest are equal; a request takes effect
//! at most once.

mod checksum;
mod copy;
mod forward;
mod machine;
mod records;
mod state;
mod tenure;
mod types;

#[cfg(test)]
mod tests;

pub use checksum::{DIGEST_UNIT, Digest, ZERO_UNIT_CRC, bind, payload_crc, unbind};
pub use machine::Target;
pub use records::{Record, RecordPage, Records};
pub use state::{Mutation, TargetOptions};
pub use tenure::{Tenure, Verdict};
pub use types::*;
