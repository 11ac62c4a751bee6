//! Files against a model: buffering, striping, truncation, holes, several handles and clients.

mod fakes;

use fakes::{CHUNK, Cluster};
use firefly_types::ErrorKind;
use fs3_client::{Credentials, Durability, File, Fs3, OpenMode, ROOT, SetAttr};
use rand::RngExt;
use std::sync::Arc;

const ME: Credentials = Credentials::ROOT;
const WRITE: OpenMode = OpenMode { write: true, read: true, execute: false, truncate: false };

async fn new_file(fs: &Arc<Fs3>, name: &str) -> File {
    fs.create(&ME, ROOT, name.as_bytes(), 0o644, true, WRITE).await.unwrap().1
}

async fn truncate(fs: &Fs3, file: &File, length: u64) {
    let change = SetAttr { length: Some(length), ..SetAttr::default() };
    let attr = fs.setattr(&ME, file.inode_id(), &change).await.unwrap();
    assert_eq!(attr.length, length);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn buffered_bytes_and_length_are_seen_at_once_and_published_at_close() {
    let cluster = Cluster::start().await;
    let (fs, other) = (cluster.connect().await, cluster.connect().await);
    let file = new_file(&fs, "f").await;
    file.write_at(10, b"hello", Durability::Buffered).await.unwrap();
    assert_eq!(cluster.storage.state.lock().unwrap().requests, 0);
    assert_eq!(fs.getattr(file.inode_id()).await.unwrap().length, 15);
    let second = fs.open(&ME, file.inode_id(), OpenMode::default()).await.unwrap().1;
    assert_eq!(&*second.read_at(0, 100, false).await.unwrap(), b"\0\0\0\0\0\0\0\0\0\0hello");
    assert_eq!(other.getattr(file.inode_id()).await.unwrap().length, 0);
    file.flush().await.unwrap();
    assert_eq!(other.read_file(&ME, "/f").await.unwrap(), b"\0\0\0\0\0\0\0\0\0\0hello");
    file.close().await.unwrap();
    second.close().await.unwrap();
    assert!(cluster.meta.state.lock().unwrap().sessions.is_empty());
    assert_eq!(fs.stats().dirty_bytes, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequential_small_writes_become_whole_chunks_on_both_chains() {
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    let file = new_file(&fs, "f").await;
    let mut data = vec![0u8; 8 * CHUNK as usize + 100];
    rand::rng().fill(&mut data[..]);
    for (nth, part) in data.chunks(1000).enumerate() {
        file.write_at(nth as u64 * 1000, part, Durability::Buffered).await.unwrap();
    }
    file.close().await.unwrap();
    {
        let state = cluster.storage.state.lock().unwrap();
        let mut sizes = state.update_sizes.clone();
        sizes.sort_unstable();
        // A chunk's end sends it; what follows is never split further than once.
        assert_eq!(sizes.iter().sum::<u32>() as usize, data.len());
        assert!(sizes.iter().filter(|s| **s == CHUNK).count() >= 6, "{sizes:?}");
        assert!(state.chunks.keys().any(|(t, _)| *t == 11) && state.chunks.keys().any(|(t, _)| *t == 22));
    }
    assert!(fs.read_file(&ME, "/f").await.unwrap() == data);
}

/// Random operations of two handles against a flat model, as fsx does on a mount.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_match_a_flat_model() {
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    let mut rng: rand::rngs::StdRng = rand::SeedableRng::seed_from_u64(seed);
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    let first = new_file(&fs, "f").await;
    let second = fs.open(&ME, first.inode_id(), WRITE).await.unwrap().1;
    let mut model: Vec<u8> = Vec::new();
    const MOST: u64 = 5 * CHUNK as u64;
    for step in 0..1500 {
        let file = if rng.random() { &first } else { &second };
        let offset = rng.random_range(0..MOST);
        let len = rng.random_range(1..=(MOST - offset).min(90_000)) as usize;
        let end = offset as usize + len;
        match rng.random_range(0..20) {
            0..7 => {
                let mut data = vec![0u8; len];
                rng.fill(&mut data[..]);
                let durability = match rng.random_range(0..6) {
                    0 => Durability::Direct,
                    1 => Durability::Synced,
                    _ => Durability::Buffered,
                };
                match file.try_write_at(offset, &data).filter(|_| durability == Durability::Buffered) {
                    Some(result) => result.unwrap(),
                    None => file.write_at(offset, &data, durability).await.unwrap(),
                }
                model.resize(model.len().max(end), 0);
                model[offset as usize..end].copy_from_slice(&data);
            }
            7..14 => {
                // Mostly sequential from some place, so that read-ahead takes part.
                let mut at = offset;
                for _ in 0..rng.random_range(1..4) {
                    let got = file.read_at(at, len, rng.random_range(0..4) == 0).await.unwrap();
                    let from = (at as usize).min(model.len());
                    let to = (at as usize + len).min(model.len());
                    assert!(*got == model[from..to], "step {step}: read {at}+{len} of {}", model.len());
                    at += len as u64;
                }
            }
            14..16 => {
                truncate(&fs, file, offset).await;
                model.resize(offset as usize, 0);
            }
            16 => {
                let keep = rng.random();
                file.zero_range(offset, len as u64, keep).await.unwrap();
                if !keep {
                    model.resize(model.len().max(end), 0);
                }
                let (from, to) = ((offset as usize).min(model.len()), end.min(model.len()));
                model[from..to].fill(0);
            }
            17 => {
                file.extend(end as u64).await.unwrap();
                model.resize(model.len().max(end), 0);
            }
            18 => file.fsync().await.unwrap(),
            _ => {
                let at = file.append(b"tail", Durability::Buffered).await.unwrap();
                assert_eq!(at, model.len() as u64);
                model.extend_from_slice(b"tail");
                if model.len() as u64 > MOST {
                    truncate(&fs, file, MOST / 2).await;
                    model.truncate(MOST as usize / 2);
                }
            }
        }
        assert_eq!(file.length(), model.len() as u64, "step {step}");
    }
    first.close().await.unwrap();
    second.close().await.unwrap();
    let other = cluster.connect().await;
    assert!(other.read_file(&ME, "/f").await.unwrap() == model);
    assert_eq!(fs.stats().dirty_bytes, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncation_cuts_the_boundary_chunk_and_removes_the_rest() {
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    let file = new_file(&fs, "f").await;
    let data = vec![7u8; 6 * CHUNK as usize];
    file.write_at(0, &data, Durability::Buffered).await.unwrap();
    truncate(&fs, &file, u64::from(CHUNK) + 10).await;
    {
        let state = cluster.storage.state.lock().unwrap();
        let mut left: Vec<_> = state.chunks.iter().map(|((t, (_, _, i)), b)| (*i, *t, b.len())).collect();
        left.sort_unstable();
        let whole = CHUNK as usize;
        assert_eq!(left, [(0, 11, whole), (0, 12, whole), (1, 21, 10), (1, 22, 10)]);
    }
    truncate(&fs, &file, u64::from(CHUNK) + 30).await;
    let tail = file.read_at(u64::from(CHUNK), 100, false).await.unwrap();
    assert_eq!(&*tail, &[[7u8; 10].as_slice(), &[0; 20]].concat()[..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o_trunc_drops_what_waits_and_starts_a_new_generation() {
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    let old = new_file(&fs, "f").await;
    old.write_at(0, b"old bytes", Durability::Buffered).await.unwrap();
    let (attr, new) = fs.open(&ME, old.inode_id(), OpenMode { truncate: true, ..WRITE }).await.unwrap();
    assert_eq!((attr.length, fs.stats().dirty_bytes), (0, 0));
    new.write_at(2, b"new", Durability::Buffered).await.unwrap();
    assert_eq!(&*old.read_at(0, 100, false).await.unwrap(), b"\0\0new");
    new.close().await.unwrap();
    old.close().await.unwrap();
    assert_eq!(fs.read_file(&ME, "/f").await.unwrap(), b"\0\0new");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn written_data_is_bounded_in_memory() {
    let cluster = Cluster::start().await;
    let options = fs3_client::ClientOptions { dirty_bytes: 4 << 20, ..cluster.options() };
    let fs = Fs3::connect(options).await.unwrap();
    let files = [new_file(&fs, "a").await, new_file(&fs, "b").await];
    // Scattered small writes never fill a chunk: only the bound makes them leave.
    for nth in 0..600u64 {
        let file = &files[nth as usize % 2];
        file.write_at(nth * 100_000, &[nth as u8; 20_000], Durability::Buffered).await.unwrap();
        assert!(fs.stats().dirty_bytes <= 4 << 20);
    }
    for file in &files {
        file.close().await.unwrap();
    }
    assert_eq!(fs.stats().dirty_bytes, 0);
    assert_eq!(fs.stats().bytes_written, 600 * 20_000);
    assert!(cluster.storage.state.lock().unwrap().most_parallel > 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unlinked_file_stays_readable_until_closed() {
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    let file = new_file(&fs, "f").await;
    file.write_at(0, b"still here", Durability::Buffered).await.unwrap();
    fs.unlink(&ME, ROOT, b"f", false).await.unwrap();
    file.fsync().await.unwrap();
    assert_eq!(&*file.read_at(0, 100, true).await.unwrap(), b"still here");
    assert_eq!(fs.read_file(&ME, "/f").await.unwrap_err().kind(), ErrorKind::NotFound);
    file.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paths_follow_links_list_and_remove_trees() {
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    fs.mkdir_all(&ME, "/a/b/c", 0o755).await.unwrap();
    fs.mkdir_all(&ME, "/a/b", 0o755).await.unwrap();
    fs.write_file(&ME, "/a/b/c/f", b"x").await.unwrap();
    let a = fs.stat_path(&ME, "/a", true).await.unwrap().inode_id;
    fs.symlink(&ME, a, b"link", b"b/./c").await.unwrap();
    fs.symlink(&ME, a, b"up", b"../a/b").await.unwrap();
    fs.symlink(&ME, a, b"loop", b"loop").await.unwrap();
    assert_eq!(fs.read_file(&ME, "/a/link/f").await.unwrap(), b"x");
    assert_eq!(fs.read_file(&ME, "/a/up/c/../../up/c/f").await.unwrap(), b"x");
    assert_eq!(fs.stat_path(&ME, "/a/loop", true).await.unwrap_err().kind(), ErrorKind::Loop);
    assert_eq!(fs.stat_path(&ME, "/a/b/c/f/g", true).await.unwrap_err().kind(), ErrorKind::NotDirectory);
    let names: Vec<_> = fs.list(&ME, "/a").await.unwrap().into_iter().map(|e| e.name).collect();
    assert_eq!(names, [b"b".to_vec(), b"link".to_vec(), b"loop".to_vec(), b"up".to_vec()]);
    assert_eq!(fs.remove_path(&ME, "/a", false).await.unwrap_err().kind(), ErrorKind::IsDirectory);
    assert_eq!(fs.remove_path(&ME, "/a", true).await.unwrap(), 7);
    assert_eq!(fs.stat_path(&ME, "/a", true).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_garbage_workers_client_removes_every_chunk() {
    let cluster = Cluster::start().await;
    let fs = cluster.connect().await;
    let file = new_file(&fs, "f").await;
    file.write_at(0, &vec![1; 5 * CHUNK as usize], Durability::Buffered).await.unwrap();
    file.close().await.unwrap();
    let attr = fs.getattr(file.inode_id()).await.unwrap();
    let chunks = fs3_client::ChunkClient::connect(&cluster.manager, cluster.identity.clone()).await.unwrap();
    let layout = fs3_core::layout::Layout::new(CHUNK, vec![1.into(), 2.into()]).unwrap();
    let removed = chunks.remove_range(attr.data_id.into(), attr.generation.into(), &layout, 2).await.unwrap();
    assert_eq!(removed, 6);
    assert_eq!(cluster.storage.state.lock().unwrap().chunks.len(), 4);
    chunks.close().await;
}
