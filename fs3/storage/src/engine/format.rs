//! Bytes on disk: header, log frames, snapshot. docs/formats.md, section "fs3 target", describes
//! the same for people. All numbers are little-endian.

use super::BLOCK_BYTES;
use firefly_types::{
    AttemptEpoch, ChunkId, ClientId, ClusterId, DataId, Generation, JobId, SessionEpoch, TargetId,
};
use fs3_core::target::{Context, MAX_CHUNK_BYTES, Record, RecordPage};

/// Format of everything in a target folder.
pub const FORMAT_VERSION: u32 = 1;

const HEADER_MAGIC: [u8; 8] = *b"FF3TARGT";
const LOG_MAGIC: [u8; 8] = *b"FF3TLOG\0";
const SNAPSHOT_MAGIC: [u8; 8] = *b"FF3TSNAP";
const FRAME_MAGIC: u32 = 0x464c_4f47; // "GOLF" in a dump: easy to find
const FRAME_HEAD: usize = 20;
/// Bytes before the first frame of a log or snapshot.
pub(super) const PREAMBLE: usize = 24;
const MAX_FRAME: usize = 64 << 20;
const MAX_BLOCKS: u32 = MAX_CHUNK_BYTES / BLOCK_BYTES as u32;

/// A hole in a chunk's map: reads as zeros, takes no block.
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
        /// What the file says.
        found: u32,
    },
}

fn damaged(what: impl Into<String>) -> FormatError {
    FormatError::Damaged(what.into())
}

/// Says whose folder it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Data of one cluster is never served to another.
    pub cluster: ClusterId,
    /// Which target.
    pub target: TargetId,
}

impl Header {
    /// The header file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = HEADER_MAGIC.to_vec();
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend((BLOCK_BYTES as u32).to_le_bytes());
        out.extend(self.cluster.0.to_le_bytes());
        out.extend(self.target.0.to_le_bytes());
        out.extend(crc32c::crc32c(&out).to_le_bytes());
        out
    }

    /// Reads them back.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader(bytes);
        if reader.take(8)? != HEADER_MAGIC {
            return Err(damaged("the header is not that of a target"));
        }
        let found = reader.u32()?;
        if found > FORMAT_VERSION {
            return Err(FormatError::TooNew { found });
        }
        let block = reader.u32()?;
        let cluster = ClusterId(u128::from_le_bytes(reader.array()?));
        let target = TargetId(reader.u32()?);
        let crc = reader.u32()?;
        if !reader.0.is_empty() || crc != crc32c::crc32c(&bytes[..bytes.len() - 4]) {
            return Err(damaged("the header's checksum is wrong"));
        }
        if block as usize != BLOCK_BYTES {
            return Err(damaged(format!("blocks of {block} bytes are not those of format {FORMAT_VERSION}")));
        }
        Ok(Self { cluster, target })
    }
}

/// Where a block lies and what it must contain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockPtr {
    /// Number of the block in the data file, or `u32::MAX` for a hole.
    pub block: u32,
    /// CRC-32C of the seal (chunk, index, version) followed by the block.
    pub crc: u32,
    /// Chunk version that wrote the block.
    pub version: u64,
}

pub(super) const NO_BLOCK: BlockPtr = BlockPtr { block: HOLE, crc: 0, version: 0 };

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

/// One entry of the log or of a snapshot.
#[derive(Clone, PartialEq, Debug)]
pub enum LogRecord {
    /// A next version beside the committed one: the changed part of the map.
    Pending {
        /// Which chunk.
        chunk: ChunkId,
        /// Version that it builds on; 0 for none.
        base: u64,
        /// Version that it creates.
        version: u64,
        /// Bytes of the chunk after it.
        length: u32,
        /// The chunk ceases to exist by it.
        removes: bool,
        /// Committed at once.
        at_once: bool,
        /// Whose it is.
        context: Context,
        /// (index in the chunk, pointer): differences from the committed map cut or extended to
        /// `length`.
        changes: Vec<(u32, BlockPtr)>,
    },
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
    /// Snapshot only: a committed chunk.
    Chunk {
        /// Which chunk.
        chunk: ChunkId,
        /// Its version.
        version: u64,
        /// Its bytes.
        length: u32,
        /// Its whole map.
        map: Vec<BlockPtr>,
    },
    /// Snapshot only: the end, with the number of `Chunk` and `Pending` entries.
    End {
        /// How many.
        entries: u64,
    },
}

