//! Fair share: what users held lately, with decay, in whole numbers.
//!
//! The usage of a user grows with the node-thousandths that the user holds and halves every
//! half-life. It is brought forward lazily, in sixteen steps per half-life, by integer arithmetic:
//! the same events give the same order on every machine.

use firefly_types::Nanos;

/// Decay steps per half-life.
const STEPS: u64 = 16;
/// 2^(-1/16) in units of 2^-32.
const FACTOR: u128 = 4_112_874_773;
/// Steps after which a usage has settled: 64 half-lives.
const SETTLED: u64 = 64 * STEPS;

fn step_ns(half_life_ms: u64) -> u64 {
    (half_life_ms.saturating_mul(1_000_000) / STEPS).max(1)
}

/// Decayed usage of one user or team.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Decayed {
    /// Thousandths of nodes, times nanoseconds.
    value: u128,
    /// Thousandths of nodes held now.
    pub(crate) rate: u64,
    decayed_at: Nanos,
    charged_at: Nanos,
}

impl Decayed {
    /// Starts at `now`, with nothing. All usages decay at the same multiples of a step, so that
    /// they can be compared and added up.
    pub(crate) fn new(now: Nanos, half_life_ms: u64) -> Self {
        let step = step_ns(half_life_ms);
        Self { value: 0, rate: 0, decayed_at: Nanos(now.0 / step * step), charged_at: now }
    }

    /// Both together; both must have been brought forward to the same time.
    pub(crate) fn merge(&mut self, other: &Decayed) {
        self.value += other.value;
        self.rate += other.rate;
    }

    /// The same usage under another half-life from `now` on.
    pub(crate) fn realigned(&self, now: Nanos, half_life_ms: u64) -> Self {
        Self { value: self.value, rate: self.rate, ..Self::new(now, half_life_ms) }
    }

    /// Charges for something that ended `age_ms` ago.
    pub(crate) fn charge_past(&mut self, milli_ms: u64, age_ms: u64, half_life_ms: u64) {
        let halves = age_ms / half_life_ms.max(1);
        if halves < 64 {
            self.value += (u128::from(milli_ms) * 1_000_000) >> halves;
        }
    }

    /// Brings it forward.
    pub(crate) fn advance(&mut self, now: Nanos, half_life_ms: u64) {
        let step = step_ns(half_life_ms);
        let mut due = now.0.saturating_sub(self.decayed_at.0) / step;
        if due > SETTLED {
            // Beyond this nothing changes but the clock.
            let skipped = Nanos(self.decayed_at.0 + (due - SETTLED) * step);
            (self.decayed_at, self.charged_at, due) = (skipped, skipped.max(self.charged_at), SETTLED);
        }
        for _ in 0..due {
            let at = Nanos(self.decayed_at.0 + step);
            self.charge_until(at);
            self.value = (self.value * FACTOR) >> 32;
            self.decayed_at = at;
            if self.value == 0 && self.rate == 0 {
                let left = now.0.saturating_sub(at.0) / step;
                self.decayed_at = Nanos(at.0 + left * step);
                break;
            }
        }
        self.charge_until(now);
    }

    fn charge_until(&mut self, at: Nanos) {
        let ns = at.0.saturating_sub(self.charged_at.0);
        self.value += u128::from(self.rate) * u128::from(ns);
        self.charged_at = self.charged_at.max(at);
    }

    /// Usage per share; call [`Decayed::advance`] first.
    #[cfg(test)]
    pub(crate) fn per_share(&self, shares: u32) -> u128 {
        self.value / u128::from(shares.max(1))
    }

    /// What decides whose turn it is: usage, and what is held now as if for a half-life, per share.
    /// Without the second part one user could take everything that comes free at one moment.
    pub(crate) fn turn(&self, shares: u32, half_life_ms: u64) -> u128 {
        let ahead = u128::from(self.rate) * u128::from(half_life_ms) * 1_000_000;
        (self.value + ahead) / u128::from(shares.max(1))
    }

    /// Node-hours, for people.
    pub(crate) fn node_hours(&self) -> f64 {
        self.value as f64 / 1e3 / 3.6e12
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: u64 = 3_600_000;

    fn at(ms: u64) -> Nanos {
        Nanos(ms * 1_000_000)
    }

    #[test]
    fn usage_halves_with_each_half_life() {
        let mut usage = Decayed::new(at(0), HOUR_MS);
        usage.rate = 1_000;
        usage.advance(at(60_000), HOUR_MS);
        let held = usage.per_share(1);
        usage.rate = 0;
        usage.advance(at(60_000 + HOUR_MS), HOUR_MS);
        let half = usage.per_share(1);
        assert!((held / 2).abs_diff(half) * 1_000 < held, "{held} {half}");
        usage.advance(at(200 * HOUR_MS), HOUR_MS);
        assert_eq!(usage.per_share(1), 0);
    }

    #[test]
    fn how_often_one_looks_changes_nothing() {
        let mut seldom = Decayed::new(at(0), HOUR_MS);
        seldom.rate = 500;
        let mut often = seldom;
        for ms in (0..=10 * HOUR_MS).step_by(60_000) {
            often.advance(at(ms), HOUR_MS);
        }
        seldom.advance(at(10 * HOUR_MS), HOUR_MS);
        assert_eq!(seldom.per_share(1), often.per_share(1));
    }

    #[test]
    fn a_steady_user_settles_at_the_rate_times_the_mean_life() {
        let mut usage = Decayed::new(at(0), HOUR_MS);
        usage.rate = 1_000;
        usage.advance(at(5_000 * HOUR_MS), HOUR_MS);
        // Mean life: half-life / ln 2, of one node.
        assert!((usage.node_hours() - std::f64::consts::LOG2_E).abs() < 0.05, "{}", usage.node_hours());
        // Twice the shares count half.
        assert_eq!(usage.per_share(2), usage.per_share(1) / 2);
    }

    #[test]
    fn time_that_stands_still_or_runs_back_charges_nothing() {
        let mut usage = Decayed::new(at(1_000), HOUR_MS);
        usage.rate = 1_000;
        usage.advance(at(1_000), HOUR_MS);
        usage.advance(at(10), HOUR_MS);
        assert_eq!(usage.per_share(1), 0);
    }
}
