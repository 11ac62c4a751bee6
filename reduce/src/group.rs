//! The running group: the submission queue, the engine behind its lock, the progress thread, and
//! how threads that wait drive progress themselves.
//!
//! Who moves things: the thread inside [`Group::wait`] as long as it spins, else the progress
//! thread. The flag `sleeping` in this rank's segment tells local peers whether they must ring
//! the doorbell; it is set only while operations are under way and nobody spins.

use crate::ReduceError;
use crate::engine::{Engine, Names, Submission};
use crate::op::{Callback, OpState};
use crate::options::Options;
use crate::placement::Placement;
use crate::request::{Plan, Request, Shape};
use crate::shm::segment::Segment;
use crate::wire::{Carried, Reach};
use firefly_types::lock;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a waiting thread looks again and again without anything moving before it sleeps.
const SPIN: Duration = Duration::from_micros(100);
/// After this long it gives its core away between looks: the rank it waits for may need it.
const SPIN_ALONE: Duration = Duration::from_micros(10);
/// Operations up to this size are tried once inside submit, where the caller allows it.
const INLINE_BYTES: usize = 64 << 10;
/// How long a group that is closed waits for its peers to have everything.
const PARTING: Duration = Duration::from_secs(1);

/// Counts of a group, for the statistics.
#[derive(Default)]
struct Counts {
    submitted: AtomicU64,
    completed: AtomicU64,
    failed: AtomicU64,
}

/// What a group has done so far, seen from this rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Operations submitted, point-to-point included.
    pub submitted: u64,
    /// Operations that ended well.
    pub completed: u64,
    /// Operations that ended with an error.
    pub failed: u64,
    /// Payload bytes handed to ranks of this node through shared memory.
    pub shm_bytes_sent: u64,
    /// Payload bytes taken from ranks of this node through shared memory.
    pub shm_bytes_received: u64,
    /// Bytes given to TCP, headers included.
    pub tcp_bytes_sent: u64,
    /// Bytes taken from TCP, headers included.
    pub tcp_bytes_received: u64,
    /// Bytes given to RDMA devices, headers and steering included.
    pub rdma_bytes_sent: u64,
    /// Bytes that RDMA devices have delivered, headers and steering included.
    pub rdma_bytes_received: u64,
    /// Payload bytes copied in user space on their way between channels and operations' memory.
    pub copied_bytes: u64,
    /// Input bytes that this rank has reduced.
    pub reduced_bytes: u64,
    /// Ranks reached through shared memory.
    pub local_peers: u32,
    /// Ranks reached through the network.
    pub remote_peers: u32,
    /// Of these, the ranks reached by RDMA.
    pub rdma_peers: u32,
}

impl Stats {
    /// What this rank reaches the others by: "shm", "rdma" and "tcp" as far as they are in use, with
    /// "+" between; "none" in a group of one.
    pub fn transport(&self) -> String {
        let used = [
            ("shm", self.local_peers > 0),
            ("rdma", self.rdma_peers > 0),
            ("tcp", self.remote_peers > self.rdma_peers),
        ];
        let used: Vec<&str> = used.into_iter().filter(|(_, used)| *used).map(|(name, _)| name).collect();
        if used.is_empty() { "none".into() } else { used.join("+") }
    }
}

struct Queue {
    sequence: u64,
    items: VecDeque<Submission>,
}

/// How an operation is submitted.
#[derive(Clone, Copy, Debug, Default)]
pub struct SubmitOptions {
    /// The callback may run inside submit.
    pub inline: bool,
    /// A wait for this operation follows at once: the progress thread is not woken for it.
    pub wait_follows: bool,
    /// Instead of the group's timeout.
    pub timeout: Option<Duration>,
}

pub(crate) struct Group {
    pub(crate) names: Arc<Names>,
    shape: Shape,
    queue: Mutex<Queue>,
    engine: Mutex<Engine>,
    segment: Option<Arc<Segment>>,
    /// Woken by local peers and by submissions.
    doorbell: OwnedFd,
    parked: AtomicBool,
    spinners: AtomicU32,
    /// Spinning makes sense: this node has a core for each of its ranks.
    spin: bool,
    failure: Mutex<Option<ReduceError>>,
    timeout_ms: AtomicU64,
    counts: Counts,
    last_bytes: Mutex<Stats>,
    stop: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
    pid: u32,
}

/// What a formed group consists of.
pub(crate) struct Parts {
    pub(crate) engine: Engine,
    pub(crate) doorbell: OwnedFd,
    pub(crate) timeout: Duration,
    pub(crate) placement: Placement,
    pub(crate) options: Options,
}

