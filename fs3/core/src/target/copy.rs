//! Filling a returning target: its predecessor copies every chunk, and the records, while client
//! updates go on as whole replacements.

use super::forward::bare;
use super::machine::{Target, error};
use super::records::RecordPage;
use super::state::{Active, Out, Role};
use super::types::*;
use firefly_types::{ChainVersion, ChunkId, ErrorKind, Nanos, TargetId};
use std::collections::BTreeSet;

/// Entries in one message of records: small against the head limit of a frame.
const RECORDS_PER_PAGE: usize = 1024;

/// The predecessor's side.
pub(super) struct Fill {
    to: TargetId,
    /// Chunks that the target does not have yet.
    todo: BTreeSet<ChunkId>,
    copying: usize,
    /// Pages still to be sent, and the message in flight.
    pages: Option<Vec<RecordPage>>,
    message: Option<u64>,
    retry_at: Nanos,
    done: bool,
}

impl Fill {
    pub(super) fn new(to: TargetId, chunks: impl Iterator<Item = ChunkId>) -> Self {
        Self {
            to,
            todo: chunks.collect(),
            copying: 0,
            pages: None,
            message: None,
            retry_at: Nanos::ZERO,
            done: false,
        }
    }
}

/// The side of the target that is being filled.
#[derive(Default)]
pub(super) struct Filling {
    /// Chunks that came under this membership; others are left-overs.
    seen: BTreeSet<ChunkId>,
    flush: Option<(u64, Vec<ChunkId>, Flushing)>,
}

enum Flushing {
    Records(Vec<Handle>),
    Done(Vec<Handle>),
}

impl<B: Clone> Target<B> {
    /// The chunk was committed, and has or has not reached the target that is being filled.
    pub(super) fn settled_for_fill(&mut self, chunk: ChunkId, reached: bool) {
        if let Some(fill) = &mut self.fill {
            if reached {
                fill.todo.remove(&chunk);
            } else {
                fill.todo.insert(chunk);
            }
        }
    }

    /// Starts as many copies as may be in flight, then sends the records, then says that it is done.
    pub(super) fn pump_fill(&mut self) {
        let Some(chain_version) = self.chain.as_ref().map(|c| c.version) else { return };
        if self.offline.is_some() {
            return;
        }
        let mut starts = Vec::new();
        let Some(fill) = self.fill.as_mut() else { return };
        // Few chunks are active, so few are skipped here.
        let free = |active: &Active<B>| active.pending.is_none() && active.copy.is_none();
        for chunk in &fill.todo {
            if fill.copying + starts.len() >= self.options.copies {
                break;
            }
            if self.active.get(chunk).is_none_or(free) {
                starts.push(*chunk);
            }
        }
        fill.copying += starts.len();
        for chunk in starts {
            if !self.committed.contains_key(&chunk) {
                self.send_absence(chunk);
                continue;
            }
            let id = self.next_id();
            self.active.entry(chunk).or_default().copy = Some(Out::Reading(id));
            self.actions.push(Action::Read { id, chunk, pending: false });
        }
        let now = self.now;
        let id = self.next_id();
        let Some(fill) = self.fill.as_mut() else { return };
        if fill.done
            || fill.message.is_some()
            || fill.retry_at > now
            || !fill.todo.is_empty()
            || fill.copying > 0
        {
            return;
        }
        let to = fill.to;
        if fill.pages.is_none() {
            fill.pages = Some(self.records.pages(RECORDS_PER_PAGE, self.version_floor));
        }
        fill.message = Some(id);
        self.actions.push(match fill.pages.as_ref().and_then(|p| p.last()) {
            Some(page) => Action::SyncRecords { id, to, chain_version, page: page.clone() },
            None => Action::SyncDone { id, to, chain_version },
        });
    }

