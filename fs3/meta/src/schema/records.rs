//! Records. Each starts with its format's version; a change of format gets a new number and a
//! decoder for both.

use super::codec::{Reader, Writer};
use crate::error::MetaError;
use firefly_proto::meta as wire;
use firefly_types::{ClientId, DataId, ErrorKind, Generation, InodeId, WireError};

/// Format of every record of this release.
const V1: u8 = 1;

/// A point in time: seconds and nanoseconds since 1970.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Stamp {
    /// Whole seconds, negative before 1970.
    pub seconds: i64,
    /// 0..1,000,000,000.
    pub nanos: u32,
}

impl Stamp {
    /// From the wire; refuses nanoseconds over a second.
    pub fn from_wire(time: wire::Time) -> Result<Self, MetaError> {
        if time.nanos >= 1_000_000_000 {
            return Err(MetaError::Invalid(format!("a time with {} nanoseconds", time.nanos)));
        }
        Ok(Self { seconds: time.seconds, nanos: time.nanos })
    }

    fn put(self, w: &mut Writer) {
        w.i64(self.seconds).u32(self.nanos);
    }

    fn take(r: &mut Reader<'_>) -> Result<Self, MetaError> {
        let stamp = Self { seconds: r.i64()?, nanos: r.u32()? };
        if stamp.nanos >= 1_000_000_000 {
            return Err(r.bad("nanoseconds over a second"));
        }
        Ok(stamp)
    }
}

impl From<Stamp> for wire::Time {
    fn from(stamp: Stamp) -> Self {
        Self { seconds: stamp.seconds, nanos: stamp.nanos }
    }
}

/// What an inode is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are POSIX's own")]
pub enum Kind {
    File = 1,
    Directory = 2,
    Symlink = 3,
    Fifo = 4,
    Socket = 5,
    CharDevice = 6,
    BlockDevice = 7,
}

impl Kind {
    const ALL: [Kind; 7] = [
        Self::File,
        Self::Directory,
        Self::Symlink,
        Self::Fifo,
        Self::Socket,
        Self::CharDevice,
        Self::BlockDevice,
    ];

    fn from_u8(n: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|k| *k as u8 == n)
    }

    /// From the wire; the unspecified and the unknown are refused.
    pub fn from_wire(n: i32) -> Result<Self, MetaError> {
        u8::try_from(n)
            .ok()
            .and_then(Self::from_u8)
            .ok_or_else(|| MetaError::Invalid(format!("{n} is not a kind of inode")))
    }

    /// As on the wire.
    pub fn to_wire(self) -> wire::InodeKind {
        match self {
            Self::File => wire::InodeKind::File,
            Self::Directory => wire::InodeKind::Directory,
            Self::Symlink => wire::InodeKind::Symlink,
            Self::Fifo => wire::InodeKind::Fifo,
            Self::Socket => wire::InodeKind::Socket,
            Self::CharDevice => wire::InodeKind::CharDevice,
            Self::BlockDevice => wire::InodeKind::BlockDevice,
        }
    }
}

/// Where a file's chunks lie. In a directory: what its new files get; zeros and an empty list
/// stand for the cluster's defaults.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FileLayout {
    /// Bytes in a chunk.
    pub chunk_bytes: u32,
    /// How many chains a new file is striped over; 0 in files.
    pub stripe: u32,
    /// Chunk i lies on `chains[i % chains.len()]`; empty in directories.
    pub chains: Vec<u32>,
}

impl FileLayout {
    fn put(&self, w: &mut Writer) {
        w.u32(self.chunk_bytes).u32(self.stripe).u32(self.chains.len() as u32);
        for chain in &self.chains {
            w.u32(*chain);
        }
    }

    fn take(r: &mut Reader<'_>) -> Result<Self, MetaError> {
        Ok(Self { chunk_bytes: r.u32()?, stripe: r.u32()?, chains: r.list()? })
    }

    /// As on the wire.
    pub fn to_wire(&self) -> wire::Layout {
        wire::Layout { chunk_bytes: self.chunk_bytes, chains: self.chains.clone() }
    }
}

