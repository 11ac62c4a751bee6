//! One storage node with one target: the real machine over the real engine over a disk in memory.

use super::Bytes;
use super::manager::Heartbeat;
use firefly_types::{ChainVersion, ClusterId, Nanos, TargetId};
use fs3_core::chain::{Chain, LocalState, PublicState, Report};
use fs3_core::target::{ChainView, Event, Handle, Target, TargetOptions, Tenure, Verdict};
use fs3_storage::engine::{Core, EngineOptions, Header, MemDisk, is_empty};
use std::collections::BTreeMap;

/// Who waits for an answer of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    Node { node: usize, incarnation: u64, call: u64 },
    Client { client: usize, attempt: u64 },
}

/// What an answer to a call of this node means to its machine.
#[derive(Clone, Debug)]
pub(super) enum Purpose {
    Forward { chunk: firefly_types::ChunkId, stamp: fs3_core::target::Stamp },
    Token { chunk: firefly_types::ChunkId, stamp: fs3_core::target::Stamp },
    Resolve { chunk: firefly_types::ChunkId, touch: u64 },
    Sync { id: u64 },
}

pub(super) struct Open {
    pub(super) target: Target<Bytes>,
    pub(super) engine: Core<Bytes>,
}

pub(super) struct Node {
    pub(super) id: usize,
    pub(super) up: bool,
    pub(super) incarnation: u64,
    pub(super) disk: MemDisk,
    tenure: Tenure,
    pub(super) open: Option<Open>,
    /// Opened since the observer last looked.
    pub(super) opened: bool,
    /// Emptied since the observer last looked.
    pub(super) wiped: bool,
    chain_seen: ChainVersion,
    /// Newest of what the manager has told.
    told: u64,
    /// It has been asked to stop serving and has.
    retired: bool,
    pub(super) lease_until: Nanos,
    pub(super) synced_at: ChainVersion,
    pub(super) offline: Option<String>,
    /// Changes whenever what was in memory is gone: events of before are void.
    pub(super) epoch: u64,
    pub(super) calls: BTreeMap<u64, Purpose>,
    pub(super) callers: BTreeMap<Handle, Caller>,
    pub(super) counter: u64,
    lying_disk: bool,
}

/// Small, so that checkpoints, evictions and laps of the log happen often.
const ENGINE: EngineOptions = EngineOptions {
    capacity_bytes: u64::MAX,
    grow_bytes: 512 << 10,
    log_bytes: 64 << 10,
    cache_bytes: 8 << 10,
    group_bytes: 1 << 20,
    plant: None,
};

impl Node {
    pub(super) fn new(id: usize, lying_disk: bool) -> Self {
        let disk = MemDisk::default();
        disk.lie_about_sync(lying_disk);
        Self {
            id,
            up: true,
            incarnation: 1,
            disk,
            tenure: Tenure::default(),
            open: None,
            opened: false,
            wiped: false,
            chain_seen: ChainVersion(0),
            told: 0,
            retired: false,
            lease_until: Nanos::ZERO,
            synced_at: ChainVersion(0),
            offline: None,
            epoch: 0,
            calls: BTreeMap::new(),
            callers: BTreeMap::new(),
            counter: 0,
            lying_disk,
        }
    }

    /// Power cut: everything in memory is gone, the disk keeps what it must and some more.
    pub(super) fn crash(&mut self, random: impl FnMut(u64) -> u64) {
        self.up = false;
        self.forget();
        self.disk.crash(random);
    }

    fn forget(&mut self) {
        self.open = None;
        self.calls.clear();
        self.callers.clear();
        self.epoch += 1;
        self.synced_at = ChainVersion(0);
        self.offline = None;
    }

    pub(super) fn restart(&mut self) {
        self.up = true;
        self.incarnation += 1;
        self.tenure = Tenure::default();
        self.chain_seen = ChainVersion(0);
        self.told = 0;
        self.retired = false;
        self.lease_until = Nanos::ZERO;
    }

    fn wipe(&mut self) {
        self.forget();
        self.disk = MemDisk::default();
        self.disk.lie_about_sync(self.lying_disk);
        self.wiped = true;
    }

    fn open(&mut self, options: TargetOptions) -> Result<(), String> {
        let header = Header { cluster: ClusterId(1), target: TargetId(self.id as u32) };
        let (engine, recovered) = Core::open(&self.disk, header, ENGINE).map_err(|e| e.to_string())?;
        let target = Target::new(TargetId(self.id as u32), self.incarnation, options, recovered);
        self.open = Some(Open { target, engine });
        self.opened = true;
        Ok(())
    }

    /// Takes in a chain: what the storage server's `node` module does. `told` orders what the
    /// manager says. `Err` if the disk cannot be opened, which only a lying disk explains.
    pub(super) fn apply(
        &mut self,
        chain: &Chain,
        retiring: Option<TargetId>,
        told: u64,
        options: TargetOptions,
    ) -> Result<Option<ChainView>, String> {
        let id = TargetId(self.id as u32);
        if told <= self.told {
            return Ok(None);
        }
        self.told = told;
        let Some(state) = chain.state_of(id) else {
            // Not, or no longer, a member: what it holds is of no use to anybody.
            self.wipe();
            (self.tenure, self.retired) = (Tenure::default(), false);
            return Ok(None);
        };
        if retiring == Some(id) {
            self.forget();
            self.retired = true;
            return Ok(None);
        }
        if std::mem::take(&mut self.retired) {
            // Wanted back: as at a start of the process.
            (self.tenure, self.chain_seen) = (Tenure::default(), ChainVersion(0));
        }
        if chain.version <= self.chain_seen {
            return Ok(None);
        }
        self.chain_seen = chain.version;
        let is_empty = is_empty(&self.disk).map_err(|e| e.to_string())?;
        match self.tenure.settle(state, chain.version, is_empty) {
            Verdict::Keep => {}
            Verdict::Open => self.open(options)?,
            Verdict::Empty => {
                self.wipe();
                self.open(options)?;
            }
            Verdict::Hold => self.forget(),
            Verdict::Lost => return Err("a complete target holds nothing".into()),
        }
        if !self.tenure.follows(chain.version) || self.open.is_none() {
            return Ok(None);
        }
        Ok(Some(ChainView {
            id: chain.id,
            version: chain.version,
            serving: chain.in_state(PublicState::Serving).collect(),
            syncing: chain.in_state(PublicState::Syncing).next(),
            min_write_replicas: 1,
        }))
    }

    pub(super) fn heartbeat(&self, now: Nanos) -> Heartbeat {
        let up_to_date = self.tenure.is_complete() || self.synced_at != ChainVersion(0);
        let local = match (&self.offline, up_to_date) {
            (Some(_), _) => LocalState::Offline,
            (None, true) => LocalState::UpToDate,
            (None, false) => LocalState::Online,
        };
        let report = match self.retired {
            true => Some(Report { local: LocalState::Offline, synced_at: ChainVersion(0) }),
            false => self.open.as_ref().map(|_| Report { local, synced_at: self.synced_at }),
        };
        Heartbeat { incarnation: self.incarnation, sent: now, report }
    }

    pub(super) fn step(&mut self, event: Event<Bytes>, now: Nanos) -> Vec<fs3_core::target::Action<Bytes>> {
        self.open.as_mut().map(|o| o.target.step(event, now)).unwrap_or_default()
    }

    pub(super) fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }
}
