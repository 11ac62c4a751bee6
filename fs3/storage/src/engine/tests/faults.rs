//! Disks that damage, fill up and fail.

use super::*;
use rand::SeedableRng;
use std::collections::{BTreeMap, BTreeSet};

#[test]
fn lost_and_misdirected_writes_show_and_are_repaired_by_the_right_bytes_only() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, SMALL);
    let bytes: Bytes = (0..40_000u32).map(|i| (i % 250) as u8 + 1).collect();
    apply(&engine, &disk, 0, update(chunk(0), Kind::Write, 0, 0, Some(bytes.clone()))).unwrap();
    let at = disk.snapshot().chunks(4096).position(|b| b.starts_with(&bytes[4096..4200])).unwrap();
    disk.edit(|volume| volume[at * 4096 + 5] ^= 1);
    let mut plan = engine.plan_read(chunk(0), false, 0..40_000).unwrap();
    let mut out = vec![0; 40_000];
    let error = engine.read(&disk, &mut plan, 0, &mut out).unwrap_err();
    assert!(matches!(error, EngineError::Corrupt { index: 1, .. }), "{error}");
    // Blocks that are not touched can be read; a write on the bad one asks for help.
    engine.read(&disk, &mut plan, 0, &mut out[..100]).unwrap();
    engine.write(4, 1, 2, update(chunk(0), Kind::Write, 5000, 0, Some(vec![7; 10])), false);
    let done = engine.run(&disk);
    assert!(matches!(done[..], [Done::Corrupt { id: 4, index: 1, .. }]), "{done:?}");
    assert!(engine.repair(&disk, &mut plan, 1, &bytes[..4096]).is_err());
    engine.repair(&disk, &mut plan, 1, &bytes[4096..8192]).unwrap();
    engine.read(&disk, &mut plan, 0, &mut out).unwrap();
    assert!(out == bytes);
    engine.audit(&disk).unwrap();
    // The same bytes at another index, chunk or version are not the same block.
    apply(&engine, &disk, 0, update(chunk(1), Kind::Write, 0, 0, Some(bytes))).unwrap();
    let other = engine.plan_read(chunk(1), false, 0..1).unwrap();
    assert_eq!(plan.meta().digest, other.meta().digest);
    let at = |c, i, v| fs3_core::target::bind(&super::super::format::seal(c, i, v), 1);
    let all = [at(chunk(0), 0, 1), at(chunk(1), 0, 1), at(chunk(0), 1, 1), at(chunk(0), 0, 2)];
    assert_eq!(BTreeSet::from(all).len(), 4);
}

/// A history with one silent fault in it, then a look at everything. Whatever is returned is right;
/// the rest is an error. `Ok(true)` if the fault was seen.
pub(super) fn with_fault(seed: u64, options: EngineOptions, fault: WriteFault) -> Result<bool, String> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let disk = MemDisk::default();
    let (mut engine, _) = open(&disk, options);
    let mut chunks: BTreeMap<ChunkId, BTreeMap<u64, Bytes>> = BTreeMap::new();
    disk.plant(rng.random_range(0..60), fault);
    let mut seen = false;
    for step in 0..60 {
        let id = chunk(rng.random_range(0..4));
        let states = chunks.entry(id).or_insert_with(|| BTreeMap::from([(0, Bytes::new())]));
        let committed = engine.plan_read(id, false, 0..0).map_or(0, |plan| plan.meta().version);
        if committed < *states.last_key_value().unwrap().0 {
            // The last frame of the log went without its data while the engine was closed.
            return Ok(true);
        }
        let (base, mut bytes) = states.last_key_value().map(|(v, b)| (*v, b.clone())).unwrap_or_default();
        // Full of numbers that do not repeat, so that one block never passes for another.
        let offset = rng.random_range(0..20) * 4096;
        let fill: Bytes =
            (0..rng.random_range(1..6) * 1024u32).flat_map(|i| (i + step * 100_000).to_le_bytes()).collect();
        let update = update(id, Kind::Write, offset, 0, Some(fill));
        model(&mut bytes, &update);
        match apply(&engine, &disk, base, update) {
            Ok(_) => {
                states.insert(base + 1, bytes);
            }
            // A corrupt map, noticed in time.
            Err(WriteError::Failed) => return Ok(true),
            Err(error) => return Err(format!("seed {seed}: {error:?}")),
        }
        if rng.random_bool(0.1) {
            engine.run(&disk);
            engine = match Core::open(&disk, HEADER, options) {
                Ok((engine, _)) => engine,
                Err(EngineError::Format(_)) => return Ok(true),
                Err(error) => return Err(format!("seed {seed}: {error}")),
            };
        }
    }
    for (id, states) in &chunks {
        let Some(mut plan) = engine.plan_read(*id, false, 0..u32::MAX) else { continue };
        let version = plan.meta().version;
        let expected = states.get(&version).ok_or(format!("seed {seed}: {id} has version {version}"))?;
        if version != *states.last_key_value().unwrap().0 {
            // The last frame of the log without its data, while the engine was closed.
            seen = true;
        }
        for (block, expected) in expected.chunks(4096).enumerate() {
            let mut out = vec![0; expected.len()];
            match engine.read(&disk, &mut plan, block * 4096, &mut out) {
                Ok(()) if out == expected => {}
                Ok(()) => return Err(format!("seed {seed}: block {block} of {id} has other bytes")),
                Err(EngineError::Corrupt { .. } | EngineError::CorruptMap { .. }) => seen = true,
                Err(error) => return Err(format!("seed {seed}: {error}")),
            }
        }
    }
    Ok(seen)
}

