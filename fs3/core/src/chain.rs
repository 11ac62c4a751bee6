//! Chain states: which targets of a chain serve, and how that changes.
//!
//! [`next_chain`] is the only place where a public state changes. It is a pure function of the
//! chain as last published and of what is known about each target now; the manager publishes the
//! result durably before anybody learns of it.
//!
//! | public | target is up | target is not up |
//! | --- | --- | --- |
//! | serving | serving | offline if another stays serving, else lastsrv |
//! | lastsrv | serving | lastsrv if nobody serves; else offline |
//! | syncing | serving if it reports the sync of *this* chain version done; syncing while somebody serves; else waiting | offline |
//! | waiting, offline | syncing if somebody serves and nobody is syncing and it is the first such; else waiting | offline |
//!
//! *Complete* targets, those that hold every acknowledged write, are the members of the last
//! published serving set: the serving ones while there are any, and otherwise the ones in
//! lastsrv, which all left in the same step. Any single one of them brings the chain back, and all
//! that are up come back together, unfilled: what they differ in are updates that were never
//! acknowledged, which each of them holds as pending, and the target settles those along the chain.
//! How long to wait for the others is the caller's decision, as with a new chain: one that comes
//! too late is filled.
//!
//! Beside the table: [`rotate_chain`] turns a whole chain back to the order that the placement
//! prefers; [`add_member`] and [`remove_member`] move a chain to other targets, one at a time.
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

    fn with(&self, members: Vec<Member>) -> Self {
        Self { id: self.id, version: ChainVersion(self.version.0 + 1), members }
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
        // Complete ones that are up start the chain again. While one serves there are none in
        // lastsrv, and a member that leaves serving in this very step is not up.
        let complete = known.iter().filter(|(m, r)| m.state == LastSrv && r.is_up());
        serving.extend(complete.map(|(m, _)| m.target));
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
    (members != chain.members).then(|| chain.with(members))
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
    (members.first().is_some_and(|m| m.state == PublicState::Serving)).then(|| chain.with(members))
}

/// The chain in the order of `preferred`, or `None` if it stands so already, if not all of its
/// members serve, or if `preferred` is not a list of exactly these. Nobody stops serving by it, and
/// every member holds every acknowledged write, so nothing has to be copied or fenced: requests
/// under the version before are refused by whoever knows the new one.
pub fn rotate_chain(chain: &Chain, preferred: &[TargetId]) -> Option<Chain> {
    let member = |target| chain.members.iter().find(|m| m.target == target).copied();
    let members: Vec<Member> = preferred.iter().filter_map(|&t| member(t)).collect();
    let is_whole = chain.members.iter().all(|m| m.state == PublicState::Serving);
    let is_same_set = members.len() == chain.members.len() && members.len() == preferred.len();
    let next = chain.with(members);
    (is_whole && is_same_set && next.members != chain.members && next.check().is_ok()).then_some(next)
}

/// The chain with one member more, which holds nothing yet. `None` if it is a member already, or if
/// the chain is new: there the newcomer would count as complete.
pub fn add_member(chain: &Chain, target: TargetId) -> Option<Chain> {
    let mut members = chain.members.clone();
    members.push(Member { target, state: PublicState::Offline });
    (!chain.is_new() && chain.state_of(target).is_none()).then(|| chain.with(members))
}

/// The chain without a member that is not complete. `None` while it is: then it serves, or the chain
/// waits for it.
pub fn remove_member(chain: &Chain, target: TargetId) -> Option<Chain> {
    let is_spare =
        matches!(chain.state_of(target)?, PublicState::Syncing | PublicState::Waiting | PublicState::Offline);
    let members = chain.members.iter().filter(|m| m.target != target).copied().collect();
    (is_spare && !chain.is_new()).then(|| chain.with(members))
}

#[cfg(test)]
mod tests;
