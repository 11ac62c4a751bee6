//! What must hold between any two events.

use crate::job::{Job, JobState, RankState, Stage};
use crate::machine::Core;
use firefly_types::{JobId, NodeId, Rank};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

impl Core {
    /// The first invariant that does not hold, in words. For tests and debug builds.
    pub fn check(&self) -> Result<(), String> {
        let mut taken: BTreeMap<NodeId, BTreeSet<(JobId, Rank)>> = BTreeMap::new();
        for job in self.jobs.values() {
            self.check_job(job).map_err(|what| format!("{}: {what}", job.id))?;
            for slot in job.attempt().into_iter().flat_map(|a| &a.ranks).filter(|s| s.state.occupies()) {
                taken.entry(slot.node).or_default().insert((job.id, slot.rank));
            }
        }
        for (id, node) in &self.nodes {
            let expected = taken.remove(id).unwrap_or_default();
            if node.ranks != expected {
                return Err(format!("{id}: slots are taken by {:?}, but {expected:?} are there", node.ranks));
            }
            // Strays came without being asked; they may exceed the slots, our own ranks may not.
            if node.ranks.len() > node.record.info.slots as usize && node.record.info.slots > 0 {
                return Err(format!("{id}: {} ranks in {} slots", node.ranks.len(), node.record.info.slots));
            }
        }
        match taken.into_iter().next() {
            Some((id, ranks)) => Err(format!("{id} is unknown but holds {ranks:?}")),
            None => Ok(()),
        }
    }

    fn check_job(&self, job: &Job) -> Result<(), String> {
        let pending = self.pending.contains(&(Reverse(job.spec.priority), job.id));
        if pending != (job.state == JobState::Pending) {
            return Err(format!("{:?}, in the queue: {pending}", job.state));
        }
        if self.finished.contains(&job.id) != job.state.is_final() {
            return Err(format!("{:?}, listed as finished: {}", job.state, !job.state.is_final()));
        }
        let stage = job.attempt().map(|a| a.stage);
        let agree = match job.state {
            JobState::Pending => matches!(stage, None | Some(Stage::Ended)),
            JobState::Starting => matches!(stage, Some(Stage::Preparing | Stage::Ending)),
            JobState::Running => matches!(stage, Some(Stage::Running | Stage::Ending)),
            JobState::Stopping => stage == Some(Stage::Ending),
            _ => matches!(stage, None | Some(Stage::Ended)),
        };
        if !agree {
            return Err(format!("the job is {:?}, its attempt {stage:?}", job.state));
        }
        let mut last = None;
        for attempt in &job.attempts {
            if last.is_some_and(|l| attempt.epoch.0 != l + 1) {
                return Err(format!("attempt {} follows attempt {last:?}", attempt.epoch.0));
            }
            last = Some(attempt.epoch.0);
            if attempt.epoch != job.epoch() && attempt.ranks.is_empty() {
                continue;
            }
            let world = job.spec.world_size() as usize;
            let nodes: BTreeSet<NodeId> = attempt.ranks.iter().map(|r| r.node).collect();
            if attempt.ranks.len() != world || nodes.len() != job.spec.nodes as usize {
                return Err(format!(
                    "attempt {} has {} of {world} ranks on {} of {} nodes",
                    attempt.epoch.0,
                    attempt.ranks.len(),
                    nodes.len(),
                    job.spec.nodes
                ));
            }
            if attempt.ranks.iter().enumerate().any(|(i, r)| r.rank.0 as usize != i) {
                return Err(format!("attempt {}: ranks are not numbered 0..{world}", attempt.epoch.0));
            }
        }
        let newest = job.epoch();
        let over = |s: &RankState| matches!(s, RankState::Exited(_) | RankState::Fenced);
        for attempt in &job.attempts {
            if attempt.epoch != newest && !attempt.ranks.iter().all(|r| over(&r.state)) {
                return Err(format!("attempt {} is not over, but {newest} exists", attempt.epoch.0));
            }
            if attempt.stage == Stage::Ended && !attempt.is_over() {
                return Err(format!("attempt {} has ended with live ranks", attempt.epoch.0));
            }
            if attempt.stage == Stage::Running && attempt.ranks.iter().any(|r| r.state == RankState::Assigned)
            {
                return Err(format!("attempt {} runs with ranks that are not ready", attempt.epoch.0));
            }
        }
        if job.failures > job.spec.max_restarts {
            return Err(format!("{} restarts of {} allowed", job.failures, job.spec.max_restarts));
        }
        Ok(())
    }
}
