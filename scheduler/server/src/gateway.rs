//! The agents' door.

use crate::actor::{Command, Handle, Session};
use crate::convert;
use crate::logs::JobLogs;
use firefly_proto::scheduler as wire;
use firefly_proto::scheduler::agent_gateway_server::AgentGateway;
use firefly_proto::scheduler::agent_report::Report;
use firefly_types::{ErrorKind, JobId, NodeId, lock};
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// Orders that may wait for one node: four for each of the most ranks that it can have. Beyond it
/// the stream is closed and the next hello brings everything again.
const MOST_ORDERS: usize = 16_384;

pub(crate) struct Gateway {
    pub(crate) actor: Handle,
    pub(crate) logs: Arc<JobLogs>,
    pub(crate) stop: CancellationToken,
    pub(crate) sessions: AtomicU64,
    pub(crate) newest: Newest,
}

/// Number of the newest session of each node. Lines are taken under the node's lock, so that once
/// a new session has its number an old one adds nothing: positions told to the new one stay true.
pub(crate) type Newest = Mutex<HashMap<NodeId, Arc<Mutex<u64>>>>;

type OrderStream = Pin<Box<dyn Stream<Item = Result<wire::AgentOrder, Status>> + Send>>;

#[tonic::async_trait]
impl AgentGateway for Gateway {
    type AttachStream = OrderStream;

    async fn attach(
        &self,
        request: Request<Streaming<wire::AgentReport>>,
    ) -> Result<Response<OrderStream>, Status> {
        let mut reports = request.into_inner();
        let hello = match reports.next().await.transpose()?.and_then(|r| r.report) {
            Some(Report::Hello(hello)) if hello.node_id > 0 => hello,
            _ => return Err(convert::status(ErrorKind::InvalidArgument, "the first report must be a hello")),
        };
        let session = Session {
            node: NodeId(hello.node_id),
            number: self.sessions.fetch_add(1, Ordering::Relaxed),
            close: self.stop.child_token(),
        };
        let newest = lock(&self.newest).entry(session.node).or_default().clone();
        *lock(&newest) = session.number;
        let (orders, stream) = mpsc::channel(MOST_ORDERS);
        let info = convert::info_from(&hello);
        tracing::info!(node = %session.node, host = hello.host, ranks = hello.running.len(), "agent connected");
        // From where each known rank's log is wanted.
        for rank in &hello.running {
            let offset = self.log(rank.job_id)?.offset(rank.epoch, rank.rank);
            self.note_end(rank)?;
            let ack = log_ack(rank.job_id, rank.epoch, rank.rank, offset);
            orders.try_send(Ok(ack)).map_err(|_| convert::status(ErrorKind::TooLarge, "too many ranks"))?;
        }
        let inventory = hello.running.into_iter().filter_map(convert::report_from).collect();
        let attach = Command::Attach { session: session.clone(), info, inventory, orders: orders.clone() };
        self.actor.send(attach).await?;
        let (actor, logs) = (self.actor.clone(), self.logs.clone());
        tokio::spawn(async move {
            let serve = Serve { actor, logs, session: session.clone(), orders, newest };
            tokio::select! {
                () = session.close.cancelled() => {}
                result = serve.run(reports) => {
                    if let Err(status) = result {
                        tracing::info!(node = %session.node, reason = status.message(), "agent disconnected");
                    }
                }
            }
            // Fails only when the actor has ended.
            let _ = serve.actor.send(Command::Detach(session)).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

impl Gateway {
    fn log(&self, job: u64) -> Result<Arc<crate::logs::JobLog>, Status> {
        self.logs.job(JobId(job)).map_err(|e| disk(&e))
    }

    fn note_end(&self, report: &wire::RankReport) -> Result<(), Status> {
        if report.state == "exited" {
            self.log(report.job_id)?.set_end(report.epoch, report.rank, report.log_end);
        }
        Ok(())
    }
}

fn disk(error: &std::io::Error) -> Status {
    convert::status(ErrorKind::Unavailable, format!("the scheduler cannot keep logs: {error}"))
}

fn log_ack(job_id: u64, epoch: u32, rank: u32, offset: u64) -> wire::AgentOrder {
    let ack = wire::LogAck { job_id, epoch, rank, offset };
    wire::AgentOrder { order: Some(wire::agent_order::Order::LogAck(ack)) }
}

/// One node's stream.
struct Serve {
    actor: Handle,
    logs: Arc<JobLogs>,
    session: Session,
    orders: crate::actor::Orders,
    newest: Arc<Mutex<u64>>,
}

impl Serve {
    async fn run(&self, mut reports: Streaming<wire::AgentReport>) -> Result<(), Status> {
        while let Some(report) = reports.next().await.transpose()? {
            match report.report {
                Some(Report::Rank(report)) => {
                    if report.state == "exited" {
                        let log = self.logs.job(JobId(report.job_id)).map_err(|e| disk(&e))?;
                        log.set_end(report.epoch, report.rank, report.log_end);
                    }
                    if let Some(report) = convert::report_from(report) {
                        self.actor.send(Command::Report(self.session.clone(), report)).await?;
                    }
                }
                Some(Report::Log(message)) => {
                    let Some((epoch, rank)) = message.chunks.first().map(|c| (c.epoch, c.rank)) else {
                        continue;
                    };
                    let job = message.job_id;
                    let log = self.logs.job(JobId(job)).map_err(|e| disk(&e))?;
                    let offset = {
                        let newest = lock(&self.newest);
                        if *newest != self.session.number {
                            return Err(Status::cancelled("the node has a newer stream"));
                        }
                        log.append(epoch, rank, message).map_err(|e| disk(&e))?
                    };
                    self.orders
                        .send(Ok(log_ack(job, epoch, rank, offset)))
                        .await
                        .map_err(|_| Status::cancelled("the stream is closed"))?;
                }
                Some(Report::Ping(ping)) => {
                    self.actor.send(Command::Ping(self.session.clone(), ping.sequence)).await?;
                }
                Some(Report::Hello(_)) | None => {}
            }
        }
        Ok(())
    }
}
