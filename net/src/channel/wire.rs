//! What is in front of every message of a channel, whatever carries it.
//!
//! ```text
//! 0  magic     4  "FFCH"
//! 4  place     1  where the payload is: see `Place`
//! 5  reserved  3  0
//! 8  len       8  bytes of the payload
//! 16 header   64  the caller's
//! 80
//! ```

use super::{ChannelError, HEADER_BYTES};

pub(super) const MAGIC: [u8; 4] = *b"FFCH";
const PREFIX: usize = 16;
/// Bytes in front of a payload.
pub(super) const WIRE_HEADER: usize = PREFIX + HEADER_BYTES;
/// Larger than any tensor in one message; catches a stream out of step.
pub(super) const MAX_LEN: u64 = 1 << 40;

/// Where a message's payload is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Place {
    /// It follows this header.
    Follows = 0,
    /// RDMA: it is offered; the receiver's answer says how it comes.
    Offered = 1,
    /// RDMA: no message, but the payload of the oldest offered one whose receiver asked for it
    /// through the ring. The caller's header is zeros.
    Late = 2,
    /// Several sockets: its first part follows here, the others come by the other sockets.
    Striped = 3,
}

/// A header that came, checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct WireHeader {
    pub(super) place: Place,
    pub(super) len: usize,
    pub(super) header: [u8; HEADER_BYTES],
}

impl WireHeader {
    pub(super) fn encode(&self) -> [u8; WIRE_HEADER] {
        let mut wire = [0; WIRE_HEADER];
        wire[..4].copy_from_slice(&MAGIC);
        wire[4] = self.place as u8;
        wire[8..16].copy_from_slice(&(self.len as u64).to_le_bytes());
        wire[PREFIX..].copy_from_slice(&self.header);
        wire
    }

    /// Reads a header whose place must be one of `allowed`: what this carrier knows.
    pub(super) fn decode(wire: &[u8; WIRE_HEADER], allowed: &[Place]) -> Result<WireHeader, ChannelError> {
        let broken = |what: String| Err(ChannelError::Protocol(what));
        if wire[..4] != MAGIC {
            return broken(format!("a message starts with {:02x?}, not with its magic", &wire[..4]));
        }
        let Some(&place) = allowed.iter().find(|p| **p as u8 == wire[4]) else {
            return broken(format!("a message's payload is in place {}, which is not in use here", wire[4]));
        };
        if wire[5..8] != [0; 3] {
            return broken("reserved bytes of a message are not zero".into());
        }
        let mut len = [0; 8];
        len.copy_from_slice(&wire[8..16]);
        let len = u64::from_le_bytes(len);
        if len > MAX_LEN {
            return broken(format!("a message of {len} bytes (limit {MAX_LEN})"));
        }
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&wire[PREFIX..]);
        if place == Place::Late && header != [0; HEADER_BYTES] {
            return broken("a late payload carries a caller's header".into());
        }
        Ok(WireHeader { place, len: len as usize, header })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [Place; 4] = [Place::Follows, Place::Offered, Place::Late, Place::Striped];

    #[test]
    fn golden_bytes() {
        let header = WireHeader { place: Place::Follows, len: 0x0102_0304, header: [0xAB; HEADER_BYTES] };
        let hex: String = header.encode().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "4646434800000000".to_owned() + "0403020100000000" + &"ab".repeat(HEADER_BYTES));
        let late = WireHeader { place: Place::Late, len: 5, header: [0; HEADER_BYTES] };
        assert_eq!(late.encode()[..16], *b"FFCH\x02\0\0\0\x05\0\0\0\0\0\0\0");
    }

    #[test]
    fn a_place_that_is_not_in_use_is_refused() {
        let offered = WireHeader { place: Place::Offered, len: 5, header: [1; HEADER_BYTES] };
        let error = WireHeader::decode(&offered.encode(), &[Place::Follows]).unwrap_err().to_string();
        assert!(error.contains("place 1, which is not in use"), "{error}");
        assert_eq!(WireHeader::decode(&offered.encode(), &ALL).unwrap(), offered);
    }

    proptest! {
        /// Arbitrary bytes are refused or are the one encoding of what they are read as.
        #[test]
        fn arbitrary_headers_are_refused_or_canonical(
            bytes in prop::collection::vec(any::<u8>(), WIRE_HEADER),
            fix in any::<bool>(),
            place in 0u8..5,
        ) {
            let mut wire = [0; WIRE_HEADER];
            wire.copy_from_slice(&bytes);
            if fix {
                wire[..8].copy_from_slice(b"FFCH\0\0\0\0");
                wire[4] = place;
                wire[13..16].fill(0);
                if place == Place::Late as u8 {
                    wire[PREFIX..].fill(0);
                }
            }
            match WireHeader::decode(&wire, &ALL) {
                Ok(read) => {
                    prop_assert!(read.len as u64 <= MAX_LEN);
                    prop_assert_eq!(read.encode(), wire);
                }
                Err(_) => prop_assert!(!fix || place > 3, "a well-formed header was refused"),
            }
        }
    }
}
