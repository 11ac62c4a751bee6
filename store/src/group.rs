//! The raft group as a value: proposals in, verdicts out, one fdatasync per batch. A group of one
//! today; the messages that a larger group would send leave [`Group::step`]'s loop at the marked
//! place.

use crate::StoreError;
use crate::log::disk::Disk;
use crate::log::{Recovered, SegmentLog};
use crate::machine::{Applied, Machine};
use raft::eraftpb::{ConfState, Entry, EntryType, HardState, Snapshot};
use raft::{Config, GetEntriesContext, RaftState, RawNode, Storage, StorageError};
use std::collections::VecDeque;
use std::sync::Arc;

/// The only member. Growing the group is a membership change, not a new format.
const NODE: u64 = 1;

/// What raft reads of the log: the entries after the last checkpoint, kept in memory.
#[derive(Default)]
struct LogView {
    /// Index and term of the entry before the first one in memory.
    compacted: (u64, u64),
    entries: VecDeque<Entry>,
    hard_state: HardState,
}

impl LogView {
    fn last_index(&self) -> u64 {
        self.entries.back().map_or(self.compacted.0, |e| e.index)
    }

    fn append(&mut self, entries: &[Entry]) {
        if let Some(first) = entries.first() {
            let keep = first.index.saturating_sub(self.compacted.0 + 1) as usize;
            self.entries.truncate(keep);
            self.entries.extend(entries.iter().cloned());
        }
    }

    fn compact(&mut self, index: u64, term: u64) {
        while self.entries.front().is_some_and(|e| e.index <= index) {
            self.entries.pop_front();
        }
        self.compacted = (index, term);
    }
}

impl Storage for LogView {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), ConfState::from((vec![NODE], vec![]))))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        let Some(skip) = low.checked_sub(self.compacted.0 + 1) else {
            return Err(StorageError::Compacted.into());
        };
        let mut entries: Vec<Entry> =
            self.entries.iter().skip(skip as usize).take((high - low) as usize).cloned().collect();
        raft::util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.compacted.0 {
            return Ok(self.compacted.1);
        }
        let at =
            index.checked_sub(self.compacted.0 + 1).ok_or(raft::Error::Store(StorageError::Compacted))?;
        self.entries.get(at as usize).map(|e| e.term).ok_or(raft::Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.compacted.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(LogView::last_index(self))
    }

    fn snapshot(&self, _: u64, _: u64) -> raft::Result<Snapshot> {
        // Nobody to send one to in a group of one.
        Err(StorageError::SnapshotTemporarilyUnavailable.into())
    }
}

/// What happened to one proposal, in proposal order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Durable and applied as this version.
    Committed(u64),
    /// Lost against a concurrent transaction.
    Conflict,
}

pub(crate) struct Group {
    raft: RawNode<LogView>,
    log: SegmentLog,
    machine: Machine,
    checkpoint_bytes: u64,
    torn_bytes: u64,
}

impl Group {
    /// Opens log and machine, replays, and becomes leader: on return every acknowledged
    /// transaction is applied.
    pub(crate) fn open(
        disk: Arc<dyn Disk>,
        cache_bytes: usize,
        checkpoint_bytes: u64,
        new_store_id: u64,
    ) -> Result<Self, StoreError> {
        let mut machine = Machine::open(&*disk, cache_bytes, new_store_id)?;
        let (log, recovered) = SegmentLog::open(disk, machine.store_id, machine.first_segment)?;
        let torn_bytes = recovered.torn_bytes;
        if torn_bytes > 0 {
            tracing::info!(torn_bytes, "cut an unfinished, never acknowledged batch off the log");
        }
        if machine.first_segment == 0 {
            // From now on an absent log is noticed.
            machine.checkpoint(log.first_needed_after(0))?;
        }
        let view = log_view(recovered, &machine)?;
        let config = Config {
            max_size_per_msg: 1 << 20,
            applied: machine.position.applied,
            // Batches are limited by the driver; replay must not build one giant batch either.
            max_committed_size_per_ready: 16 << 20,
            ..Config::new(NODE)
        };
        let raft = RawNode::new(&config, view, &logger())
            .map_err(|e| StoreError::Corrupt(format!("raft refuses the recovered state: {e}")))?;
        let mut group = Self { raft, log, machine, checkpoint_bytes, torn_bytes };
        group.raft.campaign().map_err(|e| StoreError::Failed(format!("raft: {e}")))?;
        group.step(&[])?;
        if group.raft.raft.state != raft::StateRole::Leader {
            return Err(StoreError::Failed("a group of one did not elect itself".into()));
        }
        Ok(group)
    }

    pub(crate) fn machine(&self) -> &Machine {
        &self.machine
    }

