//! Messages between two ranks of a node through a pair of byte rings.
//!
//! A message is its header (64 bytes, the last 8 hold the payload's length), the payload, and
//! padding to 64, so that payloads start on a cache line. Positions only grow; the reader checks
//! the writer's, the writer the reader's, before use.

use super::segment::{RING_BYTES, Segment};
use firefly_net::{Channel, ChannelCounters, ChannelError, Completion, HEADER_BYTES, Incoming};
use std::collections::VecDeque;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// Wakes one sleeping rank: an eventfd that its owner polls.
pub(crate) struct Doorbell {
    segment: Arc<Segment>,
    fd: OwnedFd,
}

impl Doorbell {
    /// `segment` and `fd` are those of the rank to wake.
    pub(crate) fn new(segment: Arc<Segment>, fd: OwnedFd) -> Self {
        Self { segment, fd }
    }

    /// Rings if the owner sleeps. Call after publishing what it should see.
    pub(crate) fn ring(&self) {
        // Pairs with the fence between "I sleep" and the sleeper's last look: one of the two sees
        // the other's store.
        fence(Ordering::SeqCst);
        let sleeping = &self.segment.control().sleeping.0;
        if sleeping.load(Ordering::Relaxed) != 0 && sleeping.swap(0, Ordering::AcqRel) != 0 {
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }
}

/// Publish at least this often while copying a long payload, so that the reader starts early.
const PUBLISH_BYTES: usize = 64 << 10;
/// No message is longer; a larger length in a header is a broken peer.
const MOST_BYTES: u64 = 1 << 42;

struct Outgoing {
    token: u64,
    header: [u8; HEADER_BYTES],
    ptr: *const u8,
    len: usize,
    /// Bytes of header, payload and padding written so far.
    written: usize,
}

struct Landing {
    token: u64,
    ptr: *mut u8,
    len: usize,
    /// Payload and padding read so far.
    read: usize,
}

/// Both directions between this rank and one peer.
pub(crate) struct RingLink {
    mine: Arc<Segment>,
    theirs: Arc<Segment>,
    /// The peer's index among the node's ranks, and mine.
    peer_local: usize,
    my_local: usize,
    bell: Arc<Doorbell>,
    head: u64,
    tail: u64,
    queue: VecDeque<Outgoing>,
    peeked: Option<Incoming>,
    landing: Option<Landing>,
    sent: u64,
    received: u64,
}

// SAFETY: the raw pointers are user memory that `post_send` and `post_recv` were promised.
unsafe impl Send for RingLink {}

impl RingLink {
    pub(crate) fn new(
        mine: Arc<Segment>,
        my_local: usize,
        theirs: Arc<Segment>,
        peer_local: usize,
        bell: Arc<Doorbell>,
    ) -> Self {
        Self {
            mine,
            theirs,
            peer_local,
            my_local,
            bell,
            head: 0,
            tail: 0,
            queue: VecDeque::new(),
            peeked: None,
            landing: None,
            sent: 0,
            received: 0,
        }
    }

    fn room(&self) -> Result<usize, ChannelError> {
        let tail = self.mine.ring_control(self.peer_local).tail.0.load(Ordering::Acquire);
        let used = self.head.wrapping_sub(tail);
        if used > RING_BYTES as u64 {
            return Err(ChannelError::Protocol("the peer's read position is impossible".into()));
        }
        Ok(RING_BYTES - used as usize)
    }

    fn available(&self) -> Result<usize, ChannelError> {
        let head = self.theirs.ring_control(self.my_local).head.0.load(Ordering::Acquire);
        let available = head.wrapping_sub(self.tail);
        if available > RING_BYTES as u64 {
            return Err(ChannelError::Protocol("the peer's write position is impossible".into()));
        }
        Ok(available as usize)
    }

    fn publish(&mut self) {
        self.mine.ring_control(self.peer_local).head.0.store(self.head, Ordering::Release);
        self.bell.ring();
    }

    fn release(&mut self) {
        self.theirs.ring_control(self.my_local).tail.0.store(self.tail, Ordering::Release);
        self.bell.ring();
    }

    /// Copies `len` bytes (or, with a null pointer, skips them) to the ring at `head`.
    fn put(&mut self, src: *const u8, len: usize) {
        let data = self.mine.ring_data(self.peer_local);
        let at = self.head as usize % RING_BYTES;
        let first = len.min(RING_BYTES - at);
        if !src.is_null() {
            // SAFETY: at + first <= RING_BYTES and len <= RING_BYTES; room() said that the reader
            // is done with these bytes; src has len bytes by post_send's promise.
            unsafe {
                std::ptr::copy_nonoverlapping(src, data.add(at), first);
                std::ptr::copy_nonoverlapping(src.add(first), data, len - first);
            }
        }
        self.head += len as u64;
    }

