#![allow(unreachable_pub, reason = "a module of test fakes, included by several tests")]
//! A cluster in memory: a manager over gRPC, a meta server and storage targets as net services,
//! with faults that tests inject.
#![allow(dead_code, reason = "each test file uses a part")]

use firefly_net::{Buf, BufPool, Identity, Reply, Request, Server, Service};
use firefly_proto::auth::CheckToken;
use firefly_proto::meta::*;
use firefly_proto::methods;
use firefly_proto::mgmtd::manager_server::{Manager, ManagerServer};
use firefly_proto::mgmtd::*;
use firefly_proto::storage::*;
use firefly_types::{ClusterId, ClusterSecret, ErrorKind, WireError};
use fs3_client::{ClientOptions, Fs3};
use futures::future::BoxFuture;
use prost::Message;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub const CHUNK: u32 = 64 << 10;

pub struct Cluster {
    pub identity: Identity,
    pub manager: String,
    pub routing: watch::Sender<RoutingTable>,
    pub storage: Arc<Storage>,
    pub meta: Arc<Meta>,
    stops: Mutex<HashMap<u32, CancellationToken>>,
    pub stop: CancellationToken,
}

type Key = (u64, u32, u32);

/// All targets of the cluster: they share a model, but each has its own copy of the bytes.
#[derive(Default)]
pub struct Storage {
    pub state: Mutex<StorageState>,
}

#[derive(Default)]
pub struct StorageState {
    /// (target, chunk) → bytes.
    pub chunks: HashMap<(u32, Key), Vec<u8>>,
    pub versions: HashMap<Key, u64>,
    records: HashMap<(u64, u32), (u64, UpdateReply)>,
    pub chain_targets: HashMap<u32, Vec<u32>>,
    /// How often an update changed something, by chunk.
    pub applied: HashMap<Key, u32>,
    pub requests: u32,
    /// So many next updates are done and never answered.
    pub swallow_replies: u32,
    pub corrupt_targets: HashSet<u32>,
    pub dirty_targets: HashSet<u32>,
    pub down_targets: HashSet<u32>,
    pub reads_by_target: HashMap<u32, u32>,
    pub fail_updates: Option<ErrorKind>,
    pub most_parallel: u32,
    parallel: u32,
    pub update_sizes: Vec<u32>,
}

fn key(chunk: &Option<ChunkKey>) -> Key {
    let c = chunk.as_ref().unwrap();
    (c.data_id, c.generation, c.index)
}

impl Storage {
    async fn read(&self, request: Request) -> Result<Reply, WireError> {
        let read = ReadRequest::decode(request.head).unwrap();
        let mut state = self.state.lock().unwrap();
        *state.reads_by_target.entry(read.target_id).or_default() += 1;
        if state.down_targets.contains(&read.target_id) {
            return Err(WireError::new(ErrorKind::Unavailable, "down"));
        }
        let key = key(&read.chunk);
        let mut reply = ReadReply::default();
        if state.dirty_targets.contains(&read.target_id) {
            reply.dirty = true;
            return Ok(Reply::head(reply.encode_to_vec()));
        }
        let Some(bytes) = state.chunks.get(&(read.target_id, key)) else {
            return Ok(Reply::head(reply.encode_to_vec()));
        };
        reply.version = state.versions[&key];
        reply.chunk_length = bytes.len() as u32;
        let from = (read.offset as usize).min(bytes.len());
        let to = (read.offset as usize + read.length as usize).min(bytes.len());
        let mut out = BufPool::new(1 << 20).try_alloc((to - from).max(1)).unwrap();
        out.set_len(to - from);
        out.copy_from_slice(&bytes[from..to]);
        reply.crc32c = crc32c::crc32c(&out);
        if state.corrupt_targets.contains(&read.target_id) && !out.is_empty() {
            out[0] ^= 0xff;
        }
        Ok(Reply::with_data(reply.encode_to_vec(), Buf::from(out)))
    }

    async fn update(&self, request: Request) -> Result<Reply, WireError> {
        let update = UpdateRequest::decode(request.head).unwrap();
        {
            let mut state = self.state.lock().unwrap();
            state.parallel += 1;
            state.most_parallel = state.most_parallel.max(state.parallel);
        }
        tokio::task::yield_now().await;
        let (swallow, result) = {
            let mut state = self.state.lock().unwrap();
            state.parallel -= 1;
            let result = state.apply(&update, request.payload.as_deref());
            let swallow = state.swallow_replies > 0;
            state.swallow_replies = state.swallow_replies.saturating_sub(1);
            (swallow, result)
        };
        if swallow {
            std::future::pending::<()>().await;
        }
        Ok(Reply::head(result?.encode_to_vec()))
    }