    pub(crate) fn syncs(&self) -> u64 {
        self.log.syncs()
    }

    pub(crate) fn torn_bytes(&self) -> u64 {
        self.torn_bytes
    }

    /// Proposes a batch, makes it durable with one fdatasync and applies it.
    pub(crate) fn step(&mut self, proposals: &[Vec<u8>]) -> Result<Vec<Verdict>, StoreError> {
        let failed = |e: raft::Error| StoreError::Failed(format!("raft: {e}"));
        for proposal in proposals {
            self.raft.propose(Vec::new(), proposal.clone()).map_err(failed)?;
        }
        let mut verdicts = Vec::with_capacity(proposals.len());
        while self.raft.has_ready() {
            let mut ready = self.raft.ready();
            // A larger group sends `ready.take_messages()` here, before its own sync.
            self.apply(ready.take_committed_entries(), &mut verdicts)?;
            if ready.must_sync() {
                self.log.append(ready.entries(), ready.hs())?;
            }
            let view = self.raft.mut_store();
            view.append(ready.entries());
            if let Some(state) = ready.hs() {
                view.hard_state = state.clone();
            }
            let mut light = self.raft.advance(ready);
            if let Some(commit) = light.commit_index() {
                self.raft.mut_store().hard_state.commit = commit;
            }
            self.apply(light.take_committed_entries(), &mut verdicts)?;
            self.raft.advance_apply();
        }
        if self.log.segment_bytes() >= self.checkpoint_bytes {
            self.checkpoint()?;
        }
        Ok(verdicts)
    }

    fn apply(&mut self, entries: Vec<Entry>, verdicts: &mut Vec<Verdict>) -> Result<(), StoreError> {
        if let Some(e) = entries.iter().find(|e| e.get_entry_type() != EntryType::EntryNormal) {
            return Err(StoreError::Corrupt(format!(
                "log entry {} changes the membership, which this release cannot",
                e.index
            )));
        }
        let batch: Vec<(u64, u64, &[u8])> =
            entries.iter().map(|e| (e.index, e.term, e.data.as_slice())).collect();
        for (outcome, entry) in self.machine.apply(&batch)?.into_iter().zip(&entries) {
            match outcome {
                Applied::Committed => verdicts.push(Verdict::Committed(entry.index)),
                Applied::Conflict => verdicts.push(Verdict::Conflict),
                Applied::Nothing => {}
            }
        }
        Ok(())
    }

    /// Makes the machine durable and lets go of the log before it. The order matters: the new
    /// segment exists before the checkpoint names it, and the old ones go after the checkpoint is
    /// durable.
    pub(crate) fn checkpoint(&mut self) -> Result<(), StoreError> {
        self.log.rotate()?;
        let position = self.machine.position;
        let first_needed = self.log.first_needed_after(position.applied);
        self.machine.checkpoint(first_needed)?;
        self.log.remove_before(first_needed)?;
        self.raft.mut_store().compact(position.applied, position.term);
        Ok(())
    }
}

fn log_view(recovered: Recovered, machine: &Machine) -> Result<LogView, StoreError> {
    let position = machine.position;
    let mut entries: VecDeque<Entry> = recovered.entries.into();
    while entries.front().is_some_and(|e| e.index <= position.applied) {
        entries.pop_front();
    }
    if let Some(first) = entries.front()
        && first.index != position.applied + 1
    {
        return Err(StoreError::Corrupt(format!(
            "the state machine stands at entry {}, the log goes on only at {}",
            position.applied, first.index
        )));
    }
    let mut hard_state = recovered.hard_state;
    hard_state.commit = hard_state.commit.max(position.applied);
    hard_state.term = hard_state.term.max(position.term);
    let view = LogView { compacted: (position.applied, position.term), entries, hard_state };
    if view.hard_state.commit > view.last_index() {
        return Err(StoreError::Corrupt(format!(
            "entries up to {} were committed, the log ends at {}",
            view.hard_state.commit,
            view.last_index()
        )));
    }
    Ok(view)
}

/// raft logs through slog; its lines go to `tracing`.
fn logger() -> slog::Logger {
    struct ToTracing;
    impl slog::Drain for ToTracing {
        type Ok = ();
        type Err = slog::Never;

        fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
            match record.level() {
                slog::Level::Critical | slog::Level::Error => {
                    tracing::error!(target: "raft", "{}", record.msg())
                }
                slog::Level::Warning => tracing::warn!(target: "raft", "{}", record.msg()),
                _ => tracing::debug!(target: "raft", "{}", record.msg()),
            }
            Ok(())
        }
    }
    slog::Logger::root(ToTracing, slog::o!())
}
