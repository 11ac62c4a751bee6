//! The replicated state machine: a redb table of keys and values, how far the log has been
//! applied to it, and the window of recent writes.
//!
//! redb commits without syncing after each batch; only a checkpoint syncs. A crash therefore
//! takes the machine back to its last checkpoint as a whole, and the log brings it forward again.

use crate::record::TxnRecord;
use crate::window::Window;
use crate::{StoreError, log::disk::Disk};
use redb::{Database, Durability, ReadOnlyTable, ReadableDatabase, TableDefinition};
use std::sync::Arc;

const DATA: TableDefinition<&[u8], &[u8]> = TableDefinition::new("kv");
const NUMBERS: TableDefinition<&str, u64> = TableDefinition::new("numbers");
const BLOBS: TableDefinition<&str, &[u8]> = TableDefinition::new("blobs");

const MACHINE_VERSION: u64 = 1;

/// The numbers kept beside the data, all as of the same log index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    /// Every entry up to this index is in the machine.
    pub applied: u64,
    /// Term of that entry.
    pub term: u64,
}

/// What became of one entry.
pub(crate) enum Applied {
    /// The transaction's writes are in.
    Committed,
    /// The transaction lost; nothing was written.
    Conflict,
    /// Not a transaction (a new leader's empty entry).
    Nothing,
}

pub(crate) struct Machine {
    db: Arc<Database>,
    pub store_id: u64,
    /// The oldest log segment that replay from the last checkpoint needs.
    pub first_segment: u64,
    pub position: Position,
    window: Window,
}

pub(crate) type DataTable = ReadOnlyTable<&'static [u8], &'static [u8]>;

impl Machine {
    pub(crate) fn open(disk: &dyn Disk, cache_bytes: usize, new_store_id: u64) -> Result<Self, StoreError> {
        let db = disk.database(cache_bytes).map_err(|e| match e {
            redb::DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(disk.describe()),
            other => StoreError::engine("opening", other),
        })?;
        let mut machine = Self {
            db: Arc::new(db),
            store_id: new_store_id,
            first_segment: 0,
            position: Position::default(),
            window: Window::default(),
        };
        if !machine.load()? {
            machine.checkpoint(0)?;
        }
        Ok(machine)
    }

    pub(crate) fn database(&self) -> Arc<Database> {
        self.db.clone()
    }

    /// False if the database is new.
    fn load(&mut self) -> Result<bool, StoreError> {
        let wrong = |e| StoreError::engine("reading", redb::Error::from(e));
        let txn = self.db.begin_read().map_err(|e| StoreError::engine("reading", e))?;
        let numbers = match txn.open_table(NUMBERS) {
            Ok(table) => table,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(false),
            Err(e) => return Err(StoreError::engine("reading", e)),
        };
        let number = |name: &str| -> Result<u64, StoreError> {
            match numbers.get(name).map_err(wrong)? {
                Some(value) => Ok(value.value()),
                None => Err(StoreError::Corrupt(format!("state machine: number {name:?} is missing"))),
            }
        };
        let version = number("version")?;
        if version != MACHINE_VERSION {
            return Err(StoreError::Corrupt(format!(
                "state machine: format {version} is not known to this release, which reads {MACHINE_VERSION}"
            )));
        }
        self.store_id = number("store_id")?;
        self.first_segment = number("first_segment")?;
        self.position = Position { applied: number("applied")?, term: number("term")? };
        let blobs = txn.open_table(BLOBS).map_err(|e| StoreError::engine("reading", e))?;
        let window = blobs.get("window").map_err(wrong)?;
        self.window = window.and_then(|bytes| Window::decode(bytes.value())).ok_or_else(|| {
            StoreError::Corrupt("state machine: the window of recent writes is unreadable".into())
        })?;
        Ok(true)
    }