    pub(super) fn send_copy(&mut self, chunk: ChunkId, content: Option<(Meta, B)>) {
        let Some(to) = self.fill.as_ref().map(|f| f.to) else { return };
        let Some(chain_version) = self.chain.as_ref().map(|c| c.version) else { return };
        let Some((meta, bytes)) = content else { return self.copied(chunk, false) };
        let update = Update {
            length: meta.length,
            crc: meta.digest,
            payload: Some(bytes),
            ..bare(chunk, Context::default())
        };
        self.send_sync(chunk, to, chain_version, meta, update);
    }

    /// The chunk is gone, or never came to be: the target may have got it before.
    fn send_absence(&mut self, chunk: ChunkId) {
        let Some(to) = self.fill.as_ref().map(|f| f.to) else { return };
        let Some(chain_version) = self.chain.as_ref().map(|c| c.version) else { return };
        let meta = Meta { version: self.version_floor.max(1), ..Meta::default() };
        let update = Update { kind: Kind::Remove, ..bare(chunk, Context::default()) };
        self.send_sync(chunk, to, chain_version, meta, update);
    }

    fn send_sync(
        &mut self,
        chunk: ChunkId,
        to: TargetId,
        chain_version: ChainVersion,
        meta: Meta,
        update: Update<B>,
    ) {
        let stamp = Stamp { incarnation: self.incarnation, sequence: self.next_id() };
        self.active.entry(chunk).or_default().copy = Some(Out::Sent(stamp));
        let forward = Forward {
            from: self.id,
            chain_version,
            stamp,
            base: 0,
            version: meta.version,
            update,
            prefix: Some(meta),
        };
        self.actions.push(Action::Forward { to, forward, is_sync: true });
    }

    pub(super) fn copied(&mut self, chunk: ChunkId, ok: bool) {
        let retry = self.now.after(self.options.retry);
        if let Some(fill) = self.fill.as_mut() {
            fill.copying -= 1;
            if ok {
                fill.todo.remove(&chunk);
            }
        }
        if let Some(active) = self.active.get_mut(&chunk) {
            // A failed copy keeps its slot's turn but not the chunk: clients come first.
            active.copy = if ok { None } else { Some(Out::Failed(retry)) };
        }
        self.start_next(chunk);
        self.pump_fill();
    }

    pub(super) fn on_sync_answer(&mut self, id: u64, accepted: bool) {
        let retry_at = self.now.after(self.options.retry);
        let Some(fill) = self.fill.as_mut().filter(|f| f.message == Some(id)) else { return };
        fill.message = None;
        if !accepted {
            fill.retry_at = retry_at;
            return;
        }
        match &mut fill.pages {
            Some(pages) if !pages.is_empty() => {
                pages.pop();
            }
            _ => fill.done = true,
        }
        self.pump_fill();
    }

    /// A whole chunk, or its removal, for this target that is being filled.
    pub(super) fn fill_with(&mut self, reply: Handle, forward: Forward<B>) {
        let chunk = forward.update.chunk;
        if !matches!(forward.update.kind, Kind::Replace | Kind::Remove) {
            let refusal = error(ErrorKind::Stale, "a target that is being filled takes whole chunks only");
            return self.reply(reply, Err(refusal));
        }
        if let Some(filling) = &mut self.filling {
            filling.seen.insert(chunk);
        }
        let active = self.active.entry(chunk).or_default();
        if let Some(pending) = &mut active.pending {
            match pending.stamp_in {
                Some(stamp) if forward.stamp < stamp => {
                    return self.reply(reply, Err(error(ErrorKind::Stale, "a later copy is being written")));
                }
                Some(stamp) if forward.stamp == stamp => return pending.upstream.push(reply),
                _ => {}
            }
            if let Some((old, _)) = active.next.replace((reply, forward)) {
                self.reply(old, Err(error(ErrorKind::Stale, "replaced by a later copy")));
            }
            return;
        }
        let committed = self.committed.get(&chunk).copied();
        let have = committed.map_or(0, |m| m.version);
        if forward.version < have || (forward.update.kind != Kind::Remove && self.is_before_removal(&forward))
        {
            // Only what every serving replica holds durably comes here, so older means late.
            self.reply(reply, Err(error(ErrorKind::Stale, "a later version is here already")));
            return self.start_next(chunk);
        }
        let update = &forward.update;
        let content = Meta { version: forward.version, length: update.length, digest: update.crc };
        if update.kind == Kind::Replace && committed == Some(content) {
            self.reply(reply, Ok(Answer::Updated(content)));
            return self.start_next(chunk);
        }
        // The removal of what is not here is written too: it carries a record and a version.
        let Forward { stamp, base, version, update, .. } = forward;
        // A removal that a client asked for builds on a version.
        let reports_absence = update.kind == Kind::Remove && base == 0;
        self.install(chunk, have, version, update, true, Vec::new(), Some((reply, stamp)));
        if let Some(pending) = self.active.get_mut(&chunk).and_then(|a| a.pending.as_mut()) {
            pending.reports_absence = reports_absence;
        }
    }

