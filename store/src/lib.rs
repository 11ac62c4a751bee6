//! What the cluster agrees on: [`Kv`], a transactional key-value store whose every commit is an
//! entry of a raft log. On one machine the group has one member; the log, the apply path and the
//! files are the same as for a larger one.
//!
//! ```text
//! Txn (snapshot, read set, writes) ──commit──▶ queue ──▶ store thread:
//!     batch ─▶ raft ─▶ one frame + one fdatasync ─▶ conflict check ─▶ redb (not synced) ─▶ answers
//! every 16 MiB of log: redb synced (checkpoint), older log segments removed
//! ```
//!
//! Invariants:
//!
//! * A commit is acknowledged only after its entry is durable and applied; a snapshot taken after
//!   that sees it.
//! * Transactions are serializable, in the order of the log: one commits only if nothing that it
//!   read was written after its snapshot. The verdict is a function of the log alone, so every
//!   replica and every replay comes to the same one.
//! * After a crash the store holds every acknowledged commit, and of the others each entirely or
//!   not at all.
//! * After a failed write or fdatasync nothing is retried: the store stops, and opening it again
//!   finds out what is on the disk.
//! * Damage to acknowledged log data is an error at opening, never silence — except a damaged very
//!   last frame, which looks the same as a torn one.
//!
//! Not here yet: groups of more than one member (raft and the formats are ready; transport,
//! snapshots to followers and membership changes are not), and `Coord`.

mod error;
mod group;
mod kv;
mod log;
pub mod lossy;
mod machine;
mod mem;
mod record;
mod store;
mod txn;
mod window;

pub use error::StoreError;
pub use kv::{Kv, transact};
pub use log::disk::{Disk, DiskFile, RealDisk};
pub use mem::MemKv;
pub use store::{Store, StoreOptions, StoreStats};
pub use txn::{Pairs, Txn};

/// Longest key, bytes: names are at most 255, so this leaves room for prefixes.
pub const MAX_KEY_BYTES: usize = 4096;
/// Longest value, bytes.
pub const MAX_VALUE_BYTES: usize = 1 << 20;
/// Most bytes of one transaction in the log: reads and writes together.
pub const MAX_TXN_BYTES: usize = 8 << 20;
/// Most keys read, ranges read and keys written by one transaction.
pub const MAX_TXN_OPS: usize = 65_536;