/// An inode. Of a directory, `nlink`, `mtime`, `ctime` and `version` are kept apart
/// ([`DirTimes`], the link counter) and are zero in the stored record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InodeRecord {
    /// Its number; in the key, not in the record.
    pub id: InodeId,
    /// What it is; never changes.
    pub kind: Kind,
    /// The twelve permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owning group.
    pub gid: u32,
    /// Names that point here.
    pub nlink: u32,
    /// Published length in bytes (files), bytes in the target (symbolic links).
    pub length: u64,
    /// Last access, as far as somebody set it.
    pub atime: Stamp,
    /// Last change of content.
    pub mtime: Stamp,
    /// Last change of the inode.
    pub ctime: Stamp,
    /// Birth.
    pub btime: Stamp,
    /// The file's data.
    pub data: DataId,
    /// Which generation of it.
    pub generation: Generation,
    /// Adds one for each truncate.
    pub truncates: u64,
    /// Device number of device nodes.
    pub rdev: u32,
    /// The directory that holds a directory; the root is its own.
    pub parent: InodeId,
    /// Differs after each change.
    pub version: u64,
    /// Where the data lies; the default for new files, of directories.
    pub layout: FileLayout,
    /// Target of a symbolic link.
    pub target: Vec<u8>,
}

impl InodeRecord {
    /// As stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(V1);
        w.u8(self.kind as u8).u32(self.mode).u32(self.uid).u32(self.gid).u32(self.nlink).u64(self.length);
        for stamp in [self.atime, self.mtime, self.ctime, self.btime] {
            stamp.put(&mut w);
        }
        w.u64(self.data.0).u32(self.generation.0).u64(self.truncates);
        w.u32(self.rdev).u64(self.parent.0).u64(self.version);
        self.layout.put(&mut w);
        w.bytes(&self.target).finish()
    }

    /// From the store.
    pub fn decode(id: InodeId, bytes: &[u8]) -> Result<Self, MetaError> {
        let mut r = Reader::new("inode", bytes, V1)?;
        let kind = r.u8()?;
        let inode = Self {
            id,
            kind: Kind::from_u8(kind).ok_or_else(|| r.bad(format!("kind {kind}")))?,
            mode: r.u32()?,
            uid: r.u32()?,
            gid: r.u32()?,
            nlink: r.u32()?,
            length: r.u64()?,
            atime: Stamp::take(&mut r)?,
            mtime: Stamp::take(&mut r)?,
            ctime: Stamp::take(&mut r)?,
            btime: Stamp::take(&mut r)?,
            data: DataId(r.u64()?),
            generation: Generation(r.u32()?),
            truncates: r.u64()?,
            rdev: r.u32()?,
            parent: InodeId(r.u64()?),
            version: r.u64()?,
            layout: FileLayout::take(&mut r)?,
            target: r.bytes()?,
        };
        r.end()?;
        Ok(inode)
    }

    /// As on the wire.
    pub fn to_wire(&self) -> wire::Inode {
        let is_file = self.kind == Kind::File;
        wire::Inode {
            inode_id: self.id.0,
            kind: self.kind.to_wire() as i32,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            nlink: self.nlink,
            length: self.length,
            atime: Some(self.atime.into()),
            mtime: Some(self.mtime.into()),
            ctime: Some(self.ctime.into()),
            btime: Some(self.btime.into()),
            data_id: self.data.0,
            generation: self.generation.0,
            layout: is_file.then(|| self.layout.to_wire()),
            symlink: String::from_utf8(self.target.clone()).unwrap_or_default(),
            rdev: self.rdev,
            parent: self.parent.0,
            version: self.version,
            symlink_target: self.target.clone(),
            truncate_version: self.truncates,
        }
    }
}

/// When a directory's content changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DirTimes {
    /// Last change of content.
    pub mtime: Stamp,
    /// Last change of content or inode.
    pub ctime: Stamp,
    /// Differs after each change.
    pub version: u64,
}

impl DirTimes {
    /// As stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(V1);
        self.mtime.put(&mut w);
        self.ctime.put(&mut w);
        w.u64(self.version).finish()
    }

    /// From the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let mut r = Reader::new("directory times", bytes, V1)?;
        let times = Self { mtime: Stamp::take(&mut r)?, ctime: Stamp::take(&mut r)?, version: r.u64()? };
        r.end()?;
        Ok(times)
    }
}

/// What a name points to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DentryRecord {
    /// The inode.
    pub inode: InodeId,
    /// Its kind, so that a listing need not read inodes.
    pub kind: Kind,
}

impl DentryRecord {
    /// As stored.
    pub fn encode(&self) -> Vec<u8> {
        Writer::new(V1).u8(self.kind as u8).u64(self.inode.0).finish()
    }

    /// From the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let mut r = Reader::new("directory entry", bytes, V1)?;
        let kind = r.u8()?;
        let entry = Self {
            kind: Kind::from_u8(kind).ok_or_else(|| r.bad(format!("kind {kind}")))?,
            inode: InodeId(r.u64()?),
        };
        r.end()?;
        Ok(entry)
    }
}

