//! Power cuts at every write boundary. After each: every acknowledged commit is there, and every
//! other one entirely or not at all.

use firefly_store::lossy::LossyDisk;
use firefly_store::{Disk, Kv, Store, StoreError, StoreOptions};
use firefly_types::ErrorKind;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Small, so that rotation, checkpoint and removal happen within a few commits.
fn options() -> StoreOptions {
    StoreOptions { checkpoint_bytes: 1500, cache_bytes: 1 << 20 }
}

fn parts(i: u64) -> [Vec<u8>; 3] {
    // Far apart in the tree, so that a torn transaction would show.
    ["a", "m", "z"].map(|p| format!("{p}{i:05}").into_bytes())
}

/// Writes transactions `first..first + count`, two at a time, until one fails. Returns those that
/// were acknowledged.
async fn write(store: &Store, first: u64, count: u64, rng: &mut ChaCha8Rng) -> BTreeSet<u64> {
    let mut acknowledged = BTreeSet::new();
    for i in (first..first + count).step_by(2) {
        let commit = |i: u64, filler: usize| {
            let mut txn = store.begin();
            for part in parts(i) {
                txn.put(&part, &vec![i as u8; filler]);
            }
            txn.commit()
        };
        let (one, two) =
            tokio::join!(commit(i, rng.random_range(0..700)), commit(i + 1, rng.random_range(0..9)));
        for (i, result) in [(i, one), (i + 1, two)] {
            if result.is_ok() {
                acknowledged.insert(i);
            }
        }
        if acknowledged.len() as u64 != i + 2 - first {
            break;
        }
    }
    acknowledged
}

/// The transactions that the store holds; an error if one is there in part.
fn present(store: &Store) -> Result<BTreeSet<u64>, String> {
    let mut txn = store.begin();
    let mut of = |p: &str| -> BTreeSet<u64> {
        let (from, to) = (p.as_bytes(), [p.as_bytes(), &[0xff]].concat());
        let pairs = txn.range(from, &to, usize::MAX).unwrap();
        pairs.iter().map(|(k, _)| String::from_utf8_lossy(&k[1..]).parse().unwrap()).collect()
    };
    let sets = [of("a"), of("m"), of("z")];
    if sets[0] != sets[1] || sets[1] != sets[2] {
        return Err(format!("a transaction is there in part: {sets:?}"));
    }
    Ok(sets[0].clone())
}

/// Rounds of writing until the power goes and of finding out what is left. `cut` says at which
/// operation, `None` that there are no more rounds. An error tells what was lost.
async fn rounds(
    mut disk: LossyDisk,
    rng: &mut ChaCha8Rng,
    mut cut: impl FnMut(usize) -> Option<u64>,
) -> Result<bool, String> {
    let mut acknowledged = BTreeSet::new();
    let mut was_cut = true;
    for round in 0.. {
        if let Some(at) = cut(round) {
            disk.cut_power_at(at);
        }
        match Store::open_on(Arc::new(disk.clone()), options()) {
            Ok(store) => {
                let found = present(&store)?;
                if !found.is_superset(&acknowledged) {
                    let lost: Vec<_> = acknowledged.difference(&found).collect();
                    return Err(format!("round {round}: acknowledged and lost: {lost:?}"));
                }
                acknowledged = found;
                if cut(round).is_none() {
                    return Ok(was_cut);
                }
                let first = acknowledged.last().map_or(0, |i| i + 1);
                acknowledged.extend(write(&store, first, 12, rng).await);
                drop(store);
            }
            Err(error) if !disk.is_off() => return Err(format!("round {round}: opening: {error}")),
            Err(_) => {}
        }
        was_cut = disk.is_off();
        disk = disk.after_power_cut(rng);
    }
    unreachable!("the rounds end by themselves")
}

#[tokio::test]
async fn every_acknowledged_commit_survives_a_cut_at_every_operation() {
    let mut cuts = 0;
    for at in 1.. {
        let mut cut = true;
        // Three fates of the unsynced for each place.
        for seed in 0..3 {
            let mut rng = ChaCha8Rng::seed_from_u64(at * 10 + seed);
            let outcome = rounds(LossyDisk::new(), &mut rng, |round| (round == 0).then_some(at)).await;
            cut = outcome.unwrap_or_else(|e| panic!("cut at operation {at}, seed {seed}: {e}"));
        }
        if !cut {
            break;
        }
        cuts = at;
    }
    assert!(cuts > 100, "only {cuts} operations: the workload shrank");
}

