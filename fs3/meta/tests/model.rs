//! Random operations by several clients and users, each compared with an independent model, on the
//! store in memory and on the real one with reopening in between.
//!
//! `FIREFLY_SEED=n` repeats one seed, `FIREFLY_SEEDS=n` runs more of them.

mod common;

use common::posix::{Change, Node, Posix, Refusals, Sort, When, Who};
use common::{Client, HandClock, Rebooting, Target, call, count, garbage, stored_inodes};
use firefly_proto::meta::*;
use firefly_proto::methods::meta as method;
use firefly_store::{Kv, MemKv, Store, StoreOptions};
use fs3_meta::{Meta, MetaError};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;

/// Nanoseconds of one step: the server's times of a step lie in it.
const STEP: u64 = 1_000_000;

struct World<T> {
    meta: T,
    kv: Arc<dyn Kv>,
    clock: Arc<HandClock>,
    model: Posix,
    rng: ChaCha8Rng,
    clients: Vec<Client>,
    /// Every inode number that was ever given.
    known: Vec<u64>,
    step: u64,
    done: [u64; 2],
}

fn names() -> Vec<&'static [u8]> {
    vec![b"a", b"b", b"c", b"\xff\xfe", "d\u{e9}".as_bytes()]
}

fn who(client: &Client) -> Who {
    let c = &client.caller;
    Who { client: c.client_id, uid: c.uid, gid: c.gid, groups: c.groups.clone() }
}

/// The step at which the root directory is made.
const FIRST_STEP: u64 = 1_000;

fn clock() -> Arc<HandClock> {
    let clock = Arc::new(HandClock::default());
    clock.set(FIRST_STEP * STEP);
    clock
}

impl World<Arc<Meta>> {
    async fn plain(kv: Arc<dyn Kv>, seed: u64) -> Self {
        let clock = clock();
        Self::new(common::open(kv.clone(), clock.clone()).await, kv, clock, seed)
    }
}

impl<T: Target> World<T> {
    fn new(meta: T, kv: Arc<dyn Kv>, clock: Arc<HandClock>, seed: u64) -> Self {
        let step = FIRST_STEP;
        let mut clients = Vec::new();
        for (client, uid) in [(1, 0), (1, 1000), (2, 1001), (2, 1000), (3, 1002)] {
            let mut one = Client::new(client, clients.len() as u32 + 1, uid);
            one.caller.groups = if uid == 1001 { vec![1000] } else { vec![] };
            clients.push(one);
        }
        let rng = ChaCha8Rng::seed_from_u64(seed);
        let model = Posix::new(step);
        Self { meta, kv, clock, model, rng, clients, known: vec![1], step, done: [0; 2] }
    }

    fn next_step(&mut self) {
        self.step += 1;
        self.model.step = self.step;
        self.clock.set(self.step * STEP);
    }

    fn name(&mut self) -> Vec<u8> {
        let all = names();
        all[self.rng.random_range(0..all.len())].to_vec()
    }

    /// Mostly something that exists.
    fn any(&mut self) -> u64 {
        if self.rng.random_bool(0.9) {
            let alive: Vec<u64> = self.model.nodes.keys().copied().collect();
            alive[self.rng.random_range(0..alive.len())]
        } else {
            self.known[self.rng.random_range(0..self.known.len())]
        }
    }

    /// Mostly a directory that exists.
    fn dir(&mut self) -> u64 {
        let dirs: Vec<u64> =
            self.model.nodes.iter().filter(|(_, n)| n.sort == Sort::Dir).map(|(id, _)| *id).collect();
        if self.rng.random_bool(0.95) { dirs[self.rng.random_range(0..dirs.len())] } else { self.any() }
    }

    fn mode(&mut self) -> u32 {
        let usual = [0o777, 0o755, 0o644, 0o700, 0o070, 0o007, 0o1777, 0o2775, 0o6755, 0o4711, 0o2644, 0o666];
        if self.rng.random_bool(0.8) {
            usual[self.rng.random_range(0..usual.len())]
        } else {
            self.rng.random_range(0..=0o7777)
        }
    }

    /// The server's outcome must be one that the model allows; true if it went through.
    fn judge<R: Debug, M>(
        &mut self,
        what: &str,
        real: &Result<R, MetaError>,
        model: &Result<M, Refusals>,
    ) -> bool {
        match (real, model) {
            (Ok(_), Ok(_)) => {
                self.done[0] += 1;
                true
            }
            (Err(error), Err(allowed)) if allowed.contains(&error.kind()) => {
                self.done[1] += 1;
                false
            }
            (real, _) => panic!(
                "step {}: {what}: the server says {real:?}, the model {:?}",
                self.step,
                model.as_ref().map(|_| "yes").map_err(Clone::clone)
            ),
        }
    }

