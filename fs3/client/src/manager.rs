//! The manager's gRPC service, and our session with the cluster.

use crate::FsError;
use firefly_proto::dial::{self, Authenticated};
use firefly_proto::mgmtd::manager_client::ManagerClient;
use firefly_proto::mgmtd::{
    CloseSessionRequest, GetRoutingRequest, OpenSessionReply, OpenSessionRequest, RenewSessionRequest,
    RoutingTable,
};
use firefly_proto::status::from_status;
use firefly_types::{Backoff, ClusterSecret, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Longest wait for one of the manager's short answers.
const ANSWER: Duration = Duration::from_secs(3);

#[derive(Clone)]
pub(crate) struct Manager {
    client: ManagerClient<Authenticated>,
    address: String,
}

impl Manager {
    /// Connects lazily: a manager that starts later is found later.
    pub(crate) fn new(address: &str, secret: &ClusterSecret) -> Result<Self, FsError> {
        let endpoint = dial::endpoint(address).map_err(|error| {
            FsError::invalid(
                ErrorKind::InvalidArgument,
                format!("{address:?} is not a manager's address, expected ip:port: {error}"),
            )
        })?;
        let channel = endpoint
            .connect_timeout(Duration::from_secs(2))
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(3))
            .connect_lazy();
        Ok(Self { client: dial::manager(channel, secret), address: address.to_owned() })
    }

    fn failed(&self, wanted: &str, status: &tonic::Status) -> FsError {
        FsError::Remote {
            what: format!("{wanted} from manager {}", self.address),
            error: from_status(status),
        }
    }

    /// The table, at once if newer than `known`, else after at most `wait`.
    pub(crate) async fn routing(&self, known: u64, wait: Duration) -> Result<RoutingTable, FsError> {
        let mut request = tonic::Request::new(GetRoutingRequest {
            known_version: known,
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
        });
        request.set_timeout(wait + ANSWER);
        let limit = wait + ANSWER + ANSWER;
        match tokio::time::timeout(limit, self.client.clone().get_routing(request)).await {
            Ok(Ok(reply)) => Ok(reply.into_inner()),
            Ok(Err(status)) => Err(self.failed("routing table", &status)),
            Err(_) => Err(FsError::Call {
                what: format!("routing table from manager {}", self.address),
                kind: ErrorKind::Timeout,
                message: format!("no answer in {limit:?}"),
            }),
        }
    }

    /// The first table: retried under the cluster's policy, so that clients and servers may start
    /// in any order.
    pub(crate) async fn routing_patiently(&self) -> Result<RoutingTable, FsError> {
        retry(|| self.routing(0, Duration::ZERO)).await
    }

    pub(crate) async fn open_session(
        &self,
        client_id: u64,
        description: &str,
        (attempt_epoch, job_id): (u32, u64),
    ) -> Result<OpenSessionReply, FsError> {
        retry(|| async {
            let mut request = tonic::Request::new(OpenSessionRequest {
                client_id,
                description: description.to_owned(),
                attempt_epoch,
                job_id,
            });
            request.set_timeout(ANSWER);
            let reply = self.client.clone().open_session(request).await;
            Ok(reply.map_err(|status| self.failed("session", &status))?.into_inner())
        })
        .await
    }
}

async fn retry<T, F: Future<Output = Result<T, FsError>>>(
    mut attempt: impl FnMut() -> F,
) -> Result<T, FsError> {
    let start = Instant::now();
    let mut attempts = 0;
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) if !error.kind().is_retryable() => return Err(error),
            Err(error) => {
                attempts += 1;
                match Backoff::CLUSTER.delay(attempts, start.elapsed(), rand::random()) {
                    Some(delay) => tokio::time::sleep(delay).await,
                    None => return Err(error),
                }
            }
        }
    }
}

/// Our session: its id and its epoch, which every data request carries.
pub(crate) struct Session {
    manager: Manager,
    pub(crate) client_id: u64,
    epoch: AtomicU64,
    pub(crate) attempt: (u32, u64),
    pub(crate) cluster_id: String,
    description: String,
}

impl Session {
    pub(crate) async fn open(
        manager: Manager,
        description: &str,
        attempt: (u32, u64),
        stop: CancellationToken,
    ) -> Result<Arc<Self>, FsError> {
        let reply = manager.open_session(0, description, attempt).await?;
        let session = Arc::new(Self {
            manager,
            client_id: reply.client_id,
            epoch: AtomicU64::new(reply.session_epoch),
            attempt,
            cluster_id: reply.cluster_id,
            description: description.to_owned(),
        });
        let lease = Duration::from_millis(u64::from(reply.lease_ms).max(300));
        let renewed = session.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = renewed.keep(lease) => {}
            }
        });
        Ok(session)
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    async fn keep(&self, mut lease: Duration) {
        loop {
            tokio::time::sleep(lease / 3).await;
            let mut request = tonic::Request::new(RenewSessionRequest {
                client_id: self.client_id,
                session_epoch: self.epoch(),
            });
            request.set_timeout(ANSWER);
            match self.manager.client.clone().renew_session(request).await {
                Ok(reply) => {
                    lease = Duration::from_millis(u64::from(reply.into_inner().lease_ms).max(300));
                }
                Err(status) => {
                    let error = from_status(&status);
                    // A stale or unknown session is not coming back: open the next epoch of it.
                    // Any other failure is the manager's absence, which the lease outlasts.
                    if matches!(error.kind, ErrorKind::NotFound | ErrorKind::Stale) {
                        tracing::warn!(%error, "the cluster has given up our session; opening a new one");
                        let id = self.client_id;
                        match self.manager.open_session(id, &self.description, self.attempt).await {
                            Ok(reply) => self.epoch.store(reply.session_epoch, Ordering::Release),
                            Err(error) => tracing::warn!(%error, "no new session yet"),
                        }
                    } else {
                        tracing::debug!(%error, "session not renewed; trying again");
                    }
                }
            }
        }
    }

    pub(crate) async fn close(&self) {
        let mut request = tonic::Request::new(CloseSessionRequest {
            client_id: self.client_id,
            session_epoch: self.epoch(),
        });
        request.set_timeout(ANSWER);
        // Best effort: an unclosed session ends with its lease.
        if let Err(status) = self.manager.client.clone().close_session(request).await {
            tracing::debug!(%status, "session not closed");
        }
    }
}
