//! The pass: who starts now.
//!
//! ```text
//! 1  entitled   in the site's order, within quotas, on nodes that nobody waits for. The first of
//!               a group that does not fit is its head: it gets a reservation (`reserve.rs`), and
//!               with it the right to displace (`preempt.rs`).
//! 2  filling    whoever is left, in the same order, also beyond quota, on nodes that are held for
//!               a head or as standbys: only what can give way on demand.
//! 3  promotion  what filled becomes entitled where nobody waits any more and the quota allows.
//! ```
//!
//! A pass runs only after something changed, and looks at classes of equal requests. A class that
//! did not fit is not tried again before the index of free capacity says that something grew.

use crate::amount::Amount;
use crate::capacity::Reach;
use crate::event::{Now, Order, RankKey};
use crate::job::{
    ATTEMPTS_KEPT, Attempt, Job, JobState, Opportunistic, RANKS_KEPT, RankSlot, RankState, Seat, Stage, Tally,
};
use crate::machine::{Core, Out, planted, reached};
use crate::pack;
use crate::policy::{Backfill, Packing};
use crate::queue::ClassId;
use crate::quota::{self, Held, Owner};
use crate::requests::least_held;
use crate::reserve::Reservation;
use crate::timers::Timer;
use crate::users::Turn;
use firefly_types::{AttemptEpoch, JobId, NodeId, Rank};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// When a class was tried in vain.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tried {
    /// As an entitled start: generation of the index, and whether held nodes were in reach.
    entitled: Option<(u64, bool)>,
    /// As a filling start.
    filling: Option<(u64, bool)>,
}

/// Why a job does not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    /// Its array has enough running.
    Array,
    /// Its owner holds as much as is allowed.
    Quota,
    /// Enough jobs span zones, and no zone is large enough.
    CrossZone,
    /// It would not fit even if all nodes in service were idle.
    TooLarge,
    /// It does not fit now.
    NoRoom,
    /// It fits only on nodes kept for recoveries.
    Standby,
}

/// How a job may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Entitled,
    Filling,
}

/// What a seat counts against a quota.
pub(crate) fn held_by_seat(amount: &Amount, whole: bool) -> Held {
    Held { nodes: u32::from(whole), gpus: amount.gpus, cores: amount.cores }
}

impl Job {
    /// What it holds against its quota now.
    pub(crate) fn entitled_held(&self) -> Held {
        let whole = self.spec.whole();
        let attempt = self.attempt().filter(|a| a.opportunistic.is_none());
        let seats = attempt.into_iter().flat_map(|a| a.seats_held());
        seats.fold(Held::default(), |sum, s| sum.plus(held_by_seat(&s.amount, whole)))
    }
}

impl Core {
    /// Starts what can start, if anything changed since the last time.
    pub(crate) fn pass(&mut self, now: Now, out: &mut Out) {
        // Ending a victim that had not begun to run frees nodes at once: one more round then.
        for _ in 0..4 {
            if !std::mem::take(&mut self.dirty) {
                return;
            }
            self.start_entitled(now, out);
            if !planted!(self, ReservationLeftBehind) {
                let heads = self.heads.clone();
                self.drop_reservations(|(group, r)| heads.get(group) != Some(&r.job));
            }
            if matches!(self.policy.backfill, Backfill::Opportunistic | Backfill::Easy) {
                self.start_filling(now, out);
            }
            if self.policy.backfill == Backfill::Opportunistic {
                self.promote(now, out);
            }
        }
        // Whatever is still to be done waits for the next event, at the latest the next tick.
        self.dirty = false;
    }

    /// Phase 1. Finds the heads, too: the first blocked job of each group.
    fn start_entitled(&mut self, now: Now, out: &mut Out) {
        self.heads.clear();
        let mut skip: BTreeSet<ClassId> = BTreeSet::new();
        for lane in self.queue.lanes() {
            // A head keeps its turn among its equals until it starts: usage changes all the time,
            // and what was freed for one must not go to another.
            for id in self.reservations.values().map(|r| r.job).collect::<Vec<_>>() {
                if let Some(class) = self.queue.in_lane(id, &lane) {
                    self.consider(id, class, &mut skip, now, out);
                }
            }
            let users = self.queue.users(&lane);
            let mut turns: BTreeSet<(Turn, u32)> =
                users.into_iter().map(|u| (self.users.turn(u, now.mono), u)).collect();
            while let Some((turn, user)) = turns.pop_first() {
                let Some((id, class)) = self.queue.next(&lane, user, |c| skip.contains(&c)) else { continue };
                let started = self.consider(id, class, &mut skip, now, out);
                // Whoever got something goes behind those who now have less.
                turns.insert((if started { self.users.turn(user, now.mono) } else { turn }, user));
            }
        }
    }

