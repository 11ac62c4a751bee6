//! Why a job is where it is, and the smallest change that would let it go on.
//!
//! The answer is computed from the same functions that decide: the obstacle that keeps a job out
//! of the queue, the block that keeps a queued job from starting, and the plan by which its nodes
//! would come free.

use crate::capacity::Reach;
use crate::event::Now;
use crate::job::{Job, JobState, RankState};
use crate::machine::{Core, planted};
use crate::node::NodeState;
use crate::pass::Block;
use crate::preempt::Grip;
use crate::quota::{self, Owner};
use crate::reserve::Plan;
use crate::spec::After;
use firefly_types::{JobId, NodeId};
use std::collections::BTreeSet;
use std::time::Duration;

/// Nodes and jobs that an explanation names before it only counts them.
const NAMED: usize = 8;

/// What keeps a pending job from starting: the binding constraint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Binding {
    /// It does not wait.
    None,
    /// A person or a breaker holds it.
    Held,
    /// Another job must end first.
    Dependency(JobId),
    /// Ranks of its last attempt may still run.
    Unproven,
    /// The delay of a restart.
    Delay,
    /// Its array has enough running.
    Array,
    /// Its owner's quota is used up.
    Quota,
    /// Enough jobs span zones.
    CrossZone,
    /// Too few nodes in service are large enough, even if they were idle.
    TooFewNodes,
    /// What is free is kept for recoveries.
    Standbys,
    /// Too few nodes are free.
    NoRoom,
    /// There is room, but this job goes first.
    Behind(JobId),
}

/// The smallest change that lets the job start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing is needed.
    None,
    /// A person must release it.
    Resume,
    /// This job must end.
    End(JobId),
    /// These nodes must come back, or time must pass.
    Proof(BTreeSet<NodeId>),
    /// Time must pass.
    Wait,
    /// The quota of this user must be raised, or these jobs of the user must end.
    Quota {
        /// Whose.
        user: String,
        /// The fewest of the user's jobs whose end makes room in it.
        jobs: BTreeSet<JobId>,
    },
    /// One of these jobs, which span zones, must end.
    OneOf(BTreeSet<JobId>),
    /// So many more nodes that are large enough must be in service (in one zone, unless it spans
    /// zones).
    MoreNodes(u32),
    /// These jobs must leave these nodes.
    Free {
        /// Who.
        jobs: BTreeSet<JobId>,
        /// Where.
        nodes: BTreeSet<NodeId>,
    },
}

/// An explanation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What binds.
    pub binding: Binding,
    /// What would help.
    pub change: Change,
    /// When that happens at the latest, if limits and quanta say so.
    pub latest: Option<Duration>,
    /// The same for people, the most important first.
    pub lines: Vec<String>,
}

/// What keeps a pending job out of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    Held,
    Dependency(JobId),
    Unproven,
    Delay,
}

impl Core {
    /// What keeps a pending job out of the queue.
    pub(crate) fn obstacle(&self, id: JobId, now: Now) -> Option<Obstacle> {
        let job = self.jobs.get(&id)?;
        if job.state == JobState::Held {
            return Some(Obstacle::Held);
        }
        if let Some(first) = job.waits_for.first()
            && !planted!(self, DependencyIgnored)
        {
            return Some(Obstacle::Dependency(first.job));
        }
        if job.attempt().is_some_and(|a| a.tally.lost > 0) && !planted!(self, FenceIgnored) {
            return Some(Obstacle::Unproven);
        }
        (job.not_before > now.mono).then_some(Obstacle::Delay)
    }

    /// Sentences for people, the most important first; empty if there is no such job.
    pub fn why(&self, id: JobId, now: Now) -> Vec<String> {
        self.explain(id, now).map(|e| e.lines).unwrap_or_default()
    }

