//! Payload memory: page-aligned blocks from a bounded pool.
//!
//! Blocks are fit for O_DIRECT (aligned to 4096, capacity a multiple of it) and live long enough
//! to be registered once with each RDMA device: a block that is given back keeps its
//! registrations and waits for the next taker. The pool never holds more than its limit, in use
//! and waiting together, so a flood of requests turns into waiting, not into memory.

use firefly_types::lock;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Bound, Deref, DerefMut, RangeBounds};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Alignment and granularity of payload memory: the page, and the largest logical block that
/// O_DIRECT asks for on today's drives.
pub const BUF_ALIGN: usize = 4096;

/// Free blocks kept for the next taker; beyond it memory goes back to the system.
const CACHE_BYTES: usize = 256 << 20;

/// One allocation and its registrations with devices.
struct Block {
    ptr: NonNull<u8>,
    capacity: usize,
    /// (fabric instance, its registration): dropped before the memory is freed.
    registrations: Mutex<Vec<(u64, Arc<dyn Any + Send + Sync>)>>,
}

// SAFETY: a block is plain memory reached through exactly one `Lease`, which hands out `&mut` only
// to a unique owner (`BufMut`) and `&` to shared ones (`Buf`).
unsafe impl Send for Block {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for Block {}

impl Block {
    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, BUF_ALIGN).expect("capacities are far below isize::MAX")
    }

    fn new(capacity: usize) -> Option<Block> {
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is a positive multiple of the page size.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Block { ptr, capacity, registrations: Mutex::default() })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        lock(&self.registrations).clear();
        // SAFETY: allocated in `new` with the same layout, freed only here.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.capacity)) }
    }
}

#[derive(Default)]
struct Free {
    by_capacity: BTreeMap<usize, Vec<Block>>,
    /// Bytes in `by_capacity`.
    cached: usize,
    /// Bytes allocated from the system, in use or cached.
    held: usize,
}

struct Shared {
    /// One permit per page in use. Tokio's semaphore is fair, so a large request is not starved
    /// by small ones.
    pages: Arc<Semaphore>,
    total_pages: u32,
    free: Mutex<Free>,
}

/// A bounded source of payload memory. Cloning shares the pool.
#[derive(Clone)]
pub struct BufPool {
    shared: Arc<Shared>,
}

impl BufPool {
    /// A pool that holds at most `limit_bytes` (rounded down to whole pages, at least one).
    pub fn new(limit_bytes: usize) -> BufPool {
        let total_pages = u32::try_from(limit_bytes / BUF_ALIGN).unwrap_or(u32::MAX).max(1);
        let pages = Arc::new(Semaphore::new(total_pages as usize));
        BufPool { shared: Arc::new(Shared { pages, total_pages, free: Mutex::default() }) }
    }

    /// The most bytes this pool holds.
    pub fn limit(&self) -> usize {
        self.shared.total_pages as usize * BUF_ALIGN
    }

    /// Bytes in use now (not counting free blocks that wait for a taker).
    pub fn in_use(&self) -> usize {
        (self.shared.total_pages as usize - self.shared.pages.available_permits()) * BUF_ALIGN
    }

    /// Memory for `len` bytes if the pool has room for it now. The contents are whatever the
    /// block's last user left, or zeros.
    pub fn try_alloc(&self, len: usize) -> Option<BufMut> {
        let pages = self.class(len);
        if pages > self.shared.total_pages {
            return None;
        }
        let permit = self.shared.pages.clone().try_acquire_many_owned(pages).ok()?;
        let block = self.shared.take(pages as usize * BUF_ALIGN)?;
        Some(BufMut { lease: Lease { block: Some(block), pool: self.shared.clone(), _permit: permit }, len })
    }

    /// Memory for `len` bytes, waiting in line until the pool has room. A request for more than
    /// the whole pool waits until it is alone and is then served all the same: check lengths that
    /// come from a peer before asking. The contents are whatever the block's last user left, or
    /// zeros.
    pub async fn alloc(&self, len: usize) -> BufMut {
        let pages = self.class(len);
        let permits = pages.min(self.shared.total_pages);
        let permit = self
            .shared
            .pages
            .clone()
            .acquire_many_owned(permits)
            .await
            .expect("the semaphore is never closed");
        let capacity = pages as usize * BUF_ALIGN;
        let block = self.shared.take(capacity).unwrap_or_else(|| handle_alloc_error(Block::layout(capacity)));
        BufMut { lease: Lease { block: Some(block), pool: self.shared.clone(), _permit: permit }, len }
    }

