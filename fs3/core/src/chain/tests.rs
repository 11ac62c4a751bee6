//! The table, case by case, and random lives of chains.

use super::*;
use PublicState::*;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeSet, HashSet};

const UP: Report = Report { local: LocalState::Online, synced_at: ChainVersion(0) };

fn chain(version: u64, states: &[PublicState]) -> Chain {
    let members = states.iter().zip(1..).map(|(&state, t)| Member { target: TargetId(t), state }).collect();
    Chain { id: ChainId(1), version: ChainVersion(version), members }
}

fn show(chain: &Chain) -> String {
    let letter = |s| match s {
        Serving => "S",
        LastSrv => "L",
        Syncing => "y",
        Waiting => "w",
        Offline => "-",
    };
    chain.members.iter().map(|m| format!("{}{}", m.target.0, letter(m.state))).collect::<Vec<_>>().join(" ")
}

/// Each report that a target can be in: silent, up, synced for an old version, synced now.
fn reports(version: ChainVersion) -> [Report; 4] {
    let synced = |v| Report { local: LocalState::UpToDate, synced_at: ChainVersion(v) };
    [Report::SILENT, UP, synced(version.0 - 1), synced(version.0)]
}

/// Every valid chain of `n` members, with all combinations of reports.
fn every_case(n: usize, mut visit: impl FnMut(&Chain, &[Report])) -> usize {
    let mut cases = 0;
    for code in 0..5usize.pow(n as u32) {
        let states: Vec<_> = (0..n).map(|i| PUBLIC_STATES[code / 5usize.pow(i as u32) % 5]).collect();
        let chain = chain(7, &states);
        if chain.check().is_err() {
            continue;
        }
        for code in 0..4usize.pow(n as u32) {
            let choice = |i| reports(chain.version)[code / 4usize.pow(i as u32) % 4];
            let reports: Vec<_> = (0..n).map(choice).collect();
            visit(&chain, &reports);
            cases += 1;
        }
    }
    cases
}

fn of(reports: &[Report]) -> impl Fn(TargetId) -> Report + '_ {
    |t| reports[t.0 as usize - 1]
}

#[test]
fn every_transition_of_up_to_four_members_keeps_the_promises() {
    let mut cases = 0;
    for n in 1..=4 {
        cases += every_case(n, |before, reports| {
            let case = || format!("{} with {reports:?}", show(before));
            let after = next_chain(before, of(reports));
            let Some(after) = after else { return };
            assert_eq!(after.check(), Ok(()), "{} -> {}", case(), show(&after));
            assert_eq!(after.version.0, before.version.0 + 1);
            let was = |t| before.state_of(t).unwrap();
            let complete: BTreeSet<_> = before.complete().collect();
            let serving: Vec<_> = after.in_state(Serving).collect();
            // Only targets that hold everything serve: complete ones, or those filled for
            // exactly this chain version while a complete one served on.
            let stayed = serving.iter().any(|&t| was(t) == Serving);
            for &t in &serving {
                let report = of(reports)(t);
                let filled = was(t) == Syncing
                    && stayed
                    && report.local == LocalState::UpToDate
                    && report.synced_at == before.version;
                assert!(report.is_up() && (complete.contains(&t) || filled), "{}", case());
            }
            // The next complete set comes from this one, or from filling beside it.
            assert!(after.complete().any(|t| complete.contains(&t)), "{}", case());
            // Nobody who is up and serves is thrown out, and the order of those who stay is kept.
            let kept: Vec<_> = before.in_state(Serving).filter(|&t| of(reports)(t).is_up()).collect();
            assert!(serving.starts_with(&kept), "{} -> {}", case(), show(&after));
            // A chain serves as soon as any complete member is up.
            assert_eq!(serving.is_empty(), !complete.iter().any(|&t| of(reports)(t).is_up()), "{}", case());
            // After an outage all who are complete and up serve again, without being filled.
            if before.in_state(Serving).count() == 0 && !serving.is_empty() {
                let back = before.complete().filter(|&t| of(reports)(t).is_up());
                assert!(serving.iter().copied().eq(back), "{} -> {}", case(), show(&after));
            }
            // Silent members neither serve nor are filled nor wait.
            for m in &after.members {
                if !of(reports)(m.target).is_up() {
                    assert!(matches!(m.state, Offline | LastSrv), "{}", case());
                }
            }
            // Progress: with somebody serving and somebody else up, one is being filled.
            let others_up = after.members.iter().any(|m| m.state == Waiting);
            assert!(!others_up || serving.is_empty() || after.in_state(Syncing).count() == 1, "{}", case());
            // It is a fixed point.
            assert_eq!(next_chain(&after, of(reports)), None, "{} -> {}", case(), show(&after));
        });
    }
    assert_eq!(cases, 7_736, "the number of valid cases changed");
}

