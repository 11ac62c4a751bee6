//! Open files and directories by the number that the kernel repeats.

use fs3_client::{Entry, File};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

pub(crate) struct Handles<T> {
    next: AtomicU64,
    held: RwLock<HashMap<u64, Arc<T>>>,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self { next: AtomicU64::new(1), held: RwLock::default() }
    }
}

impl<T> Handles<T> {
    pub(crate) fn add(&self, value: T) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.held.write().unwrap_or_else(PoisonError::into_inner).insert(number, Arc::new(value));
        number
    }

    pub(crate) fn get(&self, number: u64) -> Option<Arc<T>> {
        self.held.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }

    pub(crate) fn remove(&self, number: u64) -> Option<Arc<T>> {
        self.held.write().unwrap_or_else(PoisonError::into_inner).remove(&number)
    }
}

pub(crate) type Files = Handles<File>;

/// An open directory: what was listed so far, so that an offset is an index.
pub(crate) struct Dir {
    pub(crate) id: u64,
    pub(crate) listed: tokio::sync::Mutex<Listed>,
}

#[derive(Default)]
pub(crate) struct Listed {
    pub(crate) entries: Vec<Entry>,
    pub(crate) end: bool,
    pub(crate) parent: u64,
    /// The last page: from which entry on, and when it was fetched.
    pub(crate) page_from: usize,
    pub(crate) fetched: Option<Fetched>,
}

/// When a page was fetched, in time and in changes made through this mount.
#[derive(Clone, Copy)]
pub(crate) struct Fetched {
    pub(crate) at: std::time::Instant,
    pub(crate) changes: u64,
}
