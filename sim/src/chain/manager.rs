//! The manager: the real chain table over heartbeats and leases.

use firefly_types::{ChainId, ChainVersion, Nanos, TargetId};
use fs3_core::chain::{
    Chain, LocalState, PublicState, Report, add_member, next_chain, remove_member, rotate_chain, start_chain,
};
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

/// How long a chain that nobody serves waits for the others of its last serving set, once one of
/// them is there.
const REUNION: Duration = Duration::from_millis(60);

/// A target that takes the place of another.
#[derive(Clone, Copy, Debug)]
struct Move {
    to: TargetId,
    from: TargetId,
}

pub(super) struct Manager {
    pub(super) chain: Chain,
    /// A serving target that has been asked to stop, so that it can be taken out.
    pub(super) retiring: Option<TargetId>,
    /// node → (incarnation, last heard, report)
    nodes: BTreeMap<usize, (u64, Nanos, Report)>,
    /// Grows with everything that nodes are told.
    pub(super) changes: u64,
    /// Nodes without a part in the chain.
    spares: Vec<usize>,
    moving: Option<Move>,
    /// Since when a complete target waits for its like.
    reunion: Option<Nanos>,
    /// Planted bug: a serving target is taken out without having been asked.
    pub(super) takes_out_unasked: bool,
    pub(super) reached: BTreeMap<&'static str, u64>,
}

impl Manager {
    /// A chain over the first `targets` of `nodes` nodes.
    pub(super) fn new(targets: usize, nodes: usize) -> Self {
        let ids: Vec<TargetId> = (0..targets as u32).map(TargetId).collect();
        Self {
            chain: Chain::new(ChainId(1), &ids),
            retiring: None,
            nodes: BTreeMap::new(),
            changes: 0,
            spares: (targets..nodes).collect(),
            moving: None,
            reunion: None,
            takes_out_unasked: false,
            reached: BTreeMap::new(),
        }
    }

    fn reach(&mut self, what: &'static str) {
        *self.reached.entry(what).or_default() += 1;
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

    fn report(&self, target: TargetId, now: Nanos) -> Report {
        match self.nodes.get(&(target.0 as usize)) {
            Some((_, heard, report)) if now.since(*heard) <= LEASE + GRACE => *report,
            _ => Report::SILENT,
        }
    }

    /// Applies the chain table, and goes on with a move, until nothing changes any more.
    pub(super) fn settle(&mut self, now: Nanos) {
        while let Some(next) = self.next(now).or_else(|| self.go_on_moving()) {
            self.adopt(next);
        }
    }

    fn adopt(&mut self, next: Chain) {
        self.chain = next;
        self.changes += 1;
    }

    fn next(&mut self, now: Nanos) -> Option<Chain> {
        let is_up = |t: &TargetId| self.report(*t, now).local != LocalState::Offline;
        if self.chain.is_new() {
            let all = self.chain.members.iter().all(|m| is_up(&m.target));
            return if all { start_chain(&self.chain, |t| self.report(t, now)) } else { None };
        }
        let complete: Vec<_> = self.chain.in_state(PublicState::LastSrv).collect();
        let back = complete.iter().filter(|t| is_up(t)).count();
        if back > 0 && back < complete.len() {
            let since = *self.reunion.get_or_insert(now);
            if now.since(since) < REUNION {
                return None;
            }
        }
        let next = next_chain(&self.chain, |t| self.report(t, now))?;
        if back > 0 {
            self.reunion = None;
            if back > 1 {
                self.reach("several complete targets came back together");
            }
        }
        Some(next)
    }

    /// A move's last steps: the old target is asked to stop, and taken out when it has.
    fn go_on_moving(&mut self) -> Option<Chain> {
        let Move { to, from } = self.moving?;
        let Some(state) = self.chain.state_of(from) else {
            self.moving = None;
            return None;
        };
        match state {
            PublicState::Serving => {
                let may_go = self.chain.state_of(to) == Some(PublicState::Serving);
                if may_go && self.takes_out_unasked {
                    let mut next = self.chain.clone();
                    next.members.retain(|m| m.target != from);
                    next.version = ChainVersion(next.version.0 + 1);
                    self.end_move(from);
                    return Some(next);
                }
                if may_go && self.retiring.is_none() {
                    self.reach("targets asked to stop");
                    self.retiring = Some(from);
                    self.changes += 1;
                }
                None
            }
            PublicState::LastSrv => {
                // The chain may need it again.
                if self.retiring.take().is_some() {
                    self.reach("targets asked to stop and wanted back");
                    self.changes += 1;
                }
                None
            }
            PublicState::Syncing | PublicState::Waiting | PublicState::Offline => {
                // It is not complete. Whether the new one is in place yet makes no difference to it.
                let next = remove_member(&self.chain, from)?;
                self.reach(if self.retiring.is_some() { "targets moved" } else { "lost targets replaced" });
                self.end_move(from);
                Some(next)
            }
        }
    }

    fn end_move(&mut self, from: TargetId) {
        self.retiring = None;
        self.moving = None;
        self.spares.push(from.0 as usize);
    }

    /// Turns the chain to this order of its members, given by random numbers.
    pub(super) fn rotate(&mut self, mut random: impl FnMut(usize) -> usize) {
        let mut order: Vec<TargetId> = self.chain.members.iter().map(|m| m.target).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, random(i + 1));
        }
        if self.moving.is_none()
            && let Some(next) = rotate_chain(&self.chain, &order)
        {
            self.reach("rotations");
            self.adopt(next);
        }
    }

    /// Begins to put another target in the place of one of the chain's.
    pub(super) fn begin_move(&mut self, mut random: impl FnMut(usize) -> usize) {
        if self.moving.is_some() || self.spares.is_empty() || self.chain.is_new() {
            return;
        }
        let to = TargetId(self.spares[random(self.spares.len())] as u32);
        let from = self.chain.members[random(self.chain.members.len())].target;
        if let Some(next) = add_member(&self.chain, to) {
            self.spares.retain(|s| *s != to.0 as usize);
            self.moving = Some(Move { to, from });
            self.adopt(next);
        }
    }

    /// Every member serves and none is on its way in or out.
    pub(super) fn is_whole(&self) -> bool {
        self.moving.is_none() && self.chain.members.iter().all(|m| m.state == PublicState::Serving)
    }

    pub(super) fn serving(&self) -> Vec<usize> {
        self.chain.in_state(PublicState::Serving).map(|t| t.0 as usize).collect()
    }

    pub(super) fn version(&self) -> ChainVersion {
        self.chain.version
    }
}
