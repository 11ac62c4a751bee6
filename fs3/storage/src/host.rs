//! One target at work: carries events into the machine and its actions out, to the disk, the wire
//! and the callers. Decides nothing by itself.

use crate::clock::now;
use crate::engine::{BLOCK_BYTES, Disk, Done, Engine, EngineError, ReadPlan, Usage};
use crate::wire::{self, Address};
use firefly_net::{Buf, BufPool, Call, Client};
use firefly_proto::{methods::storage as method, storage as pb};
use firefly_types::{ChainId, ChainVersion, ChunkId, ErrorKind, TargetId, WireError, lock};
use fs3_core::target::{Action, Answer, Context, Event, Forward, Handle, Meta, Target, Update, WriteError};
use prost::Message;
use std::collections::HashMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;
use tokio::sync::oneshot;

/// Time for an answer from the successor. Longer than a loaded disk takes; a change of the chain
/// usually ends the wait earlier.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(4);
/// Time for an answer that needs no disk.
const SMALL_TIMEOUT: Duration = Duration::from_secs(1);

/// What a host needs of its node.
pub(crate) trait Surroundings: Send + Sync + 'static {
    /// Address of the node that holds a target.
    fn address(&self, target: TargetId) -> Option<String>;
    /// To call other nodes with.
    fn client(&self) -> &Client;
    /// The manager should hear of this soon.
    fn report(&self);
}

/// What the manager is told about the target.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) synced_at: Option<ChainVersion>,
    pub(crate) offline: Option<String>,
}

pub(crate) struct Host<D> {
    id: TargetId,
    chain: ChainId,
    engine: Engine<D, Buf>,
    machine: Mutex<Target<Buf>>,
    waiting: Mutex<HashMap<Handle, oneshot::Sender<Result<Answer, WireError>>>>,
    handles: AtomicU64,
    report: Mutex<Report>,
    stopped: AtomicBool,
    around: Arc<dyn Surroundings>,
    runtime: tokio::runtime::Handle,
    this: OnceLock<Weak<Self>>,
    repaired: AtomicU64,
}

