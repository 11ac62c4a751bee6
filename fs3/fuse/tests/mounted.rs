//! Programs on a mount of a real cluster, compared with the same programs on the local disk.

use firefly_net::Identity;
use firefly_types::{ByteSize, ClusterId, ClusterSecret, NodeId};
use fs3_client::{ClientOptions, Fs3};
use fs3_fuse::{MountOptions, Mounted};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// Why the tests of this file cannot run here, said loudly.
fn skipped() -> bool {
    let can = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !can {
        eprintln!("SKIPPED: mounting needs root and /dev/fuse");
    }
    !can
}

struct Mount {
    dir: TempDir,
    fs: Arc<Fs3>,
    mounted: Option<Mounted>,
}

impl Mount {
    fn path(&self) -> PathBuf {
        self.dir.path().to_owned()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            tokio::task::block_in_place(|| mounted.unmount()).unwrap();
        }
    }
}

/// Manager, meta server and three storage servers, in this process. Chunks of 64 KiB, so that
/// every file has many, on chains over all pairs of servers.
struct World {
    identity: Identity,
    manager: String,
    stop: CancellationToken,
    storage_stops: Vec<CancellationToken>,
    _meta: fs3_meta::Running,
    _data: TempDir,
}

impl World {
    async fn start() -> World {
        // RUST_LOG shows what client, mount and servers do.
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
        let data = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        let identity = Identity {
            cluster: ClusterId(rand::random()),
            secret: ClusterSecret::generate(),
            name: "test".into(),
        };
        let listen = ([127, 0, 0, 1], 0).into();
        let nodes = [3, 4, 5].map(NodeId);
        let settings = fs3_mgmtd::MgmtdSettings {
            min_write_replicas: Some(1),
            chunk_bytes: ByteSize(64 << 10),
            ..fs3_mgmtd::MgmtdSettings::new(nodes.to_vec())
        };
        let (data_dir, id) = (data.path().join("manager"), identity.clone());
        let config = fs3_mgmtd::MgmtdConfig { listen, data_dir, identity: id, settings };
        let manager = fs3_mgmtd::serve(config, stop.clone()).await.unwrap().addr.to_string();
        let mut storage_stops = Vec::new();
        for node_id in nodes {
            let token = stop.child_token();
            let config = fs3_storage::StorageConfig {
                node_id,
                listen,
                manager: format!("http://{manager}"),
                data_dir: data.path().join(node_id.to_string()),
                identity: identity.clone(),
                capacity_bytes: u64::MAX,
            };
            fs3_storage::serve(config, token.clone()).await.unwrap();
            storage_stops.push(token);
        }
        let config = fs3_meta::MetaConfig {
            node_id: NodeId(2),
            listen,
            manager: manager.clone(),
            data_dir: data.path().join("meta"),
            identity: identity.clone(),
            settings: fs3_meta::MetaSettings { root_mode: 0o777, ..Default::default() },
        };
        let meta = fs3_meta::serve(config, stop.clone()).await.unwrap();
        World { identity, manager, stop, storage_stops, _meta: meta, _data: data }
    }

    async fn connect(&self) -> Arc<Fs3> {
        Fs3::connect(ClientOptions::new(self.manager.clone(), self.identity.clone())).await.unwrap()
    }

