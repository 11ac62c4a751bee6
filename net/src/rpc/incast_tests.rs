//! Replies come as the client's budget allows: seen from servers that speak the protocol by hand,
//! and end to end.

use super::frame::{FrameKind, HEADER_BYTES, Header};
use super::hostile_tests::{header, member, serve_raw, serve_raw_in};
use super::tests::*;
use super::*;
use crate::buf::BufPool;
use firefly_types::ErrorKind;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};

const MIB: usize = 1 << 20;

fn client_with(reply_bytes: usize, tcp_lanes: usize) -> Client {
    Client::with_options(identity(1), ClientOptions { reply_bytes, tcp_lanes, ..Default::default() })
}

async fn next(stream: &mut TcpStream) -> Header {
    let mut bytes = [0; HEADER_BYTES];
    stream.read_exact(&mut bytes).await.unwrap();
    Header::decode(&bytes).unwrap()
}

async fn reply(stream: &mut TcpStream, call: u64, len: usize) {
    stream.write_all(&header(FrameKind::Reply, call, len as u32).encode()).await.unwrap();
    stream.write_all(&vec![7; len]).await.unwrap();
}

async fn ready(stream: &mut TcpStream, call: u64) {
    let header = Header { aux: MIB as u32, ..header(FrameKind::Ready, call, 0) };
    stream.write_all(&header.encode()).await.unwrap();
}

/// One server by hand that counts what it may send and never sends more: two calls come unasked,
/// two more are granted once their replies are there, and each that lands lets one more come.
#[tokio::test]
async fn what_may_come_at_a_time_is_bounded_and_in_order() {
    const CALLS: usize = 8;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = listener.local_addr().unwrap().to_string();
    let client = client_with(4 * MIB, 1);
    let calls: Vec<_> = (0..CALLS)
        .map(|_| {
            let (client, peer) = (client.clone(), peer.clone());
            tokio::spawn(async move {
                let recv = client.pool().try_alloc(MIB);
                client.call(&peer, Call { recv, ..call(ECHO, b"") }).await.unwrap().data.unwrap()
            })
        })
        .collect();
    let mut stream = serve_raw(&listener).await;
    let (mut free, mut asking) = (Vec::new(), Vec::new());
    for _ in 0..CALLS {
        let request = next(&mut stream).await;
        if request.ask { asking.push(request.call) } else { free.push(request.call) }
    }
    assert_eq!((free.len(), asking.len()), (2, 6), "half of the budget is taken at once");
    // The replies get ready in another order than they were asked for.
    asking.reverse();
    for call in &asking {
        ready(&mut stream, *call).await;
    }
    let (mut may, mut in_order) = (free, asking.into_iter());
    for left in (1..=CALLS).rev() {
        // What may come is sent as late as possible: before anything lands, all that fits is granted.
        while may.len() < left.min(4) {
            let grant = next(&mut stream).await;
            assert_eq!((grant.kind, grant.aux), (FrameKind::Grant, 1));
            assert_eq!(Some(grant.call), in_order.next(), "first ready, first granted");
            may.push(grant.call);
        }
        until("as much is on its way", || client.incast().now().0 == left.min(4) * MIB).await;
        let mut byte = [0];
        assert!(futures::poll!(Box::pin(stream.read(&mut byte))).is_pending(), "a grant beyond the budget");
        reply(&mut stream, may.remove(0), MIB).await;
    }
    for one in calls {
        assert!(one.await.unwrap().iter().all(|b| *b == 7));
    }
    assert_eq!(client.incast().high(), 4 * MIB);
    assert_eq!(client.incast().now(), (0, 0));
}

