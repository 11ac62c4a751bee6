//! Bytes of the log: segment headers, frames, records. `docs/formats.md`, section "store log", is
//! the specification; the golden test below pins it.
//!
//! One frame is what one fdatasync makes durable, and the next frame is written only after that
//! fdatasync has returned. Hence the rule that tells a torn tail from bit rot: a frame that does
//! not check out is the unacknowledged end of the log *unless a valid frame follows it*, because
//! that one proves that the first had been synced.

use raft::eraftpb::{Entry, EntryType, HardState};

pub(crate) const SEGMENT_MAGIC: [u8; 8] = *b"FFSTLOG1";
pub(crate) const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"FRME");
pub(crate) const FORMAT_VERSION: u32 = 1;
pub(crate) const SEGMENT_HEADER_BYTES: usize = 64;
pub(crate) const FRAME_HEADER_BYTES: usize = 24;
/// Frames start at multiples of this, so that a search for one after damage is quick.
pub(crate) const FRAME_ALIGN: usize = 8;
/// Twice what a batch may hold; a longer length is damage.
pub(crate) const MAX_FRAME_BYTES: usize = 64 << 20;

const RECORD_ENTRY: u8 = 1;
const RECORD_HARD_STATE: u8 = 2;

/// What stands at the start of each segment file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    /// Binds segments and state machine of one store together.
    pub store_id: u64,
    /// Increases by one from segment to segment; also the file's name.
    pub segment: u64,
    /// Sequence number of the segment's first frame.
    pub first_frame: u64,
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut out = [0; SEGMENT_HEADER_BYTES];
        out[..8].copy_from_slice(&SEGMENT_MAGIC);
        out[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&(SEGMENT_HEADER_BYTES as u32).to_le_bytes());
        out[16..24].copy_from_slice(&self.store_id.to_le_bytes());
        out[24..32].copy_from_slice(&self.segment.to_le_bytes());
        out[32..40].copy_from_slice(&self.first_frame.to_le_bytes());
        let crc = crc32c::crc32c(&out[..60]);
        out[60..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `Err` holds what is wrong.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let Some(head) = bytes.get(..SEGMENT_HEADER_BYTES) else {
            return Err(format!("{} bytes are shorter than a segment header", bytes.len()));
        };
        if head[..8] != SEGMENT_MAGIC {
            return Err("it does not start like a log segment".into());
        }
        if le32(head, 60) != crc32c::crc32c(&head[..60]) {
            return Err("the segment header fails its checksum".into());
        }
        let version = le32(head, 8);
        if version != FORMAT_VERSION {
            return Err(format!(
                "log format {version} is not known to this release, which reads {FORMAT_VERSION}"
            ));
        }
        Ok(Self { store_id: le64(head, 16), segment: le64(head, 24), first_frame: le64(head, 32) })
    }
}

/// One thing that the log remembers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Record {
    Entry(Entry),
    HardState(HardState),
}

/// Builds one frame.
pub(crate) struct FrameBuilder {
    bytes: Vec<u8>,
    records: u32,
}

impl FrameBuilder {
    pub(crate) fn new() -> Self {
        Self { bytes: vec![0; FRAME_HEADER_BYTES], records: 0 }
    }

