//! The engine at work: the value of [`super::core`] with a disk under it.
//!
//! One thread of the caller's drives groups and checkpoints with [`Engine::turn`]; reads go through
//! threads of their own. Both use io_uring where the disk is a file and the kernel allows it,
//! and blocking calls elsewhere.

use super::BLOCK_BYTES;
use super::buffer::Arena;
use super::core::{Core, Done, EngineError, EngineOptions, Usage};
use super::disk::Disk;
use super::format::Header;
use super::read::{Fetch, ReadPlan};
use super::reader::{Filled, Reader};
use super::ring::Ring;
use firefly_types::{ChunkId, lock};
use fs3_core::target::{RecordPage, Recovered, Update};
use rustix::event::EventfdFlags;
use rustix::fd::OwnedFd;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// Records of commits that nobody waits for go to disk after this at the latest.
const LAZY: Duration = Duration::from_millis(50);
/// Small requests of groups that use registered memory at a time.
const WRITE_SLOTS: usize = 128;

#[derive(Default)]
struct Signal {
    urgent: bool,
    lazy: bool,
    stop: bool,
}

/// How a thread of the engine is woken.
struct Wake {
    signal: Mutex<Signal>,
    condvar: Condvar,
    /// For a thread that waits at its ring.
    event: Option<Arc<OwnedFd>>,
    /// The thread waits at its ring, so that the event is worth a system call.
    at_ring: AtomicBool,
}

impl Wake {
    fn set(&self, change: impl FnOnce(&mut Signal)) {
        change(&mut lock(&self.signal));
        self.condvar.notify_all();
        if let Some(event) = self.event.as_ref().filter(|_| self.at_ring.load(Ordering::SeqCst)) {
            // The counter cannot overflow: each wait empties it.
            let _ = rustix::io::write(&**event, &1u64.to_ne_bytes());
        }
    }
}

/// The chunks of one target on a disk.
pub struct Engine<D, B> {
    core: Core<B>,
    disk: Arc<D>,
    reader: Reader,
    wake: Wake,
    refuse: bool,
}

/// What a thread that calls [`Engine::turn`] keeps between turns.
pub struct Driver {
    ring: Option<Ring>,
    closing: bool,
}

/// How to carry out disk requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Way {
    /// With io_uring if the kernel allows it.
    #[default]
    Best,
    /// With blocking calls in threads.
    Threads,
}

impl<D: Disk, B: AsRef<[u8]>> Engine<D, B> {
    /// Opens a target's volume, or makes it, and recovers what it holds. Blocks.
    pub fn open(
        disk: D,
        header: Header,
        options: EngineOptions,
        way: Way,
    ) -> Result<(Self, Recovered), EngineError> {
        let disk = Arc::new(disk);
        let (core, recovered) = Core::open(&*disk, header, options)?;
        let refuse = way == Way::Threads;
        let reader = Reader::start(Arc::clone(&disk), &header.target.to_string(), refuse)?;
        let event =
            rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok().map(Arc::new);
        let wake = Wake {
            signal: Mutex::default(),
            condvar: Condvar::new(),
            event,
            at_ring: AtomicBool::new(false),
        };
        Ok((Self { core, disk, reader, wake, refuse }, recovered))
    }

    /// See [`Core::write`].
    pub fn write(&self, id: u64, base: u64, version: u64, update: Update<B>, at_once: bool) {
        self.core.write(id, base, version, update, at_once);
        self.wake.set(|s| s.urgent = true);
    }

    /// See [`Core::commit`].
    pub fn commit(&self, chunk: ChunkId, version: u64) {
        self.core.commit(chunk, version);
        self.wake_lazily();
    }

    /// See [`Core::drop_pending`].
    pub fn drop_pending(&self, chunk: ChunkId, version: u64) {
        self.core.drop_pending(chunk, version);
        self.wake_lazily();
    }

