//! Which ranks share a node, as far as algorithms depend on it.

/// The ranks of each node in rank order, nodes in the order of their lowest ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    nodes: Vec<Vec<u32>>,
}

impl Placement {
    /// From one key per rank; ranks with equal keys share a node.
    pub(crate) fn new<K: PartialEq>(keys: &[K]) -> Self {
        let mut nodes: Vec<Vec<u32>> = Vec::new();
        for (rank, key) in keys.iter().enumerate() {
            match nodes.iter_mut().find(|node| keys[node[0] as usize] == *key) {
                Some(node) => node.push(rank as u32),
                None => nodes.push(vec![rank as u32]),
            }
        }
        Self { nodes }
    }

    /// The ranks of `rank`'s node.
    pub(crate) fn node(&self, rank: u32) -> &[u32] {
        self.nodes.iter().find(|node| node.contains(&rank)).expect("every rank is on a node")
    }

    /// Each node's lowest rank, which speaks for it.
    pub(crate) fn leaders(&self) -> Vec<u32> {
        self.nodes.iter().map(|node| node[0]).collect()
    }

    /// Whether reducing inside the nodes first, then across them, evaluates the canonical tree: nodes
    /// hold consecutive ranks, equally many on all but the last, which may hold fewer, and their
    /// number is a power of two. Then every node's ranks are a subtree, and the nodes' results meet as
    /// the tree has it.
    pub(crate) fn two_levels(&self) -> bool {
        let most = self.nodes[0].len();
        let consecutive =
            self.nodes.iter().flatten().copied().eq(0..self.nodes.iter().flatten().count() as u32);
        let (last, others) = self.nodes.split_last().expect("a group has ranks");
        self.nodes.len() > 1
            && most > 1
            && most.is_power_of_two()
            && consecutive
            && others.iter().all(|node| node.len() == most)
            && last.len() <= most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_levels_only_where_the_tree_allows_it() {
        let allowed = |nodes: &str| Placement::new(&nodes.chars().collect::<Vec<_>>()).two_levels();
        for nodes in ["aab", "aabb", "aabbc", "aabbccd", "aaaabbb", "aaaabbbbc", "aabbccdd"] {
            assert!(allowed(nodes), "{nodes}");
        }
        for nodes in ["a", "aa", "ab", "abc", "abb", "aba", "abab", "aaab", "aaabbb", "aaaabbcc", "abbcc"] {
            assert!(!allowed(nodes), "{nodes}");
        }
    }

    /// The canonical tree as text.
    fn tree(leaves: &[String]) -> String {
        if let [one] = leaves {
            return one.clone();
        }
        let mut left = 1;
        while left * 2 < leaves.len() {
            left *= 2;
        }
        format!("({}+{})", tree(&leaves[..left]), tree(&leaves[left..]))
    }

    #[test]
    fn where_it_is_allowed_the_nested_tree_is_the_canonical_one() {
        for per_node in [2usize, 4, 8] {
            for size in per_node + 1..=5 * per_node {
                let keys: Vec<usize> = (0..size).map(|r| r / per_node).collect();
                let placement = Placement::new(&keys);
                assert!(placement.two_levels());
                let all: Vec<String> = (0..size).map(|r| r.to_string()).collect();
                let inner: Vec<String> =
                    placement.nodes.iter().map(|n| tree(&all[n[0] as usize..][..n.len()])).collect();
                assert_eq!(tree(&inner), tree(&all), "{size} ranks, {per_node} per node");
            }
        }
    }
}
