//! Hard links: one name more, one name fewer.

use crate::error::MetaError;
use crate::limits::MAX_LINKS;
use crate::op::Op;
use crate::perm::Right;
use crate::schema::{InodeRecord, Kind, keys};
use firefly_types::InodeId;

/// Gives `id` another name.
pub(crate) fn link(
    op: &mut Op<'_>,
    id: InodeId,
    parent: InodeId,
    name: &[u8],
) -> Result<InodeRecord, MetaError> {
    let dir = op.directory(parent)?;
    op.cred.need(&dir, Right::Execute)?;
    let mut inode = op.stored(id)?;
    if op.entry(parent, name)?.is_some() {
        return Err(MetaError::exists(parent, name));
    }
    op.cred.need(&dir, Right::Write)?;
    if inode.kind == Kind::Directory {
        return Err(MetaError::Permission { uid: op.cred.uid, wanted: "give a directory a second name" });
    }
    if inode.nlink == 0 {
        // Unlinked and only held open: it has no place to come back to.
        return Err(MetaError::NoInode(id));
    }
    if inode.nlink >= MAX_LINKS {
        return Err(MetaError::TooManyLinks { inode: id, most: MAX_LINKS });
    }
    inode.nlink += 1;
    inode.ctime = op.now;
    op.put_entry(parent, name, &inode);
    op.touch_directory(parent);
    op.save(&mut inode);
    Ok(inode)
}

/// Removes a name of something that is not a directory.
pub(crate) fn unlink(op: &mut Op<'_>, parent: InodeId, name: &[u8]) -> Result<(), MetaError> {
    let dir = op.directory(parent)?;
    op.cred.need(&dir, Right::Execute)?;
    let entry = op.need_entry(parent, name)?;
    op.cred.need(&dir, Right::Write)?;
    let mut inode = op.stored(entry.inode)?;
    op.cred.need_sticky(&dir, &inode)?;
    if inode.kind == Kind::Directory {
        return Err(MetaError::IsDirectory(inode.id));
    }
    op.tx.delete(&keys::dentry(parent, name));
    op.touch_directory(parent);
    op.drop_link(&mut inode)
}

/// Removes an empty directory.
pub(crate) fn rmdir(op: &mut Op<'_>, parent: InodeId, name: &[u8]) -> Result<(), MetaError> {
    let dir = op.directory(parent)?;
    op.cred.need(&dir, Right::Execute)?;
    let entry = op.need_entry(parent, name)?;
    op.cred.need(&dir, Right::Write)?;
    let inode = op.stored(entry.inode)?;
    op.cred.need_sticky(&dir, &inode)?;
    if inode.kind != Kind::Directory {
        return Err(MetaError::NotDirectory(inode.id));
    }
    if !op.is_empty(inode.id)? {
        return Err(MetaError::NotEmpty(inode.id));
    }
    op.tx.delete(&keys::dentry(parent, name));
    op.touch_directory(parent);
    op.add_dir_link(parent, -1)?;
    op.remove_inode(&inode)
}