fn put_chunk(out: &mut Vec<u8>, chunk: ChunkId) {
    out.extend(chunk.data.0.to_le_bytes());
    out.extend(chunk.generation.0.to_le_bytes());
    out.extend(chunk.index.to_le_bytes());
}

fn put_ptr(out: &mut Vec<u8>, ptr: &BlockPtr) {
    out.extend(ptr.block.to_le_bytes());
    out.extend(ptr.crc.to_le_bytes());
    out.extend(ptr.version.to_le_bytes());
}

impl LogRecord {
    /// Appends the record's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Pending { chunk, base, version, length, removes, at_once, context, changes } => {
                out.push(1);
                put_chunk(out, *chunk);
                out.extend(base.to_le_bytes());
                out.extend(version.to_le_bytes());
                out.extend(length.to_le_bytes());
                out.push(u8::from(*removes) | u8::from(*at_once) << 1);
                out.extend(context.client.0.to_le_bytes());
                out.extend(context.session_epoch.0.to_le_bytes());
                out.extend(context.channel.to_le_bytes());
                out.extend(context.sequence.to_le_bytes());
                out.extend(context.attempt.0.to_le_bytes());
                out.extend(context.job.0.to_le_bytes());
                out.extend((changes.len() as u32).to_le_bytes());
                for (index, ptr) in changes {
                    out.extend(index.to_le_bytes());
                    put_ptr(out, ptr);
                }
            }
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
            Self::Chunk { chunk, version, length, map } => {
                out.push(6);
                put_chunk(out, *chunk);
                out.extend(version.to_le_bytes());
                out.extend(length.to_le_bytes());
                out.extend((map.len() as u32).to_le_bytes());
                for ptr in map {
                    put_ptr(out, ptr);
                }
            }
            Self::End { entries } => {
                out.push(7);
                out.extend(entries.to_le_bytes());
            }
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
            1 => {
                let chunk = reader.chunk()?;
                let (base, version, length) = (reader.u64()?, reader.u64()?, reader.u32()?);
                let flags = reader.u8()?;
                if flags > 3 {
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
                let count = reader.count(20, MAX_BLOCKS)?;
                let mut changes = Vec::with_capacity(count);
                for _ in 0..count {
                    changes.push((reader.u32()?, reader.ptr()?));
                }
                let blocks = length.div_ceil(BLOCK_BYTES as u32);
                if length > MAX_CHUNK_BYTES || changes.iter().any(|(index, _)| *index >= blocks) {
                    return Err(damaged(format!(
                        "pending update of {chunk} does not fit its length {length}"
                    )));
                }
                let (removes, at_once) = (flags & 1 != 0, flags & 2 != 0);
                Self::Pending { chunk, base, version, length, removes, at_once, context, changes }
            }
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
            6 => {
                let (chunk, version, length) = (reader.chunk()?, reader.u64()?, reader.u32()?);
                let count = reader.count(16, MAX_BLOCKS)?;
                if count != length.div_ceil(BLOCK_BYTES as u32) as usize {
                    return Err(damaged(format!("map of {chunk} does not fit its length {length}")));
                }
                let map = (0..count).map(|_| reader.ptr()).collect::<Result<_, _>>()?;
                Self::Chunk { chunk, version, length, map }
            }
            7 => Self::End { entries: reader.u64()? },
            tag => return Err(damaged(format!("unknown record {tag}"))),
        })
    }
}

/// Bytes that are consumed from the front; never trusts a length.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], FormatError> {
        let (head, rest) = self.0.split_at_checked(n).ok_or_else(|| damaged("the bytes end too early"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }

    fn chunk(&mut self) -> Result<ChunkId, FormatError> {
        Ok(ChunkId { data: DataId(self.u64()?), generation: Generation(self.u32()?), index: self.u32()? })
    }

    fn ptr(&mut self) -> Result<BlockPtr, FormatError> {
        Ok(BlockPtr { block: self.u32()?, crc: self.u32()?, version: self.u64()? })
    }

    /// A number of items of `size` bytes each, which must be there.
    fn count(&mut self, size: usize, limit: u32) -> Result<usize, FormatError> {
        let count = self.u32()?;
        if count > limit || (count as usize).saturating_mul(size) > self.0.len() {
            return Err(damaged(format!("{count} items do not fit")));
        }
        Ok(count as usize)
    }
}

