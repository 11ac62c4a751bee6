//! Chunks without a namespace: for the meta server's garbage worker.

use crate::FsError;
use crate::chunkio::ChunkIo;
use crate::manager::{Manager, Session};
use crate::options::ClientOptions;
use crate::parallel::all;
use crate::routing::RoutingCache;
use crate::stats::{ClientStats, Stats};
use firefly_net::Identity;
use firefly_types::{ChainId, DataId, Generation};
use fs3_core::layout::Layout;
use futures::future::BoxFuture;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// A client of the storage servers only.
pub struct ChunkClient {
    io: ChunkIo,
    session: Arc<Session>,
    stats: Arc<Stats>,
    _stop: DropGuard,
}

impl ChunkClient {
    /// Connects to the cluster whose manager is at `manager` ("http://ip:port" or "ip:port").
    pub async fn connect(manager: &str, identity: Identity) -> Result<Self, FsError> {
        let options = ClientOptions::new(manager, identity);
        let stop = CancellationToken::new();
        let guard = stop.clone().drop_guard();
        let stats = Arc::new(Stats::default());
        let manager = Manager::new(&options.manager, &options.identity.secret)?;
        let routing = RoutingCache::start(manager.clone(), stats.clone(), stop.clone()).await?;
        let session = Session::open(manager, &options.description, options.attempt, stop).await?;
        let net = firefly_net::Client::of(options.identity.clone(), firefly_net::Traffic::Storage);
        let io = ChunkIo::new(&options, net, routing, session.clone(), stats.clone());
        Ok(Self { io, session, stats, _stop: guard })
    }

    /// Removes every chunk of `data_id`'s `generation` with index >= `from_index`, on every chain
    /// of its layout. Safe to repeat. Returns how many chunks it removed.
    pub async fn remove_range(
        &self,
        data_id: DataId,
        generation: Generation,
        layout: &Layout,
        from_index: u32,
    ) -> Result<u64, FsError> {
        let chains: BTreeSet<ChainId> = layout.chains().iter().copied().collect();
        let data = (data_id.get(), generation.get());
        let mut removals: Vec<BoxFuture<'_, _>> = Vec::with_capacity(chains.len());
        for chain in chains {
            removals.push(Box::pin(self.io.remove_range(data, chain, from_index)));
        }
        let mut removed = 0;
        for result in all(removals).await {
            removed += result?;
        }
        Ok(removed)
    }

    /// Counters since the connection.
    pub fn stats(&self) -> ClientStats {
        self.stats.snapshot(0)
    }

    /// Ends the session.
    pub async fn close(self) {
        self.session.close().await;
    }
}
