//! RPC: one client and one server, each in a runtime of its own as in processes of their own.

use crate::{MIB, PINGS, VOLUME, gigabytes, micros};
use bytes::Bytes;
use firefly_net::{
    Buf, BufPool, Call, Client, ClientOptions, Identity, NetStats, Reply, Request, Server, ServerStats,
    Service,
};
use firefly_types::{ClusterId, ClusterSecret, WireError};
use futures::future::BoxFuture;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// Answers with as many bytes as the caller's buffer takes.
struct Source(Buf);

impl Service for Source {
    fn payload_limit(&self, _method: u16) -> usize {
        4 * MIB
    }

    fn handle<'a>(&'a self, request: Request) -> BoxFuture<'a, Result<Reply, WireError>> {
        let data = self.0.slice(..request.reply_capacity);
        Box::pin(async move { Ok(Reply::with_data(Bytes::new(), data)) })
    }
}

pub(crate) struct Pair {
    runtime: Runtime,
    server: Option<Runtime>,
    client: Client,
    peer: String,
    served: ServerStats,
    stop: CancellationToken,
    lanes: usize,
}

fn runtime(workers: usize) -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build().unwrap()
}

fn call(recv: Option<firefly_net::BufMut>, send: Option<Buf>) -> Call {
    Call { method: 1, head: Bytes::new(), send, recv, timeout: Duration::from_secs(60) }
}

impl Pair {
    pub(crate) fn new(workers: usize, lanes: usize) -> Pair {
        let identity = Identity {
            cluster: ClusterId(1),
            secret: ClusterSecret::from_bytes([1; 32]),
            name: "bench".into(),
        };
        let source = BufPool::new(8 * MIB).try_alloc(4 * MIB).unwrap().freeze();
        let at = "127.0.0.1:0".parse().unwrap();
        let server = Server::bind(at, identity.clone(), Arc::new(Source(source))).unwrap();
        let (peer, served, stop) =
            (server.local_addr().to_string(), server.stats(), CancellationToken::new());
        let (runtime, theirs) = (runtime(workers), runtime(workers));
        theirs.spawn(server.run(stop.clone()));
        let options = ClientOptions { tcp_lanes: lanes, ..Default::default() };
        let client = Client::with_options(identity, options);
        Pair { runtime, server: Some(theirs), client, peer, served, stop, lanes }
    }

    /// Microseconds of a call whose reply has `len` bytes of payload, one after the other.
    pub(crate) fn ping(&self, len: usize, in_task: bool) -> f64 {
        let (client, peer) = (self.client.clone(), self.peer.clone());
        let pings = async move {
            let start = Instant::now();
            for _ in 0..PINGS {
                let recv = if len > 0 { Some(client.pool().alloc(len).await) } else { None };
                client.call(&peer, call(recv, None)).await.unwrap();
            }
            micros(start, PINGS)
        };
        match in_task {
            true => self.runtime.block_on(self.runtime.spawn(pings)).unwrap(),
            false => self.runtime.block_on(pings),
        }
    }

    /// Gigabytes a second of payload, in requests or in replies, with so many calls in flight on each lane.
    pub(crate) fn stream(&self, requests: bool, each: usize) -> f64 {
        let callers = each * self.lanes;
        let start = Instant::now();
        self.runtime.block_on(async {
            let one = || {
                let (client, peer) = (self.client.clone(), self.peer.clone());
                self.runtime.spawn(async move {
                    for _ in 0..VOLUME / MIB / callers {
                        let buf = client.pool().alloc(MIB).await;
                        let call =
                            if requests { call(None, Some(buf.freeze())) } else { call(Some(buf), None) };
                        client.call(&peer, call).await.unwrap();
                    }
                })
            };
            for caller in (0..callers).map(|_| one()).collect::<Vec<_>>() {
                caller.await.unwrap();
            }
        });
        gigabytes(start, VOLUME / MIB / callers * callers * MIB)
    }

    pub(crate) fn stats(&self) -> (NetStats, NetStats) {
        (self.client.stats(), self.served.get())
    }

    /// Says what moved since `before`, by which path, and what was copied on the way.
    pub(crate) fn account(&self, before: (NetStats, NetStats)) {
        let (ours, theirs) = self.stats();
        let lanes = self.client.peers().first().map_or(0, |p| p.connections.len());
        let path = self.client.transport(&self.peer).unwrap_or("nothing");
        let copied = |now: NetStats, then: NetStats| {
            let (copied, all) =
                (now.bytes_copied - then.bytes_copied, now.bytes_received - then.bytes_received);
            copied as f64 / all as f64 * 100.0
        };
        println!(
            "    over {path}, {lanes} connections; {} and {} bytes received, {:.2} % and {:.2} % of them copied in user space",
            ours.bytes_received - before.0.bytes_received,
            theirs.bytes_received - before.1.bytes_received,
            copied(ours, before.0),
            copied(theirs, before.1),
        );
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(server) = self.server.take() {
            server.shutdown_background();
        }
    }
}
