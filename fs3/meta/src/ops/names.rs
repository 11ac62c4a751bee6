//! Names: what is one, and finding what it points to.

use crate::error::MetaError;
use crate::limits::{MAX_NAME, MAX_TARGET};
use crate::op::Op;
use crate::perm::Right;
use crate::schema::InodeRecord;
use firefly_types::InodeId;

/// Refuses what cannot be a name in a directory.
pub(crate) fn check(name: &[u8]) -> Result<(), MetaError> {
    if name.len() > MAX_NAME {
        return Err(MetaError::NameTooLong { got: name.len(), most: MAX_NAME });
    }
    if name.is_empty() {
        return Err(MetaError::Invalid("an empty name".into()));
    }
    if name.contains(&b'/') || name.contains(&0) {
        return Err(MetaError::Invalid("a name with '/' or NUL in it".into()));
    }
    Ok(())
}

/// Refuses also `.` and `..`, which are nobody's to make or remove.
pub(crate) fn check_own(name: &[u8]) -> Result<(), MetaError> {
    check(name)?;
    if is_dots(name) {
        return Err(MetaError::Invalid("'.' and '..' cannot be made, removed or renamed".into()));
    }
    Ok(())
}

/// Refuses what cannot be the target of a symbolic link.
pub(crate) fn check_target(target: &[u8]) -> Result<(), MetaError> {
    if target.is_empty() || target.contains(&0) {
        return Err(MetaError::Invalid("the target of a symbolic link is empty or has a NUL in it".into()));
    }
    if target.len() > MAX_TARGET {
        return Err(MetaError::NameTooLong { got: target.len(), most: MAX_TARGET });
    }
    Ok(())
}

pub(crate) fn is_dots(name: &[u8]) -> bool {
    name == b"." || name == b".."
}

/// What `name` in `parent` is.
pub(crate) fn lookup(op: &mut Op<'_>, parent: InodeId, name: &[u8]) -> Result<InodeRecord, MetaError> {
    let dir = op.directory(parent)?;
    op.cred.need(&dir, Right::Execute)?;
    let found = match name {
        b"." => parent,
        b".." => dir.parent,
        _ => op.need_entry(parent, name)?.inode,
    };
    op.inode(found)
}
