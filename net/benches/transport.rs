//! What RPC and channels cost over the bare socket, on loopback, each next to its peer in the same
//! run: `cargo bench -p firefly-net`. Prints medians of several rounds and the ratio.

use bytes::Bytes;
use firefly_net::{
    Buf, BufPool, Call, Channel, ChannelListener, ChannelOptions, Client, Completion, Fabric, HEADER_BYTES,
    Identity, Reply, Request, Server, Service, connect_channel,
};
use firefly_types::{ClusterId, ClusterSecret, WireError};
use futures::future::BoxFuture;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

const ROUNDS: usize = 7;
const PINGS: usize = 3000;
const VOLUME: usize = 512 << 20;
const MIB: usize = 1 << 20;

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

fn median(mut round: impl FnMut() -> f64) -> f64 {
    let mut all: Vec<f64> = (0..ROUNDS).map(|_| round()).collect();
    all.sort_by(f64::total_cmp);
    all[ROUNDS / 2]
}

fn micros(since: Instant, n: usize) -> f64 {
    since.elapsed().as_secs_f64() * 1e6 / n as f64
}

fn gigabytes(since: Instant, bytes: usize) -> f64 {
    bytes as f64 / 1e9 / since.elapsed().as_secs_f64()
}

/// A blocking echo of 64 bytes, then a one-way stream: the bare socket.
fn bare() -> (f64, f64) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut s, _) = listener.accept().unwrap();
        s.set_nodelay(true).unwrap();
        let mut small = [0; 64];
        for _ in 0..ROUNDS * PINGS {
            s.read_exact(&mut small).unwrap();
            s.write_all(&small).unwrap();
        }
        let big = vec![1; MIB];
        for _ in 0..ROUNDS {
            s.read_exact(&mut small).unwrap();
            for _ in 0..VOLUME / MIB {
                s.write_all(&big).unwrap();
            }
        }
    });
    let mut s = TcpStream::connect(addr).unwrap();
    s.set_nodelay(true).unwrap();
    let mut small = [0; 64];
    let ping = median(|| {
        let start = Instant::now();
        for _ in 0..PINGS {
            s.write_all(&small).unwrap();
            s.read_exact(&mut small).unwrap();
        }
        micros(start, PINGS)
    });
    let mut big = vec![0; MIB];
    let stream = median(|| {
        s.write_all(&small).unwrap();
        let start = Instant::now();
        for _ in 0..VOLUME / MIB {
            s.read_exact(&mut big).unwrap();
        }
        gigabytes(start, VOLUME)
    });
    server.join().unwrap();
    (ping, stream)
}

fn rpc() -> (f64, f64, f64) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let identity =
        Identity { cluster: ClusterId(1), secret: ClusterSecret::from_bytes([1; 32]), name: "bench".into() };
    let source = BufPool::new(8 * MIB).try_alloc(4 * MIB).unwrap().freeze();
    let server =
        Server::bind("127.0.0.1:0".parse().unwrap(), identity.clone(), Arc::new(Source(source))).unwrap();
    let peer = server.local_addr().to_string();
    let stop = CancellationToken::new();
    let serving = runtime.spawn(server.run(stop.clone()));
    let client = Client::new(identity);
    let call =
        |recv| Call { method: 1, head: Bytes::new(), send: None, recv, timeout: Duration::from_secs(60) };
    let sequential = |len: usize| {
        median(|| {
            let start = Instant::now();
            runtime.block_on(async {
                for _ in 0..PINGS {
                    let recv = if len > 0 { Some(client.pool().alloc(len).await) } else { None };
                    client.call(&peer, call(recv)).await.unwrap();
                }
            });
            micros(start, PINGS)
        })
    };
    let (empty, page) = (sequential(0), sequential(4096));
    let stream = median(|| {
        let start = Instant::now();
        runtime.block_on(async {
            let lanes = (0..4).map(|_| {
                let (client, peer) = (client.clone(), peer.clone());
                runtime.spawn(async move {
                    for _ in 0..VOLUME / MIB / 4 {
                        let recv = Some(client.pool().alloc(MIB).await);
                        client.call(&peer, call(recv)).await.unwrap();
                    }
                })
            });
            for lane in lanes.collect::<Vec<_>>() {
                lane.await.unwrap();
            }
        });
        gigabytes(start, VOLUME)
    });
    stop.cancel();
    runtime.block_on(serving).unwrap();
    (empty, page, stream)
}

