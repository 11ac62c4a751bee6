//! What two sides of a channel say to each other between the handshake and the first message, and
//! how the carrier is chosen. Values without I/O.
//!
//! ```text
//! dialler -> Offer     policy, sockets, rails (or why there are none)
//! acceptor -> Tcp      sockets, why not RDMA           -> both use TCP
//!          -> Refuse   why                             -> RDMA was demanded: no channel
//!          -> Rdma     which rail, endpoint
//! dialler -> Endpoint                                  (or Failed, why)
//! acceptor -> Ready    its queue pair is connected     (or Failed, why)
//! both probe over the queue pairs
//! dialler -> Done                                      (or Failed, why: TCP on this connection)
//! ```
//!
//! A further connection of a channel over several sockets says Lane and is answered by Ready.
//! Frames: length u16 (little-endian, of what follows), kind u8, fields.

use super::rdma::Endpoint;
use super::{ChannelError, MOST_SOCKETS};
use crate::fabric::Transport;
use crate::verbs::Address;
use crate::verbs::port::{LinkLayer, same_network};
use std::net::{IpAddr, Ipv6Addr};

/// Version of these frames.
const VERSION: u8 = 1;
/// Longest frame.
pub(super) const MAX_FRAME: usize = 1024;
/// Rails that are offered at most.
const MAX_RAILS: usize = 16;
/// Longest reason; longer ones are cut.
const MAX_WHY: usize = 400;

/// A port as the other side needs to know it to choose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RailInfo {
    pub(super) gid: [u8; 16],
    pub(super) link: LinkLayer,
}

impl RailInfo {
    fn is_at(&self, ip: IpAddr) -> bool {
        let v6 = Ipv6Addr::from(self.gid);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4) == ip.to_canonical()
    }
}

/// What one side has and wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Wishes {
    pub(super) policy: Transport,
    pub(super) sockets: usize,
    pub(super) rails: Vec<RailInfo>,
    /// Why there are no rails.
    pub(super) why_none: String,
}

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Frame {
    Offer { id: [u8; 16], wishes: Wishes },
    Tcp { sockets: usize, why: String },
    Refuse { why: String },
    Rdma { sockets: usize, rail: usize, endpoint: Endpoint },
    Endpoint(Endpoint),
    Ready,
    Done,
    Failed { why: String },
    Lane { id: [u8; 16], index: usize },
}

/// What the acceptor makes of an offer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Choice {
    Tcp {
        why: String,
    },
    Refuse {
        why: String,
    },
    /// The dialler's rail and the acceptor's.
    Rails {
        theirs: usize,
        ours: usize,
    },
}

fn cut(why: &str) -> &[u8] {
    let mut end = why.len().min(MAX_WHY);
    while !why.is_char_boundary(end) {
        end -= 1;
    }
    &why.as_bytes()[..end]
}

fn put_endpoint(out: &mut Vec<u8>, e: &Endpoint) {
    let Endpoint { address, ring_at, ring_key, ring, receives } = e;
    out.extend_from_slice(&address.qp.to_le_bytes());
    out.extend_from_slice(&address.psn.to_le_bytes());
    out.extend_from_slice(&address.gid);
    out.extend_from_slice(&address.lid.to_le_bytes());
    out.push(address.mtu as u8);
    out.push(address.reads);
    out.extend_from_slice(&ring_at.to_le_bytes());
    out.extend_from_slice(&ring_key.to_le_bytes());
    out.extend_from_slice(&ring.to_le_bytes());
    out.extend_from_slice(&receives.to_le_bytes());
}

