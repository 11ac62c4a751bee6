//! Measures, from a user's seat, how long reads and writes stand still during a fault: threads
//! that read and write small blocks on every chain through the mount, past the page cache, and
//! remember the longest operation.

use anyhow::{Context as _, Result};
use firefly_types::lock;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// O_DIRECT wants memory, offset and length in multiples of the block size.
const BLOCK: usize = 4096;
/// Rest between two rounds: frequent enough to time a pause to a tenth of a second, rare enough
/// not to be the load.
const REST: Duration = Duration::from_millis(50);

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

/// The running threads: one that writes, and one that reads, so that a write that stands still does
/// not hide how reads fare.
#[derive(Debug)]
pub struct Probe {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

#[repr(align(4096))]
struct Aligned([u8; BLOCK]);

impl Probe {
    /// Starts probing in `file`, with one block in each of `chunks` chunks of `chunk_bytes`, so
    /// that every chain under the file is touched. Each block is written as a whole with one
    /// value; the value grows by one with each round, modulo 256.
    pub fn start(file: &Path, chunks: usize, chunk_bytes: u64) -> Result<Self> {
        let open = || {
            OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(file)
                .with_context(|| format!("cannot open the probe file {}", file.display()))
        };
        let offset = move |chunk: usize| chunk as u64 * chunk_bytes;
        let (writer, reader) = (open()?, open()?);
        // The first round comes before the threads: the reader finds every block there.
        for chunk in 0..chunks {
            writer.write_all_at(&Box::new(Aligned([0; BLOCK])).0, offset(chunk))?;
        }
        writer.sync_all()?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(AtomicBool::new(false));
        // What each block held after the last write that ended, and what a write in progress makes it.
        let rounds: Arc<Vec<AtomicU64>> = Arc::new((0..chunks).map(|_| AtomicU64::new(0)).collect());

        let (shared, stopped, written) = (seen.clone(), stop.clone(), rounds.clone());
        let write = std::thread::Builder::new().name("probe-write".into()).spawn(move || {
            let mut block = Box::new(Aligned([0; BLOCK]));
            for round in 1u64.. {
                for chunk in 0..chunks {
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    block.0.fill(round as u8);
                    let before = Instant::now();
                    let outcome =
                        writer.write_all_at(&block.0, offset(chunk)).and_then(|()| writer.sync_data());
                    let took = before.elapsed();
                    written[chunk].store(round, Ordering::SeqCst);
                    let mut seen = lock(&shared);
                    seen.longest_write = seen.longest_write.max(took);
                    seen.note(outcome.map_err(|e| format!("a write failed: {e}")));
                }
                std::thread::sleep(REST);
            }
        })?;
        let (shared, stopped) = (seen.clone(), stop.clone());
        let read = std::thread::Builder::new().name("probe-read".into()).spawn(move || {
            let mut block = Box::new(Aligned([0; BLOCK]));
            while !stopped.load(Ordering::Relaxed) {
                for (chunk, round) in rounds.iter().enumerate() {
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    let least = round.load(Ordering::SeqCst);
                    let before = Instant::now();
                    let outcome = reader.read_exact_at(&mut block.0, offset(chunk));
                    let took = before.elapsed();
                    // Whatever was written before the read began, or by a write beside it.
                    let most = round.load(Ordering::SeqCst) + 1;
                    let is_right = block.0.iter().all(|b| *b == block.0[0])
                        && (least..=most).any(|round| round as u8 == block.0[0]);
                    let mut seen = lock(&shared);
                    seen.longest_read = seen.longest_read.max(took);
                    seen.note(match outcome {
                        Ok(()) if is_right => Ok(()),
                        Ok(()) => Err("a read gave other bytes than were written".to_owned()),
                        Err(error) => Err(format!("a read failed: {error}")),
                    });
                }
                std::thread::sleep(REST);
            }
        })?;
        Ok(Self { seen, stop, threads: vec![write, read] })
    }

    /// Forgets what was seen.
    pub fn reset(&self) {
        *lock(&self.seen) = Seen::default();
    }

    /// What was seen since the last reset.
    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Ends the threads, after the operations in progress.
    pub fn stop(mut self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic of the probe has already been printed by the panic hook.
            let _ = thread.join();
        }
        self.seen()
    }
}

impl Seen {
    fn note(&mut self, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => self.operations += 1,
            Err(why) => {
                self.failures += 1;
                self.last_failure = why;
            }
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // Not joined: on an abandoned mount the last operations may hang until the unmount.
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_healthy_file_shows_operations_and_a_scribbled_one_shows_failures() {
        // On the project's own disk: a tmpfs of old refuses O_DIRECT.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("probe");
        let probe = Probe::start(&path, 2, 1 << 20).unwrap();
        while probe.seen().operations < 20 {
            std::thread::yield_now();
        }
        assert_eq!(probe.seen().failures, 0, "{}", probe.seen().last_failure);
        let scribbler = OpenOptions::new().write(true).open(&path).unwrap();
        while probe.seen().failures == 0 {
            scribbler.write_all_at(b"not what was written", 1 << 20).unwrap();
        }
        assert!(probe.stop().last_failure.contains("other bytes"));
    }
}
