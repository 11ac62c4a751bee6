//! Ordered message channels for collectives: driven by the caller's own progress thread, no
//! runtime, no thread of their own.
//!
//! A message is a fixed header, whose meaning is the caller's, and a payload that moves between
//! the memory of both callers without a stop in between: the receiver sees the header first and
//! then says where the payload lands.

mod connect;
mod tcp;

pub use connect::{ChannelListener, connect_channel};

use crate::error::HandshakeError;
use firefly_types::ErrorKind;
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
            ChannelError::Closed { .. } => ErrorKind::Disconnected,
            ChannelError::Protocol(_) | ChannelError::Misuse(_) => ErrorKind::InvalidArgument,
            ChannelError::Deadline(_) => ErrorKind::Timeout,
            ChannelError::Unreachable { .. } => ErrorKind::Unavailable,
            ChannelError::Refused(_) => ErrorKind::Unauthenticated,
            ChannelError::Listener(_) => ErrorKind::Internal,
        }
    }

    fn closed(what: &str, e: &io::Error) -> ChannelError {
        ChannelError::Closed { reason: format!("{what}: {e}") }
    }
}

/// One ordered, reliable, two-way connection between two ranks.
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

    /// Moves bytes without blocking; pushes completions. An error is returned by a call that pushed
    /// none, so that completions before it are seen first. Call it after posting and before waiting
    /// on the descriptor.
    fn progress(&mut self, out: &mut Vec<Completion>) -> Result<(), ChannelError>;

    /// File descriptor to poll for readability, and whether writability matters now.
    fn poll_fd(&self) -> (RawFd, bool);

    /// Bytes sent since the start, headers included.
    fn bytes_sent(&self) -> u64;

    /// Bytes received since the start, headers included.
    fn bytes_received(&self) -> u64;

    /// What carries it, such as "tcp".
    fn transport(&self) -> &'static str;
}

#[cfg(test)]
mod tests;
