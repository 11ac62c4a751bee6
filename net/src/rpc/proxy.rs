//! A TCP forwarder between a client and a server of a test, whose connections the test can end and
//! hold. The handshake knows nothing of addresses, so it passes through.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

pub(super) struct Proxy {
    pub(super) peer: String,
    links: Arc<Mutex<Vec<JoinHandle<()>>>>,
    refusing: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Proxy {
    pub(super) async fn to(server: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = listener.local_addr().unwrap().to_string();
        let (links, refusing) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (mine, refuse) = (links.clone(), refusing.clone());
        let task = tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                if refuse.load(Ordering::SeqCst) {
                    continue;
                }
                mine.lock().unwrap().push(tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(server).await else { return };
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                }));
            }
        });
        Proxy { peer, links, refusing, task }
    }

    /// Ends the connection that was made as number `n`, as if its path broke.
    pub(super) fn cut(&self, n: usize) {
        self.links.lock().unwrap()[n].abort();
    }

    /// Whether connections made from now on end at once.
    pub(super) fn refuse(&self, yes: bool) {
        self.refusing.store(yes, Ordering::SeqCst);
    }

    /// Connections forwarded so far.
    pub(super) fn made(&self) -> usize {
        self.links.lock().unwrap().len()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        for link in self.links.lock().unwrap().iter() {
            link.abort();
        }
    }
}
