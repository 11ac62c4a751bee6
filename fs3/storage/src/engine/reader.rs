//! Reads: many at once, beside the engine's thread.

use super::BLOCK_BYTES;
use super::buffer::{AlignedBuf, Arena, Spare};
use super::disk::Disk;
use super::ring;
use firefly_types::lock;
use io_uring::{IoUring, opcode};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use tokio::sync::oneshot;

/// Threads that read where io_uring is refused.
const THREADS: usize = 16;
/// Completion that ends the ring's thread.
const STOP: u64 = u64::MAX;

/// A buffer that was filled, or not.
pub(super) type Filled = (AlignedBuf, io::Result<()>);

struct Job {
    offset: u64,
    buf: AlignedBuf,
    done: oneshot::Sender<Filled>,
}

/// Reads from one disk.
pub(super) struct Reader {
    way: Way,
    arena: Arc<Arena>,
    spare: Mutex<Spare>,
    threads: Vec<JoinHandle<()>>,
}

enum Way {
    Ring(Arc<Shared>),
    Threads(Arc<Pool>),
}

impl Reader {
    /// Starts its threads. `refuse` does as if the kernel had no io_uring.
    pub(super) fn start<D: Disk>(disk: Arc<D>, name: &str, refuse: bool) -> io::Result<Self> {
        let arena = Arena::new(ring::DEPTH as usize);
        let made = match disk.file() {
            Some(file) if !refuse => ring::make(file, &arena)
                .inspect_err(|error| tracing::info!(%error, "no io_uring: reads go through threads"))
                .ok(),
            _ => None,
        };
        let spawn = |number: usize, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(format!("{name} read {number}")).spawn(work)
        };
        let spare = Mutex::default();
        let (way, threads) = match made {
            Some((ring, registered)) => {
                let shared = Arc::new(Shared {
                    ring,
                    arena: registered.then(|| Arc::clone(&arena)),
                    jobs: Mutex::default(),
                });
                let mine = Arc::clone(&shared);
                let thread = spawn(0, Box::new(move || mine.run(&*disk)))?;
                (Way::Ring(shared), vec![thread])
            }
            None => {
                let pool = Arc::new(Pool::default());
                let threads = (0..THREADS)
                    .map(|number| {
                        let (pool, disk) = (Arc::clone(&pool), Arc::clone(&disk));
                        spawn(number, Box::new(move || pool.run(&*disk)))
                    })
                    .collect::<io::Result<Vec<_>>>()?;
                (Way::Threads(pool), threads)
            }
        };
        Ok(Self { way, arena, spare, threads })
    }

    /// Whether io_uring is used.
    pub(super) fn is_ring(&self) -> bool {
        matches!(self.way, Way::Ring(_))
    }

    /// A buffer for a read.
    pub(super) fn buffer(&self, len: usize) -> AlignedBuf {
        match (len == BLOCK_BYTES).then(|| self.arena.take()).flatten() {
            Some(buf) => buf,
            None => lock(&self.spare).take(len),
        }
    }

    /// Takes a buffer back for a later read.
    pub(super) fn recycle(&self, buf: AlignedBuf) {
        lock(&self.spare).put(buf);
    }

    /// Fills buffers from these offsets, all at once.
    pub(super) fn read(&self, wanted: Vec<(u64, AlignedBuf)>) -> Vec<oneshot::Receiver<Filled>> {
        let mut receivers = Vec::with_capacity(wanted.len());
        let jobs = wanted.into_iter().map(|(offset, buf)| {
            let (done, receiver) = oneshot::channel();
            receivers.push(receiver);
            Job { offset, buf, done }
        });
        match &self.way {
            Way::Ring(shared) => shared.start(jobs.collect()),
            Way::Threads(pool) => {
                lock(&pool.jobs).0.extend(jobs);
                pool.wake.notify_all();
            }
        }
        receivers
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        match &self.way {
            Way::Ring(shared) => shared.stop(),
            Way::Threads(pool) => {
                lock(&pool.jobs).1 = true;
                pool.wake.notify_all();
            }
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that reads had panicked");
            }
        }
    }
}

#[derive(Default)]
struct Jobs {
    in_flight: HashMap<u64, Job>,
    backlog: VecDeque<Job>,
    next: u64,
    stopping: bool,
}

