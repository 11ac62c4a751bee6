//! A channel of `firefly_net` as a link.

use crate::fork::{self, Guarded};
use crate::link::{Completion, HEADER_BYTES, Incoming, Link, LinkError};
use firefly_net::{Channel, ChannelError};
use std::os::fd::{BorrowedFd, RawFd};

pub(crate) struct NetLink {
    // Dropped before the channel closes its descriptor.
    _guard: Guarded,
    channel: Box<dyn Channel>,
    completions: Vec<firefly_net::Completion>,
}

impl NetLink {
    pub(crate) fn new(channel: Box<dyn Channel>) -> Self {
        // SAFETY: the channel owns the descriptor and outlives this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(channel.poll_fd().0) };
        Self { _guard: fork::guard(fd), channel, completions: Vec::new() }
    }
}

fn ended(error: ChannelError) -> LinkError {
    match error {
        ChannelError::Protocol(_) | ChannelError::Misuse(_) => LinkError::Protocol(error.to_string()),
        _ => LinkError::Closed(error.to_string()),
    }
}

impl Link for NetLink {
    unsafe fn post_send(
        &mut self,
        token: u64,
        header: &[u8; HEADER_BYTES],
        ptr: *const u8,
        len: usize,
    ) -> Result<(), LinkError> {
        // SAFETY: the caller's promise is the channel's.
        unsafe { self.channel.post_send(token, header, ptr, len) }.map_err(ended)
    }

    fn peek(&mut self) -> Result<Option<Incoming>, LinkError> {
        let incoming = self.channel.peek().map_err(ended)?;
        Ok(incoming.map(|i| Incoming { header: i.header, len: i.len }))
    }

    unsafe fn post_recv(&mut self, token: u64, ptr: *mut u8, len: usize) -> Result<(), LinkError> {
        // SAFETY: the caller's promise is the channel's.
        unsafe { self.channel.post_recv(token, ptr, len) }.map_err(ended)
    }

    fn progress(&mut self, out: &mut Vec<Completion>) -> Result<bool, LinkError> {
        let before = (self.channel.bytes_sent(), self.channel.bytes_received());
        let result = self.channel.progress(&mut self.completions);
        let mut moved = before != (self.channel.bytes_sent(), self.channel.bytes_received());
        moved |= !self.completions.is_empty();
        out.extend(self.completions.drain(..).map(|c| match c {
            firefly_net::Completion::Sent { token } => Completion::Sent { token },
            firefly_net::Completion::Received { token } => Completion::Received { token },
        }));
        result.map_err(ended)?;
        Ok(moved)
    }

    fn poll_fd(&self) -> Option<(RawFd, bool)> {
        Some(self.channel.poll_fd())
    }

    fn bytes_sent(&self) -> u64 {
        self.channel.bytes_sent()
    }

    fn bytes_received(&self) -> u64 {
        self.channel.bytes_received()
    }
}
