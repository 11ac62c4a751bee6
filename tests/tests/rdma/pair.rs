//! Two machines on one wire: `machine_two_serves` runs in the second, the others in the first.

use crate::fs3::{TARGET_CAPACITY, check, content, write};
use crate::wire::{PACKET_BYTES, Wire};
use bytes::Bytes;
use firefly_cli::local::Shape;
use firefly_net::{BufMut, Call, CallError, Client, Identity, Reply, Request, Response, Server, Service};
use firefly_tests::{Cluster, eventually};
use firefly_types::{ClusterId, ClusterSecret, ErrorKind, WireError};
use futures::future::BoxFuture;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

const ECHO: u16 = 1;
const PAYLOAD: usize = 1 << 20;
/// Far above any detection of a dead peer: a call that ends because of it was not noticed.
const CALL_TIMEOUT: Duration = Duration::from_secs(100);

fn identity(name: &str) -> Identity {
    Identity { cluster: ClusterId(7), secret: ClusterSecret::from_bytes([9; 32]), name: name.to_owned() }
}

/// Answers with what it was given.
struct Echo;

impl Service for Echo {
    fn payload_limit(&self, _: u16) -> usize {
        PAYLOAD
    }

    fn handle<'a>(&'a self, request: Request) -> BoxFuture<'a, Result<Reply, WireError>> {
        Box::pin(async move { Ok(Reply { head: request.head, data: request.payload.map(BufMut::freeze) }) })
    }
}

/// Where the scenario's script says that the server is, or shall be.
fn server() -> SocketAddr {
    std::env::var("SERVER").expect("SERVER is an address").parse().unwrap()
}

/// A file through which the machines and the driver meet.
fn sync(name: &str) -> PathBuf {
    PathBuf::from(std::env::var("SHARE").expect("SHARE is the shared folder")).join("sync").join(name)
}

fn client() -> (Client, String) {
    (Client::new(identity("machine one")), server().to_string())
}

async fn echo(client: &Client, peer: &str, byte: u8) -> Result<Response, CallError> {
    let mut send = client.pool().alloc(PAYLOAD).await;
    send.fill(byte);
    let recv = client.pool().alloc(PAYLOAD).await;
    let head = Bytes::from_static(b"head");
    let call =
        Call { method: ECHO, head, send: Some(send.freeze()), recv: Some(recv), timeout: CALL_TIMEOUT };
    let got = client.call(peer, call).await?;
    assert!(got.head == b"head"[..] && got.data.as_ref().unwrap().iter().all(|b| *b == byte));
    Ok(got)
}

