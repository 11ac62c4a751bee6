//! Evening out what no construction covers: seeded local search.
//!
//! Two chains exchange the nodes that stand in one position of theirs. That keeps what must hold
//! (each node stands equally often in each position) and changes who meets whom. The cost is the
//! sum of squares of the meetings over all pairs; a small worsening is allowed in the beginning and
//! none at the end (threshold accepting: Dueck & Scheuer 1990, in whole numbers, so that every
//! machine finds the same).

/// Exchanges that are tried at most. Some tenths of a second, once in the life of a cluster.
const TRIES: u64 = 600_000;

/// A generator that will never change (splitmix64: Steele et al. 2014): placements are pinned.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

struct Meetings {
    n: usize,
    met: Vec<i32>,
}

impl Meetings {
    /// Counts the meetings of `node` with the others of `chain` by `by` more; the change of cost.
    fn add(&mut self, node: usize, chain: &[usize], by: i32) -> i64 {
        let mut change = 0;
        for other in chain.iter().filter(|o| **o != node) {
            let met = self.met[node * self.n + other];
            change += i64::from((met + by) * (met + by) - met * met);
            self.met[node * self.n + other] += by;
            self.met[other * self.n + node] += by;
        }
        change
    }

    /// The cost if all pairs met as evenly as whole numbers allow.
    fn least_cost(&self) -> i64 {
        let pairs = (self.n * (self.n - 1) / 2) as i64;
        let all: i64 = self.met.iter().map(|m| i64::from(*m)).sum::<i64>() / 2;
        let (each, rest) = (all / pairs, all % pairs);
        (pairs - rest) * each * each + rest * (each + 1) * (each + 1)
    }

    fn cost(&self) -> i64 {
        self.met.iter().map(|m| i64::from(m * m)).sum::<i64>() / 2
    }

    fn most(&self) -> i32 {
        self.met.iter().copied().max().unwrap_or(0)
    }
}

/// Makes the meetings in `chains` of nodes 0..n more even; returns the most even that it met.
pub(super) fn even_out(n: usize, chains: Vec<Vec<usize>>) -> Vec<Vec<usize>> {
    let k = chains.first().map_or(0, Vec::len);
    if k < 2 || k == n || chains.len() < 2 {
        return chains;
    }
    let mut chains = chains;
    let mut meetings = Meetings { n, met: vec![0; n * n] };
    for chain in &chains {
        for (i, node) in chain.iter().enumerate() {
            meetings.add(*node, &chain[..i], 1);
        }
    }
    let least = meetings.least_cost();
    let mut cost = meetings.cost();
    let mut best = (meetings.most(), cost, chains.clone());
    let mut random = Random((n as u64) << 40 | (k as u64) << 32 | chains.len() as u64);
    for round in 0..TRIES {
        if cost == least {
            return chains;
        }
        let threshold = (4 * (TRIES - round) / TRIES) as i64;
        let (a, b) = (random.below(chains.len()), random.below(chains.len()));
        // Heads stay: they are in stripe order.
        let at = 1 + random.below(k - 1);
        let (x, y) = (chains[a][at], chains[b][at]);
        if x == y || chains[a].contains(&y) || chains[b].contains(&x) {
            continue;
        }
        let exchange = |chains: &mut [Vec<usize>], meetings: &mut Meetings| {
            let (x, y) = (chains[a][at], chains[b][at]);
            let mut change = meetings.add(x, &chains[a], -1) + meetings.add(y, &chains[b], -1);
            (chains[a][at], chains[b][at]) = (y, x);
            change += meetings.add(y, &chains[a], 1) + meetings.add(x, &chains[b], 1);
            change
        };
        let change = exchange(&mut chains, &mut meetings);
        if change > threshold {
            exchange(&mut chains, &mut meetings);
            continue;
        }
        cost += change;
        if cost < best.1 {
            let most = meetings.most();
            if (most, cost) < (best.0, best.1) {
                best = (most, cost, chains.clone());
            }
        }
    }
    best.2
}
