//! The chunk engine alone against the raw disk below it, in turns.
//!
//! ```text
//! cargo bench -p fs3-storage -- [speed] [writes] [chunks] [--dir DIR] [--rounds N] [--mib N]
//! ```
//!
//! * `speed`: sequential and random reads, sequential and small durable writes; the denominators are
//!   fio (io_uring, direct) on a file in the same folder, and write + fdatasync for latencies.
//! * `writes`: device sectors per payload byte (/proc/diskstats) of random overwrites. Counts all that
//!   is written to the device of DIR: put DIR on a file system that nobody else uses.
//! * `chunks`: memory and opening time with a million chunks.
//!
//! Figures are medians [smallest–largest] of the rounds. Use a quiet machine.

use firefly_types::{ChunkId, ClusterId, DataId, Generation, TargetId};
use fs3_core::target::{Context, Kind, Target, TargetOptions, Update};
use fs3_storage::engine::{AlignedBuf, Done, Engine, EngineOptions, FileDisk, Header, Way};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;
const HEADER: Header = Header { cluster: ClusterId(1), target: TargetId(1) };

type Payload = Arc<[u8]>;
type Bench = Engine<FileDisk, Payload>;

struct Settings {
    dir: PathBuf,
    rounds: usize,
    mib: usize,
    seconds: f64,
    parts: Vec<String>,
}

fn main() {
    let mut settings = Settings {
        dir: std::env::temp_dir().join("fs3-engine-bench"),
        rounds: 5,
        mib: 1024,
        seconds: 3.0,
        parts: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().expect("a value follows");
        match argument.as_str() {
            "--bench" => {}
            "--dir" => settings.dir = value().into(),
            "--rounds" => settings.rounds = value().parse().expect("a number"),
            "--mib" => settings.mib = value().parse().expect("a number"),
            "--seconds" => settings.seconds = value().parse().expect("a number"),
            part => settings.parts.push(part.to_owned()),
        }
    }
    std::fs::create_dir_all(&settings.dir).expect("the folder can be made");
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average {}; device {}", load.trim(), device_of(&settings.dir));
    let wants = |part: &str| settings.parts.is_empty() || settings.parts.iter().any(|p| p == part);
    if wants("speed") {
        speed(&settings);
    }
    if wants("writes") {
        writes(&settings);
    }
    if wants("chunks") {
        chunks(&settings);
    }
    std::fs::remove_dir_all(&settings.dir).expect("the folder can be removed");
}

// ---- the engine, driven ----

struct Driven {
    engine: Arc<Bench>,
    done: mpsc::Receiver<Done<Payload>>,
    thread: std::thread::JoinHandle<()>,
    versions: HashMap<u32, u64>,
}

fn chunk(index: u32) -> ChunkId {
    ChunkId { data: DataId(1), generation: Generation(1), index }
}

impl Driven {
    fn open(dir: &Path, options: EngineOptions) -> Self {
        let disk = FileDisk::open(dir).expect("the folder is free");
        let (engine, recovered) = Bench::open(disk, HEADER, options, Way::Best).expect("the volume opens");
        let engine = Arc::new(engine);
        let (send, done) = mpsc::channel();
        let mine = Arc::clone(&engine);
        let thread = std::thread::spawn(move || {
            let mut driver = mine.driver();
            while let Some(ended) = mine.turn(&mut driver) {
                for done in ended {
                    // Nobody listens once the bench has ended.
                    let _ = send.send(done);
                }
            }
        });
        let versions = recovered.committed.iter().map(|(id, meta)| (id.index, meta.version)).collect();
        Self { engine, done, thread, versions }
    }

    fn start(&mut self, index: u32, offset: usize, payload: &Payload) {
        let base = self.versions.get(&index).copied().unwrap_or(0);
        let update = Update {
            context: Context::default(),
            chunk: chunk(index),
            kind: Kind::Write,
            offset: offset as u32,
            length: 0,
            crc: 0,
            chunk_bytes: MIB as u32,
            payload: Some(Arc::clone(payload)),
        };
        self.engine.write(u64::from(index), base, base + 1, update, false);
    }

    /// Waits for a write to be durable, and commits it: which chunk.
    fn finish(&mut self) -> u32 {
        match self.done.recv().expect("the engine runs") {
            Done::Written { chunk, result, .. } => {
                let version = result.expect("the write succeeds").version;
                self.versions.insert(chunk.index, version);
                self.engine.commit(chunk, version);
                chunk.index
            }
            other => panic!("{other:?}"),
        }
    }