    /// Starts a job of phase 1, or makes it the head of its group. Whether it started; if not, its
    /// class is skipped from here on.
    fn consider(
        &mut self,
        id: JobId,
        class: ClassId,
        skip: &mut BTreeSet<ClassId>,
        now: Now,
        out: &mut Out,
    ) -> bool {
        let Some(group) = self.jobs.get(&id).map(|j| j.spec.group.clone()) else { return false };
        let behind = self.heads.contains_key(&group);
        if !(behind && self.policy.backfill == Backfill::None) {
            let held = !behind || planted!(self, HeadOvertaken);
            match self.try_start(id, class, Mode::Entitled, held, now, out) {
                Ok(()) => return true,
                Err(Block::NoRoom | Block::Standby) if !behind => {
                    self.heads.insert(group, id);
                    self.reserve(id, now, out);
                }
                Err(_) => {}
            }
        }
        skip.insert(class);
        false
    }

    /// Phase 2.
    fn start_filling(&mut self, now: Now, out: &mut Out) {
        let mut skip: BTreeSet<ClassId> = BTreeSet::new();
        for lane in self.queue.lanes() {
            let users = self.queue.users(&lane);
            let mut turns: BTreeSet<(Turn, u32)> =
                users.into_iter().map(|u| (self.users.turn(u, now.mono), u)).collect();
            while let Some((turn, user)) = turns.pop_first() {
                let Some((id, class)) = self.queue.next(&lane, user, |c| skip.contains(&c)) else { continue };
                let is_head = self.heads.values().any(|h| *h == id);
                if !is_head && self.may_fill(id, now) {
                    // Nodes whose occupants are leaving for the head will be needed in a moment.
                    let group = self.jobs.get(&id).map(|j| j.spec.group.clone()).unwrap_or_default();
                    let held = self.reservations.get(&group).is_none_or(|r| !r.waits.is_empty());
                    if self.try_start(id, class, Mode::Filling, held, now, out).is_ok() {
                        let turn = self.users.turn(user, now.mono);
                        turns.insert((turn, user));
                        continue;
                    }
                }
                skip.insert(class);
                turns.insert((turn, user));
            }
        }
    }

    fn may_fill(&self, id: JobId, now: Now) -> bool {
        let Some(job) = self.jobs.get(&id) else { return false };
        match self.policy.backfill {
            Backfill::Opportunistic => {
                job.spec.suspendable && job.suspended_lately(now) < self.policy.suspensions_per_hour as usize
            }
            // It must be over before the head's nodes are free.
            Backfill::Easy => {
                let left = job.spec.time_limit_ms.saturating_sub(job.ran_ms);
                let ends = now.mono.after(Duration::from_millis(left));
                let shadow = self.reservations.get(&job.spec.group).and_then(|r| r.shadow);
                job.spec.time_limit_ms > 0 && shadow.is_some_and(|s| ends <= s)
            }
            Backfill::None | Backfill::Unreserved => false,
        }
    }

    /// Phase 3.
    fn promote(&mut self, now: Now, out: &mut Out) {
        for id in self.opportunistic.clone() {
            let Some(job) = self.jobs.get(&id) else { continue };
            let group = &job.spec.group;
            let idle =
                self.capacity.idle(group, &job.spec.request(), Reach { held: false, suspending: false });
            if self.heads.contains_key(group) || idle < self.policy.standbys(group) as usize {
                continue;
            }
            let Some(attempt) =
                job.attempt().filter(|a| matches!(a.stage, Stage::Preparing | Stage::Running))
            else {
                continue;
            };
            let whole = job.spec.whole();
            let held =
                attempt.seats_held().fold(Held::default(), |sum, s| sum.plus(held_by_seat(&s.amount, whole)));
            let owner = Owner::of(job);
            if !self.quota_allows(id, &owner, held) {
                continue;
            }
            reached!(self, "promotions");
            self.ledger.charge(owner, held);
            self.opportunistic.remove(&id);
            if let Some(job) = self.jobs.get_mut(&id) {
                job.version += 1;
                if let Some(attempt) = job.attempts.last_mut() {
                    attempt.opportunistic = None;
                }
            }
            out.dirty_jobs.insert(id);
            self.watch_attempt(id, now);
        }
    }

