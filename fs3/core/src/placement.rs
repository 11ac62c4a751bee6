//! Which nodes form which chains. Balanced by construction, versioned, and the same for everybody
//! who computes it: no random source, no library shuffle.
//!
//! Nodes stand on a ring. A *pattern* is a head followed by k−1 offsets; turning it all the way
//! round gives one chain per node. Whatever the patterns are, each node is therefore head of equally
//! many chains, holds equally many targets and stands equally often in each position. What the
//! choice of patterns decides is how evenly pairs of nodes meet, and with that how evenly the
//! survivors share the copying when a node fails. That depends only on how often each distance on
//! the ring occurs, so a small search over offsets makes it even: a greedy start, then single
//! replacements while they help.

use firefly_types::NodeId;

/// Version of the function from (nodes, replication, chains per node) to chains. It is stored with
/// the result; another version never recomputes an old table.
pub const PLACEMENT_VERSION: u32 = 1;

/// Nodes at most: bounds the search.
pub const MAX_NODES: usize = 4096;
/// Replicas at most.
pub const MAX_REPLICAS: usize = 16;
/// Chains per node at most.
pub const MAX_CHAINS_PER_NODE: usize = 64;

/// Chains that each node heads, if nobody says otherwise: all distances on small rings, which is
/// perfectly even; a handful on large ones, so that a node's failure spreads over many others.
pub fn default_chains_per_node(nodes: usize) -> usize {
    nodes.saturating_sub(1).clamp(1, 12)
}

/// Why no placement can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// No nodes, or too many.
    #[error("{0} storage nodes were given; chains need 1 to {MAX_NODES}")]
    Nodes(usize),
    /// A node is listed twice.
    #[error("storage node {0} is listed twice")]
    Twice(NodeId),
    /// No replicas, or too many.
    #[error("replication {replication} is not possible on {nodes} storage nodes: choose 1 to {most}", most = nodes.min(&MAX_REPLICAS))]
    Replication {
        /// Asked for.
        replication: usize,
        /// Nodes there are.
        nodes: usize,
    },
    /// No chains, or too many.
    #[error("{0} chains per node were asked for; choose 1 to {MAX_CHAINS_PER_NODE}")]
    Chains(usize),
}

/// Chains as lists of nodes, head first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// [`PLACEMENT_VERSION`] that made it.
    pub version: u32,
    /// In stripe order: neighbours in the list have different heads.
    pub chains: Vec<Vec<NodeId>>,
}

/// How evenly the survivors share the copying after the loss of one node, in units of one target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RecoveryTraffic {
    /// The most that any survivor of any loss copies.
    pub max: f64,
    /// What it would be if all survivors shared equally.
    pub mean: f64,
}

impl RecoveryTraffic {
    /// 1.0 is perfect balance.
    pub fn ratio(&self) -> f64 {
        if self.mean > 0.0 { self.max / self.mean } else { 1.0 }
    }
}

impl std::fmt::Display for RecoveryTraffic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "max {:.2}, mean {:.2} targets per survivor ({:.2} of even)",
            self.max,
            self.mean,
            self.ratio()
        )
    }
}

/// Places `nodes.len() * chains_per_node` chains of `replication` targets each.
pub fn place(
    nodes: &[NodeId],
    replication: usize,
    chains_per_node: usize,
) -> Result<Placement, PlacementError> {
    if nodes.is_empty() || nodes.len() > MAX_NODES {
        return Err(PlacementError::Nodes(nodes.len()));
    }
    let mut sorted = nodes.to_vec();
    sorted.sort_unstable();
    if let Some(pair) = sorted.windows(2).find(|w| w[0] == w[1]) {
        return Err(PlacementError::Twice(pair[0]));
    }
    if replication == 0 || replication > nodes.len().min(MAX_REPLICAS) {
        return Err(PlacementError::Replication { replication, nodes: nodes.len() });
    }
    if chains_per_node == 0 || chains_per_node > MAX_CHAINS_PER_NODE {
        return Err(PlacementError::Chains(chains_per_node));
    }
    let n = sorted.len();
    let patterns = Patterns::search(n, replication, chains_per_node).offsets;
    let turned = |offsets: &[usize], head: usize| -> Vec<NodeId> {
        std::iter::once(0).chain(offsets.iter().copied()).map(|o| sorted[(head + o) % n]).collect()
    };
    let chains = patterns.iter().flat_map(|offsets| (0..n).map(move |head| (offsets, head)));
    Ok(Placement { version: PLACEMENT_VERSION, chains: chains.map(|(o, h)| turned(o, h)).collect() })
}

