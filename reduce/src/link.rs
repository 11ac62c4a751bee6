//! One ordered connection to one peer, driven by polling: shared memory within a node
//! ([`crate::shm::ring`]), a channel of `firefly_net` between nodes.

use std::os::fd::RawFd;

/// Bytes of a message's header.
pub(crate) const HEADER_BYTES: usize = 64;

/// A transfer that has ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completion {
    /// The memory of this send may be changed again.
    Sent { token: u64 },
    /// The payload of this receive has arrived.
    Received { token: u64 },
}

/// The next message of a peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Incoming {
    pub(crate) header: [u8; HEADER_BYTES],
    pub(crate) len: usize,
}

/// Why a link ended.
#[derive(Debug)]
pub(crate) enum LinkError {
    /// The other end is gone.
    Closed(String),
    /// The other end wrote something impossible.
    Protocol(String),
}

/// See the module. The same contract as `firefly_net::Channel`.
pub(crate) trait Link: Send {
    /// Queues a message.
    ///
    /// # Safety
    /// The memory stays valid and unchanged until `Sent { token }` or until the link is dropped.
    unsafe fn post_send(
        &mut self,
        token: u64,
        header: &[u8; HEADER_BYTES],
        ptr: *const u8,
        len: usize,
    ) -> Result<(), LinkError>;

    /// The next message whose payload has not been given a place yet, if its header is here.
    fn peek(&mut self) -> Result<Option<Incoming>, LinkError>;

    /// Gives the peeked message's payload its place; `len` is the peeked length.
    ///
    /// # Safety
    /// The memory stays valid and is not otherwise accessed until `Received { token }` or until
    /// the link is dropped.
    unsafe fn post_recv(&mut self, token: u64, ptr: *mut u8, len: usize) -> Result<(), LinkError>;

    /// Moves bytes without blocking; whether any moved.
    fn progress(&mut self, out: &mut Vec<Completion>) -> Result<bool, LinkError>;

    /// What to poll, and whether for writing too; `None`: the peer rings a doorbell instead.
    fn poll_fd(&self) -> Option<(RawFd, bool)>;

    /// Bytes given to the transport.
    fn bytes_sent(&self) -> u64;

    /// Bytes taken from the transport.
    fn bytes_received(&self) -> u64;
}