    pub(super) fn on_sync_records(
        &mut self,
        reply: Handle,
        from: TargetId,
        version: ChainVersion,
        page: RecordPage,
    ) {
        match self.check_predecessor(from, version) {
            Ok(Role::Syncing { .. }) => {}
            Ok(_) => {
                return self.reply(reply, Err(error(ErrorKind::Stale, "this target is not being filled")));
            }
            Err(refusal) => return self.reply(reply, Err(refusal)),
        }
        self.records.merge(&page);
        self.version_floor = self.version_floor.max(page.version_floor);
        self.flush(Vec::new(), page, Flushing::Records(vec![reply]));
    }

    pub(super) fn on_sync_done(&mut self, reply: Handle, from: TargetId, version: ChainVersion) {
        match self.check_predecessor(from, version) {
            Ok(Role::Syncing { .. }) => {}
            Ok(_) => {
                return self.reply(reply, Err(error(ErrorKind::Stale, "this target is not being filled")));
            }
            Err(refusal) => return self.reply(reply, Err(refusal)),
        }
        let Some(filling) = &self.filling else { return };
        let left_over: Vec<ChunkId> =
            self.committed.keys().filter(|chunk| !filling.seen.contains(chunk)).copied().collect();
        self.flush(left_over, RecordPage::default(), Flushing::Done(vec![reply]));
    }

    fn flush(&mut self, remove: Vec<ChunkId>, page: RecordPage, what: Flushing) {
        let id = self.next_id();
        let Some(filling) = &mut self.filling else { return };
        // The predecessor sends one at a time; a second one means that it gave up on the first.
        let replaced = filling.flush.replace((id, remove.clone(), what));
        if let Some((_, _, Flushing::Records(replies) | Flushing::Done(replies))) = replaced {
            for reply in replies {
                self.reply(reply, Err(error(ErrorKind::Stale, "replaced by a later message")));
            }
        }
        self.actions.push(Action::Flush { id, remove, page });
    }

    pub(super) fn on_flushed(&mut self, id: u64, ok: bool) {
        if !ok {
            return self.go_offline("its disk failed a flush".into());
        }
        let Some(filling) = &mut self.filling else { return };
        let Some((_, removed, what)) = filling.flush.take_if(|(flush, ..)| *flush == id) else { return };
        for chunk in removed {
            if let Some(meta) = self.committed.remove(&chunk) {
                self.version_floor = self.version_floor.max(meta.version);
            }
        }
        let (replies, done) = match what {
            Flushing::Records(replies) => (replies, false),
            Flushing::Done(replies) => (replies, true),
        };
        if done && let Some(version) = self.chain.as_ref().map(|c| c.version) {
            self.actions.push(Action::Synced(version));
        }
        for reply in replies {
            self.reply(reply, Ok(Answer::Done));
        }
    }
}
