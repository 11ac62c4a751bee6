//! Which carrier a connection uses, agreed for each connection after both sides have proven
//! themselves: until then no verbs object is made, so a stranger costs a socket and nothing else.
//!
//! A client that wants a rail says so in its hello. A server that knows this negotiation answers
//! with one byte and the frames of `verbs::negotiate` follow; an older one, or one without RDMA,
//! answers [`USE_TCP`]. Nothing offered, nothing asked: an older client hears nothing new.
//!
//! RDMA is used only after a message has made its way over the queue pair and back. Whatever fails
//! before that, at either side, ends in TCP on the same connection with the reason kept, or, where
//! the client's options allow RDMA only, in an error with the same reason. The choice is the
//! client's: a server whose options say `tcp` refuses rails, any other takes what the client can
//! use.

use super::{HandshakeError, ended};
use crate::error::LinkError;
use crate::fabric::{Fabric, Transport};
use crate::link::verbs::Draft;
use crate::link::{LinkOptions, tcp, tls, verbs};
use crate::verbs::negotiate::{End, Frame, PREFIX, Place};
use crate::verbs::port::same_network;
use crate::verbs::{Port, Rail};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bit of the hello's first byte: the client wants RDMA. (Bit 0 was an offer of the first layout,
/// which no release made; it is answered with TCP.)
const OFFER_RDMA: u8 = 2;
/// Answers of the server.
const USE_TCP: u8 = 0;
const NEGOTIATE: u8 = 2;

const LOOPBACK: &str = "the peer is on this machine's loopback address";

/// What a lane to a peer shall use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// TCP, whatever else there is.
    Tcp,
    /// This side's RDMA rail of that number; TCP if it does not reach the other side.
    Rail(usize),
}

/// A connection on its carrier.
pub(super) enum Link {
    Tcp((tcp::TcpTx, tcp::TcpRx)),
    Tls((tcp::TcpTx<tls::TlsWrite>, tcp::TcpRx<tls::TlsRead>)),
    Verbs((verbs::VerbsTx, verbs::VerbsRx)),
}

/// A connection that was made.
pub(super) struct Made {
    pub(super) link: Link,
    /// Why it is not RDMA, if it is not and was wanted.
    pub(super) why_tcp: Option<String>,
}

/// What this side has beside TCP.
pub(super) struct Carriers {
    fabric: Fabric,
}

impl Default for Carriers {
    fn default() -> Self {
        Carriers { fabric: Fabric::tcp() }
    }
}

/// What one connection will try.
pub(super) struct Plan {
    rail: Option<(usize, Arc<Rail>)>,
    /// Why no rail is tried.
    why_tcp: Option<String>,
    /// TCP will not do.
    must: bool,
}

impl Carriers {
    /// All rails of `fabric`.
    pub(super) fn of(fabric: &Fabric) -> Carriers {
        Carriers { fabric: fabric.clone() }
    }

    /// Rails that lanes to a server at `address` ("ip:port") may want, those that are down
    /// included, or why there are none.
    pub(super) fn rails_to(&self, address: &str) -> (usize, Option<String>) {
        let ip = address.parse::<SocketAddr>().map(|a| a.ip());
        match self.fabric.rails().len() {
            0 => (0, self.fabric.why_not()),
            _ if ip.is_ok_and(|ip| self.stays_on_tcp(ip)) => (0, Some(LOOPBACK.into())),
            rails => (rails, None),
        }
    }

    fn stays_on_tcp(&self, ip: IpAddr) -> bool {
        ip.to_canonical().is_loopback() && self.fabric.options().transport != Transport::Rdma
    }

    /// Why `rail` cannot be used now, if it cannot.
    fn why_down(&self, rail: usize) -> Option<String> {
        match self.fabric.rails().get(rail) {
            Some(rail) => rail.port().err().map(|why| format!("{}: {why}", rail.device.name())),
            None => Some(self.fabric.why_not().unwrap_or_else(|| "there is no such rail".into())),
        }
    }

    /// Why a peer at `ip` is reached by TCP whatever its lanes want, if it is.
    fn why_tcp(&self, ip: IpAddr) -> Option<String> {
        if let Some(error) = self.fabric.invalid() {
            return Some(error.to_string());
        }
        if self.stays_on_tcp(ip) {
            return Some(LOOPBACK.into());
        }
        self.fabric.why_not()
    }

