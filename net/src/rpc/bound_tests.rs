//! Memory and copies stay within their bounds, whatever peers do, and sockets are marked as asked.

use super::frame::{FrameKind, HEADER_BYTES, Header};
use super::hostile_tests::{header, member, serve_raw, try_serve_raw};
use super::tests::*;
use super::*;
use crate::buf::BufPool;
use crate::fabric::{Class, Fabric, NetOptions, Traffic, Transport};
use crate::link::tcp::PREFETCH;
use firefly_types::ErrorKind;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use tokio::net::TcpListener;

const MIB: usize = 1 << 20;
/// All heads of a server together, and those of one connection.
const ALL_HEADS: usize = 64 * MIB;
const ONE_HEADS: usize = 8 * MIB;

fn local() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// Twenty members flood a server whose handlers wait, each with the longest heads and large payloads,
/// beside strangers that say nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_the_longest_heads_and_payloads_stays_within_the_limits() {
    let service = TestService::new();
    let options = ServerOptions { pool: BufPool::new(16 * MIB), stall_time: LONG, ..Default::default() };
    let server = start_at(local(), service.clone(), options);
    let mut half_open = Vec::new();
    for _ in 0..50 {
        half_open.push(tokio::net::TcpStream::connect(server.addr).await.unwrap());
    }
    let mut floods = Vec::new();
    for n in 0..20u64 {
        let mut stream = member(&server).await;
        floods.push(tokio::spawn(async move {
            // Half of them heads for a method that waits, half payloads of which one half stays out.
            let (method, head_len, payload_len) =
                if n % 2 == 0 { (GATED, MAX_HEAD, 0) } else { (ECHO, 100, 8 * MIB) };
            let frame = Header {
                method,
                head_len: head_len as u32,
                payload_len: payload_len as u32,
                ..header(FrameKind::Request, 0, 0)
            };
            let body = vec![0; head_len + payload_len / 2];
            for call in 0..100 {
                stream.write_all(&Header { call, ..frame }.encode()).await.unwrap();
                stream.write_all(&body).await.unwrap();
                if payload_len > 0 {
                    break;
                }
            }
            std::future::pending::<()>().await;
        }));
    }
    // The handlers that run hold a head of a megabyte each.
    let running = || service.running.load(Ordering::SeqCst);
    until("the limit is reached", || running() == ALL_HEADS / MIB && server.pool.in_use() == 16 * MIB).await;
    let mut steady = 0;
    until("it stays there", || {
        assert!(running() * MIB <= ALL_HEADS, "{} heads of a megabyte", running());
        assert!(server.heads.in_use(ALL_HEADS) <= ALL_HEADS && server.pool.in_use() <= 16 * MIB);
        steady += 1;
        steady > 100
    })
    .await;
    // Members that do not flood are served, on what little they need.
    let client = Client::new(identity(1));
    assert!(client.call(&server.peer, call(ECHO, b"small")).await.is_ok());
    for flood in &floods {
        flood.abort();
    }
    service.gate().add_permits(10_000);
    until("all comes back", || server.heads.in_use(ALL_HEADS) == 0 && server.pool.in_use() == 0).await;
}

/// One member alone gets no more than its share, in requests and in answers that it does not read.
#[tokio::test]
async fn one_connection_has_its_share_of_long_heads() {
    let service = TestService::new();
    let options = ServerOptions { stall_time: LONG, ..Default::default() };
    let server = start_at(local(), service.clone(), options);
    let mut asks = member(&server).await;
    let long = Header { method: GATED, head_len: MAX_HEAD as u32, ..header(FrameKind::Request, 0, 0) };
    let flood = tokio::spawn(async move {
        let body = vec![0; MAX_HEAD];
        loop {
            asks.write_all(&long.encode()).await.unwrap();
            asks.write_all(&body).await.unwrap();
        }
    });
    until("its share is used", || service.running.load(Ordering::SeqCst) == ONE_HEADS / MIB).await;
    assert_eq!(server.heads.in_use(ALL_HEADS), ONE_HEADS);
    flood.abort();
    service.gate().add_permits(10_000);
    until("it comes back", || server.heads.in_use(ALL_HEADS) == 0).await;

    // Answers of a megabyte for a peer that reads none: what fits the socket, its share, and one
    // that waits and stops the next from being made.
    let mut deaf = member(&server).await;
    for call in 0..200 {
        let ask = Header { method: LONG_HEAD, ..header(FrameKind::Request, call, 0) };
        deaf.write_all(&ask.encode()).await.unwrap();
    }
    until("its share is used", || server.heads.in_use(ALL_HEADS) == ONE_HEADS).await;
    let mut before = 0;
    until("no more are made", || {
        let now = service.made.load(Ordering::SeqCst);
        let still = now == before;
        before = now;
        still
    })
    .await;
    let in_sockets = server.stats.get().bytes_sent as usize / MIB;
    assert!(before <= in_sockets + ONE_HEADS / MIB + 2, "{before} made, {in_sockets} in the sockets");
    // It reads them after all, and gets every one.
    for _ in 0..200 {
        let mut bytes = [0; HEADER_BYTES];
        deaf.read_exact(&mut bytes).await.unwrap();
        let mut head = vec![0; Header::decode(&bytes).unwrap().head_len as usize];
        assert_eq!(head.len(), MAX_HEAD);
        deaf.read_exact(&mut head).await.unwrap();
    }
    until("it comes back", || server.heads.in_use(ALL_HEADS) == 0).await;
}