#[test]
fn silent_faults_are_never_served() {
    for fault in [
        WriteFault::Lost,
        WriteFault::Torn,
        WriteFault::Misdirected(8192),
        WriteFault::Misdirected(4096 * 77),
    ] {
        let seen = (0..150).filter(|seed| with_fault(*seed, SMALL, fault).unwrap()).count();
        println!("{fault:?}: seen in {seen} of 150 runs");
        assert!(seen > 10, "{fault:?} was seen {seen} times only");
    }
}

/// Any bit of the volume may flip while the target is closed.
#[test]
fn flipped_bits_are_never_served() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, SMALL);
    let bytes = |n: u32| -> Bytes { (0..9000u32).flat_map(|i| (i * 31 + n * 7).to_le_bytes()).collect() };
    for index in 0..8 {
        for version in 0..3 {
            let update = update(chunk(index), Kind::Write, 0, 0, Some(bytes(index * 10 + version)));
            apply(&engine, &disk, u64::from(version), update).unwrap();
        }
    }
    engine.close();
    engine.run(&disk);
    drop(engine);
    let (mut noticed, mut unused) = (0, 0);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let sound = disk.snapshot();
    for _ in 0..400 {
        let at = rng.random_range(0..sound.len());
        disk.edit(|volume| {
            volume.copy_from_slice(&sound);
            volume[at] ^= 1 << (at % 8);
        });
        let Ok((engine, _)) = Core::<Bytes>::open(&disk, HEADER, SMALL) else {
            noticed += 1;
            continue;
        };
        let mut bad = 0;
        for index in 0..8 {
            match read(&engine, &disk, chunk(index), false) {
                Ok(held) => assert!(held.unwrap().1 == bytes(index * 10 + 2), "byte {at}"),
                Err(EngineError::Corrupt { .. } | EngineError::CorruptMap { .. }) => bad += 1,
                Err(error) => panic!("{error}"),
            }
        }
        if bad > 0 { noticed += 1 } else { unused += 1 }
    }
    println!("{noticed} noticed, {unused} where nothing lies");
    assert!(noticed > 20 && unused > 20);
}