/// A ring that any thread submits to and one thread waits at.
struct Shared {
    /// First, so that it is dropped before the arena whose memory the kernel may use.
    ring: IoUring,
    /// If its memory is registered.
    arena: Option<Arc<Arena>>,
    /// Held while submitting.
    jobs: Mutex<Jobs>,
}

impl Shared {
    fn start(&self, new: Vec<Job>) {
        let mut jobs = lock(&self.jobs);
        if jobs.stopping {
            return;
        }
        jobs.backlog.extend(new);
        self.submit(&mut jobs);
    }

    fn submit(&self, jobs: &mut Jobs) {
        let mut pushed = false;
        while jobs.in_flight.len() < ring::DEPTH as usize - 1
            && let Some(mut job) = jobs.backlog.pop_front()
        {
            let entry =
                ring::entry(&mut job.buf, job.offset, false, self.arena.as_ref()).user_data(jobs.next);
            // SAFETY: only who holds the lock of `jobs` touches the submission queue; the buffer is
            // kept in `in_flight` until its completion has come. The queue has room for as many
            // entries as may be in flight, and each is submitted before the lock is given back.
            let push = unsafe { self.ring.submission_shared().push(&entry) };
            push.expect("the queue has room for all that may be in flight");
            jobs.in_flight.insert(jobs.next, job);
            jobs.next += 1;
            pushed = true;
        }
        if pushed && let Err(error) = self.ring.submit() {
            // Its entries stay in the queue and go with the next ones.
            tracing::warn!(%error, "reads are late");
        }
    }

    fn stop(&self) {
        let mut jobs = lock(&self.jobs);
        jobs.stopping = true;
        jobs.backlog.clear();
        let nop = opcode::Nop::new().build().user_data(STOP);
        // SAFETY: under the lock, and a no-op has no buffer. One place is kept free for it.
        let push = unsafe { self.ring.submission_shared().push(&nop) };
        push.expect("one place is kept free");
        if let Err(error) = self.ring.submit() {
            tracing::error!(%error, "cannot tell a thread to stop");
        }
    }

    fn run<D: Disk + ?Sized>(&self, disk: &D) {
        let mut stop = false;
        loop {
            // SAFETY: waits only; submits nothing, so it needs no lock, and the argument is absent.
            let waited = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, 1, None) };
            if let Err(error) = waited
                && error.raw_os_error() != Some(libc::EINTR)
            {
                tracing::error!(%error, "io_uring failed");
            }
            // SAFETY: only this thread touches the completion queue.
            let ended: Vec<(u64, i32)> =
                unsafe { self.ring.completion_shared() }.map(|c| (c.user_data(), c.result())).collect();
            let mut done = Vec::with_capacity(ended.len());
            {
                let mut jobs = lock(&self.jobs);
                for (id, result) in ended {
                    stop |= id == STOP;
                    done.extend(jobs.in_flight.remove(&id).map(|job| (job, result)));
                }
                self.submit(&mut jobs);
                if stop && jobs.in_flight.is_empty() && done.is_empty() {
                    return;
                }
            }
            for (mut job, result) in done {
                let result = ring::outcome(result, job.buf.len())
                    .unwrap_or_else(|| disk.read(job.offset, &mut job.buf));
                // Nobody may wait any more.
                let _ = job.done.send((job.buf, result));
            }
            if stop && lock(&self.jobs).in_flight.is_empty() {
                return;
            }
        }
    }
}

/// Threads that read one after the other.
#[derive(Default)]
struct Pool {
    /// And whether to stop.
    jobs: Mutex<(VecDeque<Job>, bool)>,
    wake: Condvar,
}

impl Pool {
    fn run<D: Disk + ?Sized>(&self, disk: &D) {
        loop {
            let mut job = {
                let mut jobs = lock(&self.jobs);
                loop {
                    if jobs.1 {
                        return;
                    }
                    match jobs.0.pop_front() {
                        Some(job) => break job,
                        None => jobs = self.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner),
                    }
                }
            };
            let result = disk.read(job.offset, &mut job.buf);
            // Nobody may wait any more.
            let _ = job.done.send((job.buf, result));
        }
    }
}
