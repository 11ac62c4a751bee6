//! Notes: the small messages by which two sides of an RDMA channel steer it. They travel beside
//! the ring (by SEND into the receive's own memory), so that they never wait behind a payload
//! which nobody has posted memory for.
//!
//! ```text
//! 0  magic    4  "FFCN"
//! 4  kind     1
//! 5  reserved 3  0
//! 8  credit   4  see `credit`
//! 12 key      4  Clear: the remote key of the memory; else 0
//! 16 offer    8  Clear, Ring: which offer is answered, counted from 0; else 0
//! 24 address  8  Clear: where the payload goes; else 0
//! 32 len      8  Clear: bytes that fit there; else 0
//! 40
//! ```

use super::super::ChannelError;
use super::credit::Credit;

/// Bytes of a note.
pub(super) const NOTE_BYTES: usize = 40;
const MAGIC: [u8; 4] = *b"FFCN";

/// What a note says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Note {
    /// Credit alone.
    Credit,
    /// "Can you hear me?", once each way before a channel is used.
    Probe,
    /// "Write the payload of this offer here."
    Clear { offer: u64, address: u64, key: u32, len: u64 },
    /// "Send the payload of this offer through the ring": its memory is in no region.
    Ring { offer: u64 },
}

impl Note {
    pub(super) fn encode(self, credit: Credit) -> [u8; NOTE_BYTES] {
        let (kind, offer, address, key, len) = match self {
            Note::Credit => (1u8, 0, 0, 0, 0),
            Note::Probe => (2, 0, 0, 0, 0),
            Note::Clear { offer, address, key, len } => (3, offer, address, key, len),
            Note::Ring { offer } => (4, offer, 0, 0, 0),
        };
        let mut out = [0; NOTE_BYTES];
        out[..4].copy_from_slice(&MAGIC);
        out[4] = kind;
        out[8..12].copy_from_slice(&credit.encode().to_le_bytes());
        out[12..16].copy_from_slice(&key.to_le_bytes());
        out[16..24].copy_from_slice(&offer.to_le_bytes());
        out[24..32].copy_from_slice(&address.to_le_bytes());
        out[32..40].copy_from_slice(&len.to_le_bytes());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<(Note, Credit), ChannelError> {
        let broken = |what: String| ChannelError::Protocol(what);
        let bytes: &[u8; NOTE_BYTES] = bytes
            .try_into()
            .map_err(|_| broken(format!("a note of {} bytes instead of {NOTE_BYTES}", bytes.len())))?;
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if bytes[..4] != MAGIC || bytes[5..8] != [0; 3] {
            return Err(broken(format!("a note starts with {:02x?}", &bytes[..8])));
        }
        let (key, offer, address, len) = (u32_at(12), u64_at(16), u64_at(24), u64_at(32));
        let note = match bytes[4] {
            1 => Note::Credit,
            2 => Note::Probe,
            3 => Note::Clear { offer, address, key, len },
            4 => Note::Ring { offer },
            other => return Err(broken(format!("a note of kind {other}, which is not defined"))),
        };
        let credit = Credit::decode(u32_at(8));
        if credit.direct || note.encode(credit) != *bytes {
            return Err(broken("a note has fields that its kind does not use".into()));
        }
        Ok((note, credit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let note = Note::Clear { offer: 5, address: 0x0102_0304_0506_0708, key: 9, len: 10 };
        let hex: String =
            note.encode(Credit::decode(0x0001_0002)).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "4646434e030000000200010009000000050000000000000008070605040302010a00000000000000");
    }

    proptest! {
        #[test]
        fn arbitrary_notes_are_refused_or_canonical(
            bytes in prop::collection::vec(any::<u8>(), 0..60),
            fix in any::<bool>(),
            kind in 0u8..6,
        ) {
            let mut bytes = bytes;
            if fix {
                bytes.resize(NOTE_BYTES, 0);
                bytes[..8].copy_from_slice(b"FFCN\0\0\0\0");
                bytes[4] = kind;
                bytes[11] &= 0x7F;
                if kind != 3 {
                    bytes[24..].fill(0);
                    bytes[12..16].fill(0);
                    if kind != 4 { bytes[16..24].fill(0); }
                }
            }
            match Note::decode(&bytes) {
                Ok((note, credit)) => prop_assert_eq!(note.encode(credit).to_vec(), bytes),
                Err(_) => prop_assert!(!fix || kind == 0 || kind == 5),
            }
        }
    }
}