    fn remove_range(&self, request: Request) -> Result<Reply, WireError> {
        let range = RemoveRangeRequest::decode(request.head).unwrap();
        let mut state = self.state.lock().unwrap();
        let targets = state.chain_targets[&range.chain_id].clone();
        let before = state.chunks.len();
        state.chunks.retain(|(target, (data, generation, index)), _| {
            !(targets.contains(target)
                && (*data, *generation) == (range.data_id, range.generation)
                && *index >= range.from_index)
        });
        let removed = (before - state.chunks.len()) as u32;
        Ok(Reply::head(RemoveRangeReply { removed, remaining: false }.encode_to_vec()))
    }
}

impl StorageState {
    fn apply(&mut self, update: &UpdateRequest, payload: Option<&[u8]>) -> Result<UpdateReply, WireError> {
        self.requests += 1;
        let context = update.context.as_ref().unwrap();
        assert!(context.channel > 0 && context.sequence > 0, "an update without a lane");
        if self.down_targets.contains(&update.target_id) {
            return Err(WireError::new(ErrorKind::Unavailable, "down"));
        }
        if let Some(kind) = self.fail_updates {
            return Err(WireError::new(kind, "injected"));
        }
        let lane = (context.client_id, context.channel);
        if let Some((sequence, reply)) = self.records.get(&lane) {
            if *sequence == context.sequence {
                return Ok(*reply);
            }
            assert!(*sequence < context.sequence, "a lane went backwards");
        }
        let payload = payload.unwrap_or_default();
        assert_eq!(
            payload.len(),
            if update.kind() == UpdateKind::Write { update.length as usize } else { 0 }
        );
        assert_eq!(crc32c::crc32c(payload), update.crc32c);
        let key = key(&update.chunk);
        let mut length = 0;
        for target in self.chain_targets[&update.chain_id].clone() {
            if self.down_targets.contains(&target) {
                continue;
            }
            if update.kind() == UpdateKind::Remove {
                self.chunks.remove(&(target, key));
                continue;
            }
            let bytes = self.chunks.entry((target, key)).or_default();
            let (offset, len) = (update.offset as usize, update.length as usize);
            match update.kind() {
                UpdateKind::Write => {
                    if bytes.len() < offset + len {
                        bytes.resize(offset + len, 0);
                    }
                    bytes[offset..offset + len].copy_from_slice(payload);
                }
                UpdateKind::Truncate => bytes.resize(len, 0),
                UpdateKind::Punch => {
                    let to = (offset + len).min(bytes.len());
                    bytes[offset.min(to)..to].fill(0);
                }
                other => panic!("a client sent {other:?}"),
            }
            length = bytes.len() as u32;
            assert!(length <= update.chunk_bytes);
        }
        self.update_sizes.push(update.length);
        *self.applied.entry(key).or_default() += 1;
        let version = self.versions.entry(key).or_default();
        *version += 1;
        let reply = UpdateReply { version: *version, chunk_length: length };
        self.records.insert(lane, (context.sequence, reply));
        Ok(reply)
    }
}

impl Service for Storage {
    fn payload_limit(&self, _method: u16) -> usize {
        CHUNK as usize
    }

    fn handle<'a>(&'a self, request: Request) -> BoxFuture<'a, Result<Reply, WireError>> {
        Box::pin(async move {
            match request.method {
                methods::storage::READ => self.read(request).await,
                methods::storage::UPDATE => self.update(request).await,
                methods::storage::REMOVE_RANGE => self.remove_range(request),
                other => Err(WireError::new(ErrorKind::Unsupported, format!("method {other}"))),
            }
        })
    }
}

/// A small namespace.
pub struct Meta {
    pub state: Mutex<MetaState>,
    chains: Vec<u32>,
}

#[derive(Default)]
pub struct MetaState {
    pub inodes: BTreeMap<u64, Inode>,
    pub names: BTreeMap<(u64, Vec<u8>), u64>,
    next: u64,
    records: HashMap<(u64, u32), (u64, Vec<u8>)>,
    pub sessions: HashMap<u64, u64>,
    pub swallow_replies: u32,
    pub creates: u32,
    pub syncs: u32,
}

fn not_found() -> WireError {
    WireError::new(ErrorKind::NotFound, "no such entry")
}

impl MetaState {
    fn inode(&self, id: u64) -> Result<Inode, WireError> {
        self.inodes.get(&id).cloned().ok_or_else(not_found)
    }

