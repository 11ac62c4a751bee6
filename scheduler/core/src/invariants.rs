//! What must hold between any two events.

use crate::amount::Amount;
use crate::job::{Job, JobState, RankState, Stage};
use crate::machine::{Core, is_busy};
use crate::quota::{self, Ledger, Owner};
use firefly_types::{JobId, NodeId};
use std::collections::{BTreeMap, BTreeSet};

type Check = Result<(), String>;

impl Core {
    /// The first invariant that does not hold, in words. Looks at everything: for tests and
    /// simulations. [`Core::check_job`] is cheap enough for production.
    pub fn check(&self) -> Check {
        let mut seats: BTreeMap<NodeId, BTreeMap<JobId, (u32, Amount, u64)>> = BTreeMap::new();
        let mut ledger = Ledger::default();
        let mut arrays: BTreeMap<JobId, u32> = BTreeMap::new();
        let mut rates: BTreeMap<&str, u64> = BTreeMap::new();
        for job in self.jobs.values() {
            self.check_job(job.id)?;
            let mut holds = false;
            for (i, seat) in job.attempt().into_iter().flat_map(|a| a.seats.iter().enumerate()) {
                if seat.returned_unix_ms == 0 {
                    let index = u32::try_from(i).unwrap_or(u32::MAX);
                    seats.entry(seat.node).or_default().insert(job.id, (index, seat.amount, seat.gpus));
                    *rates.entry(job.spec.user.as_str()).or_default() += seat.milli;
                    holds = true;
                }
            }
            ledger.charge(Owner::of(job), job.entitled_held());
            if let Some((first, _)) = job.array.filter(|_| holds) {
                *arrays.entry(first).or_default() += 1;
            }
        }
        self.check_nodes(&mut seats)?;
        if ledger != self.ledger {
            return Err(format!("quotas are charged {:?}, jobs hold {ledger:?}", self.ledger));
        }
        if rates != self.users.rates() {
            return Err(format!("fair share charges {:?}, jobs hold {rates:?}", self.users.rates()));
        }
        if arrays != self.arrays {
            return Err(format!("arrays are counted {:?}, jobs hold {arrays:?}", self.arrays));
        }
        self.check_limits()?;
        self.check_reservations()?;
        self.queue.check()?;
        self.capacity.check(self.nodes.values())
    }

    fn check_nodes(&self, seats: &mut BTreeMap<NodeId, BTreeMap<JobId, (u32, Amount, u64)>>) -> Check {
        for (id, node) in &self.nodes {
            let expected = seats.remove(id).unwrap_or_default();
            let same = node.seats.len() == expected.len()
                && expected.iter().all(|(job, (i, amount, _))| node.seats.get(job) == Some(&(*i, *amount)));
            if !same {
                return Err(format!("{id}: seats of {:?}, but {expected:?} are there", node.seats));
            }
            let sum = expected.values().fold(Amount::default(), |sum, (_, a, _)| sum.plus(a));
            let gpus = expected.values().map(|(_, _, g)| g.count_ones()).sum::<u32>();
            let set = expected.values().fold(0, |set, (_, _, g)| set | g);
            if sum != node.taken || set != node.gpus_taken {
                return Err(format!("{id}: {:?} is booked as taken, {sum:?} is", node.taken));
            }
            if gpus != set.count_ones() {
                return Err(format!("{id}: an accelerator is given to two jobs: {expected:?}"));
            }
            // A node may come back smaller than it was; what was placed since must fit.
            if !node.record.info.amount().eq(&Amount::default()) && !sum.fits(&node.record.info.amount()) {
                return Err(format!("{id}: {sum:?} is taken of {:?}", node.record.info.amount()));
            }
            for job in expected.keys().filter_map(|j| self.jobs.get(j)).filter(|j| j.spec.whole()) {
                if expected.len() > 1 || node.whole != Some(job.id) {
                    return Err(format!("{id}: {} has the whole node, and {expected:?} are there", job.id));
                }
            }
        }
        match seats.iter().next() {
            Some((id, jobs)) => Err(format!("{id} is unknown but holds {jobs:?}")),
            None => Ok(()),
        }
    }

