//! What nodes say about ranks.

use crate::event::{Now, Order, RankKey, RankReport, Reported};
use crate::job::{DETAIL_BYTES, EndCause, Exit, RankState, Stage};
use crate::machine::{Core, Out, planted};
use firefly_types::NodeId;
use std::time::Duration;

impl Core {
    /// Takes one report. `resync`: it is part of a hello, so orders that it shows to be
    /// outstanding may have been lost and are given again.
    pub(crate) fn report(
        &mut self,
        from: NodeId,
        report: &RankReport,
        resync: bool,
        now: Now,
        out: &mut Out,
    ) {
        let key = report.key;
        let stale_ok = planted!(self, StaleEpochAccepted);
        let Some(job) = self.jobs.get_mut(&key.job) else { return self.stray(from, report, out) };
        let grace = Duration::from_millis(job.spec.grace_ms.into());
        let Some(attempt) = job.attempts.last_mut() else { return self.stray(from, report, out) };
        if attempt.epoch != key.epoch && !stale_ok {
            return self.stray(from, report, out);
        }
        let (stage, master, master_port) = (attempt.stage, attempt.master(), attempt.master_port);
        let Some(slot) = attempt.ranks.get_mut(key.rank.0 as usize).filter(|s| s.node == from) else {
            return self.stray(from, report, out);
        };
        if report.pid != 0 {
            slot.pid = report.pid;
        }
        let was = slot.state.clone();
        match (&was, &report.state) {
            (RankState::Exited(_) | RankState::Fenced, Reported::Exited(_)) => {
                self.stray_gone(from, key);
                if stage == Stage::Ended {
                    out.orders.push((from, Order::Forget { key }));
                }
            }
            // It was declared over and is not: it must not run on. As a stray it takes a slot
            // again until it is gone.
            (RankState::Exited(_) | RankState::Fenced, _) => self.stray(from, report, out),
            (RankState::Lost, Reported::Exited(_)) => {
                self.set_state(key, RankState::Fenced, now, out);
                out.orders.push((from, Order::Forget { key }));
            }
            (RankState::Lost, _) => {
                out.orders.push((from, Order::Stop { key, grace: Duration::ZERO }));
            }
            (_, Reported::Exited(exit)) => self.exited(key, exit.clone(), now, out),
            (RankState::Assigned | RankState::Held, Reported::Prepared) => {
                if stage == Stage::Preparing {
                    if key.rank.0 == 0 && report.master_port != 0 {
                        attempt.master_port = report.master_port;
                    }
                    attempt.set(key.rank, RankState::Held);
                    job.version += 1;
                    self.open_barrier(key, now, out);
                } else if matches!(stage, Stage::Running | Stage::Suspending) && resync {
                    out.orders.push((from, Order::Start { key, master, master_port }));
                    if stage == Stage::Suspending {
                        out.orders.extend(self.suspend_order(key).map(|o| (from, o)));
                    }
                } else if stage == Stage::Ending {
                    out.orders.push((from, Order::Stop { key, grace }));
                }
            }
            (_, Reported::SuspendReceived | Reported::Saved(_)) => {
                self.acknowledged(key, &report.state, now, out);
            }
            (RankState::Assigned | RankState::Held, Reported::Running) => {
                if stage == Stage::Preparing {
                    let reason = format!("rank {} on {from} runs although it was not started", key.rank.0);
                    attempt.set(key.rank, RankState::Running);
                    self.begin_end(key.job, EndCause::RankFailed, reason, now, out);
                } else {
                    attempt.set(key.rank, RankState::Running);
                    job.version += 1;
                    self.ask_again(key, from, stage, grace, resync, out);
                }
            }
            (RankState::Running, _) => self.ask_again(key, from, stage, grace, resync, out),
        }
    }

    /// Orders to a running rank may have been lost with the connection.
    fn ask_again(
        &self,
        key: RankKey,
        from: NodeId,
        stage: Stage,
        grace: Duration,
        resync: bool,
        out: &mut Out,
    ) {
        match stage {
            Stage::Ending if resync => out.orders.push((from, Order::Stop { key, grace })),
            Stage::Suspending if resync => out.orders.extend(self.suspend_order(key).map(|o| (from, o))),
            _ => {}
        }
    }

    /// User code has seen the request to give way, or has saved.
    fn acknowledged(&mut self, key: RankKey, what: &Reported, now: Now, out: &mut Out) {
        let Some(attempt) = self.jobs.get_mut(&key.job).and_then(|j| j.attempts.last_mut()) else { return };
        if let Some(suspend) = attempt.suspend.as_mut().filter(|s| !s.received) {
            suspend.received = true;
            out.dirty_jobs.insert(key.job);
        }
        if let Reported::Saved(step) = what {
            self.progress(key.job, key.epoch, *step, true, now, out);
        }
    }

    /// A rank that no attempt of ours has at this node: an older attempt, or a job long gone.
    fn stray(&mut self, from: NodeId, report: &RankReport, out: &mut Out) {
        let key = report.key;
        let Some(node) = self.nodes.get_mut(&from) else { return };
        if matches!(report.state, Reported::Exited(_)) {
            self.stray_gone(from, key);
            out.orders.push((from, Order::Forget { key }));
        } else {
            node.strays.insert(key);
            self.reindex(from);
            out.orders.push((from, Order::Stop { key, grace: Duration::ZERO }));
        }
    }

