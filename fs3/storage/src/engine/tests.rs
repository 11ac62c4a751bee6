//! The engine against a model, over disks that lose power, fill up and fail.

use super::format::{BlockPtr, read_frames};
use super::*;
use firefly_types::{
    AttemptEpoch, ChunkId, ClientId, ClusterId, DataId, Generation, JobId, SessionEpoch, TargetId,
};
use fs3_core::target::{Context, Digest, Kind, Meta, Record, RecordPage, Recovered, Update, WriteError};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

type Bytes = Vec<u8>;

const HEADER: Header = Header { cluster: ClusterId(0xfeed), target: TargetId(7) };
const SMALL: EngineOptions =
    EngineOptions { capacity_bytes: u64::MAX, grow_bytes: 256 << 10, log_bytes: 4 << 10 };

fn chunk(index: u32) -> ChunkId {
    ChunkId { data: DataId(1), generation: Generation(2), index }
}

fn context(sequence: u64) -> Context {
    Context {
        client: ClientId(9),
        session_epoch: SessionEpoch(1),
        channel: 3,
        sequence,
        attempt: AttemptEpoch(4),
        job: JobId(5),
    }
}

fn update(chunk: ChunkId, kind: Kind, offset: u32, length: u32, payload: Option<Bytes>) -> Update<Bytes> {
    Update { context: context(1), chunk, kind, offset, length, crc: 0, chunk_bytes: 1 << 20, payload }
}

fn open(disk: &MemDisk, options: EngineOptions) -> (Engine<MemDisk, Bytes>, Recovered) {
    Engine::open(disk.clone(), HEADER, options).unwrap()
}

fn written(done: Vec<Done<Bytes>>) -> Result<Meta, WriteError> {
    match <[Done<Bytes>; 1]>::try_from(done) {
        Ok([Done::Written { result, .. }]) => result,
        other => panic!("expected one write to end, got {other:?}"),
    }
}

/// Writes and commits.
fn apply(engine: &Engine<MemDisk, Bytes>, base: u64, update: Update<Bytes>) -> Result<Meta, WriteError> {
    let chunk = update.chunk;
    engine.write(1, base, base + 1, update, false);
    let meta = written(engine.run_batch())?;
    engine.commit(chunk, base + 1);
    Ok(meta)
}

fn content(engine: &Engine<MemDisk, Bytes>, chunk: ChunkId) -> Option<Bytes> {
    let plan = engine.plan_read(chunk, false)?;
    let mut out = vec![0; plan.meta().length as usize];
    engine.read(&plan, 0, &mut out).unwrap();
    assert_eq!(plan.meta().digest, Digest::of(&out));
    Some(out)
}

/// What an update does, the plain way.
fn model(content: &mut Bytes, update: &Update<Bytes>) {
    let (from, length) = (update.offset as usize, update.length as usize);
    match update.kind {
        Kind::Write => {
            let payload = update.payload.as_ref().unwrap();
            content.resize(content.len().max(from + payload.len()), 0);
            content[from..from + payload.len()].copy_from_slice(payload);
        }
        Kind::Truncate => content.resize(length, 0),
        Kind::Replace => content.clone_from(update.payload.as_ref().unwrap()),
        Kind::Punch => {
            let (a, b) = (from.min(content.len()), (from + length).min(content.len()));
            content[a..b].fill(0);
        }
        Kind::Remove => content.clear(),
    }
}

fn random_update(rng: &mut ChaCha8Rng, chunk: ChunkId) -> Update<Bytes> {
    let offset =
        if rng.random_bool(0.5) { rng.random_range(0..80_000) } else { rng.random_range(0..5) * 16384 };
    let length =
        if rng.random_bool(0.5) { rng.random_range(1..40_000) } else { rng.random_range(1..4) * 16384 };
    let kind = match rng.random_range(0..10) {
        0..6 => Kind::Write,
        6 => Kind::Truncate,
        7 => Kind::Replace,
        _ => Kind::Punch,
    };
    let byte: u8 = rng.random_range(0..4);
    let payload = matches!(kind, Kind::Write | Kind::Replace).then(|| vec![byte; length as usize]);
    update(chunk, kind, offset, length, payload)
}

