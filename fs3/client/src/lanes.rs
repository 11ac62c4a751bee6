//! Exactly-once lanes: a server keeps one record per (client, channel), so a channel carries one
//! update at a time, and a retry repeats channel and sequence.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, SemaphorePermit};

/// After this long nothing of an update that was given up can still be on its way: several times
/// the longest retry.
const REST: Duration = Duration::from_secs(120);

/// Servers keep so many channels of one client at least; a quarter of what the meta server does.
const MOST_CHANNELS: u32 = 1024;

pub(crate) struct Lanes {
    pool: Mutex<Pool>,
    permits: Semaphore,
    next_channel: AtomicU32,
}

#[derive(Default)]
struct Pool {
    free: Vec<State>,
    /// Channels whose last update was given up, oldest first.
    resting: VecDeque<(State, Instant)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    channel: u32,
    sequence: u64,
}

/// One update's right to a channel. Dropped without [`Lane::answered`], the channel rests: its last
/// update may still be on its way, and a second one must not run beside it.
pub(crate) struct Lane<'a> {
    lanes: &'a Lanes,
    state: State,
    answered: bool,
    _permit: SemaphorePermit<'a>,
}

impl Lanes {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            pool: Mutex::default(),
            permits: Semaphore::new(most.max(1)),
            // 0 stands for "no lane" on the wire.
            next_channel: AtomicU32::new(1),
        }
    }

    /// Waits for a free lane and numbers the next update on it.
    pub(crate) async fn take(&self) -> Lane<'_> {
        let permit = self.permits.acquire().await.expect("the semaphore is never closed");
        let mut state = self.next();
        state.sequence += 1;
        Lane { lanes: self, state, answered: false, _permit: permit }
    }

    fn next(&self) -> State {
        let mut pool = self.lock();
        if let Some(free) = pool.free.pop() {
            return free;
        }
        let rested = pool.resting.front().is_some_and(|(_, since)| since.elapsed() >= REST);
        let crowded = self.next_channel.load(Ordering::Relaxed) >= MOST_CHANNELS;
        if (rested || crowded)
            && let Some((state, _)) = pool.resting.pop_front()
        {
            return state;
        }
        State { channel: self.next_channel.fetch_add(1, Ordering::Relaxed), sequence: 0 }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
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
        let mut pool = self.lanes.lock();
        if self.answered {
            pool.free.push(self.state);
        } else {
            pool.resting.push_back((self.state, Instant::now()));
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

    #[tokio::test]
    async fn channels_are_bounded_however_many_updates_are_given_up() {
        let lanes = Lanes::new(4);
        for _ in 0..3 * MOST_CHANNELS {
            assert!(lanes.take().await.channel() <= MOST_CHANNELS);
        }
    }
}
