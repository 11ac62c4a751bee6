//! A disk in memory that loses power, tears, loses and misplaces writes, fills up and fails, as a
//! test or the simulator asks.

use super::disk::Disk;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Something that a disk does to a single write, without saying so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteFault {
    /// It never reaches the medium.
    Lost,
    /// Only its first half does.
    Torn,
    /// It goes to this many bytes behind where it belongs.
    Misdirected(u64),
}

/// A disk in memory. Clones share it. What was not synced is lost or kept, sector by sector and in
/// any mixture of what the sector held since the last sync, by [`MemDisk::crash`].
#[derive(Clone, Default)]
pub struct MemDisk(Arc<Mutex<Memory>>);

#[derive(Default)]
struct Memory {
    bytes: Vec<u8>,
    /// What each unsynced sector held, oldest (durable) first.
    unsynced: BTreeMap<u64, Vec<Box<[u8]>>>,
    sector: Option<u32>,
    limit: Option<u64>,
    fuse: Option<u64>,
    sync_lies: bool,
    /// After so many writes.
    fault: Option<(u64, WriteFault)>,
    reads: u64,
    written: u64,
}

impl Memory {
    fn sector(&self) -> u64 {
        u64::from(self.sector.unwrap_or(4096))
    }

    /// Counts down to the planned failure.
    fn burn(&mut self) -> io::Result<()> {
        match &mut self.fuse {
            Some(0) => Err(io::Error::other("the disk has failed, as planned")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let sector = self.sector();
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        if !offset.is_multiple_of(sector) || !(bytes.len() as u64).is_multiple_of(sector) {
            return Err(io::Error::other(format!("{} bytes at {offset} are not aligned", bytes.len())));
        }
        if at + bytes.len() > self.bytes.len() {
            return Err(io::Error::other(format!("{} bytes at {offset} leave the volume", bytes.len())));
        }
        for i in 0..bytes.len() as u64 / sector {
            let from = at + (i * sector) as usize;
            let old = self.bytes[from..from + sector as usize].into();
            self.unsynced.entry(offset / sector + i).or_default().push(old);
        }
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }
}

impl MemDisk {
    /// An empty disk that holds at most `limit` bytes.
    pub fn with_limit(limit: u64) -> Self {
        let disk = Self::default();
        disk.lock().limit = Some(limit);
        disk
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The unit of its writes: 512 or 4096 (the default) bytes.
    pub fn set_sector(&self, bytes: u32) {
        self.lock().sector = Some(bytes);
    }

    /// Changes how many bytes it holds at most.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.lock().limit = limit;
    }

    /// All operations but reads fail after `operations` more of them; `None` mends it.
    pub fn fail_after(&self, operations: Option<u64>) {
        self.lock().fuse = operations;
    }

    /// Syncs report success and do nothing: a planted fault of the medium.
    pub fn lie_about_sync(&self, lie: bool) {
        self.lock().sync_lies = lie;
    }

    /// The write after `writes` more of them meets this fault, in silence.
    pub fn plant(&self, writes: u64, fault: WriteFault) {
        self.lock().fault = Some((writes, fault));
    }

    /// Whether the planted fault has happened.
    pub fn is_fault_spent(&self) -> bool {
        self.lock().fault.is_none()
    }

    /// Power cut: each unsynced sector holds something that was written to it since the last sync,
    /// or what it held then. `random(n)` returns a number below n.
    pub fn crash(&self, mut random: impl FnMut(u64) -> u64) {
        let memory = &mut *self.lock();
        memory.fuse = None;
        let sector = memory.sector();
        for (number, held) in std::mem::take(&mut memory.unsynced) {
            let choice = random(held.len() as u64 + 1) as usize;
            if let Some(old) = held.get(choice) {
                let at = (number * sector) as usize;
                memory.bytes[at..at + old.len()].copy_from_slice(old);
            }
        }
    }

    /// Changes bytes of the volume behind the engine's back.
    pub fn edit(&self, edit: impl FnOnce(&mut [u8])) {
        edit(&mut self.lock().bytes);
    }

    /// A copy of the volume.
    pub fn snapshot(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// Reads so far, and bytes written.
    pub fn counters(&self) -> (u64, u64) {
        let memory = self.lock();
        (memory.reads, memory.written)
    }

    /// Nothing was ever written to it.
    pub fn is_blank(&self) -> bool {
        self.lock().bytes.is_empty()
    }
}

impl Disk for MemDisk {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut memory = self.lock();
        memory.reads += 1;
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let from = memory.bytes.get(at..at + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(from);
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut memory = self.lock();
        memory.burn()?;
        let fault = match memory.fault {
            Some((0, fault)) => {
                memory.fault = None;
                Some(fault)
            }
            Some((left, fault)) => {
                memory.fault = Some((left - 1, fault));
                None
            }
            None => None,
        };
        match fault {
            None => memory.put(offset, bytes),
            Some(WriteFault::Lost) => Ok(()),
            Some(WriteFault::Torn) => {
                let half = (bytes.len() / 2) as u64 / memory.sector() * memory.sector();
                memory.put(offset, &bytes[..half as usize])
            }
            Some(WriteFault::Misdirected(by)) => {
                let sector = memory.sector();
                let places = (memory.bytes.len() - bytes.len()) as u64 / sector + 1;
                memory.put((offset + by) / sector % places * sector, bytes)
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        let mut memory = self.lock();
        memory.burn()?;
        if !memory.sync_lies {
            memory.unsynced.clear();
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.lock().bytes.len() as u64)
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        let mut memory = self.lock();
        memory.burn()?;
        if memory.limit.is_some_and(|limit| len > limit) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let len = usize::try_from(len).map_err(io::Error::other)?;
        if len > memory.bytes.len() {
            memory.bytes.resize(len, 0);
        }
        Ok(())
    }

    fn free_bytes(&self) -> u64 {
        let memory = self.lock();
        memory.limit.map_or(u64::MAX >> 1, |limit| limit.saturating_sub(memory.bytes.len() as u64))
    }

    fn sector_bytes(&self) -> u32 {
        self.lock().sector() as u32
    }

    fn is_volatile(&self) -> bool {
        true
    }
}