/// Reads fields off a frame.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[b]| b)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// The rest of the frame is a reason.
    fn why(&mut self) -> Option<String> {
        let bytes = std::mem::take(&mut self.0);
        if bytes.len() > MAX_WHY {
            return None;
        }
        // It goes to logs and messages: keep it printable.
        let text = String::from_utf8(bytes.to_vec()).ok()?;
        text.chars().all(|c| !c.is_control()).then_some(text)
    }

    fn sockets(&mut self) -> Option<usize> {
        self.u8().map(usize::from).filter(|n| (1..=MOST_SOCKETS).contains(n))
    }

    fn endpoint(&mut self) -> Option<Endpoint> {
        let address = Address {
            qp: self.u32()?,
            psn: self.u32()?,
            gid: self.array()?,
            lid: self.u16()?,
            mtu: u32::from(self.u8()?),
            reads: self.u8()?,
        };
        let ring_at = u64::from_le_bytes(self.array()?);
        let endpoint =
            Endpoint { address, ring_at, ring_key: self.u32()?, ring: self.u32()?, receives: self.u32()? };
        endpoint.check().ok().map(|()| endpoint)
    }

    fn wishes(&mut self) -> Option<Wishes> {
        let policy = match self.u8()? {
            0 => Transport::Auto,
            1 => Transport::Tcp,
            2 => Transport::Rdma,
            _ => return None,
        };
        let sockets = self.sockets()?;
        let count = usize::from(self.u8()?);
        if count > MAX_RAILS {
            return None;
        }
        let mut rails = Vec::with_capacity(count);
        for _ in 0..count {
            let link = match self.u8()? {
                0 => LinkLayer::InfiniBand,
                1 => LinkLayer::Ethernet,
                _ => return None,
            };
            rails.push(RailInfo { link, gid: self.array()? });
        }
        Some(Wishes { policy, sockets, rails, why_none: self.why()? })
    }
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Frame::Offer { .. } => 1,
            Frame::Tcp { .. } => 2,
            Frame::Refuse { .. } => 3,
            Frame::Rdma { .. } => 4,
            Frame::Endpoint(_) => 5,
            Frame::Ready => 6,
            Frame::Done => 7,
            Frame::Failed { .. } => 8,
            Frame::Lane { .. } => 9,
        }
    }

    /// With its length in front.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0, 0, self.kind()];
        match self {
            Frame::Offer { id, wishes } => {
                out.push(VERSION);
                out.extend_from_slice(id);
                out.push(match wishes.policy {
                    Transport::Auto => 0,
                    Transport::Tcp => 1,
                    Transport::Rdma => 2,
                });
                out.push(wishes.sockets as u8);
                let rails = &wishes.rails[..wishes.rails.len().min(MAX_RAILS)];
                out.push(rails.len() as u8);
                for rail in rails {
                    out.push(u8::from(rail.link == LinkLayer::Ethernet));
                    out.extend_from_slice(&rail.gid);
                }
                out.extend_from_slice(cut(&wishes.why_none));
            }
            Frame::Tcp { sockets, why } => {
                out.push(*sockets as u8);
                out.extend_from_slice(cut(why));
            }
            Frame::Refuse { why } | Frame::Failed { why } => out.extend_from_slice(cut(why)),
            Frame::Rdma { sockets, rail, endpoint } => {
                out.extend_from_slice(&[*sockets as u8, *rail as u8]);
                put_endpoint(&mut out, endpoint);
            }
            Frame::Endpoint(endpoint) => put_endpoint(&mut out, endpoint),
            Frame::Ready | Frame::Done => {}
            Frame::Lane { id, index } => {
                out.extend_from_slice(id);
                out.push(*index as u8);
            }
        }
        let len = (out.len() - 2) as u16;
        out[..2].copy_from_slice(&len.to_le_bytes());
        out
    }

    /// Bytes that follow a frame's length.
    pub(super) fn body_len(prefix: [u8; 2]) -> Result<usize, ChannelError> {
        let len = usize::from(u16::from_le_bytes(prefix));
        match len {
            1..=MAX_FRAME => Ok(len),
            _ => Err(ChannelError::Protocol(format!("a frame of {len} bytes in the negotiation"))),
        }
    }

    /// Reads what follows the length.
    pub(super) fn decode(body: &[u8]) -> Result<Frame, ChannelError> {
        let mut fields = Fields(body);
        let malformed = || {
            let kind = body.first().copied().unwrap_or(0);
            ChannelError::Protocol(format!("a malformed frame of kind {kind} in the negotiation"))
        };
        let kind = fields.u8().ok_or_else(malformed)?;
        if kind == 1
            && let Some(version) = fields.u8()
            && version != VERSION
        {
            return Err(ChannelError::Protocol(format!(
                "the peer negotiates in version {version}, this side in {VERSION}: run one version in a job"
            )));
        }
        let frame = (|| {
            Some(match kind {
                1 => Frame::Offer { id: fields.array()?, wishes: fields.wishes()? },
                2 => Frame::Tcp { sockets: fields.sockets()?, why: fields.why()? },
                3 => Frame::Refuse { why: fields.why()? },
                4 => Frame::Rdma {
                    sockets: fields.sockets()?,
                    rail: usize::from(fields.u8()?),
                    endpoint: fields.endpoint()?,
                },
                5 => Frame::Endpoint(fields.endpoint()?),
                6 => Frame::Ready,
                7 => Frame::Done,
                8 => Frame::Failed { why: fields.why()? },
                9 => Frame::Lane { id: fields.array()?, index: usize::from(fields.u8()?) },
                _ => return None,
            })
        })();
        frame.filter(|_| fields.0.is_empty()).ok_or_else(malformed)
    }
}

