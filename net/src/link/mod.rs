//! The seam between what is said and what carries it: one connected pair of processes.
//!
//! RPC is written once over [`LinkTx`] and [`LinkRx`]. Each carrier moves small messages (a header
//! and a head) in order, and payloads by the means it is good at:
//!
//! | step | TCP | RDMA |
//! | --- | --- | --- |
//! | register memory | nothing | once per pool block and device, kept with the block |
//! | send a message | bytes | SEND into a posted receive |
//! | request payload: *pull* | the bytes that follow the request | READ of the caller's described memory |
//! | reply payload: *push* | the bytes within the reply | WRITE into the caller's described memory, before the reply's SEND |
//! | reply payload: *land* | read into the caller's buffer | nothing left to do: the WRITE precedes the SEND |
//! | completion | the socket took or gave the bytes | the completion queue said so |
//!
//! Rules that make one implementation of RPC right on both:
//!
//! * after [`LinkRx::recv`] returned a message with a payload, exactly one of `pull`, `land` and
//!   `skip` follows before the next `recv`;
//! * a payload's memory ([`Outgoing::payload`], [`Outgoing::window`]) stays owned by the connection
//!   until the answer came or *both* halves were dropped: a remote device may still be reading or
//!   writing it until the queue pair is destroyed;
//! * an error of either half ends the link.

pub(crate) mod tcp;
pub(crate) mod tls;
pub(crate) mod verbs;

use crate::buf::{Buf, BufMut, HeadRoom, Heads};
use crate::error::LinkError;
use crate::fabric::Class;
use crate::rpc::frame::{HEADER_BYTES, Header};
use bytes::Bytes;
use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;

/// Bytes that crossed a transport, headers included.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
    /// Payload bytes moved from one place in user space to another.
    pub(crate) copied: AtomicU64,
    /// What these are part of: a connection's of its client's or server's.
    whole: Option<Arc<Counters>>,
}

impl Counters {
    /// Counters that count to `whole` as well.
    pub(crate) fn part_of(whole: &Arc<Counters>) -> Arc<Counters> {
        Arc::new(Counters { whole: Some(whole.clone()), ..Counters::default() })
    }

    fn add(&self, n: usize, which: fn(&Counters) -> &AtomicU64) {
        which(self).fetch_add(n as u64, Ordering::Relaxed);
        if let Some(whole) = &self.whole {
            which(whole).fetch_add(n as u64, Ordering::Relaxed);
        }
    }

    pub(crate) fn add_sent(&self, n: usize) {
        self.add(n, |c| &c.sent);
    }

    pub(crate) fn add_received(&self, n: usize) {
        self.add(n, |c| &c.received);
    }

    pub(crate) fn add_copied(&self, n: usize) {
        self.add(n, |c| &c.copied);
    }
}

/// What a carrier is told about a link.
#[derive(Clone)]
pub(crate) struct LinkOptions {
    pub(crate) counters: Arc<Counters>,
    /// A peer that moves no byte of a message that has begun for so long is given up.
    pub(crate) stall: Duration,
    /// What heads of messages that arrive count against.
    pub(crate) heads: Heads,
    /// How packets are marked.
    pub(crate) class: Class,
}

#[cfg(test)]
impl LinkOptions {
    /// Nothing marked, nothing given up within a test.
    pub(crate) fn of_tests() -> LinkOptions {
        LinkOptions {
            counters: Arc::default(),
            stall: Duration::from_secs(120),
            heads: Heads::default(),
            class: Class::default(),
        }
    }
}

/// A described piece of the peer's memory, as a device names it. TCP has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) address: u64,
    pub(crate) key: u32,
    pub(crate) len: u32,
}

/// Names memory for the peer's device, registering it at first use.
pub(crate) trait Register: Send + Sync {
    /// The window onto all of `buf`, or nothing on a carrier that does not address memory.
    fn window(&self, buf: &mut BufMut) -> Result<Option<Window>, LinkError>;
}

/// A message to send.
pub(crate) struct Outgoing {
    pub(crate) header: Header,
    pub(crate) head: Bytes,
    /// Request: bytes to offer for the server's pull. Reply: bytes to push.
    pub(crate) payload: Option<Buf>,
    /// Request: where the reply's payload shall land, as this side's device names it.
    /// Reply: the window that came with the request.
    pub(crate) window: Option<Window>,
    /// Held until the message is on its way (on RDMA: has reached the peer's device); bounds what
    /// is queued.
    pub(crate) permit: Option<Permit>,
}

/// What an answer takes up until it was written.
pub(crate) struct Permit {
    /// One of the calls in flight.
    pub(crate) _call: OwnedSemaphorePermit,
    /// What its head counts for.
    pub(crate) _room: HeadRoom,
}

impl Outgoing {
    /// Bytes of header, head and payload.
    pub(crate) fn bytes(&self) -> usize {
        HEADER_BYTES + self.head.len() + self.payload.as_ref().map_or(0, |p| p.len())
    }
}

/// A message that came. Its payload, if the header says that there is one, has not been moved yet.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) header: Header,
    pub(crate) head: Bytes,
    /// Request: the caller's payload, to be pulled.
    pub(crate) source: Option<Window>,
    /// Request: where the caller wants the reply's payload; goes into the reply's [`Outgoing::window`].
    pub(crate) window: Option<Window>,
    /// What `head` counts for while its message is acted on.
    pub(crate) room: HeadRoom,
}

/// The sending half.
pub(crate) trait LinkTx: Send + 'static {
    /// "tcp" or "rdma".
    const NAME: &'static str;

    /// What names the memory of receive buffers.
    fn register(&self) -> Arc<dyn Register>;

    /// The device, on a carrier that has one.
    fn device(&self) -> Option<String> {
        None
    }

    /// Sends of `batch` what can go without waiting. What is left, the beginning of its first
    /// message possibly excepted, waits for `send`.
    fn try_send(&mut self, _batch: &mut VecDeque<Outgoing>) -> Result<(), LinkError> {
        Ok(())
    }

    /// Sends all of `batch` in order and empties it. A reply's payload is pushed before the reply.
    /// After an error, and when the future is dropped, of what is left in `batch` the peer may have
    /// seen the first message and none of the others.
    fn send(&mut self, batch: &mut VecDeque<Outgoing>) -> impl Future<Output = Result<(), LinkError>> + Send;
}

/// The receiving half.
pub(crate) trait LinkRx: Send + 'static {
    /// Whether the next message has at least begun to arrive in this process, so that answers may
    /// wait for its own and travel together.
    fn is_ahead(&self) -> bool {
        false
    }

    /// The next message, its header checked. Cancelling it loses the link. Notices a peer whose
    /// host is gone ([`LinkError::Vanished`]) within a few seconds.
    fn recv(&mut self) -> impl Future<Output = Result<Incoming, LinkError>> + Send;

    /// Fetches a request's payload into `into`, whose length is the payload's. Takes the buffer so
    /// that a cancelled pull leaves it with the link, whose device may still be writing.
    fn pull(
        &mut self,
        from: &Incoming,
        into: BufMut,
    ) -> impl Future<Output = Result<BufMut, LinkError>> + Send;

    /// Completes a reply's payload in the buffer that was named for it, whose length is the payload's.
    fn land(
        &mut self,
        reply: &Incoming,
        into: &mut BufMut,
    ) -> impl Future<Output = Result<(), LinkError>> + Send;

    /// Passes over a payload that nobody wants.
    fn skip(&mut self, from: &Incoming) -> impl Future<Output = Result<(), LinkError>> + Send;
}

#[cfg(test)]
pub(crate) mod contract;
