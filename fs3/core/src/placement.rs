//! Which nodes form which chains. Balanced by construction, versioned, and the same for everybody
//! who computes it: no random source, no library shuffle.
//!
//! Each node is head of equally many chains, holds equally many targets and stands equally often in
//! each position. What remains to be chosen is who meets whom: when a node fails, the survivors
//! copy for it in proportion to how often they stand in one chain with it.
//!
//! * **Version 2**, for new clusters: a balanced block design where one can be constructed
//!   (`design`: any two nodes meet equally often), else the ring of version 1 made more even by a
//!   seeded local search (`search`).
//! * **Version 1**: patterns turned on a ring (`ring`). Clusters that were laid out with it keep
//!   what they have: placements are stored, never computed again.

mod design;
mod field;
mod ring;
mod search;

use firefly_types::NodeId;

/// Version of the function from (nodes, replication, chains per node) to chains. It is stored with
/// the result; another version never recomputes an old table.
pub const PLACEMENT_VERSION: u32 = 2;

/// Nodes at most: bounds the search.
pub const MAX_NODES: usize = 4096;
/// Replicas at most.
pub const MAX_REPLICAS: usize = 16;
/// Chains per node at most.
pub const MAX_CHAINS_PER_NODE: usize = 64;

/// Chains that each node heads, if nobody says otherwise: one per other node on small clusters, a
/// dozen on large ones, so that a node's failure spreads over many others; more, up to twice that,
/// where a perfectly balanced design asks for it.
pub fn default_chains_per_node(nodes: usize, replication: usize) -> usize {
    let least = nodes.saturating_sub(1).clamp(1, 12);
    if replication == 0 || replication > nodes {
        return least;
    }
    (least..=2 * least).find(|c| design::Family::find(nodes, replication, *c).is_some()).unwrap_or(least)
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
    /// Another release's.
    #[error("placement version {0} is not known here; this release knows 1 to {PLACEMENT_VERSION}")]
    Version(u32),
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

/// Places `nodes.len() * chains_per_node` chains of `replication` targets each, by the newest
/// version.
pub fn place(
    nodes: &[NodeId],
    replication: usize,
    chains_per_node: usize,
) -> Result<Placement, PlacementError> {
    place_by(PLACEMENT_VERSION, nodes, replication, chains_per_node)
}

/// As [`place`], by the version that is named.
pub fn place_by(
    version: u32,
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
    let ring = || ring::chains(n, replication, chains_per_node);
    let chains = match version {
        1 => ring(),
        2 => match design::Family::find(n, replication, chains_per_node) {
            Some(family) => family.chains(chains_per_node),
            None => search::even_out(n, ring()),
        },
        other => return Err(PlacementError::Version(other)),
    };
    let chains = chains.into_iter().map(|chain| chain.into_iter().map(|i| sorted[i]).collect()).collect();
    Ok(Placement { version, chains })
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
    fn golden_placements_of_version_1() {
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
            let placed = place_by(1, &nodes(n), k, per_node).unwrap();
            assert_eq!(show(&placed), wanted, "{n} nodes, {k} replicas");
        }
    }

    /// Pinned: what new clusters get. Short ones as they are, the others by a digest (FNV-1a).
    #[test]
    fn golden_placements_of_version_2() {
        let golden = [
            (1, 1, 2, "3 3"),
            (3, 2, 2, "3-4 4-5 5-3 3-5 4-3 5-4"),
            (4, 3, 1, "3-4-5 4-5-6 5-6-3 6-3-4"),
            (7, 3, 1, "3-4-6 4-5-7 5-6-8 6-7-9 7-8-3 8-9-4 9-3-5"),
            (6, 3, 2, "3-4-6 4-5-7 5-6-8 6-7-3 7-8-4 8-3-5 3-5-4 4-6-5 5-7-6 6-8-7 7-3-8 8-4-3"),
        ];
        for (n, k, per_node, wanted) in golden {
            assert_eq!(show(&place(&nodes(n), k, per_node).unwrap()), wanted, "{n} nodes, {k} replicas");
        }
        let digests = [
            (8, 3, 7, 0xdb8f_a22e_f8fb_e5dc),
            (9, 4, 8, 0x034e_d10e_060c_7829),
            (10, 3, 9, 0x9597_ca8d_748b_115d),
            (12, 4, 11, 0xf384_17ba_aa3f_2357),
            (14, 3, 12, 0xacf6_2c95_8afc_4e9d),
            (25, 3, 12, 0x776c_c1b6_2459_4fc3),
            (31, 6, 12, 0xea15_e21f_8107_2f4f),
            (40, 4, 12, 0xa3f8_13f2_0749_0f17),
        ];
        let digest = |text: &str| {
            text.bytes()
                .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
        };
        for (n, k, per_node, wanted) in digests {
            let found = digest(&show(&place(&nodes(n), k, per_node).unwrap()));
            assert_eq!(found, wanted, "{n} nodes, {k} replicas: {found:#018x}");
        }
    }

    #[test]
    fn every_node_holds_the_same_for_any_size() {
        for n in 1..=24 {
            for k in 1..=n.min(5) {
                for per_node in [1, 2, default_chains_per_node(n, k)] {
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
    fn survivors_share_the_copying_as_evenly_as_whole_chains_allow() {
        // Where the search ends one chain above what might be possible.
        let mut above = Vec::new();
        // Printed for people: cargo test -p fs3-core survivors -- --nocapture
        for n in 2..=40 {
            for k in 2..=n.min(4) {
                let per_node = default_chains_per_node(n, k);
                let traffic =
                    |version| recovery_traffic(&place_by(version, &nodes(n), k, per_node).unwrap().chains);
                let (before, traffic) = (traffic(1), traffic(2));
                println!("{n} nodes, {k} replicas, {per_node} chains each: {traffic}; version 1: {before}");
                // Two nodes share whole chains, each of which is worth 1/(k-1).
                let whole = (k - 1) as f64;
                let least = (traffic.mean * whole - 1e-9).ceil() / whole;
                assert!(traffic.max < least + 1.0 / whole + 1e-9, "{n} nodes, {k} replicas: {traffic}");
                if traffic.max > least + 1e-9 {
                    above.push((n, k));
                }
                assert!(traffic.max <= before.max + 1e-9);
                if n <= 13 {
                    assert!(traffic.ratio() < 1.0 + 1e-9, "{n} nodes, {k} replicas: {traffic}");
                }
            }
        }
        assert_eq!(above, [(30, 4)]);
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
        assert!(place_by(3, &nodes(2), 1, 1).unwrap_err().to_string().contains("version 3"));
    }

    #[test]
    fn the_order_in_which_nodes_are_listed_does_not_matter() {
        let mut reversed = nodes(6);
        reversed.reverse();
        assert_eq!(place(&reversed, 3, 4), place(&nodes(6), 3, 4));
    }
}
