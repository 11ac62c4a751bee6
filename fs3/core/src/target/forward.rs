//! Updates, tokens and questions that travel along the chain.

use super::machine::{Target, error};
use super::state::{Active, Mutation, Out, Pending, Role, Successor};
use super::types::*;
use firefly_types::{ChainVersion, ChunkId, ErrorKind, TargetId, WireError};

impl<B: Clone> Target<B> {
    /// Does for a pending update whatever its state allows: forward, pass the token, commit.
    pub(super) fn advance(&mut self, chunk: ChunkId) {
        if self.offline.is_some() {
            return;
        }
        let Role::Serving { predecessor, successor } = self.role() else { return };
        let Some(chain_version) = self.chain.as_ref().map(|c| c.version) else { return };
        let mutation = self.options.mutation;
        let Some(pending) = self.active.get_mut(&chunk).and_then(|a| a.pending.as_mut()) else { return };
        if pending.at_once {
            return;
        }
        if predecessor.is_none() || mutation == Some(Mutation::OmitToken) {
            pending.prefix = pending.written;
        }
        if let (Some(above), Some(own)) = (pending.prefix, pending.written)
            && above != own
        {
            let version = pending.version;
            return self.go_offline(format!(
                "its copy of chunk {chunk} differs from its predecessor's at version {version}"
            ));
        }
        let prefix_durable = pending.prefix.is_some() && pending.written.is_some();
        let mut send = None;
        if pending.out == Out::Idle {
            let (to, ready) = match successor {
                Successor::None => (None, false),
                Successor::Serving(to) => (Some(to), true),
                // It commits what it gets at once, so it gets only what no predecessor can lose.
                Successor::Syncing(to) => (Some(to), prefix_durable),
            };
            let whole = matches!(successor, Successor::Syncing(_));
            if let Some(to) = to.filter(|_| ready) {
                if pending.removes {
                    send = Some((
                        to,
                        Update { kind: Kind::Remove, payload: None, ..bare(chunk, pending.context) },
                    ));
                } else if let Some(update) = pending.update.as_ref().filter(|_| !whole) {
                    send = Some((to, update.clone()));
                } else if pending.written.is_some() {
                    self.read_pending(chunk);
                    return;
                }
            }
        }
        if let Some((to, update)) = send {
            self.send_pending(chunk, to, update);
            return self.advance(chunk);
        }
        if let (Out::Sent(stamp), Successor::Serving(to), false, true, Some(meta)) =
            (pending.out, successor, pending.token_sent, prefix_durable, pending.written)
        {
            pending.token_sent = true;
            pending.passed = true;
            let token = Token { from: self.id, chain_version, chunk, stamp, meta };
            self.actions.push(Action::Token { to, token });
        }
        let below = successor == Successor::None
            || pending.down.is_some()
            || (mutation == Some(Mutation::CommitBeforeSuccessor) && predecessor.is_none());
        if prefix_durable && below {
            self.commit(chunk);
        }
    }

    fn read_pending(&mut self, chunk: ChunkId) {
        let id = self.next_id();
        if let Some(pending) = self.active.get_mut(&chunk).and_then(|a| a.pending.as_mut()) {
            pending.out = Out::Reading(id);
            self.actions.push(Action::Read { id, chunk, pending: true });
        }
    }

    /// Forwards the pending update, with the token if it is there already.
    fn send_pending(&mut self, chunk: ChunkId, to: TargetId, update: Update<B>) {
        let stamp = Stamp { incarnation: self.incarnation, sequence: self.next_id() };
        let is_sync = matches!(self.role(), Role::Serving { successor: Successor::Syncing(_), .. });
        let Some(chain_version) = self.chain.as_ref().map(|c| c.version) else { return };
        let Some(pending) = self.active.get_mut(&chunk).and_then(|a| a.pending.as_mut()) else { return };
        let prefix = pending.prefix.and(pending.written);
        pending.out = Out::Sent(stamp);
        pending.token_sent = prefix.is_some();
        pending.passed |= prefix.is_some();
        let (base, version) = (pending.base, pending.version);
        let forward = Forward { from: self.id, chain_version, stamp, base, version, update, prefix };
        self.actions.push(Action::Forward { to, forward, is_sync });
    }

