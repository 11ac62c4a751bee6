//! The fs3 mount: the kernel's FUSE requests as operations of `fs3-client`.
//!
//! * The threads that read requests never wait: they answer from memory or hand over to the tokio
//!   runtime, so that one slow request holds up no other.
//! * Permissions are checked twice: by the kernel (`default_permissions`) on attributes at most one
//!   second old, and by the meta server for every change.
//! * Coherence between mounts is close-to-open: opening a file sees everything that was written
//!   before it was closed elsewhere; names and attributes are at most a second old otherwise.
//!   Within one mount everything is seen at once, as on a local file system.
//! * The kernel's page cache is kept across opens only while the file's version is the same, and
//!   never holds dirty data (write-back is off) except for shared mappings.
//! * Locks (flock, fcntl) are the kernel's own: they hold within one mount, not across mounts.
//! * Not offered: file capabilities, POSIX ACLs, reservation of space by fallocate.

mod attr;
mod caller;
mod fs;
mod handles;
mod io;
mod known;
mod mount;
mod names;

pub use mount::{MountError, MountOptions, Mounted, mount};