    /// Why a job is where it is, and what would let it go on; `None` if there is no such job.
    pub fn explain(&self, id: JobId, now: Now) -> Option<Explanation> {
        let job = self.jobs.get(&id)?;
        let nothing =
            |lines| Explanation { binding: Binding::None, change: Change::None, latest: None, lines };
        let mut lines = Vec::new();
        match job.state {
            JobState::Pending | JobState::Held => return Some(self.explain_pending(job, now)),
            JobState::Starting => {
                lines.push(format!("{id} is placed; its ranks are being prepared"));
                for slot in job.attempt().into_iter().flat_map(|a| &a.ranks) {
                    if slot.state == RankState::Assigned {
                        lines.push(format!("rank {} on {} is not ready yet", slot.rank.0, slot.node));
                    }
                }
            }
            JobState::Suspending => {
                lines.push(format!("{id} is giving way: {}; it goes on when its turn comes", job.reason));
            }
            JobState::Running => match job.attempt().filter(|a| !a.end_reason.is_empty()) {
                Some(a) => lines.push(format!(
                    "attempt {} of {id} is being ended: {}; then it is tried again or given up",
                    a.epoch.0, a.end_reason
                )),
                None if self.opportunistic.contains(&id) => {
                    lines.push(format!("{id} runs on idle capacity: it gives way on demand"));
                }
                None => lines.push(format!("{id} runs")),
            },
            JobState::Stopping => {
                lines.push(format!("{id} is being stopped: {}", job.reason));
                for slot in job.attempt().into_iter().flat_map(|a| &a.ranks).filter(|s| s.state.is_live()) {
                    lines.push(format!("rank {} on {} has not ended yet", slot.rank.0, slot.node));
                }
            }
            JobState::Succeeded => lines.push(format!("{id} succeeded: {}", job.reason)),
            JobState::Failed => lines.push(format!("{id} failed: {}", job.reason)),
            JobState::Stopped => lines.push(format!("{id} was stopped: {}", job.reason)),
        }
        if job.state.is_final() || job.state == JobState::Running {
            for attempt in job.attempts.iter().rev().skip(1).take(3).filter(|a| !a.end_reason.is_empty()) {
                lines.push(format!("attempt {} ended: {}", attempt.epoch.0, attempt.end_reason));
            }
        }
        Some(nothing(lines))
    }

    fn explain_pending(&self, job: &Job, now: Now) -> Explanation {
        let mut lines = Vec::new();
        if !job.reason.is_empty() {
            lines.push(job.reason.clone());
        }
        let (binding, change, latest) = match self.obstacle(job.id, now) {
            Some(obstacle) => self.explain_obstacle(job, obstacle, now, &mut lines),
            None => self.explain_block(job, now, &mut lines),
        };
        Explanation { binding, change, latest, lines }
    }

    fn explain_obstacle(
        &self,
        job: &Job,
        obstacle: Obstacle,
        now: Now,
        lines: &mut Vec<String>,
    ) -> (Binding, Change, Option<Duration>) {
        match obstacle {
            Obstacle::Held => {
                lines.push(format!("it is held: `ff job resume {}` lets it go on", job.id));
                (Binding::Held, Change::Resume, None)
            }
            Obstacle::Dependency(other) => {
                for d in job.waits_for.iter().take(NAMED) {
                    let what = if d.after == After::Success { "succeeds" } else { "ends" };
                    let state = self.jobs.get(&d.job).map_or("gone".into(), |j| format!("{:?}", j.state));
                    lines.push(format!("it starts after {} {what} ({state} now)", d.job).to_lowercase());
                }
                (Binding::Dependency(other), Change::End(other), None)
            }
            Obstacle::Unproven => {
                let mut nodes = BTreeSet::new();
                let mut latest = Duration::ZERO;
                for slot in job.unproven() {
                    let silent = self.nodes.get(&slot.node).map_or(Duration::MAX, |n| n.silent(now.mono));
                    let left = self.policy.fence().saturating_sub(silent);
                    latest = latest.max(left);
                    if nodes.insert(slot.node) && nodes.len() <= NAMED {
                        lines.push(format!(
                            "rank {} of attempt {} may still run on {}, which is silent: the next attempt starts when {} is back, or in {} s",
                            slot.rank.0, job.epoch().0, slot.node, slot.node, left.as_secs()
                        ));
                    }
                }
                (Binding::Unproven, Change::Proof(nodes), Some(latest))
            }
            Obstacle::Delay => {
                let left = job.not_before.since(now.mono);
                lines.push(format!(
                    "restarts in {} s: {} attempts in a row ended early, and the delay grows with each",
                    left.as_secs() + 1,
                    job.unstable
                ));
                (Binding::Delay, Change::Wait, Some(left))
            }
        }
    }

