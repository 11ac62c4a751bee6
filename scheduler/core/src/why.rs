//! Why a job is where it is, and what would let it go on.

use crate::event::Now;
use crate::job::{Job, JobState, RankState};
use crate::machine::Core;
use crate::node::NodeState;
use crate::place::Verdict;
use firefly_types::JobId;

/// Nodes that an explanation names before it only counts them.
const NODES_NAMED: usize = 8;

impl Core {
    /// Sentences for people, the most important first; empty if there is no such job.
    pub fn why(&self, id: JobId, now: Now) -> Vec<String> {
        let Some(job) = self.jobs.get(&id) else { return Vec::new() };
        let mut lines = Vec::new();
        match job.state {
            JobState::Pending => self.why_pending(job, now, &mut lines),
            JobState::Starting => {
                lines.push(format!("{id} is placed; its ranks are being prepared"));
                for slot in job.attempt().into_iter().flat_map(|a| &a.ranks) {
                    if slot.state == RankState::Assigned {
                        lines.push(format!("rank {} on {} is not ready yet", slot.rank.0, slot.node));
                    }
                }
            }
            JobState::Running => match job.attempt().filter(|a| !a.end_reason.is_empty()) {
                Some(a) => lines.push(format!(
                    "attempt {} of {id} is being ended: {}; then it is tried again or given up",
                    a.epoch.0, a.end_reason
                )),
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
        lines
    }

    fn why_pending(&self, job: &Job, now: Now, lines: &mut Vec<String>) {
        if !job.reason.is_empty() {
            lines.push(job.reason.clone());
        }
        for slot in job.unproven() {
            let left = self
                .nodes
                .get(&slot.node)
                .map_or(0, |n| self.policy.fence().saturating_sub(n.silent(now.mono)).as_secs());
            lines.push(format!(
                "rank {} of attempt {} may still run on {}, which is silent: the next attempt starts when {} is back, or in {left} s",
                slot.rank.0, job.epoch().0, slot.node, slot.node
            ));
        }
        if job.not_before > now.mono {
            lines.push(format!(
                "restarts in {} s: {} attempts in a row ended early, and the delay grows with each",
                job.not_before.since(now.mono).as_secs() + 1,
                job.unstable
            ));
        }
        match self.verdict(job, now) {
            Verdict::NotYet => return,
            Verdict::Fits(_) => {
                if let Some(ahead) = self.ahead_of(job, now) {
                    lines.push(format!(
                        "it would fit, but {} (priority {}) is ahead of it and waits for nodes: jobs go by priority, then by age",
                        ahead.id, ahead.spec.priority
                    ));
                } else {
                    lines.push("it fits and is about to start".into());
                }
                return;
            }
            Verdict::Full | Verdict::TooLarge => {}
        }
        let (want, each) = (job.spec.nodes, job.spec.ranks_per_node);
        let ready: Vec<_> =
            self.nodes.values().filter(|n| n.state(now.mono, &self.policy) == NodeState::Ready).collect();
        let large = ready.iter().filter(|n| n.record.info.slots >= each).count();
        let free = ready.iter().filter(|n| n.free() >= each).count();
        lines.push(format!(
            "needs {want} nodes with {each} free slots each; {} are ready, {large} are large enough, {free} have the slots free",
            ready.len()
        ));
        for node in self.nodes.values().take(NODES_NAMED) {
            let id = node.record.id;
            lines.push(match node.state(now.mono, &self.policy) {
                NodeState::Cordoned => {
                    format!("{id} is cordoned: {}", node.record.cordon.as_deref().unwrap_or_default())
                }
                NodeState::Lost => format!("{id} has been silent for {} s", node.silent(now.mono).as_secs()),
                NodeState::Ready => {
                    let jobs: std::collections::BTreeSet<String> =
                        node.ranks.iter().map(|(job, _)| job.to_string()).collect();
                    let jobs: Vec<String> = jobs.into_iter().collect();
                    let by = if jobs.is_empty() {
                        String::new()
                    } else {
                        format!(" (taken by {})", jobs.join(" "))
                    };
                    format!("{id}: {} of {} slots free{by}", node.free(), node.record.info.slots)
                }
            });
        }
        if self.nodes.len() > NODES_NAMED {
            lines.push(format!("… and {} more nodes", self.nodes.len() - NODES_NAMED));
        }
        if let Some(ahead) = self.ahead_of(job, now) {
            lines.push(format!("{} (priority {}) is ahead of it", ahead.id, ahead.spec.priority));
        }
        lines.push(match self.verdict(job, now) {
            Verdict::Full => "it starts when enough of these slots are free".into(),
            _ if large < want as usize => format!(
                "it cannot start on the nodes that are ready now: {} more with at least {each} slots are needed",
                want as usize - large
            ),
            _ => "it starts with the next free slots".into(),
        });
    }

    /// The first job in the queue before this one that holds it back.
    fn ahead_of(&self, job: &Job, now: Now) -> Option<&Job> {
        self.pending
            .iter()
            .take_while(|(_, id)| *id != job.id)
            .filter_map(|(_, id)| self.jobs.get(id))
            .find(|j| self.verdict(j, now) == Verdict::Full)
    }
}
