//! Faults of servers, as a client must survive them.

mod fakes;

use fakes::{CHUNK, Cluster};
use firefly_types::ErrorKind;
use fs3_client::{Credentials, Durability, Fs3, OpenMode, ROOT};
use std::sync::Arc;

const ME: Credentials = Credentials::ROOT;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8).wrapping_add(seed)).collect()
}

async fn new_file(fs: &Arc<Fs3>, name: &str) -> fs3_client::File {
    let open = OpenMode { write: true, ..OpenMode::default() };
    fs.create(&ME, ROOT, name.as_bytes(), 0o644, true, open).await.unwrap().1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_swallowed_reply_repeats_the_request_and_not_the_update() {
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    let file = new_file(&fs, "once").await;
    cluster.storage.state.lock().unwrap().swallow_replies = 2;
    let data = pattern(1000, 1);
    file.write_at(0, &data, Durability::Direct).await.unwrap();
    {
        let state = cluster.storage.state.lock().unwrap();
        assert_eq!(state.applied.values().copied().collect::<Vec<_>>(), [1]);
        assert_eq!(state.requests, 3);
    }
    assert_eq!(&*file.read_at(0, 2000, false).await.unwrap(), &data[..]);
    assert!(fs.stats().retries >= 2);
    assert!(fs.stats().longest_pause.as_nanos() > 0);
    // The lane goes on with the next number.
    file.write_at(0, b"next", Durability::Direct).await.unwrap();
    assert_eq!(cluster.storage.state.lock().unwrap().applied.values().sum::<u32>(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_create_whose_reply_is_lost_succeeds_once() {
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    cluster.meta.state.lock().unwrap().swallow_replies = 1;
    // Exclusive: a second execution would say that the name exists.
    new_file(&fs, "exclusive").await;
    assert_eq!(cluster.meta.state.lock().unwrap().creates, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn corrupt_bytes_are_fetched_from_another_replica() {
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    let data = pattern(5000, 3);
    fs.write_file(&ME, "/a", &data).await.unwrap();
    cluster.storage.state.lock().unwrap().corrupt_targets.insert(11);
    for _ in 0..4 {
        assert_eq!(fs.read_file(&ME, "/a").await.unwrap(), data);
    }
    assert!(fs.stats().checksum_mismatches > 0, "the spread never asked the corrupt replica");

    // Negative control: without the check the same reads return wrong bytes.
    let careless =
        Fs3::connect(fs3_client::ClientOptions { verify_reads: false, ..cluster.options() }).await.unwrap();
    let mut wrong = 0;
    for _ in 0..4 {
        wrong += u32::from(careless.read_file(&ME, "/a").await.unwrap() != data);
    }
    assert!(wrong > 0);

    // Both bad: an error, never bytes.
    cluster.storage.state.lock().unwrap().corrupt_targets.insert(12);
    assert_eq!(fs.read_file(&ME, "/a").await.unwrap_err().kind(), ErrorKind::Corrupt);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_are_spread_and_a_dirty_replica_sends_them_to_the_tail() {
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    let data = pattern(100, 5);
    fs.write_file(&ME, "/a", &data).await.unwrap();
    for _ in 0..8 {
        assert_eq!(fs.read_file(&ME, "/a").await.unwrap(), data);
    }
    {
        let mut state = cluster.storage.state.lock().unwrap();
        assert!(state.reads_by_target[&11] > 0 && state.reads_by_target[&12] > 0);
        state.dirty_targets.insert(11);
        state.reads_by_target.clear();
    }
    for _ in 0..4 {
        assert_eq!(fs.read_file(&ME, "/a").await.unwrap(), data);
    }
    let state = cluster.storage.state.lock().unwrap();
    assert_eq!(state.reads_by_target[&12], 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_node_pauses_io_until_the_fail_over() {
    let cluster = Arc::new(Cluster::start().await);
    let fs = cluster.connect().await;
    let file = new_file(&fs, "survivor").await;
    let data = pattern(4 * CHUNK as usize, 7);
    file.write_at(0, &data, Durability::Buffered).await.unwrap();
    file.fsync().await.unwrap();

    cluster.kill(3);
    // Reads go on at once from the other node.
    let all = file.read_at(0, data.len(), true).await.unwrap();
    assert_eq!(&*all, &data[..]);

    // A write to the dead head waits: the fail-over happens only after the first try has failed.
    let newer = pattern(4 * CHUNK as usize, 8);
    let before = fs.stats().retries;
    let observed = fs.clone();
    let manager = cluster.clone();
    let fail_over = tokio::spawn(async move {
        while observed.stats().retries == before {
            tokio::task::yield_now().await;
        }
        manager.fail_over(3);
    });
    file.write_at(0, &newer, Durability::Synced).await.unwrap();
    fail_over.await.unwrap();
    assert_eq!(&*file.read_at(0, newer.len(), true).await.unwrap(), &newer[..]);
    assert!(fs.stats().longest_pause.as_nanos() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_background_failure_is_reported_once_to_each_handle() {
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    let first = new_file(&fs, "full").await;
    let open = OpenMode { write: true, ..OpenMode::default() };
    let second = fs.open(&ME, first.inode_id(), open).await.unwrap().1;
    cluster.storage.state.lock().unwrap().fail_updates = Some(ErrorKind::NoSpace);
    first.write_at(0, b"lost", Durability::Buffered).await.unwrap();
    assert_eq!(first.fsync().await.unwrap_err().kind(), ErrorKind::NoSpace);
    first.fsync().await.unwrap();
    assert_eq!(second.write_at(0, b"x", Durability::Buffered).await.unwrap_err().kind(), ErrorKind::NoSpace);
    cluster.storage.state.lock().unwrap().fail_updates = None;
    second.write_at(0, b"kept", Durability::Buffered).await.unwrap();
    second.fsync().await.unwrap();
    // A handle opened after the failure has nothing to report.
    let third = fs.open(&ME, first.inode_id(), open).await.unwrap().1;
    third.flush().await.unwrap();
    assert_eq!(&*third.read_at(0, 10, false).await.unwrap(), b"kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused_with_a_clear_sentence() {
    let cluster = Cluster::start().await;
    let mut options = cluster.options();
    options.identity.secret = firefly_types::ClusterSecret::from_bytes([1; 32]);
    let error = Fs3::connect(options).await.err().expect("a wrong secret");
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    let mut options = cluster.options();
    options.identity.cluster = firefly_types::ClusterId(43);
    let error = Fs3::connect(options).await.err().expect("another cluster");
    assert!(error.to_string().contains("belongs to cluster"), "{error}");
}
