//! The people's door.

use crate::actor::Handle;
use crate::convert::{self, job_to, nodes_to};
use crate::logs::{Cursor, JobLog, JobLogs};
use firefly_proto::scheduler as wire;
use firefly_proto::scheduler::scheduler_server::Scheduler;
use firefly_types::{ErrorKind, JobId, NodeId};
use scheduler_core::{Answer, Core, Event, Job, RankState};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

/// A listing without `all` shows what has not ended, or ended less than an hour ago.
const RECENT_MS: u64 = 3_600_000;
/// Bytes of log read at a time.
const LOG_BYTES: u64 = 256 << 10;
/// How long the end of a log is awaited after its job has ended: the last lines may still be on
/// their way, or their node may be gone for good.
const LAST_LINES: Duration = Duration::from_secs(3);
/// Most lines of `tail`: they are held in memory.
const MOST_TAIL: usize = 100_000;

pub(crate) struct Service {
    pub(crate) actor: Handle,
    pub(crate) logs: Arc<JobLogs>,
    pub(crate) stop: CancellationToken,
}

type Flow<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A job by id (`j3` or `3`), or the newest of that name.
fn find<'a>(core: &'a Core, wanted: &str) -> Result<&'a Job, Status> {
    let found = match wanted.parse::<JobId>() {
        Ok(id) => core.job(id),
        Err(_) => core.job_named(wanted),
    };
    found.filter(|_| !wanted.is_empty()).ok_or_else(|| {
        convert::status(ErrorKind::NotFound, format!("no job {wanted:?}: `ff job ls --all` lists them"))
    })
}

impl Service {
    async fn job<T: Send + 'static>(
        &self,
        wanted: String,
        look: impl FnOnce(&Job) -> T + Send + 'static,
    ) -> Result<T, Status> {
        self.actor.query(move |core, _| find(core, &wanted).map(look)).await?
    }

    async fn answered(&self, event: Event) -> Result<Answer, Status> {
        match self.actor.event(event).await? {
            Answer::Refused(refusal) => Err(convert::status(refusal.kind(), refusal.to_string())),
            answer => Ok(answer),
        }
    }
}

#[tonic::async_trait]
impl Scheduler for Service {
    async fn submit(
        &self,
        request: Request<wire::SubmitRequest>,
    ) -> Result<Response<wire::SubmitReply>, Status> {
        let wire::SubmitRequest { spec, idempotency_key } = request.into_inner();
        let spec =
            spec.ok_or_else(|| convert::status(ErrorKind::InvalidArgument, "the job has no description"))?;
        let event = Event::Submit { spec: convert::spec_from(spec), key: idempotency_key };
        match self.answered(event).await? {
            Answer::Job(id) => Ok(Response::new(wire::SubmitReply { job_id: id.0 })),
            _ => Err(convert::status(ErrorKind::Internal, "the submit got no job")),
        }
    }

    async fn list_jobs(
        &self,
        request: Request<wire::ListJobsRequest>,
    ) -> Result<Response<wire::ListJobsReply>, Status> {
        let wire::ListJobsRequest { all, user } = request.into_inner();
        let jobs = self
            .actor
            .query(move |core, now| {
                core.jobs()
                    .filter(|j| all || j.ended_unix_ms == 0 || j.ended_unix_ms + RECENT_MS > now.unix_ms)
                    .filter(|j| user.is_empty() || j.spec.user == user)
                    .map(|j| job_to(j, false))
                    .collect()
            })
            .await?;
        Ok(Response::new(wire::ListJobsReply { jobs }))
    }

    async fn get_job(&self, request: Request<wire::GetJobRequest>) -> Result<Response<wire::Job>, Status> {
        self.job(request.into_inner().job, |j| job_to(j, true)).await.map(Response::new)
    }

    type WatchJobStream = Flow<wire::Job>;