    async fn one(&mut self) {
        self.next_step();
        // Root half of the time: the others are refused most of what they try.
        let at = if self.rng.random_bool(0.5) { 0 } else { self.rng.random_range(0..self.clients.len()) };
        let mut client = self.clients[at].clone();
        match self.rng.random_range(0..100) {
            0..25 => self.create(&mut client).await,
            25..33 => self.unlink(&mut client).await,
            33..38 => self.link(&mut client).await,
            38..53 => self.rename(&mut client).await,
            53..63 => self.setattr(&mut client).await,
            63..73 => self.open(&mut client).await,
            73..80 => self.close(&mut client).await,
            80..84 => self.sync(&mut client).await,
            84..90 => self.xattr(&mut client).await,
            90..95 => self.lookup(&client).await,
            _ => self.list(&client).await,
        }
        self.clients[at] = client;
    }

    async fn create(&mut self, client: &mut Client) {
        let (parent, mode) = (self.dir(), self.mode());
        let name = if self.rng.random_bool(0.02) { b"..".to_vec() } else { self.name() };
        let (sort, kind) = [
            (Sort::File, InodeKind::File),
            (Sort::File, InodeKind::File),
            (Sort::Dir, InodeKind::Directory),
            (Sort::Dir, InodeKind::Directory),
            (Sort::Link, InodeKind::Symlink),
            (Sort::Fifo, InodeKind::Fifo),
            (Sort::Device, InodeKind::CharDevice),
        ][self.rng.random_range(0..7)];
        let is_file = sort == Sort::File;
        let target = if sort == Sort::Link { self.name() } else { vec![] };
        let request = CreateRequest {
            caller: client.next(),
            parent,
            name: name.clone(),
            kind: kind as i32,
            mode,
            symlink_target: target.clone(),
            exclusive: self.rng.random_bool(0.5),
            open_write: is_file && self.rng.random_bool(0.3),
            open_read: is_file && self.rng.random_bool(0.2),
            ..Default::default()
        };
        let who = who(client);
        let open = (request.open_write, request.open_read);
        let allowed = self.model.may_create(&who, parent, &name, sort, request.exclusive, open);
        let real: Result<CreateReply, _> = call(&self.meta, method::CREATE, &request).await;
        if !self.judge(&format!("{who:?} creates {request:?}"), &real, &allowed) {
            return;
        }
        let (reply, there) = (real.unwrap(), allowed.unwrap());
        let inode = reply.inode.unwrap();
        assert_eq!(reply.created, there.is_none());
        assert_eq!(inode.inode_id, there.unwrap_or(inode.inode_id));
        if there.is_none() {
            self.known.push(inode.inode_id);
            self.model.create(&who, parent, &name, sort, mode, &target, inode.inode_id, inode.data_id);
        }
        if open.0 || open.1 {
            self.model.open_session(&who, inode.inode_id, reply.session, open.0);
        } else {
            assert_eq!(reply.session, 0);
        }
        self.same(&inode);
    }

    async fn unlink(&mut self, client: &mut Client) {
        let (parent, name, directory) = (self.dir(), self.name(), self.rng.random_bool(0.4));
        let real = client.unlink(&self.meta, parent, &name, directory).await;
        let model = self.model.unlink(&who(client), parent, &name, directory);
        self.judge(&format!("{:?} unlinks {name:?} in {parent} ({directory})", who(client)), &real, &model);
    }

    async fn link(&mut self, client: &mut Client) {
        let (id, parent, name) = (self.any(), self.dir(), self.name());
        let real = client.link(&self.meta, id, parent, &name).await;
        let model = self.model.link(&who(client), id, parent, &name);
        if self.judge(&format!("{:?} links {id} as {name:?} in {parent}", who(client)), &real, &model) {
            self.same(&real.unwrap());
        }
    }

    async fn rename(&mut self, client: &mut Client) {
        let (p, q, n, m) = (self.dir(), self.dir(), self.name(), self.name());
        let flags = [0, 0, 0, 1, 2][self.rng.random_range(0..5)];
        let real = client.rename(&self.meta, (p, &n), (q, &m), flags).await;
        let model = self.model.rename(&who(client), (p, &n), (q, &m), flags);
        self.judge(
            &format!("{:?} renames {p}/{n:?} to {q}/{m:?}, flags {flags}", who(client)),
            &real,
            &model,
        );
    }

