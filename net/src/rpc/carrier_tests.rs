//! Which carrier client and server agree on, and what becomes of a connection on RDMA. Most run
//! inside the virtual machine of `tests/rdma-vm`, which has two Soft-RoCE devices on a veth pair;
//! `FIREFLY_RDMA_DEVICES` names them.

use super::*;
use crate::error::CallError;
use crate::handshake::{self, Initiator, Purpose, Responder, Terms};
use crate::rpc::tests::{
    ECHO, FILL, GATED, LONG, Running, SHORT, TestService, call, identity, start_at, until,
};
use crate::rpc::{Call, Client, ClientOptions, Identity, ServerOptions, drive_handshake};
use crate::{Fabric, NetOptions};
use firefly_types::ErrorKind;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::Ordering;
use tokio::net::TcpListener;

fn fabric(transport: Transport, device: &str) -> Fabric {
    Fabric::open(NetOptions { transport, devices: vec![device.into()], ..Default::default() }).unwrap()
}

/// The two devices.
fn devices() -> (String, String) {
    let names = std::env::var("FIREFLY_RDMA_DEVICES").expect("FIREFLY_RDMA_DEVICES names two devices");
    let (a, b) = names.split_once(',').expect("two names with a comma between");
    (a.to_owned(), b.to_owned())
}

/// Runs iproute2; by its path, as busybox has applets of the same names that know less.
fn run(tool: &str, args: &str) {
    let status = Command::new(format!("/usr/bin/{tool}")).args(args.split(' ')).status();
    assert!(status.is_ok_and(|s| s.success()), "{tool} {args}");
}

/// An address of this machine that is no loopback address and stays when the devices' links go
/// down.
fn home() -> SocketAddr {
    let _ = Command::new("/usr/bin/ip").args("addr add 10.9.0.1/32 dev lo".split(' ')).output();
    "10.9.0.1:0".parse().unwrap()
}

fn client(fabric: Fabric) -> Client {
    Client::with_options(identity(1), ClientOptions { fabric, ..Default::default() })
}

fn server(addr: SocketAddr, service: Arc<TestService>, fabric: Fabric) -> Running {
    start_at(addr, service, ServerOptions { fabric, ..Default::default() })
}

/// One call that carries bytes both ways.
async fn echo(client: &Client, peer: &str, len: usize) -> Result<(), CallError> {
    let mut send = client.pool().alloc(len).await;
    send.fill(7);
    let recv = client.pool().try_alloc(len);
    let got = client.call(peer, Call { send: Some(send.freeze()), recv, ..call(ECHO, b"head") }).await?;
    assert!(got.data.unwrap().iter().all(|b| *b == 7));
    Ok(())
}