    fn check_limits(&self) -> Check {
        for job in self.active.iter().filter_map(|j| self.jobs.get(j)) {
            let Some(attempt) = job.attempt() else { continue };
            if attempt.opportunistic.is_some() && !job.spec.suspendable {
                return Err(format!("{} cannot give way and runs opportunistically", job.id));
            }
            let zones: BTreeSet<&str> = attempt
                .seats
                .iter()
                .filter_map(|s| self.nodes.get(&s.node))
                .map(|n| n.record.info.place.zone.as_str())
                .collect();
            if zones.len() > 1 && job.spec.one_zone {
                return Err(format!("{} spans {zones:?} and must not", job.id));
            }
        }
        for job in self.jobs.values().filter(|j| j.array.is_some() && j.spec.array_parallel > 0) {
            let running = job.array.and_then(|(first, _)| self.arrays.get(&first)).copied().unwrap_or(0);
            if running > job.spec.array_parallel {
                return Err(format!("{running} jobs of {}'s array run", job.id));
            }
        }
        Ok(())
    }

    /// Whether every owner holds no more than the present quotas allow. Not an invariant where
    /// policies change: a quota that shrinks takes nothing from those who run.
    pub fn check_quotas(&self) -> Check {
        for (owner, held) in self.ledger.iter() {
            if let Some(quota) = quota::limit(&self.policy.quotas, owner).filter(|q| !q.allows(*held)) {
                return Err(format!("{owner:?} holds {held:?}, the quota is {quota}"));
            }
        }
        Ok(())
    }

    fn check_reservations(&self) -> Check {
        for (group, reservation) in &self.reservations {
            let owner = self.jobs.get(&reservation.job);
            if !self.queue.contains(reservation.job) || owner.is_none_or(|j| j.spec.group != *group) {
                return Err(format!("nodes are held for {}, which does not wait", reservation.job));
            }
            let intruders = self.intruders(reservation);
            if !intruders.is_empty() && !reservation.stale {
                return Err(format!("{intruders:?} took nodes that {} waits for", reservation.job));
            }
        }
        for node in self.nodes.values() {
            let Some(owner) = node.held_for else { continue };
            let group = &node.record.info.group;
            let known = self
                .reservations
                .get(group)
                .is_some_and(|r| r.job == owner && r.nodes.contains(&node.record.id));
            if !known {
                return Err(format!("{} is held for {owner}, which has no claim to it", node.record.id));
            }
        }
        Ok(())
    }

    /// The first invariant of one job that does not hold, in words.
    pub fn check_job(&self, id: JobId) -> Check {
        let Some(job) = self.jobs.get(&id) else { return Ok(()) };
        self.check_lists(job).and_then(|()| check_attempts(job)).map_err(|what| format!("{id}: {what}"))
    }

    /// Every job is in exactly the lists that its state calls for.
    fn check_lists(&self, job: &Job) -> Check {
        let id = job.id;
        let waits = matches!(job.state, JobState::Pending | JobState::Held);
        let (queued, waiting) = (self.queue.contains(id), self.waiting.contains(&id));
        if waits != (queued || waiting) || (queued && waiting) {
            return Err(format!("{:?}, in the queue: {queued}, waiting for else: {waiting}", job.state));
        }
        if queued && (job.state == JobState::Held || job.hold.is_some() || !job.waits_for.is_empty()) {
            return Err("it is in the queue and may not start".into());
        }
        if self.finished.contains(&(job.ended_unix_ms, id)) != job.state.is_final() {
            return Err(format!("{:?}, listed as finished: {}", job.state, !job.state.is_final()));
        }
        if is_busy(job) != self.active.contains(&id) {
            return Err(format!("{:?}, listed as active: {}", job.state, self.active.contains(&id)));
        }
        let opportunistic =
            job.attempt().is_some_and(|a| a.opportunistic.is_some() && a.seats_held().next().is_some());
        if opportunistic != self.opportunistic.contains(&id) {
            return Err(format!("runs opportunistically: {opportunistic}, and is listed otherwise"));
        }
        Ok(())
    }
}