    pub(crate) fn entry(&mut self, entry: &Entry) {
        debug_assert!(entry.context.is_empty(), "the store proposes without context");
        self.bytes.push(RECORD_ENTRY);
        self.bytes.push(entry.entry_type as u8);
        self.bytes.extend_from_slice(&entry.index.to_le_bytes());
        self.bytes.extend_from_slice(&entry.term.to_le_bytes());
        self.bytes.extend_from_slice(&(entry.data.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(&entry.data);
        self.records += 1;
    }

    pub(crate) fn hard_state(&mut self, state: &HardState) {
        self.bytes.push(RECORD_HARD_STATE);
        self.bytes.extend_from_slice(&state.term.to_le_bytes());
        self.bytes.extend_from_slice(&state.vote.to_le_bytes());
        self.bytes.extend_from_slice(&state.commit.to_le_bytes());
        self.records += 1;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// The frame's bytes, padded to [`FRAME_ALIGN`].
    pub(crate) fn finish(mut self, store_id: u64, segment: u64, sequence: u64) -> Vec<u8> {
        let payload = self.bytes.len() - FRAME_HEADER_BYTES;
        assert!(payload <= MAX_FRAME_BYTES, "the driver limits batches to half a frame");
        self.bytes[0..4].copy_from_slice(&FRAME_MAGIC.to_le_bytes());
        self.bytes[4..8].copy_from_slice(&(payload as u32).to_le_bytes());
        self.bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
        self.bytes[16..20].copy_from_slice(&self.records.to_le_bytes());
        let crc = frame_crc(store_id, segment, &self.bytes[..20], &self.bytes[FRAME_HEADER_BYTES..]);
        self.bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(FRAME_ALIGN), 0);
        self.bytes
    }
}

/// Covers which store and segment the frame belongs to, so that a block that a file system hands
/// out again, still holding an old frame, does not pass.
fn frame_crc(store_id: u64, segment: u64, head: &[u8], payload: &[u8]) -> u32 {
    let mut seed = [0; 16];
    seed[..8].copy_from_slice(&store_id.to_le_bytes());
    seed[8..].copy_from_slice(&segment.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&seed), head), payload)
}

/// A frame that checks out.
pub(crate) struct Frame {
    pub sequence: u64,
    pub records: Vec<Record>,
    /// Bytes that it takes in the file, padding included.
    pub bytes: usize,
}

/// What stands at one place of a segment.
pub(crate) enum Parsed {
    Frame(Frame),
    /// Nothing more.
    End,
    /// Not a frame: a torn tail or damage.
    Bad(String),
}

/// Reads the frame at the start of `bytes`.
pub(crate) fn parse_frame(bytes: &[u8], store_id: u64, segment: u64) -> Parsed {
    if bytes.is_empty() {
        return Parsed::End;
    }
    let Some(head) = bytes.get(..FRAME_HEADER_BYTES) else {
        return Parsed::Bad("a frame header is cut short".into());
    };
    if le32(head, 0) != FRAME_MAGIC {
        return Parsed::Bad("no frame starts here".into());
    }
    let length = le32(head, 4) as usize;
    if length > MAX_FRAME_BYTES {
        return Parsed::Bad(format!("a frame claims {length} bytes"));
    }
    let Some(payload) = bytes.get(FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + length) else {
        return Parsed::Bad("a frame is cut short".into());
    };
    if le32(head, 20) != frame_crc(store_id, segment, &head[..20], payload) {
        return Parsed::Bad("a frame fails its checksum".into());
    }
    let padded = (FRAME_HEADER_BYTES + length).next_multiple_of(FRAME_ALIGN);
    match parse_records(payload, le32(head, 16)) {
        Some(records) => {
            Parsed::Frame(Frame { sequence: le64(head, 8), records, bytes: padded.min(bytes.len()) })
        }
        None => Parsed::Bad("a frame checks out but its records make no sense".into()),
    }
}

/// Offset of the next valid frame in `bytes` at or after `from`, if any.
pub(crate) fn find_frame(bytes: &[u8], from: usize, store_id: u64, segment: u64) -> Option<usize> {
    let magic = FRAME_MAGIC.to_le_bytes();
    (from.next_multiple_of(FRAME_ALIGN)..bytes.len()).step_by(FRAME_ALIGN).find(|&at| {
        bytes[at..].starts_with(&magic)
            && matches!(parse_frame(&bytes[at..], store_id, segment), Parsed::Frame(_))
    })
}