/// Calls until all lanes to `peer` are on RDMA (again): a rail that failed rests for some seconds.
async fn back_on_rdma(client: &Client, peer: &str) {
    let back = async {
        while client.transport(peer) != Some("rdma") {
            let _ = echo(client, peer, 100_000).await;
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LONG, back).await.expect("RDMA is used again");
}

fn queue_pairs(fabric: &Fabric) -> u64 {
    fabric.rails()[0].device.counters.queue_pairs.load(Ordering::Relaxed)
}

#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn rdma_is_used_where_both_sides_have_it() {
    let (a, b) = devices();
    let auto = |device: &str| fabric(Transport::Auto, device);
    let with = server(home(), TestService::new(), auto(&b));
    let without = server(home(), TestService::new(), Fabric::tcp());
    let absent = server(home(), TestService::new(), auto("nosuch*"));
    let near = server("127.0.0.1:0".parse().unwrap(), TestService::new(), auto(&b));
    let (rdma, plain) = (client(auto(&a)), client(Fabric::tcp()));
    let must = client(fabric(Transport::Rdma, &a));
    for (client, server, carrier) in [
        (&rdma, &with, "rdma"),
        (&rdma, &without, "tcp"),
        (&rdma, &absent, "tcp"),
        (&plain, &with, "tcp"),
        // A peer on the loopback address is no farther than memory; but RDMA may be asked for.
        (&rdma, &near, "tcp"),
        (&must, &near, "rdma"),
    ] {
        echo(client, &server.peer, 300_000).await.unwrap();
        assert_eq!(client.transport(&server.peer), Some(carrier));
    }
    let error = echo(&must, &without.peer, 1).await.unwrap_err();
    println!("{error}");
    let CallError::Refused { reason: HandshakeError::Rail { device, reason }, .. } = &error else {
        panic!("{error}")
    };
    assert!(device == "any" && reason.contains("TCP was asked for"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    for server in [with, without, absent, near] {
        server.stop().await;
    }
}

/// Both directions of a path that carries nothing, although both ports are up: the same connection
/// goes on with TCP, or says what failed.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn a_path_that_carries_no_probe_ends_in_tcp_or_in_the_reason() {
    let (a, b) = devices();
    let server = server(home(), TestService::new(), fabric(Transport::Auto, &b));
    for link in ["d0", "d1"] {
        run("tc", &format!("qdisc replace dev {link} root netem loss 100%"));
        let auto = client(fabric(Transport::Auto, &a));
        let tried = echo(&auto, &server.peer, 100_000).await;
        let must = client(fabric(Transport::Rdma, &a));
        let refused = echo(&must, &server.peer, 100_000).await;
        run("tc", &format!("qdisc del dev {link} root"));
        tried.unwrap();
        assert_eq!(auto.transport(&server.peer), Some("tcp"));
        let error = refused.unwrap_err().to_string();
        println!("{error}");
        // Depending on what the kernel remembers of the neighbour, the probe is lost, or already the
        // question for its hardware address.
        let reasons = ["rxe0 does not reach the server's rxe1", "connecting (to ready-to-receive) failed"];
        assert!(reasons.iter().any(|reason| error.contains(reason)), "{error}");
        // The control: nothing but the path was in the way. The rail rests for a while first.
        back_on_rdma(&must, &server.peer).await;
        back_on_rdma(&auto, &server.peer).await;
    }
    server.stop().await;
}

/// A port that goes down ends its connections at once, with the reason, and is used again when it
/// is up.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn a_port_that_goes_down_is_left_and_used_again_when_it_is_up() {
    let (a, b) = devices();
    let service = TestService::new();
    let theirs = fabric(Transport::Auto, &b);
    let server = server(home(), service.clone(), theirs.clone());
    let ours = fabric(Transport::Auto, &a);
    let client = client(ours.clone());
    echo(&client, &server.peer, 100_000).await.unwrap();
    assert_eq!(client.transport(&server.peer), Some("rdma"));
    // A call in flight when it happens.
    let recv = client.pool().try_alloc(8192);
    let pending = client.call(&server.peer, Call { recv, ..call(GATED, b"") });
    let down = async {
        let _ = service.entered.acquire().await.unwrap();
        run("ip", "link set d1 down");
    };
    let (answer, ()) = tokio::join!(pending, down);
    let error = answer.unwrap_err().to_string();
    println!("{error}");
    assert!(error.contains("is down") || error.contains("the peer closed"), "{error}");
    until("both rails know", || ours.rails()[0].port().is_err() && theirs.rails()[0].port().is_err()).await;
    assert!(ours.why_not().unwrap().contains("rxe0: port 1 is down"), "{:?}", ours.why_not());
    // The buffers are free: no device can touch them any more.
    until("memory comes back", || client.pool().in_use() == 0).await;
    echo(&client, &server.peer, 100_000).await.unwrap();
    assert_eq!(client.transport(&server.peer), Some("tcp"));
    run("ip", "link set d1 up");
    until("both rails are up", || ours.rails()[0].port().is_ok() && theirs.rails()[0].port().is_ok()).await;
    assert_eq!(ours.report().why_not, None);
    until("the address is back", || {
        ours.rails()[0].refresh().is_ok_and(|p| p.gid.address().is_ipv4())
            && theirs.rails()[0].refresh().is_ok_and(|p| p.gid.address().is_ipv4())
    })
    .await;
    service.gate().add_permits(1);
    back_on_rdma(&client, &server.peer).await;
    server.stop().await;
}

