//! Run inside the virtual machine of `tests/rdma-vm`, which has two Soft-RoCE devices on a veth
//! pair. `FIREFLY_RDMA_DEVICES` names two devices that reach each other, such as "rxe0,rxe1".

use super::*;
use crate::link::contract::link_contract;
use crate::rpc::tests::rpc_contract;
use tokio::net::TcpListener;

fn devices() -> (Arc<Device>, Arc<Device>) {
    let names = std::env::var("FIREFLY_RDMA_DEVICES").expect("FIREFLY_RDMA_DEVICES names two devices");
    let (a, b) = names.split_once(',').expect("two names with a comma between");
    (Device::open(a).unwrap(), Device::open(b).unwrap())
}

async fn pair_of((a, b): (Arc<Device>, Arc<Device>)) -> ((VerbsTx, VerbsRx), (VerbsTx, VerbsRx)) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    let (client, server) = tokio::join!(
        connect(client, a, LinkOptions::of_tests()),
        connect(server, b, LinkOptions::of_tests())
    );
    (client.unwrap(), server.unwrap())
}

async fn pair() -> ((VerbsTx, VerbsRx), (VerbsTx, VerbsRx)) {
    pair_of(devices()).await
}

#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn verbs_keep_the_links_contract() {
    let (client, server) = pair().await;
    let shared = server.0.shared();
    let steps = link_contract(client, server).await;
    println!(
        "link contract over verbs: {steps} steps, {} completion events",
        shared.events.load(Ordering::Relaxed)
    );
    assert_eq!(steps, 24);
    assert!(shared.events.load(Ordering::Relaxed) > 0, "completions came as events");
}

#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn verbs_carry_rpc() {
    let (client, server) = pair().await;
    let steps = rpc_contract(client, server).await;
    println!("rpc contract over verbs: {steps} steps");
    assert_eq!(steps, 55);
}

#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn a_block_is_registered_once() {
    let (a, _b) = devices();
    let pool = BufPool::new(1 << 20);
    let mut keys = Vec::new();
    for _ in 0..10 {
        let buf = pool.try_alloc(64 << 10).unwrap();
        keys.push(a.keys_of_mut(&buf).unwrap().remote);
        keys.push(a.keys_of(&buf.freeze()).unwrap().remote);
    }
    assert!(keys.iter().all(|k| *k == keys[0]) && a.registrations_made() == 1);
}

/// The last memory that a device may touch is let go only after the queue pair is gone.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn a_cancelled_pull_leaves_its_buffer_with_the_link() {
    let (client, server) = pair().await;
    let (mut ct, cr) = client;
    let (st, mut sr) = server;
    let pool = BufPool::new(8 << 20);
    let mut payload = pool.try_alloc(4 << 20).unwrap();
    payload.fill(9);
    let payload = payload.freeze();
    let header = Header {
        kind: FrameKind::Request,
        call: 1,
        method: 1,
        head_len: 0,
        payload_len: payload.len() as u32,
        aux: 0,
        ask: false,
    };
    let message =
        Outgoing { header, head: Bytes::new(), payload: Some(payload.clone()), window: None, permit: None };
    ct.send(&mut VecDeque::from([message])).await.unwrap();
    let got = sr.recv().await.unwrap();
    let theirs = BufPool::new(4 << 20);
    let into = theirs.try_alloc(4 << 20).unwrap();
    {
        let mut pull = Box::pin(sr.pull(&got, into));
        // Posts the READ and is dropped at once.
        assert!(futures::poll!(&mut pull).is_pending());
    }
    assert!(theirs.try_alloc(1).is_none(), "the device may still write");
    drop((ct, cr, st, sr));
    assert!(theirs.try_alloc(4 << 20).is_some(), "the queue pair is gone");
}

