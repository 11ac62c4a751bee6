//! A non-blocking stream on which a channel's handshake and negotiation are spoken, and what both
//! sides of that have in common.

use super::negotiate::{Frame, RailInfo, Wishes};
use super::{ChannelError, ChannelOptions};
use crate::error::HandshakeError;
use crate::fabric::{Class, Traffic};
use crate::handshake::{Purpose, Terms};
use crate::verbs::{Port, Rail};
use firefly_types::{ClusterId, ClusterSecret};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

/// Channels belong to a job, which its secret names; they have no cluster id of their own.
const NO_CLUSTER: ClusterId = ClusterId(0);

pub(super) fn terms(secret: &ClusterSecret) -> Terms {
    Terms::new(NO_CLUSTER, secret, Purpose::Channel)
}

/// How a channel's packets are marked.
pub(super) fn class(options: &ChannelOptions) -> Class {
    options.fabric.options().class(Traffic::Collective)
}

/// Options that every connection of a channel gets.
pub(super) fn configure(stream: &TcpStream, class: Class) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let socket = socket2::SockRef::from(stream);
    let class = u32::from(class.traffic_class);
    match stream.local_addr()? {
        _ if class == 0 => Ok(()),
        SocketAddr::V4(_) => socket.set_tos_v4(class),
        SocketAddr::V6(_) => socket.set_tclass_v6(class),
    }
}

/// Waits for one of `fds` until `deadline`, rounded up so that it does not spin at the end.
pub(super) fn poll(fds: &mut [libc::pollfd], deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let millis = left.as_micros().div_ceil(1000).min(60_000) as libc::c_int;
    // SAFETY: `fds` is a valid array of that many entries.
    let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, millis) };
    if n < 0 {
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
    Ok(())
}

pub(super) fn pollfd(fd: RawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd, events, revents: 0 }
}

/// See the module.
pub(super) struct Talk {
    pub(super) stream: TcpStream,
    output: Vec<u8>,
    input: Vec<u8>,
}

fn ended(e: &io::Error) -> HandshakeError {
    HandshakeError::Ended(e.to_string())
}

impl Talk {
    pub(super) fn new(stream: TcpStream) -> Talk {
        Talk { stream, output: Vec::new(), input: Vec::new() }
    }

    /// Queues bytes to be sent.
    pub(super) fn say(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }

    /// What to poll for.
    pub(super) fn pollfd(&self) -> libc::pollfd {
        let events = if self.output.is_empty() { libc::POLLIN } else { libc::POLLOUT };
        pollfd(self.stream.as_raw_fd(), events)
    }

    /// Whether all that was said is on its way.
    pub(super) fn flush(&mut self) -> Result<bool, HandshakeError> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ended(&e)),
            }
        }
        Ok(true)
    }

    /// The next `wants` bytes, if they are here. Never reads beyond: what follows is the channel's.
    pub(super) fn hear(&mut self, wants: usize) -> Result<Option<Vec<u8>>, HandshakeError> {
        while self.input.len() < wants {
            let mut chunk = vec![0; wants - self.input.len()];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(HandshakeError::Ended("the other side closed".into())),
                Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ended(&e)),
            }
        }
        Ok(Some(std::mem::take(&mut self.input)))
    }

    /// The next frame of the negotiation, if it is here.
    pub(super) fn hear_frame(&mut self) -> Result<Option<Frame>, ChannelError> {
        let closed = |e: HandshakeError| ChannelError::Closed { reason: e.to_string() };
        if self.input.len() < 2 {
            match self.hear(2).map_err(closed)? {
                Some(prefix) => self.input = prefix,
                None => return Ok(None),
            }
        }
        let len = Frame::body_len([self.input[0], self.input[1]])?;
        match self.hear(2 + len).map_err(closed)? {
            Some(bytes) => Frame::decode(&bytes[2..]).map(Some),
            None => Ok(None),
        }
    }
}

/// This side's rails that are up, each with the address to use for a connection from `local`.
pub(super) type Rails = Vec<(Arc<Rail>, Port)>;

/// What this side has and wants.
pub(super) fn wishes(options: &ChannelOptions, local: IpAddr) -> (Wishes, Rails) {
    let rails: Rails = options
        .fabric
        .rails()
        .iter()
        .filter_map(|rail| Some((rail.clone(), rail.port().ok()?.at(local))))
        .collect();
    let infos = rails.iter().map(|(_, port)| RailInfo { gid: port.gid.raw, link: port.link }).collect();
    let why_none = options.fabric.why_not().unwrap_or_default();
    let wishes = Wishes {
        policy: options.fabric.options().transport,
        sockets: options.sockets.clamp(1, super::MOST_SOCKETS),
        rails: infos,
        why_none,
    };
    (wishes, rails)
}
