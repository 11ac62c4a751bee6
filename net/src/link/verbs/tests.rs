//! Run inside the virtual machine of `tests/rdma-vm`, which has two Soft-RoCE devices on a veth
//! pair. `FIREFLY_RDMA_DEVICES` names two devices that reach each other, such as "rxe0,rxe1".

use super::wire::MESSAGE_HEADER;
use super::*;
use crate::buf::BufPool;
use crate::link::contract::link_contract;
use crate::link::{LinkRx, LinkTx, Outgoing};
use crate::rpc::frame::{FrameKind, Header};
use crate::rpc::tests::rpc_contract;
use crate::verbs::negotiate::Place;
use bytes::Bytes;
use tokio::net::TcpListener;

fn rails() -> (Arc<Rail>, Arc<Rail>) {
    rails_with(false)
}

/// With or without memory windows. Those of Soft-RoCE stand no loss of packets: the kernel does local
/// requests again with the others.
fn rails_with(windows: bool) -> (Arc<Rail>, Arc<Rail>) {
    let names = std::env::var("FIREFLY_RDMA_DEVICES").expect("FIREFLY_RDMA_DEVICES names two devices");
    let (a, b) = names.split_once(',').expect("two names with a comma between");
    let rail = |name| Rail::new(&Device::open(name, windows).unwrap(), 1);
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
    let links = [client.0.half.0.clone(), server.0.half.0.clone()];
    let steps = tokio::time::timeout(Duration::from_secs(100), rpc_contract(client, server)).await;
    let steps = steps.unwrap_or_else(|_| panic!("stuck: {}\n{}", describe(&links[0]), describe(&links[1])));
    println!("rpc contract over verbs: {steps} steps");
    assert_eq!(steps, 55);
}

/// The same with memory windows, on either side or both.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn windows_keep_the_contracts() {
    let (client, server) = pair_of(rails_with(true)).await;
    assert_eq!(link_contract(client, server).await, 24);
    let (with, without) = (rails_with(true), rails());
    for rails in [with.clone(), (with.0, without.1), (without.0, with.1)] {
        let (client, server) = pair_of(rails).await;
        assert_eq!(rpc_contract(client, server).await, 55);
    }
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
    let pool = BufPool::new(1 << 20);
    let (client, server) = pair().await;
    let (mut ct, mut cr) = client;
    let (_st, mut sr) = server;
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
    let error = Device::open("nosuch0", false).err().unwrap().to_string();
    assert!(error.starts_with("nosuch0: "), "{error}");
}

/// Where a link stands, for the message of a test that got nowhere.
fn describe(shared: &Shared) -> String {
    let state = shared.lock();
    let posted: Vec<String> = state
        .posted
        .iter()
        .map(|p| {
            let what = match p.work {
                Work::Nothing => "inline",
                Work::Slot(_) => "slot",
                Work::Window(_) => "take back",
                Work::Write { .. } => "WRITE",
                Work::Read { .. } => "READ",
            };
            format!("{}:{what}", p.id)
        })
        .collect();
    format!(
        "{:?}, posted [{}] ({} unsignaled), {} arrived, {} bound, {} free slots, {:?}, {:?}, over {:?}",
        shared.rail,
        posted.join(" "),
        state.unsignaled,
        state.arrived.len(),
        state.bound.len(),
        state.free.len(),
        state.credits,
        shared.work,
        state.over,
    )
}

fn request(call: u64, payload: Option<Buf>, window: Option<Window>) -> Outgoing {
    let payload_len = payload.as_ref().map_or(0, |p| p.len()) as u32;
    let header =
        Header { kind: FrameKind::Request, call, method: 1, head_len: 4, payload_len, aux: 0, ask: false };
    Outgoing { header, head: Bytes::from_static(b"head"), payload, window, permit: None }
}

fn reply(call: u64, payload: Option<Buf>, window: Option<Window>) -> Outgoing {
    let payload_len = payload.as_ref().map_or(0, |p| p.len()) as u32;
    let header =
        Header { kind: FrameKind::Reply, call, method: 0, head_len: 4, payload_len, aux: 0, ask: false };
    Outgoing { header, head: Bytes::from_static(b"head"), payload, window, permit: None }
}

