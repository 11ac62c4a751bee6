//! Faults on real processes: servers are ended with SIGKILL under a load that checks itself. The
//! model is kept apart from the system: a map from file to the content that was acknowledged.

use firefly_cli::local::Shape;
use firefly_tests::{Cluster, eventually};
use firefly_types::ByteSize;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Files under a folder, and what an fsync has acknowledged of each.
struct Load {
    rng: ChaCha8Rng,
    dir: PathBuf,
    acknowledged: BTreeMap<String, Vec<u8>>,
}

impl Load {
    fn new(seed: u64, dir: PathBuf) -> Self {
        println!("seed {seed}");
        std::fs::create_dir_all(&dir).unwrap();
        Self { rng: ChaCha8Rng::seed_from_u64(seed), dir, acknowledged: BTreeMap::new() }
    }

    /// One operation on one of a few files: write somewhere (and fsync), rename, remove, or read
    /// and compare.
    fn step(&mut self) {
        let name = format!("f{}", self.rng.random_range(0..12));
        let path = self.dir.join(&name);
        match self.rng.random_range(0..10) {
            0..6 => {
                let offset = self.rng.random_range(0..3 << 20);
                let length = self.rng.random_range(1..200_000);
                let byte = self.rng.random::<u8>();
                let data: Vec<u8> = (0..length).map(|i| byte.wrapping_add((i % 251) as u8)).collect();
                let mut file = OpenOptions::new()
                    .create(true)
                    .truncate(false)
                    .write(true)
                    .open(&path)
                    .expect("open to write");
                file.seek(SeekFrom::Start(offset as u64)).unwrap();
                file.write_all(&data).expect("write");
                file.sync_all().expect("fsync");
                let model = self.acknowledged.entry(name).or_default();
                if model.len() < offset + length {
                    model.resize(offset + length, 0);
                }
                model[offset..offset + length].copy_from_slice(&data);
            }
            6 => {
                let to = format!("f{}", self.rng.random_range(0..12));
                if let Some(content) = self.acknowledged.remove(&name) {
                    std::fs::rename(&path, self.dir.join(&to)).expect("rename");
                    self.acknowledged.insert(to, content);
                }
            }
            7 => {
                if self.acknowledged.remove(&name).is_some() {
                    std::fs::remove_file(&path).expect("remove");
                }
            }
            _ => self.check(&name, self.acknowledged.get(&name)),
        }
    }

    fn check(&self, name: &str, expected: Option<&Vec<u8>>) {
        match (File::open(self.dir.join(name)), expected) {
            (Ok(mut file), Some(expected)) => {
                let mut found = Vec::new();
                file.read_to_end(&mut found).expect("read");
                assert_eq!(found.len(), expected.len(), "length of {name}");
                if let Some(at) = (0..found.len()).find(|&i| found[i] != expected[i]) {
                    panic!("{name} differs first at byte {at} of {}", found.len());
                }
            }
            (Err(error), None) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{name}"),
            (Ok(_), None) => panic!("{name} was removed and is there"),
            (Err(error), Some(_)) => panic!("{name}: {error}"),
        }
    }

