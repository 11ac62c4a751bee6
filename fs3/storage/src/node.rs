//! One storage node: its targets, and what the routing table means for each of them.
//!
//! Whether a target keeps its data is decided by `fs3_core::target::Tenure`; this module opens and
//! empties folders accordingly.

use crate::StorageConfig;
use crate::engine::{Engine, EngineOptions, FileDisk, Header, Way};
use crate::host::{Host, Surroundings};
use crate::scrub::{self, Order, Progress};
use firefly_net::{BufPool, Client, Traffic};
use firefly_proto::mgmtd as pb;
use firefly_types::{ChainId, ChainVersion, ErrorKind, Nanos, TargetId, WireError, lock};
use fs3_core::chain::PublicState;
use fs3_core::target::{ChainView, Event, Mutation, Target, TargetOptions, Tenure, Verdict};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};

pub(crate) type TargetHost = Host<FileDisk>;

/// Payload memory of a node's server.
pub(crate) const POOL_BYTES: usize = 512 << 20;

struct Slot {
    chain: ChainId,
    /// Open and running, or why not.
    state: Result<Running, String>,
    tenure: Tenure,
    /// It was asked to stop serving, and has.
    retired: bool,
}

struct Running {
    host: Arc<TargetHost>,
    thread: std::thread::JoinHandle<()>,
}

pub(crate) struct Node {
    config: StorageConfig,
    pub(crate) incarnation: u64,
    client: Client,
    pool: BufPool,
    budget: Arc<Semaphore>,
    slots: Mutex<HashMap<TargetId, Slot>>,
    addresses: RwLock<HashMap<TargetId, String>>,
    routing_version: Mutex<u64>,
    lease_until: Mutex<Nanos>,
    pub(crate) wake_report: Notify,
    scrub_order: watch::Sender<Order>,
    pub(crate) scrubs: Mutex<HashMap<TargetId, Progress>>,
}

impl Surroundings for Node {
    fn address(&self, target: TargetId) -> Option<String> {
        self.addresses.read().unwrap_or_else(PoisonError::into_inner).get(&target).cloned()
    }

    fn client(&self) -> &Client {
        &self.client
    }

    fn report(&self) {
        self.wake_report.notify_one();
    }
}

impl Node {
    pub(crate) fn new(config: StorageConfig, incarnation: u64) -> Arc<Self> {
        let client = Client::of(config.identity.clone(), Traffic::Storage);
        Arc::new(Self {
            config,
            incarnation,
            client,
            pool: BufPool::new(POOL_BYTES),
            budget: Arc::new(Semaphore::new(POOL_BYTES / 2)),
            slots: Mutex::default(),
            addresses: RwLock::default(),
            routing_version: Mutex::new(0),
            lease_until: Mutex::default(),
            wake_report: Notify::new(),
            scrub_order: watch::Sender::default(),
            scrubs: Mutex::default(),
        })
    }

    pub(crate) fn pool(&self) -> &BufPool {
        &self.pool
    }

    pub(crate) fn admit_bytes(&self, bytes: usize) -> Result<OwnedSemaphorePermit, WireError> {
        let wanted = u32::try_from(bytes).unwrap_or(u32::MAX);
        Arc::clone(&self.budget).try_acquire_many_owned(wanted).map_err(|_| {
            WireError::new(
                ErrorKind::Unavailable,
                "this node has too many bytes of updates in flight: ask again",
            )
        })
    }

    pub(crate) fn host(&self, target: TargetId) -> Result<Arc<TargetHost>, WireError> {
        match lock(&self.slots).get(&target) {
            Some(Slot { state: Ok(running), .. }) => Ok(Arc::clone(&running.host)),
            Some(Slot { state: Err(reason), .. }) => Err(WireError::new(
                ErrorKind::Unavailable,
                format!("target {target} is offline: {reason}; ask another replica"),
            )),
            None => Err(WireError::new(
                ErrorKind::Stale,
                format!("target {target} is not on node {}: refresh the routing table", self.config.node_id),
            )),
        }
    }

    fn dir(&self, target: TargetId) -> PathBuf {
        self.config.data_dir.join(target.to_string())
    }

    pub(crate) fn routing_version(&self) -> u64 {
        *lock(&self.routing_version)
    }