    fn explain_block(
        &self,
        job: &Job,
        now: Now,
        lines: &mut Vec<String>,
    ) -> (Binding, Change, Option<Duration>) {
        let id = job.id;
        let ahead = self.ahead_of(job);
        let is_head = self.reservations.get(&job.spec.group).is_some_and(|r| r.job == id);
        match self.choose(job, false, is_head, now) {
            Ok(_) => match ahead {
                Some(other) => {
                    let priority = self.jobs.get(&other).map_or(0, |j| j.priority);
                    lines.push(format!(
                        "it would fit, but {other} (priority {priority}) is ahead of it and waits for nodes"
                    ));
                    (Binding::Behind(other), Change::End(other), None)
                }
                None => {
                    lines.push("it fits and is about to start".into());
                    (Binding::None, Change::None, Some(Duration::ZERO))
                }
            },
            Err(Block::Array) => {
                lines
                    .push(format!("{} jobs of its array run, as many as it allows", job.spec.array_parallel));
                let first = job.array.map(|(first, _)| first);
                let mates = self
                    .active
                    .iter()
                    .filter(|j| self.jobs.get(j).is_some_and(|j| j.array.map(|(f, _)| f) == first));
                (Binding::Array, Change::OneOf(mates.copied().collect()), None)
            }
            Err(Block::Quota) => self.explain_quota(job, now, lines),
            Err(Block::CrossZone) => {
                let names: Vec<String> = self.crossing.iter().map(JobId::to_string).collect();
                lines.push(format!(
                    "no zone has {} nodes, and {} job(s) may span zones at a time: {} do(es)",
                    job.spec.nodes,
                    self.policy.cross_zone_jobs,
                    names.join(" ")
                ));
                (Binding::CrossZone, Change::OneOf(self.crossing.clone()), None)
            }
            Err(Block::TooLarge) => self.explain_too_large(job, lines),
            Err(block @ (Block::NoRoom | Block::Standby)) => {
                self.explain_no_room(job, block, ahead, now, lines)
            }
        }
    }

    fn explain_quota(
        &self,
        job: &Job,
        now: Now,
        lines: &mut Vec<String>,
    ) -> (Binding, Change, Option<Duration>) {
        let owner = Owner::of(job);
        let held = self.ledger.held(&owner);
        let quota = quota::limit(&self.policy.quotas, &owner);
        let limit = quota.map(ToString::to_string).unwrap_or_default();
        lines.push(format!(
            "the quota of {:?} in group {:?} at priority {} is {limit}; {} nodes, {} GPUs, {} cores are held",
            owner.user, owner.group, owner.priority, held.nodes, held.gpus, held.cores
        ));
        // The youngest first: they have the least to lose.
        let (mut left, mut jobs) = (held, BTreeSet::new());
        for other in self.active.iter().rev().filter_map(|j| self.jobs.get(j)) {
            let theirs = other.entitled_held();
            if Owner::of(other) != owner || theirs == quota::Held::default() {
                continue;
            }
            if quota.is_none_or(|q| q.allows(left.plus(crate::requests::least_held(&job.spec)))) {
                break;
            }
            left = left.minus(theirs);
            jobs.insert(other.id);
        }
        let latest = self.latest_end(&jobs, now);
        if self.policy.borrow && job.spec.suspendable {
            lines.push("it may also start beyond its quota, on idle nodes that can suspend".into());
        }
        if jobs.is_empty() {
            lines.push("the quota can never be enough for it: ask for more quota, or for fewer nodes".into());
        } else {
            lines.push(format!("it starts when {} of the same owner end(s)", names(&jobs)));
        }
        (Binding::Quota, Change::Quota { user: owner.user, jobs }, latest)
    }

    fn explain_too_large(&self, job: &Job, lines: &mut Vec<String>) -> (Binding, Change, Option<Duration>) {
        let (want, each) = (job.spec.nodes, job.spec.request());
        self.describe_nodes(job, lines);
        let zones = self.capacity.large_enough(&job.spec.group, &each);
        let may_cross = !job.spec.one_zone && self.policy.cross_zone_jobs > 0;
        let large: usize =
            if may_cross { zones.values().sum() } else { zones.values().max().copied().unwrap_or(0) };
        let missing = want.saturating_sub(u32::try_from(large).unwrap_or(u32::MAX));
        let zone = if may_cross || zones.len() < 2 { "" } else { " in one zone" };
        let what = if each.gpus + each.cores == 0 && each.memory_bytes == 0 {
            format!("{} slots", each.slots)
        } else {
            each.to_string()
        };
        lines.push(format!(
            "it cannot start on the nodes that are ready now: {missing} more with at least {what} are needed{zone}"
        ));
        (Binding::TooFewNodes, Change::MoreNodes(missing), None)
    }

