//! The seam between the engine and the bytes.

use super::buffer::AlignedBuf;
use std::io;
use std::os::fd::BorrowedFd;

/// What the engine needs of a disk: one volume of bytes, read and written in aligned blocks. All
/// calls block; an error of a write or sync is final.
pub trait Disk: Send + Sync + 'static {
    /// Fills `buf` from the volume.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes into the volume; durable after [`Disk::sync`].
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes all writes that have returned durable, down to the medium.
    fn sync(&self) -> io::Result<()>;
    /// Bytes of the volume.
    fn size(&self) -> io::Result<u64>;
    /// Extends the volume, durably, and reserves the room. `StorageFull` leaves it as it was.
    fn grow(&self, len: u64) -> io::Result<()>;
    /// Bytes by which the volume could grow.
    fn free_bytes(&self) -> u64;
    /// The unit that the medium writes whole or not at all: 512 or 4096 bytes.
    fn sector_bytes(&self) -> u32;
    /// A power cut empties it.
    fn is_volatile(&self) -> bool;
    /// The file under it, for io_uring; `None` if only the calls above reach it.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Lets another process (or a later opening in this one) have it.
    fn release(&self) {}
}

/// Something that the engine wants done on the disk. Those that were asked for may be carried out
/// in any order and side by side: where order matters the engine waits.
#[derive(Debug)]
pub struct Io {
    /// Comes back with the completion.
    pub id: u64,
    /// What to do.
    pub kind: IoKind,
}

/// What to do on the disk.
#[derive(Debug)]
pub enum IoKind {
    /// Fill the buffer.
    Read {
        /// Where in the volume, bytes.
        offset: u64,
        /// Given back, filled.
        buf: AlignedBuf,
    },
    /// Write the buffer.
    Write {
        /// Where in the volume, bytes.
        offset: u64,
        /// Given back.
        buf: AlignedBuf,
    },
    /// Make everything durable whose completion was given back before this was asked for.
    Sync,
    /// Extend the volume to so many bytes.
    Grow(u64),
}

/// How an [`Io`] ended.
#[derive(Debug)]
pub struct Completion {
    /// As asked.
    pub id: u64,
    /// The buffer of a read or write.
    pub buf: Option<AlignedBuf>,
    /// Success, or what the disk said.
    pub result: io::Result<()>,
}

impl Io {
    /// Carries it out here and now.
    pub fn perform<D: Disk + ?Sized>(self, disk: &D) -> Completion {
        let (buf, result) = match self.kind {
            IoKind::Read { offset, mut buf } => {
                let result = disk.read(offset, &mut buf);
                (Some(buf), result)
            }
            IoKind::Write { offset, buf } => {
                let result = disk.write(offset, &buf);
                (Some(buf), result)
            }
            IoKind::Sync => (None, disk.sync()),
            IoKind::Grow(len) => (None, disk.grow(len)),
        };
        Completion { id: self.id, buf, result }
    }
}