    pub(super) fn on_content(&mut self, chunk: ChunkId, id: u64, content: Option<(Meta, B)>) {
        let Role::Serving { successor, .. } = self.role() else { return };
        let retry = Out::Failed(self.now.after(self.options.retry));
        let Some(active) = self.active.get_mut(&chunk) else { return };
        if active.copy == Some(Out::Reading(id)) {
            return self.send_copy(chunk, content);
        }
        let Some(pending) = active.pending.as_mut().filter(|p| p.out == Out::Reading(id)) else { return };
        let (Successor::Serving(to) | Successor::Syncing(to)) = successor else { return };
        match content {
            Some((meta, bytes)) if meta.version == pending.version => {
                let update = Update {
                    kind: Kind::Replace,
                    length: meta.length,
                    crc: meta.digest,
                    payload: Some(bytes),
                    ..bare(chunk, pending.context)
                };
                self.send_pending(chunk, to, update);
                self.advance(chunk);
            }
            _ => pending.out = retry,
        }
    }

    pub(super) fn check_predecessor(&self, from: TargetId, version: ChainVersion) -> Result<Role, WireError> {
        self.check_alive()?;
        self.check_version(version)?;
        let role = self.role();
        match role {
            Role::Serving { predecessor: Some(p), .. } | Role::Syncing { predecessor: p } if p == from => {
                Ok(role)
            }
            _ => Err(error(
                ErrorKind::Stale,
                format!("target {from} is not the predecessor of {} at {version}", self.id),
            )),
        }
    }

    pub(super) fn on_forward(&mut self, reply: Handle, forward: Forward<B>) {
        match self.admit_forward(&forward) {
            Err(refusal) => self.reply(reply, Err(refusal)),
            Ok(Role::Syncing { .. }) => self.fill_with(reply, forward),
            Ok(_) => self.take_forward(reply, forward),
        }
    }

    fn admit_forward(&mut self, forward: &Forward<B>) -> Result<Role, WireError> {
        let role = self.check_predecessor(forward.from, forward.chain_version)?;
        if forward.stamp.incarnation < self.predecessor_incarnation {
            return Err(late(forward));
        }
        self.predecessor_incarnation = forward.stamp.incarnation;
        self.records.observe(&forward.update.context);
        Ok(role)
    }

    fn take_forward(&mut self, reply: Handle, forward: Forward<B>) {
        let chunk = forward.update.chunk;
        let committed = self.committed.get(&chunk).copied();
        if let Some(meta) = committed.filter(|m| m.version == forward.version) {
            return self.reply(reply, Ok(Answer::Updated(meta)));
        }
        let pending = self.active.entry(chunk).or_default().pending.as_ref().map(|p| p.version);
        let is_newer = pending.is_none_or(|version| version > forward.version);
        if committed.is_none() && forward.update.kind == Kind::Remove && is_newer {
            // Gone already; the predecessor has lost its record of that in a restart. What is
            // pending, if anything, creates the chunk anew.
            let meta = Meta { version: forward.version, ..Meta::default() };
            self.version_floor = self.version_floor.max(forward.version);
            self.reply(reply, Ok(Answer::Updated(meta)));
            return self.start_next(chunk);
        }
        if pending.is_some() {
            return self.take_beside_pending(reply, forward);
        }
        let have = committed.map_or(0, |m| m.version);
        if forward.version <= have || self.is_before_removal(&forward) {
            self.reply(reply, Err(late(&forward)));
            return self.start_next(chunk);
        }
        if forward.base != have {
            // A serving replica that lacks a committed update must not guess.
            let refusal = error(ErrorKind::Unavailable, format!("target {} is incomplete", self.id));
            self.reply(reply, Err(refusal));
            return self.go_offline(format!(
                "chunk {chunk} is at version {have} here and was at {} on the predecessor",
                forward.base
            ));
        }
        self.install_forward(reply, forward);
    }

    fn install_forward(&mut self, reply: Handle, forward: Forward<B>) {
        let Forward { stamp, base, version, update, prefix, .. } = forward;
        let chunk = update.chunk;
        self.install(chunk, base, version, update, false, Vec::new(), Some((reply, stamp)));
        self.confirm(chunk, stamp, prefix);
    }

    /// The pending update is the predecessor's, under this stamp; its token may be here already.
    fn confirm(&mut self, chunk: ChunkId, stamp: Stamp, prefix: Option<Meta>) {
        let touch = self.next_id();
        let resolve_at = self.now.after(self.options.resolve);
        let Some(Active { pending: Some(pending), early, .. }) = self.active.get_mut(&chunk) else { return };
        pending.stamp_in = Some(stamp);
        pending.touch = touch;
        pending.resolve_at = resolve_at;
        let overtook = early.take_if(|(token, _)| token.stamp <= stamp).filter(|(t, _)| t.stamp == stamp);
        if let Some(meta) = prefix.or(overtook.map(|(token, _)| token.meta)) {
            pending.prefix = Some(meta);
        }
        self.advance(chunk);
    }