    fn check_all(&self, dir: &Path) {
        let through = Self { rng: self.rng.clone(), dir: dir.to_owned(), acknowledged: BTreeMap::new() };
        for i in 0..12 {
            let name = format!("f{i}");
            through.check(&name, self.acknowledged.get(&name));
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_storage_servers_are_killed_one_after_the_other() {
    let mut cluster = Cluster::start();
    let mount = cluster.mount();
    let mut load = Load::new(0xf1ef1e, mount.join("load"));
    for victim in ["storage-3", "storage-4", "storage-5"] {
        for _ in 0..25 {
            load.step();
        }
        assert!(cluster.local.kill_role(victim).unwrap());
        for _ in 0..25 {
            load.step();
        }
        cluster.local.start_role(&firefly_tests::ff(), victim).unwrap();
        for _ in 0..10 {
            load.step();
        }
        eventually("every chain is whole again", || cluster.is_whole());
    }
    load.check_all(&load.dir);
    // A second mount has nothing in its caches.
    let second = cluster.mount();
    load.check_all(&second.join("load"));
}

#[test]
fn a_total_outage_loses_nothing() {
    let mut cluster = Cluster::start();
    let mount = cluster.mount();
    let mut load = Load::new(0x0ff, mount.join("load"));
    for _ in 0..40 {
        load.step();
    }
    cluster.unmount();
    for role in cluster.local.roles().unwrap() {
        assert!(cluster.local.kill_role(&role).unwrap(), "{role}");
    }
    cluster.ff(&["up"]).ok();
    let mount = cluster.mount();
    load.check_all(&mount.join("load"));
}

#[test]
fn the_manager_and_the_meta_server_can_die_under_load() {
    let mut cluster = Cluster::start();
    let mount = cluster.mount();
    let mut load = Load::new(0xde7a, mount.join("load"));
    for victim in ["meta", "manager", "meta"] {
        for _ in 0..20 {
            load.step();
        }
        assert!(cluster.local.kill_role(victim).unwrap());
        cluster.local.start_role(&firefly_tests::ff(), victim).unwrap();
        for _ in 0..20 {
            load.step();
        }
    }
    load.check_all(&load.dir);
}

#[test]
fn a_running_job_survives_the_scheduler_and_the_agents() {
    let cluster = Cluster::start();
    let out = cluster.dir().join("out");
    // Each rank writes its name, waits to be let go, and writes again: a second start would show.
    let script = format!(
        "echo started >> {out}.$RANK; while [ ! -e {out}.go ]; do sleep 0.05; done; echo ended >> {out}.$RANK",
        out = out.display()
    );
    cluster.ff(&["run", "-n", "2", "--name", "survivor", "-d", "--", "sh", "-c", &script]).ok();
    let written =
        |rank: u32| std::fs::read_to_string(format!("{}.{rank}", out.display())).unwrap_or_default();
    eventually("both ranks run", || written(0) == "started\n" && written(1) == "started\n");
    for victim in ["scheduler", "agent-1", "agent-2"] {
        assert!(cluster.local.kill_role(victim).unwrap(), "{victim}");
    }
    cluster.ff(&["up"]).ok();
    File::create(format!("{}.go", out.display())).unwrap();
    eventually("the job succeeds", || {
        let shown = cluster.ff(&["--json", "job", "status", "survivor"]).ok();
        assert!(!shown.to_lowercase().contains("failed"), "{shown}");
        shown.to_lowercase().contains("succeeded")
    });
    assert_eq!(written(0), "started\nended\n");
    assert_eq!(written(1), "started\nended\n");
}

#[test]
fn a_killed_rank_brings_the_job_back_with_the_reason_shown() {
    let cluster = Cluster::start();
    let script =
        "if [ $TORCHELASTIC_RESTART_COUNT = 0 ] && [ $RANK = 1 ]; then kill -9 $$; fi; sleep 0.2; echo fine";
    let run =
        cluster.ff(&["run", "-n", "2", "--name", "phoenix", "--max-restarts", "1", "--", "sh", "-c", script]);
    assert_eq!(run.code, 0, "{run:?}");
    assert!(run.out.contains("fine"), "{run:?}");
    let shown = cluster.ff(&["job", "status", "phoenix"]).ok();
    assert!(shown.contains("SIGKILL") && shown.contains("rank 1"), "{shown}");
}

#[test]
fn a_full_cluster_refuses_writes_keeps_what_it_has_and_recovers() {
    let mut cluster = Cluster::laid_out(&Shape { port_base: 0, ..Shape::default() });
    for node in 3..=5 {
        cluster.configure(&format!("storage-{node}"), |config| {
            config.storage.as_mut().unwrap().capacity = Some(ByteSize(8 << 20));
        });
    }
    cluster.up();
    let mount = cluster.mount();
    std::fs::write(mount.join("kept"), "acknowledged").unwrap();
    let mut big = File::create(mount.join("big")).unwrap();
    let megabyte = vec![7u8; 1 << 20];
    // Six chains of 8 MiB hold less than this, whatever the layout.
    let refused = (0..64).find_map(|_| big.write_all(&megabyte).and_then(|()| big.sync_all()).err());
    let refused = refused.expect("64 MiB went into a cluster of 48 MiB");
    assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC), "{refused}");
    drop(big);
    assert_eq!(std::fs::read(mount.join("kept")).unwrap(), b"acknowledged");
    std::fs::remove_file(mount.join("big")).unwrap();
    eventually("the garbage worker gives the room back", || {
        let path = mount.join("again");
        let mut file = File::create(&path).unwrap();
        file.write_all(&megabyte[..1 << 19]).and_then(|()| file.sync_all()).is_ok()
    });
}
