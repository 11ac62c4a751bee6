//! Bulk transport between the processes of one cluster: remote procedure calls whose payloads are
//! received straight into the caller's or the pool's memory ([`rpc`]), and ordered channels for
//! collectives ([`channel`]).
//!
//! ```text
//!   fs3, scheduler                     reduce
//!   Client / Server (tokio)            Channel (the caller's own progress thread)
//!        └── link: LinkTx + LinkRx          └── non-blocking socket
//!              ├── TCP                handshake: mutual proof of the cluster's secret,
//!              └── RDMA (verbs)                  one state machine without I/O for both
//!   buf: page-aligned, bounded, registered once
//! ```
//!
//! The seam is the internal trait pair in `link`: register memory, send and receive small messages,
//! pull (RDMA READ; on TCP the bytes that follow the request), push (RDMA WRITE; on TCP the bytes
//! within the reply), completions. RPC is written once over it; `link::contract` and
//! `rpc::tests::rpc_contract` are one test body that runs over both carriers, over verbs in a
//! virtual machine with Soft-RoCE (`tests/rdma-vm`). libibverbs is looked
//! up at run time, and a machine without it uses TCP ([`fabric`]).
//!
//! Invariants kept here:
//!
//! * **A buffer in flight is never freed.** From the moment that a call is on its way, its receive
//!   buffer belongs to the connection, until the answer came or the connection (on RDMA: the queue
//!   pair) was destroyed. Timeouts and dropped futures change nothing about that.
//! * **Nobody is served who has not proven to hold the secret**, and the secret never crosses the
//!   wire. Proofs are bound to both nonces, the roles, the cluster and all that was negotiated.
//! * **Memory is bounded**: per connection by the calls in flight, per process by the pool. Lengths
//!   are checked against limits before memory is taken; a flood becomes waiting at the sender.
//! * **A peer that misbehaves costs its own connection**, with a message that says why, and nothing
//!   else.
//! * **A call that failed with `Timeout` or `Disconnected` may have happened.** RPC never repeats a
//!   call that was sent; exactly-once is the services' affair (`types::RequestId`).
//!
//! What this crate does not do: encryption and per-message authentication (the data network is
//! trusted to deliver what members send; checksums of stored data travel end to end in the heads),
//! retries (callers use `types::Backoff`), and naming (callers know addresses from the routing
//! table).

pub mod buf;
pub mod channel;
pub mod error;
pub mod fabric;
mod handshake;
mod link;
pub mod rpc;
mod verbs;

pub use buf::{BUF_ALIGN, Buf, BufMut, BufPool};
pub use channel::{
    Channel, ChannelCounters, ChannelError, ChannelListener, ChannelOptions, Completion, HEADER_BYTES,
    Incoming, MOST_SOCKETS, Region, connect_channel,
};
pub use error::{CallError, HandshakeError, LinkError, WorkError};
pub use fabric::{
    Class, Fabric, FabricError, FabricReport, NetOptions, RailReport, RailWork, Traffic, Transport,
};
pub use rpc::{
    Call, Client, ClientOptions, ConnectionInfo, Identity, MAX_HEAD, MAX_PAYLOAD, NetInfo, NetStats,
    PeerInfo, Reply, Request, Response, Server, ServerOptions, ServerStats, Service,
};