    /// The lease of all targets: requests may be served until then.
    pub(crate) fn extend_lease(&self, until: Nanos) {
        *lock(&self.lease_until) = until;
        for host in self.hosts() {
            host.step(Event::Lease(until));
        }
    }

    fn hosts(&self) -> Vec<Arc<TargetHost>> {
        let slots = lock(&self.slots);
        slots.values().filter_map(|s| s.state.as_ref().ok()).map(|r| Arc::clone(&r.host)).collect()
    }

    /// Hosts of the targets that serve, in order of their ids.
    pub(crate) fn serving_hosts(&self) -> Vec<Arc<TargetHost>> {
        let mut hosts: Vec<_> = self.hosts().into_iter().filter(|h| h.serves()).collect();
        hosts.sort_by_key(|h| h.id());
        hosts
    }

    pub(crate) fn data_dir(&self) -> &Path {
        &self.config.data_dir
    }

    pub(crate) fn scrub_orders(&self) -> watch::Receiver<Order> {
        self.scrub_order.subscribe()
    }

    pub(crate) fn tick(&self) {
        for host in self.hosts() {
            host.step(Event::Tick);
        }
    }

    /// Blocks put right from other replicas.
    pub(crate) fn repaired(&self) -> u64 {
        self.hosts().iter().map(|h| h.repaired()).sum()
    }

    /// Takes in a routing table. Blocks on disk: opening and wiping targets.
    pub(crate) fn apply(self: &Arc<Self>, table: &pb::RoutingTable) {
        if table.version <= self.routing_version() {
            return;
        }
        let nodes: HashMap<u32, &str> = table.nodes.iter().map(|n| (n.node_id, n.address.as_str())).collect();
        let address =
            |t: &pb::TargetInfo| Some((TargetId(t.target_id), (*nodes.get(&t.node_id)?).to_owned()));
        *self.addresses.write().unwrap_or_else(PoisonError::into_inner) =
            table.targets.iter().filter_map(address).filter(|(_, a)| !a.is_empty()).collect();
        for info in table.targets.iter().filter(|t| t.node_id == self.config.node_id.0) {
            let target = TargetId(info.target_id);
            let Some(chain) = table.chains.iter().find(|c| c.chain_id == info.chain_id) else { continue };
            let Some(at) = chain.targets.iter().position(|t| *t == info.target_id) else { continue };
            let Some(state) = chain.states.get(at).and_then(|s| public_state(*s)) else { continue };
            if self.retire_or_return(target, chain.chain_id, info.retiring) {
                continue;
            }
            self.settle(target, chain, state);
            self.tell(target, chain, table.min_write_replicas);
        }
        let own = |t: &TargetId| {
            table.targets.iter().any(|i| i.target_id == t.0 && i.node_id == self.config.node_id.0)
        };
        let gone: Vec<TargetId> = lock(&self.slots).keys().filter(|t| !own(t)).copied().collect();
        for target in gone {
            // Before its folder goes, if it does: only what the manager names as taken out for good.
            let slot = lock(&self.slots).remove(&target);
            if let Some(mut slot) = slot {
                slot.close();
            }
        }
        for grave in table.graves.iter().filter(|g| g.node_id == self.config.node_id.0) {
            self.bury(TargetId(grave.target_id));
        }
        if let Some(order) = table.scrub {
            let order = Order { pass: order.pass, active: order.active, rate: order.rate_bytes };
            self.scrub_order.send_if_modified(|old| std::mem::replace(old, order) != order);
        }
        // Last: a heartbeat that names this version says that the targets act on it, and the manager
        // believes reports accordingly.
        *lock(&self.routing_version) = table.version;
        self.wake_report.notify_one();
    }

