//! The garbage worker: removes the chunks of data that nothing refers to.
//!
//! The queue lies in the store and grows in the transactions that drop the references, so what is
//! in it is exactly what may be removed, also after a crash. An entry leaves it only when every
//! chain has confirmed; removing twice is harmless.

use crate::error::MetaError;
use crate::meta::Meta;
use crate::op::PAGE;
use crate::schema::{FileLayout, GarbageRecord, keys};
use firefly_net::Identity;
use firefly_store::transact;
use firefly_types::{Backoff, ChainId, DataId, Generation};
use fs3_client::ChunkClient;
use fs3_core::layout::Layout;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

/// Files whose chunks are removed at one time: enough to hide round trips, few enough to leave the
/// disks to those who work.
const AT_ONCE: usize = 8;

/// Removes chunks.
pub trait ChunkRemover: Send + Sync + 'static {
    /// Removes all chunks of this generation of `data` on every chain of `layout`, and returns how
    /// many there were. Repeating it is harmless. The error is for people.
    fn remove<'a>(
        &'a self,
        data: DataId,
        generation: Generation,
        layout: &'a FileLayout,
    ) -> BoxFuture<'a, Result<u64, String>>;
}

/// Removes chunks as any other client would, through `fs3-client`.
pub struct ClusterChunks {
    manager: String,
    identity: Identity,
    client: OnceCell<ChunkClient>,
}

impl ClusterChunks {
    /// Connects to the cluster of `manager` when the first chunk is to be removed.
    pub fn new(manager: String, identity: Identity) -> Self {
        Self { manager, identity, client: OnceCell::new() }
    }
}

impl ChunkRemover for ClusterChunks {
    fn remove<'a>(
        &'a self,
        data: DataId,
        generation: Generation,
        layout: &'a FileLayout,
    ) -> BoxFuture<'a, Result<u64, String>> {
        Box::pin(async move {
            let connect = || ChunkClient::connect(&self.manager, self.identity.clone());
            let client = self.client.get_or_try_init(connect).await.map_err(|e| e.to_string())?;
            let chains = layout.chains.iter().copied().map(ChainId).collect();
            let layout = Layout::new(layout.chunk_bytes, chains).map_err(|e| e.to_string())?;
            client.remove_range(data, generation, &layout, 0).await.map_err(|e| e.to_string())
        })
    }
}

/// What one pass over the queue did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Entries whose chunks are gone.
    pub removed: u64,
    /// Chunks removed.
    pub chunks: u64,
    /// Entries that are too young to be removed.
    pub young: u64,
    /// Entries that could not be removed; they stay in the queue.
    pub failed: u64,
}

impl Meta {
    /// Goes once through the queue and removes what has lain in it for `min_age`: writers that had
    /// not heard of a truncate need that long to stop making chunks of the old generation.
    pub async fn collect_garbage(
        &self,
        chunks: &dyn ChunkRemover,
        min_age: Duration,
    ) -> Result<Pass, MetaError> {
        let mut pass = Pass::default();
        let now = i128::from(self.clock.tick());
        let (mut from, to) = keys::garbages();
        loop {
            let page = self.kv.begin().snapshot_range(&from, &to, PAGE)?;
            let Some((last, _)) = page.last() else { return Ok(pass) };
            from = keys::after(last);
            let mut due = Vec::with_capacity(page.len());
            for (key, value) in page {
                let record = GarbageRecord::decode(&value)?;
                let since = i128::from(record.since.seconds) * 1_000_000_000 + i128::from(record.since.nanos);
                if now - since < min_age.as_nanos() as i128 {
                    pass.young += 1;
                } else {
                    due.push((key, record.layout));
                }
            }
            for group in due.chunks(AT_ONCE) {
                let mut running: FuturesUnordered<_> =
                    group.iter().map(|(key, layout)| self.remove_one(chunks, key, layout)).collect();
                while let Some(result) = running.next().await {
                    match result? {
                        Some(removed) => {
                            pass.removed += 1;
                            pass.chunks += removed;
                        }
                        None => pass.failed += 1,
                    }
                }
            }
        }
    }

    async fn remove_one(
        &self,
        chunks: &dyn ChunkRemover,
        key: &[u8],
        layout: &FileLayout,
    ) -> Result<Option<u64>, MetaError> {
        let (data, generation) = keys::garbage_id(key)?;
        let removed = match chunks.remove(data, generation, layout).await {
            Ok(removed) => removed,
            Err(error) => {
                tracing::warn!(%data, %generation, error, "chunks without a file could not be removed yet");
                return Ok(None);
            }
        };
        // Read first, so that an entry which came back meanwhile (it cannot: numbers are never
        // reused) would be a conflict and not be lost.
        transact(self.kv.as_ref(), |tx| {
            if tx.get(key)?.is_some() {
                tx.delete(key);
            }
            Ok::<_, MetaError>(())
        })
        .await?;
        tracing::debug!(%data, %generation, removed, "removed the chunks of a file that is gone");
        Ok(Some(removed))
    }

    /// How many entries the queue has, up to `most`.
    pub fn garbage_length(&self, most: usize) -> Result<usize, MetaError> {
        let (from, to) = keys::garbages();
        Ok(self.kv.begin().snapshot_range(&from, &to, most)?.len())
    }
}

/// Goes through the queue whenever something is put into it, and now and then, until `stop`.
pub(crate) async fn run(
    meta: Arc<Meta>,
    chunks: Arc<dyn ChunkRemover>,
    min_age: Duration,
    interval: Duration,
    stop: CancellationToken,
) {
    let (mut failures, mut failing_since) = (0, Instant::now());
    loop {
        let pass = tokio::select! {
            pass = meta.collect_garbage(chunks.as_ref(), min_age) => pass,
            () = stop.cancelled() => return,
        };
        let failed = match pass {
            Ok(pass) => pass.failed > 0,
            Err(error) => {
                tracing::error!(%error, "the garbage worker cannot read its queue");
                true
            }
        };
        if failed {
            if failures == 0 {
                failing_since = Instant::now();
            }
            failures += 1;
            let policy =
                Backoff { first: Duration::from_millis(200), most: 4 * interval, total: Duration::MAX };
            let delay = policy.delay(failures, failing_since.elapsed(), 1.0).unwrap_or(4 * interval);
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = stop.cancelled() => return,
            }
            continue;
        }
        failures = 0;
        tokio::select! {
            () = meta.garbage.notified(), if min_age.is_zero() => {}
            () = tokio::time::sleep(interval) => {}
            () = stop.cancelled() => return,
        }
    }
}
