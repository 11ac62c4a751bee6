//! The queue of jobs that could start now if there were room.
//!
//! ```text
//! lane   equal by every rule before fair share     served in order
//! user   within a lane                             served by least decayed usage
//! class  equal requests of one user                if one does not fit, none of them does
//! job    within a class                            served in order of the rules after fair share
//! ```
//!
//! Fifty thousand jobs are a few hundred classes: a pass looks at classes.

use crate::job::Job;
use crate::order::{self, Key, OrderBy};
use crate::spec::Dependency;
use firefly_types::JobId;
use std::collections::{BTreeMap, BTreeSet};

/// Jobs that fit or do not fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClassId(u32);

/// What makes two requests equal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Class {
    user: u32,
    group: String,
    priority: i32,
    nodes: u32,
    each: crate::amount::Amount,
    /// exclusive, suspendable, one zone, recovering, overdue
    flags: [bool; 5],
    time_limit_ms: u64,
    array: Option<JobId>,
    /// Jobs with memories of their own (nodes to avoid, lost rights) share with nobody.
    alone: Option<JobId>,
}

/// Where a job is in the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    head: Key,
    user: u32,
    class: ClassId,
    tail: Key,
}

type Classes = BTreeMap<ClassId, BTreeSet<(Key, JobId)>>;

/// The queue.
#[derive(Clone, Debug, Default)]
pub(crate) struct Queue {
    lanes: BTreeMap<Key, BTreeMap<u32, Classes>>,
    entries: BTreeMap<JobId, Entry>,
    /// Classes that jobs in the queue have, with their number of jobs.
    classes: BTreeMap<Class, (ClassId, usize)>,
    by_id: BTreeMap<ClassId, Class>,
    next_class: u32,
}

impl Queue {
    /// Puts a job in, or to its new place. `user` is the interned owner; if users take no turns, a
    /// lane has one queue for all.
    pub(crate) fn insert(&mut self, job: &Job, user: u32, order: &[OrderBy], alone: bool) {
        self.remove(job.id);
        let turn = if order::by_user(order) { user } else { 0 };
        let spec = &job.spec;
        let class = Class {
            user,
            group: spec.group.clone(),
            priority: job.priority,
            nodes: spec.nodes,
            each: spec.request(),
            flags: [
                spec.whole(),
                spec.suspendable,
                spec.one_zone,
                job.recovering,
                job.overdue_since.is_some(),
            ],
            time_limit_ms: spec.time_limit_ms,
            array: job.array.map(|(first, _)| first),
            alone: alone.then_some(job.id),
        };
        let next = &mut self.next_class;
        let (id, count) = self.classes.entry(class.clone()).or_insert_with(|| {
            *next += 1;
            (ClassId(*next), 0)
        });
        *count += 1;
        let class_id = *id;
        self.by_id.entry(class_id).or_insert(class);
        let (head, tail) = order::keys(order, job);
        let lane = self.lanes.entry(head).or_default().entry(turn).or_default();
        lane.entry(class_id).or_default().insert((tail, job.id));
        self.entries.insert(job.id, Entry { head, user: turn, class: class_id, tail });
    }

    /// Takes a job out.
    pub(crate) fn remove(&mut self, id: JobId) {
        let Some(entry) = self.entries.remove(&id) else { return };
        if let Some(users) = self.lanes.get_mut(&entry.head) {
            if let Some(classes) = users.get_mut(&entry.user) {
                if let Some(jobs) = classes.get_mut(&entry.class) {
                    jobs.remove(&(entry.tail, id));
                    if jobs.is_empty() {
                        classes.remove(&entry.class);
                    }
                }
                if classes.is_empty() {
                    users.remove(&entry.user);
                }
            }
            if users.is_empty() {
                self.lanes.remove(&entry.head);
            }
        }
        if let Some(class) = self.by_id.get(&entry.class)
            && let Some((_, count)) = self.classes.get_mut(class)
        {
            *count -= 1;
            if *count == 0 {
                self.classes.remove(class);
                self.by_id.remove(&entry.class);
            }
        }
    }

    pub(crate) fn contains(&self, id: JobId) -> bool {
        self.entries.contains_key(&id)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn jobs(&self) -> impl Iterator<Item = JobId> {
        self.entries.keys().copied()
    }

    /// Lanes in the order in which they are served.
    pub(crate) fn lanes(&self) -> Vec<Key> {
        self.lanes.keys().copied().collect()
    }

    /// The job's class, if it waits in this lane.
    pub(crate) fn in_lane(&self, id: JobId, lane: &Key) -> Option<ClassId> {
        self.entries.get(&id).filter(|e| e.head == *lane).map(|e| e.class)
    }

    pub(crate) fn users(&self, lane: &Key) -> Vec<u32> {
        self.lanes.get(lane).map(|users| users.keys().copied().collect()).unwrap_or_default()
    }

    /// The user's next job in the lane, leaving out classes.
    pub(crate) fn next(
        &self,
        lane: &Key,
        user: u32,
        skip: impl Fn(ClassId) -> bool,
    ) -> Option<(JobId, ClassId)> {
        let classes = self.lanes.get(lane)?.get(&user)?;
        let heads = classes
            .iter()
            .filter(|(class, _)| !skip(**class))
            .filter_map(|(class, jobs)| jobs.first().map(|(key, job)| (*key, *job, *class)));
        heads.min().map(|(_, job, class)| (job, class))
    }

    /// Whether the entries and the lanes agree.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut seen = BTreeSet::new();
        for (head, users) in &self.lanes {
            for (user, classes) in users {
                for (class, jobs) in classes {
                    for (tail, job) in jobs {
                        let entry = Entry { head: *head, user: *user, class: *class, tail: *tail };
                        if self.entries.get(job) != Some(&entry) || !seen.insert(*job) {
                            return Err(format!("{job} is in the queue at two places or at a wrong one"));
                        }
                    }
                }
            }
        }
        let counted: usize = self.classes.values().map(|(_, n)| n).sum();
        if seen.len() != self.entries.len() || counted != seen.len() || self.by_id.len() != self.classes.len()
        {
            return Err("the queue's entries and lanes disagree".into());
        }
        Ok(())
    }
}

/// Jobs that wait for another job, by that one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Dependents(BTreeMap<JobId, BTreeSet<JobId>>);

impl Dependents {
    pub(crate) fn add(&mut self, job: JobId, after: &[Dependency]) {
        for dependency in after {
            self.0.entry(dependency.job).or_default().insert(job);
        }
    }

    /// Those that waited for this one.
    pub(crate) fn take(&mut self, of: JobId) -> BTreeSet<JobId> {
        self.0.remove(&of).unwrap_or_default()
    }
}