    /// See [`Core::flush`].
    pub fn flush(&self, id: u64, remove: Vec<ChunkId>, page: RecordPage) {
        self.core.flush(id, remove, page);
        self.wake.set(|s| s.urgent = true);
    }

    fn wake_lazily(&self) {
        let mut signal = lock(&self.wake.signal);
        let first = !std::mem::replace(&mut signal.lazy, true);
        drop(signal);
        if first {
            self.wake.set(|_| {});
        }
    }

    /// What the thread that drives the engine needs. Called in that thread.
    pub fn driver(&self) -> Driver {
        let arena = Arena::new(WRITE_SLOTS);
        let ring = match (self.disk.file(), &self.wake.event) {
            (Some(file), Some(event)) if !self.refuse => {
                Ring::new(file, Arc::clone(&arena), Arc::clone(event))
                    .inspect_err(|error| tracing::info!(%error, "no io_uring: writes block their thread"))
                    .ok()
            }
            _ => None,
        };
        if ring.is_some() {
            self.core.use_arena(arena);
        }
        Driver { ring, closing: false }
    }

    /// Whether reads use io_uring.
    pub fn uses_ring(&self) -> bool {
        self.reader.is_ring()
    }

    /// Works until something has ended, and returns it; `None` after [`Engine::stop`].
    pub fn turn(&self, driver: &mut Driver) -> Option<Vec<Done<B>>> {
        let mut eager = false;
        loop {
            if lock(&self.wake.signal).stop && !driver.closing {
                driver.closing = true;
                self.core.close();
            }
            let result = self.step(driver, eager || driver.closing);
            eager = false;
            let done = self.core.take_done();
            if !done.is_empty() {
                return Some(done);
            }
            match result {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    self.core.end(&format!("io_uring failed: {error}"));
                    driver.ring = None;
                    continue;
                }
            }
            if driver.closing {
                self.core.end("it is closed");
                return None;
            }
            eager = self.wait(driver);
        }
    }

    /// Starts what can be started and waits for what is under way. False if there is nothing.
    fn step(&self, driver: &mut Driver, eager: bool) -> io::Result<bool> {
        let mut ios = self.core.poll(eager);
        let Some(ring) = &mut driver.ring else {
            let any = !ios.is_empty();
            for io in ios {
                self.core.complete(io.perform(&*self.disk));
            }
            return Ok(any);
        };
        while !ios.is_empty() {
            ring.start(ios)?;
            // A group is composed in pieces: the next one while the disk has this.
            ios = self.core.poll(eager);
        }
        if ring.is_idle() {
            return Ok(false);
        }
        self.wake.at_ring.store(true, Ordering::SeqCst);
        let missed = {
            let mut signal = lock(&self.wake.signal);
            let missed = signal.urgent || signal.stop && !driver.closing;
            signal.urgent = false;
            missed
        };
        // What came meanwhile may go on beside a checkpoint.
        let completions = ring.wait(&*self.disk, missed.then_some(Duration::ZERO));
        self.wake.at_ring.store(false, Ordering::SeqCst);
        completions?.into_iter().for_each(|completion| self.core.complete(completion));
        Ok(true)
    }

    /// Waits until there is something to do; true if records that nobody waits for should go too.
    fn wait(&self, driver: &Driver) -> bool {
        debug_assert!(driver.ring.as_ref().is_none_or(Ring::is_idle));
        let mut signal = lock(&self.wake.signal);
        while !signal.urgent && !signal.stop {
            if signal.lazy {
                let (again, timeout) =
                    self.wake.condvar.wait_timeout(signal, LAZY).unwrap_or_else(PoisonError::into_inner);
                signal = again;
                if timeout.timed_out() {
                    signal.lazy = false;
                    return true;
                }
            } else {
                signal = self.wake.condvar.wait(signal).unwrap_or_else(PoisonError::into_inner);
            }
        }
        // A group takes the records along.
        signal.lazy &= !signal.urgent;
        signal.urgent = false;
        false
    }

    /// See [`Core::plan_read`].
    pub fn plan_read(&self, id: ChunkId, pending: bool, range: Range<u32>) -> Option<ReadPlan> {
        self.core.plan_read(id, pending, range)
    }

    /// Fills `out` from `offset` of the chunk on, which must lie within the range that was planned.
    /// Every block that is touched is verified as a whole.
    pub async fn read(&self, plan: &mut ReadPlan, offset: usize, out: &mut [u8]) -> Result<(), EngineError> {
        self.core.check_open()?;
        self.load_leaves(plan).await?;
        plan.fill_holes(offset, out);
        let fetches = plan.fetches(offset, out.len());
        let reads = self.reader.read(self.buffers(&fetches));
        for (fetch, filled) in fetches.iter().zip(reads) {
            let (buf, result) = received(filled).await?;
            match result {
                Ok(()) => plan.deliver(fetch, &buf, offset, out)?,
                Err(_) => self.read_apart(plan, fetch, offset, out).await?,
            }
            self.reader.recycle(buf);
        }
        Ok(())
    }

    fn buffers(&self, fetches: &[Fetch]) -> Vec<(u64, super::buffer::AlignedBuf)> {
        fetches.iter().map(|fetch| (fetch.offset(), self.reader.buffer(fetch.bytes()))).collect()
    }

    /// One of several blocks cannot be read: find out which by reading them one by one.
    async fn read_apart(
        &self,
        plan: &ReadPlan,
        fetch: &Fetch,
        offset: usize,
        out: &mut [u8],
    ) -> Result<(), EngineError> {
        let fetches = plan.apart(fetch);
        let reads = self.reader.read(self.buffers(&fetches));
        for (fetch, filled) in fetches.iter().zip(reads) {
            let (buf, result) = received(filled).await?;
            result.map_err(|_| plan.unreadable(fetch))?;
            plan.deliver(fetch, &buf, offset, out)?;
        }
        Ok(())
    }

    async fn load_leaves(&self, plan: &mut ReadPlan) -> Result<(), EngineError> {
        let missing = plan.missing();
        if missing.is_empty() {
            return Ok(());
        }
        let wanted = missing
            .iter()
            .map(|at| (u64::from(at.block) * BLOCK_BYTES as u64, self.reader.buffer(BLOCK_BYTES)))
            .collect();
        let mut pages = Vec::with_capacity(missing.len());
        for filled in self.reader.read(wanted) {
            let (page, result) = received(filled).await?;
            result?;
            pages.push(page);
        }
        plan.supply(&self.core, pages.iter().map(|page| &page[..]))
    }

    /// Puts a block right with bytes from another replica (see [`Core::repair`]).
    pub fn repair(&self, plan: &mut ReadPlan, index: u32, bytes: &[u8]) -> Result<(), EngineError> {
        self.core.repair(&*self.disk, plan, index, bytes)
    }

    /// Room used and left.
    pub fn usage(&self) -> Usage {
        self.core.usage(&*self.disk)
    }

    /// Why nothing works any more, if so.
    pub fn failed(&self) -> Option<String> {
        self.core.failed()
    }

    /// Ends the driving thread after what is under way. Says how the disk had failed, if it had.
    pub fn stop(&self) -> Option<String> {
        let failure = self.core.failed();
        self.wake.set(|s| s.stop = true);
        failure
    }

    /// Lets go of the disk though calls that still run hold this engine.
    pub fn release(&self) {
        self.core.end("it is closed");
        self.disk.release();
    }

    /// The disk under it.
    pub fn disk(&self) -> &Arc<D> {
        &self.disk
    }

    /// The engine as a value.
    pub fn core(&self) -> &Core<B> {
        &self.core
    }
}

async fn received(filled: oneshot::Receiver<Filled>) -> Result<Filled, EngineError> {
    filled.await.map_err(|_| EngineError::Failed("it is closed".into()))
}
