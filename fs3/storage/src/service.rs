//! The methods 0x02xx of the storage service.

use crate::node::{Node, TargetHost};
use crate::wire::{self, bad};
use firefly_net::{Buf, Reply, Request, Service};
use firefly_proto::{methods::storage as method, storage as pb};
use firefly_types::{ChainVersion, ChunkId, DataId, ErrorKind, Generation, TargetId, WireError};
use fs3_core::target::{Answer, Context, Event, Kind, MAX_CHUNK_BYTES, Meta, Update, payload_crc};
use futures::future::BoxFuture;
use prost::Message;
use std::sync::Arc;

/// Chunks that one RemoveRange takes: bounds the work of one request.
const REMOVE_STEP: usize = 64;

pub(crate) struct StorageService {
    pub(crate) node: Arc<Node>,
}

impl Service for StorageService {
    fn payload_limit(&self, method: u16) -> usize {
        match method {
            method::UPDATE | method::FORWARD => MAX_CHUNK_BYTES as usize,
            _ => 0,
        }
    }

    fn handle<'a>(&'a self, request: Request) -> BoxFuture<'a, Result<Reply, WireError>> {
        Box::pin(async move {
            match request.method {
                method::READ => self.read(request).await,
                method::UPDATE => self.update(request).await,
                method::FORWARD => self.forward(request).await,
                method::PREFIX_DURABLE => self.prefix_durable(&request).await,
                method::REMOVE_RANGE => self.remove_range(&request).await,
                method::QUERY_LAST_CHUNK => self.query_last_chunk(&request),
                method::SYNC_DONE => self.sync_done(&request).await,
                method::RESOLVE => self.resolve(&request).await,
                method::SYNC_RECORDS => self.sync_records(&request).await,
                other => Err(WireError::new(
                    ErrorKind::Unsupported,
                    format!("the storage service has no method {other:#06x}: are both sides of one release?"),
                )),
            }
        })
    }
}

impl StorageService {
    fn host(&self, target: u32) -> Result<Arc<TargetHost>, WireError> {
        self.node.host(TargetId(target))
    }

    async fn read(&self, request: Request) -> Result<Reply, WireError> {
        let message: pb::ReadRequest = wire::decode(&request.head)?;
        let host = self.host(message.target_id)?;
        let context = wire::context(message.context.as_ref())?;
        let chunk = wire::chunk_id(message.chunk.as_ref())?;
        let length = message.length.min(u32::try_from(request.reply_capacity).unwrap_or(u32::MAX));
        let version = ChainVersion(message.chain_version);
        let (meta, data, dirty) =
            host.read(&context, version, chunk, message.offset, length, self.node.pool()).await?;
        let meta = meta.unwrap_or_default();
        let reply = pb::ReadReply {
            version: meta.version,
            chunk_length: meta.length,
            crc32c: payload_crc(data.as_deref().unwrap_or_default()),
            dirty,
        };
        Ok(Reply { head: reply.encode_to_vec().into(), data })
    }

    async fn update(&self, request: Request) -> Result<Reply, WireError> {
        let message: pb::UpdateRequest = wire::decode(&request.head)?;
        let host = self.host(message.target_id)?;
        // Client updates may hold half of the memory only: forwards of other heads need the rest,
        // or two nodes that wait for each other would wait for ever.
        let bytes = request.payload.as_ref().map_or(0, |p| p.len());
        let _budget = self.node.admit_bytes(bytes)?;
        let update = wire::update(&message, request.payload.map(Buf::from))?;
        if update.context.client.0 == 0 {
            return Err(bad("an update needs a client id: open a session first"));
        }
        let chain_version = ChainVersion(message.chain_version);
        let meta = updated(host.ask(|reply| Event::Update { reply, chain_version, update }).await?)?;
        let reply = pb::UpdateReply { version: meta.version, chunk_length: meta.length };
        Ok(Reply::head(reply.encode_to_vec()))
    }

    async fn forward(&self, request: Request) -> Result<Reply, WireError> {
        let message: pb::ForwardRequest = wire::decode(&request.head)?;
        let target = message.update.as_ref().map_or(0, |u| u.target_id);
        let host = self.host(target)?;
        let forward = wire::forward(&message, request.payload.map(Buf::from))?;
        let meta = updated(host.ask(|reply| Event::Forward { reply, forward }).await?)?;
        let reply =
            pb::ForwardReply { version: meta.version, chunk_length: meta.length, chunk_crc32c: meta.digest };
        Ok(Reply::head(reply.encode_to_vec()))
    }

