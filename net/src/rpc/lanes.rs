//! Which carrier each lane to a peer shall use, given what failed before. Pure: time and jitter are
//! arguments, dialling is the caller's.
//!
//! Lane 0 carries small calls, the others bulk, so that a small call never waits behind a payload.
//! With rails there is a bulk lane for each, and lane `n` prefers rail `n - 1`; without, a few TCP
//! connections. A rail that failed is left out for a while and then tried again, and lanes that
//! stood in for it move back. Without a rail that works it is TCP, or an error if only RDMA will do.

use super::carrier::Want;
use crate::fabric::Transport;
use firefly_types::Backoff;
use std::ops::Range;
use std::time::{Duration, Instant};

/// When a rail that failed is tried again: quickly at first, because a link that flaps is back
/// within seconds; then each minute, since each try costs a queue pair and a wait. For ever.
const RETRY: Backoff =
    Backoff { first: Duration::from_secs(1), most: Duration::from_secs(60), total: Duration::MAX };

/// What a call needs of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Moves few bytes and waits for nobody else's.
    Small,
    /// Moves many bytes.
    Bulk,
}

#[derive(Clone, Debug, Default)]
struct Rail {
    failures: u32,
    /// Left out until then.
    retry_at: Option<Instant>,
    why: Option<String>,
}

/// What is known about the ways to one peer.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    transport: Transport,
    rails: Vec<Rail>,
    /// Why this side has no rails.
    why_none: Option<String>,
    tcp_lanes: usize,
}

impl Plan {
    pub(super) fn new(
        transport: Transport,
        rails: usize,
        why_none: Option<String>,
        tcp_lanes: usize,
    ) -> Plan {
        Plan { transport, rails: vec![Rail::default(); rails], why_none, tcp_lanes: tcp_lanes.max(1) }
    }

    /// Lanes there may ever be.
    pub(super) fn most_lanes(&self) -> usize {
        1 + self.rails.len().max(self.tcp_lanes)
    }

    /// The lanes for calls of `class`.
    pub(super) fn lanes(&self, class: Class, now: Instant) -> Range<usize> {
        match class {
            Class::Small => 0..1,
            Class::Bulk if (0..self.rails.len()).any(|rail| self.is_usable(rail, now)) => {
                1..1 + self.rails.len()
            }
            Class::Bulk => 1..1 + self.tcp_lanes,
        }
    }

    fn is_usable(&self, rail: usize, now: Instant) -> bool {
        self.rails.get(rail).is_some_and(|r| r.retry_at.is_none_or(|at| at <= now))
    }

    /// What `lane` shall be dialled for, or why there is no way.
    pub(super) fn want(&self, lane: usize, now: Instant) -> Result<Want, String> {
        let count = self.rails.len();
        let from = lane.saturating_sub(1);
        let in_order = (0..count).map(|i| (from + i) % count);
        match in_order.into_iter().find(|rail| self.is_usable(*rail, now)) {
            Some(rail) => Ok(Want::Rail(rail)),
            None if self.transport == Transport::Rdma => Err(self.why_not().unwrap_or_default()),
            None => Ok(Want::Tcp),
        }
    }

    /// Notes that `rail` does not reach the peer.
    pub(super) fn failed(&mut self, rail: usize, why: String, now: Instant, jitter: f64) {
        let Some(rail) = self.rails.get_mut(rail) else { return };
        rail.failures += 1;
        rail.retry_at = RETRY.delay(rail.failures, Duration::ZERO, jitter).map(|delay| now + delay);
        rail.why = Some(why);
    }

    /// Notes that `rail` reaches the peer.
    pub(super) fn worked(&mut self, rail: usize) {
        if let Some(rail) = self.rails.get_mut(rail) {
            *rail = Rail::default();
        }
    }

