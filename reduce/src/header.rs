//! The 64 bytes in front of every message between two ranks, and what an operation is called in
//! them. All fields are little-endian. Everything a receiver needs to tell "the message I wait
//! for" from "my peer does something else" is here, so that a difference becomes an error.

use crate::dtype::{DType, redop_name};
use firefly_net::HEADER_BYTES;
use std::fmt;

const MAGIC: u32 = 0x3152_4646; // "FFR1"

/// What a message is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum MessageKind {
    /// Part of a collective, sent without asking.
    Eager = 1,
    /// "Send me this part of the collective": its receiver has posted the memory.
    Clear = 2,
    /// Part of a collective, sent after [`MessageKind::Clear`].
    Data = 3,
    /// Point-to-point, sent without asking.
    EagerP2p = 4,
    /// Point-to-point: "I have `len` bytes for this tag".
    Offer = 5,
    /// Answer to an offer: a receive has matched it.
    ClearP2p = 6,
    /// Point-to-point payload after [`MessageKind::ClearP2p`].
    DataP2p = 7,
    /// Sign of life.
    Heartbeat = 8,
    /// The sender's group is broken; the payload says why.
    Failed = 9,
    /// The sender leaves in order and will send nothing more.
    Bye = 10,
    /// Everything up to the peer's [`MessageKind::Bye`] has arrived.
    ByeSeen = 11,
    /// "I wait for you in this operation": lets the peer notice a difference.
    Probe = 12,
    /// An eager point-to-point message has found its receive.
    Taken = 13,
    /// Answer to [`MessageKind::Probe`], as soon as it is true: "I have issued this operation".
    Here = 14,
}

impl MessageKind {
    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Eager,
            2 => Self::Clear,
            3 => Self::Data,
            4 => Self::EagerP2p,
            5 => Self::Offer,
            6 => Self::ClearP2p,
            7 => Self::DataP2p,
            8 => Self::Heartbeat,
            9 => Self::Failed,
            10 => Self::Bye,
            11 => Self::ByeSeen,
            12 => Self::Probe,
            13 => Self::Taken,
            14 => Self::Here,
            _ => return None,
        })
    }
}

/// Which collective; numbers as in the C ABI.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum OpKind {
    AllReduce = 0,
    Reduce = 1,
    Broadcast = 2,
    AllGather = 3,
    ReduceScatter = 4,
    AllToAll = 5,
    Gather = 6,
    Scatter = 7,
    // 8 to 10 are the point-to-point operations, which have no descriptor.
    Barrier = 11,
}

fn op_name(code: u8) -> &'static str {
    match code {
        0 => "allreduce",
        1 => "reduce",
        2 => "broadcast",
        3 => "all-gather",
        4 => "reduce-scatter",
        5 => "all-to-all",
        6 => "gather",
        7 => "scatter",
        8 => "send",
        9 => "receive",
        10 => "receive from any",
        11 => "barrier",
        _ => "unknown operation",
    }
}

/// "No root" and "no reduction" in a [`Descriptor`].
pub(crate) const NO_ROOT: u32 = u32::MAX;
pub(crate) const NO_REDOP: u8 = u8::MAX;

/// What must be equal on all ranks at one place of the sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Descriptor {
    pub(crate) op: u8,
    pub(crate) dtype: u8,
    pub(crate) redop: u8,
    pub(crate) root: u32,
    /// Elements; 0 where ranks may differ (all-to-all).
    pub(crate) count: u64,
}

impl fmt::Display for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(op_name(self.op))?;
        if self.redop != NO_REDOP {
            write!(f, " {}", redop_name(self.redop))?;
        }
        if self.op != OpKind::Barrier as u8 {
            match DType::from_code(i32::from(self.dtype)) {
                Some(dtype) => write!(f, " {dtype}")?,
                None => f.write_str(" unknown type")?,
            }
            if self.op != OpKind::AllToAll as u8 {
                write!(f, " x {}", self.count)?;
            }
        }
        if self.root != NO_ROOT {
            write!(f, " root {}", self.root)?;
        }
        Ok(())
    }
}

