//! Locking that outlives a panic elsewhere.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also after a panic of another holder. For state that is valid between any two statements
/// under its lock, so that a panic can leave nothing half done that a later holder would trust; one
/// thread's panic must not take the others along.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
