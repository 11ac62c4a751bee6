//! A load that checks itself: clients overwrite cells of a few files at random and read them back,
//! past every cache, and note what was asked and answered when.

use crate::history::{Did, History, Operation};
use firefly_net::Identity;
use fs3_client::{ClientOptions, Credentials, Durability, File, Fs3, OpenMode};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Files written to.
pub const FILES: usize = 3;
/// Cells of a file: it spans two chunks.
pub const CELLS: usize = 192;
/// Bytes of a cell: half a block, so that overwrites keep a part of what they lie on.
const CELL: usize = 8192;
/// Cells that one operation touches at most.
const MOST: usize = 6;

/// Patience of a client that only reads: one that is cut off with a server must not spend the cut on
/// chunks that are out of its reach, when what it is there for are the others.
const READER: Duration = Duration::from_millis(300);

/// Everybody in the cluster's files may do everything here.
const ROOT: Credentials = Credentials { uid: 0, gid: 0, groups: Vec::new() };

/// What the clients share.
pub struct Plan {
    /// Decides what is done.
    pub seed: u64,
    /// The manager's address.
    pub manager: String,
    /// How clients prove membership.
    pub identity: Identity,
    /// Where time begins.
    pub clock: Instant,
    /// Ends the load.
    pub stop: AtomicBool,
    /// Clients whose files are open.
    pub ready: AtomicU64,
    /// Operations answered.
    pub answered: AtomicU64,
    /// Operations that ended in an error.
    pub failed: AtomicU64,
    /// No two writes have the same.
    tags: AtomicU64,
}

impl Plan {
    /// A load that has not begun.
    pub fn new(seed: u64, manager: String, identity: Identity) -> Arc<Self> {
        Arc::new(Self {
            seed,
            manager,
            identity,
            clock: Instant::now(),
            stop: AtomicBool::new(false),
            ready: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            tags: AtomicU64::new(1),
        })
    }

    fn now(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64 + 1
    }

    fn path(file: usize) -> String {
        format!("/faults-{file}")
    }

    async fn connect(&self) -> Arc<Fs3> {
        let options = ClientOptions::new(self.manager.clone(), self.identity.clone());
        Fs3::connect(options).await.expect("a client connects before anything is broken")
    }

    /// Makes the files: full of holes, which read as tag 0.
    pub async fn prepare(&self) {
        let fs = self.connect().await;
        for file in 0..FILES {
            let made = fs.create_path(&ROOT, &Self::path(file), 0o644).await.expect("a file");
            made.extend((CELLS * CELL) as u64).await.expect("its length");
            made.close().await.expect("closing it");
        }
        fs.shutdown().await.expect("a shutdown");
    }

    async fn open(&self, fs: &Arc<Fs3>) -> Vec<File> {
        let mut files = Vec::new();
        for file in 0..FILES {
            let inode = fs.stat_path(&ROOT, &Self::path(file), true).await.expect("it is there");
            let mode = OpenMode { read: true, write: true, ..OpenMode::default() };
            files.push(fs.open(&ROOT, inode.inode_id, mode).await.expect("it opens").1);
        }
        files
    }

    /// One client with `workers` operations at a time, until the end. `writes`: out of ten operations.
    pub async fn run(self: Arc<Self>, client: u64, workers: u64, writes: u32) -> History {
        let fs = self.connect().await;
        let files = Arc::new(self.open(&fs).await);
        self.ready.fetch_add(1, Ordering::Relaxed);
        let lanes = (0..workers).map(|worker| {
            let (plan, files) = (Arc::clone(&self), Arc::clone(&files));
            let rng = ChaCha8Rng::seed_from_u64(plan.seed ^ (client << 32 | worker << 16));
            tokio::spawn(plan.work(files, rng, writes))
        });
        let mut history = History::default();
        for lane in lanes.collect::<Vec<_>>() {
            history.merge(lane.await.expect("a worker ends"));
        }
        history
    }

    async fn work(self: Arc<Self>, files: Arc<Vec<File>>, mut rng: ChaCha8Rng, writes: u32) -> History {
        let mut history = History::default();
        while !self.stop.load(Ordering::Relaxed) {
            let file = rng.random_range(0..FILES);
            let first = rng.random_range(0..CELLS);
            let count = rng.random_range(1..=MOST).min(CELLS - first);
            let is_fine = match rng.random_range(0..10) < writes {
                true => self.write(&files, file, first, count, &mut history).await,
                false if writes == 0 => {
                    let read = self.read(&files, file, first, count, &mut history);
                    // Nothing is noted of a read that is given up: it has no effect.
                    tokio::time::timeout(READER, read).await.unwrap_or(false)
                }
                false => self.read(&files, file, first, count, &mut history).await,
            };
            (if is_fine { &self.answered } else { &self.failed }).fetch_add(1, Ordering::Relaxed);
        }
        history
    }

    async fn write(
        &self,
        files: &[File],
        file: usize,
        first: usize,
        count: usize,
        history: &mut History,
    ) -> bool {
        let tag = self.tags.fetch_add(1, Ordering::Relaxed);
        let bytes: Vec<u8> = tag.to_le_bytes().iter().copied().cycle().take(count * CELL).collect();
        let start = self.now();
        let result = files[file].write_at((first * CELL) as u64, &bytes, Durability::Direct).await;
        // After an error nobody knows: parts of it may take effect, now or later.
        let end = result.is_ok().then(|| self.now());
        for cell in first..first + count {
            history.add((file, cell), Operation { did: Did::Write(tag), start, end });
        }
        result.is_ok()
    }

    async fn read(
        &self,
        files: &[File],
        file: usize,
        first: usize,
        count: usize,
        history: &mut History,
    ) -> bool {
        let start = self.now();
        let Ok(data) = files[file].read_at((first * CELL) as u64, count * CELL, true).await else {
            return false;
        };
        let end = Some(self.now());
        let bytes: &[u8] = &data;
        assert_eq!(bytes.len(), count * CELL, "a read within the file was cut short");
        for (i, cell) in bytes.chunks(CELL).enumerate() {
            let tag = u64::from_le_bytes(cell[..8].try_into().expect("eight bytes"));
            let torn = cell.chunks(8).any(|word| word != tag.to_le_bytes());
            // A tag that was never written is what the checker looks for.
            let tag = if torn { u64::MAX } else { tag };
            history.add((file, first + i), Operation { did: Did::Read(tag), start, end });
        }
        true
    }

    /// Reads everything a few times with a client of its own, so that every replica is asked.
    pub async fn read_all(&self) -> History {
        let fs = self.connect().await;
        let files = self.open(&fs).await;
        let mut history = History::default();
        for _ in 0..4 {
            for file in 0..FILES {
                for first in (0..CELLS).step_by(MOST) {
                    let count = MOST.min(CELLS - first);
                    let is_fine = self.read(&files, file, first, count, &mut history).await;
                    assert!(is_fine, "file {file} cannot be read though everything works again");
                }
            }
        }
        history
    }
}
