//! Accepting channels: several may be in the making at one time, and one slow peer holds up nobody.

use super::connect::tcp_channel;
use super::negotiate::{Choice, Frame, choose};
use super::rdma::{Half, VerbsChannel};
use super::talk::{self, Talk, class, configure, poll, pollfd};
use super::{Channel, ChannelError, ChannelOptions};
use crate::error::HandshakeError;
use crate::handshake::{self, Responder};
use firefly_types::{ClusterSecret, lock};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Time for a stranger or a member to prove itself and to agree on the carrier. Loaded machines
/// start thousands of ranks at once, so more than RPC's.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// Handshakes at one time; beyond it new connections wait in the kernel.
const MAX_HANDSHAKES: usize = 256;

/// How far a connection is.
enum Stage {
    /// Nobody is known yet: no verbs object is made for a stranger.
    Handshake(Responder),
    Offer {
        hello: [u8; 32],
    },
    /// The dialler makes its half.
    Endpoint {
        main: Main,
        half: Half,
    },
    /// The dialler probes.
    Done {
        main: Main,
        channel: Box<VerbsChannel>,
    },
    /// Further connections of this channel are awaited.
    Sockets {
        main: Main,
        why: String,
        others: Vec<Option<TcpStream>>,
    },
    /// Over, once the last words have left.
    Over(Outcome),
    /// Only within `advance`.
    Moving,
}

/// What is known of a channel's first connection.
#[derive(Clone)]
struct Main {
    hello: [u8; 32],
    id: [u8; 16],
    sockets: usize,
    demanded: bool,
}

/// How a connection's making ended.
enum Outcome {
    Tcp {
        hello: [u8; 32],
        why: String,
        others: Vec<TcpStream>,
    },
    Rdma {
        hello: [u8; 32],
        channel: Box<VerbsChannel>,
    },
    Lane {
        id: [u8; 16],
        index: usize,
    },
    /// A stranger, or a member that breaks the rules.
    Refused(String),
    /// A member, but no channel as it was demanded.
    NoRdma(String),
}

struct Making {
    talk: Talk,
    peer: SocketAddr,
    until: Instant,
    stage: Stage,
}

impl Making {
    /// Goes as far as it can without waiting. `Some` when it is over.
    fn advance(&mut self, options: &ChannelOptions) -> Option<Outcome> {
        loop {
            match self.talk.flush() {
                Ok(true) => {}
                Ok(false) => return self.overdue(),
                Err(e) => {
                    // A refusal that cannot be delivered is still this refusal.
                    return Some(match std::mem::replace(&mut self.stage, Stage::Moving) {
                        Stage::Over(outcome @ (Outcome::Refused(_) | Outcome::NoRdma(_))) => outcome,
                        _ => Outcome::Refused(e.to_string()),
                    });
                }
            }
            match std::mem::replace(&mut self.stage, Stage::Moving) {
                Stage::Over(outcome) => return Some(outcome),
                Stage::Handshake(mut machine) => {
                    let message = match self.talk.hear(machine.wants()) {
                        Ok(Some(message)) => message,
                        Ok(None) => {
                            self.stage = Stage::Handshake(machine);
                            return self.overdue();
                        }
                        Err(e) => return Some(Outcome::Refused(e.to_string())),
                    };
                    let advance = machine.feed(&message);
                    self.talk.say(&advance.send);
                    self.stage = match advance.done {
                        None => Stage::Handshake(machine),
                        Some(Ok(agreed)) => Stage::Offer { hello: agreed.hello },
                        Some(Err(reason)) => Stage::Over(Outcome::Refused(reason.to_string())),
                    };
                }
                Stage::Sockets { main, why, others } => {
                    if others.iter().all(Option::is_some) {
                        let others = others.into_iter().flatten().collect();
                        return Some(Outcome::Tcp { hello: main.hello, why, others });
                    }
                    self.stage = Stage::Sockets { main, why, others };
                    // Nothing is said here meanwhile; the end is noticed.
                    return match self.talk.hear(1) {
                        Ok(None) => self.overdue(),
                        Ok(Some(_)) => Some(Outcome::Refused("it spoke out of turn".into())),
                        Err(e) => Some(Outcome::Refused(e.to_string())),
                    };
                }
                stage => match self.talk.hear_frame() {
                    Ok(Some(frame)) => self.stage = self.answer(stage, frame, options),
                    Ok(None) => {
                        self.stage = stage;
                        return self.overdue();
                    }
                    Err(e) => return Some(Outcome::Refused(e.to_string())),
                },
            }
        }
    }

