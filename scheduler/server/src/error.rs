//! Why the daemon cannot run.

use firefly_store::StoreError;
use firefly_types::ErrorKind;
use std::net::SocketAddr;

/// Why the daemon cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    /// The address cannot be served.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The state cannot be read or written.
    #[error("the scheduler's state: {0}")]
    Store(#[from] StoreError),
    /// The state holds something that this version cannot read.
    #[error("the scheduler's state is damaged or from a newer version: {0}")]
    Damaged(String),
    /// A folder cannot be used.
    #[error("cannot use {path}: {source}")]
    Folder {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The daemon has ended.
    #[error("the scheduler is shutting down")]
    Stopped,
}

impl SchedulerError {
    /// For programs.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Listen { .. } | Self::Folder { .. } | Self::Stopped => ErrorKind::Unavailable,
            Self::Store(e) => e.kind(),
            Self::Damaged(_) => ErrorKind::Corrupt,
        }
    }
}
