//! Measures, from a user's seat, how long reads and writes stand still during a fault: a thread
//! that reads and writes small blocks on every chain through the mount, past the page cache, and
//! remembers the longest operation.

use anyhow::{Context as _, Result};
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// O_DIRECT wants memory, offset and length in multiples of the block size.
const BLOCK: usize = 4096;
/// Rest between two rounds: frequent enough to time a pause to a tenth of a second, rare enough
/// not to be the load.
const REST: Duration = Duration::from_millis(25);

/// What the probe has seen since the last [`Probe::reset`].
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Longest durable write.
    pub longest_write: Duration,
    /// Longest read.
    pub longest_read: Duration,
    /// Operations that ended well.
    pub operations: u64,
    /// Operations that failed, or gave back other bytes than were written; the last with its reason.
    pub failures: u64,
    /// The last failure.
    pub last_failure: String,
}

/// The running thread.
#[derive(Debug)]
pub struct Probe {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

impl Probe {
    /// Starts probing in `file`, with one block in each of `chunks` chunks of `chunk_bytes`, so
    /// that every chain under the file is touched.
    pub fn start(file: &Path, chunks: usize, chunk_bytes: u64) -> Result<Self> {
        let handle = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(file)
            .with_context(|| format!("cannot open the probe file {}", file.display()))?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (seen.clone(), stop.clone());
        let thread = std::thread::Builder::new().name("probe".into()).spawn(move || {
            let mut round = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                round += 1;
                for chunk in 0..chunks {
                    if stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    let offset = chunk as u64 * chunk_bytes;
                    let mut block = Box::new(Aligned([0; BLOCK]));
                    block.0.fill((round % 251) as u8);
                    let expected = block.0;
                    let before = Instant::now();
                    let wrote = handle.write_all_at(&block.0, offset).and_then(|()| handle.sync_data());
                    let write_time = before.elapsed();
                    let before = Instant::now();
                    let read = wrote.and_then(|()| handle.read_exact_at(&mut block.0, offset));
                    let read_time = before.elapsed();
                    let mut seen = lock(&shared);
                    seen.longest_write = seen.longest_write.max(write_time);
                    seen.longest_read = seen.longest_read.max(read_time);
                    match read {
                        Ok(()) if block.0 == expected => seen.operations += 2,
                        Ok(()) => {
                            seen.failures += 1;
                            seen.last_failure = "a read gave other bytes than were written".into();
                        }
                        Err(error) => {
                            seen.failures += 1;
                            seen.last_failure = error.to_string();
                        }
                    }
                }
                std::thread::sleep(REST);
            }
        })?;
        Ok(Self { seen, stop, thread: Some(thread) })
    }

    /// Forgets what was seen.
    pub fn reset(&self) {
        *lock(&self.seen) = Seen::default();
    }

    /// What was seen since the last reset.
    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Ends the thread, after the operation in progress.
    pub fn stop(mut self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the probe has already been printed by the panic hook.
            let _ = thread.join();
        }
        self.seen()
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // Not joined: on an abandoned mount its last operation may hang until the unmount.
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    // The data is plain counters: a panicking holder leaves them usable.
    seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
