//! The background workers. None of them keeps anything of its own: what is left to do follows from
//! the tables, so a restart loses nothing, and an order that was answered is carried out.

use crate::event::{Role, WorkerReport, Write};
use crate::moves::Cause;
use crate::state::{ManagerState, Work};
use firefly_types::{ByteSize, ChainId, NodeId, TargetId};
use fs3_core::chain::{PublicState, rotate_chain};
use fs3_core::worker::{Activity, Status, Worker};
use std::collections::BTreeMap;

trait ManagerWorker: Worker<ManagerState> + Sync {
    /// Does what may be done now; called often.
    fn work(&self, state: &mut ManagerState, work: &mut Work);
}

const WORKERS: [&dyn ManagerWorker; 5] = [&Rotate, &Rebuild, &Drain, &Rebalance, &Scrub];

impl ManagerState {
    pub(crate) fn run_workers(&mut self, work: &mut Work) {
        if self.now < self.works_at {
            return;
        }
        self.works_at = self.now.after(crate::config::ms(self.timing.heartbeat_ms));
        for worker in WORKERS {
            worker.work(self, work);
        }
    }

    /// How far each worker is.
    pub fn workers(&self) -> Vec<WorkerReport> {
        let report = |w: &&dyn ManagerWorker| WorkerReport {
            name: w.name(),
            status: w.status(self),
            throttle: w.throttle(self),
        };
        WORKERS.iter().map(report).collect()
    }

    /// Targets of each node that may get targets.
    fn loads(&self) -> BTreeMap<NodeId, usize> {
        let takes = |n: &crate::NodeEntry| n.role == Role::Storage && n.alive && !n.draining;
        let mut loads: BTreeMap<NodeId, usize> =
            self.nodes.iter().filter(|(_, n)| takes(n)).map(|(id, _)| (*id, 0)).collect();
        for (owner, _) in self.owners.values() {
            if let Some(load) = loads.get_mut(owner) {
                *load += 1;
            }
        }
        loads
    }

    /// Targets that would have to move for even loads.
    pub(crate) fn excess(&self) -> usize {
        let loads = self.loads();
        let most = loads.values().sum::<usize>().div_ceil(loads.len().max(1));
        loads.values().map(|l| l.saturating_sub(most)).sum::<usize>().max(
            // With a rest, some may stand at the ceiling and others two below.
            usize::from(spread(&loads) > 1),
        )
    }

    /// Targets that the node is taking in.
    fn incoming(&self, node: NodeId) -> usize {
        let is_coming = |(target, (owner, chain)): &(&TargetId, &(NodeId, ChainId))| {
            let state = self.chains.get(chain).and_then(|e| e.chain.state_of(**target));
            *owner == node
                && matches!(state, Some(PublicState::Syncing | PublicState::Waiting | PublicState::Offline))
        };
        self.owners.iter().filter(is_coming).count()
    }

    fn has_intake(&self, node: NodeId) -> bool {
        self.incoming(node) < self.settings.moves_per_node as usize
    }