/// One open of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SessionRecord {
    /// Who holds it.
    pub client: ClientId,
    /// The client's epoch when it opened.
    pub epoch: u64,
    /// Opened for writing.
    pub write: bool,
    /// Which user opened.
    pub uid: u32,
    /// The file's truncate count that the client knows of: lengths measured under an older one
    /// are not published.
    pub truncates: u64,
}

impl SessionRecord {
    /// As stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(V1);
        w.u64(self.client.0)
            .u64(self.epoch)
            .u8(u8::from(self.write))
            .u32(self.uid)
            .u64(self.truncates)
            .finish()
    }

    /// From the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let mut r = Reader::new("session", bytes, V1)?;
        let session = Self {
            client: ClientId(r.u64()?),
            epoch: r.u64()?,
            write: r.u8()? != 0,
            uid: r.u32()?,
            truncates: r.u64()?,
        };
        r.end()?;
        Ok(session)
    }
}

/// What is known of a client.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ClientRecord {
    /// The newest session epoch seen; older ones are refused.
    pub epoch: u64,
    /// Sessions and lanes up to this epoch are given up: the client was not heard of for too long.
    pub expired_through: u64,
    /// Sessions and lanes up to this epoch have been removed.
    pub drained_through: u64,
}

impl ClientRecord {
    /// As stored.
    pub fn encode(&self) -> Vec<u8> {
        Writer::new(V1).u64(self.epoch).u64(self.expired_through).u64(self.drained_through).finish()
    }

    /// From the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let mut r = Reader::new("client", bytes, V1)?;
        let client = Self { epoch: r.u64()?, expired_through: r.u64()?, drained_through: r.u64()? };
        r.end()?;
        Ok(client)
    }

    /// The lowest epoch that is served.
    pub fn lowest_epoch(&self) -> u64 {
        self.epoch.max(self.expired_through + 1)
    }
}

/// How a request ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LaneReply {
    /// The reply's bytes.
    Done(Vec<u8>),
    /// The error.
    Refused(WireError),
}

/// The last request executed on a lane. Commits with the request's effects.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LaneRecord {
    /// Epoch of the session that asked.
    pub epoch: u64,
    /// Its number.
    pub sequence: u64,
    /// Its method, so that a number used twice by mistake is noticed.
    pub method: u16,
    /// What was answered.
    pub reply: LaneReply,
}

impl LaneRecord {
    /// As stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(V1);
        w.u64(self.epoch).u64(self.sequence).u32(u32::from(self.method));
        match &self.reply {
            LaneReply::Done(reply) => w.u8(0).bytes(reply),
            LaneReply::Refused(error) => {
                w.u8(1).u32(u32::from(error.kind.code())).bytes(error.message.as_bytes())
            }
        };
        w.finish()
    }

    /// From the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let mut r = Reader::new("exactly-once record", bytes, V1)?;
        let (epoch, sequence, method) = (r.u64()?, r.u64()?, r.u32()?);
        let method = u16::try_from(method).map_err(|_| r.bad(format!("method {method}")))?;
        let reply = match r.u8()? {
            0 => LaneReply::Done(r.bytes()?),
            1 => {
                let kind = r.u32()?;
                let kind = u16::try_from(kind).map_or(ErrorKind::Internal, ErrorKind::from_code);
                LaneReply::Refused(WireError::new(kind, String::from_utf8_lossy(&r.bytes()?)))
            }
            n => return Err(r.bad(format!("outcome {n}"))),
        };
        r.end()?;
        Ok(Self { epoch, sequence, method, reply })
    }
}

/// Data without a reference.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GarbageRecord {
    /// Since when.
    pub since: Stamp,
    /// Where its chunks lie.
    pub layout: FileLayout,
}

impl GarbageRecord {
    /// As stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new(V1);
        self.since.put(&mut w);
        self.layout.put(&mut w);
        w.finish()
    }

    /// From the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let mut r = Reader::new("garbage", bytes, V1)?;
        let garbage = Self { since: Stamp::take(&mut r)?, layout: FileLayout::take(&mut r)? };
        r.end()?;
        Ok(garbage)
    }
}

/// What some requests have added to the totals, net.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Inodes.
    pub inodes: i64,
    /// Bytes of published length.
    pub bytes: i64,
}

impl Usage {
    /// As stored.
    pub fn encode(&self) -> Vec<u8> {
        Writer::new(V1).i64(self.inodes).i64(self.bytes).finish()
    }

    /// From the store.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let mut r = Reader::new("usage", bytes, V1)?;
        let usage = Self { inodes: r.i64()?, bytes: r.i64()? };
        r.end()?;
        Ok(usage)
    }

    /// The sum. Saturates: a length of 2^63 must not stop the server.
    pub fn plus(self, other: Usage) -> Usage {
        Usage {
            inodes: self.inodes.saturating_add(other.inodes),
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }
}
