//! The machine's state, and what the head and the clients see of it.

use super::copy::{Fill, Filling};
use super::records::Records;
use super::state::{Active, Mutation, Out, Pending, Queued, Role, Successor, TargetOptions};
use super::types::*;
use firefly_types::{ChainVersion, ChunkId, DataId, ErrorKind, Generation, Nanos, TargetId, WireError};
use std::collections::BTreeMap;
use std::time::Duration;

/// Longer than any message along the chain can be under way: its call has a time-out of a few
/// seconds, and a connection that stalls is given up after 15.
const REMEMBER_REMOVED: Duration = Duration::from_secs(30);

/// Which forwards of a chunk speak of a time before its removal.
#[derive(Clone, Copy)]
enum Removed {
    /// Those of this version or an older one.
    At(u64),
    /// Those with an older stamp. A predecessor reports to the target that it fills as absent also
    /// what never existed, and that may be created later with a lower version than the absence was
    /// reported with.
    By(Stamp),
}

/// One replica of one chain.
pub struct Target<B> {
    pub(super) id: TargetId,
    pub(super) options: TargetOptions,
    pub(super) incarnation: u64,
    pub(super) offline: Option<String>,
    lease_until: Nanos,
    pub(super) chain: Option<ChainView>,
    pub(super) committed: BTreeMap<ChunkId, Meta>,
    pub(super) version_floor: u64,
    /// Chunks removed a short while ago under this membership: a forward that
    /// was delayed must not bring one back. Not `version_floor`, which is of all chunks: another
    /// chunk's creation may be on its way with a lower version.
    removed: BTreeMap<ChunkId, (Removed, Nanos)>,
    removed_swept: Nanos,
    pub(super) records: Records,
    pub(super) active: BTreeMap<ChunkId, Active<B>>,
    pub(super) predecessor_incarnation: u64,
    pub(super) fill: Option<Fill>,
    pub(super) filling: Option<Filling>,
    counter: u64,
    pub(super) now: Nanos,
    pub(super) actions: Vec<Action<B>>,
}

pub(super) fn error(kind: ErrorKind, message: impl Into<String>) -> WireError {
    WireError::new(kind, message)
}

impl<B: Clone> Target<B> {
    /// A target that starts with what its disk holds. `incarnation` must be higher than at any
    /// earlier start. It serves nothing before it has a chain and a lease.
    pub fn new(id: TargetId, incarnation: u64, options: TargetOptions, recovered: Recovered) -> Self {
        let mut records = Records::default();
        records.merge(&recovered.records);
        let mut target = Self {
            id,
            options,
            incarnation,
            offline: None,
            lease_until: Nanos::ZERO,
            chain: None,
            committed: recovered.committed.into_iter().collect(),
            version_floor: recovered.records.version_floor,
            removed: BTreeMap::new(),
            removed_swept: Nanos::ZERO,
            records,
            active: BTreeMap::new(),
            predecessor_incarnation: 0,
            fill: None,
            filling: None,
            counter: 0,
            now: Nanos::ZERO,
            actions: Vec::new(),
        };
        for found in recovered.pending {
            let touch = target.next_id();
            let pending = Pending {
                base: found.base,
                version: found.meta.version,
                context: found.context,
                removes: found.removes,
                update: None,
                at_once: false,
                write: None,
                written: Some(found.meta),
                prefix: None,
                passed: false,
                may_be_committed: true,
                stamp_in: None,
                out: Out::Idle,
                token_sent: false,
                down: None,
                doomed: None,
                clients: Vec::new(),
                upstream: Vec::new(),
                touch,
                resolve_at: Nanos::ZERO,
                reports_absence: false,
            };
            target.active.entry(found.chunk).or_default().pending = Some(pending);
        }
        target
    }

