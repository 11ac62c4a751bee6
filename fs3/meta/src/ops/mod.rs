//! The operations, one noun a file. Each is a plain function of a running [`crate::op::Op`] and a
//! request that the door has already looked at; the caller commits.

pub(crate) mod attr;
pub(crate) mod create;
pub(crate) mod link;
pub(crate) mod names;
pub(crate) mod open;
pub(crate) mod readdir;
pub(crate) mod rename;
pub(crate) mod statfs;
pub(crate) mod xattr;
