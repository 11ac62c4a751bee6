//! How long files and their data live: sessions, unlinked files that are open, truncates,
//! published lengths, the garbage worker, clients that are not heard of any more.

mod common;

use common::{Client, HandClock, ROOT, call, count, garbage, in_memory, kind};
use firefly_proto::meta::*;
use firefly_proto::methods::meta as method;
use firefly_store::{Kv, MemKv};
use firefly_types::{DataId, ErrorKind, Generation};
use fs3_meta::garbage::{ChunkRemover, Pass};
use fs3_meta::schema::FileLayout;
use fs3_meta::{Meta, MetaError};
use futures::future::BoxFuture;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Storage servers that remember what they were told to remove.
#[derive(Default)]
struct FakeChunks {
    removed: Mutex<BTreeSet<(u64, u32)>>,
    /// Data whose chains are down.
    down: Mutex<BTreeSet<u64>>,
}

impl ChunkRemover for FakeChunks {
    fn remove<'a>(
        &'a self,
        data: DataId,
        generation: Generation,
        layout: &'a FileLayout,
    ) -> BoxFuture<'a, Result<u64, String>> {
        Box::pin(async move {
            assert_eq!((layout.chunk_bytes, layout.chains.len()), (1 << 20, 3));
            if self.down.lock().unwrap().contains(&data.0) {
                return Err("its chain is down".into());
            }
            self.removed.lock().unwrap().insert((data.0, generation.0));
            Ok(1)
        })
    }
}

async fn open_file(meta: &Meta, client: &mut Client, name: &[u8]) -> (Inode, u64) {
    let request = CreateRequest {
        caller: client.next(),
        parent: ROOT,
        name: name.to_vec(),
        kind: InodeKind::File as i32,
        mode: 0o644,
        exclusive: true,
        open_write: true,
        ..Default::default()
    };
    let reply: CreateReply = call(meta, method::CREATE, &request).await.unwrap();
    (reply.inode.unwrap(), reply.session)
}

async fn sync(
    meta: &Meta,
    client: &mut Client,
    inode_id: u64,
    length: u64,
    version: Option<u64>,
) -> Result<Inode, MetaError> {
    let request = SyncRequest {
        caller: client.next(),
        inode_id,
        length: Some(length),
        mtime: None,
        truncate_version: version,
    };
    Ok(call::<_, InodeReply>(meta, method::SYNC, &request).await?.inode.unwrap())
}

fn cut(inode_id: u64, length: u64) -> SetAttrRequest {
    SetAttrRequest { inode_id, length: Some(length), ..Default::default() }
}

#[tokio::test]
async fn an_unlinked_file_lives_as_long_as_anybody_has_it_open() {
    let (kv, meta) = in_memory().await;
    let (mut writer, mut reader) = (Client::new(1, 1, 0), Client::new(2, 1, 0));
    let (file, write) = open_file(&meta, &mut writer, b"f").await;
    let read = reader.open(&meta, file.inode_id, false).await.unwrap().session;
    writer.unlink(&meta, ROOT, b"f", false).await.unwrap();
    assert_eq!(reader.getattr(&meta, file.inode_id).await.unwrap().nlink, 0);
    assert_eq!(kind(reader.lookup(&meta, ROOT, b"f").await), ErrorKind::NotFound);
    assert_eq!(kind(reader.link(&meta, file.inode_id, ROOT, b"g").await), ErrorKind::NotFound);
    writer.close(&meta, file.inode_id, write, Some(100)).await.unwrap();
    assert!(garbage(kv.as_ref()).is_empty(), "a reader still has it open");
    assert_eq!(reader.getattr(&meta, file.inode_id).await.unwrap().length, 100);
    reader.close(&meta, file.inode_id, read, None).await.unwrap();
    assert_eq!(garbage(kv.as_ref()), BTreeSet::from([(file.data_id, 0)]));
    assert_eq!(kind(reader.getattr(&meta, file.inode_id).await), ErrorKind::NotFound);
    assert_eq!(reader.statfs(&meta).await, StatFsReply { inodes: 1, logical_bytes: 0 });
}

#[tokio::test]
async fn a_file_that_is_renamed_over_goes_when_it_is_closed() {
    let (kv, meta) = in_memory().await;
    let mut client = Client::root();
    let (old, session) = open_file(&meta, &mut client, b"old").await;
    let (new, other) = open_file(&meta, &mut client, b"new").await;
    client.close(&meta, new.inode_id, other, None).await.unwrap();
    client.rename(&meta, (ROOT, b"new"), (ROOT, b"old"), 0).await.unwrap();
    assert_eq!(client.lookup(&meta, ROOT, b"old").await.unwrap().inode_id, new.inode_id);
    assert!(garbage(kv.as_ref()).is_empty());
    client.close(&meta, old.inode_id, session, None).await.unwrap();
    assert_eq!(garbage(kv.as_ref()), BTreeSet::from([(old.data_id, 0)]));
}

