//! The TCP carrier: messages and payloads follow each other on one stream.

use super::{Counters, Incoming, LinkOptions, LinkRx, LinkTx, Outgoing, Register, Window};
use crate::buf::{BufMut, HeadRoom, Heads};
use crate::error::LinkError;
use crate::rpc::frame::{HEADER_BYTES, Header};
use bytes::{BufMut as _, Bytes, BytesMut};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, Interval, MissedTickBehavior};

/// Bytes read ahead: several small messages, or one with a page of payload, arrive in one read. At
/// most so much of each payload is copied once, the rest is received in place.
pub(crate) const PREFETCH: usize = 8 << 10;

/// Messages handed to the kernel at once, three pieces each.
const MAX_BATCH: usize = 21;

/// A message may take its link's stall time and a second for each of so many bytes: a peer that
/// dribbles, one byte at a time, does not hold the memory of a message for ever.
const SLOWEST: u64 = 1 << 20;

/// How often a link asks its socket whether the peer's host is still there, and the kernel asks
/// the host on an idle one.
const PULSE: Duration = Duration::from_secs(1);
/// Silence after which a host that owes an acknowledgement is given up: three unanswered probes, or
/// about as many retransmissions. With the pulse that is noticed within four seconds, so that a file
/// system on top is back in service within five.
pub(crate) const VANISHED: Duration = Duration::from_secs(3);

/// Options that every connection gets.
pub(crate) fn configure(stream: &TcpStream, options: &LinkOptions) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    let class = u32::from(options.class.traffic_class);
    match stream.local_addr()? {
        _ if class == 0 => {}
        SocketAddr::V4(_) => socket.set_tos_v4(class)?,
        SocketAddr::V6(_) => socket.set_tclass_v6(class)?,
    }
    // The kernel probes an idle connection; `Pulse` judges by the answers. The kernel's own verdict
    // (TCP_USER_TIMEOUT, which overrides the number of probes) comes later, because it also falls
    // on a peer that is well and only slow to read.
    let keepalive = socket2::TcpKeepalive::new().with_time(PULSE).with_interval(PULSE);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(options.stall))
}

/// Notices within about [`VANISHED`] and [`PULSE`] that the host at the other end of a stream is
/// gone: power, cable, network. The end of its process alone closes the stream and needs no pulse.
pub(crate) struct Pulse(Interval);

impl Pulse {
    pub(crate) fn new() -> Pulse {
        let mut tick = tokio::time::interval_at(Instant::now() + PULSE, PULSE);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Pulse(tick)
    }

    /// Returns when it is time for a [`Pulse::check`]. Cancellation safe.
    pub(crate) async fn due(&mut self) {
        self.0.tick().await;
    }

    /// An error if the peer's host owes acknowledgements and has been silent for too long. `socket`
    /// is a TCP socket.
    pub(crate) fn check(&self, socket: BorrowedFd<'_>) -> Result<(), LinkError> {
        // SAFETY: the structure is plain integers, for which all zeros is a value.
        let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
        let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes to the structure.
        let rc = unsafe {
            let at = (&raw mut info).cast();
            libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, at, &raw mut len)
        };
        if rc != 0 {
            return Err(io::Error::last_os_error().into());
        }
        let silent = Duration::from_millis(info.tcpi_last_ack_recv.into());
        // More than one unanswered: the first may be on its way. An answer resets these counts, so
        // a reader that is slow, whose host acknowledges with a closed window, is not gone.
        let owes = info.tcpi_probes > 1 || info.tcpi_retransmits > 1;
        if owes && silent >= VANISHED { Err(LinkError::Vanished(silent)) } else { Ok(()) }
    }
}

/// Makes both halves of a connected, authenticated stream.
pub(crate) fn split(stream: TcpStream, options: LinkOptions) -> (TcpTx, TcpRx) {
    let (read, write) = stream.into_split();
    link(read, write, options)
}

/// The same of two halves.
pub(super) fn link<R: ReadHalf, W: WriteHalf>(
    read: R,
    write: W,
    options: LinkOptions,
) -> (TcpTx<W>, TcpRx<R>) {
    let LinkOptions { counters, stall, heads, .. } = options;
    let tx = TcpTx { stream: write, begun: 0, counters: counters.clone(), stall };
    let ahead = Box::new([0; PREFETCH]);
    let rx = TcpRx { stream: read, ahead, from: 0, to: 0, counters, stall, heads, pulse: Pulse::new() };
    (tx, rx)
}

