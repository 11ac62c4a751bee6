//! Chunk requests to storage: reads from any serving replica, updates to the head, both retried
//! until the cluster's fail-over is over.

use crate::FsError;
use crate::lanes::Lanes;
use crate::manager::Session;
use crate::options::ClientOptions;
use crate::retry::Retry;
use crate::routing::{Chain, Replica, RoutingCache};
use crate::stats::{Stats, add};
use bytes::Bytes;
use firefly_net::{Buf, BufMut, Call, Client};
use firefly_proto::methods::storage as method;
use firefly_proto::storage::{
    ChunkKey, ReadReply, ReadRequest, RemoveRangeReply, RemoveRangeRequest, RequestContext, UpdateKind,
    UpdateReply, UpdateRequest,
};
use firefly_types::{ChainId, ChunkId, ErrorKind, TargetId};
use prost::Message;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// How long a target that failed is asked last: about one fail-over, so that readers do not pay
/// the time-out of a dead node once per request.
const SUSPECT_FOR: Duration = Duration::from_secs(3);

/// Bound of a wait that another wait bounds already.
const MOST_PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct ChunkIo {
    net: Client,
    routing: RoutingCache,
    session: Arc<Session>,
    lanes: Lanes,
    reads: Semaphore,
    suspects: Mutex<HashMap<TargetId, Instant>>,
    spread: AtomicUsize,
    call_timeout: Duration,
    update_timeout: Duration,
    verify: bool,
    pub(crate) stats: Arc<Stats>,
}

/// What one chunk update does; the payload, if any, is separate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Update {
    pub(crate) chunk: ChunkId,
    pub(crate) chain: ChainId,
    pub(crate) kind: UpdateKind,
    pub(crate) offset: u32,
    pub(crate) length: u32,
    pub(crate) chunk_bytes: u32,
}

enum ReadOutcome {
    Clean(BufMut),
    Dirty,
}

impl ChunkIo {
    pub(crate) fn new(
        options: &ClientOptions,
        net: Client,
        routing: RoutingCache,
        session: Arc<Session>,
        stats: Arc<Stats>,
    ) -> Self {
        Self {
            net,
            routing,
            session,
            lanes: Lanes::new(options.update_lanes),
            reads: Semaphore::new(options.reads_in_flight.max(1)),
            suspects: Mutex::default(),
            // Different clients begin with different replicas.
            spread: AtomicUsize::new(rand::random::<u16>().into()),
            call_timeout: options.call_timeout,
            update_timeout: options.update_timeout,
            verify: options.verify_reads,
            stats,
        }
    }

    pub(crate) fn net(&self) -> &Client {
        &self.net
    }

    pub(crate) fn routing(&self) -> &RoutingCache {
        &self.routing
    }

    fn context(&self, lane: (u32, u64)) -> RequestContext {
        RequestContext {
            client_id: self.session.client_id,
            session_epoch: self.session.epoch(),
            channel: lane.0,
            sequence: lane.1,
            trace_id: rand::random(),
            attempt_epoch: self.session.attempt.0,
            job_id: self.session.attempt.1,
        }
    }

    fn suspect(&self, target: TargetId) {
        let mut suspects = self.suspects.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let now = Instant::now();
        suspects.retain(|_, since| now.duration_since(*since) < SUSPECT_FOR);
        suspects.insert(target, now);
    }

    /// Replicas in the order to ask them: rotated for spread, those that failed lately last.
    fn reading_order(&self, chain: &Chain) -> Vec<Replica> {
        let mut order = chain.serving.clone();
        if order.len() > 1 {
            let turn = self.spread.fetch_add(1, Ordering::Relaxed) % order.len();
            order.rotate_left(turn);
            let suspects = self.suspects.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if !suspects.is_empty() {
                order.sort_by_key(|r| suspects.get(&r.target).is_some_and(|t| t.elapsed() < SUSPECT_FOR));
            }
        }
        order
    }

