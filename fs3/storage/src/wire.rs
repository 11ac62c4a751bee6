//! Between the messages on the wire and the machine's values. Nothing that comes from a peer is
//! used before it passed here.

use firefly_net::Buf;
use firefly_proto::storage as pb;
use firefly_types::{
    AttemptEpoch, ChainId, ChainVersion, ChunkId, ClientId, DataId, ErrorKind, Generation, JobId,
    SessionEpoch, TargetId, WireError,
};
use fs3_core::target::{
    Context, Digest, Forward, Kind, MAX_CHUNK_BYTES, Meta, Record, RecordPage, Resolution, Resolve, Stamp,
    Token, Update, payload_crc,
};

pub(crate) fn bad(message: impl Into<String>) -> WireError {
    WireError::new(ErrorKind::InvalidArgument, message)
}

pub(crate) fn decode<M: prost::Message + Default>(head: &[u8]) -> Result<M, WireError> {
    M::decode(head).map_err(|e| bad(format!("the request cannot be read: {e}")))
}

pub(crate) fn chunk_id(key: Option<&pb::ChunkKey>) -> Result<ChunkId, WireError> {
    let key = key.ok_or_else(|| bad("the request names no chunk"))?;
    Ok(ChunkId { data: DataId(key.data_id), generation: Generation(key.generation), index: key.index })
}

pub(crate) fn chunk_key(id: ChunkId) -> pb::ChunkKey {
    pb::ChunkKey { data_id: id.data.0, generation: id.generation.0, index: id.index }
}

pub(crate) fn context(context: Option<&pb::RequestContext>) -> Result<Context, WireError> {
    let c = context.ok_or_else(|| bad("the request has no context"))?;
    Ok(Context {
        client: ClientId(c.client_id),
        session_epoch: SessionEpoch(c.session_epoch),
        channel: c.channel,
        sequence: c.sequence,
        attempt: AttemptEpoch(c.attempt_epoch),
        job: JobId(c.job_id),
    })
}

fn context_message(c: &Context) -> pb::RequestContext {
    pb::RequestContext {
        client_id: c.client.0,
        session_epoch: c.session_epoch.0,
        channel: c.channel,
        sequence: c.sequence,
        trace_id: 0,
        attempt_epoch: c.attempt.0,
        job_id: c.job.0,
    }
}

fn kind(raw: i32) -> Result<Kind, WireError> {
    Ok(match pb::UpdateKind::try_from(raw) {
        Ok(pb::UpdateKind::Write) => Kind::Write,
        Ok(pb::UpdateKind::Truncate) => Kind::Truncate,
        Ok(pb::UpdateKind::Remove) => Kind::Remove,
        Ok(pb::UpdateKind::Replace) => Kind::Replace,
        Ok(pb::UpdateKind::Punch) => Kind::Punch,
        Ok(pb::UpdateKind::Unspecified) | Err(_) => return Err(bad(format!("unknown kind of update {raw}"))),
    })
}

/// An update with its payload, which must be what its checksum says.
pub(crate) fn update(message: &pb::UpdateRequest, payload: Option<Buf>) -> Result<Update<Buf>, WireError> {
    let kind = kind(message.kind)?;
    let chunk = chunk_id(message.chunk.as_ref())?;
    let takes_bytes = matches!(kind, Kind::Write | Kind::Replace);
    let payload = payload.filter(|p| !p.is_empty());
    let bytes = payload.as_deref().unwrap_or_default();
    if !takes_bytes && payload.is_some() {
        return Err(bad("this kind of update takes no payload"));
    }
    let length = if takes_bytes { bytes.len() as u32 } else { message.length };
    if kind == Kind::Write && bytes.is_empty() {
        return Err(bad("a write needs a payload"));
    }
    if bytes.len() > MAX_CHUNK_BYTES as usize {
        return Err(bad(format!("a payload of {} bytes is larger than any chunk", bytes.len())));
    }
    let crc = match kind {
        Kind::Write => payload_crc(bytes),
        Kind::Replace => Digest::of(bytes),
        _ => message.crc32c,
    };
    if crc != message.crc32c {
        return Err(WireError::new(
            ErrorKind::InvalidArgument,
            format!(
                "the payload for chunk {chunk} has checksum {crc:08x}, the sender computed {:08x}: it was \
                 damaged on the way, or its buffer changed while it was sent; send it again",
                message.crc32c
            ),
        ));
    }
    let chunk_bytes = if kind == Kind::Replace { MAX_CHUNK_BYTES } else { message.chunk_bytes };
    let offset = if kind == Kind::Write || kind == Kind::Punch { message.offset } else { 0 };
    let context = context(message.context.as_ref())?;
    let length = if kind == Kind::Remove { 0 } else { length };
    Ok(Update { context, chunk, kind, offset, length, crc, chunk_bytes, payload })
}

