//! Ordered message channels for collectives: driven by the caller's own progress thread, no
//! runtime, no thread of their own.
//!
//! A message is a fixed header, whose meaning is the caller's, and a payload. The receiver sees the
//! header first and then says where the payload lands.
//!
//! | carrier | payload's way | copies in user space |
//! | --- | --- | --- |
//! | TCP, one socket | between the memory of both callers by the kernel | 0 |
//! | TCP, k sockets | the same, large ones in k parts at once | 0 |
//! | RDMA, both memories in a [`Region`] | one WRITE from one to the other | 0 |
//! | RDMA, one of them in a region | WRITEs between it and the other side's stage or ring | 1 |
//! | RDMA, neither | stage, WRITE, ring | 2: one on each side |
//!
//! Which carrier it is, both sides agree on after they have proven themselves to each other
//! ([`connect_channel`]).

mod accept;
mod connect;
mod negotiate;
mod rdma;
mod region;
mod striped;
mod talk;
mod tcp;
mod wire;

pub use accept::ChannelListener;
pub use connect::connect_channel;
pub use region::Region;

use crate::error::{HandshakeError, LinkError};
use crate::fabric::{Fabric, FabricError};
use firefly_types::ErrorKind;
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

/// Bytes of a message's header.
pub const HEADER_BYTES: usize = 64;

/// Something posted is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Completion {
    /// The memory of a [`Channel::post_send`] may be changed again. It does not say that the peer
    /// has received it.
    Sent {
        /// As given.
        token: u64,
    },
    /// The memory of a [`Channel::post_recv`] holds the payload.
    Received {
        /// As given.
        token: u64,
    },
}

/// A message whose header has arrived.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Incoming {
    /// As the peer gave it.
    pub header: [u8; HEADER_BYTES],
    /// Bytes of the payload.
    pub len: usize,
}

/// Why a channel cannot go on, or could not be made. Once a channel has failed it stays failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The peer is gone.
    #[error("the channel is closed: {reason}")]
    Closed {
        /// How it ended.
        reason: String,
    },
    /// The peer broke the protocol.
    #[error("the peer broke the channel's protocol: {0}")]
    Protocol(String),
    /// An RDMA device could not do its work.
    #[error("{device}: {what}: {reason}")]
    Device {
        /// Which device.
        device: String,
        /// What was tried.
        what: String,
        /// What it said.
        reason: String,
    },
    /// RDMA was demanded and cannot be had.
    #[error(
        "{peer} cannot be reached by RDMA, which was demanded: {why}; repair it, or allow TCP (transport auto)"
    )]
    NoRdma {
        /// Address of the peer.
        peer: String,
        /// Why not.
        why: String,
    },
    /// The options of the network cannot be followed.
    #[error(transparent)]
    Options(FabricError),
    /// The caller broke the channel's rules; nothing was done.
    #[error("misuse of a channel: {0}")]
    Misuse(&'static str),
    /// Not done by the deadline.
    #[error("{0} was not done by the deadline")]
    Deadline(String),
    /// The peer could not be reached.
    #[error("cannot connect a channel to {peer}: {reason}")]
    Unreachable {
        /// Address dialled.
        peer: String,
        /// Why.
        reason: String,
    },
    /// The peer did not prove that it holds the same secret.
    #[error("the peer was refused: {0}")]
    Refused(HandshakeError),
    /// The listening socket failed.
    #[error("cannot accept channels: {0}")]
    Listener(String),
}

impl ChannelError {
    /// The small public kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ChannelError::Closed { .. } | ChannelError::Device { .. } => ErrorKind::Disconnected,
            ChannelError::Protocol(_) | ChannelError::Misuse(_) | ChannelError::Options(_) => {
                ErrorKind::InvalidArgument
            }
            ChannelError::Deadline(_) => ErrorKind::Timeout,
            ChannelError::Unreachable { .. } | ChannelError::NoRdma { .. } => ErrorKind::Unavailable,
            ChannelError::Refused(_) => ErrorKind::Unauthenticated,
            ChannelError::Listener(_) => ErrorKind::Internal,
        }
    }

    fn closed(what: &str, e: &io::Error) -> ChannelError {
        ChannelError::Closed { reason: format!("{what}: {e}") }
    }

    /// Of a device's error.
    fn device(device: &str, error: LinkError) -> ChannelError {
        match error {
            LinkError::Device { device, what, reason } => {
                ChannelError::Device { device, what: format!("{what} failed"), reason }
            }
            LinkError::Work { device, what, error } => {
                let what = format!("{what} failed");
                ChannelError::Device { device, what, reason: error.to_string() }
            }
            other => ChannelError::Device {
                device: device.to_owned(),
                what: "its work failed".to_owned(),
                reason: other.to_string(),
            },
        }
    }
}

