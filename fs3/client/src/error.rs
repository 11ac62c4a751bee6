//! What can go wrong in the client, precisely; [`FsError::kind`] is what a program acts on.

use firefly_net::CallError;
use firefly_types::{ErrorKind, WireError};
use fs3_core::layout::LayoutError;
use std::time::Duration;

/// Why an operation failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FsError {
    /// A server answered with an error.
    #[error("{what}: {error}")]
    Remote {
        /// What was wanted.
        what: String,
        /// The server's answer.
        error: WireError,
    },
    /// The call itself failed: no connection, no answer in time, refused.
    #[error("{what}: {message}")]
    Call {
        /// What was wanted.
        what: String,
        /// Sort of failure.
        kind: ErrorKind,
        /// What happened.
        message: String,
    },
    /// Retried until the limit.
    #[error("{what}: given up after {attempts} tries in {elapsed:.1?}; the last one: {last}")]
    GaveUp {
        /// What was wanted.
        what: String,
        /// Tries made.
        attempts: u32,
        /// Time since the first try.
        elapsed: Duration,
        /// Kind of the last failure.
        kind: ErrorKind,
        /// The last failure.
        last: String,
    },
    /// Every replica's bytes fail their checksum.
    #[error("{what}: every replica that answered returned bytes that fail their checksum; run `ff fs fsck`")]
    Corrupt {
        /// What was wanted.
        what: String,
    },
    /// Nobody to ask: the routing table has no such server or chain, or none that serves.
    #[error("{what}: {missing}; see `ff fs chain ls` and `ff fs node ls`")]
    NoServer {
        /// What was wanted.
        what: String,
        /// What is missing.
        missing: String,
    },
    /// A peer sent something that its protocol does not allow.
    #[error("{what}: unexpected answer: {detail}")]
    Protocol {
        /// What was wanted.
        what: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The operation makes no sense on this object or with these arguments.
    #[error("{message}")]
    Invalid {
        /// Sort of mistake.
        kind: ErrorKind,
        /// For people.
        message: String,
    },
    /// Reading or writing a local file, for put and get.
    #[error("{path}: {message}")]
    Local {
        /// The local file.
        path: String,
        /// What happened.
        message: String,
    },
}

impl FsError {
    /// Sort of failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Remote { error, .. } => error.kind,
            Self::Call { kind, .. } | Self::GaveUp { kind, .. } | Self::Invalid { kind, .. } => *kind,
            Self::Corrupt { .. } => ErrorKind::Corrupt,
            Self::NoServer { .. } => ErrorKind::Unavailable,
            Self::Protocol { .. } | Self::Local { .. } => ErrorKind::Internal,
        }
    }

    pub(crate) fn invalid(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Invalid { kind, message: message.into() }
    }

    pub(crate) fn call(what: &str, error: CallError) -> Self {
        match error {
            CallError::Remote(error) => Self::Remote { what: what.to_owned(), error },
            other => {
                // A handshake cut short by a server that starts or dies is worth another try; a
                // wrong secret is not.
                let kind = match &other {
                    CallError::Refused { reason, .. } => reason.kind(),
                    other => other.kind(),
                };
                Self::Call { what: what.to_owned(), kind, message: other.to_string() }
            }
        }
    }

    pub(crate) fn protocol(what: &str, detail: impl Into<String>) -> Self {
        Self::Protocol { what: what.to_owned(), detail: detail.into() }
    }
}

impl From<LayoutError> for FsError {
    fn from(error: LayoutError) -> Self {
        let kind = match error {
            LayoutError::TooFar { .. } => ErrorKind::TooLarge,
            _ => ErrorKind::Internal,
        };
        Self::Invalid { kind, message: error.to_string() }
    }
}
