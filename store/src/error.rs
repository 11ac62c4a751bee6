//! Why the store refused or failed.

use firefly_types::{ErrorKind, WireError};
use std::sync::Arc;

/// Everything that can go wrong between a caller and the store.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A transaction that committed in between wrote something that this one had read, or this
    /// one's snapshot is too old to be checked. Nothing was written; run it again from the start.
    #[error("the transaction lost against a concurrent one; run it again from the start")]
    Conflict,
    /// Keys are 1 byte to [`crate::MAX_KEY_BYTES`].
    #[error("a key of {0} bytes was given; keys have 1 to {max} bytes", max = crate::MAX_KEY_BYTES)]
    KeySize(usize),
    /// Values are at most [`crate::MAX_VALUE_BYTES`].
    #[error("a value of {0} bytes was given; values have at most {max} bytes: split it", max = crate::MAX_VALUE_BYTES)]
    ValueTooLarge(usize),
    /// Reads and writes of one transaction together exceed a limit.
    #[error(
        "the transaction holds {ops} operations of {bytes} bytes; at most {max_ops} and {max_bytes} are taken: \
         commit smaller steps",
        max_ops = crate::MAX_TXN_OPS, max_bytes = crate::MAX_TXN_BYTES
    )]
    TxnTooLarge {
        /// Keys read and written, ranges read.
        ops: usize,
        /// Size in the log.
        bytes: usize,
    },
    /// Stored bytes are not what was stored.
    #[error(
        "the store is damaged: {0}; restore the folder from a copy, or start it empty if its data can be lost"
    )]
    Corrupt(String),
    /// Another process, or another handle in this one, has the store open.
    #[error("the store {0} is open already; one process at a time can have it: stop the other one first")]
    InUse(String),
    /// The file system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done, with the file's name.
        doing: String,
        /// Why it failed.
        source: Arc<std::io::Error>,
    },
    /// An I/O error stopped the store. The commit in flight may or may not be durable; opening
    /// the store again decides.
    #[error("the store has stopped: {0}; open it again")]
    Failed(String),
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// The small public kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Conflict => ErrorKind::Conflict,
            Self::KeySize(_) => ErrorKind::InvalidArgument,
            Self::ValueTooLarge(_) | Self::TxnTooLarge { .. } => ErrorKind::TooLarge,
            Self::Corrupt(_) => ErrorKind::Corrupt,
            Self::InUse(_) => ErrorKind::Busy,
            Self::Io { .. } => ErrorKind::Internal,
            Self::Failed(_) => ErrorKind::Unavailable,
            Self::Closed => ErrorKind::Cancelled,
        }
    }

    pub(crate) fn io(doing: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { doing: doing.into(), source: Arc::new(source) }
    }

    /// The state machine's engine failed. Its own corruption reports keep their kind.
    pub(crate) fn engine(doing: &str, error: impl Into<redb::Error>) -> Self {
        match error.into() {
            redb::Error::Corrupted(what) => Self::Corrupt(format!("state machine: {what}")),
            redb::Error::Io(source) => Self::io(format!("state machine: {doing}"), source),
            other => Self::Failed(format!("state machine: {doing}: {other}")),
        }
    }
}

impl From<StoreError> for WireError {
    fn from(error: StoreError) -> Self {
        WireError::new(error.kind(), error.to_string())
    }
}
