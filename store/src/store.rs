//! The store as a handle: a thread owns the raft group; transactions reach it through a queue.

use crate::group::{Group, Verdict};
use crate::log::disk::{Disk, RealDisk};
use crate::machine::{self, DataTable};
use crate::record::TxnRecord;
use crate::txn::{BoxFuture, Committer, Snapshot};
use crate::window::WINDOW_INDICES;
use crate::{Kv, MAX_TXN_BYTES, StoreError, Txn};
use redb::Database;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Most bytes in one batch, which becomes one log frame. Half of what a frame may hold.
const MAX_BATCH_BYTES: usize = 16 << 20;
/// Most transactions in one batch: bounds the wait of the first of them for the last.
const MAX_BATCH: usize = 1024;
/// Bytes of transactions that wait for the log at most; beyond that `commit` waits before it
/// queues. In KiB, the semaphore's unit.
const QUEUE_KIB: usize = 64 << 10;

const _: () =
    assert!(MAX_BATCH_BYTES + MAX_TXN_BYTES + MAX_BATCH * 64 <= crate::log::format::MAX_FRAME_BYTES);
const _: () = assert!(MAX_TXN_BYTES / 1024 < QUEUE_KIB);

/// How a store is opened. The defaults suit a manager or a metadata server.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Log bytes after which the state machine is synced and the log before it removed. Larger
    /// means fewer pauses and a longer replay after a crash. Default 16 MiB: well under a second
    /// of replay.
    pub checkpoint_bytes: u64,
    /// Page cache of the state machine, bytes. Default 64 MiB.
    pub cache_bytes: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { checkpoint_bytes: 16 << 20, cache_bytes: 64 << 20 }
    }
}

/// Numbers for people and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Index of the last entry applied, which is the version of a snapshot taken now.
    pub applied: u64,
    /// Calls of fdatasync on the log since opening; commits divided by it is the batch size.
    pub syncs: u64,
    /// Transactions committed since opening.
    pub committed: u64,
    /// Transactions refused because of a conflict since opening.
    pub conflicts: u64,
    /// Bytes of an unfinished batch that opening cut off the log.
    pub torn_bytes: u64,
}

enum Command {
    Commit {
        payload: Vec<u8>,
        reply: oneshot::Sender<Result<u64, StoreError>>,
        _queued: OwnedSemaphorePermit,
    },
    Checkpoint(oneshot::Sender<Result<(), StoreError>>),
    Stop,
}

#[derive(Default)]
struct Shared {
    applied: AtomicU64,
    syncs: AtomicU64,
    committed: AtomicU64,
    conflicts: AtomicU64,
    torn_bytes: u64,
    /// Why the thread ended, if an error ended it.
    failure: Mutex<Option<StoreError>>,
}

impl Shared {
    /// Notes why the thread ends, before the waiting callers learn that it does.
    fn fail(&self, error: &StoreError) {
        let failure = StoreError::Failed(error.to_string());
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
    }

    fn gone(&self) -> StoreError {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.clone().unwrap_or(StoreError::Closed)
    }
}

struct Queue {
    commands: mpsc::Sender<Command>,
    space: Arc<Semaphore>,
    shared: Arc<Shared>,
}

/// An open store. Dropping it writes a checkpoint and waits for its thread; transactions that
/// are still open then fail with [`StoreError::Closed`].
pub struct Store {
    database: Arc<Database>,
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

impl Store {
    /// Opens or creates the store in `dir`. Blocks for the replay of the log. One process at a
    /// time can have it open.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Arc<Self>, StoreError> {
        let disk = RealDisk::open(dir)
            .map_err(|e| StoreError::io(format!("opening the store folder {}", dir.display()), e))?;
        Self::open_on(Arc::new(disk), options)
    }

