//! An open file: reading, writing, making durable.

use crate::blocks::block_bytes;
use crate::budget::MOST_AT_ONCE;
use crate::inode::{OpenInode, Patches};
use crate::parallel::all;
use crate::stats::add;
use crate::{Credentials, FsError};
use firefly_net::Buf;
use firefly_proto::meta::{CloseReply, CloseRequest, Inode};
use firefly_proto::methods::meta as method;
use firefly_types::{ChainId, ChunkId, ErrorKind};
use fs3_core::layout::{Layout, Piece};
use futures::future::BoxFuture;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A read this far from where the last one ended still counts as sequential: the kernel sends the
/// reads of one stream in parallel.
const SEQUENTIAL_SLACK: u64 = 1 << 20;

/// Reads longer than this are split by callers; a limit against absurd allocations.
const MOST_READ: usize = 64 << 20;

/// How far a write has got when it returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Durability {
    /// In this client's memory; `fsync` or `flush` makes it durable.
    #[default]
    Buffered,
    /// On storage (O_DIRECT); the file's length too if it grew.
    Direct,
    /// On storage, with length and time published (O_SYNC).
    Synced,
}

/// Bytes that a read returned.
pub enum Data {
    /// As they came from storage.
    Shared(Buf),
    /// Assembled from several places.
    Owned(Vec<u8>),
}

impl Deref for Data {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Shared(buf) => buf,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// An open file. Handles of one file share its state within one client.
pub struct File {
    inode: Arc<OpenInode>,
    session: u64,
    writes: bool,
    seen_error: AtomicU64,
    wrote: AtomicBool,
    closed: AtomicBool,
    next_read: AtomicU64,
}

impl File {
    pub(crate) fn new(inode: Arc<OpenInode>, session: u64, writes: bool) -> Self {
        // A failure before this open is for the handles of that time to report.
        let seen_error = AtomicU64::new(inode.error_count());
        Self {
            inode,
            session,
            writes,
            seen_error,
            wrote: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            next_read: AtomicU64::new(0),
        }
    }

    /// The file's inode number.
    pub fn inode_id(&self) -> u64 {
        self.inode.id
    }

    /// Whether the handle was opened for writing.
    pub fn writable(&self) -> bool {
        self.writes
    }

    /// Attributes as this client sees them now, without asking anybody.
    pub fn attributes(&self) -> Inode {
        self.inode.state().view()
    }

    /// Length as this client sees it now.
    pub fn length(&self) -> u64 {
        self.inode.state().length()
    }

    fn report(&self) -> Result<(), FsError> {
        let seen = self.seen_error.load(Ordering::Acquire);
        match self.inode.unseen_error(seen) {
            Some((count, error)) if self.seen_error.fetch_max(count, Ordering::AcqRel) < count => Err(error),
            _ => Ok(()),
        }
    }

    /// Reads up to `len` bytes at `offset`; fewer only at the end of the file. `direct` goes past
    /// the read-ahead (O_DIRECT).
    pub async fn read_at(&self, offset: u64, len: usize, direct: bool) -> Result<Data, FsError> {
        let _shared = self.inode.gate.read().await;
        let Some(plan) = self.plan(offset, len, direct)? else { return Ok(Data::Owned(Vec::new())) };
        self.fetch(plan).await
    }

