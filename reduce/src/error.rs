//! Why a collective failed. One enum for the room; each message says which rank of which group,
//! which operation, what was missing.

use firefly_types::ErrorKind;

/// Why a group could not be formed, an operation was refused, or a group broke.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReduceError {
    /// The arguments make no sense; the group is unharmed.
    #[error("{detail}")]
    Invalid {
        /// What was wanted and what to pass instead.
        detail: String,
    },
    /// This element type has no such reduction; the group is unharmed.
    #[error("{detail}")]
    Unsupported {
        /// Which type and which reduction.
        detail: String,
    },
    /// The group could not be formed.
    #[error("{detail}")]
    Bootstrap {
        /// Who was missing, or what the system refused.
        detail: String,
    },
    /// A member's process died, or its host fell silent.
    #[error("{detail}")]
    PeerDied {
        /// The dead rank.
        rank: u32,
        /// How it was noticed and what waited for it.
        detail: String,
    },
    /// An operation did not complete within its time.
    #[error("{detail}")]
    Timeout {
        /// Ranks that had not done their part.
        missing: Vec<u32>,
        /// The operation and the ranks.
        detail: String,
    },
    /// Ranks issued different operations at one place of the sequence.
    #[error("{detail}")]
    Mismatch {
        /// Both sides.
        detail: String,
    },
    /// A peer sent or wrote something that the protocol does not allow.
    #[error("{detail}")]
    Protocol {
        /// What.
        detail: String,
    },
    /// The group was aborted or closed, here or by a peer.
    #[error("{detail}")]
    Aborted {
        /// By whom and why.
        detail: String,
    },
    /// The system refused something that must work.
    #[error("{detail}")]
    System {
        /// Which call and why.
        detail: String,
    },
}

impl ReduceError {
    /// The small public kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Bootstrap { .. } => ErrorKind::Unavailable,
            Self::PeerDied { .. } => ErrorKind::Disconnected,
            Self::Timeout { .. } => ErrorKind::Timeout,
            Self::Mismatch { .. } => ErrorKind::InvalidArgument,
            Self::Protocol { .. } => ErrorKind::Corrupt,
            Self::Aborted { .. } => ErrorKind::Cancelled,
            Self::System { .. } => ErrorKind::Internal,
        }
    }

    /// The same error with `context` in front of its message.
    pub fn during(&self, context: &str) -> Self {
        let mut error = self.clone();
        let detail = error.detail_mut();
        *detail = format!("{context}: {detail}");
        error
    }

    fn detail_mut(&mut self) -> &mut String {
        match self {
            Self::Invalid { detail }
            | Self::Unsupported { detail }
            | Self::Bootstrap { detail }
            | Self::PeerDied { detail, .. }
            | Self::Timeout { detail, .. }
            | Self::Mismatch { detail }
            | Self::Protocol { detail }
            | Self::Aborted { detail }
            | Self::System { detail } => detail,
        }
    }

    pub(crate) fn invalid(detail: impl Into<String>) -> Self {
        Self::Invalid { detail: detail.into() }
    }

    pub(crate) fn protocol(detail: impl Into<String>) -> Self {
        Self::Protocol { detail: detail.into() }
    }

    pub(crate) fn bootstrap(detail: impl Into<String>) -> Self {
        Self::Bootstrap { detail: detail.into() }
    }

    pub(crate) fn system(call: &str, source: impl std::fmt::Display) -> Self {
        Self::System { detail: format!("{call} failed: {source}") }
    }

    /// Number on the wire and in shared memory, for a peer's notice.
    pub(crate) fn code(&self) -> u32 {
        match self {
            Self::Invalid { .. } => 1,
            Self::Unsupported { .. } => 2,
            Self::Bootstrap { .. } => 3,
            Self::PeerDied { .. } => 4,
            Self::Timeout { .. } => 5,
            Self::Mismatch { .. } => 6,
            Self::Protocol { .. } => 7,
            Self::Aborted { .. } => 8,
            Self::System { .. } => 9,
        }
    }

    /// An error that rank `from` told us about.
    pub(crate) fn from_notice(code: u32, dead: u32, from: u32, text: &str) -> Self {
        let detail = format!("rank {from} reported: {text}");
        match code {
            4 => Self::PeerDied { rank: dead, detail },
            6 => Self::Mismatch { detail },
            7 => Self::Protocol { detail },
            // A peer's own timeout or abort ends this rank's operations because the peer left.
            _ => Self::Aborted { detail },
        }
    }
}
