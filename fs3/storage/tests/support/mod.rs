//! A manager that keeps its chain in memory, and a client that retries like a real one.

#![allow(unreachable_pub, reason = "shared by test binaries")]

use firefly_net::{Call, CallError, Client, Identity};
use firefly_proto::auth::CheckToken;
use firefly_proto::methods::storage as method;
use firefly_proto::mgmtd::manager_server::{Manager, ManagerServer};
use firefly_proto::{mgmtd as pb, storage as sp};
use firefly_types::{ChainId, ChainVersion, ClusterId, ClusterSecret, ErrorKind, NodeId, TargetId};
use fs3_core::chain::{Chain, LocalState, PublicState, Report, next_chain, remove_member, start_chain};
use fs3_storage::{Running, StorageConfig, serve};
use prost::Message;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

const CHAIN: u32 = 1;

struct State {
    chain: Chain,
    /// node → (address, incarnation)
    nodes: BTreeMap<u32, (String, u64)>,
    /// target → its last report; silent ones are absent
    reports: BTreeMap<u32, Report>,
    reasons: BTreeMap<u32, String>,
    /// target → how far its scrub is
    scrubs: BTreeMap<u32, pb::ScrubProgress>,
    scrub: pb::ScrubOrder,
    retiring: Option<u32>,
    graves: Vec<u32>,
}

/// Target n is on node n. A node counts as dead when the test says so.
#[derive(Clone)]
pub struct FakeManager {
    state: Arc<Mutex<State>>,
    table: Arc<watch::Sender<pb::RoutingTable>>,
    pub min_write_replicas: u32,
}

fn public(state: PublicState) -> pb::PublicState {
    match state {
        PublicState::Serving => pb::PublicState::Serving,
        PublicState::Syncing => pb::PublicState::Syncing,
        PublicState::Waiting => pb::PublicState::Waiting,
        PublicState::LastSrv => pb::PublicState::Lastsrv,
        PublicState::Offline => pb::PublicState::Offline,
    }
}

impl FakeManager {
    pub async fn start(targets: u32, secret: &ClusterSecret) -> (Self, String) {
        let ids: Vec<TargetId> = (1..=targets).map(TargetId).collect();
        let state = State {
            chain: Chain::new(ChainId(CHAIN), &ids),
            nodes: BTreeMap::new(),
            reports: BTreeMap::new(),
            reasons: BTreeMap::new(),
            scrubs: BTreeMap::new(),
            scrub: pb::ScrubOrder::default(),
            retiring: None,
            graves: Vec::new(),
        };
        let manager = Self {
            state: Arc::new(Mutex::new(state)),
            table: Arc::new(watch::Sender::new(pb::RoutingTable::default())),
            min_write_replicas: 1,
        };
        manager.publish(&mut manager.state.lock().unwrap());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let service = ManagerServer::with_interceptor(manager.clone(), CheckToken::new(secret));
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        (manager, address)
    }

    fn publish(&self, state: &mut State) {
        let old = self.table.borrow().version;
        let targets = state.chain.members.iter().map(|m| pb::TargetInfo {
            target_id: m.target.0,
            node_id: m.target.0,
            chain_id: CHAIN,
            state: public(m.state).into(),
            retiring: state.retiring == Some(m.target.0),
            ..pb::TargetInfo::default()
        });
        let nodes = state.nodes.iter().map(|(id, (address, incarnation))| pb::NodeInfo {
            node_id: *id,
            role: pb::NodeRole::Storage.into(),
            address: address.clone(),
            alive: true,
            incarnation: *incarnation,
            ..pb::NodeInfo::default()
        });
        let table = pb::RoutingTable {
            version: old + 1,
            nodes: nodes.collect(),
            targets: targets.collect(),
            chains: vec![pb::ChainInfo {
                chain_id: CHAIN,
                version: state.chain.version.0,
                targets: state.chain.members.iter().map(|m| m.target.0).collect(),
                states: state.chain.members.iter().map(|m| public(m.state).into()).collect(),
                ..pb::ChainInfo::default()
            }],
            min_write_replicas: self.min_write_replicas,
            replication: 3,
            chunk_bytes: 1 << 20,
            stripe_chains: vec![CHAIN],
            graves: state.graves.iter().map(|t| pb::Grave { target_id: *t, node_id: *t }).collect(),
            scrub: Some(state.scrub),
        };
        self.table.send_replace(table);
    }

