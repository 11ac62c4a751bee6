//! Seeded worlds around the core. The world keeps its own books and judges by them.

mod books;
mod world;

use crate::machine::Planted;
use world::{Seen, World};

/// Seeds of the promise test; `FIREFLY_SEED` runs one alone, `FIREFLY_SIM_SEEDS` and
/// `FIREFLY_SIM_FROM` more.
fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    if let Some(seed) = number("FIREFLY_SEED") {
        return seed..seed + 1;
    }
    let from = number("FIREFLY_SIM_FROM").unwrap_or(0);
    from..from + number("FIREFLY_SIM_SEEDS").unwrap_or(500)
}

const STEPS: usize = 1_000;

/// A seed, and what its world came to: the hash of its history and what was seen, or the promise
/// that was broken.
type Outcome = (u64, Result<(u64, Seen), String>);

/// Runs seeds on all cores; outcomes in order of seed.
fn run_all(seeds: std::ops::Range<u64>, planted: Option<Planted>) -> Vec<Outcome> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let mut all: Vec<Outcome> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut mine = Vec::new();
                    loop {
                        let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        if seed >= seeds.end {
                            return mine;
                        }
                        mine.push((seed, World::new(seed, planted).run(STEPS)));
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
fn no_history_breaks_a_promise() {
    let (mut reached, mut count) = (Seen::new(), 0);
    for (seed, outcome) in run_all(seeds(), None) {
        let (_, seen) = outcome.unwrap_or_else(|e| panic!("FIREFLY_SEED={seed} replays it: {e}"));
        for (what, n) in seen {
            *reached.entry(what).or_default() += n;
        }
        count += 1;
    }
    println!("{count} seeds: {reached:#?}");
    if std::env::var("FIREFLY_SEED").is_ok() {
        return;
    }
    for what in [
        "scheduler crashes",
        "restarts",
        "lost nodes",
        "fenced nodes",
        "fenced ranks",
        "stray ranks",
        "repeated reports",
        "start timeouts",
        "successes",
        "failures",
        "stops",
        "held jobs",
        "failed ranks",
        "hangs",
        "time limits",
        "ends by suspension",
        "ends by force",
        "ends by GPU or network",
        "ends by storage or host",
        "faults of nodes",
        "auto cordons",
        "capped cordons",
        "changed policies",
        "maintenance windows",
        "suspensions by people",
        "reservations",
        "displacements",
        "suspensions",
        "forced suspensions",
        "opportunistic starts",
        "promotions",
        "overdue jobs",
        "demotions",
        "jobs across zones",
        "failed dependencies",
        "no-progress breakers",
        "lost ranks stopped later",
    ] {
        assert!(reached.get(what).is_some_and(|n| *n > 0), "no seed ever visited: {what}");
    }
}

#[test]
fn every_planted_bug_is_found() {
    let bugs = [
        Planted::PartialGang,
        Planted::BarrierOpensEarly,
        Planted::StaleEpochAccepted,
        Planted::FenceIgnored,
        Planted::OrderBeforePersist,
        Planted::RoomOvercommitted,
        Planted::SeatLeaked,
        Planted::StopForgottenOnRestart,
        Planted::QuotaOffByOne,
        Planted::ReservationLeftBehind,
        Planted::SeatReturnedTwice,
        Planted::CrossZoneUncounted,
        Planted::GangSharesNodes,
        Planted::PreemptsInVain,
        Planted::SuspendsUnable,
        Planted::HeldJobStarts,
        Planted::DependencyIgnored,
        Planted::AutoCordonUncapped,
        Planted::QuantumIgnored,
        Planted::IndexMissesRelease,
        Planted::HeadOvertaken,
    ];
    let mut unnoticed = Vec::new();
    for bug in bugs {
        let found = (0..60).find_map(|round| {
            let outcomes = run_all(round * 8..(round + 1) * 8, Some(bug));
            outcomes.into_iter().find_map(|(seed, o)| o.err().map(|what| (seed, what)))
        });
        match found {
            Some((seed, what)) => {
                let what: String = what.chars().take(150).collect();
                println!("{bug:?} found by seed {seed}, after {} seeds: {what}", seed + 1);
            }
            None => unnoticed.push(bug),
        }
    }
    assert!(unnoticed.is_empty(), "{unnoticed:?} went unnoticed");
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in [3, 99, 200] {
        let run = || World::new(seed, None).run(STEPS).unwrap();
        assert_eq!(run(), run(), "seed {seed}");
    }
    let of = |seed| World::new(seed, None).run(100).unwrap().0;
    assert_ne!(of(3), of(4));
}