/// What a link has done so far: SENDs, WRITEs, READs, windows bound and taken back, completions,
/// grants that travelled alone.
fn work(shared: &Shared) -> [u64; 7] {
    let w = &shared.work;
    [&w.sends, &w.writes, &w.reads, &w.binds, &w.invalidations, &w.completions, &w.grants]
        .map(|n| n.load(Ordering::Relaxed))
}

fn less(now: [u64; 7], before: [u64; 7]) -> [u64; 7] {
    std::array::from_fn(|i| now[i] - before[i])
}

/// The table in the module's documentation, by the link's and the device's counters.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn each_call_costs_what_is_documented() {
    for windows in [false, true] {
        costs_of_calls(windows).await;
    }
}

async fn costs_of_calls(windows: bool) {
    let options = (LinkOptions::of_tests(), LinkOptions::of_tests());
    let copied = [options.0.counters.clone(), options.1.counters.clone()];
    let rails = rails_with(windows);
    let (ours, theirs) = (BufPool::new(8 << 20), BufPool::new(8 << 20));
    let (client, server) = pair_with(rails.clone(), options).await;
    let ((mut ct, mut cr), (mut st, mut sr)) = (client, server);
    let (a, b) = (ct.half.0.clone(), st.half.0.clone());
    let memory = ct.register();
    // One in 16 requests asks for its completion: as many calls as make whole numbers.
    const CALLS: u64 = 4 * SIGNAL_EVERY as u64;
    let mib = || 1usize << 20;
    let full = |pool: &BufPool| pool.try_alloc(mib()).unwrap();
    // SENDs, WRITEs, READs, windows bound, windows taken back by a request of their own; and the
    // completions beside those that are asked for now and then.
    let bind = u64::from(windows);
    for (what, client_posts, server_posts, completions) in [
        ("without payload", [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 2]),
        ("write 1 MiB", [1, 0, 0, bind, 0], [1, 0, 1, 0, 0], [1, 3]),
        ("read 1 MiB", [1, 0, 0, bind, 0], [1, 1, 0, 0, 0], [1, 2]),
    ] {
        let mut before = [[0; 7]; 2];
        let mut registered = [0; 2];
        let mut sent = [0; 2];
        let mut events = 0;
        // The first call of each kind registers its buffers; the others are the steady state.
        for call in 0..=CALLS {
            if call == 1 {
                // All completions of before are in: the last one is the server's, of its reply.
                settle(&[&a, &b]).await;
                before = [work(&a), work(&b)];
                registered =
                    [&rails.0, &rails.1].map(|r| r.device.counters.registrations.load(Ordering::Relaxed));
                sent = [&copied[0], &copied[1]].map(|c| c.sent.load(Ordering::Relaxed));
                events = a.work.events.load(Ordering::Relaxed) + b.work.events.load(Ordering::Relaxed);
            }
            let mut landing = (what == "read 1 MiB").then(|| full(&ours));
            let window = landing.as_mut().and_then(|l| memory.window(l).unwrap());
            let payload = (what == "write 1 MiB").then(|| full(&ours).freeze());
            ct.send(&mut VecDeque::from([request(call, payload, window)])).await.unwrap();
            let got = sr.recv().await.unwrap();
            if what == "write 1 MiB" {
                sr.pull(&got, full(&theirs)).await.unwrap();
            }
            let payload = (what == "read 1 MiB").then(|| full(&theirs).freeze());
            st.send(&mut VecDeque::from([reply(call, payload, got.window)])).await.unwrap();
            let got = cr.recv().await.unwrap();
            if let Some(landing) = &mut landing {
                cr.land(&got, landing).await.unwrap();
            }
            // The reply's buffer is free again, so that the next call takes the same.
            settle(&[&a, &b]).await;
        }
        settle(&[&a, &b]).await;
        let now_and_then = client_posts.iter().sum::<u64>() * CALLS / u64::from(SIGNAL_EVERY);
        for (side, shared, posts, completions) in [
            ("client", &a, client_posts, completions[0] * CALLS + now_and_then),
            ("server", &b, server_posts, completions[1] * CALLS),
        ] {
            let at = usize::from(side == "server");
            let [posted @ .., done, grants] = less(work(shared), before[at]);
            println!("{what}, {side}, {CALLS} calls: {posted:?}, {done} completions");
            assert_eq!(posted, posts.map(|n| n * CALLS), "{what} {side}");
            assert_eq!((done, grants), (completions, 0), "{what} {side}");
        }
        let after = [&rails.0, &rails.1].map(|r| r.device.counters.registrations.load(Ordering::Relaxed));
        assert_eq!(after, registered, "{what}: nothing is registered in steady state");
        let now = a.work.events.load(Ordering::Relaxed) + b.work.events.load(Ordering::Relaxed);
        // An event may tell of several completions, never of none.
        assert!(now - events <= (completions[0] + completions[1] + 1) * CALLS + now_and_then, "{what}");
        let bytes: Vec<u64> =
            copied.iter().zip(sent).map(|(c, n)| (c.sent.load(Ordering::Relaxed) - n) / CALLS).collect();
        let mib = mib() as u64;
        let payload = [mib * u64::from(what == "write 1 MiB"), mib * u64::from(what == "read 1 MiB")];
        // Header, windows and head of a message, and 8 bytes for its SEND.
        let message = (PART_HEADER + MESSAGE_HEADER + 4) as u64;
        assert_eq!(bytes, [message + payload[0], message + payload[1]], "{what}");
    }
    for counters in copied {
        assert_eq!(counters.copied.load(Ordering::Relaxed), 0, "no payload byte is copied");
    }
}

