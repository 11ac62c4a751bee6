//! Listing a directory page by page. The cursor is the last name seen, so a page boundary stays
//! where it is whatever comes and goes around it: a name that exists throughout is listed once.

use crate::error::MetaError;
use crate::limits::{MAX_NAME, MAX_READDIR_BYTES, MAX_READDIR_ENTRIES};
use crate::op::Op;
use crate::perm::Right;
use crate::schema::{DentryRecord, keys};
use firefly_proto::meta::{Entry, ReadDirReply, ReadDirRequest};
use firefly_types::InodeId;
use prost::Message;

/// Looks at a request.
pub(crate) fn check(request: &ReadDirRequest) -> Result<(), MetaError> {
    if request.cursor.len() > MAX_NAME {
        return Err(MetaError::Invalid("a listing's cursor is the one that an entry came with".into()));
    }
    Ok(())
}

/// One page: at most `limit` entries (0 means as many as fit) and at most
/// [`MAX_READDIR_BYTES`] encoded.
pub(crate) fn read(op: &mut Op<'_>, request: &ReadDirRequest) -> Result<ReadDirReply, MetaError> {
    let dir = op.directory(InodeId(request.inode_id))?;
    op.cred.need(&dir, Right::Read)?;
    if request.with_attributes {
        // Attributes of names are what lookup gives, and lookup asks for this.
        op.cred.need(&dir, Right::Execute)?;
    }
    let limit = match request.limit as usize {
        0 => MAX_READDIR_ENTRIES,
        n => n.min(MAX_READDIR_ENTRIES),
    };
    let (start, to) = keys::dentries(dir.id);
    let from =
        if request.cursor.is_empty() { start } else { keys::after(&keys::dentry(dir.id, &request.cursor)) };
    let found = op.tx.range(&from, &to, limit + 1)?;
    let more = found.len() > limit;
    let mut reply = ReadDirReply { entries: Vec::new(), end: !more, parent: dir.parent.0 };
    let mut bytes = 0;
    for (key, value) in found.iter().take(limit) {
        let name = keys::dentry_name(key)?;
        let entry = DentryRecord::decode(value)?;
        let inode = if request.with_attributes { Some(op.inode(entry.inode)?.to_wire()) } else { None };
        let entry = Entry {
            name: name.to_vec(),
            inode_id: entry.inode.0,
            kind: entry.kind.to_wire() as i32,
            cursor: name.to_vec(),
            inode,
        };
        // The entry, its tag and its length.
        bytes += entry.encoded_len() + 8;
        if bytes > MAX_READDIR_BYTES && !reply.entries.is_empty() {
            reply.end = false;
            break;
        }
        reply.entries.push(entry);
    }
    Ok(reply)
}
