//! Bytes on disk: superblock, log frames and their records. docs/formats.md, section "fs3 target",
//! describes the same for people. All numbers are little-endian; checksums are CRC-32C.

use super::BLOCK_BYTES;
use super::index::DIRTY;
use firefly_types::{
    AttemptEpoch, ChunkId, ClientId, ClusterId, DataId, Generation, JobId, SessionEpoch, TargetId,
};
use fs3_core::target::{Context, MAX_CHUNK_BYTES, Record, RecordPage};

/// Format of everything in a target's volume.
pub const FORMAT_VERSION: u32 = 2;

pub(super) const MAGIC: [u8; 8] = *b"FF3TARGT";
const FRAME_MAGIC: u32 = 0x464c_4f47; // "GOLF" in a dump: easy to find
/// Bytes of a frame before its body.
pub(super) const FRAME_HEAD: usize = 20;
const MAX_FRAME: usize = 64 << 20;
/// Blocks of the largest chunk.
pub(super) const MAX_BLOCKS: u32 = MAX_CHUNK_BYTES / BLOCK_BYTES as u32;
/// Chunk versions take 6 bytes on disk: 2.8e14 updates of one chunk, 89 years at 100,000 a second.
pub(super) const MAX_VERSION: u64 = (1 << 48) - 1;

/// A hole in a chunk's map: reads as zeros, takes no block. No volume has a block of this number.
pub(super) const HOLE: u32 = u32::MAX;

/// Why bytes on disk are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not ours, or damaged.
    #[error("{0}")]
    Damaged(String),
    /// Written by a newer release.
    #[error("format version {found} is newer than {FORMAT_VERSION}, which this release reads: upgrade it")]
    TooNew {
        /// What the bytes say.
        found: u32,
    },
    /// Written before the first release.
    #[error(
        "format version {found} is older than {FORMAT_VERSION} and was never released, so it is not \
         converted: remove the folder; the chain's other replicas fill the target again"
    )]
    TooOld {
        /// What the bytes say.
        found: u32,
    },
}

pub(super) fn damaged(what: impl Into<String>) -> FormatError {
    FormatError::Damaged(what.into())
}

/// Says whose volume it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Data of one cluster is never served to another.
    pub cluster: ClusterId,
    /// Which target.
    pub target: TargetId,
}

impl Header {
    /// What the checksums of log frames begin with, so that a frame of another target's log never
    /// passes for one of this.
    pub(super) fn seed(&self) -> u32 {
        let crc = crc32c::crc32c(&self.cluster.0.to_le_bytes());
        crc32c::crc32c_append(crc, &self.target.0.to_le_bytes())
    }
}

/// Where a page of metadata lies, and its checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PagePtr {
    /// Number of the block in the volume.
    pub block: u32,
    /// CRC-32C of the page's seal followed by the page.
    pub crc: u32,
}

/// What a page's checksum is bound to besides its content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PageKind {
    Leaf(ChunkId, u32),
    Index,
    Bitmap(u32),
    Root,
}

/// The checksum of a page.
pub(super) fn page_crc(kind: PageKind, page: &[u8]) -> u32 {
    let mut seal = Vec::with_capacity(21);
    match kind {
        PageKind::Leaf(chunk, leaf) => {
            seal.push(1);
            put_chunk(&mut seal, chunk);
            seal.extend(leaf.to_le_bytes());
        }
        PageKind::Index => seal.push(2),
        PageKind::Bitmap(number) => {
            seal.push(3);
            seal.extend(number.to_le_bytes());
        }
        PageKind::Root => seal.push(4),
    }
    crc32c::crc32c_append(crc32c::crc32c(&seal), page)
}

/// Where everything begins. One sector, written in turn to two places, so that a torn write leaves
/// the one before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Whose volume it is.
    pub header: Header,
    /// Frames of the log begin at multiples of this: the unit that the disk writes whole.
    pub sector_bytes: u32,
    /// Number of the checkpoint; the higher of two valid superblocks counts.
    pub generation: u64,
    /// First block of the log.
    pub log_first: u32,
    /// Blocks of the log.
    pub log_blocks: u32,
    /// Where in the log the first frame behind the checkpoint is, bytes.
    pub log_offset: u64,
    /// Number of that frame.
    pub log_sequence: u64,
    /// First block of the checkpoint's root.
    pub root: PagePtr,
    /// Bytes of the root.
    pub root_bytes: u64,
}

/// Bytes of an encoded superblock; at most a sector.
pub(super) const SUPER_BYTES: usize = 100;

