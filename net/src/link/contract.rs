//! What every carrier must do, as one test body. Each carrier's tests run it, and RPC's own
//! (`rpc::tests::rpc_contract`), over links of its kind.

use super::*;
use crate::buf::BufPool;
use crate::rpc::MAX_HEAD;
use crate::rpc::frame::FrameKind;

fn message(
    kind: FrameKind,
    call: u64,
    head: &[u8],
    payload: Option<Buf>,
    window: Option<Window>,
) -> Outgoing {
    let header = Header {
        kind,
        call,
        method: if kind == FrameKind::Request { 5 } else { 0 },
        head_len: head.len() as u32,
        payload_len: payload.as_ref().map_or(0, |p| p.len()) as u32,
        aux: 0,
        ask: false,
    };
    Outgoing { header, head: Bytes::copy_from_slice(head), payload, window, permit: None }
}

fn pattern(pool: &BufPool, len: usize, seed: usize) -> Buf {
    let mut buf = pool.try_alloc(len).expect("the test's pool is large enough");
    for (i, b) in buf.iter_mut().enumerate() {
        *b = (i * 31 + seed) as u8;
    }
    buf.freeze()
}

/// Sends requests and replies both ways and ends the link. Returns the number of steps that held.
pub(crate) async fn link_contract(
    (mut ct, mut cr): (impl LinkTx, impl LinkRx),
    (mut st, mut sr): (impl LinkTx, impl LinkRx),
) -> usize {
    let (ours, theirs) = (BufPool::new(64 << 20), BufPool::new(64 << 20));
    let mut steps = 0;
    let sizes = [1, 511, 512, 4096, 70_000, 1 << 20, (3 << 20) + 3];

    // Messages alone, in order, of all lengths; several in one batch.
    let heads: Vec<Vec<u8>> =
        [0, 1, 100, 8127, 8128, 8129, 50_000, MAX_HEAD].iter().map(|n| vec![*n as u8 ^ 0x5A; *n]).collect();
    let mut batch: VecDeque<Outgoing> =
        heads.iter().enumerate().map(|(i, h)| message(FrameKind::Request, i as u64, h, None, None)).collect();
    let receive = async {
        for (i, head) in heads.iter().enumerate() {
            let got = sr.recv().await.unwrap();
            assert_eq!((got.header.call, got.header.method), (i as u64, 5));
            assert!(got.head == head);
            steps += 1;
        }
    };
    let (sent, ()) = tokio::join!(ct.send(&mut batch), receive);
    sent.unwrap();
    assert!(batch.is_empty());

    // A request's payload is pulled; the caller's copy stays as it was.
    for len in sizes {
        let payload = pattern(&ours, len, 1);
        let mut batch =
            VecDeque::from([message(FrameKind::Request, 1, b"pull", Some(payload.clone()), None)]);
        let receive = async {
            let got = sr.recv().await.unwrap();
            let into = theirs.try_alloc(got.header.payload_len as usize).unwrap();
            sr.pull(&got, into).await.unwrap()
        };
        let (sent, pulled) = tokio::join!(ct.send(&mut batch), receive);
        sent.unwrap();
        assert!(*pulled == *payload, "pull {len}");
        steps += 1;
    }

    // A payload that nobody wants is passed over, and the next message is in step.
    let mut batch = VecDeque::from([
        message(FrameKind::Request, 1, b"unwanted", Some(pattern(&ours, 300_000, 2)), None),
        message(FrameKind::Request, 2, b"next", None, None),
    ]);
    let receive = async {
        let got = sr.recv().await.unwrap();
        sr.skip(&got).await.unwrap();
        assert_eq!(sr.recv().await.unwrap().head.as_ref(), b"next");
    };
    let (sent, ()) = tokio::join!(ct.send(&mut batch), receive);
    sent.unwrap();
    steps += 1;

    // A reply's payload is pushed into the buffer that the request named, and nowhere else.
    let memory = ct.register();
    for len in sizes {
        let mut landing = ours.try_alloc(len + 4096).unwrap();
        landing.fill(0xEE);
        let window = memory.window(&mut landing).unwrap();
        let reply = pattern(&theirs, len, 3);
        let mut ask = VecDeque::from([message(FrameKind::Request, 7, b"fill this", None, window)]);
        ct.send(&mut ask).await.unwrap();
        let asked = sr.recv().await.unwrap();
        let mut answer =
            VecDeque::from([message(FrameKind::Reply, 7, b"done", Some(reply.clone()), asked.window)]);
        let receive = async {
            let got = cr.recv().await.unwrap();
            assert_eq!((got.header.call, got.head.as_ref()), (7, &b"done"[..]));
            landing.set_len(got.header.payload_len as usize);
            cr.land(&got, &mut landing).await.unwrap();
        };
        let (sent, ()) = tokio::join!(st.send(&mut answer), receive);
        sent.unwrap();
        assert!(*landing == *reply, "push {len}");
        landing.set_len(len + 4096);
        assert!(landing[len..].iter().all(|b| *b == 0xEE), "nothing beyond the payload is touched");
        steps += 1;
    }

    // The end of one side is an error on the other.
    drop((ct, cr));
    assert!(sr.recv().await.is_err());
    steps + 1
}
