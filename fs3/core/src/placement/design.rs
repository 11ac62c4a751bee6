//! Balanced block designs by construction: difference families.
//!
//! A family of base blocks over a group of n elements, in whose differences every element but zero
//! occurs equally often, gives a design when each block is moved by every element of the group: any
//! two points meet in equally many blocks. One base block gives n chains, in which every node stands
//! once in each position. Sources: Singer 1938 (planes), Bose 1939 and Wilson 1972 (cosets in finite
//! fields); each family is checked here before it is used, so a construction that does not apply is
//! passed over.

use super::field::{Field, add, prime_power};

/// The group that blocks are moved by.
#[derive(Clone, Copy)]
enum Group {
    /// Numbers modulo n.
    Cyclic(usize),
    /// Vectors over the numbers modulo p, as digits.
    Vectors(usize),
}

impl Group {
    fn add(self, a: usize, b: usize) -> usize {
        match self {
            Group::Cyclic(n) => (a + b) % n,
            Group::Vectors(p) => add(p, a, b),
        }
    }
}

/// Base blocks over a group.
pub(super) struct Family {
    group: Group,
    n: usize,
    blocks: Vec<Vec<usize>>,
}

impl Family {
    /// The smallest family that is known for blocks of `k` out of `n` points and whose size divides
    /// `per_node`.
    pub(super) fn find(n: usize, k: usize, per_node: usize) -> Option<Self> {
        let families = candidates(n, k, per_node).into_iter();
        let fitting = families.filter(|f| per_node.is_multiple_of(f.blocks.len()) && f.is_balanced());
        fitting.min_by_key(|f| f.blocks.len())
    }

    /// `per_node` chains headed by each point, in stripe order.
    pub(super) fn chains(&self, per_node: usize) -> Vec<Vec<usize>> {
        let k = self.blocks[0].len();
        let copies = (0..per_node / self.blocks.len()).flat_map(|copy| {
            // Each copy begins the blocks elsewhere, so that pairs meet in other positions.
            self.blocks
                .iter()
                .map(move |block| (0..k).map(move |i| block[(i + copy) % k]).collect::<Vec<_>>())
        });
        // Heads in order, whatever a block begins with.
        let moved = copies.flat_map(|block| {
            let by_head = |head: usize| {
                let shift = (0..self.n).find(|s| self.group.add(block[0], *s) == head);
                let shift = shift.expect("a group has an element between any two");
                block.iter().map(|b| self.group.add(*b, shift)).collect()
            };
            (0..self.n).map(by_head).collect::<Vec<_>>()
        });
        moved.collect()
    }

    /// Every two points meet equally often: it is enough to look at those that meet point 0.
    fn is_balanced(&self) -> bool {
        let mut met = vec![0u32; self.n];
        for block in &self.blocks {
            for b in block {
                let Some(to_zero) = (0..self.n).find(|s| self.group.add(*b, *s) == 0) else { return false };
                for c in block.iter().filter(|c| *c != b) {
                    met[self.group.add(*c, to_zero)] += 1;
                }
            }
        }
        let distinct = self.blocks.iter().all(|block| {
            let mut sorted = block.clone();
            sorted.sort_unstable();
            sorted.windows(2).all(|w| w[0] != w[1])
        });
        distinct && met[0] == 0 && met[1..].windows(2).all(|w| w[0] == w[1])
    }
}

