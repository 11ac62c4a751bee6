//! The interface that the rooms above see.

use crate::{StoreError, Txn};
use firefly_types::Backoff;
use std::time::{Duration, Instant};

/// A transactional, serializable key-value store.
pub trait Kv: Send + Sync + 'static {
    /// Starts a transaction on a snapshot that holds every commit acknowledged so far. An error
    /// in taking the snapshot is reported by the transaction's first read or its commit.
    fn begin(&self) -> Txn;
}

/// Conflicts resolve in the time of a few commits, so waits are short; under constant contention
/// somebody always wins, so a long total is progress of others, not a hang.
const CONFLICT_BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(1),
    most: Duration::from_millis(100),
    total: Duration::from_secs(10),
};

/// Runs `f` in a transaction and commits it, again from the start whenever it loses against a
/// concurrent one (for at most 10 s). `f` may run several times: it must have no effects but on
/// the transaction and its result. An error of `f` drops the transaction.
pub async fn transact<T, E, F>(kv: &dyn Kv, mut f: F) -> Result<T, E>
where
    F: FnMut(&mut Txn) -> Result<T, E>,
    E: From<StoreError>,
{
    let started = Instant::now();
    let mut attempt = 0;
    loop {
        let mut txn = kv.begin();
        let lost = match f(&mut txn) {
            Ok(value) => match txn.commit().await {
                Ok(_) => return Ok(value),
                Err(StoreError::Conflict) => E::from(StoreError::Conflict),
                Err(error) => return Err(error.into()),
            },
            // A read of a snapshot that is too old fails inside `f`, in whatever form `f` gave it.
            Err(error) if txn.is_conflicted() => error,
            Err(error) => return Err(error),
        };
        attempt += 1;
        match CONFLICT_BACKOFF.delay(attempt, started.elapsed(), rand::random::<f64>()) {
            Some(delay) => tokio::time::sleep(delay).await,
            None => return Err(lost),
        }
    }
}
