//! Which carrier a connection uses. The client offers in its hello what it has beside TCP; a
//! server that was offered something answers with one byte. Nothing offered, nothing asked: a
//! build without RDMA and an older one say the same as before.

use super::{HandshakeError, ended};
use crate::error::LinkError;
use crate::fabric::{Fabric, Rail};
use crate::link::{Counters, tcp, verbs};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bit of the hello's first byte: the client has an RDMA device.
const OFFER_RDMA: u8 = 1;
/// Answers of the server.
const USE_TCP: u8 = 0;
const USE_RDMA: u8 = 1;

/// A connection on its carrier.
pub(super) enum Link {
    Tcp((tcp::TcpTx, tcp::TcpRx)),
    Verbs((verbs::VerbsTx, verbs::VerbsRx)),
}

/// What this side has beside TCP.
#[derive(Default)]
pub(super) struct Carriers {
    rail: Option<Rail>,
}

impl Carriers {
    /// The first rail of `fabric`.
    pub(super) fn of(fabric: &Fabric) -> Carriers {
        Carriers { rail: fabric.rails().first().cloned() }
    }

    fn offers(&self) -> u8 {
        if self.rail.is_some() { OFFER_RDMA } else { 0 }
    }

    /// The client's hello.
    pub(super) fn hello(&self) -> [u8; 32] {
        let mut hello = [0; 32];
        hello[0] = self.offers();
        hello
    }

    /// The client's side, after the handshake.
    pub(super) async fn dial(
        &self,
        mut stream: TcpStream,
        counters: Arc<Counters>,
        stall: Duration,
    ) -> Result<Link, HandshakeError> {
        if self.offers() == 0 {
            return Ok(Link::Tcp(tcp::split(stream, counters, stall)));
        }
        let answer = stream.read_u8().await.map_err(ended)?;
        self.make(answer, stream, counters, stall).await.map_err(|e| HandshakeError::Ended(e.to_string()))
    }

    /// The server's side, after the handshake.
    pub(super) async fn answer(
        &self,
        hello: &[u8; 32],
        mut stream: TcpStream,
        counters: Arc<Counters>,
        stall: Duration,
    ) -> Result<Link, HandshakeError> {
        if hello[0] == 0 {
            return Ok(Link::Tcp(tcp::split(stream, counters, stall)));
        }
        // Offers of newer clients that this side does not know are not taken.
        let choice = hello[0] & self.offers();
        stream.write_u8(choice).await.map_err(ended)?;
        self.make(choice, stream, counters, stall).await.map_err(|e| HandshakeError::Ended(e.to_string()))
    }

    async fn make(
        &self,
        choice: u8,
        stream: TcpStream,
        counters: Arc<Counters>,
        stall: Duration,
    ) -> Result<Link, LinkError> {
        match choice {
            USE_TCP => Ok(Link::Tcp(tcp::split(stream, counters, stall))),
            USE_RDMA => {
                let rail = self.rail.as_ref();
                let rail = rail.ok_or_else(|| LinkError::Protocol("RDMA without a device".into()))?;
                Ok(Link::Verbs(verbs::connect(stream, rail, counters, stall).await?))
            }
            other => Err(LinkError::Protocol(format!("carrier {other} was chosen, which was not offered"))),
        }
    }
}