/// Callers that give up while their replies are in line, or not there yet, stop nobody.
#[tokio::test]
async fn abandoned_calls_give_their_place_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = listener.local_addr().unwrap().to_string();
    let client = client_with(2 * MIB, 1);
    let ask = |head: &'static [u8]| {
        let (client, peer) = (client.clone(), peer.clone());
        let recv = client.pool().try_alloc(MIB);
        tokio::spawn(async move { client.call(&peer, Call { recv, ..call(ECHO, head) }).await })
    };
    let first = ask(b"");
    let mut stream = serve_raw(&listener).await;
    let free = next(&mut stream).await;
    assert!(!free.ask);
    // The second takes the other half when it is ready, the third is in line behind it, the fourth
    // is not ready yet.
    let mut rest = Vec::new();
    for _ in 0..3 {
        rest.push((ask(b""), next(&mut stream).await));
    }
    assert!(rest.iter().all(|(_, request)| request.ask));
    ready(&mut stream, rest[0].1.call).await;
    let grant = next(&mut stream).await;
    assert_eq!((grant.kind, grant.call, grant.aux), (FrameKind::Grant, rest[0].1.call, 1));
    ready(&mut stream, rest[1].1.call).await;
    until("it is in line", || client.incast().now().1 == 1).await;
    // All of them give up, the one that holds tokens last.
    rest.rotate_left(1);
    for (task, _) in &mut rest {
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
    }
    rest.rotate_right(1);
    let dropped = next(&mut stream).await;
    assert_eq!((dropped.kind, dropped.call, dropped.aux), (FrameKind::Grant, rest[1].1.call, 0));
    ready(&mut stream, rest[2].1.call).await;
    let dropped = next(&mut stream).await;
    assert_eq!((dropped.call, dropped.aux), (rest[2].1.call, 0), "dropped when it gets ready");
    until("only the first holds tokens", || client.incast().now() == (MIB, 0)).await;
    // Their memory is still the connection's, until the server says that it has let go.
    assert_eq!(client.quarantined_bytes(), 3 * MIB);
    reply(&mut stream, rest[0].1.call, MIB).await;
    for (_, request) in &rest[1..] {
        let kind = u32::from(ErrorKind::Timeout.code());
        stream
            .write_all(&Header { aux: kind, ..header(FrameKind::Error, request.call, 0) }.encode())
            .await
            .unwrap();
    }
    until("nothing is quarantined", || client.quarantined_bytes() == 0).await;
    reply(&mut stream, free.call, MIB).await;
    first.await.unwrap().unwrap();
    assert_eq!(client.incast().now(), (0, 0));
    // And the end of a connection gives back what its calls held or waited for.
    let held = [ask(b""), ask(b""), ask(b"")];
    for _ in 0..3 {
        let request = next(&mut stream).await;
        if request.ask {
            ready(&mut stream, request.call).await;
        }
    }
    until("one is in line", || client.incast().now() == (2 * MIB, 1)).await;
    drop(stream);
    for one in held {
        assert_eq!(one.await.unwrap().unwrap_err().kind(), ErrorKind::Disconnected);
    }
    assert_eq!(client.incast().now(), (0, 0));
}

/// Eight servers, forty-eight megabytes asked for at one time, a budget of four; some callers give
/// up on the way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_servers_and_a_small_budget() {
    let client = client_with(4 * MIB, 2);
    let servers: Vec<Running> = (0..8).map(|_| start(TestService::new())).collect();
    let mut calls = Vec::new();
    for n in 0..48u8 {
        let (client, peer) = (client.clone(), servers[usize::from(n) % 8].peer.clone());
        calls.push(tokio::spawn(async move {
            let recv = client.pool().alloc(MIB).await;
            let timeout = if n % 5 == 4 { Duration::from_micros(500) } else { LONG };
            let got = client.call(&peer, Call { recv: Some(recv), timeout, ..call(2, &[n]) }).await;
            match got {
                Ok(got) => assert!(got.data.unwrap().iter().all(|b| *b == n)),
                Err(error) => assert!(timeout < LONG && error.kind() == ErrorKind::Timeout, "{error}"),
            }
        }));
    }
    for one in calls {
        one.await.unwrap();
    }
    let high = client.incast().high();
    assert!(high > 2 * MIB && high <= 4 * MIB, "{high} bytes on their way");
    until("all tokens are back", || client.incast().now() == (0, 0)).await;
    until("all memory comes back", || client.pool().in_use() == 0).await;
}

/// A server of the release before knows no grants and is not asked to ask.
#[tokio::test]
async fn an_older_server_is_spoken_to_as_before() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = listener.local_addr().unwrap().to_string();
    let client = client_with(MIB, 1);
    let ask = || {
        let (client, peer) = (client.clone(), peer.clone());
        let recv = client.pool().try_alloc(MIB);
        tokio::spawn(async move { client.call(&peer, Call { recv, ..call(ECHO, b"") }).await })
    };
    let calls = [ask(), ask(), ask()];
    let mut stream = serve_raw_in(&listener, (1, 1)).await;
    for call in calls {
        let request = next(&mut stream).await;
        assert!(!request.ask);
        reply(&mut stream, request.call, MIB).await;
        call.await.unwrap().unwrap();
    }
    // One that asks all the same breaks its protocol.
    let call = ask();
    let request = next(&mut stream).await;
    ready(&mut stream, request.call).await;
    let error = call.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("knows no grants"), "{error}");
}

