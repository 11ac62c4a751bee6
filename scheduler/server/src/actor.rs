//! The one task that owns the core.

use crate::convert;
use crate::journal::Journal;
use crate::logs::JobLogs;
use firefly_proto::scheduler as wire;
use firefly_types::{ClusterSecret, Nanos, NodeId};
use scheduler_core::{Answer, Core, Decision, Event, NodeInfo, Now, RankReport, Record};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Events that share one commit.
const BATCH: usize = 256;
/// Time passes for the core this often.
const TICK: Duration = Duration::from_millis(250);

/// Orders on their way to one node.
pub(crate) type Orders = mpsc::Sender<Result<wire::AgentOrder, tonic::Status>>;

/// A look at the state.
pub(crate) type Look = Box<dyn FnOnce(&Core, Now) + Send>;

/// What the actor is asked.
pub(crate) enum Command {
    /// A person's event.
    Event(Event, oneshot::Sender<Answer>),
    /// A look at the state, after everything before it has become durable.
    Query(Look),
    /// A node has connected.
    Attach { session: Session, info: NodeInfo, inventory: Vec<RankReport>, orders: Orders },
    /// A node's stream has ended.
    Detach(Session),
    /// News from a node.
    Report(Session, RankReport),
    /// A sign of life, to be answered.
    Ping(Session, u64),
}

/// One stream of one node.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) node: NodeId,
    pub(crate) number: u64,
    /// Ends the stream.
    pub(crate) close: CancellationToken,
}

/// Access to the actor.
#[derive(Clone)]
pub(crate) struct Handle {
    commands: mpsc::Sender<Command>,
    /// Grows with every batch that may have changed something.
    pub(crate) changed: watch::Receiver<u64>,
}

impl Handle {
    pub(crate) async fn send(&self, command: Command) -> Result<(), tonic::Status> {
        self.commands.send(command).await.map_err(|_| gone())
    }

    pub(crate) async fn event(&self, event: Event) -> Result<Answer, tonic::Status> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Event(event, reply)).await?;
        answer.await.map_err(|_| gone())
    }

    pub(crate) async fn query<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Core, Now) -> T + Send + 'static,
    ) -> Result<T, tonic::Status> {
        let (reply, answer) = oneshot::channel();
        let look = move |core: &Core, now| {
            // Whoever asked may have gone.
            let _ = reply.send(look(core, now));
        };
        self.send(Command::Query(Box::new(look))).await?;
        answer.await.map_err(|_| gone())
    }
}

fn gone() -> tonic::Status {
    convert::status(firefly_types::ErrorKind::Unavailable, "the scheduler is shutting down: try again")
}

/// Now, on both clocks.
pub(crate) fn now() -> Now {
    let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let boot =
        Duration::new(u64::try_from(boot.tv_sec).unwrap_or(0), u32::try_from(boot.tv_nsec).unwrap_or(0));
    Now { mono: Nanos::ZERO.after(boot), unix_ms: u64::try_from(unix.as_millis()).unwrap_or(u64::MAX) }
}

struct Actor {
    core: Core,
    journal: Journal,
    logs: Arc<JobLogs>,
    secret: ClusterSecret,
    sessions: HashMap<NodeId, (Session, Orders)>,
}

/// Effects of a batch, in order, held back until its records are durable.
enum Effect {
    Decision(Decision),
    Answer(oneshot::Sender<Answer>, Answer),
    Query(Look),
    Pong(Session, u64),
}