    /// Writes chunks one after the other with `depth` of them on the way.
    fn fill(&mut self, count: u32, depth: usize, payload: &Payload) {
        let mut on_the_way = 0;
        for index in 0..count {
            if on_the_way == depth {
                self.finish();
                on_the_way -= 1;
            }
            self.start(index, 0, payload);
            on_the_way += 1;
        }
        (0..on_the_way).for_each(|_| {
            self.finish();
        });
    }

    /// Random overwrites of 4 KiB, `depth` on the way, on different chunks; each one's time.
    fn overwrite(
        &mut self,
        rng: &mut ChaCha8Rng,
        count: usize,
        depth: usize,
        until: Option<Instant>,
    ) -> Vec<Duration> {
        let chunks = self.versions.len() as u32;
        let payload: Payload = random_bytes(BLOCK).into();
        let mut begun: HashMap<u32, Instant> = HashMap::new();
        let mut times = Vec::new();
        for _ in 0..count {
            if until.is_some_and(|until| Instant::now() > until) {
                break;
            }
            if begun.len() == depth {
                let index = self.finish();
                times.extend(begun.remove(&index).map(|at| at.elapsed()));
            }
            let index = loop {
                let index = rng.random_range(0..chunks);
                if !begun.contains_key(&index) {
                    break index;
                }
            };
            begun.insert(index, Instant::now());
            self.start(index, rng.random_range(0..256) * BLOCK, &payload);
        }
        while !begun.is_empty() {
            let index = self.finish();
            times.extend(begun.remove(&index).map(|at| at.elapsed()));
        }
        times
    }

    /// Reads of `len` bytes, `depth` at a time, for so long; bytes per second.
    fn read(
        &self,
        runtime: &tokio::runtime::Runtime,
        len: usize,
        depth: usize,
        random: bool,
        seconds: f64,
    ) -> f64 {
        let chunks = self.versions.len() as u32;
        let next = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let begin = Instant::now();
        let until = begin + Duration::from_secs_f64(seconds);
        let tasks: Vec<_> = (0..depth)
            .map(|n| {
                let (engine, next) = (Arc::clone(&self.engine), Arc::clone(&next));
                runtime.spawn(async move {
                    let mut rng = ChaCha8Rng::seed_from_u64(n as u64);
                    let mut out = AlignedBuf::zeroed(len);
                    let mut bytes = 0;
                    while Instant::now() < until {
                        let (index, offset) = match random {
                            true => (rng.random_range(0..chunks), rng.random_range(0..MIB / len) * len),
                            false => (next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % chunks, 0),
                        };
                        let range = offset as u32..(offset + len) as u32;
                        let mut plan = engine.plan_read(chunk(index), false, range).expect("it is there");
                        engine.read(&mut plan, offset, &mut out).await.expect("it is sound");
                        bytes += len;
                    }
                    bytes
                })
            })
            .collect();
        let bytes: usize = tasks.into_iter().map(|t| runtime.block_on(t).expect("the task ends")).sum();
        bytes as f64 / begin.elapsed().as_secs_f64()
    }

    fn close(self) {
        self.engine.stop();
        self.thread.join().expect("the thread ends");
        self.engine.release();
    }
}

fn random_bytes(len: usize) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    (0..len).map(|_| rng.random()).collect()
}

// ---- the raw disk ----

/// One fio job on a file of the folder; bytes per second.
fn fio(settings: &Settings, arguments: &[&str]) -> f64 {
    let done = Command::new("fio")
        .args(["--name=raw", "--ioengine=io_uring", "--direct=1", "--output-format=json", "--fallocate=none"])
        .arg(format!("--filename={}", settings.dir.join("raw").display()))
        .arg(format!("--size={}m", settings.mib))
        .args(arguments)
        .output()
        .expect("fio is installed");
    let text = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "fio failed: {text}{}", String::from_utf8_lossy(&done.stderr));
    // Bytes and milliseconds of the side that moved bytes; the last "job_runtime" covers syncs too.
    let number = |key: &str| -> Vec<f64> {
        text.split(&format!("\"{key}\" : "))
            .skip(1)
            .filter_map(|rest| rest.split([',', '\n']).next()?.trim().parse().ok())
            .collect()
    };
    let bytes = number("io_bytes").into_iter().fold(0.0, f64::max);
    let runtime = number("job_runtime").into_iter().fold(0.0, f64::max);
    bytes / (runtime / 1000.0)
}

