//! Gang placement.

use crate::event::{Now, Order, RankKey};
use crate::job::{ATTEMPTS_KEPT, Attempt, Job, JobState, RANKS_KEPT, RankSlot, RankState, Stage};
use crate::machine::{Core, Out, planted};
use firefly_types::{AttemptEpoch, JobId, NodeId, Rank};

/// Why a pending job is not placed now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Waits for the delay of a restart or for the proof that its last attempt is over: holds
    /// back nobody.
    NotYet,
    /// On these nodes, in the order of ranks.
    Fits(Vec<NodeId>),
    /// Would fit if these nodes were empty: holds back those behind it.
    Full,
    /// Could not fit even on empty nodes, of those that are up: holds back nobody.
    TooLarge,
}

impl Core {
    /// Serves the waiting jobs in order.
    pub(crate) fn place(&mut self, now: Now, out: &mut Out) {
        let waiting: Vec<JobId> = self.pending.iter().map(|(_, id)| *id).collect();
        for id in waiting {
            let Some(job) = self.jobs.get(&id) else { continue };
            match self.verdict(job, now) {
                Verdict::Fits(nodes) => self.start(id, &nodes, now, out),
                Verdict::Full => break,
                Verdict::NotYet | Verdict::TooLarge => {}
            }
        }
    }

    pub(crate) fn verdict(&self, job: &Job, now: Now) -> Verdict {
        let fenced = planted!(self, FenceIgnored) || job.unproven().next().is_none();
        if job.not_before > now.mono || !fenced {
            return Verdict::NotYet;
        }
        let (want, each) = (job.spec.nodes as usize, job.spec.ranks_per_node);
        let up =
            || self.nodes.values().filter(|n| n.record.cordon.is_none() && n.is_up(now.mono, &self.policy));
        let overcommit = planted!(self, SlotsOvercommitted);
        // Fullest first: what stays free stays free in one piece for the next gang.
        let mut fitting: Vec<(u32, NodeId)> =
            up().filter(|n| n.free() >= each || overcommit).map(|n| (n.free(), n.record.id)).collect();
        fitting.sort_unstable();
        if planted!(self, PartialGang) && !fitting.is_empty() {
            fitting.truncate(want);
        } else if fitting.len() < want {
            let could = up().filter(|n| n.record.info.slots >= each).count();
            return if could >= want { Verdict::Full } else { Verdict::TooLarge };
        }
        let mut nodes: Vec<NodeId> = fitting.into_iter().take(want).map(|(_, id)| id).collect();
        // Ranks are ordered by place.
        nodes.sort_unstable();
        Verdict::Fits(nodes)
    }

    fn start(&mut self, id: JobId, nodes: &[NodeId], now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let epoch = AttemptEpoch(job.epoch().0 + 1);
        let each = job.spec.ranks_per_node;
        let mut ranks = Vec::with_capacity(nodes.len() * each as usize);
        for node in nodes {
            for _ in 0..each {
                let rank = Rank(u32::try_from(ranks.len()).unwrap_or(u32::MAX));
                ranks.push(RankSlot { rank, node: *node, state: RankState::Assigned, pid: 0 });
                if let Some(node) = self.nodes.get_mut(node) {
                    node.ranks.insert((id, rank));
                }
            }
        }
        let list: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
        out.notes.push((id, epoch, format!("attempt {} starts on {}", epoch.0, list.join(" "))));
        if job.attempts.len() >= ATTEMPTS_KEPT {
            job.attempts.remove(0);
        }
        // Of a large job, only the newest attempt keeps its ranks: bounds the record.
        for old in job.attempts.iter_mut().filter(|a| a.ranks.len() > RANKS_KEPT) {
            old.ranks.clear();
        }
        job.attempts.push(Attempt {
            epoch,
            stage: Stage::Preparing,
            started_unix_ms: now.unix_ms,
            running_unix_ms: 0,
            ended_unix_ms: 0,
            cause: None,
            end_reason: String::new(),
            master_port: 0,
            ranks,
            since: now.mono,
        });
        job.state = JobState::Starting;
        job.reason.clear();
        job.version += 1;
        self.pending.remove(&(std::cmp::Reverse(job.spec.priority), id));
        self.active.insert(id);
        out.dirty_jobs.insert(id);
        // Or else a crash now would bring back ranks that have given up the slots just taken.
        out.dirty_jobs.append(&mut self.unsaved);
        let count = self.jobs.get(&id).and_then(|j| j.attempt()).map_or(0, |a| a.ranks.len());
        for rank in 0..count {
            let key = RankKey { job: id, epoch, rank: Rank(u32::try_from(rank).unwrap_or(u32::MAX)) };
            let node = self.jobs.get(&id).and_then(|j| j.attempt()).map(|a| a.ranks[rank].node);
            out.orders.extend(node.zip(self.prepare_order(key)));
        }
    }

    /// The order that prepares a rank of a newest attempt.
    pub(crate) fn prepare_order(&self, key: RankKey) -> Option<Order> {
        let each = self.jobs.get(&key.job)?.spec.ranks_per_node.max(1);
        Some(Order::Prepare { key, node_rank: key.rank.0 / each, local_rank: key.rank.0 % each })
    }
}
