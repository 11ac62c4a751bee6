//! The RPC frame: a fixed header, then the head, then the payload. Pure: bytes in, a checked
//! header or a precise error out.
//!
//! ```text
//! 0  magic        2  0xF1 0xFE
//! 2  version      1  of the frame layout
//! 3  kind         1  1 request, 2 reply, 3 error, 4 ready, 5 grant
//! 4  head_len     4  <= MAX_HEAD
//! 8  call         8  chosen by the client, comes back in the answer
//! 16 payload_len  4  <= MAX_PAYLOAD
//! 20 aux          4  request: bytes that the caller's buffer takes; error: kind; reply: 0; ready:
//!                    bytes of the reply's payload; grant: 1 send it, 0 drop it
//! 24 method       2  request only, else 0
//! 26 flags        1  request: 1 ask before sending a reply with payload; else 0
//! 27 reserved     5  0
//! ```
//! Ready and grant have neither head nor payload; they and the flag came with protocol version 2.
//! Integers are little-endian. The order puts what bounds memory (lengths) before what is acted on.

use crate::error::LinkError;

/// Bytes of a frame's header.
pub(crate) const HEADER_BYTES: usize = 32;
/// Longest head: a page of a directory listing or a long list of extents fits, a flood does not.
pub const MAX_HEAD: usize = 1 << 20;
/// Longest payload of one frame: the largest chunk with room to spare. A service sets its own,
/// lower limit for each method.
pub const MAX_PAYLOAD: usize = 256 << 20;

const MAGIC: [u8; 2] = [0xF1, 0xFE];
const LAYOUT: u8 = 1;

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum FrameKind {
    /// Client to server.
    Request = 1,
    /// The service's answer.
    Reply = 2,
    /// The service's or the server's refusal; the head is its message.
    Error = 3,
    /// Server to client: the reply to a call that said "ask" is there.
    Ready = 4,
    /// Client to server: send that reply, or drop it.
    Grant = 5,
}