    async fn setattr(&mut self, client: &mut Client) {
        let id = self.any();
        let mut change = Change::default();
        for _ in 0..self.rng.random_range(1..3) {
            let id = [0, 1000, 1001][self.rng.random_range(0..3)];
            let time = self.rng.random_bool(0.5).then(|| (self.rng.random_range(-5..5), 999_999_999));
            match self.rng.random_range(0..6) {
                0 => change.mode = Some(self.mode()),
                1 => change.uid = Some(id),
                2 => change.gid = Some(id),
                3 => change.length = Some(self.rng.random_range(0..10_000)),
                4 => change.atime = Some(time),
                _ => change.mtime = Some(time),
            }
        }
        if self.rng.random_bool(0.05)
            && let Some(node) = self.model.nodes.get(&id)
        {
            // What the kernel asks for when somebody writes to a set-user-id file.
            change = Change { mode: Some(node.mode & !0o6000), ..Default::default() };
        }
        let wire_time = |t: Option<(i64, u32)>| t.map(|(seconds, nanos)| Time { seconds, nanos });
        let request = SetAttrRequest {
            inode_id: id,
            mode: change.mode,
            uid: change.uid,
            gid: change.gid,
            length: change.length,
            atime: change.atime.and_then(wire_time),
            mtime: change.mtime.and_then(wire_time),
            atime_now: change.atime == Some(None),
            mtime_now: change.mtime == Some(None),
            caller: None,
        };
        let real = client.setattr(&self.meta, request).await;
        let model = self.model.setattr(&who(client), id, &change);
        if self.judge(&format!("{:?} sets {change:?} on {id}", who(client)), &real, &model) {
            self.same(&real.unwrap());
        }
    }

    async fn open(&mut self, client: &mut Client) {
        let (id, write, read) = (self.any(), self.rng.random_bool(0.5), self.rng.random_bool(0.5));
        let truncate = self.rng.random_bool(0.3);
        let request =
            OpenRequest { caller: client.next(), inode_id: id, write, truncate, read, ..Default::default() };
        let real: Result<OpenReply, _> = call(&self.meta, method::OPEN, &request).await;
        let model = self.model.open(&who(client), id, write, read, truncate);
        if self.judge(&format!("{:?} opens {request:?}", who(client)), &real, &model) {
            let reply = real.unwrap();
            self.model.open_session(&who(client), id, reply.session, write);
            self.same(&reply.inode.unwrap());
        }
    }

    async fn close(&mut self, client: &mut Client) {
        let open: Vec<u64> = self.model.sessions.keys().copied().collect();
        let Some(session) = (!open.is_empty()).then(|| open[self.rng.random_range(0..open.len())]) else {
            return;
        };
        let id = self.model.sessions[&session].inode;
        let length = self.rng.random_bool(0.6).then(|| self.rng.random_range(0..20_000));
        let real = client.close(&self.meta, id, session, length).await;
        let model = self.model.close(&who(client), session, length);
        if self.judge(&format!("{:?} closes {session} of {id}", who(client)), &real, &model)
            && self.model.nodes.contains_key(&id)
        {
            self.same(&real.unwrap());
        }
    }

    async fn sync(&mut self, client: &mut Client) {
        let (id, length) = (self.any(), self.rng.random_range(0..20_000));
        let request =
            SyncRequest { caller: client.next(), inode_id: id, length: Some(length), ..Default::default() };
        let real: Result<InodeReply, _> = call(&self.meta, method::SYNC, &request).await;
        let model = self.model.sync(&who(client), id, length);
        if self.judge(&format!("{:?} syncs {length} of {id}", who(client)), &real, &model) {
            self.same(&real.unwrap().inode.unwrap());
        }
    }

