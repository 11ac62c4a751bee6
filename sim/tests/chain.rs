//! Seeded worlds of one chain.

use firefly_sim::chain::{Mutant, Options, Outcome, run};
use fs3_core::target::Mutation;
use std::collections::BTreeMap;

fn seeds() -> std::ops::Range<u64> {
    // More on demand: make sim SEEDS=10000 FROM=300
    let number = |name: &str, otherwise: u64| match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}, not a number")),
        Err(_) => otherwise,
    };
    let from = number("FIREFLY_SIM_FROM", 0);
    from..from + number("FIREFLY_SIM_SEEDS", 300)
}

/// Runs seeds on all cores; outcomes in order of seed.
fn run_all(seeds: std::ops::Range<u64>, make: impl Fn(u64) -> Options + Sync) -> Vec<(u64, Outcome)> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let mut all: Vec<(u64, Outcome)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut mine = Vec::new();
                    loop {
                        let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        if seed >= seeds.end {
                            return mine;
                        }
                        mine.push((seed, run(make(seed))));
                    }
                })
            })
            .collect();
        workers.into_iter().flat_map(|w| w.join().unwrap()).collect()
    });
    all.sort_by_key(|(seed, _)| *seed);
    all
}

#[test]
fn promises_hold_in_every_world() {
    let outcomes = run_all(seeds(), Options::seed);
    let mut reached: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut events, mut operations) = (0, 0);
    for (seed, outcome) in &outcomes {
        assert!(outcome.violation.is_none(), "seed {seed}: {}", outcome.violation.as_ref().unwrap());
        events += outcome.events;
        operations += outcome.operations;
        for (what, count) in &outcome.reached {
            *reached.entry(what).or_default() += count;
        }
    }
    println!("{} seeds, {events} events, {operations} operations, {reached:?}", outcomes.len());
    // The interesting states were visited.
    for what in [
        "crashes",
        "crashes within a batch",
        "total outages",
        "nodes cut off from the manager",
        "dirty reads",
        "reads refused until settled",
        "questions about pending updates",
        "pending updates dropped",
        "targets filled",
        "chain changes",
        "rotations",
        "several complete targets came back together",
        "targets asked to stop",
        "targets asked to stop and wanted back",
        "targets moved",
        "lost targets replaced",
    ] {
        assert!(
            reached.get(what).is_some_and(|n| *n > 0),
            "{what} never happened in {} seeds",
            outcomes.len()
        );
    }
}

#[test]
fn a_seed_replays_its_world() {
    for seed in [0, 7, 23] {
        assert_eq!(run(Options::seed(seed)), run(Options::seed(seed)), "seed {seed}");
    }
    assert_ne!(run(Options::seed(0)).fingerprint, run(Options::seed(1)).fingerprint);
}

/// Pasting a failing seed here (FIREFLY_SIM_SEED=n) replays it alone.
#[test]
fn one_seed() {
    let Some(seed) = std::env::var("FIREFLY_SIM_SEED").ok().and_then(|v| v.parse().ok()) else { return };
    let outcome = run(Options::seed(seed));
    println!("{outcome:#?}");
    assert_eq!(outcome.violation, None, "seed {seed}");
}

#[test]
fn every_planted_bug_is_found() {
    let mutants = [
        Mutant::Machine(Mutation::OmitToken),
        Mutant::Machine(Mutation::VolatileRecords),
        Mutant::Machine(Mutation::CommitBeforeSuccessor),
        Mutant::Machine(Mutation::IgnoreLease),
        Mutant::Machine(Mutation::ServeUnresolved),
        Mutant::Machine(Mutation::ServeHandedOver),
        Mutant::Machine(Mutation::FillOmitsPending),
        Mutant::LyingDisk,
        Mutant::TakesOutUnasked,
    ];
    for mutant in mutants {
        // Rare ones need many worlds; each round of seeds runs on all cores.
        let found = (0..100).find_map(|round| {
            let make = |seed| Options { mutant: Some(mutant), ..Options::seed(seed) };
            let outcomes = run_all(round * 50..(round + 1) * 50, make);
            outcomes.into_iter().find_map(|(seed, o)| o.violation.map(|v| (seed, v)))
        });
        match found {
            Some((seed, violation)) => println!("{mutant:?} found by seed {seed}: {violation}"),
            None => panic!("{mutant:?} was not found"),
        }
    }
}