fn parse_records(mut bytes: &[u8], count: u32) -> Option<Vec<Record>> {
    let mut records = Vec::new();
    for _ in 0..count {
        let (&kind, rest) = bytes.split_first()?;
        bytes = rest;
        match kind {
            RECORD_ENTRY => {
                let head = take(&mut bytes, 21)?;
                let entry_type = EntryType::from_i32(i32::from(head[0]))?;
                let data = take(&mut bytes, le32(head, 17) as usize)?.to_vec();
                let mut entry = Entry { index: le64(head, 1), term: le64(head, 9), ..Default::default() };
                entry.data = data;
                entry.set_entry_type(entry_type);
                records.push(Record::Entry(entry));
            }
            RECORD_HARD_STATE => {
                let body = take(&mut bytes, 24)?;
                records.push(Record::HardState(HardState {
                    term: le64(body, 0),
                    vote: le64(body, 8),
                    commit: le64(body, 16),
                }));
            }
            _ => return None,
        }
    }
    bytes.is_empty().then_some(records)
}

fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(head)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn sample_frame() -> Vec<u8> {
        let mut frame = FrameBuilder::new();
        frame.hard_state(&HardState { term: 2, vote: 1, commit: 6 });
        let mut entry = Entry { index: 7, term: 2, ..Default::default() };
        entry.data = b"abc".to_vec();
        frame.entry(&entry);
        frame.finish(0x1122, 3, 9)
    }

    #[test]
    fn golden_bytes() {
        let header = SegmentHeader { store_id: 0x1122, segment: 3, first_frame: 9 };
        assert_eq!(
            hex(&header.encode()),
            "464653544c4f47310100000040000000221100000000000003000000000000000900000000000000\
             0000000000000000000000000000000000000000da74b37d"
        );
        assert_eq!(SegmentHeader::decode(&header.encode()), Ok(header));
        let wanted = [
            "46524d45320000000900000000000000020000008bca77ad", // head: 50 bytes, frame 9, 2 records
            "02020000000000000001000000000000000600000000000000", // hard state
            "010007000000000000000200000000000000",
            "03000000616263", // entry 7
            "000000000000",   // padding
        ]
        .concat();
        assert_eq!(hex(&sample_frame()), wanted);
    }

    #[test]
    fn frames_round_trip_and_belong_to_one_segment() {
        let bytes = sample_frame();
        let Parsed::Frame(frame) = parse_frame(&bytes, 0x1122, 3) else {
            panic!("a valid frame was refused")
        };
        assert_eq!((frame.sequence, frame.records.len(), frame.bytes), (9, 2, bytes.len()));
        assert!(matches!(parse_frame(&bytes, 0x1122, 4), Parsed::Bad(_)), "another segment's frame passed");
        assert!(matches!(parse_frame(&bytes, 0x1123, 3), Parsed::Bad(_)), "another store's frame passed");
    }

    proptest! {
        #[test]
        fn any_changed_bit_is_noticed(at in 0usize..65, bit in 0u8..8) {
            let mut bytes = sample_frame();
            let at = at % (FRAME_HEADER_BYTES + 25 + 25);
            bytes[at] ^= 1 << bit;
            prop_assert!(matches!(parse_frame(&bytes, 0x1122, 3), Parsed::Bad(_)));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), count in 0u32..9) {
            let _ = parse_frame(&bytes, 1, 1);
            let _ = parse_records(&bytes, count);
            let _ = SegmentHeader::decode(&bytes);
            let mut framed = FRAME_MAGIC.to_le_bytes().to_vec();
            framed.extend(&bytes);
            let _ = parse_frame(&framed, 1, 1);
            let _ = find_frame(&framed, 0, 1, 1);
        }

        #[test]
        fn a_cut_frame_is_never_accepted(keep in 0usize..73) {
            let bytes = sample_frame();
            let keep = keep % (FRAME_HEADER_BYTES + 25 + 25);
            prop_assert!(!matches!(parse_frame(&bytes[..keep], 0x1122, 3), Parsed::Frame(_)));
        }
    }
}