/// Waits until no signaled request is in flight and no completion waits.
async fn settle(links: &[&Arc<Shared>]) {
    let quiet = |shared: &Arc<Shared>| {
        let state = shared.lock();
        state.posted.len() == state.unsignaled as usize
    };
    crate::rpc::tests::until("the links are quiet", || links.iter().all(|l| quiet(l))).await;
}

/// A peer that does not read holds its sender at the credits it gave: nothing is sent that finds no
/// receive, nothing is lost, and the sender gives up after the stall time.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn a_sender_without_credits_waits_and_then_gives_up() {
    let (client, server) = pair().await;
    let ((mut ct, _cr), (_st, mut sr)) = (client, server);
    let shared = ct.half.0.clone();
    let mut batch: VecDeque<Outgoing> = (0..500).map(|call| request(call, None, None)).collect();
    let before = work(&shared);
    ct.try_send(&mut batch).unwrap();
    assert_eq!(less(work(&shared), before)[0], RECEIVES as u64 - 1, "all credits but the one for a grant");
    assert_eq!(batch.len(), 500 - (RECEIVES - 1));
    // The peer reads: all arrive, in order, and grants travel alone because nothing goes back.
    let receive = async {
        for call in 0..500 {
            assert_eq!(sr.recv().await.unwrap().header.call, call);
        }
    };
    let (sent, ()) = tokio::join!(ct.send(&mut batch), receive);
    sent.unwrap();
    assert!(batch.is_empty());
    assert!(shared.work.waits.load(Ordering::Relaxed) > 0 && work(&_st.half.0)[6] > 5);

    // And one that never reads again.
    let short = LinkOptions { stall: Duration::from_millis(300), ..LinkOptions::of_tests() };
    let (client, _server) = pair_with(rails(), (short, LinkOptions::of_tests())).await;
    let (mut ct, mut cr) = client;
    let mut batch: VecDeque<Outgoing> = (0..500).map(|call| request(call, None, None)).collect();
    let error = ct.send(&mut batch).await.unwrap_err();
    assert!(matches!(error, LinkError::Stalled(_)) || matches!(error, LinkError::Over(_)), "{error}");
    assert!(error.to_string().contains("moved no byte"), "{error}");
    assert!(cr.recv().await.is_err(), "both halves know");
}