    /// What a read will take from where, decided in one moment: which is what makes laying the
    /// buffered bytes over the fetched ones right.
    fn plan(&self, offset: u64, len: usize, direct: bool) -> Result<Option<Plan>, FsError> {
        let expected = self.next_read.load(Ordering::Relaxed);
        let mut state = self.inode.state();
        let length = state.length();
        if offset >= length || len == 0 {
            return Ok(None);
        }
        let len = (len.min(MOST_READ) as u64).min(length - offset) as usize;
        let end = offset + len as u64;
        self.next_read.store(end, Ordering::Relaxed);
        let pieces: Vec<Piece> = state.layout().pieces(offset, len as u64)?.collect();
        let patches = state.patches(&pieces);
        let mut plan = Plan {
            offset,
            len,
            pieces,
            patches,
            data: state.data(),
            layout: state.layout().clone(),
            blocks: Vec::new(),
        };
        // A fresh handle's first read at 0 counts as sequential, a jump does not.
        let sequential = offset.abs_diff(expected) <= SEQUENTIAL_SLACK;
        if direct || !sequential {
            return Ok(Some(plan));
        }
        let block = u64::from(block_bytes(plan.layout.chunk_bytes()));
        let options = &self.inode.shared.options;
        let (first, last) = (offset / block, (end - 1) / block);
        state.blocks.passed(first.saturating_sub(SEQUENTIAL_SLACK.div_ceil(block)));
        // Nothing is read ahead for the first read of a file: most small files are read once.
        let ahead = if offset == 0 { 0 } else { (options.readahead_per_file as u64 / block).max(1) };
        let end_of_file = (length - 1) / block;
        for number in first..=(last + ahead).min(end_of_file) {
            match state.blocks.get(number, block as u32, &self.inode.shared.readahead) {
                Some((cell, new)) => {
                    if number > last && !new {
                        continue;
                    }
                    plan.blocks.push((number, cell, number > last));
                }
                // No room: those asked for are read directly, those ahead are left out.
                None => break,
            }
        }
        let wanted = plan.blocks.iter().filter(|(_, _, ahead)| !ahead).count() as u64;
        if wanted != last - first + 1 {
            plan.blocks.clear();
        }
        Ok(Some(plan))
    }

    async fn fetch(&self, mut plan: Plan) -> Result<Data, FsError> {
        if plan.patched_whole() {
            let mut out = vec![0; plan.len];
            plan.lay_patches(&mut out);
            return Ok(Data::Owned(out));
        }
        if !plan.blocks.is_empty() {
            return self.fetch_blocks(plan).await;
        }
        let io = &self.inode.shared.io;
        if plan.pieces.len() == 1 && plan.patches.is_empty() {
            let piece = plan.pieces[0];
            let data = io.read(plan.chunk(piece.index), piece.chain, piece.chunk_offset, piece.len).await?;
            if data.len() == plan.len {
                return Ok(Data::Shared(Buf::from(data)));
            }
            let mut out = vec![0; plan.len];
            out[..data.len()].copy_from_slice(&data);
            return Ok(Data::Owned(out));
        }
        let mut out = vec![0; plan.len];
        let mut reads: Vec<BoxFuture<'_, _>> = Vec::with_capacity(plan.pieces.len());
        for piece in &plan.pieces {
            let chunk = plan.chunk(piece.index);
            reads.push(Box::pin(async move {
                (piece, io.read(chunk, piece.chain, piece.chunk_offset, piece.len).await)
            }));
        }
        for (piece, data) in all(reads).await {
            let data = data?;
            let at = (piece.file_offset - plan.offset) as usize;
            out[at..at + data.len()].copy_from_slice(&data);
        }
        plan.lay_patches(&mut out);
        Ok(Data::Owned(out))
    }