    /// Takes in what happened and returns what to do. The driver carries the actions out in
    /// order, and `Commit` and `Drop` before the next step.
    pub fn step(&mut self, event: Event<B>, now: Nanos) -> Vec<Action<B>> {
        self.now = now.max(self.now);
        match event {
            Event::Chain(view) => self.on_chain(view),
            Event::Lease(until) => self.lease_until = until.max(self.lease_until),
            Event::Update { reply, chain_version, update } => self.on_update(reply, chain_version, update),
            Event::Forward { reply, forward } => self.on_forward(reply, forward),
            Event::Token { reply, token } => self.on_token(reply, token),
            Event::Resolve { reply, query } => self.on_resolve(reply, query),
            Event::SyncRecords { reply, from, chain_version, page } => {
                self.on_sync_records(reply, from, chain_version, page)
            }
            Event::SyncDone { reply, from, chain_version } => self.on_sync_done(reply, from, chain_version),
            Event::ForwardAnswer { chunk, stamp, result } => self.on_forward_answer(chunk, stamp, result),
            Event::TokenAnswer { chunk, stamp, delivered } => self.on_token_answer(chunk, stamp, delivered),
            Event::ResolveAnswer { chunk, touch, resolution } => {
                self.on_resolve_answer(chunk, touch, resolution)
            }
            Event::SyncAnswer { id, accepted } => self.on_sync_answer(id, accepted),
            Event::Written { chunk, id, result } => self.on_written(chunk, id, result),
            Event::Content { chunk, id, content } => self.on_content(chunk, id, content),
            Event::Flushed { id, ok } => self.on_flushed(id, ok),
            Event::Tick => self.on_tick(),
        }
        std::mem::take(&mut self.actions)
    }

    /// Whether a read may be served now, and what of. The driver reads the granted version from
    /// the engine before the next step.
    pub fn read(
        &mut self,
        context: &Context,
        chain_version: ChainVersion,
        chunk: ChunkId,
        now: Nanos,
    ) -> Result<ReadGrant, WireError> {
        self.now = now.max(self.now);
        let successor = self.check_serving(context, chain_version)?;
        let meta = self.committed.get(&chunk).copied();
        let Some(pending) = self.active.get(&chunk).and_then(|a| a.pending.as_ref()) else {
            return Ok(ReadGrant { meta, dirty: false });
        };
        if matches!(successor, Successor::Serving(_)) {
            return Ok(ReadGrant { meta, dirty: true });
        }
        // A target that is being filled has it already, and may have become the tail without this
        // one knowing yet.
        let filled = pending.passed
            && matches!(successor, Successor::Syncing(_))
            && self.options.mutation != Some(Mutation::ServeHandedOver);
        let unsettled = pending.may_be_committed || filled;
        if unsettled && self.options.mutation != Some(Mutation::ServeUnresolved) {
            return Err(error(
                ErrorKind::Unavailable,
                format!(
                    "chunk {chunk}: version {} is being settled after a change of the chain: ask again",
                    pending.version
                ),
            ));
        }
        Ok(ReadGrant { meta, dirty: false })
    }

    /// Whether a request about this target's chunks (a count, a listing) may be served now.
    pub fn check_request(
        &mut self,
        context: &Context,
        chain_version: ChainVersion,
        now: Nanos,
    ) -> Result<(), WireError> {
        self.now = now.max(self.now);
        self.check_serving(context, chain_version).map(|_| ())
    }

    fn check_serving(&mut self, context: &Context, version: ChainVersion) -> Result<Successor, WireError> {
        self.check_alive()?;
        self.check_version(version)?;
        let Role::Serving { successor, .. } = self.role() else {
            return Err(error(
                ErrorKind::Stale,
                format!("target {} does not serve: refresh the routing table", self.id),
            ));
        };
        self.records.admit(context)?;
        Ok(successor)
    }

    /// Offline and lease, which guard every request.
    pub(super) fn check_alive(&self) -> Result<(), WireError> {
        if let Some(reason) = &self.offline {
            return Err(error(ErrorKind::Unavailable, format!("target {} is offline: {reason}", self.id)));
        }
        if self.now >= self.lease_until && self.options.mutation != Some(Mutation::IgnoreLease) {
            return Err(error(
                ErrorKind::Unavailable,
                format!("target {} has no lease from the manager now: ask again or elsewhere", self.id),
            ));
        }
        Ok(())
    }

    pub(super) fn check_version(&self, version: ChainVersion) -> Result<(), WireError> {
        match &self.chain {
            Some(chain) if chain.version == version => Ok(()),
            Some(chain) => Err(error(
                ErrorKind::Stale,
                format!(
                    "chain {} is at {}, the request at {version}: refresh and ask again",
                    chain.id, chain.version
                ),
            )),
            None => {
                Err(error(ErrorKind::Unavailable, format!("target {} does not know its chain yet", self.id)))
            }
        }
    }