/// The copying after the loss of one node: each of its targets is read from the other members of
/// the chain, shared equally among them.
pub fn recovery_traffic(chains: &[Vec<NodeId>]) -> RecoveryTraffic {
    let mut nodes: Vec<NodeId> = chains.iter().flatten().copied().collect();
    nodes.sort_unstable();
    nodes.dedup();
    let at = |node: &NodeId| nodes.binary_search(node).unwrap_or(0);
    let n = nodes.len();
    let mut share = vec![0.0f64; n * n];
    for chain in chains.iter().filter(|c| c.len() > 1) {
        let each = 1.0 / (chain.len() - 1) as f64;
        for a in chain {
            for b in chain.iter().filter(|b| *b != a) {
                share[at(a) * n + at(b)] += each;
            }
        }
    }
    let max = share.iter().copied().fold(0.0, f64::max);
    let pairs = (n * n.saturating_sub(1)).max(1);
    RecoveryTraffic { max, mean: share.iter().sum::<f64>() / pairs as f64 }
}

/// The offsets of each pattern, and how often each distance on the ring occurs in them.
struct Patterns {
    n: usize,
    offsets: Vec<Vec<usize>>,
    /// By distance 1..=n/2.
    met: Vec<u32>,
}

impl Patterns {
    fn search(n: usize, replication: usize, count: usize) -> Self {
        let mut patterns = Self { n, offsets: Vec::new(), met: vec![0; n / 2 + 1] };
        for index in 0..count {
            let mut pattern = Vec::new();
            for position in 1..replication {
                // Start where the last pattern's choice at this position ended, so that equally
                // good offsets take turns and every node sits in every position.
                let start = index + position;
                let offset = patterns.best_offset(&pattern, start);
                patterns.count(&pattern, offset, 1);
                pattern.push(offset);
            }
            patterns.offsets.push(pattern);
        }
        patterns.improve();
        patterns
    }

    fn distance(&self, a: usize, b: usize) -> usize {
        let d = a.abs_diff(b);
        d.min(self.n - d)
    }

    /// Cost that adding `offset` to `pattern` adds: how often the distances it makes are met
    /// already. On an even ring the opposite node is met once per turn by each of the two, so that
    /// distance weighs double.
    fn cost(&self, pattern: &[usize], offset: usize) -> u64 {
        let weight = |d: usize| u64::from(self.met[d]) * if 2 * d == self.n { 2 } else { 1 };
        std::iter::once(&0).chain(pattern).map(|&o| weight(self.distance(o, offset))).sum()
    }

    fn best_offset(&self, pattern: &[usize], start: usize) -> usize {
        let ring = self.n - 1;
        let candidates = (0..ring).map(|i| (start + i - 1) % ring + 1);
        candidates
            .filter(|o| !pattern.contains(o))
            .min_by_key(|&o| self.cost(pattern, o))
            .expect("a pattern has fewer members than the ring has nodes")
    }

    fn count(&mut self, pattern: &[usize], offset: usize, by: i32) {
        for o in std::iter::once(0).chain(pattern.iter().copied()) {
            let d = self.distance(o, offset);
            self.met[d] = self.met[d].wrapping_add_signed(by);
        }
    }