/// Two rails share the calls; when one goes down in mid-transfer its calls go another way, and when it
/// is up again it gets its share again. A third device on a veth pair of its own is made for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn two_rails_share_the_load_and_stand_in_for_each_other() {
    let (a, _) = devices();
    run("ip", "link add e0 type veth peer name e1");
    for dev in ["e0", "e1"] {
        run("ip", &format!("link set {dev} mtu 4200 up"));
    }
    run("ip", "addr add 10.2.0.1/24 dev e0");
    run("rdma", "link add rxe9 type rxe netdev e0");
    let both = || {
        let options = NetOptions { devices: vec![a.clone(), "rxe9".into()], ..Default::default() };
        Fabric::open(options).unwrap()
    };
    let (ours, theirs) = (both(), both());
    until("both rails are up and have their addresses", || {
        let ready = |rail: &Arc<Rail>| rail.refresh().is_ok_and(|p| p.gid.address().is_ipv4());
        ours.rails().iter().all(ready) && theirs.rails().iter().all(ready)
    })
    .await;
    let server = server(home(), TestService::new(), theirs.clone());
    let client = client(ours.clone());
    let moved = |rail: usize| ours.report().rails[rail].work.bytes + theirs.report().rails[rail].work.bytes;
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let done = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let workers: Vec<_> = (0..6)
        .map(|_| {
            let (client, peer) = (client.clone(), server.peer.clone());
            let (stop, done) = (stop.clone(), done.clone());
            tokio::spawn(async move {
                let mut lost = 0;
                while !stop.load(Ordering::Relaxed) {
                    match echo(&client, &peer, 1 << 20).await {
                        Ok(()) => done.fetch_add(1, Ordering::Relaxed),
                        // As a service does that repeats with the same request id.
                        Err(e) if e.kind() == ErrorKind::Disconnected => {
                            lost += 1;
                            0
                        }
                        Err(e) => panic!("{e}"),
                    };
                }
                lost
            })
        })
        .collect();
    let mib = 1 << 20;
    until("both rails carry calls", || moved(0) > 8 * mib && moved(1) > 8 * mib).await;
    run("ip", "link set e1 down");
    until("its rail is down", || ours.rails()[1].port().is_err()).await;
    let (before, calls) = (moved(0), done.load(Ordering::Relaxed));
    until("the other rail carries on", || moved(0) > before + 8 * mib).await;
    assert!(done.load(Ordering::Relaxed) > calls);
    let why = client.peers()[0].why_not_rdma.clone();
    assert!(why.as_ref().is_some_and(|why| why.contains("rxe9")), "{why:?}");
    run("ip", "link set e1 up");
    until("it is up again", || ours.rails()[1].port().is_ok() && theirs.rails()[1].port().is_ok()).await;
    let before = moved(1);
    until("it carries calls again", || moved(1) > before + 8 * mib).await;
    stop.store(true, Ordering::Relaxed);
    let mut lost = 0;
    for worker in workers {
        lost += tokio::time::timeout(LONG, worker).await.expect("no call hangs").unwrap();
    }
    println!("{} calls, {lost} of them cut off by the link that went down", done.load(Ordering::Relaxed));
    drop(client);
    server.stop().await;
    // The device stays: its removal would wait for everybody who has it open.
}