    /// Pages of the size class for `len`: eight classes per doubling waste at most an eighth and
    /// keep free blocks reusable.
    fn class(&self, len: usize) -> u32 {
        let pages = u32::try_from(len.div_ceil(BUF_ALIGN).max(1)).unwrap_or(u32::MAX);
        if pages <= 8 || pages > 1 << 30 {
            return pages;
        }
        let rounded = pages.next_multiple_of(pages.next_power_of_two() / 16);
        if pages <= self.shared.total_pages { rounded.min(self.shared.total_pages) } else { rounded }
    }
}

impl fmt::Debug for BufPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufPool({} of {} bytes in use)", self.in_use(), self.limit())
    }
}

impl Shared {
    fn take(&self, capacity: usize) -> Option<Block> {
        let mut evicted = Vec::new();
        {
            let mut free = lock(&self.free);
            if let Some(block) = free.by_capacity.get_mut(&capacity).and_then(Vec::pop) {
                free.cached -= capacity;
                return Some(block);
            }
            // The permits say that memory in use leaves room; free blocks of other classes yield.
            let limit = self.total_pages as usize * BUF_ALIGN;
            while free.held + capacity > limit && free.cached > 0 {
                let Some(mut entry) = free.by_capacity.last_entry() else { break };
                let block = entry.get_mut().pop();
                if entry.get().is_empty() {
                    entry.remove();
                }
                if let Some(block) = block {
                    free.cached -= block.capacity;
                    free.held -= block.capacity;
                    evicted.push(block);
                }
            }
            free.held += capacity;
        }
        drop(evicted);
        let block = Block::new(capacity);
        if block.is_none() {
            lock(&self.free).held -= capacity;
        }
        block
    }

    fn put(&self, block: Block) {
        let mut free = lock(&self.free);
        let limit = self.total_pages as usize * BUF_ALIGN;
        if free.cached + block.capacity <= CACHE_BYTES && free.held <= limit {
            free.cached += block.capacity;
            free.by_capacity.entry(block.capacity).or_default().push(block);
        } else {
            free.held -= block.capacity;
            drop(free);
            drop(block);
        }
    }
}

/// A block in somebody's hands; goes back to its pool when dropped, before its permits do.
struct Lease {
    block: Option<Block>,
    pool: Arc<Shared>,
    _permit: OwnedSemaphorePermit,
}

impl Lease {
    fn block(&self) -> &Block {
        self.block.as_ref().expect("the block leaves only in drop")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.put(block);
        }
    }
}

/// Payload memory with one owner, who may write.
pub struct BufMut {
    lease: Lease,
    len: usize,
}

impl BufMut {
    /// Bytes that count as content.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte counts as content.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that the memory takes: the length asked for, rounded up to at least a whole page.
    pub fn capacity(&self) -> usize {
        self.lease.block().capacity
    }

    /// Declares the first `len` bytes to be the content. All of the memory is initialised, so
    /// growing shows old bytes of this process, never undefined ones.
    ///
    /// # Panics
    /// If `len` is over the capacity: a bug of the caller.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "set_len({len}) on a buffer of {} bytes", self.capacity());
        self.len = len;
    }

    /// Gives up the right to write in return for cheap sharing.
    pub fn freeze(self) -> Buf {
        Buf { start: 0, len: self.len, lease: Arc::new(self.lease) }
    }

    /// The cached registration with fabric instance `fabric`, made by `register(address, capacity)`
    /// at the first use.
    pub(crate) fn registration<E>(
        &self,
        fabric: u64,
        register: impl FnOnce(*mut u8, usize) -> Result<Arc<dyn Any + Send + Sync>, E>,
    ) -> Result<Arc<dyn Any + Send + Sync>, E> {
        registration(self.lease.block(), fabric, register)
    }
}

fn registration<E>(
    block: &Block,
    fabric: u64,
    register: impl FnOnce(*mut u8, usize) -> Result<Arc<dyn Any + Send + Sync>, E>,
) -> Result<Arc<dyn Any + Send + Sync>, E> {
    let mut known = lock(&block.registrations);
    if let Some((_, found)) = known.iter().find(|(id, _)| *id == fabric) {
        return Ok(found.clone());
    }
    let made = register(block.ptr.as_ptr(), block.capacity)?;
    known.push((fabric, made.clone()));
    Ok(made)
}

