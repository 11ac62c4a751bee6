//! Chain states: which targets of a chain serve, and how that changes.
//!
//! [`next_chain`] is the only place where a public state changes. It is a pure function of the
//! chain as last published and of what is known about each target now; the manager publishes the
//! result durably before anybody learns of it.
//!
//! | public | target is up | target is not up |
//! | --- | --- | --- |
//! | serving | serving | offline if another stays serving, else lastsrv |
//! | lastsrv | serving if nobody serves and it is the first such; else waiting | lastsrv if nobody serves; else offline |
//! | syncing | serving if it reports the sync of *this* chain version done; syncing while somebody serves; else waiting | offline |
//! | waiting, offline | syncing if somebody serves and nobody is syncing and it is the first such; else waiting | offline |
//!
//! *Complete* targets, those that hold every acknowledged write, are the members of the last
//! published serving set: the serving ones while there are any, and otherwise the ones in
//! lastsrv, which all left in the same step. Any single one of them brings the chain back. The
//! others then re-enter by being filled, because two complete targets may still differ in updates
//! that were never acknowledged, and the one that serves alone settles those.
//!
//! Differences from 3FS: all members of the last serving set become lastsrv, not only the head,
//! so the chain does not wait for one particular machine; and a sync counts only for the chain
//! version that it was made under.

use firefly_types::{ChainId, ChainVersion, TargetId};

/// What the cluster has agreed about a target. Declared in chain order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PublicState {
    /// Reads and writes.
    Serving,
    /// Was last to serve; complete, and the chain waits for it or one of its like.
    LastSrv,
    /// Takes writes while its predecessor fills it.
    Syncing,
    /// Runs and waits for its turn to be filled.
    Waiting,
    /// Out.
    Offline,
}

/// All of them, for tables and tests.
pub const PUBLIC_STATES: [PublicState; 5] = [
    PublicState::Serving,
    PublicState::LastSrv,
    PublicState::Syncing,
    PublicState::Waiting,
    PublicState::Offline,
];

/// What a target's node says about it; a node that is not heard says [`LocalState::Offline`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum LocalState {
    /// Holds everything that its chain has committed, as far as it knows.
    UpToDate,
    /// Runs, but must be filled before it can serve.
    Online,
    /// Cannot be used.
    Offline,
}

/// What is known about one target now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    /// Its own view.
    pub local: LocalState,
    /// The chain version for which the filling of this target has finished; zero if none.
    pub synced_at: ChainVersion,
}

impl Report {
    /// The report of a target whose node is silent.
    pub const SILENT: Report = Report { local: LocalState::Offline, synced_at: ChainVersion(0) };

    fn is_up(self) -> bool {
        self.local != LocalState::Offline
    }
}

/// One target's place in a chain.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Member {
    /// Which target.
    pub target: TargetId,
    /// Its state.
    pub state: PublicState,
}

/// A chain as published.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Chain {
    /// Which chain.
    pub id: ChainId,
    /// Increases by one with every change of `members`.
    pub version: ChainVersion,
    /// In chain order: serving, lastsrv, syncing, waiting, offline. The first serving one is the
    /// head, the last serving one the tail.
    pub members: Vec<Member>,
}

impl Chain {
    /// A new, empty chain, in the order that the placement prefers. All of its targets are
    /// complete, because there is nothing to hold yet; [`start_chain`] lets it begin.
    pub fn new(id: ChainId, targets: &[TargetId]) -> Self {
        let member = |&target| Member { target, state: PublicState::LastSrv };
        Self { id, version: ChainVersion(1), members: targets.iter().map(member).collect() }
    }

    /// Whether no target of it has ever served.
    pub fn is_new(&self) -> bool {
        self.version == ChainVersion(1)
    }

    /// Members in `state`, in chain order.
    pub fn in_state(&self, state: PublicState) -> impl Iterator<Item = TargetId> + '_ {
        self.members.iter().filter(move |m| m.state == state).map(|m| m.target)
    }

    /// The state of `target`, if it is a member.
    pub fn state_of(&self, target: TargetId) -> Option<PublicState> {
        self.members.iter().find(|m| m.target == target).map(|m| m.state)
    }

    /// Members that hold every acknowledged write.
    pub fn complete(&self) -> impl Iterator<Item = TargetId> + '_ {
        let complete = |m: &&Member| matches!(m.state, PublicState::Serving | PublicState::LastSrv);
        self.members.iter().filter(complete).map(|m| m.target)
    }

    /// Checks what must hold of every published chain; `Err` names the rule that is broken.
    pub fn check(&self) -> Result<(), &'static str> {
        let count = |state| self.in_state(state).count();
        let (serving, lastsrv, syncing) =
            (count(PublicState::Serving), count(PublicState::LastSrv), count(PublicState::Syncing));
        let mut targets: Vec<_> = self.members.iter().map(|m| m.target).collect();
        targets.sort_unstable();
        targets.dedup();
        if targets.len() != self.members.len() {
            Err("a target stands twice in the chain")
        } else if !self.members.is_sorted_by_key(|m| m.state) {
            Err("members are not in chain order")
        } else if serving + lastsrv == 0 {
            Err("no member is complete: the chain's data would be given up")
        } else if serving > 0 && lastsrv > 0 {
            Err("lastsrv beside serving: it misses the writes made since")
        } else if syncing > 1 {
            Err("two members are filled at once")
        } else if syncing > 0 && serving == 0 {
            Err("a member is filled by nobody")
        } else if self.version == ChainVersion(0) {
            Err("version zero means none")
        } else {
            Ok(())
        }
    }
}

