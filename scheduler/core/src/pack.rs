//! Which idle nodes a gang gets: as near together as possible, and so that the largest holes stay.
//!
//! The tree is walked from the top: of the children that can hold all that is wanted the one with the smallest hole near enough
//! is taken; if none can, the largest is used up and the rest is looked for in the
//! others. So a gang sits under one leaf, else one spine, else one zone, and spills into as few
//! others as it can.

use crate::node::Place;
use firefly_types::NodeId;
use std::collections::BTreeMap;

/// Idle nodes by place.
pub(crate) type Idle<'a> = BTreeMap<&'a Place, Vec<NodeId>>;

/// `want` of the idle nodes, or `None`. Across zones only if `may_cross`.
pub(crate) fn gang(idle: &Idle<'_>, want: usize, may_cross: bool) -> Option<Vec<NodeId>> {
    let leaves: Vec<(&Place, &[NodeId])> = idle.iter().map(|(p, n)| (*p, n.as_slice())).collect();
    let zones = children(&leaves, Level::Zone);
    // The nearest fit: one leaf before one spine before one zone; then the smallest such hole.
    let fit = zones.iter().filter(|z| z.size >= want).min_by_key(|z| hole(&z.leaves, want));
    let mut taken = Vec::with_capacity(want);
    match fit {
        Some(zone) => take(&zone.leaves, Level::Spine, want, &mut taken),
        None if may_cross && zones.iter().map(|z| z.size).sum::<usize>() >= want => {
            take(&leaves, Level::Zone, want, &mut taken);
        }
        None => return None,
    }
    Some(taken)
}

/// `want` of the idle nodes by number, wherever they are.
pub(crate) fn first_fit(idle: &Idle<'_>, want: usize) -> Option<Vec<NodeId>> {
    let mut all: Vec<NodeId> = idle.values().flatten().copied().collect();
    all.sort_unstable();
    all.truncate(want);
    (all.len() == want).then_some(all)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Zone,
    Spine,
    Leaf,
}

impl Level {
    fn name(self, place: &Place) -> (&str, &str, &str) {
        match self {
            Level::Zone => (&place.zone, "", ""),
            Level::Spine => (&place.zone, &place.spine, ""),
            Level::Leaf => (&place.zone, &place.spine, &place.leaf),
        }
    }
}

struct Child<'a> {
    leaves: Vec<(&'a Place, &'a [NodeId])>,
    size: usize,
}

fn children<'a>(leaves: &[(&'a Place, &'a [NodeId])], level: Level) -> Vec<Child<'a>> {
    let mut all: Vec<Child<'a>> = Vec::new();
    for &(place, nodes) in leaves {
        match all.last_mut().filter(|c| level.name(c.leaves[0].0) == level.name(place)) {
            Some(child) => {
                child.leaves.push((place, nodes));
                child.size += nodes.len();
            }
            None => all.push(Child { leaves: vec![(place, nodes)], size: nodes.len() }),
        }
    }
    all
}

/// The hole that fits best: how near its nodes are to each other (0: under one leaf; 1: under one
/// spine; 2: neither), and its size.
fn hole(leaves: &[(&Place, &[NodeId])], want: usize) -> (u8, usize) {
    let best = |sizes: &mut dyn Iterator<Item = usize>| sizes.filter(|n| *n >= want).min();
    if let Some(size) = best(&mut leaves.iter().map(|(_, nodes)| nodes.len())) {
        (0, size)
    } else if let Some(size) = best(&mut children(leaves, Level::Spine).iter().map(|s| s.size)) {
        (1, size)
    } else {
        (2, leaves.iter().map(|(_, nodes)| nodes.len()).sum())
    }
}