/// What to use with a peer that made an offer. `ours` is this side, `at` the addresses of the
/// connection (the peer's and this side's), `spread` anything that differs between connections.
pub(super) fn choose(ours: &Wishes, theirs: &Wishes, at: (IpAddr, IpAddr), spread: usize) -> Choice {
    let demanded = ours.policy == Transport::Rdma || theirs.policy == Transport::Rdma;
    let without = |why: String| match demanded {
        true => Choice::Refuse { why },
        false => Choice::Tcp { why },
    };
    let none = |whose: &str, wishes: &Wishes| {
        let why = if wishes.why_none.is_empty() { "no RDMA device" } else { wishes.why_none.as_str() };
        without(format!("{whose}: {why}"))
    };
    for (whose, wishes) in [("here", ours), ("there", theirs)] {
        if wishes.policy == Transport::Tcp || wishes.rails.is_empty() {
            return none(whose, wishes);
        }
    }
    let (peer, here) = (at.0.to_canonical(), at.1.to_canonical());
    if peer.is_loopback() && !demanded {
        return without("the peer is reached by loopback".into());
    }
    // The rails at the connection's own addresses are known to reach each other; then come those of
    // one network; then any, which the probe will judge.
    let rank = |theirs: &RailInfo, ours: &RailInfo| match () {
        () if theirs.is_at(peer) && ours.is_at(here) => 3,
        () if same_network(&theirs.gid, &ours.gid) => 2,
        () => 1,
    };
    let mut best = (0, Vec::new());
    for (t, their_rail) in theirs.rails.iter().enumerate() {
        for (o, our_rail) in ours.rails.iter().enumerate() {
            if their_rail.link != our_rail.link {
                continue;
            }
            let rank = rank(their_rail, our_rail);
            match rank.cmp(&best.0) {
                std::cmp::Ordering::Greater => best = (rank, vec![(t, o)]),
                std::cmp::Ordering::Equal => best.1.push((t, o)),
                std::cmp::Ordering::Less => {}
            }
        }
    }
    match best.1.get(spread.checked_rem(best.1.len()).unwrap_or(0)) {
        Some(&(theirs, ours)) => Choice::Rails { theirs, ours },
        None => without("one side has InfiniBand, the other Ethernet".into()),
    }
}

#[cfg(test)]
#[path = "negotiate_tests.rs"]
mod tests;
