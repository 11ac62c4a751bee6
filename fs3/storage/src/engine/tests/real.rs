//! Real files, with io_uring and without.

use super::*;
use std::sync::Arc;

type Real = super::super::Engine<FileDisk, Bytes>;

/// Drives an engine in a thread of its own and waits for what is submitted.
struct Driven {
    engine: Arc<Real>,
    done: std::sync::mpsc::Receiver<Done<Bytes>>,
    thread: std::thread::JoinHandle<()>,
    recovered: Recovered,
}

impl Driven {
    fn open(dir: &std::path::Path, way: Way) -> Self {
        let options = EngineOptions { log_bytes: 1 << 20, grow_bytes: 4 << 20, ..SMALL };
        let (engine, recovered) = Real::open(FileDisk::open(dir).unwrap(), HEADER, options, way).unwrap();
        let engine = Arc::new(engine);
        let (send, done) = std::sync::mpsc::channel();
        let mine = Arc::clone(&engine);
        let thread = std::thread::spawn(move || {
            let mut driver = mine.driver();
            while let Some(ended) = mine.turn(&mut driver) {
                ended.into_iter().for_each(|done| send.send(done).unwrap());
            }
        });
        Self { engine, done, thread, recovered }
    }

    fn apply(&self, base: u64, update: Update<Bytes>) -> Meta {
        let chunk = update.chunk;
        self.engine.write(1, base, base + 1, update, false);
        let Done::Written { result, .. } = self.done.recv().unwrap() else { panic!("not a write") };
        self.engine.commit(chunk, base + 1);
        result.unwrap()
    }

    fn read(&self, runtime: &tokio::runtime::Runtime, id: ChunkId, from: u32, len: usize) -> Bytes {
        let mut plan = self.engine.plan_read(id, false, from..from + len as u32).unwrap();
        let mut out = vec![0; len];
        runtime.block_on(self.engine.read(&mut plan, from as usize, &mut out)).unwrap();
        out
    }

    fn close(self) {
        self.engine.stop();
        self.thread.join().unwrap();
        assert!(self.engine.core().audit(&**self.engine.disk()).is_ok());
        self.engine.release();
    }
}

fn works(dir: &std::path::Path, way: Way) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let bytes: Bytes = (0..3_000_000u32).map(|i| (i / 7 % 251) as u8).collect();
    let driven = Driven::open(dir, way);
    assert!(FileDisk::open(dir).is_err(), "a folder belongs to one process");
    driven.apply(0, update(chunk(0), Kind::Write, 3, 0, Some(bytes.clone())));
    for n in 0..200u32 {
        driven.apply(
            u64::from(n / 20),
            update(chunk(1 + n % 20), Kind::Write, n / 20 * 5000, 0, Some(bytes[..6000].to_vec())),
        );
    }
    // More writes at once than the kernel takes.
    let payload: Bytes = bytes[..4096].to_vec();
    for n in 0..1000 {
        let update = update(chunk(1000 + n), Kind::Write, 0, 0, Some(payload.clone()));
        driven.engine.write(u64::from(n), 0, 1, update, true);
    }
    (0..1000).for_each(|_| assert!(matches!(driven.done.recv(), Ok(Done::Written { result: Ok(_), .. }))));
    // Many reads at once.
    runtime.block_on(async {
        let reads = (0..400usize).map(|n| {
            let (engine, bytes) = (&driven.engine, &bytes);
            async move {
                let from = n * 7001;
                let mut plan = engine.plan_read(chunk(0), false, from as u32..from as u32 + 20_000).unwrap();
                let mut out = vec![0; 20_000];
                engine.read(&mut plan, from, &mut out).await.unwrap();
                assert!(n == 0 || out[..] == bytes[from - 3..from - 3 + 20_000], "read {n}");
            }
        });
        futures::future::join_all(reads).await;
    });
    driven.close();
    let driven = Driven::open(dir, way);
    assert_eq!((driven.recovered.pending.len(), driven.recovered.committed.len()), (0, 1021));
    assert!(driven.read(&runtime, chunk(0), 3, 3_000_000) == bytes);
    let last = driven.read(&runtime, chunk(20), 45_000, 6000);
    assert!(last == bytes[..6000]);
    driven.close();
    assert!(!FileDisk::is_empty(dir).unwrap());
    FileDisk::wipe(dir).unwrap();
    assert!(FileDisk::is_empty(dir).unwrap());
}