    /// Opens a store on any [`Disk`].
    pub fn open_on(disk: Arc<dyn Disk>, options: StoreOptions) -> Result<Arc<Self>, StoreError> {
        let place = disk.describe();
        let group = Group::open(disk, options.cache_bytes, options.checkpoint_bytes, rand::random())?;
        let shared = Arc::new(Shared {
            applied: group.machine().position.applied.into(),
            torn_bytes: group.torn_bytes(),
            ..Shared::default()
        });
        let database = group.machine().database();
        let (commands, receiver) = mpsc::channel();
        let queue =
            Arc::new(Queue { commands, space: Arc::new(Semaphore::new(QUEUE_KIB)), shared: shared.clone() });
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || {
                if let Err(error) = run(group, &receiver, &shared) {
                    tracing::error!(%place, %error, "the store stops");
                }
            })
            .map_err(|e| StoreError::io("starting the store's thread", e))?;
        Ok(Arc::new(Self { database, queue, thread: Some(thread) }))
    }

    /// Syncs the state machine and removes the log before it.
    pub async fn checkpoint(&self) -> Result<(), StoreError> {
        let (reply, done) = oneshot::channel();
        let gone = || self.queue.shared.gone();
        self.queue.commands.send(Command::Checkpoint(reply)).map_err(|_| gone())?;
        done.await.map_err(|_| gone())?
    }

    /// Counters since opening.
    pub fn stats(&self) -> StoreStats {
        let shared = &self.queue.shared;
        StoreStats {
            applied: shared.applied.load(Ordering::Relaxed),
            syncs: shared.syncs.load(Ordering::Relaxed),
            committed: shared.committed.load(Ordering::Relaxed),
            conflicts: shared.conflicts.load(Ordering::Relaxed),
            torn_bytes: shared.torn_bytes,
        }
    }
}

impl Kv for Store {
    fn begin(&self) -> Txn {
        let snapshot = machine::snapshot(&self.database)
            .map(|(table, version)| (Box::new(table) as Box<dyn Snapshot>, version));
        Txn::new(snapshot, self.queue.clone())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // A thread that is gone already has reported why.
        let _ = self.queue.commands.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's thread panicked");
        }
    }
}

impl Committer for Queue {
    fn commit(&self, record: TxnRecord) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(async move {
            let payload = record.encode();
            let kib = payload.len().div_ceil(1024) as u32;
            let queued = self.space.clone().acquire_many_owned(kib).await.map_err(|_| StoreError::Closed)?;
            let (reply, verdict) = oneshot::channel();
            let command = Command::Commit { payload, reply, _queued: queued };
            self.commands.send(command).map_err(|_| self.shared.gone())?;
            verdict.await.map_err(|_| self.shared.gone())?
        })
    }

    fn is_too_old(&self, version: u64) -> bool {
        version + WINDOW_INDICES < self.shared.applied.load(Ordering::Relaxed)
    }
}

impl Snapshot for DataTable {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let value = DataTable::get(self, key).map_err(|e| StoreError::engine("reading", e))?;
        Ok(value.map(|v| v.value().to_vec()))
    }

    fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        take: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        for pair in self.range(from..to).map_err(|e| StoreError::engine("reading", e))? {
            let (key, value) = pair.map_err(|e| StoreError::engine("reading", e))?;
            if !take(key.value(), value.value()) {
                break;
            }
        }
        Ok(())
    }
}

/// The thread: takes what has queued up, makes it one batch, answers.
fn run(mut group: Group, commands: &mpsc::Receiver<Command>, shared: &Shared) -> Result<(), StoreError> {
    let mut payloads = Vec::new();
    let mut replies = Vec::new();
    while let Ok(first) = commands.recv() {
        let mut next = Some(first);
        let mut bytes = 0;
        let mut then = None;
        while let Some(command) = next.take() {
            match command {
                Command::Commit { payload, reply, _queued } => {
                    bytes += payload.len();
                    payloads.push(payload);
                    replies.push((reply, _queued));
                    if bytes < MAX_BATCH_BYTES && payloads.len() < MAX_BATCH {
                        next = commands.try_recv().ok();
                    }
                }
                other => then = Some(other),
            }
        }
        let verdicts = group.step(&payloads).inspect_err(|e| shared.fail(e))?;
        debug_assert_eq!(verdicts.len(), replies.len());
        shared.applied.store(group.machine().position.applied, Ordering::Relaxed);
        shared.syncs.store(group.syncs(), Ordering::Relaxed);
        payloads.clear();
        for ((reply, _queued), verdict) in replies.drain(..).zip(verdicts) {
            let answer = match verdict {
                Verdict::Committed(version) => {
                    shared.committed.fetch_add(1, Ordering::Relaxed);
                    Ok(version)
                }
                Verdict::Conflict => {
                    shared.conflicts.fetch_add(1, Ordering::Relaxed);
                    Err(StoreError::Conflict)
                }
            };
            // A caller that has gone away does not want to know.
            let _ = reply.send(answer);
        }
        match then {
            Some(Command::Checkpoint(reply)) => {
                let result = group.checkpoint().inspect_err(|e| shared.fail(e));
                let _ = reply.send(result.clone());
                result?;
            }
            Some(Command::Stop) => return group.checkpoint(),
            _ => {}
        }
    }
    Ok(())
}
