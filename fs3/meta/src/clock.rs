//! The time of operations: wall-clock time that never stands still or goes back within one server,
//! so that two changes of a directory never carry the same stamp.

use crate::schema::Stamp;
use firefly_types::Nanos;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Where time comes from. Tests bring their own.
pub trait Clock: Send + Sync + 'static {
    /// Nanoseconds since 1970, larger each time.
    fn tick(&self) -> u64;

    /// Time since some start, which setting the system's clock does not change: for silence.
    fn monotonic(&self) -> Nanos;
}

/// A tick as a time.
pub(crate) fn stamp(tick: u64) -> Stamp {
    Stamp { seconds: (tick / 1_000_000_000) as i64, nanos: (tick % 1_000_000_000) as u32 }
}

/// The system's clock.
#[derive(Debug)]
pub struct WallClock {
    last: AtomicU64,
    start: Instant,
}

impl Default for WallClock {
    fn default() -> Self {
        Self { last: AtomicU64::new(0), start: Instant::now() }
    }
}

impl Clock for WallClock {
    fn tick(&self) -> u64 {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        let next = |last: u64| Some(wall.max(last + 1));
        let last = self.last.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).unwrap_or_default();
        wall.max(last + 1)
    }

    fn monotonic(&self) -> Nanos {
        Nanos::ZERO.after(self.start.elapsed())
    }
}
