//! What the engine does, against the plain way of doing it.

use super::*;
use rand::SeedableRng;
use std::collections::BTreeMap;

#[test]
fn every_kind_of_update_does_what_the_model_does() {
    for seed in 0..60 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let disk = MemDisk::default();
        disk.set_sector(if seed % 2 == 0 { 512 } else { 4096 });
        let (mut engine, _) = open(&disk, SMALL);
        let mut models: BTreeMap<ChunkId, (u64, Bytes)> = BTreeMap::new();
        let mut floor = 0;
        for step in 0..80 {
            let chunk = chunk(rng.random_range(0..5));
            if rng.random_bool(0.04) && models.contains_key(&chunk) {
                let (version, _) = models.remove(&chunk).unwrap();
                apply(&engine, &disk, version, update(chunk, Kind::Remove, 0, 0, None)).unwrap();
                floor = floor.max(version + 1);
                assert!(content(&engine, &disk, chunk).is_none());
                continue;
            }
            let update = random_update(&mut rng, chunk);
            let (version, bytes) = models.entry(chunk).or_insert((0, Bytes::new()));
            let next = if *version == 0 { floor } else { *version } + 1;
            engine.write(1, *version, next, update.clone(), false);
            let meta = written(engine.run(&disk)).unwrap();
            model(bytes, &update);
            let (pending, held) = read(&engine, &disk, chunk, true).unwrap().unwrap();
            assert!(held == *bytes && pending == meta, "seed {seed} step {step}: {:?} pending", update.kind);
            engine.commit(chunk, next);
            *version = next;
            assert!(
                content(&engine, &disk, chunk).as_ref() == Some(bytes),
                "seed {seed} step {step}: {:?}",
                update.kind
            );
            if rng.random_bool(0.05) {
                engine.run(&disk);
                drop(engine);
                let recovered;
                (engine, recovered) = open(&disk, SMALL);
                let found: Vec<_> =
                    recovered.committed.iter().map(|(id, m)| (*id, m.version, m.length)).collect();
                let expected: Vec<_> = models.iter().map(|(id, (v, b))| (*id, *v, b.len() as u32)).collect();
                assert_eq!(found, expected, "seed {seed} step {step}");
            }
        }
        engine.run(&disk);
        // What is used is what the maps hold, to the block.
        let audit = engine.audit(&disk).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert_eq!((audit.pending, audit.leaving > 1000), (0, false), "seed {seed}");
        for (chunk, (_, bytes)) in &models {
            assert!(content(&engine, &disk, *chunk).as_ref() == Some(bytes), "seed {seed}");
        }
    }
}

#[test]
fn partial_reads_return_the_part() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, SMALL);
    let bytes: Bytes = (0..3_000_000u32).map(|i| (i / 100 % 251) as u8).collect();
    apply(&engine, &disk, 0, update(chunk(0), Kind::Write, 0, 0, Some(bytes.clone()))).unwrap();
    for (version, at) in (1..).zip((0..300).map(|i| (i * 7919) % 2_900_000u32)) {
        apply(
            &engine,
            &disk,
            version,
            update(chunk(0), Kind::Write, at, 0, Some(bytes[at as usize..at as usize + 5000].to_vec())),
        )
        .unwrap();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for _ in 0..300 {
        let from = rng.random_range(0..2_999_999u32);
        let to = (from + rng.random_range(1..400_000)).min(3_000_000);
        let mut plan = engine.plan_read(chunk(0), false, from..to).unwrap();
        let mut out = vec![0; (to - from) as usize];
        engine.read(&disk, &mut plan, from as usize, &mut out).unwrap();
        assert!(out == bytes[from as usize..to as usize], "{from}..{to}");
    }
}

#[test]
fn a_pending_version_can_be_replaced_or_dropped_without_a_trace() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, SMALL);
    let first = update(chunk(0), Kind::Write, 0, 0, Some(vec![1; 50_000]));
    apply(&engine, &disk, 0, first).unwrap();
    for fill in [2, 3] {
        engine.write(1, 1, 2, update(chunk(0), Kind::Write, 100, 0, Some(vec![fill; 100])), false);
        written(engine.run(&disk)).unwrap();
    }
    assert_eq!(content(&engine, &disk, chunk(0)).unwrap(), vec![1; 50_000]);
    engine.drop_pending(chunk(0), 2);
    engine.run(&disk);
    assert!(engine.plan_read(chunk(0), true, 0..1).is_none());
    engine.audit(&disk).unwrap();
    let (engine, recovered) = open(&disk, SMALL);
    assert_eq!((recovered.pending.len(), recovered.committed[0].1.version), (0, 1));
    assert_eq!(content(&engine, &disk, chunk(0)).unwrap(), vec![1; 50_000]);
    engine.audit(&disk).unwrap();
    // The record travels with the data.
    let record = fs3_core::target::Record { sequence: 1, version: 1, length: 50_000 };
    assert_eq!(recovered.records.channels, [(ClientId(9), 3, record)]);
    assert_eq!(recovered.records.attempts, [(JobId(5), AttemptEpoch(4))]);
}

