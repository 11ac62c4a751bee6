//! Ranks as real processes: a test function runs itself again, once per rank, with the rank in
//! the environment. A watchdog in each turns a hang into a failure.
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod values;

use firefly_reduce::{
    Callback, Communicator, Config, DType, Handle, Operation, RawBuf, ReduceError, Request, Store,
    StoreError, SubmitOptions,
};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// A hang ends after this long. Far beyond what any test takes, so that a slow machine passes.
const WATCHDOG: Duration = Duration::from_secs(150);
/// A test's parent waits a little less for what its ranks say.
const PATIENCE: Duration = Duration::from_secs(120);

/// A store in a folder.
pub(crate) struct FileStore(pub(crate) PathBuf);

impl Store for FileStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let name = key.replace('/', "_");
        let made = self.0.join(format!(".{name}.{}", std::process::id()));
        std::fs::write(&made, value).map_err(|e| StoreError::Failed(e.to_string()))?;
        std::fs::rename(&made, self.0.join(name)).map_err(|e| StoreError::Failed(e.to_string()))
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        let until = Instant::now() + timeout;
        loop {
            if let Ok(value) = std::fs::read(self.0.join(key.replace('/', "_"))) {
                return Ok(value);
            }
            if Instant::now() >= until {
                return Err(StoreError::Timeout { key: key.into(), waited: timeout });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// What a rank's process knows.
pub(crate) struct Rank {
    pub(crate) rank: u32,
    pub(crate) size: u32,
    pub(crate) node: String,
    pub(crate) dir: PathBuf,
}

impl Rank {
    pub(crate) fn config(&self, group: &str) -> Config {
        let mut config = Config::new(self.rank, self.size);
        config.group = group.into();
        config.node_key = Some(self.node.clone());
        config.timeout = Duration::from_secs(60);
        config
    }

    pub(crate) fn create(&self, config: &Config) -> Result<Communicator, ReduceError> {
        Communicator::create(config, &FileStore(self.dir.clone()))
    }

    pub(crate) fn group(&self, name: &str) -> Communicator {
        self.create(&self.config(name)).unwrap()
    }

    /// Says something to the other processes of the test.
    pub(crate) fn note(&self, name: &str) {
        std::fs::write(self.dir.join(name), std::process::id().to_string()).unwrap();
    }

    pub(crate) fn await_note(&self, name: &str) -> u32 {
        await_note(&self.dir, name)
    }
}

pub(crate) fn await_note(dir: &Path, name: &str) -> u32 {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(pid) = std::fs::read_to_string(dir.join(name)).ok().and_then(|t| t.parse().ok()) {
            return pid;
        }
        if Instant::now() >= until {
            for rank in 0..8 {
                let output = std::fs::read_to_string(dir.join(format!("output{rank}")));
                eprintln!("rank {rank}: {}", output.unwrap_or_default());
            }
            panic!("{name} never came");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs `body` in one process per rank. `nodes` has one letter per rank: equal letters share a
/// node. Panics unless every rank succeeds.
pub(crate) fn world(test: &str, nodes: &str, body: impl Fn(&Rank)) {
    if let Some(outcome) = launch(test, nodes, body, |_, _| {}) {
        for (rank, (status, output)) in outcome.iter().enumerate() {
            assert!(status.success(), "{test} on {nodes}: rank {rank} ended with {status}:\n{output}");
        }
    }
}

/// As [`world`], but the caller judges the outcomes; `meddle` runs in the parent while the ranks
/// run. `None` in a rank's process.
pub(crate) fn launch(
    test: &str,
    nodes: &str,
    body: impl Fn(&Rank),
    meddle: impl FnOnce(&Path, &mut [Child]),
) -> Option<Vec<(ExitStatus, String)>> {
    // A test may launch several worlds; a rank's process takes part in its own only.
    thread_local!(static LAUNCHED: Cell<u32> = const { Cell::new(0) });
    let launch = LAUNCHED.replace(LAUNCHED.get() + 1).to_string();
    if let Ok(mine) = std::env::var("FFR_TEST_LAUNCH") {
        if mine == launch {
            std::thread::spawn(|| {
                std::thread::sleep(WATCHDOG);
                eprintln!("the watchdog ended a rank that hangs");
                std::process::exit(99);
            });
            let rank: u32 = std::env::var("FFR_TEST_RANK").unwrap().parse().unwrap();
            body(&Rank {
                rank,
                size: nodes.len() as u32,
                node: format!("node {}", &nodes[rank as usize..][..1]),
                dir: std::env::var("FFR_TEST_DIR").unwrap().into(),
            });
        }
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut children: Vec<Child> = (0..nodes.len())
        .map(|rank| {
            let output = std::fs::File::create(dir.path().join(format!("output{rank}"))).unwrap();
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", test, "--include-ignored", "--nocapture", "--test-threads", "1"])
                .env("FFR_TEST_LAUNCH", &launch)
                .env("FFR_TEST_RANK", rank.to_string())
                .env("FFR_TEST_DIR", dir.path())
                .stdout(output.try_clone().unwrap())
                .stderr(output)
                .spawn()
                .unwrap()
        })
        .collect();
    meddle(dir.path(), &mut children);
    let statuses: Vec<ExitStatus> = children.iter_mut().map(|child| child.wait().unwrap()).collect();
    let outputs = (0..nodes.len()).map(|rank| {
        let bytes = std::fs::read(dir.path().join(format!("output{rank}"))).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    });
    Some(statuses.into_iter().zip(outputs).collect())
}

/// Memory for elements of any type, aligned for all.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Memory {
    words: Vec<u128>,
    len: usize,
}

impl Memory {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let mut memory = Self { words: vec![0; bytes.len().div_ceil(16)], len: bytes.len() };
        memory.bytes_mut().copy_from_slice(bytes);
        memory
    }

    pub(crate) fn zeroed(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(16)], len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: words holds at least len bytes, and u128 has no padding.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), self.len) }
    }

    pub(crate) fn buf(&mut self, dtype: DType) -> RawBuf {
        RawBuf { ptr: self.words.as_mut_ptr().cast(), count: self.len / dtype.size() }
    }
}

/// Submits and waits.
pub(crate) fn run(
    group: &Communicator,
    operation: Operation,
    dtype: DType,
    input: &[RawBuf],
    output: &[RawBuf],
) -> Result<(), ReduceError> {
    start(group, operation, dtype, input, output, None)?.wait()
}

/// Submits; the tests keep the memory until the operation is complete.
pub(crate) fn start(
    group: &Communicator,
    operation: Operation,
    dtype: DType,
    input: &[RawBuf],
    output: &[RawBuf],
    callback: Option<Callback>,
) -> Result<Handle, ReduceError> {
    let request = Request { operation, dtype, input, output };
    // SAFETY: the tests keep the memory alive and untouched until the operation is complete.
    unsafe { group.submit(&request, SubmitOptions::default(), callback) }
}
