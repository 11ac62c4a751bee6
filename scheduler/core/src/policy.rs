//! The scheduler's knobs: unit, default and reason of each.

use firefly_types::Backoff;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Times and limits of the scheduler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Milliseconds of silence after which a node is shown as lost and gets no new ranks.
    /// Default 5 s: agents report every second.
    pub silent_after_ms: u64,
    /// Milliseconds of silence after which the attempts on a node are ended. Default 60 s:
    /// longer than the restart of an agent, which must cost nothing.
    pub agent_lease_ms: u64,
    /// Milliseconds after which a rank's shim ends it when it has heard from no scheduler.
    /// Default 10 min: longer than any scheduler outage that must cost nothing.
    pub orphan_lease_ms: u64,
    /// Milliseconds granted to a shim to end its rank once the orphan lease is over. Default 30 s.
    pub orphan_margin_ms: u64,
    /// Milliseconds in which all ranks of an attempt must be prepared. Default 2 min.
    pub start_timeout_ms: u64,
    /// Milliseconds before the first restart. Default 1 s; it doubles with each attempt that
    /// did not reach `stable_after_ms`.
    pub restart_first_ms: u64,
    /// Milliseconds beyond which the delay of a restart does not grow. Default 5 min.
    pub restart_most_ms: u64,
    /// Milliseconds of running after which an attempt counts as stable and the delays start
    /// over. Default 10 min.
    pub stable_after_ms: u64,
    /// Unstable attempts in a row that end by faults of nodes before the job is given up.
    /// Default 20: such faults do not count against `max_restarts`, but must not loop for ever.
    pub most_unstable: u32,
    /// Finished jobs that stay listed. Default 1000; the oldest go, with their logs.
    pub finished_jobs_kept: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            silent_after_ms: 5_000,
            agent_lease_ms: 60_000,
            orphan_lease_ms: 600_000,
            orphan_margin_ms: 30_000,
            start_timeout_ms: 120_000,
            restart_first_ms: 1_000,
            restart_most_ms: 300_000,
            stable_after_ms: 600_000,
            most_unstable: 20,
            finished_jobs_kept: 1_000,
        }
    }
}

impl Policy {
    /// Delay before the restart that follows `unstable` unstable attempts in a row.
    pub(crate) fn restart_delay(&self, unstable: u32) -> Duration {
        let backoff = Backoff {
            first: Duration::from_millis(self.restart_first_ms),
            most: Duration::from_millis(self.restart_most_ms),
            total: Duration::MAX,
        };
        backoff.delay(unstable.max(1), Duration::ZERO, 1.0).unwrap_or(backoff.most)
    }

    /// Silence after which the ranks of a lost node are over by their own lease.
    pub(crate) fn fence(&self) -> Duration {
        Duration::from_millis(self.orphan_lease_ms.saturating_add(self.orphan_margin_ms))
    }
}