    fn take_beside_pending(&mut self, reply: Handle, forward: Forward<B>) {
        let chunk = forward.update.chunk;
        let Some(active) = self.active.get_mut(&chunk) else { return };
        let Some(pending) = active.pending.as_mut() else { return };
        if let Some(stamp) = pending.stamp_in
            && forward.stamp <= stamp
        {
            if forward.stamp == stamp {
                pending.upstream.push(reply);
            } else {
                self.reply(reply, Err(late(&forward)));
            }
            return;
        }
        if forward.version == pending.version {
            if same_update(pending, &forward) {
                pending.upstream.push(reply);
                if pending.update.is_none() && forward.update.kind != Kind::Replace {
                    pending.update = Some(forward.update);
                }
                return self.confirm(chunk, forward.stamp, forward.prefix);
            }
            // What the predecessor says now counts: it cannot have lost what was committed.
            if pending.write.is_some() {
                if let Some((old, _)) = active.next.replace((reply, forward)) {
                    self.reply(old, Err(error(ErrorKind::Stale, "replaced by a later forward")));
                }
                return;
            }
            // It may be the same update in another form, after a restart: then it may have been
            // committed here, and is served neither way until this has settled again.
            let may_be_committed = pending.may_be_committed || pending.passed;
            let replaced = error(ErrorKind::Stale, "replaced by another update of the predecessor");
            for old in pending.upstream.split_off(0).into_iter().chain(pending.clients.split_off(0)) {
                self.reply(old, Err(replaced.clone()));
            }
            self.install_forward(reply, forward);
            if let Some(pending) = self.active.get_mut(&chunk).and_then(|a| a.pending.as_mut()) {
                pending.may_be_committed |= may_be_committed;
            }
            return;
        }
        if forward.base == pending.result_version()
            && pending.written.is_some()
            && forward.version > pending.version
        {
            // The predecessor builds on it, so it is committed there; only our record of that was
            // lost in a restart.
            self.commit(chunk);
            return self.take_forward(reply, forward);
        }
        self.reply(reply, Err(late(&forward)));
    }

    pub(super) fn on_token(&mut self, reply: Handle, token: Token) {
        if let Err(refusal) = self.check_predecessor(token.from, token.chain_version) {
            return self.reply(reply, Err(refusal));
        }
        self.reply(reply, Ok(Answer::Done));
        let now = self.now;
        if self.committed.get(&token.chunk).is_some_and(|m| m.version >= token.meta.version) {
            return;
        }
        let active = self.active.entry(token.chunk).or_default();
        match &mut active.pending {
            Some(pending) if pending.stamp_in == Some(token.stamp) => {
                pending.prefix = Some(token.meta);
                self.advance(token.chunk);
            }
            _ => {
                if active.early.as_ref().is_none_or(|(old, _)| old.stamp < token.stamp) {
                    active.early = Some((token, now));
                }
            }
        }
    }

    pub(super) fn on_token_answer(&mut self, chunk: ChunkId, stamp: Stamp, delivered: bool) {
        let pending = self.active.get_mut(&chunk).and_then(|a| a.pending.as_mut());
        if let Some(pending) = pending.filter(|p| p.out == Out::Sent(stamp) && !delivered) {
            // The next tick sends it again.
            pending.token_sent = false;
        }
    }

    pub(super) fn on_forward_answer(
        &mut self,
        chunk: ChunkId,
        stamp: Stamp,
        result: Result<Meta, WireError>,
    ) {
        let retry = Out::Failed(self.now.after(self.options.retry));
        let successor = match self.role() {
            Role::Serving { successor, .. } => successor,
            _ => return,
        };
        let Some(active) = self.active.get_mut(&chunk) else { return };
        if active.copy == Some(Out::Sent(stamp)) {
            return self.copied(chunk, result.is_ok());
        }
        let Some(pending) = active.pending.as_mut().filter(|p| p.out == Out::Sent(stamp)) else { return };
        match result {
            Ok(meta) => {
                if let Some(own) = pending.written
                    && !pending.removes
                    && own != meta
                {
                    return self.go_offline(format!(
                        "chunk {chunk}: its successor committed version {} with other content",
                        meta.version
                    ));
                }
                pending.down = Some(meta);
                self.advance(chunk);
            }
            Err(refusal)
                if refusal.kind == ErrorKind::NoSpace
                    && matches!(successor, Successor::Serving(_))
                    && !pending.may_be_committed =>
            {
                // The successor holds nothing of it, so nobody below does.
                if pending.write.is_some() {
                    pending.doomed = Some(refusal);
                } else {
                    self.abandon(chunk, refusal);
                }
            }
            Err(_) => {
                pending.out = retry;
                pending.token_sent = false;
            }
        }
    }