#[tokio::test]
async fn cuts_may_follow_each_other_during_recovery_too() {
    for seed in 0..150 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut places = ChaCha8Rng::seed_from_u64(seed + 1_000_000);
        let mut chosen = Vec::new();
        let cut = |round: usize| {
            if round == chosen.len() {
                let most = if places.random_bool(0.5) { 12 } else { 150 };
                chosen.push((round < 6).then(|| places.random_range(1..most)));
            }
            chosen[round]
        };
        rounds(LossyDisk::new(), &mut rng, cut).await.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    }
}

/// Shows that the tests above can fail: on a disk that does not sync its log, they do.
#[tokio::test]
async fn without_syncs_the_loss_is_found() {
    let mut found = 0;
    for seed in 0..40 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let cut = |round| (round == 0).then_some(60);
        found += u32::from(rounds(LossyDisk::ignoring_log_sync(), &mut rng, cut).await.is_err());
    }
    assert!(found > 10, "only {found} of 40 lossy runs were noticed");
}

/// Entries after a checkpoint are judged again when the log is replayed, against writes before it.
#[tokio::test]
async fn a_replay_comes_to_the_same_verdicts() {
    let disk = LossyDisk::new();
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let store = Store::open_on(Arc::new(disk.clone()), options()).unwrap();
    let set = async |key: &str, value: &str| {
        let mut txn = store.begin();
        txn.put(key.as_bytes(), value.as_bytes());
        txn.commit().await.unwrap();
    };
    set("k", "old").await;
    let [mut loser, mut winner] = [(); 2].map(|()| store.begin());
    loser.get(b"k").unwrap();
    winner.get(b"other").unwrap();
    set("k", "new").await;
    store.checkpoint().await.unwrap();
    loser.put(b"k", b"lost update");
    assert!(matches!(loser.commit().await, Err(StoreError::Conflict)));
    winner.put(b"w", b"kept");
    winner.commit().await.unwrap();

    let image = disk.after_power_cut(&mut rng);
    drop(store);
    let store = Store::open_on(Arc::new(image), options()).unwrap();
    let mut txn = store.begin();
    assert_eq!(txn.get(b"k").unwrap(), Some(b"new".to_vec()));
    assert_eq!(txn.get(b"w").unwrap(), Some(b"kept".to_vec()));
}

#[tokio::test]
async fn damage_in_acknowledged_log_data_is_refused_not_skipped() {
    let disk = LossyDisk::new();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    // No checkpoint: everything stands in the log only.
    let options = StoreOptions { checkpoint_bytes: 1 << 30, cache_bytes: 1 << 20 };
    let store = Store::open_on(Arc::new(disk.clone()), options.clone()).unwrap();
    write(&store, 0, 12, &mut rng).await;
    let names = disk.list().unwrap();
    let [log] = names.as_slice() else { panic!("one segment expected, got {names:?}") };
    let length = disk.read(log).unwrap().len();
    // The power goes with everything synced.
    let image = disk.after_power_cut(&mut rng);
    drop(store);
    let mut refused = 0;
    for byte in (0..length).step_by(7) {
        let damaged = image.after_power_cut(&mut rng);
        assert!(damaged.flip_bit(log, byte, byte as u8));
        match Store::open_on(Arc::new(damaged), options.clone()) {
            Err(StoreError::Corrupt(_)) => refused += 1,
            Err(error) => panic!("byte {byte}: {error} is of kind {}", error.kind()),
            Ok(store) => {
                // Only the very last frame may pass for a torn tail.
                let found = present(&store).unwrap();
                assert!((0..10).all(|i| found.contains(&i)), "byte {byte}: silently lost, found {found:?}");
            }
        }
    }
    assert!(refused > length / 7 / 2, "{refused} of {} places refused", length / 7);
}

#[tokio::test]
async fn after_an_io_error_the_store_stops_instead_of_retrying() {
    let disk = LossyDisk::new();
    let store = Store::open_on(Arc::new(disk.clone()), options()).unwrap();
    disk.cut_power_at(2);
    for _ in 0..3 {
        let mut txn = store.begin();
        txn.put(b"k", b"v");
        let error = txn.commit().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    }
}
