//! Transactions: a snapshot to read from, a record of what was read, and writes kept back until
//! commit.

use crate::record::TxnRecord;
use crate::{MAX_KEY_BYTES, MAX_VALUE_BYTES, StoreError};
use std::future::Future;
use std::ops::Bound;
use std::pin::Pin;
use std::sync::Arc;

pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Pairs in key order.
pub type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// A view of all keys as of one version.
pub(crate) trait Snapshot: Send {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;
    /// The first pairs of the range for which `take` returns true; stops when it returns false.
    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        take: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError>;
}

/// Takes a finished transaction to the log.
pub(crate) trait Committer: Send + Sync {
    fn commit(&self, record: TxnRecord) -> BoxFuture<'_, Result<u64, StoreError>>;
    /// Whether a snapshot of this version can still win.
    fn is_too_old(&self, version: u64) -> bool;
}

/// One serializable transaction. Reads come from a snapshot; nothing is visible to others before
/// [`Txn::commit`] resolves, and dropping it undoes everything. It may be retried, so the code
/// that fills it must have no other effects ([`crate::transact`]).
///
/// Reads are short synchronous look-ups, mostly in memory.
pub struct Txn {
    snapshot: Result<Box<dyn Snapshot>, StoreError>,
    committer: Arc<dyn Committer>,
    record: TxnRecord,
    /// The first misuse; reported by the next call that can.
    error: Option<StoreError>,
    conflicted: bool,
}

impl Txn {
    pub(crate) fn new(
        snapshot: Result<(Box<dyn Snapshot>, u64), StoreError>,
        committer: Arc<dyn Committer>,
    ) -> Self {
        let (snapshot, read_version) = match snapshot {
            Ok((snapshot, version)) => (Ok(snapshot), version),
            Err(error) => (Err(error), 0),
        };
        let record = TxnRecord { read_version, ..Default::default() };
        Self { snapshot, committer, record, error: None, conflicted: false }
    }

    /// The version of the snapshot.
    pub fn version(&self) -> u64 {
        self.record.read_version
    }

    /// The value of `key`, own writes included. The transaction will conflict with a concurrent
    /// one that writes it.
    pub fn get(&mut self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.check(key)?;
        if let Some(own) = self.record.writes.get(key) {
            return Ok(own.clone());
        }
        let value = self.snapshot()?.get(key)?;
        if !self.record.keys.contains(key) {
            self.record.keys.insert(key.to_vec());
        }
        Ok(value)
    }

    /// The value of `key` in the snapshot, own writes included, without the promise that it is
    /// still the same at commit: for hints.
    pub fn snapshot_get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        check_key(key)?;
        if let Some(own) = self.record.writes.get(key) {
            return Ok(own.clone());
        }
        self.snapshot()?.get(key)
    }

    /// Up to `limit` pairs from `from` (inclusive) to `to` (exclusive) in key order, own writes
    /// included. The transaction will conflict with a concurrent one that writes, adds or removes
    /// a key in the part that was looked at: all of the range, or up to the last pair returned
    /// when `limit` cut it short.
    pub fn range(&mut self, from: &[u8], to: &[u8], limit: usize) -> Result<Pairs, StoreError> {
        self.check_age()?;
        let (pairs, seen_to) = self.merge(from, to, limit)?;
        if from < seen_to.as_slice() {
            self.record.ranges.insert((from.to_vec(), seen_to));
        }
        Ok(pairs)
    }

    /// As [`Txn::range`], without recording: for listings that need not be serializable.
    pub fn snapshot_range(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Pairs, StoreError> {
        self.merge(from, to, limit).map(|(pairs, _)| pairs)
    }

    /// Writes `value` to `key`. A key or value beyond its limit fails the commit.
    pub fn put(&mut self, key: &[u8], value: &[u8]) {
        if value.len() > MAX_VALUE_BYTES {
            self.error.get_or_insert(StoreError::ValueTooLarge(value.len()));
        } else {
            self.write(key, Some(value.to_vec()));
        }
    }

    /// Removes `key`, present or not.
    pub fn delete(&mut self, key: &[u8]) {
        self.write(key, None);
    }

    /// Commits: resolves once the writes are durable and applied, with their version.
    /// [`StoreError::Conflict`] says that nothing was written and that the whole transaction may
    /// be run again. A transaction without writes always succeeds: it saw one consistent state.
    /// If the future is dropped, the transaction may still commit.
    pub async fn commit(self) -> Result<u64, StoreError> {
        let Self { snapshot, committer, record, error, .. } = self;
        snapshot.map(drop)?;
        if let Some(error) = error {
            return Err(error);
        }
        if record.writes.is_empty() {
            return Ok(record.read_version);
        }
        record.check_size()?;
        committer.commit(record).await
    }

    /// Whether an operation of this transaction has returned [`StoreError::Conflict`].
    pub(crate) fn is_conflicted(&self) -> bool {
        self.conflicted
    }

    fn write(&mut self, key: &[u8], value: Option<Vec<u8>>) {
        match check_key(key) {
            Ok(()) => drop(self.record.writes.insert(key.to_vec(), value)),
            Err(error) => drop(self.error.get_or_insert(error)),
        }
    }

    fn snapshot(&self) -> Result<&dyn Snapshot, StoreError> {
        self.snapshot.as_deref().map_err(Clone::clone)
    }

    /// Before a recorded read: misuse so far, and whether this snapshot can still win.
    fn check(&mut self, key: &[u8]) -> Result<(), StoreError> {
        check_key(key)?;
        self.check_age()
    }

    fn check_age(&mut self) -> Result<(), StoreError> {
        if let Some(error) = &self.error {
            return Err(error.clone());
        }
        if self.committer.is_too_old(self.record.read_version) {
            self.conflicted = true;
            return Err(StoreError::Conflict);
        }
        Ok(())
    }

    /// Pairs of snapshot and own writes, and the end of the part that was looked at.
    fn merge(&self, from: &[u8], to: &[u8], limit: usize) -> Result<(Pairs, Vec<u8>), StoreError> {
        for end in [from, to] {
            if end.len() > MAX_KEY_BYTES + 1 {
                return Err(StoreError::KeySize(end.len()));
            }
        }
        let mut pairs = Pairs::new();
        if from >= to || limit == 0 {
            return Ok((pairs, from.to_vec()));
        }
        let bounds = (Bound::Included(from), Bound::Excluded(to));
        let mut own = self.record.writes.range::<[u8], _>(bounds).peekable();
        let writes = &self.record.writes;
        self.snapshot()?.scan(from, to, &mut |key, value| {
            while let Some((k, v)) = own.next_if(|(k, _)| k.as_slice() < key) {
                if pairs.len() == limit {
                    return false;
                }
                pairs.extend(v.clone().map(|v| (k.clone(), v)));
            }
            if pairs.len() == limit {
                return false;
            }
            if !writes.contains_key(key) {
                pairs.push((key.to_vec(), value.to_vec()));
            }
            pairs.len() < limit
        })?;
        for (k, v) in own {
            if pairs.len() == limit {
                break;
            }
            pairs.extend(v.clone().map(|v| (k.clone(), v)));
        }
        let seen_to = match pairs.last() {
            Some((last, _)) if pairs.len() == limit => [last.as_slice(), &[0]].concat(),
            _ => to.to_vec(),
        };
        Ok((pairs, seen_to))
    }
}

fn check_key(key: &[u8]) -> Result<(), StoreError> {
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(StoreError::KeySize(key.len()));
    }
    Ok(())
}