impl Superblock {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend((BLOCK_BYTES as u32).to_le_bytes());
        out.extend(self.header.cluster.0.to_le_bytes());
        out.extend(self.header.target.0.to_le_bytes());
        out.extend(self.sector_bytes.to_le_bytes());
        out.extend(self.generation.to_le_bytes());
        out.extend(self.log_first.to_le_bytes());
        out.extend(self.log_blocks.to_le_bytes());
        out.extend(self.log_offset.to_le_bytes());
        out.extend(self.log_sequence.to_le_bytes());
        out.extend(self.root.block.to_le_bytes());
        out.extend(self.root.crc.to_le_bytes());
        out.extend(self.root_bytes.to_le_bytes());
        out.extend([0; 8]);
        out.extend(crc32c::crc32c(&out).to_le_bytes());
        debug_assert_eq!(out.len(), SUPER_BYTES);
        out
    }

    /// Reads it back; `None` if there is nothing (zeros).
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, FormatError> {
        let bytes = bytes.get(..SUPER_BYTES).ok_or_else(|| damaged("the superblock is cut short"))?;
        if bytes.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let mut reader = Reader(bytes);
        if reader.take(8)? != MAGIC {
            return Err(damaged("the superblock is not that of a target"));
        }
        let found = reader.u32()?;
        if found > FORMAT_VERSION {
            return Err(FormatError::TooNew { found });
        }
        if found < FORMAT_VERSION {
            return Err(FormatError::TooOld { found });
        }
        if reader.u32()? as usize != BLOCK_BYTES {
            return Err(damaged("the superblock's block size is not that of its format"));
        }
        let header = Header {
            cluster: ClusterId(u128::from_le_bytes(reader.array()?)),
            target: TargetId(reader.u32()?),
        };
        let out = Self {
            header,
            sector_bytes: reader.u32()?,
            generation: reader.u64()?,
            log_first: reader.u32()?,
            log_blocks: reader.u32()?,
            log_offset: reader.u64()?,
            log_sequence: reader.u64()?,
            root: reader.page()?,
            root_bytes: reader.u64()?,
        };
        reader.take(8)?;
        if reader.u32()? != crc32c::crc32c(&bytes[..SUPER_BYTES - 4]) {
            return Err(damaged("the superblock's checksum is wrong"));
        }
        let log_bytes = u64::from(out.log_blocks) * BLOCK_BYTES as u64;
        let sector = u64::from(out.sector_bytes);
        if !matches!(sector, 512 | 4096)
            || out.log_offset >= log_bytes
            || !out.log_offset.is_multiple_of(sector)
            || out.log_first.checked_add(out.log_blocks).is_none()
        {
            return Err(damaged("the superblock's numbers make no sense"));
        }
        Ok(Some(out))
    }
}

/// What a block's checksum is bound to.
pub(super) fn seal(chunk: ChunkId, index: u32, version: u64) -> [u8; 28] {
    let mut out = [0; 28];
    out[..8].copy_from_slice(&chunk.data.0.to_le_bytes());
    out[8..12].copy_from_slice(&chunk.generation.0.to_le_bytes());
    out[12..16].copy_from_slice(&chunk.index.to_le_bytes());
    out[16..20].copy_from_slice(&index.to_le_bytes());
    out[20..].copy_from_slice(&version.to_le_bytes());
    out
}

/// A part of a chunk's map that an update changes: `crcs.len()` neighbouring blocks of the volume,
/// or holes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// First block in the chunk.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// First block in the volume; `u32::MAX` for holes.
    pub block: u32,
    /// Checksum of each block; none for holes.
    pub crcs: Vec<u32>,
}

/// A next version of a chunk.
#[derive(Clone, PartialEq, Debug)]
pub struct PendingRecord {
    /// Which chunk.
    pub chunk: ChunkId,
    /// Version that it builds on; 0 for none.
    pub base: u64,
    /// Version that it creates.
    pub version: u64,
    /// Bytes of the chunk after it.
    pub length: u32,
    /// The chunk's checksum after it.
    pub digest: u32,
    /// The chunk ceases to exist by it.
    pub removes: bool,
    /// Committed at once.
    pub at_once: bool,
    /// Nothing of the committed map stays.
    pub whole: bool,
    /// Whose it is.
    pub context: Context,
    /// Differences from the committed map cut or extended with holes to `length` (from an empty one
    /// if `whole`), by first block, without overlap.
    pub changes: Vec<Change>,
}

/// One entry of the log.
#[derive(Clone, PartialEq, Debug)]
pub enum LogRecord {
    /// A next version beside the committed one.
    Pending(PendingRecord),
    /// The pending version is the committed one.
    Commit {
        /// Which chunk.
        chunk: ChunkId,
        /// Which version.
        version: u64,
    },
    /// The pending version never was.
    Drop {
        /// Which chunk.
        chunk: ChunkId,
        /// Which version.
        version: u64,
    },
    /// The chunk is gone.
    Remove {
        /// Which chunk.
        chunk: ChunkId,
    },
    /// Exactly-once records and epochs.
    Page(RecordPage),
    /// The target was opened or closed here: what stands before is durable.
    Mark,
}