#[test]
fn pending_versions_and_records_outlive_their_part_of_the_log() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, SMALL);
    apply(&engine, &disk, 0, update(chunk(0), Kind::Write, 0, 0, Some(vec![1; 10_000]))).unwrap();
    let mut pending = update(chunk(0), Kind::Write, 5000, 0, Some(vec![2; 10_000]));
    pending.context.channel = 77;
    engine.write(1, 1, 2, pending, false);
    written(engine.run(&disk)).unwrap();
    for version in 0..200 {
        apply(&engine, &disk, version, update(chunk(1), Kind::Write, 0, 0, Some(vec![version as u8; 100])))
            .unwrap();
    }
    engine.run(&disk);
    drop(engine);
    let (engine, recovered) = open(&disk, SMALL);
    assert_eq!(recovered.pending.len(), 1);
    assert_eq!((recovered.pending[0].meta.version, recovered.pending[0].context.channel), (2, 77));
    engine.commit(chunk(0), 2);
    let mut expected = vec![1; 5000];
    expected.extend([2; 10_000]);
    assert_eq!(content(&engine, &disk, chunk(0)).unwrap(), expected);
    engine.run(&disk);
    engine.audit(&disk).unwrap();
    assert!(recovered.records.channels.iter().any(|(_, channel, r)| *channel == 3 && r.version == 200));
}

#[test]
fn left_overs_go_in_steps_and_records_come() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, SMALL);
    for index in 0..200 {
        apply(&engine, &disk, 0, update(chunk(index), Kind::Write, 0, 0, Some(vec![9; 9000]))).unwrap();
    }
    let page = fs3_core::target::RecordPage { version_floor: 44, ..Default::default() };
    engine.flush(8, (10..200).map(chunk).collect(), page);
    assert!(matches!(engine.run(&disk)[..], [Done::Flushed { id: 8, ok: true }]));
    assert_eq!(engine.chunks(), 10);
    let audit = engine.audit(&disk).unwrap();
    assert_eq!(audit.data, 30);
    let (engine, recovered) = open(&disk, SMALL);
    assert_eq!((recovered.committed.len(), recovered.records.version_floor), (10, 44));
    engine.audit(&disk).unwrap();
}

#[test]
fn an_overwrite_costs_a_block_and_its_record() {
    let disk = MemDisk::default();
    let options = EngineOptions { log_bytes: 8 << 20, cache_bytes: 8 << 20, ..SMALL };
    let (engine, _) = open(&disk, options);
    apply(&engine, &disk, 0, update(chunk(0), Kind::Write, 0, 0, Some(vec![1; 1 << 20]))).unwrap();
    engine.run(&disk);
    let (_, before) = disk.counters();
    for version in 1..101u64 {
        let at = (version as u32 * 37 % 256) * 4096;
        apply(&engine, &disk, version, update(chunk(0), Kind::Write, at, 0, Some(vec![2; 4096]))).unwrap();
    }
    let (_, after) = disk.counters();
    // The block, and one sector of the log with this record and the commit of the one before.
    assert_eq!(after - before, 100 * 8192);
    // It stays in one place: the whole chunk is a few requests.
    let (reads, _) = disk.counters();
    content(&engine, &disk, chunk(0)).unwrap();
    assert!(disk.counters().0 - reads <= 4, "{} requests", disk.counters().0 - reads);
}

#[test]
fn a_cold_read_is_two_disk_reads_and_a_warm_one_is_one() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, SMALL);
    for index in 0..4 {
        apply(&engine, &disk, 0, update(chunk(index), Kind::Write, 0, 0, Some(vec![1; 1 << 20]))).unwrap();
    }
    for version in 0..120 {
        apply(&engine, &disk, version, update(chunk(9), Kind::Write, 0, 0, Some(vec![1; 100]))).unwrap();
    }
    engine.run(&disk);
    drop(engine);
    let (engine, _) = open(&disk, SMALL);
    for expected in [2, 1] {
        let before = disk.counters().0;
        let mut plan = engine.plan_read(chunk(2), false, 8192..12288).unwrap();
        engine.read(&disk, &mut plan, 8192, &mut [0; 4096]).unwrap();
        assert_eq!(disk.counters().0 - before, expected);
    }
}
