//! The chunk engine: chunks on one disk, with every byte checked.
//!
//! # What it keeps
//!
//! A target's *volume* (a file, an image or a block device) is a row of 4 KiB blocks: two
//! superblocks, the log, and the rest, which the allocator hands out for data and metadata alike.
//!
//! * **Redirect on write.** An update writes new blocks, never over old ones, and a log record with
//!   the changed part of the chunk's block map. So an overwrite of 4 KiB costs one block and its
//!   share of a log frame, and the committed version stays readable beside the pending one.
//! * **Neighbours stay neighbours** ([`alloc`]): large writes get stretches, small overwrites go
//!   next to what they replace, and reads fetch across small gaps.
//! * **Checksums live in the parent pointer** ([`leaf`], [`format`]) and cover chunk, block index
//!   and version: a lost, torn, stale or misdirected write shows. Every read verifies whole blocks,
//!   also where it wants a part of one. Metadata pages are checked the same way.
//! * **One flush per group** ([`writer`]): the data of all waiting updates and one log frame are
//!   written side by side and made durable by one flush. Why a power cut at any moment loses nothing
//!   that was acknowledged and invents nothing: [`recovery`].
//! * **Maps are paged** ([`state`], [`cache`]): memory holds the table of chunks ([`index`]) and a
//!   bounded cache of map leaves, so a cold read costs two disk reads.
//! * **Checkpoints are incremental** ([`checkpoint`]): they write the pages that changed, beside the
//!   groups that go on, and free the log behind them.
//! * **Space is accounted to the block** ([`audit`]).
//! * **A failed write or flush ends the target** (`fsync` may report an error once and forget it:
//!   Rebello et al., ATC 2020). Nothing is retried.
//!
//! # How it runs
//!
//! [`Core`] is a value without threads, clock or files: operations and disk completions go in, disk
//! requests and results come out, in whatever order the disk completes them. [`Engine`] drives it
//! on a real disk: one thread owns an io_uring for groups and checkpoints, reads share another, and
//! blocking calls stand in where io_uring is refused. [`MemDisk`] is a disk that loses power, for
//! tests and the simulator; [`Plant`] lists bugs that those tests must find.
//!
//! # Limits
//!
//! 16 TiB per volume (32-bit block numbers); 2^48 updates of one chunk; a group, and so the latency
//! that others wait for, takes up to 32 MiB of payload. A volume does not shrink. The log's size is
//! fixed when the volume is made.

mod alloc;
mod audit;
mod buffer;
mod cache;
mod checkpoint;
mod core;
mod disk;
mod driver;
mod file_disk;
mod format;
mod index;
mod leaf;
mod log;
mod mem_disk;
mod plan;
mod read;
mod reader;
mod recovery;
mod ring;
mod state;
mod writer;

#[cfg(test)]
mod tests;

pub use self::core::{Core, Done, EngineError, EngineOptions, Plant, Usage};
pub use audit::Audit;
pub use buffer::AlignedBuf;
pub use disk::{Completion, Disk, Io, IoKind};
pub use driver::{Driver, Engine, Way};
pub use file_disk::FileDisk;
pub use format::{
    Change, FORMAT_VERSION, FormatError, Header, LogRecord, PagePtr, PendingRecord, Superblock,
};
pub use leaf::BlockPtr;
pub use mem_disk::{MemDisk, WriteFault};
pub use read::ReadPlan;
pub use recovery::is_empty;

/// Bytes in a block: the unit of redirection, of checksums and of everything on the volume. Format 2
/// fixes it to the unit of the checksums that replicas compare.
pub const BLOCK_BYTES: usize = fs3_core::target::DIGEST_UNIT;

/// Neighbouring blocks of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Extent {
    start: u32,
    count: u32,
}

impl Extent {
    /// Appends a block, to the last extent if it is its neighbour.
    fn add(extents: &mut Vec<Extent>, block: u32) {
        match extents.last_mut() {
            Some(last) if last.start + last.count == block => last.count += 1,
            _ => extents.push(Extent { start: block, count: 1 }),
        }
    }

    /// The extent in pieces of at most `most` blocks.
    fn pieces(self, most: u32) -> impl Iterator<Item = Extent> {
        (0..self.count.div_ceil(most))
            .map(move |i| Extent { start: self.start + i * most, count: most.min(self.count - i * most) })
    }
}