    /// What a connection to the peer of `stream` tries for a lane that wants `want`.
    pub(super) fn plan(&self, want: Want, stream: &TcpStream) -> Plan {
        let must = self.fabric.options().transport == Transport::Rdma || self.fabric.invalid().is_some();
        let tcp = |why_tcp| Plan { rail: None, why_tcp, must };
        let Want::Rail(number) = want else {
            let why = || self.fabric.why_not().unwrap_or_else(|| "TCP may not be used".into());
            return tcp(must.then(why));
        };
        let ip = stream.peer_addr().map_or(IpAddr::from([0; 4]), |a| a.ip());
        if let Some(why) = self.why_tcp(ip).or_else(|| self.why_down(number)) {
            return tcp(Some(why));
        }
        match self.fabric.rails().get(number) {
            Some(rail) => Plan { rail: Some((number, rail.clone())), why_tcp: None, must },
            None => tcp(Some("there is no such rail".into())),
        }
    }

    /// The server's side, after the handshake.
    pub(super) async fn answer(
        &self,
        hello: &[u8; 32],
        mut stream: TcpStream,
        options: LinkOptions,
    ) -> Result<Made, HandshakeError> {
        if hello[0] == 0 {
            return Ok(Made { link: Link::Tcp(tcp::split(stream, options)), why_tcp: None });
        }
        if hello[0] & OFFER_RDMA == 0 {
            stream.write_u8(USE_TCP).await.map_err(ended)?;
            let why_tcp = Some("the client offers nothing that this side knows".to_owned());
            return Ok(Made { link: Link::Tcp(tcp::split(stream, options)), why_tcp });
        }
        stream.write_u8(NEGOTIATE).await.map_err(ended)?;
        match self.negotiate(&mut stream, &options).await? {
            Ok(draft) => Ok(Made { link: Link::Verbs(draft.finish(stream)), why_tcp: None }),
            Err(why) => Ok(Made { link: Link::Tcp(tcp::split(stream, options)), why_tcp: Some(why) }),
        }
    }

    /// The server's frames. The inner error is why it ends in TCP.
    async fn negotiate(
        &self,
        stream: &mut TcpStream,
        options: &LinkOptions,
    ) -> Result<Result<Draft, String>, HandshakeError> {
        let offer = match read_frame(stream).await? {
            Frame::Offer(place) => place,
            Frame::Refuse(why) => return Ok(Err(why)),
            other => return Err(malformed(other.unexpected("Offer"))),
        };
        let local = stream.local_addr().map_err(ended)?.ip();
        let made = self.pair(&offer, local).and_then(|(rail, port, place)| {
            Draft::new(&rail, &port, place, options).map_err(|e| e.to_string())
        });
        let (draft, end) =
            match made.and_then(|d| d.end().map(|end| (d, end)).ok_or_else(|| "it is gone".into())) {
                Ok(made) => made,
                Err(why) => return refuse(stream, why).await,
            };
        write_frame(stream, &Frame::Accept(end)).await?;
        let peer = match read_frame(stream).await? {
            Frame::Connect(end) => end,
            Frame::Refuse(why) => return Ok(Err(why)),
            other => return Err(malformed(other.unexpected("Connect"))),
        };
        if let Err(e) = draft.connect(&peer).await {
            return refuse(stream, e.to_string()).await;
        }
        write_frame(stream, &Frame::Ready).await?;
        // The client judges the path; an error of this side's will show as a probe without answer.
        let verdict = {
            let verdict = read_frame(stream);
            tokio::pin!(verdict);
            tokio::select! {
                verdict = &mut verdict => verdict?,
                e = draft.answer_probes() => {
                    tracing::debug!(error = %e, "an RDMA probe failed");
                    verdict.await?
                }
            }
        };
        match verdict {
            Frame::Use => Ok(Ok(draft)),
            Frame::Refuse(why) => Ok(Err(why)),
            other => Err(malformed(other.unexpected("Use"))),
        }
    }

    /// This side's rail for a client that offers `offer` and has dialled `local`.
    fn pair(&self, offer: &Place, local: IpAddr) -> Result<(Arc<Rail>, Port, Place), String> {
        if let Some(why) = self.fabric.why_not() {
            return Err(format!("the server uses no RDMA: {why}"));
        }
        let rails = self.fabric.rails();
        let up = rails.iter().enumerate().filter_map(|(i, rail)| Some((i, rail, rail.port().ok()?)));
        let best = up.filter(|(_, _, port)| port.link == offer.link).min_by_key(|(i, _, port)| {
            let near = port.gids.iter().any(|gid| same_network(&gid.raw, &offer.gid));
            (!near, *i != usize::from(offer.rail), *i)
        });
        let Some((number, rail, port)) = best else {
            return Err(format!("the server has no {} port that is up", offer.link.name()));
        };
        let port = port.toward(&offer.gid, local);
        let place = place(number, rail, &port);
        Ok((rail.clone(), port, place))
    }
}