    async fn xattr(&mut self, client: &mut Client) {
        let id = self.any();
        let name = [&b"user.x"[..], b"user.y\xff"][self.rng.random_range(0..2)];
        let set = self.rng.random_bool(0.6);
        let refusals = self.model.user_xattr_refusals(&who(client), id, set);
        let mut model = if refusals.is_empty() { Ok(()) } else { Err(refusals) };
        let present = self.model.nodes.get(&id).is_some_and(|n| n.xattrs.contains_key(name));
        let what = format!("{:?} xattr {name:?} of {id}", who(client));
        if !set {
            if !present {
                model.as_mut().map_or_else(|no| no.push(firefly_types::ErrorKind::NoAttribute), |()| ());
                if model.is_ok() {
                    model = Err(vec![firefly_types::ErrorKind::NoAttribute]);
                }
            }
            let real = client.getxattr(&self.meta, id, name).await;
            if self.judge(&what, &real, &model) {
                assert_eq!(real.unwrap(), self.model.nodes[&id].xattrs[name]);
            }
            return;
        }
        let remove = self.rng.random_bool(0.3);
        let flags = if remove { 2 } else { self.rng.random_range(0..3) };
        let missing = match flags {
            1 if present => Some(firefly_types::ErrorKind::AlreadyExists),
            2 if !present => Some(firefly_types::ErrorKind::NoAttribute),
            _ => None,
        };
        model = match (model, missing) {
            (Ok(()), None) => Ok(()),
            (no, more) => Err(no.err().into_iter().flatten().chain(more).collect()),
        };
        let value = vec![self.rng.random(); self.rng.random_range(0..100)];
        let real = if remove {
            client.removexattr(&self.meta, id, name).await
        } else {
            client.setxattr(&self.meta, id, name, &value, flags).await
        };
        if self.judge(&what, &real, &model) {
            let now = When::Step(self.step);
            let node = self.model.nodes.get_mut(&id).unwrap();
            node.ctime = now;
            if remove {
                node.xattrs.remove(name);
            } else {
                node.xattrs.insert(name.to_vec(), value);
            }
        }
    }

    async fn lookup(&mut self, client: &Client) {
        let parent = self.dir();
        let name = match self.rng.random_range(0..5) {
            0 => b".".to_vec(),
            1 => b"..".to_vec(),
            _ => self.name(),
        };
        let real = client.lookup(&self.meta, parent, &name).await;
        let model = self.model.lookup(&who(client), parent, &name);
        if self.judge(&format!("{:?} looks up {parent}/{name:?}", who(client)), &real, &model) {
            let inode = real.unwrap();
            assert_eq!(inode.inode_id, model.unwrap());
            self.same(&inode);
        }
    }

    async fn list(&mut self, client: &Client) {
        let (dir, limit) = (self.dir(), self.rng.random_range(0..4));
        let real = client.names(&self.meta, dir, limit).await;
        let who = who(client);
        let model = match self.model.nodes.get(&dir) {
            None => Err(vec![firefly_types::ErrorKind::NotFound]),
            Some(n) if n.sort != Sort::Dir => Err(vec![firefly_types::ErrorKind::NotDirectory]),
            Some(_) if !self.model.may(&who, dir, 4) => Err(vec![firefly_types::ErrorKind::AccessDenied]),
            Some(n) => Ok(n.names.clone().into_iter().collect::<Vec<_>>()),
        };
        if self.judge(&format!("{who:?} lists {dir}"), &real, &model) {
            assert_eq!(real.unwrap(), model.unwrap());
        }
    }

    /// An inode as the server shows it is the model's.
    fn same(&self, real: &Inode) {
        let id = real.inode_id;
        let node: &Node = self.model.nodes.get(&id).unwrap_or_else(|| panic!("{id} should be gone"));
        let sort = match real.kind() {
            InodeKind::File => Sort::File,
            InodeKind::Directory => Sort::Dir,
            InodeKind::Symlink => Sort::Link,
            InodeKind::Fifo => Sort::Fifo,
            _ => Sort::Device,
        };
        let shown = (sort, real.mode, real.uid, real.gid, real.length, real.nlink);
        let links = self.model.links(id);
        assert_eq!(shown, (node.sort, node.mode, node.uid, node.gid, node.length, links), "{id}: {real:?}");
        for (name, time, wanted) in [
            ("atime", real.atime, node.atime),
            ("mtime", real.mtime, node.mtime),
            ("ctime", real.ctime, node.ctime),
        ] {
            let time = time.unwrap();
            match wanted {
                When::At(seconds, nanos) => {
                    assert_eq!((time.seconds, time.nanos), (seconds, nanos), "{name} of {id}")
                }
                When::Step(step) => {
                    let nanos = time.seconds as u64 * 1_000_000_000 + u64::from(time.nanos);
                    assert_eq!(nanos / STEP, step, "{name} of {id}");
                }
            }
        }
        assert_eq!(real.symlink_target, node.target);
        let layout = real.layout.clone().unwrap_or_default();
        if sort == Sort::File {
            assert_eq!(
                (real.data_id, real.generation, real.truncate_version),
                (node.data, node.generation, node.cuts)
            );
            assert_eq!((layout.chunk_bytes, layout.chains.len()), (1 << 20, 3));
        } else if sort == Sort::Dir {
            assert_eq!(real.parent, self.model.parent(id));
        }
    }

