//! The index of free capacity: which nodes in service have what left, by kind and place.
//!
//! Kept up to date node by node ([`Capacity::set`]), never rebuilt. Nodes of one kind ([`Kind`])
//! form a pool; a request looks at the few pools that match and at their leaves, not at nodes.

use crate::amount::Amount;
use crate::node::{Node, Place};
use firefly_types::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// What nodes have in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Kind {
    pub(crate) group: String,
    pub(crate) full: Amount,
    pub(crate) can_suspend: bool,
}

/// Where a node in service stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) kind: Kind,
    pub(crate) place: Place,
    pub(crate) free: Amount,
    pub(crate) idle: bool,
    /// A blocked job waits for it.
    pub(crate) held: bool,
}

impl Standing {
    /// `None` for a node that gets nothing.
    pub(crate) fn of(node: &Node) -> Option<Self> {
        let info = &node.record.info;
        node.in_service().then(|| Self {
            kind: Kind { group: info.group.clone(), full: info.amount(), can_suspend: info.can_suspend },
            place: info.place.clone(),
            free: node.free(),
            idle: node.idle(),
            held: node.held_for.is_some(),
        })
    }
}

/// Which nodes a search may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Those that a blocked job waits for, too.
    pub(crate) held: bool,
    /// Only those that can suspend.
    pub(crate) suspending: bool,
}

/// Free nodes of one kind, either held for somebody or not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shelf {
    /// Nodes with nothing on them, by place.
    idle: BTreeMap<Place, BTreeSet<NodeId>>,
    /// Of those, so many in each zone.
    idle_in_zone: BTreeMap<String, usize>,
    /// Nodes with anything left, by what is left.
    by_free: BTreeMap<Amount, BTreeSet<NodeId>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Pool {
    /// Not held, held.
    shelves: [Shelf; 2],
    /// Nodes in service, busy or not, by zone.
    in_service: BTreeMap<String, usize>,
}

/// The index.
#[derive(Clone, Debug, Default)]
pub(crate) struct Capacity {
    pools: BTreeMap<Kind, Pool>,
    nodes: BTreeMap<NodeId, Standing>,
    /// Grows whenever something may fit that did not fit before.
    pub(crate) generation: u64,
}