/// Starts the actor. It ends when `stop` fires, and fires it itself when the journal fails.
pub(crate) fn spawn(
    core: Core,
    journal: Journal,
    logs: Arc<JobLogs>,
    secret: ClusterSecret,
    stop: CancellationToken,
) -> (Handle, tokio::task::JoinHandle<()>) {
    let (commands, mut inbox) = mpsc::channel(4096);
    let (changes, changed) = watch::channel(0);
    let mut actor = Actor { core, journal, logs, secret, sessions: HashMap::new() };
    let task = tokio::spawn(async move {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let (mut records, mut effects) = (Vec::new(), Vec::new());
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = tick.tick() => {
                    actor.step(Event::Tick, &mut records, &mut effects);
                }
                n = inbox.recv_many(&mut batch, BATCH) => {
                    if n == 0 {
                        break;
                    }
                    for command in batch.drain(..) {
                        actor.take(command, &mut records, &mut effects);
                    }
                }
            }
            if !records.is_empty()
                && let Err(error) = actor.journal.commit(records).await
            {
                // What is in memory is ahead of what is durable: going on would break promises,
                // starting again will not.
                tracing::error!(%error, "the scheduler cannot record its decisions and stops");
                stop.cancel();
                break;
            }
            for effect in effects {
                actor.effect(effect);
            }
            changes.send_modify(|n| *n += 1);
        }
        for (session, _) in actor.sessions.into_values() {
            session.close.cancel();
        }
    });
    (Handle { commands, changed }, task)
}

impl Actor {
    fn step(&mut self, event: Event, records: &mut Vec<Record>, effects: &mut Vec<Effect>) -> Option<Answer> {
        let mut answer = None;
        for decision in self.core.step(event, now()) {
            match decision {
                Decision::Persist(record) => {
                    if matches!(record, Record::RemoveJob(_)) {
                        effects.push(Effect::Decision(Decision::Persist(record.clone())));
                    }
                    records.push(record);
                }
                Decision::Answer(a) => answer = Some(a),
                other => effects.push(Effect::Decision(other)),
            }
        }
        answer
    }

    fn take(&mut self, command: Command, records: &mut Vec<Record>, effects: &mut Vec<Effect>) {
        match command {
            Command::Event(event, reply) => {
                if let Some(answer) = self.step(event, records, effects) {
                    effects.push(Effect::Answer(reply, answer));
                }
            }
            Command::Query(look) => effects.push(Effect::Query(look)),
            Command::Attach { session, info, inventory, orders } => {
                let node = session.node;
                if let Some((old, _)) = self.sessions.insert(node, (session, orders)) {
                    old.close.cancel();
                }
                self.step(Event::Hello { node, info, inventory }, records, effects);
            }
            Command::Detach(session) => {
                if self.is_current(&session) {
                    self.sessions.remove(&session.node);
                    self.step(Event::Gone { node: session.node }, records, effects);
                }
            }
            Command::Report(session, report) => {
                if self.is_current(&session) {
                    self.step(Event::Rank { node: session.node, report }, records, effects);
                }
            }
            Command::Ping(session, sequence) => {
                if self.is_current(&session) {
                    self.step(Event::Beat { node: session.node }, records, effects);
                    effects.push(Effect::Pong(session, sequence));
                }
            }
        }
    }

    fn is_current(&self, session: &Session) -> bool {
        self.sessions.get(&session.node).is_some_and(|(s, _)| s.number == session.number)
    }

    fn effect(&mut self, effect: Effect) {
        match effect {
            Effect::Decision(Decision::Note { job, epoch, text }) => self.logs.note(job, epoch, &text),
            Effect::Decision(Decision::Order { node, order }) => {
                if let Some(order) = convert::order_to(order, &self.core, &self.secret) {
                    self.send(node, order);
                }
            }
            Effect::Decision(Decision::Persist(record)) => {
                if let Record::RemoveJob(id) = record {
                    self.logs.remove(id);
                }
            }
            // Taken out in `step`.
            Effect::Decision(Decision::Answer(_)) => {}
            Effect::Answer(reply, answer) => {
                // Whoever asked may have gone.
                let _ = reply.send(answer);
            }
            Effect::Query(look) => look(&self.core, now()),
            Effect::Pong(session, sequence) => {
                if self.is_current(&session) {
                    let pong = wire::agent_order::Order::Pong(wire::Pong { sequence });
                    self.send(session.node, wire::AgentOrder { order: Some(pong) });
                }
            }
        }
    }

    /// A node that does not take its orders loses its stream: its next hello brings all again.
    fn send(&mut self, node: NodeId, order: wire::AgentOrder) {
        if let Some((session, orders)) = self.sessions.get(&node)
            && orders.try_send(Ok(order)).is_err()
        {
            session.close.cancel();
        }
    }
}