#[test]
fn a_full_disk_refuses_whole_updates_and_takes_them_again_when_there_is_room() {
    for limit in (60..140).step_by(3) {
        let disk = MemDisk::with_limit((limit + 18) * 4096);
        let options = EngineOptions { grow_bytes: 5 * 4096, ..SMALL };
        let Ok((engine, _)) = Core::<Bytes>::open(&disk, HEADER, options) else {
            assert!(limit < 64, "{limit} blocks are enough for an empty target");
            continue;
        };
        let write = |index: u32, blocks: usize| {
            update(chunk(index), Kind::Write, 0, 0, Some(vec![index as u8 + 1; blocks * 4096]))
        };
        // Fill it up.
        let mut written = 0;
        while apply(&engine, &disk, 0, write(written, 5)).is_ok() {
            written += 1;
        }
        assert!(engine.failed().is_none(), "limit {limit}: {:?}", engine.failed());
        assert!(written > 0 && engine.plan_read(chunk(written), false, 0..1).is_none());
        engine.run(&disk);
        // Overwrites may find room or not; nothing is half done.
        for index in 0..written {
            let _ = apply(&engine, &disk, 1, write(index, 1));
        }
        engine.run(&disk);
        engine.audit(&disk).unwrap_or_else(|e| panic!("limit {limit}: {e}"));
        for index in 0..written {
            assert!(content(&engine, &disk, chunk(index)).unwrap().iter().all(|b| *b == index as u8 + 1));
        }
        // Removal needs no room and gives some back, also after a restart.
        drop(engine);
        let (engine, recovered) = open(&disk, options);
        let versions: BTreeMap<_, _> = recovered.committed.iter().map(|(id, m)| (*id, m.version)).collect();
        for (id, version) in &versions {
            let last = version + 1;
            apply(&engine, &disk, *version, update(*id, Kind::Remove, 0, 0, None)).unwrap();
            assert_eq!(engine.plan_read(*id, false, 0..1).map(|p| p.meta().version), None, "{last}");
        }
        engine.run(&disk);
        let mut again = 0;
        while apply(&engine, &disk, 0, write(1000 + again, 5)).is_ok() {
            again += 1;
        }
        assert!(again + 2 >= written, "limit {limit}: {written} fitted, then {again}");
        engine.run(&disk);
        engine.audit(&disk).unwrap_or_else(|e| panic!("limit {limit}: {e}"));
    }
}

/// Room appears and disappears under a random history.
#[test]
fn a_disk_that_is_full_now_and_then_loses_nothing() {
    let mut ever_refused = 0;
    for seed in 0..60 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let disk = MemDisk::with_limit(600 * 4096);
        let (mut engine, _) = open(&disk, SMALL);
        let mut models: BTreeMap<ChunkId, (u64, Bytes)> = BTreeMap::new();
        let (mut refused, mut floor) = (0, 0);
        for step in 0..150 {
            disk.set_limit(Some(rng.random_range(82..250) * 4096));
            let id = chunk(rng.random_range(0..8));
            let mut update = random_update(&mut rng, id);
            if rng.random_bool(0.1) && models.contains_key(&id) {
                update = super::update(id, Kind::Remove, 0, 0, None);
            }
            let (version, bytes) = models.get(&id).cloned().unwrap_or_default();
            let next = if version == 0 { floor } else { version } + 1;
            engine.write(1, version, next, update.clone(), false);
            match written(engine.run(&disk)) {
                Ok(_) if update.kind == Kind::Remove => {
                    models.remove(&id);
                    floor = floor.max(next);
                    engine.commit(id, next);
                }
                Ok(_) => {
                    let mut bytes = bytes;
                    model(&mut bytes, &update);
                    models.insert(id, (next, bytes));
                    engine.commit(id, next);
                }
                Err(WriteError::NoSpace) => {
                    refused += 1;
                    assert_ne!(update.kind, Kind::Remove, "seed {seed}: a removal needs no room");
                }
                Err(error) => panic!("seed {seed} step {step}: {error:?}: {:?}", engine.failed()),
            }
            if rng.random_bool(0.05) {
                engine.run(&disk);
                engine.audit(&disk).unwrap_or_else(|e| panic!("seed {seed} step {step}: {e}"));
                (engine, _) = open(&disk, SMALL);
            }
        }
        ever_refused += refused;
        for (id, (_, bytes)) in &models {
            assert!(content(&engine, &disk, *id).as_ref() == Some(bytes), "seed {seed}: {id}");
        }
    }
    assert!(ever_refused > 100, "{ever_refused} refusals");
}

#[test]
fn a_disk_with_less_room_than_a_step_is_used_up() {
    let room = |grow_bytes| {
        let disk = MemDisk::with_limit(1000 * 4096);
        let (engine, _) = open(&disk, EngineOptions { grow_bytes, ..SMALL });
        let write = |index| update(chunk(index), Kind::Write, 0, 0, Some(vec![index as u8; 4096]));
        let mut written = 0;
        while apply(&engine, &disk, 0, write(written)).is_ok() {
            written += 1;
        }
        assert!(engine.failed().is_none(), "{:?}", engine.failed());
        written
    };
    let (fine, coarse) = (room(4096), room(1 << 30));
    assert!(coarse > 100 && coarse + 8 >= fine, "{fine} chunks by small steps, {coarse} by large ones");
}

