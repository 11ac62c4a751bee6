//! An open file of this client: attributes as this client sees them, written data that waits,
//! read-ahead. Shared by all handles of the file.
//!
//! Locks, in this order: `gate` (shared by reads and writes, exclusive for truncate and punch),
//! `publishing` (one length publication at a time), `state` (never held across an await).

use crate::blocks::{Blocks, block_bytes};
use crate::chunkio::Update;
use crate::extents::Extents;
use crate::parallel::all;
use crate::shared::Shared;
use crate::{Credentials, FsError};
use firefly_net::Buf;
use firefly_proto::meta::{Inode, InodeReply, SyncRequest, Time};
use firefly_proto::methods::meta as method;
use firefly_proto::storage::UpdateKind;
use firefly_types::{ChainId, ChunkId, DataId, ErrorKind, Generation};
use fs3_core::layout::{Layout, Piece};
use futures::future::BoxFuture;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, RwLock};

/// A range of this many bytes is written in the background without waiting for more.
const WRITE_UNIT: usize = 1 << 20;

pub(crate) struct OpenInode {
    pub(crate) id: u64,
    pub(crate) shared: Arc<Shared>,
    pub(crate) gate: RwLock<()>,
    pub(crate) publishing: tokio::sync::Mutex<()>,
    changed: Notify,
    state: Mutex<State>,
}

pub(crate) struct State {
    attr: Inode,
    layout: Layout,
    /// Length and modification time that the meta server does not know yet.
    dirty_length: Option<u64>,
    dirty_mtime: Option<Time>,
    /// Adds one for each change of the two above: tells whether they changed while published.
    dirty_serial: u64,
    chunks: BTreeMap<u32, ChunkBuffer>,
    /// Failures of background writes, counted, so that each handle reports each once.
    error: Option<(u64, FsError)>,
    pub(crate) blocks: Blocks,
}

/// What this client knows of a file and the meta server does not.
#[derive(Clone, Copy)]
pub(crate) struct News {
    pub(crate) length: Option<u64>,
    pub(crate) mtime: Option<Time>,
    pub(crate) truncate_version: u64,
    serial: u64,
}

#[derive(Default)]
struct ChunkBuffer {
    dirty: Extents,
    inflight: Option<Arc<Extents>>,
    started: u64,
    completed: u64,
}

/// Bytes of the write buffer that lie over a read: position in the read, and the bytes.
pub(crate) type Patches = Vec<(usize, Vec<u8>)>;

pub(crate) fn now() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() }
}

pub(crate) fn layout_of(attr: &Inode) -> Result<Layout, FsError> {
    let layout = attr.layout.as_ref().ok_or_else(|| {
        FsError::invalid(
            ErrorKind::InvalidArgument,
            format!("inode {} has no data: not a regular file", attr.inode_id),
        )
    })?;
    Ok(Layout::new(layout.chunk_bytes, layout.chains.iter().copied().map(ChainId).collect())?)
}