    fn overdue(&self) -> Option<Outcome> {
        (Instant::now() >= self.until).then(|| Outcome::Refused(HandshakeError::TimedOut.to_string()))
    }

    /// Acts on the dialler's frame.
    fn answer(&mut self, stage: Stage, frame: Frame, options: &ChannelOptions) -> Stage {
        match (stage, frame) {
            (Stage::Offer { .. }, Frame::Lane { id, index }) => {
                // Said when its channel has taken it.
                Stage::Over(Outcome::Lane { id, index })
            }
            (Stage::Offer { hello }, Frame::Offer { id, wishes }) => {
                let local = self.talk.stream.local_addr().map_or(self.peer.ip(), |a| a.ip());
                let (ours, rails) = talk::wishes(options, local);
                let spread = usize::from(u16::from_le_bytes([id[0], id[1]]));
                let choice = choose(&ours, &wishes, (self.peer.ip(), local), spread);
                let rdma = crate::fabric::Transport::Rdma;
                let demanded = ours.policy == rdma || wishes.policy == rdma;
                let main = Main { hello, id, sockets: ours.sockets.min(wishes.sockets), demanded };
                match choice {
                    Choice::Tcp { why } => self.use_tcp(main, why, true),
                    Choice::Refuse { why } => self.refuse(why),
                    Choice::Rails { theirs, ours } => {
                        let (rail, port) = &rails[ours];
                        match Half::new(&rail.device, port, class(options)) {
                            Ok(half) => {
                                let (sockets, endpoint) = (main.sockets, half.endpoint());
                                self.talk.say(&Frame::Rdma { sockets, rail: theirs, endpoint }.encode());
                                Stage::Endpoint { main, half }
                            }
                            Err(e) => self.without_rdma(main, e.to_string(), true),
                        }
                    }
                }
            }
            (Stage::Endpoint { main, half }, Frame::Endpoint(peer)) => {
                let connected = half.connect(peer).map_err(|e| e.to_string()).and_then(|mut channel| {
                    match channel.probe() {
                        Ok(()) => Ok(channel),
                        Err(e) => {
                            channel.give_up();
                            Err(e.to_string())
                        }
                    }
                });
                match connected {
                    Ok(channel) => {
                        self.talk.say(&Frame::Ready.encode());
                        Stage::Done { main, channel: Box::new(channel) }
                    }
                    Err(why) if main.demanded => self.refuse(why),
                    Err(why) => {
                        self.talk.say(&Frame::Failed { why: why.clone() }.encode());
                        self.use_tcp(main, why, false)
                    }
                }
            }
            (Stage::Endpoint { main, .. }, Frame::Failed { why }) => self.without_rdma(main, why, false),
            (Stage::Done { main, channel }, Frame::Done) => {
                Stage::Over(Outcome::Rdma { hello: main.hello, channel })
            }
            (Stage::Done { main, mut channel }, Frame::Failed { why }) => {
                channel.give_up();
                self.without_rdma(main, why, false)
            }
            (_, frame) => Stage::Over(Outcome::Refused(format!("{frame:?} came out of turn"))),
        }
    }

    fn refuse(&mut self, why: String) -> Stage {
        self.talk.say(&Frame::Refuse { why: why.clone() }.encode());
        Stage::Over(Outcome::NoRdma(why))
    }

    /// RDMA failed; `tell`: the dialler waits to hear of it.
    fn without_rdma(&mut self, main: Main, why: String, tell: bool) -> Stage {
        match (main.demanded, tell) {
            (false, tell) => self.use_tcp(main, why, tell),
            (true, true) => self.refuse(why),
            // The dialler said so itself, and knows what was demanded by whom.
            (true, false) => Stage::Over(Outcome::NoRdma(why)),
        }
    }

    fn use_tcp(&mut self, main: Main, why: String, tell: bool) -> Stage {
        if tell {
            self.talk.say(&Frame::Tcp { sockets: main.sockets, why: why.clone() }.encode());
        }
        let others = (1..main.sockets).map(|_| None).collect();
        Stage::Sockets { main, why, others }
    }
}

/// Accepts channels.
pub struct ChannelListener {
    listener: TcpListener,
    /// Kept between calls of `accept`: two ranks may arrive during one.
    making: Mutex<Vec<Making>>,
}