#[test]
fn blocks_in_the_hands_of_a_reader_are_not_reused() {
    readers_keep_their_version(SMALL).unwrap();
}

pub(super) fn readers_keep_their_version(options: EngineOptions) -> Result<(), String> {
    let disk = MemDisk::with_limit(130 * 4096);
    let (engine, _) = open(&disk, options);
    let write = |fill| update(chunk(0), Kind::Write, 0, 0, Some(vec![fill; 8 * 4096]));
    apply(&engine, &disk, 0, write(1)).unwrap();
    let mut reader = engine.plan_read(chunk(0), false, 0..8 * 4096).unwrap();
    let mut refused = false;
    for version in 1..20 {
        refused |= apply(&engine, &disk, version, write(version as u8 + 1)).is_err();
        engine.run(&disk);
        if refused {
            break;
        }
        let mut old = vec![0; 8 * 4096];
        match engine.read(&disk, &mut reader, 0, &mut old) {
            Ok(()) if old.iter().all(|b| *b == 1) => {}
            Ok(()) => return Err("a reader saw another version".into()),
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(())
}

#[test]
fn after_a_failed_write_or_flush_nothing_is_tried_again() {
    // Data and frame, then the flush.
    for operation in 0..3 {
        let disk = MemDisk::default();
        let (engine, _) = open(&disk, SMALL);
        apply(&engine, &disk, 0, update(chunk(0), Kind::Write, 0, 0, Some(vec![1; 10]))).unwrap();
        engine.run(&disk);
        disk.fail_after(Some(operation));
        let again = update(chunk(0), Kind::Write, 0, 0, Some(vec![2; 10]));
        assert_eq!(apply(&engine, &disk, 1, again.clone()), Err(WriteError::Failed));
        disk.fail_after(None);
        assert_eq!(apply(&engine, &disk, 1, again), Err(WriteError::Failed), "operation {operation}");
        assert!(engine.failed().is_some());
    }
}

#[test]
fn damage_in_the_middle_of_the_log_is_not_taken_for_a_torn_tail() {
    let frames = |disk: &MemDisk| -> Vec<usize> {
        let volume = disk.snapshot();
        (0..volume.len()).step_by(512).filter(|at| volume[*at..].starts_with(b"GOLF")).collect()
    };
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, EngineOptions { log_bytes: 1 << 20, ..SMALL });
    for version in 0..5 {
        let fill = vec![version as u8 + 1; 10];
        apply(&engine, &disk, version, update(chunk(0), Kind::Write, 0, 0, Some(fill))).unwrap();
    }
    drop(engine);
    let found = frames(&disk);
    // The last frame is torn: the log ends before it.
    disk.edit(|volume| volume[found.last().unwrap() + 30] ^= 1);
    let (engine, recovered) = open(&disk, SMALL);
    assert_eq!(recovered.committed[0].1.version, 3);
    assert_eq!(recovered.pending[0].meta.version, 4);
    drop(engine);
    // The one before has a successor by now: the frame of the opening.
    disk.edit(|volume| volume[found[found.len() - 2] + 30] ^= 1);
    let refused = Core::<Bytes>::open(&disk, HEADER, SMALL).err().unwrap();
    assert!(matches!(refused, EngineError::Format(FormatError::Damaged(_))), "{refused}");
}

#[test]
fn data_missing_under_the_last_frame_ends_the_log_and_under_others_is_reported() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, EngineOptions { log_bytes: 1 << 20, ..SMALL });
    for index in 0..3 {
        apply(&engine, &disk, 0, update(chunk(index), Kind::Write, 0, 0, Some(vec![index as u8 + 1; 4096])))
            .unwrap();
    }
    drop(engine);
    let lose = |index: u8| {
        disk.edit(|volume| {
            let at = volume.chunks(4096).position(|b| b.iter().all(|b| *b == index + 1)).unwrap();
            volume[at * 4096..(at + 1) * 4096].fill(0x77);
        });
    };
    lose(2);
    lose(1);
    let (engine, recovered) = open(&disk, SMALL);
    // The third write went with its data; the second was acknowledged, so it is known to be damaged.
    assert!(
        engine.plan_read(chunk(2), true, 0..1).is_none() && engine.plan_read(chunk(2), false, 0..1).is_none()
    );
    assert_eq!(recovered.pending.len(), 1);
    let error = read(&engine, &disk, chunk(1), true).unwrap_err();
    assert!(matches!(error, EngineError::Corrupt { index: 0, .. }), "{error}");
    engine.audit(&disk).unwrap();
}