/// A peer that sends a byte now and then is never silent for long, and given up all the same.
#[tokio::test]
async fn a_peer_that_dribbles_is_given_up() {
    let options = ServerOptions { stall_time: Duration::from_millis(300), ..Default::default() };
    let server = start_at(local(), TestService::new(), options);
    for (method, head_len, payload_len) in [(ECHO, MIB / 4, 0), (ECHO, 0, MIB / 4)] {
        let mut stream = member(&server).await;
        let (head_len, payload_len) = (head_len as u32, payload_len as u32);
        let frame = Header { method, head_len, payload_len, ..header(FrameKind::Request, 1, 0) };
        stream.write_all(&frame.encode()).await.unwrap();
        let dribble = async {
            while stream.write_all(&[1]).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(LONG, dribble).await.expect("given up");
        until("its memory comes back", || server.heads.in_use(ALL_HEADS) == 0 && server.pool.in_use() == 0)
            .await;
    }
}

/// Of a payload, at most what was read ahead with its header is copied in user space, once at each
/// side; the rest goes from the kernel to its place.
#[tokio::test]
async fn payload_bytes_are_copied_at_most_once_and_only_those_read_ahead() {
    let server = start(TestService::new());
    let client = Client::new(identity(1));
    let mut expected = 0;
    for (len, times) in [(4096, 50), (MIB, 20)] {
        for _ in 0..times {
            let send = client.pool().try_alloc(len).map(BufMut::freeze);
            let recv = client.pool().try_alloc(len);
            client.call(&server.peer, Call { send, recv, ..call(ECHO, b"head") }).await.unwrap();
            expected += len.min(PREFETCH) as u64;
        }
        for (side, stats) in [("client", client.stats()), ("server", server.stats.get())] {
            println!("{len} bytes, {side}: {} of {} copied", stats.bytes_copied, stats.bytes_received);
            assert!(stats.bytes_copied <= expected, "{side}: {} copied", stats.bytes_copied);
            assert!(stats.bytes_copied > 0, "{side}: nothing is counted");
        }
    }
}

/// Late answers against a pool whose every free buffer is watched: nothing is ever written to memory
/// that its call has let go of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_answer_never_lands_in_memory_that_was_handed_out_again() {
    use rand::{RngExt, SeedableRng};
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = listener.local_addr().unwrap().to_string();
    // Eight buffers for sixteen callers: what one gives back the next has at once.
    let options = ClientOptions { pool_bytes: 8 * 8192, tcp_lanes: 1, ..Default::default() };
    let client = Client::with_options(identity(1), options);
    // Answers late, in any order, in pieces, and now and then ends the connection in the middle.
    let serving = tokio::spawn(async move {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        loop {
            let Ok(stream) = try_serve_raw(&listener, (1, 2)).await else { continue };
            let (mut read, mut stream) = stream.into_split();
            let (request, mut requests) = tokio::sync::mpsc::unbounded_channel();
            tokio::spawn(async move {
                let mut bytes = [0; HEADER_BYTES];
                while read.read_exact(&mut bytes).await.is_ok() {
                    let _ = request.send(Header::decode(&bytes).unwrap());
                }
            });
            let mut owed: Vec<(u64, usize)> = Vec::new();
            loop {
                let wait = Duration::from_millis(rng.random_range(1..4));
                match tokio::time::timeout(wait, requests.recv()).await {
                    Ok(Some(header)) => owed.push((header.call, header.aux as usize)),
                    Ok(None) => break,
                    Err(_) => {}
                }
                if owed.is_empty() || rng.random_bool(0.3) {
                    continue;
                }
                let (call, len) = owed.swap_remove(rng.random_range(0..owed.len()));
                let mut answer = header(FrameKind::Reply, call, len as u32).encode().to_vec();
                answer.resize(HEADER_BYTES + len, 0xEE);
                let cut =
                    if rng.random_bool(0.02) { rng.random_range(1..answer.len()) } else { answer.len() };
                let (first, second) = answer[..cut].split_at(cut / 2);
                if stream.write_all(first).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
                if stream.write_all(second).await.is_err() || cut < answer.len() {
                    break;
                }
            }
        }
    });
    let callers: Vec<_> = (0..16u64)
        .map(|n| {
            let (client, peer) = (client.clone(), peer.clone());
            tokio::spawn(async move {
                let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed ^ (n + 1));
                let (mut late, mut landed) = (0, 0);
                for _ in 0..120 {
                    let mut mine = client.pool().alloc(8192).await;
                    mine.fill(n as u8);
                    // Held a while before it is lent to a call: an answer to its last user would show.
                    for _ in 0..rng.random_range(0..20) {
                        tokio::task::yield_now().await;
                        assert!(mine.iter().all(|b| *b == n as u8), "somebody wrote to memory of caller {n}");
                    }
                    let timeout = Duration::from_millis(rng.random_range(0..40));
                    let ask = Call { recv: Some(mine), timeout, ..call(ECHO, b"") };
                    match client.call(&peer, ask).await {
                        Ok(got) => {
                            assert!(got.data.unwrap().iter().all(|b| *b == 0xEE));
                            landed += 1;
                        }
                        Err(error) => {
                            let kind = error.kind();
                            let fine = [ErrorKind::Timeout, ErrorKind::Disconnected, ErrorKind::Unavailable];
                            assert!(fine.contains(&kind), "{error}");
                            late += usize::from(kind == ErrorKind::Timeout);
                        }
                    }
                }
                (late, landed)
            })
        })
        .collect();
    let (mut late, mut landed) = (0, 0);
    for caller in callers {
        let (l, n) = caller.await.unwrap();
        (late, landed) = (late + l, landed + n);
    }
    println!("{landed} landed, {late} were late");
    assert!(late > 20 && landed > 20, "{late} late, {landed} landed: the test shows nothing");
    client.disconnect(&peer);
    until("all memory comes back", || client.pool().in_use() == 0).await;
    serving.abort();
}