/// The late answer of a call that timed out: its WRITE comes when the pool would love to hand the
/// memory to somebody else.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn a_late_write_lands_in_memory_that_nobody_else_was_given() {
    let (a, b) = devices();
    let service = TestService::new();
    let server = server(home(), service.clone(), fabric(Transport::Auto, &b));
    // A pool of exactly one buffer: whoever gets memory gets this memory.
    let options =
        ClientOptions { pool_bytes: 8192, fabric: fabric(Transport::Auto, &a), ..Default::default() };
    let client = Client::with_options(identity(1), options);
    let recv = client.pool().try_alloc(8192);
    client.call(&server.peer, Call { recv, ..call(FILL, &[1]) }).await.unwrap();
    assert_eq!(client.transport(&server.peer), Some("rdma"));
    let recv = client.pool().try_alloc(8192).unwrap();
    let address = recv.as_ptr() as usize;
    let late = Call { recv: Some(recv), timeout: SHORT, ..call(GATED, &[0xAB]) };
    let error = client.call(&server.peer, late).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert_eq!(client.quarantined_bytes(), 8192);
    assert!(client.pool().try_alloc(1).is_none(), "the memory is not handed out again");
    service.gate().add_permits(1);
    until("the late answer frees the buffer", || client.quarantined_bytes() == 0).await;
    let again = client.pool().alloc(8192).await;
    // The control: the late WRITE did land in this very memory. Had the pool handed it out after
    // the timeout, its new owner's bytes would be these.
    assert_eq!(again.as_ptr() as usize, address);
    assert!(again.iter().all(|b| *b == 0xAB));
    drop(again);
    // Given up with the connection: free only once the queue pair is gone.
    let recv = client.pool().try_alloc(8192);
    let late = Call { recv, timeout: SHORT, ..call(GATED, &[0xCD]) };
    assert!(client.call(&server.peer, late).await.is_err());
    assert!(client.pool().try_alloc(1).is_none());
    client.disconnect(&server.peer);
    let mut mine = tokio::time::timeout(LONG, client.pool().alloc(8192)).await.unwrap();
    mine.fill(0x11);
    service.gate().add_permits(1);
    // The answer has nowhere to go; a whole call over a new queue pair later, nothing was touched.
    until("the late handler is done", || service.running() == 0).await;
    client.call(&server.peer, call(ECHO, b"after")).await.unwrap();
    assert!(mine.iter().all(|b| *b == 0x11));
    server.stop().await;
}

/// Body of a process that is ended in mid-transfer: serves on an address that it prints.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child of another test"]
async fn child_that_serves() {
    let Ok(device) = std::env::var("FIREFLY_TEST_CHILD") else { return };
    let server = server(home(), TestService::new(), fabric(Transport::Auto, &device));
    println!("serving at {}", server.peer);
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn a_peer_that_dies_in_mid_transfer_is_an_error_and_gives_memory_back() {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let (a, b) = devices();
    home();
    let mut child = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "rpc::carrier::verbs_tests::child_that_serves", "--include-ignored", "--nocapture"])
        .env("FIREFLY_TEST_CHILD", b)
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let peer = loop {
        let line = lines.next_line().await.unwrap().expect("the child says where it serves");
        if let Some((_, peer)) = line.split_once("serving at ") {
            break peer.trim().to_owned();
        }
    };
    let client = client(fabric(Transport::Rdma, &a));
    echo(&client, &peer, 100_000).await.unwrap();
    assert_eq!(client.transport(&peer), Some("rdma"));
    // Transfers that take long compared with the time to the kill, so that it hits some in the
    // middle: each is 8 MiB and there is always one in flight.
    let calls: Vec<_> = (0..4)
        .map(|_| {
            let (client, peer) = (client.clone(), peer.clone());
            tokio::spawn(async move {
                loop {
                    if let Err(e) = echo(&client, &peer, 8 << 20).await {
                        return e;
                    }
                }
            })
        })
        .collect();
    let before = client.stats().bytes_received;
    until("transfers are on their way", || client.stats().bytes_received > before + (1 << 20)).await;
    child.start_kill().unwrap();
    for one in calls {
        let error = tokio::time::timeout(LONG, one).await.expect("no call hangs").unwrap();
        println!("{error}");
        assert!(matches!(error.kind(), ErrorKind::Disconnected | ErrorKind::Unavailable), "{error}");
    }
    until("memory comes back", || client.pool().in_use() == 0).await;
    child.wait().await.unwrap();
}

