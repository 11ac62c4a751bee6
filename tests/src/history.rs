//! What clients asked and were told, and whether one order of events explains it.
//!
//! Every cell of every file is a register. Each write carries a tag of its own, so a read says which
//! write it saw; that makes the question "is there an order?" answerable in n log n: Gibbons & Korach,
//! "Testing shared memories" (1997), in the form of zones. All operations on one value form a
//! *cluster*; between the first of their ends and the last of their starts the value must have been in
//! the register (a *forward zone*). The history is linearizable if and only if no two forward zones
//! overlap and no cluster that could happen in one moment (a *backward zone*) lies within one.

use std::collections::BTreeMap;

/// What was done to a cell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Did {
    /// Wrote this tag.
    Write(u64),
    /// Read this tag; zero is what a cell holds before its first write.
    Read(u64),
}

/// One operation on one cell, in nanoseconds of one clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operation {
    /// What.
    pub did: Did,
    /// When it was asked for.
    pub start: u64,
    /// When it was answered; never for a write whose outcome is unknown.
    pub end: Option<u64>,
}

/// Operations by (file, cell).
#[derive(Clone, Default, Debug)]
pub struct History {
    cells: BTreeMap<(usize, usize), Vec<Operation>>,
}

#[derive(Clone, Copy)]
struct Cluster {
    written: Option<u64>,
    first_end: u64,
    last_start: u64,
    is_read: bool,
    is_known: bool,
}

impl History {
    /// Adds an operation.
    pub fn add(&mut self, cell: (usize, usize), operation: Operation) {
        self.cells.entry(cell).or_default().push(operation);
    }

    /// Adds all of another.
    pub fn merge(&mut self, other: History) {
        for (cell, operations) in other.cells {
            self.cells.entry(cell).or_default().extend(operations);
        }
    }

    /// Number of operations.
    pub fn len(&self) -> usize {
        self.cells.values().map(Vec::len).sum()
    }

    /// Whether nothing was done.
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// Longest time without an acknowledged write, nanoseconds, and when it began.
    pub fn longest_gap(&self) -> (u64, u64) {
        let is_write = |o: &&Operation| matches!(o.did, Did::Write(_));
        let mut ends: Vec<u64> =
            self.cells.values().flatten().filter(is_write).filter_map(|o| o.end).collect();
        ends.sort_unstable();
        ends.windows(2).map(|w| (w[1] - w[0], w[0])).max().unwrap_or((0, 0))
    }

    /// `Err` tells what no order explains.
    pub fn check(&self) -> Result<(), String> {
        for ((file, cell), operations) in &self.cells {
            check_cell(operations).map_err(|why| format!("file {file} cell {cell}: {why}"))?;
        }
        Ok(())
    }
}

