//! What two sides tell each other about their queue pairs, over the authenticated TCP connection
//! beside them. Pure: a frame to bytes, bytes to a checked frame or a precise error.
//!
//! ```text
//! client                                   server
//!   Offer: my port            ──────────>    chooses a port that reaches it
//!                             <──────────  Accept: my queue pair      (or Refuse: why)
//!   makes and connects its own
//!   Connect: my queue pair    ──────────>    connects
//!                             <──────────  Ready
//!   a message over the queue pair and back: the probe
//!   Use                       ──────────>
//! ```
//!
//! Either side may say Refuse instead of its next frame; then both let go of their queue pairs, and
//! the TCP connection is free for what it was before. Until the peer has proven itself (the
//! handshake before all this) there is no queue pair and nothing of a device is touched.
//!
//! A frame is `len` (2 bytes, little-endian, of what follows), version, kind, body. A frame of
//! another version is refused with both numbers.

use super::port::LinkLayer;
use super::queue::Address;

/// Version of these frames.
const VERSION: u8 = 1;
/// Longest frame without its length: names and reasons are cut.
pub(crate) const MAX_FRAME: usize = 512;
/// Bytes of the length.
pub(crate) const PREFIX: usize = 2;
const MAX_NAME: usize = 64;
const MAX_REASON: usize = 400;

/// Where a side's queue pair is or would be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) link: LinkLayer,
    pub(crate) gid: [u8; 16],
    /// Which of the side's rails it is.
    pub(crate) rail: u8,
    /// The rail's name, for messages.
    pub(crate) name: String,
}

/// A queue pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) place: Place,
    pub(crate) address: Address,
    /// Receives posted.
    pub(crate) receives: u32,
    /// Bytes that each of them takes.
    pub(crate) bytes: u32,
    /// The keys that it gives to its peer are of memory windows, which a SEND may invalidate.
    pub(crate) windows: bool,
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    Offer(Place),
    Accept(End),
    Connect(End),
    Ready,
    Use,
    /// Why RDMA is not used for this connection.
    Refuse(String),
}

/// Why bytes are no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("a frame of {0} bytes (limit {MAX_FRAME})")]
    Length(usize),
    #[error("version {0} of the RDMA negotiation (this side speaks {VERSION}); upgrade the older one")]
    Version(u8),
    #[error("kind {0} of a frame")]
    Kind(u8),
    #[error("{0} of a frame is not valid")]
    Field(&'static str),
    #[error("a {got} came where {wanted} was due")]
    Unexpected { got: &'static str, wanted: &'static str },
}

impl Frame {
    /// For messages.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Frame::Offer(_) => "Offer",
            Frame::Accept(_) => "Accept",
            Frame::Connect(_) => "Connect",
            Frame::Ready => "Ready",
            Frame::Use => "Use",
            Frame::Refuse(_) => "Refuse",
        }
    }

    /// The error of a frame out of turn.
    pub(crate) fn unexpected(&self, wanted: &'static str) -> FrameError {
        FrameError::Unexpected { got: self.name(), wanted }
    }

    /// The bytes to send, length included.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0, 0, VERSION, 0];
        out[3] = match self {
            Frame::Offer(place) => {
                put_place(&mut out, place);
                1
            }
            Frame::Accept(end) => {
                put_end(&mut out, end);
                2
            }
            Frame::Connect(end) => {
                put_end(&mut out, end);
                3
            }
            Frame::Ready => 4,
            Frame::Use => 5,
            Frame::Refuse(reason) => {
                put_text(&mut out, reason, MAX_REASON);
                6
            }
        };
        let len = (out.len() - PREFIX) as u16;
        out[..PREFIX].copy_from_slice(&len.to_le_bytes());
        out
    }

    /// Bytes that follow a length, if it is one.
    pub(crate) fn length(prefix: [u8; PREFIX]) -> Result<usize, FrameError> {
        let len = usize::from(u16::from_le_bytes(prefix));
        if (2..=MAX_FRAME).contains(&len) { Ok(len) } else { Err(FrameError::Length(len)) }
    }

    /// Of what followed the length.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Frame, FrameError> {
        let mut fields = Fields(bytes);
        let version = fields.u8()?;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        let frame = match fields.u8()? {
            1 => Frame::Offer(fields.place()?),
            2 => Frame::Accept(fields.end()?),
            3 => Frame::Connect(fields.end()?),
            4 => Frame::Ready,
            5 => Frame::Use,
            6 => Frame::Refuse(fields.text(MAX_REASON)?),
            other => return Err(FrameError::Kind(other)),
        };
        if fields.0.is_empty() { Ok(frame) } else { Err(FrameError::Field("the end")) }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str, max: usize) {
    let cut = (0..=text.len().min(max)).rev().find(|n| text.is_char_boundary(*n)).unwrap_or(0);
    out.extend_from_slice(&(cut as u16).to_le_bytes());
    out.extend_from_slice(&text.as_bytes()[..cut]);
}

