//! The daemon's life.

use crate::actor;
use crate::config::SchedulerConfig;
use crate::error::SchedulerError;
use crate::gateway::{Gateway, Newest};
use crate::journal::Journal;
use crate::logs::JobLogs;
use crate::service::Service;
use firefly_proto::auth::CheckToken;
use firefly_proto::scheduler::agent_gateway_server::AgentGatewayServer;
use firefly_proto::scheduler::scheduler_server::SchedulerServer;
use firefly_store::{Store, StoreOptions};
use scheduler_core::Core;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;

/// A scheduler that serves.
#[derive(Debug)]
pub struct Running {
    /// Where.
    pub addr: SocketAddr,
    task: JoinHandle<()>,
}

impl Running {
    /// Returns when the daemon has ended and its folder is free for the next one.
    pub async fn wait(self) {
        // The task ends by its token; a panic in it has been reported by the runtime.
        let _ = self.task.await;
    }
}

/// Starts a scheduler and returns once it listens. It runs until `stop` fires, and fires `stop`
/// itself if its state can no longer be written.
pub async fn serve(config: SchedulerConfig, stop: CancellationToken) -> Result<Running, SchedulerError> {
    let folder = |source| SchedulerError::Folder { path: config.data_dir.display().to_string(), source };
    std::fs::create_dir_all(&config.data_dir).map_err(folder)?;
    let logs =
        Arc::new(JobLogs::open(config.data_dir.join("logs"), config.log_bytes_per_job).map_err(folder)?);
    let dir = config.data_dir.join("store");
    let opened = tokio::task::spawn_blocking(move || {
        let store = Store::open(&dir, StoreOptions::default())?;
        Journal::load(store)
    });
    let (journal, records) = opened.await.map_err(|e| SchedulerError::Damaged(e.to_string()))??;
    let core = Core::restore(config.policy.clone(), records, actor::now());
    let listen = |source| SchedulerError::Listen { address: config.listen, source };
    let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
    let addr = listener.local_addr().map_err(listen)?;

    let (handle, actor) = actor::spawn(core, journal, logs.clone(), config.secret.clone(), stop.clone());
    let check = CheckToken::new(&config.secret);
    let service = Service { actor: handle.clone(), logs: logs.clone(), stop: stop.clone() };
    let gateway =
        Gateway { actor: handle, logs, stop: stop.clone(), sessions: 1.into(), newest: Newest::default() };
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = tonic::transport::Server::builder()
        // A node or a person whose machine vanished is noticed, however quiet the stream.
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(SchedulerServer::with_interceptor(service, check.clone()))
        .add_service(AgentGatewayServer::with_interceptor(gateway, check));
    let task = tokio::spawn(async move {
        if let Err(error) = server.serve_with_incoming_shutdown(incoming, stop.cancelled()).await {
            tracing::error!(%error, "the scheduler's server ends");
        }
        stop.cancel();
        // The store's folder is free once the actor has let go of it.
        let _ = actor.await;
    });
    tracing::info!(%addr, "the scheduler serves");
    Ok(Running { addr, task })
}
