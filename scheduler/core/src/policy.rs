//! The site's policy: which rules, in which order, and every knob with unit, default and reason.

use crate::order::OrderBy;
use crate::preempt::Displace;
use crate::quota::Quota;
use firefly_types::Backoff;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// Times, limits and rules of the scheduler.
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

    /// How waiting jobs are ordered: rules by name, the first that tells two jobs apart decides.
    /// Default: overdue, priority, recovering, fair-share, user-rank, age.
    pub order: Vec<OrderBy>,
    /// What may start past a job that waits for nodes. Default: opportunistic.
    pub backfill: Backfill,
    /// Whom a waiting job may displace: rules by name, any one suffices. Default: opportunistic,
    /// lower-priority, overdue, time-slice.
    pub displace: Vec<Displace>,
    /// How nodes are chosen. Default: topology.
    pub packing: Packing,
    /// Limits per user, group and priority. Default: none.
    pub quotas: Vec<Quota>,
    /// Whether jobs beyond their quota may use idle capacity and give way on demand. Default
    /// true: idle nodes help nobody.
    pub borrow: bool,
    /// Pools of nodes by name. A pool that is not named here is taken as it comes.
    pub groups: BTreeMap<String, GroupPolicy>,
    /// Teams and their shares. A user without a team is a team of its own with one share.
    pub teams: BTreeMap<String, Team>,
    /// Milliseconds after which past usage counts half in fair share. Default 1 h: a burst in
    /// the morning is forgiven by the afternoon.
    pub half_life_ms: u64,
    /// Milliseconds of waiting after which a job goes before all others, oldest first. Default
    /// 24 h; 0: never. This bounds every wait.
    pub overdue_after_ms: u64,
    /// Milliseconds that an attempt may run at least before it is displaced (opportunistic ones
    /// excepted). Default 15 min.
    pub quantum_ms: u64,
    /// The quantum is at least so many times the job's measured cost of a suspension. Default 30:
    /// at most 1/30 of the time is lost to sharing.
    pub quantum_costs: u32,
    /// Milliseconds of running after which an equal may take its turn. Default 4 h.
    pub time_slice_ms: u64,
    /// Jobs of this priority and above are displaced by nobody. Default 50.
    pub exempt_priority: i32,
    /// Suspensions of one job in an hour. Default 4: beyond it the job is left alone, and does
    /// not start where it would have to give way.
    pub suspensions_per_hour: u32,
    /// Milliseconds that a suspended job has to save. Default 60 s.
    pub suspend_grace_ms: u32,
    /// Milliseconds assumed for a suspension until a job's own has been measured. Default 60 s.
    pub suspend_cost_ms: u64,
    /// Exit code by which a rank says that it saved and gives way. Default 85.
    pub suspended_exit_code: i32,
    /// Lowers the priority of jobs that have run for a while. Default none.
    pub demotions: Vec<Demotion>,
    /// Jobs at a time that may span zones. Default 1: few links join zones.
    pub cross_zone_jobs: u32,
    /// Fast failures in a row after which a job displaces nobody any more. Default 3.
    pub crash_loop: u32,
    /// Attempts in a row without a new saved step after which a job that reports steps is held.
    /// Default 3.
    pub no_progress: u32,
    /// Milliseconds that a job is kept away from a node whose fault ended it. Default 24 h.
    pub avoid_ms: u64,
    /// Nodes that one job is kept away from, at most. Default 16.
    pub most_avoided: usize,
    /// Strikes of different jobs within `strike_window_ms` that cordon a node. Default 3.
    pub strikes: usize,
    /// Default 24 h.
    pub strike_window_ms: u64,
    /// Percent of a group's nodes (at least one) that the scheduler cordons by itself within
    /// `auto_cordon_window_ms`. Default 5: more alarms than that mean that the checker is broken.
    pub auto_cordon_percent: u32,
    /// The same for one leaf. Default 20: more means that the switch is broken.
    pub auto_cordon_leaf_percent: u32,
    /// Default 1 h.
    pub auto_cordon_window_ms: u64,
    /// Milliseconds before a maintenance window from which jobs that could run into it and cannot
    /// be suspended are kept away. Default 24 h.
    pub maintenance_lead_ms: u64,
}