#[test]
fn a_folder_works_with_io_uring() {
    let dir = tempfile::tempdir().unwrap();
    works(&dir.path().join("t7"), Way::Best);
}

#[test]
fn a_folder_works_without_io_uring() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t7");
    works(&path, Way::Threads);
    let (engine, _) = Real::open(FileDisk::open(&path).unwrap(), HEADER, SMALL, Way::Threads).unwrap();
    assert!(!engine.uses_ring());
}

#[test]
fn memory_without_a_disk_says_so() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("t7");
    assert!(FileDisk::open(&path).unwrap().is_volatile());
    works(&path, Way::Best);
}

#[test]
fn a_link_leads_to_an_image_and_wiping_leaves_it_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let (path, image) = (dir.path().join("t7"), dir.path().join("image"));
    std::fs::create_dir(&path).unwrap();
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    std::os::unix::fs::symlink(&image, path.join("volume")).unwrap();
    assert!(FileDisk::is_empty(&path).unwrap());
    let driven = Driven::open(&path, Way::Best);
    driven.apply(0, update(chunk(0), Kind::Write, 0, 0, Some(vec![1; 5000])));
    driven.close();
    assert!(!FileDisk::is_empty(&path).unwrap());
    FileDisk::wipe(&path).unwrap();
    assert!(FileDisk::is_empty(&path).unwrap() && image.exists());
    let driven = Driven::open(&path, Way::Best);
    assert_eq!(driven.recovered.committed.len(), 0);
    driven.close();
}

#[test]
fn a_folder_of_the_old_format_is_refused_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("header"), b"FF3TARGT\x01\0\0\0").unwrap();
    assert!(!FileDisk::is_empty(dir.path()).unwrap());
    let refused = FileDisk::open(dir.path()).err().unwrap();
    assert!(matches!(refused, EngineError::Format(FormatError::TooOld { found: 1 })));
    assert!(refused.to_string().contains("remove the folder"), "{refused}");
}

/// A loop device over an image, detached when dropped.
struct Loop(String);

impl Loop {
    /// `None` where the machine does not let us: no root, or no loop devices.
    fn attach(image: &std::path::Path, sector: u32) -> Option<Self> {
        let done = std::process::Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--sector-size", &sector.to_string()])
            .arg(image)
            .output()
            .ok()?;
        let device = String::from_utf8(done.stdout).ok()?.trim().to_owned();
        done.status.success().then_some(Self(device))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = std::process::Command::new("losetup").args(["--detach", &self.0]).status();
        assert!(detached.is_ok_and(|status| status.success()), "{} stays attached", self.0);
    }
}

#[test]
fn a_block_device_is_used_as_it_is_and_its_sector_is_found_out() {
    for sector in [512, 4096] {
        let dir = tempfile::tempdir().unwrap();
        let (path, image) = (dir.path().join("t7"), dir.path().join("image"));
        std::fs::create_dir(&path).unwrap();
        std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let Some(device) = Loop::attach(&image, sector) else {
            println!("not tested: losetup needs root and loop devices");
            return;
        };
        std::os::unix::fs::symlink(&device.0, path.join("volume")).unwrap();
        let disk = FileDisk::open(&path).unwrap();
        assert_eq!((disk.sector_bytes(), disk.size().unwrap(), disk.free_bytes()), (sector, 64 << 20, 0));
        assert!(!disk.is_volatile() && disk.is_direct());
        drop(disk);
        let driven = Driven::open(&path, Way::Best);
        driven.apply(0, update(chunk(0), Kind::Write, 100, 0, Some(vec![1; 50_000])));
        driven.close();
        let driven = Driven::open(&path, Way::Best);
        assert_eq!(driven.recovered.committed.len(), 1);
        driven.close();
        FileDisk::wipe(&path).unwrap();
        assert!(FileDisk::is_empty(&path).unwrap() && path.join("volume").exists());
    }
}
