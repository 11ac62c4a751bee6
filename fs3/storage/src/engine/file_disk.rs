//! A target folder on a real file system.

use super::disk::Disk;
use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// From linux/magic.h; not in every libc binding.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// The log is extended on disk in steps of this, so that an append seldom changes the file's
/// allocation, which would make its flush dearer.
const LOG_STEP: u64 = 1 << 20;

/// Files of one target in one folder.
pub struct FileDisk {
    dir: PathBuf,
    data: File,
    direct: bool,
    volatile: bool,
    /// Open small files, with their length and reserved bytes.
    appending: Mutex<HashMap<String, Arc<Mutex<Appending>>>>,
    /// Held locked: one process per target.
    lock: File,
}

struct Appending {
    file: File,
    len: u64,
    reserved: u64,
}

impl FileDisk {
    /// Opens or makes the folder. Fails if another process has it open.
    pub fn open(dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("lock"))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| {
            io::Error::new(
                io::ErrorKind::WouldBlock,
                format!("{} is in use by another process ({e}): stop it first", dir.display()),
            )
        })?;
        let path = dir.join("blocks");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let (fd, direct) = match rustix::fs::open(&path, flags | OFlags::DIRECT, mode) {
            Ok(fd) => (fd, true),
            Err(rustix::io::Errno::INVAL) => (rustix::fs::open(&path, flags, mode)?, false),
            Err(e) => return Err(e.into()),
        };
        let data = File::from(fd);
        let fs_type = rustix::fs::fstatfs(&data)?.f_type;
        #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
        let volatile = [TMPFS_MAGIC, RAMFS_MAGIC].contains(&(fs_type as i64));
        File::open(dir)?.sync_all()?;
        Ok(Self { dir: dir.to_owned(), data, direct, volatile, appending: Mutex::default(), lock })
    }

    /// Whether the data file bypasses the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn appending(&self, name: &str) -> io::Result<Arc<Mutex<Appending>>> {
        let mut open = self.appending.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = open.get(name) {
            return Ok(Arc::clone(file));
        }
        let path = self.dir.join(name);
        let existed = path.exists();
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)?;
        if !existed {
            file.sync_all()?;
            self.sync_dir()?;
        }
        let len = file.metadata()?.len();
        let file = Arc::new(Mutex::new(Appending { file, len, reserved: len }));
        open.insert(name.to_owned(), Arc::clone(&file));
        Ok(file)
    }
}

fn reserve(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, flags, offset, len) {
        // Not every file system can reserve; there, a full disk shows at the write.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}

impl Disk for FileDisk {
    fn read_data(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.data.read_exact_at(buf, offset)
    }

    fn write_data(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.data.write_all_at(bytes, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        // Direct I/O is not durability: this flushes the device's cache and the file's metadata.
        self.data.sync_data()
    }

    fn data_len(&self) -> io::Result<u64> {
        Ok(self.data.metadata()?.len())
    }

    fn grow_data(&self, len: u64) -> io::Result<()> {
        let old = self.data_len()?;
        if len > old {
            reserve(&self.data, FallocateFlags::empty(), old, len - old)?;
            if self.data_len()? < len {
                self.data.set_len(len)?;
            }
            self.data.sync_all()?;
        }
        Ok(())
    }

    fn read_file(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        match std::fs::read(self.dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn write_file(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.appending.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        let temporary = self.dir.join(format!("{name}.new"));
        let file = File::create(&temporary)?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()?;
        std::fs::rename(temporary, self.dir.join(name))?;
        self.sync_dir()
    }

    fn append_file(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let file = self.appending(name)?;
        let mut open = file.lock().unwrap_or_else(PoisonError::into_inner);
        let end = open.len + bytes.len() as u64;
        if end > open.reserved {
            let step = (end - open.reserved).next_multiple_of(LOG_STEP);
            reserve(&open.file, FallocateFlags::KEEP_SIZE, open.reserved, step)?;
            open.reserved += step;
        }
        open.file.write_all_at(bytes, open.len)?;
        open.len = end;
        Ok(())
    }

    fn sync_file(&self, name: &str) -> io::Result<()> {
        let file = self.appending(name)?;
        let open = file.lock().unwrap_or_else(PoisonError::into_inner);
        open.file.sync_data()
    }

    fn truncate_file(&self, name: &str, len: u64) -> io::Result<()> {
        let file = self.appending(name)?;
        let mut open = file.lock().unwrap_or_else(PoisonError::into_inner);
        open.file.set_len(len)?;
        open.file.sync_all()?;
        (open.len, open.reserved) = (len, len);
        Ok(())
    }

    fn remove_file(&self, name: &str) -> io::Result<()> {
        self.appending.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        match std::fs::remove_file(self.dir.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => self.sync_dir(),
        }
    }

    fn free_bytes(&self) -> u64 {
        rustix::fs::fstatvfs(&self.data).map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize))
    }

    fn is_volatile(&self) -> bool {
        self.volatile
    }

    fn release(&self) {
        if let Err(error) = rustix::fs::flock(&self.lock, FlockOperation::Unlock) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot unlock the folder");
        }
    }
}
