//! What all parts of one client share.

use crate::FsError;
use crate::budget::Budget;
use crate::chunkio::ChunkIo;
use crate::inode::OpenInode;
use crate::manager::Session;
use crate::metaio::MetaIo;
use crate::options::ClientOptions;
use crate::stats::Stats;
use firefly_proto::meta::Inode;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub(crate) struct Shared {
    pub(crate) options: ClientOptions,
    pub(crate) io: ChunkIo,
    pub(crate) meta: MetaIo,
    pub(crate) session: Arc<Session>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) budget: Budget,
    pub(crate) readahead: Arc<Semaphore>,
    pub(crate) runtime: tokio::runtime::Handle,
    pub(crate) stop: CancellationToken,
    open: Mutex<HashMap<u64, Weak<OpenInode>>>,
}

impl Shared {
    pub(crate) fn new(
        options: ClientOptions,
        io: ChunkIo,
        meta: MetaIo,
        session: Arc<Session>,
        stats: Arc<Stats>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            budget: Budget::new(options.dirty_bytes),
            readahead: Arc::new(Semaphore::new(options.readahead_bytes)),
            options,
            io,
            meta,
            session,
            stats,
            runtime: tokio::runtime::Handle::current(),
            stop,
            open: Mutex::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<u64, Weak<OpenInode>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file, if some handle of this client has it open.
    pub(crate) fn find(&self, id: u64) -> Option<Arc<OpenInode>> {
        self.table().get(&id)?.upgrade()
    }

    /// The file as open in this client; its attributes become `attr` unless they are older.
    pub(crate) fn opened(self: &Arc<Self>, attr: &Inode) -> Result<Arc<OpenInode>, FsError> {
        let mut table = self.table();
        if let Some(inode) = table.get(&attr.inode_id).and_then(Weak::upgrade) {
            drop(table);
            inode.state().apply(attr);
            return Ok(inode);
        }
        let inode = Arc::new(OpenInode::new(self.clone(), attr)?);
        table.insert(attr.inode_id, Arc::downgrade(&inode));
        Ok(inode)
    }

    /// The last user of the file is gone.
    pub(crate) fn forget(&self, id: u64) {
        let mut table = self.table();
        // Another thread may have opened it anew since.
        if table.get(&id).is_some_and(|inode| inode.strong_count() == 0) {
            table.remove(&id);
        }
    }

    pub(crate) fn all_open(&self) -> Vec<Arc<OpenInode>> {
        self.table().values().filter_map(Weak::upgrade).collect()
    }

    /// Starts sending everything that waits, to make room for a writer.
    pub(crate) fn flush_in_background(&self) {
        for inode in self.all_open() {
            if inode.has_dirty() {
                self.runtime.spawn(async move { inode.flush_data().await });
            }
        }
    }

    /// Sends and publishes everything that waits; failures are in each file's record.
    pub(crate) async fn flush_everything(&self) -> Result<(), FsError> {
        let mut result = Ok(());
        for inode in self.all_open() {
            if inode.has_dirty()
                && let Err(error) = inode.flush().await
            {
                result = Err(error);
            }
        }
        result
    }

    /// The periodic publisher: bounds what a crash of this client loses, and what others miss.
    pub(crate) async fn publish_periodically(shared: Weak<Self>, every: Duration, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(every) => {}
            }
            let Some(shared) = shared.upgrade() else { return };
            for inode in shared.all_open() {
                inode.state().blocks.expire();
                if inode.has_dirty() {
                    shared.runtime.spawn(async move {
                        if let Err(error) = inode.flush().await {
                            tracing::warn!(inode = inode.id, %error, "length not published; trying again");
                        }
                    });
                }
            }
        }
    }
}