    /// A target that takes another's place is in: this one stops serving and says so, upon which the
    /// manager takes it out of the chain. `false` if it is to be used; also when the chain, having
    /// lost everybody else, wants it back.
    fn retire_or_return(&self, target: TargetId, chain: u32, retiring: bool) -> bool {
        let mut slots = lock(&self.slots);
        let slot = slots.entry(target).or_insert_with(|| Slot::new(ChainId(chain)));
        if retiring && !slot.retired {
            slot.retired = true;
            let mut slot = std::mem::replace(slot, Slot { retired: true, ..Slot::new(ChainId(chain)) });
            drop(slots);
            tracing::info!(%target, "another target has taken its place: it stops serving");
            slot.close();
            let mut slots = lock(&self.slots);
            if let Some(slot) = slots.get_mut(&target) {
                slot.state = Err("another target has taken its place".into());
            }
        } else if !retiring && slot.retired {
            // As at a start of the process: the folder holds what it held.
            *slot = Slot::new(ChainId(chain));
        }
        retiring
    }

    /// Removes what is left of a target that was taken out of its chain for good.
    fn bury(&self, target: TargetId) {
        let dir = self.dir(target);
        scrub::forget(&self.config.data_dir, target);
        lock(&self.scrubs).remove(&target);
        match std::fs::remove_dir_all(&dir) {
            Ok(()) => tracing::info!(%target, "another target has taken its place: its folder is removed"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%target, %error, "{} cannot be removed", dir.display()),
        }
    }

    /// Opens the target's folder, or empties it, as its public state demands.
    fn settle(self: &Arc<Self>, target: TargetId, chain: &pb::ChainInfo, state: PublicState) {
        let chain_id = ChainId(chain.chain_id);
        // A folder that cannot be looked at is not an empty one; opening it says what is wrong.
        let is_empty = FileDisk::is_empty(&self.dir(target)).unwrap_or(false);
        let (verdict, mut slot) = {
            let mut slots = lock(&self.slots);
            let slot = slots.entry(target).or_insert_with(|| Slot::new(chain_id));
            let verdict = slot.tenure.settle(state, ChainVersion(chain.version), is_empty);
            if verdict == Verdict::Keep {
                // It stays in the map: a heartbeat at this moment must not miss it.
                return;
            }
            let Some(slot) = slots.remove(&target) else { return };
            (verdict, slot)
        };
        match verdict {
            Verdict::Keep => {}
            Verdict::Open => slot.state = self.open(target, chain_id, false),
            Verdict::Empty => {
                slot.state = match slot.close() {
                    // Never again on this disk, until somebody looks at it and starts the node anew.
                    Some(failure) => Err(failure),
                    None => {
                        tracing::info!(%target, %chain_id, "the chain went on without it: it is emptied");
                        self.open(target, chain_id, true)
                    }
                };
            }
            Verdict::Hold => {
                slot.close();
                slot.state = Err("it waits to be taken out of the chain before it is filled".into());
            }
            Verdict::Lost => {
                slot.state =
                    Err("its folder is empty though it was the last to serve: restore the disk".into());
            }
        }
        if let Err(reason) = &slot.state {
            tracing::warn!(%target, reason, "the target is not in use");
        }
        lock(&self.slots).insert(target, slot);
    }

    fn open(self: &Arc<Self>, target: TargetId, chain: ChainId, wipe: bool) -> Result<Running, String> {
        let dir = self.dir(target);
        if wipe {
            FileDisk::wipe(&dir).map_err(|e| format!("cannot empty {}: {e}", dir.display()))?;
        }
        let disk = FileDisk::open(&dir).map_err(|e| format!("cannot open {}: {e}", dir.display()))?;
        let header = Header { cluster: self.config.identity.cluster, target };
        let options =
            EngineOptions { capacity_bytes: self.config.capacity_bytes, ..EngineOptions::default() };
        let (engine, recovered) =
            Engine::open(disk, header, options, Way::Best).map_err(|e| e.to_string())?;
        tracing::info!(
            %target,
            chunks = recovered.committed.len(),
            pending = recovered.pending.len(),
            "target opened"
        );
        let options = TargetOptions { mutation: planted_bug(), ..TargetOptions::default() };
        let machine = Target::new(target, self.incarnation, options, recovered);
        let around: Arc<dyn Surroundings> = self.clone();
        let (host, thread) = Host::start(chain, engine, machine, around)
            .map_err(|e| format!("cannot start its thread: {e}"))?;
        host.step(Event::Lease(*lock(&self.lease_until)));
        Ok(Running { host, thread })
    }

