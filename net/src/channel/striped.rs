//! One channel over several TCP connections. Messages go by the first; payloads of [`STRIPE_BYTES`]
//! and more are cut into one part for each connection, which move at the same time. A further
//! connection carries nothing but parts, in the order of their messages, each behind a header that
//! names message and connection, so that a connection out of step is noticed.

use super::tcp::TcpChannel;
use super::wire::{Place, WireHeader};
use super::{Channel, ChannelCounters, ChannelError, Completion, HEADER_BYTES, Incoming, pop_if};
use std::collections::VecDeque;
use std::net::TcpStream;
use std::os::fd::RawFd;

/// Payloads of this size and more are cut: a part is then worth its own system calls.
const STRIPE_BYTES: usize = 256 << 10;

/// Offset and length of part `i` of `len` bytes cut into `parts`: whole pages, the rest in the last.
fn part(len: usize, parts: usize, i: usize) -> (usize, usize) {
    let each = (len / parts) & !4095;
    let start = each * i;
    (start, if i + 1 == parts { len - start } else { each })
}

/// In front of part `i` of message `number`.
fn part_header(number: u64, i: usize, len: usize) -> WireHeader {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(b"FFSTRIPE");
    header[8..16].copy_from_slice(&number.to_le_bytes());
    header[16] = i as u8;
    WireHeader { place: Place::Follows, len, header }
}

/// A posted message whose parts are under way.
struct Pending {
    token: u64,
    parts: usize,
}

/// Messages in the order posted; reported in it.
#[derive(Default)]
struct Order {
    first: u64,
    pending: VecDeque<Pending>,
}

impl Order {
    fn push(&mut self, token: u64, parts: usize) -> u64 {
        self.pending.push_back(Pending { token, parts });
        self.first + self.pending.len() as u64 - 1
    }

    fn next_number(&self) -> u64 {
        self.first + self.pending.len() as u64
    }

    fn part_done(&mut self, number: u64) {
        self.pending[(number - self.first) as usize].parts -= 1;
    }

    fn take_done(&mut self) -> Option<u64> {
        let done = pop_if(&mut self.pending, |p| p.parts == 0)?;
        self.first += 1;
        Some(done.token)
    }
}

/// A part that is expected: (message, memory, length).
type Expected = (u64, *mut u8, usize);

pub(super) struct StripedChannel {
    sockets: Vec<TcpChannel>,
    sends: Order,
    recvs: Order,
    /// By socket; the first has none.
    expected: Vec<VecDeque<Expected>>,
    failed: Option<ChannelError>,
    completions: Vec<Completion>,
}

// SAFETY: the raw pointers are only handed on to the sockets, under promises made for the time
// until completion and not for a thread.
unsafe impl Send for StripedChannel {}

impl StripedChannel {
    /// Takes over connected, authenticated, non-blocking streams, at least two, in the order that
    /// both sides have agreed on.
    pub(super) fn new(streams: Vec<TcpStream>, why_not_rdma: Option<String>) -> StripedChannel {
        let mut why = why_not_rdma;
        let expected = streams.iter().map(|_| VecDeque::new()).collect();
        let sockets = streams.into_iter().enumerate().map(|(i, stream)| match i {
            0 => TcpChannel::first_of_several(stream, why.take()),
            _ => TcpChannel::new(stream, None),
        });
        StripedChannel {
            sockets: sockets.collect(),
            sends: Order::default(),
            recvs: Order::default(),
            expected,
            failed: None,
            completions: Vec::new(),
        }
    }

    fn check(&self) -> Result<(), ChannelError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn fail(&mut self, e: ChannelError) -> ChannelError {
        self.failed.get_or_insert(e).clone()
    }

    /// Says which connection it was.
    fn of_socket(&self, i: usize, e: ChannelError) -> ChannelError {
        let which = || format!("connection {} of {}", i + 1, self.sockets.len());
        match e {
            ChannelError::Closed { reason } => {
                ChannelError::Closed { reason: format!("{}: {reason}", which()) }
            }
            ChannelError::Protocol(what) => ChannelError::Protocol(format!("{}: {what}", which())),
            other => other,
        }
    }

    /// Moves the bytes of socket `i`; parts that come there find their places.
    fn progress_socket(&mut self, i: usize) -> Result<bool, ChannelError> {
        let mut moved = false;
        loop {
            let progressed = self.sockets[i].progress(&mut self.completions)?;
            moved |= progressed;
            for completion in self.completions.drain(..) {
                match completion {
                    Completion::Sent { token } => self.sends.part_done(token),
                    Completion::Received { token } => self.recvs.part_done(token),
                }
            }
            if i == 0 || self.sockets[i].is_receiving() {
                return Ok(moved);
            }
            let Some(&(number, ptr, len)) = self.expected[i].front() else { return Ok(moved) };
            let Some(head) = self.sockets[i].peek_wire()? else { return Ok(moved) };
            if head != part_header(number, i, len) {
                return Err(ChannelError::Protocol(format!(
                    "a part of {} bytes that is not that of message {number}",
                    head.len
                )));
            }
            self.sockets[i].post_landing(number, ptr, len);
            self.expected[i].pop_front();
            moved = true;
        }
    }
}