impl Group {
    pub(crate) fn start(parts: Parts) -> Result<Arc<Self>, ReduceError> {
        let Parts { engine, doorbell, timeout, placement, options } = parts;
        let names = engine.names.clone();
        let local = engine.local_peers.len() + 1;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let group = Arc::new(Self {
            shape: Shape::new(
                names.rank,
                names.size,
                engine.arena.is_some() && !engine.has_remote_peers(),
                placement,
                options,
            ),
            queue: Mutex::new(Queue { sequence: 0, items: VecDeque::new() }),
            segment: engine.segment.clone(),
            engine: Mutex::new(engine),
            doorbell,
            parked: AtomicBool::new(false),
            spinners: AtomicU32::new(0),
            spin: local <= cores,
            failure: Mutex::new(None),
            timeout_ms: AtomicU64::new(timeout.as_millis() as u64),
            counts: Counts::default(),
            // The peers are known from the start, also to who asks while another holds the engine.
            last_bytes: Mutex::new(Stats {
                local_peers: local as u32 - 1,
                remote_peers: names.size - local as u32,
                ..Stats::default()
            }),
            stop: AtomicBool::new(false),
            thread: Mutex::new(None),
            pid: std::process::id(),
            names,
        });
        let runner = group.clone();
        let thread = std::thread::Builder::new()
            .name("ffreduce".into())
            .spawn(move || runner.run())
            .map_err(|e| ReduceError::system("starting the progress thread", e))?;
        *lock(&group.thread) = Some(thread);
        crate::elastic::retract();
        Ok(group)
    }

    /// Whether this process is a forked child of the one that formed the group.
    pub(crate) fn forked(&self) -> bool {
        self.pid != std::process::id()
    }

    fn check_process(&self) -> Result<(), ReduceError> {
        if self.forked() {
            return Err(ReduceError::invalid(format!(
                "{}: the group belongs to the parent process; a forked child must form its own",
                self.names.us()
            )));
        }
        Ok(())
    }

    pub(crate) fn options(&self) -> &Options {
        &self.shape.options
    }

    pub(crate) fn failure(&self) -> Option<ReduceError> {
        lock(&self.failure).clone()
    }

    pub(crate) fn sequence(&self) -> u64 {
        lock(&self.queue).sequence
    }

    pub(crate) fn set_timeout(&self, timeout: Duration) {
        self.timeout_ms.store(timeout.as_millis() as u64, Ordering::Relaxed);
    }

