//! What a caller sees: transactions, limits, reopening, and serializability of random concurrent
//! transactions against a model.

use firefly_store::{
    Kv, MAX_KEY_BYTES, MAX_VALUE_BYTES, MemKv, Pairs, Store, StoreError, StoreOptions, transact,
};
use firefly_types::ErrorKind;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

fn open(dir: &std::path::Path) -> Arc<Store> {
    Store::open(dir, StoreOptions::default()).unwrap()
}

#[tokio::test]
async fn a_transaction_sees_its_own_writes_and_others_see_them_after_commit() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut txn = store.begin();
    for key in ["a", "c", "e"] {
        txn.put(key.as_bytes(), b"1");
    }
    assert_eq!(txn.get(b"a").unwrap(), Some(b"1".to_vec()));
    assert_eq!(store.begin().get(b"a").unwrap(), None);
    let version = txn.commit().await.unwrap();

    let mut txn = store.begin();
    assert_eq!(txn.version(), version);
    txn.put(b"b", b"2");
    txn.delete(b"c");
    txn.put(b"e", b"3");
    txn.put(b"f", b"4");
    let keys = |pairs: Vec<(Vec<u8>, Vec<u8>)>| {
        pairs.into_iter().map(|(k, v)| String::from_utf8([k, v].concat()).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(keys(txn.range(b"a", b"z", 10).unwrap()), ["a1", "b2", "e3", "f4"]);
    assert_eq!(keys(txn.range(b"a", b"z", 2).unwrap()), ["a1", "b2"]);
    assert_eq!(keys(txn.range(b"b", b"f", 10).unwrap()), ["b2", "e3"]);
    assert_eq!(keys(txn.range(b"z", b"a", 10).unwrap()), [""; 0]);
    assert_eq!(keys(txn.snapshot_range(b"e", b"z", 1).unwrap()), ["e3"]);
}

#[tokio::test]
async fn conflicts_are_found_on_keys_and_in_ranges_up_to_where_the_limit_cut() {
    let kv = MemKv::new();
    let set = async |key: &str, value: &str| {
        let mut txn = kv.begin();
        txn.put(key.as_bytes(), value.as_bytes());
        txn.commit().await.unwrap();
    };
    set("a", "1").await;
    set("b", "1").await;

    let mut reader = kv.begin();
    reader.get(b"a").unwrap();
    reader.put(b"x", b"1");
    set("a", "2").await;
    assert!(matches!(reader.commit().await, Err(StoreError::Conflict)));

    let mut ranger = kv.begin();
    ranger.range(b"a", b"zz", 1).unwrap();
    ranger.put(b"x", b"1");
    set("b", "2").await;
    ranger.commit().await.expect("b lies beyond the cut");

    let mut ranger = kv.begin();
    ranger.range(b"a", b"zz", 9).unwrap();
    ranger.put(b"x", b"1");
    set("phantom", "1").await;
    assert!(matches!(ranger.commit().await, Err(StoreError::Conflict)));

    let mut hinted = kv.begin();
    hinted.snapshot_get(b"a").unwrap();
    hinted.put(b"x", b"1");
    set("a", "3").await;
    hinted.commit().await.expect("an unrecorded read does not conflict");

    let mut reader = kv.begin();
    assert_eq!(reader.get(b"a").unwrap(), Some(b"3".to_vec()));
    set("a", "4").await;
    reader.commit().await.expect("a transaction that only reads saw one consistent state");
}

#[tokio::test]
async fn limits_are_refused_with_their_kind() {
    let kv = MemKv::new();
    let kind = async |fill: &dyn Fn(&mut firefly_store::Txn)| {
        let mut txn = kv.begin();
        fill(&mut txn);
        txn.commit().await.unwrap_err().kind()
    };
    assert_eq!(kind(&|t| t.put(b"", b"")).await, ErrorKind::InvalidArgument);
    assert_eq!(kind(&|t| t.delete(&[0; MAX_KEY_BYTES + 1])).await, ErrorKind::InvalidArgument);
    assert_eq!(kind(&|t| t.put(b"k", &vec![0; MAX_VALUE_BYTES + 1])).await, ErrorKind::TooLarge);
    let too_much = |t: &mut firefly_store::Txn| {
        for i in 0..9u8 {
            t.put(&[i], &vec![0; MAX_VALUE_BYTES]);
        }
    };
    assert_eq!(kind(&too_much).await, ErrorKind::TooLarge);
    assert!(kv.begin().get(&[0; MAX_KEY_BYTES + 1]).is_err());
    let mut largest = kv.begin();
    largest.put(&[0; MAX_KEY_BYTES], &vec![0; MAX_VALUE_BYTES]);
    largest.commit().await.unwrap();
}

#[tokio::test]
async fn everything_is_there_after_reopening_and_one_process_at_a_time_may() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..4u32 {
        let store = open(dir.path());
        let second = Store::open(dir.path(), StoreOptions::default()).err().expect("opened twice");
        assert_eq!(second.kind(), ErrorKind::Busy, "{second}");
        let seen = store.begin().range(b"k", b"l", 99).unwrap();
        assert_eq!(seen.len() as u32, round);
        let mut txn = store.begin();
        txn.put(format!("k{round}").as_bytes(), b"v");
        txn.commit().await.unwrap();
        if round == 1 {
            store.checkpoint().await.unwrap();
        }
        let mut late = store.begin();
        drop(store);
        late.put(b"x", b"");
        assert!(matches!(late.commit().await, Err(StoreError::Closed)));
    }
}

