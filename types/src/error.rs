//! The small public error kind that every precise error maps to, and its forms at each door:
//! errno at the mount, status on the wire, exit code at the shell.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What sort of failure this is, as far as a caller can act on it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[non_exhaustive]
#[repr(u16)]
pub enum ErrorKind {
    /// A bug or an unforeseen state on the other side.
    Internal = 1,
    /// The request makes no sense, whoever asks and whenever.
    InvalidArgument = 2,
    /// The thing named does not exist.
    NotFound = 3,
    /// The thing to be made exists.
    AlreadyExists = 4,
    /// Known who you are; not allowed.
    PermissionDenied = 5,
    /// Not known who you are.
    Unauthenticated = 6,
    /// No room left.
    NoSpace = 7,
    /// The server cannot serve this now; the same request may go through later.
    Unavailable = 8,
    /// No answer within the time allowed: it may or may not have happened.
    Timeout = 9,
    /// The request carries an older epoch, chain version or generation than the server's; refresh
    /// and ask again.
    Stale = 10,
    /// Stored data fails its checksum.
    Corrupt = 11,
    /// A directory that must be empty is not.
    NotEmpty = 12,
    /// A directory is needed here.
    NotDirectory = 13,
    /// A directory cannot be used here.
    IsDirectory = 14,
    /// Name longer than 255 bytes or path longer than 4095.
    NameTooLong = 15,
    /// Larger than a stated limit.
    TooLarge = 16,
    /// A concurrent transaction won; retry it.
    Conflict = 17,
    /// Too many symbolic links, or a directory moved into itself.
    Loop = 18,
    /// Too many links to one inode.
    TooManyLinks = 19,
    /// The operation is not offered by this version or this kind of object.
    Unsupported = 20,
    /// The operation was given up on purpose: abort, stop, shutdown.
    Cancelled = 21,
    /// Held by somebody else.
    Busy = 22,
    /// Extended attribute not present.
    NoAttribute = 23,
    /// The peer is gone.
    Disconnected = 24,
    /// The mode bits of the thing named do not allow this (EACCES); [`ErrorKind::PermissionDenied`]
    /// is EPERM: the operation is for its owner or for root.
    AccessDenied = 25,
}

impl ErrorKind {
    const ALL: [ErrorKind; 25] = [
        Self::Internal,
        Self::InvalidArgument,
        Self::NotFound,
        Self::AlreadyExists,
        Self::PermissionDenied,
        Self::Unauthenticated,
        Self::NoSpace,
        Self::Unavailable,
        Self::Timeout,
        Self::Stale,
        Self::Corrupt,
        Self::NotEmpty,
        Self::NotDirectory,
        Self::IsDirectory,
        Self::NameTooLong,
        Self::TooLarge,
        Self::Conflict,
        Self::Loop,
        Self::TooManyLinks,
        Self::Unsupported,
        Self::Cancelled,
        Self::Busy,
        Self::NoAttribute,
        Self::Disconnected,
        Self::AccessDenied,
    ];

    /// The wire number.
    pub const fn code(self) -> u16 {
        self as u16
    }

    /// From the wire number; a number of a newer version reads as [`ErrorKind::Internal`].
    pub fn from_code(code: u16) -> Self {
        Self::ALL.into_iter().find(|k| k.code() == code).unwrap_or(Self::Internal)
    }

    /// Whether the same request may succeed later without anybody changing it.
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Unavailable | Self::Timeout | Self::Stale | Self::Conflict | Self::Disconnected)
    }

    /// The errno (Linux numbers) that the mount returns.
    pub const fn errno(self) -> i32 {
        match self {
            Self::Internal | Self::Corrupt => 5,              // EIO
            Self::InvalidArgument => 22,                      // EINVAL
            Self::NotFound => 2,                              // ENOENT
            Self::AlreadyExists => 17,                        // EEXIST
            Self::PermissionDenied => 1,                      // EPERM
            Self::Unauthenticated | Self::AccessDenied => 13, // EACCES
            Self::NoSpace => 28,                              // ENOSPC
            Self::Unavailable | Self::Conflict => 11,         // EAGAIN
            Self::Timeout => 110,                             // ETIMEDOUT
            Self::Stale => 116,                               // ESTALE
            Self::NotEmpty => 39,                             // ENOTEMPTY
            Self::NotDirectory => 20,                         // ENOTDIR
            Self::IsDirectory => 21,                          // EISDIR
            Self::NameTooLong => 36,                          // ENAMETOOLONG
            Self::TooLarge => 27,                             // EFBIG
            Self::Loop => 40,                                 // ELOOP
            Self::TooManyLinks => 31,                         // EMLINK
            Self::Unsupported => 95,                          // EOPNOTSUPP
            Self::Cancelled => 4,                             // EINTR
            Self::Busy => 16,                                 // EBUSY
            Self::NoAttribute => 61,                          // ENODATA
            Self::Disconnected => 107,                        // ENOTCONN
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Internal => "internal error",
            Self::InvalidArgument => "invalid argument",
            Self::NotFound => "not found",
            Self::AlreadyExists => "already exists",
            Self::PermissionDenied => "permission denied",
            Self::Unauthenticated => "not authenticated",
            Self::NoSpace => "no space left",
            Self::Unavailable => "unavailable",
            Self::Timeout => "timed out",
            Self::Stale => "stale version",
            Self::Corrupt => "corrupt data",
            Self::NotEmpty => "directory not empty",
            Self::NotDirectory => "not a directory",
            Self::IsDirectory => "is a directory",
            Self::NameTooLong => "name too long",
            Self::TooLarge => "too large",
            Self::Conflict => "conflict",
            Self::Loop => "loop",
            Self::TooManyLinks => "too many links",
            Self::Unsupported => "not supported",
            Self::Cancelled => "cancelled",
            Self::Busy => "busy",
            Self::NoAttribute => "no such attribute",
            Self::Disconnected => "peer is gone",
            Self::AccessDenied => "access denied",
        })
    }
}

/// An error as it crosses a wire: the kind to act on, and a sentence for a person that says what
/// was wanted, what happened and what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    /// What a program does next depends on this alone.
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
}

impl WireError {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_keep_their_wire_numbers() {
        // Pinned: a number is never given to another kind.
        let codes: Vec<u16> = ErrorKind::ALL.iter().map(|k| k.code()).collect();
        assert_eq!(codes, (1..=25).collect::<Vec<u16>>());
        for kind in ErrorKind::ALL {
            assert_eq!(ErrorKind::from_code(kind.code()), kind);
        }
        assert_eq!(ErrorKind::from_code(60_000), ErrorKind::Internal);
    }
}
