//! Dialling a channel: connect, prove the secret, agree on the carrier.

use super::negotiate::{Frame, Wishes};
use super::rdma::{Endpoint, Half, VerbsChannel};
use super::striped::StripedChannel;
use super::talk::{self, Rails, Talk, class, configure, poll};
use super::tcp::TcpChannel;
use super::{Channel, ChannelError, ChannelOptions};
use crate::error::HandshakeError;
use crate::fabric::Transport;
use crate::handshake::{self, Initiator};
use firefly_types::ClusterSecret;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// A probe that takes longer over a path that is fit for collectives has been lost. Three
/// retransmissions by the device (a quarter of a second each) fit in.
const PROBE: Duration = Duration::from_secs(2);

/// A channel over TCP from what the negotiation ended with.
pub(super) fn tcp_channel(mut streams: Vec<TcpStream>, why_not_rdma: String) -> Box<dyn Channel> {
    let why = Some(why_not_rdma);
    match streams.len() {
        1 => Box::new(TcpChannel::new(streams.remove(0), why)),
        _ => Box::new(StripedChannel::new(streams, why)),
    }
}

/// One dialling.
struct Dial<'a> {
    addr: SocketAddr,
    secret: &'a ClusterSecret,
    deadline: Instant,
    options: &'a ChannelOptions,
}

/// Dials `addr`, proves `secret` both ways, sends `hello` (such as this process's rank) and agrees
/// on the carrier: RDMA if both sides allow it, have devices, and a message made it both ways over
/// them; else TCP over as many connections as both sides want. [`Channel::why_not_rdma`] says why
/// it is TCP.
///
/// # Errors
/// `Unreachable` at once when nothing listens there: publish addresses after binding. `Refused`
/// when the other side does not hold the secret, `Deadline` when it does not answer, `NoRdma` when
/// one side demands RDMA and it cannot be had.
pub fn connect_channel(
    addr: SocketAddr,
    secret: &ClusterSecret,
    hello: [u8; 32],
    deadline: Instant,
    options: &ChannelOptions,
) -> Result<Box<dyn Channel>, ChannelError> {
    if let Some(error) = options.fabric.invalid() {
        return Err(ChannelError::Options(error.clone()));
    }
    let dial = Dial { addr, secret, deadline, options };
    let talk = dial.authenticate(hello)?;
    let local = talk.stream.local_addr().map_err(|e| dial.unreachable(e.to_string()))?.ip();
    let (wishes, rails) = talk::wishes(options, local);
    dial.negotiate(talk, wishes, &rails)
}