    fn update(&self, state: &mut State) {
        loop {
            let report = |t: TargetId| state.reports.get(&t.0).copied().unwrap_or(Report::SILENT);
            let everybody = state.chain.members.iter().all(|m| report(m.target) != Report::SILENT);
            let next = match state.chain.is_new() {
                true if everybody => start_chain(&state.chain, report),
                true => None,
                false => next_chain(&state.chain, report),
            };
            let Some(next) = next else { return };
            state.chain = next;
            self.publish(state);
        }
    }

    /// The process of this node has ended, provably.
    pub fn declare_dead(&self, node: u32) {
        let mut state = self.state.lock().unwrap();
        state.reports.remove(&node);
        self.update(&mut state);
    }

    /// Has everything checked.
    pub fn scrub(&self, pass: u64, rate_bytes: u64) {
        let mut state = self.state.lock().unwrap();
        state.scrub = pb::ScrubOrder { pass, active: true, rate_bytes };
        self.publish(&mut state);
    }

    pub fn scrubbed(&self, target: u32) -> pb::ScrubProgress {
        self.state.lock().unwrap().scrubs.get(&target).copied().unwrap_or_default()
    }

    /// Asks a target to stop serving, or wants it back.
    pub fn retire(&self, target: Option<u32>) {
        let mut state = self.state.lock().unwrap();
        state.retiring = target;
        self.publish(&mut state);
    }

    /// Takes a target that is out out of the chain for good.
    pub fn bury(&self, target: u32) {
        let mut state = self.state.lock().unwrap();
        state.chain = remove_member(&state.chain, TargetId(target)).expect("it is out");
        state.retiring = None;
        state.graves.push(target);
        self.publish(&mut state);
    }

    pub fn chain(&self) -> Chain {
        self.state.lock().unwrap().chain.clone()
    }

    pub fn reason(&self, target: u32) -> String {
        self.state.lock().unwrap().reasons.get(&target).cloned().unwrap_or_default()
    }

    pub fn address(&self, node: u32) -> Option<String> {
        self.state.lock().unwrap().nodes.get(&node).map(|n| n.0.clone())
    }

    /// Waits until the published chain is as wanted.
    pub async fn wait(&self, wanted: impl Fn(&Chain) -> bool) {
        let mut table = self.table.subscribe();
        let waiting = async {
            while !wanted(&self.chain()) {
                table.changed().await.unwrap();
            }
        };
        if tokio::time::timeout(Duration::from_secs(30), waiting).await.is_err() {
            panic!("the chain stays {:?}", self.chain());
        }
    }

    pub async fn wait_serving(&self, count: usize) {
        self.wait(|c| c.in_state(PublicState::Serving).count() == count).await;
    }
}

#[tonic::async_trait]
impl Manager for FakeManager {
    async fn heartbeat(
        &self,
        request: Request<pb::HeartbeatRequest>,
    ) -> Result<Response<pb::HeartbeatReply>, Status> {
        let request = request.into_inner();
        let mut state = self.state.lock().unwrap();
        let now = (request.address.clone(), request.incarnation);
        let before = state.nodes.insert(request.node_id, now.clone());
        if before.as_ref() != Some(&now) {
            // A new incarnation proves that the old one is dead.
            if before.is_some_and(|b| b.1 != request.incarnation) {
                state.reports.remove(&request.node_id);
                self.update(&mut state);
            }
            self.publish(&mut state);
        }
        for report in request.targets {
            let local = match report.state() {
                pb::LocalState::UpToDate => LocalState::UpToDate,
                pb::LocalState::Online => LocalState::Online,
                _ => LocalState::Offline,
            };
            let synced_at = ChainVersion(report.synced_at_version);
            state.reports.insert(report.target_id, Report { local, synced_at });
            state.reasons.insert(report.target_id, report.reason);
            state.scrubs.insert(report.target_id, report.scrub.unwrap_or_default());
        }
        self.update(&mut state);
        let routing_version = self.table.borrow().version;
        Ok(Response::new(pb::HeartbeatReply {
            routing_version,
            lease_ms: 60_000,
            interval_ms: 50,
            cluster_format_version: 1,
        }))
    }

    async fn get_routing(
        &self,
        request: Request<pb::GetRoutingRequest>,
    ) -> Result<Response<pb::RoutingTable>, Status> {
        let request = request.into_inner();
        let mut table = self.table.subscribe();
        let newer = table.wait_for(|t| t.version > request.known_version);
        let wait = Duration::from_millis(request.wait_ms.into());
        let _ = tokio::time::timeout(wait, newer).await;
        Ok(Response::new(self.table.borrow().clone()))
    }

