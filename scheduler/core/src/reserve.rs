//! What the head of a group waits for.
//!
//! The head is the first job of its group that does not fit. It gets a reservation: a set of nodes
//! that it will start on. Those that are idle stay free for it (others may use them only while
//! giving way on demand), and those that are taken come to it as their jobs end. The set is chosen
//! to be free as early and as cheaply as possible, and is kept until the head starts or a node of
//! it fails: a head that changed its mind with every event could wait for ever.
//!
//! If displacing alone makes the whole set free, the victims are asked to give way at once. If
//! not, nobody is: preemption that does not let the head start would be loss without gain.

use crate::amount::Amount;
use crate::capacity::{Reach, Standing};
use crate::event::Now;
use crate::job::{EndCause, Job, Stage};
use crate::machine::{Core, Out, planted, reached};
use crate::pass::Span;
use crate::preempt::{Grip, Occupant};
use crate::quota::{Held, Owner};
use firefly_types::{JobId, Nanos, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Victims beyond which a plan is not trimmed further: trimming looks at all of them for each.
const TRIMMED: usize = 64;

/// A head's claim.
#[derive(Clone, Debug)]
pub(crate) struct Reservation {
    pub(crate) job: JobId,
    pub(crate) nodes: BTreeSet<NodeId>,
    /// Jobs that must leave; those that are neither leaving nor to be displaced.
    pub(crate) waits: BTreeSet<JobId>,
    /// Jobs that are leaving.
    pub(crate) leaving: BTreeSet<JobId>,
    /// Who was on the nodes when they were chosen.
    pub(crate) present: BTreeSet<JobId>,
    /// What is promised to it besides nodes: of its owner's quota, of its array's limit.
    pub(crate) owner: Owner,
    pub(crate) held: Held,
    pub(crate) array: Option<JobId>,
    /// The nodes are in several zones.
    pub(crate) crosses: bool,
    /// When all of `waits` have reached their time limits, if they have some.
    pub(crate) shadow: Option<Nanos>,
    /// Must be chosen anew.
    pub(crate) stale: bool,
}

/// How a waiting job can get its nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) nodes: BTreeSet<NodeId>,
    pub(crate) occupants: Vec<Occupant>,
}

impl Plan {
    fn worst(&self) -> Option<Grip> {
        self.occupants.iter().map(|o| o.grip).max()
    }

    fn cost(&self) -> u64 {
        self.occupants.iter().fold(0, |sum, o| sum.saturating_add(o.cost))
    }
}

impl Core {
    /// Ends reservations; their nodes are open again.
    pub(crate) fn drop_reservations(&mut self, which: impl Fn((&String, &Reservation)) -> bool) {
        let gone: Vec<String> =
            self.reservations.iter().filter(|(g, r)| which((g, r))).map(|(g, _)| g.clone()).collect();
        for group in gone {
            let Some(reservation) = self.reservations.remove(&group) else { continue };
            for node in reservation.nodes {
                if let Some(n) = self.nodes.get_mut(&node).filter(|n| n.held_for == Some(reservation.job)) {
                    n.held_for = None;
                    self.reindex(node);
                }
            }
        }
    }

    /// Sees to it that the head of a group has a valid reservation, and displaces for it.
    pub(crate) fn reserve(&mut self, id: JobId, now: Now, out: &mut Out) {
        let Some(group) = self.jobs.get(&id).map(|j| j.spec.group.clone()) else { return };
        if self.still_valid(&group, id) {
            return;
        }
        self.drop_reservations(|(g, _)| *g == group);
        let occupants = self.occupants(id, now);
        let Some(plan) = self.plan(id, &occupants, now) else { return };
        let of_grip = |grip| plan.occupants.iter().filter(move |o| o.grip == grip).map(|o| o.job);
        let waits: BTreeSet<JobId> = of_grip(Grip::Firm).collect();
        let mut leaving: BTreeSet<JobId> = of_grip(Grip::Leaving).collect();
        let in_vain = planted!(self, PreemptsInVain);
        let victims: Vec<JobId> =
            if waits.is_empty() || in_vain { of_grip(Grip::Loose).collect() } else { Vec::new() };
        leaving.extend(&victims);
        let present = plan.nodes.iter().filter_map(|n| self.nodes.get(n)).flat_map(|n| n.jobs()).collect();
        let shadow = self.shadow(&waits);
        let zone = |n: &NodeId| self.nodes.get(n).map(|n| n.record.info.place.zone.as_str());
        let crosses = plan.nodes.iter().map(zone).collect::<BTreeSet<_>>().len() > 1;
        for node in &plan.nodes {
            if let Some(n) = self.nodes.get_mut(node) {
                n.held_for = Some(id);
                self.reindex(*node);
            }
        }
        reached!(self, "reservations");
        let nodes = plan.nodes;
        let Some(job) = self.jobs.get(&id) else { return };
        let (owner, held) = (Owner::of(job), self.held_on(job, nodes.iter()));
        let array = job.array.map(|(first, _)| first);
        let reservation = Reservation {
            job: id,
            nodes,
            waits,
            leaving,
            present,
            owner,
            held,
            array,
            crosses,
            shadow,
            stale: false,
        };
        self.reservations.insert(group, reservation);
        for victim in victims {
            self.displace(victim, id, now, out);
        }
    }