    fn tell(&self, target: TargetId, chain: &pb::ChainInfo, min_write_replicas: u32) {
        let in_state = |wanted: pb::PublicState| {
            let pairs = chain.targets.iter().zip(&chain.states);
            pairs.filter(move |(_, s)| **s == i32::from(wanted)).map(|(t, _)| TargetId(*t))
        };
        let view = ChainView {
            id: ChainId(chain.chain_id),
            version: ChainVersion(chain.version),
            serving: in_state(pb::PublicState::Serving).collect(),
            syncing: in_state(pb::PublicState::Syncing).next(),
            min_write_replicas,
        };
        let host = {
            let slots = lock(&self.slots);
            let Some(slot) = slots.get(&target) else { return };
            let Ok(running) = &slot.state else { return };
            if !slot.tenure.follows(view.version) || slot.chain != view.id {
                return;
            }
            Arc::clone(&running.host)
        };
        host.step(Event::Chain(view));
    }

    /// What the next heartbeat says of the targets.
    pub(crate) fn reports(&self) -> Vec<pb::TargetReport> {
        let slots = lock(&self.slots);
        let mut reports: Vec<pb::TargetReport> = slots
            .iter()
            .map(|(target, slot)| {
                let mut report = pb::TargetReport { target_id: target.0, ..pb::TargetReport::default() };
                let offline = match &slot.state {
                    Ok(running) => {
                        let usage = running.host.usage();
                        let state = running.host.report();
                        report.used_bytes = usage.used_bytes;
                        report.capacity_bytes = usage.capacity_bytes;
                        report.is_volatile = usage.is_volatile;
                        report.synced_at_version = state.synced_at.map_or(0, |v| v.0);
                        state.offline
                    }
                    Err(reason) => Some(reason.clone()),
                };
                let up_to_date = slot.tenure.is_complete() || report.synced_at_version != 0;
                report.set_state(match offline {
                    Some(_) => pb::LocalState::Offline,
                    None if up_to_date => pb::LocalState::UpToDate,
                    None => pb::LocalState::Online,
                });
                report.reason = offline.unwrap_or_default();
                report.scrub = lock(&self.scrubs).get(target).map(Progress::message);
                report
            })
            .collect();
        reports.sort_by_key(|r| r.target_id);
        reports
    }

    /// Ends all targets' threads.
    pub(crate) fn stop(&self) {
        let slots = std::mem::take(&mut *lock(&self.slots));
        for (_, mut slot) in slots {
            slot.close();
        }
    }
}

/// A bug to plant, for the negative control of the fault run on real processes. Only builds with
/// assertions know the switch.
fn planted_bug() -> Option<Mutation> {
    if !cfg!(debug_assertions) {
        return None;
    }
    let bug = std::env::var("FIREFLY_PLANTED_BUG").ok()?;
    let mutation = match bug.as_str() {
        "ignore-lease" => Mutation::IgnoreLease,
        "commit-before-successor" => Mutation::CommitBeforeSuccessor,
        other => {
            tracing::error!("there is no bug called {other:?} to plant");
            return None;
        }
    };
    tracing::error!(bug, "a bug is planted: this server breaks its promises");
    Some(mutation)
}

fn public_state(raw: i32) -> Option<PublicState> {
    Some(match pb::PublicState::try_from(raw).ok()? {
        pb::PublicState::Serving => PublicState::Serving,
        pb::PublicState::Syncing => PublicState::Syncing,
        pb::PublicState::Waiting => PublicState::Waiting,
        pb::PublicState::Lastsrv => PublicState::LastSrv,
        pb::PublicState::Offline => PublicState::Offline,
        pb::PublicState::Unspecified => return None,
    })
}

impl Slot {
    fn new(chain: ChainId) -> Self {
        Self { chain, tenure: Tenure::default(), state: Err("it has not been opened".into()), retired: false }
    }

    /// Ends the target's thread and closes its files; says how its disk had failed, if it had.
    fn close(&mut self) -> Option<String> {
        match std::mem::replace(&mut self.state, Err("closed".into())) {
            Ok(Running { host, thread }) => {
                let failure = host.stop();
                if thread.join().is_err() {
                    tracing::error!("a disk thread had panicked");
                }
                host.release();
                failure
            }
            Err(_) => None,
        }
    }
}
