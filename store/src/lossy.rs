//! A disk in memory that can lose power: [`LossyDisk`]. What was not synced is then lost, kept or
//! torn at 512-byte sectors, each by chance; names of files that were made or removed since the
//! last sync of the folder may or may not have changed. SIGKILL cannot test this, because the page
//! cache outlives the process.

use crate::log::disk::{Disk, DiskFile};
use rand::{Rng, RngExt};
use redb::{Database, StorageBackend};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The smallest unit that a disk writes as a whole.
const SECTOR: usize = 512;
/// The file under the state machine; the log files have other names.
const DATABASE: &str = "state.redb";

/// A disk in memory whose power can be cut. Clones are handles of the same disk.
#[derive(Clone, Debug, Default)]
pub struct LossyDisk(Arc<Mutex<World>>);

#[derive(Debug, Default)]
struct World {
    files: BTreeMap<String, Content>,
    /// Files whose names are durable, with what they held when they were removed, if they were.
    durable_names: BTreeMap<String, Option<Content>>,
    operations: u64,
    cut_at: Option<u64>,
    is_off: bool,
    ignores_log_sync: bool,
}

#[derive(Clone, Debug, Default)]
struct Content {
    now: Vec<u8>,
    synced: Vec<u8>,
    /// Since the last sync, in order.
    pending: Vec<Change>,
}

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    SetLen(usize),
}

