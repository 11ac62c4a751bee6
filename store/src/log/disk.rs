//! The seam between the store and the file system: everything durable goes through [`Disk`], so
//! that tests can put a disk under it that loses and tears what was not synced
//! ([`crate::lossy::LossyDisk`]).

use redb::Database;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// A folder of log files plus the state machine's database.
pub trait Disk: Send + Sync + 'static {
    /// Names of all log files, in any order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// The whole content of a log file.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Makes an empty log file. Its name is durable after [`Disk::sync_dir`].
    fn create(&self, name: &str) -> io::Result<Box<dyn DiskFile>>;
    /// Shortens a log file and syncs it.
    fn truncate(&self, name: &str, len: u64) -> io::Result<()>;
    /// Removes a log file; durable after [`Disk::sync_dir`].
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes creations and removals durable.
    fn sync_dir(&self) -> io::Result<()>;
    /// Opens or creates the state machine's database with a page cache of `cache_bytes`.
    fn database(&self, cache_bytes: usize) -> Result<Database, redb::DatabaseError>;
    /// For messages.
    fn describe(&self) -> String;
}

/// A log file that grows.
pub trait DiskFile: Send {
    /// Adds at the end.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes everything appended durable (fdatasync).
    fn sync(&mut self) -> io::Result<()>;
}

/// A folder of a real file system.
pub struct RealDisk {
    dir: PathBuf,
}

impl RealDisk {
    /// Uses `dir`, made if it is not there.
    pub fn open(dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(dir.join("log"))?;
        // The folders' own names must survive too.
        File::open(dir)?.sync_all()?;
        if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
            File::open(parent)?.sync_all()?;
        }
        Ok(Self { dir: dir.to_owned() })
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(name)
    }
}

impl Disk for RealDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.dir.join("log"))? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.log_path(name))?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new().append(true).create_new(true).open(self.log_path(name))?;
        Ok(Box::new(RealFile(file)))
    }

    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.log_path(name))?;
        file.set_len(len)?;
        file.sync_all()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.log_path(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(self.dir.join("log"))?.sync_all()
    }

    fn database(&self, cache_bytes: usize) -> Result<Database, redb::DatabaseError> {
        let path = self.dir.join("state.redb");
        if !path.exists() {
            // A database that a crash left half made cannot be opened, so it is made under
            // another name and renamed when whole.
            let new = self.dir.join("state.redb.new");
            let io = redb::StorageError::from;
            if new.exists() {
                std::fs::remove_file(&new).map_err(io)?;
            }
            drop(Database::create(&new)?);
            File::open(&new).and_then(|f| f.sync_all()).map_err(io)?;
            std::fs::rename(&new, &path).map_err(io)?;
            File::open(&self.dir).and_then(|d| d.sync_all()).map_err(io)?;
        }
        Database::builder().set_cache_size(cache_bytes).create(path)
    }

    fn describe(&self) -> String {
        self.dir.display().to_string()
    }
}

struct RealFile(File);

impl DiskFile for RealFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data()
    }
}
