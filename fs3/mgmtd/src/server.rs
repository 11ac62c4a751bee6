//! The driver: gRPC in front, the store behind, one task that owns the state between them.
//!
//! One step at a time: decide, make durable, publish, answer. Nobody can therefore see a decision
//! that a restart would forget.

use crate::event::{Event, Reply};
use crate::state::ManagerState;
use crate::{MgmtdConfig, MgmtdError, bootstrap, persist, wire};
use firefly_proto::auth::CheckToken;
use firefly_proto::mgmtd as pb;
use firefly_proto::mgmtd::manager_server::{Manager, ManagerServer};
use firefly_proto::mgmtd::operator_server::{Operator, OperatorServer};
use firefly_proto::status::to_status;
use firefly_store::{Kv, Store, StoreOptions};
use firefly_types::{ErrorKind, Incarnation, Nanos, NodeId, RoutingVersion, WireError, lock};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

/// The longest that a poll is held. Clients ask for less; a proxy between may want less still.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// Events waiting for the state at most; more wait in their connections.
const QUEUE: usize = 1024;
/// Cluster format version: what all nodes may write and send.
const CLUSTER_FORMAT: u32 = 1;

/// A manager that runs.
pub struct Running {
    /// Where it answers.
    pub addr: SocketAddr,
    task: JoinHandle<Result<(), MgmtdError>>,
}

impl Running {
    /// Waits until it has stopped, after its token fired or because its state cannot be kept.
    pub async fn finished(self) -> Result<(), MgmtdError> {
        self.task.await.unwrap_or_else(|e| Err(MgmtdError::Serve(format!("its task ended: {e}"))))
    }
}

/// Starts a manager. Returns once it listens; it runs until `stop` fires.
pub async fn serve(config: MgmtdConfig, stop: CancellationToken) -> Result<Running, MgmtdError> {
    let MgmtdConfig { listen, data_dir, identity, settings } = config;
    settings.check()?;
    let opened = tokio::task::spawn_blocking(move || Store::open(&data_dir, StoreOptions::default())).await;
    let store = opened.map_err(|e| MgmtdError::Serve(format!("opening the store: {e}")))??;
    let tables =
        persist::load_or_create(&*store, identity.cluster, &settings, || bootstrap::first_tables(&settings))
            .await?;

    let listener = tokio::net::TcpListener::bind(listen)
        .await
        .map_err(|source| MgmtdError::Listen { addr: listen, source })?;
    let addr = listener.local_addr().map_err(|source| MgmtdError::Listen { addr: listen, source })?;

    let clock = Clock(Instant::now());
    let timing = settings.timing.clone();
    let state = ManagerState::new(settings, tables, clock.now());
    let (events, inbox) = mpsc::channel(QUEUE);
    let (versions, published) = watch::channel(state.routing_version());
    // Ends with either side: a manager whose state has failed must not go on answering.
    let stop = stop.child_token();
    let neighbours = Neighbours::default();
    let owner = Owner {
        state,
        store: store.clone(),
        clock,
        versions,
        tick: timing.tick(),
        neighbours: neighbours.clone(),
    };
    let owner = tokio::spawn(owner.run(inbox, stop.clone()));
    let service = Service {
        events,
        neighbours,
        published,
        stop: stop.clone(),
        cluster: identity.cluster.to_string(),
        interval_ms: timing.heartbeat_ms,
        session_ms: timing.session_ms,
    };
    let operator = OperatorServer::with_interceptor(service.clone(), CheckToken::new(&identity.secret));
    let service = ManagerServer::with_interceptor(service, CheckToken::new(&identity.secret));
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let task = tokio::spawn(async move {
        let server = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .add_service(service)
            .add_service(operator)
            .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        let served = server.await.map_err(|e| MgmtdError::Serve(e.to_string()));
        stop.cancel();
        let owned = owner.await.unwrap_or_else(|e| Err(MgmtdError::Serve(format!("the state's task: {e}"))));
        // Closing writes a checkpoint, which blocks.
        let closed = tokio::task::spawn_blocking(move || drop(store)).await;
        closed.map_err(|e| MgmtdError::Serve(format!("closing the store: {e}")))?;
        owned.and(served)
    });
    tracing::info!(%addr, "manager listens");
    Ok(Running { addr, task })
}