/// What a server of the protocol may send, mutated: calls end one way or another, memory comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mutated_answers_do_no_harm() {
    use rand::{RngExt, SeedableRng};
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = listener.local_addr().unwrap().to_string();
    let client = Client::with_options(
        identity(1),
        ClientOptions { reply_bytes: 64 << 10, tcp_lanes: 1, ..Default::default() },
    );
    for round in 0..60 {
        let calls: Vec<_> = (0..4)
            .map(|_| {
                let (client, peer) = (client.clone(), peer.clone());
                let recv = client.pool().try_alloc(32 << 10);
                tokio::spawn(async move { client.call(&peer, Call { recv, ..call(ECHO, b"") }).await })
            })
            .collect();
        let mut stream = serve_raw(&listener).await;
        let mut bytes = Vec::new();
        for _ in 0..4 {
            let mut request = [0; HEADER_BYTES];
            stream.read_exact(&mut request).await.unwrap();
            let Header { call, .. } = Header::decode(&request).unwrap();
            let kind = [FrameKind::Reply, FrameKind::Error, FrameKind::Ready, FrameKind::Grant]
                [rng.random_range(0..4)];
            let (head, payload) = match kind {
                FrameKind::Reply => (rng.random_range(0..600u32), rng.random_range(0..40_000u32)),
                FrameKind::Error => (rng.random_range(0..600), 0),
                _ => (0, 0),
            };
            let aux = if kind == FrameKind::Ready { 32 << 10 } else { u32::from(kind == FrameKind::Error) };
            let answer = Header { head_len: head, aux, ..header(kind, call, payload) };
            bytes.extend_from_slice(&answer.encode());
            bytes.extend((0..head + payload).map(|_| rng.random::<u8>()));
        }
        for _ in 0..round % 4 {
            let at = rng.random_range(0..bytes.len().min(200));
            bytes[at] = rng.random();
        }
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        drop(stream);
        for one in calls {
            let _ = one.await.unwrap();
        }
        client.disconnect(&peer);
        assert_eq!(client.incast().now(), (0, 0), "round {round}");
    }
    until("all memory comes back", || client.pool().in_use() == 0).await;
}

/// The type of service of this process's sockets whose own or other end is `addr`.
fn marks(addr: SocketAddr) -> Vec<(bool, u32)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let Ok(fd) = entry.unwrap().file_name().to_string_lossy().parse::<i32>() else { continue };
        // SAFETY: only asked for names and options, which an unrelated descriptor answers with an error.
        let socket = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        let socket = socket2::SockRef::from(&socket);
        let (own, other) = (socket.local_addr(), socket.peer_addr());
        let Some(other) = other.ok().and_then(|a| a.as_socket()) else { continue };
        let accepted = own.ok().and_then(|a| a.as_socket()) == Some(addr);
        if accepted || other == addr {
            let tos = if addr.is_ipv4() { socket.tos_v4() } else { socket.tclass_v6() };
            found.push((accepted, tos.unwrap()));
        }
    }
    found.sort_unstable();
    found
}

#[tokio::test]
async fn connections_are_marked_as_their_traffic_is() {
    let class = |traffic_class| Class { traffic_class, ..Class::default() };
    let fabric = Fabric::open(NetOptions {
        transport: Transport::Tcp,
        storage: class(0x48),
        control: class(0x10),
        ..NetOptions::default()
    })
    .unwrap();
    for addr in ["127.0.0.1:0", "[::1]:0"] {
        let options =
            ServerOptions { fabric: fabric.clone(), traffic: Traffic::Control, ..Default::default() };
        let server = start_at(addr.parse().unwrap(), TestService::new(), options);
        let options =
            ClientOptions { fabric: fabric.clone(), traffic: Traffic::Storage, ..Default::default() };
        let client = Client::with_options(identity(1), options);
        client.call(&server.peer, call(ECHO, b"")).await.unwrap();
        assert_eq!(marks(server.addr), [(false, 0x48), (true, 0x10)]);
    }
}
