//! Remote procedure calls whose payloads are received straight into pool buffers.

mod carrier;
mod client;
mod connection;
pub(crate) mod frame;
mod incast;
pub mod info;
mod lanes;
mod outbox;
mod peer;
mod server;
mod serving;

pub use client::{Client, ClientOptions};
pub use frame::{MAX_HEAD, MAX_PAYLOAD};
pub use info::{ConnectionInfo, NetInfo, PeerInfo};
pub use server::{Server, ServerOptions, ServerStats};

use crate::buf::{Buf, BufMut};
use crate::error::HandshakeError;
use crate::handshake::Advance;
use bytes::Bytes;
use firefly_types::{ClusterId, ClusterSecret, WireError};
use futures::future::BoxFuture;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Default time for a handshake; a cluster's round trips are far below it even on a loaded machine.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// Default time after which a peer that moves no byte of a message is given up: its process is
/// stopped or its reader is stuck, and what is queued for it would only age.
const STALL_TIME: Duration = Duration::from_secs(15);

/// A call that moves no more is small: metadata, and reads of a page. It may wait for some of its
/// kind, never for a chunk; and its reply floods nobody.
const SMALL: usize = 16 << 10;

/// Who a process is, and what makes it a member.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// The secret of that cluster's members.
    pub secret: ClusterSecret,
    /// For the other side's logs, such as "storage n3". Cut to 100 bytes.
    pub name: String,
}

/// One call.
#[derive(Debug)]
pub struct Call {
    /// What to do; the service gives the numbers their meaning.
    pub method: u16,
    /// The message, at most [`MAX_HEAD`] bytes.
    pub head: Bytes,
    /// Payload to the server, at most [`MAX_PAYLOAD`] bytes.
    pub send: Option<Buf>,
    /// Where the reply's payload shall land. The server may fill its whole capacity.
    pub recv: Option<BufMut>,
    /// Time from now to the answer, connecting included.
    pub timeout: Duration,
}

impl Call {
    /// Bytes that move, or may.
    fn bytes(&self) -> usize {
        let payload = self.send.as_ref().map_or(0, |b| b.len());
        self.head.len() + payload + self.recv.as_ref().map_or(0, BufMut::capacity)
    }
}

/// The answer to a [`Call`].
#[derive(Debug)]
pub struct Response {
    /// The message.
    pub head: Bytes,
    /// The buffer given as [`Call::recv`], its length set to the bytes received.
    pub data: Option<BufMut>,
}

/// What a server does with calls.
pub trait Service: Send + Sync + 'static {
    /// Largest payload accepted for `method`; 0 refuses payloads. Called before memory is taken.
    fn payload_limit(&self, method: u16) -> usize;

    /// Carries out one call. Runs concurrently with others and to its end even if the caller is
    /// gone by then.
    fn handle<'a>(&'a self, request: Request) -> BoxFuture<'a, Result<Reply, WireError>>;
}

/// A call as its service sees it.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub method: u16,
    /// The message.
    pub head: Bytes,
    /// The payload, already received.
    pub payload: Option<BufMut>,
    /// Bytes that the caller's buffer takes: the most that [`Reply::data`] may hold.
    pub reply_capacity: usize,
    /// Name and address of the caller.
    pub peer: String,
}

/// What a service answers.
#[derive(Debug, Default)]
pub struct Reply {
    /// The message, at most [`MAX_HEAD`] bytes.
    pub head: Bytes,
    /// Payload for the caller's buffer.
    pub data: Option<Buf>,
}

impl Reply {
    /// An answer without payload.
    pub fn head(head: impl Into<Bytes>) -> Reply {
        Reply { head: head.into(), data: None }
    }

    /// An answer with payload.
    pub fn with_data(head: impl Into<Bytes>, data: impl Into<Buf>) -> Reply {
        Reply { head: head.into(), data: Some(data.into()) }
    }
}

/// Counters of one client or server, since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStats {
    /// Bytes sent, headers included.
    pub bytes_sent: u64,
    /// Bytes received, headers included.
    pub bytes_received: u64,
    /// Payload bytes moved from one place in user space to another, among the bytes received. The
    /// rest of what was received went from the kernel, or by the device, straight to its place.
    pub bytes_copied: u64,
    /// Calls begun (client) or taken up (server).
    pub calls: u64,
    /// Connections made, reconnects included.
    pub connections: u64,
    /// Connections refused by the handshake.
    pub refused: u64,
}

/// A stream's error during the handshake.
fn ended(e: std::io::Error) -> HandshakeError {
    match e.kind() {
        std::io::ErrorKind::UnexpectedEof => HandshakeError::Ended("the other side closed".into()),
        _ => HandshakeError::Ended(e.to_string()),
    }
}

/// Drives one side of a handshake over an async stream. `wants` and `feed` belong to the machine.
async fn drive_handshake<S, M>(
    stream: &mut S,
    machine: &mut M,
    wants: fn(&M) -> usize,
    feed: fn(&mut M, &[u8]) -> Advance,
) -> Result<crate::handshake::Agreed, HandshakeError>
where
    S: AsyncReadExt + AsyncWriteExt + Unpin,
{
    loop {
        let mut message = vec![0; wants(machine)];
        stream.read_exact(&mut message).await.map_err(ended)?;
        let advance = feed(machine, &message);
        let sent = async {
            stream.write_all(&advance.send).await?;
            stream.flush().await
        };
        let sent = sent.await;
        if let Some(done) = advance.done {
            // A refusal that cannot be delivered is still this refusal.
            return match (done, sent) {
                (Ok(_), Err(e)) => Err(ended(e)),
                (done, _) => done,
            };
        }
        sent.map_err(ended)?;
    }
}

#[cfg(test)]
mod bound_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod incast_tests;
#[cfg(test)]
mod lane_tests;
#[cfg(test)]
mod proxy;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod vanish_tests;
