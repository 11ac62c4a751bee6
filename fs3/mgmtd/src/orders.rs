//! Operators' orders: what is checked, and what becomes durable. Workers do the rest.

use crate::event::{Order, Role, Write};
use crate::moves::Cause;
use crate::state::{ManagerState, NodeEntry, Work};
use firefly_types::{ErrorKind, NodeId, TargetId, WireError};

/// Bytes that a scrub reads per second and node unless told otherwise: a few percent of an SSD.
const SCRUB_RATE: u64 = 64 << 20;
/// Storage nodes at most.
const MAX_NODES: usize = fs3_core::placement::MAX_NODES;

fn refuse<T>(kind: ErrorKind, why: String) -> Result<T, WireError> {
    Err(WireError::new(kind, why))
}

impl ManagerState {
    pub(crate) fn order(&mut self, order: Order, work: &mut Work) -> Result<String, WireError> {
        match order {
            Order::AddNode(id) => self.add_node(id, work),
            Order::RemoveNode(id) => self.remove_node(id, work),
            Order::DrainNode(id) => self.drain_node(id, true, work),
            Order::UndrainNode(id) => self.drain_node(id, false, work),
            Order::DrainTarget(target) => {
                let to =
                    self.destination(target).map_err(|why| WireError::new(ErrorKind::Unavailable, why))?;
                let new = self.begin_move(target, to, Cause::Drain, work)?;
                Ok(format!("{new} on {to} takes the place of {target}; `ff fs workers` shows how far it is"))
            }
            Order::ReplaceTarget(target) => {
                let Some((node, _)) = self.owners.get(&target).copied() else {
                    return refuse(ErrorKind::NotFound, format!("there is no target {target}"));
                };
                if !self.nodes.get(&node).is_some_and(|n| n.alive) {
                    return refuse(
                        ErrorKind::Unavailable,
                        format!(
                            "{node}, which holds {target}, is not alive: start it first, or drain the target"
                        ),
                    );
                }
                let new = self.begin_move(target, node, Cause::Replace, work)?;
                Ok(format!(
                    "{new} on {node} takes the place of {target}; `ff fs workers` shows how far it is"
                ))
            }
            Order::Rebalance { start } => {
                work.writes.insert(Write::Tasks);
                if !start {
                    self.tasks.rebalancing = false;
                    return Ok("no more moves are begun; those under way are finished".into());
                }
                if !self.tasks.rebalancing {
                    (self.tasks.rebalancing, self.tasks.rebalance_moves) = (true, 0);
                }
                Ok(format!("{} targets to move; `ff fs workers` shows how far it is", self.excess()))
            }
            Order::Scrub { start, rate_bytes } => {
                work.writes.insert(Write::Tasks);
                work.publishes = true;
                if !start {
                    self.tasks.scrubbing = false;
                    return Ok(format!("scrub {} stops", self.tasks.scrub_pass));
                }
                self.tasks.scrub_rate = if rate_bytes == 0 { SCRUB_RATE } else { rate_bytes };
                if !self.tasks.scrubbing {
                    (self.tasks.scrubbing, self.tasks.scrub_pass) = (true, self.tasks.scrub_pass + 1);
                }
                Ok(format!(
                    "scrub {} goes on at {}/s and node; `ff fs scrub status` shows how far it is",
                    self.tasks.scrub_pass,
                    firefly_types::ByteSize(self.tasks.scrub_rate)
                ))
            }
        }
    }

    fn add_node(&mut self, id: NodeId, work: &mut Work) -> Result<String, WireError> {
        match self.nodes.get(&id) {
            Some(node) if node.role == Role::Storage => {
                return refuse(ErrorKind::AlreadyExists, format!("{id} is a storage node already"));
            }
            Some(_) => {
                return refuse(
                    ErrorKind::AlreadyExists,
                    format!("{id} is a meta server: choose another number"),
                );
            }
            None => {}
        }
        if self.nodes.values().filter(|n| n.role == Role::Storage).count() >= MAX_NODES {
            return refuse(ErrorKind::Unavailable, format!("{MAX_NODES} storage nodes are the limit"));
        }
        self.nodes.insert(id, NodeEntry::new(Role::Storage));
        work.writes.insert(Write::Node(id));
        work.publishes = true;
        work.note(format!("{id} was added"));
        Ok(format!("{id} may come; `ff fs rebalance` moves targets to it"))
    }

    fn remove_node(&mut self, id: NodeId, work: &mut Work) -> Result<String, WireError> {
        self.storage_node(id)?;
        let held: Vec<String> =
            self.owners.iter().filter(|(_, (owner, _))| *owner == id).map(|(t, _)| t.to_string()).collect();
        if !held.is_empty() {
            return refuse(
                ErrorKind::Conflict,
                format!(
                    "{id} still holds {} targets: move them first with `ff fs node drain {id}`",
                    held.len()
                ),
            );
        }
        self.nodes.remove(&id);
        self.contacts.remove(&id);
        work.writes.insert(Write::Node(id));
        let left: Vec<TargetId> =
            self.graves.iter().filter(|(_, (n, _))| *n == id).map(|(t, _)| *t).collect();
        for target in left {
            self.graves.remove(&target);
            work.writes.insert(Write::Grave(target));
        }
        work.publishes = true;
        work.note(format!("{id} was removed"));
        Ok(format!("{id} is no longer part of the cluster; its server can be stopped and its folder removed"))
    }

    fn drain_node(&mut self, id: NodeId, draining: bool, work: &mut Work) -> Result<String, WireError> {
        self.storage_node(id)?;
        if draining {
            let others =
                |(other, n): &(&NodeId, &NodeEntry)| **other != id && n.role == Role::Storage && !n.draining;
            let left = self.nodes.iter().filter(others).count();
            if left < self.replication as usize {
                return refuse(
                    ErrorKind::InvalidArgument,
                    format!(
                        "{left} storage nodes would be left for {} replicas: add one first with `ff fs node add`",
                        self.replication
                    ),
                );
            }
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.draining = draining;
        }
        work.writes.insert(Write::Node(id));
        work.publishes = true;
        let held = self.owners.values().filter(|(owner, _)| *owner == id).count();
        Ok(match draining {
            true => format!("{held} targets to move off {id}; `ff fs workers` shows how far it is"),
            false => format!("{id} is used again; it holds {held} targets"),
        })
    }

    fn storage_node(&self, id: NodeId) -> Result<(), WireError> {
        match self.nodes.get(&id) {
            Some(node) if node.role == Role::Storage => Ok(()),
            _ => refuse(
                ErrorKind::NotFound,
                format!("there is no storage node {id}: `ff fs node ls` lists them"),
            ),
        }
    }
}