impl Capacity {
    /// Takes over a node's new standing.
    pub(crate) fn set(&mut self, id: NodeId, new: Option<Standing>) {
        let old = self.nodes.get(&id);
        if old == new.as_ref() {
            return;
        }
        let worse = match (old, &new) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(o), Some(n)) => {
                o.kind == n.kind && n.free.fits(&o.free) && n.idle <= o.idle && n.held >= o.held
            }
        };
        self.generation += u64::from(!worse);
        if let Some(old) = self.nodes.remove(&id)
            && let Some(pool) = self.pools.get_mut(&old.kind)
        {
            count(&mut pool.in_service, &old.place.zone, false);
            let shelf = &mut pool.shelves[usize::from(old.held)];
            remove(&mut shelf.by_free, &old.free, id);
            if old.idle {
                remove(&mut shelf.idle, &old.place, id);
                count(&mut shelf.idle_in_zone, &old.place.zone, false);
            }
            if pool.in_service.is_empty() {
                self.pools.remove(&old.kind);
            }
        }
        if let Some(new) = new {
            let pool = self.pools.entry(new.kind.clone()).or_default();
            count(&mut pool.in_service, &new.place.zone, true);
            let shelf = &mut pool.shelves[usize::from(new.held)];
            if new.free != Amount::default() {
                shelf.by_free.entry(new.free).or_default().insert(id);
            }
            if new.idle {
                shelf.idle.entry(new.place.clone()).or_default().insert(id);
                count(&mut shelf.idle_in_zone, &new.place.zone, true);
            }
            self.nodes.insert(id, new);
        }
    }

    /// What is known of a node in service.
    pub(crate) fn standing(&self, id: NodeId) -> Option<&Standing> {
        self.nodes.get(&id)
    }

    fn pools<'a>(&'a self, group: &'a str, each: &'a Amount) -> impl Iterator<Item = (&'a Kind, &'a Pool)> {
        let first = Kind { group: group.to_owned(), full: Amount::default(), can_suspend: false };
        let of_group = self.pools.range(first..).take_while(move |(kind, _)| kind.group == group);
        of_group.filter(move |(kind, _)| each.fits(&kind.full))
    }

    fn shelves<'a>(
        &'a self,
        group: &'a str,
        each: &'a Amount,
        reach: Reach,
    ) -> impl Iterator<Item = &'a Shelf> {
        self.pools(group, each)
            .filter(move |(kind, _)| kind.can_suspend || !reach.suspending)
            .flat_map(move |(_, pool)| pool.shelves.iter().take(1 + usize::from(reach.held)))
    }

    /// Nodes in service that are large enough, by zone.
    pub(crate) fn large_enough<'a>(&'a self, group: &'a str, each: &'a Amount) -> BTreeMap<&'a str, usize> {
        let mut zones = BTreeMap::new();
        for (_, pool) in self.pools(group, each) {
            for (zone, n) in &pool.in_service {
                *zones.entry(zone.as_str()).or_default() += n;
            }
        }
        zones
    }

    /// Idle nodes that are large enough.
    pub(crate) fn idle(&self, group: &str, each: &Amount, reach: Reach) -> usize {
        self.shelves(group, each, reach).flat_map(|s| s.idle_in_zone.values()).sum()
    }

    /// The same by place, without those to avoid.
    pub(crate) fn idle_places<'a>(
        &'a self,
        group: &'a str,
        each: &'a Amount,
        reach: Reach,
        avoid: &BTreeSet<NodeId>,
    ) -> BTreeMap<&'a Place, Vec<NodeId>> {
        let mut places: BTreeMap<&Place, Vec<NodeId>> = BTreeMap::new();
        for shelf in self.shelves(group, each, reach) {
            for (place, nodes) in &shelf.idle {
                let all = places.entry(place).or_default();
                all.extend(nodes.iter().filter(|n| !avoid.contains(n)));
            }
        }
        places.retain(|_, nodes| !nodes.is_empty());
        places
    }

    /// The node with the least left that has room, for a job that shares one.
    pub(crate) fn room(
        &self,
        group: &str,
        each: &Amount,
        reach: Reach,
        avoid: &BTreeSet<NodeId>,
    ) -> Option<NodeId> {
        let mut best: Option<(Amount, NodeId)> = None;
        for shelf in self.shelves(group, each, reach) {
            // Ordered by accelerators, then slots: nothing before `from` can have room.
            let from = Amount { cores: 0, memory_bytes: 0, ..*each };
            let fitting = shelf.by_free.range(from..).filter(|(free, _)| each.fits(free));
            let found = fitting
                .flat_map(|(free, nodes)| nodes.iter().map(|n| (*free, *n)))
                .find(|(_, n)| !avoid.contains(n));
            best = match (best, found) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
        best.map(|(_, node)| node)
    }

    /// Whether the index is what a look at all nodes gives.
    pub(crate) fn check<'a>(&self, nodes: impl Iterator<Item = &'a Node>) -> Result<(), String> {
        let mut fresh = Capacity::default();
        for node in nodes {
            fresh.set(node.record.id, Standing::of(node));
        }
        if self.nodes != fresh.nodes || self.pools != fresh.pools {
            return Err("the index of free capacity is not what the nodes say".into());
        }
        Ok(())
    }
}

fn count(zones: &mut BTreeMap<String, usize>, zone: &str, more: bool) {
    match zones.get_mut(zone) {
        Some(n) if more => *n += 1,
        Some(n) => {
            *n -= 1;
            if *n == 0 {
                zones.remove(zone);
            }
        }
        None => {
            zones.insert(zone.to_owned(), usize::from(more));
        }
    }
}

fn remove<K: Ord>(map: &mut BTreeMap<K, BTreeSet<NodeId>>, key: &K, id: NodeId) {
    if let Some(set) = map.get_mut(key) {
        set.remove(&id);
        if set.is_empty() {
            map.remove(key);
        }
    }
}