impl Dial<'_> {
    fn unreachable(&self, reason: String) -> ChannelError {
        ChannelError::Unreachable { peer: self.addr.to_string(), reason }
    }

    fn overdue(&self) -> ChannelError {
        ChannelError::Deadline(format!("a channel to {}", self.addr))
    }

    /// Waits until the talk can go on.
    fn wait(&self, talk: &Talk) -> Result<(), ChannelError> {
        if Instant::now() >= self.deadline {
            return Err(self.overdue());
        }
        poll(&mut [talk.pollfd()], self.deadline).map_err(|e| self.unreachable(e.to_string()))
    }

    /// A connection on which both sides have proven themselves.
    fn authenticate(&self, hello: [u8; 32]) -> Result<Talk, ChannelError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.overdue());
        }
        let unreachable = |e: io::Error| self.unreachable(e.to_string());
        let stream = match TcpStream::connect_timeout(&self.addr, left) {
            Ok(stream) => stream,
            Err(e) if e.kind() == io::ErrorKind::TimedOut => return Err(self.overdue()),
            Err(e) => return Err(unreachable(e)),
        };
        configure(&stream, class(self.options)).map_err(unreachable)?;
        let (mut machine, first) = Initiator::start(talk::terms(self.secret), "", hello, handshake::nonce());
        let mut talk = Talk::new(stream);
        talk.say(&first);
        let failed = |reason| match reason {
            HandshakeError::Ended(reason) => self.unreachable(reason),
            reason => ChannelError::Refused(reason),
        };
        loop {
            let heard = match talk.flush().map_err(failed)? {
                true => talk.hear(machine.wants()).map_err(failed)?,
                false => None,
            };
            let Some(message) = heard else {
                self.wait(&talk)?;
                continue;
            };
            let advance = machine.feed(&message);
            talk.say(&advance.send);
            match advance.done {
                Some(Ok(_)) => return Ok(talk),
                Some(Err(reason)) => return Err(failed(reason)),
                None => {}
            }
        }
    }

    /// The peer's next frame.
    fn answer(&self, talk: &mut Talk) -> Result<Frame, ChannelError> {
        let closed = |e: HandshakeError| self.unreachable(e.to_string());
        loop {
            let heard = match talk.flush().map_err(closed)? {
                true => talk.hear_frame()?,
                false => None,
            };
            match heard {
                Some(frame) => return Ok(frame),
                None => self.wait(talk)?,
            }
        }
    }

    fn unexpected(&self, frame: &Frame) -> ChannelError {
        ChannelError::Protocol(format!("{frame:?} is no answer at this place of the negotiation"))
    }

    fn negotiate(
        &self,
        mut talk: Talk,
        wishes: Wishes,
        rails: &Rails,
    ) -> Result<Box<dyn Channel>, ChannelError> {
        let id: [u8; 16] = rand::random();
        let policy = wishes.policy;
        talk.say(&Frame::Offer { id, wishes }.encode());
        let (sockets, why) = match self.answer(&mut talk)? {
            Frame::Tcp { sockets, why } => (sockets, why),
            Frame::Refuse { why } => return Err(self.no_rdma(why)),
            Frame::Rdma { sockets, rail, endpoint } => {
                let Some(rail) = rails.get(rail) else {
                    return Err(ChannelError::Protocol(format!(
                        "the peer chose rail {rail}, which was not offered"
                    )));
                };
                match self.try_rdma(&mut talk, rail, endpoint)? {
                    Ok(mut channel) => {
                        channel.attach(talk.stream);
                        return Ok(Box::new(channel));
                    }
                    Err(why) => (sockets, why),
                }
            }
            other => return Err(self.unexpected(&other)),
        };
        if policy == Transport::Rdma {
            return Err(self.no_rdma(why));
        }
        let mut streams = vec![talk.stream];
        for index in 1..sockets {
            let mut talk = self.authenticate([0; 32])?;
            talk.say(&Frame::Lane { id, index }.encode());
            match self.answer(&mut talk)? {
                Frame::Ready => streams.push(talk.stream),
                other => return Err(self.unexpected(&other)),
            }
        }
        Ok(tcp_channel(streams, why))
    }

    fn no_rdma(&self, why: String) -> ChannelError {
        ChannelError::NoRdma { peer: self.addr.to_string(), why }
    }

    /// Makes this side's half, connects and probes. The inner error is why it is TCP then; both
    /// sides know it.
    fn try_rdma(
        &self,
        talk: &mut Talk,
        (rail, port): &(std::sync::Arc<crate::verbs::Rail>, crate::verbs::Port),
        peer: Endpoint,
    ) -> Result<Result<VerbsChannel, String>, ChannelError> {
        let made = Half::new(&rail.device, port, class(self.options)).and_then(|half| {
            let mine = half.endpoint();
            half.connect(peer).map(|channel| (channel, mine))
        });
        let (mut channel, mine) = match made {
            Ok(made) => made,
            Err(e) => return self.give_up(talk, e.to_string()),
        };
        talk.say(&Frame::Endpoint(mine).encode());
        match self.answer(talk)? {
            Frame::Ready => {}
            Frame::Failed { why } => return Ok(Err(why)),
            Frame::Refuse { why } => return Err(self.no_rdma(why)),
            other => return Err(self.unexpected(&other)),
        }
        match self.probe(&mut channel) {
            Ok(()) => {
                talk.say(&Frame::Done.encode());
                while !talk.flush().map_err(|e| self.unreachable(e.to_string()))? {
                    self.wait(talk)?;
                }
                Ok(Ok(channel))
            }
            Err(e) => {
                channel.give_up();
                drop(channel);
                self.give_up(talk, format!("{}: {e}", rail.name()))
            }
        }
    }

    fn give_up(&self, talk: &mut Talk, why: String) -> Result<Result<VerbsChannel, String>, ChannelError> {
        talk.say(&Frame::Failed { why: why.clone() }.encode());
        while !talk.flush().map_err(|e| self.unreachable(e.to_string()))? {
            self.wait(talk)?;
        }
        Ok(Err(why))
    }

    /// A message each way over the queue pairs.
    fn probe(&self, channel: &mut VerbsChannel) -> Result<(), ChannelError> {
        let until = self.deadline.min(Instant::now() + PROBE);
        channel.probe()?;
        while !channel.heard() {
            if Instant::now() >= until {
                return Err(ChannelError::Deadline("a message each way over the queue pairs".into()));
            }
            let mut fds = Vec::new();
            channel.poll_fds(&mut fds);
            let mut fds: Vec<_> = fds.into_iter().map(|(fd, _)| talk::pollfd(fd, libc::POLLIN)).collect();
            poll(&mut fds, until).map_err(|e| self.unreachable(e.to_string()))?;
            channel.progress(&mut Vec::new())?;
        }
        Ok(())
    }
}