fn take(leaves: &[(&Place, &[NodeId])], level: Level, want: usize, taken: &mut Vec<NodeId>) {
    let mut left = want;
    let mut rest = children(leaves, level);
    while left > 0 && !rest.is_empty() {
        let smallest_fit =
            (0..rest.len()).filter(|i| rest[*i].size >= left).min_by_key(|i| hole(&rest[*i].leaves, left));
        // Of equals the last: `max_by_key`'s choice, stable since the order of places is.
        let pick = smallest_fit.or_else(|| (0..rest.len()).max_by_key(|i| rest[*i].size)).unwrap_or(0);
        let child = rest.remove(pick);
        let from = left.min(child.size);
        match level {
            Level::Zone => take(&child.leaves, Level::Spine, from, taken),
            Level::Spine => take(&child.leaves, Level::Leaf, from, taken),
            Level::Leaf => taken.extend(child.leaves.iter().flat_map(|(_, n)| n.iter()).take(from)),
        }
        left -= from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn place(zone: u32, spine: u32, leaf: u32) -> Place {
        Place { zone: format!("z{zone}"), spine: format!("s{spine}"), leaf: format!("l{leaf}") }
    }

    fn places(sizes: &[((u32, u32, u32), u32)]) -> Vec<(Place, Vec<NodeId>)> {
        let mut next = 0;
        let mut all = Vec::new();
        for ((z, s, l), n) in sizes {
            let nodes = (next..next + n).map(NodeId).collect();
            next += n;
            all.push((place(*z, *s, *l), nodes));
        }
        all
    }

    fn idle(places: &[(Place, Vec<NodeId>)]) -> Idle<'_> {
        places.iter().map(|(p, n)| (p, n.clone())).collect()
    }

    /// Leaves, spines and zones that the nodes touch.
    fn spread(places: &[(Place, Vec<NodeId>)], nodes: &[NodeId]) -> (usize, usize, usize) {
        let of = |node| &places.iter().find(|(_, n)| n.contains(node)).unwrap().0;
        let count = |level: Level| nodes.iter().map(|n| level.name(of(n))).collect::<BTreeSet<_>>().len();
        (count(Level::Leaf), count(Level::Spine), count(Level::Zone))
    }

    #[test]
    fn the_smallest_leaf_that_fits_is_used() {
        let p = places(&[((1, 1, 1), 4), ((1, 1, 2), 2), ((1, 2, 1), 3), ((2, 1, 1), 8)]);
        let nodes = gang(&idle(&p), 2, false).unwrap();
        assert_eq!(nodes, p[1].1);
        // Larger than any leaf of zone 1, but not than its spine: one leaf elsewhere is nearer.
        assert_eq!(spread(&p, &gang(&idle(&p), 6, false).unwrap()), (1, 1, 1));
        assert_eq!(gang(&idle(&p), 10, false), None);
        assert_eq!(spread(&p, &gang(&idle(&p), 10, true).unwrap()).2, 2);
        assert_eq!(gang(&idle(&p), 18, true), None);
    }

    proptest! {
        #[test]
        fn gangs_are_whole_and_as_near_as_any_choice(
            sizes in prop::collection::btree_map((1..3u32, 1..3u32, 1..4u32), 1..5u32, 1..9),
            want in 1..20usize,
        ) {
            let p = places(&sizes.into_iter().collect::<Vec<_>>());
            let idle = idle(&p);
            let total = |same: &dyn Fn(&Place) -> bool| {
                p.iter().filter(|(q, _)| same(q)).map(|(_, n)| n.len()).sum::<usize>()
            };
            let leaf = p.iter().any(|(_, n)| n.len() >= want);
            let spine = p.iter().any(|(a, _)| {
                total(&|b: &Place| (&a.zone, &a.spine) == (&b.zone, &b.spine)) >= want
            });
            let zone = p.iter().any(|(a, _)| total(&|b: &Place| a.zone == b.zone) >= want);
            match gang(&idle, want, false) {
                None => prop_assert!(!zone),
                Some(nodes) => {
                    prop_assert_eq!(nodes.iter().collect::<BTreeSet<_>>().len(), want);
                    let (leaves, spines, zones) = spread(&p, &nodes);
                    prop_assert_eq!(zones, 1);
                    prop_assert!(!spine || spines == 1);
                    prop_assert!(!leaf || leaves == 1);
                }
            }
            let all = total(&|_: &Place| true);
            prop_assert_eq!(gang(&idle, want, true).is_some(), all >= want);
            prop_assert_eq!(first_fit(&idle, want).is_some(), all >= want);
        }
    }
}
