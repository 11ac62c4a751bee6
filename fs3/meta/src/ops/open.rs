//! Opening and closing files, and publishing how long they have become.
//!
//! A session is kept for every open, also for reading: as long as one is there, a file without a
//! name keeps its data. Writers measure the file's length; it is published on close and sync, and
//! only grows, unless the file was cut after the measurement: then it says nothing.

use super::attr::may_write;
use crate::error::MetaError;
use crate::limits::MAX_LENGTH;
use crate::op::Op;
use crate::perm::{Right, without_set_id};
use crate::schema::{InodeRecord, Kind, SessionRecord, Stamp, keys};
use firefly_proto::meta::{CloseRequest, OpenReply, OpenRequest, SyncRequest};
use firefly_types::{Generation, InodeId};

/// Opens a file.
pub(crate) fn open(op: &mut Op<'_>, request: &OpenRequest, session: u64) -> Result<OpenReply, MetaError> {
    let mut inode = op.inode(InodeId(request.inode_id))?;
    match inode.kind {
        Kind::File => {}
        Kind::Directory => return Err(MetaError::IsDirectory(inode.id)),
        _ => return Err(MetaError::Invalid(format!("{} is not a file: only files have sessions", inode.id))),
    }
    if request.write || request.truncate {
        op.cred.need(&inode, Right::Write)?;
    }
    if request.execute {
        op.cred.need(&inode, Right::Execute)?;
    } else if request.read || !request.write {
        op.cred.need(&inode, Right::Read)?;
    }
    if request.truncate {
        replace_data(op, &mut inode)?;
        op.save(&mut inode);
    }
    op.open_session(&inode, session, request.write);
    Ok(OpenReply { inode: Some(inode.to_wire()), session })
}

/// O_TRUNC: the file gets new, empty data. Chunks of the old generation are nobody's from the
/// moment that this commits, so no reader can meet half of the cut.
fn replace_data(op: &mut Op<'_>, inode: &mut InodeRecord) -> Result<(), MetaError> {
    let next = inode.generation.0.checked_add(1).ok_or_else(|| {
        MetaError::Unsupported(format!("{} was truncated 2^32 times; copy it to a new file", inode.id))
    })?;
    op.discard_data(inode);
    inode.generation = Generation(next);
    op.count_bytes(inode.length, 0);
    inode.length = 0;
    inode.mtime = op.now;
    inode.ctime = op.now;
    if !op.cred.is_root() {
        inode.mode = without_set_id(inode.kind, inode.mode);
    }
    op.count_truncate(inode)
}

/// What a writer reports.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Written {
    length: Option<u64>,
    mtime: Option<Stamp>,
    truncates: Option<u64>,
}

impl Written {
    fn new(
        length: Option<u64>,
        mtime: Option<firefly_proto::meta::Time>,
        truncates: Option<u64>,
    ) -> Result<Self, MetaError> {
        if let Some(got) = length.filter(|length| *length > MAX_LENGTH) {
            return Err(MetaError::TooLarge { what: "a file length", got, most: MAX_LENGTH });
        }
        Ok(Self { length, mtime: mtime.map(Stamp::from_wire).transpose()?, truncates })
    }

    /// Looks at a request.
    pub(crate) fn from_close(request: &CloseRequest) -> Result<Self, MetaError> {
        Self::new(request.length, request.mtime, request.truncate_version)
    }

    /// Looks at a request.
    pub(crate) fn from_sync(request: &SyncRequest) -> Result<Self, MetaError> {
        Self::new(request.length, request.mtime, request.truncate_version)
    }

    fn is_nothing(&self) -> bool {
        self.length.is_none() && self.mtime.is_none()
    }
}

/// Publishes without closing.
pub(crate) fn sync(op: &mut Op<'_>, id: InodeId, written: &Written) -> Result<InodeRecord, MetaError> {
    let mut inode = op.inode(id)?;
    if written.is_nothing() {
        return Ok(inode);
    }
    if inode.kind != Kind::File {
        return Err(MetaError::Invalid(format!("{id} is not a file")));
    }
    if !may_write(op, &inode)? {
        op.cred.need(&inode, Right::Write)?;
    }
    let known = match written.truncates {
        Some(truncates) => truncates,
        None => newest_known(op, &inode)?,
    };
    publish(op, &mut inode, written, known);
    op.save(&mut inode);
    Ok(inode)
}

/// Publishes and closes. A session that is gone already (its client was given up for a while, or
/// the close is repeated after its record was lost) is no error: it is closed.
pub(crate) fn close(
    op: &mut Op<'_>,
    id: InodeId,
    session: u64,
    written: &Written,
) -> Result<InodeRecord, MetaError> {
    let mut inode = op.inode(id)?;
    let held = match op.tx.get(&keys::session(id, session))? {
        Some(bytes) => Some(SessionRecord::decode(&bytes)?),
        None => None,
    };
    match held {
        Some(held) if held.client != op.client => {
            return Err(MetaError::Permission { uid: op.cred.uid, wanted: "close another client's session" });
        }
        Some(held) => {
            if held.write && !written.is_nothing() {
                publish(op, &mut inode, written, written.truncates.unwrap_or(held.truncates));
                op.save(&mut inode);
            }
            op.close_session(&inode, held.client, session)?;
        }
        None => {
            // Without the session only an explicit, current measurement counts.
            if let (Some(known), false) = (written.truncates, written.is_nothing())
                && inode.kind == Kind::File
                && op.cred.has(&inode, Right::Write)
            {
                publish(op, &mut inode, written, known);
                op.save(&mut inode);
            }
        }
    }
    Ok(inode)
}

/// The newest truncate count that a write session of this client knows of.
fn newest_known(op: &mut Op<'_>, inode: &InodeRecord) -> Result<u64, MetaError> {
    let client = op.client;
    let mine = op.sessions(inode.id)?;
    let newest = mine.iter().filter(|(_, s)| s.write && s.client == client).map(|(_, s)| s.truncates).max();
    // Somebody without a session (permitted by the mode) can only mean the file as it is.
    Ok(newest.unwrap_or(inode.truncates))
}

fn publish(op: &mut Op<'_>, inode: &mut InodeRecord, written: &Written, known: u64) {
    if known == inode.truncates
        && let Some(length) = written.length
        && length > inode.length
    {
        op.count_bytes(inode.length, length);
        inode.length = length;
        inode.mtime = op.now;
    }
    if let Some(mtime) = written.mtime {
        inode.mtime = mtime;
    }
    inode.ctime = op.now;
    if !op.cred.is_root() {
        inode.mode = without_set_id(inode.kind, inode.mode);
    }
}