    async fn open_session(
        &self,
        _: Request<pb::OpenSessionRequest>,
    ) -> Result<Response<pb::OpenSessionReply>, Status> {
        Err(Status::unimplemented("not in this manager"))
    }

    async fn renew_session(
        &self,
        _: Request<pb::RenewSessionRequest>,
    ) -> Result<Response<pb::RenewSessionReply>, Status> {
        Err(Status::unimplemented("not in this manager"))
    }

    async fn close_session(
        &self,
        _: Request<pb::CloseSessionRequest>,
    ) -> Result<Response<pb::CloseSessionReply>, Status> {
        Err(Status::unimplemented("not in this manager"))
    }
}

pub struct Node {
    pub running: Running,
    stop: CancellationToken,
}

/// A cluster in this process.
pub struct Cluster {
    pub manager: FakeManager,
    pub dir: tempfile::TempDir,
    identity: Identity,
    manager_address: String,
    pub nodes: BTreeMap<u32, Node>,
}

impl Cluster {
    pub async fn start(nodes: u32) -> Self {
        let secret = ClusterSecret::from_bytes([3; 32]);
        let (manager, manager_address) = FakeManager::start(nodes, &secret).await;
        let identity = Identity { cluster: ClusterId(7), secret, name: "test".into() };
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = Self { manager, dir, identity, manager_address, nodes: BTreeMap::new() };
        for node in 1..=nodes {
            cluster.start_node(node).await;
        }
        cluster.manager.wait_serving(nodes as usize).await;
        cluster
    }

    pub fn data_dir(&self, node: u32) -> std::path::PathBuf {
        self.dir.path().join(format!("n{node}"))
    }

    pub async fn start_node(&mut self, node: u32) {
        let config = StorageConfig {
            node_id: NodeId(node),
            listen: "127.0.0.1:0".parse().unwrap(),
            manager: self.manager_address.clone(),
            data_dir: self.data_dir(node),
            identity: self.identity.clone(),
            capacity_bytes: 256 << 20,
        };
        let stop = CancellationToken::new();
        let running = serve(config, stop.clone()).await.unwrap();
        self.nodes.insert(node, Node { running, stop });
    }

    pub async fn stop_node(&mut self, node: u32) {
        let node_state = self.nodes.remove(&node).unwrap();
        node_state.stop.cancel();
        node_state.running.stopped().await;
        self.manager.declare_dead(node);
    }

    pub fn client(&self, id: u64) -> TestClient {
        TestClient {
            net: Client::new(self.identity.clone()),
            manager: self.manager.clone(),
            id,
            sequence: 0,
            epoch: 1,
        }
    }

    pub fn target_dir(&self, node: u32) -> std::path::PathBuf {
        self.data_dir(node).join(format!("t{node}"))
    }
}

pub struct TestClient {
    net: Client,
    manager: FakeManager,
    id: u64,
    pub sequence: u64,
    pub epoch: u64,
}

pub fn key(index: u32) -> sp::ChunkKey {
    sp::ChunkKey { data_id: 5, generation: 0, index }
}

impl TestClient {
    fn context(&self) -> sp::RequestContext {
        sp::RequestContext {
            client_id: self.id,
            session_epoch: self.epoch,
            channel: 1,
            sequence: self.sequence,
            ..sp::RequestContext::default()
        }
    }

    async fn try_call<R: Message + Default>(
        &self,
        target: TargetId,
        method: u16,
        head: Vec<u8>,
        send: Option<&[u8]>,
        recv: usize,
    ) -> Result<(R, Vec<u8>), CallError> {
        let peer = self.manager.address(target.0).unwrap_or_default();
        let send = match send {
            Some(bytes) => {
                let mut buf = self.net.pool().alloc(bytes.len()).await;
                buf.copy_from_slice(bytes);
                Some(buf.freeze())
            }
            None => None,
        };
        let recv = if recv > 0 { Some(self.net.pool().alloc(recv).await) } else { None };
        let call = Call { method, head: head.into(), send, recv, timeout: Duration::from_secs(10) };
        let response = self.net.call(&peer, call).await?;
        let data = response.data.map(|d| d.to_vec()).unwrap_or_default();
        Ok((R::decode(response.head).unwrap(), data))
    }

