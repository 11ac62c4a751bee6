//! fs3's inodes as the kernel wants them, and the kernel's times as fs3 wants them.

use firefly_types::ErrorKind;
use fs3_client::{FsError, Inode, InodeKind, Time};
use fuser::{Errno, FileAttr, FileType, INodeNo};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Preferred size of reads and writes that programs see in `st_blksize`: large enough that `cp`
/// and Python move chunks quickly, small enough not to waste memory on tiny files.
const BLOCK_BYTES: u32 = 128 << 10;

pub(crate) fn kind(kind: InodeKind) -> FileType {
    match kind {
        InodeKind::Directory => FileType::Directory,
        InodeKind::Symlink => FileType::Symlink,
        InodeKind::Fifo => FileType::NamedPipe,
        InodeKind::Socket => FileType::Socket,
        InodeKind::CharDevice => FileType::CharDevice,
        InodeKind::BlockDevice => FileType::BlockDevice,
        InodeKind::File | InodeKind::Unspecified => FileType::RegularFile,
    }
}

/// The kind of inode that the type bits of a mode name.
pub(crate) fn kind_of_mode(mode: u32) -> Option<InodeKind> {
    Some(match mode & libc::S_IFMT {
        libc::S_IFREG | 0 => InodeKind::File,
        libc::S_IFIFO => InodeKind::Fifo,
        libc::S_IFSOCK => InodeKind::Socket,
        libc::S_IFCHR => InodeKind::CharDevice,
        libc::S_IFBLK => InodeKind::BlockDevice,
        _ => return None,
    })
}

/// Times before 1970 have negative seconds and nanoseconds that count forward.
pub(crate) fn system_time(time: Option<&Time>) -> SystemTime {
    let Some(time) = time else { return UNIX_EPOCH };
    let nanos = Duration::from_nanos(u64::from(time.nanos));
    let whole = Duration::from_secs(time.seconds.unsigned_abs());
    let second =
        if time.seconds >= 0 { UNIX_EPOCH.checked_add(whole) } else { UNIX_EPOCH.checked_sub(whole) };
    second.and_then(|s| s.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// A time that the kernel sent. fuser makes of a negative (seconds, nanos) the instant
/// 1970 − (|seconds| + nanos), so the way back is the same.
pub(crate) fn wire_time(time: SystemTime) -> Time {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Time { seconds: after.as_secs() as i64, nanos: after.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            Time { seconds: -(before.as_secs() as i64), nanos: before.subsec_nanos() }
        }
    }
}

pub(crate) fn attr(inode: &Inode) -> FileAttr {
    FileAttr {
        ino: INodeNo(inode.inode_id),
        size: match inode.kind() {
            InodeKind::Symlink => fs3_client::symlink_target(inode).len() as u64,
            _ => inode.length,
        },
        blocks: inode.length.div_ceil(512),
        atime: system_time(inode.atime.as_ref()),
        mtime: system_time(inode.mtime.as_ref()),
        ctime: system_time(inode.ctime.as_ref()),
        crtime: system_time(inode.btime.as_ref()),
        kind: kind(inode.kind()),
        perm: (inode.mode & 0o7777) as u16,
        nlink: inode.nlink,
        uid: inode.uid,
        gid: inode.gid,
        rdev: inode.rdev,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// What a program sees. A cluster that stayed away until the retries ended is an I/O error: EAGAIN
/// and the like would mean something else to a program.
pub(crate) fn errno(error: &FsError) -> Errno {
    let kind = error.kind();
    match (error, kind) {
        (_, ErrorKind::Timeout) => Errno::ETIMEDOUT,
        (FsError::GaveUp { .. } | FsError::NoServer { .. }, _)
        | (_, ErrorKind::Unavailable | ErrorKind::Disconnected | ErrorKind::Conflict) => Errno::EIO,
        _ => Errno::from_i32(kind.errno()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_both_ways() {
        for (seconds, nanos) in [(0, 0), (1, 5), (1 << 33, 999_999_999), (-1, 0), (-2, 0)] {
            let time = Time { seconds, nanos };
            assert_eq!(wire_time(system_time(Some(&time))), time);
        }
        // What the kernel gets for half a second before 1970 is (−1, 0.5 s).
        let half = system_time(Some(&Time { seconds: -1, nanos: 500_000_000 }));
        assert_eq!(UNIX_EPOCH.duration_since(half).unwrap(), Duration::from_millis(500));
    }

    #[test]
    fn an_absent_cluster_is_an_io_error() {
        let gone = FsError::NoServer { what: "x".into(), missing: "y".into() };
        assert_eq!(errno(&gone).code(), libc::EIO);
        let full = FsError::Invalid { kind: ErrorKind::NoSpace, message: String::new() };
        assert_eq!(errno(&full).code(), libc::ENOSPC);
    }
}