    async fn fetch_blocks(&self, mut plan: Plan) -> Result<Data, FsError> {
        let block = u64::from(block_bytes(plan.layout.chunk_bytes()));
        let shared = &self.inode.shared;
        let blocks = std::mem::take(&mut plan.blocks);
        let place = |number: u64| -> Result<(ChunkId, ChainId, u32), FsError> {
            let (index, offset) = plan.layout.locate(number * block)?;
            Ok((plan.chunk(index), plan.layout.chain_of(index), offset))
        };
        // All but the first in the background: those ahead, and the rest of a long read.
        for (number, cell, _) in blocks.iter().skip(1) {
            if !cell.initialized() {
                let (chunk, chain, offset) = place(*number)?;
                let (cell, shared) = (cell.clone(), shared.clone());
                shared.runtime.clone().spawn(async move {
                    let fetch =
                        || async { shared.io.read(chunk, chain, offset, block as u32).await.map(Buf::from) };
                    // A failure is met again, and reported, by the reader who gets there.
                    let _ = cell.get_or_try_init(fetch).await;
                });
            }
        }
        let mut out = None;
        for (number, cell, _) in blocks.iter().filter(|(_, _, ahead)| !ahead) {
            let (chunk, chain, offset) = place(*number)?;
            if cell.initialized() {
                add(&shared.stats.readahead_hits, 1);
            }
            let fetch = || async { shared.io.read(chunk, chain, offset, block as u32).await.map(Buf::from) };
            let data = cell.get_or_try_init(fetch).await?;
            let start = number * block;
            let from = plan.offset.max(start);
            let to = (plan.offset + plan.len as u64).min(start + block);
            let held_to = to.min(start + data.len() as u64);
            if plan.patches.is_empty() && (to - from) as usize == plan.len && held_to == to {
                return Ok(Data::Shared(data.slice((from - start) as usize..(to - start) as usize)));
            }
            let out = out.get_or_insert_with(|| vec![0; plan.len]);
            if held_to > from {
                let at = (from - plan.offset) as usize;
                out[at..at + (held_to - from) as usize]
                    .copy_from_slice(&data[(from - start) as usize..(held_to - start) as usize]);
            }
        }
        let mut out = out.unwrap_or_else(|| vec![0; plan.len]);
        plan.lay_patches(&mut out);
        Ok(Data::Owned(out))
    }

    fn check_write(&self, offset: u64, len: usize) -> Result<(), FsError> {
        if !self.writes {
            return Err(FsError::invalid(
                ErrorKind::PermissionDenied,
                format!("inode {} is open for reading only", self.inode.id),
            ));
        }
        self.report()?;
        let most = self.inode.state().layout().max_length();
        if offset.checked_add(len as u64).is_none_or(|end| end > most) {
            return Err(FsError::invalid(
                ErrorKind::TooLarge,
                format!("a file of this layout holds at most {most} bytes"),
            ));
        }
        self.wrote.store(true, Ordering::Release);
        Ok(())
    }

    /// Buffers a write without waiting, if there is room and nothing excludes it: the fast path of
    /// a thread that must not block. `None` means: use [`File::write_at`].
    pub fn try_write_at(&self, offset: u64, data: &[u8]) -> Option<Result<(), FsError>> {
        if data.is_empty() || data.len() > MOST_AT_ONCE {
            return None;
        }
        let _shared = self.inode.gate.try_read().ok()?;
        if let Err(error) = self.check_write(offset, data.len()) {
            return Some(Err(error));
        }
        self.inode.shared.budget.try_take(data.len()).then(|| self.inode.buffer(offset, data))
    }

    /// Writes `data` at `offset`.
    pub async fn write_at(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), FsError> {
        let _shared = self.inode.gate.read().await;
        self.write_gated(offset, data, durability).await
    }

    /// Writes `data` at the end of the file and returns where that was. Appends of one client do
    /// not overlap.
    pub async fn append(&self, data: &[u8], durability: Durability) -> Result<u64, FsError> {
        let _alone = self.inode.gate.write().await;
        let offset = self.length();
        self.write_gated(offset, data, durability).await?;
        Ok(offset)
    }