    /// One update, again and again under one sequence number until it is answered for good.
    pub async fn update(
        &mut self,
        kind: sp::UpdateKind,
        chunk: sp::ChunkKey,
        offset: u32,
        length: u32,
        payload: Option<&[u8]>,
    ) -> Result<sp::UpdateReply, CallError> {
        self.sequence += 1;
        self.repeat(kind, chunk, offset, length, payload).await
    }

    /// The same again, under the last sequence number.
    pub async fn repeat(
        &self,
        kind: sp::UpdateKind,
        chunk: sp::ChunkKey,
        offset: u32,
        length: u32,
        payload: Option<&[u8]>,
    ) -> Result<sp::UpdateReply, CallError> {
        let attempts = async {
            loop {
                let chain = self.manager.chain();
                let Some(head) = chain.in_state(PublicState::Serving).next() else {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                };
                let request = sp::UpdateRequest {
                    context: Some(self.context()),
                    chain_id: CHAIN,
                    chain_version: chain.version.0,
                    target_id: head.0,
                    chunk: Some(chunk),
                    kind: kind.into(),
                    offset,
                    length,
                    crc32c: payload.map_or(0, crc32c::crc32c),
                    chunk_bytes: 1 << 20,
                };
                match self.try_call(head, method::UPDATE, request.encode_to_vec(), payload, 0).await {
                    Ok((reply, _)) => return Ok(reply),
                    Err(e) if e.kind().is_retryable() && !e.to_string().contains("session") => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    Err(e) => return Err(e),
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(30), attempts)
            .await
            .expect("the update goes through in time")
    }

    pub async fn write(&mut self, index: u32, offset: u32, bytes: &[u8]) -> sp::UpdateReply {
        let (kind, length) = (sp::UpdateKind::Write, bytes.len() as u32);
        self.update(kind, key(index), offset, length, Some(bytes)).await.unwrap()
    }

    /// Reads from one target; asks again while the answer is retryable.
    pub async fn read_at(
        &self,
        target: TargetId,
        index: u32,
        offset: u32,
        length: u32,
    ) -> Result<(sp::ReadReply, Vec<u8>), CallError> {
        let attempts = async {
            loop {
                let request = sp::ReadRequest {
                    context: Some(self.context()),
                    chain_id: CHAIN,
                    chain_version: self.manager.chain().version.0,
                    target_id: target.0,
                    chunk: Some(key(index)),
                    offset,
                    length,
                };
                let head = request.encode_to_vec();
                match self.try_call::<sp::ReadReply>(target, method::READ, head, None, length as usize).await
                {
                    Ok((reply, data)) => {
                        assert_eq!(reply.crc32c, crc32c::crc32c(&data));
                        return Ok((reply, data));
                    }
                    Err(e) if e.kind().is_retryable() => tokio::time::sleep(Duration::from_millis(20)).await,
                    Err(e) => return Err(e),
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(30), attempts).await.expect("the read goes through in time")
    }

    /// Reads the same from every serving target.
    pub async fn read_everywhere(&self, index: u32, length: u32) -> Vec<u8> {
        let serving: Vec<TargetId> = self.manager.chain().in_state(PublicState::Serving).collect();
        let mut seen: Option<Vec<u8>> = None;
        for target in serving {
            let (_, data) = self.read_at(target, index, 0, length).await.unwrap();
            if let Some(other) = &seen {
                assert!(*other == data, "target {target} differs in chunk {index}");
            }
            seen = Some(data);
        }
        seen.unwrap()
    }

    pub async fn call_head<R: Message + Default>(
        &self,
        method: u16,
        build: impl Fn(&Chain, TargetId) -> Vec<u8>,
    ) -> R {
        let chain = self.manager.chain();
        let head = chain.in_state(PublicState::Serving).next().unwrap();
        self.try_call(head, method, build(&chain, head), None, 0).await.unwrap().0
    }

    pub fn plain_context(&self) -> sp::RequestContext {
        self.context()
    }
}

pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(31).wrapping_add(seed * 97 + i / 4096) % 251) as u8 + 1).collect()
}

/// Flips a byte in the middle of the block of the volume that begins with `begin`.
pub fn corrupt_block(target_dir: &Path, begin: &[u8]) {
    let path = target_dir.join("volume");
    let bytes = std::fs::read(&path).unwrap();
    let at = bytes.chunks(4096).position(|b| b.starts_with(begin)).expect("the block is there") * 4096;
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[bytes[at + 2000] ^ 1], at as u64 + 2000).unwrap();
    file.sync_all().unwrap();
}

pub fn is_stale(error: &CallError) -> bool {
    error.kind() == ErrorKind::Stale
}