/// One header, decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) kind: MessageKind,
    /// Which forming of which group: two never share a link, so a difference is a stray message.
    pub(crate) group: u32,
    /// Sequence number of the collective, or identifier of the send.
    pub(crate) sequence: u64,
    /// Which piece of a collective, or the tag.
    pub(crate) part: u32,
    pub(crate) descriptor: Descriptor,
    /// Payload bytes, announced (Offer, Clear) or following.
    pub(crate) len: u64,
    /// Bits of the sender's premultiplication factor; for Failed: error code and dead rank.
    pub(crate) extra: u64,
    /// CRC-32C of the payload, in groups that check payloads.
    pub(crate) checksum: Option<u32>,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0u8; HEADER_BYTES];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = self.kind as u8;
        out[5] = self.descriptor.op;
        out[6] = self.descriptor.dtype;
        out[7] = self.descriptor.redop;
        out[8..12].copy_from_slice(&self.group.to_le_bytes());
        out[12..16].copy_from_slice(&self.part.to_le_bytes());
        out[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        out[24..32].copy_from_slice(&self.descriptor.count.to_le_bytes());
        out[32..40].copy_from_slice(&self.len.to_le_bytes());
        out[40..48].copy_from_slice(&self.extra.to_le_bytes());
        out[48..52].copy_from_slice(&self.descriptor.root.to_le_bytes());
        if let Some(checksum) = self.checksum {
            out[52..56].copy_from_slice(&checksum.to_le_bytes());
            out[56] = 1;
        }
        out
    }

    /// `None`: not one of ours, or of a version that this one does not know.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let u32_at = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) | u64::from(u32_at(i + 4)) << 32;
        if u32_at(0) != MAGIC {
            return None;
        }
        Some(Self {
            kind: MessageKind::from_code(bytes[4])?,
            group: u32_at(8),
            sequence: u64_at(16),
            part: u32_at(12),
            descriptor: Descriptor {
                op: bytes[5],
                dtype: bytes[6],
                redop: bytes[7],
                root: u32_at(48),
                count: u64_at(24),
            },
            len: u64_at(32),
            extra: u64_at(40),
            checksum: (bytes[56] == 1).then(|| u32_at(52)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header {
            kind: MessageKind::Eager,
            group: 0x0102_0304,
            sequence: 7,
            part: 9,
            descriptor: Descriptor { op: 0, dtype: 11, redop: 0, root: NO_ROOT, count: 1000 },
            len: 4000,
            extra: 0x3ff0_0000_0000_0000,
            checksum: None,
        }
    }

    #[test]
    fn golden_bytes() {
        let bytes = sample().encode();
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "4646523101000b0004030201090000000700000000000000e803000000000000\
             a00f000000000000000000000000f03fffffffff000000000000000000000000"
        );
        assert_eq!(Header::decode(&bytes), Some(sample()));
        let checked = Header { checksum: Some(0x0a0b_0c0d), ..sample() };
        assert_eq!(checked.encode()[52..57], [0x0d, 0x0c, 0x0b, 0x0a, 1]);
        assert_eq!(Header::decode(&checked.encode()), Some(checked));
    }

    #[test]
    fn strangers_are_not_decoded() {
        let mut bytes = sample().encode();
        bytes[4] = 99;
        assert_eq!(Header::decode(&bytes), None);
        assert_eq!(Header::decode(&[0; HEADER_BYTES]), None);
    }

    #[test]
    fn a_descriptor_reads_like_a_sentence() {
        assert_eq!(sample().descriptor.to_string(), "allreduce sum f32 x 1000");
        let barrier = Descriptor { op: 11, dtype: 0, redop: NO_REDOP, root: NO_ROOT, count: 0 };
        assert_eq!(barrier.to_string(), "barrier");
    }
}