#[test]
fn every_kind_of_update_does_what_the_model_does() {
    for seed in 0..30 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let disk = MemDisk::default();
        let (mut engine, _) = open(&disk, SMALL);
        let mut models: BTreeMap<ChunkId, (u64, Bytes)> = BTreeMap::new();
        for step in 0..60 {
            let chunk = chunk(rng.random_range(0..3));
            let update = random_update(&mut rng, chunk);
            let (version, bytes) = models.entry(chunk).or_default();
            apply(&engine, *version, update.clone()).unwrap();
            *version += 1;
            model(bytes, &update);
            assert!(
                content(&engine, chunk).as_ref() == Some(bytes),
                "seed {seed} step {step}: {:?}",
                update.kind
            );
            if rng.random_bool(0.05) {
                engine.run_batch();
                drop(engine);
                let recovered;
                (engine, recovered) = open(&disk, SMALL);
                assert_eq!(recovered.committed.len(), models.len(), "seed {seed} step {step}");
            }
        }
        // Space comes back: what is used is what the maps hold.
        engine.run_batch();
        let used = models.values().map(|(_, b)| b.len().div_ceil(BLOCK_BYTES) as u64 * BLOCK_BYTES as u64);
        engine.write(9, 0, 1, update(self::chunk(99), Kind::Write, 0, 0, Some(vec![1; 1])), true);
        engine.run_batch();
        assert!(engine.usage().used_bytes <= used.sum::<u64>() + BLOCK_BYTES as u64, "seed {seed}");
    }
}

/// Power cuts anywhere: durable versions survive, and what is found is some state in between.
#[test]
fn crashes_lose_nothing_that_was_durable_and_invent_nothing() {
    for seed in 0..400u64 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let disk = MemDisk::default();
        let (mut engine, _) = open(&disk, SMALL);
        // version → content; durable as pending at least.
        let mut states: Vec<Bytes> = vec![Bytes::new()];
        for _ in 0..6 {
            disk.fail_after(Some(rng.random_range(0..40)));
            let mut attempted: Option<Bytes> = None;
            for _ in 0..20 {
                let base = states.len() as u64 - 1;
                let update = random_update(&mut rng, chunk(0));
                let mut next = states[base as usize].clone();
                model(&mut next, &update);
                attempted = Some(next.clone());
                engine.write(1, base, base + 1, update, false);
                match written(engine.run_batch()) {
                    Ok(_) => states.push(next),
                    Err(_) => break,
                }
                attempted = None;
                engine.commit(chunk(0), base + 1);
                if rng.random_bool(0.3) {
                    engine.run_batch();
                }
            }
            drop(engine);
            disk.crash(|n| rng.random_range(0..n));
            let recovered;
            (engine, recovered) = open(&disk, SMALL);
            let durable = states.len() as u64 - 1;
            let committed = recovered.committed.first().map_or(0, |(_, m)| m.version);
            let pending = recovered.pending.first().map(|p| p.meta.version);
            let newest = pending.unwrap_or(committed);
            assert!(committed <= durable && newest >= durable && newest <= durable + 1, "seed {seed}");
            if newest > durable {
                states.push(attempted.expect("only what was attempted can appear"));
            }
            if let Some(version) = pending {
                engine.commit(chunk(0), version);
            }
            let expected = &states[newest as usize];
            assert!(
                content(&engine, chunk(0)).unwrap_or_default() == *expected,
                "seed {seed} version {newest}"
            );
        }
    }
}

