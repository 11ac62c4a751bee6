//! How channels are made: dial or accept, prove the secret, hand over the socket.

use super::tcp::TcpChannel;
use super::{Channel, ChannelError};
use crate::error::HandshakeError;
use crate::handshake::{self, Agreed, Initiator, Purpose, Responder, Terms};
use firefly_types::{ClusterId, ClusterSecret};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time for a stranger or a member to prove itself. Loaded machines start thousands of ranks at
/// once, so more than RPC's.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Handshakes at one time; beyond it new connections wait in the kernel.
const MAX_HANDSHAKES: usize = 256;

/// Channels belong to a job, which its secret names; they have no cluster id of their own.
const NO_CLUSTER: ClusterId = ClusterId(0);

fn terms(secret: &ClusterSecret) -> Terms {
    Terms::new(NO_CLUSTER, secret, Purpose::Channel)
}

/// Milliseconds for `poll` until `deadline`, rounded up so that it does not spin at the end.
fn poll_time(deadline: Instant) -> libc::c_int {
    let left = deadline.saturating_duration_since(Instant::now());
    left.as_micros().div_ceil(1000).min(60_000) as libc::c_int
}

fn poll(fds: &mut [libc::pollfd], deadline: Instant) -> io::Result<()> {
    // SAFETY: `fds` is a valid array of that many entries.
    let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, poll_time(deadline)) };
    if n < 0 {
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
    Ok(())
}

fn pollfd(fd: &impl AsRawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 }
}

/// One side of a handshake on a non-blocking socket.
enum Machine {
    Initiator(Initiator),
    Responder(Responder),
}

struct Shaking {
    stream: TcpStream,
    machine: Machine,
    peer: SocketAddr,
    until: Instant,
    output: Vec<u8>,
    input: Vec<u8>,
    done: Option<Result<Agreed, HandshakeError>>,
}

impl Shaking {
    fn wants(&self) -> usize {
        match &self.machine {
            Machine::Initiator(m) => m.wants(),
            Machine::Responder(m) => m.wants(),
        }
    }

    fn events(&self) -> libc::c_short {
        if self.output.is_empty() { libc::POLLIN } else { libc::POLLOUT }
    }

    /// Goes as far as it can without waiting. `Some` when it is over.
    fn advance(&mut self) -> Option<Result<Agreed, HandshakeError>> {
        let ended = |e: io::Error| Some(Err(HandshakeError::Ended(e.to_string())));
        loop {
            while !self.output.is_empty() {
                match self.stream.write(&self.output) {
                    Ok(n) => drop(self.output.drain(..n)),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return self.overdue(),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    // A refusal that cannot be delivered is still this refusal.
                    Err(e) => {
                        return match self.done.take() {
                            Some(Err(refused)) => Some(Err(refused)),
                            _ => ended(e),
                        };
                    }
                }
            }
            if let Some(done) = self.done.take() {
                return Some(done);
            }
            let wants = self.wants();
            // Never reads past the handshake: what follows is the channel's.
            let mut chunk = vec![0; wants - self.input.len()];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Some(Err(HandshakeError::Ended("the other side closed".into()))),
                Ok(n) => self.input.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return self.overdue(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return ended(e),
            }
            if self.input.len() == wants {
                let message = std::mem::take(&mut self.input);
                let advance = match &mut self.machine {
                    Machine::Initiator(m) => m.feed(&message),
                    Machine::Responder(m) => m.feed(&message),
                };
                self.output = advance.send;
                self.done = advance.done;
            }
        }
    }

    fn overdue(&self) -> Option<Result<Agreed, HandshakeError>> {
        (Instant::now() >= self.until).then_some(Err(HandshakeError::TimedOut))
    }
}

fn configure(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)
}

/// Accepts channels. Several may be in the making at one time: one slow stranger holds up nobody.
pub struct ChannelListener {
    listener: TcpListener,
    /// Kept between calls of `accept`: two ranks may arrive during one.
    shaking: Mutex<Vec<Shaking>>,
}

impl ChannelListener {
    /// Listens on `addr`; port 0 takes a free one.
    pub fn bind(addr: SocketAddr) -> io::Result<ChannelListener> {
        let listener = TcpListener::bind(addr)?;
        listener.set_nonblocking(true)?;
        Ok(ChannelListener { listener, shaking: Mutex::default() })
    }

