//! What people ask: submit, stop, hold, resume, reorder, configure.

use crate::event::{Answer, Now, Record, Refusal};
use crate::job::{EndCause, Job, JobState};
use crate::machine::{Core, Out, planted};
use crate::policy::Policy;
use crate::quota::{self, Held, Owner};
use crate::spec::{After, JobSpec};
use crate::timers::Timer;
use crate::users::Users;
use firefly_types::{JobId, Nanos, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

impl Core {
    pub(crate) fn submit(&mut self, spec: JobSpec, key: String, now: Now, out: &mut Out) {
        if let Some(&id) = self.keys.get(&key).filter(|_| !key.is_empty()) {
            out.answer = Some(Answer::Job(id));
            return;
        }
        if key.len() > 256 {
            return out.refuse(Refusal::Invalid("an idempotency key has at most 256 bytes".into()));
        }
        if let Err(refusal) = spec.validate().and_then(|()| self.possible(&spec)) {
            return out.refuse(refusal);
        }
        let first = JobId(self.next_job);
        let array = spec.array.max(1);
        for index in 0..array {
            let id = JobId(self.next_job);
            self.next_job += 1;
            let key = if index == 0 { key.clone() } else { String::new() };
            if !key.is_empty() {
                self.keys.insert(key.clone(), id);
            }
            let job = Job {
                id,
                key,
                state: JobState::Pending,
                attempts: Vec::new(),
                failures: 0,
                unstable: 0,
                submitted_unix_ms: now.unix_ms,
                ended_unix_ms: 0,
                reason: String::new(),
                stop: None,
                hold: None,
                version: 1,
                delay_ms: 0,
                not_before: now.mono,
                priority: spec.priority,
                // Those that have ended already, and ended well, need no waiting for.
                waits_for: spec.after.iter().filter(|d| !self.is_over(d.job)).copied().collect(),
                array: (array > 1).then_some((first, index)),
                used: crate::Usage::default(),
                ran_ms: 0,
                waiting_unix_ms: 0,
                recovering: false,
                suspensions: 0,
                suspended_unix_ms: Vec::new(),
                suspend_cost_ms: 0,
                saved_step: 0,
                no_progress: 0,
                avoid: BTreeMap::new(),
                overdue_since: None,
                half_cost_ms: None,
                spec: spec.clone(),
            };
            self.users.id(&spec.user, &self.policy, now.mono);
            self.dependents.add(id, &job.waits_for);
            self.jobs.insert(id, job);
            out.dirty_jobs.insert(id);
            self.enqueue(id, now, out);
        }
        out.answer = Some(Answer::Job(first));
    }

    fn is_over(&self, id: JobId) -> bool {
        self.jobs.get(&id).is_none_or(|j| j.state.is_final())
    }

    /// Refuses what this site can never give, even when all of it is there and idle.
    fn possible(&self, spec: &JobSpec) -> Result<(), Refusal> {
        for dependency in &spec.after {
            let Some(other) = self.jobs.get(&dependency.job) else {
                return Err(Refusal::NoJob(dependency.job));
            };
            let failed = other.state.is_final() && other.state != JobState::Succeeded;
            if dependency.after == After::Success && failed {
                return Err(Refusal::NotNow(format!(
                    "{} has ended without success already: the job could never start",
                    other.id
                )));
            }
        }
        let named = &self.policy.groups;
        let known = spec.group.is_empty()
            || named.contains_key(&spec.group)
            || self.nodes.values().any(|n| n.record.info.group == spec.group);
        if !known {
            let mut groups: BTreeSet<&str> = named.keys().map(String::as_str).collect();
            groups.extend(self.nodes.values().map(|n| n.record.info.group.as_str()));
            groups.remove("");
            let groups: Vec<&str> = groups.into_iter().collect();
            let known = if groups.is_empty() { "none".to_owned() } else { groups.join(", ") };
            return Err(Refusal::NoGroup { group: spec.group.clone(), known });
        }
        // A site that has not said how large it is may still grow.
        if let Some(group) = named.get(&spec.group).filter(|g| g.nodes > 0)
            && spec.nodes > group.nodes
        {
            return Err(Refusal::TooLarge {
                wanted: format!("{} nodes", spec.nodes),
                owner: format!("group {:?}", spec.group),
                most: format!("{} nodes", group.nodes),
            });
        }
        let owner = Owner { user: spec.user.clone(), group: spec.group.clone(), priority: spec.priority };
        let least = least_held(spec);
        if !self.policy.borrow
            && let Some(quota) = quota::limit(&self.policy.quotas, &owner).filter(|q| !q.allows(least))
        {
            return Err(Refusal::BeyondQuota {
                wanted: format!("{} nodes, {} GPUs, {} cores", least.nodes, least.gpus, least.cores),
                owner: format!("{:?} in group {:?} at priority {}", owner.user, owner.group, owner.priority),
                most: quota.to_string(),
            });
        }
        Ok(())
    }

    pub(crate) fn stop(&mut self, id: JobId, reason: String, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get_mut(&id) else { return out.refuse(Refusal::NoJob(id)) };
        out.answer = Some(Answer::Job(id));
        if job.state.is_final() || job.stop.is_some() {
            return;
        }
        let reason = if reason.is_empty() { "stopped by a person".to_owned() } else { reason };
        job.stop = Some(reason.clone());
        out.dirty_jobs.insert(id);
        if matches!(job.state, JobState::Pending | JobState::Held) {
            self.finish(id, JobState::Stopped, reason, now, out);
            return;
        }
        job.state = JobState::Stopping;
        job.reason.clone_from(&reason);
        job.version += 1;
        self.begin_end(id, EndCause::Stopped, reason, now, out);
    }

    pub(crate) fn hold(&mut self, id: JobId, reason: String, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get_mut(&id) else { return out.refuse(Refusal::NoJob(id)) };
        if job.state.is_final() {
            return out.refuse(Refusal::NotNow(format!("{id} has ended: nothing is left to hold")));
        }
        job.hold = Some(if reason.is_empty() { "held by a person".to_owned() } else { reason });
        job.version += 1;
        out.dirty_jobs.insert(id);
        out.answer = Some(Answer::Job(id));
        self.enqueue(id, now, out);
    }

    pub(crate) fn resume(&mut self, id: JobId, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get_mut(&id) else { return out.refuse(Refusal::NoJob(id)) };
        if job.hold.is_none() {
            return out.refuse(Refusal::NotNow(format!("{id} is not held")));
        }
        job.hold = None;
        job.no_progress = 0;
        if let Some(suspend) = job.attempts.last_mut().and_then(|a| a.suspend.as_mut()) {
            suspend.hold = false;
        }
        if job.state == JobState::Held {
            job.state = JobState::Pending;
            job.reason.clear();
        }
        job.version += 1;
        out.dirty_jobs.insert(id);
        out.answer = Some(Answer::Job(id));
        self.enqueue(id, now, out);
    }

    /// Changes what a job's place in the queue depends on.
    pub(crate) fn reorder(&mut self, id: JobId, now: Now, out: &mut Out, change: impl FnOnce(&mut Job)) {
        if self.jobs.get(&id).is_none_or(|j| j.state.is_final()) {
            return out.refuse(match self.jobs.contains_key(&id) {
                true => Refusal::NotNow(format!("{id} has ended: it has no place in the queue")),
                false => Refusal::NoJob(id),
            });
        }
        self.change_order(id, now, out, change);
        out.answer = Some(Answer::Job(id));
    }

    /// The same without a person. What the job holds moves to its new account.
    pub(crate) fn change_order(&mut self, id: JobId, now: Now, out: &mut Out, change: impl FnOnce(&mut Job)) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let held = job.entitled_held();
        let before = Owner::of(job);
        change(job);
        job.version += 1;
        let after = Owner::of(job);
        if before != after {
            self.ledger.release(&before, held);
            self.ledger.charge(after, held);
        }
        out.dirty_jobs.insert(id);
        self.enqueue(id, now, out);
        self.forget_tries();
    }

    /// What did not fit may fit now, for a reason that the index of free capacity does not see.
    pub(crate) fn forget_tries(&mut self) {
        self.tried.clear();
        self.dirty = true;
    }

    /// Puts a pending job where it belongs: into the queue if only room is missing, else among
    /// those that wait for something else.
    pub(crate) fn enqueue(&mut self, id: JobId, now: Now, out: &mut Out) {
        let ignore_hold = planted!(self, HeldJobStarts);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if !matches!(job.state, JobState::Pending | JobState::Held) {
            self.queue.remove(id);
            self.waiting.remove(&id);
            return;
        }
        if let Some(reason) = job.hold.clone()
            && job.state == JobState::Pending
            && !ignore_hold
        {
            job.state = JobState::Held;
            job.reason = reason;
            job.version += 1;
            out.dirty_jobs.insert(id);
        }
        let ready = job.state == JobState::Pending && self.obstacle(id, now).is_none();
        if !ready {
            self.queue.remove(id);
            self.waiting.insert(id);
            // It may have been a head.
            self.dirty = true;
            if let Some(job) = self.jobs.get_mut(&id) {
                job.waiting_unix_ms = 0;
                job.overdue_since = None;
                if job.not_before > now.mono {
                    self.timers.set(job.not_before, Timer::Delay(id));
                }
            }
            return;
        }
        self.waiting.remove(&id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if job.waiting_unix_ms == 0 {
            job.waiting_unix_ms = now.unix_ms.max(1);
            out.dirty_jobs.insert(id);
        }
        self.watch_wait(id, now);
        let Some(job) = self.jobs.get(&id) else { return };
        let alone = !job.avoid.is_empty()
            || job.unstable >= self.policy.crash_loop
            || job.suspended_lately(now) >= self.policy.suspensions_per_hour as usize;
        let user = self.users.known(&job.spec.user).unwrap_or(0);
        self.queue.insert(job, user, &self.policy.order, alone);
        self.dirty = true;
    }

    /// Sets the timer for the bound on a job's wait.
    pub(crate) fn watch_wait(&mut self, id: JobId, now: Now) {
        let bound = self.policy.overdue_after_ms;
        let Some(job) = self.jobs.get(&id).filter(|_| bound > 0) else { return };
        if job.overdue_since.is_none() {
            let waited = now.unix_ms.saturating_sub(job.waiting_unix_ms);
            let at = now.mono.after(Duration::from_millis(bound.saturating_sub(waited)));
            self.timers.set(at, Timer::Overdue(id));
        }
    }

    /// A job may have waited beyond the bound: from now on it goes before all others.
    pub(crate) fn overdue(&mut self, id: JobId, now: Now) {
        let bound = self.policy.overdue_after_ms;
        if !self.queue.contains(id) || bound == 0 {
            return;
        }
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if job.overdue_since.is_some() {
            return;
        }
        if now.unix_ms.saturating_sub(job.waiting_unix_ms) < bound {
            // Waited anew since the timer was set, or the wall clock was set back.
            return self.watch_wait(id, now);
        }
        job.overdue_since = Some(now.mono);
        let _ = job;
        crate::machine::reached!(self, "overdue jobs");
        let mut out = Out::default();
        self.enqueue(id, now, &mut out);
    }

    pub(crate) fn configure(&mut self, policy: Policy, now: Now, out: &mut Out) {
        if let Err(what) = policy.validate() {
            return out.refuse(Refusal::Invalid(what));
        }
        self.policy = policy;
        self.users.reconfigure(&self.policy, now.mono);
        // Orders, bounds and quotas may be others: every waiting job finds its place anew.
        let ids: Vec<JobId> = self.queue.jobs().chain(self.waiting.iter().copied()).collect();
        for id in ids {
            self.enqueue(id, now, out);
        }
        for id in self.active.clone() {
            self.watch_attempt(id, now);
        }
        let nodes: Vec<NodeId> = self.nodes.keys().copied().collect();
        for node in nodes {
            self.look_at(node, now.mono);
        }
        self.drop_reservations(|_| true);
        self.forget_tries();
        out.answer = Some(Answer::Site);
    }

    /// The state after a restart, from everything that was persisted. Nodes count as heard now:
    /// each gets a full lease to come back with its ranks.
    pub fn restore(policy: Policy, records: impl IntoIterator<Item = Record>, now: Now) -> Self {
        let mut core = Self::new(policy);
        core.users = Users::new(&core.policy);
        for record in records {
            core.take_record(record, now);
        }
        let ids: Vec<JobId> = core.jobs.keys().copied().collect();
        let mut out = Out::default();
        for id in ids {
            core.take_back(id, now);
            core.enqueue(id, now, &mut out);
        }
        let nodes: Vec<NodeId> = core.nodes.keys().copied().collect();
        for node in nodes {
            core.look_at(node, now.mono.after(Duration::from_millis(core.policy.silent_after_ms)));
            core.reindex(node);
        }
        // Or else a restart would lift the cap on cordons without a person.
        for node in core.nodes.values().filter(|n| n.record.auto_cordon_unix_ms > 0) {
            let ago = now.unix_ms.saturating_sub(node.record.auto_cordon_unix_ms);
            let at = Nanos(now.mono.0.saturating_sub(ago.saturating_mul(1_000_000)));
            core.auto_cordons.push_back((at, node.record.id));
        }
        core.auto_cordons.make_contiguous().sort_unstable();
        let windows: Vec<u32> = core.windows.keys().copied().collect();
        for id in windows {
            core.timers.set(now.mono, Timer::Maintenance(id));
        }
        core.dirty = true;
        core
    }

    fn take_record(&mut self, record: Record, now: Now) {
        match record {
            Record::Job(job) => {
                self.jobs.insert(job.id, *job);
            }
            Record::Node(node) => {
                self.nodes.insert(node.id, crate::Node::new(node, now.mono));
            }
            Record::RemoveJob(id) => {
                self.jobs.remove(&id);
            }
            Record::Account(account) => {
                self.accounts.insert(account.user, account.used);
            }
            Record::Maintenance(window) => {
                self.windows.insert(window.id, window);
            }
            Record::RemoveMaintenance(id) => {
                self.windows.remove(&id);
            }
        }
    }

    /// Takes a job's holdings back into the books.
    fn take_back(&mut self, id: JobId, now: Now) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        self.next_job = self.next_job.max(id.0 + 1);
        if !job.key.is_empty() {
            self.keys.insert(job.key.clone(), id);
        }
        let user = self.users.id(&job.spec.user, &self.policy, now.mono);
        job.not_before = now.mono.after(Duration::from_millis(job.delay_ms));
        let mut past = Vec::new();
        for attempt in &mut job.attempts {
            attempt.tally = attempt.counted();
            for seat in &attempt.seats {
                let end = if seat.returned_unix_ms > 0 { seat.returned_unix_ms } else { now.unix_ms };
                let held = end.saturating_sub(attempt.started_unix_ms);
                past.push((seat.milli.saturating_mul(held), now.unix_ms.saturating_sub(end)));
            }
        }
        for (milli_ms, age) in past {
            self.users.charge_past(user, milli_ms, age, now.mono);
        }
        let whole = job.spec.whole();
        let held = job.entitled_held();
        let owner = Owner::of(job);
        let waits_for = job.waits_for.clone();
        let finished = job.state.is_final().then_some(job.ended_unix_ms);
        let array = job.array;
        if let Some(attempt) = job.attempts.last_mut() {
            attempt.since = now.mono;
            attempt.running_since = now.mono;
            attempt.saved_at = now.mono;
            attempt.progress_at = now.mono;
            if let Some(suspend) = &mut attempt.suspend {
                suspend.since = now.mono;
            }
            let (mut zones, mut any) = (BTreeSet::new(), false);
            for (index, seat) in attempt.seats.iter().enumerate() {
                // A job that spans zones counts as such until its last seat is returned.
                zones.extend(self.nodes.get(&seat.node).map(|n| n.record.info.place.zone.clone()));
                if seat.returned_unix_ms > 0 {
                    continue;
                }
                let fresh = crate::machine::fresh_record(seat.node);
                let node = self.nodes.entry(seat.node).or_insert_with(|| crate::Node::new(fresh, now.mono));
                node.take(id, u32::try_from(index).unwrap_or(u32::MAX), seat.amount, seat.gpus, whole);
                self.users.take(user, seat.milli, now.mono);
                any = true;
            }
            if any {
                self.active.insert(id);
                if attempt.opportunistic.is_some() {
                    self.opportunistic.insert(id);
                }
                if let Some((first, _)) = array {
                    *self.arrays.entry(first).or_default() += 1;
                }
            }
            if any && zones.len() > 1 {
                self.crossing.insert(id);
            }
        }
        self.ledger.charge(owner, held);
        self.dependents.add(id, &waits_for);
        if let Some(ended) = finished {
            self.finished.insert((ended, id));
        }
        if self.jobs.get(&id).is_some_and(crate::machine::is_busy) {
            self.active.insert(id);
        }
        self.watch_attempt(id, now);
    }
}

/// The least that a job holds against its quota, whatever nodes it gets.
pub(crate) fn least_held(spec: &JobSpec) -> Held {
    let n = spec.nodes;
    Held {
        nodes: if spec.whole() { n } else { 0 },
        gpus: spec.gpus_per_node.saturating_mul(n),
        cores: spec.cores_per_node.saturating_mul(n),
    }
}