/// Requests with payload wait for the server's memory, which replies hold that wait for grants,
/// which are behind the requests: such replies go ungranted.
#[tokio::test]
async fn a_server_that_waits_for_memory_does_not_wait_for_grants() {
    let options = ServerOptions { pool: BufPool::new(2 * MIB), grant_time: LONG, ..Default::default() };
    let server = start_at("127.0.0.1:0".parse().unwrap(), TestService::new(), options);
    let client = client_with(2 * MIB, 1);
    let calls = (0..16u8).map(|n| {
        let mut send = client.pool().try_alloc(MIB).unwrap();
        send.fill(n);
        let recv = client.pool().try_alloc(MIB);
        client.call(&server.peer, Call { send: Some(send.freeze()), recv, ..call(ECHO, &[n]) })
    });
    for (n, got) in futures::future::join_all(calls).await.into_iter().enumerate() {
        assert!(got.unwrap().data.unwrap().iter().all(|b| usize::from(*b) == n));
    }
    assert_eq!(client.incast().now(), (0, 0));
}

/// Asks for forty replies of a megabyte by hand, more than may wait at a time.
async fn ask_forty(options: ServerOptions) -> (Arc<TestService>, Running, TcpStream) {
    let service = TestService::new();
    let server = start_at("127.0.0.1:0".parse().unwrap(), service.clone(), options);
    let mut stream = member(&server).await;
    for call in 0..40 {
        let ask = Header { method: 2, aux: MIB as u32, ask: true, ..header(FrameKind::Request, call, 0) };
        stream.write_all(&ask.encode()).await.unwrap();
    }
    (service, server, stream)
}

#[tokio::test]
async fn a_client_that_is_slow_to_grant_holds_bounded_memory_and_stops_nobody() {
    let options = ServerOptions { grant_time: LONG, ..Default::default() };
    let (service, server, mut stream) = ask_forty(options).await;
    let mut waiting = Vec::new();
    for _ in 0..32 {
        let header = next(&mut stream).await;
        assert_eq!((header.kind, header.aux), (FrameKind::Ready, MIB as u32));
        waiting.push(header.call);
    }
    // The others wait without memory, and what is small on the same connection does not wait at all.
    let echo = Header { method: ECHO, ..header(FrameKind::Request, 99, 0) };
    stream.write_all(&echo.encode()).await.unwrap();
    assert_eq!(next(&mut stream).await.call, 99);
    assert_eq!(service.pool.in_use(), 32 * MIB);
    let other = client_with(64 * MIB, 1);
    let recv = other.pool().try_alloc(MIB);
    let got = other.call(&server.peer, Call { recv, ..call(2, &[9]) }).await;
    assert!(got.unwrap().data.unwrap().iter().all(|b| *b == 9));
    // One is granted, one dropped; each lets one more be made.
    let (kept, dropped) = (waiting[5], waiting[7]);
    stream.write_all(&Header { aux: 1, ..header(FrameKind::Grant, kept, 0) }.encode()).await.unwrap();
    let mut got = [next(&mut stream).await, Header { ..header(FrameKind::Grant, 0, 0) }];
    let mut payload = vec![1; MIB];
    if got[0].kind == FrameKind::Reply {
        stream.read_exact(&mut payload).await.unwrap();
    }
    got[1] = next(&mut stream).await;
    if got[1].kind == FrameKind::Reply {
        stream.read_exact(&mut payload).await.unwrap();
    }
    got.sort_by_key(|h| h.kind as u8);
    assert_eq!((got[0].kind, got[0].call), (FrameKind::Reply, kept));
    assert!(got[1].kind == FrameKind::Ready && payload.iter().all(|b| *b == 0));
    stream.write_all(&header(FrameKind::Grant, dropped, 0).encode()).await.unwrap();
    // Grants for what is not there, or not any more, do no harm.
    stream.write_all(&Header { aux: 1, ..header(FrameKind::Grant, kept, 0) }.encode()).await.unwrap();
    stream.write_all(&Header { aux: 1, ..header(FrameKind::Grant, 12345, 0) }.encode()).await.unwrap();
    let error = loop {
        let header = next(&mut stream).await;
        if header.kind != FrameKind::Ready {
            break header;
        }
    };
    assert_eq!((error.kind, error.call), (FrameKind::Error, dropped));
    drop(stream);
    until("the end of the connection frees the rest", || service.pool.in_use() == 0).await;
}

#[tokio::test]
async fn a_grant_that_never_comes_ends_the_wait() {
    let options = ServerOptions { grant_time: Duration::from_millis(50), ..Default::default() };
    let (service, _server, mut stream) = ask_forty(options).await;
    let mut errors = 0;
    while errors < 40 {
        let header = next(&mut stream).await;
        if header.kind == FrameKind::Error {
            let mut message = vec![0; header.head_len as usize];
            stream.read_exact(&mut message).await.unwrap();
            let message = String::from_utf8(message).unwrap();
            assert!(message.contains("no grant in 50ms"), "{message}");
            assert_eq!(header.aux, u32::from(ErrorKind::Timeout.code()));
            errors += 1;
        } else {
            assert_eq!(header.kind, FrameKind::Ready);
        }
    }
    until("all memory comes back", || service.pool.in_use() == 0).await;
}
