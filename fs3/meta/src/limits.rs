//! Limits on what a request may ask for.

/// Most bytes in a name (POSIX NAME_MAX).
pub const MAX_NAME: usize = 255;
/// Most bytes in a symbolic link (PATH_MAX without the NUL).
pub const MAX_TARGET: usize = 4095;
/// Most names for one file: what common file systems allow at least, and programs expect.
pub const MAX_LINKS: u32 = 65_000;
/// Longest file: offsets are signed on Linux.
pub const MAX_LENGTH: u64 = i64::MAX as u64;
/// Most bytes in the name of an extended attribute (XATTR_NAME_MAX).
pub const MAX_XATTR_NAME: usize = 255;
/// Most bytes in the value of one (XATTR_SIZE_MAX).
pub const MAX_XATTR_VALUE: usize = 64 << 10;
/// Most bytes that all names of one inode take in a listing (XATTR_LIST_MAX).
pub const MAX_XATTR_LIST: usize = 32 << 10;
/// Most bytes in all names and values of one inode: removing it reads them.
pub const MAX_XATTR_TOTAL: usize = 1 << 20;
/// Most groups that a caller may be in (Linux NGROUPS_MAX is 65536; more than this in one
/// request is an attack or a bug).
pub const MAX_GROUPS: usize = 1024;
/// Lanes of one client are numbered below this: each holds a record and a reply, and a client
/// gives a lane up for good when it has asked in vain for half a minute.
pub const MAX_CHANNELS: u32 = 1 << 20;
/// Most entries in one page of a listing.
pub const MAX_READDIR_ENTRIES: usize = 1024;
/// Most bytes in one page of a listing: it must fit in the head of a reply.
pub const MAX_READDIR_BYTES: usize = 48 << 10;
/// Deepest nesting of directories that a rename walks up.
pub const MAX_DEPTH: usize = 1 << 16;
/// Most bytes in the head of a request...
pub const MAX_REQUEST: usize = 64 << 10;
/// ...except of one that brings the value of an extended attribute.
pub const MAX_SET_XATTR_REQUEST: usize = MAX_XATTR_VALUE + (16 << 10);