fn frame_crc(generation: u64, sequence: u64, body: &[u8]) -> u32 {
    let seed = crc32c::crc32c(&[generation.to_le_bytes(), sequence.to_le_bytes()].concat());
    crc32c::crc32c_append(seed, body)
}

/// Appends a frame: magic, length, checksum (of generation, sequence, body), sequence, body.
pub(super) fn put_frame(out: &mut Vec<u8>, generation: u64, sequence: u64, body: &[u8]) {
    out.extend(FRAME_MAGIC.to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    out.extend(frame_crc(generation, sequence, body).to_le_bytes());
    out.extend(sequence.to_le_bytes());
    out.extend(body);
}

fn frame_at(bytes: &[u8], generation: u64) -> Option<(u64, &[u8])> {
    let mut reader = Reader(bytes);
    let magic = reader.u32().ok()?;
    let len = reader.u32().ok()? as usize;
    let crc = reader.u32().ok()?;
    let sequence = reader.u64().ok()?;
    if magic != FRAME_MAGIC || len > MAX_FRAME {
        return None;
    }
    let body = reader.take(len).ok()?;
    (frame_crc(generation, sequence, body) == crc).then_some((sequence, body))
}

/// First bytes of a log or snapshot: magic, format version, zero, generation.
pub(super) fn preamble(snapshot: bool, generation: u64) -> Vec<u8> {
    let mut out = if snapshot { SNAPSHOT_MAGIC } else { LOG_MAGIC }.to_vec();
    out.extend(FORMAT_VERSION.to_le_bytes());
    out.extend([0; 4]);
    out.extend(generation.to_le_bytes());
    out
}

/// Checks a preamble.
pub(super) fn check_preamble(bytes: &[u8], snapshot: bool, generation: u64) -> Result<(), FormatError> {
    let name = if snapshot { "snapshot" } else { "log" };
    let found = bytes.get(8..12).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    if bytes.len() >= PREAMBLE && bytes[..8] == preamble(snapshot, generation)[..8] && found > FORMAT_VERSION
    {
        return Err(FormatError::TooNew { found });
    }
    if bytes.get(..PREAMBLE) != Some(&preamble(snapshot, generation)[..]) {
        return Err(damaged(format!("the {name} of generation {generation} does not begin as one")));
    }
    Ok(())
}

/// The frames of a log or snapshot.
pub(super) struct Frames {
    /// Bodies in order.
    pub(super) bodies: Vec<Vec<u8>>,
    /// Where the valid part ends.
    pub(super) end: usize,
}

/// Reads frames up to the end or to a torn tail. What is torn can only be the last frame, since
/// the next is written after it was synced: a valid frame behind a bad one means damage, which
/// must not pass for a tail.
pub(super) fn read_frames(bytes: &[u8], generation: u64) -> Result<Frames, FormatError> {
    let mut frames = Frames { bodies: Vec::new(), end: PREAMBLE };
    let mut next = 0;
    while let Some((sequence, body)) = bytes.get(frames.end..).and_then(|rest| frame_at(rest, generation)) {
        if sequence != next {
            return Err(damaged(format!("frame {sequence} stands where {next} belongs")));
        }
        next += 1;
        frames.end += FRAME_HEAD + body.len();
        frames.bodies.push(body.to_vec());
    }
    let tail = bytes.get(frames.end..).unwrap_or_default();
    let valid_behind = (1..tail.len().saturating_sub(FRAME_HEAD - 1))
        .filter(|at| tail[*at..*at + 4] == FRAME_MAGIC.to_le_bytes())
        .any(|at| frame_at(&tail[at..], generation).is_some_and(|(sequence, _)| sequence > next));
    if valid_behind {
        return Err(damaged(format!("frame {next} is damaged and later ones are not: the disk lost data")));
    }
    Ok(frames)
}
