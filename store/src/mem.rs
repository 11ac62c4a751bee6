//! The same transactions on a map in memory: for tests of the rooms above, which want the
//! semantics without files and threads.

use crate::record::TxnRecord;
use crate::txn::{BoxFuture, Committer, Snapshot};
use crate::window::{WINDOW_INDICES, Window};
use crate::{Kv, StoreError, Txn};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

/// A volatile [`Kv`] with the conflict rules and limits of [`crate::Store`].
#[derive(Clone, Default)]
pub struct MemKv(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Copied on write while snapshots of it are alive.
    data: Arc<Map>,
    version: u64,
    window: Window,
}

impl MemKv {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kv for MemKv {
    fn begin(&self) -> Txn {
        let state = self.state();
        let snapshot: Box<dyn Snapshot> = Box::new(state.data.clone());
        Txn::new(Ok((snapshot, state.version)), Arc::new(self.clone()))
    }
}

impl Committer for MemKv {
    fn commit(&self, record: TxnRecord) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(async move {
            let mut state = self.state();
            state.version += 1;
            if !state.window.admits(&record) {
                return Err(StoreError::Conflict);
            }
            let version = state.version;
            state.window.record(version, record.writes.keys().map(Vec::as_slice));
            let data = Arc::make_mut(&mut state.data);
            for (key, value) in record.writes {
                match value {
                    Some(value) => drop(data.insert(key, value)),
                    None => drop(data.remove(&key)),
                }
            }
            Ok(version)
        })
    }

    fn is_too_old(&self, version: u64) -> bool {
        version + WINDOW_INDICES < self.state().version
    }
}

impl Snapshot for Arc<Map> {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.as_ref().get(key).cloned())
    }

    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        take: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        for (key, value) in self.range::<[u8], _>((Bound::Included(from), Bound::Excluded(to))) {
            if !take(key, value) {
                break;
            }
        }
        Ok(())
    }
}