    /// Whether the head still has what it waits for, and somebody whom it waits for.
    fn still_valid(&mut self, group: &str, id: JobId) -> bool {
        let Some(reservation) = self.reservations.get(group).filter(|r| r.job == id && !r.stale) else {
            return false;
        };
        let on_nodes = |job: &JobId| {
            let seats = self.jobs.get(job).and_then(Job::attempt).into_iter().flat_map(|a| a.seats_held());
            seats.into_iter().any(|s| reservation.nodes.contains(&s.node))
        };
        let (waits, leaving): (BTreeSet<JobId>, BTreeSet<JobId>) = (
            reservation.waits.iter().filter(|j| on_nodes(j)).copied().collect(),
            reservation.leaving.iter().filter(|j| on_nodes(j)).copied().collect(),
        );
        // Somebody before the head took a node that it waited for.
        let overrun = !self.intruders(reservation).is_empty();
        let somebody = !waits.is_empty() || !leaving.is_empty();
        // Nobody is in the way any more who stays: those who are may have to give way now.
        let changed = waits.is_empty() && !reservation.waits.is_empty();
        if let Some(reservation) = self.reservations.get_mut(group) {
            (reservation.waits, reservation.leaving) = (waits, leaving);
        }
        somebody && !overrun && !changed
    }

    /// Entitled jobs on a head's nodes that were not there when it chose them.
    pub(crate) fn intruders(&self, reservation: &Reservation) -> Vec<JobId> {
        let jobs = reservation.nodes.iter().filter_map(|n| self.nodes.get(n)).flat_map(|n| n.jobs());
        let easy = self.policy.backfill == crate::policy::Backfill::Easy;
        jobs.filter(|j| !easy && !reservation.present.contains(j) && !self.opportunistic.contains(j))
            .collect()
    }

    /// When all of these have used up their time limits.
    fn shadow(&self, waits: &BTreeSet<JobId>) -> Option<Nanos> {
        let ends = waits.iter().map(|id| {
            let job = self.jobs.get(id).filter(|j| j.spec.time_limit_ms > 0)?;
            let attempt = job.attempt()?;
            let left = job.spec.time_limit_ms.saturating_sub(job.ran_ms);
            Some(attempt.running_since.after(Duration::from_millis(left)))
        });
        ends.collect::<Option<Vec<Nanos>>>()?.into_iter().max()
    }

    /// Asks a running attempt to give way; one that has not begun to run is taken back.
    fn displace(&mut self, victim: JobId, winner: JobId, now: Now, out: &mut Out) {
        reached!(self, "displacements");
        let reason = match self.jobs.get(&winner) {
            Some(w) => format!("{winner} (priority {}) needs its nodes", w.priority),
            None => format!("{winner} needs its nodes"),
        };
        let stage = self.jobs.get(&victim).and_then(Job::attempt).map(|a| a.stage);
        if stage == Some(Stage::Running) {
            self.suspend(victim, reason, false, now, out);
        } else {
            self.begin_end(victim, EndCause::Suspended, reason, now, out);
        }
    }

    /// The cheapest way to the job's nodes, given the active jobs of its group in order of cost.
    /// `None` if there is none, even when all of them leave.
    pub(crate) fn plan(&self, id: JobId, occupants: &[Occupant], now: Now) -> Option<Plan> {
        let job = self.jobs.get(&id)?;
        let (avoid, span) = self.span(job, now).ok()?;
        let each = job.spec.request();
        if !job.spec.whole() {
            return self.plan_room(job, &each, occupants, &avoid);
        }
        let reach = Reach { held: true, suspending: false };
        let places = self.capacity.idle_places(&job.spec.group, &each, reach, &avoid);
        let zones = self.capacity.large_enough(&job.spec.group, &each);
        let standbys = if job.recovering { 0 } else { self.policy.standbys(&job.spec.group) as usize };
        let want = job.spec.nodes as usize;
        let search = |zone: Option<&str>| {
            let within = |place_zone: &str| zone.is_none_or(|z| z == place_zone);
            let idle: Vec<NodeId> =
                places.iter().filter(|(p, _)| within(&p.zone)).flat_map(|(_, n)| n.iter().copied()).collect();
            let usable = |s: &Standing| {
                s.kind.group == job.spec.group && each.fits(&s.kind.full) && within(&s.place.zone)
            };
            self.plan_gang(want, standbys, &idle, occupants, &avoid, &usable)
        };
        match span {
            Span::Crossing => search(None),
            Span::OneZone => {
                let plans = zones.iter().filter(|(_, n)| **n >= want).filter_map(|(z, _)| search(Some(z)));
                plans.min_by_key(|p| (p.worst(), p.cost()))
            }
        }
    }