fn check_cell(operations: &[Operation]) -> Result<(), String> {
    // The value before the first write was there from the beginning.
    let initial = Cluster { written: Some(0), first_end: 0, last_start: 0, is_read: true, is_known: true };
    let mut clusters: BTreeMap<u64, Cluster> = BTreeMap::from([(0, initial)]);
    for o in operations {
        let end = o.end.unwrap_or(u64::MAX);
        let (tag, is_read) = match o.did {
            Did::Write(tag) => (tag, false),
            Did::Read(tag) => (tag, true),
        };
        let cluster = clusters.entry(tag).or_insert(Cluster {
            written: None,
            first_end: u64::MAX,
            last_start: 0,
            is_read: false,
            is_known: false,
        });
        cluster.first_end = cluster.first_end.min(end);
        cluster.last_start = cluster.last_start.max(o.start);
        cluster.is_read |= is_read;
        cluster.is_known |= o.end.is_some();
        if !is_read {
            if cluster.written.is_some() {
                return Err(format!("tag {tag} was written twice: the load is wrong"));
            }
            cluster.written = Some(o.start);
        }
    }
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for (tag, c) in &clusters {
        let Some(written) = c.written else { return Err(format!("{tag:#x} was read, and never written")) };
        if c.first_end < written {
            return Err(format!("{tag:#x} was read before anybody asked to write it"));
        }
        match (c.first_end < c.last_start, c.is_read || c.is_known) {
            (true, _) => forward.push((c.first_end, c.last_start, *tag)),
            // Nobody saw it and nobody was told: it may not have happened.
            (false, false) => {}
            (false, true) => backward.push((c.last_start, c.first_end, *tag)),
        }
    }
    forward.sort_unstable();
    for pair in forward.windows(2) {
        if pair[1].0 < pair[0].1 {
            return Err(format!(
                "{:#x} was seen from {} to {} and {:#x} from {} to {}: one of them came back after it was gone",
                pair[0].2, pair[0].0, pair[0].1, pair[1].2, pair[1].0, pair[1].1
            ));
        }
    }
    for (from, to, tag) in backward {
        // The last zone that begins before; since zones do not overlap, no earlier one reaches as far.
        let before = forward.partition_point(|zone| zone.0 < from);
        if let Some(zone) = before.checked_sub(1).map(|i| forward[i])
            && to < zone.1
        {
            return Err(format!(
                "{tag:#x} was written and acknowledged between {from} and {to}, while {:#x} was seen from {} to {}: \
                 the write was lost, or an old value was read",
                zone.2, zone.0, zone.1
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn w(tag: u64, start: u64, end: u64) -> Operation {
        Operation { did: Did::Write(tag), start, end: Some(end) }
    }

    fn r(tag: u64, start: u64, end: u64) -> Operation {
        Operation { did: Did::Read(tag), start, end: Some(end) }
    }

    fn lost(tag: u64, start: u64) -> Operation {
        Operation { did: Did::Write(tag), start, end: None }
    }

    #[test]
    fn what_may_not_be_is_found() {
        let cases: [(&str, Vec<Operation>, bool); 9] = [
            ("in turn", vec![w(1, 1, 2), r(1, 3, 4), w(2, 5, 6), r(2, 7, 8)], true),
            ("a stale read", vec![w(1, 1, 2), w(2, 3, 4), r(1, 5, 6)], false),
            ("a lost write", vec![w(1, 1, 2), r(0, 3, 4)], false),
            ("a value from nowhere", vec![r(9, 1, 2)], false),
            ("a value from the future", vec![r(1, 1, 2), w(1, 3, 4)], false),
            ("back and forth", vec![w(1, 1, 9), w(2, 1, 9), r(1, 2, 3), r(2, 4, 5), r(1, 6, 7)], false),
            (
                "an unknown write that is seen late",
                vec![lost(1, 1), w(2, 2, 3), r(2, 4, 5), r(1, 6, 7)],
                true,
            ),
            ("and then gone again", vec![lost(1, 1), w(2, 2, 3), r(1, 4, 5), r(2, 6, 7)], false),
            ("an unknown write that nobody sees", vec![lost(1, 1), r(0, 5, 6)], true),
        ];
        for (what, operations, is_fine) in cases {
            assert_eq!(check_cell(&operations).is_ok(), is_fine, "{what}: {:?}", check_cell(&operations));
        }
    }

    /// Tries every order.
    fn explained(operations: &[Operation], done: u32, value: u64) -> bool {
        let all = (1u32 << operations.len()) - 1;
        let must = |o: &Operation| o.end.is_some();
        if (0..operations.len()).all(|i| done & (1 << i) != 0 || !must(&operations[i])) {
            return true;
        }
        let left = || (0..operations.len()).filter(|i| (all & !done) & (1 << i) != 0);
        let horizon = left().filter_map(|i| operations[i].end).min().unwrap_or(u64::MAX);
        left().any(|i| {
            let o = operations[i];
            // Nothing goes before what had ended before it began.
            o.start <= horizon
                && match o.did {
                    Did::Read(tag) => tag == value && explained(operations, done | 1 << i, value),
                    Did::Write(tag) => explained(operations, done | 1 << i, tag),
                }
        })
    }

    #[test]
    fn the_zones_agree_with_trying_every_order() {
        let (mut fine, mut wrong) = (0, 0);
        for seed in 0..20_000 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            // Distinct times, so that "at the same moment" needs no convention.
            let n = rng.random_range(2..8);
            let mut times: Vec<u64> = (1..=2 * n as u64).collect();
            for i in (1..times.len()).rev() {
                times.swap(i, rng.random_range(0..=i));
            }
            let mut tags = 0;
            let operations: Vec<Operation> = times
                .chunks(2)
                .map(|pair| {
                    let (start, end) = (pair[0].min(pair[1]), pair[0].max(pair[1]));
                    if rng.random_bool(0.5) {
                        tags += 1;
                        let end = rng.random_bool(0.8).then_some(end);
                        Operation { did: Did::Write(tags), start, end }
                    } else {
                        r(rng.random_range(0..=n as u64 / 2), start, end)
                    }
                })
                .collect();
            let expected = explained(&operations, 0, 0);
            assert_eq!(check_cell(&operations).is_ok(), expected, "seed {seed}: {operations:?}");
            *(if expected { &mut fine } else { &mut wrong }) += 1;
        }
        assert!(fine > 1000 && wrong > 1000, "{fine} fine, {wrong} wrong");
    }
}