    fn explain_no_room(
        &self,
        job: &Job,
        block: Block,
        ahead: Option<JobId>,
        now: Now,
        lines: &mut Vec<String>,
    ) -> (Binding, Change, Option<Duration>) {
        self.describe_nodes(job, lines);
        if let Some(other) = ahead {
            let priority = self.jobs.get(&other).map_or(0, |j| j.priority);
            lines.push(format!("{other} (priority {priority}) is ahead of it"));
        }
        let standbys = self.policy.standbys(&job.spec.group);
        if block == Block::Standby {
            lines.push(format!("{standbys} idle node(s) are kept for jobs that a fault has ended"));
        }
        let occupants = self.occupants(job.id, now);
        let plan = self.plan(job.id, &occupants, now).unwrap_or_default();
        let Plan { nodes, occupants } = plan;
        let jobs: BTreeSet<JobId> = occupants.iter().map(|o| o.job).collect();
        let of =
            |grip| occupants.iter().filter(move |o| o.grip == grip).map(|o| o.job).collect::<BTreeSet<_>>();
        let (leaving, loose, firm) = (of(Grip::Leaving), of(Grip::Loose), of(Grip::Firm));
        if !leaving.is_empty() {
            lines.push(format!("{} is (are) leaving", names(&leaving)));
        }
        if !loose.is_empty() {
            lines.push(format!("{} give(s) way as soon as that is enough", names(&loose)));
        }
        let latest = if firm.is_empty() {
            Some(Duration::from_millis(u64::from(self.policy.suspend_grace_ms)))
        } else {
            self.latest_end(&firm, now)
        };
        if !firm.is_empty() {
            let when = latest.map(|l| format!(", in {} s at the latest", l.as_secs())).unwrap_or_default();
            lines.push(format!("{} must end first{when}", names(&firm)));
        }
        lines.push(if jobs.is_empty() {
            "it starts with the next free nodes".into()
        } else {
            format!("it starts when enough of these slots are free: on {}", node_names(&nodes))
        });
        let binding = match (ahead, block) {
            (_, Block::Standby) => Binding::Standbys,
            (Some(other), _) if jobs.is_empty() => Binding::Behind(other),
            _ => Binding::NoRoom,
        };
        (binding, Change::Free { jobs, nodes }, latest)
    }

    /// When all of these have ended by their own time limits.
    fn latest_end(&self, jobs: &BTreeSet<JobId>, now: Now) -> Option<Duration> {
        let ends = jobs.iter().map(|id| {
            let job = self.jobs.get(id).filter(|j| j.spec.time_limit_ms > 0)?;
            Some(Duration::from_millis(job.spec.time_limit_ms.saturating_sub(job.ran(now.mono))))
        });
        ends.collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    fn describe_nodes(&self, job: &Job, lines: &mut Vec<String>) {
        let (want, each, group) = (job.spec.nodes, job.spec.request(), &job.spec.group);
        let of_group = || self.nodes.values().filter(|n| n.record.info.group == *group);
        let ready = of_group().filter(|n| n.in_service()).count();
        let large: usize = self.capacity.large_enough(group, &each).values().sum();
        let free = if job.spec.whole() {
            self.capacity.idle(group, &each, Reach { held: true, suspending: false })
        } else {
            of_group().filter(|n| n.in_service() && each.fits(&n.free())).count()
        };
        let kind = if job.spec.whole() { "whole nodes" } else { "nodes" };
        lines.push(format!(
            "needs {want} {kind} with {each} each; {ready} are ready, {large} are large enough, {free} have that free"
        ));
        for node in of_group().take(NAMED) {
            let id = node.record.id;
            lines.push(match node.state() {
                NodeState::Cordoned => match &node.record.cordon {
                    Some(reason) => format!("{id} is cordoned: {reason}"),
                    None => format!("{id} is under maintenance"),
                },
                NodeState::Lost => format!("{id} has not been heard of lately"),
                NodeState::Ready => {
                    let jobs: Vec<String> = node.jobs().map(|j| j.to_string()).collect();
                    let by = if !node.strays.is_empty() {
                        format!(" (ranks of unknown jobs are being ended: {})", node.strays.len())
                    } else if jobs.is_empty() {
                        String::new()
                    } else {
                        format!(" (taken by {})", jobs.join(" "))
                    };
                    format!("{id}: {} of {} slots free{by}", node.free().slots, node.record.info.slots)
                }
            });
        }
        let all = of_group().count();
        if all > NAMED {
            lines.push(format!("… and {} more nodes", all - NAMED));
        }
    }

    /// The head that holds this job back.
    fn ahead_of(&self, job: &Job) -> Option<JobId> {
        self.heads.get(&job.spec.group).copied().filter(|head| *head != job.id)
    }
}

fn names(jobs: &BTreeSet<JobId>) -> String {
    let first: Vec<String> = jobs.iter().take(NAMED).map(JobId::to_string).collect();
    let more = jobs.len().saturating_sub(NAMED);
    if more > 0 { format!("{} and {more} more", first.join(" ")) } else { first.join(" ") }
}

fn node_names(nodes: &BTreeSet<NodeId>) -> String {
    let first: Vec<String> = nodes.iter().take(NAMED).map(NodeId::to_string).collect();
    let more = nodes.len().saturating_sub(NAMED);
    if more > 0 { format!("{} and {more} more", first.join(" ")) } else { first.join(" ") }
}
