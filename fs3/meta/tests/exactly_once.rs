//! Retries, fencing by epochs, and many transactions at once.

mod common;

use common::{Client, ROOT, call, count, in_memory, kind};
use firefly_proto::meta::*;
use firefly_proto::methods::meta as method;
use firefly_store::{Kv, Store, StoreOptions};
use firefly_types::ErrorKind;
use fs3_meta::{Meta, MetaError};
use prost::Message;
use std::sync::Arc;

fn create(client: &mut Client, name: &[u8]) -> Vec<u8> {
    CreateRequest {
        caller: client.next(),
        parent: ROOT,
        name: name.to_vec(),
        kind: InodeKind::File as i32,
        mode: 0o644,
        exclusive: true,
        open_write: true,
        ..Default::default()
    }
    .encode_to_vec()
}

/// The reply is lost and the request comes again: true if it was executed once.
async fn a_retry_happens_once(meta: &Meta) -> bool {
    let mut client = Client::root();
    let request = create(&mut client, b"f");
    let first = meta.handle(method::CREATE, &request).await.unwrap();
    let again = meta.handle(method::CREATE, &request).await;
    let append = |client: &mut Client| {
        let unlink =
            UnlinkRequest { caller: client.next(), parent: ROOT, name: b"f".to_vec(), directory: false };
        unlink.encode_to_vec()
    };
    let unlink = append(&mut client);
    let gone = meta.handle(method::UNLINK, &unlink).await.unwrap();
    let gone_again = meta.handle(method::UNLINK, &unlink).await;
    again == Ok(first) && gone_again == Ok(gone)
}

#[tokio::test]
async fn a_retry_gets_the_first_reply_and_has_no_effect() {
    let (kv, meta) = in_memory().await;
    assert!(a_retry_happens_once(&meta).await);
    assert_eq!((count(kv.as_ref(), b'S'), count(kv.as_ref(), b'R')), (1, 1));
}

#[tokio::test]
async fn negative_control_without_the_records_a_retry_runs_again() {
    let (_, meta) = in_memory().await;
    meta.switch_off_dedupe();
    assert!(!a_retry_happens_once(&meta).await);
}

#[tokio::test]
async fn a_refusal_is_remembered_too() {
    let (_, meta) = in_memory().await;
    let (mut one, mut other) = (Client::new(1, 1, 0), Client::new(2, 1, 0));
    other.create(&meta, ROOT, b"f").await.unwrap();
    let request = create(&mut one, b"f");
    let refused = meta.handle(method::CREATE, &request).await.unwrap_err().to_wire();
    assert_eq!(refused.kind, ErrorKind::AlreadyExists);
    // A duplicate that was held up on its way must not succeed after its client was told "no".
    other.unlink(&meta, ROOT, b"f", false).await.unwrap();
    assert_eq!(meta.handle(method::CREATE, &request).await.unwrap_err().to_wire(), refused);
    assert_eq!(kind(one.lookup(&meta, ROOT, b"f").await), ErrorKind::NotFound);
}

#[tokio::test]
async fn records_survive_the_server_and_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::root();
    let request = create(&mut client, b"f");
    let first = {
        let kv = Store::open(dir.path(), StoreOptions::default()).unwrap();
        common::open(kv, Arc::default()).await.handle(method::CREATE, &request).await.unwrap()
    };
    let kv = Store::open(dir.path(), StoreOptions::default()).unwrap();
    let meta = common::open(kv, Arc::default()).await;
    assert_eq!(meta.handle(method::CREATE, &request).await, Ok(first));
    // Numbers of the earlier server are not given again.
    let old = client.lookup(&meta, ROOT, b"f").await.unwrap();
    let new = client.create(&meta, ROOT, b"g").await.unwrap().inode.unwrap();
    assert!(new.inode_id > old.inode_id && new.data_id > old.data_id);
}