#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn a_window_that_is_not_the_peers_is_refused_by_the_device() {
    let (client, server) = pair().await;
    let (mut ct, mut cr) = client;
    let (_st, mut sr) = server;
    let pool = BufPool::new(1 << 20);
    let payload = pool.try_alloc(4096).unwrap().freeze();
    let header = Header {
        kind: FrameKind::Request,
        call: 1,
        method: 1,
        head_len: 0,
        payload_len: 4096,
        aux: 0,
        ask: false,
    };
    let message = Outgoing { header, head: Bytes::new(), payload: Some(payload), window: None, permit: None };
    ct.send(&mut VecDeque::from([message])).await.unwrap();
    let mut got = sr.recv().await.unwrap();
    let source = got.source.as_mut().unwrap();
    source.key ^= 0x5555_0000;
    let error = sr.pull(&got, pool.try_alloc(4096).unwrap()).await.err().unwrap();
    println!("{error}");
    assert!(error.to_string().contains("READ"), "{error}");
    // The link is over on both sides.
    assert!(sr.recv().await.is_err());
    drop((_st, sr));
    assert!(cr.recv().await.is_err());
}

/// The whole of it: client and server agree on RDMA by themselves, and on TCP with a peer that has
/// none.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn client_and_server_agree_on_rdma() {
    use crate::rpc::tests::{ECHO, TestService, call, identity, start_at};
    use crate::{Call, Client, ClientOptions, Fabric, NetOptions, ServerOptions};
    let names = std::env::var("FIREFLY_RDMA_DEVICES").unwrap();
    let (a, b) = names.split_once(',').unwrap();
    let rdma = |device: &str| Fabric::open(NetOptions { devices: vec![device.into()], ..Default::default() });
    let options = |device: &str| ServerOptions { fabric: rdma(device), ..Default::default() };
    let any = || "127.0.0.1:0".parse().unwrap();
    let with = start_at(any(), TestService::new(), options(b));
    let without = start_at(any(), TestService::new(), ServerOptions::default());
    let absent = start_at(any(), TestService::new(), options("nosuch0"));
    let client = Client::with_options(identity(1), ClientOptions { fabric: rdma(a), ..Default::default() });
    let plain = Client::new(identity(1));
    for (client, server, carrier) in [
        (&client, &with, "rdma"),
        (&client, &without, "tcp"),
        (&client, &absent, "tcp"),
        (&plain, &with, "tcp"),
    ] {
        let mut send = client.pool().alloc(300_000).await;
        send.fill(7);
        let recv = client.pool().try_alloc(300_000);
        let call = Call { send: Some(send.freeze()), recv, ..call(ECHO, b"head") };
        let got = client.call(&server.peer, call).await.unwrap();
        assert!(got.data.unwrap().iter().all(|b| *b == 7));
        assert_eq!(client.transport(&server.peer), Some(carrier));
    }
    for server in [with, without, absent] {
        server.stop().await;
    }
}

#[test]
#[ignore = "needs libibverbs: tests/rdma-vm/run.sh"]
fn an_unknown_device_is_a_precise_error() {
    let error = Device::open("nosuch0").err().unwrap().to_string();
    assert!(error.starts_with("nosuch0: "), "{error}");
}

#[test]
fn malformed_addresses_and_windows_are_refused() {
    let mut good = [0; ADDRESS_BYTES];
    good[..8].copy_from_slice(&MAGIC);
    good[32] = 3;
    assert!(parse_address(&good).is_ok());
    for (at, byte) in [(0, b'X'), (11, 1), (32, 0), (32, 6), (35, 1)] {
        let mut bad = good;
        bad[at] = byte;
        assert!(parse_address(&bad).is_err(), "{at}");
    }
    let window = Window { address: 0x0102_0304_0506_0708, key: 9, len: 10 };
    let mut bytes = Vec::new();
    put_window(&mut bytes, Some(window));
    assert_eq!(get_window(&bytes), Some(window));
    bytes.clear();
    put_window(&mut bytes, None);
    assert_eq!(get_window(&bytes), None);
}