/// Where a message goes.
#[derive(Clone, Copy)]
pub(crate) struct Address {
    pub(crate) chain: ChainId,
    pub(crate) target: TargetId,
}

pub(crate) fn forward_message(to: Address, forward: &Forward<Buf>, is_sync: bool) -> pb::ForwardRequest {
    let u = &forward.update;
    let kind = match u.kind {
        Kind::Write => pb::UpdateKind::Write,
        Kind::Truncate => pb::UpdateKind::Truncate,
        Kind::Remove => pb::UpdateKind::Remove,
        Kind::Replace => pb::UpdateKind::Replace,
        Kind::Punch => pb::UpdateKind::Punch,
    };
    pb::ForwardRequest {
        update: Some(pb::UpdateRequest {
            context: Some(context_message(&u.context)),
            chain_id: to.chain.0,
            chain_version: forward.chain_version.0,
            target_id: to.target.0,
            chunk: Some(chunk_key(u.chunk)),
            kind: kind.into(),
            offset: u.offset,
            length: u.length,
            crc32c: u.crc,
            chunk_bytes: u.chunk_bytes,
        }),
        version: forward.version,
        chunk_crc32c: forward.prefix.map_or(0, |m| m.digest),
        is_sync,
        from_target: forward.from.0,
        stamp_incarnation: forward.stamp.incarnation,
        stamp_sequence: forward.stamp.sequence,
        base_version: forward.base,
        prefix_durable: forward.prefix.is_some(),
        prefix_length: forward.prefix.map_or(0, |m| m.length),
    }
}

pub(crate) fn forward(message: &pb::ForwardRequest, payload: Option<Buf>) -> Result<Forward<Buf>, WireError> {
    let request = message.update.as_ref().ok_or_else(|| bad("the forward holds no update"))?;
    if message.version == 0 {
        return Err(bad("the forward has no version"));
    }
    let prefix = message.prefix_durable.then_some(Meta {
        version: message.version,
        length: message.prefix_length,
        digest: message.chunk_crc32c,
    });
    Ok(Forward {
        from: TargetId(message.from_target),
        chain_version: ChainVersion(request.chain_version),
        stamp: Stamp { incarnation: message.stamp_incarnation, sequence: message.stamp_sequence },
        base: message.base_version,
        version: message.version,
        update: update(request, payload)?,
        prefix,
    })
}

pub(crate) fn token_message(to: Address, token: &Token) -> pb::PrefixDurableRequest {
    pb::PrefixDurableRequest {
        chain_id: to.chain.0,
        chain_version: token.chain_version.0,
        target_id: to.target.0,
        chunk: Some(chunk_key(token.chunk)),
        version: token.meta.version,
        from_target: token.from.0,
        stamp_incarnation: token.stamp.incarnation,
        stamp_sequence: token.stamp.sequence,
        chunk_length: token.meta.length,
        chunk_crc32c: token.meta.digest,
    }
}

