//! Errors on gRPC: a [`WireError`] as a `tonic::Status` and back, without losing its kind.

use firefly_types::{ErrorKind, WireError};
use tonic::{Code, Status};

/// Carries the exact kind beside gRPC's coarser code.
const KIND_HEADER: &str = "firefly-error-kind";

/// As a gRPC status.
pub fn to_status(error: &WireError) -> Status {
    let code = match error.kind {
        ErrorKind::InvalidArgument
        | ErrorKind::NameTooLong
        | ErrorKind::NotDirectory
        | ErrorKind::IsDirectory => Code::InvalidArgument,
        ErrorKind::NotFound | ErrorKind::NoAttribute => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::PermissionDenied | ErrorKind::AccessDenied => Code::PermissionDenied,
        ErrorKind::Unauthenticated => Code::Unauthenticated,
        ErrorKind::NoSpace | ErrorKind::TooLarge | ErrorKind::TooManyLinks => Code::ResourceExhausted,
        ErrorKind::Unavailable | ErrorKind::Disconnected => Code::Unavailable,
        ErrorKind::Timeout => Code::DeadlineExceeded,
        ErrorKind::Stale | ErrorKind::Conflict => Code::Aborted,
        ErrorKind::Corrupt => Code::DataLoss,
        ErrorKind::NotEmpty | ErrorKind::Loop | ErrorKind::Busy => Code::FailedPrecondition,
        ErrorKind::Unsupported => Code::Unimplemented,
        ErrorKind::Cancelled => Code::Cancelled,
        _ => Code::Internal,
    };
    let mut status = Status::new(code, error.message.clone());
    status.metadata_mut().insert(KIND_HEADER, error.kind.code().into());
    status
}

/// From a gRPC status, ours or the transport's own.
pub fn from_status(status: &Status) -> WireError {
    let exact = status.metadata().get(KIND_HEADER).and_then(|v| v.to_str().ok()?.parse().ok());
    let kind = match exact {
        Some(code) => ErrorKind::from_code(code),
        None => match status.code() {
            Code::InvalidArgument | Code::OutOfRange => ErrorKind::InvalidArgument,
            Code::NotFound => ErrorKind::NotFound,
            Code::AlreadyExists => ErrorKind::AlreadyExists,
            Code::PermissionDenied => ErrorKind::PermissionDenied,
            Code::Unauthenticated => ErrorKind::Unauthenticated,
            Code::ResourceExhausted => ErrorKind::TooLarge,
            Code::Unavailable | Code::Unknown => ErrorKind::Unavailable,
            Code::DeadlineExceeded => ErrorKind::Timeout,
            Code::Aborted => ErrorKind::Conflict,
            Code::DataLoss => ErrorKind::Corrupt,
            Code::Unimplemented => ErrorKind::Unsupported,
            Code::Cancelled => ErrorKind::Cancelled,
            _ => ErrorKind::Internal,
        },
    };
    WireError::new(kind, status.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_survives_the_trip() {
        for code in 1..=25 {
            let error = WireError::new(ErrorKind::from_code(code), "because");
            assert_eq!(from_status(&to_status(&error)), error);
        }
    }
}