#[test]
fn the_written_table() {
    // Who of three is up ("u", "f" = filled for this version, "." = silent), and what follows.
    let table = [
        ("1S 2S 3S", "uuu", "unchanged"),
        ("1S 2S 3S", "u.u", "1S 3S 2-"),
        ("1S 2S 3S", ".uu", "2S 3S 1-"),
        ("1S 2S 3S", "...", "1L 2L 3L"),
        ("1S 2- 3-", "...", "1L 2- 3-"),
        ("1S 2- 3-", "uuu", "1S 2y 3w"),
        ("1S 2y 3w", "uuu", "unchanged"),
        ("1S 2y 3w", "ufu", "1S 2S 3y"),
        ("1S 2y 3w", "u.u", "1S 3y 2-"),
        ("1S 2y 3w", ".uu", "1L 2w 3w"),
        ("1S 2y 3w", ".fu", "1L 2w 3w"),
        ("1L 2w 3w", ".uu", "unchanged"),
        ("1L 2w 3w", "uuu", "1S 2y 3w"),
        ("1L 2L 3-", ".u.", "2S 1- 3-"),
        ("1L 2L 3-", "uu.", "1S 2S 3-"),
        ("1L 2L 3-", "uuu", "1S 2S 3y"),
        ("1L 2L 3L", "..u", "3S 1- 2-"),
        ("1L 2L 3L", "uuu", "1S 2S 3S"),
        ("1L 2L 3L", ".uu", "2S 3S 1-"),
    ];
    for (before, up, after) in table {
        let states: Vec<_> = before
            .split(' ')
            .map(|m| match &m[1..] {
                "S" => Serving,
                "L" => LastSrv,
                "y" => Syncing,
                "w" => Waiting,
                _ => Offline,
            })
            .collect();
        let chain = chain(7, &states);
        let report = |t: TargetId| match &up[t.0 as usize - 1..t.0 as usize] {
            "u" => UP,
            "f" => Report { local: LocalState::UpToDate, synced_at: ChainVersion(7) },
            _ => Report::SILENT,
        };
        let next = next_chain(&chain, report).map_or("unchanged".into(), |c| show(&c));
        assert_eq!(next, after, "{before} with {up}");
    }
}

/// A world that knows the truth: which acknowledged writes each target really holds.
#[test]
fn no_acknowledged_write_is_lost_in_random_lives_of_chains() {
    let mut visited = HashSet::new();
    for seed in 0..500u64 {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let n = rng.random_range(1..=4);
        let targets: Vec<_> = (1..=n).map(TargetId).collect();
        let mut chain = Chain::new(ChainId(1), &targets);
        let mut up = vec![true; n as usize];
        let mut held: Vec<BTreeSet<u32>> = vec![BTreeSet::new(); n as usize];
        let mut synced_at = vec![0u64; n as usize];
        let mut acknowledged = BTreeSet::new();
        for write in 0..200 {
            let at = rng.random_range(0..n as usize);
            match rng.random_range(0..4) {
                0 => up[at] = !up[at],
                1 if rng.random_bool(0.2) => up.fill(false),
                _ => {}
            }
            // Filling makes progress now and then.
            if let Some(t) = chain.in_state(Syncing).next()
                && rng.random_bool(0.3)
            {
                let source = chain.in_state(Serving).last().unwrap();
                let t = t.0 as usize - 1;
                if up[t] && up[source.0 as usize - 1] {
                    held[t] = held[source.0 as usize - 1].clone();
                    synced_at[t] = chain.version.0;
                }
            }
            // A write is acknowledged once every serving member holds it; a syncing one gets it too.
            let serving: Vec<_> = chain.in_state(Serving).map(|t| t.0 as usize - 1).collect();
            if !serving.is_empty() && serving.iter().all(|&t| up[t]) {
                let takers = chain.in_state(Serving).chain(chain.in_state(Syncing));
                for t in takers.map(|t| t.0 as usize - 1).filter(|&t| up[t]) {
                    held[t].insert(write);
                }
                // A syncing member that was down missed it, but the manager has not noticed
                // yet, and its node would report the sync only of what it has: not synced.
                for t in chain.in_state(Syncing).map(|t| t.0 as usize - 1).filter(|&t| !up[t]) {
                    synced_at[t] = 0;
                }
                acknowledged.insert(write);
            }
            if rng.random_bool(0.6) {
                let report = |t: TargetId| {
                    let t = t.0 as usize - 1;
                    let local = match (up[t], synced_at[t] > 0) {
                        (false, _) => LocalState::Offline,
                        (true, true) => LocalState::UpToDate,
                        (true, false) => LocalState::Online,
                    };
                    Report { local, synced_at: ChainVersion(synced_at[t]) }
                };
                if let Some(next) = next_chain(&chain, report) {
                    assert_eq!(next.check(), Ok(()), "seed {seed}");
                    // A member that starts being filled is emptied first.
                    for t in next.in_state(Syncing) {
                        if chain.state_of(t) != Some(Syncing) {
                            held[t.0 as usize - 1].clear();
                            synced_at[t.0 as usize - 1] = 0;
                        }
                    }
                    chain = next;
                }
                visited.insert(chain.members.iter().map(|m| m.state).collect::<Vec<_>>());
            }
            for t in chain.in_state(Serving).map(|t| t.0 as usize - 1) {
                assert!(held[t].is_superset(&acknowledged), "seed {seed}: t{} lost a write", t + 1);
            }
        }
    }
    // The interesting states were really visited.
    for state in PUBLIC_STATES {
        assert!(visited.iter().any(|v| v.len() == 4 && v.contains(&state)), "{state:?} never happened");
    }
    assert!(visited.contains(&vec![LastSrv, LastSrv, LastSrv]));
    assert!(visited.contains(&vec![Serving, Syncing, Waiting, Offline]));
}