    async fn prefix_durable(&self, request: &Request) -> Result<Reply, WireError> {
        let message: pb::PrefixDurableRequest = wire::decode(&request.head)?;
        let token = wire::token(&message)?;
        self.host(message.target_id)?.ask(|reply| Event::Token { reply, token }).await?;
        Ok(Reply::head(pb::PrefixDurableReply {}.encode_to_vec()))
    }

    async fn resolve(&self, request: &Request) -> Result<Reply, WireError> {
        let message: pb::ResolveRequest = wire::decode(&request.head)?;
        let query = wire::resolve(&message)?;
        let host = self.host(message.target_id)?;
        match host.ask(|reply| Event::Resolve { reply, query }).await? {
            Answer::Resolved(resolution) => {
                Ok(Reply::head(wire::resolution_message(resolution).encode_to_vec()))
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn sync_records(&self, request: &Request) -> Result<Reply, WireError> {
        let message: pb::SyncRecordsRequest = wire::decode(&request.head)?;
        let (from, chain_version) = (TargetId(message.from_target), ChainVersion(message.chain_version));
        let page = wire::page(&message);
        let host = self.host(message.target_id)?;
        host.ask(|reply| Event::SyncRecords { reply, from, chain_version, page }).await?;
        Ok(Reply::head(pb::SyncRecordsReply {}.encode_to_vec()))
    }

    async fn sync_done(&self, request: &Request) -> Result<Reply, WireError> {
        let message: pb::SyncDoneRequest = wire::decode(&request.head)?;
        let (from, chain_version) = (TargetId(message.from_target), ChainVersion(message.chain_version));
        let host = self.host(message.target_id)?;
        host.ask(|reply| Event::SyncDone { reply, from, chain_version }).await?;
        Ok(Reply::head(pb::SyncDoneReply {}.encode_to_vec()))
    }

    async fn remove_range(&self, request: &Request) -> Result<Reply, WireError> {
        let message: pb::RemoveRangeRequest = wire::decode(&request.head)?;
        let host = self.host(message.target_id)?;
        let context = wire::context(message.context.as_ref())?;
        let chain_version = ChainVersion(message.chain_version);
        let file = ChunkId {
            data: DataId(message.data_id),
            generation: Generation(message.generation),
            index: message.from_index,
        };
        let found = host.list(&context, chain_version, file, REMOVE_STEP + 1)?;
        let remaining = found.len() > REMOVE_STEP;
        let removals = found.iter().take(REMOVE_STEP).map(|(chunk, _)| {
            // Removing twice is removing once: no record of the request is needed.
            let update = Update {
                context: Context::default(),
                chunk: *chunk,
                kind: Kind::Remove,
                offset: 0,
                length: 0,
                crc: 0,
                chunk_bytes: MAX_CHUNK_BYTES,
                payload: None,
            };
            host.ask(move |reply| Event::Update { reply, chain_version, update })
        });
        let mut removed = 0;
        for result in futures::future::join_all(removals).await {
            result?;
            removed += 1;
        }
        Ok(Reply::head(pb::RemoveRangeReply { removed, remaining }.encode_to_vec()))
    }

    fn query_last_chunk(&self, request: &Request) -> Result<Reply, WireError> {
        let message: pb::QueryLastChunkRequest = wire::decode(&request.head)?;
        let host = self.host(message.target_id)?;
        let context = wire::context(message.context.as_ref())?;
        let file =
            ChunkId { data: DataId(message.data_id), generation: Generation(message.generation), index: 0 };
        let (last, chunks, bytes) = host.summary(&context, ChainVersion(message.chain_version), file)?;
        let reply = pb::QueryLastChunkReply {
            exists: last.is_some(),
            index: last.map_or(0, |(chunk, _)| chunk.index),
            chunk_length: last.map_or(0, |(_, meta)| meta.length),
            chunks,
            bytes,
        };
        Ok(Reply::head(reply.encode_to_vec()))
    }
}

fn updated(answer: Answer) -> Result<Meta, WireError> {
    match answer {
        Answer::Updated(meta) => Ok(meta),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(answer: &Answer) -> WireError {
    WireError::new(ErrorKind::Internal, format!("the target answered something else: {answer:?}"))
}
