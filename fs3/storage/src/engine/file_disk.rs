//! A target's folder on a real file system, or a block device.

use super::core::EngineError;
use super::disk::Disk;
use super::format::FormatError;
use super::recovery::is_empty;
use rustix::fs::{AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, StatxFlags};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// From linux/magic.h; not in every libc binding.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// The volume's name in its folder: a file, or a link to a block device or an image.
const VOLUME: &str = "volume";

/// The volume of one target.
pub struct FileDisk {
    dir: PathBuf,
    volume: File,
    /// Locked: one process per target.
    lock: File,
    direct: bool,
    device: bool,
    volatile: bool,
    sector: u32,
}

impl FileDisk {
    /// Opens or makes the folder. Fails if another process has it open, or if it holds a format that
    /// is too old.
    pub fn open(dir: &Path) -> Result<Self, EngineError> {
        std::fs::create_dir_all(dir)?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("lock"))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| {
            io::Error::new(
                io::ErrorKind::WouldBlock,
                format!("{} is in use by another process ({e}): stop it first", dir.display()),
            )
        })?;
        // Format 1 had a file of this name, and its data elsewhere.
        if dir.join("header").exists() {
            return Err(FormatError::TooOld { found: 1 }.into());
        }
        let path = dir.join(VOLUME);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let (fd, direct) = match rustix::fs::open(&path, flags | OFlags::DIRECT, mode) {
            Ok(fd) => (fd, true),
            Err(rustix::io::Errno::INVAL) => {
                (rustix::fs::open(&path, flags, mode).map_err(io::Error::from)?, false)
            }
            Err(e) => return Err(io::Error::from(e).into()),
        };
        let volume = File::from(fd);
        let stat = rustix::fs::fstat(&volume).map_err(io::Error::from)?;
        let device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        let fs_type = rustix::fs::fstatfs(&volume).map_err(io::Error::from)?.f_type;
        #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
        let volatile = !device && [TMPFS_MAGIC, RAMFS_MAGIC].contains(&(fs_type as i64));
        let sector = find_sector(&volume, device, stat.st_dev)?;
        File::open(dir)?.sync_all()?;
        Ok(Self { dir: dir.to_owned(), volume, lock, direct, device, volatile, sector })
    }

    /// Whether a folder holds no target.
    pub fn is_empty(dir: &Path) -> io::Result<bool> {
        if !dir.join(VOLUME).exists() {
            return Ok(!dir.join("header").exists());
        }
        let disk = ReadOnly(File::open(dir.join(VOLUME))?);
        // What cannot be read as a superblock is not nothing.
        Ok(is_empty(&disk).unwrap_or(false))
    }

    /// Makes the folder hold no target. A block device stays where it is and loses its superblocks.
    pub fn wipe(dir: &Path) -> io::Result<()> {
        let path = dir.join(VOLUME);
        let linked = std::fs::symlink_metadata(&path).is_ok_and(|m| m.file_type().is_symlink());
        if linked && path.exists() {
            let volume = OpenOptions::new().write(true).open(&path)?;
            let blank = vec![0; 2 * super::BLOCK_BYTES];
            let len = (&volume).seek(SeekFrom::End(0))?.min(blank.len() as u64);
            volume.write_all_at(&blank[..len as usize], 0)?;
            return volume.sync_all();
        }
        match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether the volume bypasses the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }
}

/// The unit that the medium writes whole: what the file system asks of direct I/O, or the physical
/// sector of the device where that is known and larger. A write of part of a physical sector makes
/// the drive rewrite all of it, and a power cut then may take acknowledged neighbours with it.
fn find_sector(volume: &File, device: bool, dev: u64) -> Result<u32, EngineError> {
    let mut sector = 512;
    if device {
        let logical = rustix::fs::ioctl_blksszget(volume).map_err(io::Error::from)?;
        let physical = rustix::fs::ioctl_blkpbszget(volume).map_err(io::Error::from)?;
        sector = logical.max(physical);
    } else {
        let flags = AtFlags::EMPTY_PATH;
        if let Ok(stat) = rustix::fs::statx(volume, c"", flags, StatxFlags::DIOALIGN)
            && stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        {
            if stat.stx_dio_offset_align > super::BLOCK_BYTES as u32 {
                let what = format!(
                    "direct I/O on this file system takes multiples of {} bytes, and blocks have {}: put the \
                     target on another one",
                    stat.stx_dio_offset_align,
                    super::BLOCK_BYTES
                );
                return Err(io::Error::new(io::ErrorKind::Unsupported, what).into());
            }
            sector = stat.stx_dio_offset_align.max(sector);
        }
        sector = sector.max(physical_sector(dev).unwrap_or(super::BLOCK_BYTES as u32));
    }
    Ok(if sector <= 512 { 512 } else { 4096 })
}

/// The physical sector of the device under a file system, as sysfs has it.
fn physical_sector(dev: u64) -> Option<u32> {
    let device = format!("/sys/dev/block/{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev));
    // A partition's queue is that of its disk.
    ["queue", "../queue"].iter().find_map(|queue| {
        std::fs::read_to_string(format!("{device}/{queue}/physical_block_size")).ok()?.trim().parse().ok()
    })
}

/// The length of a file or a device.
fn length(file: &File) -> io::Result<u64> {
    // A device's metadata has no length; the end of either can be sought.
    (&mut &*file).seek(SeekFrom::End(0))
}

impl Disk for FileDisk {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.volume.read_exact_at(buf, offset)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.volume.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        // Direct I/O is not durability: this flushes the device's cache and the file's metadata.
        self.volume.sync_data()
    }

    fn size(&self) -> io::Result<u64> {
        length(&self.volume)
    }

    fn grow(&self, len: u64) -> io::Result<()> {
        if self.device {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let old = self.size()?;
        if len <= old {
            return Ok(());
        }
        match rustix::fs::fallocate(&self.volume, FallocateFlags::empty(), old, len - old) {
            Ok(()) => {}
            // Not every file system can reserve; there, a full disk shows at a write, which ends
            // the target.
            Err(rustix::io::Errno::OPNOTSUPP) => self.volume.set_len(len)?,
            Err(error) => return Err(error.into()),
        }
        self.volume.sync_all()
    }

    fn free_bytes(&self) -> u64 {
        if self.device {
            return 0;
        }
        rustix::fs::fstatvfs(&self.volume).map_or(0, |s| s.f_bavail.saturating_mul(s.f_frsize))
    }

    fn sector_bytes(&self) -> u32 {
        self.sector
    }

    fn is_volatile(&self) -> bool {
        self.volatile
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.volume.as_fd())
    }

    fn release(&self) {
        if let Err(error) = rustix::fs::flock(&self.lock, FlockOperation::Unlock) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot unlock the folder");
        }
    }
}

/// To look at a volume without locking it.
struct ReadOnly(File);

impl Disk for ReadOnly {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        length(&self.0)
    }

    fn grow(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn free_bytes(&self) -> u64 {
        0
    }

    fn sector_bytes(&self) -> u32 {
        4096
    }

    fn is_volatile(&self) -> bool {
        false
    }
}
