//! The TCP carrier: messages and payloads follow each other on one stream.

use super::{Counters, Incoming, LinkRx, LinkTx, Outgoing, Register, Window};
use crate::buf::BufMut;
use crate::error::LinkError;
use crate::rpc::frame::{HEADER_BYTES, Header};
use bytes::{BufMut as _, Bytes, BytesMut};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// Header and a usual head arrive in one read; at most these few hundred bytes of a payload that
/// follows are copied once, the rest is received in place.
const PREFETCH: usize = 512;

/// Pieces handed to the kernel at once.
const MAX_PIECES: usize = 64;

/// Options that every connection gets.
pub(crate) fn configure(stream: &TcpStream, stall: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    // A silent peer (power, cable) is noticed without traffic in about 10 + 3 * 3 s, and with
    // unacknowledged bytes after `stall`.
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(10))
        .with_interval(Duration::from_secs(3))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(stall))
}

/// Makes both halves of a connected, authenticated stream.
///
/// `stall`: a peer that moves no byte of a message that has begun for so long is given up.
pub(crate) fn split(stream: TcpStream, counters: Arc<Counters>, stall: Duration) -> (TcpTx, TcpRx) {
    let (read, write) = stream.into_split();
    let tx = TcpTx { stream: write, counters: counters.clone(), stall };
    let rx = TcpRx { stream: read, ahead: Box::new([0; PREFETCH]), from: 0, to: 0, counters, stall };
    (tx, rx)
}

/// A stream addresses no memory.
struct Unaddressed;

impl Register for Unaddressed {
    fn window(&self, _buf: &mut BufMut) -> Result<Option<Window>, LinkError> {
        Ok(None)
    }
}

/// Sends on a TCP stream.
pub(crate) struct TcpTx {
    stream: OwnedWriteHalf,
    counters: Arc<Counters>,
    stall: Duration,
}

impl LinkTx for TcpTx {
    const NAME: &'static str = "tcp";

    fn register(&self) -> Arc<dyn Register> {
        Arc::new(Unaddressed)
    }

    async fn send(&mut self, batch: &mut VecDeque<Outgoing>) -> Result<(), LinkError> {
        // Bytes of the first message that are already written.
        let mut skip = 0;
        let mut headers: VecDeque<[u8; HEADER_BYTES]> = batch.iter().map(|m| m.header.encode()).collect();
        while let Some(first) = batch.front() {
            let total = HEADER_BYTES + first.head.len() + first.payload.as_ref().map_or(0, |p| p.len());
            if skip >= total {
                skip -= total;
                batch.pop_front();
                headers.pop_front();
                continue;
            }
            let mut pieces = Vec::with_capacity(MAX_PIECES.min(3 * batch.len()));
            let mut before = skip;
            'fill: for (message, header) in batch.iter().zip(&headers) {
                let payload: &[u8] = message.payload.as_deref().unwrap_or_default();
                for piece in [&header[..], &message.head, payload] {
                    if before >= piece.len() {
                        before -= piece.len();
                        continue;
                    }
                    pieces.push(IoSlice::new(&piece[before..]));
                    before = 0;
                    if pieces.len() == MAX_PIECES {
                        break 'fill;
                    }
                }
            }
            let written = tokio::time::timeout(self.stall, self.stream.write_vectored(&pieces))
                .await
                .map_err(|_| LinkError::Stalled(self.stall))??;
            if written == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero).into());
            }
            self.counters.add_sent(written);
            skip += written;
        }
        Ok(())
    }
}

/// Receives from a TCP stream.
pub(crate) struct TcpRx {
    stream: OwnedReadHalf,
    ahead: Box<[u8; PREFETCH]>,
    from: usize,
    to: usize,
    counters: Arc<Counters>,
    stall: Duration,
}

impl TcpRx {
    /// Bytes in the prefetch buffer, at least `n` of them (`n` <= PREFETCH).
    async fn at_least(&mut self, n: usize) -> Result<(), LinkError> {
        while self.to - self.from < n {
            if self.from > 0 {
                self.ahead.copy_within(self.from..self.to, 0);
                self.to -= self.from;
                self.from = 0;
            }
            let got = self.stream.read(&mut self.ahead[self.to..]).await?;
            if got == 0 {
                return Err(if self.to == self.from {
                    LinkError::Closed
                } else {
                    LinkError::Protocol("the stream ended within a message".into())
                });
            }
            self.counters.add_received(got);
            self.to += got;
        }
        Ok(())
    }

    /// Takes up to `out.len()` prefetched bytes.
    fn drain(&mut self, out: &mut [u8]) -> usize {
        let n = out.len().min(self.to - self.from);
        out[..n].copy_from_slice(&self.ahead[self.from..self.from + n]);
        self.from += n;
        n
    }

    async fn fill(&mut self, out: &mut [u8]) -> Result<(), LinkError> {
        let mut at = self.drain(out);
        while at < out.len() {
            // Within a message, silence is a fault: memory is already held for the rest.
            let got = tokio::time::timeout(self.stall, self.stream.read(&mut out[at..]))
                .await
                .map_err(|_| LinkError::Stalled(self.stall))??;
            if got == 0 {
                return Err(LinkError::Protocol("the stream ended within a message".into()));
            }
            self.counters.add_received(got);
            at += got;
        }
        Ok(())
    }
}

impl LinkRx for TcpRx {
    async fn recv(&mut self) -> Result<Incoming, LinkError> {
        self.at_least(HEADER_BYTES).await?;
        let mut header = [0; HEADER_BYTES];
        self.drain(&mut header);
        let header = Header::decode(&header)?;
        let mut head = BytesMut::new();
        if header.head_len > 0 {
            // The limit was checked by the decoder.
            head.put_bytes(0, header.head_len as usize);
            self.fill(&mut head).await?;
        }
        Ok(Incoming { header, head: Bytes::from(head), source: None, window: None })
    }

    async fn pull(&mut self, _from: &Incoming, mut into: BufMut) -> Result<BufMut, LinkError> {
        self.fill(&mut into).await?;
        Ok(into)
    }

    async fn land(&mut self, _reply: &Incoming, into: &mut BufMut) -> Result<(), LinkError> {
        self.fill(into).await
    }

    async fn skip(&mut self, from: &Incoming) -> Result<(), LinkError> {
        let mut left = from.header.payload_len as usize;
        let mut scratch = vec![0; left.min(64 << 10)];
        while left > 0 {
            let n = left.min(scratch.len());
            self.fill(&mut scratch[..n]).await?;
            left -= n;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "tcp_tests.rs"]
mod tests;