    /// Queues an operation.
    ///
    /// # Safety
    /// As [`crate::Communicator::submit`].
    pub(crate) unsafe fn submit(
        &self,
        request: &Request<'_>,
        options: SubmitOptions,
        callback: Option<Callback>,
    ) -> Result<Arc<OpState>, ReduceError> {
        self.check_process()?;
        let us = || self.names.us();
        let plan = request.plan(&self.shape).map_err(|e| e.during(&us()))?;
        if let Some(failure) = self.failure() {
            return Err(failure.during(&format!("{}: the group is broken", us())));
        }
        let bytes: usize =
            request.input.iter().chain(request.output).map(|b| b.count * request.dtype.size()).sum();
        let timeout =
            options.timeout.unwrap_or_else(|| Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed)));
        let op = {
            let mut queue = lock(&self.queue);
            let sequence = match &plan {
                Plan::Collective { .. } => {
                    queue.sequence += 1;
                    queue.sequence
                }
                _ => 0,
            };
            let op = Arc::new(OpState::new(sequence, callback));
            queue.items.push_back(Submission { plan, op: op.clone(), submitted: Instant::now(), timeout });
            op
        };
        self.counts.submitted.fetch_add(1, Ordering::Relaxed);
        let mut woken = options.wait_follows;
        if options.inline
            && self.spin
            && bytes <= INLINE_BYTES
            && let Some(mut engine) = self.try_engine()
        {
            self.step(&mut engine);
            woken |= !engine.busy();
            self.deliver(engine);
        }
        if !woken {
            self.wake();
        }
        Ok(op)
    }

    fn try_engine(&self) -> Option<MutexGuard<'_, Engine>> {
        match self.engine.try_lock() {
            Ok(engine) => Some(engine),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Takes submissions in and moves what can be moved, once.
    fn step(&self, engine: &mut Engine) -> bool {
        let items = std::mem::take(&mut lock(&self.queue).items);
        let any = !items.is_empty();
        let now = Instant::now();
        // A panic of ours must not leave operations, and those who wait for them, hanging.
        let moved = catch_unwind(AssertUnwindSafe(|| {
            for item in items {
                engine.accept(item);
            }
            let moved = engine.progress(now);
            engine.tick(now);
            moved
        }));
        moved.unwrap_or_else(|_| {
            engine
                .fail(ReduceError::System { detail: "a bug in firefly-reduce: its engine panicked".into() });
            true
        }) || any
    }

    /// Lets the engine go and tells the owners of completed operations.
    fn deliver(&self, mut engine: MutexGuard<'_, Engine>) {
        let finished = engine.take_finished();
        if let Some(failure) = &engine.failure {
            lock(&self.failure).get_or_insert_with(|| failure.clone());
        }
        drop(engine);
        for (op, outcome) in finished {
            let count = if outcome.is_ok() { &self.counts.completed } else { &self.counts.failed };
            count.fetch_add(1, Ordering::Relaxed);
            op.deliver(outcome);
        }
    }

    /// Wakes the progress thread if it is parked.
    fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.parked.swap(false, Ordering::AcqRel) {
            let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
        }
    }

    fn set_sleeping(&self, sleeping: bool) {
        if let Some(segment) = &self.segment {
            segment.control().sleeping.0.store(u32::from(sleeping), Ordering::Relaxed);
        }
        // Pairs with the fence in Doorbell::ring.
        fence(Ordering::SeqCst);
    }

    /// Tries a little progress.
    pub(crate) fn test(&self) {
        if self.forked() {
            return;
        }
        if let Some(mut engine) = self.try_engine() {
            self.step(&mut engine);
            self.deliver(engine);
        }
    }

    /// Waits until `op` is complete or `until` has come, driving progress.
    pub(crate) fn wait(&self, op: &OpState, until: Option<Instant>) {
        if op.is_complete() || self.forked() {
            return;
        }
        if self.spin {
            self.spinners.fetch_add(1, Ordering::AcqRel);
            self.set_sleeping(false);
            self.spin(op, until);
            self.spinners.fetch_sub(1, Ordering::AcqRel);
        }
        if op.is_complete() {
            // Others may still be under way; the progress thread takes over.
            if self.try_engine().is_none_or(|engine| engine.busy()) {
                self.wake();
            }
            return;
        }
        self.wake();
        op.sleep(until);
    }

    fn spin(&self, op: &OpState, until: Option<Instant>) {
        let mut idle_since = Instant::now();
        let mut rounds = 0u32;
        let mut polite = false;
        while !op.is_complete() {
            let mut moved = false;
            if let Some(mut engine) = self.try_engine() {
                moved = self.step(&mut engine);
                self.deliver(engine);
            }
            if moved {
                idle_since = Instant::now();
                polite = false;
                continue;
            }
            if polite {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
            rounds += 1;
            // Looking at the clock costs as much as several rounds.
            if polite || rounds.is_multiple_of(16) {
                let now = Instant::now();
                let idle = now.saturating_duration_since(idle_since);
                if idle >= SPIN || until.is_some_and(|u| now >= u) {
                    return;
                }
                polite = idle >= SPIN_ALONE;
            }
        }
    }

    /// Breaks the group from here.
    pub(crate) fn abort(&self, reason: &str) {
        if self.forked() {
            return;
        }
        let mut engine = lock(&self.engine);
        for item in std::mem::take(&mut lock(&self.queue).items) {
            engine.accept(item);
        }
        let detail = format!("rank {} aborted the group: {reason}", self.names.rank);
        engine.break_off(ReduceError::Aborted { detail });
        self.deliver(engine);
        // Its sleep may be long, and it holds descriptors of a group that is gone.
        self.wake();
    }

    pub(crate) fn stats(&self) -> Stats {
        let mut stats = if self.forked() {
            *lock(&self.last_bytes)
        } else {
            let engine = lock(&self.engine);
            let last = *lock(&self.last_bytes);
            self.read_bytes(&engine, last)
        };
        stats.submitted = self.counts.submitted.load(Ordering::Relaxed);
        stats.completed = self.counts.completed.load(Ordering::Relaxed);
        stats.failed = self.counts.failed.load(Ordering::Relaxed);
        stats
    }

    /// How `rank` is reached; `None` for this rank itself and once the group is broken.
    pub(crate) fn reach(&self, rank: u32) -> Option<Reach> {
        if self.forked() {
            return None;
        }
        lock(&self.engine).wire.as_ref()?.reach(rank)
    }

    fn read_bytes(&self, engine: &Engine, mut stats: Stats) -> Stats {
        if let Some(wire) = &engine.wire {
            let Carried { shm, tcp, rdma, rdma_peers, copied } = wire.carried();
            let arena = engine.arena.as_ref().map(|a| a.counted.get()).unwrap_or_default();
            stats.shm_bytes_sent = shm.0 + arena.staged;
            stats.shm_bytes_received = shm.1 + arena.read;
            stats.tcp_bytes_sent = tcp.0;
            stats.tcp_bytes_received = tcp.1;
            stats.rdma_bytes_sent = rdma.0;
            stats.rdma_bytes_received = rdma.1;
            stats.copied_bytes = copied;
            stats.rdma_peers = rdma_peers;
            stats.reduced_bytes = engine.reduced_bytes();
            stats.local_peers = engine.local_peers.len() as u32;
            stats.remote_peers = self.names.size - 1 - stats.local_peers;
            *lock(&self.last_bytes) = stats;
        }
        stats
    }

    /// The progress thread.
    fn run(&self) {
        let mut link_fds = Vec::new();
        loop {
            let mut engine = lock(&self.engine);
            let mut rounds = 0;
            while self.step(&mut engine) && rounds < 64 {
                rounds += 1;
            }
            if self.stop.load(Ordering::Acquire) {
                self.part(engine);
                return;
            }
            // Parked first, then one more look: a submission or a peer either is seen by that look
            // or sees the flag.
            self.parked.store(true, Ordering::Release);
            let spun = self.spinners.load(Ordering::Acquire) > 0;
            self.set_sleeping(engine.busy() && !spun);
            if self.step(&mut engine) || rounds == 64 {
                self.parked.store(false, Ordering::Relaxed);
                self.deliver(engine);
                continue;
            }
            engine.poll_fds(!spun, &mut link_fds);
            let patience = engine.patience(Instant::now());
            let watched: Vec<(u32, Arc<OwnedFd>)> =
                engine.watches.iter().map(|w| (w.rank, w.process.clone())).collect();
            self.deliver(engine);
            let gone = self.poll(&watched, &link_fds, patience);
            self.parked.store(false, Ordering::Relaxed);
            if !gone.is_empty() {
                let mut engine = lock(&self.engine);
                for rank in gone {
                    engine.process_gone(rank, Instant::now());
                }
                self.deliver(engine);
            }
        }
    }

    /// Sleeps until something happens; returns the ranks whose processes are gone.
    fn poll(
        &self,
        watched: &[(u32, Arc<OwnedFd>)],
        links: &[(std::os::fd::RawFd, bool)],
        patience: Duration,
    ) -> Vec<u32> {
        let mut fds = vec![PollFd::new(&self.doorbell, PollFlags::IN)];
        fds.extend(watched.iter().map(|(_, fd)| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
        for &(fd, writable) in links {
            let flags = if writable { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            // SAFETY: the link owns the descriptor. Another thread may drop the link while we
            // poll; the kernel holds the file for the call, and a number that is reused in
            // between costs one needless wake-up.
            fds.push(PollFd::from_borrowed_fd(unsafe { BorrowedFd::borrow_raw(fd) }, flags));
        }
        let timeout =
            Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: i64::from(patience.subsec_nanos()) };
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
        if !fds[0].revents().is_empty() {
            let _ = rustix::io::read(&self.doorbell, &mut [0u8; 8]);
        }
        watched
            .iter()
            .zip(&fds[1..])
            .filter(|(_, fd)| fd.revents().intersects(PollFlags::IN | PollFlags::HUP))
            .map(|((rank, _), _)| *rank)
            .collect()
    }

    /// Leaves in order: peers get everything that was sent to them, within a bound.
    fn part(&self, mut engine: MutexGuard<'_, Engine>) {
        for item in std::mem::take(&mut lock(&self.queue).items) {
            engine.accept(item);
        }
        engine.part();
        let until = Instant::now() + PARTING;
        while !engine.parted(Instant::now()) && Instant::now() < until {
            let mut fds = Vec::new();
            engine.poll_fds(true, &mut fds);
            self.poll(&[], &fds, Duration::from_millis(1));
        }
        let before = *lock(&self.last_bytes); // its lock must not be held in read_bytes
        self.read_bytes(&engine, before);
        engine.close();
        self.deliver(engine);
    }

    /// Stops the progress thread. Called once, by the last owner.
    pub(crate) fn close(&self) {
        if self.forked() {
            return;
        }
        self.stop.store(true, Ordering::Release);
        self.wake();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}