    fn nodes_of(&self, chain: ChainId) -> impl Iterator<Item = NodeId> + '_ {
        let members = self.chains.get(&chain).into_iter().flat_map(|e| &e.chain.members);
        members.filter_map(|m| self.owners.get(&m.target)).map(|(node, _)| *node)
    }

    /// How often two nodes stand in one chain.
    fn meetings(&self, a: NodeId, b: NodeId) -> usize {
        let both = |id: &&ChainId| self.nodes_of(**id).any(|n| n == a) && self.nodes_of(**id).any(|n| n == b);
        self.chains.keys().filter(both).count()
    }

    /// Whether the target's data fits the node, as far as is known: a node without targets has not
    /// said how much it takes.
    fn has_room(&self, node: NodeId, target: TargetId) -> bool {
        let need = self.target_status(target).map_or(0, |s| s.used_bytes);
        let Some(contact) = self.contacts.get(&node) else { return false };
        let said = contact.targets.values().filter(|s| s.capacity_bytes > 0);
        let free = said.map(|s| s.capacity_bytes.saturating_sub(s.used_bytes)).max();
        // A tenth more than it holds now: clients go on writing.
        free.is_none_or(|free| free > need + need / 10)
    }

    /// The node that should take the target in: the one with fewest targets, and among those the one
    /// that meets the chain's other nodes least. `Err` says why there is none.
    pub(crate) fn destination(&self, target: TargetId) -> Result<NodeId, String> {
        let Some((_, id)) = self.owners.get(&target).copied() else {
            return Err(format!("there is no target {target}: `ff fs target ls` lists them"));
        };
        let members: Vec<NodeId> = self.nodes_of(id).collect();
        let mut last_reason = "every live node that is not being drained holds a copy already: add one \
                               with `ff fs node add`";
        let mut candidates = Vec::new();
        for (node, load) in self.loads() {
            let failed = self.failed_moves.get(&(id, node));
            let rested = crate::config::ms(self.timing.rebuild_after_ms);
            if members.contains(&node) {
                continue;
            }
            if failed.is_some_and(|at| self.now.since(*at) < rested) {
                last_reason = "the nodes left have failed to take it in a short while ago";
                continue;
            }
            if !self.has_room(node, target) {
                last_reason = "the nodes left have no room for it";
                continue;
            }
            let met: usize = members.iter().map(|m| self.meetings(node, *m)).sum();
            candidates.push((load, met, node));
        }
        let best = candidates.into_iter().min().map(|(.., node)| node);
        best.ok_or_else(|| format!("{target} cannot go anywhere: {last_reason}"))
    }

    fn moves_of(&self, cause: Cause) -> usize {
        let of = |id: &&ChainId| self.chains.get(id).and_then(|e| e.moving).is_some_and(|m| m.cause == cause);
        self.moving.iter().filter(of).count()
    }

    fn intake_throttle(&self) -> String {
        format!("{} target(s) at a time per receiving node (moves_per_node)", self.settings.moves_per_node)
    }
}

fn spread(loads: &BTreeMap<NodeId, usize>) -> usize {
    loads.values().max().unwrap_or(&0) - loads.values().min().unwrap_or(&0)
}

/// Turns chains back to their preferred order: after a server has returned, its targets stand at
/// the ends of their chains, and the heads, which take all writes, on fewer nodes.
struct Rotate;

impl Rotate {
    fn turned(state: &ManagerState) -> impl Iterator<Item = ChainId> + '_ {
        let is_turned = |entry: &crate::ChainEntry| {
            entry.moving.is_none() && rotate_chain(&entry.chain, &entry.preferred).is_some()
        };
        state.chains.iter().filter(move |(_, entry)| is_turned(entry)).map(|(id, _)| *id)
    }

    fn fills(state: &ManagerState) -> usize {
        state.chains.values().filter(|e| e.chain.in_state(PublicState::Syncing).next().is_some()).count()
    }
}

impl Worker<ManagerState> for Rotate {
    fn name(&self) -> &'static str {
        "rotate"
    }

    fn throttle(&self, state: &ManagerState) -> String {
        format!("one chain per {} ms, none while targets are filled (rotate_ms)", state.timing.rotate_ms)
    }

    fn status(&self, state: &ManagerState) -> Status {
        let (turned, fills) = (Self::turned(state).count() as u64, Self::fills(state));
        match (turned, fills) {
            (0, _) => Status::idle("every whole chain is in its preferred order"),
            (_, 0) => Status {
                activity: Activity::Working,
                done: 0,
                total: turned,
                detail: format!("{turned} chains to turn"),
            },
            _ => Status {
                activity: Activity::Blocked,
                done: 0,
                total: turned,
                detail: format!("{turned} chains to turn, once {fills} chains have been filled"),
            },
        }
    }
}

