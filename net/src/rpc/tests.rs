//! What RPC promises between members: payloads, concurrency, limits, reconnects, quarantine.

use super::*;
use crate::buf::BufPool;
use crate::error::CallError;
use crate::link::{LinkRx, LinkTx};
use firefly_types::ErrorKind;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Generous: a test that waits for it has failed.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// For calls whose answer is withheld: they time out whatever the machine's load.
pub(crate) const SHORT: Duration = Duration::from_millis(50);

pub(crate) fn identity(secret: u8) -> Identity {
    let secret = ClusterSecret::from_bytes([secret; 32]);
    Identity { cluster: ClusterId(7), secret, name: "tester".into() }
}

pub(crate) const ECHO: u16 = 1;
pub(crate) const FILL: u16 = 2;
pub(crate) const GATED: u16 = 3;
const PANIC: u16 = 4;
const FAIL: u16 = 5;
pub(crate) const HUGE_HEAD: u16 = 6;
pub(crate) const LONG_HEAD: u16 = 7;

/// Echoes, fills, waits, panics and fails, as the method says.
pub(crate) struct TestService {
    pub(crate) pool: BufPool,
    /// Each GATED call waits for a permit.
    gate: Semaphore,
    pub(crate) entered: Semaphore,
    /// How often each head was echoed.
    pub(crate) seen: Mutex<HashMap<Bytes, usize>>,
    /// How many long heads were made.
    pub(crate) made: AtomicUsize,
    pub(crate) running: AtomicUsize,
    most: AtomicUsize,
}

impl TestService {
    pub(crate) fn new() -> Arc<TestService> {
        Arc::new(TestService {
            pool: BufPool::new(64 << 20),
            gate: Semaphore::new(0),
            entered: Semaphore::new(0),
            seen: Mutex::default(),
            made: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        })
    }

    pub(crate) fn gate(&self) -> &Semaphore {
        &self.gate
    }

    /// Handlers at work now.
    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    async fn answer(&self, request: Request) -> Result<Reply, WireError> {
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(running, Ordering::SeqCst);
        let reply = self.method(request).await;
        self.running.fetch_sub(1, Ordering::SeqCst);
        reply
    }

    async fn method(&self, request: Request) -> Result<Reply, WireError> {
        let name_and_address = request.peer.strip_prefix("tester (").and_then(|p| p.strip_suffix(')'));
        assert!(name_and_address.is_some_and(|a| a.parse::<SocketAddr>().is_ok()), "{}", request.peer);
        match request.method {
            ECHO => {
                *self.seen.lock().unwrap().entry(request.head.clone()).or_default() += 1;
                Ok(Reply { head: request.head, data: request.payload.map(Into::into) })
            }
            FILL | GATED => {
                if request.method == GATED {
                    self.entered.add_permits(1);
                    self.gate.acquire().await.unwrap().forget();
                }
                let mut out = self.pool.alloc(request.reply_capacity.max(1)).await;
                let byte = request.head.first().copied().unwrap_or(0);
                out.set_len(request.reply_capacity);
                out.fill(byte);
                Ok(Reply::with_data(request.head, out))
            }
            PANIC => panic!("asked to"),
            FAIL => {
                Err(WireError::new(ErrorKind::NotFound, "no such thing: ".to_owned() + &"ä".repeat(5000)))
            }
            LONG_HEAD => {
                self.made.fetch_add(1, Ordering::SeqCst);
                Ok(Reply::head(vec![0; MAX_HEAD]))
            }
            HUGE_HEAD => Ok(Reply::head(vec![0; MAX_HEAD + 1])),
            other => Err(WireError::new(ErrorKind::Unsupported, format!("method {other}"))),
        }
    }
}

impl Service for TestService {
    fn payload_limit(&self, method: u16) -> usize {
        if method == ECHO { 8 << 20 } else { 0 }
    }

    fn handle<'a>(&'a self, request: Request) -> BoxFuture<'a, Result<Reply, WireError>> {
        Box::pin(self.answer(request))
    }
}

