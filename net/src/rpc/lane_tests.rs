//! What several connections to one server are for: small calls do not wait for bulk, bulk spreads,
//! and what one loses another carries.

use super::proxy::Proxy;
use super::tests::*;
use super::*;
use crate::buf::BufPool;
use firefly_types::ErrorKind;
use std::sync::atomic::Ordering;

const MIB: usize = 1 << 20;

fn small_pool(bytes: usize) -> ServerOptions {
    ServerOptions { pool: BufPool::new(bytes), ..Default::default() }
}

fn with_lanes(tcp_lanes: usize) -> Client {
    Client::with_options(identity(1), ClientOptions { tcp_lanes, ..Default::default() })
}

fn bulk(client: &Client, head: &[u8]) -> Call {
    let send = client.pool().try_alloc(MIB).map(BufMut::freeze);
    Call { send, recv: client.pool().try_alloc(MIB), ..call(ECHO, head) }
}

#[tokio::test]
async fn a_small_call_does_not_wait_for_bulk() {
    let server = start_at("127.0.0.1:0".parse().unwrap(), TestService::new(), small_pool(4 * MIB));
    let client = with_lanes(1);
    // The server has no memory for payloads: what carries bulk is stuck in the middle of one.
    let all = server.pool.try_alloc(4 * MIB).unwrap();
    let (other, peer) = (client.clone(), server.peer.clone());
    let stuck = tokio::spawn(async move { other.call(&peer, bulk(&other, b"bulk")).await });
    until("it is on its way", || client.stats().bytes_sent > 1000).await;
    for _ in 0..10 {
        client.call(&server.peer, call(ECHO, b"small")).await.unwrap();
    }
    // The control: another bulk call, on the same connection, does wait.
    let brief = Call { timeout: Duration::from_millis(50), ..bulk(&client, b"behind it") };
    assert_eq!(client.call(&server.peer, brief).await.unwrap_err().kind(), ErrorKind::Timeout);
    assert!(!stuck.is_finished());
    drop(all);
    assert_eq!(stuck.await.unwrap().unwrap().head, "bulk".as_bytes());
}

#[tokio::test]
async fn bulk_goes_where_least_is_in_flight() {
    let service = TestService::new();
    let server = start(service.clone());
    let client = with_lanes(3);
    let spread = |client: &Client| -> Vec<usize> {
        client.peers()[0].connections.iter().map(|c| c.calls_in_flight).collect()
    };
    let ask = |megabytes: usize| {
        let (client, peer) = (client.clone(), server.peer.clone());
        let recv = client.pool().try_alloc(megabytes * MIB);
        tokio::spawn(async move { client.call(&peer, Call { recv, ..call(GATED, b"") }).await })
    };
    let mut calls = Vec::new();
    // Lanes are made as all that there are get busy. The first carries one large call.
    for (lanes, megabytes) in [(1, 8), (2, 1), (2, 1), (3, 1)] {
        calls.push(ask(megabytes));
        service.entered.acquire().await.unwrap().forget();
        until("a lane more", || client.peers()[0].connections.len() == lanes).await;
    }
    let before = spread(&client);
    for _ in 0..6 {
        calls.push(ask(1));
        service.entered.acquire().await.unwrap().forget();
    }
    let after = spread(&client);
    // The one with eight megabytes in flight got nothing more; the others share.
    let mut more: Vec<usize> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
    more.sort_unstable();
    assert_eq!(more[0], 0, "{before:?} then {after:?}");
    assert_eq!(more.iter().sum::<usize>(), 6);
    assert!(more[1] >= 2, "{before:?} then {after:?}");
    service.gate().add_permits(calls.len());
    for one in calls {
        one.await.unwrap().unwrap();
    }
}

/// A lane dies with many calls queued: those that the server cannot have seen go another way, the
/// others end as "may have happened", and nothing happens twice.
#[tokio::test]
async fn calls_that_were_not_sent_survive_their_connection() {
    const CALLS: u32 = 96;
    let service = TestService::new();
    let server = start_at("127.0.0.1:0".parse().unwrap(), service.clone(), small_pool(4 * MIB));
    let proxy = Proxy::to(server.addr).await;
    let client = with_lanes(1);
    let all = server.pool.try_alloc(4 * MIB).unwrap();
    let calls: Vec<_> = (0..CALLS)
        .map(|n| {
            let (client, peer) = (client.clone(), proxy.peer.clone());
            tokio::spawn(async move {
                let head = n.to_le_bytes();
                let call = bulk(&client, &head);
                client.call(&peer, call).await.map(|got| assert_eq!(got.head, head.as_slice()))
            })
        })
        .collect();
    // All are in flight, and as much is sent as the sockets take.
    until("all are begun", || {
        client
            .peers()
            .first()
            .is_some_and(|p| p.connections.iter().map(|c| c.calls_in_flight).sum::<usize>() == CALLS as usize)
    })
    .await;
    let sent = || client.stats().bytes_sent;
    let mut before = 0;
    until("the path is full", || {
        let now = sent();
        let still = now == before && now > 0;
        before = now;
        still
    })
    .await;
    proxy.cut(0);
    drop(all);
    let (mut fine, mut lost) = (0, 0);
    for one in calls {
        match one.await.unwrap() {
            Ok(()) => fine += 1,
            Err(error) if error.kind() == ErrorKind::Disconnected => lost += 1,
            Err(error) => panic!("{error}"),
        }
    }
    println!("{fine} moved, {lost} may have happened");
    assert!(lost >= 1 && lost <= sent() as usize / MIB + 1, "{lost} lost");
    assert!(fine >= 32, "only {fine} moved to another connection");
    let seen = service.seen.lock().unwrap();
    assert!(seen.values().all(|times| *times == 1), "a call was carried out twice");
    assert!(seen.len() >= fine);
}