    /// Why the peer is not reached by RDMA, or not by all of it.
    pub(super) fn why_not(&self) -> Option<String> {
        let failed: Vec<&str> = self.rails.iter().filter_map(|r| r.why.as_deref()).collect();
        if failed.is_empty() { self.why_none.clone() } else { Some(failed.join("; ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NO_JITTER: f64 = 1.0;

    #[test]
    fn lanes_spread_over_rails_and_move_together_when_one_fails() {
        let start = Instant::now();
        let mut plan = Plan::new(Transport::Auto, 2, None, 3);
        let wants = |plan: &Plan, now| [0, 1, 2].map(|lane| plan.want(lane, now).unwrap());
        assert_eq!(wants(&plan, start), [Want::Rail(0), Want::Rail(0), Want::Rail(1)]);
        assert_eq!((plan.lanes(Class::Bulk, start), plan.most_lanes()), (1..3, 4));
        plan.failed(0, "rail 0: no path".into(), start, NO_JITTER);
        assert_eq!(wants(&plan, start), [Want::Rail(1); 3]);
        plan.failed(1, "rail 1: no path".into(), start, NO_JITTER);
        assert_eq!(wants(&plan, start), [Want::Tcp; 3]);
        assert_eq!(plan.lanes(Class::Bulk, start), 1..4);
        assert_eq!(plan.why_not().unwrap(), "rail 0: no path; rail 1: no path");
        // Tried again when the time has come, not before.
        let almost = start + RETRY.first - Duration::from_millis(1);
        assert_eq!(wants(&plan, almost), [Want::Tcp; 3]);
        let later = start + RETRY.first;
        assert_eq!(wants(&plan, later), [Want::Rail(0), Want::Rail(0), Want::Rail(1)]);
        // Each failure in a row doubles the wait; a success forgets them.
        plan.failed(0, "again".into(), later, NO_JITTER);
        assert_eq!(plan.want(0, later + RETRY.first), Ok(Want::Rail(1)));
        assert_eq!(plan.want(0, later + 2 * RETRY.first), Ok(Want::Rail(0)));
        plan.worked(0);
        plan.worked(1);
        assert_eq!(plan.why_not(), None);
        plan.failed(0, "much later".into(), later, NO_JITTER);
        assert_eq!(plan.want(0, later + RETRY.first), Ok(Want::Rail(0)));
    }

    #[test]
    fn without_a_way_the_reason_is_told() {
        let now = Instant::now();
        let none = Plan::new(Transport::Rdma, 0, Some("no RDMA device was found".into()), 2);
        assert!(none.want(1, now).unwrap_err().contains("no RDMA device was found"));
        let mut one = Plan::new(Transport::Rdma, 1, None, 2);
        one.failed(0, "rxe0 does not reach it".into(), now, NO_JITTER);
        assert!(one.want(1, now).unwrap_err().contains("rxe0 does not reach it"));
        assert_eq!(
            Plan::new(Transport::Tcp, 0, Some("TCP was asked for".into()), 2).want(1, now),
            Ok(Want::Tcp)
        );
    }

    proptest! {
        /// Whatever fails and works in whatever order: a rail is never wanted before its time, TCP
        /// only when no rail is due, and every rail is wanted again in the end.
        #[test]
        fn failed_rails_rest_and_return(
            rails in 1usize..4,
            events in prop::collection::vec((0usize..4, 0u8..3, 0u64..4000, 0.0..1.0f64), 0..60),
        ) {
            let mut now = Instant::now();
            let mut plan = Plan::new(Transport::Auto, rails, None, 2);
            let mut resting: Vec<Option<Instant>> = vec![None; rails];
            for (rail, what, wait, jitter) in events {
                let rail = rail % rails;
                match what {
                    0 => {
                        plan.failed(rail, "why".into(), now, jitter);
                        resting[rail] = Some(now + RETRY.first / 2);
                    }
                    1 => {
                        plan.worked(rail);
                        resting[rail] = None;
                    }
                    _ => now += Duration::from_millis(wait),
                }
                for lane in 0..plan.most_lanes() {
                    match plan.want(lane, now).unwrap() {
                        Want::Rail(rail) => prop_assert!(resting[rail].is_none_or(|until| until <= now)),
                        Want::Tcp => prop_assert!(resting.iter().all(Option::is_some)),
                    }
                }
            }
            let end = now + RETRY.most;
            for rail in 0..rails {
                prop_assert_eq!(plan.want(rail + 1, end), Ok(Want::Rail(rail)));
            }
        }
    }
}
