//! What the tests of the namespace share: a client that speaks in bytes, a clock that is set by
//! hand, and looks into the store behind the server's back.
#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]

pub mod posix;

use firefly_proto::meta::*;
use firefly_proto::methods::meta as method;
use firefly_store::lossy::LossyDisk;
use firefly_store::{Kv, MemKv, Store, StoreOptions};
use firefly_types::{ErrorKind, InodeId, Nanos};
use fs3_meta::clock::Clock;
use fs3_meta::layout::ClusterLayout;
use fs3_meta::schema::keys;
use fs3_meta::{Meta, MetaError, RootOwner};
use prost::Message;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub const ROOT: u64 = 1;

/// Time stands still until it is set; each look at it is one nanosecond.
#[derive(Default)]
pub struct HandClock(AtomicU64);

impl HandClock {
    pub fn set(&self, nanos: u64) {
        self.0.store(nanos, Ordering::SeqCst);
    }
}

impl Clock for HandClock {
    fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }

    fn monotonic(&self) -> Nanos {
        Nanos(self.0.load(Ordering::SeqCst))
    }
}

/// Somebody who answers requests.
#[allow(async_fn_in_trait, reason = "only used with known types")]
pub trait Target {
    async fn handle(&self, number: u16, head: &[u8]) -> Result<Vec<u8>, MetaError>;
}

impl Target for Meta {
    async fn handle(&self, number: u16, head: &[u8]) -> Result<Vec<u8>, MetaError> {
        Meta::handle(self, number, head).await
    }
}

impl<T: Target> Target for Arc<T> {
    async fn handle(&self, number: u16, head: &[u8]) -> Result<Vec<u8>, MetaError> {
        T::handle(self, number, head).await
    }
}

/// A server that runs on a disk which loses power now and then. Whoever asks does not notice: the
/// request is repeated, as a client would, after the server came back with what the disk kept.
pub struct Rebooting {
    state: Mutex<(LossyDisk, Arc<Store>, Arc<Meta>)>,
    clock: Arc<HandClock>,
    rng: Mutex<ChaCha8Rng>,
    pub reboots: AtomicU64,
    dedupe: bool,
}

impl Rebooting {
    pub async fn new(seed: u64, clock: Arc<HandClock>, dedupe: bool) -> Self {
        let disk = LossyDisk::new();
        let store = Store::open_on(Arc::new(disk.clone()), StoreOptions::default()).unwrap();
        let meta = open(store.clone(), clock.clone()).await;
        if !dedupe {
            meta.switch_off_dedupe();
        }
        let rng = Mutex::new(ChaCha8Rng::seed_from_u64(seed));
        let this =
            Self { state: Mutex::new((disk, store, meta)), clock, rng, reboots: AtomicU64::new(0), dedupe };
        this.plan_cut();
        this
    }

    fn now(&self) -> (LossyDisk, Arc<Meta>) {
        let state = self.state.lock().unwrap();
        (state.0.clone(), state.2.clone())
    }

    pub fn kv(&self) -> Arc<dyn Kv> {
        self.state.lock().unwrap().1.clone()
    }

    fn plan_cut(&self) {
        let (disk, _) = self.now();
        disk.cut_power_at(disk.operations() + self.rng.lock().unwrap().random_range(1..60));
    }

    async fn reboot(&self) {
        self.reboots.fetch_add(1, Ordering::SeqCst);
        let disk = self.now().0.after_power_cut(&mut *self.rng.lock().unwrap());
        let store = Store::open_on(Arc::new(disk.clone()), StoreOptions::default()).unwrap();
        let meta = open(store.clone(), self.clock.clone()).await;
        if !self.dedupe {
            meta.switch_off_dedupe();
        }
        *self.state.lock().unwrap() = (disk, store, meta);
        self.plan_cut();
    }
}

impl Target for Rebooting {
    async fn handle(&self, number: u16, head: &[u8]) -> Result<Vec<u8>, MetaError> {
        loop {
            let (disk, meta) = self.now();
            match meta.handle(number, head).await {
                Err(MetaError::Store { .. } | MetaError::Unavailable(_)) if disk.is_off() => {
                    self.reboot().await
                }
                answer => return answer,
            }
        }
    }
}

pub const OPEN_ROOT: RootOwner = RootOwner { uid: 0, gid: 0, mode: 0o777 };

pub async fn open(kv: Arc<dyn Kv>, clock: Arc<HandClock>) -> Arc<Meta> {
    let meta = Meta::open(kv, clock, OPEN_ROOT).await.unwrap();
    meta.set_layout(ClusterLayout { chunk_bytes: 1 << 20, stripe_chains: vec![1, 2, 3] });
    meta
}

