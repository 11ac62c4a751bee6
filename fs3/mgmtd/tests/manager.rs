//! A real manager on loopback: gRPC, store, restart. Everything waits on the routing long poll, never
//! on time.

use firefly_net::rpc::Identity;
use firefly_proto::auth::AddToken;
use firefly_proto::mgmtd::manager_client::ManagerClient;
use firefly_proto::mgmtd::*;
use firefly_proto::status::from_status;
use firefly_types::{ClusterId, ClusterSecret, ErrorKind, NodeId};
use fs3_mgmtd::{MgmtdConfig, MgmtdError, MgmtdSettings, Running, Timing, serve};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

type Client = ManagerClient<InterceptedService<Channel, AddToken>>;

/// Short, so that the test is, and long enough that a loaded machine does not look dead for long:
/// where it does, chains change and heal, and the test still waits for the state that it wants.
fn timing() -> Timing {
    Timing {
        heartbeat_ms: 60,
        lease_ms: 500,
        margin_ms: 100,
        takeover_ms: 100,
        bootstrap_ms: 600_000,
        session_ms: 20_000,
        rotate_ms: 50,
        ..Timing::default()
    }
}

fn secret() -> ClusterSecret {
    ClusterSecret::from_bytes([5; 32])
}

fn config(dir: &Path, cluster: u128) -> MgmtdConfig {
    let mut settings = MgmtdSettings::new(vec![NodeId(3), NodeId(4), NodeId(5)]);
    settings.min_write_replicas = Some(1);
    settings.timing = timing();
    MgmtdConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        data_dir: dir.to_owned(),
        identity: Identity { cluster: ClusterId(cluster), secret: secret(), name: "manager n1".into() },
        settings,
    }
}

async fn client_with(running: &Running, secret: &ClusterSecret) -> Client {
    let channel = Channel::from_shared(format!("http://{}", running.addr)).unwrap().connect().await.unwrap();
    ManagerClient::with_interceptor(channel, AddToken::new(secret))
}

async fn client(running: &Running) -> Client {
    client_with(running, &secret()).await
}

/// The first routing table, from `known` on, that is as wanted.
async fn wait_for(client: &mut Client, mut is_wanted: impl FnMut(&RoutingTable) -> bool) -> RoutingTable {
    let mut known_version = 0;
    let search = async {
        loop {
            let request = GetRoutingRequest { known_version, wait_ms: 5_000 };
            let table = client.get_routing(request).await.unwrap().into_inner();
            assert!(table.version >= known_version);
            if is_wanted(&table) {
                return table;
            }
            known_version = table.version;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), search).await.expect("the wanted table never came")
}

fn states_of(table: &RoutingTable, node: u32) -> Vec<PublicState> {
    table.targets.iter().filter(|t| t.node_id == node).map(TargetInfo::state).collect()
}

fn all_serve(table: &RoutingTable) -> bool {
    table.targets.iter().all(|t| t.state() == PublicState::Serving)
}

/// A storage node that only beats, and reports targets as filled while `fills`.
struct FakeNode {
    fills: Arc<AtomicBool>,
    leases: Arc<AtomicU64>,
    stop: CancellationToken,
    /// The latest refusal.
    refused: watch::Receiver<Option<ErrorKind>>,
}