/// Monotonic, from the start of the process. It need not count suspend: on this side, a clock that
/// runs late only waits longer before it replaces a server.
#[derive(Clone, Copy)]
struct Clock(Instant);

impl Clock {
    fn now(self) -> Nanos {
        // Not from zero, so that "long ago" can be told from the start.
        Nanos(1).after(self.0.elapsed())
    }
}

enum Message {
    Event(Event, oneshot::Sender<Result<Reply, WireError>>),
    Table(oneshot::Sender<pb::RoutingTable>),
    Workers(oneshot::Sender<pb::ListWorkersReply>),
}

/// Processes that run on this machine and whose end can therefore be seen.
type Neighbours = Arc<Mutex<BTreeMap<(NodeId, Incarnation), pb::ProcessIdentity>>>;

struct Owner {
    state: ManagerState,
    store: Arc<Store>,
    clock: Clock,
    versions: watch::Sender<RoutingVersion>,
    tick: Duration,
    neighbours: Neighbours,
}

impl Owner {
    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Message>,
        stop: CancellationToken,
    ) -> Result<(), MgmtdError> {
        let mut ticks = tokio::time::interval(self.tick);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            // What has arrived goes before the passing of time: a heartbeat that waits in the queue
            // must not be overtaken by the verdict on its silence.
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                message = inbox.recv() => match message {
                    Some(Message::Event(event, answer)) => {
                        let reply = self.step(event).await.inspect_err(|error| {
                            tracing::error!(%error, "the manager stops: its decisions cannot be made durable");
                            stop.cancel();
                        })?;
                        // Whoever asked may have gone away.
                        let _ = answer.send(reply);
                    }
                    Some(Message::Table(answer)) => {
                        let _ = answer.send(wire::routing_table(&self.state, self.clock.now()));
                    }
                    Some(Message::Workers(answer)) => {
                        let _ = answer.send(wire::workers(self.state.workers()));
                    }
                    None => return Ok(()),
                },
                _ = ticks.tick() => {
                    for (node, incarnation) in self.ended_neighbours() {
                        let _ = self.step(Event::Ended { node, incarnation }).await.inspect_err(|error| {
                            tracing::error!(%error, "the manager stops: its decisions cannot be made durable");
                            stop.cancel();
                        })?;
                    }
                    let _ = self.step(Event::Tick).await.inspect_err(|error| {
                        tracing::error!(%error, "the manager stops: its decisions cannot be made durable");
                        stop.cancel();
                    })?;
                }
            }
        }
    }

    /// Those that still count as alive and whose processes have ended.
    fn ended_neighbours(&self) -> Vec<(NodeId, Incarnation)> {
        let mut neighbours = lock(&self.neighbours);
        // The newest start of each node is of interest, until it has been found to be over.
        let counts = |node: &NodeId, incarnation: &Incarnation| {
            self.state.nodes.get(node).is_none_or(|n| !n.retired.contains(incarnation))
        };
        neighbours.retain(|(node, incarnation), _| counts(node, incarnation));
        let ended = neighbours.iter().filter(|(_, process)| firefly_proto::process::is_gone(process));
        ended.map(|(key, _)| *key).collect()
    }

    async fn step(&mut self, event: Event) -> Result<Result<Reply, WireError>, MgmtdError> {
        let decisions = self.state.step(event, self.clock.now());
        if !decisions.writes.is_empty() {
            let mut txn = self.store.begin();
            // Only puts and deletes, by the only writer: nothing that could conflict.
            persist::write(&self.state, &decisions.writes, &mut txn);
            txn.commit().await?;
        }
        for note in &decisions.notes {
            tracing::info!("{note}");
        }
        if decisions.publishes {
            self.versions.send_replace(self.state.routing_version());
        }
        Ok(decisions.reply)
    }
}

#[derive(Clone)]
struct Service {
    events: mpsc::Sender<Message>,
    neighbours: Neighbours,
    published: watch::Receiver<RoutingVersion>,
    stop: CancellationToken,
    cluster: String,
    interval_ms: u32,
    session_ms: u32,
}

impl Service {
    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T, Status> {
        let (answer, answered) = oneshot::channel();
        let stopping =
            || to_status(&WireError::new(ErrorKind::Unavailable, "the manager is stopping; try again"));
        self.events.send(make(answer)).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())
    }

    async fn step(&self, event: Result<Event, WireError>) -> Result<Reply, Status> {
        let event = event.map_err(|e| to_status(&e))?;
        self.ask(|answer| Message::Event(event, answer)).await?.map_err(|e| to_status(&e))
    }
}