/// The control: without credits a sender meets a peer without receives, and that is an error of its
/// own on both sides. Nobody relies on the device's retries.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn a_sender_that_ignores_credits_is_refused_by_the_device() {
    let (client, server) = pair().await;
    let ((mut ct, mut cr), (_st, mut sr)) = (client, server);
    ct.half.0.lock().credits.ignore();
    let mut batch: VecDeque<Outgoing> =
        (0..RECEIVES as u64 + 1).map(|call| request(call, None, None)).collect();
    ct.try_send(&mut batch).unwrap();
    assert!(batch.is_empty());
    let error = tokio::time::timeout(Duration::from_secs(60), cr.recv()).await.unwrap().unwrap_err();
    println!("{error}");
    assert!(error.to_string().contains("SEND failed: the peer had no receive posted"), "{error}");
    drop((ct, cr));
    // What had arrived is still handed out, then the end.
    let mut got = 0;
    while sr.recv().await.is_ok() {
        got += 1;
    }
    assert_eq!(got, RECEIVES);
}

/// A grant that cannot be, and a SEND that is none of ours.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn a_peer_that_breaks_the_messages_rules_is_given_up() {
    for (bytes, reason) in [
        ([wire::part_header(Kind::Grant, 100_000)].concat(), "a grant of 100000 receives"),
        (vec![9; 20], "a SEND of kind 9"),
        ([&wire::part_header(Kind::Probe, 64)[..], &[0; 8]].concat(), "a probe on a link that is in use"),
        ([&wire::part_header(Kind::Part, 64)[..], &[0; 3]].concat(), "a message of 3 bytes"),
    ] {
        let (client, server) = pair().await;
        let ((ct, _cr), (_st, mut sr)) = (client, server);
        let shared = ct.half.0.clone();
        let local = piece(bytes.as_ptr(), bytes.len(), 0);
        let how = How { inline: true, signaled: true, ..How::default() };
        shared.post(&mut shared.lock(), Op::Send, Some(local), Work::Nothing, how).unwrap();
        let error = sr.recv().await.unwrap_err().to_string();
        assert!(error.contains(reason), "{reason}: {error}");
    }
}

/// Packets are marked as the options say; the device tells. Soft-RoCE keeps no service level, which
/// only InfiniBand has (`verbs::queue` tests that it is asked for).
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn queue_pairs_carry_their_class() {
    let class = |traffic_class| crate::fabric::Class { service_level: 3, traffic_class };
    let options = |tc| LinkOptions { class: class(tc), ..LinkOptions::of_tests() };
    let (client, server) = pair_with(rails(), (options(104), options(0))).await;
    for (link, expected) in [(&client.0, 104), (&server.0, 0)] {
        let state = link.half.0.lock();
        assert_eq!(state.queue.as_ref().unwrap().class().unwrap().traffic_class, expected);
    }
}

/// Random messages both ways at once over a path that may lose packets: all arrive as they were.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn random_messages_cross_both_ways() {
    use rand::{RngExt, SeedableRng};
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let (client, server) = pair().await;
    let ((mut ct, mut cr), (mut st, mut sr)) = (client, server);
    let mut heads = || -> Vec<Bytes> {
        (0..300)
            .map(|_| {
                let len =
                    if rng.random_bool(0.8) { rng.random_range(0..600) } else { rng.random_range(0..30_000) };
                Bytes::from(vec![rng.random::<u8>(); len])
            })
            .collect()
    };
    let (there, back) = (heads(), heads());
    let batch = |heads: &[Bytes]| -> VecDeque<Outgoing> {
        let one = |head: &Bytes| {
            let mut message = request(7, None, None);
            message.header.head_len = head.len() as u32;
            message.head = head.clone();
            message
        };
        heads.iter().map(one).collect()
    };
    let (mut out, mut home) = (batch(&there), batch(&back));
    let receive = async |rx: &mut VerbsRx, heads: &[Bytes]| {
        for head in heads {
            assert!(rx.recv().await.unwrap().head == *head);
        }
    };
    let (a, b, (), ()) = tokio::join!(
        ct.send(&mut out),
        st.send(&mut home),
        receive(&mut sr, &there),
        receive(&mut cr, &back)
    );
    a.unwrap();
    b.unwrap();
}

