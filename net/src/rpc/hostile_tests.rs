//! Peers that are strangers, broken, stuck or malicious: precise errors, bounded memory, and the
//! members beside them keep being served.

use super::frame::{FrameKind, HEADER_BYTES, Header};
use super::tests::*;
use super::*;
use crate::error::CallError;
use crate::handshake::{self, Initiator, Purpose, Responder, Terms};
use firefly_types::ErrorKind;
use tokio::net::{TcpListener, TcpStream};

fn terms(secret: u8) -> Terms {
    let Identity { cluster, secret, .. } = identity(secret);
    Terms::new(cluster, &secret, Purpose::Rpc)
}

/// Connects and proves itself as a member, then leaves the raw stream to the test.
pub(super) async fn member(server: &Running) -> TcpStream {
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    let (mut machine, hello) = Initiator::start(terms(1), "tester", [0; 32], handshake::nonce());
    stream.write_all(&hello).await.unwrap();
    drive_handshake(&mut stream, &mut machine, Initiator::wants, Initiator::feed).await.unwrap();
    stream
}

/// Accepts one connection as a server that proves itself, then leaves the raw stream to the test.
pub(super) async fn serve_raw(listener: &TcpListener) -> TcpStream {
    serve_raw_in(listener, terms(1).versions).await
}

/// The same in some versions of the protocol only.
pub(super) async fn serve_raw_in(listener: &TcpListener, versions: (u16, u16)) -> TcpStream {
    try_serve_raw(listener, versions).await.unwrap()
}

/// The same for a client that may give up meanwhile.
pub(super) async fn try_serve_raw(
    listener: &TcpListener,
    versions: (u16, u16),
) -> Result<TcpStream, HandshakeError> {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut machine = Responder::new(Terms { versions, ..terms(1) }, handshake::nonce());
    drive_handshake(&mut stream, &mut machine, Responder::wants, Responder::feed).await?;
    Ok(stream)
}

pub(super) fn header(kind: FrameKind, call: u64, payload_len: u32) -> Header {
    Header { kind, call, method: 0, head_len: 0, payload_len, aux: 0, ask: false }
}

/// Whether the other side has closed; bytes that come before are dropped.
async fn closes(stream: &mut TcpStream) -> bool {
    let drained = async {
        let mut sink = [0; 4096];
        while !matches!(stream.read(&mut sink).await, Ok(0) | Err(_)) {}
    };
    tokio::time::timeout(LONG, drained).await.is_ok()
}

#[tokio::test]
async fn strangers_are_refused_with_the_reason() {
    let server = start(TestService::new());
    let wrong_secret = Client::new(identity(2));
    let error = wrong_secret.call(&server.peer, call(ECHO, b"")).await.unwrap_err();
    assert!(matches!(error, CallError::Refused { reason: HandshakeError::WrongSecret, .. }), "{error}");
    assert_eq!((error.kind(), wrong_secret.stats().refused), (ErrorKind::Unauthenticated, 1));
    let wrong_cluster = Client::new(Identity { cluster: ClusterId(8), ..identity(1) });
    let error = wrong_cluster.call(&server.peer, call(ECHO, b"")).await.unwrap_err();
    assert!(matches!(error, CallError::Refused { reason: HandshakeError::WrongCluster, .. }), "{error}");
    until("the server has counted them", || server.stats.get().refused == 2).await;
    assert_eq!(server.stats.get().calls, 0);
    // An impostor server is found out by the client, too.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = listener.local_addr().unwrap().to_string();
    let impostor = tokio::spawn(async move {
        // Accepts any client and cannot prove itself.
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut hello = vec![0; 64];
        stream.read_exact(&mut hello).await.unwrap();
        let mut honest = Responder::new(terms(2), handshake::nonce());
        stream.write_all(&honest.feed(&hello).send).await.unwrap();
        let mut proof = vec![0; honest.wants()];
        stream.read_exact(&mut proof).await.unwrap();
        // Status "ok" with a made-up proof.
        stream.write_all(&[0; 34]).await.unwrap();
        // The client says no more.
        assert_eq!(stream.read(&mut proof).await.unwrap_or(0), 0);
    });
    let error = Client::new(identity(1)).call(&peer, call(ECHO, b"secret head")).await.unwrap_err();
    assert!(matches!(error, CallError::Refused { reason: HandshakeError::WrongSecret, .. }), "{error}");
    impostor.await.unwrap();
    // Members are still served.
    assert!(Client::new(identity(1)).call(&server.peer, call(ECHO, b"")).await.is_ok());
}

