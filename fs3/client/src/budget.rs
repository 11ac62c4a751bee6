//! Bytes that written data may occupy while it waits, over all files of a client.

use tokio::sync::Semaphore;

/// Largest part that one writer takes at a time; the whole must hold several.
pub(crate) const MOST_AT_ONCE: usize = 1 << 20;

pub(crate) struct Budget {
    free: Semaphore,
    total: usize,
}

impl Budget {
    pub(crate) fn new(bytes: usize) -> Self {
        let total = bytes.max(4 * MOST_AT_ONCE);
        Self { free: Semaphore::new(total), total }
    }

    /// Takes `bytes` if they are free; [`Budget::give`] returns them.
    pub(crate) fn try_take(&self, bytes: usize) -> bool {
        match self.free.try_acquire_many(bytes.min(self.total) as u32) {
            Ok(permit) => {
                permit.forget();
                true
            }
            Err(_) => false,
        }
    }

    /// Waits for `bytes`, at most [`MOST_AT_ONCE`].
    pub(crate) async fn take(&self, bytes: usize) {
        debug_assert!(bytes <= MOST_AT_ONCE);
        if let Ok(permit) = self.free.acquire_many(bytes as u32).await {
            permit.forget();
        }
    }

    pub(crate) fn give(&self, bytes: usize) {
        self.free.add_permits(bytes);
    }

    pub(crate) fn in_use(&self) -> usize {
        self.total - self.free.available_permits()
    }
}