impl Deref for BufMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` <= capacity, the block is initialised and alive as long as the lease.
        unsafe { std::slice::from_raw_parts(self.lease.block().ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for BufMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` is the only owner of the block.
        unsafe { std::slice::from_raw_parts_mut(self.lease.block().ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for BufMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufMut({} of {} bytes)", self.len, self.capacity())
    }
}

/// Payload memory that many may read. Cloning and slicing share the block.
#[derive(Clone)]
pub struct Buf {
    lease: Arc<Lease>,
    start: usize,
    len: usize,
}

impl Buf {
    /// Part of this buffer, sharing its memory.
    ///
    /// # Panics
    /// If the range is not within the buffer, as slicing a `[u8]` does.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Buf {
        let from = match range.start_bound() {
            Bound::Included(n) => *n,
            Bound::Excluded(n) => n + 1,
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(n) => n + 1,
            Bound::Excluded(n) => *n,
            Bound::Unbounded => self.len,
        };
        assert!(from <= to && to <= self.len, "slice {from}..{to} of a buffer of {} bytes", self.len);
        Buf { lease: self.lease.clone(), start: self.start + from, len: to - from }
    }

    /// As [`BufMut::registration`].
    pub(crate) fn registration<E>(
        &self,
        fabric: u64,
        register: impl FnOnce(*mut u8, usize) -> Result<Arc<dyn Any + Send + Sync>, E>,
    ) -> Result<Arc<dyn Any + Send + Sync>, E> {
        registration(self.lease.block(), fabric, register)
    }
}