    /// Applies a batch of committed entries, given as (index, term, payload), in one step.
    /// Readers see all of it or nothing.
    pub(crate) fn apply(&mut self, entries: &[(u64, u64, &[u8])]) -> Result<Vec<Applied>, StoreError> {
        let Some(&(last, term, _)) = entries.last() else { return Ok(Vec::new()) };
        let doing = "applying";
        let wrong = |e| StoreError::engine(doing, redb::Error::from(e));
        let mut txn = self.db.begin_write().map_err(|e| StoreError::engine(doing, e))?;
        txn.set_durability(Durability::None).map_err(|e| StoreError::engine(doing, e))?;
        let mut outcomes = Vec::with_capacity(entries.len());
        {
            let mut data = txn.open_table(DATA).map_err(|e| StoreError::engine(doing, e))?;
            for &(index, _, payload) in entries {
                if payload.is_empty() {
                    outcomes.push(Applied::Nothing);
                    continue;
                }
                let record = TxnRecord::decode(payload).ok_or_else(|| {
                    StoreError::Corrupt(format!(
                        "log entry {index} passes its checksum but is no transaction of this release"
                    ))
                })?;
                if !self.window.admits(&record) {
                    outcomes.push(Applied::Conflict);
                    continue;
                }
                for (key, value) in &record.writes {
                    match value {
                        Some(value) => drop(data.insert(key.as_slice(), value.as_slice()).map_err(wrong)?),
                        None => drop(data.remove(key.as_slice()).map_err(wrong)?),
                    }
                }
                self.window.record(index, record.writes.keys().map(Vec::as_slice));
                outcomes.push(Applied::Committed);
            }
            let mut numbers = txn.open_table(NUMBERS).map_err(|e| StoreError::engine(doing, e))?;
            numbers.insert("applied", last).map_err(wrong)?;
            numbers.insert("term", term).map_err(wrong)?;
        }
        txn.commit().map_err(|e| StoreError::engine(doing, e))?;
        self.position = Position { applied: last, term };
        Ok(outcomes)
    }

    /// Makes the machine durable as it stands. Replay will start after it, from `first_segment`.
    pub(crate) fn checkpoint(&mut self, first_segment: u64) -> Result<(), StoreError> {
        let doing = "writing a checkpoint";
        let wrong = |e| StoreError::engine(doing, redb::Error::from(e));
        let mut txn = self.db.begin_write().map_err(|e| StoreError::engine(doing, e))?;
        txn.set_durability(Durability::Immediate).map_err(|e| StoreError::engine(doing, e))?;
        // Opening after a crash must not walk the whole database.
        txn.set_quick_repair(true);
        {
            txn.open_table(DATA).map_err(|e| StoreError::engine(doing, e))?;
            let mut numbers = txn.open_table(NUMBERS).map_err(|e| StoreError::engine(doing, e))?;
            for (name, value) in [
                ("version", MACHINE_VERSION),
                ("store_id", self.store_id),
                ("first_segment", first_segment),
                ("applied", self.position.applied),
                ("term", self.position.term),
            ] {
                numbers.insert(name, value).map_err(wrong)?;
            }
            let mut blobs = txn.open_table(BLOBS).map_err(|e| StoreError::engine(doing, e))?;
            blobs.insert("window", self.window.encode().as_slice()).map_err(wrong)?;
        }
        txn.commit().map_err(|e| StoreError::engine(doing, e))?;
        self.first_segment = first_segment;
        Ok(())
    }
}

/// A consistent view of the data and the log index it stands at.
pub(crate) fn snapshot(db: &Database) -> Result<(DataTable, u64), StoreError> {
    let doing = "taking a snapshot";
    let txn = db.begin_read().map_err(|e| StoreError::engine(doing, e))?;
    let numbers = txn.open_table(NUMBERS).map_err(|e| StoreError::engine(doing, e))?;
    let applied = numbers.get("applied").map_err(|e| StoreError::engine(doing, e))?;
    let applied =
        applied.ok_or_else(|| StoreError::Corrupt("state machine: number \"applied\" is missing".into()))?;
    let data = txn.open_table(DATA).map_err(|e| StoreError::engine(doing, e))?;
    Ok((data, applied.value()))
}