/// How channels are made. Both sides' options count.
#[derive(Clone, Debug)]
pub struct ChannelOptions {
    /// The transports, and how collective traffic is marked.
    pub fabric: Fabric,
    /// TCP connections for one channel, 1 to [`MOST_SOCKETS`]; the smaller number of both sides is
    /// used. More than one pays where one connection does not fill the path: a switch that spreads
    /// connections over links, or a single core that cannot keep up with the kernel's copying.
    pub sockets: usize,
}

/// Most TCP connections of one channel.
pub const MOST_SOCKETS: usize = 16;

impl Default for ChannelOptions {
    fn default() -> ChannelOptions {
        ChannelOptions { fabric: Fabric::shared(), sockets: 1 }
    }
}

/// What a channel has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelCounters {
    /// Bytes sent, headers included.
    pub bytes_sent: u64,
    /// Bytes received, headers included.
    pub bytes_received: u64,
    /// Payload bytes copied in user space on their way, in both directions.
    pub bytes_copied: u64,
    /// Requests given to the device, or system calls that moved bytes.
    pub operations: u64,
    /// Completions taken from the device; 0 on TCP.
    pub completions: u64,
    /// Memory registrations that belong to this channel alone; 0 on TCP.
    pub registrations: u64,
}

/// One ordered, reliable, two-way connection between two ranks.
///
/// Sends are reported in the order posted, and so are receives. The next message may show before
/// the receive of the one before is complete; callers that post one receive at a time lose nothing
/// but overlap.
pub trait Channel: Send {
    /// Queues a message. Messages arrive in the order posted.
    ///
    /// # Safety
    /// The memory must be valid for reads and unchanged until `Sent { token }` is reported or the
    /// channel is destroyed.
    unsafe fn post_send(
        &mut self,
        token: u64,
        header: &[u8; HEADER_BYTES],
        ptr: *const u8,
        len: usize,
    ) -> Result<(), ChannelError>;

    /// The next incoming message's header once it has arrived; its payload waits until
    /// [`Channel::post_recv`] says where it lands. Gives the same message until then.
    fn peek(&mut self) -> Result<Option<Incoming>, ChannelError>;

    /// Says where the payload of the peeked message lands. `len` must equal the peeked length.
    ///
    /// # Safety
    /// The memory must be valid for writes and not otherwise accessed until `Received { token }`
    /// is reported or the channel is destroyed.
    unsafe fn post_recv(&mut self, token: u64, ptr: *mut u8, len: usize) -> Result<(), ChannelError>;

    /// Moves bytes without blocking; pushes completions; whether anything moved. An error is
    /// returned by a call that pushed none, so that completions before it are seen first. Call it
    /// after posting, and until it moves nothing before waiting on the descriptors.
    fn progress(&mut self, out: &mut Vec<Completion>) -> Result<bool, ChannelError>;

    /// Adds the file descriptors to poll for readability, and whether writability matters now.
    fn poll_fds(&self, out: &mut Vec<(RawFd, bool)>);

    /// Adds the file descriptors that a forked child must close: as long as it holds them, the end
    /// of this process does not end the channel for the peer.
    fn fork_fds(&self, out: &mut Vec<RawFd>) {
        let mut fds = Vec::new();
        self.poll_fds(&mut fds);
        out.extend(fds.into_iter().map(|(fd, _)| fd));
    }

    /// What it has done so far.
    fn counters(&self) -> ChannelCounters;

    /// What carries it: "tcp", "rdma".
    fn transport(&self) -> &'static str;

    /// Why it is not carried by RDMA, if it is not.
    fn why_not_rdma(&self) -> Option<&str> {
        None
    }
}

/// The first element, if there is one of which `is` holds.
fn pop_if<T>(queue: &mut VecDeque<T>, is: impl FnOnce(&T) -> bool) -> Option<T> {
    if queue.front().is_some_and(is) { queue.pop_front() } else { None }
}

#[cfg(test)]
mod contract;
#[cfg(test)]
mod tests;