#[test]
fn a_pending_version_can_be_replaced_or_dropped_without_a_trace() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, SMALL);
    let first = update(chunk(0), Kind::Write, 0, 0, Some(vec![1; 50_000]));
    apply(&engine, 0, first).unwrap();
    for fill in [2, 3] {
        engine.write(1, 1, 2, update(chunk(0), Kind::Write, 100, 0, Some(vec![fill; 100])), false);
        written(engine.run_batch()).unwrap();
    }
    assert_eq!(content(&engine, chunk(0)).unwrap(), vec![1; 50_000]);
    engine.drop_pending(chunk(0), 2);
    engine.run_batch();
    assert!(engine.plan_read(chunk(0), true).is_none());
    let (engine, recovered) = open(&disk, SMALL);
    assert_eq!((recovered.pending.len(), recovered.committed[0].1.version), (0, 1));
    assert_eq!(content(&engine, chunk(0)).unwrap(), vec![1; 50_000]);
    // The record travels with the data.
    assert_eq!(
        recovered.records.channels,
        [(ClientId(9), 3, Record { sequence: 1, version: 1, length: 50_000 })]
    );
    assert_eq!(recovered.records.attempts, [(JobId(5), AttemptEpoch(4))]);
}

#[test]
fn a_full_disk_refuses_whole_updates_and_takes_them_again_when_there_is_room() {
    let disk = MemDisk::with_limit(10 * BLOCK_BYTES as u64);
    let options = EngineOptions { grow_bytes: 5 * BLOCK_BYTES as u64, ..SMALL };
    let (engine, _) = open(&disk, options);
    let write = |index, blocks: usize| {
        update(chunk(index), Kind::Write, 0, 0, Some(vec![index as u8 + 1; blocks * BLOCK_BYTES]))
    };
    apply(&engine, 0, write(0, 8)).unwrap();
    assert_eq!(apply(&engine, 0, write(1, 3)), Err(WriteError::NoSpace));
    assert!(engine.plan_read(chunk(1), false).is_none());
    // Overwriting needs room beside the committed version; two blocks are left.
    assert_eq!(apply(&engine, 1, write(0, 3)), Err(WriteError::NoSpace));
    apply(&engine, 1, write(0, 2)).unwrap();
    apply(&engine, 2, update(chunk(0), Kind::Remove, 0, 0, None)).unwrap();
    engine.run_batch();
    apply(&engine, 0, write(1, 3)).unwrap();
    assert_eq!(content(&engine, chunk(1)).unwrap().len(), 3 * BLOCK_BYTES);
}

#[test]
fn blocks_in_the_hands_of_a_reader_are_not_reused() {
    let disk = MemDisk::with_limit(4 * BLOCK_BYTES as u64);
    let options = EngineOptions { grow_bytes: 4 * BLOCK_BYTES as u64, ..SMALL };
    let (engine, _) = open(&disk, options);
    let write = |fill| update(chunk(0), Kind::Write, 0, 0, Some(vec![fill; 2 * BLOCK_BYTES]));
    apply(&engine, 0, write(1)).unwrap();
    let reader = engine.plan_read(chunk(0), false).unwrap();
    apply(&engine, 1, write(2)).unwrap();
    engine.run_batch();
    assert_eq!(apply(&engine, 2, write(3)), Err(WriteError::NoSpace));
    let mut old = vec![0; 2 * BLOCK_BYTES];
    engine.read(&reader, 0, &mut old).unwrap();
    assert!(old.iter().all(|b| *b == 1));
    drop(reader);
    apply(&engine, 2, write(3)).unwrap();
}

#[test]
fn lost_and_misdirected_writes_show_and_are_repaired_by_the_right_bytes_only() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, SMALL);
    let bytes: Bytes = (0..40_000u32).map(|i| (i % 250) as u8 + 1).collect();
    apply(&engine, 0, update(chunk(0), Kind::Write, 0, 0, Some(bytes.clone()))).unwrap();
    disk.corrupt_data(BLOCK_BYTES as u64 + 5, 1);
    let plan = engine.plan_read(chunk(0), false).unwrap();
    let mut out = vec![0; 40_000];
    let error = engine.read(&plan, 0, &mut out).unwrap_err();
    assert!(matches!(error, EngineError::Corrupt { index: 1, .. }), "{error}");
    // Blocks that are not touched can be read; a write on the bad one asks for help.
    engine.read(&plan, 0, &mut out[..100]).unwrap();
    engine.write(4, 1, 2, update(chunk(0), Kind::Write, 20_000, 0, Some(vec![7; 10])), false);
    let done = engine.run_batch();
    assert!(matches!(done[..], [Done::Corrupt { id: 4, index: 1, .. }]), "{done:?}");
    assert!(engine.repair(&plan, 1, &bytes[..BLOCK_BYTES]).is_err());
    engine.repair(&plan, 1, &bytes[BLOCK_BYTES..2 * BLOCK_BYTES]).unwrap();
    engine.read(&plan, 0, &mut out).unwrap();
    assert!(out == bytes);
    // The same bytes at another index, chunk or version are not the same block.
    let same = update(chunk(1), Kind::Write, 0, 0, Some(bytes));
    apply(&engine, 0, same).unwrap();
    let other = engine.plan_read(chunk(1), false).unwrap();
    assert_eq!(plan.meta().digest, other.meta().digest);
    let pointers = |seal: [u8; 28]| fs3_core::target::bind(&seal, 1);
    let at = |c, i, v| pointers(super::format::seal(c, i, v));
    let all = [at(chunk(0), 0, 1), at(chunk(1), 0, 1), at(chunk(0), 1, 1), at(chunk(0), 0, 2)];
    assert_eq!(std::collections::BTreeSet::from(all).len(), 4);
}

