//! Registered memory in equal slots, for messages: one allocation, one registration, and no key
//! for the peer.

use super::device::{Device, Reach, Region};
use super::queue::{Piece, piece};
use crate::buf::BUF_ALIGN;
use crate::error::LinkError;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;

/// The slots. Which of them a device may touch right now is the owner's business, who drops this
/// only after the queue pair.
pub(crate) struct Slab {
    /// Some until drop; goes before the memory.
    region: Option<Region>,
    key: u32,
    memory: NonNull<u8>,
    slot: usize,
    count: usize,
}

// SAFETY: plain memory with one owner; its methods give out slices by `&self` and `&mut self`.
unsafe impl Send for Slab {}

impl Slab {
    /// `count` slots of `slot` bytes.
    pub(crate) fn new(device: &Arc<Device>, slot: usize, count: usize) -> Result<Slab, LinkError> {
        let layout = Slab::layout(slot, count);
        // SAFETY: the layout's size is positive: see `layout`.
        let memory = unsafe { alloc_zeroed(layout) };
        let memory = NonNull::new(memory).unwrap_or_else(|| handle_alloc_error(layout));
        let mut slab = Slab { region: None, key: 0, memory, slot, count };
        // SAFETY: the memory lives until `slab` is dropped, which drops the region first. Nobody
        // but this device touches it behind the back of the owner, and only the slots posted.
        let region = unsafe { Region::new(device, memory.as_ptr(), layout.size(), Reach::Local) }?;
        slab.key = region.keys().local;
        slab.region = Some(region);
        Ok(slab)
    }

    fn layout(slot: usize, count: usize) -> Layout {
        let size = (slot * count).max(1).next_multiple_of(BUF_ALIGN);
        Layout::from_size_align(size, BUF_ALIGN).expect("slots are few and small")
    }

    fn at(&self, index: usize) -> *mut u8 {
        assert!(index < self.count, "slot {index} of {}", self.count);
        // SAFETY: within the allocation, as was just checked.
        unsafe { self.memory.as_ptr().add(index * self.slot) }
    }

    /// The first `len` bytes of a slot, for a request.
    pub(crate) fn piece(&self, index: usize, len: usize) -> Piece {
        assert!(len <= self.slot, "{len} bytes of a slot of {}", self.slot);
        piece(self.at(index), len, self.key)
    }

    /// Bytes that arrived.
    ///
    /// # Safety
    /// The slot is not posted: its completion was polled, and it was not posted again.
    pub(crate) unsafe fn read(&self, index: usize, len: usize) -> &[u8] {
        assert!(len <= self.slot, "{len} bytes of a slot of {}", self.slot);
        // SAFETY: initialised memory within the allocation; the caller promises that no device
        // writes to it.
        unsafe { std::slice::from_raw_parts(self.at(index), len) }
    }

    /// A slot to be filled.
    ///
    /// # Safety
    /// The slot is not posted.
    pub(crate) unsafe fn write(&mut self, index: usize) -> &mut [u8] {
        // SAFETY: as in `read`; `&mut self` is the only owner.
        unsafe { std::slice::from_raw_parts_mut(self.at(index), self.slot) }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        drop(self.region.take());
        // SAFETY: allocated in `new` with the same layout, freed only here, registered no more.
        unsafe { dealloc(self.memory.as_ptr(), Slab::layout(self.slot, self.count)) }
    }
}