fn raw_file(settings: &Settings) -> std::fs::File {
    let path = settings.dir.join("raw");
    let mut options = std::fs::OpenOptions::new();
    options.write(true).custom_flags(libc::O_DIRECT);
    options.open(path).expect("fio has made the file")
}

/// Random writes of 4 KiB, each with its flush; each one's time.
fn raw_latencies(settings: &Settings, rng: &mut ChaCha8Rng) -> Vec<Duration> {
    let file = raw_file(settings);
    let mut block = AlignedBuf::zeroed(BLOCK);
    block.copy_from_slice(&random_bytes(BLOCK));
    let until = Instant::now() + Duration::from_secs_f64(settings.seconds);
    let mut times = Vec::new();
    while Instant::now() < until {
        let at = rng.random_range(0..(settings.mib * MIB / BLOCK) as u64) * BLOCK as u64;
        let begin = Instant::now();
        file.write_all_at(&block, at).expect("the disk works");
        file.sync_data().expect("the disk works");
        times.push(begin.elapsed());
    }
    times
}

// ---- figures ----

fn median(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

fn show(name: &str, unit: &str, raw: Vec<f64>, ours: Vec<f64>) {
    let ratio = raw.iter().zip(&ours).map(|(raw, ours)| ours / raw).collect();
    let text =
        |(m, a, b): (f64, f64, f64), digits: usize| format!("{m:.digits$} [{a:.digits$}–{b:.digits$}]");
    println!(
        "| {name} | {} | {} {unit} | {} |",
        text(median(raw), 1),
        text(median(ours), 1),
        text(median(ratio), 2)
    );
}

fn micros(times: &[Duration]) -> f64 {
    median(times.iter().map(|t| t.as_secs_f64() * 1e6).collect()).0
}

fn speed(settings: &Settings) {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("threads");
    let count = settings.mib as u32;
    let payload: Payload = random_bytes(MIB).into();
    let seconds = format!("--runtime={}", settings.seconds);
    let timed = ["--time_based", &seconds];
    fio(settings, &["--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1"]);
    let mut figures: Vec<(&str, &str, Vec<f64>, Vec<f64>)> = [
        ("sequential write 1 MiB, 8 on the way, durable", "MB/s"),
        ("the same over existing chunks", "MB/s"),
        ("sequential read 1 MiB, 4 on the way", "MB/s"),
        ("random read 4 KiB, 32 on the way, map in memory", "kIOPS"),
        ("random read 4 KiB, 32 on the way, map cold", "kIOPS"),
        ("4 KiB durable write, one at a time, median", "µs"),
        ("sequential read after random overwrites", "MB/s"),
    ]
    .map(|(name, unit)| (name, unit, Vec::new(), Vec::new()))
    .into();
    for round in 0..settings.rounds {
        let mut rng = ChaCha8Rng::seed_from_u64(round as u64);
        let dir = settings.dir.join("t1");
        let mut put = |row: usize, raw: f64, ours: f64| {
            figures[row].2.push(raw);
            figures[row].3.push(ours);
        };
        let mut driven = Driven::open(&dir, EngineOptions::default());
        for row in 0..2 {
            let raw = fio(settings, &["--rw=write", "--bs=1m", "--iodepth=8", "--fdatasync=8"]);
            let begin = Instant::now();
            driven.fill(count, 8, &payload);
            put(row, raw / 1e6, (settings.mib * MIB) as f64 / begin.elapsed().as_secs_f64() / 1e6);
        }
        let raw = fio(settings, &["--rw=read", "--bs=1m", "--iodepth=4", timed[0], timed[1]]);
        put(2, raw / 1e6, driven.read(&runtime, MIB, 4, false, settings.seconds) / 1e6);
        let raw =
            fio(settings, &["--rw=randread", "--bs=4k", "--iodepth=32", timed[0], timed[1]]) / BLOCK as f64;
        put(3, raw / 1e3, driven.read(&runtime, BLOCK, 32, true, settings.seconds) / BLOCK as f64 / 1e3);
        let raw_times = raw_latencies(settings, &mut rng);
        let until = Instant::now() + Duration::from_secs_f64(settings.seconds);
        let times = driven.overwrite(&mut rng, usize::MAX, 1, Some(until));
        put(5, micros(&raw_times), micros(&times));
        let raw = fio(settings, &["--rw=read", "--bs=1m", "--iodepth=4", timed[0], timed[1]]);
        // Every block of the data set once, on average: what was neighbours no longer is.
        driven.overwrite(&mut rng, settings.mib * 256, 256.min(settings.mib / 2), None);
        put(6, raw / 1e6, driven.read(&runtime, MIB, 4, false, settings.seconds) / 1e6);
        driven.close();
        // A cache of one leaf or two: every read finds its map on disk.
        let driven = Driven::open(&dir, EngineOptions { cache_bytes: 16 << 10, ..EngineOptions::default() });
        let raw =
            fio(settings, &["--rw=randread", "--bs=4k", "--iodepth=32", timed[0], timed[1]]) / BLOCK as f64;
        put(4, raw / 1e3, driven.read(&runtime, BLOCK, 32, true, settings.seconds) / BLOCK as f64 / 1e3);
        driven.close();
        std::fs::remove_dir_all(&dir).expect("the volume can be removed");
    }
    println!(
        "| {} MiB, {} rounds | raw disk | engine | ratio |\n| --- | --- | --- | --- |",
        settings.mib, settings.rounds
    );
    for (name, unit, raw, ours) in figures {
        show(name, unit, raw, ours);
    }
}

/// Major and minor number of the device under a folder, as /proc/diskstats has them.
fn device_of(dir: &Path) -> String {
    let device = std::fs::metadata(dir).expect("the folder exists").dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    format!("{major}:{minor}")
}

/// Bytes written to the device since the machine started.
fn device_bytes(dir: &Path) -> Option<u64> {
    let device = device_of(dir);
    let (major, minor) = device.split_once(':')?;
    let stats = std::fs::read_to_string("/proc/diskstats").ok()?;
    let line = stats
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>())
        .find(|f| f[0] == major && f[1] == minor)?;
    Some(line[9].parse::<u64>().ok()? * 512)
}