    async fn write_gated(&self, offset: u64, data: &[u8], durability: Durability) -> Result<(), FsError> {
        self.check_write(offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        if durability != Durability::Buffered {
            let before = self.inode.unpublished().length;
            self.inode.write_through(offset, data).await?;
            if durability == Durability::Synced || self.inode.unpublished().length != before {
                self.inode.publish().await?;
            }
            return Ok(());
        }
        let budget = &self.inode.shared.budget;
        for (nth, part) in data.chunks(MOST_AT_ONCE).enumerate() {
            if !budget.try_take(part.len()) {
                self.inode.shared.flush_in_background();
                budget.take(part.len()).await;
            }
            self.inode.buffer(offset + (nth * MOST_AT_ONCE) as u64, part)?;
        }
        Ok(())
    }

    /// Everything written by this client to the file is on storage, its length published.
    pub async fn fsync(&self) -> Result<(), FsError> {
        let flushed = self.inode.flush().await;
        self.report()?;
        flushed
    }

    /// What close(2) does: as [`File::fsync`] if this handle wrote, nothing otherwise.
    pub async fn flush(&self) -> Result<(), FsError> {
        if self.wrote.load(Ordering::Acquire) || (self.writes && self.inode.has_dirty()) {
            self.fsync().await
        } else {
            self.report()
        }
    }

    /// Makes `offset .. offset + len` read as zeros, and extends the file unless `keep_size`.
    pub async fn zero_range(&self, offset: u64, len: u64, keep_size: bool) -> Result<(), FsError> {
        let _alone = self.inode.gate.write().await;
        self.check_write(offset, 0)?;
        self.inode.flush_data().await;
        self.report()?;
        self.inode.punch(offset, len).await?;
        let end = offset.saturating_add(len);
        if !keep_size && end > self.length() {
            self.check_write(end, 0)?;
            self.inode.state().touched(end);
        }
        Ok(())
    }

    /// Makes sure that the file is at least `end` bytes long. Space is not reserved.
    pub async fn extend(&self, end: u64) -> Result<(), FsError> {
        let _alone = self.inode.gate.write().await;
        self.check_write(end, 0)?;
        let mut state = self.inode.state();
        if end > state.length() {
            state.touched(end);
        }
        Ok(())
    }

    /// Ends the handle: flushes, publishes, closes the session at the meta server. Only the first
    /// call does something.
    pub async fn close(&self) -> Result<(), FsError> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        close(self.inode.clone(), self.session, self.writes).await?;
        self.report()
    }
}

async fn close(inode: Arc<OpenInode>, session: u64, writes: bool) -> Result<(), FsError> {
    if writes {
        inode.flush_data().await;
    }
    if session == 0 {
        return if writes { inode.publish().await } else { Ok(()) };
    }
    let _one = inode.publishing.lock().await;
    let news = inode.unpublished();
    let reply: CloseReply = inode
        .shared
        .meta
        .change("closing a file", method::CLOSE, &Credentials::ROOT, |caller| CloseRequest {
            caller: Some(caller),
            inode_id: inode.id,
            session,
            length: news.length.filter(|_| writes),
            mtime: news.mtime.filter(|_| writes),
            truncate_version: Some(news.truncate_version),
        })
        .await?;
    if writes {
        inode.published(reply.inode.as_ref(), &news);
    }
    Ok(())
}

impl Drop for File {
    fn drop(&mut self) {
        if !*self.closed.get_mut() {
            let (inode, session, writes) = (self.inode.clone(), self.session, self.writes);
            let runtime = inode.shared.runtime.clone();
            runtime.spawn(async move {
                if let Err(error) = close(inode, session, writes).await {
                    tracing::warn!(%error, "closing a file that was dropped open");
                }
            });
        }
    }
}

struct Plan {
    offset: u64,
    len: usize,
    pieces: Vec<Piece>,
    patches: Patches,
    data: (u64, u32),
    layout: Layout,
    blocks: Vec<(u64, crate::blocks::Cell, bool)>,
}

impl Plan {
    fn chunk(&self, index: u32) -> ChunkId {
        ChunkId { data: self.data.0.into(), generation: self.data.1.into(), index }
    }

    fn patched_whole(&self) -> bool {
        // Patches of one kind are disjoint and in order; a sum tells a full cover only of one kind,
        // so look for a chain of patches without a gap.
        let mut sorted: Vec<(usize, usize)> =
            self.patches.iter().map(|(at, b)| (*at, at + b.len())).collect();
        sorted.sort_unstable();
        let mut reached = 0;
        for (from, to) in sorted {
            if from > reached {
                return false;
            }
            reached = reached.max(to);
        }
        reached >= self.len
    }

    fn lay_patches(&mut self, out: &mut [u8]) {
        for (at, bytes) in self.patches.drain(..) {
            out[at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }
}
