//! The TCP channel: a non-blocking socket and what is posted on it. Messages follow each other, each
//! with its header in front ([`super::wire`]).

use super::wire::{MAX_LEN, Place, WIRE_HEADER, WireHeader};
use super::{Channel, ChannelCounters, ChannelError, Completion, HEADER_BYTES, Incoming};
use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};

/// Pieces handed to the kernel at once.
const MAX_PIECES: usize = 32;
/// Bytes moved by one `progress` in each direction before it returns, so that a fast peer does not
/// keep the caller from its other channels.
const BURST: usize = 4 << 20;

/// A posted send. The pointer is the caller's promise (`post_send`).
struct Send {
    token: u64,
    wire: [u8; WIRE_HEADER],
    ptr: *const u8,
    len: usize,
}

/// A posted receive. The pointer is the caller's promise (`post_recv`).
struct Recv {
    token: u64,
    ptr: *mut u8,
    len: usize,
    done: usize,
}

pub(super) struct TcpChannel {
    stream: TcpStream,
    sends: VecDeque<Send>,
    /// Bytes of the first send that are on their way.
    sent: usize,
    /// The wire header that is arriving.
    wire: [u8; WIRE_HEADER],
    wire_done: usize,
    next: Option<WireHeader>,
    recv: Option<Recv>,
    failed: Option<ChannelError>,
    counters: ChannelCounters,
    /// Where payloads may be.
    places: &'static [Place],
    why_not_rdma: Option<String>,
}

// SAFETY: the raw pointers are only passed to the kernel, under promises made for the time until
// completion and not for a thread.
unsafe impl std::marker::Send for TcpChannel {}

impl TcpChannel {
    /// Takes over a connected, authenticated, non-blocking stream.
    pub(super) fn new(stream: TcpStream, why_not_rdma: Option<String>) -> TcpChannel {
        TcpChannel {
            stream,
            sends: VecDeque::new(),
            sent: 0,
            wire: [0; WIRE_HEADER],
            wire_done: 0,
            next: None,
            recv: None,
            failed: None,
            counters: ChannelCounters::default(),
            places: &[Place::Follows],
            why_not_rdma,
        }
    }

    /// The same, as the first of several sockets.
    pub(super) fn first_of_several(stream: TcpStream, why_not_rdma: Option<String>) -> TcpChannel {
        TcpChannel { places: &[Place::Follows, Place::Striped], ..TcpChannel::new(stream, why_not_rdma) }
    }

    fn check(&self) -> Result<(), ChannelError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn fail(&mut self, e: ChannelError) -> ChannelError {
        self.failed.get_or_insert(e).clone()
    }

    /// Queues `wire` and `len` bytes behind it: all of a payload, or its first part.
    pub(super) fn post_wire(
        &mut self,
        token: u64,
        wire: &WireHeader,
        ptr: *const u8,
        len: usize,
    ) -> Result<(), ChannelError> {
        self.check()?;
        if wire.len as u64 > MAX_LEN {
            return Err(ChannelError::Misuse("a message is longer than a channel takes"));
        }
        self.sends.push_back(Send { token, wire: wire.encode(), ptr, len });
        Ok(())
    }

    /// As [`Channel::peek`], with where the payload is.
    pub(super) fn peek_wire(&mut self) -> Result<Option<WireHeader>, ChannelError> {
        if self.next.is_some() || self.recv.is_some() {
            // While a payload is arriving its successor's header is not there yet; what has
            // arrived stays readable after a failure.
            return Ok(self.next);
        }
        self.check()?;
        let mut none = Vec::new();
        self.pump_in(&mut none)?;
        debug_assert!(none.is_empty(), "nothing was posted");
        Ok(self.next)
    }

    /// Says where the `len` bytes behind the peeked header land.
    pub(super) fn post_landing(&mut self, token: u64, ptr: *mut u8, len: usize) {
        debug_assert!(self.next.is_some() && self.recv.is_none());
        self.next = None;
        self.recv = Some(Recv { token, ptr, len, done: 0 });
    }

    /// Whether a message's header is here and its payload has no place.
    pub(super) fn has_next(&self) -> bool {
        self.next.is_some()
    }

    /// Whether a payload is on its way to its place.
    pub(super) fn is_receiving(&self) -> bool {
        self.recv.is_some()
    }