pub(super) fn put_chunk(out: &mut Vec<u8>, chunk: ChunkId) {
    out.extend(chunk.data.0.to_le_bytes());
    out.extend(chunk.generation.0.to_le_bytes());
    out.extend(chunk.index.to_le_bytes());
}

impl LogRecord {
    /// Appends the record's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Pending(pending) => pending.encode(out),
            Self::Commit { chunk, version } | Self::Drop { chunk, version } => {
                out.push(if matches!(self, Self::Commit { .. }) { 2 } else { 3 });
                put_chunk(out, *chunk);
                out.extend(version.to_le_bytes());
            }
            Self::Remove { chunk } => {
                out.push(4);
                put_chunk(out, *chunk);
            }
            Self::Page(page) => {
                out.push(5);
                out.extend(page.version_floor.to_le_bytes());
                out.extend((page.channels.len() as u32).to_le_bytes());
                for (client, channel, record) in &page.channels {
                    out.extend(client.0.to_le_bytes());
                    out.extend(channel.to_le_bytes());
                    out.extend(record.sequence.to_le_bytes());
                    out.extend(record.version.to_le_bytes());
                    out.extend(record.length.to_le_bytes());
                }
                out.extend((page.sessions.len() as u32).to_le_bytes());
                for (client, epoch) in &page.sessions {
                    out.extend(client.0.to_le_bytes());
                    out.extend(epoch.0.to_le_bytes());
                }
                out.extend((page.attempts.len() as u32).to_le_bytes());
                for (job, attempt) in &page.attempts {
                    out.extend(job.0.to_le_bytes());
                    out.extend(attempt.0.to_le_bytes());
                }
            }
            Self::Mark => out.push(6),
        }
    }

    /// Reads all records of a frame's body.
    pub fn decode_all(bytes: &[u8]) -> Result<Vec<Self>, FormatError> {
        let mut reader = Reader(bytes);
        let mut records = Vec::new();
        while !reader.0.is_empty() {
            records.push(Self::decode(&mut reader)?);
        }
        Ok(records)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        Ok(match reader.u8()? {
            1 => Self::Pending(PendingRecord::decode(reader)?),
            2 => Self::Commit { chunk: reader.chunk()?, version: reader.u64()? },
            3 => Self::Drop { chunk: reader.chunk()?, version: reader.u64()? },
            4 => Self::Remove { chunk: reader.chunk()? },
            5 => {
                let mut page = RecordPage { version_floor: reader.u64()?, ..RecordPage::default() };
                for _ in 0..reader.count(32, u32::MAX)? {
                    let (client, channel) = (ClientId(reader.u64()?), reader.u32()?);
                    let record =
                        Record { sequence: reader.u64()?, version: reader.u64()?, length: reader.u32()? };
                    page.channels.push((client, channel, record));
                }
                for _ in 0..reader.count(16, u32::MAX)? {
                    page.sessions.push((ClientId(reader.u64()?), SessionEpoch(reader.u64()?)));
                }
                for _ in 0..reader.count(12, u32::MAX)? {
                    page.attempts.push((JobId(reader.u64()?), AttemptEpoch(reader.u32()?)));
                }
                Self::Page(page)
            }
            6 => Self::Mark,
            tag => return Err(damaged(format!("unknown record {tag}"))),
        })
    }
}

