//! Rename, with all flags, as one transaction.

use super::names;
use crate::error::MetaError;
use crate::limits::MAX_DEPTH;
use crate::op::{Op, ROOT};
use crate::perm::Right;
use crate::schema::{InodeRecord, Kind, keys};
use firefly_proto::meta::RenameRequest;
use firefly_types::InodeId;

/// Fails if the new name exists.
const NOREPLACE: u32 = 1;
/// Both names exist and change places.
const EXCHANGE: u32 = 2;

/// A request that the door has looked at.
#[derive(Clone, Debug)]
pub(crate) struct Move {
    pub(crate) parent: InodeId,
    pub(crate) name: Vec<u8>,
    pub(crate) new_parent: InodeId,
    pub(crate) new_name: Vec<u8>,
    pub(crate) no_replace: bool,
    pub(crate) exchange: bool,
}

impl Move {
    /// Looks at a request.
    pub(crate) fn from_wire(request: RenameRequest) -> Result<Self, MetaError> {
        names::check_own(&request.name)?;
        names::check_own(&request.new_name)?;
        if request.flags & !(NOREPLACE | EXCHANGE) != 0 || request.flags == NOREPLACE | EXCHANGE {
            return Err(MetaError::Invalid(format!(
                "rename flags {:#x}: 1 (no replace) or 2 (exchange) are offered, not both",
                request.flags
            )));
        }
        Ok(Self {
            parent: InodeId(request.parent),
            name: request.name,
            new_parent: InodeId(request.new_parent),
            new_name: request.new_name,
            no_replace: request.flags & NOREPLACE != 0,
            exchange: request.flags & EXCHANGE != 0,
        })
    }
}

/// Renames.
pub(crate) fn rename(op: &mut Op<'_>, to_do: &Move) -> Result<(), MetaError> {
    let from = op.directory(to_do.parent)?;
    op.cred.need(&from, Right::Execute)?;
    let to = if to_do.new_parent == to_do.parent { from.clone() } else { op.directory(to_do.new_parent)? };
    op.cred.need(&to, Right::Execute)?;
    let source = op.need_entry(from.id, &to_do.name)?;
    let target = op.entry(to.id, &to_do.new_name)?;
    if to_do.no_replace && target.is_some() {
        return Err(MetaError::exists(to.id, &to_do.new_name));
    }
    if to_do.exchange && target.is_none() {
        return Err(MetaError::no_entry(to.id, &to_do.new_name));
    }
    op.cred.need(&from, Right::Write)?;
    op.cred.need(&to, Right::Write)?;

    let source = op.inode(source.inode)?;
    op.cred.need_sticky(&from, &source)?;
    need_movable(op, &source, &from, &to)?;
    let Some(target) = target else {
        return move_to_free_name(op, to_do, source);
    };
    if target.inode == source.id {
        // Two names of one file: POSIX wants nothing to happen.
        return Ok(());
    }
    let target = op.inode(target.inode)?;
    op.cred.need_sticky(&to, &target)?;
    if to_do.exchange {
        need_movable(op, &target, &to, &from)?;
        return exchange(op, to_do, source, target);
    }
    replace(op, to_do, source, target)
}

/// A directory may not come to lie in itself, and who moves it to another parent changes its `..`
/// and so must be allowed to write it.
fn need_movable(
    op: &mut Op<'_>,
    inode: &InodeRecord,
    from: &InodeRecord,
    to: &InodeRecord,
) -> Result<(), MetaError> {
    if inode.kind != Kind::Directory || from.id == to.id {
        return Ok(());
    }
    // Reading every ancestor puts them into the read set: a concurrent rename that would close a
    // loop together with this one is a conflict.
    let mut at = to.clone();
    for _ in 0..MAX_DEPTH {
        if at.id == inode.id {
            return Err(MetaError::Invalid(format!("directory {} cannot be moved into itself", inode.id)));
        }
        if at.id == ROOT {
            return op.cred.need(inode, Right::Write);
        }
        at = op.directory(at.parent)?;
    }
    Err(MetaError::TooLarge { what: "a directory depth", got: MAX_DEPTH as u64 + 1, most: MAX_DEPTH as u64 })
}

fn move_to_free_name(op: &mut Op<'_>, to_do: &Move, source: InodeRecord) -> Result<(), MetaError> {
    op.tx.delete(&keys::dentry(to_do.parent, &to_do.name));
    op.put_entry(to_do.new_parent, &to_do.new_name, &source);
    settle(op, source, to_do.parent, to_do.new_parent)?;
    touch_both(op, to_do);
    Ok(())
}

fn replace(
    op: &mut Op<'_>,
    to_do: &Move,
    source: InodeRecord,
    mut target: InodeRecord,
) -> Result<(), MetaError> {
    match (source.kind == Kind::Directory, target.kind == Kind::Directory) {
        (true, false) => return Err(MetaError::NotDirectory(target.id)),
        (false, true) => return Err(MetaError::IsDirectory(target.id)),
        (true, true) => {
            if !op.is_empty(target.id)? {
                return Err(MetaError::NotEmpty(target.id));
            }
            op.add_dir_link(to_do.new_parent, -1)?;
            op.remove_inode(&target)?;
        }
        (false, false) => op.drop_link(&mut target)?,
    }
    move_to_free_name(op, to_do, source)
}

fn exchange(
    op: &mut Op<'_>,
    to_do: &Move,
    source: InodeRecord,
    target: InodeRecord,
) -> Result<(), MetaError> {
    op.put_entry(to_do.new_parent, &to_do.new_name, &source);
    op.put_entry(to_do.parent, &to_do.name, &target);
    settle(op, source, to_do.parent, to_do.new_parent)?;
    settle(op, target, to_do.new_parent, to_do.parent)?;
    touch_both(op, to_do);
    Ok(())
}

/// `inode` lies in `to` now, no longer in `from`.
fn settle(op: &mut Op<'_>, mut inode: InodeRecord, from: InodeId, to: InodeId) -> Result<(), MetaError> {
    inode.ctime = op.now;
    if inode.kind == Kind::Directory && from != to {
        inode.parent = to;
        op.add_dir_link(from, -1)?;
        op.add_dir_link(to, 1)?;
    }
    op.save(&mut inode);
    Ok(())
}

fn touch_both(op: &mut Op<'_>, to_do: &Move) {
    op.touch_directory(to_do.parent);
    op.touch_directory(to_do.new_parent);
}
