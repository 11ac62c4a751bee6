//! Exactly-once lanes: a server keeps one record per (client, channel), so a channel carries one
//! update at a time, and a retry repeats channel and sequence.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::sync::{Semaphore, SemaphorePermit};

pub(crate) struct Lanes {
    free: Mutex<Vec<State>>,
    permits: Semaphore,
    next_channel: AtomicU32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    channel: u32,
    sequence: u64,
}

/// One update's right to a channel. Dropped without [`Lane::answered`], the channel is never used
/// again: its last update may still be on its way, and a second one must not run beside it.
pub(crate) struct Lane<'a> {
    lanes: &'a Lanes,
    state: State,
    answered: bool,
    _permit: SemaphorePermit<'a>,
}

impl Lanes {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            free: Mutex::new(Vec::with_capacity(most)),
            permits: Semaphore::new(most.max(1)),
            // 0 stands for "no lane" on the wire.
            next_channel: AtomicU32::new(1),
        }
    }

    /// Waits for a free lane and numbers the next update on it.
    pub(crate) async fn take(&self) -> Lane<'_> {
        let permit = self.permits.acquire().await.expect("the semaphore is never closed");
        let mut state = self.lock().pop().unwrap_or_else(|| State {
            channel: self.next_channel.fetch_add(1, Ordering::Relaxed),
            sequence: 0,
        });
        state.sequence += 1;
        Lane { lanes: self, state, answered: false, _permit: permit }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<State>> {
        self.free.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Lane<'_> {
    pub(crate) fn channel(&self) -> u32 {
        self.state.channel
    }

    pub(crate) fn sequence(&self) -> u64 {
        self.state.sequence
    }

    /// The server's answer is definite: the channel is free for the next update.
    pub(crate) fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for Lane<'_> {
    fn drop(&mut self) {
        if self.answered {
            self.lanes.lock().push(self.state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_channel_is_reused_only_after_an_answer() {
        let lanes = Lanes::new(2);
        let first = lanes.take().await;
        let second = lanes.take().await;
        assert_eq!((first.channel(), first.sequence(), second.channel()), (1, 1, 2));
        assert_eq!(lanes.permits.available_permits(), 0);
        first.answered();
        let again = lanes.take().await;
        assert_eq!((again.channel(), again.sequence()), (1, 2));
        drop(again);
        let fresh = lanes.take().await;
        assert_eq!((fresh.channel(), fresh.sequence()), (3, 1));
    }
}