    /// Replaces single offsets while that makes the meetings more even. Each replacement lowers
    /// the sum of squares, so it ends; the bound on rounds keeps large rings quick.
    fn improve(&mut self) {
        for _ in 0..20 {
            let mut changed = false;
            for p in 0..self.offsets.len() {
                for position in 0..self.offsets[p].len() {
                    let mut rest = self.offsets[p].clone();
                    let old = rest.remove(position);
                    self.count(&rest, old, -1);
                    let new = self.best_offset(&rest, old);
                    let better = self.cost(&rest, new) < self.cost(&rest, old);
                    let chosen = if better { new } else { old };
                    self.count(&rest, chosen, 1);
                    rest.insert(position, chosen);
                    changed |= better;
                    self.offsets[p] = rest;
                }
            }
            if !changed {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(n: usize) -> Vec<NodeId> {
        (3..3 + n as u32).map(NodeId).collect()
    }

    fn show(placement: &Placement) -> String {
        let chain = |c: &Vec<NodeId>| c.iter().map(|n| n.0.to_string()).collect::<Vec<_>>().join("-");
        placement.chains.iter().map(chain).collect::<Vec<_>>().join(" ")
    }

    /// Pinned: files refer to chains by their place in this list.
    #[test]
    fn golden_placements() {
        let golden = [
            (1, 1, 1, "3"),
            (2, 2, 1, "3-4 4-3"),
            (3, 2, 2, "3-4 4-5 5-3 3-5 4-3 5-4"),
            (
                5,
                3,
                4,
                "3-4-6 4-5-7 5-6-3 6-7-4 7-3-5 3-7-5 4-3-6 5-4-7 6-5-3 7-6-4 \
                 3-6-7 4-7-3 5-3-4 6-4-5 7-5-6 3-5-4 4-6-5 5-7-6 6-3-7 7-4-3",
            ),
            (7, 3, 1, "3-4-6 4-5-7 5-6-8 6-7-9 7-8-3 8-9-4 9-3-5"),
        ];
        for (n, k, per_node, wanted) in golden {
            assert_eq!(show(&place(&nodes(n), k, per_node).unwrap()), wanted, "{n} nodes, {k} replicas");
        }
    }

    #[test]
    fn every_node_holds_the_same_for_any_size() {
        for n in 1..=24 {
            for k in 1..=n.min(5) {
                for per_node in [1, 2, default_chains_per_node(n)] {
                    let placement = place(&nodes(n), k, per_node).unwrap();
                    assert_eq!(placement.chains.len(), n * per_node);
                    for position in 0..k {
                        let mut held = vec![0; n];
                        for chain in &placement.chains {
                            held[chain[position].0 as usize - 3] += 1;
                        }
                        assert!(held.iter().all(|&h| h == per_node), "{n} nodes, {k} replicas: {held:?}");
                    }
                    for chain in &placement.chains {
                        let mut members = chain.clone();
                        members.sort_unstable();
                        members.dedup();
                        assert_eq!(members.len(), k, "a node stands twice in a chain");
                    }
                }
            }
        }
    }

    #[test]
    fn survivors_share_the_copying() {
        // With all distances the balance is perfect for pairs; elsewhere it is bounded. Printed for
        // people: cargo test -p fs3-core survivors -- --nocapture
        for n in 2..=40 {
            for k in 2..=n.min(4) {
                let placement = place(&nodes(n), k, default_chains_per_node(n)).unwrap();
                let traffic = recovery_traffic(&placement.chains);
                println!("{n} nodes, {k} replicas, {} chains: {traffic}", placement.chains.len());
                if n <= 13 {
                    let most = if k == 2 { 1.0 } else { 1.34 };
                    assert!(traffic.ratio() <= most + 1e-9, "{n} nodes, {k} replicas: {traffic}");
                }
            }
        }
    }

    #[test]
    fn the_measure_notices_imbalance() {
        let pair = |a, b| vec![NodeId(a), NodeId(b)];
        let even = recovery_traffic(&[pair(1, 2), pair(2, 3), pair(3, 1)]);
        assert_eq!((even.max, even.mean), (1.0, 1.0));
        let uneven = recovery_traffic(&[pair(1, 2), pair(2, 1), pair(3, 1)]);
        assert!(uneven.ratio() > 1.5, "{uneven}");
    }

    #[test]
    fn impossible_wishes_are_refused_with_the_reason() {
        assert_eq!(place(&[], 1, 1), Err(PlacementError::Nodes(0)));
        assert_eq!(place(&[NodeId(1), NodeId(1)], 1, 1), Err(PlacementError::Twice(NodeId(1))));
        assert!(place(&nodes(2), 3, 1).unwrap_err().to_string().contains("choose 1 to 2"));
        assert!(place(&nodes(2), 0, 1).is_err());
        assert!(place(&nodes(2), 1, 0).is_err());
        assert!(place(&nodes(2), 1, 65).is_err());
    }

    #[test]
    fn the_order_in_which_nodes_are_listed_does_not_matter() {
        let mut reversed = nodes(6);
        reversed.reverse();
        assert_eq!(place(&reversed, 3, 4), place(&nodes(6), 3, 4));
    }
}