impl FakeNode {
    fn start(mut client: Client, node: u32, incarnation: u64, fills: bool) -> Self {
        let fills = Arc::new(AtomicBool::new(fills));
        let leases = Arc::new(AtomicU64::new(0));
        let stop = CancellationToken::new();
        let (refusals, refused) = watch::channel(None);
        let this = Self { fills: fills.clone(), leases: leases.clone(), stop: stop.clone(), refused };
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            let mut table = RoutingTable::default();
            loop {
                let own = table.targets.iter().filter(|t| t.node_id == node);
                let report = |target: &TargetInfo| {
                    let chain = table.chains.iter().find(|c| c.chain_id == target.chain_id).unwrap();
                    let is_filled = target.state() == PublicState::Syncing && fills.load(Ordering::Relaxed);
                    let state = if is_filled { LocalState::UpToDate } else { LocalState::Online };
                    TargetReport {
                        target_id: target.target_id,
                        state: state as i32,
                        used_bytes: 7,
                        synced_at_version: if is_filled { chain.version } else { 0 },
                        ..Default::default()
                    }
                };
                let request = HeartbeatRequest {
                    node_id: node,
                    role: NodeRole::Storage as i32,
                    incarnation,
                    address: format!("127.0.0.1:{}", 1000 + node),
                    targets: own.map(report).collect(),
                    routing_version: table.version,
                    format_version: 1,
                    process: None,
                };
                match client.heartbeat(request).await {
                    Ok(reply) => {
                        let reply = reply.into_inner();
                        assert_eq!(reply.interval_ms, timing().heartbeat_ms);
                        leases.fetch_add(u64::from(reply.lease_ms > 0), Ordering::Relaxed);
                        if reply.routing_version > table.version {
                            let request = GetRoutingRequest { known_version: table.version, wait_ms: 0 };
                            if let Ok(newer) = client.get_routing(request).await {
                                table = newer.into_inner();
                                continue;
                            }
                        }
                    }
                    Err(status) => drop(refusals.send(Some(from_status(&status).kind))),
                }
                tokio::time::sleep(Duration::from_millis(60)).await;
            }
        }));
        this
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_falls_silent_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let stop = CancellationToken::new();
    let running = serve(config(dir.path(), 1), stop.clone()).await.unwrap();
    let mut watcher = client(&running).await;

    let _n3 = FakeNode::start(client(&running).await, 3, 31, true);
    let _n4 = FakeNode::start(client(&running).await, 4, 41, true);
    let n5 = FakeNode::start(client(&running).await, 5, 51, true);
    let table = wait_for(&mut watcher, all_serve).await;
    assert_eq!((table.chains.len(), table.targets.len(), table.nodes.len()), (6, 12, 3));
    assert_eq!((table.replication, table.min_write_replicas, table.chunk_bytes), (2, 1, 1 << 20));
    assert_eq!(table.stripe_chains, [1, 2, 3, 4, 5, 6]);
    assert!(table.nodes.iter().all(|n| n.alive && n.address == format!("127.0.0.1:{}", 1000 + n.node_id)));
    let heads = table
        .chains
        .iter()
        .map(|c| table.targets.iter().find(|t| t.target_id == c.targets[0]).unwrap().node_id);
    assert_eq!(heads.collect::<Vec<_>>(), [3, 4, 5, 3, 4, 5]);

    drop(n5);
    let without = wait_for(&mut watcher, |t| {
        states_of(t, 5).iter().all(|s| *s == PublicState::Offline)
            && states_of(t, 3).iter().chain(&states_of(t, 4)).all(|s| *s == PublicState::Serving)
    })
    .await;
    assert!(!without.nodes.iter().find(|n| n.node_id == 5).unwrap().alive);
    for (old, new) in table.chains.iter().zip(&without.chains) {
        let lost_one = new.states().any(|s| s == PublicState::Offline);
        assert!(new.version >= old.version + u64::from(lost_one));
    }

    // It comes back as a new process, and is filled only when it says so, for this version.
    let n5 = FakeNode::start(client(&running).await, 5, 52, false);
    wait_for(&mut watcher, |t| states_of(t, 5).iter().all(|s| *s == PublicState::Syncing)).await;
    n5.fills.store(true, Ordering::Relaxed);
    let healed = wait_for(&mut watcher, all_serve).await;
    assert!(healed.version > without.version);
    assert_eq!(healed.nodes.iter().find(|n| n.node_id == 5).unwrap().incarnation, 52);
    assert!(n5.leases.load(Ordering::Relaxed) > 0);

    // The old process wakes up again and is told to go.
    let mut old = FakeNode::start(client(&running).await, 5, 51, true);
    let refused = old.refused.wait_for(|r| r.is_some());
    let kind = *tokio::time::timeout(Duration::from_secs(60), refused).await.unwrap().unwrap();
    assert_eq!(kind, Some(ErrorKind::Stale));

    stop.cancel();
    running.finished().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_keeps_tables_ids_and_epochs() {
    let dir = tempfile::tempdir().unwrap();
    let (mut version, mut chains, mut session) = (0, Vec::new(), None);
    for round in 0..3 {
        let stop = CancellationToken::new();
        let running = serve(config(dir.path(), 1), stop.clone()).await.unwrap();
        let mut watcher = client(&running).await;
        let nodes: Vec<_> = [(3, 31), (4, 41), (5, 51)].map(|(n, i)| (n, i, client(&running))).into();
        let mut fakes = Vec::new();
        for (node, incarnation, client) in nodes {
            // The servers outlive the manager.
            fakes.push(FakeNode::start(client.await, node, incarnation, true));
        }
        let table = wait_for(&mut watcher, all_serve).await;
        assert!(table.version >= version, "round {round}");
        for (old, new) in std::iter::zip(&chains, &table.chains) {
            let (old, new): (&ChainInfo, &ChainInfo) = (old, new);
            assert_eq!((old.chain_id, &old.preferred), (new.chain_id, &new.preferred));
            assert!(new.version >= old.version);
        }
        (version, chains) = (table.version, table.chains);

        if let Some((client_id, session_epoch)) = session {
            watcher.renew_session(RenewSessionRequest { client_id, session_epoch }).await.unwrap();
        }
        let opened = watcher.open_session(OpenSessionRequest::default()).await.unwrap().into_inner();
        assert_eq!(opened.cluster_id, ClusterId(1).to_string());
        assert_eq!(opened.lease_ms, 20_000);
        if let Some((client_id, session_epoch)) = session {
            assert!(opened.client_id > client_id && opened.session_epoch > session_epoch);
        }
        session = Some((opened.client_id, opened.session_epoch));

        let ahead = GetRoutingRequest { known_version: version + 1000, wait_ms: 0 };
        let error = from_status(&watcher.get_routing(ahead).await.unwrap_err());
        assert_eq!(error.kind, ErrorKind::Stale, "{error}");

        // A poll that is held answers when the manager stops.
        let held = GetRoutingRequest { known_version: version, wait_ms: 60_000 };
        let poll = tokio::spawn(async move { watcher.get_routing(held).await });
        drop(fakes);
        stop.cancel();
        running.finished().await.unwrap();
        let _ = poll.await.unwrap();
    }
}