    async fn mount(&self) -> Mount {
        let fs = self.connect().await;
        let dir = tempfile::tempdir().unwrap();
        let mounted = fs3_fuse::mount(fs.clone(), dir.path(), MountOptions::default()).unwrap();
        Mount { dir, fs, mounted: Some(mounted) }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn run(dir: &Path, script: &str) -> String {
    let output = Command::new("timeout")
        .args(["120", "bash", "-euo", "pipefail", "-c", script])
        .current_dir(dir)
        .env("HOME", "/nonexistent")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_AUTHOR_NAME", "a")
        .env("GIT_AUTHOR_EMAIL", "a@b")
        .env("GIT_COMMITTER_NAME", "a")
        .env("GIT_COMMITTER_EMAIL", "a@b")
        .env("GIT_AUTHOR_DATE", "2001-02-03T04:05:06Z")
        .env("GIT_COMMITTER_DATE", "2001-02-03T04:05:06Z")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{script}\nin {}: {}\n{}\n{}",
        dir.display(),
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Names, kinds, modes, link counts, link targets, file lengths and contents.
const MANIFEST: &str = "find . -type d -printf '%P d %m %n\\n' -o -type l -printf '%P l %l\\n' -o -printf '%P %y %m %n %s %T@\\n' \
    | sort; find . -type f -print0 | sort -z | xargs -0 -r sha256sum";
/// The same without times, for scripts that do not set them.
const MANIFEST_NO_TIMES: &str = "find . -type d -printf '%P d %m %n\\n' -o -type l -printf '%P l %l\\n' -o -printf '%P %y %m %n %s\\n' \
    | sort; find . -type f -print0 | sort -z | xargs -0 -r sha256sum";

fn same(mounted: &str, local: &str, what: &str) {
    let unlike = |a: &str, b: &str| -> Vec<String> {
        a.lines().filter(|line| !b.lines().any(|other| other == *line)).take(20).map(str::to_owned).collect()
    };
    let (only_there, only_here) = (unlike(mounted, local), unlike(local, mounted));
    assert!(mounted == local, "{what}\non the mount: {only_there:#?}\non the local disk: {only_here:#?}");
}

fn compare(mount: &Path, script: &str, manifest: &str) {
    let local = tempfile::tempdir().unwrap();
    let name = format!("work{}", rand::random::<u32>());
    let (here, there) = (local.path().join(&name), mount.join(&name));
    for dir in [&here, &there] {
        std::fs::create_dir(dir).unwrap();
    }
    same(&run(&there, script), &run(&here, script), &format!("output of {script}"));
    same(&run(&there, manifest), &run(&here, manifest), &format!("tree after {script}"));
    run(mount, &format!("rm -rf {name} && test ! -e {name}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tools_leave_the_same_trees_as_on_the_local_disk() {
    if skipped() {
        return;
    }
    let world = World::start().await;
    let mount = world.mount().await;
    let tree = tempfile::tempdir().unwrap();
    run(
        tree.path(),
        "mkdir -p a/b/c 'with space' empty; for i in $(seq 40); do head -c $((i * 4567)) /dev/urandom > a/f$i; done
         ln -s f1 a/soft; ln a/f2 a/b/hard; ln -s /nowhere a/dangling; mkfifo a/fifo; chmod 751 a/b; chmod 4755 a/f3
         touch -d '1999-12-31 23:59:59.123456789' a/f4; touch -d '1960-01-01' a/f5; : > 'with space/ü'; chown 1:2 a/f6",
    );
    let source = tree.path().display();
    compare(
        &mount.path(),
        &format!("cp -a {source}/. . && cp -a a copy && cmp a/f9 copy/f9 && mv copy moved"),
        MANIFEST,
    );
    compare(
        &mount.path(),
        &format!(
            "tar -C {source} -cf t.tar . && mkdir x && tar -C x -xf t.tar && cd x && tar -df ../t.tar && rm ../t.tar"
        ),
        MANIFEST,
    );
    compare(
        &mount.path(),
        "git init -q r && cd r && for i in $(seq 30); do seq $((i * 100)) > f$i; done && git add . && git commit -qm one && \
         git mv f1 g1 && sed -i s/5/five/ f2 && git commit -qam two && git gc -q && git fsck --strict && \
         git clone -q --no-hardlinks . ../clone && cd ../clone && git fsck --strict && git log --format=%H && git status --short && rm -rf ../r/.git .git",
        MANIFEST_NO_TIMES,
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_of_every_kind_read_back() {
    if skipped() {
        return;
    }
    let world = World::start().await;
    let mount = world.mount().await;
    let scripts = [
        // dd, also direct and synchronous, also in the middle of a file.
        "seq 450000 > src; dd if=src of=d1 bs=64k status=none; dd if=src of=d2 bs=4096 count=500 oflag=direct status=none
         dd if=src of=d3 bs=10000 oflag=sync count=20 status=none; dd if=/dev/zero of=d1 bs=1000 seek=77 count=5 conv=notrunc status=none
         dd if=d1 bs=128k iflag=direct status=none | sha256sum; cat d2 d3 | sha256sum",
        // Append, truncate, sparse.
        "for i in $(seq 300); do echo line $i >> log; done; truncate -s 1000 log; echo end >> log; truncate -s 70000 log; echo x >> log
         truncate -s 5M sparse; printf end | dd of=sparse bs=1 seek=4000000 conv=notrunc status=none; cp --sparse=never sparse dense; cmp sparse dense",
        // Atomic save, rename over, exchange of names, hard links.
        "echo old > doc; for i in 1 2 3; do echo new $i > doc.tmp; sync doc.tmp; mv doc.tmp doc; cat doc; done; ln doc other; echo more >> other; cat doc
         mkdir d1 d2; echo 1 > d1/f; mv d1/f d2/g; mv d2 d1/d2; cat d1/d2/g; mv -n doc other; ls | sort",
        // Several writers of one file through one mount.
        "seq 100000 > in; split -n 4 -d in part; for i in 0 1 2 3; do (dd if=part0$i of=out bs=1000 seek=$((i * 200)) conv=notrunc status=none) & done; wait
         for i in $(seq 8); do (for j in $(seq 50); do echo $i-$j; done > w$i) & done; wait; cat w* | sort | sha256sum; sha256sum out",
        // fallocate.
        "seq 50000 > f; fallocate -p -o 10000 -l 150000 f; sha256sum f; fallocate -l 1M f; fallocate -z -o 1000000 -l 200000 f; fallocate -n -l 9M f; stat -c %s f",
        // Extended attributes and removal.
        "echo x > f; python3 - <<'E'
import os
os.setxattr('f', 'user.a', b'1' * 3000); os.setxattr('f', 'user.b', b''); print(sorted(os.listxattr('f')), os.getxattr('f', 'user.a')[:9])
os.removexattr('f', 'user.a'); print(os.listxattr('f'))
try: os.setxattr('f', 'user.b', b'', os.XATTR_CREATE)
except OSError as e: print(e.errno)
try: os.getxattr('f', 'user.z')
except OSError as e: print(e.errno)
E
         mkdir -p deep/a/b/c; for i in $(seq 300); do : > deep/a/$i; done; ls deep/a | wc -l; rm -rf deep; ls",
    ];
    for script in scripts {
        compare(&mount.path(), script, MANIFEST_NO_TIMES);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_files_behave_as_posix_says() {
    if skipped() {
        return;
    }
    let world = World::start().await;
    let mount = world.mount().await;
    let script = r#"
import os, mmap, errno, fcntl
# Open, unlinked.
fd = os.open('gone', os.O_RDWR | os.O_CREAT); os.write(fd, b'x' * 200000); os.unlink('gone')
os.lseek(fd, 0, 0); print(len(os.read(fd, 300000)), os.fstat(fd).st_nlink, os.fstat(fd).st_size, os.path.exists('gone'))
os.ftruncate(fd, 10); print(os.pread(fd, 20, 0)); os.fsync(fd); os.close(fd)
# Replaced while open: the old bytes stay.
open('doc', 'w').write('old'); old = open('doc'); open('new', 'w').write('new'); os.rename('new', 'doc'); print(old.read(), open('doc').read())
# Shared mapping, written and read back through the file and another mapping.
fd = os.open('map', os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 200000); m = mmap.mmap(fd, 200000)
m[65530:65550] = b'across the boundary!'; m[199990:] = b'0123456789'; m.flush(); print(os.pread(fd, 20, 65530))
os.pwrite(fd, b'WRITE', 100); print(m[98:107]); m.close(); os.close(fd); print(open('map', 'rb').read()[65530:65550])
# O_APPEND from two descriptors; O_EXCL; O_TRUNC with another reader.
a = os.open('log', os.O_WRONLY | os.O_CREAT | os.O_APPEND); b = os.open('log', os.O_WRONLY | os.O_APPEND)
for i in range(50): os.write(a, b'a%02d\n' % i); os.write(b, b'b%02d\n' % i)
print(len(open('log').read().split()), os.fstat(a).st_size)
try: os.open('log', os.O_CREAT | os.O_EXCL)
except OSError as e: print(errno.errorcode[e.errno])
r = open('log', 'rb'); r.read(4); open('log', 'w').write('short'); print(r.read(), os.stat('log').st_size)
# Seeking for data and holes.
fd = os.open('log', os.O_RDWR); print(os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 2, os.SEEK_HOLE))
try: os.lseek(fd, 100, os.SEEK_DATA)
except OSError as e: print(errno.errorcode[e.errno])
# Locks within the mount.
fcntl.flock(fd, fcntl.LOCK_EX); fd2 = os.open('log', os.O_RDWR)
try: fcntl.flock(fd2, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError as e: print(errno.errorcode[e.errno])
fcntl.lockf(fd2, fcntl.LOCK_EX, 10, 0)
# Errors.
os.mkdir('dir'); open('dir/f', 'w')
for f in (lambda: os.rmdir('dir'), lambda: os.unlink('dir'), lambda: os.rename('dir', 'dir/sub'), lambda: os.open('log/x', os.O_RDONLY),
          lambda: os.open('n' * 256, os.O_CREAT), lambda: os.mkdir('dir'), lambda: os.link('dir', 'l'), lambda: open('dir'), lambda: os.readlink('log')):
    try: f(); print('no error')
    except OSError as e: print(errno.errorcode[e.errno])
# Times.
os.utime('log', ns=(5_000_000_001, -1_500_000_000)); s = os.stat('log'); print(s.st_atime_ns, s.st_mtime_ns)
fd = os.open('log', os.O_WRONLY); os.write(fd, b'z'); os.utime('log', ns=(1, 2)); os.close(fd); print(os.stat('log').st_mtime_ns)
# Many entries, listed while they are removed.
os.mkdir('many')
for i in range(1500): open('many/%d' % i, 'w').close()
# Sizes that change behind a listing that has begun.
it = os.scandir('many'); next(it)
for i in range(0, 1500, 7):
    with open('many/%d' % i, 'w') as f: f.write('x' * (i + 1))
print([e.name for e in it if int(e.name) % 7 == 0 and e.stat().st_size != int(e.name) + 1])
print(len(os.listdir('many'))); n = 0
for e in os.scandir('many'): os.unlink(e.path); n += 1
print(n, os.listdir('many'))
"#;
    compare(&mount.path(), &format!("cat > s.py <<'E'\n{script}\nE\npython3 s.py"), MANIFEST_NO_TIMES);
    // Programs run from the mount.
    compare(
        &mount.path(),
        "cp $(command -v sha256sum) prog && echo x > f && ./prog f && printf '#!/bin/sh\\necho ran $1\\n' > s && chmod +x s && ./s 5",
        MANIFEST_NO_TIMES,
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renameat2_and_permissions() {
    if skipped() {
        return;
    }
    let world = World::start().await;
    let mount = world.mount().await;
    let dir = mount.path();
    std::fs::write(dir.join("a"), "a").unwrap();
    std::fs::write(dir.join("b"), "b").unwrap();
    let at = |name: &str| std::fs::File::open(dir.join(name));
    let root = at(".").unwrap();
    let rename = |from, to, flags| rustix::fs::renameat_with(&root, from, &root, to, flags);
    use rustix::fs::RenameFlags;
    assert_eq!(rename("a", "b", RenameFlags::NOREPLACE), Err(rustix::io::Errno::EXIST));
    rename("a", "b", RenameFlags::EXCHANGE).unwrap();
    assert_eq!(std::fs::read_to_string(dir.join("a")).unwrap(), "b");
    assert_eq!(rename("a", "c", RenameFlags::WHITEOUT), Err(rustix::io::Errno::INVAL));
    let script = "mkdir own; chown 12345:54321 own; echo secret > own/f; chmod 640 own/f; chown 0:777 own/f; chmod 711 own
        s() { setpriv --reuid 12345 --regid 54321 --groups \"$1\" -- bash -c \"$2\" 2>/dev/null && echo yes || echo no; }
        s 777 'cat own/f'; s 778 'cat own/f'; s 778 'echo x > own/new && stat -c %u:%g own/new'; s 778 'echo x > here'
        chmod 4777 own/f; s 778 'echo more >> own/f'; stat -c %a own/f; s 778 'rm -f own/f'; s 778 'chmod 600 own/new'; s 778 'chown 0 own/new'";
    compare(&dir, script, MANIFEST_NO_TIMES);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_mounts_see_each_other_at_open() {
    if skipped() {
        return;
    }
    let world = World::start().await;
    let (one, two) = (world.mount().await, world.mount().await);
    let (a, b) = (one.path().join("f"), two.path().join("f"));
    for round in 0..20usize {
        let text = format!("round {round} ").repeat(round * 500 + 1);
        let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        std::fs::write(from, &text).unwrap();
        // Opened after the close elsewhere: the new length and the new bytes, at once.
        let mut got = String::new();
        std::io::Read::read_to_string(&mut std::fs::File::open(to).unwrap(), &mut got).unwrap();
        assert!(got == text, "round {round}: {} bytes instead of {}", got.len(), text.len());
    }
    // The kernel keeps pages of an unchanged file across opens: reading again asks storage nothing.
    let reads = two.fs.stats().reads;
    let first = std::fs::read(&b).unwrap();
    let asked = two.fs.stats().reads;
    assert_eq!(std::fs::read(&b).unwrap(), first);
    assert_eq!(two.fs.stats().reads, asked, "{reads}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mount_ends_cleanly_even_when_it_is_in_use() {
    if skipped() {
        return;
    }
    let world = World::start().await;
    let mut mount = world.mount().await;
    let path = mount.path();
    let file = std::fs::File::create(path.join("f")).unwrap();
    file.write_all_at(b"buffered", 0).unwrap();
    let busy = std::thread::spawn(move || {
        // Holds the mount while it is detached, then lets go.
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(file);
    });
    let device = std::fs::metadata(&path).unwrap().dev();
    let mounted = mount.mounted.take().unwrap();
    tokio::task::block_in_place(|| mounted.unmount()).unwrap();
    busy.join().unwrap();
    assert_ne!(std::fs::metadata(&path).unwrap().dev(), device);
    mount.fs.shutdown().await.unwrap();
    let again = world.mount().await;
    assert_eq!(std::fs::read(again.path().join("f")).unwrap(), b"buffered");
    assert!(matches!(
        fs3_fuse::mount(again.fs.clone(), &again.path(), MountOptions::default()),
        Err(fs3_fuse::MountError::Busy(_))
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_storage_server_only_pauses_programs() {
    if skipped() {
        return;
    }
    let world = World::start().await;
    let mount = world.mount().await;
    let dir = mount.path();
    run(&dir, "seq 300000 > before; sha256sum before > sums");
    let (started, starts) = std::sync::mpsc::channel();
    let writing = std::thread::spawn({
        let dir = dir.clone();
        move || {
            for i in 0..40 {
                run(&dir, &format!("seq {i} 20000 > during{i}; sync during{i}; sha256sum during{i} >> sums"));
                let _ = started.send(());
            }
        }
    });
    // In the middle of the writing.
    for _ in 0..5 {
        starts.recv().unwrap();
    }
    world.storage_stops[1].cancel();
    tokio::task::block_in_place(|| writing.join()).unwrap();
    // Through another client, from the replicas that are left.
    let other = world.mount().await;
    run(&other.path(), "sha256sum --quiet -c sums; test $(wc -l < sums) = 41");
    println!("longest pause {:?}", mount.fs.stats().longest_pause);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_library_and_a_mount_agree() {
    if skipped() {
        return;
    }
    let world = World::start().await;
    let mount = world.mount().await;
    let fs = world.connect().await;
    let me = fs3_client::Credentials::ROOT;
    let data: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
    fs.mkdir_all(&me, "/lib/deep", 0o755).await.unwrap();
    fs.write_file(&me, "/lib/deep/f", &data).await.unwrap();
    assert!(std::fs::read(mount.path().join("lib/deep/f")).unwrap() == data);
    std::fs::write(mount.path().join("lib/g"), &data[..777_777]).unwrap();
    assert!(fs.read_file(&me, "/lib/g").await.unwrap() == data[..777_777]);
    assert_eq!(fs.remove_path(&me, "/lib", true).await.unwrap(), 4);
    let free = rustix::fs::statvfs(mount.path()).unwrap();
    assert!(free.f_blocks > 0 && free.f_bfree <= free.f_blocks);
    fs.shutdown().await.unwrap();
}