/// What a link reads from.
pub(crate) trait ReadHalf: AsyncRead + Unpin + Send + 'static {
    /// The socket below.
    fn socket(&self) -> BorrowedFd<'_>;
}

/// What a link writes to.
pub(crate) trait WriteHalf: AsyncWrite + Unpin + Send + 'static {
    /// What people call it.
    const NAME: &'static str;

    /// Writes what can be written without waiting.
    fn try_write_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize>;
}

impl ReadHalf for OwnedReadHalf {
    fn socket(&self) -> BorrowedFd<'_> {
        self.as_ref().as_fd()
    }
}

impl WriteHalf for OwnedWriteHalf {
    const NAME: &'static str = "tcp";

    fn try_write_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        OwnedWriteHalf::try_write_vectored(self, pieces)
    }
}

/// A stream addresses no memory.
struct Unaddressed;

impl Register for Unaddressed {
    fn window(&self, _buf: &mut BufMut) -> Result<Option<Window>, LinkError> {
        Ok(None)
    }
}

/// How long a transfer may still take.
struct Patience {
    stall: Duration,
    end: Instant,
}

impl Patience {
    fn new(stall: Duration, bytes: usize) -> Patience {
        let moving = Duration::from_micros(bytes as u64 * 1_000_000 / SLOWEST);
        Patience { stall, end: Instant::now() + stall + moving }
    }

    /// The error if no byte moves before the instant returned.
    fn next(&self) -> (Instant, LinkError) {
        let stall = Instant::now() + self.stall;
        if stall <= self.end {
            (stall, LinkError::Stalled(self.stall))
        } else {
            (self.end, LinkError::Dribbled(SLOWEST))
        }
    }
}

/// Sends on a TCP stream.
pub(crate) struct TcpTx<W = OwnedWriteHalf> {
    stream: W,
    /// Bytes of the first message that are already written.
    begun: usize,
    counters: Arc<Counters>,
    stall: Duration,
}

impl<W> TcpTx<W> {
    /// What one write takes of `batch`.
    fn pieces<'a>(
        &self,
        batch: &'a VecDeque<Outgoing>,
        headers: &'a mut [[u8; HEADER_BYTES]; MAX_BATCH],
        pieces: &mut [IoSlice<'a>; 3 * MAX_BATCH],
    ) -> usize {
        for (message, header) in batch.iter().zip(headers.iter_mut()) {
            *header = message.header.encode();
        }
        let (mut count, mut before) = (0, self.begun);
        for (message, header) in batch.iter().zip(headers.iter()) {
            let payload: &[u8] = message.payload.as_deref().unwrap_or_default();
            for piece in [&header[..], &message.head, payload] {
                if before >= piece.len() {
                    before -= piece.len();
                    continue;
                }
                pieces[count] = IoSlice::new(&piece[before..]);
                count += 1;
                before = 0;
            }
        }
        count
    }

    /// Accounts for bytes written.
    fn wrote(&mut self, batch: &mut VecDeque<Outgoing>, bytes: usize) {
        self.counters.add_sent(bytes);
        self.begun += bytes;
        while let Some(first) = batch.front().map(Outgoing::bytes).filter(|total| *total <= self.begun) {
            self.begun -= first;
            batch.pop_front();
        }
    }
}

impl<W: WriteHalf> LinkTx for TcpTx<W> {
    const NAME: &'static str = W::NAME;

    fn register(&self) -> Arc<dyn Register> {
        Arc::new(Unaddressed)
    }

