//! Which carrier a connection uses. The client offers in its hello what it has beside TCP; a
//! server that was offered something answers with one byte. Nothing offered, nothing asked: a
//! build without RDMA and an older one say the same as before.

use super::{HandshakeError, ended};
use crate::error::LinkError;
use crate::fabric::Fabric;
use crate::link::{LinkOptions, tcp, tls, verbs};
use crate::verbs::Device;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bit of the hello's first byte: the client has an RDMA device.
const OFFER_RDMA: u8 = 1;
/// Answers of the server.
const USE_TCP: u8 = 0;
const USE_RDMA: u8 = 1;

/// What a lane to a peer shall use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    /// TCP, whatever else there is.
    Tcp,
    /// This side's RDMA device of that number; TCP if the other side has none.
    Rail(usize),
}

/// A connection on its carrier.
pub(super) enum Link {
    Tcp((tcp::TcpTx, tcp::TcpRx)),
    Tls((tcp::TcpTx<tls::TlsWrite>, tcp::TcpRx<tls::TlsRead>)),
    Verbs((verbs::VerbsTx, verbs::VerbsRx)),
}

/// What this side has beside TCP.
#[derive(Default)]
pub(super) struct Carriers {
    device: Option<Arc<Device>>,
}

impl Carriers {
    /// The first rail of `fabric`.
    pub(super) fn of(fabric: &Fabric) -> Carriers {
        Carriers { device: fabric.rails().first().map(|rail| rail.device.clone()) }
    }

    /// Devices that a lane may want.
    pub(super) fn rails(&self) -> usize {
        usize::from(self.device.is_some())
    }

    fn rail(&self, want: Want) -> Option<&Arc<Device>> {
        match want {
            Want::Rail(0) => self.device.as_ref(),
            Want::Rail(_) | Want::Tcp => None,
        }
    }

    /// The client's hello for a lane.
    pub(super) fn hello(&self, want: Want) -> [u8; 32] {
        let mut hello = [0; 32];
        hello[0] = if self.rail(want).is_some() { OFFER_RDMA } else { 0 };
        hello
    }

    /// The client's side, after the handshake. A server without RDMA turns a rail into TCP; a
    /// device that does not reach the server is a [`HandshakeError::Rail`].
    pub(super) async fn dial(
        &self,
        want: Want,
        mut stream: TcpStream,
        options: LinkOptions,
    ) -> Result<Link, HandshakeError> {
        let Some(device) = self.rail(want) else { return Ok(Link::Tcp(tcp::split(stream, options))) };
        let answer = stream.read_u8().await.map_err(ended)?;
        self.make(answer, stream, Some(device), options).await
    }

    /// The server's side, after the handshake.
    pub(super) async fn answer(
        &self,
        hello: &[u8; 32],
        mut stream: TcpStream,
        options: LinkOptions,
    ) -> Result<Link, HandshakeError> {
        if hello[0] == 0 {
            return Ok(Link::Tcp(tcp::split(stream, options)));
        }
        // Offers of newer clients that this side does not know are not taken.
        let have = if self.device.is_some() { OFFER_RDMA } else { 0 };
        let choice = hello[0] & have;
        stream.write_u8(choice).await.map_err(ended)?;
        self.make(choice, stream, self.device.as_ref(), options).await
    }

    async fn make(
        &self,
        choice: u8,
        stream: TcpStream,
        device: Option<&Arc<Device>>,
        options: LinkOptions,
    ) -> Result<Link, HandshakeError> {
        match (choice, device) {
            (USE_TCP, _) => Ok(Link::Tcp(tcp::split(stream, options))),
            (USE_RDMA, Some(device)) => match verbs::connect(stream, device.clone(), options).await {
                Ok(link) => Ok(Link::Verbs(link)),
                Err(LinkError::Closed) => Err(HandshakeError::Ended("the other side closed".into())),
                Err(e) => {
                    Err(HandshakeError::Rail { device: device.name().to_owned(), reason: e.to_string() })
                }
            },
            _ => Err(HandshakeError::Malformed("a carrier was chosen that was not offered")),
        }
    }
}