/// Waits as a progress thread would and moves what can move.
fn drive(channel: &mut dyn Channel, done: &mut Vec<Completion>) {
    let before = done.len();
    while channel.progress(done).unwrap() {}
    if done.len() > before || channel.peek().unwrap().is_some() {
        return;
    }
    let mut fds = Vec::new();
    channel.poll_fds(&mut fds);
    let events = |writable| libc::POLLIN | if writable { libc::POLLOUT } else { 0 };
    let mut fds: Vec<_> =
        fds.into_iter().map(|(fd, w)| libc::pollfd { fd, events: events(w), revents: 0 }).collect();
    // SAFETY: a live array of its length.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 1000) };
}

fn send(channel: &mut dyn Channel, memory: &[u8]) {
    let mut done = Vec::new();
    // SAFETY: `memory` outlives the loop, which ends when it was sent.
    unsafe { channel.post_send(1, &[0; HEADER_BYTES], memory.as_ptr(), memory.len()).unwrap() };
    channel.progress(&mut done).unwrap();
    while !done.contains(&Completion::Sent { token: 1 }) {
        drive(channel, &mut done);
    }
}

fn receive(channel: &mut dyn Channel, memory: &mut [u8]) {
    let mut done = Vec::new();
    let len = loop {
        match channel.peek().unwrap() {
            Some(next) => break next.len,
            None => drive(channel, &mut done),
        }
    };
    assert!(len <= memory.len());
    // SAFETY: `memory` outlives the loop, which ends when it was filled.
    unsafe { channel.post_recv(2, memory.as_mut_ptr(), len).unwrap() };
    channel.progress(&mut done).unwrap();
    while !done.contains(&Completion::Received { token: 2 }) {
        drive(channel, &mut done);
    }
}

fn channel() -> (f64, f64) {
    let secret = ClusterSecret::from_bytes([1; 32]);
    let options = ChannelOptions { fabric: Fabric::tcp(), sockets: 1 };
    let listener = ChannelListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let (addr, theirs) = (listener.local_addr(), secret.clone());
    let accepting = options.clone();
    let soon = || Instant::now() + Duration::from_secs(10);
    let server = std::thread::spawn(move || {
        let (mut c, _) = listener.accept(&theirs, soon(), &accepting).unwrap();
        let mut small = [0; 64];
        for _ in 0..ROUNDS * PINGS {
            receive(&mut *c, &mut small);
            send(&mut *c, &small);
        }
        let big = vec![1; MIB];
        for _ in 0..ROUNDS {
            receive(&mut *c, &mut small);
            for _ in 0..VOLUME / MIB {
                send(&mut *c, &big);
            }
        }
    });
    let mut c = connect_channel(addr, &secret, [0; 32], soon(), &options).unwrap();
    let mut small = [0; 64];
    let ping = median(|| {
        let start = Instant::now();
        for _ in 0..PINGS {
            send(&mut *c, &small);
            receive(&mut *c, &mut small);
        }
        micros(start, PINGS)
    });
    let mut big = vec![0; MIB];
    let stream = median(|| {
        send(&mut *c, &small);
        let start = Instant::now();
        for _ in 0..VOLUME / MIB {
            receive(&mut *c, &mut big);
        }
        gigabytes(start, VOLUME)
    });
    server.join().unwrap();
    (ping, stream)
}

fn main() {
    let (bare_ping, bare_stream) = bare();
    let (channel_ping, channel_stream) = channel();
    let (empty, page, rpc_stream) = rpc();
    println!("round trip, 64 B    bare socket {bare_ping:6.1} us");
    println!("round trip, 64 B    channel     {channel_ping:6.1} us   {:.2} x", channel_ping / bare_ping);
    println!("call, no payload    rpc         {empty:6.1} us   {:.2} x", empty / bare_ping);
    println!("call, 4 KiB reply   rpc         {page:6.1} us   {:.2} x", page / bare_ping);
    println!("stream, 1 MiB       bare socket {bare_stream:6.2} GB/s");
    println!(
        "stream, 1 MiB       channel     {channel_stream:6.2} GB/s {:.2} x",
        channel_stream / bare_stream
    );
    println!("replies of 1 MiB    rpc         {rpc_stream:6.2} GB/s {:.2} x", rpc_stream / bare_stream);
}