fn writes(settings: &Settings) {
    println!(
        "| random overwrite of 4 KiB, {} MiB of data, 3 times | device bytes per payload byte |\n| --- | --- |",
        settings.mib
    );
    for depth in [1, 32] {
        let dir = settings.dir.join("t1");
        let mut driven = Driven::open(&dir, EngineOptions::default());
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        driven.fill(settings.mib as u32, 8, &random_bytes(MIB).into());
        let count = settings.mib * 256 * 3;
        let before = device_bytes(&dir).expect("the device is in /proc/diskstats");
        let begin = Instant::now();
        driven.overwrite(&mut rng, count, depth, None);
        let elapsed = begin.elapsed().as_secs_f64();
        let after = device_bytes(&dir).expect("the device is in /proc/diskstats");
        let cost = (after - before) as f64 / (count * BLOCK) as f64;
        println!("| {depth} on the way | {cost:.2} ({:.0} writes/s) |", count as f64 / elapsed);
        driven.close();
        std::fs::remove_dir_all(&dir).expect("the volume can be removed");
    }
}

fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    kib.unwrap_or(f64::NAN) / 1e3
}

fn chunks(settings: &Settings) {
    const CHUNKS: u32 = 1_000_000;
    if std::env::var_os("FS3_BENCH_OPEN").is_none() {
        let dir = settings.dir.join("t1");
        let mut driven = Driven::open(&dir, EngineOptions::default());
        driven.fill(CHUNKS, 4096, &random_bytes(BLOCK).into());
        driven.close();
        // A fresh process: what making them took is no part of the figure.
        let me = std::env::current_exe().expect("the bench has a file");
        let status = Command::new(me)
            .args(["chunks", "--dir"])
            .arg(&settings.dir)
            .env("FS3_BENCH_OPEN", "1")
            .status()
            .expect("the bench can start itself");
        assert!(status.success());
        return;
    }
    let before = resident();
    let begin = Instant::now();
    let disk = FileDisk::open(&settings.dir.join("t1")).expect("the folder is free");
    let (engine, recovered) =
        Bench::open(disk, HEADER, EngineOptions::default(), Way::Best).expect("the volume opens");
    let opened = begin.elapsed();
    let held = recovered.committed.len();
    let target: Target<Payload> = Target::new(HEADER.target, 1, TargetOptions::default(), recovered);
    let with_machine = begin.elapsed();
    println!("| {held} chunks of 4 KiB | |\n| --- | --- |");
    println!(
        "| opened in | {:.2} s; {:.2} s with the replication machine |",
        opened.as_secs_f64(),
        with_machine.as_secs_f64()
    );
    println!("| memory, engine and machine | {:.0} MB |", resident() - before);
    assert_eq!(target.committed().len(), engine.core().chunks());
    // The other process removes the folder.
    std::process::exit(0);
}