#[tokio::test]
async fn strangers_and_nonsense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let stop = CancellationToken::new();
    let running = serve(config(dir.path(), 1), stop.clone()).await.unwrap();

    let mut stranger = client_with(&running, &ClusterSecret::from_bytes([6; 32])).await;
    let status = stranger.get_routing(GetRoutingRequest::default()).await.unwrap_err();
    assert_eq!(from_status(&status).kind, ErrorKind::Unauthenticated);
    let channel = Channel::from_shared(format!("http://{}", running.addr)).unwrap().connect().await.unwrap();
    let status = ManagerClient::new(channel).open_session(OpenSessionRequest::default()).await.unwrap_err();
    assert_eq!(from_status(&status).kind, ErrorKind::Unauthenticated);

    let mut member = client(&running).await;
    let good = HeartbeatRequest {
        node_id: 3,
        role: NodeRole::Storage as i32,
        incarnation: 1,
        address: "127.0.0.1:1".into(),
        ..Default::default()
    };
    let kind = |result: Result<tonic::Response<HeartbeatReply>, tonic::Status>| {
        from_status(&result.unwrap_err()).kind
    };
    let bad = HeartbeatRequest { role: 9, ..good.clone() };
    assert_eq!(kind(member.heartbeat(bad).await), ErrorKind::InvalidArgument);
    let bad = HeartbeatRequest { address: "x".repeat(100_000), ..good.clone() };
    assert_eq!(kind(member.heartbeat(bad).await), ErrorKind::InvalidArgument);
    let bad = HeartbeatRequest { node_id: 77, ..good.clone() };
    assert_eq!(kind(member.heartbeat(bad).await), ErrorKind::NotFound);
    let foreign = TargetReport { target_id: 2, state: LocalState::Online as i32, ..Default::default() };
    let bad = HeartbeatRequest { targets: vec![foreign], ..good.clone() };
    assert_eq!(kind(member.heartbeat(bad).await), ErrorKind::InvalidArgument);
    member.heartbeat(good).await.unwrap();

    let no_session = RenewSessionRequest { client_id: 1, session_epoch: 1 };
    assert_eq!(from_status(&member.renew_session(no_session).await.unwrap_err()).kind, ErrorKind::Stale);
    let zero = RenewSessionRequest::default();
    assert_eq!(from_status(&member.renew_session(zero).await.unwrap_err()).kind, ErrorKind::InvalidArgument);
    let long = OpenSessionRequest { description: "x".repeat(5000), ..Default::default() };
    assert_eq!(from_status(&member.open_session(long).await.unwrap_err()).kind, ErrorKind::InvalidArgument);
    let opened = member.open_session(OpenSessionRequest::default()).await.unwrap().into_inner();
    let close = CloseSessionRequest { client_id: opened.client_id, session_epoch: opened.session_epoch };
    member.close_session(close).await.unwrap();

    // One manager per folder at a time.
    assert!(serve(config(dir.path(), 1), stop.clone()).await.is_err());
    stop.cancel();
    running.finished().await.unwrap();

    let refuse = async |config: MgmtdConfig, word: &str| {
        let error = serve(config, CancellationToken::new()).await.err().expect("started");
        assert!(error.to_string().contains(word), "{error}");
        error
    };
    let error = refuse(config(dir.path(), 2), "belongs to cluster").await;
    assert!(matches!(error, MgmtdError::Mismatch(_)));
    let mut other = config(dir.path(), 1);
    other.settings.storage_nodes.push(NodeId(6));
    refuse(other, "storage_nodes").await;
    let mut other = config(dir.path(), 1);
    other.settings.replication = Some(3);
    refuse(other, "replication").await;
    let mut other = config(dir.path(), 1);
    other.settings.timing.margin_ms = 1;
    refuse(other, "margin_ms").await;
}

#[tokio::test]
async fn a_single_node_makes_a_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let stop = CancellationToken::new();
    let mut config = config(dir.path(), 1);
    config.settings = MgmtdSettings { timing: timing(), ..MgmtdSettings::new(vec![NodeId(3)]) };
    let running = serve(config, stop.clone()).await.unwrap();
    let _n3 = FakeNode::start(client(&running).await, 3, 1, true);
    let table = wait_for(&mut client(&running).await, all_serve).await;
    assert_eq!((table.chains.len(), table.replication, table.min_write_replicas), (1, 1, 1));
    stop.cancel();
    running.finished().await.unwrap();
}