#[test]
fn after_a_failed_flush_nothing_is_tried_again() {
    // Data write, data flush, log append, log flush: the second and fourth are flushes.
    for operation in 1..4 {
        let disk = MemDisk::default();
        let (engine, _) = open(&disk, SMALL);
        apply(&engine, 0, update(chunk(0), Kind::Write, 0, 0, Some(vec![1; 10]))).unwrap();
        engine.run_batch();
        disk.fail_after(Some(operation));
        let again = update(chunk(0), Kind::Write, 0, 0, Some(vec![2; 10]));
        assert_eq!(apply(&engine, 1, again.clone()), Err(WriteError::Failed));
        disk.fail_after(None);
        assert_eq!(apply(&engine, 1, again), Err(WriteError::Failed));
        assert!(engine.failed().is_some());
    }
}

#[test]
fn another_cluster_or_target_is_not_let_in() {
    let disk = MemDisk::default();
    drop(open(&disk, SMALL));
    let other = Header { cluster: ClusterId(1), ..HEADER };
    let refused = Engine::<_, Bytes>::open(disk.clone(), other, SMALL);
    assert!(matches!(refused, Err(EngineError::Foreign { .. })));
    disk.edit_file("header", |bytes| bytes[8] = 2);
    let refused = Engine::<_, Bytes>::open(disk, HEADER, SMALL).err().unwrap();
    assert!(matches!(refused, EngineError::Format(FormatError::TooNew { found: 2 })), "{refused}");
}

#[test]
fn damage_in_the_middle_of_the_log_is_not_taken_for_a_torn_tail() {
    let disk = MemDisk::default();
    let (engine, _) = open(&disk, EngineOptions::default());
    for version in 0..5 {
        apply(&engine, version, update(chunk(0), Kind::Write, 0, 0, Some(vec![version as u8 + 1; 10])))
            .unwrap();
    }
    drop(engine);
    disk.edit_file("log.1", |bytes| {
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
    });
    let (_, recovered) = open(&disk, SMALL);
    assert_eq!(recovered.committed[0].1.version, 3);
    disk.edit_file("log.1", |bytes| bytes[60] ^= 1);
    let refused = Engine::<_, Bytes>::open(disk, HEADER, SMALL).err().unwrap();
    assert!(matches!(refused, EngineError::Format(FormatError::Damaged(_))), "{refused}");
}

#[test]
fn a_real_folder_works_and_belongs_to_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t7");
    let disk = FileDisk::open(&path).unwrap();
    assert!(FileDisk::open(&path).is_err());
    let (engine, _) = Engine::<_, Bytes>::open(disk, HEADER, EngineOptions::default()).unwrap();
    let bytes: Bytes = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    engine.write(1, 0, 1, update(chunk(0), Kind::Write, 3, 0, Some(bytes.clone())), false);
    assert!(matches!(engine.run_batch()[..], [Done::Written { result: Ok(_), .. }]));
    drop(engine);
    let disk = FileDisk::open(&path).unwrap();
    let (engine, recovered) = Engine::<_, Bytes>::open(disk, HEADER, EngineOptions::default()).unwrap();
    assert_eq!(recovered.pending.len(), 1);
    engine.commit(chunk(0), 1);
    let plan = engine.plan_read(chunk(0), false).unwrap();
    let mut out = AlignedBuf::zeroed(plan.meta().length as usize);
    engine.read(&plan, 0, &mut out).unwrap();
    assert!(out[3..] == bytes[..]);
}