    /// The address to dial.
    pub fn local_addr(&self) -> SocketAddr {
        self.listener.local_addr().expect("a bound socket has an address")
    }

    /// Waits until `deadline` for a peer that proves to hold `secret`; gives its channel and its
    /// hello. Strangers are refused and logged, and the wait goes on.
    ///
    /// One accept runs at a time; another waits for it.
    pub fn accept(
        &self,
        secret: &ClusterSecret,
        deadline: Instant,
    ) -> Result<(Box<dyn Channel>, [u8; 32]), ChannelError> {
        let failed = |e: io::Error| ChannelError::Listener(e.to_string());
        let mut shaking = self.shaking.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut at = 0;
            while at < shaking.len() {
                match shaking[at].advance() {
                    None => at += 1,
                    Some(Ok(agreed)) => {
                        let done = shaking.swap_remove(at);
                        return Ok((Box::new(TcpChannel::new(done.stream)), agreed.hello));
                    }
                    Some(Err(reason)) => {
                        let refused = shaking.swap_remove(at);
                        tracing::warn!(peer = %refused.peer, %reason, "refused a channel");
                    }
                }
            }
            if Instant::now() >= deadline {
                return Err(ChannelError::Deadline("a channel from a peer with the right secret".into()));
            }
            while shaking.len() < MAX_HANDSHAKES {
                match self.listener.accept() {
                    Ok((stream, peer)) => {
                        if let Err(e) = configure(&stream) {
                            tracing::warn!(%peer, error = %e, "cannot set up a channel's socket");
                            continue;
                        }
                        let machine = Machine::Responder(Responder::new(terms(secret), handshake::nonce()));
                        let until = Instant::now() + HANDSHAKE_TIME;
                        let (output, input) = (Vec::new(), Vec::new());
                        shaking.push(Shaking { stream, machine, peer, until, output, input, done: None });
                    }
                    Err(e) => match e.kind() {
                        io::ErrorKind::WouldBlock => break,
                        // The peer was gone before it was accepted.
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                        _ => return Err(failed(e)),
                    },
                }
            }
            let mut until = deadline;
            let mut fds = Vec::with_capacity(1 + shaking.len());
            if shaking.len() < MAX_HANDSHAKES {
                fds.push(pollfd(&self.listener, libc::POLLIN));
            }
            for one in shaking.iter() {
                fds.push(pollfd(&one.stream, one.events()));
                until = until.min(one.until);
            }
            poll(&mut fds, until).map_err(failed)?;
        }
    }
}

/// Dials `addr`, proves `secret` both ways and sends `hello` (such as this process's rank).
///
/// # Errors
/// `Unreachable` at once when nothing listens there: publish addresses after binding. `Refused`
/// when the other side does not hold the secret, `Deadline` when it does not answer.
pub fn connect_channel(
    addr: SocketAddr,
    secret: &ClusterSecret,
    hello: [u8; 32],
    deadline: Instant,
) -> Result<Box<dyn Channel>, ChannelError> {
    let unreachable =
        |e: io::Error| ChannelError::Unreachable { peer: addr.to_string(), reason: e.to_string() };
    let overdue = || ChannelError::Deadline(format!("a channel to {addr}"));
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(overdue());
    }
    let stream = match TcpStream::connect_timeout(&addr, left) {
        Ok(stream) => stream,
        Err(e) if e.kind() == io::ErrorKind::TimedOut => return Err(overdue()),
        Err(e) => return Err(unreachable(e)),
    };
    configure(&stream).map_err(unreachable)?;
    let (machine, output) = Initiator::start(terms(secret), "", hello, handshake::nonce());
    let machine = Machine::Initiator(machine);
    let mut shaking =
        Shaking { stream, machine, peer: addr, until: deadline, output, input: Vec::new(), done: None };
    loop {
        match shaking.advance() {
            Some(Ok(_)) => return Ok(Box::new(TcpChannel::new(shaking.stream))),
            Some(Err(HandshakeError::TimedOut)) => return Err(overdue()),
            Some(Err(HandshakeError::Ended(reason))) => {
                return Err(ChannelError::Unreachable { peer: addr.to_string(), reason });
            }
            Some(Err(reason)) => return Err(ChannelError::Refused(reason)),
            None => {}
        }
        poll(&mut [pollfd(&shaking.stream, shaking.events())], deadline).map_err(unreachable)?;
    }
}