/// The right to a buffer ends with its call: what the peer's device does with an old key is refused
/// and changes nothing. The control: with keys of whole blocks, the same late WRITE lands in memory
/// that belongs to somebody else by then.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn a_right_ends_with_its_call() {
    for windows in [true, false] {
        let rails = rails_with(windows);
        let (ours, theirs) = (BufPool::new(4096), BufPool::new(1 << 20));
        let (client, server) = pair_of(rails).await;
        let ((mut ct, mut cr), (mut st, mut sr)) = (client, server);
        let mut landing = ours.try_alloc(4096).unwrap();
        let window = ct.register().window(&mut landing).unwrap();
        ct.send(&mut VecDeque::from([request(1, None, window)])).await.unwrap();
        let asked = sr.recv().await.unwrap();
        let data = |byte| {
            let mut data = theirs.try_alloc(4096).unwrap();
            data.fill(byte);
            data.freeze()
        };
        st.send(&mut VecDeque::from([reply(1, Some(data(1)), asked.window)])).await.unwrap();
        let got = cr.recv().await.unwrap();
        cr.land(&got, &mut landing).await.unwrap();
        assert!(landing.iter().all(|b| *b == 1));
        // The call is over; the memory is given to somebody else.
        let address = landing.as_ptr();
        drop(landing);
        let mut mine = ours.try_alloc(4096).unwrap();
        assert_eq!(mine.as_ptr(), address);
        mine.fill(7);
        // A second answer to the same call, as only a faulty peer sends it.
        st.send(&mut VecDeque::from([reply(1, Some(data(0xEE)), asked.window)])).await.unwrap();
        if windows {
            let error = tokio::time::timeout(Duration::from_secs(60), sr.recv()).await.unwrap().unwrap_err();
            println!("{error}");
            assert!(error.to_string().contains("WRITE failed: the peer's device refused access"), "{error}");
            assert!(mine.iter().all(|b| *b == 7), "the new owner's bytes are as they were");
        } else {
            cr.recv().await.unwrap();
            // SAFETY: the device wrote behind the back of `mine`, which is what is shown here; a
            // volatile read of memory that is alive.
            let byte = unsafe { std::ptr::read_volatile(address) };
            assert_eq!(byte, 0xEE);
        }
    }
}

/// A call with payloads both ways gives two rights; the answer takes back one, this side the other,
/// before the caller has its memory again.
#[tokio::test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh"]
async fn both_rights_of_a_call_are_taken_back() {
    let (ours, theirs) = (BufPool::new(8 << 20), BufPool::new(8 << 20));
    let (client, server) = pair_of(rails_with(true)).await;
    let ((mut ct, mut cr), (mut st, mut sr)) = (client, server);
    let (a, b) = (ct.half.0.clone(), st.half.0.clone());
    let before = work(&a);
    for call in 0..40 {
        let mut landing = ours.try_alloc(70_000).unwrap();
        let window = ct.register().window(&mut landing).unwrap();
        let payload = ours.try_alloc(70_000).unwrap().freeze();
        ct.send(&mut VecDeque::from([request(call, Some(payload), window)])).await.unwrap();
        assert_eq!(a.lock().bound.len(), 2);
        let got = sr.recv().await.unwrap();
        let pulled = sr.pull(&got, theirs.try_alloc(70_000).unwrap()).await.unwrap();
        st.send(&mut VecDeque::from([reply(call, Some(pulled.freeze()), got.window)])).await.unwrap();
        let got = cr.recv().await.unwrap();
        let windows = {
            let state = a.lock();
            (state.bound.len(), state.calls.len(), state.free_windows.len())
        };
        assert_eq!(windows, (0, 0, 2));
        cr.land(&got, &mut landing).await.unwrap();
    }
    let [sends, _, _, binds, invalidations, ..] = less(work(&a), before);
    assert_eq!((sends, binds, invalidations), (40, 80, 40));
    assert!(b.lock().sources.is_empty());
}