#[tokio::test]
async fn sequences_only_go_up_and_belong_to_one_method() {
    let (_, meta) = in_memory().await;
    let mut client = Client::root();
    let (early, late) = (create(&mut client, b"early"), create(&mut client, b"late"));
    meta.handle(method::CREATE, &late).await.unwrap();
    assert_eq!(kind(meta.handle(method::CREATE, &early).await), ErrorKind::Stale);
    let reused =
        UnlinkRequest { caller: client.same(), parent: ROOT, name: b"late".to_vec(), directory: false };
    assert_eq!(kind(meta.handle(method::UNLINK, &reused.encode_to_vec()).await), ErrorKind::InvalidArgument);
    // Another lane of the same client counts for itself.
    let mut lane = Client::new(1, 2, 0);
    lane.create(&meta, ROOT, b"early").await.unwrap();
    // A gap is a request that was given up before it was sent.
    lane.caller.sequence += 10;
    lane.create(&meta, ROOT, b"gap").await.unwrap();
}

#[tokio::test]
async fn an_older_session_epoch_is_refused() {
    let (_, meta) = in_memory().await;
    let mut old = Client::root();
    old.create(&meta, ROOT, b"f").await.unwrap();
    let retry = create(&mut old, b"g");
    let first = meta.handle(method::CREATE, &retry).await.unwrap();
    let mut new = old.clone();
    new.caller.session_epoch = 5;
    // A retry under the new session is still the same request.
    let mut again = CreateRequest::decode(retry.as_slice()).unwrap();
    again.caller.as_mut().unwrap().session_epoch = 5;
    assert_eq!(meta.handle(method::CREATE, &again.encode_to_vec()).await, Ok(first));
    new.create(&meta, ROOT, b"h").await.unwrap();
    assert_eq!(kind(old.create(&meta, ROOT, b"i").await), ErrorKind::Stale);
    assert_eq!(kind(old.getattr(&meta, ROOT).await), ErrorKind::Stale);
    assert_eq!(kind(old.lookup(&meta, ROOT, b"f").await), ErrorKind::Stale);
    // Other clients have their own epochs.
    Client::new(2, 1, 0).getattr(&meta, ROOT).await.unwrap();
}

