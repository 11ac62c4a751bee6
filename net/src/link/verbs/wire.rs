//! What a SEND carries. Pure: bytes in, a checked part or a precise error out.
//!
//! ```text
//! 0  kind       1  1 part of a message, 2 nothing but a grant, 3 probe
//! 1  reserved   3  0
//! 4  grant      4  receives posted since the beginning, modulo 2^32 (`credits`)
//! 8  bytes         part: bytes of the message; probe: 8 bytes that come back
//! ```
//!
//! A message is the frame's header (32 bytes), the window onto the request's payload, the window
//! for the reply's payload (16 bytes each: address, key, length; all zeros: none), and the head. It
//! takes as many parts as it needs, in order. Integers are little-endian.

use crate::error::LinkError;
use crate::link::Window;
use crate::rpc::frame::{HEADER_BYTES, Header};

/// Bytes before those of a part.
pub(super) const PART_HEADER: usize = 8;
const WINDOW: usize = 16;
/// Bytes of a message before its head.
pub(super) const MESSAGE_HEADER: usize = HEADER_BYTES + 2 * WINDOW;

/// What a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Part = 1,
    Grant = 2,
    Probe = 3,
}

/// A part's header.
pub(super) fn part_header(kind: Kind, grant: u32) -> [u8; PART_HEADER] {
    let mut out = [0; PART_HEADER];
    out[0] = kind as u8;
    out[4..].copy_from_slice(&grant.to_le_bytes());
    out
}

/// Checks a part's header. There is at least a byte after it, but in a grant.
pub(super) fn decode_part(bytes: &[u8]) -> Result<(Kind, u32), LinkError> {
    let broken = |what: String| Err(LinkError::Protocol(what));
    let Some((header, rest)) = bytes.split_first_chunk::<PART_HEADER>() else {
        return broken(format!("a SEND of {} bytes", bytes.len()));
    };
    let kind = match header[0] {
        1 => Kind::Part,
        2 => Kind::Grant,
        3 => Kind::Probe,
        other => return broken(format!("a SEND of kind {other}")),
    };
    if header[1..4] != [0; 3] {
        return broken("reserved bytes of a SEND are not zero".into());
    }
    let fits = match kind {
        Kind::Part => !rest.is_empty(),
        Kind::Grant => rest.is_empty(),
        Kind::Probe => rest.len() == 8,
    };
    if !fits {
        return broken(format!("a SEND of kind {kind:?} with {} bytes", rest.len()));
    }
    Ok((kind, u32::from_le_bytes([header[4], header[5], header[6], header[7]])))
}

fn put_window(out: &mut [u8], window: Option<Window>) {
    let window = window.unwrap_or_default();
    out[..8].copy_from_slice(&window.address.to_le_bytes());
    out[8..12].copy_from_slice(&window.key.to_le_bytes());
    out[12..16].copy_from_slice(&window.len.to_le_bytes());
}

fn get_window(bytes: &[u8]) -> Option<Window> {
    let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let address = u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32;
    let (key, len) = (u32_at(8), u32_at(12));
    (len > 0).then_some(Window { address, key, len })
}

/// What precedes a message's head.
pub(super) fn message_header(
    header: &Header,
    source: Option<Window>,
    window: Option<Window>,
) -> [u8; MESSAGE_HEADER] {
    let mut out = [0; MESSAGE_HEADER];
    out[..HEADER_BYTES].copy_from_slice(&header.encode());
    put_window(&mut out[HEADER_BYTES..], source);
    put_window(&mut out[HEADER_BYTES + WINDOW..], window);
    out
}

/// The frame's header, the window onto the payload, the window for the reply.
type MessageHeader = (Header, Option<Window>, Option<Window>);

/// Takes a message's beginning apart.
pub(super) fn decode_message(bytes: &[u8]) -> Result<MessageHeader, LinkError> {
    let Some((start, _)) = bytes.split_first_chunk::<MESSAGE_HEADER>() else {
        return Err(LinkError::Protocol(format!("a message of {} bytes", bytes.len())));
    };
    let mut header = [0; HEADER_BYTES];
    header.copy_from_slice(&start[..HEADER_BYTES]);
    let header = Header::decode(&header)?;
    let source = get_window(&start[HEADER_BYTES..]);
    let window = get_window(&start[HEADER_BYTES + WINDOW..]);
    let offered = source.map_or(0, |w| w.len);
    if header.kind == crate::rpc::frame::FrameKind::Request && offered != header.payload_len {
        let what = format!("a payload of {} bytes in a window of {offered}", header.payload_len);
        return Err(LinkError::Protocol(what));
    }
    Ok((header, source, window))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::frame::FrameKind;
    use proptest::prelude::*;

    fn header(payload_len: u32) -> Header {
        Header { kind: FrameKind::Request, call: 7, method: 1, head_len: 3, payload_len, aux: 0, ask: false }
    }

    #[test]
    fn messages_come_back_as_they_were_and_bad_ones_are_refused_by_name() {
        let window = Window { address: 0x0102_0304_0506_0708, key: 9, len: 10 };
        let bytes = message_header(&header(10), Some(window), None);
        assert_eq!(decode_message(&bytes).unwrap(), (header(10), Some(window), None));
        let bytes = message_header(&header(0), None, Some(window));
        assert_eq!(decode_message(&bytes).unwrap(), (header(0), None, Some(window)));
        for (bytes, what) in [
            (message_header(&header(11), Some(window), None).to_vec(), "11 bytes in a window of 10"),
            (message_header(&header(11), None, None).to_vec(), "11 bytes in a window of 0"),
            (bytes[..60].to_vec(), "a message of 60 bytes"),
        ] {
            let error = decode_message(&bytes).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        let part = |kind: u8, rest: &[u8]| [&[kind, 0, 0, 0, 5, 0, 0, 0][..], rest].concat();
        assert_eq!(decode_part(&part(1, b"x")).unwrap(), (Kind::Part, 5));
        assert_eq!(decode_part(&part_header(Kind::Grant, 77)).unwrap(), (Kind::Grant, 77));
        assert_eq!(decode_part(&part(3, b"12345678")).unwrap(), (Kind::Probe, 5));
        for bad in [part(1, b""), part(2, b"x"), part(3, b"x"), part(4, b"x"), vec![1; 8], vec![1; 7], vec![]]
        {
            assert!(matches!(decode_part(&bad), Err(LinkError::Protocol(_))), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_part(&bytes);
            if let Ok((header, source, _)) = decode_message(&bytes) {
                prop_assert!(header.kind != FrameKind::Request || source.map_or(0, |w| w.len) == header.payload_len);
            }
        }
    }
}