    async fn watch_job(
        &self,
        request: Request<wire::WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let wire::WatchJobRequest { job, known_version } = request.into_inner();
        // By id from here on: a newer job of the name must not take its place.
        let id = self.job(job, |j| j.id).await?;
        let (flow, stream) = mpsc::channel(4);
        let (actor, stop) = (self.actor.clone(), self.stop.clone());
        tokio::spawn(async move {
            let mut changed = actor.changed.clone();
            let mut known = known_version;
            let watch = async {
                loop {
                    changed.mark_unchanged();
                    let look = move |core: &Core, _| {
                        find(core, &id.to_string())
                            .map(|j| (j.state.is_final(), (j.version != known).then(|| job_to(j, true))))
                    };
                    match actor.query(look).await.and_then(|r| r) {
                        Ok((over, job)) => {
                            if let Some(job) = job {
                                known = job.version;
                                if flow.send(Ok(job)).await.is_err() {
                                    return;
                                }
                            }
                            if over {
                                return;
                            }
                        }
                        Err(status) => {
                            let _ = flow.send(Err(status)).await;
                            return;
                        }
                    }
                    if changed.changed().await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = stop.cancelled() => {}
                () = flow.closed() => {}
                () = watch => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn stop_job(&self, request: Request<wire::StopJobRequest>) -> Result<Response<wire::Job>, Status> {
        let wire::StopJobRequest { job, reason } = request.into_inner();
        let id = self.job(job, |j| j.id).await?;
        self.answered(Event::Stop { job: id, reason }).await?;
        self.job(id.to_string(), |j| job_to(j, true)).await.map(Response::new)
    }

    async fn why_job(
        &self,
        request: Request<wire::GetJobRequest>,
    ) -> Result<Response<wire::WhyReply>, Status> {
        let wanted = request.into_inner().job;
        let lines =
            self.actor.query(move |core, now| find(core, &wanted).map(|job| core.why(job.id, now))).await??;
        Ok(Response::new(wire::WhyReply { lines }))
    }

    type LogsStream = Flow<wire::LogChunk>;

    async fn logs(&self, request: Request<wire::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let request = request.into_inner();
        let id = self.job(request.job.clone(), |j| j.id).await?;
        let log = self.logs.job(id).map_err(|e| disk(&e))?;
        let (flow, stream) = mpsc::channel(256);
        let follow = Follow { actor: self.actor.clone(), log, id, request, flow };
        let stop = self.stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = follow.flow.closed() => {}
                result = follow.run() => {
                    if let Err(status) = result {
                        // Nobody listens any more if this fails.
                        let _ = follow.flow.send(Err(status)).await;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn list_nodes(
        &self,
        _: Request<wire::ListNodesRequest>,
    ) -> Result<Response<wire::ListNodesReply>, Status> {
        let nodes = self.actor.query(nodes_to).await?;
        Ok(Response::new(wire::ListNodesReply { nodes }))
    }

    async fn cordon_node(
        &self,
        request: Request<wire::CordonNodeRequest>,
    ) -> Result<Response<wire::Node>, Status> {
        let wire::CordonNodeRequest { node_id, cordon, reason } = request.into_inner();
        let reason: String = reason.chars().take(200).collect();
        self.answered(Event::Cordon { node: NodeId(node_id), cordon, reason }).await?;
        let nodes = self.actor.query(nodes_to).await?;
        let node = nodes.into_iter().find(|n| n.node_id == node_id);
        node.map(Response::new)
            .ok_or_else(|| convert::status(ErrorKind::NotFound, format!("no node n{node_id}")))
    }
}

fn disk(error: &std::io::Error) -> Status {
    convert::status(ErrorKind::Unavailable, format!("the log cannot be read: {error}"))
}

/// One reader of one log.
struct Follow {
    actor: Handle,
    log: Arc<JobLog>,
    id: JobId,
    request: wire::LogsRequest,
    flow: mpsc::Sender<Result<wire::LogChunk, Status>>,
}

impl Follow {
    async fn run(&self) -> Result<(), Status> {
        let mut changed = self.log.subscribe();
        let mut cursor = Cursor::default();
        if self.request.tail > 0 {
            cursor = self.tail(cursor).await?;
        }
        let mut ended = None;
        loop {
            changed.mark_unchanged();
            // The state first: lines that come after it are read in the next round.
            let done = self.request.follow && self.is_done(&mut ended).await?;
            loop {
                let (chunks, next) = self.read(cursor).await?;
                if chunks.is_empty() {
                    cursor = next;
                    break;
                }
                cursor = next;
                for chunk in chunks.into_iter().filter(|c| self.wanted(c)) {
                    if self.flow.send(Ok(chunk)).await.is_err() {
                        return Ok(());
                    }
                }
            }
            if done || !self.request.follow {
                return Ok(());
            }
            // The job's end changes nothing in its log by itself: look now and then.
            let look = Duration::from_millis(200);
            let _ = tokio::time::timeout(look, changed.changed()).await;
        }
    }

    fn wanted(&self, chunk: &wire::LogChunk) -> bool {
        chunk.is_system || self.request.rank.is_none_or(|r| r == chunk.rank)
    }

    /// Sends the last lines of what is there.
    async fn tail(&self, mut cursor: Cursor) -> Result<Cursor, Status> {
        let most = (self.request.tail as usize).min(MOST_TAIL);
        let mut last: VecDeque<wire::LogChunk> = VecDeque::with_capacity(most);
        loop {
            let (chunks, next) = self.read(cursor).await?;
            cursor = next;
            if chunks.is_empty() {
                break;
            }
            for chunk in chunks.into_iter().filter(|c| self.wanted(c)) {
                if last.len() == most {
                    last.pop_front();
                }
                last.push_back(chunk);
            }
        }
        for chunk in last {
            if self.flow.send(Ok(chunk)).await.is_err() {
                break;
            }
        }
        Ok(cursor)
    }

    async fn read(&self, cursor: Cursor) -> Result<(Vec<wire::LogChunk>, Cursor), Status> {
        let log = self.log.clone();
        tokio::task::spawn_blocking(move || log.read(cursor, LOG_BYTES))
            .await
            .map_err(|e| convert::status(ErrorKind::Internal, e.to_string()))?
            .map_err(|e| disk(&e))
    }

    /// Whether the job has ended and everything that its ranks said is here.
    async fn is_done(&self, ended: &mut Option<tokio::time::Instant>) -> Result<bool, Status> {
        let id = self.id;
        let state = self
            .actor
            .query(move |core, _| {
                let job = core.job(id)?;
                let exited = job.attempt().map_or_else(Vec::new, |a| {
                    let over = a.ranks.iter().filter(|r| matches!(r.state, RankState::Exited(_)));
                    over.map(|r| (a.epoch.0, r.rank.0)).collect()
                });
                Some((job.state.is_final(), exited))
            })
            .await?;
        // A job that is no longer kept has ended long ago.
        let Some((is_final, exited)) = state else { return Ok(true) };
        if !is_final {
            return Ok(false);
        }
        let since = ended.get_or_insert_with(tokio::time::Instant::now);
        let complete = exited.iter().all(|(epoch, rank)| self.log.is_complete(*epoch, *rank));
        Ok(complete || since.elapsed() > LAST_LINES)
    }
}