#[tokio::test]
async fn an_older_attempt_of_a_job_is_refused() {
    let (_, meta) = in_memory().await;
    let with = |client: u64, attempt: u32| {
        let mut c = Client::new(client, 1, 0);
        (c.caller.job_id, c.caller.attempt_epoch) = (7, attempt);
        c
    };
    let (mut first, mut second) = (with(1, 1), with(2, 2));
    first.create(&meta, ROOT, b"f").await.unwrap();
    second.create(&meta, ROOT, b"g").await.unwrap();
    let refused = first.create(&meta, ROOT, b"h").await;
    assert!(matches!(refused, Err(MetaError::StaleAttempt { job: 7, got: 1, known: 2 })), "{refused:?}");
    assert_eq!(kind(first.getattr(&meta, ROOT).await), ErrorKind::Stale);
    // Clients outside jobs, and other jobs, are not concerned.
    Client::new(3, 1, 0).create(&meta, ROOT, b"i").await.unwrap();
    let mut other = with(4, 1);
    other.caller.job_id = 8;
    other.create(&meta, ROOT, b"j").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_make_names_in_one_directory_without_conflicts() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
    let meta = common::open(store.clone(), Arc::default()).await;
    let before = store.stats();
    let tasks: Vec<_> = (0..16u32)
        .map(|n| {
            let meta = meta.clone();
            tokio::spawn(async move {
                let mut client = Client::new(1 + u64::from(n % 4), n + 1, 0);
                for i in 0..20 {
                    client.create(&meta, ROOT, format!("{n}.{i}").as_bytes()).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let root = Client::root();
    assert_eq!(root.names(&meta, ROOT, 7).await.unwrap().len(), 320);
    assert_eq!(root.statfs(&meta).await.inodes, 321);
    let after = store.stats();
    // The first use of a client's record is shared by its lanes, so a few conflicts at the start.
    assert!(after.conflicts - before.conflicts <= 16, "{after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_many_wins_a_name_and_counts_stay_right() {
    let (kv, meta) = in_memory().await;
    let tasks: Vec<_> = (0..12u32)
        .map(|n| {
            let meta = meta.clone();
            tokio::spawn(async move {
                let mut client = Client::new(u64::from(n) + 1, 1, 0);
                let mut won = 0;
                for i in 0..20 {
                    let name = format!("{i}");
                    won += u32::from(client.mkdir(&meta, ROOT, name.as_bytes()).await.is_ok());
                    // Linking, renaming and removing the same few names from all sides.
                    let _ = client.rename(&meta, (ROOT, name.as_bytes()), (ROOT, b"x"), 0).await;
                    let _ = client.unlink(&meta, ROOT, b"x", true).await;
                    let _ = client.create(&meta, ROOT, b"file").await;
                    let _ = client.rename(&meta, (ROOT, b"file"), (ROOT, b"moved"), 0).await;
                }
                won
            })
        })
        .collect();
    let mut won = 0;
    for task in tasks {
        won += task.await.unwrap();
    }
    assert!(won >= 20);
    let root = Client::root();
    let names = root.names(&meta, ROOT, 0).await.unwrap();
    let mut dirs = 0;
    for (_, id) in &names {
        let inode = root.getattr(&meta, *id).await.unwrap();
        dirs += u32::from(inode.kind() == InodeKind::Directory);
        assert_eq!(inode.nlink, if inode.kind() == InodeKind::Directory { 2 } else { 1 });
    }
    assert_eq!(root.getattr(&meta, ROOT).await.unwrap().nlink, 2 + dirs);
    assert_eq!(root.statfs(&meta).await.inodes as usize, names.len() + 1);
    assert_eq!(common::stored_inodes(kv.as_ref()).len(), names.len() + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rename_is_atomic_for_lookups() {
    let (_, meta) = in_memory().await;
    let mut root = Client::root();
    root.create(&meta, ROOT, b"a").await.unwrap();
    root.create(&meta, ROOT, b"b").await.unwrap();
    let (a, b) =
        (root.lookup(&meta, ROOT, b"a").await.unwrap(), root.lookup(&meta, ROOT, b"b").await.unwrap());
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let watchers: Vec<_> = (0..2)
        .map(|n| {
            let (meta, done, ids) = (meta.clone(), done.clone(), [a.inode_id, b.inode_id]);
            tokio::spawn(async move {
                let client = Client::new(10 + n, 1, 0);
                let mut seen = 0;
                while !done.load(std::sync::atomic::Ordering::SeqCst) || seen < 100 {
                    // The name is always there, and a listing always has both files.
                    let found = client.lookup(&meta, ROOT, b"a").await.unwrap().inode_id;
                    assert!(ids.contains(&found));
                    let names = client.names(&meta, ROOT, 0).await.unwrap();
                    let mut listed: Vec<u64> = names.iter().map(|(_, id)| *id).collect();
                    listed.sort_unstable();
                    assert_eq!(listed, ids, "{names:?}");
                    seen += 1;
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for _ in 0..300 {
        root.rename(&meta, (ROOT, b"a"), (ROOT, b"b"), 2).await.unwrap();
        tokio::task::yield_now().await;
    }
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    for watcher in watchers {
        watcher.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_renames_never_close_a_loop() {
    for round in 0..30 {
        let (_, meta) = in_memory().await;
        let mut root = Client::root();
        let a = root.mkdir(&meta, ROOT, b"a").await.unwrap();
        let b = root.mkdir(&meta, ROOT, b"b").await.unwrap();
        let move_into = |client: u64, name: &'static [u8], into: u64| {
            let meta = meta.clone();
            tokio::spawn(async move {
                let mut client = Client::new(client, 1, 0);
                client.rename(&meta, (ROOT, name), (into, name), 0).await
            })
        };
        let (one, two) = (move_into(2, b"a", b), move_into(3, b"b", a));
        let won = [one.await.unwrap().is_ok(), two.await.unwrap().is_ok()];
        assert_eq!(won.iter().filter(|w| **w).count(), 1, "round {round}: {won:?}");
        let reachable = root.names(&meta, ROOT, 0).await.unwrap();
        assert_eq!(reachable.len(), 1, "round {round}");
        assert_eq!(root.getattr(&meta, ROOT).await.unwrap().nlink, 3);
    }
}

#[tokio::test]
async fn statfs_and_the_gate_read_nothing_into_being() {
    let (kv, meta) = in_memory().await;
    let client = Client::new(9, 9, 0);
    let _: StatFsReply =
        call(&meta, method::STAT_FS, &StatFsRequest { caller: client.same() }).await.unwrap();
    assert_eq!((count(kv.as_ref(), b'C'), count(kv.as_ref(), b'R')), (0, 0));
    assert!(kv.begin().snapshot_get(b"mC").unwrap().is_none());
}