fn check_attempts(job: &Job) -> Check {
    let stage = job.attempt().map(|a| a.stage);
    let agree = match job.state {
        JobState::Pending | JobState::Held => matches!(stage, None | Some(Stage::Ended)),
        JobState::Starting => matches!(stage, Some(Stage::Preparing | Stage::Ending)),
        JobState::Running => matches!(stage, Some(Stage::Running | Stage::Ending)),
        JobState::Suspending => matches!(stage, Some(Stage::Suspending | Stage::Ending)),
        JobState::Stopping => stage == Some(Stage::Ending),
        _ => matches!(stage, None | Some(Stage::Ended)),
    };
    if !agree {
        return Err(format!("the job is {:?}, its attempt {stage:?}", job.state));
    }
    let newest = job.epoch();
    let over = |s: &RankState| matches!(s, RankState::Exited(_) | RankState::Fenced);
    let mut last = None;
    for attempt in &job.attempts {
        let epoch = attempt.epoch;
        if last.is_some_and(|l| epoch.0 != l + 1) {
            return Err(format!("attempt {} follows attempt {last:?}", epoch.0));
        }
        last = Some(epoch.0);
        if epoch != newest && !attempt.ranks.iter().all(|r| over(&r.state)) {
            return Err(format!("attempt {} is not over, but {newest} exists", epoch.0));
        }
        if (attempt.stage == Stage::Ended) != attempt.cause.is_some() && attempt.stage != Stage::Ending {
            return Err(format!("attempt {} is {:?} for {:?}", epoch.0, attempt.stage, attempt.cause));
        }
        if epoch != newest && attempt.ranks.is_empty() {
            continue;
        }
        let world = job.spec.world_size() as usize;
        let nodes: BTreeSet<NodeId> = attempt.ranks.iter().map(|r| r.node).collect();
        if attempt.ranks.len() != world || nodes.len() != job.spec.nodes as usize {
            return Err(format!(
                "attempt {} has {} of {world} ranks on {} of {} nodes",
                epoch.0,
                attempt.ranks.len(),
                nodes.len(),
                job.spec.nodes
            ));
        }
        if attempt.ranks.iter().enumerate().any(|(i, r)| r.rank.0 as usize != i) {
            return Err(format!("attempt {}: ranks are not numbered 0..{world}", epoch.0));
        }
        if attempt.tally != attempt.counted() {
            return Err(format!("attempt {}: its tally is {:?}", epoch.0, attempt.tally));
        }
        if attempt.stage == Stage::Ended && !attempt.is_over() {
            return Err(format!("attempt {} has ended with live ranks", epoch.0));
        }
        if matches!(attempt.stage, Stage::Running | Stage::Suspending) && attempt.tally.assigned > 0 {
            return Err(format!("attempt {} runs with ranks that are not ready", epoch.0));
        }
        for (i, seat) in attempt.seats.iter().enumerate() {
            let slots = attempt.ranks.get(attempt.ranks_of_seat(i)).unwrap_or_default();
            let occupied = slots.iter().any(|r| r.state.occupies());
            if slots.iter().any(|r| r.node != seat.node) || occupied != (seat.returned_unix_ms == 0) {
                return Err(format!("attempt {}: the seat on {} and its ranks disagree", epoch.0, seat.node));
            }
        }
    }
    if job.failures > job.spec.max_restarts {
        return Err(format!("{} restarts of {} allowed", job.failures, job.spec.max_restarts));
    }
    Ok(())
}