    /// Receives into `ptr..ptr + len` and then into the wire header, so that the next message's
    /// header comes with the same system call. Returns the bytes received, 0 if none are there.
    fn receive(&mut self, ptr: *mut u8, len: usize) -> Result<usize, ChannelError> {
        let ahead = &mut self.wire[self.wire_done..];
        let mut pieces = [
            libc::iovec { iov_base: ptr.cast(), iov_len: len },
            libc::iovec { iov_base: ahead.as_mut_ptr().cast(), iov_len: ahead.len() },
        ];
        let pieces = if len == 0 { &mut pieces[1..] } else { &mut pieces[..] };
        // SAFETY: msghdr is a plain C struct for which zeros mean "absent".
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = pieces.len() as _;
        loop {
            // SAFETY: the pieces point to the caller's posted memory (valid by the promise of
            // `post_recv`) and to our own header; both outlive the call.
            let got = unsafe { libc::recvmsg(self.stream.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
            if got > 0 {
                self.counters.bytes_received += got as u64;
                self.counters.operations += 1;
                return Ok(got as usize);
            }
            if got == 0 {
                let reason = "the peer closed it".to_owned();
                return Err(self.fail(ChannelError::Closed { reason }));
            }
            let e = io::Error::last_os_error();
            match e.kind() {
                io::ErrorKind::WouldBlock => return Ok(0),
                io::ErrorKind::Interrupted => {}
                _ => return Err(self.fail(ChannelError::closed("receiving failed", &e))),
            }
        }
    }

    /// Reads payload and headers as far as they are wanted.
    fn pump_in(&mut self, out: &mut Vec<Completion>) -> Result<(), ChannelError> {
        let mut moved = 0;
        loop {
            if let Some(recv) = self.recv.take_if(|r| r.done == r.len) {
                out.push(Completion::Received { token: recv.token });
            }
            if self.recv.is_none() {
                if self.next.is_none() && self.wire_done == WIRE_HEADER {
                    self.wire_done = 0;
                    let read = WireHeader::decode(&self.wire, self.places);
                    self.next = Some(read.map_err(|e| self.fail(e))?);
                }
                // A payload that waits to be posted: nothing more is wanted.
                if self.next.is_some() {
                    return Ok(());
                }
            }
            // Only after completions were reported: what is left keeps the descriptor readable, a
            // completion does not.
            if moved >= BURST {
                return Ok(());
            }
            let (ptr, len) = match &self.recv {
                // SAFETY: `done` < `len`, within the posted memory.
                Some(r) => (unsafe { r.ptr.add(r.done) }, r.len - r.done),
                None => (std::ptr::null_mut(), 0),
            };
            let got = self.receive(ptr, len)?;
            if got == 0 {
                return Ok(());
            }
            let landed = got.min(len);
            if let Some(recv) = &mut self.recv {
                recv.done += landed;
            }
            self.wire_done += got - landed;
            moved += got;
        }
    }

    fn pump_out(&mut self, out: &mut Vec<Completion>) -> Result<(), ChannelError> {
        let mut moved = 0;
        while moved < BURST {
            while let Some(first) = self.sends.front() {
                let total = WIRE_HEADER + first.len;
                if self.sent < total {
                    break;
                }
                self.sent -= total;
                out.push(Completion::Sent { token: first.token });
                self.sends.pop_front();
            }
            if self.sends.is_empty() {
                return Ok(());
            }
            let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_PIECES];
            let mut used = 0;
            let mut before = self.sent;
            'fill: for send in &self.sends {
                for (ptr, len) in [(send.wire.as_ptr(), WIRE_HEADER), (send.ptr, send.len)] {
                    if before >= len {
                        before -= len;
                        continue;
                    }
                    if used == MAX_PIECES {
                        break 'fill;
                    }
                    // SAFETY: `before` < `len`, within the wire header or the posted memory.
                    let from = unsafe { ptr.add(before) };
                    pieces[used] = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: len - before };
                    used += 1;
                    before = 0;
                }
            }
            // SAFETY: msghdr is a plain C struct for which zeros mean "absent".
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = pieces.as_mut_ptr();
            message.msg_iovlen = used as _;
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the pieces point to wire headers in our queue and to posted memory (valid by
            // the promise of `post_send`); sendmsg only reads them.
            let put = unsafe { libc::sendmsg(self.stream.as_raw_fd(), &message, flags) };
            if put >= 0 {
                self.sent += put as usize;
                self.counters.bytes_sent += put as u64;
                self.counters.operations += 1;
                moved += put as usize;
                continue;
            }
            let e = io::Error::last_os_error();
            match e.kind() {
                io::ErrorKind::WouldBlock => return Ok(()),
                io::ErrorKind::Interrupted => {}
                _ => return Err(self.fail(ChannelError::closed("sending failed", &e))),
            }
        }
        Ok(())
    }
}

impl Channel for TcpChannel {
    unsafe fn post_send(
        &mut self,
        token: u64,
        header: &[u8; HEADER_BYTES],
        ptr: *const u8,
        len: usize,
    ) -> Result<(), ChannelError> {
        self.post_wire(token, &WireHeader { place: Place::Follows, len, header: *header }, ptr, len)
    }

    fn peek(&mut self) -> Result<Option<Incoming>, ChannelError> {
        let next = self.peek_wire()?;
        Ok(next.map(|WireHeader { header, len, .. }| Incoming { header, len }))
    }

    unsafe fn post_recv(&mut self, token: u64, ptr: *mut u8, len: usize) -> Result<(), ChannelError> {
        self.check()?;
        let Some(next) = self.next else {
            return Err(ChannelError::Misuse("post_recv without a peeked message"));
        };
        if next.len != len {
            return Err(ChannelError::Misuse("post_recv with another length than the peeked message's"));
        }
        self.post_landing(token, ptr, len);
        Ok(())
    }

    fn progress(&mut self, out: &mut Vec<Completion>) -> Result<bool, ChannelError> {
        self.check()?;
        let before = (out.len(), self.counters.operations);
        // What the peer sent before it died is delivered before the error that its death makes.
        let moved = self.pump_in(out).and_then(|()| self.pump_out(out));
        // A peer may close right after its last message: first the completions, then, by the next
        // call, the end. The descriptor stays readable until then.
        if out.len() == before.0 {
            moved?;
        }
        Ok(before != (out.len(), self.counters.operations))
    }

    fn poll_fds(&self, out: &mut Vec<(RawFd, bool)>) {
        out.push((self.stream.as_raw_fd(), !self.sends.is_empty()));
    }

    fn counters(&self) -> ChannelCounters {
        self.counters
    }

    fn transport(&self) -> &'static str {
        "tcp"
    }

    fn why_not_rdma(&self) -> Option<&str> {
        self.why_not_rdma.as_deref()
    }
}