    /// What is promised to the heads that were found so far, other than this job. Those that were
    /// heads before and come later in the order bind nobody before them.
    fn promises<'a>(&'a self, id: JobId) -> impl Iterator<Item = &'a Reservation> {
        let found = move |(group, r): (&String, &'a Reservation)| {
            (r.job != id && self.heads.get(group) == Some(&r.job)).then_some(r)
        };
        self.reservations.iter().filter_map(found)
    }

    /// Whether the job may hold so much, besides what its owner's other jobs hold and what is
    /// promised to those of them that are heads: a head must not lose its turn to its owner.
    pub(crate) fn quota_allows(&self, id: JobId, owner: &Owner, more: Held) -> bool {
        let Some(quota) = quota::limit(&self.policy.quotas, owner) else { return true };
        let promised = self.promises(id).filter(|r| r.owner == *owner);
        let held = promised.fold(self.ledger.held(owner), |sum, r| sum.plus(r.held));
        let more = if planted!(self, QuotaOffByOne) {
            Held { nodes: more.nodes.saturating_sub(1), gpus: more.gpus.saturating_sub(1), ..more }
        } else {
            more
        };
        quota.allows(held.plus(more))
    }

    fn try_start(
        &mut self,
        id: JobId,
        class: ClassId,
        mode: Mode,
        held: bool,
        now: Now,
        out: &mut Out,
    ) -> Result<(), Block> {
        let generation = self.capacity.generation;
        let tried = self.tried.get(&class).copied().unwrap_or_default();
        let last = if mode == Mode::Entitled { tried.entitled } else { tried.filling };
        if last.is_some_and(|(g, h)| g == generation && (h || !held)) {
            return Err(Block::NoRoom);
        }
        let Some(job) = self.jobs.get(&id) else { return Err(Block::TooLarge) };
        let found = self.choose(job, mode == Mode::Filling, held, now);
        match found {
            Ok(nodes) => {
                let opportunistic = match mode {
                    Mode::Filling if self.policy.backfill == Backfill::Opportunistic => {
                        let beyond = !self.quota_allows(id, &Owner::of(job), self.held_on(job, nodes.iter()));
                        Some(if beyond { Opportunistic::OverQuota } else { Opportunistic::Fill })
                    }
                    _ => None,
                };
                self.start(id, &nodes, opportunistic, now, out);
                Ok(())
            }
            Err(block) => {
                if block == Block::NoRoom {
                    if self.tried.len() > 100_000 {
                        // Classes come and go; this only bounds the memory.
                        self.tried.clear();
                    }
                    let tried = self.tried.entry(class).or_default();
                    let slot = if mode == Mode::Entitled { &mut tried.entitled } else { &mut tried.filling };
                    *slot = Some((generation, held));
                }
                Err(block)
            }
        }
    }

    pub(crate) fn held_on<'a>(&self, job: &Job, nodes: impl Iterator<Item = &'a NodeId>) -> Held {
        let whole = job.spec.whole();
        let amounts = nodes
            .filter_map(|n| self.nodes.get(n))
            .map(|n| if whole { n.record.info.amount() } else { job.spec.request() });
        amounts.fold(Held::default(), |sum, a| sum.plus(held_by_seat(&a, whole)))
    }

    /// Nodes for a job, in the order of ranks, or what is in the way. `held`: also nodes that a
    /// head waits for.
    pub(crate) fn choose(
        &self,
        job: &Job,
        filling: bool,
        held: bool,
        now: Now,
    ) -> Result<Vec<NodeId>, Block> {
        let spec = &job.spec;
        if let Some((first, _)) = job.array.filter(|_| spec.array_parallel > 0) {
            let promised = self.promises(job.id).filter(|r| r.array == Some(first));
            let running = self.arrays.get(&first).copied().unwrap_or(0) as usize + promised.count();
            if running >= spec.array_parallel as usize {
                return Err(Block::Array);
            }
        }
        let lends = filling && self.policy.backfill == Backfill::Opportunistic && self.policy.borrow;
        let owner = Owner::of(job);
        if !lends && !self.quota_allows(job.id, &owner, least_held(spec)) {
            return Err(Block::Quota);
        }
        let suspending = filling && self.policy.backfill == Backfill::Opportunistic;
        let (group, each) = (spec.group.as_str(), spec.request());
        let (avoid, span) = self.span(job, now)?;
        if span == Span::Crossing && self.crossing_full(job.id) {
            return Err(Block::CrossZone);
        }
        // Open nodes first; those that somebody waits for only if need be.
        let mut block = Block::NoRoom;
        for reach_held in [false, true].into_iter().take(1 + usize::from(held)) {
            let reach = Reach { held: reach_held, suspending };
            match self.choose_within(job, group, &each, reach, &avoid, span, filling) {
                Ok(nodes) => {
                    if !lends && !self.quota_allows(job.id, &owner, self.held_on(job, nodes.iter())) {
                        return Err(Block::Quota);
                    }
                    return Ok(nodes);
                }
                Err(b) => block = b,
            }
        }
        Err(block)
    }

    #[allow(clippy::too_many_arguments, reason = "one search, told apart only by these")]
    fn choose_within(
        &self,
        job: &Job,
        group: &str,
        each: &Amount,
        reach: Reach,
        avoid: &BTreeSet<NodeId>,
        span: Span,
        filling: bool,
    ) -> Result<Vec<NodeId>, Block> {
        let standbys = if filling || job.recovering { 0 } else { self.policy.standbys(group) as usize };
        let want = job.spec.nodes as usize;
        let share = planted!(self, GangSharesNodes) && want == 1;
        if !job.spec.whole() || share {
            let overcommit = planted!(self, RoomOvercommitted);
            let each = if overcommit { Amount { slots: 1, gpus: 0, ..*each } } else { *each };
            let node = self.capacity.room(group, &each, reach, avoid).ok_or(Block::NoRoom)?;
            let on_idle = self.capacity.standing(node).is_some_and(|s| s.idle);
            if on_idle && standbys > 0 && self.capacity.idle(group, &Amount::default(), reach) <= standbys {
                return Err(Block::Standby);
            }
            return Ok(vec![node]);
        }
        let idle = self.capacity.idle(group, each, reach);
        let partial = planted!(self, PartialGang) && idle > 0;
        if idle < want && !partial {
            return Err(Block::NoRoom);
        }
        let places = self.capacity.idle_places(group, each, reach, avoid);
        let want = if partial { want.min(places.values().map(Vec::len).sum()) } else { want };
        let may_cross = span == Span::Crossing;
        let found = match self.policy.packing {
            Packing::Topology => pack::gang(&places, want, may_cross),
            Packing::FirstFit if may_cross => pack::first_fit(&places, want),
            Packing::FirstFit => by_zone(&places).values().find_map(|zone| pack::first_fit(zone, want)),
        };
        let mut nodes = found.ok_or(Block::NoRoom)?;
        if standbys > 0 && idle - want < standbys {
            return Err(Block::Standby);
        }
        // Ranks are ordered by place, so that neighbours in rank are neighbours on the network.
        let place = |id: &NodeId| self.nodes.get(id).map(|n| &n.record.info.place);
        nodes.sort_unstable_by(|a, b| place(a).cmp(&place(b)).then(a.cmp(b)));
        Ok(nodes)
    }

    /// Whether this job may not span zones besides those that do, and the heads that are about to:
    /// a filling job must not take the turn of the head that it fills for.
    pub(crate) fn crossing_full(&self, id: JobId) -> bool {
        let promised = self.promises(id).filter(|r| r.crosses).count();
        let spanning = self.crossing.len() + promised;
        spanning >= self.policy.cross_zone_jobs as usize && !planted!(self, CrossZoneUncounted)
    }

    /// Nodes that the job stays away from, and whether it must span zones. An error if it could
    /// not run on the nodes in service even if they were idle.
    pub(crate) fn span(&self, job: &Job, now: Now) -> Result<(BTreeSet<NodeId>, Span), Block> {
        let spec = &job.spec;
        let each = spec.request();
        let want = spec.nodes as usize;
        let zones = self.capacity.large_enough(&spec.group, &each);
        let fits = |avoid: &BTreeSet<NodeId>| {
            let mut left = zones.clone();
            for node in avoid {
                if let Some(standing) = self.capacity.standing(*node)
                    && standing.kind.group == spec.group
                    && each.fits(&standing.kind.full)
                    && let Some(n) = left.get_mut(standing.place.zone.as_str())
                {
                    *n -= 1;
                }
            }
            if left.values().any(|n| *n >= want) {
                Some(Span::OneZone)
            } else if !spec.one_zone
                && self.policy.cross_zone_jobs > 0
                && spec.whole()
                && left.values().sum::<usize>() >= want
            {
                Some(Span::Crossing)
            } else {
                None
            }
        };
        let closing = self.closing_nodes(job, now);
        let mut avoid = closing.clone();
        avoid.extend(job.avoid.iter().filter(|(_, until)| **until > now.unix_ms).map(|(n, _)| *n));
        // A node under suspicion is better than none; one that closes is not.
        match fits(&avoid) {
            Some(span) if span == Span::OneZone || avoid.len() == closing.len() => Ok((avoid, span)),
            other => match fits(&closing) {
                Some(Span::OneZone) => Ok((closing, Span::OneZone)),
                span => other.map(|s| (avoid, s)).or(span.map(|s| (closing, s))).ok_or(Block::TooLarge),
            },
        }
    }

    /// Places a job.
    pub(crate) fn start(
        &mut self,
        id: JobId,
        nodes: &[NodeId],
        opportunistic: Option<Opportunistic>,
        now: Now,
        out: &mut Out,
    ) {
        self.queue.remove(id);
        self.drop_reservations(|(_, r)| r.job == id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let epoch = AttemptEpoch(job.epoch().0 + 1);
        let (each, whole) = (job.spec.ranks_per_node, job.spec.whole());
        let user = self.users.known(&job.spec.user).unwrap_or(0);
        let mut ranks = Vec::with_capacity(nodes.len() * each as usize);
        let mut seats = Vec::with_capacity(nodes.len());
        let (mut held, mut zones) = (Held::default(), BTreeSet::new());
        for (index, id_of_node) in nodes.iter().enumerate() {
            let Some(node) = self.nodes.get_mut(id_of_node) else { continue };
            let full = node.record.info.amount();
            let amount = if whole { full } else { job.spec.request() };
            let gpus = free_gpus(node.gpus_taken, full.gpus, amount.gpus);
            let milli = if whole { 1_000 } else { amount.milli_of(&full) };
            node.take(id, u32::try_from(index).unwrap_or(u32::MAX), amount, gpus, whole);
            zones.insert(node.record.info.place.zone.clone());
            seats.push(Seat { node: *id_of_node, amount, milli, gpus, returned_unix_ms: 0 });
            held = held.plus(held_by_seat(&amount, whole));
            self.users.take(user, milli, now.mono);
            for _ in 0..each {
                let rank = Rank(u32::try_from(ranks.len()).unwrap_or(u32::MAX));
                ranks.push(RankSlot { rank, node: *id_of_node, state: RankState::Assigned, pid: 0 });
            }
        }
        let list: Vec<String> = nodes.iter().take(64).map(NodeId::to_string).collect();
        let more = if nodes.len() > 64 { format!(" and {} more", nodes.len() - 64) } else { String::new() };
        let way = match opportunistic {
            Some(Opportunistic::OverQuota) => ", beyond its quota: it gives way on demand",
            Some(Opportunistic::Fill) => ", on nodes that others wait for: it gives way on demand",
            None => "",
        };
        out.notes.push((id, epoch, format!("attempt {} starts on {}{more}{way}", epoch.0, list.join(" "))));
        if job.attempts.len() >= ATTEMPTS_KEPT {
            job.attempts.remove(0);
        }
        // Of a large job, only the newest attempt keeps its ranks: bounds the record.
        for old in job.attempts.iter_mut().filter(|a| a.ranks.len() > RANKS_KEPT) {
            old.ranks.clear();
            old.seats.clear();
        }
        let count = u32::try_from(ranks.len()).unwrap_or(u32::MAX);
        job.attempts.push(Attempt {
            epoch,
            stage: Stage::Preparing,
            started_unix_ms: now.unix_ms,
            running_unix_ms: 0,
            ended_unix_ms: 0,
            cause: None,
            end_reason: String::new(),
            master_port: 0,
            seats,
            opportunistic,
            overdue: job.overdue_since.is_some(),
            step: 0,
            ranks,
            since: now.mono,
            running_since: now.mono,
            saved_at: now.mono,
            progress_at: now.mono,
            suspend: None,
            tally: Tally { assigned: count, live: count, lost: 0 },
        });
        job.state = JobState::Starting;
        job.reason.clear();
        job.waiting_unix_ms = 0;
        job.overdue_since = None;
        job.version += 1;
        if opportunistic.is_some() {
            self.opportunistic.insert(id);
            reached!(self, "opportunistic starts");
        } else {
            self.ledger.charge(Owner::of(job), held);
        }
        if zones.len() > 1 {
            self.crossing.insert(id);
            reached!(self, "jobs across zones");
        }
        if let Some((first, _)) = job.array {
            *self.arrays.entry(first).or_default() += 1;
        }
        self.active.insert(id);
        for node in nodes {
            self.reindex(*node);
        }
        out.dirty_jobs.insert(id);
        // Or else a crash now would bring back ranks that have given up the slots just taken.
        out.dirty_jobs.append(&mut self.unsaved);
        self.watch_attempt(id, now);
        for rank in 0..count {
            let key = RankKey { job: id, epoch, rank: Rank(rank) };
            let node = self.jobs.get(&id).and_then(|j| j.attempt()).map(|a| a.ranks[rank as usize].node);
            out.orders.extend(node.zip(self.prepare_order(key)));
        }
    }

    /// The order that prepares a rank of a newest attempt.
    pub(crate) fn prepare_order(&self, key: RankKey) -> Option<Order> {
        let job = self.jobs.get(&key.job)?;
        let each = job.spec.ranks_per_node.max(1);
        let node_rank = key.rank.0 / each;
        let gpus = job.attempt()?.seats.get(node_rank as usize).map_or(0, |s| s.gpus);
        Some(Order::Prepare { key, node_rank, local_rank: key.rank.0 % each, gpus })
    }

    /// Sets the timers that an attempt's state calls for.
    pub(crate) fn watch_attempt(&mut self, id: JobId, now: Now) {
        let Some(job) = self.jobs.get(&id) else { return };
        let Some(attempt) = job.attempt() else { return };
        let epoch = attempt.epoch;
        let ms = Duration::from_millis;
        let mut timers = Vec::new();
        let mut set = |at, timer| timers.push((at, timer));
        match attempt.stage {
            Stage::Preparing => {
                set(attempt.since.after(ms(self.policy.start_timeout_ms)), Timer::Start(id, epoch));
            }
            Stage::Running | Stage::Suspending => {
                if job.spec.time_limit_ms > 0 {
                    let left = job.spec.time_limit_ms.saturating_sub(job.ran_ms);
                    set(attempt.running_since.after(ms(left)), Timer::Limit(id, epoch));
                }
                if job.spec.progress_timeout_ms > 0 {
                    let at = attempt.progress_at.after(ms(job.spec.progress_timeout_ms));
                    set(at, Timer::Progress(id, epoch));
                }
                for rule in self.policy.demotions.iter().filter(|r| r.from == job.priority) {
                    let left = rule.after_ms.saturating_sub(job.ran_ms);
                    set(attempt.running_since.after(ms(left)), Timer::Demotion(id, epoch));
                }
                if attempt.stage == Stage::Suspending {
                    let since = attempt.suspend.as_ref().map_or(now.mono, |s| s.since);
                    set(since.after(self.suspend_grace(job)), Timer::Suspend(id, epoch));
                } else if job.spec.suspendable {
                    let from = attempt.running_since;
                    set(from.after(self.quantum(job)), Timer::Quantum(id, epoch));
                    set(from.after(ms(self.policy.time_slice_ms)), Timer::Quantum(id, epoch));
                }
            }
            Stage::Ending | Stage::Ended => {}
        }
        for (at, timer) in timers {
            self.timers.set(at, timer);
        }
    }
}

/// Whether a gang stays in one zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Span {
    OneZone,
    /// No zone could hold it.
    Crossing,
}

fn by_zone<'a>(places: &pack::Idle<'a>) -> BTreeMap<&'a str, pack::Idle<'a>> {
    let mut zones: BTreeMap<&str, pack::Idle<'a>> = BTreeMap::new();
    for (place, nodes) in places {
        zones.entry(&place.zone).or_default().insert(*place, nodes.clone());
    }
    zones
}

/// The lowest accelerators that nobody has.
fn free_gpus(taken: u64, all: u32, wanted: u32) -> u64 {
    let free = (0..all.min(u64::BITS)).filter(|i| taken & (1 << i) == 0);
    free.take(wanted as usize).fold(0, |set, i| set | 1 << i)
}
