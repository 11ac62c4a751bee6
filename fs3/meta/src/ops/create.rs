//! Making something new under a name: files, directories, symbolic links, pipes, sockets, devices.

use super::names;
use crate::error::MetaError;
use crate::layout::ClusterLayout;
use crate::op::{Fresh, Op};
use crate::perm::{Right, for_new};
use crate::schema::{InodeRecord, Kind};
use firefly_proto::meta::{CreateReply, CreateRequest};
use firefly_types::InodeId;

/// A request that the door has looked at.
#[derive(Clone, Debug)]
pub(crate) struct New {
    pub(crate) parent: InodeId,
    pub(crate) name: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) target: Vec<u8>,
    pub(crate) rdev: u32,
    pub(crate) exclusive: bool,
    pub(crate) write: bool,
    pub(crate) read: bool,
}

impl New {
    /// Looks at a request.
    pub(crate) fn from_wire(request: CreateRequest) -> Result<Self, MetaError> {
        names::check(&request.name)?;
        let kind = Kind::from_wire(request.kind)?;
        let target = if request.symlink_target.is_empty() {
            request.symlink.into_bytes()
        } else {
            request.symlink_target
        };
        if kind == Kind::Symlink {
            names::check_target(&target)?;
        } else if !target.is_empty() {
            return Err(MetaError::Invalid("only a symbolic link has a target".into()));
        }
        let (write, read) = (request.open_write, request.open_read);
        if kind != Kind::File && (write || read) {
            return Err(MetaError::Invalid("only a file is opened as it is made".into()));
        }
        if request.mode & !crate::perm::MODE_BITS != 0 {
            return Err(MetaError::Invalid(format!(
                "mode {:o} has other than permission bits",
                request.mode
            )));
        }
        Ok(Self {
            parent: InodeId(request.parent),
            name: request.name,
            kind,
            mode: request.mode,
            target,
            rdev: request.rdev,
            exclusive: request.exclusive,
            write,
            read,
        })
    }
}

/// Makes it, or opens the file that is there.
pub(crate) fn create(
    op: &mut Op<'_>,
    new: &New,
    fresh: Fresh,
    cluster: &ClusterLayout,
) -> Result<CreateReply, MetaError> {
    let dir = op.directory(new.parent)?;
    op.cred.need(&dir, Right::Execute)?;
    if names::is_dots(&new.name) {
        return Err(MetaError::exists(new.parent, &new.name));
    }
    if let Some(entry) = op.entry(new.parent, &new.name)? {
        return existing(op, new, entry.inode, fresh.session);
    }
    op.cred.need(&dir, Right::Write)?;
    if matches!(new.kind, Kind::CharDevice | Kind::BlockDevice) && !op.cred.is_root() {
        return Err(MetaError::Permission { uid: op.cred.uid, wanted: "make a device node" });
    }
    let (gid, mode) = for_new(op.cred, &dir, new.kind, new.mode);
    let mut inode = op.new_inode(fresh.inode, new.kind, op.cred.uid, gid, mode);
    match new.kind {
        Kind::File => {
            inode.data = fresh.data;
            inode.layout = cluster.place(fresh.data, &dir.layout)?;
        }
        Kind::Directory => {
            inode.parent = new.parent;
            inode.layout = dir.layout.clone();
            op.add_dir_link(new.parent, 1)?;
        }
        Kind::Symlink => {
            inode.mode = 0o777;
            inode.length = new.target.len() as u64;
            inode.target.clone_from(&new.target);
        }
        Kind::CharDevice | Kind::BlockDevice => inode.rdev = new.rdev,
        Kind::Fifo | Kind::Socket => {}
    }
    op.put_entry(new.parent, &new.name, &inode);
    op.touch_directory(new.parent);
    op.save(&mut inode);
    op.usage.inodes += 1;
    let session = open(op, new, &inode, fresh.session);
    if new.kind == Kind::Directory {
        inode.nlink = 2;
    }
    Ok(CreateReply { inode: Some(inode.to_wire()), created: true, session })
}

fn existing(op: &mut Op<'_>, new: &New, id: InodeId, session: u64) -> Result<CreateReply, MetaError> {
    let inode = op.inode(id)?;
    if new.exclusive || new.kind != Kind::File {
        return Err(MetaError::exists(new.parent, &new.name));
    }
    match inode.kind {
        Kind::File => {}
        Kind::Directory => return Err(MetaError::IsDirectory(id)),
        _ => return Err(MetaError::exists(new.parent, &new.name)),
    }
    if new.write {
        op.cred.need(&inode, Right::Write)?;
    }
    if new.read {
        op.cred.need(&inode, Right::Read)?;
    }
    let session = open(op, new, &inode, session);
    Ok(CreateReply { inode: Some(inode.to_wire()), created: false, session })
}

fn open(op: &mut Op<'_>, new: &New, inode: &InodeRecord, session: u64) -> u64 {
    if !new.write && !new.read {
        return 0;
    }
    op.open_session(inode, session, new.write);
    session
}
