//! One running operation: its transaction, who asks, what time it is, and the steps that several
//! operations share. Every change of the namespace goes through here, so the link counts, the
//! garbage queue and the totals are kept in one place.

use crate::error::MetaError;
use crate::perm::Cred;
use crate::schema::{
    DentryRecord, DirTimes, FileLayout, GarbageRecord, InodeRecord, Kind, SessionRecord, Stamp, Usage, keys,
};
use firefly_store::{Pairs, Txn};
use firefly_types::{ClientId, DataId, InodeId};

/// The root directory.
pub const ROOT: InodeId = InodeId(1);

/// Entries taken from a range at once where all are wanted.
pub(crate) const PAGE: usize = 256;

/// Numbers that an operation may use for what it makes; unused ones are lost, which is harmless.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fresh {
    pub(crate) inode: InodeId,
    pub(crate) data: DataId,
    pub(crate) session: u64,
}

/// A running operation.
pub(crate) struct Op<'a> {
    pub(crate) tx: &'a mut Txn,
    pub(crate) cred: &'a Cred,
    pub(crate) client: ClientId,
    pub(crate) epoch: u64,
    pub(crate) now: Stamp,
    /// Differs for each operation: the version of a directory after it.
    pub(crate) tick: u64,
    /// What the operation adds to the totals.
    pub(crate) usage: Usage,
    /// Whether it put something into the garbage queue.
    pub(crate) made_garbage: bool,
}

