//! Records byte by byte, and decoders under garbage.

use super::*;
use firefly_types::{ClientId, DataId, ErrorKind, Generation, InodeId, WireError};
use proptest::prelude::*;

/// Bytes from hexadecimal text with blanks.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

fn layout() -> FileLayout {
    FileLayout { chunk_bytes: 1 << 20, stripe: 2, chains: vec![7, 8] }
}

fn inode() -> InodeRecord {
    let at = |seconds| Stamp { seconds, nanos: 0x0a0b_0c0d };
    InodeRecord {
        id: InodeId(9),
        kind: Kind::File,
        mode: 0o4755,
        uid: 1000,
        gid: 1001,
        nlink: 2,
        length: 0x0102_0304_0506_0708,
        atime: at(1),
        mtime: at(2),
        ctime: at(3),
        btime: at(-1),
        data: DataId(0x11),
        generation: Generation(0x22),
        truncates: 0x33,
        rdev: 0x44,
        parent: InodeId(0x55),
        version: 0x66,
        layout: layout(),
        target: b"to".to_vec(),
    }
}

const LAYOUT: &str = "00001000 02000000 02000000 07000000 08000000";

#[test]
fn golden_inode() {
    let bytes = hex(&format!(
        "01 01 ed090000 e8030000 e9030000 02000000 0807060504030201
         0100000000000000 0d0c0b0a 0200000000000000 0d0c0b0a
         0300000000000000 0d0c0b0a ffffffffffffffff 0d0c0b0a
         1100000000000000 22000000 3300000000000000 44000000 5500000000000000 6600000000000000
         {LAYOUT} 02000000 746f"
    ));
    assert_eq!(inode().encode(), bytes);
    assert_eq!(InodeRecord::decode(InodeId(9), &bytes).unwrap(), inode());
}

#[test]
fn golden_small_records() {
    let stamp = Stamp { seconds: 5, nanos: 6 };
    let times = DirTimes { mtime: stamp, ctime: Stamp { seconds: 7, nanos: 8 }, version: 9 };
    let bytes = hex("01 0500000000000000 06000000 0700000000000000 08000000 0900000000000000");
    assert_eq!((times.encode(), DirTimes::decode(&bytes)), (bytes, Ok(times)));

    let dentry = DentryRecord { inode: InodeId(0x0102), kind: Kind::Symlink };
    let bytes = hex("01 03 0201000000000000");
    assert_eq!((dentry.encode(), DentryRecord::decode(&bytes)), (bytes, Ok(dentry)));

    let session = SessionRecord { client: ClientId(1), epoch: 2, write: true, uid: 3, truncates: 4 };
    let bytes = hex("01 0100000000000000 0200000000000000 01 03000000 0400000000000000");
    assert_eq!((session.encode(), SessionRecord::decode(&bytes)), (bytes, Ok(session)));

    let client = ClientRecord { epoch: 1, expired_through: 2, drained_through: 3 };
    let bytes = hex("01 0100000000000000 0200000000000000 0300000000000000");
    assert_eq!((client.encode(), ClientRecord::decode(&bytes)), (bytes, Ok(client)));

    let garbage = GarbageRecord { since: stamp, layout: layout() };
    let bytes = hex(&format!("01 0500000000000000 06000000 {LAYOUT}"));
    assert_eq!((garbage.encode(), GarbageRecord::decode(&bytes)), (bytes, Ok(garbage)));

    let usage = Usage { inodes: 1, bytes: -2 };
    let bytes = hex("01 0100000000000000 feffffffffffffff");
    assert_eq!((usage.encode(), Usage::decode(&bytes)), (bytes, Ok(usage)));
}

#[test]
fn golden_exactly_once_records() {
    let head = "01 0100000000000000 0200000000000000 04010000";
    let with = |reply| LaneRecord { epoch: 1, sequence: 2, method: 0x0104, reply };
    let done = with(LaneReply::Done(vec![0xaa, 0xbb]));
    let bytes = hex(&format!("{head} 00 02000000 aabb"));
    assert_eq!((done.encode(), LaneRecord::decode(&bytes)), (bytes, Ok(done)));
    let refused = with(LaneReply::Refused(WireError::new(ErrorKind::NotEmpty, "no")));
    let bytes = hex(&format!("{head} 01 0c000000 02000000 6e6f"));
    assert_eq!((refused.encode(), LaneRecord::decode(&bytes)), (bytes, Ok(refused)));
}

#[test]
fn another_format_or_a_cut_record_is_an_error() {
    let good = inode().encode();
    for len in 0..good.len() {
        assert!(InodeRecord::decode(InodeId(9), &good[..len]).is_err(), "{len}");
    }
    let longer = [good.as_slice(), &[0]].concat();
    assert!(InodeRecord::decode(InodeId(9), &longer).is_err());
    let mut newer = good.clone();
    newer[0] = 2;
    let error = InodeRecord::decode(InodeId(9), &newer).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("format 2"), "{error}");
}

proptest! {
    /// Whatever decodes is exactly what would be written.
    #[test]
    fn decoders_survive_anything(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), first in 0u8..3) {
        if let Some(version) = bytes.first_mut() {
            *version = first;
        }
        if let Ok(inode) = InodeRecord::decode(InodeId(9), &bytes) {
            prop_assert_eq!(inode.encode(), bytes.clone());
        }
        if let Ok(times) = DirTimes::decode(&bytes) {
            prop_assert_eq!(times.encode(), bytes.clone());
        }
        if let Ok(dentry) = DentryRecord::decode(&bytes) {
            prop_assert_eq!(dentry.encode(), bytes.clone());
        }
        if let Ok(garbage) = GarbageRecord::decode(&bytes) {
            prop_assert_eq!(garbage.encode(), bytes.clone());
        }
        let _ = (SessionRecord::decode(&bytes), ClientRecord::decode(&bytes));
        let _ = (LaneRecord::decode(&bytes), Usage::decode(&bytes));
    }

    /// One flipped byte of a real record is read as something else or refused, never a panic.
    #[test]
    fn decoders_survive_damage(at in 0usize..140, to: u8) {
        let mut bytes = inode().encode();
        let at = at % bytes.len();
        bytes[at] = to;
        let _ = InodeRecord::decode(InodeId(9), &bytes);
    }
}