#[tokio::test]
async fn another_lane_stands_in_until_the_lost_one_is_back() {
    let service = TestService::new();
    let server = start(service.clone());
    let proxy = Proxy::to(server.addr).await;
    let client = with_lanes(1);
    client.call(&proxy.peer, call(ECHO, b"small")).await.unwrap();
    client.call(&proxy.peer, bulk(&client, b"bulk")).await.unwrap();
    assert_eq!(proxy.made(), 2);
    // The small lane dies under a call, and no new connection can be made.
    let (other, peer) = (client.clone(), proxy.peer.clone());
    let pending = tokio::spawn(async move { other.call(&peer, call(GATED, b"")).await });
    service.entered.acquire().await.unwrap().forget();
    proxy.refuse(true);
    proxy.cut(0);
    let error = pending.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error}");
    for _ in 0..20 {
        client.call(&proxy.peer, call(ECHO, b"stood in for")).await.unwrap();
    }
    assert_eq!(client.peers()[0].connections.len(), 1);
    // It comes back by itself, in passing, when it can.
    proxy.refuse(false);
    let back = async {
        while client.peers()[0].connections.len() < 2 {
            client.call(&proxy.peer, call(ECHO, b"meanwhile")).await.unwrap();
        }
    };
    tokio::time::timeout(LONG, back).await.expect("the lane comes back");
    let small = |client: &Client| client.peers()[0].connections[0].bytes_sent;
    let before = small(&client);
    client.call(&proxy.peer, call(ECHO, b"on its own lane again")).await.unwrap();
    assert!(small(&client) > before);
}

#[tokio::test]
async fn callers_that_wait_for_one_try_share_its_end() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = listener.local_addr().unwrap().to_string();
    let options = ClientOptions { handshake_time: Duration::from_millis(200), ..Default::default() };
    let client = Client::with_options(identity(1), options);
    // Says nothing, so each try takes the whole handshake time.
    let accepted = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = accepted.clone();
    let silent = tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            held.push(listener.accept().await.unwrap());
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let calls = (0..50).map(|_| client.call(&peer, call(ECHO, b"")));
    for result in futures::future::join_all(calls).await {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Unavailable);
    }
    assert!(accepted.load(Ordering::SeqCst) <= 2, "one try for those who came before it, one for the rest");
    silent.abort();
}

#[tokio::test]
async fn both_sides_tell_who_is_connected_how() {
    let service = TestService::new();
    let server = start(service.clone());
    let fabric = crate::fabric::Fabric::tcp();
    let client = Client::with_options(identity(1), ClientOptions { fabric, ..Default::default() });
    client.call(&server.peer, call(ECHO, b"small")).await.unwrap();
    client.call(&server.peer, bulk(&client, b"bulk")).await.unwrap();
    let (other, peer) = (client.clone(), server.peer.clone());
    let recv = client.pool().try_alloc(MIB);
    let pending = tokio::spawn(async move { other.call(&peer, Call { recv, ..call(GATED, b"") }).await });
    service.entered.acquire().await.unwrap().forget();

    let info = client.info(&server.peer, LONG).await.unwrap();
    assert_eq!(info.name, "tester");
    assert_eq!(info.connections.len(), 2);
    let loads: Vec<usize> = info.connections.iter().map(|c| c.calls_in_flight).collect();
    assert_eq!(loads.iter().sum::<usize>(), 1, "{loads:?}");
    for connection in &info.connections {
        assert_eq!((connection.name.as_str(), connection.transport.as_str()), ("tester", "tcp"));
        assert!(connection.address.starts_with("127.0.0.1:") && connection.device.is_none());
        assert!(connection.bytes_received > 0);
    }
    assert_eq!(info.calls, 4);

    let ours = client.peers();
    assert_eq!((ours.len(), ours[0].address.as_str()), (1, server.peer.as_str()));
    assert_eq!(ours[0].why_not_rdma.as_deref(), Some("TCP was asked for"));
    assert_eq!(client.fabric_report().why_not, ours[0].why_not_rdma);
    let bytes = |list: &[ConnectionInfo]| list.iter().map(|c| c.bytes_sent.max(c.bytes_received)).max();
    assert!(bytes(&ours[0].connections) >= Some(MIB as u64));
    service.gate().add_permits(1);
    pending.await.unwrap().unwrap();
    // An ended connection is no longer told of.
    drop(client);
    let asker = Client::new(identity(1));
    let gone = async { while asker.info(&server.peer, LONG).await.unwrap().connections.len() > 1 {} };
    tokio::time::timeout(LONG, gone).await.expect("only the asker is left");
}