/// What may start past a job that waits for nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backfill {
    /// Nothing of its group: first come, first served.
    None,
    /// What runs on nodes that it does not wait for.
    Unreserved,
    /// Also what ends, by its declared time limit, before the nodes that it waits for are free.
    Easy,
    /// Also what gives way on demand.
    Opportunistic,
}

/// How nodes are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Packing {
    /// As near together as possible, keeping the largest holes whole.
    Topology,
    /// By number.
    FirstFit,
}

/// A pool of nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GroupPolicy {
    /// Nodes that it has when all are there: jobs that ask for more are refused. 0: unknown.
    pub nodes: u32,
    /// Nodes kept free for jobs that a fault has ended; only jobs that give way use them.
    pub standbys: u32,
}

/// A team of users.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Team {
    /// Its part of the cluster, relative to other teams'.
    pub shares: u32,
    /// Its users with their shares of the team's part.
    pub users: BTreeMap<String, u32>,
}

impl Default for Team {
    fn default() -> Self {
        Self { shares: 1, users: BTreeMap::new() }
    }
}

/// A demotion rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Demotion {
    /// Jobs of this priority.
    pub from: i32,
    /// Get this one.
    pub to: i32,
    /// After so many milliseconds of running.
    pub after_ms: u64,
}

impl Default for Policy {
    fn default() -> Self {
        const HOUR: u64 = 3_600_000;
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
            order: vec![
                OrderBy::Overdue,
                OrderBy::Priority,
                OrderBy::Recovering,
                OrderBy::FairShare,
                OrderBy::UserRank,
                OrderBy::Age,
            ],
            backfill: Backfill::Opportunistic,
            displace: vec![
                Displace::Opportunistic,
                Displace::LowerPriority,
                Displace::Overdue,
                Displace::TimeSlice,
            ],
            packing: Packing::Topology,
            quotas: Vec::new(),
            borrow: true,
            groups: BTreeMap::new(),
            teams: BTreeMap::new(),
            half_life_ms: HOUR,
            overdue_after_ms: 24 * HOUR,
            quantum_ms: HOUR / 4,
            quantum_costs: 30,
            time_slice_ms: 4 * HOUR,
            exempt_priority: 50,
            suspensions_per_hour: 4,
            suspend_grace_ms: 60_000,
            suspend_cost_ms: 60_000,
            suspended_exit_code: 85,
            demotions: Vec::new(),
            cross_zone_jobs: 1,
            crash_loop: 3,
            no_progress: 3,
            avoid_ms: 24 * HOUR,
            most_avoided: 16,
            strikes: 3,
            strike_window_ms: 24 * HOUR,
            auto_cordon_percent: 5,
            auto_cordon_leaf_percent: 20,
            auto_cordon_window_ms: HOUR,
            maintenance_lead_ms: 24 * HOUR,
        }
    }
}

impl Policy {
    /// Why this policy makes no sense, if so.
    pub fn validate(&self) -> Result<(), String> {
        let mut seen = std::collections::BTreeSet::new();
        if let Some(twice) = self.order.iter().find(|piece| !seen.insert(format!("{piece:?}"))) {
            return Err(format!("the order names {twice:?} twice: the second could decide nothing"));
        }
        if self.order.len() > crate::order::MOST_PIECES {
            return Err(format!("an order has at most {} rules", crate::order::MOST_PIECES));
        }
        if self.half_life_ms < 1_000 {
            return Err("a half-life below 1000 ms forgets faster than jobs start: use at least 1000".into());
        }
        for (name, team) in &self.teams {
            if team.shares == 0 || team.users.values().any(|s| *s == 0) {
                return Err(format!("team {name:?} has a share of 0: leave the entry out, or give it 1"));
            }
        }
        for rule in &self.demotions {
            if rule.to >= rule.from {
                return Err(format!("a demotion from priority {} to {} is none", rule.from, rule.to));
            }
        }
        let mut users = std::collections::BTreeSet::new();
        for user in self.teams.values().flat_map(|t| t.users.keys()) {
            if !users.insert(user) {
                return Err(format!("user {user:?} is in two teams"));
            }
        }
        Ok(())
    }

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

    /// Nodes of the group that are kept free for recoveries.
    pub(crate) fn standbys(&self, group: &str) -> u32 {
        self.groups.get(group).map_or(0, |g| g.standbys)
    }
}
