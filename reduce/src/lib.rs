//! Asynchronous collectives on the CPU and the wire.
//!
//! Ranks of one node exchange data through shared memory, ranks of different nodes through
//! `firefly_net` channels: RDMA where both have it, TCP elsewhere ([`Config::channels`]). Each group has one progress thread; a thread that waits for an operation
//! drives the group itself. The C ABI is in `ffi/`.
//!
//! Invariants:
//!
//! * submitting never blocks on a peer; every operation ends, with success or an error that names
//!   ranks and operation;
//! * collectives match by issue order; each message carries what its sender issued, so different
//!   operations at one place of the sequence are an error on both sides;
//! * one canonical reduction tree over ranks ([`kernels`]): the bits of a result depend on the
//!   inputs and the group's size alone;
//! * peers never write this rank's user memory: what they send lands in segments, sockets, rings and
//!   staging memory, and is copied or reduced from there by this rank; once an operation has ended nothing of ours touches its memory;
//! * indices and lengths from shared memory or the wire are copied once and checked before use.
//!
//! ```no_run
//! use firefly_reduce::{Communicator, ReduceOp};
//! let group = Communicator::from_env()?;
//! let mut gradients = vec![1.0f32; 1 << 20];
//! group.allreduce_f32(&mut gradients, ReduceOp::Avg)?;
//! # Ok::<(), firefly_reduce::ReduceError>(())
//! ```

mod bootstrap;
mod comm;
mod cutoffs;
pub mod doctor;
mod dtype;
mod elastic;
mod engine;
mod environment;
mod error;
mod fork;
mod group;
mod header;
pub mod kernels;
mod local;
mod network;
mod op;
mod ops;
mod options;
pub mod perf;
mod placement;
mod rendezvous;
mod request;
mod scratch;
mod shm;
mod split;
pub mod status;
mod store;
mod wire;

pub use comm::{Communicator, Config, Handle, Meeting, Pending, Scalar, secret_from_env};
pub use cutoffs::{Algorithm, Cutoffs};
pub use dtype::{DType, ReduceOp};
pub use environment::{bind_address_from_env, node_key_from_env};
pub use error::ReduceError;
pub use group::{Stats, SubmitOptions};
pub use op::Callback;
pub use options::Options;
pub use rendezvous::Rendezvous;
pub use request::{Operation, RawBuf, Request};
pub use store::{MemoryStore, Store, StoreError};
pub use wire::Reach;

/// Memory segments that this process has mapped; for tests of resource release.
#[doc(hidden)]
pub fn mapped_segments() -> usize {
    shm::segment::mapped_segments()
}