    pub(super) fn on_resolve(&mut self, reply: Handle, query: Resolve) {
        let checked = self.check_alive().and_then(|()| self.check_version(query.chain_version));
        if let Err(refusal) = checked {
            return self.reply(reply, Err(refusal));
        }
        if !matches!(self.role(), Role::Serving { successor: Successor::Serving(s), .. } if s == query.from) {
            return self
                .reply(reply, Err(error(ErrorKind::Stale, "not the predecessor of the one who asks")));
        }
        let pending = self.active.get_mut(&query.chunk).and_then(|a| a.pending.as_mut());
        let resolution = match (pending, self.committed.get(&query.chunk)) {
            (Some(pending), _) if pending.version <= query.version => {
                pending.token_sent = false;
                Resolution::Pending
            }
            (_, Some(meta)) if meta.version >= query.version => Resolution::Committed(Some(*meta)),
            (_, Some(_)) => Resolution::Unknown,
            (_, None) if query.removes => Resolution::Committed(None),
            (_, None) => Resolution::Unknown,
        };
        self.reply(reply, Ok(Answer::Resolved(resolution)));
        self.advance(query.chunk);
    }

    pub(super) fn on_resolve_answer(&mut self, chunk: ChunkId, touch: u64, resolution: Resolution) {
        let pending = self.active.get_mut(&chunk).and_then(|a| a.pending.as_mut());
        let Some(pending) = pending.filter(|p| p.touch == touch && p.write.is_none()) else { return };
        match resolution {
            Resolution::Pending => {}
            Resolution::Committed(None) if pending.removes => self.commit(chunk),
            Resolution::Committed(Some(meta)) if pending.written == Some(meta) => self.commit(chunk),
            Resolution::Committed(_) => {
                let version = pending.version;
                self.go_offline(format!(
                    "its pending version {version} of chunk {chunk} is not what the predecessor committed"
                ));
            }
            Resolution::Unknown => self.abandon(
                chunk,
                error(
                    ErrorKind::Stale,
                    "the predecessor does not know the update: it was lost before it was durable",
                ),
            ),
        }
    }

    /// Asks the predecessor about pending updates that it has not mentioned for a while.
    pub(super) fn ask_about_pending(&mut self) {
        let Role::Serving { predecessor: Some(to), .. } = self.role() else { return };
        let Some(chain_version) = self.chain.as_ref().map(|c| c.version) else { return };
        if self.offline.is_some() {
            return;
        }
        let (now, again) = (self.now, self.now.after(self.options.resolve));
        for (chunk, active) in &mut self.active {
            let Some(pending) = &mut active.pending else { continue };
            if pending.written.is_some() && pending.write.is_none() && pending.resolve_at <= now {
                pending.resolve_at = again;
                let query = Resolve {
                    from: self.id,
                    chain_version,
                    chunk: *chunk,
                    base: pending.base,
                    version: pending.version,
                    removes: pending.removes,
                };
                self.actions.push(Action::Resolve { to, query, touch: pending.touch });
            }
        }
    }
}

fn late<B>(forward: &Forward<B>) -> WireError {
    error(
        ErrorKind::Stale,
        format!(
            "version {} of chunk {} came too late and was ignored",
            forward.version, forward.update.chunk
        ),
    )
}

/// Whether the forward says again what is pending. Careful: a client may retry with a buffer that
/// has changed, under the same request.
fn same_update<B>(pending: &Pending<B>, forward: &Forward<B>) -> bool {
    let new = &forward.update;
    if pending.context != new.context || pending.base != forward.base {
        return false;
    }
    if pending.removes || new.kind == Kind::Remove {
        return pending.removes && new.kind == Kind::Remove;
    }
    if new.kind == Kind::Replace {
        return pending.written.is_some_and(|m| m.length == new.length && m.digest == new.crc);
    }
    pending.update.as_ref().is_some_and(|old| {
        (old.kind, old.offset, old.length, old.crc) == (new.kind, new.offset, new.length, new.crc)
    })
}

/// An update of `chunk` with nothing in it yet.
pub(super) fn bare<B>(chunk: ChunkId, context: Context) -> Update<B> {
    Update {
        context,
        chunk,
        kind: Kind::Replace,
        offset: 0,
        length: 0,
        crc: 0,
        chunk_bytes: MAX_CHUNK_BYTES,
        payload: None,
    }
}
