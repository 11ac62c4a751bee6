//! A peer whose host is gone without a word, as by power or cable: in a network namespace whose
//! cable the test pulls. Needs root and iproute2, and says so loudly where they lack.

use super::tests::*;
use super::*;
use crate::link::tcp::VANISHED;
use firefly_types::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::process::Command;

/// A second host, reached by a cable.
struct OtherHost {
    name: String,
    address: String,
}

fn ip(args: &[&str]) -> Result<(), String> {
    let out = Command::new("ip").args(args).output().map_err(|e| e.to_string())?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim()))
}

impl OtherHost {
    fn new() -> Result<OtherHost, String> {
        let id = std::process::id();
        let (name, net) = (format!("ffvanish{}", id % 100_000), id % 254);
        let (near, far) = (format!("ffv{}a", id % 100_000), format!("ffv{}b", id % 100_000));
        let (ours, theirs) = (format!("10.213.{net}.1/30"), format!("10.213.{net}.2/30"));
        ip(&["netns", "add", &name])?;
        let me = OtherHost { name, address: format!("10.213.{net}.2:0") };
        ip(&["link", "add", &near, "type", "veth", "peer", "name", &far, "netns", &me.name])?;
        ip(&["addr", "add", &ours, "dev", &near])?;
        ip(&["link", "set", &near, "up"])?;
        ip(&["-n", &me.name, "addr", "add", &theirs, "dev", &far])?;
        ip(&["-n", &me.name, "link", "set", &far, "up"])?;
        Ok(me)
    }

    fn pull_the_cable(&self) {
        let far = self.name.replace("ffvanish", "ffv") + "b";
        ip(&["-n", &self.name, "link", "set", &far, "down"]).unwrap();
    }

    /// Binds a server there: a socket belongs to the namespace that its thread was in.
    fn bind(&self, service: std::sync::Arc<TestService>) -> Server {
        let namespace = std::fs::File::open(format!("/run/netns/{}", self.name)).unwrap();
        let address: SocketAddr = self.address.parse().unwrap();
        let bound = std::thread::spawn(move || {
            // SAFETY: changes the namespace of this thread alone, which ends right after.
            assert_eq!(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
            Server::bind(address, identity(1), service).unwrap()
        });
        bound.join().unwrap()
    }
}

impl Drop for OtherHost {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", &self.name]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_vanishes_is_noticed_idle_and_busy() {
    let host = match OtherHost::new() {
        Ok(host) => host,
        Err(why) => {
            eprintln!("NOT TESTED: a peer whose host vanishes; this needs root and iproute2 ({why})");
            return;
        }
    };
    let service = TestService::new();
    let server = host.bind(service.clone());
    let (peer, stop, stats) = (server.local_addr().to_string(), Default::default(), server.stats());
    let serving = tokio::spawn(server.run(tokio_util::sync::CancellationToken::clone(&stop)));
    let client = Client::with_options(identity(1), ClientOptions { tcp_lanes: 1, ..Default::default() });
    client.call(&peer, call(ECHO, b"")).await.unwrap();
    // One connection has nothing to say, the other is in the middle of payloads both ways.
    let (other, to) = (client.clone(), peer.clone());
    let idle = tokio::spawn(async move { other.call(&to, call(GATED, b"")).await });
    service.entered.acquire().await.unwrap().forget();
    let (other, to) = (client.clone(), peer.clone());
    let busy = tokio::spawn(async move {
        loop {
            let send = other.pool().alloc(4 << 20).await.freeze();
            let recv = Some(other.pool().alloc(4 << 20).await);
            if let Err(error) = other.call(&to, Call { send: Some(send), recv, ..call(ECHO, b"") }).await {
                return error;
            }
        }
    });
    until("it is busy", || stats.get().bytes_received > 16 << 20).await;
    host.pull_the_cable();
    let since = std::time::Instant::now();
    for (what, error) in [("busy", busy.await.unwrap()), ("idle", idle.await.unwrap().unwrap_err())] {
        println!("{what}: noticed after {:?}: {error}", since.elapsed());
        assert_eq!(error.kind(), ErrorKind::Disconnected);
        assert!(error.to_string().contains("has acknowledged nothing for"), "{what}: {error}");
    }
    // The other side notices as well, and keeps nothing for a client that is gone.
    service.gate().add_permits(1);
    stop.cancel();
    serving.await.unwrap();
    assert!(VANISHED < Duration::from_secs(5));
}

/// The control: a peer that is well and reads nothing for longer than that is not given up.
#[tokio::test]
async fn a_host_that_is_only_slow_to_read_is_not_given_up() {
    let service = TestService::new();
    let pool = crate::buf::BufPool::new(1 << 20);
    let options = ServerOptions { pool: pool.clone(), ..Default::default() };
    let server = start_at("127.0.0.1:0".parse().unwrap(), service, options);
    let client = Client::new(identity(1));
    // Without memory the server reads no payload, and its window closes.
    let all = pool.try_alloc(1 << 20).unwrap();
    let (other, peer) = (client.clone(), server.peer.clone());
    let slow = tokio::spawn(async move {
        let send = other.pool().alloc(8 << 20).await.freeze();
        other.call(&peer, Call { send: Some(send), ..call(ECHO, b"") }).await
    });
    until("the path is full", || client.stats().bytes_sent > 100_000).await;
    // What is asserted is that nothing happens: no event tells that the time is over.
    let quiet = tokio::time::timeout(VANISHED + 2 * Duration::from_secs(1), slow);
    assert!(quiet.await.is_err(), "given up");
    assert_eq!(client.peers()[0].connections.len(), 1);
    drop(all);
}
