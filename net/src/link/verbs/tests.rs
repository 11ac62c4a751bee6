//! Run inside the virtual machine of `tests/rdma-vm`, which has two Soft-RoCE devices on a veth
//! pair. `FIREFLY_RDMA_DEVICES` names two devices that reach each other, such as "rxe0,rxe1".

use super::*;
use crate::buf::BufPool;
use crate::link::contract::link_contract;
use crate::rpc::frame::Header;
use crate::rpc::tests::rpc_contract;
use crate::verbs::negotiate::Place;
use tokio::net::TcpListener;

fn rails() -> (Arc<Rail>, Arc<Rail>) {
    let names = std::env::var("FIREFLY_RDMA_DEVICES").expect("FIREFLY_RDMA_DEVICES names two devices");
    let (a, b) = names.split_once(',').expect("two names with a comma between");
    let rail = |name| Rail::new(&Device::open(name).unwrap(), 1);
    (rail(a), rail(b))
}

/// A link between two rails, made without the frames of `rpc::carrier`.
async fn pair_with(
    (a, b): (Arc<Rail>, Arc<Rail>),
    (ours, theirs): (LinkOptions, LinkOptions),
) -> ((VerbsTx, VerbsRx), (VerbsTx, VerbsRx)) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    let (a, b) = (draft(&a, &ours), draft(&b, &theirs));
    a.connect(&b.end().unwrap()).await.unwrap();
    b.connect(&a.end().unwrap()).await.unwrap();
    tokio::select! {
        probed = a.probe() => probed.unwrap(),
        e = b.answer_probes() => panic!("{e}"),
    }
    (a.finish(client), b.finish(server))
}

fn draft(rail: &Arc<Rail>, options: &LinkOptions) -> Draft {
    let port = rail.port().unwrap();
    let place = Place { link: port.link, gid: port.gid.raw, rail: 0, name: rail.name() };
    Draft::new(rail, &port, place, options).unwrap()
}

async fn pair_of(rails: (Arc<Rail>, Arc<Rail>)) -> ((VerbsTx, VerbsRx), (VerbsTx, VerbsRx)) {
    pair_with(rails, (LinkOptions::of_tests(), LinkOptions::of_tests())).await
}

async fn pair() -> ((VerbsTx, VerbsRx), (VerbsTx, VerbsRx)) {
    pair_of(rails()).await
}

#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn verbs_keep_the_links_contract() {
    let (client, server) = pair().await;
    let shared = server.0.half.0.clone();
    let steps = link_contract(client, server).await;
    println!(
        "link contract over verbs: {steps} steps, {} completion events",
        shared.work.events.load(Ordering::Relaxed)
    );
    assert_eq!(steps, 24);
    assert!(shared.work.events.load(Ordering::Relaxed) > 0, "completions came as events");
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
    let a = rails().0.device.clone();
    let pool = BufPool::new(1 << 20);
    let mut keys = Vec::new();
    for _ in 0..10 {
        let buf = pool.try_alloc(64 << 10).unwrap();
        keys.push(a.keys_of_mut(&buf).unwrap().remote);
        keys.push(a.keys_of(&buf.freeze()).unwrap().remote);
    }
    assert!(keys.iter().all(|k| *k == keys[0]) && a.counters.registrations.load(Ordering::Relaxed) == 1);
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
    assert!(error.to_string().contains("READ failed: the peer's device refused access"), "{error}");
    // The link is over on both sides.
    assert!(sr.recv().await.is_err());
    drop((_st, sr));
    assert!(cr.recv().await.is_err());
}

#[test]
#[ignore = "needs libibverbs: tests/rdma-vm/run.sh"]
fn an_unknown_device_is_a_precise_error() {
    let error = Device::open("nosuch0").err().unwrap().to_string();
    assert!(error.starts_with("nosuch0: "), "{error}");
}
