//! Memory windows (type 2): keys of their own for parts of registered memory, made and taken back
//! by requests on a queue pair, without the kernel.
//!
//! A window's key is good only on the queue pair that bound it and only until it is invalidated,
//! by a request of this side's or by the SEND with which the peer ends a call. Binding costs a
//! request and no completion; the registration under it (`Reach::Windows`) gives peers no right at
//! all.

use super::device::{Device, failed};
use super::ffi;
use crate::error::LinkError;
use std::ptr::NonNull;
use std::sync::Arc;

/// A window, bound or free. Dropped before the queue pair that bound it: some devices let go of a
/// queue pair only when its windows are gone.
pub(crate) struct MemoryWindow {
    mw: NonNull<ffi::ibv_mw>,
    device: Arc<Device>,
}

// SAFETY: verbs objects may be used from any thread; the library locks where it must.
unsafe impl Send for MemoryWindow {}

impl MemoryWindow {
    /// A free window.
    pub(crate) fn new(device: &Arc<Device>) -> Result<MemoryWindow, LinkError> {
        // SAFETY: an open device, whose table has this entry if it is set.
        let alloc = unsafe { device.context.as_ref() }.ops.alloc_mw;
        // SAFETY: a live protection domain.
        let mw = alloc
            .map_or(std::ptr::null_mut(), |alloc| unsafe { alloc(device.pd.as_ptr(), ffi::IBV_MW_TYPE_2) });
        let mw = NonNull::new(mw).ok_or_else(|| failed(device.name(), "making a memory window"))?;
        Ok(MemoryWindow { mw, device: device.clone() })
    }

    /// The window, and the key that binding it shall give: its low byte is the caller's to choose,
    /// and a key is not used twice in a row.
    pub(super) fn next(&mut self) -> (*mut ffi::ibv_mw, u32) {
        // SAFETY: alive.
        let key = unsafe { self.mw.as_ref() }.rkey;
        (self.mw.as_ptr(), key & !0xFF | key.wrapping_add(1) & 0xFF)
    }

    /// The request that binds it to `key` was posted. The library leaves it to its caller to note
    /// the key of a window of type 2; the next request names the window by it.
    pub(super) fn bound(&mut self, key: u32) {
        // SAFETY: alive, and used by nobody else.
        unsafe { self.mw.as_mut() }.rkey = key;
    }
}

impl Drop for MemoryWindow {
    fn drop(&mut self) {
        // SAFETY: an open device; the table has the entry, as it had the one that made this.
        let dealloc = unsafe { self.device.context.as_ref() }.ops.dealloc_mw;
        if let Some(dealloc) = dealloc {
            // SAFETY: made by `new`, let go once.
            unsafe { dealloc(self.mw.as_ptr()) };
        }
    }
}
