//! Version 1, and where the search of version 2 begins: patterns that are turned on a ring.
//!
//! Nodes stand on a ring. A *pattern* is a head followed by k−1 offsets; turning it all the way
//! round gives one chain per node. Whatever the patterns are, each node is therefore head of equally
//! many chains, holds equally many targets and stands equally often in each position. What the
//! choice of patterns decides is how evenly pairs of nodes meet. That depends only on how often each
//! distance on the ring occurs, so a small search over offsets makes it even: a greedy start, then
//! single replacements while they help.

/// Chains as rows of node indices, head first, in stripe order.
pub(super) fn chains(n: usize, replication: usize, per_node: usize) -> Vec<Vec<usize>> {
    let patterns = Patterns::search(n, replication, per_node).offsets;
    let turned = |offsets: &[usize], head: usize| {
        std::iter::once(0).chain(offsets.iter().copied()).map(|o| (head + o) % n).collect()
    };
    patterns
        .iter()
        .flat_map(|offsets| (0..n).map(move |head| (offsets, head)))
        .map(|(o, h)| turned(o, h))
        .collect()
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