impl ChannelListener {
    /// Listens on `addr`; port 0 takes a free one.
    pub fn bind(addr: SocketAddr) -> io::Result<ChannelListener> {
        let listener = TcpListener::bind(addr)?;
        listener.set_nonblocking(true)?;
        Ok(ChannelListener { listener, making: Mutex::default() })
    }

    /// The address to dial.
    pub fn local_addr(&self) -> SocketAddr {
        self.listener.local_addr().expect("a bound socket has an address")
    }

    /// Waits until `deadline` for a peer that proves to hold `secret`; gives its channel, made by
    /// `options` and the peer's, and its hello. Strangers are refused and logged, and the wait goes on.
    ///
    /// One accept runs at a time; another waits for it.
    ///
    /// # Errors
    /// `Deadline`; `NoRdma` if a member came and RDMA was demanded but cannot be had; `Options` if
    /// the network's options cannot be followed.
    pub fn accept(
        &self,
        secret: &ClusterSecret,
        deadline: Instant,
        options: &ChannelOptions,
    ) -> Result<(Box<dyn Channel>, [u8; 32]), ChannelError> {
        if let Some(error) = options.fabric.invalid() {
            return Err(ChannelError::Options(error.clone()));
        }
        let failed = |e: io::Error| ChannelError::Listener(e.to_string());
        let mut making = lock(&self.making);
        loop {
            let mut at = 0;
            while at < making.len() {
                let Some(outcome) = making[at].advance(options) else {
                    at += 1;
                    continue;
                };
                let Making { talk, peer, .. } = making.swap_remove(at);
                match outcome {
                    Outcome::Tcp { hello, why, others } => {
                        let streams = std::iter::once(talk.stream).chain(others).collect();
                        return Ok((tcp_channel(streams, why), hello));
                    }
                    Outcome::Rdma { hello, mut channel } => {
                        channel.attach(talk.stream);
                        return Ok((channel, hello));
                    }
                    Outcome::Lane { id, index } => {
                        match take_lane(&mut making, id, index, talk) {
                            // Its channel may be complete now: look at all again.
                            Ok(()) => at = 0,
                            Err(reason) => tracing::warn!(%peer, %reason, "refused a channel's connection"),
                        }
                    }
                    Outcome::Refused(reason) => tracing::warn!(%peer, %reason, "refused a channel"),
                    Outcome::NoRdma(why) => {
                        return Err(ChannelError::NoRdma { peer: peer.to_string(), why });
                    }
                }
            }
            if Instant::now() >= deadline {
                return Err(ChannelError::Deadline("a channel from a peer with the right secret".into()));
            }
            while making.len() < MAX_HANDSHAKES {
                match self.listener.accept() {
                    Ok((stream, peer)) => {
                        if let Err(e) = configure(&stream, class(options)) {
                            tracing::warn!(%peer, error = %e, "cannot set up a channel's socket");
                            continue;
                        }
                        let machine = Responder::new(talk::terms(secret), handshake::nonce());
                        let until = Instant::now() + HANDSHAKE_TIME;
                        let (talk, stage) = (Talk::new(stream), Stage::Handshake(machine));
                        making.push(Making { talk, peer, until, stage });
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
            let mut fds = Vec::with_capacity(1 + making.len());
            if making.len() < MAX_HANDSHAKES {
                fds.push(pollfd(self.listener.as_raw_fd(), libc::POLLIN));
            }
            for one in making.iter() {
                fds.push(one.talk.pollfd());
                until = until.min(one.until);
            }
            poll(&mut fds, until).map_err(failed)?;
        }
    }
}

/// Gives a further connection to the channel that waits for it.
fn take_lane(making: &mut [Making], id: [u8; 16], index: usize, mut talk: Talk) -> Result<(), String> {
    let place = making.iter_mut().find_map(|m| match &mut m.stage {
        Stage::Sockets { main, others, .. } if main.id == id => others.get_mut(index.checked_sub(1)?),
        _ => None,
    });
    let Some(place @ None) = place else {
        return Err(format!("no channel waits for its connection {index}"));
    };
    talk.say(&Frame::Ready.encode());
    match talk.flush() {
        Ok(true) => *place = Some(talk.stream),
        Ok(false) => return Err("a socket without room for three bytes".into()),
        Err(e) => return Err(e.to_string()),
    }
    Ok(())
}