/// A frame's header, checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) kind: FrameKind,
    pub(crate) call: u64,
    pub(crate) method: u16,
    pub(crate) head_len: u32,
    pub(crate) payload_len: u32,
    /// Request: bytes that the caller's buffer takes. Error: wire number of the kind. Ready: bytes
    /// of the reply's payload. Grant: 1 to send it.
    pub(crate) aux: u32,
    /// Request: the server asks before it sends a payload.
    pub(crate) ask: bool,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        debug_assert!(self.head_len as usize <= MAX_HEAD && self.payload_len as usize <= MAX_PAYLOAD);
        let mut out = [0; HEADER_BYTES];
        out[..2].copy_from_slice(&MAGIC);
        out[2] = LAYOUT;
        out[3] = self.kind as u8;
        out[4..8].copy_from_slice(&self.head_len.to_le_bytes());
        out[8..16].copy_from_slice(&self.call.to_le_bytes());
        out[16..20].copy_from_slice(&self.payload_len.to_le_bytes());
        out[20..24].copy_from_slice(&self.aux.to_le_bytes());
        out[24..26].copy_from_slice(&self.method.to_le_bytes());
        out[26] = u8::from(self.ask);
        out
    }

    /// Checks everything that can be checked without knowing the connection's state.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, LinkError> {
        let broken = |what: String| Err(LinkError::Protocol(what));
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[..2] != MAGIC {
            return broken(format!(
                "a frame starts with {:02x}{:02x}, not with its magic",
                bytes[0], bytes[1]
            ));
        }
        if bytes[2] != LAYOUT {
            return broken(format!("frame layout {} (this side reads {LAYOUT})", bytes[2]));
        }
        let kind = match bytes[3] {
            1 => FrameKind::Request,
            2 => FrameKind::Reply,
            3 => FrameKind::Error,
            4 => FrameKind::Ready,
            5 => FrameKind::Grant,
            other => return broken(format!("frame kind {other}")),
        };
        let mut call = [0; 8];
        call.copy_from_slice(&bytes[8..16]);
        let header = Header {
            kind,
            call: u64::from_le_bytes(call),
            method: u16::from_le_bytes([bytes[24], bytes[25]]),
            head_len: u32_at(4),
            payload_len: u32_at(16),
            aux: u32_at(20),
            ask: bytes[26] == 1,
        };
        if header.head_len as usize > MAX_HEAD {
            return broken(format!("a head of {} bytes (limit {MAX_HEAD})", header.head_len));
        }
        if header.payload_len as usize > MAX_PAYLOAD {
            return broken(format!("a payload of {} bytes (limit {MAX_PAYLOAD})", header.payload_len));
        }
        if bytes[26] > 1 || bytes[27..] != [0; 5] {
            return broken("reserved bytes of a frame are not zero".into());
        }
        let empty = header.head_len == 0 && header.payload_len == 0 && header.method == 0;
        let fits = match kind {
            _ if header.ask && kind != FrameKind::Request => false,
            FrameKind::Request => header.aux as usize <= MAX_PAYLOAD,
            FrameKind::Ready => empty && header.aux as usize <= MAX_PAYLOAD,
            FrameKind::Grant => empty && header.aux <= 1,
            FrameKind::Reply => header.aux == 0 && header.method == 0,
            FrameKind::Error => {
                header.aux <= u32::from(u16::MAX) && header.method == 0 && header.payload_len == 0
            }
        };
        if !fits {
            return broken(format!("fields that do not belong to a frame of kind {kind:?}"));
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let header = Header {
            kind: FrameKind::Request,
            call: 0x0102_0304_0506_0708,
            method: 0x1122,
            head_len: 3,
            payload_len: 0x0010_0000,
            aux: 4096,
            ask: false,
        };
        let hex: String = header.encode().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "f1fe0101030000000807060504030201000010000010000022110000000000".to_owned() + "00");
        assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        let asking = Header { ask: true, ..header };
        assert_eq!(asking.encode()[24..], [0x22, 0x11, 1, 0, 0, 0, 0, 0]);
        let grant =
            Header { kind: FrameKind::Grant, method: 0, head_len: 0, payload_len: 0, aux: 1, ..header };
        assert_eq!(grant.encode()[..4], [0xF1, 0xFE, 1, 5]);
        assert_eq!(Header::decode(&grant.encode()).unwrap(), grant);
    }

    fn any_header() -> impl Strategy<Value = Header> {
        let lengths = (0..=MAX_HEAD as u32, 0..=MAX_PAYLOAD as u32);
        (1u8..=5, any::<u64>(), any::<u16>(), lengths, 0u32..=60_000, any::<bool>()).prop_map(
            |(kind, call, method, (head_len, payload_len), aux, ask)| {
                let (request, bare) = (kind == 1, kind > 3);
                Header {
                    kind: match kind {
                        1 => FrameKind::Request,
                        2 => FrameKind::Reply,
                        3 => FrameKind::Error,
                        4 => FrameKind::Ready,
                        _ => FrameKind::Grant,
                    },
                    call,
                    method: if request { method } else { 0 },
                    head_len: if bare { 0 } else { head_len },
                    payload_len: if kind >= 3 { 0 } else { payload_len },
                    aux: match kind {
                        2 => 0,
                        5 => aux % 2,
                        _ => aux,
                    },
                    ask: request && ask,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn headers_round_trip(header in any_header()) {
            prop_assert_eq!(Header::decode(&header.encode()).unwrap(), header);
        }

        /// Whatever comes, the decoder neither panics nor lets a length over its limit through, and
        /// what it accepts it would have written itself: no two encodings of one header.
        #[test]
        fn arbitrary_bytes_are_refused_or_canonical(mut bytes in any::<[u8; HEADER_BYTES]>(), fix in 0..5usize) {
            bytes[..fix.min(3)].copy_from_slice(&[0xF1, 0xFE, 1][..fix.min(3)]);
            if fix == 4 {
                bytes[3] = 1 + bytes[3] % 5;
                if bytes[3] > 3 {
                    bytes[4..8].fill(0);
                    bytes[16..20].fill(0);
                    bytes[24..26].fill(0);
                }
                bytes[26..].fill(0);
                bytes[7] = 0;
                bytes[19] = 0;
                bytes[22..24].fill(0);
            }
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert!(header.head_len as usize <= MAX_HEAD);
                prop_assert!(header.payload_len as usize <= MAX_PAYLOAD);
                prop_assert_eq!(header.encode(), bytes);
            }
        }

        /// Any single flipped bit of a valid header is either refused or changes what it means.
        #[test]
        fn a_flipped_bit_never_reads_as_the_same(header in any_header(), bit in 0..HEADER_BYTES * 8) {
            let mut bytes = header.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(other) = Header::decode(&bytes) {
                prop_assert_ne!(other, header);
            }
        }
    }
}
