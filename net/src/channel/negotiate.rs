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
//! Frames: length u16 (little-endian, of what follows), kind u8, fields; those of rails and queue pairs
//! are RPC's too (`verbs::negotiate`).

use super::{ChannelError, MOST_SOCKETS};
use crate::fabric::Transport;
use crate::verbs::negotiate::{End, Fields, FrameError, Place, put_end, put_place, put_text};
use crate::verbs::port::same_network;
use std::net::{IpAddr, Ipv6Addr};

/// Version of these frames.
const VERSION: u8 = 1;
/// Longest frame.
pub(super) const MAX_FRAME: usize = 2048;
/// Rails that are offered at most.
const MAX_RAILS: usize = 16;
/// Longest reason; longer ones are cut.
const MAX_WHY: usize = 400;

fn is_at(rail: &Place, ip: IpAddr) -> bool {
    let v6 = Ipv6Addr::from(rail.gid);
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4) == ip.to_canonical()
}

/// What one side has and wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Wishes {
    pub(super) policy: Transport,
    pub(super) sockets: usize,
    pub(super) rails: Vec<Place>,
    /// Why there are no rails.
    pub(super) why_none: String,
}

/// A side's queue pair and its ring, of `end.bytes` bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Endpoint {
    pub(super) end: End,
    /// Where the ring is, and its remote key.
    pub(super) ring: (u64, u32),
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

/// A reason, for people.
fn why(fields: &mut Fields<'_>) -> Result<String, FrameError> {
    fields.text(MAX_WHY)
}

fn sockets(fields: &mut Fields<'_>) -> Result<usize, FrameError> {
    let n = usize::from(fields.u8()?);
    if (1..=MOST_SOCKETS).contains(&n) { Ok(n) } else { Err(FrameError::Field("the number of sockets")) }
}

fn wishes(fields: &mut Fields<'_>) -> Result<Wishes, FrameError> {
    let policy = match fields.u8()? {
        0 => Transport::Auto,
        1 => Transport::Tcp,
        2 => Transport::Rdma,
        _ => return Err(FrameError::Field("the policy")),
    };
    let sockets = sockets(fields)?;
    let count = usize::from(fields.u8()?);
    if count > MAX_RAILS {
        return Err(FrameError::Field("the number of rails"));
    }
    let rails = (0..count).map(|_| fields.place()).collect::<Result<_, _>>()?;
    Ok(Wishes { policy, sockets, rails, why_none: why(fields)? })
}

fn put_endpoint(out: &mut Vec<u8>, Endpoint { end, ring }: &Endpoint) {
    put_end(out, end);
    out.extend_from_slice(&ring.0.to_le_bytes());
    out.extend_from_slice(&ring.1.to_le_bytes());
}

fn endpoint(fields: &mut Fields<'_>) -> Result<Endpoint, FrameError> {
    let end = fields.end()?;
    let ring = (u64::from_le_bytes(fields.array()?), u32::from_le_bytes(fields.array()?));
    Ok(Endpoint { end, ring })
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
                rails.iter().for_each(|rail| put_place(&mut out, rail));
                put_text(&mut out, &wishes.why_none, MAX_WHY);
            }
            Frame::Tcp { sockets, why } => {
                out.push(*sockets as u8);
                put_text(&mut out, why, MAX_WHY);
            }
            Frame::Refuse { why } | Frame::Failed { why } => put_text(&mut out, why, MAX_WHY),
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
        let kind = body.first().copied().unwrap_or(0);
        if kind == 1
            && let Some(&version) = body.get(1)
            && version != VERSION
        {
            return Err(ChannelError::Protocol(format!(
                "the peer negotiates in version {version}, this side in {VERSION}: run one version in a job"
            )));
        }
        Frame::read(Fields(body)).map_err(|what| {
            ChannelError::Protocol(format!("a malformed frame of kind {kind} in the negotiation: {what}"))
        })
    }

    fn read(mut fields: Fields<'_>) -> Result<Frame, FrameError> {
        let fields = &mut fields;
        let frame = match fields.u8()? {
            1 => {
                // The version, looked at before.
                fields.u8()?;
                Frame::Offer { id: fields.array()?, wishes: wishes(fields)? }
            }
            2 => Frame::Tcp { sockets: sockets(fields)?, why: why(fields)? },
            3 => Frame::Refuse { why: why(fields)? },
            4 => Frame::Rdma {
                sockets: sockets(fields)?,
                rail: usize::from(fields.u8()?),
                endpoint: endpoint(fields)?,
            },
            5 => Frame::Endpoint(endpoint(fields)?),
            6 => Frame::Ready,
            7 => Frame::Done,
            8 => Frame::Failed { why: why(fields)? },
            9 => Frame::Lane { id: fields.array()?, index: usize::from(fields.u8()?) },
            other => return Err(FrameError::Kind(other)),
        };
        if fields.0.is_empty() { Ok(frame) } else { Err(FrameError::Field("the end")) }
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
    let rank = |theirs: &Place, ours: &Place| match () {
        () if is_at(theirs, peer) && is_at(ours, here) => 3,
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