fn put_place(out: &mut Vec<u8>, place: &Place) {
    out.push(match place.link {
        LinkLayer::InfiniBand => 1,
        LinkLayer::Ethernet => 2,
    });
    out.push(place.rail);
    out.extend_from_slice(&place.gid);
    put_text(out, &place.name, MAX_NAME);
}

fn put_end(out: &mut Vec<u8>, end: &End) {
    put_place(out, &end.place);
    let Address { qp, psn, gid: _, lid, mtu, reads } = end.address;
    out.extend_from_slice(&qp.to_le_bytes());
    out.extend_from_slice(&psn.to_le_bytes());
    out.extend_from_slice(&lid.to_le_bytes());
    out.extend_from_slice(&[mtu as u8, reads]);
    out.extend_from_slice(&end.receives.to_le_bytes());
    out.extend_from_slice(&end.bytes.to_le_bytes());
    out.push(u8::from(end.windows));
}

/// Cuts fields from a frame; too few bytes are an error.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], FrameError> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(FrameError::Field("the length"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u8(&mut self) -> Result<u8, FrameError> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, FrameError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn text(&mut self, max: usize) -> Result<String, FrameError> {
        let len = usize::from(u16::from_le_bytes(self.array()?));
        if len > max {
            return Err(FrameError::Field("a text's length"));
        }
        // It goes to logs and into messages: keep it printable.
        let text = String::from_utf8_lossy(self.take(len)?);
        Ok(text.chars().map(|c| if c.is_control() { '?' } else { c }).collect())
    }

    fn place(&mut self) -> Result<Place, FrameError> {
        let link = match self.u8()? {
            1 => LinkLayer::InfiniBand,
            2 => LinkLayer::Ethernet,
            _ => return Err(FrameError::Field("the link layer")),
        };
        Ok(Place { link, rail: self.u8()?, gid: self.array()?, name: self.text(MAX_NAME)? })
    }

    fn end(&mut self) -> Result<End, FrameError> {
        let place = self.place()?;
        let (qp, psn) = (self.u32()?, self.u32()?);
        let lid = u16::from_le_bytes(self.array()?);
        let (mtu, reads) = (u32::from(self.u8()?), self.u8()?);
        let receives = self.u32()?;
        let bytes = self.u32()?;
        let windows = match self.u8()? {
            0 => false,
            1 => true,
            _ => return Err(FrameError::Field("the kind of keys")),
        };
        // Numbers of queue pairs and packets have 24 bits; 0 and 1 are management queue pairs.
        if !(2..=0xFF_FFFF).contains(&qp) {
            return Err(FrameError::Field("the queue pair's number"));
        }
        if psn > 0xFF_FFFF {
            return Err(FrameError::Field("the packet sequence number"));
        }
        if !(1..=5).contains(&mtu) {
            return Err(FrameError::Field("the MTU"));
        }
        if reads == 0 || reads > 128 {
            return Err(FrameError::Field("the number of READs"));
        }
        if !(4..=1 << 16).contains(&receives) {
            return Err(FrameError::Field("the number of receives"));
        }
        let address = Address { qp, psn, gid: place.gid, lid, mtu, reads };
        Ok(End { place, address, receives, bytes, windows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn end() -> End {
        let mut gid = [0; 16];
        gid[10..].copy_from_slice(&[0xFF, 0xFF, 10, 1, 0, 2]);
        let place = Place { link: LinkLayer::Ethernet, gid, rail: 1, name: "rxe1".into() };
        let address = Address { qp: 17, psn: 0x12_3456, gid, lid: 0, mtu: 5, reads: 16 };
        End { place, address, receives: 64, bytes: 4096, windows: true }
    }

    fn frames() -> Vec<Frame> {
        vec![
            Frame::Offer(end().place),
            Frame::Accept(end()),
            Frame::Connect(end()),
            Frame::Ready,
            Frame::Use,
            Frame::Refuse("no RDMA device".into()),
        ]
    }

    fn decode(bytes: &[u8]) -> Result<Frame, FrameError> {
        let len = Frame::length([bytes[0], bytes[1]])?;
        assert_eq!(len, bytes.len() - PREFIX);
        Frame::decode(&bytes[PREFIX..])
    }

    #[test]
    fn frames_come_back_as_they_were() {
        for frame in frames() {
            assert_eq!(decode(&frame.encode()), Ok(frame));
        }
        let long = Frame::Refuse("ä".repeat(1000));
        let Ok(Frame::Refuse(cut)) = decode(&long.encode()) else { panic!() };
        assert_eq!(cut.len(), 400);
        let Ok(Frame::Refuse(clean)) = decode(&Frame::Refuse("a\nb\u{1b}[0m".into()).encode()) else {
            panic!()
        };
        assert_eq!(clean, "a?b?[0m");
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        type Change = fn(&mut End);
        let table: [(&str, Change); 7] = [
            ("queue pair", |e| e.address.qp = 1),
            ("queue pair", |e| e.address.qp = 1 << 24),
            ("packet sequence", |e| e.address.psn = 1 << 24),
            ("MTU", |e| e.address.mtu = 6),
            ("READs", |e| e.address.reads = 0),
            ("receives", |e| e.receives = 3),
            ("receives", |e| e.receives = 1 << 17),
        ];
        for (what, change) in table {
            let mut bad = end();
            change(&mut bad);
            let error = decode(&Frame::Accept(bad).encode()).unwrap_err();
            assert!(error.to_string().contains(what), "{what}: {error}");
        }
        let mut other = Frame::Ready.encode();
        other[2] = 9;
        assert_eq!(decode(&other), Err(FrameError::Version(9)));
        other[2..4].copy_from_slice(&[VERSION, 77]);
        assert_eq!(decode(&other), Err(FrameError::Kind(77)));
        for len in [0, 1, MAX_FRAME as u16 + 1, u16::MAX] {
            assert_eq!(Frame::length(len.to_le_bytes()), Err(FrameError::Length(len.into())));
        }
        let mut longer = Frame::Ready.encode();
        longer.push(0);
        longer[0] += 1;
        assert!(decode(&longer).is_err());
    }

    proptest! {
        /// Arbitrary and mutated bytes: an error or a frame within limits, never a panic.
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..MAX_FRAME)) {
            let _ = Frame::decode(&bytes);
        }

        #[test]
        fn mutated_frames_are_survived(which in 0usize..6, at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let mut bytes = frames()[which].encode();
            let at = at.index(bytes.len() - PREFIX) + PREFIX;
            bytes[at] = to;
            if let Ok(Frame::Accept(end) | Frame::Connect(end)) = Frame::decode(&bytes[PREFIX..]) {
                prop_assert!(end.address.qp < 1 << 24 && end.receives <= 1 << 16 && end.address.mtu <= 5);
            }
        }
    }
}