    fn try_send(&mut self, batch: &mut VecDeque<Outgoing>) -> Result<(), LinkError> {
        while !batch.is_empty() {
            let (mut headers, mut pieces) =
                ([[0; HEADER_BYTES]; MAX_BATCH], [IoSlice::new(&[]); 3 * MAX_BATCH]);
            let count = self.pieces(batch, &mut headers, &mut pieces);
            match self.stream.try_write_vectored(&pieces[..count]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero).into()),
                Ok(bytes) => self.wrote(batch, bytes),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    async fn send(&mut self, batch: &mut VecDeque<Outgoing>) -> Result<(), LinkError> {
        let patience = Patience::new(self.stall, batch.iter().map(Outgoing::bytes).sum());
        while !batch.is_empty() {
            let (deadline, error) = patience.next();
            let bytes = {
                let (mut headers, mut pieces) =
                    ([[0; HEADER_BYTES]; MAX_BATCH], [IoSlice::new(&[]); 3 * MAX_BATCH]);
                let count = self.pieces(batch, &mut headers, &mut pieces);
                let writing = self.stream.write_vectored(&pieces[..count]);
                tokio::time::timeout_at(deadline, writing).await.map_err(|_| error)??
            };
            if bytes == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero).into());
            }
            self.wrote(batch, bytes);
        }
        // What encrypts keeps the end of it back until told.
        let (deadline, error) = patience.next();
        tokio::time::timeout_at(deadline, self.stream.flush()).await.map_err(|_| error)??;
        Ok(())
    }
}

/// Receives from a TCP stream.
pub(crate) struct TcpRx<R = OwnedReadHalf> {
    stream: R,
    ahead: Box<[u8; PREFETCH]>,
    from: usize,
    to: usize,
    counters: Arc<Counters>,
    stall: Duration,
    heads: Heads,
    pulse: Pulse,
}

impl<R: ReadHalf> TcpRx<R> {
    /// Bytes in the prefetch buffer, at least `n` of them (`n` <= PREFETCH).
    async fn at_least(&mut self, n: usize) -> Result<(), LinkError> {
        while self.to - self.from < n {
            if self.from > 0 {
                self.ahead.copy_within(self.from..self.to, 0);
                self.to -= self.from;
                self.from = 0;
            }
            let got = tokio::select! {
                biased;
                got = self.stream.read(&mut self.ahead[self.to..]) => got?,
                () = self.pulse.due() => {
                    self.pulse.check(self.stream.socket())?;
                    continue;
                }
            };
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

    /// Fills `out`, from what was read ahead and then in place. Returns the bytes copied.
    async fn fill(&mut self, out: &mut [u8]) -> Result<usize, LinkError> {
        let copied = self.drain(out);
        let mut at = copied;
        if at == out.len() {
            return Ok(copied);
        }
        // Within a message, silence is a fault: memory is already held for the rest.
        let patience = Patience::new(self.stall, out.len());
        let (mut deadline, mut error) = patience.next();
        while at < out.len() {
            let got = tokio::select! {
                biased;
                got = self.stream.read(&mut out[at..]) => got?,
                () = self.pulse.due() => {
                    self.pulse.check(self.stream.socket())?;
                    continue;
                }
                () = tokio::time::sleep_until(deadline) => return Err(error),
            };
            if got == 0 {
                return Err(LinkError::Protocol("the stream ended within a message".into()));
            }
            self.counters.add_received(got);
            at += got;
            (deadline, error) = patience.next();
        }
        Ok(copied)
    }
}

impl<R: ReadHalf> LinkRx for TcpRx<R> {
    fn is_ahead(&self) -> bool {
        self.to - self.from >= HEADER_BYTES
    }

    async fn recv(&mut self) -> Result<Incoming, LinkError> {
        self.at_least(HEADER_BYTES).await?;
        let mut header = [0; HEADER_BYTES];
        self.drain(&mut header);
        let header = Header::decode(&header)?;
        // The limit was checked by the decoder.
        let len = header.head_len as usize;
        let mut room = HeadRoom::default();
        let mut head = Bytes::new();
        if len > 0 {
            room = self.heads.take(len).await;
            if len <= self.to - self.from {
                head = Bytes::copy_from_slice(&self.ahead[self.from..self.from + len]);
                self.from += len;
            } else {
                let mut long = BytesMut::with_capacity(len);
                long.put_bytes(0, len);
                self.fill(&mut long).await?;
                head = long.freeze();
            }
        }
        Ok(Incoming { header, head, source: None, window: None, room })
    }

    async fn pull(&mut self, _from: &Incoming, mut into: BufMut) -> Result<BufMut, LinkError> {
        let copied = self.fill(&mut into).await?;
        self.counters.add_copied(copied);
        Ok(into)
    }

    async fn land(&mut self, _reply: &Incoming, into: &mut BufMut) -> Result<(), LinkError> {
        let copied = self.fill(into).await?;
        self.counters.add_copied(copied);
        Ok(())
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
