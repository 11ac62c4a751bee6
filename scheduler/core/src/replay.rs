//! Replaying a recorded day.
//!
//! A log is what the state was when it began ([`Start`]), and every event since with the decisions
//! that were taken ([`Entry`]). The core has no clock and no randomness: the same log gives the
//! same decisions, and a log replayed under another policy shows what that policy would have done
//! with the same requests and the same faults, up to the point where the world itself would have
//! gone another way: reports of attempts that the other policy never started are then skipped.

use crate::event::{Decision, Event, Now, Order, Record};
use crate::machine::Core;
use crate::policy::Policy;
use firefly_types::JobId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The first line of a log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// Version of the log's format.
    pub version: u32,
    /// When.
    pub now: Now,
    /// The site's policy.
    pub policy: Policy,
    /// What was durable: what [`Core::restore`] began with.
    pub records: Vec<Record>,
}

/// The version that this code writes.
pub const LOG_VERSION: u32 = 1;

/// Every further line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// When.
    pub now: Now,
    /// What happened.
    pub event: Event,
    /// What was decided.
    pub decisions: Vec<Decision>,
}

/// A step at which the replay decided otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Number of the entry, from 0.
    pub entry: usize,
    /// What happened.
    pub event: Event,
    /// What was decided then and not now.
    pub missing: Vec<Decision>,
    /// What was decided now and not then.
    pub added: Vec<Decision>,
}

/// How a day went for its jobs: when they first started and when they ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Attempts started.
    pub starts: u64,
    /// Attempts asked to give way.
    pub suspensions: u64,
    /// Milliseconds since 1970 of the first start, by job.
    pub first_start: BTreeMap<JobId, u64>,
}

impl Outcome {
    fn see(&mut self, now: Now, decisions: &[Decision]) {
        for decision in decisions {
            if let Decision::Order { order, .. } = decision {
                let first_rank = order.key().rank.0 == 0;
                match order {
                    Order::Prepare { key, .. } if first_rank => {
                        self.starts += 1;
                        self.first_start.entry(key.job).or_insert(now.unix_ms);
                    }
                    Order::Suspend { .. } if first_rank => self.suspensions += 1,
                    _ => {}
                }
            }
        }
    }
}

/// A replay under way.
#[derive(Clone, Debug)]
pub struct Replay {
    core: Core,
    entry: usize,
    /// What happened then.
    pub then: Outcome,
    /// What happens now.
    pub now: Outcome,
}

impl Replay {
    /// Begins with the recorded state, under the recorded policy or another.
    pub fn new(start: Start, policy: Option<Policy>) -> Self {
        let core = Core::restore(policy.unwrap_or(start.policy), start.records, start.now);
        Self { core, entry: 0, then: Outcome::default(), now: Outcome::default() }
    }

    /// The replayed state.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// Replays one entry.
    pub fn step(&mut self, entry: &Entry) -> Option<Difference> {
        let number = self.entry;
        self.entry += 1;
        self.then.see(entry.now, &entry.decisions);
        let decisions = self.core.step(entry.event.clone(), entry.now);
        self.now.see(entry.now, &decisions);
        if decisions == entry.decisions {
            return None;
        }
        let only = |a: &[Decision], b: &[Decision]| -> Vec<Decision> {
            a.iter().filter(|d| !b.contains(d)).cloned().collect()
        };
        Some(Difference {
            entry: number,
            event: entry.event.clone(),
            missing: only(&entry.decisions, &decisions),
            added: only(&decisions, &entry.decisions),
        })
    }
}
