//! Why a namespace operation was refused.

use firefly_store::StoreError;
use firefly_types::{ClientId, ErrorKind, InodeId, WireError};

/// A refused operation. Nothing of it has happened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A name is longer than [`crate::MAX_NAME`].
    #[error("a name of {got} bytes is too long: at most {most} are allowed")]
    NameTooLong {
        /// Bytes in the name.
        got: usize,
        /// Bytes allowed.
        most: usize,
    },
    /// No such inode.
    #[error("{0} does not exist (any more)")]
    NoInode(InodeId),
    /// No such entry in the directory.
    #[error("no entry {name:?} in directory {parent}")]
    NoEntry {
        /// The directory.
        parent: InodeId,
        /// The name, for people.
        name: String,
    },
    /// The name is taken.
    #[error("{name:?} already exists in directory {parent}")]
    Exists {
        /// The directory.
        parent: InodeId,
        /// The name, for people.
        name: String,
    },
    /// The mode bits refuse (EACCES).
    #[error("the mode of {inode} does not let user {uid} {wanted}")]
    Access {
        /// Whose mode.
        inode: InodeId,
        /// Who asked.
        uid: u32,
        /// What for.
        wanted: &'static str,
    },
    /// For the owner or root only (EPERM).
    #[error("user {uid} may not {wanted}")]
    Permission {
        /// Who asked.
        uid: u32,
        /// What for.
        wanted: &'static str,
    },
    /// A directory is needed.
    #[error("{0} is not a directory")]
    NotDirectory(InodeId),
    /// A directory cannot be used.
    #[error("{0} is a directory")]
    IsDirectory(InodeId),
    /// The directory has entries.
    #[error("directory {0} is not empty")]
    NotEmpty(InodeId),
    /// Too many names for one inode.
    #[error("{inode} has {most} links already, the most allowed")]
    TooManyLinks {
        /// Which.
        inode: InodeId,
        /// The limit.
        most: u32,
    },
    /// Over a stated limit.
    #[error("{what} of {got} is over the limit of {most}")]
    TooLarge {
        /// Of what.
        what: &'static str,
        /// How much.
        got: u64,
        /// How much is allowed.
        most: u64,
    },
    /// No room for another extended attribute.
    #[error("no room for more extended attributes on {0}")]
    NoAttributeSpace(InodeId),
    /// No such extended attribute.
    #[error("{inode} has no attribute {name:?}")]
    NoAttribute {
        /// Which inode.
        inode: InodeId,
        /// The name, for people.
        name: String,
    },
    /// Not offered.
    #[error("{0}")]
    Unsupported(String),
    /// An older epoch of the same client.
    #[error("{client} asked under session epoch {got}, but {known} is known: open a new session")]
    StaleEpoch {
        /// Who asked.
        client: ClientId,
        /// Under which epoch.
        got: u64,
        /// The lowest that is accepted.
        known: u64,
    },
    /// An older attempt of the same job.
    #[error("attempt {got} of job {job} is over: attempt {known} runs now")]
    StaleAttempt {
        /// Which job.
        job: u64,
        /// Whose request this is.
        got: u32,
        /// Which attempt has effects.
        known: u32,
    },
    /// An older request on the lane than the last one executed.
    #[error("request {got} of {client} on channel {channel} comes after {known}: it was given up")]
    StaleSequence {
        /// Who asked.
        client: ClientId,
        /// On which lane.
        channel: u32,
        /// The request.
        got: u64,
        /// The last one executed.
        known: u64,
    },
    /// The server cannot do this now.
    #[error("{0}")]
    Unavailable(String),
    /// Concurrent transactions won again and again.
    #[error("concurrent changes won again and again: try again")]
    Conflict,
    /// What the store returned is not what this version writes.
    #[error("the stored {what} cannot be read: {why}")]
    Corrupt {
        /// Which record.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The store failed.
    #[error("the store failed: {message}")]
    Store {
        /// The store's own kind.
        kind: ErrorKind,
        /// The store's own words.
        message: String,
    },
    /// An error that was recorded when the request was executed first.
    #[error("{0}")]
    Recorded(WireError),
}

impl MetaError {
    /// What a caller can act on.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid(_) => ErrorKind::InvalidArgument,
            Self::NameTooLong { .. } => ErrorKind::NameTooLong,
            Self::NoInode(_) | Self::NoEntry { .. } => ErrorKind::NotFound,
            Self::Exists { .. } => ErrorKind::AlreadyExists,
            Self::Access { .. } => ErrorKind::AccessDenied,
            Self::Permission { .. } => ErrorKind::PermissionDenied,
            Self::NotDirectory(_) => ErrorKind::NotDirectory,
            Self::IsDirectory(_) => ErrorKind::IsDirectory,
            Self::NotEmpty(_) => ErrorKind::NotEmpty,
            Self::TooManyLinks { .. } => ErrorKind::TooManyLinks,
            Self::TooLarge { .. } => ErrorKind::TooLarge,
            Self::NoAttributeSpace(_) => ErrorKind::NoSpace,
            Self::NoAttribute { .. } => ErrorKind::NoAttribute,
            Self::Unsupported(_) => ErrorKind::Unsupported,
            Self::StaleEpoch { .. } | Self::StaleAttempt { .. } | Self::StaleSequence { .. } => {
                ErrorKind::Stale
            }
            Self::Unavailable(_) => ErrorKind::Unavailable,
            Self::Conflict => ErrorKind::Conflict,
            Self::Corrupt { .. } => ErrorKind::Corrupt,
            Self::Store { kind, .. } => *kind,
            Self::Recorded(error) => error.kind,
        }
    }

    /// Whether the answer follows from the request and the namespace alone. Such an answer is
    /// recorded for retries; the others say that the request was not executed at all.
    pub(crate) fn is_answer(&self) -> bool {
        !matches!(
            self,
            Self::StaleEpoch { .. }
                | Self::StaleAttempt { .. }
                | Self::StaleSequence { .. }
                | Self::Unavailable(_)
                | Self::Conflict
                | Self::Corrupt { .. }
                | Self::Store { .. }
                | Self::Recorded(_)
        )
    }

    /// As it crosses the wire.
    pub fn to_wire(&self) -> WireError {
        match self {
            Self::Recorded(error) => error.clone(),
            other => WireError::new(other.kind(), other.to_string()),
        }
    }

    pub(crate) fn no_entry(parent: InodeId, name: &[u8]) -> Self {
        Self::NoEntry { parent, name: String::from_utf8_lossy(name).into_owned() }
    }

    pub(crate) fn exists(parent: InodeId, name: &[u8]) -> Self {
        Self::Exists { parent, name: String::from_utf8_lossy(name).into_owned() }
    }
}

impl From<StoreError> for MetaError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict => Self::Conflict,
            StoreError::Closed => Self::Unavailable("the meta server is stopping".into()),
            other => Self::Store { kind: other.kind(), message: other.to_string() },
        }
    }
}
