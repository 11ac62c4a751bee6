//! Changing an inode's attributes, by the rules of chmod, chown, utimensat and truncate.

use crate::error::MetaError;
use crate::limits::MAX_LENGTH;
use crate::op::Op;
use crate::perm::{MODE_BITS, Right, S_ISGID, without_set_id};
use crate::schema::{InodeRecord, Kind, Stamp, keys};
use firefly_proto::meta::SetAttrRequest;
use firefly_types::InodeId;

/// A request that the door has looked at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Change {
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) length: Option<u64>,
    pub(crate) atime: Option<When>,
    pub(crate) mtime: Option<When>,
}

/// A time to set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum When {
    /// The server's time.
    Now,
    /// This one.
    At(Stamp),
}

impl Change {
    /// Looks at a request.
    pub(crate) fn from_wire(request: &SetAttrRequest) -> Result<Self, MetaError> {
        let when = |now: bool, at: Option<_>| match (now, at) {
            (true, _) => Ok(Some(When::Now)),
            (false, Some(time)) => Stamp::from_wire(time).map(|t| Some(When::At(t))),
            (false, None) => Ok(None),
        };
        let change = Self {
            mode: request.mode,
            uid: request.uid,
            gid: request.gid,
            length: request.length,
            atime: when(request.atime_now, request.atime)?,
            mtime: when(request.mtime_now, request.mtime)?,
        };
        if let Some(mode) = change.mode.filter(|mode| mode & !MODE_BITS != 0) {
            return Err(MetaError::Invalid(format!("mode {mode:o} has other than permission bits")));
        }
        if change.uid == Some(u32::MAX) || change.gid == Some(u32::MAX) {
            return Err(MetaError::Invalid("4294967295 is not the number of a user or a group".into()));
        }
        if let Some(got) = change.length.filter(|length| *length > MAX_LENGTH) {
            return Err(MetaError::TooLarge { what: "a file length", got, most: MAX_LENGTH });
        }
        Ok(change)
    }
}

/// Applies all of `change` or nothing.
pub(crate) fn set(op: &mut Op<'_>, id: InodeId, change: &Change) -> Result<InodeRecord, MetaError> {
    let mut inode = op.inode(id)?;
    // Truncate first: its right is judged by the bits before the change.
    if let Some(length) = change.length {
        set_length(op, &mut inode, length)?;
    }
    let chown = change.uid.is_some() || change.gid.is_some();
    if chown {
        set_owner(op, &mut inode, change)?;
    }
    if let Some(mode) = change.mode {
        // A write by another user takes the set-id bits away; the kernel asks in the writer's name.
        let only_clears =
            inode.kind == Kind::File && mode != inode.mode && mode == without_set_id(inode.kind, inode.mode);
        if !(only_clears && may_write(op, &inode)?) {
            op.cred.need_owner(&inode, "change the mode of another's file")?;
        }
        // Together with chown, what the kernel asks for is the mode after it.
        inode.mode = mode;
        if !op.cred.is_root() && !op.cred.in_group(inode.gid) {
            inode.mode &= !S_ISGID;
        }
    }
    set_times(op, &mut inode, change)?;
    inode.ctime = op.now;
    op.save(&mut inode);
    Ok(inode)
}

fn set_length(op: &mut Op<'_>, inode: &mut InodeRecord, length: u64) -> Result<(), MetaError> {
    match inode.kind {
        Kind::File => {}
        Kind::Directory => return Err(MetaError::IsDirectory(inode.id)),
        _ => return Err(MetaError::Invalid(format!("{} has no length to set", inode.id))),
    }
    if !holds_write_session(op, inode)? {
        op.cred.need(inode, Right::Write)?;
    }
    op.count_bytes(inode.length, length);
    inode.length = length;
    inode.mtime = op.now;
    if !op.cred.is_root() {
        inode.mode = without_set_id(inode.kind, inode.mode);
    }
    op.count_truncate(inode)
}

/// ftruncate: whoever has the file open for writing may cut it, whatever its mode says now.
pub(crate) fn holds_write_session(op: &mut Op<'_>, inode: &InodeRecord) -> Result<bool, MetaError> {
    let (client, uid) = (op.client, op.cred.uid);
    Ok(op.sessions(inode.id)?.iter().any(|(_, s)| s.write && s.client == client && s.uid == uid))
}

/// By the mode or by an open session.
pub(crate) fn may_write(op: &mut Op<'_>, inode: &InodeRecord) -> Result<bool, MetaError> {
    Ok(op.cred.has(inode, Right::Write) || holds_write_session(op, inode)?)
}

fn set_owner(op: &mut Op<'_>, inode: &mut InodeRecord, change: &Change) -> Result<(), MetaError> {
    let cred = op.cred;
    if !cred.is_root() {
        let keeps_owner = change.uid.is_none_or(|uid| uid == inode.uid && cred.uid == inode.uid);
        let joins_group =
            change.gid.is_none_or(|gid| cred.uid == inode.uid && (gid == inode.gid || cred.in_group(gid)));
        if !keeps_owner || !joins_group {
            return Err(MetaError::Permission {
                uid: cred.uid,
                wanted: "give a file to another user or group",
            });
        }
    }
    inode.uid = change.uid.unwrap_or(inode.uid);
    inode.gid = change.gid.unwrap_or(inode.gid);
    // Linux does so for root as well: the new owner has not asked for it.
    inode.mode = without_set_id(inode.kind, inode.mode);
    if inode.kind == Kind::File {
        op.tx.delete(&keys::xattr(inode.id, b"security.capability"));
    }
    Ok(())
}

fn set_times(op: &mut Op<'_>, inode: &mut InodeRecord, change: &Change) -> Result<(), MetaError> {
    let wanted = [change.atime, change.mtime];
    if wanted == [None, None] {
        return Ok(());
    }
    let all_now = wanted.iter().flatten().all(|when| *when == When::Now);
    if !op.cred.owns(inode) {
        // "touch" is for everybody who may write; other times are for the owner. A length
        // change brings the time along.
        if !all_now {
            return Err(MetaError::Permission {
                uid: op.cred.uid,
                wanted: "set the times of another's file",
            });
        }
        if change.length.is_none() && !holds_write_session(op, inode)? {
            op.cred.need(inode, Right::Write)?;
        }
    }
    let now = op.now;
    let pick = |when: Option<When>, old: Stamp| match when {
        None => old,
        Some(When::Now) => now,
        Some(When::At(stamp)) => stamp,
    };
    inode.atime = pick(change.atime, inode.atime);
    inode.mtime = pick(change.mtime, inode.mtime);
    Ok(())
}
