//! Memory that direct I/O accepts.

use firefly_types::lock;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// Alignment that every disk accepts for direct I/O: 4Kn drives need it, 512e ones take it.
pub(super) const ALIGN: usize = 4096;

/// A page-aligned buffer of initialised bytes.
pub struct AlignedBuf {
    memory: NonNull<u8>,
    capacity: usize,
    len: usize,
    /// Whose slot it is, if it is not an allocation of its own.
    arena: Option<Arc<Arena>>,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let capacity = len.max(1).next_multiple_of(ALIGN);
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is a positive multiple of the alignment.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) });
        let memory = memory.unwrap_or_else(|| handle_alloc_error(layout));
        Self { memory, capacity, len, arena: None }
    }

    /// Whether it lies in memory that was registered with the kernel as this arena.
    pub(super) fn is_in(&self, arena: &Arc<Arena>) -> bool {
        self.arena.as_ref().is_some_and(|mine| Arc::ptr_eq(mine, arena))
    }

    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, ALIGN).expect("buffers are far smaller than isize::MAX")
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        match &self.arena {
            Some(arena) => lock(&arena.free).push(self.memory),
            // SAFETY: allocated in `zeroed` with the same layout, freed only here.
            None => unsafe { dealloc(self.memory.as_ptr(), Self::layout(self.capacity)) },
        }
    }
}

/// Slots of one block each in one piece of memory, which can be registered with the kernel once:
/// then it need not look up the pages for each request.
pub(super) struct Arena {
    memory: AlignedBuf,
    free: Mutex<Vec<NonNull<u8>>>,
}

// SAFETY: the pointers lead into `memory`, each to a slot that nobody else has.
unsafe impl Send for Arena {}
// SAFETY: as above, and the list is behind a lock.
unsafe impl Sync for Arena {}

impl Arena {
    pub(super) fn new(slots: usize) -> Arc<Self> {
        let mut memory = AlignedBuf::zeroed(slots * ALIGN);
        let free = memory.chunks_exact_mut(ALIGN).map(|slot| NonNull::from(slot).cast()).collect();
        Arc::new(Self { memory, free: Mutex::new(free) })
    }

    /// A slot, if one is free.
    pub(super) fn take(self: &Arc<Self>) -> Option<AlignedBuf> {
        let memory = lock(&self.free).pop()?;
        Some(AlignedBuf { memory, capacity: ALIGN, len: ALIGN, arena: Some(Arc::clone(self)) })
    }

    /// All of it, for the kernel.
    pub(super) fn whole(&self) -> (*mut u8, usize) {
        (self.memory.memory.as_ptr(), self.memory.len)
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` is at most the capacity, and all of it was initialised with zeros.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// Buffers that were used before: fresh memory costs a page fault for each page.
#[derive(Default)]
pub(super) struct Spare {
    pub(super) arena: Option<Arc<Arena>>,
    buffers: Vec<AlignedBuf>,
    bytes: usize,
}

/// Bytes of spare buffers that are kept.
const SPARE_BYTES: usize = 8 << 20;

impl Spare {
    /// A buffer of `len` bytes with any content.
    pub(super) fn take(&mut self, len: usize) -> AlignedBuf {
        if len <= ALIGN
            && let Some(mut buf) = self.arena.as_ref().and_then(Arena::take)
        {
            buf.len = len;
            return buf;
        }
        // The newest that fits well: it is the likeliest to be in the processor's cache.
        let fits = |b: &AlignedBuf| b.capacity >= len && b.capacity <= 2 * len.max(ALIGN);
        let Some(at) = self.buffers.iter().rposition(fits) else { return AlignedBuf::zeroed(len) };
        let mut buf = self.buffers.swap_remove(at);
        self.bytes -= buf.capacity;
        buf.len = len;
        buf
    }

    pub(super) fn put(&mut self, buf: AlignedBuf) {
        if buf.arena.is_some() {
            return;
        }
        // Few, so that looking through them stays cheap.
        if self.buffers.len() < 64 && self.bytes + buf.capacity <= SPARE_BYTES {
            self.bytes += buf.capacity;
            self.buffers.push(buf);
        }
    }
}
