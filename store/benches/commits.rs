//! Commit and read rates beside what the disk does bare: `cargo bench -p firefly-store`. Numbers of
//! one run are comparable with each other only.

use firefly_store::{Kv, Store, StoreOptions};
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

const TIME: Duration = Duration::from_secs(2);

fn rate(n: usize, since: Instant) -> f64 {
    n as f64 / since.elapsed().as_secs_f64()
}

/// A file that grows by 300 bytes and an fdatasync at a time.
fn bare(dir: &std::path::Path) -> f64 {
    let mut file = std::fs::File::create(dir.join("bare")).expect("a file");
    let (started, mut n) = (Instant::now(), 0);
    while started.elapsed() < TIME {
        file.write_all(&[0; 300]).and_then(|()| file.sync_data()).expect("a sync");
        n += 1;
    }
    rate(n, started)
}

async fn commits(store: &Arc<Store>, clients: usize) -> (f64, f64) {
    let (started, syncs) = (Instant::now(), store.stats().syncs);
    let tasks: Vec<_> = (0..clients)
        .map(|client| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut n = 0usize;
                while started.elapsed() < TIME {
                    let key = format!("{:08x}/{client}", (n * 7919) % 100_000);
                    let mut txn = store.begin();
                    txn.get(key.as_bytes()).expect("a read");
                    txn.put(key.as_bytes(), &[1; 200]);
                    txn.commit().await.expect("a commit");
                    n += 1;
                }
                n
            })
        })
        .collect();
    let mut n = 0;
    for task in tasks {
        n += task.await.expect("a client");
    }
    (rate(n, started), n as f64 / (store.stats().syncs - syncs) as f64)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let dir = tempfile::tempdir_in(".").expect("a folder on the disk under test");
    println!("bare append + fdatasync, one at a time: {:>9.0}/s", bare(dir.path()));
    let store = Store::open(&dir.path().join("store"), StoreOptions::default()).expect("a store");
    for clients in [1, 8, 64, 256] {
        let (rate, batch) = commits(&store, clients).await;
        println!(
            "commits (1 read, 1 put of 200 B), {clients:>3} clients: {rate:>9.0}/s, {batch:.1} per sync"
        );
    }
    let (started, mut n) = (Instant::now(), 0usize);
    while started.elapsed() < TIME {
        let mut txn = store.begin();
        txn.get(format!("{:08x}/0", (n * 7919) % 100_000).as_bytes()).expect("a read");
        n += 1;
    }
    println!("begin + get: {:>9.0}/s", rate(n, started));
    let mut txn = store.begin();
    let (started, mut n) = (Instant::now(), 0usize);
    while started.elapsed() < TIME {
        n += txn.range(format!("{:08x}", (n * 31) % 90_000).as_bytes(), b"z", 100).expect("a scan").len();
        if n.is_multiple_of(4096) {
            txn = store.begin();
        }
    }
    println!("scans of 100: {:>9.0} pairs/s", rate(n, started));
}