pub(crate) struct Running {
    pub(crate) addr: SocketAddr,
    pub(crate) peer: String,
    pub(crate) stats: ServerStats,
    pub(crate) pool: BufPool,
    pub(crate) heads: crate::buf::Heads,
    pub(crate) stop: CancellationToken,
    task: JoinHandle<()>,
}

pub(crate) fn start_at(addr: SocketAddr, service: Arc<TestService>, options: ServerOptions) -> Running {
    let server = Server::bind_with(addr, identity(1), service, options).unwrap();
    let addr = server.local_addr();
    let stop = CancellationToken::new();
    let (stats, pool, heads) = (server.stats(), server.pool().clone(), server.heads());
    let task = tokio::spawn(server.run(stop.clone()));
    Running { addr, peer: addr.to_string(), stats, pool, heads, stop, task }
}

pub(crate) fn start(service: Arc<TestService>) -> Running {
    start_at("127.0.0.1:0".parse().unwrap(), service, ServerOptions::default())
}

impl Running {
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

pub(crate) fn call(method: u16, head: &[u8]) -> Call {
    Call { method, head: Bytes::copy_from_slice(head), send: None, recv: None, timeout: LONG }
}

/// Waits for something that the other side brings about, without a clock.
pub(crate) async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(LONG, async {
        while !is() {
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("waited in vain: {what}"));
}

#[tokio::test]
async fn heads_and_payloads_of_all_sizes_come_back() {
    let server = start(TestService::new());
    let client = Client::new(identity(1));
    // Around the prefetch window, the page, the socket buffer and several of them.
    for head in [0, 1, 100, 479, 480, 481, 5000, MAX_HEAD] {
        for len in [0, 1, 31, 32, 479, 480, 481, 4096, 65_536, 1 << 20, (5 << 20) + 3] {
            let text: Vec<u8> = (0..head).map(|i| i as u8).collect();
            let mut send = client.pool().alloc(len).await;
            for (i, b) in send.iter_mut().enumerate() {
                *b = (i * 7 + len) as u8;
            }
            let send = send.freeze();
            let recv = Some(client.pool().alloc(len).await);
            let address = recv.as_ref().unwrap().as_ptr();
            let got = client
                .call(&server.peer, Call { send: Some(send.clone()), recv, ..call(ECHO, &text) })
                .await
                .unwrap();
            assert_eq!(got.head, text);
            let data = got.data.unwrap();
            assert!(data.as_ptr() == address, "the payload lands in the buffer given");
            assert!(*data == *send, "head {head}, payload {len}");
        }
    }
    assert_eq!(client.stats().connections, 2, "one for small calls, one for bulk");
    let (ours, theirs) = (client.stats(), server.stats.get());
    assert_eq!((ours.bytes_sent, ours.bytes_received), (theirs.bytes_received, theirs.bytes_sent));
    assert_eq!(ours.calls, theirs.calls);
    server.stop().await;
    until("all memory comes back", || client.pool().in_use() == 0).await;
}

#[tokio::test]
async fn an_error_is_carried_with_kind_and_message() {
    let server = start(TestService::new());
    let client = Client::new(identity(1));
    let error = client.call(&server.peer, call(FAIL, b"")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let text = error.to_string();
    assert!(text.starts_with("no such thing: ää") && text.len() <= 4096, "{} bytes", text.len());
    let error = client.call(&server.peer, call(PANIC, b"")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    let error = client.call(&server.peer, call(99, b"")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    // The connection survived all of it.
    assert!(client.call(&server.peer, call(ECHO, b"x")).await.is_ok());
    assert_eq!(client.stats().connections, 1);
}

#[tokio::test]
async fn limits_refuse_the_call_and_keep_the_connection() {
    let server = start(TestService::new());
    let client = Client::new(identity(1));
    let big = |n| client.pool().try_alloc(n).map(|b| b.freeze());
    // More than the method takes: read and dropped by the server, no pool memory taken.
    let error = client.call(&server.peer, Call { send: big(9 << 20), ..call(ECHO, b"") }).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    assert!(error.to_string().contains("8388608"), "{error}");
    let error = client.call(&server.peer, Call { send: big(1), ..call(FAIL, b"") }).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge, "a method that takes no payload");
    assert_eq!(server.pool.in_use(), 0);
    // A reply that does not fit the caller's buffer, or any head.
    let error = client.call(&server.peer, Call { send: big(5000), ..call(ECHO, b"") }).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge, "no buffer given: {error}");
    let recv = client.pool().try_alloc(4096);
    let error =
        client.call(&server.peer, Call { send: big(5000), recv, ..call(ECHO, b"") }).await.unwrap_err();
    assert!(error.to_string().contains("5000") && error.to_string().contains("4096"), "{error}");
    let error = client.call(&server.peer, call(HUGE_HEAD, b"")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    // What the protocol itself does not carry is not even sent.
    let error = client.call(&server.peer, call(ECHO, &vec![0; MAX_HEAD + 1])).await.unwrap_err();
    assert!(matches!(error, CallError::TooLarge { what: "head", .. }), "{error}");
    assert!(client.call(&server.peer, call(ECHO, b"x")).await.is_ok());
    assert_eq!(client.stats().connections, 2, "one for small calls, one for bulk");
}

#[tokio::test]
async fn many_calls_share_one_connection_and_answers_find_their_callers() {
    let service = TestService::new();
    let server = start(service.clone());
    let client = Client::new(identity(1));
    let calls = (0..200u8).map(|i| {
        let (client, peer) = (client.clone(), server.peer.clone());
        tokio::spawn(async move {
            let recv = Some(client.pool().alloc(3000 + usize::from(i)).await);
            let capacity = recv.as_ref().unwrap().capacity();
            let got = client.call(&peer, Call { recv, ..call(GATED, &[i]) }).await.unwrap();
            let data = got.data.unwrap();
            assert_eq!((got.head.as_ref(), data.len()), (&[i][..], capacity));
            assert!(data.iter().all(|b| *b == i));
        })
    });
    let calls: Vec<_> = calls.collect();
    // All are in flight at one time before the first is answered.
    let _ = service.entered.acquire_many(200).await.unwrap();
    service.gate.add_permits(200);
    for one in calls {
        one.await.unwrap();
    }
    assert_eq!(client.stats().connections, 1);
}

#[tokio::test]
async fn calls_in_flight_are_bounded_and_the_rest_wait_their_turn() {
    let service = TestService::new();
    let server = start(service.clone());
    let client = Client::new(identity(1));
    let total = connection::MAX_IN_FLIGHT + 50;
    let calls: Vec<_> = (0..total)
        .map(|_| {
            let (client, peer) = (client.clone(), server.peer.clone());
            tokio::spawn(async move { client.call(&peer, call(GATED, b"")).await.map(drop) })
        })
        .collect();
    let _ = service.entered.acquire_many(connection::MAX_IN_FLIGHT as u32).await.unwrap();
    assert_eq!(service.running.load(Ordering::SeqCst), connection::MAX_IN_FLIGHT);
    service.gate.add_permits(total);
    for one in calls {
        one.await.unwrap().unwrap();
    }
    assert_eq!(service.most.load(Ordering::SeqCst), connection::MAX_IN_FLIGHT);
}

#[tokio::test]
async fn a_small_receive_pool_makes_callers_wait_and_holds_its_bound() {
    let service = TestService::new();
    let pool = BufPool::new(3 << 20);
    let options = ServerOptions { pool: pool.clone(), ..Default::default() };
    let server = start_at("127.0.0.1:0".parse().unwrap(), service, options);
    let client = Client::new(identity(1));
    let calls: Vec<_> = (0..32u8)
        .map(|i| {
            let (client, peer) = (client.clone(), server.peer.clone());
            tokio::spawn(async move {
                let mut send = client.pool().alloc(1 << 20).await;
                send.fill(i);
                let recv = Some(client.pool().alloc(1 << 20).await);
                let got =
                    client.call(&peer, Call { send: Some(send.freeze()), recv, ..call(ECHO, &[i]) }).await;
                assert!(got.unwrap().data.unwrap().iter().all(|b| *b == i));
            })
        })
        .collect();
    for one in calls {
        one.await.unwrap();
    }
    until("the server's memory comes back", || pool.in_use() == 0).await;
}

#[tokio::test]
async fn a_server_that_comes_back_is_found_again() {
    let service = TestService::new();
    let server = start(service.clone());
    let (addr, peer) = (server.addr, server.peer.clone());
    let client = Client::new(identity(1));
    assert!(client.call(&peer, call(ECHO, b"1")).await.is_ok());
    server.stop().await;
    let error = loop {
        // The end of the old connection may be noticed before, during or after the first call.
        match client.call(&peer, call(ECHO, b"2")).await {
            Err(error) if error.kind() == ErrorKind::Disconnected => {}
            Err(error) => break error,
            Ok(_) => panic!("answered by a server that is gone"),
        }
    };
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let server = start_at(addr, service, ServerOptions::default());
    assert!(client.call(&peer, call(ECHO, b"3")).await.is_ok());
    assert_eq!(client.stats().connections, 2);
    server.stop().await;
}

#[tokio::test]
async fn a_stopping_server_answers_what_is_in_flight() {
    let service = TestService::new();
    let server = start(service.clone());
    let client = Client::new(identity(1));
    let (other, peer) = (client.clone(), server.peer.clone());
    let pending = tokio::spawn(async move { other.call(&peer, call(GATED, b"late")).await });
    let _ = service.entered.acquire().await.unwrap();
    server.stop.cancel();
    service.gate.add_permits(1);
    assert_eq!(pending.await.unwrap().unwrap().head, "late".as_bytes());
    server.task.await.unwrap();
}

#[tokio::test]
async fn a_timed_out_calls_buffer_is_quarantined_until_the_late_answer_came() {
    let service = TestService::new();
    let server = start(service.clone());
    // A pool of exactly one buffer: whoever gets memory gets this memory.
    let options = ClientOptions { pool_bytes: 8192, ..Default::default() };
    let client = Client::with_options(identity(1), options);
    // Connected first: the short time is for the answer alone.
    client.call(&server.peer, call(ECHO, b"")).await.unwrap();
    let recv = client.pool().try_alloc(8192).unwrap();
    let address = recv.as_ptr() as usize;
    let late = Call { recv: Some(recv), timeout: SHORT, ..call(GATED, &[0xAB]) };
    let error = client.call(&server.peer, late).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert_eq!(client.quarantined_bytes(), 8192);
    assert!(client.pool().try_alloc(1).is_none(), "the memory is not handed out again");
    // Other calls go on meanwhile on the same connection.
    assert!(client.call(&server.peer, call(ECHO, b"x")).await.is_ok());
    assert!(client.pool().try_alloc(1).is_none());
    service.gate.add_permits(1);
    until("the late answer frees the buffer", || client.quarantined_bytes() == 0).await;
    let again = client.pool().alloc(8192).await;
    // The control: the late answer did write to this very memory. Had the pool handed it out after
    // the timeout, its new owner's bytes would be these.
    assert_eq!(again.as_ptr() as usize, address);
    assert!(again.iter().all(|b| *b == 0xAB));
    assert_eq!(client.stats().connections, 1);
}

#[tokio::test]
async fn a_dropped_calls_buffer_is_quarantined_until_the_connection_is_destroyed() {
    let service = TestService::new();
    let server = start(service.clone());
    let options = ClientOptions { pool_bytes: 4096, ..Default::default() };
    let client = Client::with_options(identity(1), options);
    let recv = client.pool().try_alloc(4096);
    let (other, peer) = (client.clone(), server.peer.clone());
    let task = tokio::spawn(async move { other.call(&peer, Call { recv, ..call(GATED, b"") }).await });
    let _ = service.entered.acquire().await.unwrap();
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
    assert_eq!(client.quarantined_bytes(), 4096);
    assert!(client.pool().try_alloc(1).is_none());
    client.disconnect(&server.peer);
    // In line until the connection's tasks are gone.
    let freed = tokio::time::timeout(LONG, client.pool().alloc(1)).await;
    assert!(freed.is_ok());
}

#[tokio::test]
async fn a_peer_that_leaves_too_many_calls_unanswered_loses_the_connection() {
    let service = TestService::new();
    let server = start(service.clone());
    let client = Client::new(identity(1));
    client.call(&server.peer, call(ECHO, b"")).await.unwrap();
    let calls: Vec<_> = (0..connection::MAX_QUARANTINED)
        .map(|_| {
            let (client, peer) = (client.clone(), server.peer.clone());
            let recv = client.pool().try_alloc(4096);
            tokio::spawn(async move {
                client.call(&peer, Call { recv, timeout: SHORT, ..call(GATED, b"") }).await
            })
        })
        .collect();
    for one in calls {
        let error = one.await.unwrap().unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Disconnected), "{error}");
    }
    until("their buffers come free", || client.pool().in_use() == 0).await;
    assert!(client.call(&server.peer, call(ECHO, b"")).await.is_ok());
    assert_eq!(client.stats().connections, 2);
}

#[tokio::test]
async fn dropping_the_client_closes_its_connections() {
    let server = start(TestService::new());
    let client = Client::new(identity(1));
    let pool = client.pool().clone();
    let recv = pool.try_alloc(4096);
    client.call(&server.peer, Call { recv, ..call(ECHO, b"") }).await.unwrap();
    drop(client);
    // The server returns from `run` only when no connection is left, well within its drain time.
    until("nothing is held", || pool.in_use() == 0).await;
    server.stop().await;
}

/// Random calls in random order against a model: what was sent comes back, memory returns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_traffic_keeps_every_byte() {
    use rand::{RngExt, SeedableRng};
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let service = TestService::new();
    let options = ServerOptions { pool: BufPool::new(4 << 20), ..Default::default() };
    let server = start_at("127.0.0.1:0".parse().unwrap(), service, options);
    let client =
        Client::with_options(identity(1), ClientOptions { pool_bytes: 8 << 20, ..Default::default() });
    let outcomes = Arc::new(Mutex::new(HashMap::<&str, usize>::new()));
    let tasks: Vec<_> = (0..8u64)
        .map(|task| {
            let (client, peer, outcomes) = (client.clone(), server.peer.clone(), outcomes.clone());
            tokio::spawn(async move {
                let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed ^ task);
                for _ in 0..150 {
                    let len = if rng.random_bool(0.5) {
                        rng.random_range(0..2000)
                    } else {
                        rng.random_range(0..300_000)
                    };
                    let mut send = client.pool().alloc(len).await;
                    let byte: u8 = rng.random();
                    send.fill(byte);
                    let room = rng.random_range(0..300_000);
                    let recv = client.pool().try_alloc(room);
                    let capacity = recv.as_ref().map_or(0, |r| r.capacity());
                    let head = vec![byte; rng.random_range(0..1500)];
                    // Some give up at once: their buffers are quarantined in mid-traffic.
                    let timeout = if rng.random_bool(0.1) { Duration::from_micros(300) } else { LONG };
                    let send = (len > 0).then(|| send.freeze());
                    let got = client.call(&peer, Call { send, recv, timeout, ..call(ECHO, &head) }).await;
                    let outcome = match got {
                        Ok(got) => {
                            assert_eq!(got.head, head);
                            let data = got.data.as_deref().unwrap_or_default();
                            assert!(data.len() == len && data.iter().all(|b| *b == byte));
                            "ok"
                        }
                        Err(e) if e.kind() == ErrorKind::Timeout && timeout < LONG => "timeout",
                        Err(e) if e.kind() == ErrorKind::TooLarge && len > capacity => "too large",
                        Err(e) => panic!("{e}"),
                    };
                    *outcomes.lock().unwrap().entry(outcome).or_default() += 1;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let seen = outcomes.lock().unwrap().clone();
    assert!(seen["ok"] > 100 && seen["too large"] > 10, "{seen:?}");
    until("all memory comes back", || client.pool().in_use() == 0).await;
    assert_eq!(client.stats().connections, 3, "no connection was lost: one for small calls, two for bulk");
}

/// RPC as it is written, over any carrier. Returns the number of steps that held.
pub(crate) async fn rpc_contract(
    (ct, cr): (impl LinkTx, impl LinkRx),
    server: (impl LinkTx, impl LinkRx),
) -> usize {
    let service = TestService::new();
    let (stop, theirs) = (CancellationToken::new(), service.clone());
    let serving = tokio::spawn({
        let stop = stop.clone();
        async move { server::serve_link(theirs, identity(1), server, "127.0.0.1:0", stop).await }
    });
    let connection =
        connection::Connection::start(ct, cr, Arc::default(), Some(incast::Incast::new(64 << 20)));
    let ask = async |call: Call| connection.call(call).await;
    let mut steps = 0;

    // Payloads pulled and pushed, heads longer than a SEND.
    let pool = BufPool::new(32 << 20);
    for (head, len) in [(0, 0), (100, 1), (9000, 4096), (0, 300_000), (200_000, (1 << 20) + 5)] {
        let head = vec![7; head];
        let mut send = pool.alloc(len).await;
        for (i, b) in send.iter_mut().enumerate() {
            *b = (i * 13 + len) as u8;
        }
        let send = send.freeze();
        let recv = pool.try_alloc(len);
        let call = Call { send: Some(send.clone()), recv, ..call(ECHO, &head) };
        let Ok(got) = ask(call).await else { panic!("refused") };
        assert!(got.head == head && *got.data.unwrap() == *send);
        steps += 1;
    }

    // Several in flight, answered in another order than asked.
    let calls = (0..40u8).map(|i| {
        let recv = pool.try_alloc(3000);
        ask(Call { recv, ..call(if i % 4 == 0 { GATED } else { FILL }, &[i]) })
    });
    let open = async {
        let _ = service.entered.acquire_many(10).await.unwrap();
        service.gate.add_permits(10);
    };
    let (answers, ()) = tokio::join!(futures::future::join_all(calls), open);
    for (i, got) in answers.into_iter().enumerate() {
        let Ok(got) = got else { panic!("refused") };
        assert!(got.data.unwrap().iter().all(|b| *b == i as u8));
        steps += 1;
    }

    // Errors and limits.
    assert!(ask(call(FAIL, b"")).await.is_err());
    let send = pool.try_alloc(5000).map(BufMut::freeze);
    assert!(ask(Call { send, ..call(FAIL, b"") }).await.is_err(), "a payload that the method does not take");
    assert!(ask(call(ECHO, b"still there")).await.is_ok());
    steps += 3;

    // Quarantine: the late answer lands in memory that nobody else was given.
    let small = BufPool::new(8192);
    let recv = small.try_alloc(8192);
    let address = recv.as_ref().unwrap().as_ptr() as usize;
    let late = tokio::time::timeout(SHORT, ask(Call { recv, ..call(GATED, &[0xAB]) })).await;
    assert!(late.is_err() && connection.quarantined_bytes() == 8192);
    assert!(small.try_alloc(1).is_none());
    assert!(ask(call(ECHO, b"meanwhile")).await.is_ok());
    service.gate.add_permits(1);
    until("the late answer came", || connection.quarantined_bytes() == 0).await;
    let again = small.alloc(8192).await;
    assert!(again.as_ptr() as usize == address && again.iter().all(|b| *b == 0xAB));
    drop(again);
    steps += 4;

    // The end of the link frees what is in flight, and the server notices.
    let recv = small.try_alloc(8192);
    let pending = ask(Call { recv, ..call(GATED, b"") });
    let close = async {
        until("it is in flight", || service.running.load(Ordering::SeqCst) == 1).await;
        connection.close("the test says so");
    };
    let (answer, ()) = tokio::join!(pending, close);
    assert!(matches!(answer, Err(connection::Ended::Lost(reason)) if reason == "the test says so"));
    tokio::time::timeout(LONG, small.alloc(8192)).await.expect("its buffer is free");
    let reason = tokio::time::timeout(LONG, serving).await.expect("the server notices").unwrap();
    assert!(reason.contains("closed"), "{reason}");
    steps + 3
}