fn terms(secret: u8) -> Terms {
    let Identity { cluster, secret, .. } = identity(secret);
    Terms::new(cluster, &secret, Purpose::Rpc)
}

/// Connects with an offer of RDMA and proves itself with `secret`.
async fn member(addr: SocketAddr, secret: u8, offer: u8) -> Result<TcpStream, HandshakeError> {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let mut hello = [0; 32];
    hello[0] = offer;
    let (mut machine, first) = Initiator::start(terms(secret), "tester", hello, handshake::nonce());
    stream.write_all(&first).await.unwrap();
    drive_handshake(&mut stream, &mut machine, Initiator::wants, Initiator::feed).await?;
    Ok(stream)
}

async fn closes(stream: &mut TcpStream) -> bool {
    let drained = async {
        let mut sink = [0; 4096];
        while !matches!(stream.read(&mut sink).await, Ok(0) | Err(_)) {}
    };
    tokio::time::timeout(LONG, drained).await.is_ok()
}

#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn strangers_and_malformed_negotiations_cost_no_queue_pair() {
    let (a, b) = devices();
    let theirs = fabric(Transport::Auto, &b);
    let options = ServerOptions { fabric: theirs.clone(), handshake_time: LONG, ..Default::default() };
    let server = start_at(home(), TestService::new(), options);
    let made = || queue_pairs(&theirs);
    // A stranger is refused before anything is negotiated.
    assert_eq!(member(server.addr, 2, OFFER_RDMA).await.err(), Some(HandshakeError::WrongSecret));
    // One that offers without proving anything at all.
    let mut stranger = TcpStream::connect(server.addr).await.unwrap();
    stranger.write_all(&[OFFER_RDMA; 100]).await.unwrap();
    assert!(closes(&mut stranger).await);
    assert_eq!(made(), 0);
    // A member whose frames make no sense.
    let ours = fabric(Transport::Auto, &a);
    let place = place(0, &ours.rails()[0], &ours.rails()[0].port().unwrap());
    let offer = Frame::Offer(place.clone()).encode();
    let mut other_version = offer.clone();
    other_version[2] = 9;
    let mut bad_link = offer.clone();
    bad_link[4] = 9;
    for bad in [
        vec![0xFF; 100],
        vec![0, 0],
        vec![0xFF, 0xFF],
        other_version,
        bad_link,
        offer[..offer.len() - 1].to_vec(),
        Frame::Use.encode(),
        Frame::Ready.encode(),
    ] {
        let mut stream = member(server.addr, 1, OFFER_RDMA).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), NEGOTIATE);
        stream.write_all(&bad).await.unwrap();
        stream.shutdown().await.unwrap();
        assert!(closes(&mut stream).await, "{bad:?}");
    }
    assert_eq!(made(), 0);
    // After a good offer the server has one, and lets go of it when what follows is bad.
    let mut stream = member(server.addr, 1, OFFER_RDMA).await.unwrap();
    stream.read_u8().await.unwrap();
    stream.write_all(&offer).await.unwrap();
    let Frame::Accept(mut end) = read_frame(&mut stream).await.unwrap() else { panic!("not accepted") };
    assert_eq!(made(), 1);
    end.address.qp = 1;
    write_frame(&mut stream, &Frame::Connect(end)).await.unwrap();
    assert!(closes(&mut stream).await);
    // A client that refuses after all goes on with TCP.
    let mut stream = member(server.addr, 1, OFFER_RDMA).await.unwrap();
    stream.read_u8().await.unwrap();
    write_frame(&mut stream, &Frame::Refuse("no reason".into())).await.unwrap();
    let plain = crate::rpc::frame::Header {
        kind: crate::rpc::frame::FrameKind::Request,
        call: 1,
        method: ECHO,
        head_len: 0,
        payload_len: 0,
        aux: 0,
        ask: false,
    };
    stream.write_all(&plain.encode()).await.unwrap();
    let mut answer = [0; crate::rpc::frame::HEADER_BYTES];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(made(), 1);
    drop(stream);
    // Members are still served.
    let good = client(ours);
    echo(&good, &server.peer, 100_000).await.unwrap();
    assert_eq!(good.transport(&server.peer), Some("rdma"));
    drop(good);
    server.stop().await;
}