impl ManagerWorker for Rotate {
    fn work(&self, state: &mut ManagerState, work: &mut Work) {
        if state.now < state.rotates_at || Self::fills(state) > 0 {
            return;
        }
        let Some(id) = Self::turned(state).next() else { return };
        state.rotates_at = state.now.after(crate::config::ms(state.timing.rotate_ms));
        let entry = &state.chains[&id];
        if let Some(next) = rotate_chain(&entry.chain, &entry.preferred) {
            state.adopt(next, work);
        }
    }
}

/// Gives the places of targets that have been out too long to new ones on other nodes.
struct Rebuild;

impl Rebuild {
    /// Targets that are out while their chain serves, and whether their time is over.
    fn lost(state: &ManagerState) -> Vec<(TargetId, bool)> {
        let after = crate::config::ms(state.timing.rebuild_after_ms);
        let serves = |t: &TargetId| {
            let entry = state.owners.get(t).and_then(|(_, id)| state.chains.get(id));
            entry.is_some_and(|e| {
                e.moving.is_none() && e.chain.in_state(PublicState::Serving).next().is_some()
            })
        };
        let out = state.out_since.iter().filter(|(t, _)| serves(t));
        out.map(|(t, since)| (*t, state.now.since(*since) >= after)).collect()
    }
}

impl Worker<ManagerState> for Rebuild {
    fn name(&self) -> &'static str {
        "rebuild"
    }

    fn throttle(&self, state: &ManagerState) -> String {
        state.intake_throttle()
    }

    fn status(&self, state: &ManagerState) -> Status {
        let lost = Self::lost(state);
        let overdue: Vec<TargetId> = lost.iter().filter(|(_, over)| *over).map(|(t, _)| *t).collect();
        let total = overdue.len() as u64;
        let why = overdue.iter().find_map(|t| state.destination(*t).err());
        let minutes = crate::config::ms(state.timing.rebuild_after_ms).as_secs_f64() / 60.0;
        match (lost.len(), overdue.len(), why) {
            (0, ..) => Status::idle("no target is out"),
            (n, 0, _) => {
                Status::idle(format!("{n} targets are out; each is rebuilt elsewhere after {minutes:.1} min"))
            }
            (_, _, Some(why)) => Status { activity: Activity::Blocked, done: 0, total, detail: why },
            (..) => Status {
                activity: Activity::Working,
                done: 0,
                total,
                detail: format!("{total} targets wait to be rebuilt elsewhere"),
            },
        }
    }
}

impl ManagerWorker for Rebuild {
    fn work(&self, state: &mut ManagerState, work: &mut Work) {
        for (target, _) in Self::lost(state).into_iter().filter(|(_, over)| *over) {
            if let Ok(node) = state.destination(target)
                && state.has_intake(node)
            {
                // Refusals are for operators; here the next look decides anew.
                let _ = state.begin_move(target, node, Cause::Rebuild, work);
            }
        }
    }
}

/// Moves the targets of nodes that are to be emptied.
struct Drain;

impl Drain {
    fn left(state: &ManagerState) -> Vec<TargetId> {
        let drains = |node: &NodeId| state.nodes.get(node).is_some_and(|n| n.draining);
        state.owners.iter().filter(|(_, (node, _))| drains(node)).map(|(t, _)| *t).collect()
    }

    /// A target that goes away, or one that comes to a node that has begun to be emptied since.
    fn is_moving(state: &ManagerState, target: TargetId) -> bool {
        state.owners.get(&target).and_then(|(_, id)| state.chains.get(id)).is_some_and(|e| e.moving.is_some())
    }
}

impl Worker<ManagerState> for Drain {
    fn name(&self) -> &'static str {
        "drain"
    }

    fn throttle(&self, state: &ManagerState) -> String {
        state.intake_throttle()
    }

    fn status(&self, state: &ManagerState) -> Status {
        let left = Self::left(state);
        let under_way = state.moves_of(Cause::Drain) + state.moves_of(Cause::Replace);
        if left.is_empty() && under_way == 0 {
            return Status::idle("no node is being emptied");
        }
        let waiting = left.iter().filter(|t| !Self::is_moving(state, **t));
        let why = waiting.clone().find_map(|t| state.destination(*t).err());
        let detail = format!("{} targets to move, {under_way} on their way", left.len().max(under_way));
        Status {
            activity: if why.is_some() { Activity::Blocked } else { Activity::Working },
            done: 0,
            total: left.len().max(under_way) as u64,
            detail: why.map_or(detail.clone(), |why| format!("{detail}; {why}")),
        }
    }
}