    fn stray_gone(&mut self, from: NodeId, key: RankKey) {
        if self.nodes.get_mut(&from).is_some_and(|n| n.strays.remove(&key)) {
            self.reindex(from);
        }
    }

    /// A rank of ours is not in its node's inventory.
    pub(crate) fn absent(&mut self, from: NodeId, key: RankKey, now: Now, out: &mut Out) {
        let Some(job) = self.jobs.get(&key.job) else { return };
        let Some(attempt) = job.attempt() else { return };
        let (stage, Some(slot)) = (attempt.stage, attempt.ranks.get(key.rank.0 as usize)) else { return };
        match slot.state {
            RankState::Assigned if stage == Stage::Preparing => {
                let order = self.prepare_order(key);
                out.orders.extend(order.map(|o| (from, o)));
            }
            RankState::Lost => self.set_state(key, RankState::Fenced, now, out),
            RankState::Assigned | RankState::Held | RankState::Running => {
                let detail = format!("{from} came back without it (the node was restarted?)");
                let exit = Exit { detail, ..Exit::default() };
                let reason = format!("rank {} on {from} {exit}", key.rank.0);
                self.set_state(key, RankState::Exited(exit), now, out);
                self.blame(from, key.job, &reason, now, out);
                self.begin_end(key.job, EndCause::NodeLost, reason, now, out);
            }
            RankState::Exited(_) | RankState::Fenced => {}
        }
    }

    /// A live rank is over.
    fn exited(&mut self, key: RankKey, mut exit: Exit, now: Now, out: &mut Out) {
        if exit.detail.len() > DETAIL_BYTES {
            let end = (0..=DETAIL_BYTES).rev().find(|i| exit.detail.is_char_boundary(*i)).unwrap_or(0);
            exit.detail.truncate(end);
        }
        let Some((stage, from)) = self.jobs.get(&key.job).and_then(|job| {
            let attempt = job.attempt()?;
            Some((attempt.stage, attempt.ranks.get(key.rank.0 as usize)?.node))
        }) else {
            return;
        };
        let success = exit.code == Some(0) && exit.signal.is_none();
        let reason = match stage {
            Stage::Preparing => format!("rank {} on {from} could not be prepared: {exit}", key.rank.0),
            _ => format!("rank {} on {from} {exit}", key.rank.0),
        };
        self.set_state(key, RankState::Exited(exit.clone()), now, out);
        match stage {
            Stage::Suspending => self.exited_suspending(key.job, &exit, reason, now, out),
            Stage::Preparing => self.begin_end(key.job, EndCause::RankFailed, reason, now, out),
            Stage::Running if !success => self.begin_end(key.job, EndCause::RankFailed, reason, now, out),
            Stage::Running => {
                if self.jobs.get(&key.job).and_then(|j| j.attempt()).is_some_and(|a| a.is_over()) {
                    self.begin_end(
                        key.job,
                        EndCause::Completed,
                        "every rank exited with code 0".into(),
                        now,
                        out,
                    );
                }
            }
            Stage::Ending => self.end_if_over(key.job, now, out),
            Stage::Ended => {}
        }
    }

    /// Starts all ranks, once all are held and the port is known.
    fn open_barrier(&mut self, key: RankKey, now: Now, out: &mut Out) {
        let early = planted!(self, BarrierOpensEarly);
        let Some(job) = self.jobs.get_mut(&key.job) else { return };
        let Some(attempt) = job.attempts.last_mut() else { return };
        let all_held = attempt.tally.assigned == 0;
        if attempt.stage != Stage::Preparing || attempt.master_port == 0 || !(all_held || early) {
            return;
        }
        attempt.stage = Stage::Running;
        attempt.since = now.mono;
        attempt.running_since = now.mono;
        attempt.saved_at = now.mono;
        attempt.progress_at = now.mono;
        attempt.running_unix_ms = now.unix_ms;
        let startup = now.unix_ms.saturating_sub(attempt.started_unix_ms);
        job.state = crate::job::JobState::Running;
        job.reason.clear();
        job.version += 1;
        let (master, master_port, epoch) = (attempt.master(), attempt.master_port, attempt.epoch);
        for slot in &attempt.ranks {
            let key = RankKey { job: job.id, epoch, rank: slot.rank };
            out.orders.push((slot.node, Order::Start { key, master, master_port }));
        }
        let waited = now.unix_ms.saturating_sub(attempt.started_unix_ms);
        let text = format!(
            "attempt {} runs: all {} ranks were ready after {waited} ms",
            epoch.0,
            attempt.ranks.len()
        );
        if let Some(half) = job.half_cost_ms.take() {
            // A suspension costs the way out and the way back.
            job.measure_suspend_cost(half.saturating_add(startup));
        }
        let id = job.id;
        out.notes.push((id, epoch, text));
        out.dirty_jobs.insert(id);
        self.watch_attempt(id, now);
    }
}
