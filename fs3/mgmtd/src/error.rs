//! Why a manager cannot start or go on.

use firefly_store::StoreError;
use firefly_types::ErrorKind;

/// What stops a manager. Errors of single requests are `WireError`s instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MgmtdError {
    /// The configuration cannot work; the message names the knob.
    #[error("manager configuration: {0}")]
    Config(String),
    /// No chains can be laid over the nodes.
    #[error("manager configuration: {0}")]
    Placement(#[from] fs3_core::placement::PlacementError),
    /// The folder belongs to another cluster, or the configuration no longer fits it.
    #[error("{0}")]
    Mismatch(String),
    /// The store refused or failed.
    #[error("manager state: {0}")]
    Store(#[from] StoreError),
    /// Stored state makes no sense.
    #[error("manager state: {0}")]
    Corrupt(String),
    /// The address cannot be bound or served.
    #[error("cannot listen on {addr}: {source}")]
    Listen {
        /// Which address.
        addr: std::net::SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The gRPC server failed.
    #[error("manager gRPC: {0}")]
    Serve(String),
}

impl MgmtdError {
    /// The small public kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config(_) | Self::Placement(_) => ErrorKind::InvalidArgument,
            Self::Mismatch(_) => ErrorKind::AlreadyExists,
            Self::Store(e) => e.kind(),
            Self::Corrupt(_) => ErrorKind::Corrupt,
            Self::Listen { .. } | Self::Serve(_) => ErrorKind::Unavailable,
        }
    }
}
