//! The manager: the real chain table over heartbeats and leases.

use firefly_types::{ChainId, ChainVersion, Nanos, TargetId};
use fs3_core::chain::{Chain, LocalState, PublicState, Report, next_chain, start_chain};
use std::collections::BTreeMap;
use std::time::Duration;

/// Right to serve, from the sending of a heartbeat.
pub(super) const LEASE: Duration = Duration::from_millis(150);
/// The manager waits longer than any lease that it gave can last.
const GRACE: Duration = Duration::from_millis(20);

/// What a node says.
#[derive(Clone, Debug)]
pub(super) struct Heartbeat {
    pub(super) incarnation: u64,
    pub(super) sent: Nanos,
    pub(super) report: Option<Report>,
}

pub(super) struct Manager {
    pub(super) chain: Chain,
    /// node → (incarnation, last heard, report)
    nodes: BTreeMap<usize, (u64, Nanos, Report)>,
    pub(super) changes: u64,
}

impl Manager {
    pub(super) fn new(targets: usize) -> Self {
        let ids: Vec<TargetId> = (0..targets as u32).map(TargetId).collect();
        Self { chain: Chain::new(ChainId(1), &ids), nodes: BTreeMap::new(), changes: 0 }
    }

    pub(super) fn hear(&mut self, node: usize, heartbeat: &Heartbeat, now: Nanos) {
        let report = heartbeat.report.unwrap_or(Report::SILENT);
        if let Some((incarnation, _, old)) = self.nodes.get_mut(&node) {
            if heartbeat.incarnation < *incarnation {
                return;
            }
            if heartbeat.incarnation > *incarnation {
                // The old process is provably dead.
                *old = Report::SILENT;
                self.settle(now);
            }
        }
        self.nodes.insert(node, (heartbeat.incarnation, now, report));
        self.settle(now);
    }

    /// Applies the chain table until it changes nothing more.
    pub(super) fn settle(&mut self, now: Nanos) {
        loop {
            let report = |target: TargetId| match self.nodes.get(&(target.0 as usize)) {
                Some((_, heard, report)) if now.since(*heard) <= LEASE + GRACE => *report,
                _ => Report::SILENT,
            };
            let next = if self.chain.is_new() {
                let all = self.chain.members.iter().all(|m| report(m.target).local != LocalState::Offline);
                if all { start_chain(&self.chain, report) } else { None }
            } else {
                next_chain(&self.chain, report)
            };
            let Some(next) = next else { return };
            self.chain = next;
            self.changes += 1;
        }
    }

    pub(super) fn serving(&self) -> Vec<usize> {
        self.chain.in_state(PublicState::Serving).map(|t| t.0 as usize).collect()
    }

    pub(super) fn version(&self) -> ChainVersion {
        self.chain.version
    }
}