impl ManagerWorker for Drain {
    fn work(&self, state: &mut ManagerState, work: &mut Work) {
        for target in Self::left(state) {
            if !Self::is_moving(state, target)
                && let Ok(node) = state.destination(target)
                && state.has_intake(node)
            {
                let _ = state.begin_move(target, node, Cause::Drain, work);
            }
        }
    }
}

/// Spreads targets evenly over the nodes, then heads, which costs no copying.
struct Rebalance;

impl Rebalance {
    /// A target of the fullest node that may go to the emptiest.
    fn next(state: &ManagerState) -> Option<(TargetId, NodeId)> {
        let loads = state.loads();
        if spread(&loads) < 2 {
            return None;
        }
        let (_, to) = loads.iter().map(|(n, l)| (*l, *n)).min()?;
        let least = loads[&to];
        let mut full: Vec<(usize, NodeId)> = loads.iter().map(|(n, l)| (*l, *n)).collect();
        full.sort_unstable_by(|a, b| b.cmp(a));
        // The fullest first; of its targets the one whose chain meets the receiver least.
        full.into_iter().take_while(|(load, _)| *load >= least + 2).find_map(|(_, from)| {
            let may_go = |(target, (owner, id)): &(&TargetId, &(NodeId, ChainId))| {
                *owner == from
                    && state.chains.get(id).is_some_and(|e| e.moving.is_none() && !e.chain.is_new())
                    && state.nodes_of(*id).all(|n| n != to)
                    && state.has_room(to, **target)
                    && !state.failed_moves.contains_key(&(*id, to))
            };
            let cost = |id: ChainId| -> usize {
                state.nodes_of(id).filter(|n| *n != from).map(|n| state.meetings(n, to)).sum()
            };
            let movable = state.owners.iter().filter(may_go);
            movable.min_by_key(|(t, (_, id))| (cost(*id), **t)).map(|(t, _)| (*t, to))
        })
    }

    /// A chain whose head should be another member: its node heads two chains more than the other's.
    fn next_head(state: &ManagerState) -> Option<(ChainId, usize)> {
        let node_of = |t: &TargetId| state.owners.get(t).map(|(n, _)| *n);
        let mut heads: BTreeMap<NodeId, usize> = state.loads().into_keys().map(|n| (n, 0)).collect();
        for entry in state.chains.values() {
            if let Some(count) = entry.preferred.first().and_then(node_of).and_then(|n| heads.get_mut(&n)) {
                *count += 1;
            }
        }
        let heads_of = |t: &TargetId| node_of(t).and_then(|n| heads.get(&n).copied());
        state.chains.iter().filter(|(_, e)| e.moving.is_none()).find_map(|(id, entry)| {
            let most = heads_of(entry.preferred.first()?)?;
            let better = |(_, t): &(usize, &TargetId)| heads_of(t).is_some_and(|h| h + 2 <= most);
            entry.preferred.iter().enumerate().skip(1).find(better).map(|(at, _)| (*id, at))
        })
    }
}

impl Worker<ManagerState> for Rebalance {
    fn name(&self) -> &'static str {
        "rebalance"
    }

    fn throttle(&self, state: &ManagerState) -> String {
        state.intake_throttle()
    }

    fn status(&self, state: &ManagerState) -> Status {
        let (left, under_way) = (state.excess() as u64, state.moves_of(Cause::Rebalance) as u64);
        let begun = state.tasks.rebalance_moves;
        let loads = state.loads();
        let (least, most) = (loads.values().min().unwrap_or(&0), loads.values().max().unwrap_or(&0));
        if !state.tasks.rebalancing && under_way == 0 {
            return Status::idle(format!("nodes hold {least} to {most} targets"));
        }
        Status {
            activity: Activity::Working,
            done: begun.saturating_sub(under_way),
            total: begun + left,
            detail: format!("{left} targets to move, {under_way} on their way; nodes hold {least} to {most}"),
        }
    }
}

