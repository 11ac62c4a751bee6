//! Why a call, a handshake or a link failed.

pub use crate::verbs::status::WorkError;
use firefly_types::{ErrorKind, WireError};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Why a call did not return a response.
///
/// [`CallError::Timeout`] and [`CallError::Disconnected`] mean that the call may or may not have
/// happened; the other variants mean that it did not, or (`Remote`) what its server said.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The server's own answer.
    #[error(transparent)]
    Remote(#[from] WireError),
    /// No answer in time.
    #[error(
        "no answer from {peer} to method {method} within {after:?}: it may or may not have happened; ask again with the same request id"
    )]
    Timeout {
        /// Address called.
        peer: String,
        /// Method called.
        method: u16,
        /// The time allowed.
        after: Duration,
    },
    /// The connection ended while the call was in flight.
    #[error(
        "the connection to {peer} ended before the answer came ({reason}): the call may or may not have happened"
    )]
    Disconnected {
        /// Address called.
        peer: String,
        /// How it ended.
        reason: String,
    },
    /// No connection could be made; nothing was sent.
    #[error("cannot connect to {peer}: {source}; is the server running there?")]
    Unreachable {
        /// Address called.
        peer: String,
        /// Why.
        source: io::Error,
    },
    /// The handshake failed; nothing was sent.
    #[error("{peer} and this process did not come to terms: {reason}")]
    Refused {
        /// Address called.
        peer: String,
        /// Which part of the handshake failed.
        reason: HandshakeError,
    },
    /// The call is over a limit of the protocol; nothing was sent.
    #[error("the {what} of a call is {len} bytes, the limit is {limit}: split the request")]
    TooLarge {
        /// Head or payload.
        what: &'static str,
        /// What was given.
        len: usize,
        /// What is allowed.
        limit: usize,
    },
}

impl CallError {
    /// The small public kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            CallError::Remote(e) => e.kind,
            CallError::Timeout { .. } => ErrorKind::Timeout,
            CallError::Disconnected { .. } => ErrorKind::Disconnected,
            CallError::Unreachable { .. } => ErrorKind::Unavailable,
            // Nothing was sent, so what passes by itself is "unavailable", not "may have happened".
            CallError::Refused { reason, .. } => match reason.kind() {
                ErrorKind::Timeout | ErrorKind::Disconnected => ErrorKind::Unavailable,
                kind => kind,
            },
            CallError::TooLarge { .. } => ErrorKind::TooLarge,
        }
    }
}

/// Why two processes did not agree to talk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// The other side does not speak this protocol at all.
    #[error("what came is not a Firefly handshake")]
    NotFirefly,
    /// A field holds a value that this version does not define.
    #[error("a handshake message is malformed: {0}")]
    Malformed(&'static str),
    /// No common protocol version.
    #[error(
        "protocol versions do not overlap: the client speaks {client_min} to {client_max}, the server {server_min} to {server_max}; upgrade the older one"
    )]
    Version {
        /// Lowest of the client.
        client_min: u16,
        /// Highest of the client.
        client_max: u16,
        /// Lowest of the server.
        server_min: u16,
        /// Highest of the server.
        server_max: u16,
    },
    /// The other side belongs to another cluster.
    #[error("the server belongs to another cluster; check the address and the cluster id")]
    WrongCluster,
    /// An RPC client met a channel listener, or the other way round.
    #[error("the port serves another purpose (RPC against channel); check the address")]
    WrongPurpose,
    /// The other side does not hold the same secret.
    #[error("the other side does not hold the same cluster secret; check the secret files of both")]
    WrongSecret,
    /// The server takes no more connections now.
    #[error("the server is at its limit of connections; try again later")]
    Full,
    /// Only RDMA may be used, and this device does not reach the other side.
    #[error("RDMA was asked for and does not work (device {device}): {reason}")]
    Rail {
        /// This side's device.
        device: String,
        /// What failed.
        reason: String,
    },
    /// What the sides said about their RDMA devices makes no sense.
    #[error("the negotiation of RDMA went wrong: {0}")]
    Negotiation(String),
    /// The server asks for TLS and this side did not use it.
    #[error("the server uses TLS and this side does not; set `tls` alike on both")]
    TlsWanted,
    /// TLS was not agreed on.
    #[error("TLS failed: {0}")]
    Tls(String),
    /// Took too long.
    #[error("the handshake did not finish in time")]
    TimedOut,
    /// The connection ended during the handshake.
    #[error("the connection ended during the handshake: {0}")]
    Ended(String),
}

impl HandshakeError {
    /// The small public kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            HandshakeError::TimedOut => ErrorKind::Timeout,
            HandshakeError::Full | HandshakeError::Rail { .. } => ErrorKind::Unavailable,
            HandshakeError::Ended(_) => ErrorKind::Disconnected,
            HandshakeError::Version { .. } => ErrorKind::Unsupported,
            _ => ErrorKind::Unauthenticated,
        }
    }
}

/// Why a link between two processes cannot go on. The connection is destroyed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The peer closed in an orderly way.
    #[error("the peer closed the connection")]
    Closed,
    /// The transport failed.
    #[error("the transport failed: {0}")]
    Io(#[from] io::Error),
    /// The peer neither takes nor gives the bytes of a message that has begun.
    #[error("the peer moved no byte of a message for {0:?}")]
    Stalled(Duration),
    /// The peer moves the bytes of a message, but hardly: its memory would be held for ever.
    #[error("the peer moved a message slower than {0} bytes a second")]
    Dribbled(u64),
    /// The peer's host acknowledges nothing any more: power, cable or network.
    #[error("the peer's host has acknowledged nothing for {0:?}")]
    Vanished(Duration),
    /// The peer sent something that the protocol does not allow.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// A device said no.
    #[error("{device}: {what} failed: {reason}")]
    Device {
        /// Which device.
        device: String,
        /// What was tried.
        what: &'static str,
        /// What it said.
        reason: String,
    },
    /// Work that a device had taken was not done.
    #[error("{device}: {what} failed: {error}")]
    Work {
        /// Which device.
        device: String,
        /// What was to be done.
        what: &'static str,
        /// What became of it.
        error: WorkError,
    },
    /// The link had ended before, for this reason.
    #[error("{0}")]
    Over(Arc<LinkError>),
}

impl LinkError {
    /// Whether it points at this side's device or the path from it rather than at the peer's
    /// process: another way to the peer may do better.
    pub fn is_of_the_device(&self) -> bool {
        match self {
            LinkError::Device { .. } => true,
            LinkError::Work { error, .. } => error.is_of_the_path(),
            LinkError::Over(reason) => reason.is_of_the_device(),
            _ => false,
        }
    }

    /// The small public kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            LinkError::Closed
            | LinkError::Io(_)
            | LinkError::Stalled(_)
            | LinkError::Dribbled(_)
            | LinkError::Vanished(_)
            | LinkError::Work { .. } => ErrorKind::Disconnected,
            LinkError::Protocol(_) => ErrorKind::InvalidArgument,
            LinkError::Device { .. } => ErrorKind::Unavailable,
            LinkError::Over(reason) => reason.kind(),
        }
    }
}
