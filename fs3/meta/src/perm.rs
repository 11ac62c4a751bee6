//! POSIX permission rules: who may do what to an inode with these bits.

use crate::error::MetaError;
use crate::schema::{InodeRecord, Kind};

/// Set-user-id.
pub(crate) const S_ISUID: u32 = 0o4000;
/// Set-group-id.
pub(crate) const S_ISGID: u32 = 0o2000;
/// Sticky.
pub(crate) const S_ISVTX: u32 = 0o1000;
/// Group may execute.
const S_IXGRP: u32 = 0o010;
/// All twelve bits.
pub(crate) const MODE_BITS: u32 = 0o7777;

/// A right that mode bits grant, as the bit of its triple.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Right {
    /// Read a file, list a directory.
    Read = 4,
    /// Write a file, change a directory's names.
    Write = 2,
    /// Run a file, walk through a directory.
    Execute = 1,
}

/// Who asks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Cred {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

impl Cred {
    pub(crate) fn is_root(&self) -> bool {
        self.uid == 0
    }

    pub(crate) fn in_group(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }

    pub(crate) fn owns(&self, inode: &InodeRecord) -> bool {
        self.is_root() || self.uid == inode.uid
    }

    /// Whether the bits grant `right`. The first class that matches decides (POSIX 4.5): an owner
    /// without the bit is refused even if everybody else has it.
    pub(crate) fn has(&self, inode: &InodeRecord, right: Right) -> bool {
        if self.is_root() {
            // Root runs only what somebody may run; everything else it may.
            return right != Right::Execute || inode.kind == Kind::Directory || inode.mode & 0o111 != 0;
        }
        let shift = if self.uid == inode.uid {
            6
        } else if self.in_group(inode.gid) {
            3
        } else {
            0
        };
        inode.mode >> shift & right as u32 != 0
    }

    /// Refuses unless the bits grant `right`.
    pub(crate) fn need(&self, inode: &InodeRecord, right: Right) -> Result<(), MetaError> {
        if self.has(inode, right) {
            return Ok(());
        }
        let wanted = match (right, inode.kind) {
            (Right::Read, Kind::Directory) => "list it",
            (Right::Write, Kind::Directory) => "change its names",
            (Right::Execute, Kind::Directory) => "search it",
            (Right::Read, _) => "read it",
            (Right::Write, _) => "write it",
            (Right::Execute, _) => "execute it",
        };
        Err(MetaError::Access { inode: inode.id, uid: self.uid, wanted })
    }

    /// The sticky bit of `dir`: only the owner of `victim` or of the directory removes the name.
    pub(crate) fn need_sticky(&self, dir: &InodeRecord, victim: &InodeRecord) -> Result<(), MetaError> {
        if dir.mode & S_ISVTX == 0 || self.owns(dir) || self.owns(victim) {
            return Ok(());
        }
        Err(MetaError::Permission { uid: self.uid, wanted: "remove another's name from a sticky directory" })
    }

    pub(crate) fn need_owner(&self, inode: &InodeRecord, wanted: &'static str) -> Result<(), MetaError> {
        if self.owns(inode) { Ok(()) } else { Err(MetaError::Permission { uid: self.uid, wanted }) }
    }
}

/// The mode after a write or a change of owner by somebody: set-user-id goes, and set-group-id
/// where it means what it says (without group execution it marks mandatory locking).
pub(crate) fn without_set_id(kind: Kind, mode: u32) -> u32 {
    if kind == Kind::Directory {
        return mode;
    }
    let mode = mode & !S_ISUID;
    if mode & S_IXGRP != 0 { mode & !S_ISGID } else { mode }
}

/// Owner group and mode of something new in `dir`.
pub(crate) fn for_new(cred: &Cred, dir: &InodeRecord, kind: Kind, mode: u32) -> (u32, u32) {
    let mut mode = mode & MODE_BITS;
    if dir.mode & S_ISGID == 0 {
        return (cred.gid, mode);
    }
    if kind == Kind::Directory {
        mode |= S_ISGID;
    } else if mode & (S_ISGID | S_IXGRP) == S_ISGID | S_IXGRP && !cred.is_root() && !cred.in_group(dir.gid) {
        // Otherwise anybody could make a program that runs as the directory's group.
        mode &= !S_ISGID;
    }
    (dir.gid, mode)
}