impl State {
    pub(crate) fn length(&self) -> u64 {
        self.dirty_length.map_or(self.attr.length, |dirty| dirty.max(self.attr.length))
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn chunk(&self, index: u32) -> ChunkId {
        ChunkId { data: DataId(self.attr.data_id), generation: Generation(self.attr.generation), index }
    }

    pub(crate) fn data(&self) -> (u64, u32) {
        (self.attr.data_id, self.attr.generation)
    }

    /// Attributes as this client sees them: the server's, with what it does not know yet.
    pub(crate) fn view(&self) -> Inode {
        let mut view = self.attr.clone();
        view.length = self.length();
        if let Some(mtime) = &self.dirty_mtime {
            view.mtime = Some(*mtime);
            let newer = view.ctime.is_none_or(|c| (c.seconds, c.nanos) < (mtime.seconds, mtime.nanos));
            if newer {
                view.ctime = Some(*mtime);
            }
        }
        view
    }

    /// Takes attributes from the server unless they are older than those known.
    pub(crate) fn apply(&mut self, attr: &Inode) {
        if attr.version < self.attr.version {
            return;
        }
        if attr.version > self.attr.version || (attr.data_id, attr.generation) != self.data() {
            self.blocks.clear();
        }
        if attr.truncate_version != self.attr.truncate_version && self.dirty_length.is_some() {
            // Somebody else truncated: of our length only what still waits here counts.
            self.dirty_length = self.end_of_buffer();
        }
        if let Ok(layout) = layout_of(attr) {
            self.layout = layout;
            self.attr = attr.clone();
        }
    }

    fn end_of_buffer(&self) -> Option<u64> {
        let (index, buffer) = self.chunks.last_key_value()?;
        let end = buffer.dirty.end().max(buffer.inflight.as_ref().map_or(0, |i| i.end()));
        Some(u64::from(*index) * u64::from(self.layout.chunk_bytes()) + end)
    }

    /// After a truncation or a replacement of the data: nothing of the old state counts.
    pub(crate) fn reset(&mut self, attr: &Inode) {
        self.dirty_length = None;
        self.dirty_mtime = None;
        self.dirty_serial += 1;
        self.blocks.clear();
        if let Ok(layout) = layout_of(attr) {
            self.layout = layout;
            self.attr = attr.clone();
        }
    }

    pub(crate) fn touched(&mut self, end: u64) {
        if end > self.length() {
            self.dirty_length = Some(end);
        }
        self.dirty_mtime = Some(now());
        self.dirty_serial += 1;
    }

    /// An explicit modification time replaces the one that writes left. An unpublished length
    /// carries it along, since publishing a length alone would count as a modification.
    pub(crate) fn mtime_set(&mut self, mtime: Option<Time>) {
        self.dirty_mtime = mtime.filter(|_| self.dirty_length.is_some());
        self.dirty_serial += 1;
    }

    fn forget_blocks(&mut self, piece: &Piece) {
        let block = u64::from(block_bytes(self.layout.chunk_bytes()));
        let last = piece.file_offset + u64::from(piece.len) - 1;
        self.blocks.forget(piece.file_offset / block, last / block);
    }

    fn forget_chunk(&mut self, index: u32) {
        let chunk = u64::from(self.layout.chunk_bytes());
        let block = u64::from(block_bytes(self.layout.chunk_bytes()));
        let start = u64::from(index) * chunk;
        self.blocks.forget(start / block, (start + chunk - 1) / block);
    }

    /// What the write buffer holds of the pieces, older first.
    pub(crate) fn patches(&self, pieces: &[Piece]) -> Patches {
        let mut patches = Patches::new();
        let Some(first) = pieces.first() else { return patches };
        if self.chunks.is_empty() {
            return patches;
        }
        let origin = first.file_offset;
        for piece in pieces {
            let Some(buffer) = self.chunks.get(&piece.index) else { continue };
            for extents in buffer.inflight.as_deref().into_iter().chain([&buffer.dirty]) {
                for (at, bytes) in extents.cut(piece.chunk_offset, piece.len) {
                    let position = (piece.file_offset - origin) as usize + (at - piece.chunk_offset) as usize;
                    patches.push((position, bytes.to_vec()));
                }
            }
        }
        patches
    }

    fn has_dirty(&self) -> bool {
        !self.chunks.is_empty() || self.dirty_length.is_some() || self.dirty_mtime.is_some()
    }
}

impl OpenInode {
    pub(crate) fn new(shared: Arc<Shared>, attr: &Inode) -> Result<Self, FsError> {
        Ok(Self {
            id: attr.inode_id,
            shared,
            gate: RwLock::new(()),
            publishing: tokio::sync::Mutex::new(()),
            changed: Notify::new(),
            state: Mutex::new(State {
                attr: attr.clone(),
                layout: layout_of(attr)?,
                dirty_length: None,
                dirty_mtime: None,
                dirty_serial: 0,
                chunks: BTreeMap::new(),
                error: None,
                blocks: Blocks::default(),
            }),
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn has_dirty(&self) -> bool {
        self.state().has_dirty()
    }

    /// The newest background failure that a handle which has seen `seen` must still report.
    pub(crate) fn unseen_error(&self, seen: u64) -> Option<(u64, FsError)> {
        self.state().error.clone().filter(|(count, _)| *count > seen)
    }

    pub(crate) fn error_count(&self) -> u64 {
        self.state().error.as_ref().map_or(0, |(count, _)| *count)
    }

    fn record(&self, error: FsError) {
        tracing::warn!(inode = self.id, %error, "a background write failed; the next write, fsync or close reports it");
        let mut state = self.state();
        let count = state.error.as_ref().map_or(0, |(count, _)| *count);
        state.error = Some((count + 1, error));
    }

    /// Puts bytes for which the budget was taken into the buffer. The caller holds the gate.
    pub(crate) fn buffer(self: &Arc<Self>, offset: u64, data: &[u8]) -> Result<(), FsError> {
        let mut ready = Vec::new();
        {
            let mut state = self.state();
            let layout = state.layout.clone();
            let pieces = match layout.pieces(offset, data.len() as u64) {
                Ok(pieces) => pieces,
                Err(error) => {
                    self.shared.budget.give(data.len());
                    return Err(error.into());
                }
            };
            let mut grown = 0;
            for piece in pieces {
                let at = (piece.file_offset - offset) as usize;
                let buffer = state.chunks.entry(piece.index).or_default();
                let before = buffer.dirty.bytes();
                buffer.dirty.insert(piece.chunk_offset, &data[at..at + piece.len as usize]);
                grown += buffer.dirty.bytes() - before;
                let full = piece.chunk_offset + piece.len == layout.chunk_bytes();
                if buffer.inflight.is_none() && (full || buffer.dirty.longest() >= WRITE_UNIT) {
                    ready.push(piece.index);
                }
                state.forget_blocks(&piece);
            }
            self.shared.budget.give(data.len() - grown);
            state.touched(offset + data.len() as u64);
        }
        for index in ready {
            let inode = self.clone();
            self.shared.runtime.spawn(async move { inode.send_chunk(index, true).await });
        }
        Ok(())
    }

    /// Sends what waits for chunk `index` at the time of the call. Failures go to the record.
    pub(crate) async fn flush_chunk(&self, index: u32) {
        self.send_chunk(index, false).await;
    }

    /// `follow`: goes on while a writer keeps filling the chunk, since nobody else would start.
    async fn send_chunk(&self, index: u32, follow: bool) {
        let mut needed = None;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let work = {
                let mut state = self.state();
                let chunk = state.chunk(index);
                let chain = state.layout.chain_of(index);
                let chunk_bytes = state.layout.chunk_bytes();
                let Some(buffer) = state.chunks.get_mut(&index) else { return };
                let needed = *needed.get_or_insert(buffer.started + u64::from(!buffer.dirty.is_empty()));
                if buffer.completed >= needed {
                    return;
                }
                if buffer.inflight.is_some() {
                    None
                } else {
                    let extents = Arc::new(std::mem::take(&mut buffer.dirty));
                    buffer.inflight = Some(extents.clone());
                    buffer.started += 1;
                    let template =
                        Update { chunk, chain, kind: UpdateKind::Write, offset: 0, length: 0, chunk_bytes };
                    Some((extents, template))
                }
            };
            let Some((extents, template)) = work else {
                changed.await;
                continue;
            };
            self.send(&extents, template).await;
            {
                let mut state = self.state();
                // Before the bytes leave the buffer: see `blocks`.
                state.forget_chunk(index);
                if let Some(buffer) = state.chunks.get_mut(&index) {
                    buffer.inflight = None;
                    buffer.completed += 1;
                    if follow && buffer.dirty.longest() >= WRITE_UNIT {
                        needed = Some(buffer.started + 1);
                    }
                    if buffer.dirty.is_empty() {
                        state.chunks.remove(&index);
                    }
                }
            }
            self.shared.budget.give(extents.bytes());
            self.changed.notify_waiters();
        }
    }

    async fn send(&self, extents: &Extents, template: Update) {
        let io = &self.shared.io;
        let mut sends: Vec<BoxFuture<'_, _>> = Vec::new();
        for (offset, bytes) in extents.iter() {
            sends.push(Box::pin(async move {
                let mut payload = io.net().pool().alloc(bytes.len()).await;
                payload.copy_from_slice(bytes);
                let update = Update { offset, length: bytes.len() as u32, ..template };
                io.update(update, Some(Buf::from(payload))).await
            }));
        }
        for result in all(sends).await {
            if let Err(error) = result {
                self.record(error);
            }
        }
    }

    /// Sends everything that waits at the time of the call.
    pub(crate) async fn flush_data(&self) {
        let waiting: Vec<u32> = self.state().chunks.keys().copied().collect();
        let mut flushes: Vec<BoxFuture<'_, ()>> = Vec::with_capacity(waiting.len());
        for index in waiting {
            flushes.push(Box::pin(self.flush_chunk(index)));
        }
        all(flushes).await;
    }

    /// Drops what waits and lets what is on its way arrive: the data is about to be replaced. The
    /// caller holds the gate exclusively.
    pub(crate) async fn discard(&self) {
        {
            let mut state = self.state();
            let mut dropped = 0;
            state.chunks.retain(|_, buffer| {
                dropped += buffer.dirty.bytes();
                buffer.dirty = Extents::default();
                buffer.inflight.is_some()
            });
            self.shared.budget.give(dropped);
        }
        self.flush_data().await;
    }

    /// Publishes length and modification time if they changed. After [`OpenInode::flush_data`], so
    /// that a published length never covers bytes that are not on storage.
    pub(crate) async fn publish(&self) -> Result<(), FsError> {
        let _one = self.publishing.lock().await;
        let news = self.unpublished();
        if news.length.is_none() && news.mtime.is_none() {
            return Ok(());
        }
        let reply: InodeReply = self
            .shared
            .meta
            .change("publishing a file's length", method::SYNC, &Credentials::ROOT, |caller| SyncRequest {
                caller: Some(caller),
                inode_id: self.id,
                length: news.length,
                mtime: news.mtime,
                truncate_version: Some(news.truncate_version),
            })
            .await?;
        self.published(reply.inode.as_ref(), &news);
        Ok(())
    }

    /// What is unpublished now, for a close that publishes it on its way.
    pub(crate) fn unpublished(&self) -> News {
        let state = self.state();
        News {
            length: state.dirty_length,
            mtime: state.dirty_mtime,
            truncate_version: state.attr.truncate_version,
            serial: state.dirty_serial,
        }
    }

    /// The meta server has taken `news` and answered with `attr`.
    pub(crate) fn published(&self, attr: Option<&Inode>, news: &News) {
        let mut state = self.state();
        if state.dirty_serial == news.serial {
            state.dirty_length = None;
            state.dirty_mtime = None;
        }
        match attr {
            // Our own publication changes nothing that read-ahead holds.
            Some(attr) if attr.version >= state.attr.version => {
                if let Ok(layout) = layout_of(attr) {
                    state.layout = layout;
                    state.attr = attr.clone();
                }
            }
            Some(_) => {}
            None => state.attr.length = state.attr.length.max(news.length.unwrap_or(0)),
        }
    }

    /// Flushes data, then publishes.
    pub(crate) async fn flush(&self) -> Result<(), FsError> {
        self.flush_data().await;
        self.publish().await
    }

    /// Writes past the buffer, for O_DIRECT and O_SYNC. The caller holds the gate.
    pub(crate) async fn write_through(&self, offset: u64, data: &[u8]) -> Result<(), FsError> {
        let pieces: Vec<Piece> = self.state().layout.pieces(offset, data.len() as u64)?.collect();
        let mut sends: Vec<BoxFuture<'_, _>> = Vec::with_capacity(pieces.len());
        for piece in &pieces {
            sends.push(Box::pin(self.write_piece(piece, &data[(piece.file_offset - offset) as usize..])));
        }
        for result in all(sends).await {
            result?;
        }
        self.state().touched(offset + data.len() as u64);
        Ok(())
    }

    async fn write_piece(&self, piece: &Piece, data: &[u8]) -> Result<(), FsError> {
        // Older bytes of this chunk must not land on these later.
        self.flush_chunk(piece.index).await;
        let io = &self.shared.io;
        let mut payload = io.net().pool().alloc(piece.len as usize).await;
        payload.copy_from_slice(&data[..piece.len as usize]);
        let update = {
            let mut state = self.state();
            state.forget_blocks(piece);
            Update {
                chunk: state.chunk(piece.index),
                chain: piece.chain,
                kind: UpdateKind::Write,
                offset: piece.chunk_offset,
                length: piece.len,
                chunk_bytes: state.layout.chunk_bytes(),
            }
        };
        let result = io.update(update, Some(Buf::from(payload))).await;
        self.state().forget_blocks(piece);
        result.map(drop)
    }

    /// Cuts the file's chunks down to `length` on storage. The caller holds the gate exclusively
    /// and has flushed.
    pub(crate) async fn cut(&self, from: u64, length: u64) -> Result<(), FsError> {
        let (layout, data) = {
            let state = self.state();
            (state.layout.clone(), state.data())
        };
        if length >= from {
            return Ok(());
        }
        let io = &self.shared.io;
        let (boundary, keep) = layout.locate(length)?;
        if keep > 0 {
            let update = Update {
                chunk: self.state().chunk(boundary),
                chain: layout.chain_of(boundary),
                kind: UpdateKind::Truncate,
                offset: 0,
                length: keep,
                chunk_bytes: layout.chunk_bytes(),
            };
            io.update(update, None).await?;
        }
        let first = boundary + u32::from(keep > 0);
        let after = layout.chunk_count(from);
        // Only chains that hold a chunk of the cut range need to hear of it.
        let chains: std::collections::BTreeSet<ChainId> = (u64::from(first)..after)
            .take(layout.chains().len())
            .map(|index| layout.chain_of(index as u32))
            .collect();
        let mut removals: Vec<BoxFuture<'_, _>> = Vec::with_capacity(chains.len());
        for chain in chains {
            removals.push(Box::pin(io.remove_range(data, chain, first)));
        }
        for result in all(removals).await {
            result?;
        }
        Ok(())
    }

    /// Zeros a range on storage. The caller holds the gate exclusively and has flushed.
    pub(crate) async fn punch(&self, offset: u64, len: u64) -> Result<(), FsError> {
        let (pieces, chunk_bytes) = {
            let state = self.state();
            let end = offset.saturating_add(len).min(state.length());
            let pieces: Vec<Piece> =
                state.layout.pieces(offset.min(end), end.saturating_sub(offset))?.collect();
            (pieces, state.layout.chunk_bytes())
        };
        let mut sends: Vec<BoxFuture<'_, _>> = Vec::with_capacity(pieces.len());
        for piece in &pieces {
            let whole = piece.len == chunk_bytes;
            let update = Update {
                chunk: self.state().chunk(piece.index),
                chain: piece.chain,
                kind: if whole { UpdateKind::Remove } else { UpdateKind::Punch },
                offset: piece.chunk_offset,
                length: piece.len,
                chunk_bytes,
            };
            sends.push(Box::pin(self.shared.io.update(update, None)));
        }
        for result in all(sends).await {
            match result {
                // Nothing there is as good as zeros.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                other => drop(other?),
            }
        }
        let mut state = self.state();
        state.blocks.clear();
        let length = state.length();
        state.touched(length);
        Ok(())
    }
}

impl Drop for OpenInode {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let lost: usize = state.chunks.values().map(|c| c.dirty.bytes()).sum();
        if lost > 0 {
            tracing::error!(inode = self.id, bytes = lost, "written data dropped unsent");
            self.shared.budget.give(lost);
        }
        self.shared.forget(self.id);
    }
}