#[tokio::test]
async fn a_published_length_only_grows_unless_the_file_was_cut_in_between() {
    let (_, meta) = in_memory().await;
    let (mut one, mut two) = (Client::new(1, 1, 0), Client::new(2, 1, 0));
    let (file, session) = open_file(&meta, &mut one, b"f").await;
    let id = file.inode_id;
    let other = two.open(&meta, id, true).await.unwrap().session;
    assert_eq!(sync(&meta, &mut one, id, 100, None).await.unwrap().length, 100);
    assert_eq!(sync(&meta, &mut two, id, 60, None).await.unwrap().length, 100);
    // Two cuts; one has not heard of it: what it measured says nothing.
    let cut_inode = two.setattr(&meta, cut(id, 10)).await.unwrap();
    assert_eq!((cut_inode.length, cut_inode.truncate_version), (10, 1));
    assert_eq!(sync(&meta, &mut one, id, 200, None).await.unwrap().length, 10);
    // The reply showed the new version; what is measured under it counts.
    assert_eq!(sync(&meta, &mut one, id, 30, Some(1)).await.unwrap().length, 30);
    // The one who cut knows at once.
    assert_eq!(sync(&meta, &mut two, id, 50, None).await.unwrap().length, 50);
    assert_eq!(two.close(&meta, id, other, Some(70)).await.unwrap().length, 70);
    assert_eq!(one.close(&meta, id, session, Some(500)).await.unwrap().length, 70);
    assert_eq!(one.statfs(&meta).await.logical_bytes, 70);
    // A reader's close publishes nothing.
    let read = two.open(&meta, id, false).await.unwrap().session;
    assert_eq!(two.close(&meta, id, read, Some(900)).await.unwrap().length, 70);
    // Nor does a close of a session that is gone, unless it says what it measured.
    assert_eq!(two.close(&meta, id, read, Some(900)).await.unwrap().length, 70);
}

#[tokio::test]
async fn opening_with_truncate_gives_new_data_and_discards_the_old() {
    let (kv, meta) = in_memory().await;
    let (mut one, mut two) = (Client::new(1, 1, 0), Client::new(2, 1, 0));
    let (file, session) = open_file(&meta, &mut one, b"f").await;
    one.close(&meta, file.inode_id, session, Some(4096)).await.unwrap();
    let late = two.open(&meta, file.inode_id, true).await.unwrap().session;
    let request = OpenRequest {
        caller: one.next(),
        inode_id: file.inode_id,
        write: true,
        truncate: true,
        ..Default::default()
    };
    let reply: OpenReply = call(&meta, method::OPEN, &request).await.unwrap();
    let inode = reply.inode.unwrap();
    assert_eq!((inode.data_id, inode.generation, inode.length), (file.data_id, 1, 0));
    assert_eq!(garbage(kv.as_ref()), BTreeSet::from([(file.data_id, 0)]));
    assert_eq!(two.close(&meta, file.inode_id, late, Some(9999)).await.unwrap().length, 0);
    assert_eq!(one.close(&meta, file.inode_id, reply.session, Some(5)).await.unwrap().length, 5);
}

#[tokio::test]
async fn an_open_file_may_be_cut_whatever_its_mode_says() {
    let (_, meta) = in_memory().await;
    let (mut user, mut other) = (Client::new(1, 1, 1000), Client::new(2, 1, 1001));
    let (file, session) = open_file(&meta, &mut user, b"f").await;
    let id = file.inode_id;
    user.setattr(&meta, SetAttrRequest { inode_id: id, mode: Some(0o444), ..Default::default() })
        .await
        .unwrap();
    user.setattr(&meta, cut(id, 7)).await.unwrap();
    assert_eq!(kind(other.setattr(&meta, cut(id, 8)).await), ErrorKind::AccessDenied);
    assert_eq!(kind(other.close(&meta, id, session, None).await), ErrorKind::PermissionDenied);
    user.close(&meta, id, session, None).await.unwrap();
    assert_eq!(kind(user.setattr(&meta, cut(id, 8)).await), ErrorKind::AccessDenied);
}

