//! The clock of leases: one that also counts the time in which the machine was suspended.

use firefly_types::Nanos;
use rustix::time::{ClockId, clock_gettime};

/// CLOCK_BOOTTIME.
pub(crate) fn now() -> Nanos {
    let t = clock_gettime(ClockId::Boottime);
    Nanos((t.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_nsec as u64))
}
