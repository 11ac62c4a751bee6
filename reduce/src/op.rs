//! A submitted operation as its owner sees it.

use crate::ReduceError;
use firefly_types::lock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

/// Called once with the outcome.
pub type Callback = Box<dyn FnOnce(&Result<(), ReduceError>) + Send>;

/// Shared by the handle and the engine.
pub(crate) struct OpState {
    /// 0 for point-to-point.
    pub(crate) sequence: u64,
    complete: AtomicBool,
    source: AtomicI32,
    outcome: Mutex<Option<Result<(), ReduceError>>>,
    wake: Condvar,
    callback: Mutex<Option<Callback>>,
}

impl OpState {
    pub(crate) fn new(sequence: u64, callback: Option<Callback>) -> Self {
        Self {
            sequence,
            complete: AtomicBool::new(false),
            source: AtomicI32::new(-1),
            outcome: Mutex::new(None),
            wake: Condvar::new(),
            callback: Mutex::new(callback),
        }
    }

    /// Runs the callback, then wakes the waiters. Call with no lock held.
    pub(crate) fn deliver(&self, outcome: Result<(), ReduceError>) {
        let callback = lock(&self.callback).take();
        if let Some(callback) = callback {
            callback(&outcome);
        }
        let mut slot = lock(&self.outcome);
        *slot = Some(outcome);
        // Inside the lock: who sees the outcome sees the flag.
        self.complete.store(true, Ordering::Release);
        drop(slot);
        self.wake.notify_all();
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    pub(crate) fn outcome(&self) -> Option<Result<(), ReduceError>> {
        if !self.is_complete() {
            return None;
        }
        lock(&self.outcome).clone()
    }

    /// Sleeps until the operation is complete or `until` has come.
    pub(crate) fn sleep(&self, until: Option<Instant>) {
        let mut outcome = lock(&self.outcome);
        while outcome.is_none() {
            outcome = match until {
                None => self.wake.wait(outcome).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return;
                    }
                    self.wake.wait_timeout(outcome, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    pub(crate) fn set_source(&self, rank: u32) {
        self.source.store(rank as i32, Ordering::Relaxed);
    }

    pub(crate) fn source(&self) -> Option<u32> {
        u32::try_from(self.source.load(Ordering::Relaxed)).ok()
    }
}
