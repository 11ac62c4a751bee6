//! The one retry policy: exponential backoff with jitter under a total limit. Pure: the caller
//! supplies elapsed time and randomness and does the sleeping.

use std::time::Duration;

/// When to try again, and when to stop trying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// Delay before the second try.
    pub first: Duration,
    /// No delay is longer.
    pub most: Duration,
    /// No try starts later than this after the first.
    pub total: Duration,
}

impl Backoff {
    /// For calls between servers and clients of one cluster: quick first retries, since most
    /// failures are a fail-over that takes a few seconds, and a total that outlasts one.
    pub const CLUSTER: Backoff = Backoff {
        first: Duration::from_millis(5),
        most: Duration::from_millis(500),
        total: Duration::from_secs(30),
    };

    /// Delay before try number `attempt` (the first retry is 1), or `None` to give up.
    /// `elapsed` counts from the first try; `jitter` is uniform in 0..1 and spreads retries of
    /// many clients over the upper half of the delay.
    pub fn delay(&self, attempt: u32, elapsed: Duration, jitter: f64) -> Option<Duration> {
        debug_assert!((0.0..=1.0).contains(&jitter));
        let doubled = self.first.saturating_mul(1u32 << attempt.saturating_sub(1).min(30));
        let delay = doubled.min(self.most).mul_f64(0.5 + 0.5 * jitter);
        (elapsed + delay <= self.total).then_some(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_a_ceiling_and_then_gives_up() {
        let policy = Backoff {
            first: Duration::from_millis(10),
            most: Duration::from_millis(40),
            total: Duration::from_secs(1),
        };
        let at = |n| policy.delay(n, Duration::ZERO, 1.0).unwrap().as_millis();
        assert_eq!([at(1), at(2), at(3), at(4), at(99)], [10, 20, 40, 40, 40]);
        assert_eq!(policy.delay(1, Duration::ZERO, 0.0), Some(Duration::from_millis(5)));
        assert_eq!(policy.delay(3, Duration::from_millis(990), 0.5), None);
    }
}