pub async fn in_memory() -> (Arc<MemKv>, Arc<Meta>) {
    let kv = Arc::new(MemKv::new());
    let meta = open(kv.clone(), Arc::default()).await;
    (kv, meta)
}

/// A client's lane on behalf of one user.
#[derive(Clone, Debug)]
pub struct Client {
    pub caller: Caller,
}

impl Client {
    pub fn new(client_id: u64, channel: u32, uid: u32) -> Self {
        let caller = Caller {
            client_id,
            session_epoch: 1,
            channel,
            sequence: 0,
            uid,
            gid: uid,
            groups: vec![],
            trace_id: 0,
            attempt_epoch: 0,
            job_id: 0,
        };
        Self { caller }
    }

    pub fn root() -> Self {
        Self::new(1, 1, 0)
    }

    /// The caller of the next change.
    pub fn next(&mut self) -> Option<Caller> {
        self.caller.sequence += 1;
        Some(self.caller.clone())
    }

    /// The caller of a question, or of a repeated change.
    pub fn same(&self) -> Option<Caller> {
        Some(self.caller.clone())
    }

    pub async fn create(
        &mut self,
        meta: &impl Target,
        parent: u64,
        name: &[u8],
    ) -> Result<CreateReply, MetaError> {
        let request = CreateRequest {
            caller: self.next(),
            parent,
            name: name.to_vec(),
            kind: InodeKind::File as i32,
            mode: 0o644,
            exclusive: true,
            ..Default::default()
        };
        call(meta, method::CREATE, &request).await
    }

    pub async fn mkdir(&mut self, meta: &impl Target, parent: u64, name: &[u8]) -> Result<u64, MetaError> {
        let request = CreateRequest {
            caller: self.next(),
            parent,
            name: name.to_vec(),
            kind: InodeKind::Directory as i32,
            mode: 0o755,
            ..Default::default()
        };
        let reply: CreateReply = call(meta, method::CREATE, &request).await?;
        Ok(reply.inode.unwrap().inode_id)
    }

    pub async fn lookup(&self, meta: &impl Target, parent: u64, name: &[u8]) -> Result<Inode, MetaError> {
        let request = LookupRequest { caller: self.same(), parent, name: name.to_vec() };
        Ok(call::<_, InodeReply>(meta, method::LOOKUP, &request).await?.inode.unwrap())
    }

    pub async fn getattr(&self, meta: &impl Target, inode_id: u64) -> Result<Inode, MetaError> {
        let request = GetAttrRequest { caller: self.same(), inode_id };
        Ok(call::<_, InodeReply>(meta, method::GET_ATTR, &request).await?.inode.unwrap())
    }

    pub async fn setattr(&mut self, meta: &impl Target, request: SetAttrRequest) -> Result<Inode, MetaError> {
        let request = SetAttrRequest { caller: self.next(), ..request };
        Ok(call::<_, InodeReply>(meta, method::SET_ATTR, &request).await?.inode.unwrap())
    }

    pub async fn unlink(
        &mut self,
        meta: &impl Target,
        parent: u64,
        name: &[u8],
        directory: bool,
    ) -> Result<(), MetaError> {
        let request = UnlinkRequest { caller: self.next(), parent, name: name.to_vec(), directory };
        call::<_, UnlinkReply>(meta, method::UNLINK, &request).await.map(drop)
    }

    pub async fn link(
        &mut self,
        meta: &impl Target,
        inode_id: u64,
        parent: u64,
        name: &[u8],
    ) -> Result<Inode, MetaError> {
        let request = LinkRequest { caller: self.next(), inode_id, parent, name: name.to_vec() };
        Ok(call::<_, InodeReply>(meta, method::LINK, &request).await?.inode.unwrap())
    }

    pub async fn rename(
        &mut self,
        meta: &impl Target,
        from: (u64, &[u8]),
        to: (u64, &[u8]),
        flags: u32,
    ) -> Result<(), MetaError> {
        let request = RenameRequest {
            caller: self.next(),
            parent: from.0,
            name: from.1.to_vec(),
            new_parent: to.0,
            new_name: to.1.to_vec(),
            flags,
        };
        call::<_, RenameReply>(meta, method::RENAME, &request).await.map(drop)
    }

    pub async fn open(
        &mut self,
        meta: &impl Target,
        inode_id: u64,
        write: bool,
    ) -> Result<OpenReply, MetaError> {
        let request = OpenRequest { caller: self.next(), inode_id, write, ..Default::default() };
        call(meta, method::OPEN, &request).await
    }

