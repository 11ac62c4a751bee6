//! The server as a whole: a manager that tells chains and hears heartbeats, calls over TCP, the
//! real store, a restart.

mod common;

use common::{Client as Who, ROOT, Target};
use firefly_net::{Call, CallError, Client, Identity};
use firefly_proto::auth::CheckToken;
use firefly_proto::meta::*;
use firefly_proto::methods::meta as method;
use firefly_proto::mgmtd::manager_server::{Manager, ManagerServer};
use firefly_proto::mgmtd::*;
use firefly_types::{ClusterId, ClusterSecret, DataId, ErrorKind, Generation, NodeId, WireError};
use fs3_meta::garbage::ChunkRemover;
use fs3_meta::schema::FileLayout;
use fs3_meta::{MetaConfig, MetaError, MetaSettings, serve_with};
use futures::future::BoxFuture;
use prost::Message;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

/// Hears heartbeats and names chains.
#[derive(Clone, Default)]
struct FakeManager {
    heard: Arc<Mutex<Vec<HeartbeatRequest>>>,
    news: Arc<Notify>,
}

#[tonic::async_trait]
impl Manager for FakeManager {
    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatReply>, Status> {
        self.heard.lock().unwrap().push(request.into_inner());
        self.news.notify_waiters();
        Ok(Response::new(HeartbeatReply {
            routing_version: 3,
            lease_ms: 100,
            interval_ms: 10,
            ..Default::default()
        }))
    }

    async fn get_routing(
        &self,
        request: Request<GetRoutingRequest>,
    ) -> Result<Response<RoutingTable>, Status> {
        if request.into_inner().known_version == 3 {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(RoutingTable {
            version: 3,
            chunk_bytes: 1 << 20,
            stripe_chains: vec![5, 6],
            ..Default::default()
        }))
    }

    async fn open_session(
        &self,
        _: Request<OpenSessionRequest>,
    ) -> Result<Response<OpenSessionReply>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn renew_session(
        &self,
        _: Request<RenewSessionRequest>,
    ) -> Result<Response<RenewSessionReply>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn close_session(
        &self,
        _: Request<CloseSessionRequest>,
    ) -> Result<Response<CloseSessionReply>, Status> {
        Err(Status::unimplemented("not needed here"))
    }
}

#[derive(Default)]
struct Removed {
    data: Mutex<Vec<u64>>,
    news: Notify,
}

impl ChunkRemover for Removed {
    fn remove<'a>(
        &'a self,
        data: DataId,
        _: Generation,
        _: &'a FileLayout,
    ) -> BoxFuture<'a, Result<u64, String>> {
        self.data.lock().unwrap().push(data.0);
        self.news.notify_one();
        Box::pin(async { Ok(1) })
    }
}

fn identity(name: &str) -> Identity {
    Identity { cluster: ClusterId(7), secret: ClusterSecret::from_bytes([7; 32]), name: name.into() }
}

async fn start_manager(stop: CancellationToken) -> (FakeManager, String) {
    let manager = FakeManager::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let service = ManagerServer::with_interceptor(manager.clone(), CheckToken::new(&identity("").secret));
    tokio::spawn(async move {
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.cancelled_owned())
            .await
    });
    (manager, address)
}

fn config(dir: &Path, manager: &str) -> MetaConfig {
    MetaConfig {
        node_id: NodeId(2),
        listen: "127.0.0.1:0".parse().unwrap(),
        manager: manager.to_owned(),
        data_dir: dir.to_owned(),
        identity: identity("meta n2"),
        settings: MetaSettings { garbage_delay_s: 0, root_mode: 0o777, ..Default::default() },
    }
}

/// A meta server over TCP.
#[derive(Clone)]
struct Remote {
    net: Client,
    address: String,
}

