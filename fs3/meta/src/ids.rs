//! Numbers for new inodes, data and sessions. Taken from the store in batches, so that making a
//! file does not contend for a counter; a restart loses the rest of a batch, and a number is
//! never given twice.

use crate::error::MetaError;
use crate::op::Fresh;
use crate::schema::keys;
use firefly_store::{Kv, transact};
use firefly_types::{DataId, InodeId};
use std::ops::Range;
use tokio::sync::Mutex;

/// Numbers in a batch: one more commit in a thousand operations.
const BATCH: u64 = 1024;

/// One sort of number.
struct Pool {
    name: &'static str,
    first: u64,
    left: Mutex<Range<u64>>,
}

impl Pool {
    fn new(name: &'static str, first: u64) -> Self {
        Self { name, first, left: Mutex::new(0..0) }
    }

    async fn take(&self, kv: &dyn Kv) -> Result<u64, MetaError> {
        let mut left = self.left.lock().await;
        if let Some(id) = left.next() {
            return Ok(id);
        }
        let (key, first) = (keys::counter(self.name), self.first);
        let start = transact(kv, |tx| {
            let start = match tx.get(&key)? {
                Some(bytes) => bytes.as_slice().try_into().map(u64::from_be_bytes).map_err(|_| {
                    MetaError::Corrupt { what: "counter", why: format!("{} bytes", bytes.len()) }
                })?,
                None => first,
            };
            let next = start
                .checked_add(BATCH)
                .ok_or_else(|| MetaError::Unavailable("all numbers are used up".into()))?;
            tx.put(&key, &next.to_be_bytes());
            Ok::<_, MetaError>(start)
        })
        .await?;
        *left = start + 1..start + BATCH;
        Ok(start)
    }
}

/// All sorts.
pub(crate) struct Ids {
    inodes: Pool,
    data: Pool,
    sessions: Pool,
}

impl Ids {
    pub(crate) fn new() -> Self {
        // Inode 1 is the root; data and session 0 mean "none" on the wire.
        Self { inodes: Pool::new("inode", 2), data: Pool::new("data", 1), sessions: Pool::new("session", 1) }
    }

    /// What making a file needs.
    pub(crate) async fn for_file(&self, kv: &dyn Kv) -> Result<Fresh, MetaError> {
        Ok(Fresh {
            inode: InodeId(self.inodes.take(kv).await?),
            data: DataId(self.data.take(kv).await?),
            session: self.sessions.take(kv).await?,
        })
    }

    /// What making anything else needs.
    pub(crate) async fn for_inode(&self, kv: &dyn Kv) -> Result<Fresh, MetaError> {
        Ok(Fresh { inode: InodeId(self.inodes.take(kv).await?), data: DataId(0), session: 0 })
    }

    /// What opening needs.
    pub(crate) async fn for_session(&self, kv: &dyn Kv) -> Result<u64, MetaError> {
        self.sessions.take(kv).await
    }
}