    /// Copies `len` bytes (or skips them) from the ring at `tail`.
    fn take(&mut self, dst: *mut u8, len: usize) {
        let data = self.theirs.ring_data(self.my_local);
        let at = self.tail as usize % RING_BYTES;
        let first = len.min(RING_BYTES - at);
        if !dst.is_null() {
            // SAFETY: as in `put`, mirrored; dst has len bytes by post_recv's promise.
            unsafe {
                std::ptr::copy_nonoverlapping(data.add(at), dst, first);
                std::ptr::copy_nonoverlapping(data, dst.add(first), len - first);
            }
        }
        self.tail += len as u64;
    }

    fn push(&mut self, out: &mut Vec<Completion>) -> Result<bool, ChannelError> {
        let mut moved = false;
        while let Some(mut item) = self.queue.pop_front() {
            let payload_end = HEADER_BYTES + item.len;
            let end = payload_end.next_multiple_of(HEADER_BYTES);
            while item.written < end {
                let room = self.room()?;
                if item.written < HEADER_BYTES {
                    if room < HEADER_BYTES {
                        break;
                    }
                    let header = item.header;
                    self.put(header.as_ptr(), HEADER_BYTES);
                    item.written = HEADER_BYTES;
                } else if item.written < payload_end {
                    let n = room.min(payload_end - item.written).min(PUBLISH_BYTES);
                    if n == 0 {
                        break;
                    }
                    // SAFETY: written - HEADER_BYTES < len, inside the posted memory.
                    let src = unsafe { item.ptr.add(item.written - HEADER_BYTES) };
                    self.put(src, n);
                    item.written += n;
                    if item.written < payload_end {
                        self.publish();
                    }
                } else {
                    let n = room.min(end - item.written);
                    if n == 0 {
                        break;
                    }
                    self.put(std::ptr::null(), n);
                    item.written += n;
                }
                moved = true;
            }
            if item.written < end {
                self.queue.push_front(item);
                break;
            }
            self.sent += item.len as u64;
            out.push(Completion::Sent { token: item.token });
        }
        if moved {
            self.publish();
        }
        Ok(moved)
    }

    fn pull(&mut self, out: &mut Vec<Completion>) -> Result<bool, ChannelError> {
        let Some(mut landing) = self.landing.take() else { return Ok(false) };
        let end = landing.len.next_multiple_of(HEADER_BYTES);
        let mut moved = false;
        while landing.read < end {
            let available = self.available()?;
            if available == 0 {
                break;
            }
            if landing.read < landing.len {
                let n = available.min(landing.len - landing.read).min(PUBLISH_BYTES);
                // SAFETY: read < len, inside the posted memory.
                let dst = unsafe { landing.ptr.add(landing.read) };
                self.take(dst, n);
                landing.read += n;
            } else {
                let n = available.min(end - landing.read);
                self.take(std::ptr::null_mut(), n);
                landing.read += n;
            }
            self.release();
            moved = true;
        }
        if landing.read < end {
            self.landing = Some(landing);
        } else {
            self.received += landing.len as u64;
            out.push(Completion::Received { token: landing.token });
            moved = true;
        }
        Ok(moved)
    }
}

impl Channel for RingLink {
    unsafe fn post_send(
        &mut self,
        token: u64,
        header: &[u8; HEADER_BYTES],
        ptr: *const u8,
        len: usize,
    ) -> Result<(), ChannelError> {
        let mut header = *header;
        header[HEADER_BYTES - 8..].copy_from_slice(&(len as u64).to_le_bytes());
        self.queue.push_back(Outgoing { token, header, ptr, len, written: 0 });
        Ok(())
    }

    fn peek(&mut self) -> Result<Option<Incoming>, ChannelError> {
        if self.landing.is_some() {
            return Ok(None);
        }
        if self.peeked.is_none() && self.available()? >= HEADER_BYTES {
            let mut header = [0; HEADER_BYTES];
            self.take(header.as_mut_ptr(), HEADER_BYTES);
            self.release();
            let mut len = [0; 8];
            len.copy_from_slice(&header[HEADER_BYTES - 8..]);
            let len = u64::from_le_bytes(len);
            if len > MOST_BYTES {
                return Err(ChannelError::Protocol(format!("the peer announced a message of {len} bytes")));
            }
            header[HEADER_BYTES - 8..].fill(0);
            self.peeked = Some(Incoming { header, len: len as usize });
        }
        Ok(self.peeked)
    }

    unsafe fn post_recv(&mut self, token: u64, ptr: *mut u8, len: usize) -> Result<(), ChannelError> {
        match self.peeked.take() {
            Some(incoming) if incoming.len == len => {
                self.landing = Some(Landing { token, ptr, len, read: 0 });
                Ok(())
            }
            _ => {
                Err(ChannelError::Protocol("a receive was posted for no peeked message of its length".into()))
            }
        }
    }

    fn progress(&mut self, out: &mut Vec<Completion>) -> Result<bool, ChannelError> {
        let pushed = self.push(out)?;
        Ok(self.pull(out)? || pushed)
    }

    fn poll_fds(&self, _out: &mut Vec<(RawFd, bool)>) {
        // The peer rings the doorbell instead.
    }

    fn counters(&self) -> ChannelCounters {
        ChannelCounters { bytes_sent: self.sent, bytes_received: self.received, ..Default::default() }
    }

    fn transport(&self) -> &'static str {
        "shm"
    }
}