impl<D: Disk + 'static> Host<D> {
    /// Starts the target's disk thread and clock. Must be called within a tokio runtime.
    pub(crate) fn start(
        chain: ChainId,
        engine: Engine<D, Buf>,
        machine: Target<Buf>,
        around: Arc<dyn Surroundings>,
    ) -> std::io::Result<(Arc<Self>, std::thread::JoinHandle<()>)> {
        let host = Arc::new(Self {
            id: machine.id(),
            chain,
            engine,
            machine: Mutex::new(machine),
            waiting: Mutex::default(),
            handles: AtomicU64::new(1),
            report: Mutex::default(),
            stopped: AtomicBool::new(false),
            around,
            runtime: tokio::runtime::Handle::current(),
            this: OnceLock::new(),
            repaired: AtomicU64::new(0),
        });
        let _ = host.this.set(Arc::downgrade(&host));
        let disk = Arc::clone(&host);
        let thread =
            std::thread::Builder::new().name(format!("disk {}", host.id)).spawn(move || disk.run_disk())?;
        Ok((host, thread))
    }

    /// Ends the disk thread and everybody's waiting. Says how the disk had failed, if it had.
    pub(crate) fn stop(&self) -> Option<String> {
        self.stopped.store(true, Ordering::SeqCst);
        lock(&self.waiting).clear();
        self.engine.stop()
    }

    /// Lets go of the disk though calls that still run hold this host.
    pub(crate) fn release(&self) {
        self.engine.release();
    }

    pub(crate) fn id(&self) -> TargetId {
        self.id
    }

    /// Whether it serves, as far as it knows.
    pub(crate) fn serves(&self) -> bool {
        lock(&self.machine).chain().is_some_and(|c| c.serving.contains(&self.id))
    }

    /// The first committed chunk after this one, and how many there are in all.
    pub(crate) fn chunk_after(&self, after: Option<ChunkId>) -> (Option<ChunkId>, u64) {
        let machine = lock(&self.machine);
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let next = machine.committed().range((from, Bound::Unbounded)).next().map(|(chunk, _)| *chunk);
        (next, machine.committed().len() as u64)
    }

    /// Reads a chunk as a whole, verifies it, and repairs it from other replicas: bytes read and
    /// blocks repaired. A chunk that has gone meanwhile is in order.
    pub(crate) async fn check_chunk(self: &Arc<Self>, chunk: ChunkId) -> Result<(u64, u64), EngineError> {
        let Some(plan) = self.engine.plan_read(chunk, false, 0..u32::MAX) else { return Ok((0, 0)) };
        let length = plan.meta().length as usize;
        let pool = self.around.client().pool().clone();
        let (_, repaired) = self.read_plan(plan, 0, length, &pool).await?;
        Ok((length as u64, repaired))
    }

    fn arc(&self) -> Option<Arc<Self>> {
        self.this.get()?.upgrade()
    }

    fn run_disk(&self) {
        let mut driver = self.engine.driver();
        while let Some(ended) = self.engine.turn(&mut driver) {
            for done in ended {
                match done {
                    Done::Written { chunk, id, result } => {
                        if let Err(error) = result {
                            let reason = self.engine.failed();
                            tracing::warn!(target_id = %self.id, %chunk, ?error, reason, "a write failed");
                        }
                        self.step(Event::Written { chunk, id, result });
                    }
                    Done::Flushed { id, ok } => self.step(Event::Flushed { id, ok }),
                    Done::Corrupt { id, base, version, update, at_once, index } => {
                        self.repair_and_write(id, base, version, update, at_once, index);
                    }
                }
            }
        }
    }

    /// The block under a write is corrupt: get it from another replica, then write again.
    fn repair_and_write(
        &self,
        id: u64,
        base: u64,
        version: u64,
        update: Update<Buf>,
        at_once: bool,
        index: u32,
    ) {
        let Some(host) = self.arc() else { return };
        self.runtime.spawn(async move {
            let chunk = update.chunk;
            let start = index * BLOCK_BYTES as u32;
            if let Some(mut plan) = host.engine.plan_read(chunk, false, start..start + BLOCK_BYTES as u32)
                && host.repair(&mut plan, chunk, index).await
            {
                host.engine.write(id, base, version, update, at_once);
                return;
            }
            host.step(Event::Written { chunk, id, result: Err(WriteError::Failed) });
        });
    }

    /// One step of the machine, with everything that it asks for.
    pub(crate) fn step(&self, event: Event<Buf>) {
        let mut machine = lock(&self.machine);
        let actions = machine.step(event, now());
        for action in actions {
            self.act(action);
        }
        // Held until here: `Commit` must reach the engine before a read of the next step.
        drop(machine);
    }

    /// A step whose answer somebody waits for.
    pub(crate) async fn ask(&self, event: impl FnOnce(Handle) -> Event<Buf>) -> Result<Answer, WireError> {
        let handle = self.handles.fetch_add(1, Ordering::Relaxed);
        let (send, receive) = oneshot::channel();
        lock(&self.waiting).insert(handle, send);
        if self.stopped.load(Ordering::SeqCst) {
            lock(&self.waiting).remove(&handle);
        }
        self.step(event(handle));
        receive.await.unwrap_or_else(|_| {
            Err(WireError::new(
                ErrorKind::Unavailable,
                format!("target {} is stopping: ask elsewhere", self.id),
            ))
        })
    }

    fn act(&self, action: Action<Buf>) {
        match action {
            Action::Write { id, base, version, update, commit } => {
                self.engine.write(id, base, version, update, commit);
            }
            Action::Commit { chunk, version } => {
                self.engine.commit(chunk, version);
            }
            Action::Drop { chunk, version } => {
                self.engine.drop_pending(chunk, version);
            }
            Action::Flush { id, remove, page } => {
                self.engine.flush(id, remove, page);
            }
            Action::Read { id, chunk, pending } => self.read_whole(id, chunk, pending),
            Action::Reply { reply, result } => {
                if let Some(caller) = lock(&self.waiting).remove(&reply) {
                    let _ = caller.send(result);
                }
            }
            Action::Synced(version) => {
                tracing::info!(target_id = %self.id, %version, "filled");
                lock(&self.report).synced_at = Some(version);
                self.around.report();
            }
            Action::Offline(reason) => {
                tracing::error!(target_id = %self.id, reason, "the target goes offline");
                lock(&self.report).offline = Some(reason);
                self.around.report();
            }
            Action::Forward { to, forward, is_sync } => self.send_forward(to, forward, is_sync),
            Action::Token { to, token } => {
                let address = self.to(to);
                let head = wire::token_message(address, &token).encode_to_vec();
                let (chunk, stamp) = (token.chunk, token.stamp);
                self.send(to, method::PREFIX_DURABLE, head, None, SMALL_TIMEOUT, move |host, result| {
                    let delivered = result.is_ok();
                    host.step(Event::TokenAnswer { chunk, stamp, delivered });
                });
            }
            Action::Resolve { to, query, touch } => {
                let address = self.to(to);
                let head = wire::resolve_message(address, &query).encode_to_vec();
                let chunk = query.chunk;
                self.send(to, method::RESOLVE, head, None, SMALL_TIMEOUT, move |host, result| {
                    let reply = result.ok().and_then(|head| wire::decode::<pb::ResolveReply>(&head).ok());
                    if let Some(resolution) = reply.and_then(|r| wire::resolution(&r)) {
                        host.step(Event::ResolveAnswer { chunk, touch, resolution });
                    }
                });
            }
            Action::SyncRecords { id, to, chain_version, page } => {
                let address = self.to(to);
                let head = wire::page_message(address, self.id, chain_version, &page).encode_to_vec();
                self.send(to, method::SYNC_RECORDS, head, None, FORWARD_TIMEOUT, move |host, result| {
                    host.step(Event::SyncAnswer { id, accepted: result.is_ok() });
                });
            }
            Action::SyncDone { id, to, chain_version } => {
                let address = self.to(to);
                let head = pb::SyncDoneRequest {
                    chain_id: address.chain.0,
                    chain_version: chain_version.0,
                    target_id: to.0,
                    from_target: self.id.0,
                }
                .encode_to_vec();
                self.send(to, method::SYNC_DONE, head, None, FORWARD_TIMEOUT, move |host, result| {
                    host.step(Event::SyncAnswer { id, accepted: result.is_ok() });
                });
            }
        }
    }

    fn to(&self, target: TargetId) -> Address {
        Address { chain: self.chain, target }
    }

    fn send_forward(&self, to: TargetId, forward: Forward<Buf>, is_sync: bool) {
        let head = wire::forward_message(self.to(to), &forward, is_sync).encode_to_vec();
        let (chunk, stamp) = (forward.update.chunk, forward.stamp);
        let payload = forward.update.payload;
        self.send(to, method::FORWARD, head, payload, FORWARD_TIMEOUT, move |host, result| {
            let result = result.and_then(|head| wire::decode::<pb::ForwardReply>(&head)).map(|r| Meta {
                version: r.version,
                length: r.chunk_length,
                digest: r.chunk_crc32c,
            });
            host.step(Event::ForwardAnswer { chunk, stamp, result });
        });
    }

    /// Calls another target's node; `then` gets the answer, or why there is none.
    fn send(
        &self,
        to: TargetId,
        method: u16,
        head: Vec<u8>,
        send: Option<Buf>,
        timeout: Duration,
        then: impl FnOnce(&Self, Result<Vec<u8>, WireError>) + Send + 'static,
    ) {
        let Some(host) = self.arc() else { return };
        self.runtime.spawn(async move {
            let result = match host.around.address(to) {
                None => {
                    Err(WireError::new(ErrorKind::Unavailable, format!("no address of target {to} is known")))
                }
                Some(peer) => {
                    let call = Call { method, head: head.into(), send, recv: None, timeout };
                    let answer = host.around.client().call(&peer, call).await;
                    answer.map(|r| r.head.to_vec()).map_err(|e| WireError::new(e.kind(), e.to_string()))
                }
            };
            if let Err(error) = &result {
                tracing::debug!(target_id = %host.id, %to, method, %error, "a call along the chain failed");
            }
            then(&host, result);
        });
    }

    /// A whole chunk for the machine. The version is the one of this moment.
    fn read_whole(&self, id: u64, chunk: ChunkId, pending: bool) {
        let Some(host) = self.arc() else { return };
        let plan = self.engine.plan_read(chunk, pending, 0..u32::MAX);
        self.runtime.spawn(async move {
            let content = match plan {
                None => None,
                Some(plan) => {
                    let meta = plan.meta();
                    let pool = host.around.client().pool().clone();
                    match host.read_plan(plan, 0, meta.length as usize, &pool).await {
                        Ok((bytes, _)) => Some((meta, bytes)),
                        Err(error) => {
                            tracing::warn!(target_id = %host.id, %chunk, %error, "a chunk cannot be copied now");
                            None
                        }
                    }
                }
            };
            host.step(Event::Content { chunk, id, content });
        });
    }

    /// Reads and verifies; a corrupt block is fetched from another replica, once each. The bytes,
    /// and how many blocks were repaired.
    async fn read_plan(
        &self,
        mut plan: ReadPlan,
        offset: usize,
        length: usize,
        pool: &BufPool,
    ) -> Result<(Buf, u64), EngineError> {
        let mut buffer = pool.alloc(length).await;
        let (mut repaired, mut repairs) = (None, 0);
        loop {
            match self.engine.read(&mut plan, offset, &mut buffer[..length]).await {
                Ok(()) => {
                    buffer.set_len(length);
                    return Ok((buffer.freeze(), repairs));
                }
                Err(EngineError::Corrupt { chunk, index, block }) => {
                    tracing::warn!(target_id = %self.id, %chunk, index, block, "a block fails its checksum");
                    if repaired == Some(index) || !self.repair(&mut plan, chunk, index).await {
                        return Err(EngineError::Corrupt { chunk, index, block });
                    }
                    repaired = Some(index);
                    repairs += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Fetches a block from the other serving replicas until one fits its checksum here.
    async fn repair(&self, plan: &mut ReadPlan, chunk: ChunkId, index: u32) -> bool {
        let chain = lock(&self.machine).chain().cloned();
        let Some(chain) = chain else { return false };
        let offset = index * BLOCK_BYTES as u32;
        let length = (plan.meta().length.saturating_sub(offset)).min(BLOCK_BYTES as u32);
        for other in chain.serving.iter().filter(|t| **t != self.id) {
            let Some(peer) = self.around.address(*other) else { continue };
            let head = pb::ReadRequest {
                context: Some(pb::RequestContext::default()),
                chain_id: self.chain.0,
                chain_version: chain.version.0,
                target_id: other.0,
                chunk: Some(wire::chunk_key(chunk)),
                offset,
                length,
            };
            let client = self.around.client();
            let recv = client.pool().alloc(length as usize).await;
            let call = Call {
                method: method::READ,
                head: head.encode_to_vec().into(),
                send: None,
                recv: Some(recv),
                timeout: FORWARD_TIMEOUT,
            };
            let Ok(response) = client.call(&peer, call).await else { continue };
            let Some(bytes) = response.data else { continue };
            if self.engine.repair(plan, index, &bytes).is_ok() {
                tracing::info!(target_id = %self.id, %chunk, index, from = %other, "repaired a block");
                self.repaired.fetch_add(1, Ordering::Relaxed);
                return true;
            }
        }
        false
    }

    /// Serves a client's read: state, bytes, whether a newer version is pending.
    pub(crate) async fn read(
        self: &Arc<Self>,
        context: &Context,
        chain_version: ChainVersion,
        chunk: ChunkId,
        offset: u32,
        length: u32,
        pool: &BufPool,
    ) -> Result<(Option<Meta>, Option<Buf>, bool), WireError> {
        let (grant, plan) = {
            let mut machine = lock(&self.machine);
            let grant = machine.read(context, chain_version, chunk, now())?;
            (grant, self.engine.plan_read(chunk, false, offset..offset.saturating_add(length)))
        };
        let (Some(meta), Some(plan)) = (grant.meta, plan) else { return Ok((None, None, grant.dirty)) };
        if plan.meta() != meta {
            return Err(WireError::new(
                ErrorKind::Internal,
                format!("machine and engine disagree about chunk {chunk}: {meta:?}, {:?}", plan.meta()),
            ));
        }
        let length = meta.length.saturating_sub(offset).min(length) as usize;
        if length == 0 {
            return Ok((Some(meta), None, grant.dirty));
        }
        let read = self.read_plan(plan, offset as usize, length, pool).await;
        let (bytes, _) = read.map_err(|e| {
            WireError::new(
                e.kind(),
                format!("target {}: {e}; another replica has the data: ask there", self.id),
            )
        })?;
        Ok((Some(meta), Some(bytes), grant.dirty))
    }

    /// Chunks of one file from an index on, if such requests may be served now.
    pub(crate) fn list(
        &self,
        context: &Context,
        chain_version: ChainVersion,
        file: ChunkId,
        limit: usize,
    ) -> Result<Vec<(ChunkId, Meta)>, WireError> {
        let mut machine = lock(&self.machine);
        machine.check_request(context, chain_version, now())?;
        Ok(machine.chunks_of(file.data, file.generation, file.index).take(limit).collect())
    }

    /// (last chunk, number of chunks, bytes) of one file on this target.
    #[allow(clippy::type_complexity, reason = "one caller, right at the wire")]
    pub(crate) fn summary(
        &self,
        context: &Context,
        chain_version: ChainVersion,
        file: ChunkId,
    ) -> Result<(Option<(ChunkId, Meta)>, u64, u64), WireError> {
        let mut machine = lock(&self.machine);
        machine.check_request(context, chain_version, now())?;
        let (mut last, mut chunks, mut bytes) = (None, 0, 0);
        for (chunk, meta) in machine.chunks_of(file.data, file.generation, 0) {
            last = Some((chunk, meta));
            chunks += 1;
            bytes += u64::from(meta.length);
        }
        Ok((last, chunks, bytes))
    }

    pub(crate) fn report(&self) -> Report {
        lock(&self.report).clone()
    }

    pub(crate) fn usage(&self) -> Usage {
        self.engine.usage()
    }

    /// Blocks put right from other replicas since the start.
    pub(crate) fn repaired(&self) -> u64 {
        self.repaired.load(Ordering::Relaxed)
    }
}