    /// Bytes `offset .. offset + length` of a chunk as far as it has any: a shorter answer means
    /// that the chunk ends there, an empty one that it does not exist.
    pub(crate) async fn read(
        &self,
        chunk: ChunkId,
        chain_id: ChainId,
        offset: u32,
        length: u32,
    ) -> Result<BufMut, FsError> {
        let what = format!("read of chunk {chunk} on chain {chain_id}");
        let _permit = self.reads.acquire().await.expect("the semaphore is never closed");
        let mut retry = Retry::new(&what, &self.stats);
        loop {
            let routing = self.routing.current();
            let version = routing.version();
            let chain = routing.chain(chain_id).cloned().unwrap_or_default();
            let order = self.reading_order(&chain);
            let mut corrupt = 0;
            let mut failure = None;
            for (nth, replica) in order.iter().enumerate() {
                if nth > 0 {
                    add(&self.stats.replica_switches, 1);
                }
                let mut outcome =
                    self.read_once(&what, &chain, chain_id, replica, chunk, offset, length).await;
                if let (Ok(ReadOutcome::Dirty), Some(tail)) = (&outcome, chain.serving.last())
                    && tail.target != replica.target
                {
                    outcome = self.read_once(&what, &chain, chain_id, tail, chunk, offset, length).await;
                }
                match outcome {
                    Ok(ReadOutcome::Clean(data)) => {
                        add(&self.stats.reads, 1);
                        add(&self.stats.bytes_read, data.len() as u64);
                        retry.done();
                        return Ok(data);
                    }
                    Ok(ReadOutcome::Dirty) => {
                        failure = Some(FsError::Call {
                            what: what.clone(),
                            kind: ErrorKind::Unavailable,
                            message: "the tail has an update that is not committed yet".into(),
                        });
                    }
                    Err(error) if error.kind() == ErrorKind::Corrupt => {
                        tracing::warn!(%error, target_id = %replica.target, "asking another replica");
                        corrupt += 1;
                        failure.get_or_insert(error);
                    }
                    Err(error) if error.kind().is_retryable() => {
                        // A stale version says nothing about the target's health.
                        let stale = error.kind() == ErrorKind::Stale;
                        if !stale {
                            self.suspect(replica.target);
                        }
                        failure = Some(error);
                        if stale && self.routing.current().version() > version {
                            break;
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
            if corrupt > 0 && corrupt == order.len() && retry.attempts() > 0 {
                return Err(FsError::Corrupt { what });
            }
            let failure = failure.unwrap_or_else(|| self.nobody_serves(&what, chain_id));
            retry.again(failure, self.routing.wait_newer(version, MOST_PATIENCE)).await?;
        }
    }

    fn nobody_serves(&self, what: &str, chain: ChainId) -> FsError {
        FsError::NoServer { what: what.to_owned(), missing: format!("no target of chain {chain} serves now") }
    }

    #[allow(clippy::too_many_arguments, reason = "one request, spelled out once")]
    async fn read_once(
        &self,
        what: &str,
        chain: &Chain,
        chain_id: ChainId,
        replica: &Replica,
        chunk: ChunkId,
        offset: u32,
        length: u32,
    ) -> Result<ReadOutcome, FsError> {
        let head = ReadRequest {
            context: Some(self.context((0, 0))),
            chain_id: chain_id.get(),
            chain_version: chain.version,
            target_id: replica.target.get(),
            chunk: Some(key(chunk)),
            offset,
            length,
        };
        let call = Call {
            method: method::READ,
            head: head.encode_to_vec().into(),
            send: None,
            recv: Some(self.net.pool().alloc(length as usize).await),
            timeout: self.call_timeout,
        };
        let response = match self.net.call(&replica.address, call).await {
            Ok(response) => response,
            Err(error) => {
                let error = FsError::call(what, error);
                // A server may say "no such chunk" either way; a hole is not a failure.
                if error.kind() == ErrorKind::NotFound && matches!(error, FsError::Remote { .. }) {
                    return Ok(ReadOutcome::Clean(self.empty().await?));
                }
                return Err(error);
            }
        };
        let reply = decode::<ReadReply>(what, &response.head)?;
        if reply.dirty {
            return Ok(ReadOutcome::Dirty);
        }
        let data = match response.data {
            Some(data) => data,
            None => self.empty().await?,
        };
        let expected = reply.chunk_length.saturating_sub(offset).min(length) as usize;
        if data.len() != expected {
            return Err(FsError::Remote {
                what: what.to_owned(),
                error: firefly_types::WireError::new(
                    ErrorKind::Corrupt,
                    format!("target {} sent {} bytes, expected {expected}", replica.target, data.len()),
                ),
            });
        }
        if self.verify && !data.is_empty() && crc32c::crc32c(&data) != reply.crc32c {
            add(&self.stats.checksum_mismatches, 1);
            return Err(FsError::Remote {
                what: what.to_owned(),
                error: firefly_types::WireError::new(
                    ErrorKind::Corrupt,
                    format!("the bytes from target {} fail their checksum", replica.target),
                ),
            });
        }
        Ok(ReadOutcome::Clean(data))
    }

    async fn empty(&self) -> Result<BufMut, FsError> {
        let mut none = self.net.pool().alloc(1).await;
        none.set_len(0);
        Ok(none)
    }

    /// One update, exactly once however often it is sent.
    pub(crate) async fn update(&self, update: Update, payload: Option<Buf>) -> Result<UpdateReply, FsError> {
        let what = format!("{} of chunk {} on chain {}", name(update.kind), update.chunk, update.chain);
        let lane = self.lanes.take().await;
        let crc = payload.as_ref().map_or(0, |p| crc32c::crc32c(p));
        let mut retry = Retry::new(&what, &self.stats);
        let result = loop {
            let routing = self.routing.current();
            let version = routing.version();
            let head =
                routing.chain(update.chain).and_then(|c| Some((c.version, c.serving.first()?.clone())));
            let error = match head {
                None => self.nobody_serves(&what, update.chain),
                Some((chain_version, head)) => {
                    let request = UpdateRequest {
                        context: Some(self.context((lane.channel(), lane.sequence()))),
                        chain_id: update.chain.get(),
                        chain_version,
                        target_id: head.target.get(),
                        chunk: Some(key(update.chunk)),
                        kind: update.kind.into(),
                        offset: update.offset,
                        length: update.length,
                        crc32c: crc,
                        chunk_bytes: update.chunk_bytes,
                    };
                    let call = Call {
                        method: method::UPDATE,
                        head: request.encode_to_vec().into(),
                        send: payload.clone(),
                        recv: None,
                        timeout: self.update_timeout,
                    };
                    match self.net.call(&head.address, call).await {
                        Ok(response) => break decode::<UpdateReply>(&what, &response.head),
                        Err(error) => FsError::call(&what, error),
                    }
                }
            };
            // Corrupt here means that the payload was damaged on its way: send it again.
            if !error.kind().is_retryable() && error.kind() != ErrorKind::Corrupt {
                break Err(error);
            }
            // If this gives up, so does the lane: nobody knows whether the update happened.
            retry.again(error, self.routing.wait_newer(version, MOST_PATIENCE)).await?;
        };
        retry.done();
        lane.answered();
        if result.is_ok() {
            add(&self.stats.writes, 1);
            add(&self.stats.bytes_written, payload.map_or(0, |p| p.len() as u64));
        }
        result
    }

    /// Removes all chunks of one file with index >= `from_index` from one chain.
    pub(crate) async fn remove_range(
        &self,
        data: (u64, u32),
        chain: ChainId,
        from_index: u32,
    ) -> Result<u64, FsError> {
        let what = format!("removal of chunks d{}.g{} from {from_index} on chain {chain}", data.0, data.1);
        let mut removed = 0;
        loop {
            let lane = self.lanes.take().await;
            let mut retry = Retry::new(&what, &self.stats);
            let result = loop {
                let routing = self.routing.current();
                let version = routing.version();
                let head = routing.chain(chain).and_then(|c| Some((c.version, c.serving.first()?.clone())));
                let error = match head {
                    None => self.nobody_serves(&what, chain),
                    Some((chain_version, head)) => {
                        let request = RemoveRangeRequest {
                            context: Some(self.context((lane.channel(), lane.sequence()))),
                            chain_id: chain.get(),
                            chain_version,
                            target_id: head.target.get(),
                            data_id: data.0,
                            generation: data.1,
                            from_index,
                        };
                        let call = Call {
                            method: method::REMOVE_RANGE,
                            head: request.encode_to_vec().into(),
                            send: None,
                            recv: None,
                            timeout: self.update_timeout,
                        };
                        match self.net.call(&head.address, call).await {
                            Ok(response) => break decode::<RemoveRangeReply>(&what, &response.head),
                            Err(error) => FsError::call(&what, error),
                        }
                    }
                };
                if !error.kind().is_retryable() {
                    break Err(error);
                }
                retry.again(error, self.routing.wait_newer(version, MOST_PATIENCE)).await?;
            };
            retry.done();
            lane.answered();
            let reply = result?;
            removed += u64::from(reply.removed);
            if !reply.remaining {
                return Ok(removed);
            }
        }
    }
}

fn key(chunk: ChunkId) -> ChunkKey {
    ChunkKey { data_id: chunk.data.get(), generation: chunk.generation.get(), index: chunk.index }
}

fn name(kind: UpdateKind) -> &'static str {
    match kind {
        UpdateKind::Write => "write",
        UpdateKind::Truncate => "truncation",
        UpdateKind::Remove => "removal",
        UpdateKind::Punch => "punch",
        UpdateKind::Replace | UpdateKind::Unspecified => "update",
    }
}

pub(crate) fn decode<M: Message + Default>(what: &str, head: &Bytes) -> Result<M, FsError> {
    M::decode(head.as_ref()).map_err(|error| FsError::protocol(what, error.to_string()))
}