#[test]
fn after_an_orderly_end_even_the_last_write_is_not_taken_for_torn() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, SMALL);
    apply(&engine, &disk, 0, update(chunk(0), Kind::Write, 0, 0, Some(vec![5; 4096]))).unwrap();
    engine.close();
    engine.run(&disk);
    drop(engine);
    disk.edit(|volume| {
        let at = volume.chunks(4096).position(|b| b.iter().all(|b| *b == 5)).unwrap();
        volume[at * 4096] ^= 1;
    });
    let (engine, recovered) = open(&disk, SMALL);
    assert_eq!(recovered.committed.len(), 1);
    assert!(matches!(read(&engine, &disk, chunk(0), false), Err(EngineError::Corrupt { index: 0, .. })));
}

#[test]
fn another_cluster_target_format_or_sector_is_not_let_in() {
    let disk = MemDisk::default();
    disk.set_sector(512);
    drop(open(&disk, SMALL));
    let other = Header { cluster: ClusterId(1), ..HEADER };
    let refused = Core::<Bytes>::open(&disk, other, SMALL);
    assert!(matches!(refused, Err(EngineError::Foreign { .. })));
    disk.set_sector(4096);
    let refused = Core::<Bytes>::open(&disk, HEADER, SMALL);
    assert!(matches!(refused, Err(EngineError::Sector { made: 512, found: 4096 })));
    disk.set_sector(512);
    for (version, wanted) in [(3, FormatError::TooNew { found: 3 }), (1, FormatError::TooOld { found: 1 })] {
        let sound = disk.snapshot();
        disk.edit(|volume| (0..2).for_each(|slot| volume[slot * 4096 + 8] = version));
        match Core::<Bytes>::open(&disk, HEADER, SMALL) {
            Err(EngineError::Format(found)) => assert_eq!(found, wanted),
            other => panic!("{:?}", other.err()),
        }
        disk.edit(|volume| volume.copy_from_slice(&sound));
    }
    // Somebody else's disk is not overwritten.
    let foreign = MemDisk::default();
    foreign.grow(1 << 20).unwrap();
    foreign.edit(|volume| volume[..4].copy_from_slice(b"XFSB"));
    let before = foreign.snapshot();
    assert!(Core::<Bytes>::open(&foreign, HEADER, SMALL).is_err());
    assert!(foreign.snapshot() == before);
}

#[test]
fn a_corrupt_map_takes_the_target_out_before_anything_builds_on_it() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, SMALL);
    let bytes = vec![3; 20_000];
    apply(&engine, &disk, 0, update(chunk(0), Kind::Write, 0, 0, Some(bytes))).unwrap();
    for version in 0..150 {
        apply(&engine, &disk, version, update(chunk(1), Kind::Write, 0, 0, Some(vec![1; 100]))).unwrap();
    }
    engine.run(&disk);
    drop(engine);
    let (engine, _) = open(&disk, SMALL);
    let at = match engine.plan_read(chunk(0), false, 0..1).unwrap().missing()[..] {
        [at] => at.block as usize * 4096,
        _ => panic!("the leaf is not on disk only"),
    };
    disk.edit(|volume| volume[at + 3] ^= 1);
    let error = read(&engine, &disk, chunk(0), false).unwrap_err();
    assert!(matches!(error, EngineError::CorruptMap { leaf: 0, .. }), "{error}");
    let refused = apply(&engine, &disk, 1, update(chunk(0), Kind::Write, 0, 0, Some(vec![1; 10])));
    assert_eq!(refused, Err(WriteError::Failed));
    assert!(engine.failed().unwrap().contains("leaf 0 of chunk"), "{:?}", engine.failed());
}
