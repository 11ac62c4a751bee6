//! A target takes another's place in a chain.
//!
//! The new target joins the chain as one that is out, and is filled like any that returns. Then
//! the old one is asked to stop: the table calls it *retiring*, its node stops serving it and reports
//! it offline, and with that the chain goes on without it, as if its disk had failed. Only a target
//! that is not complete is taken out. So at no moment does a target serve that the chain has
//! forgotten, and at no moment has the chain fewer copies than before. A target that is out anyway
//! (a rebuild) goes at once, for it would have to be filled again itself.
//!
//! All of this is durable in the chain's record, so it goes on after a restart of the manager.

use crate::event::Write;
use crate::state::{ManagerState, Work};
use firefly_types::{ChainId, ErrorKind, NodeId, TargetId, WireError};
use fs3_core::chain::{LocalState, PublicState, add_member, remove_member};

/// Why a target takes another's place. The numbers are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// The old one was out too long.
    Rebuild = 1,
    /// Its node is emptied, or an operator wants it elsewhere.
    Drain = 2,
    /// Nodes shall hold equally many.
    Rebalance = 3,
    /// An operator wants a new one on the same node.
    Replace = 4,
}

/// A target on its way into a chain, and the one that goes for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Move {
    /// The new one.
    pub to: TargetId,
    /// The old one.
    pub from: TargetId,
    /// Why.
    pub cause: Cause,
    /// The old one has been asked to stop serving.
    pub retiring: bool,
}

impl ManagerState {
    /// Begins to put a new target on `node` in the place of `from`.
    pub(crate) fn begin_move(
        &mut self,
        from: TargetId,
        node: NodeId,
        cause: Cause,
        work: &mut Work,
    ) -> Result<TargetId, WireError> {
        let refuse = |kind, why: String| Err(WireError::new(kind, why));
        let Some((_, id)) = self.owners.get(&from).copied() else {
            return refuse(
                ErrorKind::NotFound,
                format!("there is no target {from}: `ff fs target ls` lists them"),
            );
        };
        let entry = &self.chains[&id];
        if let Some(Move { from, to, .. }) = entry.moving {
            return refuse(
                ErrorKind::Conflict,
                format!("{to} is taking the place of {from} in chain {id}: wait for it (`ff fs workers`)"),
            );
        }
        if self.owners.len() as u64 >= crate::MAX_TARGETS {
            return refuse(ErrorKind::Unavailable, format!("{} targets are the limit", crate::MAX_TARGETS));
        }
        let to = TargetId(self.next_target);
        let Some(next) = add_member(&entry.chain, to) else {
            return refuse(
                ErrorKind::Unavailable,
                format!("chain {id} has never served: wait until it does"),
            );
        };
        self.next_target += 1;
        work.writes.insert(Write::Counters);
        self.owners.insert(to, (node, id));
        if let Some(entry) = self.chains.get_mut(&id) {
            entry.preferred.iter_mut().filter(|t| **t == from).for_each(|t| *t = to);
            entry.preferred.push(from);
            entry.moving = Some(Move { to, from, cause, retiring: false });
        }
        self.moving.insert(id);
        self.dirty.insert(id);
        work.note(format!("{id}: {to} on {node} takes the place of {from} ({cause:?})"));
        self.adopt(next, work);
        Ok(to)
    }

    pub(crate) fn go_on_moving(&mut self, work: &mut Work) {
        for id in self.moving.clone() {
            let Some(Move { to, from, retiring, .. }) = self.chains.get(&id).and_then(|e| e.moving) else {
                continue;
            };
            let chain = &self.chains[&id].chain;
            match chain.state_of(from) {
                Some(PublicState::Serving) => {
                    let others = chain.in_state(PublicState::Serving).filter(|t| *t != from).count();
                    let is_in = chain.state_of(to) == Some(PublicState::Serving);
                    if self.is_lost(to) && !is_in {
                        self.end_move(id, from, to, work);
                    } else if is_in && !retiring && others >= self.replication as usize {
                        self.set_retiring(id, true, work);
                    }
                }
                Some(PublicState::LastSrv) => {
                    // Nobody serves: the chain may need it again.
                    if retiring {
                        self.set_retiring(id, false, work);
                    }
                }
                // Not complete: nothing is lost with it.
                _ => self.end_move(id, to, from, work),
            }
        }
    }

    fn set_retiring(&mut self, id: ChainId, retiring: bool, work: &mut Work) {
        if let Some(moving) = self.chains.get_mut(&id).and_then(|e| e.moving.as_mut()) {
            moving.retiring = retiring;
            work.writes.insert(Write::Chain(id));
            work.publishes = true;
        }
    }

    /// The move is over: `stays` keeps the place, `goes` is taken out for good.
    fn end_move(&mut self, id: ChainId, stays: TargetId, goes: TargetId, work: &mut Work) {
        let Some(next) = remove_member(&self.chains[&id].chain, goes) else { return };
        let Some(entry) = self.chains.get_mut(&id) else { return };
        let Some(moving) = entry.moving.take() else { return };
        // The old one stands behind; whoever stays gets the place.
        entry.preferred.retain(|t| *t != moving.from);
        entry.preferred.iter_mut().filter(|t| **t == moving.to).for_each(|t| *t = stays);
        self.moving.remove(&id);
        self.dirty.insert(id);
        self.out_since.remove(&goes);
        if let Some((node, _)) = self.owners.remove(&goes) {
            self.graves.insert(goes, (node, self.routing_version));
            work.buried.insert(goes);
            work.writes.insert(Write::Grave(goes));
            if goes == moving.to {
                self.failed_moves.insert((id, node), self.now);
                work.note(format!("{id}: {goes} on {node} cannot be filled; {stays} keeps its place"));
            } else {
                work.note(format!("{id}: {stays} has taken the place of {goes}"));
            }
        }
        self.adopt(next, work);
    }

    /// The new target will not be filled: its node is dead or its disk refuses.
    fn is_lost(&self, target: TargetId) -> bool {
        let Some((owner, _)) = self.owners.get(&target) else { return true };
        let is_alive = self.nodes.get(owner).is_some_and(|n| n.alive);
        let refuses = |s: &crate::TargetStatus| s.local == LocalState::Offline && !s.reason.is_empty();
        !is_alive || self.target_status(target).is_some_and(refuses)
    }
}