fn unexpected(reply: &Reply) -> Status {
    to_status(&WireError::new(
        ErrorKind::Internal,
        format!("the manager decided {reply:?} where that makes no sense"),
    ))
}

#[tonic::async_trait]
impl Manager for Service {
    async fn heartbeat(
        &self,
        request: Request<pb::HeartbeatRequest>,
    ) -> Result<Response<pb::HeartbeatReply>, Status> {
        let mut request = request.into_inner();
        let process = request.process.take();
        let key = (NodeId(request.node_id), Incarnation(request.incarnation));
        let reply = self.step(wire::heartbeat(request)).await?;
        if let Some(process) = process.filter(firefly_proto::process::is_here) {
            lock(&self.neighbours).entry(key).or_insert(process);
        }
        match reply {
            Reply::Lease { routing_version, lease } => Ok(Response::new(pb::HeartbeatReply {
                routing_version: routing_version.0,
                lease_ms: lease.as_millis() as u32,
                interval_ms: self.interval_ms,
                cluster_format_version: CLUSTER_FORMAT,
            })),
            other => Err(unexpected(&other)),
        }
    }

    async fn get_routing(
        &self,
        request: Request<pb::GetRoutingRequest>,
    ) -> Result<Response<pb::RoutingTable>, Status> {
        let request = request.into_inner();
        let known = RoutingVersion(request.known_version);
        let mut published = self.published.clone();
        let newest = *published.borrow();
        if known > newest {
            let message =
                format!("you know routing table {known}, this manager has {newest}: it has lost its state");
            return Err(to_status(&WireError::new(ErrorKind::Stale, message)));
        }
        let wait = Duration::from_millis(u64::from(request.wait_ms)).min(MAX_WAIT);
        tokio::select! {
            // All three mean the same: answer with what there is.
            _ = published.wait_for(|version| *version > known) => {}
            () = tokio::time::sleep(wait) => {}
            () = self.stop.cancelled() => {}
        }
        Ok(Response::new(self.ask(Message::Table).await?))
    }

    async fn open_session(
        &self,
        request: Request<pb::OpenSessionRequest>,
    ) -> Result<Response<pb::OpenSessionReply>, Status> {
        match self.step(wire::open_session(request.into_inner())).await? {
            Reply::Session { client, epoch } => Ok(Response::new(pb::OpenSessionReply {
                client_id: client.0,
                session_epoch: epoch.0,
                lease_ms: self.session_ms,
                cluster_id: self.cluster.clone(),
            })),
            other => Err(unexpected(&other)),
        }
    }

    async fn renew_session(
        &self,
        request: Request<pb::RenewSessionRequest>,
    ) -> Result<Response<pb::RenewSessionReply>, Status> {
        let request = request.into_inner();
        let event = wire::session(request.client_id, request.session_epoch);
        self.step(event.map(|(client, epoch)| Event::RenewSession { client, epoch })).await?;
        Ok(Response::new(pb::RenewSessionReply { lease_ms: self.session_ms }))
    }

    async fn close_session(
        &self,
        request: Request<pb::CloseSessionRequest>,
    ) -> Result<Response<pb::CloseSessionReply>, Status> {
        let request = request.into_inner();
        let event = wire::session(request.client_id, request.session_epoch);
        self.step(event.map(|(client, epoch)| Event::CloseSession { client, epoch })).await?;
        Ok(Response::new(pb::CloseSessionReply {}))
    }
}

#[tonic::async_trait]
impl Operator for Service {
    async fn administer(
        &self,
        request: Request<pb::AdministerRequest>,
    ) -> Result<Response<pb::AdministerReply>, Status> {
        match self.step(wire::order(request.into_inner())).await? {
            Reply::Accepted(message) => Ok(Response::new(pb::AdministerReply { message })),
            other => Err(unexpected(&other)),
        }
    }

    async fn list_workers(
        &self,
        _: Request<pb::ListWorkersRequest>,
    ) -> Result<Response<pb::ListWorkersReply>, Status> {
        Ok(Response::new(self.ask(Message::Workers).await?))
    }
}