/// The chain that follows from `chain` and what is known now, or `None` if nothing changes.
/// Applying it again with the same reports changes nothing more.
pub fn next_chain(chain: &Chain, report: impl Fn(TargetId) -> Report) -> Option<Chain> {
    use PublicState::{LastSrv, Offline, Serving, Syncing, Waiting};
    let known: Vec<(Member, Report)> = chain.members.iter().map(|&m| (m, report(m.target))).collect();

    // Who serves next. Synced members join behind those that serve already.
    let serves = |&(m, r): &(Member, Report)| m.state == Serving && r.is_up();
    let joins = |&(m, r): &(Member, Report)| {
        m.state == Syncing && r.local == LocalState::UpToDate && r.synced_at == chain.version
    };
    let mut serving: Vec<TargetId> = known.iter().filter(|k| serves(k)).map(|(m, _)| m.target).collect();
    if !serving.is_empty() {
        serving.extend(known.iter().filter(|k| joins(k)).map(|(m, _)| m.target));
    } else {
        // A complete one that is up starts the chain again, alone. While one serves there are
        // none in lastsrv, and a member that leaves serving in this very step is not up.
        let first = known.iter().find(|(m, r)| m.state == LastSrv && r.is_up());
        serving.extend(first.map(|(m, _)| m.target));
    }

    let mut filling = None;
    if !serving.is_empty() {
        // The one that is being filled goes on; else the next in line.
        let is_candidate = |(m, r): &&(Member, Report)| r.is_up() && !serving.contains(&m.target);
        let goes_on = known.iter().filter(is_candidate).find(|(m, _)| m.state == Syncing);
        filling = goes_on.or_else(|| known.iter().find(is_candidate)).map(|(m, _)| m.target);
    }

    let state = |&(m, r): &(Member, Report)| -> PublicState {
        if serving.contains(&m.target) {
            Serving
        } else if filling == Some(m.target) {
            Syncing
        } else if serving.is_empty() && matches!(m.state, Serving | LastSrv) {
            LastSrv
        } else if r.is_up() {
            Waiting
        } else {
            Offline
        }
    };
    let mut members: Vec<Member> =
        known.iter().map(|k| Member { target: k.0.target, state: state(k) }).collect();
    // Stable: members of one state keep their order, a newly serving one comes last.
    let place = |m: &Member| (m.state, serving.iter().position(|&t| t == m.target));
    members.sort_by_key(place);
    (members != chain.members).then(|| Chain {
        id: chain.id,
        version: ChainVersion(chain.version.0 + 1),
        members,
    })
}

/// Lets a new chain begin: all of its targets that are up serve, in the preferred order, without
/// filling, since all are empty. `None` if the chain is not new or nobody is up. The caller decides
/// how long to wait for the stragglers, who are filled when they come.
pub fn start_chain(chain: &Chain, report: impl Fn(TargetId) -> Report) -> Option<Chain> {
    if !chain.is_new() {
        return None;
    }
    let mut members: Vec<Member> = chain
        .members
        .iter()
        .map(|m| {
            let is_up = report(m.target).is_up();
            Member { state: if is_up { PublicState::Serving } else { PublicState::Offline }, ..*m }
        })
        .collect();
    members.sort_by_key(|m| m.state);
    (members.first().is_some_and(|m| m.state == PublicState::Serving)).then(|| Chain {
        id: chain.id,
        version: ChainVersion(chain.version.0 + 1),
        members,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use PublicState::*;
    use rand::{RngExt, SeedableRng};
    use std::collections::{BTreeSet, HashSet};

    const UP: Report = Report { local: LocalState::Online, synced_at: ChainVersion(0) };

    fn chain(version: u64, states: &[PublicState]) -> Chain {
        let members =
            states.iter().zip(1..).map(|(&state, t)| Member { target: TargetId(t), state }).collect();
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
        chain
            .members
            .iter()
            .map(|m| format!("{}{}", m.target.0, letter(m.state)))
            .collect::<Vec<_>>()
            .join(" ")
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
                assert_eq!(
                    serving.is_empty(),
                    !complete.iter().any(|&t| of(reports)(t).is_up()),
                    "{}",
                    case()
                );
                // Silent members neither serve nor are filled nor wait.
                for m in &after.members {
                    if !of(reports)(m.target).is_up() {
                        assert!(matches!(m.state, Offline | LastSrv), "{}", case());
                    }
                }
                // Progress: with somebody serving and somebody else up, one is being filled.
                let others_up = after.members.iter().any(|m| m.state == Waiting);
                assert!(
                    !others_up || serving.is_empty() || after.in_state(Syncing).count() == 1,
                    "{}",
                    case()
                );
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
            ("1L 2L 3-", "uu.", "1S 2y 3-"),
            ("1L 2L 3L", "..u", "3S 1- 2-"),
            ("1L 2L 3L", "uuu", "1S 2y 3w"),
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
}
