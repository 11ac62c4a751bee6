//! The door: from the bytes of a request to something that an operation may rely on. Everything
//! that can be refused without looking at the namespace is refused here.

use crate::caller::Caller;
use crate::error::MetaError;
use crate::limits::{MAX_REQUEST, MAX_SET_XATTR_REQUEST};
use crate::ops::open::Written;
use crate::ops::{attr, create, names, readdir, rename, xattr};
use firefly_proto::meta as wire;
use firefly_proto::methods::meta as method;
use firefly_types::InodeId;
use prost::Message;

/// A request that changes nothing.
#[derive(Clone, Debug)]
pub(crate) enum Question {
    Lookup { parent: InodeId, name: Vec<u8> },
    GetAttr { inode: InodeId },
    ReadDir(wire::ReadDirRequest),
    StatFs,
    GetXattr { inode: InodeId, name: Vec<u8> },
    ListXattr { inode: InodeId },
}

/// A request that changes something.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    SetAttr { inode: InodeId, change: attr::Change },
    Create(create::New),
    Link { inode: InodeId, parent: InodeId, name: Vec<u8> },
    Unlink { parent: InodeId, name: Vec<u8>, directory: bool },
    Rename(rename::Move),
    Open(wire::OpenRequest),
    Close { inode: InodeId, session: u64, written: Written },
    Sync { inode: InodeId, written: Written },
    SetXattr { inode: InodeId, name: Vec<u8>, value: Vec<u8>, flags: u32 },
    RemoveXattr { inode: InodeId, name: Vec<u8> },
}

/// A request that has passed the door.
pub(crate) enum Asked {
    Question(Caller, Question),
    Change(Caller, Change),
}

/// Most bytes in the head of a request.
fn limit(number: u16) -> usize {
    if number == method::SET_XATTR { MAX_SET_XATTR_REQUEST } else { MAX_REQUEST }
}

fn decode<M: Message + Default>(head: &[u8]) -> Result<M, MetaError> {
    M::decode(head).map_err(|error| MetaError::Invalid(format!("the request cannot be read: {error}")))
}

/// Looks at a request.
pub(crate) fn look(number: u16, head: &[u8]) -> Result<Asked, MetaError> {
    if head.len() > limit(number) {
        let (got, most) = (head.len() as u64, limit(number) as u64);
        return Err(MetaError::TooLarge { what: "a request", got, most });
    }
    let question = |caller, question| Ok(Asked::Question(Caller::from_wire(caller)?, question));
    let change = |caller, change| {
        let caller = Caller::from_wire(caller)?;
        caller.need_sequence()?;
        Ok(Asked::Change(caller, change))
    };
    match number {
        method::LOOKUP => {
            let r: wire::LookupRequest = decode(head)?;
            names::check(&r.name)?;
            question(r.caller, Question::Lookup { parent: InodeId(r.parent), name: r.name })
        }
        method::GET_ATTR => {
            let r: wire::GetAttrRequest = decode(head)?;
            question(r.caller, Question::GetAttr { inode: InodeId(r.inode_id) })
        }
        method::READ_DIR => {
            let mut r: wire::ReadDirRequest = decode(head)?;
            readdir::check(&r)?;
            question(r.caller.take(), Question::ReadDir(r))
        }
        method::STAT_FS => {
            let r: wire::StatFsRequest = decode(head)?;
            question(r.caller, Question::StatFs)
        }
        method::GET_XATTR => {
            let r: wire::GetXattrRequest = decode(head)?;
            xattr::check_name(&r.name)?;
            question(r.caller, Question::GetXattr { inode: InodeId(r.inode_id), name: r.name })
        }
        method::LIST_XATTR => {
            let r: wire::ListXattrRequest = decode(head)?;
            question(r.caller, Question::ListXattr { inode: InodeId(r.inode_id) })
        }
        method::SET_ATTR => {
            let r: wire::SetAttrRequest = decode(head)?;
            let wanted = attr::Change::from_wire(&r)?;
            change(r.caller, Change::SetAttr { inode: InodeId(r.inode_id), change: wanted })
        }
        method::CREATE => {
            let mut r: wire::CreateRequest = decode(head)?;
            let caller = r.caller.take();
            change(caller, Change::Create(create::New::from_wire(r)?))
        }
        method::LINK => {
            let r: wire::LinkRequest = decode(head)?;
            names::check_own(&r.name)?;
            let (inode, parent) = (InodeId(r.inode_id), InodeId(r.parent));
            change(r.caller, Change::Link { inode, parent, name: r.name })
        }
        method::UNLINK => {
            let r: wire::UnlinkRequest = decode(head)?;
            names::check_own(&r.name)?;
            let (parent, directory) = (InodeId(r.parent), r.directory);
            change(r.caller, Change::Unlink { parent, name: r.name, directory })
        }
        method::RENAME => {
            let mut r: wire::RenameRequest = decode(head)?;
            let caller = r.caller.take();
            change(caller, Change::Rename(rename::Move::from_wire(r)?))
        }
        method::OPEN => {
            let mut r: wire::OpenRequest = decode(head)?;
            change(r.caller.take(), Change::Open(r))
        }
        method::CLOSE => {
            let r: wire::CloseRequest = decode(head)?;
            let written = Written::from_close(&r)?;
            change(r.caller, Change::Close { inode: InodeId(r.inode_id), session: r.session, written })
        }
        method::SYNC => {
            let r: wire::SyncRequest = decode(head)?;
            let written = Written::from_sync(&r)?;
            change(r.caller, Change::Sync { inode: InodeId(r.inode_id), written })
        }
        method::SET_XATTR => {
            let r: wire::SetXattrRequest = decode(head)?;
            xattr::check_set(&r.name, &r.value, r.flags)?;
            let inode = InodeId(r.inode_id);
            change(r.caller, Change::SetXattr { inode, name: r.name, value: r.value, flags: r.flags })
        }
        method::REMOVE_XATTR => {
            let r: wire::RemoveXattrRequest = decode(head)?;
            xattr::check_name(&r.name)?;
            change(r.caller, Change::RemoveXattr { inode: InodeId(r.inode_id), name: r.name })
        }
        _ => Err(MetaError::Unsupported(format!("method {number:#06x} is not one of the namespace"))),
    }
}