impl Change {
    fn apply(&self, to: &mut Vec<u8>) {
        match self {
            Change::Write(at, bytes) => {
                if to.len() < at + bytes.len() {
                    to.resize(at + bytes.len(), 0);
                }
                to[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            Change::SetLen(len) => to.resize(*len, 0),
        }
    }
}

impl Content {
    fn change(&mut self, change: Change) {
        change.apply(&mut self.now);
        self.pending.push(change);
    }

    fn sync(&mut self) {
        self.synced.clone_from(&self.now);
        self.pending.clear();
    }

    /// What a power cut leaves.
    fn survive(&self, rng: &mut impl Rng) -> Content {
        let mut left = self.synced.clone();
        // Often all or nothing, which are the commonest real outcomes; else sector by sector.
        let odds = [0.0, 1.0, 0.5, 0.9][rng.random_range(0..4)];
        for change in &self.pending {
            match change {
                Change::Write(at, bytes) => {
                    let mut done = 0;
                    while done < bytes.len() {
                        let start = at + done;
                        let n = (SECTOR - start % SECTOR).min(bytes.len() - done);
                        if rng.random_bool(odds) {
                            Change::Write(start, bytes[done..done + n].to_vec()).apply(&mut left);
                        }
                        done += n;
                    }
                }
                Change::SetLen(_) if rng.random_bool(odds) => change.apply(&mut left),
                Change::SetLen(_) => {}
            }
        }
        // The length is metadata and may be durable although the bytes are not.
        if rng.random_bool(0.3) && left.len() < self.now.len() {
            left.resize(self.now.len(), 0);
        }
        Content { now: left.clone(), synced: left, pending: Vec::new() }
    }
}

impl LossyDisk {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// A disk that acknowledges syncs of log files without doing them: for showing that a test
    /// would notice.
    pub fn ignoring_log_sync() -> Self {
        let disk = Self::new();
        disk.world().ignores_log_sync = true;
        disk
    }

    /// Cuts the power at the `n`th changing operation from now: it takes effect at most partly,
    /// and it and all later ones fail.
    pub fn cut_power_at(&self, n: u64) {
        let mut world = self.world();
        world.cut_at = Some(world.operations + n);
    }

    /// Whether the power has gone.
    pub fn is_off(&self) -> bool {
        self.world().is_off
    }

    /// Changing operations so far.
    pub fn operations(&self) -> u64 {
        self.world().operations
    }

    /// The disk as it is found when power returns (power is cut now if it was not). The old
    /// handles stay dead.
    pub fn after_power_cut(&self, rng: &mut impl Rng) -> LossyDisk {
        let mut world = self.world();
        world.is_off = true;
        let mut files = BTreeMap::new();
        for (name, content) in &world.files {
            if world.durable_names.contains_key(name) || rng.random_bool(0.5) {
                files.insert(name.clone(), content.survive(rng));
            }
        }
        for (name, removed) in &world.durable_names {
            if let Some(content) = removed
                && !files.contains_key(name)
                && rng.random_bool(0.5)
            {
                files.insert(name.clone(), content.survive(rng));
            }
        }
        let durable_names = files.keys().map(|name| (name.clone(), None)).collect();
        let ignores_log_sync = world.ignores_log_sync;
        LossyDisk(Arc::new(Mutex::new(World { files, durable_names, ignores_log_sync, ..World::default() })))
    }

    /// Changes one bit of a log file, as a decaying medium would. False if there is no such byte.
    pub fn flip_bit(&self, name: &str, byte: usize, bit: u8) -> bool {
        let mut world = self.world();
        let Some(content) = world.files.get_mut(name).filter(|c| byte < c.now.len()) else { return false };
        content.now[byte] ^= 1 << (bit % 8);
        content.sync();
        true
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one changing operation, or the part of it that the power cut lets through.
    fn change<T>(&self, operate: impl FnOnce(&mut World) -> io::Result<T>, is_sync: bool) -> io::Result<T> {
        let mut world = self.world();
        if world.is_off {
            return Err(no_power());
        }
        world.operations += 1;
        if world.cut_at.is_some_and(|at| world.operations >= at) {
            world.is_off = true;
            // A write may have reached the disk in part, a sync may have made nothing durable.
            if !is_sync {
                drop(operate(&mut world));
            }
            return Err(no_power());
        }
        operate(&mut world)
    }

    fn write(&self, name: &str, change: impl FnOnce(&Content) -> Change) -> io::Result<()> {
        self.change(
            |world| {
                let content = world.files.get_mut(name).ok_or_else(not_found)?;
                let change = change(content);
                content.change(change);
                Ok(())
            },
            false,
        )
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        self.change(
            |world| {
                let ignores = world.ignores_log_sync && name != DATABASE;
                let content = world.files.get_mut(name).ok_or_else(not_found)?;
                if !ignores {
                    content.sync();
                }
                Ok(())
            },
            true,
        )
    }
}

fn no_power() -> io::Error {
    io::Error::other("the simulated power is off")
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for LossyDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.world().files.keys().filter(|name| *name != DATABASE).cloned().collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let world = self.world();
        if world.is_off {
            return Err(no_power());
        }
        world.files.get(name).map(|c| c.now.clone()).ok_or_else(not_found)
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        self.change(
            |world| {
                if world.files.contains_key(name) {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                world.files.insert(name.to_owned(), Content::default());
                Ok(())
            },
            false,
        )?;
        Ok(Box::new(LossyFile { disk: self.clone(), name: name.to_owned() }))
    }

    fn truncate(&self, name: &str, len: u64) -> io::Result<()> {
        self.write(name, |_| Change::SetLen(len as usize))?;
        self.sync(name)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.change(
            |world| {
                let content = world.files.remove(name).ok_or_else(not_found)?;
                if let Some(removed) = world.durable_names.get_mut(name) {
                    *removed = Some(content);
                }
                Ok(())
            },
            false,
        )
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.change(
            |world| {
                if !world.ignores_log_sync {
                    world.durable_names = world.files.keys().map(|name| (name.clone(), None)).collect();
                }
                Ok(())
            },
            true,
        )
    }

    fn database(&self, cache_bytes: usize) -> Result<Database, redb::DatabaseError> {
        if !self.world().files.contains_key(DATABASE) {
            // As `RealDisk` does: made elsewhere, put in place in one step.
            let elsewhere = LossyDisk::new();
            elsewhere.world().files.insert(DATABASE.to_owned(), Content::default());
            drop(Database::builder().create_with_backend(LossyBackend(elsewhere.clone()))?);
            let mut content = elsewhere.world().files.remove(DATABASE).unwrap_or_default();
            content.sync();
            self.change(
                |world| {
                    world.files.insert(DATABASE.to_owned(), content);
                    world.durable_names.insert(DATABASE.to_owned(), None);
                    Ok(())
                },
                false,
            )
            .map_err(redb::StorageError::from)?;
        }
        Database::builder().set_cache_size(cache_bytes).create_with_backend(LossyBackend(self.clone()))
    }

    fn describe(&self) -> String {
        "a simulated disk".into()
    }
}

struct LossyFile {
    disk: LossyDisk,
    name: String,
}

impl DiskFile for LossyFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.disk.write(&self.name, |content| Change::Write(content.now.len(), bytes.to_vec()))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.disk.sync(&self.name)
    }
}

#[derive(Debug)]
struct LossyBackend(LossyDisk);

impl LossyBackend {
    fn read_with<T>(&self, read: impl FnOnce(&[u8]) -> io::Result<T>) -> io::Result<T> {
        let world = self.0.world();
        if world.is_off {
            return Err(no_power());
        }
        read(&world.files.get(DATABASE).ok_or_else(not_found)?.now)
    }
}

impl StorageBackend for LossyBackend {
    fn len(&self) -> io::Result<u64> {
        self.read_with(|bytes| Ok(bytes.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.read_with(|bytes| {
            let from = bytes.get(offset as usize..).and_then(|b| b.get(..out.len()));
            out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.write(DATABASE, |_| Change::SetLen(len as usize))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync(DATABASE)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(DATABASE, |_| Change::Write(offset as usize, data.to_vec()))
    }
}