/// Calls until the other machine's server has started.
async fn first_call(client: &Client, peer: &str) {
    let started = Instant::now();
    loop {
        match echo(client, peer, 0).await {
            Ok(_) => return,
            Err(CallError::Unreachable { source, .. }) if started.elapsed() < firefly_tests::HANG => {
                println!("not yet: {source}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
#[ignore = "the second of two machines: tests/rdma-vm/run.sh pair"]
fn machine_two_serves() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let stop = CancellationToken::new();
    let served = Server::bind(server(), identity("machine two"), Arc::new(Echo)).unwrap();
    let stats = served.stats();
    let running = runtime.spawn(served.run(stop.clone()));
    let until = sync(&std::env::var("UNTIL").expect("UNTIL names a file"));
    eventually("the first machine is done", || until.exists());
    stop.cancel();
    runtime.block_on(running).unwrap();
    assert!(stats.get().calls > 0, "somebody called");
}

#[tokio::test]
#[ignore = "the first of two machines: tests/rdma-vm/run.sh pair"]
async fn two_machines_agree_on_rdma() {
    let (client, peer) = client();
    first_call(&client, &peer).await;
    assert_eq!(client.transport(&peer), Some("rdma"));
    let before = Wire::now();
    for byte in 1..9 {
        echo(&client, &peer, byte).await.unwrap();
    }
    // The request's payload is read by the other machine, which takes packets of ours; the reply's
    // is written into our memory.
    let after = Wire::now();
    after.sent_by_rdma(before, "requests", 8 * PAYLOAD as u64);
    assert!((after.rdma_received - before.rdma_received) * PACKET_BYTES >= 8 * PAYLOAD as u64);
}

#[tokio::test]
#[ignore = "the first of two machines: tests/rdma-vm/run.sh pair"]
async fn a_machine_without_a_device_is_reached_by_tcp() {
    let (client, peer) = client();
    first_call(&client, &peer).await;
    let before = Wire::now();
    for byte in 1..9 {
        echo(&client, &peer, byte).await.unwrap();
    }
    assert_eq!(client.transport(&peer), Some("tcp"));
    assert_eq!(Wire::now().rdma_packets, before.rdma_packets);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the first of two machines: tests/rdma-vm/run.sh pair-death"]
async fn calls_to_a_machine_that_dies_end_with_an_error_and_those_to_others_go_on() {
    let (client, peer) = client();
    first_call(&client, &peer).await;
    assert_eq!(client.transport(&peer), Some("rdma"));
    let other = Server::bind("10.1.0.1:0".parse().unwrap(), identity("other"), Arc::new(Echo)).unwrap();
    let other_peer = other.local_addr().to_string();
    let stop = CancellationToken::new();
    let running = tokio::spawn(other.run(stop.clone()));

    let done = Arc::new(AtomicU64::new(0));
    let callers: Vec<_> = (0..4)
        .map(|byte| {
            let (client, peer, done) = (client.clone(), peer.clone(), done.clone());
            tokio::spawn(async move {
                loop {
                    match echo(&client, &peer, byte).await {
                        Ok(_) => done.fetch_add(1, Ordering::Relaxed),
                        Err(error) => return error,
                    };
                }
            })
        })
        .collect();
    let waiting = done.clone();
    tokio::task::spawn_blocking(move || eventually("calls move", || waiting.load(Ordering::Relaxed) > 8))
        .await
        .unwrap();
    std::fs::write(sync("kill-2"), "").unwrap();
    let killed = sync("killed-2");
    tokio::task::spawn_blocking(move || eventually("the machine is gone", || killed.exists())).await.unwrap();
    let gone = Instant::now();
    for caller in callers {
        let error = caller.await.unwrap();
        println!("after {:?}: {error}", gone.elapsed());
        // A timeout would mean that nobody noticed.
        assert!(matches!(error.kind(), ErrorKind::Disconnected | ErrorKind::Unavailable), "{error}");
    }
    // The first call after it says so too, and others are not held up.
    let error = echo(&client, &peer, 1).await.expect_err("nobody is there");
    println!("after {:?}: {error}", gone.elapsed());
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    echo(&client, &other_peer, 5).await.unwrap();
    stop.cancel();
    running.await.unwrap();
}

/// A chain's two copies are on two machines; one loses its power in mid-write.
#[test]
#[ignore = "the first of two machines: tests/rdma-vm/run.sh pair-fs3"]
fn files_outlive_the_machine_that_holds_their_other_copies() {
    let seed = 0x2fdb;
    println!("seed {seed:#x}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let shape = Shape { port_base: 0, storage_servers: 2, replication: 2, agents: 0 };
    let mut cluster = Cluster::laid_out(&shape);
    let here = IpAddr::from([10, 1, 0, 1]);
    let mut manager = None;
    for role in cluster.local.roles().unwrap() {
        cluster.configure(&role, |config| {
            // gRPC crosses the wire too: the other machine's server asks the manager.
            if let Some(section) = &mut config.manager {
                section.listen.set_ip(here);
                manager = Some(section.listen.to_string());
            }
            let manager = || manager.clone().expect("the manager comes first");
            if let Some(section) = &mut config.meta {
                section.listen.set_ip(here);
                section.manager = manager();
            }
            if let Some(section) = &mut config.storage {
                section.capacity = Some(TARGET_CAPACITY);
                section.listen.set_ip(here);
                section.manager = manager();
                if section.node_id == 4 {
                    section.listen.set_ip(IpAddr::from([10, 1, 0, 2]));
                    section.data_dir = "/run/work/storage-4".into();
                    config.secret_file = sync("secret");
                }
            }
        });
    }
    cluster.configure_commands(|description| {
        description.manager = manager.clone().unwrap();
    });
    // The other machine's script starts what it finds.
    let state = cluster.local.state();
    std::fs::copy(state.join("secret"), sync("secret")).unwrap();
    let moved = state.join("conf/storage-4.toml");
    std::fs::copy(&moved, sync("storage-4.toml.new")).unwrap();
    std::fs::rename(sync("storage-4.toml.new"), sync("storage-4.toml")).unwrap();
    std::fs::remove_file(moved).unwrap();
    cluster.up();
    eventually("the other machine serves", || sync("ready").exists());

    let mount = cluster.mount();
    let mut files = BTreeMap::new();
    let before = Wire::now();
    for i in 0..6 {
        let (name, bytes) = (format!("f{i}"), content(&mut rng, 500_000));
        write(&mount.join(&name), &bytes);
        files.insert(name, bytes);
    }
    let total: u64 = files.values().map(|f| f.len() as u64).sum();
    // Each byte goes to the chain's head and from there to the other copy. This machine's device
    // sees either way: sent, received, or both if it stays on this machine.
    let after = Wire::now();
    let packets = after.rdma_packets - before.rdma_packets + after.rdma_received - before.rdma_received;
    println!("{total} bytes in two copies; {packets} packets of at most {PACKET_BYTES}");
    assert!(packets * PACKET_BYTES >= 2 * total);

    let piece = content(&mut rng, 400_000);
    let pieces = 16;
    let mut file = File::create(mount.join("long")).unwrap();
    for i in 0..pieces {
        if i == 4 {
            // The driver needs a moment, in which writing goes on.
            std::fs::write(sync("kill-2"), "").unwrap();
        }
        if i == pieces - 1 {
            eventually("the other machine is gone", || sync("killed-2").exists());
        }
        file.write_all(&piece).unwrap();
        file.sync_all().expect("writing goes on with the copy that is left");
    }
    files.insert("long".to_owned(), piece.repeat(pieces));
    let cold = cluster.mount();
    for (name, bytes) in &files {
        check(&cold.join(name), bytes);
    }
    assert!(!cluster.is_whole());
}