    /// Everything, through the door and behind it.
    async fn compare(&mut self) {
        let root = Client::root();
        for id in self.model.nodes.keys().copied().collect::<Vec<_>>() {
            self.same(&root.getattr(&self.meta, id).await.unwrap());
            let node = &self.model.nodes[&id];
            if node.sort == Sort::Dir {
                let wanted: Vec<_> = node.names.clone().into_iter().collect();
                assert_eq!(root.names(&self.meta, id, 0).await.unwrap(), wanted);
            }
            let wanted: Vec<_> = node.xattrs.keys().cloned().collect();
            assert_eq!(root.listxattr(&self.meta, id).await.unwrap(), wanted);
        }
        let kv = self.kv.as_ref();
        assert_eq!(stored_inodes(kv), self.model.nodes.keys().copied().collect::<BTreeSet<_>>());
        assert_eq!(garbage(kv), self.model.garbage);
        assert_eq!(count(kv, b'S'), self.model.sessions.len());
        assert_eq!(count(kv, b'K'), self.model.sessions.len());
        assert_eq!(count(kv, b'D'), self.model.nodes.values().map(|n| n.names.len()).sum::<usize>());
        assert_eq!(count(kv, b'X'), self.model.nodes.values().map(|n| n.xattrs.len()).sum::<usize>());
        let dirs = self.model.nodes.values().filter(|n| n.sort == Sort::Dir).count();
        assert_eq!(count(kv, b'T'), dirs);
        let totals = root.statfs(&self.meta).await;
        assert_eq!(
            (totals.inodes, totals.logical_bytes),
            (self.model.nodes.len() as u64, self.model.bytes())
        );
    }
}

fn seeds(usual: u64) -> std::ops::Range<u64> {
    let from_env = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    match from_env("FIREFLY_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..from_env("FIREFLY_SEEDS").unwrap_or(usual),
    }
}

#[tokio::test]
async fn random_operations_agree_with_the_model() {
    let (mut went, mut refused) = (0, 0);
    for seed in seeds(12) {
        println!("seed {seed}");
        let mut world = World::plain(Arc::new(MemKv::new()), seed).await;
        for step in 0..1_500 {
            world.one().await;
            if step % 100 == 99 {
                world.compare().await;
            }
        }
        went += world.done[0];
        refused += world.done[1];
    }
    println!("{went} operations went through, {refused} were refused");
    assert!(went > 2_000 && refused > 2_000, "the mix no longer visits both: {went} and {refused}");
}

#[tokio::test]
async fn the_namespace_survives_reopening_the_store() {
    for seed in seeds(2) {
        println!("seed {seed}");
        let dir = tempfile::tempdir().unwrap();
        let open = || Store::open(dir.path(), StoreOptions::default()).unwrap();
        let mut world = World::plain(open(), 1_000 + seed).await;
        for _ in 0..8 {
            for _ in 0..60 {
                world.one().await;
            }
            // Everything acknowledged is there again; the server itself kept nothing.
            world.meta = common::in_memory().await.1;
            world.kv = Arc::new(MemKv::new());
            world.kv = open();
            world.meta = common::open(world.kv.clone(), world.clock.clone()).await;
            world.compare().await;
        }
    }
}

#[tokio::test]
async fn power_cuts_lose_nothing_and_double_nothing() {
    let mut reboots = 0;
    for seed in seeds(6) {
        println!("seed {seed}");
        let clock = clock();
        let meta = Rebooting::new(seed, clock.clone(), true).await;
        let mut world = World::new(meta, Arc::new(MemKv::new()), clock, 2_000 + seed);
        under_power_cuts(&mut world).await;
        reboots += world.meta.reboots.load(std::sync::atomic::Ordering::SeqCst);
    }
    println!("{reboots} power cuts");
    assert!(reboots > 20, "{reboots}");
}

async fn under_power_cuts(world: &mut World<Rebooting>) {
    for step in 0..300 {
        world.one().await;
        if step % 30 == 29 {
            world.kv = world.meta.kv();
            world.compare().await;
        }
    }
}

/// Without the exactly-once records, some request that was durable although its reply was lost
/// runs twice.
#[tokio::test]
#[should_panic(expected = "the server says")]
async fn negative_control_power_cuts_without_the_records() {
    for seed in 0..20 {
        let clock = clock();
        let meta = Rebooting::new(seed, clock.clone(), false).await;
        under_power_cuts(&mut World::new(meta, Arc::new(MemKv::new()), clock, 2_000 + seed)).await;
    }
}