    fn plan_gang(
        &self,
        want: usize,
        standbys: usize,
        idle: &[NodeId],
        occupants: &[Occupant],
        avoid: &BTreeSet<NodeId>,
        usable: &dyn Fn(&Standing) -> bool,
    ) -> Option<Plan> {
        // What stays behind as standbys must be freed beyond what the gang takes.
        let need = (want + standbys).saturating_sub(idle.len());
        let nodes_of = |o: &Occupant| {
            let seats = self.jobs.get(&o.job).and_then(Job::attempt).into_iter().flat_map(|a| a.seats_held());
            let nodes = seats.map(|s| s.node).filter(|n| !avoid.contains(n));
            nodes.filter(|n| self.capacity.standing(*n).is_some_and(usable)).collect::<Vec<NodeId>>()
        };
        let mut chosen: Vec<(&Occupant, Vec<NodeId>)> = Vec::new();
        // Nodes with several jobs are free when the last of them has left.
        let mut left: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut freed = 0;
        for occupant in occupants {
            if freed >= need {
                break;
            }
            let nodes = nodes_of(occupant);
            if nodes.is_empty() {
                continue;
            }
            for node in &nodes {
                let jobs =
                    left.entry(*node).or_insert_with(|| self.nodes.get(node).map_or(0, |n| n.seats.len()));
                *jobs = jobs.saturating_sub(1);
                let strays = self.nodes.get(node).is_some_and(|n| !n.strays.is_empty());
                freed += usize::from(*jobs == 0 && !strays);
            }
            chosen.push((occupant, nodes));
        }
        if freed < need {
            return None;
        }
        // The dearest that are not needed after all stay.
        let mut i = chosen.len();
        while i > 0 && chosen.len() <= TRIMMED {
            i -= 1;
            let lost = chosen[i].1.iter().filter(|n| left.get(n) == Some(&0)).count();
            if freed - lost >= need {
                for node in &chosen[i].1 {
                    *left.entry(*node).or_default() += 1;
                }
                freed -= lost;
                chosen.remove(i);
            }
        }
        let mut nodes: BTreeSet<NodeId> = idle.iter().copied().take(want).collect();
        for (_, theirs) in &chosen {
            for node in theirs.iter().filter(|n| left.get(n) == Some(&0)) {
                if nodes.len() < want {
                    nodes.insert(*node);
                }
            }
        }
        Some(Plan { nodes, occupants: chosen.into_iter().map(|(o, _)| o.clone()).collect() })
    }

    /// The same for a job that shares a node: one node, on which enough must leave.
    fn plan_room(
        &self,
        job: &Job,
        each: &Amount,
        occupants: &[Occupant],
        avoid: &BTreeSet<NodeId>,
    ) -> Option<Plan> {
        let mut leaving: BTreeMap<NodeId, (Amount, Vec<(Occupant, Amount)>)> = BTreeMap::new();
        for occupant in occupants {
            let Some(attempt) = self.jobs.get(&occupant.job).and_then(Job::attempt) else { continue };
            for seat in attempt.seats_held().filter(|s| !avoid.contains(&s.node)) {
                let Some(standing) = self.capacity.standing(seat.node) else { continue };
                let strays = self.nodes.get(&seat.node).is_some_and(|n| !n.strays.is_empty());
                if standing.kind.group != job.spec.group || !each.fits(&standing.kind.full) || strays {
                    continue;
                }
                let (free, jobs) = leaving.entry(seat.node).or_insert_with(|| (standing.free, Vec::new()));
                *free = free.plus(&seat.amount);
                jobs.push((occupant.clone(), seat.amount));
                if each.fits(free) {
                    // The dearest that are not needed after all stay.
                    let (mut free, mut jobs) = (*free, std::mem::take(jobs));
                    for i in (0..jobs.len()).rev() {
                        let without = free.minus(&jobs[i].1);
                        if each.fits(&without) {
                            free = without;
                            jobs.remove(i);
                        }
                    }
                    let occupants = jobs.into_iter().map(|(o, _)| o).collect();
                    return Some(Plan { nodes: [seat.node].into(), occupants });
                }
            }
        }
        None
    }

    /// An attempt may be displaced from now on: heads that wait for somebody look again.
    pub(crate) fn quantum_over(&mut self, id: JobId, epoch: firefly_types::AttemptEpoch) {
        let Some(job) = self.jobs.get(&id).filter(|j| j.epoch() == epoch) else { return };
        if job.attempt().is_some_and(|a| a.stage == Stage::Running)
            && let Some(reservation) = self.reservations.get_mut(&job.spec.group)
            && !reservation.waits.is_empty()
        {
            reservation.stale = true;
            self.dirty = true;
        }
    }
}