pub(crate) fn token(message: &pb::PrefixDurableRequest) -> Result<Token, WireError> {
    Ok(Token {
        from: TargetId(message.from_target),
        chain_version: ChainVersion(message.chain_version),
        chunk: chunk_id(message.chunk.as_ref())?,
        stamp: Stamp { incarnation: message.stamp_incarnation, sequence: message.stamp_sequence },
        meta: Meta { version: message.version, length: message.chunk_length, digest: message.chunk_crc32c },
    })
}

pub(crate) fn resolve_message(to: Address, query: &Resolve) -> pb::ResolveRequest {
    pb::ResolveRequest {
        chain_id: to.chain.0,
        chain_version: query.chain_version.0,
        target_id: to.target.0,
        from_target: query.from.0,
        chunk: Some(chunk_key(query.chunk)),
        base_version: query.base,
        version: query.version,
        removes: query.removes,
    }
}

pub(crate) fn resolve(message: &pb::ResolveRequest) -> Result<Resolve, WireError> {
    Ok(Resolve {
        from: TargetId(message.from_target),
        chain_version: ChainVersion(message.chain_version),
        chunk: chunk_id(message.chunk.as_ref())?,
        base: message.base_version,
        version: message.version,
        removes: message.removes,
    })
}

pub(crate) fn resolution_message(resolution: Resolution) -> pb::ResolveReply {
    let (state, meta) = match resolution {
        Resolution::Committed(meta) => (pb::ResolveState::Committed, meta),
        Resolution::Pending => (pb::ResolveState::Pending, None),
        Resolution::Unknown => (pb::ResolveState::Unknown, None),
    };
    let known = meta.unwrap_or_default();
    pb::ResolveReply {
        state: state.into(),
        exists: meta.is_some(),
        version: known.version,
        chunk_length: known.length,
        chunk_crc32c: known.digest,
    }
}

pub(crate) fn resolution(message: &pb::ResolveReply) -> Option<Resolution> {
    let meta = Meta { version: message.version, length: message.chunk_length, digest: message.chunk_crc32c };
    match pb::ResolveState::try_from(message.state) {
        Ok(pb::ResolveState::Committed) => Some(Resolution::Committed(message.exists.then_some(meta))),
        Ok(pb::ResolveState::Pending) => Some(Resolution::Pending),
        Ok(pb::ResolveState::Unknown) => Some(Resolution::Unknown),
        Ok(pb::ResolveState::Unspecified) | Err(_) => None,
    }
}

pub(crate) fn page_message(
    to: Address,
    from: TargetId,
    chain_version: ChainVersion,
    page: &RecordPage,
) -> pb::SyncRecordsRequest {
    let channel = |(client, channel, record): &(ClientId, u32, Record)| pb::ChannelRecord {
        client_id: client.0,
        channel: *channel,
        sequence: record.sequence,
        version: record.version,
        chunk_length: record.length,
    };
    pb::SyncRecordsRequest {
        chain_id: to.chain.0,
        chain_version: chain_version.0,
        target_id: to.target.0,
        from_target: from.0,
        channels: page.channels.iter().map(channel).collect(),
        sessions: page
            .sessions
            .iter()
            .map(|(client, epoch)| pb::SessionRecord { client_id: client.0, session_epoch: epoch.0 })
            .collect(),
        attempts: page
            .attempts
            .iter()
            .map(|(job, attempt)| pb::AttemptRecord { job_id: job.0, attempt_epoch: attempt.0 })
            .collect(),
        version_floor: page.version_floor,
    }
}

pub(crate) fn page(message: &pb::SyncRecordsRequest) -> RecordPage {
    let channel = |c: &pb::ChannelRecord| {
        let record = Record { sequence: c.sequence, version: c.version, length: c.chunk_length };
        (ClientId(c.client_id), c.channel, record)
    };
    RecordPage {
        channels: message.channels.iter().map(channel).collect(),
        sessions: message
            .sessions
            .iter()
            .map(|s| (ClientId(s.client_id), SessionEpoch(s.session_epoch)))
            .collect(),
        attempts: message.attempts.iter().map(|a| (JobId(a.job_id), AttemptEpoch(a.attempt_epoch))).collect(),
        version_floor: message.version_floor,
    }
}
