//! The fs3 file system as a library: routing, striping, retry, buffering. The mount, the command
//! line and the meta server's garbage worker are its users.
//!
//! * [`Fs3`] works on inodes and open [`File`]s; [`path`] adds paths; [`ChunkClient`] is for who
//!   has no namespace.
//! * Every change carries an exactly-once number that its retries repeat, so a fail-over is a
//!   pause, never a doubled or lost operation.
//! * Bytes whose checksum is wrong are never returned: another replica is asked.
//! * Written data is acknowledged by [`File::fsync`], [`File::flush`] and [`Durability`] other than
//!   `Buffered`, never before. All handles of one client see it at once. A background failure is
//!   reported once to each handle of the file.
//! * Memory is bounded: written data that waits, read-ahead, requests in flight.
//!
//! Layers, lower ones first: `lanes`, `retry`, `routing`, `manager` (session) → `chunkio`, `metaio`
//! (one request with its retries) → `extents`, `blocks`, `inode` (buffers of one file) → `file`,
//! `fs`, `path`.

mod blocks;
mod budget;
mod chunk_client;
mod chunkio;
mod error;
mod extents;
mod file;
mod fs;
mod inode;
mod lanes;
mod manager;
mod metaio;
mod options;
mod parallel;
pub mod path;
mod retry;
pub mod routing;
mod shared;
mod stats;

pub use chunk_client::ChunkClient;
pub use error::FsError;
pub use file::{Data, Durability, File};
pub use firefly_proto::meta::{Entry, Inode, InodeKind, Time};
pub use fs::{Fs3, NAME_MAX, NewNode, OpenMode, Page, ROOT, SetAttr, SetTime, StatFs, symlink_target};
pub use metaio::Credentials;
pub use options::ClientOptions;
pub use stats::ClientStats;