#[tokio::test]
async fn with_and_without_tls_do_not_meet_and_say_why() {
    use crate::fabric::{Fabric, NetOptions};
    let with = |tls| Fabric::open(NetOptions { tls, ..NetOptions::default() }).unwrap();
    let client = |tls, secret| {
        Client::with_options(identity(secret), ClientOptions { fabric: with(tls), ..Default::default() })
    };
    let server = |tls| {
        let options = ServerOptions { fabric: with(tls), ..Default::default() };
        start_at("127.0.0.1:0".parse().unwrap(), TestService::new(), options)
    };
    let (plain, secure) = (server(false), server(true));
    let member = client(true, 1);
    for len in [0, 5000, 3 << 20] {
        let send = member.pool().try_alloc(len).map(BufMut::freeze);
        let recv = member.pool().try_alloc(len);
        let got = member.call(&secure.peer, Call { send, recv, ..call(ECHO, b"over TLS") }).await.unwrap();
        assert_eq!((got.head.as_ref(), got.data.unwrap().len()), (&b"over TLS"[..], len));
    }
    assert_eq!(member.transport(&secure.peer), Some("tls"));
    assert!(member.peers()[0].why_not_rdma.as_ref().unwrap().contains("TLS was asked for"));
    let refused = async |client: &Client, peer: &str| match client.call(peer, call(ECHO, b"")).await {
        Err(CallError::Refused { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&client(true, 2), &secure.peer).await, HandshakeError::WrongSecret);
    assert_eq!(refused(&client(false, 1), &secure.peer).await, HandshakeError::TlsWanted);
    let reason = refused(&client(true, 1), &plain.peer).await;
    assert!(matches!(&reason, HandshakeError::Tls(why) if why.contains("the server does not")), "{reason}");
    until("the servers have counted them", || {
        (secure.stats.get().refused, plain.stats.get().refused) == (2, 1)
    })
    .await;
}

#[tokio::test]
async fn silent_and_half_open_peers_cost_a_place_for_a_while_only() {
    let options = ServerOptions { handshake_time: Duration::from_millis(200), ..Default::default() };
    let server = start_at("127.0.0.1:0".parse().unwrap(), TestService::new(), options);
    // More silent strangers than there are places.
    let mut silent = Vec::new();
    for _ in 0..150 {
        silent.push(TcpStream::connect(server.addr).await.unwrap());
    }
    let client =
        Client::with_options(identity(1), ClientOptions { handshake_time: LONG, ..Default::default() });
    // A slow machine may miss the brief handshake time; the next try counts as well.
    let served = tokio::time::timeout(LONG, async {
        while client.call(&server.peer, call(ECHO, b"")).await.is_err() {}
    });
    assert!(served.await.is_ok());
    for stream in &mut silent {
        assert!(closes(stream).await);
    }
    // A server that accepts and says nothing.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = listener.local_addr().unwrap().to_string();
    let client = Client::with_options(
        identity(1),
        ClientOptions { handshake_time: Duration::from_millis(50), ..Default::default() },
    );
    let error = client.call(&peer, call(ECHO, b"")).await.unwrap_err();
    assert!(matches!(error, CallError::Refused { reason: HandshakeError::TimedOut, .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}

#[tokio::test]
async fn garbage_before_and_after_the_handshake_ends_the_connection() {
    let server = start(TestService::new());
    let mut web = TcpStream::connect(server.addr).await.unwrap();
    web.write_all(&b"GET / HTTP/1.1\r\nHost: example\r\nAccept: everything and more of it\r\n\r\n".repeat(4))
        .await
        .unwrap();
    assert!(closes(&mut web).await);

    let good = header(FrameKind::Request, 1, 0).encode();
    let mut broken: Vec<(&str, [u8; HEADER_BYTES])> = vec![("nothing of a frame", [0xEE; HEADER_BYTES])];
    for (what, at, byte) in [
        ("another layout", 2, 9),
        ("an unknown kind", 3, 77),
        ("a reply from a client", 3, 2),
        ("a huge head", 7, 0xFF),
        ("a huge payload", 19, 0xFF),
        ("reserved bytes", 30, 1),
    ] {
        let mut bytes = good;
        bytes[at] = byte;
        broken.push((what, bytes));
    }
    for (what, bytes) in broken {
        let mut stream = member(&server).await;
        stream.write_all(&bytes).await.unwrap();
        assert!(closes(&mut stream).await, "{what}");
    }
    // A frame cut short by the end of the stream.
    let mut stream = member(&server).await;
    stream.write_all(&Header { head_len: 10, ..header(FrameKind::Request, 1, 0) }.encode()).await.unwrap();
    stream.write_all(b"abc").await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(closes(&mut stream).await);
    assert_eq!(server.pool.in_use(), 0);
    assert!(Client::new(identity(1)).call(&server.peer, call(ECHO, b"")).await.is_ok());
}

#[tokio::test]
async fn a_payload_that_never_comes_is_given_up_and_its_memory_freed() {
    let options = ServerOptions { stall_time: Duration::from_millis(200), ..Default::default() };
    let server = start_at("127.0.0.1:0".parse().unwrap(), TestService::new(), options);
    let mut stream = member(&server).await;
    let promise = Header { method: ECHO, ..header(FrameKind::Request, 1, 4 << 20) };
    stream.write_all(&promise.encode()).await.unwrap();
    stream.write_all(&[7; 1000]).await.unwrap();
    until("the server waits for the payload", || server.pool.in_use() > 0).await;
    assert!(closes(&mut stream).await);
    until("its memory is free", || server.pool.in_use() == 0).await;
}

#[tokio::test]
async fn a_peer_that_never_reads_holds_bounded_memory_and_is_given_up() {
    let service = TestService::new();
    let options = ServerOptions { stall_time: Duration::from_millis(500), ..Default::default() };
    let server = start_at("127.0.0.1:0".parse().unwrap(), service.clone(), options);
    let mut stream = member(&server).await;
    // Asks for 1 MiB again and again and reads nothing.
    let ask = Header { method: 2, aux: 1 << 20, ..header(FrameKind::Request, 1, 0) };
    let flood = async { while stream.write_all(&ask.encode()).await.is_ok() {} };
    tokio::time::timeout(LONG, flood).await.expect("given up");
    // Replies wait in the service's own pool: bounded by it, and freed with the connection.
    until("all replies are dropped", || service.pool.in_use() == 0).await;
    assert!(Client::new(identity(1)).call(&server.peer, call(ECHO, b"")).await.is_ok());
}

#[tokio::test]
async fn a_server_that_breaks_the_protocol_loses_the_client_and_no_memory() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = listener.local_addr().unwrap().to_string();
    let client = Client::new(identity(1));
    let cases: [(&str, Vec<u8>); 5] = [
        ("sent a Request", header(FrameKind::Request, 1, 0).encode().to_vec()),
        ("not in flight", header(FrameKind::Reply, 999, 0).encode().to_vec()),
        ("for a buffer of 4096", header(FrameKind::Reply, 1, 4097).encode().to_vec()),
        ("not with its magic", vec![3; HEADER_BYTES]),
        ("within a message", header(FrameKind::Reply, 1, 100).encode().to_vec()),
    ];
    for (reason, bytes) in cases {
        let recv = client.pool().try_alloc(4096);
        let (theirs, ours) = tokio::join!(
            async {
                let mut stream = serve_raw(&listener).await;
                stream.read_exact(&mut [0; HEADER_BYTES]).await.unwrap();
                stream.write_all(&bytes).await.unwrap();
                stream.shutdown().await.unwrap();
                stream
            },
            client.call(&peer, Call { recv, ..call(ECHO, b"") })
        );
        drop(theirs);
        let error = ours.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Disconnected);
        assert!(error.to_string().contains(reason), "{reason}: {error}");
        until("its memory is free", || client.pool().in_use() == 0).await;
    }
}

#[tokio::test]
async fn a_server_at_its_limit_says_so() {
    let options = ServerOptions { max_connections: 1, ..Default::default() };
    let server = start_at("127.0.0.1:0".parse().unwrap(), TestService::new(), options);
    let first = Client::new(identity(1));
    assert!(first.call(&server.peer, call(ECHO, b"")).await.is_ok());
    let second = Client::new(identity(1));
    let error = second.call(&server.peer, call(ECHO, b"")).await.unwrap_err();
    assert!(matches!(error, CallError::Refused { reason: HandshakeError::Full, .. }), "{error}");
    drop(first);
    // The place comes free when the first client's connection has ended.
    let served = tokio::time::timeout(LONG, async {
        while second.call(&server.peer, call(ECHO, b"")).await.is_err() {
            tokio::task::yield_now().await;
        }
    });
    assert!(served.await.is_ok());
}

/// Mutated streams: whatever a member sends, the server survives, its memory comes back and
/// others are served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mutated_streams_do_no_harm() {
    use rand::{RngExt, SeedableRng};
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let server = start(TestService::new());
    for round in 0..60 {
        let mut bytes = Vec::new();
        for id in 0..rng.random_range(1..6u64) {
            let head_len = rng.random_range(0..600u32);
            let payload_len = rng.random_range(0..9000u32);
            let method = rng.random_range(1..3u16);
            let frame =
                Header { method, head_len, payload_len, aux: 4096, ..header(FrameKind::Request, id, 0) };
            bytes.extend_from_slice(&frame.encode());
            bytes.extend((0..head_len + payload_len).map(|_| rng.random::<u8>()));
        }
        if round % 3 > 0 {
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..bytes.len().min(200));
                bytes[at] = rng.random();
            }
        }
        bytes.truncate(rng.random_range(1..=bytes.len()));
        let mut stream = member(&server).await;
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        assert!(closes(&mut stream).await, "round {round}");
    }
    until("all memory comes back", || server.pool.in_use() == 0).await;
    assert!(Client::new(identity(1)).call(&server.peer, call(ECHO, b"")).await.is_ok());
}