impl Target for Remote {
    async fn handle(&self, number: u16, head: &[u8]) -> Result<Vec<u8>, MetaError> {
        loop {
            let call = Call {
                method: number,
                head: head.to_vec().into(),
                send: None,
                recv: None,
                timeout: Duration::from_secs(10),
            };
            match self.net.call(&self.address, call).await {
                Ok(response) => return Ok(response.head.to_vec()),
                // Until the routing table has come, no file can be placed.
                Err(CallError::Remote(error)) if error.kind == ErrorKind::Unavailable => {
                    tokio::task::yield_now().await;
                }
                Err(CallError::Remote(error)) => return Err(MetaError::Recorded(error)),
                Err(error) => {
                    return Err(MetaError::Recorded(WireError::new(error.kind(), error.to_string())));
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_meta_server_serves_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let manager_stop = CancellationToken::new();
    let (manager, manager_address) = start_manager(manager_stop.clone()).await;
    let removed = Arc::new(Removed::default());

    let stop = CancellationToken::new();
    let running =
        serve_with(config(dir.path(), &manager_address), removed.clone(), stop.clone()).await.unwrap();
    let meta = Remote { net: Client::new(identity("a test")), address: running.addr.to_string() };

    // The manager knows where the server is.
    loop {
        let news = manager.news.notified();
        if manager.heard.lock().unwrap().len() > 2 {
            break;
        }
        news.await;
    }
    let first = manager.heard.lock().unwrap()[0].clone();
    assert_eq!((first.node_id, first.role(), &first.address), (2, NodeRole::Meta, &meta.address));

    // Many in flight, from several clients.
    let tasks: Vec<_> = (1..=8)
        .map(|n| {
            let meta = meta.clone();
            tokio::spawn(async move {
                let mut client = Who::new(n, 1, 1000);
                let dir = client.mkdir(&meta, ROOT, format!("dir {n}").as_bytes()).await.unwrap();
                for i in 0..20 {
                    let made = client.create(&meta, dir, format!("{i}").as_bytes()).await.unwrap();
                    let layout = made.inode.unwrap().layout.unwrap();
                    assert_eq!((layout.chunk_bytes, layout.chains.len()), (1 << 20, 2));
                }
                dir
            })
        })
        .collect();
    let mut dirs = Vec::new();
    for task in tasks {
        dirs.push(task.await.unwrap());
    }

    // The garbage worker runs on its own.
    let mut client = Who::new(1, 1, 1000);
    client.caller.sequence = 100;
    let victim = client.lookup(&meta, dirs[0], b"7").await.unwrap();
    client.unlink(&meta, dirs[0], b"7", false).await.unwrap();
    removed.news.notified().await;
    assert_eq!(*removed.data.lock().unwrap(), [victim.data_id]);

    // Errors keep their kind and their words on the wire; payloads are refused.
    let refused = client.lookup(&meta, dirs[0], b"7").await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound);
    assert!(refused.to_string().contains("\"7\""), "{refused}");
    let mut payload = meta.net.pool().alloc(16).await;
    payload.set_len(16);
    let call = Call {
        method: method::STAT_FS,
        head: StatFsRequest { caller: client.same() }.encode_to_vec().into(),
        send: Some(payload.freeze()),
        recv: None,
        timeout: Duration::from_secs(10),
    };
    assert!(meta.net.call(&meta.address, call).await.is_err());

    // It stops, comes back elsewhere, and has everything.
    let last =
        UnlinkRequest { caller: client.next(), parent: dirs[0], name: b"8".to_vec(), directory: false };
    let reply = meta.handle(method::UNLINK, &last.encode_to_vec()).await.unwrap();
    stop.cancel();
    running.stopped().await;
    let stop = CancellationToken::new();
    let running =
        serve_with(config(dir.path(), &manager_address), removed.clone(), stop.clone()).await.unwrap();
    let meta = Remote { address: running.addr.to_string(), ..meta };
    assert_eq!(meta.handle(method::UNLINK, &last.encode_to_vec()).await, Ok(reply));
    assert_eq!(client.names(&meta, dirs[0], 0).await.unwrap().len(), 18);
    assert_eq!(client.statfs(&meta).await.inodes, 1 + 8 + 160 - 2);
    loop {
        let news = manager.news.notified();
        let heard = manager.heard.lock().unwrap().last().unwrap().clone();
        if heard.address == meta.address {
            assert_ne!(heard.incarnation, first.incarnation, "a new start has a new incarnation");
            break;
        }
        news.await;
    }
    stop.cancel();
    running.stopped().await;
    manager_stop.cancel();
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let stop = CancellationToken::new();
    let removed = Arc::new(Removed::default());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap();
    let wrong = MetaConfig { listen, ..config(dir.path(), "127.0.0.1:1") };
    let error = serve_with(wrong, removed.clone(), stop.clone()).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains(&listen.to_string()), "{error}");
    let file = dir.path().join("file");
    std::fs::write(&file, b"").unwrap();
    assert!(serve_with(config(&file, "127.0.0.1:1"), removed.clone(), stop.clone()).await.is_err());
    let error = serve_with(config(dir.path(), "not an address"), removed, stop).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}
