//! The seam between the engine and the bytes, and a disk in memory that can lose power.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the engine needs of a disk: one data file, accessed in aligned blocks, and a few small
/// named files. Blocking; an error of a write or sync is final.
pub trait Disk: Send + Sync {
    /// Fills `buf` from the data file.
    fn read_data(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes into the data file; durable after [`Disk::sync_data`].
    fn write_data(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes all data writes durable, down to the medium.
    fn sync_data(&self) -> io::Result<()>;
    /// Bytes that the data file has.
    fn data_len(&self) -> io::Result<u64>;
    /// Reserves room up to `len` bytes. `StorageFull` leaves everything as it was.
    fn grow_data(&self, len: u64) -> io::Result<()>;
    /// The whole of a small file, or `None` if there is none.
    fn read_file(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
    /// Replaces a small file, durably and whole or not at all.
    fn write_file(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// Appends; durable after [`Disk::sync_file`]. `StorageFull` leaves the file as it was.
    fn append_file(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// Makes appended bytes durable.
    fn sync_file(&self, name: &str) -> io::Result<()>;
    /// Cuts a file, durably.
    fn truncate_file(&self, name: &str, len: u64) -> io::Result<()>;
    /// Removes a file; absent is fine.
    fn remove_file(&self, name: &str) -> io::Result<()>;
    /// Bytes that the disk could still take.
    fn free_bytes(&self) -> u64;
    /// A power cut empties it.
    fn is_volatile(&self) -> bool;
    /// Lets another process (or a later opening in this one) have it.
    fn release(&self) {}
}

/// A disk in memory. What was not synced is lost, torn or kept by [`MemDisk::crash`], as its
/// random source says; operations can be made to fail after a number of them.
#[derive(Clone, Default)]
pub struct MemDisk(Arc<Mutex<Memory>>);

#[derive(Default)]
struct Memory {
    data: Vec<u8>,
    /// Old content of ranges written since the last sync.
    unsynced: Vec<(u64, Vec<u8>)>,
    files: BTreeMap<String, File>,
    limit: Option<u64>,
    fuse: Option<u64>,
    sync_lies: bool,
}

#[derive(Default, Clone)]
struct File {
    bytes: Vec<u8>,
    synced: usize,
}

impl Memory {
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
}

impl MemDisk {
    /// An empty disk of at most `limit` data bytes.
    pub fn with_limit(limit: u64) -> Self {
        let disk = Self::default();
        disk.lock().limit = Some(limit);
        disk
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All operations but reads fail after `operations` more of them; `None` mends it.
    pub fn fail_after(&self, operations: Option<u64>) {
        self.lock().fuse = operations;
    }

    /// Syncs report success and do nothing: a planted fault of the medium.
    pub fn lie_about_sync(&self, lie: bool) {
        self.lock().sync_lies = lie;
    }

    /// Power cut: each unsynced data write is kept or undone, and of each unsynced tail of a file
    /// some length is kept, its last byte possibly garbled. `random(n)` returns a number below n.
    pub fn crash(&self, mut random: impl FnMut(u64) -> u64) {
        let memory = &mut *self.lock();
        memory.fuse = None;
        for (offset, old) in std::mem::take(&mut memory.unsynced).into_iter().rev() {
            if random(2) == 0 {
                let at = offset as usize;
                memory.data[at..at + old.len()].copy_from_slice(&old);
            }
        }
        for file in memory.files.values_mut() {
            let tail = (file.bytes.len() - file.synced) as u64;
            let kept = file.synced + random(tail + 1) as usize;
            file.bytes.truncate(kept);
            if kept > file.synced && random(2) == 0 {
                file.bytes[kept - 1] ^= 0x55;
            }
            file.synced = file.bytes.len();
        }
    }

    /// Damages bytes of the data file.
    pub fn corrupt_data(&self, offset: u64, flip: u8) {
        if let Some(byte) = self.lock().data.get_mut(offset as usize) {
            *byte ^= flip;
        }
    }

    /// Changes a small file behind the engine's back.
    pub fn edit_file(&self, name: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        if let Some(file) = self.lock().files.get_mut(name) {
            edit(&mut file.bytes);
            file.synced = file.bytes.len();
        }
    }

    /// Names of the small files.
    pub fn file_names(&self) -> Vec<String> {
        self.lock().files.keys().cloned().collect()
    }
}

impl Disk for MemDisk {
    fn read_data(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let memory = self.lock();
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let from = memory.data.get(at..at + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(from);
        Ok(())
    }

    fn write_data(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut memory = self.lock();
        memory.burn()?;
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let old = memory.data.get(at..at + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?.to_vec();
        memory.unsynced.push((offset, old));
        memory.data[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut memory = self.lock();
        memory.burn()?;
        if !memory.sync_lies {
            memory.unsynced.clear();
        }
        Ok(())
    }

    fn data_len(&self) -> io::Result<u64> {
        Ok(self.lock().data.len() as u64)
    }

    fn grow_data(&self, len: u64) -> io::Result<()> {
        let mut memory = self.lock();
        memory.burn()?;
        if memory.limit.is_some_and(|limit| len > limit) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let len = usize::try_from(len).map_err(io::Error::other)?;
        if len > memory.data.len() {
            memory.data.resize(len, 0);
        }
        Ok(())
    }

    fn read_file(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(self.lock().files.get(name).map(|f| f.bytes.clone()))
    }

    fn write_file(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut memory = self.lock();
        memory.burn()?;
        memory.files.insert(name.to_owned(), File { bytes: bytes.to_vec(), synced: bytes.len() });
        Ok(())
    }

    fn append_file(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut memory = self.lock();
        memory.burn()?;
        memory.files.entry(name.to_owned()).or_default().bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn sync_file(&self, name: &str) -> io::Result<()> {
        let mut memory = self.lock();
        memory.burn()?;
        let lies = memory.sync_lies;
        if let Some(file) = memory.files.get_mut(name).filter(|_| !lies) {
            file.synced = file.bytes.len();
        }
        Ok(())
    }

    fn truncate_file(&self, name: &str, len: u64) -> io::Result<()> {
        let mut memory = self.lock();
        memory.burn()?;
        if let Some(file) = memory.files.get_mut(name) {
            file.bytes.truncate(len as usize);
            file.synced = file.bytes.len();
        }
        Ok(())
    }

    fn remove_file(&self, name: &str) -> io::Result<()> {
        let mut memory = self.lock();
        memory.burn()?;
        memory.files.remove(name);
        Ok(())
    }

    fn free_bytes(&self) -> u64 {
        let memory = self.lock();
        memory.limit.map_or(u64::MAX >> 1, |limit| limit - memory.data.len() as u64)
    }

    fn is_volatile(&self) -> bool {
        true
    }
}