    fn publish(
        &mut self,
        id: u64,
        length: Option<u64>,
        mtime: Option<Time>,
        truncates: Option<u64>,
    ) -> Result<Inode, WireError> {
        let inode = self.inodes.get_mut(&id).ok_or_else(not_found)?;
        if truncates.is_none_or(|t| t == inode.truncate_version) {
            inode.length = inode.length.max(length.unwrap_or(0));
        }
        if mtime.is_some() {
            inode.mtime = mtime;
        }
        inode.version += 1;
        Ok(inode.clone())
    }

    fn handle(&mut self, method: u16, head: &[u8], chains: &[u32]) -> Result<Vec<u8>, WireError> {
        use methods::meta::*;
        let reply = |inode| InodeReply { inode: Some(inode) }.encode_to_vec();
        Ok(match method {
            LOOKUP => {
                let q = LookupRequest::decode(head).unwrap();
                let id = *self.names.get(&(q.parent, q.name)).ok_or_else(not_found)?;
                reply(self.inode(id)?)
            }
            GET_ATTR => reply(self.inode(GetAttrRequest::decode(head).unwrap().inode_id)?),
            SET_ATTR => {
                let q = SetAttrRequest::decode(head).unwrap();
                let inode = self.inodes.get_mut(&q.inode_id).ok_or_else(not_found)?;
                if let Some(length) = q.length {
                    inode.length = length;
                    inode.truncate_version += 1;
                }
                inode.mode = q.mode.unwrap_or(inode.mode);
                inode.mtime = q.mtime.or(inode.mtime);
                inode.version += 1;
                reply(inode.clone())
            }
            CREATE => {
                let q = CreateRequest::decode(head).unwrap();
                if let Some(id) = self.names.get(&(q.parent, q.name.clone())) {
                    if q.exclusive {
                        return Err(WireError::new(ErrorKind::AlreadyExists, "exists"));
                    }
                    let inode = self.inode(*id)?;
                    return Ok(CreateReply { inode: Some(inode), created: false, session: 0 }.encode_to_vec());
                }
                self.creates += 1;
                self.next += 1;
                let id = self.next;
                let layout = Layout { chunk_bytes: CHUNK, chains: chains.to_vec() };
                let inode = Inode {
                    inode_id: id,
                    kind: q.kind,
                    mode: q.mode,
                    nlink: 1,
                    data_id: id + 1000,
                    symlink: q.symlink.clone(),
                    layout: (q.kind() == InodeKind::File).then_some(layout),
                    ..Default::default()
                };
                self.names.insert((q.parent, q.name), id);
                self.inodes.insert(id, inode.clone());
                let session = if q.open_write || q.open_read { 7000 + id } else { 0 };
                if session > 0 {
                    self.sessions.insert(session, id);
                }
                CreateReply { inode: Some(inode), created: true, session }.encode_to_vec()
            }
            OPEN => {
                let q = OpenRequest::decode(head).unwrap();
                let inode = self.inodes.get_mut(&q.inode_id).ok_or_else(not_found)?;
                if q.truncate {
                    inode.generation += 1;
                    inode.length = 0;
                    inode.version += 1;
                    inode.truncate_version += 1;
                }
                self.next += 1;
                self.sessions.insert(9000 + self.next, q.inode_id);
                OpenReply { inode: Some(inode.clone()), session: 9000 + self.next }.encode_to_vec()
            }
            CLOSE => {
                let q = CloseRequest::decode(head).unwrap();
                assert!(self.sessions.remove(&q.session).is_some(), "closed twice");
                let inode = self.publish(q.inode_id, q.length, q.mtime, q.truncate_version)?;
                CloseReply { inode: Some(inode) }.encode_to_vec()
            }
            SYNC => {
                let q = SyncRequest::decode(head).unwrap();
                self.syncs += 1;
                reply(self.publish(q.inode_id, q.length, q.mtime, q.truncate_version)?)
            }
            UNLINK => {
                let q = UnlinkRequest::decode(head).unwrap();
                let id = self.names.remove(&(q.parent, q.name)).ok_or_else(not_found)?;
                if !self.sessions.values().any(|open| *open == id) {
                    self.inodes.remove(&id);
                }
                UnlinkReply {}.encode_to_vec()
            }
            READ_DIR => {
                let q = ReadDirRequest::decode(head).unwrap();
                let mut all: Vec<Entry> = Vec::new();
                for ((parent, name), id) in &self.names {
                    if *parent == q.inode_id && *name > q.cursor {
                        let inode = self.inode(*id)?;
                        all.push(Entry {
                            name: name.clone(),
                            inode_id: *id,
                            kind: inode.kind,
                            cursor: name.clone(),
                            inode: Some(inode),
                        });
                    }
                }
                let end = all.len() <= q.limit as usize;
                all.truncate(q.limit as usize);
                ReadDirReply { entries: all, end, parent: 1 }.encode_to_vec()
            }
            other => return Err(WireError::new(ErrorKind::Unsupported, format!("method {other}"))),
        })
    }
}