impl Op<'_> {
    /// The inode as stored: of a directory, without what changes with its content. The cheap read,
    /// for permission checks; it conflicts with less.
    pub(crate) fn stored(&mut self, id: InodeId) -> Result<InodeRecord, MetaError> {
        match self.tx.get(&keys::inode(id))? {
            Some(bytes) => InodeRecord::decode(id, &bytes),
            None => Err(MetaError::NoInode(id)),
        }
    }

    /// The stored inode of a directory.
    pub(crate) fn directory(&mut self, id: InodeId) -> Result<InodeRecord, MetaError> {
        let inode = self.stored(id)?;
        if inode.kind == Kind::Directory { Ok(inode) } else { Err(MetaError::NotDirectory(id)) }
    }

    /// The whole inode.
    pub(crate) fn inode(&mut self, id: InodeId) -> Result<InodeRecord, MetaError> {
        let mut inode = self.stored(id)?;
        if inode.kind == Kind::Directory {
            let times = match self.tx.get(&keys::dir_times(id))? {
                Some(bytes) => DirTimes::decode(&bytes)?,
                None => DirTimes::default(),
            };
            inode.mtime = times.mtime;
            inode.ctime = times.ctime;
            inode.version = times.version;
            inode.nlink = self.dir_links(id)?.saturating_add(2);
        }
        Ok(inode)
    }

    /// Stores a whole inode and gives it its next version. Of a directory, the link count is
    /// not touched.
    pub(crate) fn save(&mut self, inode: &mut InodeRecord) {
        if inode.kind != Kind::Directory {
            inode.version += 1;
            self.tx.put(&keys::inode(inode.id), &inode.encode());
            return;
        }
        inode.version = self.tick;
        let times = DirTimes { mtime: inode.mtime, ctime: inode.ctime, version: inode.version };
        self.tx.put(&keys::dir_times(inode.id), &times.encode());
        let bare = InodeRecord {
            nlink: 0,
            mtime: Stamp::default(),
            ctime: Stamp::default(),
            version: 0,
            ..inode.clone()
        };
        self.tx.put(&keys::inode(inode.id), &bare.encode());
    }

    /// A name came or went in `dir`.
    pub(crate) fn touch_directory(&mut self, dir: InodeId) {
        let times = DirTimes { mtime: self.now, ctime: self.now, version: self.tick };
        self.tx.put(&keys::dir_times(dir), &times.encode());
    }

    fn dir_links(&mut self, dir: InodeId) -> Result<u32, MetaError> {
        let Some(bytes) = self.tx.get(&keys::dir_links(dir))? else { return Ok(0) };
        bytes.as_slice().try_into().map(u32::from_be_bytes).map_err(|_| MetaError::Corrupt {
            what: "directory link count",
            why: format!("{} bytes", bytes.len()),
        })
    }

    /// Directories in `dir` became one more or one fewer.
    pub(crate) fn add_dir_link(&mut self, dir: InodeId, by: i32) -> Result<(), MetaError> {
        let links = self.dir_links(dir)?;
        let links = links.checked_add_signed(by).ok_or_else(|| MetaError::Corrupt {
            what: "directory link count",
            why: format!("{links} and {by} more"),
        })?;
        self.tx.put(&keys::dir_links(dir), &links.to_be_bytes());
        Ok(())
    }

    /// What `name` in `parent` points to.
    pub(crate) fn entry(&mut self, parent: InodeId, name: &[u8]) -> Result<Option<DentryRecord>, MetaError> {
        self.tx.get(&keys::dentry(parent, name))?.map(|bytes| DentryRecord::decode(&bytes)).transpose()
    }

    /// As [`Op::entry`], and it must exist.
    pub(crate) fn need_entry(&mut self, parent: InodeId, name: &[u8]) -> Result<DentryRecord, MetaError> {
        self.entry(parent, name)?.ok_or_else(|| MetaError::no_entry(parent, name))
    }

    /// Points `name` in `parent` to `inode`.
    pub(crate) fn put_entry(&mut self, parent: InodeId, name: &[u8], inode: &InodeRecord) {
        let entry = DentryRecord { inode: inode.id, kind: inode.kind };
        self.tx.put(&keys::dentry(parent, name), &entry.encode());
    }

    /// Whether `dir` has no names. A name that comes before the commit is a conflict.
    pub(crate) fn is_empty(&mut self, dir: InodeId) -> Result<bool, MetaError> {
        let (from, to) = keys::dentries(dir);
        Ok(self.tx.range(&from, &to, 1)?.is_empty())
    }

    /// The open sessions on a file.
    pub(crate) fn sessions(&mut self, id: InodeId) -> Result<Vec<(Vec<u8>, SessionRecord)>, MetaError> {
        let (from, to) = keys::sessions(id);
        self.all(from, to)?.into_iter().map(|(k, v)| Ok((k, SessionRecord::decode(&v)?))).collect()
    }

    /// Everything in a range, page by page.
    pub(crate) fn all(&mut self, mut from: Vec<u8>, to: Vec<u8>) -> Result<Pairs, MetaError> {
        let mut all = Vec::new();
        loop {
            let page = self.tx.range(&from, &to, PAGE)?;
            let full = page.len() == PAGE;
            if let Some((last, _)) = page.last() {
                from = keys::after(last);
            }
            all.extend(page);
            if !full {
                return Ok(all);
            }
        }
    }

    /// Opens a session on `inode`.
    pub(crate) fn open_session(&mut self, inode: &InodeRecord, session: u64, write: bool) {
        let record = SessionRecord {
            client: self.client,
            epoch: self.epoch,
            write,
            uid: self.cred.uid,
            truncates: inode.truncates,
        };
        self.tx.put(&keys::session(inode.id, session), &record.encode());
        self.tx.put(&keys::client_session(self.client, session), &inode.id.0.to_be_bytes());
    }

    /// Closes a session of `client` on `inode`; the last one on a file without a name takes the
    /// file with it. True if the file is gone.
    pub(crate) fn close_session(
        &mut self,
        inode: &InodeRecord,
        client: ClientId,
        session: u64,
    ) -> Result<bool, MetaError> {
        self.tx.delete(&keys::session(inode.id, session));
        self.tx.delete(&keys::client_session(client, session));
        if inode.nlink > 0 || inode.kind == Kind::Directory || self.has_session(inode.id)? {
            return Ok(false);
        }
        self.remove_inode(inode)?;
        Ok(true)
    }

    fn has_session(&mut self, id: InodeId) -> Result<bool, MetaError> {
        let (from, to) = keys::sessions(id);
        Ok(!self.tx.range(&from, &to, 1)?.is_empty())
    }

    /// One name fewer points to `inode` (not a directory). The last name takes the file with it
    /// unless somebody has it open.
    pub(crate) fn drop_link(&mut self, inode: &mut InodeRecord) -> Result<(), MetaError> {
        debug_assert!(inode.kind != Kind::Directory);
        inode.nlink = inode.nlink.saturating_sub(1);
        inode.ctime = self.now;
        if inode.nlink == 0 && !self.has_session(inode.id)? {
            return self.remove_inode(inode);
        }
        self.save(inode);
        Ok(())
    }

    /// The inode ceases to exist: its attributes go, its data becomes garbage.
    pub(crate) fn remove_inode(&mut self, inode: &InodeRecord) -> Result<(), MetaError> {
        self.tx.delete(&keys::inode(inode.id));
        if inode.kind == Kind::Directory {
            self.tx.delete(&keys::dir_times(inode.id));
            self.tx.delete(&keys::dir_links(inode.id));
        }
        let (from, to) = keys::xattrs(inode.id);
        for (key, _) in self.all(from, to)? {
            self.tx.delete(&key);
        }
        self.usage.inodes -= 1;
        if inode.kind == Kind::File {
            self.count_bytes(inode.length, 0);
            self.discard_data(inode);
        }
        Ok(())
    }

    /// The present generation of the file's data has no reference any more.
    pub(crate) fn discard_data(&mut self, inode: &InodeRecord) {
        let record = GarbageRecord { since: self.now, layout: inode.layout.clone() };
        self.tx.put(&keys::garbage(inode.data, inode.generation), &record.encode());
        self.made_garbage = true;
    }

    /// A file's published length went from `old` to `new`.
    pub(crate) fn count_bytes(&mut self, old: u64, new: u64) {
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.usage.bytes = self.usage.bytes.saturating_add(signed(new).saturating_sub(signed(old)));
    }

    /// The file's content was cut or replaced by this client: its own sessions know, the others'
    /// measured lengths are void.
    pub(crate) fn count_truncate(&mut self, inode: &mut InodeRecord) -> Result<(), MetaError> {
        inode.truncates += 1;
        for (key, mut session) in self.sessions(inode.id)? {
            if session.client == self.client {
                session.truncates = inode.truncates;
                self.tx.put(&key, &session.encode());
            }
        }
        Ok(())
    }

    /// Something new of `kind` without a name yet.
    pub(crate) fn new_inode(&self, id: InodeId, kind: Kind, uid: u32, gid: u32, mode: u32) -> InodeRecord {
        InodeRecord {
            id,
            kind,
            mode,
            uid,
            gid,
            nlink: 1,
            length: 0,
            atime: self.now,
            mtime: self.now,
            ctime: self.now,
            btime: self.now,
            data: DataId(0),
            generation: Default::default(),
            truncates: 0,
            rdev: 0,
            parent: InodeId(0),
            version: 0,
            layout: FileLayout::default(),
            target: Vec::new(),
        }
    }
}
