//! Start and stop of a storage node.

use crate::manager;
use crate::node::Node;
use crate::service::StorageService;
use firefly_net::{Identity, Server, ServerOptions, Traffic};
use firefly_types::{ErrorKind, NodeId};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// What a storage node must be told.
#[derive(Clone, Debug)]
pub struct StorageConfig {
    /// The node's id, as the manager's configuration lists it.
    pub node_id: NodeId,
    /// Address of the net service; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The manager, `http://ip:port` or `ip:port`.
    pub manager: String,
    /// Holds one folder per target, `t<ID>`. One disk per node: put several nodes on a machine
    /// with several disks.
    pub data_dir: PathBuf,
    /// Cluster, secret, and a name for logs.
    pub identity: Identity,
    /// Most bytes of blocks in each target. `u64::MAX`: what the disk takes.
    pub capacity_bytes: u64,
}

/// Why a storage node did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be bound.
    #[error("cannot listen on {addr}: {source}; is another server running there?")]
    Listen {
        /// Which address.
        addr: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The data folder cannot be used.
    #[error("cannot use the data folder {dir}: {source}")]
    DataDir {
        /// Which folder.
        dir: String,
        /// Why.
        source: std::io::Error,
    },
    /// The manager's address is not one.
    #[error("{0:?} is not the address of a manager: expected ip:port")]
    Manager(String),
}

impl ServeError {
    /// The small public kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Listen { .. } | Self::DataDir { .. } => ErrorKind::Unavailable,
            Self::Manager(_) => ErrorKind::InvalidArgument,
        }
    }
}

/// A node that serves.
pub struct Running {
    /// Where.
    pub addr: SocketAddr,
    node: Arc<Node>,
    tasks: Vec<JoinHandle<()>>,
}

impl Running {
    /// Waits for the end after the stop was asked for; then all files are closed.
    pub async fn stopped(self) {
        for task in self.tasks {
            let _ = task.await;
        }
    }

    /// Blocks that failed their checksum and were put right from another replica, since the start.
    pub fn repaired_blocks(&self) -> u64 {
        self.node.repaired()
    }
}

/// Starts a storage node; returns once it listens. It runs until `stop`.
///
/// # Errors
/// If the folder, the address or the manager's address cannot be used. A manager that is away is
/// no error: the node waits for it.
pub async fn serve(config: StorageConfig, stop: CancellationToken) -> Result<Running, ServeError> {
    let data_dir = |source| ServeError::DataDir { dir: config.data_dir.display().to_string(), source };
    let incarnation = next_incarnation(&config.data_dir).map_err(data_dir)?;
    let manager = manager::connect(&config).map_err(|_| ServeError::Manager(config.manager.clone()))?;
    let node = Node::new(config.clone(), incarnation);
    let service = Arc::new(StorageService { node: Arc::clone(&node) });
    let options =
        ServerOptions { pool: node.pool().clone(), traffic: Traffic::Storage, ..ServerOptions::default() };
    let server = Server::bind_with(config.listen, config.identity.clone(), service, options)
        .map_err(|source| ServeError::Listen { addr: config.listen, source })?;
    let addr = server.local_addr();
    tracing::info!(node = %config.node_id, %addr, incarnation, "storage node serves");
    let tick = {
        let (node, stop) = (Arc::clone(&node), stop.clone());
        async move {
            let mut clock = tokio::time::interval(Duration::from_millis(25));
            clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    () = stop.cancelled() => break,
                    _ = clock.tick() => node.tick(),
                }
            }
            // Joins threads and closes files.
            let _ = tokio::task::spawn_blocking(move || node.stop()).await;
        }
    };
    let tasks = vec![
        tokio::spawn(server.run(stop.clone())),
        tokio::spawn(tick),
        tokio::spawn(manager::heartbeats(
            Arc::clone(&node),
            config.node_id.0,
            addr,
            manager.clone(),
            stop.clone(),
        )),
        tokio::spawn(crate::scrub::run(Arc::clone(&node), stop.clone())),
        tokio::spawn(manager::routing(Arc::clone(&node), manager, stop)),
    ];
    Ok(Running { addr, node, tasks })
}

/// A number higher than at any earlier start: time, made to grow by the last one on file.
fn next_incarnation(data_dir: &Path) -> std::io::Result<u64> {
    std::fs::create_dir_all(data_dir)?;
    let path = data_dir.join("incarnation");
    let last = match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().unwrap_or(0),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => 0,
        Err(e) => return Err(e),
    };
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let next = time.max(last + 1);
    let temporary = data_dir.join("incarnation.new");
    let file = std::fs::File::create(&temporary)?;
    std::io::Write::write_all(&mut &file, next.to_string().as_bytes())?;
    file.sync_all()?;
    std::fs::rename(temporary, path)?;
    std::fs::File::open(data_dir)?.sync_all()?;
    Ok(next)
}