impl ManagerWorker for Rebalance {
    fn work(&self, state: &mut ManagerState, work: &mut Work) {
        if !state.tasks.rebalancing {
            return;
        }
        while let Some((target, node)) = Self::next(state) {
            if !state.has_intake(node) || state.begin_move(target, node, Cause::Rebalance, work).is_err() {
                return;
            }
            state.tasks.rebalance_moves += 1;
            work.writes.insert(Write::Tasks);
        }
        if state.moves_of(Cause::Rebalance) > 0 {
            return;
        }
        while let Some((id, at)) = Self::next_head(state) {
            if let Some(entry) = state.chains.get_mut(&id) {
                entry.preferred.swap(0, at);
                work.writes.insert(Write::Chain(id));
                work.publishes = true;
            }
        }
        state.tasks.rebalancing = false;
        work.writes.insert(Write::Tasks);
        work.note(format!("rebalanced: {} targets were moved", state.tasks.rebalance_moves));
    }
}

/// Has every serving target check what it holds. The checking is done on the nodes; here it is
/// ordered and its end noticed.
struct Scrub;

impl Scrub {
    /// (serving targets, those that are done, sums over all).
    fn sums(state: &ManagerState) -> (u64, u64, crate::ScrubProgress) {
        let pass = state.tasks.scrub_pass;
        let (mut targets, mut done) = (0, 0);
        let mut sum = crate::ScrubProgress { pass, ..Default::default() };
        for target in state.chains.values().flat_map(|e| e.chain.in_state(PublicState::Serving)) {
            targets += 1;
            let Some(status) = state.target_status(target).filter(|s| s.scrub.pass == pass) else { continue };
            done += u64::from(status.scrub.done);
            sum.chunks_checked += status.scrub.chunks_checked;
            sum.chunks_total += status.scrub.chunks_total;
            sum.bytes_checked += status.scrub.bytes_checked;
            sum.blocks_repaired += status.scrub.blocks_repaired;
            sum.chunks_bad += status.scrub.chunks_bad;
        }
        (targets, done, sum)
    }
}

impl Worker<ManagerState> for Scrub {
    fn name(&self) -> &'static str {
        "scrub"
    }

    fn throttle(&self, state: &ManagerState) -> String {
        format!("{}/s per node", ByteSize(state.tasks.scrub_rate))
    }

    fn status(&self, state: &ManagerState) -> Status {
        if state.tasks.scrub_pass == 0 {
            return Status::idle("never run");
        }
        let (targets, done, sum) = Self::sums(state);
        let detail = format!(
            "pass {}: {done} of {targets} targets, {} chunks, {}; {} blocks repaired, {} chunks beyond repair",
            sum.pass,
            sum.chunks_checked,
            ByteSize(sum.bytes_checked),
            sum.blocks_repaired,
            sum.chunks_bad
        );
        if !state.tasks.scrubbing {
            return Status::idle(detail);
        }
        Status { activity: Activity::Working, done: sum.chunks_checked, total: sum.chunks_total, detail }
    }
}

impl ManagerWorker for Scrub {
    fn work(&self, state: &mut ManagerState, work: &mut Work) {
        let (targets, done, sum) = Self::sums(state);
        if state.tasks.scrubbing && targets > 0 && done == targets {
            state.tasks.scrubbing = false;
            work.writes.insert(Write::Tasks);
            work.publishes = true;
            work.note(format!(
                "scrub {} is done: {} chunks, {} blocks repaired, {} chunks beyond repair",
                sum.pass, sum.chunks_checked, sum.blocks_repaired, sum.chunks_bad
            ));
        }
    }
}