impl Channel for StripedChannel {
    unsafe fn post_send(
        &mut self,
        token: u64,
        header: &[u8; HEADER_BYTES],
        ptr: *const u8,
        len: usize,
    ) -> Result<(), ChannelError> {
        self.check()?;
        let parts = if len >= STRIPE_BYTES { self.sockets.len() } else { 1 };
        let place = if parts > 1 { Place::Striped } else { Place::Follows };
        let number = self.sends.next_number();
        let (_, first) = part(len, parts, 0);
        self.sockets[0].post_wire(number, &WireHeader { place, len, header: *header }, ptr, first)?;
        for i in 1..parts {
            let (start, len) = part(len, parts, i);
            // SAFETY: within the posted memory.
            let from = unsafe { ptr.add(start) };
            let posted = self.sockets[i].post_wire(number, &part_header(number, i, len), from, len);
            posted.map_err(|e| self.of_socket(i, e)).map_err(|e| self.fail(e))?;
        }
        self.sends.push(token, parts);
        Ok(())
    }

    fn peek(&mut self) -> Result<Option<Incoming>, ChannelError> {
        let next = match self.sockets[0].peek_wire() {
            Ok(next) => next,
            Err(e) => return Err(self.fail(e)),
        };
        if let Some(WireHeader { place: Place::Striped, len, .. }) = next
            && len < STRIPE_BYTES
        {
            return Err(self.fail(ChannelError::Protocol(format!("a payload of {len} bytes in parts"))));
        }
        Ok(next.map(|WireHeader { header, len, .. }| Incoming { header, len }))
    }

    unsafe fn post_recv(&mut self, token: u64, ptr: *mut u8, len: usize) -> Result<(), ChannelError> {
        self.check()?;
        let Some(next) = self.sockets[0].peek_wire()? else {
            return Err(ChannelError::Misuse("post_recv without a peeked message"));
        };
        if next.len != len {
            return Err(ChannelError::Misuse("post_recv with another length than the peeked message's"));
        }
        let parts = if next.place == Place::Striped { self.sockets.len() } else { 1 };
        let number = self.recvs.push(token, parts);
        self.sockets[0].post_landing(number, ptr, part(len, parts, 0).1);
        for i in 1..parts {
            let (start, len) = part(len, parts, i);
            // SAFETY: within the posted memory.
            self.expected[i].push_back((number, unsafe { ptr.add(start) }, len));
        }
        Ok(())
    }

    fn progress(&mut self, out: &mut Vec<Completion>) -> Result<bool, ChannelError> {
        self.check()?;
        let before = out.len();
        let (mut moved, mut error) = (false, None);
        for i in 0..self.sockets.len() {
            match self.progress_socket(i) {
                Ok(any) => moved |= any,
                Err(e) => error = error.or(Some((i, self.of_socket(i, e)))),
            }
        }
        while let Some(token) = self.sends.take_done() {
            out.push(Completion::Sent { token });
        }
        while let Some(token) = self.recvs.take_done() {
            out.push(Completion::Received { token });
        }
        if out.len() > before {
            return Ok(true);
        }
        match error {
            // What came by the first connection before another one ended is still the caller's.
            Some((i, _)) if i > 0 && self.recvs.pending.is_empty() && self.peek()?.is_some() => Ok(moved),
            Some((_, e)) => Err(self.fail(e)),
            None => Ok(moved),
        }
    }

    fn poll_fds(&self, out: &mut Vec<(RawFd, bool)>) {
        for (i, socket) in self.sockets.iter().enumerate() {
            // A part that waits for its message to be posted would show as readable for ever.
            let ahead = i > 0 && socket.has_next() && self.expected[i].is_empty();
            if !ahead {
                socket.poll_fds(out);
            }
        }
    }

    fn fork_fds(&self, out: &mut Vec<RawFd>) {
        self.sockets.iter().for_each(|s| s.fork_fds(out));
    }

    fn counters(&self) -> ChannelCounters {
        let mut sum = ChannelCounters::default();
        for counters in self.sockets.iter().map(TcpChannel::counters) {
            sum.bytes_sent += counters.bytes_sent;
            sum.bytes_received += counters.bytes_received;
            sum.operations += counters.operations;
        }
        sum
    }

    fn transport(&self) -> &'static str {
        "tcp"
    }

    fn why_not_rdma(&self) -> Option<&str> {
        self.sockets[0].why_not_rdma()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_payload_without_overlap() {
        for len in [STRIPE_BYTES, STRIPE_BYTES + 1, 1 << 20, (5 << 20) + 4097] {
            for parts in 1..=16 {
                let mut at = 0;
                for i in 0..parts {
                    let (start, n) = part(len, parts, i);
                    assert!(start == at && n > 0, "{len} in {parts}");
                    at += n;
                }
                assert_eq!(at, len);
            }
        }
    }
}