fn place(number: usize, rail: &Rail, port: &Port) -> Place {
    Place { link: port.link, gid: port.gid.raw, rail: number.min(255) as u8, name: rail.name() }
}

impl Plan {
    /// The client's hello.
    pub(super) fn hello(&self) -> [u8; 32] {
        let mut hello = [0; 32];
        hello[0] = if self.rail.is_some() { OFFER_RDMA } else { 0 };
        hello
    }

    /// The client's side, after the handshake.
    ///
    /// # Errors
    /// [`HandshakeError::Rail`] where only RDMA may be used and this rail does not reach the peer.
    pub(super) async fn dial(
        self,
        mut stream: TcpStream,
        options: LinkOptions,
    ) -> Result<Made, HandshakeError> {
        let (why, device) = match &self.rail {
            None => (self.why_tcp, "none".to_owned()),
            Some((number, rail)) => match dial_rail(*number, rail, &mut stream, &options).await? {
                Ok(draft) => return Ok(Made { link: Link::Verbs(draft.finish(stream)), why_tcp: None }),
                Err(why) => (Some(why), rail.name()),
            },
        };
        match why {
            Some(reason) if self.must => Err(HandshakeError::Rail { device, reason }),
            why_tcp => Ok(Made { link: Link::Tcp(tcp::split(stream, options)), why_tcp }),
        }
    }
}

/// The client's frames. The inner error is why it ends in TCP.
async fn dial_rail(
    number: usize,
    rail: &Arc<Rail>,
    stream: &mut TcpStream,
    options: &LinkOptions,
) -> Result<Result<Draft, String>, HandshakeError> {
    match stream.read_u8().await.map_err(ended)? {
        NEGOTIATE => {}
        USE_TCP => return Ok(Err("the server has no RDMA, or is older than this client".into())),
        _ => return Err(HandshakeError::Malformed("a carrier was chosen that was not offered")),
    }
    let local = stream.local_addr().map_err(ended)?.ip();
    let port = match rail.port() {
        Ok(port) => port.at(local),
        Err(why) => return refuse(stream, format!("{}: {why}", rail.device.name())).await,
    };
    let place = place(number, rail, &port);
    write_frame(stream, &Frame::Offer(place.clone())).await?;
    let peer = match read_frame(stream).await? {
        Frame::Accept(end) => end,
        Frame::Refuse(why) => return Ok(Err(why)),
        other => return Err(malformed(other.unexpected("Accept"))),
    };
    let (draft, end) = match make(rail, &port, place, options, &peer).await {
        Ok(made) => made,
        Err(e) => return refuse(stream, e.to_string()).await,
    };
    write_frame(stream, &Frame::Connect(end)).await?;
    match read_frame(stream).await? {
        Frame::Ready => {}
        Frame::Refuse(why) => return Ok(Err(why)),
        other => return Err(malformed(other.unexpected("Ready"))),
    }
    if let Err(e) = draft.probe().await {
        let why = format!("{} does not reach the server's {}: {e}", rail.name(), peer.place.name);
        return refuse(stream, why).await;
    }
    write_frame(stream, &Frame::Use).await?;
    Ok(Ok(draft))
}

async fn make(
    rail: &Arc<Rail>,
    port: &Port,
    place: Place,
    options: &LinkOptions,
    peer: &End,
) -> Result<(Draft, End), LinkError> {
    let draft = Draft::new(rail, port, place, options)?;
    draft.connect(peer).await?;
    let end = draft.end().ok_or(LinkError::Closed)?;
    Ok((draft, end))
}

/// Says no, with the reason; both sides go on with TCP.
async fn refuse(stream: &mut TcpStream, why: String) -> Result<Result<Draft, String>, HandshakeError> {
    write_frame(stream, &Frame::Refuse(why.clone())).await?;
    Ok(Err(why))
}

fn malformed(error: impl std::fmt::Display) -> HandshakeError {
    HandshakeError::Negotiation(error.to_string())
}

async fn write_frame(stream: &mut TcpStream, frame: &Frame) -> Result<(), HandshakeError> {
    stream.write_all(&frame.encode()).await.map_err(ended)
}

async fn read_frame(stream: &mut TcpStream) -> Result<Frame, HandshakeError> {
    let mut prefix = [0; PREFIX];
    stream.read_exact(&mut prefix).await.map_err(ended)?;
    let mut bytes = vec![0; Frame::length(prefix).map_err(malformed)?];
    stream.read_exact(&mut bytes).await.map_err(ended)?;
    Frame::decode(&bytes).map_err(malformed)
}

#[cfg(test)]
#[path = "carrier_tests.rs"]
mod verbs_tests;