#[tokio::test]
async fn a_missing_log_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    std::fs::remove_dir_all(dir.path().join("log")).unwrap();
    let error = Store::open(dir.path(), StoreOptions::default()).err().expect("opened without its log");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[tokio::test]
async fn transact_retries_until_it_wins() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let store = store.clone();
        tasks.spawn(async move {
            for _ in 0..25 {
                transact::<_, StoreError, _>(&*store, |txn| {
                    let n = txn.get(b"n")?.map_or(0, |v| u32::from_le_bytes(v.try_into().unwrap()));
                    txn.put(b"n", &(n + 1).to_le_bytes());
                    Ok(())
                })
                .await
                .unwrap();
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(store.begin().get(b"n").unwrap(), Some(200u32.to_le_bytes().to_vec()));
    let stats = store.stats();
    assert_eq!(stats.committed, 200);
    assert!(stats.conflicts > 0, "eight tasks on one key never met");
}

/// What one committed transaction saw and did.
struct Observed {
    version: u64,
    gets: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    ranges: Vec<(Vec<u8>, Vec<u8>, usize, Pairs)>,
    writes: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

async fn random_client(kv: Arc<dyn Kv>, mut rng: ChaCha8Rng, log: Arc<Mutex<Vec<Observed>>>) {
    let key = |rng: &mut ChaCha8Rng| vec![b'a' + rng.random_range(0..12u8)];
    for _ in 0..60 {
        let mut txn = kv.begin();
        let mut seen = Observed { version: 0, gets: vec![], ranges: vec![], writes: vec![] };
        for _ in 0..rng.random_range(1..4) {
            if rng.random_bool(0.7) {
                let key = key(&mut rng);
                seen.gets.push((key.clone(), txn.get(&key).unwrap()));
            } else {
                let (from, to) = (key(&mut rng), key(&mut rng));
                let limit = rng.random_range(1..6);
                let pairs = txn.range(&from, &to, limit).unwrap();
                seen.ranges.push((from, to, limit, pairs));
            }
            tokio::task::yield_now().await;
        }
        // One in five only reads. Reads come first, so that what they saw is the store's.
        if rng.random_bool(0.8) {
            for _ in 0..rng.random_range(1..3) {
                let key = key(&mut rng);
                let value = rng.random_bool(0.7).then(|| rng.random::<u64>().to_le_bytes().to_vec());
                match &value {
                    Some(value) => txn.put(&key, value),
                    None => txn.delete(&key),
                }
                seen.writes.push((key, value));
            }
        }
        match txn.commit().await {
            Ok(version) => {
                seen.version = version;
                log.lock().unwrap().push(seen);
            }
            Err(StoreError::Conflict) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Replays what was committed in version order; every read must have seen exactly the state
/// before its transaction.
fn check_serializable(mut log: Vec<Observed>) -> Map {
    // Transactions that only read stand behind the write of the same version.
    log.sort_by_key(|o| (o.version, o.writes.is_empty()));
    let mut model = Map::new();
    for seen in log {
        for (key, value) in &seen.gets {
            assert_eq!(model.get(key), value.as_ref(), "version {} read {key:?}", seen.version);
        }
        for (from, to, limit, pairs) in &seen.ranges {
            let wanted: Vec<_> = if from < to {
                model
                    .range(from.clone()..to.clone())
                    .take(*limit)
                    .map(|(k, v)| (k.clone(), v.clone()))
                    .collect()
            } else {
                vec![]
            };
            assert_eq!(&wanted, pairs, "version {} read {from:?}..{to:?}", seen.version);
        }
        for (key, value) in seen.writes {
            match value {
                Some(value) => drop(model.insert(key, value)),
                None => drop(model.remove(&key)),
            }
        }
    }
    model
}

async fn random_transactions_are_serializable(kv: Arc<dyn Kv>, seed: u64) {
    println!("seed {seed}");
    let log = Arc::new(Mutex::new(Vec::new()));
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..8 {
        let rng = ChaCha8Rng::seed_from_u64(seed * 100 + client);
        clients.spawn(random_client(kv.clone(), rng, log.clone()));
    }
    while let Some(done) = clients.join_next().await {
        done.unwrap();
    }
    let log = std::mem::take(&mut *log.lock().unwrap());
    assert!(log.len() > 50, "hardly anything committed: {}", log.len());
    let model = check_serializable(log);
    let state: Map = kv.begin().range(&[0], &[255], usize::MAX).unwrap().into_iter().collect();
    assert_eq!(state, model);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_store_is_serializable() {
    for seed in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        // A checkpoint every few batches, so that they take part.
        let options = StoreOptions { checkpoint_bytes: 8 << 10, ..StoreOptions::default() };
        let store = Store::open(dir.path(), options).unwrap();
        random_transactions_are_serializable(store, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_memory_store_is_serializable() {
    for seed in 0..8 {
        random_transactions_are_serializable(Arc::new(MemKv::new()), seed).await;
    }
}

#[test]
#[should_panic(expected = "read")]
fn the_checker_notices_a_stale_read() {
    let write = |version, value: &[u8]| Observed {
        version,
        gets: vec![],
        ranges: vec![],
        writes: vec![(b"a".to_vec(), Some(value.to_vec()))],
    };
    let mut stale = write(3, b"3");
    stale.gets.push((b"a".to_vec(), Some(b"1".to_vec())));
    check_serializable(vec![write(1, b"1"), write(2, b"2"), stale]);
}
