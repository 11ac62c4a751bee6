//! What ranks meet through before they are connected: a key-value store that all of them see.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Why a store did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The key did not appear in time.
    #[error("{key} was not published within {waited:?}")]
    Timeout {
        /// Which.
        key: String,
        /// How long.
        waited: Duration,
    },
    /// The store cannot be used.
    #[error("the bootstrap store failed: {0}")]
    Failed(String),
}

/// A key-value store for forming a group. Values are small (under 64 KiB) and written once.
pub trait Store {
    /// Publishes `value` under `key`.
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError>;
    /// Waits until `key` is published.
    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError>;
}

/// A store in memory: for ranks that are threads of one process, and behind the rendezvous.
#[derive(Default)]
pub struct MemoryStore {
    entries: Mutex<HashMap<String, Vec<u8>>>,
    published: Condvar,
}

/// All that a store in memory keeps; beyond, `set` is refused.
const MOST_ENTRIES: usize = 1 << 20;

impl Store for MemoryStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= MOST_ENTRIES && !entries.contains_key(key) {
            return Err(StoreError::Failed(format!("it is full ({MOST_ENTRIES} entries)")));
        }
        entries.insert(key.to_owned(), value.to_owned());
        self.published.notify_all();
        Ok(())
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        let until = Instant::now() + timeout;
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(value) = entries.get(key) {
                return Ok(value.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(StoreError::Timeout { key: key.to_owned(), waited: timeout });
            }
            entries = self.published.wait_timeout(entries, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