impl Service for Meta {
    fn payload_limit(&self, _method: u16) -> usize {
        0
    }

    fn handle<'a>(&'a self, request: Request) -> BoxFuture<'a, Result<Reply, WireError>> {
        Box::pin(async move {
            // Every request begins with the caller as field 1.
            let lane = LookupRequest::decode(request.head.clone())
                .ok()
                .and_then(|q| q.caller)
                .or_else(|| GetAttrRequest::decode(request.head.clone()).ok().and_then(|q| q.caller))
                .map(|c| (c.client_id, c.channel, c.sequence));
            let (client, channel, sequence) = lane.expect("a caller");
            let (swallow, result) = {
                let mut state = self.state.lock().unwrap();
                let done = state
                    .records
                    .get(&(client, channel))
                    .filter(|(s, _)| channel > 0 && *s == sequence)
                    .map(|(_, r)| r.clone());
                let result = match done {
                    Some(reply) => Ok(reply),
                    None => {
                        let result = state.handle(request.method, &request.head, &self.chains);
                        if let (true, Ok(reply)) = (channel > 0, &result) {
                            state.records.insert((client, channel), (sequence, reply.clone()));
                        }
                        result
                    }
                };
                let swallow = channel > 0 && state.swallow_replies > 0;
                if swallow {
                    state.swallow_replies -= 1;
                }
                (swallow, result)
            };
            if swallow {
                std::future::pending::<()>().await;
            }
            Ok(Reply::head(result?))
        })
    }
}

struct FakeManager {
    routing: watch::Receiver<RoutingTable>,
    cluster: String,
}

#[tonic::async_trait]
impl Manager for FakeManager {
    async fn heartbeat(
        &self,
        _request: tonic::Request<HeartbeatRequest>,
    ) -> Result<tonic::Response<HeartbeatReply>, tonic::Status> {
        let routing_version = self.routing.borrow().version;
        Ok(tonic::Response::new(HeartbeatReply {
            routing_version,
            lease_ms: 60_000,
            interval_ms: 1000,
            cluster_format_version: 1,
        }))
    }

    async fn get_routing(
        &self,
        request: tonic::Request<GetRoutingRequest>,
    ) -> Result<tonic::Response<RoutingTable>, tonic::Status> {
        let request = request.into_inner();
        let mut routing = self.routing.clone();
        let wait = Duration::from_millis(request.wait_ms.into());
        let _ = tokio::time::timeout(wait, routing.wait_for(|r| r.version > request.known_version)).await;
        let table = routing.borrow().clone();
        Ok(tonic::Response::new(table))
    }

    async fn open_session(
        &self,
        request: tonic::Request<OpenSessionRequest>,
    ) -> Result<tonic::Response<OpenSessionReply>, tonic::Status> {
        let client_id = request.into_inner().client_id;
        Ok(tonic::Response::new(OpenSessionReply {
            client_id: if client_id == 0 { rand::random::<u32>().into() } else { client_id },
            session_epoch: 1,
            lease_ms: 60_000,
            cluster_id: self.cluster.clone(),
        }))
    }

    async fn renew_session(
        &self,
        _request: tonic::Request<RenewSessionRequest>,
    ) -> Result<tonic::Response<RenewSessionReply>, tonic::Status> {
        Ok(tonic::Response::new(RenewSessionReply { lease_ms: 60_000 }))
    }

    async fn close_session(
        &self,
        _request: tonic::Request<CloseSessionRequest>,
    ) -> Result<tonic::Response<CloseSessionReply>, tonic::Status> {
        Ok(tonic::Response::new(CloseSessionReply {}))
    }
}

fn any_port() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