/// A server that lies in its frames, stops in the middle or never answers: an error or TCP, within
/// the handshake's time.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn servers_that_break_the_negotiation_are_precise_errors() {
    let (a, _) = devices();
    let listener = TcpListener::bind(home()).await.unwrap();
    let peer = listener.local_addr().unwrap().to_string();
    let ours = fabric(Transport::Auto, &a);
    let accept = async |answer: &[u8]| {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut machine = Responder::new(terms(1), handshake::nonce());
        let agreed =
            drive_handshake(&mut stream, &mut machine, Responder::wants, Responder::feed).await.unwrap();
        assert_eq!(agreed.hello[0], OFFER_RDMA);
        stream.write_all(answer).await.unwrap();
        stream
    };
    let frame = |frame: Frame| [&[NEGOTIATE][..], &frame.encode()].concat();
    for (answer, reason) in [
        (vec![7], "a carrier was chosen that was not offered"),
        (frame(Frame::Use), "a Use came where Accept was due"),
        (vec![NEGOTIATE, 0xFF, 0xFF], "a frame of 65535 bytes"),
    ] {
        let client = client(ours.clone());
        let (stream, error) = tokio::join!(accept(&answer), echo(&client, &peer, 10));
        let error = error.unwrap_err().to_string();
        assert!(error.contains(reason), "{reason}: {error}");
        drop(stream);
    }
    // Says nothing more: the handshake's time ends it.
    let options = ClientOptions { fabric: ours.clone(), handshake_time: SHORT * 4, ..Default::default() };
    let impatient = Client::with_options(identity(1), options);
    let (stream, error) = tokio::join!(accept(&[NEGOTIATE]), echo(&impatient, &peer, 10));
    let error = error.unwrap_err();
    assert!(matches!(error, CallError::Refused { reason: HandshakeError::TimedOut, .. }), "{error}");
    drop(stream);
    assert_eq!(queue_pairs(&ours), 0, "no queue pair for a server that accepted nothing");
}

/// Peers of the first layout, and of one that does not exist yet: TCP. Needs no devices.
#[tokio::test]
async fn older_and_unknown_offers_are_answered_with_tcp() {
    let any = "127.0.0.1:0".parse().unwrap();
    let server = server(any, TestService::new(), Fabric::tcp());
    for offer in [1, 4, 0x80] {
        let mut stream = member(server.addr, 1, offer).await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), USE_TCP, "{offer}");
        stream.write_all(&[0xEE; 32]).await.unwrap();
        assert!(closes(&mut stream).await, "frames follow");
    }
    // A server without RDMA says so, after which frames follow as ever.
    let mut stream = member(server.addr, 1, OFFER_RDMA).await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), NEGOTIATE);
    let place =
        Place { link: crate::verbs::port::LinkLayer::Ethernet, gid: [1; 16], rail: 0, name: "x".into() };
    write_frame(&mut stream, &Frame::Offer(place)).await.unwrap();
    let Frame::Refuse(why) = read_frame(&mut stream).await.unwrap() else { panic!("not refused") };
    assert_eq!(why, "the server uses no RDMA: TCP was asked for");
    server.stop().await;
}

/// Without RDMA devices, `transport = rdma` is an error that says why.
#[tokio::test]
async fn rdma_that_was_asked_for_and_is_not_there_is_an_error() {
    let any = "127.0.0.1:0".parse().unwrap();
    let server = server(any, TestService::new(), Fabric::tcp());
    let options =
        NetOptions { transport: Transport::Rdma, devices: vec!["nosuch*".into()], ..Default::default() };
    let must = client(Fabric::open(options).unwrap());
    let error = must.call(&server.peer, call(ECHO, b"")).await.unwrap_err();
    println!("{error}");
    assert!(error.to_string().contains("RDMA was asked for and does not work"), "{error}");
    server.stop().await;
}