/// Families of at most `most` base blocks that may be balanced.
fn candidates(n: usize, k: usize, most: usize) -> Vec<Family> {
    let cyclic = |blocks: Vec<Vec<usize>>| Family { group: Group::Cyclic(n), n, blocks };
    let mut all = Vec::new();
    if k == 1 || k == n || k + 1 == n {
        all.push(cyclic(vec![(0..k).collect()]));
    }
    if k == 2 {
        for count in [(n - 1) / 2, n - 1].into_iter().filter(|count| *count <= most) {
            all.push(cyclic((1..=count).map(|d| vec![0, d]).collect()));
        }
    }
    if let Some(line) = singer(n, k) {
        all.push(cyclic(vec![line]));
    }
    if let Some((p, m)) = prime_power(n).filter(|_| k >= 2 && k < n) {
        let field = Field::new(p, m);
        let units = field.units();
        let vectors = |blocks: Vec<Vec<usize>>| Family { group: Group::Vectors(p), n, blocks };
        // A block of powers, times each of the first `count` powers of the primitive element.
        let multiples = |with_zero: bool, exponents: &[usize], count: usize| {
            let block = |i: usize| {
                let zero = with_zero.then_some(0);
                zero.into_iter().chain(exponents.iter().map(|e| field.power(e + i))).collect()
            };
            vectors((0..count).map(block).collect())
        };
        for (with_zero, size) in [(false, k), (true, k - 1)] {
            let mut shapes: Vec<(Vec<usize>, usize)> = Vec::new();
            if units.is_multiple_of(size) {
                // A subgroup of the non-zero elements: as many multiples as it has cosets.
                shapes.push(((0..size).map(|j| j * (units / size)).collect(), units / size));
            }
            // Anything: all multiples.
            shapes.push(((0..size).collect(), units));
            for (exponents, count) in shapes {
                // A block and its negative have the same differences, so half may do.
                let halves = [Some(count), count.is_multiple_of(2).then_some(count / 2)];
                for count in halves.into_iter().flatten().filter(|count| *count <= most) {
                    all.push(multiples(with_zero, &exponents, count));
                }
            }
        }
    }
    all.retain(|f| !f.blocks.is_empty());
    if 2 * k > n && k + 1 < n {
        // What a design leaves out is a design.
        for mut family in candidates(n, n - k, most) {
            for block in &mut family.blocks {
                *block = (0..n).filter(|i| !block.contains(i)).collect();
            }
            all.push(family);
        }
    }
    all
}

/// A line of the projective plane over GF(q), for n = q² + q + 1 and k = q + 1: the exponents of the
/// elements of GF(q³) whose trace to GF(q) is zero, modulo n.
fn singer(n: usize, k: usize) -> Option<Vec<usize>> {
    let q = k.checked_sub(1).filter(|q| *q >= 2 && q * q + q + 1 == n)?;
    let (p, m) = prime_power(q)?;
    let field = Field::new(p, 3 * m);
    let trace = |i: usize| {
        let conjugates = [i, i * q, i * q * q].map(|e| field.power(e));
        conjugates.into_iter().fold(0, |sum, e| field.add(sum, e))
    };
    Some((0..n).filter(|i| trace(*i) == 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_designs_are_found_and_balanced() {
        // (points, block, base blocks): planes, residues, triple systems, complements.
        for (n, k, size) in [
            (7, 3, 1),
            (13, 4, 1),
            (21, 5, 1),
            (31, 6, 1),
            (57, 8, 1),
            (11, 5, 1),
            (13, 3, 2),
            (19, 3, 3),
            (25, 3, 4),
            (9, 4, 2),
            (7, 4, 1),
            (8, 7, 1),
            (5, 2, 2),
            (6, 2, 5),
        ] {
            let family = Family::find(n, k, size).unwrap_or_else(|| panic!("({n}, {k}) in {size} blocks"));
            let mut met = vec![0; n * n];
            for chain in family.chains(size) {
                for (a, b) in chain.iter().flat_map(|a| chain.iter().map(move |b| (a, b))) {
                    met[a * n + b] += usize::from(a != b);
                }
            }
            let pairs = (0..n * n).filter(|i| i / n != i % n).map(|i| met[i]).collect::<Vec<_>>();
            assert!(pairs.iter().all(|m| *m == pairs[0]), "({n}, {k}) is not balanced: {pairs:?}");
        }
        assert!(Family::find(6, 3, 1).is_none(), "five differences are not covered by six evenly");
    }

    #[test]
    fn an_unbalanced_family_is_noticed() {
        let broken = Family { group: Group::Cyclic(7), n: 7, blocks: vec![vec![0, 1, 2]] };
        assert!(!broken.is_balanced());
        let twice = Family { group: Group::Cyclic(3), n: 3, blocks: vec![vec![0, 0]] };
        assert!(!twice.is_balanced());
    }
}