impl PendingRecord {
    fn encode(&self, out: &mut Vec<u8>) {
        out.push(1);
        put_chunk(out, self.chunk);
        out.extend(self.base.to_le_bytes());
        out.extend(self.version.to_le_bytes());
        out.extend(self.length.to_le_bytes());
        out.extend(self.digest.to_le_bytes());
        out.push(u8::from(self.removes) | u8::from(self.at_once) << 1 | u8::from(self.whole) << 2);
        let context = &self.context;
        out.extend(context.client.0.to_le_bytes());
        out.extend(context.session_epoch.0.to_le_bytes());
        out.extend(context.channel.to_le_bytes());
        out.extend(context.sequence.to_le_bytes());
        out.extend(context.attempt.0.to_le_bytes());
        out.extend(context.job.0.to_le_bytes());
        out.extend((self.changes.len() as u32).to_le_bytes());
        for change in &self.changes {
            out.extend(change.first.to_le_bytes());
            out.extend(change.count.to_le_bytes());
            out.extend(change.block.to_le_bytes());
            out.extend(change.crcs.iter().flat_map(|crc| crc.to_le_bytes()));
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, FormatError> {
        let chunk = reader.chunk()?;
        let (base, version) = (reader.u64()?, reader.u64()?);
        let (length, digest) = (reader.u32()?, reader.u32()?);
        let flags = reader.u8()?;
        if flags > 7 {
            return Err(damaged(format!("unknown flags {flags:#x} of a pending update")));
        }
        let context = Context {
            client: ClientId(reader.u64()?),
            session_epoch: SessionEpoch(reader.u64()?),
            channel: reader.u32()?,
            sequence: reader.u64()?,
            attempt: AttemptEpoch(reader.u32()?),
            job: JobId(reader.u64()?),
        };
        if length > MAX_CHUNK_BYTES || version > MAX_VERSION {
            return Err(damaged(format!("version {version} of {chunk}, {length} bytes, is out of range")));
        }
        let blocks = length.div_ceil(BLOCK_BYTES as u32);
        let count = reader.count(12, MAX_BLOCKS)?;
        let mut changes = Vec::with_capacity(count);
        let mut at = 0;
        for _ in 0..count {
            let (first, count, block) = (reader.u32()?, reader.u32()?, reader.u32()?);
            let end = first.checked_add(count).filter(|end| first >= at && *end <= blocks && count > 0);
            let Some(end) = end else {
                return Err(damaged(format!("an update of {chunk} does not fit its length {length}")));
            };
            at = end;
            let mut crcs = Vec::new();
            if block != HOLE {
                if block.checked_add(count).is_none_or(|end| end > DIRTY) {
                    return Err(damaged(format!("an update of {chunk} leaves the volume")));
                }
                let bytes = reader.take(count as usize * 4)?;
                crcs.extend(bytes.as_chunks::<4>().0.iter().map(|crc| u32::from_le_bytes(*crc)));
            }
            changes.push(Change { first, count, block, crcs });
        }
        let (removes, at_once, whole) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
        Ok(Self { chunk, base, version, length, digest, removes, at_once, whole, context, changes })
    }
}

/// Bytes that are consumed from the front; never trusts a length.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, n: usize) -> Result<&'a [u8], FormatError> {
        let (head, rest) = self.0.split_at_checked(n).ok_or_else(|| damaged("the bytes end too early"))?;
        self.0 = rest;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(super) fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u48(&mut self) -> Result<u64, FormatError> {
        let mut out = [0; 8];
        out[..6].copy_from_slice(self.take(6)?);
        Ok(u64::from_le_bytes(out))
    }

    pub(super) fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn chunk(&mut self) -> Result<ChunkId, FormatError> {
        Ok(ChunkId { data: DataId(self.u64()?), generation: Generation(self.u32()?), index: self.u32()? })
    }

    pub(super) fn page(&mut self) -> Result<PagePtr, FormatError> {
        Ok(PagePtr { block: self.u32()?, crc: self.u32()? })
    }

    /// A number of items of `size` bytes each at least, which must be there.
    pub(super) fn count(&mut self, size: usize, limit: u32) -> Result<usize, FormatError> {
        let count = self.u32()?;
        if count > limit || (count as usize).saturating_mul(size) > self.0.len() {
            return Err(damaged(format!("{count} items do not fit")));
        }
        Ok(count as usize)
    }
}

fn frame_crc(seed: u32, sequence: u64, body: &[u8]) -> u32 {
    let head = [&sequence.to_le_bytes()[..], &(body.len() as u32).to_le_bytes()].concat();
    crc32c::crc32c_append(crc32c::crc32c_append(seed, &head), body)
}

/// A frame: magic, length of the body, checksum (of whose log it is, sequence, length, body),
/// sequence, body.
pub(super) fn frame(seed: u32, sequence: u64, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(FRAME_HEAD + body.len());
    out.extend(FRAME_MAGIC.to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    out.extend(frame_crc(seed, sequence, body).to_le_bytes());
    out.extend(sequence.to_le_bytes());
    out.extend(body);
    out
}

/// The frame that begins here, if it is a valid one: its sequence and body.
pub(super) fn frame_at(bytes: &[u8], seed: u32) -> Option<(u64, &[u8])> {
    let mut reader = Reader(bytes);
    let magic = reader.u32().ok()?;
    let len = reader.u32().ok()? as usize;
    let crc = reader.u32().ok()?;
    let sequence = reader.u64().ok()?;
    if magic != FRAME_MAGIC || len > MAX_FRAME {
        return None;
    }
    let body = reader.take(len).ok()?;
    (frame_crc(seed, sequence, body) == crc).then_some((sequence, body))
}