    pub async fn close(
        &mut self,
        meta: &impl Target,
        inode_id: u64,
        session: u64,
        length: Option<u64>,
    ) -> Result<Inode, MetaError> {
        let request = CloseRequest { caller: self.next(), inode_id, session, length, ..Default::default() };
        Ok(call::<_, CloseReply>(meta, method::CLOSE, &request).await?.inode.unwrap())
    }

    pub async fn names(
        &self,
        meta: &impl Target,
        inode_id: u64,
        limit: u32,
    ) -> Result<Vec<(Vec<u8>, u64)>, MetaError> {
        let mut names = Vec::new();
        let mut cursor = Vec::new();
        loop {
            let request =
                ReadDirRequest { caller: self.same(), inode_id, cursor, limit, with_attributes: false };
            let page: ReadDirReply = call(meta, method::READ_DIR, &request).await?;
            names.extend(page.entries.iter().map(|e| (e.name.clone(), e.inode_id)));
            match page.entries.last() {
                Some(last) if !page.end => cursor = last.cursor.clone(),
                _ => return Ok(names),
            }
        }
    }

    pub async fn statfs(&self, meta: &impl Target) -> StatFsReply {
        call(meta, method::STAT_FS, &StatFsRequest { caller: self.same() }).await.unwrap()
    }

    pub async fn setxattr(
        &mut self,
        meta: &impl Target,
        inode_id: u64,
        name: &[u8],
        value: &[u8],
        flags: u32,
    ) -> Result<(), MetaError> {
        let request = SetXattrRequest {
            caller: self.next(),
            inode_id,
            name: name.to_vec(),
            value: value.to_vec(),
            flags,
        };
        call::<_, XattrReply>(meta, method::SET_XATTR, &request).await.map(drop)
    }

    pub async fn getxattr(
        &self,
        meta: &impl Target,
        inode_id: u64,
        name: &[u8],
    ) -> Result<Vec<u8>, MetaError> {
        let request = GetXattrRequest { caller: self.same(), inode_id, name: name.to_vec() };
        Ok(call::<_, GetXattrReply>(meta, method::GET_XATTR, &request).await?.value)
    }

    pub async fn listxattr(&self, meta: &impl Target, inode_id: u64) -> Result<Vec<Vec<u8>>, MetaError> {
        let request = ListXattrRequest { caller: self.same(), inode_id };
        Ok(call::<_, ListXattrReply>(meta, method::LIST_XATTR, &request).await?.names)
    }

    pub async fn removexattr(
        &mut self,
        meta: &impl Target,
        inode_id: u64,
        name: &[u8],
    ) -> Result<(), MetaError> {
        let request = RemoveXattrRequest { caller: self.next(), inode_id, name: name.to_vec() };
        call::<_, XattrReply>(meta, method::REMOVE_XATTR, &request).await.map(drop)
    }
}

pub async fn call<Q: Message, R: Message + Default>(
    meta: &impl Target,
    number: u16,
    request: &Q,
) -> Result<R, MetaError> {
    let reply = meta.handle(number, &request.encode_to_vec()).await?;
    Ok(R::decode(reply.as_slice()).unwrap())
}

/// What kind of refusal it is.
pub fn kind<T: std::fmt::Debug>(result: Result<T, MetaError>) -> ErrorKind {
    result.expect_err("this must be refused").kind()
}

/// The garbage queue as it lies in the store.
pub fn garbage(kv: &dyn Kv) -> BTreeSet<(u64, u32)> {
    let (from, to) = keys::garbages();
    let pairs = kv.begin().range(&from, &to, 60_000).unwrap();
    pairs.iter().map(|(k, _)| keys::garbage_id(k).unwrap()).map(|(d, g)| (d.0, g.0)).collect()
}

/// Numbers of all inodes in the store.
pub fn stored_inodes(kv: &dyn Kv) -> BTreeSet<u64> {
    let (from, to) = keys::inodes();
    let pairs = kv.begin().range(&from, &to, 60_000).unwrap();
    pairs.iter().map(|(k, _)| u64::from_be_bytes(k[2..10].try_into().unwrap())).collect()
}

/// Keys of one sort in the store.
pub fn count(kv: &dyn Kv, tag: u8) -> usize {
    kv.begin().range(&[b'm', tag], &[b'm', tag + 1], 60_000).unwrap().len()
}

pub fn id(raw: u64) -> InodeId {
    InodeId(raw)
}
