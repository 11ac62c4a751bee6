//! The meta server: the namespace on its store, its place in the cluster, its workers.

use crate::clock::WallClock;
use crate::error::MetaError;
use crate::garbage::{self, ChunkRemover, ClusterChunks};
use crate::manager::{Manager, Myself};
use crate::meta::{Meta, RootOwner};
use crate::service::MetaService;
use firefly_net::{Identity, Server};
use firefly_store::{Store, StoreError, StoreOptions};
use firefly_types::{ErrorKind, NodeId};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Everything that [`serve`] needs.
#[derive(Clone, Debug)]
pub struct MetaConfig {
    /// The node's number, unique in the cluster.
    pub node_id: NodeId,
    /// Where calls are answered. Port 0 lets the system choose; `ff up` binds loopback only.
    pub listen: SocketAddr,
    /// The manager, `http://ip:port` or `ip:port`.
    pub manager: String,
    /// Folder of the namespace's store.
    pub data_dir: PathBuf,
    /// The cluster and its secret.
    pub identity: Identity,
    /// What may be tuned.
    pub settings: MetaSettings,
}

/// The part of the configuration that stands in a file. Every field has a default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetaSettings {
    /// Address that clients dial, `ip:port`, where it is not `listen` (a server that listens on
    /// every interface). Default: `listen` with the port it got.
    pub advertise: Option<String>,
    /// Owner of the root directory of a new file system. Default: the user of this process, who
    /// can then begin to use it without being root.
    pub root_uid: Option<u32>,
    /// Its group. Default: the group of this process.
    pub root_gid: Option<u32>,
    /// Its permission bits. Default 0755.
    pub root_mode: u32,
    /// Seconds for which chunks without a file stay. Default 10: longer than a writer needs to
    /// hear of another's truncate.
    pub garbage_delay_s: u64,
    /// Seconds between two looks at the garbage queue. Default 2.
    pub garbage_interval_s: u64,
    /// Seconds of silence after which a client's sessions are closed. Default 3600: a mount that
    /// only reads may have no reason to ask the meta server for long, and giving it up takes away
    /// the unlinked files that it has open.
    pub client_timeout_s: u64,
    /// Bytes of page cache for the store, in MiB. Default 64.
    pub cache_mib: usize,
}

impl Default for MetaSettings {
    fn default() -> Self {
        Self {
            advertise: None,
            root_uid: None,
            root_gid: None,
            root_mode: 0o755,
            garbage_delay_s: 10,
            garbage_interval_s: 2,
            client_timeout_s: 3600,
            cache_mib: 64,
        }
    }
}

/// Why a meta server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The store cannot be opened.
    #[error("cannot open the namespace's store {dir}: {source}")]
    Store {
        /// Its folder.
        dir: String,
        /// Why.
        source: StoreError,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: {source}; is another server running there?")]
    Listen {
        /// Which address.
        addr: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The manager's address is none.
    #[error("{address:?} is not the address of a manager, expected ip:port: {source}")]
    Manager {
        /// What was given.
        address: String,
        /// Why.
        source: tonic::transport::Error,
    },
    /// The namespace cannot be opened.
    #[error("cannot open the namespace: {0}")]
    Namespace(#[from] MetaError),
}

impl ServeError {
    /// The small public kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Store { source, .. } => source.kind(),
            Self::Listen { .. } => ErrorKind::Unavailable,
            Self::Manager { .. } => ErrorKind::InvalidArgument,
            Self::Namespace(error) => error.kind(),
        }
    }
}

/// A running meta server. Dropping this does not stop it; its token does.
pub struct Running {
    /// Where it listens.
    pub addr: SocketAddr,
    /// The namespace, for tests and tools in the same process.
    pub meta: Arc<Meta>,
    tasks: JoinSet<()>,
}

impl Running {
    /// Waits until everything has ended after the token fired.
    pub async fn stopped(mut self) {
        while let Some(ended) = self.tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a part of the meta server ended badly");
            }
        }
    }
}

/// Starts a meta server; returns once it listens. It runs until `stop` fires.
pub async fn serve(config: MetaConfig, stop: CancellationToken) -> Result<Running, ServeError> {
    let chunks = Arc::new(ClusterChunks::new(config.manager.clone(), config.identity.clone()));
    serve_with(config, chunks, stop).await
}

/// As [`serve`], with another remover of chunks.
pub async fn serve_with(
    config: MetaConfig,
    chunks: Arc<dyn ChunkRemover>,
    stop: CancellationToken,
) -> Result<Running, ServeError> {
    let settings = config.settings;
    let manager = Manager::new(&config.manager, &config.identity.secret)
        .map_err(|source| ServeError::Manager { address: config.manager.clone(), source })?;
    let dir = config.data_dir.clone();
    let options = StoreOptions { cache_bytes: settings.cache_mib << 20, ..StoreOptions::default() };
    let opened = tokio::task::spawn_blocking(move || Store::open(&dir, options)).await;
    let store = opened
        .unwrap_or_else(|error| Err(StoreError::Failed(error.to_string())))
        .map_err(|source| ServeError::Store { dir: config.data_dir.display().to_string(), source })?;
    let root = RootOwner {
        uid: settings.root_uid.unwrap_or_else(|| rustix::process::geteuid().as_raw()),
        gid: settings.root_gid.unwrap_or_else(|| rustix::process::getegid().as_raw()),
        mode: settings.root_mode & 0o7777,
    };
    let meta = Meta::open(store, Arc::new(WallClock::default()), root).await?;

    let service = Arc::new(MetaService::new(meta.clone()));
    let server = Server::bind(config.listen, config.identity, service)
        .map_err(|source| ServeError::Listen { addr: config.listen, source })?;
    let addr = server.local_addr();
    let myself = Myself {
        node: config.node_id,
        // Two starts of one server are never within the same nanosecond.
        incarnation: SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64),
        address: settings.advertise.unwrap_or_else(|| addr.to_string()),
    };
    tracing::info!(node = %myself.node, address = myself.address, "the meta server listens");

    let mut tasks = JoinSet::new();
    let routing = Arc::new(AtomicU64::new(0));
    tasks.spawn(manager.clone().heartbeat(myself, routing.clone(), stop.clone()));
    tasks.spawn(manager.follow_routing(meta.clone(), routing, stop.clone()));
    let seconds = Duration::from_secs;
    tasks.spawn(garbage::run(
        meta.clone(),
        chunks,
        seconds(settings.garbage_delay_s),
        seconds(settings.garbage_interval_s.max(1)),
        stop.clone(),
    ));
    tasks.spawn(expire_clients(meta.clone(), seconds(settings.client_timeout_s.max(1)), stop.clone()));
    tasks.spawn(async move { server.run(stop).await });
    Ok(Running { addr, meta, tasks })
}

/// Gives up silent clients, looking a few times per timeout.
async fn expire_clients(meta: Arc<Meta>, timeout: Duration, stop: CancellationToken) {
    let interval = (timeout / 8).clamp(Duration::from_secs(1), Duration::from_secs(60));
    loop {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = meta.expire_clients(timeout).await {
            tracing::error!(%error, "silent clients cannot be given up");
        }
    }
}
