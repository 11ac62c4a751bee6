//! Bytes on disk: as they were released, and as they may never be.

use super::super::format::{SUPER_BYTES, frame, frame_at};
use super::super::leaf::Leaf;
use super::super::log::{Log, read_frames};
use super::*;
use fs3_core::target::{Record, RecordPage};
use proptest::prelude::*;

fn superblock() -> Superblock {
    Superblock {
        header: HEADER,
        sector_bytes: 512,
        generation: 9,
        log_first: 2,
        log_blocks: 16,
        log_offset: 1024,
        log_sequence: 77,
        root: PagePtr { block: 30, crc: 0x0102_0304 },
        root_bytes: 500,
    }
}

fn samples() -> Vec<LogRecord> {
    let record = Record { sequence: 11, version: 12, length: 13 };
    let pending = PendingRecord {
        chunk: chunk(3),
        base: 1,
        version: 2,
        length: 20_000,
        digest: 0x0506_0708,
        removes: false,
        at_once: true,
        whole: false,
        context: context(8),
        changes: vec![
            Change { first: 1, count: 2, block: 5, crcs: vec![0x0102_0304, 0x1112_1314] },
            Change { first: 4, count: 1, block: u32::MAX, crcs: vec![] },
        ],
    };
    vec![
        LogRecord::Pending(pending),
        LogRecord::Commit { chunk: chunk(3), version: 2 },
        LogRecord::Drop { chunk: chunk(3), version: 3 },
        LogRecord::Remove { chunk: chunk(3) },
        LogRecord::Page(RecordPage {
            channels: vec![(ClientId(9), 3, record)],
            sessions: vec![(ClientId(9), SessionEpoch(1))],
            attempts: vec![(JobId(5), AttemptEpoch(4))],
            version_floor: 14,
        }),
        LogRecord::Mark,
    ]
}

fn leaf() -> Leaf {
    let mut leaf = Leaf::default();
    leaf.set(2, 900, 5, &[1, 2, 3]);
    leaf.set(9, 100, 6, &[4]);
    leaf
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Format 2 as it is: a change here is a new format version.
#[test]
fn golden_bytes() {
    let mut lines = vec![hex(&superblock().encode())];
    for record in samples() {
        let mut out = Vec::new();
        record.encode(&mut out);
        lines.push(hex(&out));
    }
    lines.push(hex(&frame(HEADER.seed(), 3, b"body")));
    lines.push(hex(&leaf().encode()));
    lines.push(hex(&super::super::index::golden()));
    let expected: Vec<&str> =
        include_str!("../golden/format.hex").lines().filter(|l| !l.starts_with('#')).collect();
    if lines != expected {
        panic!("these bytes are another format:\n{}", lines.join("\n"));
    }
}

#[test]
fn records_round_trip() {
    let mut all = Vec::new();
    samples().iter().for_each(|record| record.encode(&mut all));
    assert_eq!(LogRecord::decode_all(&all).unwrap(), samples());
    assert_eq!(Superblock::decode(&superblock().encode()).unwrap(), Some(superblock()));
    assert_eq!(Superblock::decode(&[0; SUPER_BYTES]).unwrap(), None);
}

fn ring() -> Log {
    Log { first: 2, bytes: 8192, sector: 512, head: 0, head_sequence: 1, tail: 0, sequence: 1 }
}

/// Frames that go round the ring are found again, wherever the head is.
#[test]
fn a_ring_wraps_at_its_end() {
    let mut log = ring();
    let mut bytes = vec![0; 8192];
    for sequence in 1..200u64 {
        let body = vec![sequence as u8; (sequence as usize * 37) % 900];
        let frame = frame(5, sequence, &body);
        let Some(at) = log.place(frame.len() as u64, 0) else {
            // A checkpoint frees what lies before the last three frames.
            let frames = read_frames(&bytes, &log, 5, false).unwrap();
            assert_eq!(frames.tail, log.tail);
            assert_eq!(frames.found.len() as u64, log.sequence - log.head_sequence);
            let keep = frames.found.len() - 3;
            (log.head, log.head_sequence) = (frames.found[keep].0, log.head_sequence + keep as u64);
            // The head of a checkpoint is where the frame before it ended.
            continue;
        };
        if log.sequence != sequence {
            continue;
        }
        bytes[at as usize..at as usize + frame.len()].copy_from_slice(&frame);
        log.advance(at, frame.len() as u64);
        assert_eq!(read_frames(&bytes, &log, 5, false).unwrap().found.last().unwrap().1, body);
        assert!(log.used() <= log.bytes - log.sector);
    }
}

proptest! {
    /// Whatever lies on disk, reading it ends in values or an error, never in a panic.
    #[test]
    fn decoders_survive_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = LogRecord::decode_all(&bytes);
        let _ = Superblock::decode(&bytes);
        let _ = frame_at(&bytes, 1);
        let mut padded = bytes;
        padded.resize(8192, 0);
        let _ = read_frames(&padded, &ring(), 1, false);
    }

    /// One changed byte in a superblock or a frame never passes for the original or another one.
    #[test]
    fn a_changed_byte_is_noticed(at in any::<proptest::sample::Index>(), flip in 1u8..) {
        let mut bytes = superblock().encode();
        bytes[at.index(SUPER_BYTES)] ^= flip;
        prop_assert!(Superblock::decode(&bytes).is_err());
        let mut body = Vec::new();
        samples()[0].encode(&mut body);
        let mut bytes = frame(HEADER.seed(), 1, &body);
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        prop_assert!(frame_at(&bytes, HEADER.seed()).is_none());
    }

    /// Records with one changed byte decode to something or to an error; a volume whose log holds
    /// them opens or says why not.
    #[test]
    fn a_changed_record_does_no_harm(which in 0usize..6, at in any::<proptest::sample::Index>(), flip in 1u8..) {
        let mut body = Vec::new();
        samples()[which].encode(&mut body);
        let at = at.index(body.len());
        body[at] ^= flip;
        let disk = MemDisk::default();
        let (engine, _) = open(&disk, SMALL);
        apply(&engine, &disk, 0, update(chunk(3), Kind::Write, 0, 0, Some(vec![1; 20_000]))).unwrap();
        engine.close();
        engine.run(&disk);
        let log = firefly_types::lock(&engine.writer).log;
        let frame = frame(HEADER.seed(), log.sequence, &body);
        let offset = log.offset(log.tail) as usize;
        disk.edit(|volume| volume[offset..offset + frame.len()].copy_from_slice(&frame));
        // A frame behind it, so that it is believed.
        let next = super::super::format::frame(HEADER.seed(), log.sequence + 1, &[6]);
        let offset = offset + frame.len().next_multiple_of(4096);
        disk.edit(|volume| volume[offset..offset + next.len()].copy_from_slice(&next));
        if let Ok((engine, _)) = Core::<Bytes>::open(&disk, HEADER, SMALL) {
            let _ = read(&engine, &disk, chunk(3), false);
            let _ = read(&engine, &disk, chunk(3), true);
        }
    }
}