fn samples() -> Vec<LogRecord> {
    let ptr = BlockPtr { block: 5, crc: 0x0102_0304, version: 6 };
    let record = Record { sequence: 11, version: 12, length: 13 };
    vec![
        LogRecord::Pending {
            chunk: chunk(3),
            base: 1,
            version: 2,
            length: 20_000,
            removes: false,
            at_once: true,
            context: context(8),
            changes: vec![(1, ptr)],
        },
        LogRecord::Commit { chunk: chunk(3), version: 2 },
        LogRecord::Drop { chunk: chunk(3), version: 3 },
        LogRecord::Remove { chunk: chunk(3) },
        LogRecord::Page(RecordPage {
            channels: vec![(ClientId(9), 3, record)],
            sessions: vec![(ClientId(9), SessionEpoch(1))],
            attempts: vec![(JobId(5), AttemptEpoch(4))],
            version_floor: 14,
        }),
        LogRecord::Chunk { chunk: chunk(3), version: 6, length: 16_384, map: vec![ptr] },
        LogRecord::End { entries: 2 },
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Format 1 as it was released: a change here is a new format version.
#[test]
fn golden_bytes() {
    assert_eq!(hex(&HEADER.encode()), include_str!("golden/header.hex").trim());
    let golden = include_str!("golden/records.hex");
    let encoded: Vec<String> = samples()
        .iter()
        .map(|record| {
            let mut out = Vec::new();
            record.encode(&mut out);
            hex(&out)
        })
        .collect();
    assert_eq!(encoded, golden.lines().collect::<Vec<_>>());
    let mut frame = super::format::preamble(false, 3);
    super::format::put_frame(&mut frame, 3, 0, b"body");
    assert_eq!(hex(&frame), include_str!("golden/log.hex").trim());
}

#[test]
fn records_round_trip() {
    let mut all = Vec::new();
    for record in samples() {
        record.encode(&mut all);
    }
    assert_eq!(LogRecord::decode_all(&all).unwrap(), samples());
    assert_eq!(Header::decode(&HEADER.encode()).unwrap(), HEADER);
}

proptest! {
    /// Whatever lies on disk, reading it ends in records or an error, never in a panic.
    #[test]
    fn decoders_survive_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = LogRecord::decode_all(&bytes);
        let _ = Header::decode(&bytes);
        let _ = read_frames(&bytes, 1);
    }

    /// One changed byte in a header or a frame never passes for the original or for another one.
    #[test]
    fn a_changed_byte_is_noticed(at in any::<proptest::sample::Index>(), flip in 1u8..) {
        let mut header = HEADER.encode();
        header[at.index(40)] ^= flip;
        prop_assert!(Header::decode(&header).is_err());
        let mut log = super::format::preamble(false, 1);
        let begin = log.len();
        let mut body = Vec::new();
        samples()[0].encode(&mut body);
        super::format::put_frame(&mut log, 1, 0, &body);
        let at = begin + at.index(log.len() - begin);
        log[at] ^= flip;
        let frames = read_frames(&log, 1);
        prop_assert!(frames.is_ok_and(|f| f.bodies.is_empty() && f.end == begin));
    }

    /// Records with one changed byte decode to something or to an error, and replay in an image
    /// does not panic either.
    #[test]
    fn a_changed_record_does_no_harm(which in 0usize..7, at in any::<proptest::sample::Index>(), flip in 1u8..) {
        let mut bytes = Vec::new();
        samples()[which].encode(&mut bytes);
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if let Ok(records) = LogRecord::decode_all(&bytes) {
            let mut image = super::image::Image::default();
            for record in records {
                let _ = image.replay(record);
            }
        }
    }
}