impl Cluster {
    /// Two storage nodes and chains 1 and 2 over both, in opposite order: targets 11 (node 3) and
    /// 12 (node 4) on chain 1, 22 (node 4) and 21 (node 3) on chain 2.
    pub async fn start() -> Cluster {
        let identity = Identity {
            cluster: ClusterId(42),
            secret: ClusterSecret::from_bytes([9; 32]),
            name: "test".into(),
        };
        let stop = CancellationToken::new();
        let storage = Arc::new(Storage::default());
        {
            let mut state = storage.state.lock().unwrap();
            state.chain_targets = HashMap::from([(1, vec![11, 12]), (2, vec![22, 21])]);
        }
        let meta = Arc::new(Meta { state: Mutex::default(), chains: vec![1, 2] });
        {
            let mut state = meta.state.lock().unwrap();
            state.next = 1;
            let root = Inode {
                inode_id: 1,
                kind: InodeKind::Directory.into(),
                mode: 0o755,
                nlink: 2,
                ..Default::default()
            };
            state.inodes.insert(1, root);
        }
        let mut stops = HashMap::new();
        let mut nodes = Vec::new();
        for (node_id, role) in [(2, NodeRole::Meta), (3, NodeRole::Storage), (4, NodeRole::Storage)] {
            let service: Arc<dyn Service> = match role {
                NodeRole::Meta => meta.clone(),
                _ => storage.clone(),
            };
            let server = Server::bind(any_port(), identity.clone(), service).unwrap();
            let address = server.local_addr().to_string();
            let token = stop.child_token();
            tokio::spawn(server.run(token.clone()));
            stops.insert(node_id, token);
            nodes.push(NodeInfo { node_id, role: role.into(), address, alive: true, ..Default::default() });
        }
        let target =
            |target_id, node_id, chain_id| TargetInfo { target_id, node_id, chain_id, ..Default::default() };
        let serving = vec![PublicState::Serving as i32; 2];
        let chain = |chain_id, targets: [u32; 2]| ChainInfo {
            chain_id,
            version: 1,
            targets: targets.to_vec(),
            states: serving.clone(),
            ..Default::default()
        };
        let table = RoutingTable {
            version: 1,
            nodes,
            targets: vec![target(11, 3, 1), target(12, 4, 1), target(21, 3, 2), target(22, 4, 2)],
            chains: vec![chain(1, [11, 12]), chain(2, [22, 21])],
            min_write_replicas: 1,
            replication: 2,
            chunk_bytes: CHUNK,
            stripe_chains: vec![1, 2],
            ..RoutingTable::default()
        };
        let (routing, receiver) = watch::channel(table);
        let service = ManagerServer::with_interceptor(
            FakeManager { routing: receiver, cluster: identity.cluster.to_string() },
            CheckToken::new(&identity.secret),
        );
        let listener = tokio::net::TcpListener::bind(any_port()).await.unwrap();
        let manager = listener.local_addr().unwrap().to_string();
        let stopped = stop.clone();
        tokio::spawn(async move {
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming_shutdown(incoming, stopped.cancelled_owned())
                .await
                .unwrap();
        });
        Cluster { identity, manager, routing, storage, meta, stops: Mutex::new(stops), stop }
    }

    pub fn options(&self) -> ClientOptions {
        ClientOptions {
            call_timeout: Duration::from_millis(300),
            update_timeout: Duration::from_millis(300),
            // Publication is by hand, so that tests see what was sent when.
            publish_every: Duration::from_secs(3600),
            ..ClientOptions::new(self.manager.clone(), self.identity.clone())
        }
    }

    pub async fn connect(&self) -> Arc<Fs3> {
        Fs3::connect(self.options()).await.unwrap()
    }

    /// Another meta server takes the place of the one in memory.
    pub fn use_meta(&self, address: String) {
        self.routing.send_modify(|table| {
            for node in table.nodes.iter_mut().filter(|n| n.role() == NodeRole::Meta) {
                node.address = address.clone();
            }
            table.version += 1;
        });
    }

    /// Ends a node's process: connections break.
    pub fn kill(&self, node: u32) {
        self.stops.lock().unwrap()[&node].cancel();
    }

    /// What the manager does after a node's death: its targets leave their chains.
    pub fn fail_over(&self, node: u32) {
        self.routing.send_modify(|table| {
            let gone: Vec<u32> =
                table.targets.iter().filter(|t| t.node_id == node).map(|t| t.target_id).collect();
            for chain in &mut table.chains {
                let mut kept: Vec<(u32, i32)> = Vec::new();
                let mut lost = Vec::new();
                for (target, state) in chain.targets.iter().zip(&chain.states) {
                    if gone.contains(target) {
                        lost.push((*target, PublicState::Offline as i32));
                    } else {
                        kept.push((*target, *state));
                    }
                }
                chain.version += 1;
                kept.extend(lost);
                (chain.targets, chain.states) = kept.into_iter().unzip();
            }
            table.version += 1;
        });
        let mut state = self.storage.state.lock().unwrap();
        let down: Vec<u32> = if node == 3 { vec![11, 21] } else { vec![12, 22] };
        state.down_targets.extend(down);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