#[tokio::test]
async fn the_garbage_worker_removes_exactly_what_has_no_reference() {
    let kv = Arc::new(MemKv::new());
    let clock = Arc::new(HandClock::default());
    let meta = common::open(kv.clone(), clock.clone()).await;
    let mut client = Client::root();
    let mut files = Vec::new();
    for n in 0..40 {
        let (file, session) = open_file(&meta, &mut client, format!("{n}").as_bytes()).await;
        if n % 4 != 3 {
            client.close(&meta, file.inode_id, session, Some(1)).await.unwrap();
        }
        files.push(file.data_id);
    }
    // Every second one goes; of those, some are still open.
    for n in (1..40).step_by(2) {
        client.unlink(&meta, ROOT, format!("{n}").as_bytes(), false).await.unwrap();
    }
    let gone: BTreeSet<_> = (1..40).step_by(4).map(|n| (files[n], 0)).collect();
    let chunks = FakeChunks::default();
    let age = Duration::from_secs(5);
    let pass = meta.collect_garbage(&chunks, age).await.unwrap();
    assert_eq!(pass, Pass { young: 10, ..Default::default() });
    clock.set(6_000_000_000);
    chunks.down.lock().unwrap().extend([files[1], files[5]]);
    let pass = meta.collect_garbage(&chunks, age).await.unwrap();
    assert_eq!((pass.removed, pass.failed), (8, 2));
    assert_eq!(garbage(kv.as_ref()), BTreeSet::from([(files[1], 0), (files[5], 0)]));
    // A new server goes on with what is left.
    let meta = common::open(kv.clone(), clock.clone()).await;
    chunks.down.lock().unwrap().clear();
    assert_eq!(meta.collect_garbage(&chunks, age).await.unwrap().removed, 2);
    assert_eq!(*chunks.removed.lock().unwrap(), gone);
    assert_eq!(meta.garbage_length(10).unwrap(), 0);
}

#[tokio::test]
async fn a_client_that_is_not_heard_of_loses_its_sessions() {
    let (kv, meta) = in_memory().await;
    let (mut lost, mut alive) = (Client::new(1, 1, 0), Client::new(2, 1, 0));
    let mut unlinked = Vec::new();
    for n in 0..100 {
        let (file, _) = open_file(&meta, &mut lost, format!("{n}").as_bytes()).await;
        if n % 2 == 0 {
            lost.unlink(&meta, ROOT, format!("{n}").as_bytes(), false).await.unwrap();
            unlinked.push((file.data_id, 0));
        }
    }
    let (kept, _) = open_file(&meta, &mut alive, b"kept").await;
    alive.unlink(&meta, ROOT, b"kept", false).await.unwrap();
    let before = alive.statfs(&meta).await;
    assert_eq!(meta.expire_clients(Duration::from_secs(3600)).await.unwrap(), 0);
    assert_eq!(count(kv.as_ref(), b'S'), 101);

    // A new server has heard of nobody yet; the living one speaks, the other does not.
    let clock = Arc::new(HandClock::default());
    clock.set(1_000_000_000);
    let meta = common::open(kv.clone(), clock.clone()).await;
    let silence = Duration::from_secs(60);
    assert_eq!(meta.expire_clients(silence).await.unwrap(), 0);
    clock.set(60_000_000_000);
    alive.getattr(&meta, ROOT).await.unwrap();
    assert_eq!(meta.expire_clients(silence).await.unwrap(), 0);
    clock.set(62_000_000_000);
    assert_eq!(meta.expire_clients(silence).await.unwrap(), 1);
    assert_eq!(garbage(kv.as_ref()), unlinked.into_iter().collect());
    assert_eq!((count(kv.as_ref(), b'S'), count(kv.as_ref(), b'K'), count(kv.as_ref(), b'R')), (1, 1, 1));
    assert_eq!(alive.getattr(&meta, kept.inode_id).await.unwrap().nlink, 0);
    assert_eq!(alive.statfs(&meta).await.inodes, before.inodes - 50);
    // It comes back: under its old session it is refused, under a new one it begins anew.
    assert_eq!(kind(lost.create(&meta, ROOT, b"x").await), ErrorKind::Stale);
    lost.caller.session_epoch += 1;
    lost.create(&meta, ROOT, b"x").await.unwrap();
    assert_eq!(lost.names(&meta, ROOT, 0).await.unwrap().len(), 51);
}