impl Deref for Buf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: start + len <= the block's capacity; nobody writes to a frozen block.
        unsafe { std::slice::from_raw_parts(self.lease.block().ptr.as_ptr().add(self.start), self.len) }
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<BufMut> for Buf {
    fn from(buf: BufMut) -> Buf {
        buf.freeze()
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

/// Granularity of [`Heads`], which a semaphore keeps in 32 bits. Heads up to it, as most are, are
/// not counted: the number of calls in flight bounds them.
const HEAD_UNIT: usize = 1 << 10;
/// Long heads of one connection in memory at a time, in and out: several of the longest, or thousands
/// of usual ones.
const CONNECTION_HEADS: usize = 8 << 20;

/// Bounds the memory of messages' heads, which do not come from a pool: of one connection and of
/// all connections of its client or server together. Waiting in line for room is what turns a flood
/// into back pressure.
#[derive(Clone)]
pub(crate) struct Heads {
    all: Arc<Semaphore>,
    connection: Arc<Semaphore>,
    /// The most that one head is counted for, or a limit below it would refuse it for ever.
    most: u32,
}

/// Room that a head takes while its message is acted on.
#[derive(Debug, Default)]
pub(crate) struct HeadRoom {
    #[expect(dead_code, reason = "held, not read")]
    permits: Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>,
}

impl Heads {
    /// At most `limit_bytes` for all connections together.
    pub(crate) fn new(limit_bytes: usize) -> Heads {
        let units = (limit_bytes / HEAD_UNIT).clamp(1, u32::MAX as usize >> 3);
        let most = units.min(CONNECTION_HEADS / HEAD_UNIT) as u32;
        Heads { all: Arc::new(Semaphore::new(units)), connection: Arc::new(Semaphore::new(0)), most }
            .of_connection()
    }

    /// The same limit for another connection.
    pub(crate) fn of_connection(&self) -> Heads {
        let connection = Arc::new(Semaphore::new(CONNECTION_HEADS / HEAD_UNIT));
        Heads { all: self.all.clone(), connection, most: self.most }
    }

    fn units(&self, len: usize) -> u32 {
        len.div_ceil(HEAD_UNIT).min(self.most as usize) as u32
    }

    /// Room for a head of `len` bytes if there is some now.
    pub(crate) fn try_take(&self, len: usize) -> Option<HeadRoom> {
        if len <= HEAD_UNIT {
            return Some(HeadRoom::default());
        }
        let connection = self.connection.clone().try_acquire_many_owned(self.units(len)).ok()?;
        let all = self.all.clone().try_acquire_many_owned(self.units(len)).ok()?;
        Some(HeadRoom { permits: Some((connection, all)) })
    }

    /// Bytes of heads that take room now, of all connections.
    #[cfg(test)]
    pub(crate) fn in_use(&self, limit_bytes: usize) -> usize {
        limit_bytes - self.all.available_permits() * HEAD_UNIT
    }

    /// The least room that is counted, waiting in line for it.
    pub(crate) async fn take_some(&self) -> HeadRoom {
        self.take(HEAD_UNIT + 1).await
    }

    /// Room for a head of `len` bytes, waiting in line for it.
    pub(crate) async fn take(&self, len: usize) -> HeadRoom {
        if let Some(room) = self.try_take(len) {
            return room;
        }
        let units = self.units(len);
        let connection = self.connection.clone().acquire_many_owned(units).await;
        let all = self.all.clone().acquire_many_owned(units).await;
        HeadRoom { permits: connection.ok().zip(all.ok()) }
    }
}

impl Default for Heads {
    /// 64 MiB for all connections: sixty-four of the longest, and one part in eight of the default
    /// payload memory.
    fn default() -> Self {
        Heads::new(64 << 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn memory_is_aligned_bounded_and_comes_back() {
        let pool = BufPool::new(64 << 10);
        let mut a = pool.try_alloc(5000).unwrap();
        assert_eq!((a.len(), a.capacity(), a.as_ptr() as usize % BUF_ALIGN), (5000, 8192, 0));
        assert!(a.iter().all(|b| *b == 0));
        a.fill(7);
        let b = pool.try_alloc(56 << 10).unwrap();
        assert!(pool.try_alloc(1).is_none());
        assert!(pool.try_alloc(usize::MAX / 2).is_none());
        let shared = a.freeze();
        let part = shared.slice(1000..=1001);
        drop(shared);
        assert_eq!((&*part, pool.in_use()), (&[7u8, 7][..], 64 << 10));
        drop((part, b));
        assert_eq!(pool.in_use(), 0);
        // Free blocks of other sizes yield to a large one, so the limit holds.
        let all = pool.try_alloc(64 << 10).unwrap();
        assert_eq!(lock(&pool.shared.free).held, 64 << 10);
        drop(all);
    }

    #[test]
    fn a_waiter_is_served_in_line_when_memory_returns() {
        let pool = BufPool::new(16 << 10);
        let held = pool.try_alloc(12 << 10).unwrap();
        let mut large = Box::pin(pool.alloc(16 << 10));
        assert!(large.as_mut().now_or_never().is_none());
        // A page is free, but the large request is first in line.
        assert!(pool.alloc(1).now_or_never().is_none());
        drop(held);
        let got = large.as_mut().now_or_never().expect("served");
        assert_eq!(got.len(), 16 << 10);
        drop(got);
        // More than the pool holds is served alone rather than never.
        let giant = pool.alloc(20 << 10).now_or_never().expect("served alone");
        assert!(pool.try_alloc(1).is_none());
        drop(giant);
        assert!(pool.try_alloc(1).is_some());
        assert!(lock(&pool.shared.free).held <= 16 << 10);
    }

    #[test]
    fn registrations_live_as_long_as_the_block() {
        let pool = BufPool::new(1 << 20);
        let buf = pool.try_alloc(4096).unwrap();
        let mut made = 0;
        let mut ask = |buf: &BufMut| {
            buf.registration(1, |_, _| {
                made += 1;
                Ok::<_, ()>(Arc::new(42u32) as _)
            })
            .unwrap()
        };
        let first = ask(&buf);
        drop(buf);
        let buf = pool.try_alloc(4096).unwrap();
        let second = ask(&buf);
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(made, 1);
        drop((buf, second));
        drop(pool);
        assert_eq!(Arc::strong_count(&first), 1);
    }

    proptest::proptest! {
        #[test]
        fn classes_waste_at_most_an_eighth(len in 0usize..1 << 34) {
            let pool = BufPool::new(1 << 36);
            let capacity = pool.class(len) as usize * BUF_ALIGN;
            let exact = len.next_multiple_of(BUF_ALIGN).max(BUF_ALIGN);
            proptest::prop_assert!(capacity >= exact && capacity - exact <= exact / 8);
        }
    }
}