#[test]
fn a_new_chain_starts_with_all_who_are_up_and_only_once() {
    let new = Chain::new(ChainId(1), &[TargetId(1), TargetId(2), TargetId(3)]);
    assert_eq!((show(&new).as_str(), new.check()), ("1L 2L 3L", Ok(())));
    assert_eq!(start_chain(&new, |_| Report::SILENT), None);
    let without_first = |t| if t == TargetId(1) { Report::SILENT } else { UP };
    let started = start_chain(&new, without_first).unwrap();
    assert_eq!((show(&started).as_str(), started.check()), ("2S 3S 1-", Ok(())));
    assert_eq!(start_chain(&started, |_| UP), None);
    assert_eq!(show(&next_chain(&started, |_| UP).unwrap()), "2S 3S 1y");
}

#[test]
fn the_check_names_what_is_wrong() {
    for states in [
        &[Offline][..],
        &[Waiting, Serving],
        &[Serving, LastSrv],
        &[Serving, Syncing, Syncing],
        &[LastSrv, Syncing],
    ] {
        assert!(chain(1, states).check().is_err(), "{states:?}");
    }
    let mut twice = chain(1, &[Serving, Serving]);
    twice.members[1].target = TargetId(1);
    assert!(twice.check().is_err());
}

#[test]
fn rotation_changes_the_order_of_a_whole_chain_and_nothing_else() {
    let order = |ids: &[u32]| ids.iter().copied().map(TargetId).collect::<Vec<_>>();
    let whole = chain(7, &[Serving, Serving, Serving]);
    let turned = rotate_chain(&whole, &order(&[3, 1, 2])).unwrap();
    assert_eq!(
        (show(&turned).as_str(), turned.version, turned.check()),
        ("3S 1S 2S", ChainVersion(8), Ok(()))
    );
    assert_eq!(rotate_chain(&turned, &order(&[3, 1, 2])), None, "it stands so already");
    for wrong in [&[1, 2][..], &[1, 2, 4], &[1, 2, 2], &[3, 2, 1, 4]] {
        assert_eq!(rotate_chain(&whole, &order(wrong)), None, "{wrong:?}");
    }
    every_case(3, |before, _| {
        if let Some(after) = rotate_chain(before, &order(&[2, 3, 1])) {
            assert!(before.members.iter().all(|m| m.state == Serving), "{}", show(before));
            assert_eq!(after.check(), Ok(()));
        }
    });
}

#[test]
fn members_come_empty_and_go_only_when_the_chain_can_do_without_them() {
    for n in 1..=4 {
        every_case(n, |before, reports| {
            let new = TargetId(9);
            let grown = add_member(before, new).unwrap();
            assert_eq!((grown.check(), grown.state_of(new)), (Ok(()), Some(Offline)), "{}", show(before));
            assert!(grown.complete().eq(before.complete()));
            // It is filled like any other before it serves.
            let up = |t| if t == new { UP } else { of(reports)(t) };
            assert_ne!(next_chain(&grown, up).unwrap_or(grown).state_of(new), Some(Serving));
            for m in &before.members {
                match remove_member(before, m.target) {
                    Some(after) => {
                        assert_eq!(after.check(), Ok(()), "{}", show(before));
                        assert!(after.complete().eq(before.complete()), "{}", show(before));
                        assert_eq!((after.state_of(m.target), after.version.0), (None, before.version.0 + 1));
                    }
                    None => assert!(before.complete().any(|t| t == m.target), "{}", show(before)),
                }
            }
        });
    }
    let known = chain(7, &[Serving, Offline]);
    assert_eq!(add_member(&known, TargetId(2)), None, "it is a member already");
    assert_eq!(remove_member(&known, TargetId(3)), None, "it is no member");
    let new = Chain::new(ChainId(1), &[TargetId(1)]);
    assert_eq!((add_member(&new, TargetId(2)), remove_member(&new, TargetId(1))), (None, None));
}