#[tokio::test]
async fn links_have_a_limit() {
    let (kv, meta) = in_memory().await;
    let mut root = Client::root();
    let file = root.create(&meta, ROOT, b"f").await.unwrap().inode.unwrap();
    let key = fs3_meta::schema::keys::inode(common::id(file.inode_id));
    let mut tx = kv.begin();
    let bytes = tx.get(&key).unwrap().unwrap();
    let mut record = fs3_meta::schema::InodeRecord::decode(common::id(file.inode_id), &bytes).unwrap();
    record.nlink = fs3_meta::limits::MAX_LINKS - 1;
    tx.put(&key, &record.encode());
    tx.commit().await.unwrap();
    root.link(&meta, file.inode_id, ROOT, b"last").await.unwrap();
    assert_eq!(kind(root.link(&meta, file.inode_id, ROOT, b"more").await), ErrorKind::TooManyLinks);
}

#[tokio::test]
async fn a_directory_says_how_its_new_files_are_laid_out() {
    let (_, meta) = in_memory().await;
    let mut root = Client::root();
    let dir = root.mkdir(&meta, ROOT, b"d").await.unwrap();
    root.setxattr(&meta, dir, b"fs3.layout", b"chunk=4MiB stripe=2", 0).await.unwrap();
    assert_eq!(root.getxattr(&meta, dir, b"fs3.layout").await.unwrap(), b"chunk=4MiB stripe=2");
    assert_eq!(root.listxattr(&meta, dir).await.unwrap(), [b"fs3.layout".to_vec()]);
    let inside = root.mkdir(&meta, dir, b"inside").await.unwrap();
    let file = root.create(&meta, inside, b"f").await.unwrap().inode.unwrap();
    let layout = file.layout.unwrap();
    assert_eq!((layout.chunk_bytes, layout.chains.len()), (4 << 20, 2));
    for bad in [&b"chunk=5000"[..], b"chunk=1GiB", b"stripe=0", b"stripe=x", b"width=3", b"", b"\xff"] {
        assert_eq!(kind(root.setxattr(&meta, dir, b"fs3.layout", bad, 0).await), ErrorKind::InvalidArgument);
    }
    assert_eq!(
        kind(root.setxattr(&meta, file.inode_id, b"fs3.layout", b"stripe=1", 0).await),
        ErrorKind::Unsupported
    );
    root.removexattr(&meta, dir, b"fs3.layout").await.unwrap();
    let file = root.create(&meta, dir, b"f").await.unwrap().inode.unwrap();
    assert_eq!(file.layout.unwrap().chunk_bytes, 1 << 20);
}

#[tokio::test]
async fn a_listing_keeps_its_place_while_names_come_and_go() {
    let (_, meta) = in_memory().await;
    let mut root = Client::root();
    for n in 0..200 {
        root.create(&meta, ROOT, format!("{n:03}").as_bytes()).await.unwrap();
    }
    let (mut cursor, mut seen, mut end) = (Vec::new(), Vec::new(), false);
    while !end {
        let request = ReadDirRequest {
            caller: root.same(),
            inode_id: ROOT,
            cursor: cursor.clone(),
            limit: 10,
            with_attributes: true,
        };
        let page: ReadDirReply = call(&meta, method::READ_DIR, &request).await.unwrap();
        assert!(page.entries.iter().all(|e| e.inode.as_ref().unwrap().inode_id == e.inode_id));
        assert_eq!(page.parent, ROOT);
        seen.extend(page.entries.iter().map(|e| e.name.clone()));
        let last = page.entries.last().unwrap();
        cursor.clone_from(&last.cursor);
        end = page.end;
        // The name under the cursor goes, one before it comes.
        root.unlink(&meta, ROOT, &last.name, false).await.unwrap();
        root.create(&meta, ROOT, format!("00+{}", seen.len()).as_bytes()).await.unwrap();
    }
    let wanted: Vec<_> = (0..200).map(|n| format!("{n:03}").into_bytes()).collect();
    assert_eq!(seen, wanted);
    // A page is also bounded in bytes: 1024 long names with attributes do not fit one.
    let dir = root.mkdir(&meta, ROOT, b"long").await.unwrap();
    for n in 0..300 {
        root.create(&meta, dir, format!("{n:0255}").as_bytes()).await.unwrap();
    }
    let request =
        ReadDirRequest { caller: root.same(), inode_id: dir, with_attributes: true, ..Default::default() };
    let page: ReadDirReply = call(&meta, method::READ_DIR, &request).await.unwrap();
    assert!(!page.end && page.entries.len() < 300);
    assert!(prost::Message::encoded_len(&page) <= fs3_meta::limits::MAX_READDIR_BYTES);
    assert_eq!(root.names(&meta, dir, 0).await.unwrap().len(), 300);
}