    pub(super) fn role(&self) -> Role {
        let Some(chain) = &self.chain else { return Role::Out };
        let last = chain.serving.last().copied();
        if let Some(at) = chain.serving.iter().position(|t| *t == self.id) {
            let predecessor = at.checked_sub(1).map(|i| chain.serving[i]);
            let successor = match (chain.serving.get(at + 1), chain.syncing) {
                (Some(next), _) => Successor::Serving(*next),
                (None, Some(next)) => Successor::Syncing(next),
                (None, None) => Successor::None,
            };
            return Role::Serving { predecessor, successor };
        }
        match last {
            Some(predecessor) if chain.syncing == Some(self.id) => Role::Syncing { predecessor },
            _ => Role::Out,
        }
    }

    pub(super) fn next_id(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    pub(super) fn reply(&mut self, reply: Handle, result: Result<Answer, WireError>) {
        self.actions.push(Action::Reply { reply, result });
    }

    pub(super) fn go_offline(&mut self, reason: String) {
        if self.offline.is_some() {
            return;
        }
        let refusal = error(ErrorKind::Unavailable, format!("target {} went offline: {reason}", self.id));
        for active in self.active.values_mut() {
            let waiting = active.queue.drain(..).flat_map(|q| q.reply);
            let held =
                active.pending.iter_mut().flat_map(|p| p.clients.drain(..).chain(p.upstream.drain(..)));
            let next = active.next.take().map(|(reply, _)| reply);
            for reply in waiting.chain(held).chain(next) {
                self.actions.push(Action::Reply { reply, result: Err(refusal.clone()) });
            }
        }
        self.fill = None;
        self.actions.push(Action::Offline(reason.clone()));
        self.offline = Some(reason);
    }

    fn on_update(&mut self, reply: Handle, version: ChainVersion, update: Update<B>) {
        if let Err(refusal) = self.admit_update(version, &update) {
            return self.reply(reply, Err(refusal));
        }
        match self.recorded(&update.context) {
            Some(Ok(answer)) => return self.reply(reply, Ok(answer)),
            Some(Err(refusal)) => return self.reply(reply, Err(refusal)),
            None => {}
        }
        let chunk = update.chunk;
        let active = self.active.entry(chunk).or_default();
        if let Some(request) = update.context.request() {
            // A retry of something under way waits with it.
            if let Some(pending) = active.pending.as_mut().filter(|p| p.context.request() == Some(request)) {
                pending.clients.push(reply);
                return;
            }
            if let Some(queued) =
                active.queue.iter_mut().find(|q| q.update.context.request() == Some(request))
            {
                queued.reply.push(reply);
                return;
            }
        }
        if active.queue.len() >= self.options.queue {
            let refusal = error(
                ErrorKind::Unavailable,
                format!("chunk {chunk} has {} updates waiting already: ask again later", self.options.queue),
            );
            return self.reply(reply, Err(refusal));
        }
        active.queue.push_back(Queued { reply: vec![reply], chain_version: version, update });
        self.start_next(chunk);
    }

    fn admit_update(&mut self, version: ChainVersion, update: &Update<B>) -> Result<(), WireError> {
        self.check_serving(&update.context, version)?;
        let Role::Serving { predecessor: None, .. } = self.role() else {
            return Err(error(
                ErrorKind::Stale,
                format!("target {} is not the head of its chain: refresh the routing table", self.id),
            ));
        };
        self.check_replicas()?;
        let end = u64::from(update.offset) + u64::from(update.length);
        if update.chunk_bytes > MAX_CHUNK_BYTES || end > u64::from(update.chunk_bytes) {
            return Err(error(
                ErrorKind::InvalidArgument,
                format!(
                    "update of bytes {}..{end} does not fit a chunk of {} bytes (limit {MAX_CHUNK_BYTES})",
                    update.offset, update.chunk_bytes
                ),
            ));
        }
        if update.kind == Kind::Replace {
            return Err(error(ErrorKind::InvalidArgument, "whole-chunk replacement is for replicas only"));
        }
        Ok(())
    }

    /// Whether enough replicas serve for a client's update.
    fn check_replicas(&self) -> Result<(), WireError> {
        match &self.chain {
            Some(chain) if chain.serving.len() < chain.min_write_replicas as usize => Err(error(
                ErrorKind::Unavailable,
                format!(
                    "chain {} has {} serving replicas and writes need {}: wait for one to return",
                    chain.id,
                    chain.serving.len(),
                    chain.min_write_replicas
                ),
            )),
            _ => Ok(()),
        }
    }

    /// What the records say: done before, too old, or (`None`) new.
    fn recorded(&self, context: &Context) -> Option<Result<Answer, WireError>> {
        context.request()?;
        let record = self.records.get(context)?;
        if record.sequence == context.sequence {
            let meta = Meta { version: record.version, length: record.length, digest: 0 };
            return Some(Ok(Answer::Updated(meta)));
        }
        (context.sequence < record.sequence).then(|| {
            Err(error(
                ErrorKind::Stale,
                format!(
                    "request {} of client {} channel {} came after {}: it is a late duplicate",
                    context.sequence, context.client, context.channel, record.sequence
                ),
            ))
        })
    }

    /// Begins the next queued update if the chunk is free.
    pub(super) fn start_next(&mut self, chunk: ChunkId) {
        loop {
            let Some(active) = self.active.get_mut(&chunk) else { return };
            let copying = matches!(active.copy, Some(Out::Reading(_) | Out::Sent(_)));
            if active.pending.is_some() || copying {
                return;
            }
            let Some(queued) = active.queue.pop_front() else {
                if active.copy.is_none() && active.early.is_none() && active.next.is_none() {
                    self.active.remove(&chunk);
                }
                return;
            };
            // Membership, lease and records may have changed while it waited.
            let admitted = self.admit_update(queued.chain_version, &queued.update);
            let early = match (admitted, self.recorded(&queued.update.context)) {
                (Err(refusal), _) => Some(Err(refusal)),
                (Ok(()), done @ Some(_)) => done,
                (Ok(()), None) => self.without_effect(&queued.update).map(Ok),
            };
            if let Some(result) = early {
                for reply in queued.reply {
                    self.reply(reply, result.clone());
                }
                continue;
            }
            let base = self.committed.get(&chunk).map_or(0, |m| m.version);
            let version = if base == 0 { self.version_floor } else { base } + 1;
            self.install(chunk, base, version, queued.update, false, queued.reply, None);
            self.advance(chunk);
            return;
        }
    }

    /// Removing or punching what does not exist changes nothing and needs no version.
    fn without_effect(&self, update: &Update<B>) -> Option<Answer> {
        let absent = !self.committed.contains_key(&update.chunk);
        (absent && matches!(update.kind, Kind::Remove | Kind::Punch))
            .then(|| Answer::Updated(Meta::default()))
    }

    /// Makes `update` the chunk's pending one and starts to write it.
    #[allow(clippy::too_many_arguments, reason = "one call per role; a struct would only rename them")]
    pub(super) fn install(
        &mut self,
        chunk: ChunkId,
        base: u64,
        version: u64,
        update: Update<B>,
        at_once: bool,
        clients: Vec<Handle>,
        upstream: Option<(Handle, Stamp)>,
    ) {
        let id = self.next_id();
        let pending = Pending {
            base,
            version,
            context: update.context,
            removes: update.kind == Kind::Remove,
            update: Some(update.clone()),
            at_once,
            write: Some(id),
            written: None,
            prefix: None,
            passed: false,
            may_be_committed: false,
            stamp_in: upstream.map(|(_, stamp)| stamp),
            out: Out::Idle,
            token_sent: false,
            down: None,
            doomed: None,
            clients,
            upstream: upstream.map(|(reply, _)| reply).into_iter().collect(),
            touch: id,
            resolve_at: self.now.after(self.options.resolve),
            reports_absence: false,
        };
        self.active.entry(chunk).or_default().pending = Some(pending);
        let mut stored = update;
        if self.options.mutation == Some(Mutation::VolatileRecords) {
            stored.context = Context::default();
        }
        self.actions.push(Action::Write { id, base, version, update: stored, commit: at_once });
    }

    /// The pending update takes effect here.
    pub(super) fn commit(&mut self, chunk: ChunkId) {
        let Some(pending) = self.active.get_mut(&chunk).and_then(|a| a.pending.take()) else { return };
        let meta = pending.written.unwrap_or(Meta { version: pending.version, ..Meta::default() });
        if pending.removes {
            self.committed.remove(&chunk);
            self.version_floor = self.version_floor.max(pending.version);
            let removed = match pending.stamp_in.filter(|_| pending.reports_absence) {
                Some(stamp) => Removed::By(stamp),
                None => Removed::At(pending.version),
            };
            self.removed.insert(chunk, (removed, self.now));
        } else {
            self.committed.insert(chunk, meta);
        }
        self.records.commit(&pending.context, meta.version, meta.length);
        if !pending.at_once {
            self.actions.push(Action::Commit { chunk, version: pending.version });
        }
        // The chain may have shrunk since the update was admitted. It has taken effect, but is not
        // acknowledged on fewer replicas than writes need: the retry finds its record once the
        // chain has healed.
        let too_few = self.check_replicas().err();
        for reply in pending.clients {
            self.reply(reply, too_few.clone().map_or(Ok(Answer::Updated(meta)), Err));
        }
        for reply in pending.upstream {
            self.reply(reply, Ok(Answer::Updated(meta)));
        }
        let reached = pending.down.is_some() || self.options.mutation == Some(Mutation::FillOmitsPending);
        self.settled_for_fill(chunk, reached);
        self.after_pending(chunk);
    }

    /// The pending update never was.
    pub(super) fn abandon(&mut self, chunk: ChunkId, refusal: WireError) {
        let Some(pending) = self.active.get_mut(&chunk).and_then(|a| a.pending.take()) else { return };
        self.actions.push(Action::Drop { chunk, version: pending.version });
        for reply in pending.clients.into_iter().chain(pending.upstream) {
            self.reply(reply, Err(refusal.clone()));
        }
        self.after_pending(chunk);
    }

    fn after_pending(&mut self, chunk: ChunkId) {
        if let Some((reply, forward)) = self.active.get_mut(&chunk).and_then(|a| a.next.take()) {
            self.on_forward(reply, forward);
        }
        self.start_next(chunk);
        self.pump_fill();
    }

    fn on_written(&mut self, chunk: ChunkId, id: u64, result: Result<Meta, WriteError>) {
        let Some(active) = self.active.get_mut(&chunk) else { return };
        let Some(pending) = active.pending.as_mut().filter(|p| p.write == Some(id)) else { return };
        pending.write = None;
        match result {
            Ok(meta) => pending.written = Some(meta),
            Err(WriteError::Failed) => return self.go_offline("its disk failed a write or a flush".into()),
            Err(WriteError::NoSpace) if pending.at_once => {
                return self.go_offline("its disk filled up while it was being filled".into());
            }
            Err(WriteError::NoSpace) => {
                return self.abandon(
                    chunk,
                    error(ErrorKind::NoSpace, format!("target {} has no room left", self.id)),
                );
            }
        }
        if pending.at_once {
            return self.commit(chunk);
        }
        if let Some(refusal) = pending.doomed.take() {
            return self.abandon(chunk, refusal);
        }
        if let Some((reply, forward)) = active.next.take() {
            return self.on_forward(reply, forward);
        }
        self.advance(chunk);
    }

    fn on_chain(&mut self, view: ChainView) {
        if self.chain.as_ref().is_some_and(|c| c.version >= view.version) || self.offline.is_some() {
            return;
        }
        let predecessor_of = |role| match role {
            Role::Serving { predecessor, .. } => predecessor,
            Role::Syncing { predecessor } => Some(predecessor),
            Role::Out => None,
        };
        let before = predecessor_of(self.role());
        let stale = error(
            ErrorKind::Stale,
            format!("chain {} changed to {}: refresh and ask again", view.id, view.version),
        );
        self.chain = Some(view);
        self.removed.clear();
        let role = self.role();
        if predecessor_of(role) != before {
            self.predecessor_incarnation = 0;
        }
        self.fill = None;
        self.filling = matches!(role, Role::Syncing { .. }).then(Filling::default);
        let head = matches!(role, Role::Serving { predecessor: None, .. });
        let chunks: Vec<ChunkId> = self.active.keys().copied().collect();
        for chunk in &chunks {
            let touch = self.next_id();
            let now = self.now;
            let Some(active) = self.active.get_mut(chunk) else { continue };
            let mut refused: Vec<Handle> = active.queue.drain(..).flat_map(|q| q.reply).collect();
            refused.extend(active.next.take().map(|(reply, _)| reply));
            active.copy = None;
            active.early = None;
            if let Some(pending) = &mut active.pending {
                refused.append(&mut pending.upstream);
                if !head {
                    refused.append(&mut pending.clients);
                }
                pending.may_be_committed |= pending.passed;
                // Tokens are established anew: the predecessors are others now.
                pending.prefix = None;
                pending.token_sent = false;
                pending.stamp_in = None;
                pending.out = Out::Idle;
                pending.down = None;
                pending.touch = touch;
                pending.resolve_at = now;
            }
            for reply in refused {
                self.reply(reply, Err(stale.clone()));
            }
        }
        if let Role::Serving { successor: Successor::Syncing(to), .. } = role {
            // What is pending counts too: it may turn out to be committed without passing through
            // here again (a copy that was still being written, an answer from the predecessor).
            let counts = self.options.mutation != Some(Mutation::FillOmitsPending);
            let pending = self.active.iter().filter(|(_, a)| a.pending.is_some() && counts);
            let chunks = self.committed.keys().chain(pending.map(|(chunk, _)| chunk));
            self.fill = Some(Fill::new(to, chunks.copied()));
        }
        for chunk in chunks {
            self.advance(chunk);
            self.start_next(chunk);
        }
        self.ask_about_pending();
        self.pump_fill();
    }

    /// Whether a forward speaks of a time before the chunk's removal.
    pub(super) fn is_before_removal(&self, forward: &Forward<B>) -> bool {
        self.removed.get(&forward.update.chunk).is_some_and(|(removed, _)| match removed {
            Removed::At(version) => forward.version <= *version,
            Removed::By(stamp) => forward.stamp < *stamp,
        })
    }

    fn on_tick(&mut self) {
        let now = self.now;
        if now.since(self.removed_swept) > REMEMBER_REMOVED / 4 {
            self.removed_swept = now;
            self.removed.retain(|_, (_, since)| now.since(*since) < REMEMBER_REMOVED);
        }
        let mut due = Vec::new();
        for (chunk, active) in &mut self.active {
            if active.early.as_ref().is_some_and(|(_, since)| now.since(*since) > Duration::from_secs(5)) {
                active.early = None;
                due.push(*chunk);
            }
            if let Some(pending) = &mut active.pending {
                if matches!(pending.out, Out::Failed(at) if at <= now) {
                    pending.out = Out::Idle;
                    due.push(*chunk);
                } else if !pending.token_sent && pending.prefix.is_some() {
                    due.push(*chunk);
                }
            }
            if matches!(active.copy, Some(Out::Failed(at)) if at <= now) {
                active.copy = None;
                due.push(*chunk);
            }
        }
        for chunk in due {
            self.advance(chunk);
            self.start_next(chunk);
        }
        self.ask_about_pending();
        self.pump_fill();
    }

    /// The target's id.
    pub fn id(&self) -> TargetId {
        self.id
    }

    /// The chain as this target knows it.
    pub fn chain(&self) -> Option<&ChainView> {
        self.chain.as_ref()
    }

    /// Why it is offline, if it is.
    pub fn offline(&self) -> Option<&str> {
        self.offline.as_deref()
    }

    /// Committed chunks of one file generation from an index on, in order.
    pub fn chunks_of(
        &self,
        data: DataId,
        generation: Generation,
        from: u32,
    ) -> impl Iterator<Item = (ChunkId, Meta)> + '_ {
        let first = ChunkId { data, generation, index: from };
        let last = ChunkId { data, generation, index: u32::MAX };
        self.committed.range(first..=last).map(|(chunk, meta)| (*chunk, *meta))
    }

    /// All committed chunks.
    pub fn committed(&self) -> &BTreeMap<ChunkId, Meta> {
        &self.committed
    }

    /// Number of chunks with a pending update or something waiting.
    pub fn busy_chunks(&self) -> usize {
        self.active.len()
    }
}
