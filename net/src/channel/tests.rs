//! What channels promise, driven as a progress thread would drive them: by `poll` alone.

use super::*;
use crate::handshake::{self, Initiator, Purpose, Responder, Terms};
use firefly_types::{ClusterId, ClusterSecret};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Generous: a test that waits for it has failed.
const LONG: Duration = Duration::from_secs(60);

fn secret(n: u8) -> ClusterSecret {
    ClusterSecret::from_bytes([n; 32])
}

fn soon() -> Instant {
    Instant::now() + LONG
}

fn listener() -> ChannelListener {
    ChannelListener::bind("127.0.0.1:0".parse().unwrap()).unwrap()
}

fn pair() -> (Box<dyn Channel>, Box<dyn Channel>) {
    let listener = listener();
    let addr = listener.local_addr();
    let dialled = std::thread::spawn(move || connect_channel(addr, &secret(1), [42; 32], soon()).unwrap());
    let (accepted, hello) = listener.accept(&secret(1), soon()).unwrap();
    assert_eq!(hello, [42; 32]);
    (dialled.join().unwrap(), accepted)
}

fn header(n: u64) -> [u8; HEADER_BYTES] {
    let mut out = [0xCC; HEADER_BYTES];
    out[..8].copy_from_slice(&n.to_le_bytes());
    out
}

/// Waits until one of the channels can move.
fn wait(channels: &[&dyn Channel]) {
    let mut fds: Vec<libc::pollfd> = channels
        .iter()
        .map(|c| {
            let (fd, writable) = c.poll_fd();
            libc::pollfd { fd, events: libc::POLLIN | if writable { libc::POLLOUT } else { 0 }, revents: 0 }
        })
        .collect();
    // SAFETY: a valid array of that many entries.
    let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, LONG.as_millis() as i32) };
    assert!(n > 0, "nothing to poll for: a wake-up was lost");
}

/// A rank that sends a list of messages and receives what comes, owning all memory that it posts.
struct Rank {
    channel: Box<dyn Channel>,
    to_send: VecDeque<Vec<u8>>,
    posted: VecDeque<(u64, Vec<u8>)>,
    sent: u64,
    landing: Option<(u64, Vec<u8>)>,
    received: Vec<Vec<u8>>,
}

impl Rank {
    fn new(channel: Box<dyn Channel>, messages: Vec<Vec<u8>>) -> Rank {
        let to_send = messages.into();
        Rank { channel, to_send, posted: VecDeque::new(), sent: 0, landing: None, received: Vec::new() }
    }

    fn step(&mut self) -> Result<(), ChannelError> {
        while let Some(message) = self.to_send.pop_front() {
            let token = self.sent + self.posted.len() as u64;
            // SAFETY: the vector's memory stays in `posted` until it is reported sent.
            unsafe { self.channel.post_send(token, &header(token), message.as_ptr(), message.len())? };
            self.posted.push_back((token, message));
        }
        if self.landing.is_none()
            && let Some(next) = self.channel.peek()?
        {
            let n = self.received.len() as u64;
            assert_eq!(next.header, header(n), "messages come in order");
            assert_eq!(self.channel.peek()?, Some(next), "peeking changes nothing");
            let mut memory = vec![0; next.len];
            // SAFETY: the vector's memory stays in `landing`, untouched, until it is reported.
            unsafe { self.channel.post_recv(n, memory.as_mut_ptr(), next.len)? };
            self.landing = Some((n, memory));
        }
        let mut done = Vec::new();
        let result = self.channel.progress(&mut done);
        for completion in done {
            match completion {
                Completion::Sent { token } => {
                    assert_eq!(self.posted.pop_front().unwrap().0, token, "sends complete in order");
                    self.sent += 1;
                }
                Completion::Received { token } => {
                    let (n, memory) = self.landing.take().unwrap();
                    assert_eq!(n, token);
                    self.received.push(memory);
                }
            }
        }
        result
    }

    fn idle(&self) -> bool {
        self.to_send.is_empty() && self.posted.is_empty()
    }
}

/// Runs two ranks until each has what the other sent.
fn exchange(a: Vec<Vec<u8>>, b: Vec<Vec<u8>>) -> (Rank, Rank) {
    let (left, right) = pair();
    let (want_a, want_b) = (a.len(), b.len());
    let (mut left, mut right) = (Rank::new(left, a), Rank::new(right, b));
    loop {
        left.step().unwrap();
        right.step().unwrap();
        let done = left.received.len() == want_b && right.received.len() == want_a;
        if done && left.idle() && right.idle() {
            return (left, right);
        }
        // A completed receive makes room for the next message, which may be there already.
        let next = |r: &mut Rank| r.landing.is_none() && r.channel.peek().unwrap().is_some();
        if !next(&mut left) && !next(&mut right) {
            wait(&[&*left.channel, &*right.channel]);
        }
    }
}

#[test]
fn messages_arrive_in_order_in_posted_memory() {
    let messages: Vec<Vec<u8>> =
        [0, 1, 79, 80, 81, 0, 0, 4096, 1 << 20].iter().map(|n| vec![*n as u8 + 1; *n]).collect();
    let (left, right) = exchange(messages.clone(), vec![]);
    assert_eq!(right.received, messages);
    assert_eq!(left.channel.bytes_sent(), right.channel.bytes_received());
    assert_eq!(left.channel.bytes_sent() as usize, messages.iter().map(|m| m.len() + 80).sum::<usize>());
    assert_eq!(left.channel.transport(), "tcp");
}

#[test]
fn both_sides_may_send_more_than_the_sockets_hold() {
    let big = || (0..3).map(|i| vec![i; 24 << 20]).collect::<Vec<_>>();
    let (left, right) = exchange(big(), big());
    assert!(left.received == big() && right.received == big());
}

#[test]
fn random_messages_keep_order_and_bytes() {
    use rand::{RngExt, SeedableRng};
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut some = || {
        (0..rng.random_range(1..120))
            .map(|_| {
                let len = if rng.random_bool(0.7) {
                    rng.random_range(0..300)
                } else {
                    rng.random_range(0..200_000)
                };
                let first: u8 = rng.random();
                (0..len).map(|i: usize| first.wrapping_add(i as u8)).collect::<Vec<u8>>()
            })
            .collect::<Vec<_>>()
    };
    let (a, b) = (some(), some());
    let (left, right) = exchange(a.clone(), b.clone());
    assert!(left.received == b && right.received == a);
}

/// Drives one rank until its channel fails.
fn until_error(rank: &mut Rank) -> ChannelError {
    loop {
        if let Err(e) = rank.step() {
            return e;
        }
        if rank.landing.is_some() || rank.channel.peek().is_ok_and(|p| p.is_none()) {
            wait(&[&*rank.channel]);
        }
    }
}

#[test]
fn what_a_peer_sent_before_its_death_is_delivered_then_the_death() {
    let (left, right) = pair();
    let mut left = Rank::new(left, vec![vec![1; 100], vec![2; 200]]);
    while !(left.to_send.is_empty() && left.idle()) {
        left.step().unwrap();
    }
    drop(left);
    let mut right = Rank::new(right, vec![]);
    let error = until_error(&mut right);
    assert_eq!(right.received, [vec![1; 100], vec![2; 200]]);
    assert!(matches!(&error, ChannelError::Closed { reason } if reason.contains("peer closed")), "{error}");
    // It stays failed, with the same reason.
    assert_eq!(right.step().unwrap_err().to_string(), error.to_string());
    // SAFETY: nothing is read, the channel has failed.
    let again = unsafe { right.channel.post_send(9, &header(9), std::ptr::null(), 0) };
    assert_eq!(again.unwrap_err().to_string(), error.to_string());
}

#[test]
fn a_peer_that_dies_in_the_middle_of_a_message_is_noticed_by_receiver_and_sender() {
    let (left, right) = pair();
    // More than the sockets hold, so that it cannot be on its way entirely.
    let mut left = Rank::new(left, vec![vec![1; 64 << 20]]);
    let mut right = Rank::new(right, vec![vec![2; 64 << 20]]);
    while right.landing.is_none() {
        left.step().unwrap();
        right.step().unwrap();
    }
    drop(left);
    let error = until_error(&mut right);
    assert!(matches!(error, ChannelError::Closed { .. }), "{error}");
    assert!(right.received.is_empty() && right.sent == 0);
}

#[test]
fn misuse_is_an_error_and_does_no_harm() {
    let (left, right) = pair();
    let (mut left, mut right) = (Rank::new(left, vec![vec![5; 10]]), right);
    // SAFETY: refused before the pointer is used.
    let early = unsafe { right.post_recv(0, std::ptr::null_mut(), 10) };
    assert!(matches!(early, Err(ChannelError::Misuse(_))));
    while !(left.to_send.is_empty() && left.idle()) {
        left.step().unwrap();
    }
    while right.peek().unwrap().is_none() {
        wait(&[&*right]);
    }
    // SAFETY: refused before the pointer is used.
    let wrong = unsafe { right.post_recv(0, std::ptr::null_mut(), 11) };
    assert!(matches!(wrong, Err(ChannelError::Misuse(_))));
    let mut right = Rank::new(right, vec![]);
    while right.received.is_empty() {
        right.step().unwrap();
    }
    assert_eq!(right.received, [[5; 10]]);
}

#[test]
fn strangers_are_refused_and_hold_up_nobody() {
    let listener = listener();
    let addr = listener.local_addr();
    // One says nothing, one talks nonsense, one has the wrong secret, one speaks RPC.
    let silent = TcpStream::connect(addr).unwrap();
    let mut web = TcpStream::connect(addr).unwrap();
    web.write_all(&b"GET / HTTP/1.1\r\n".repeat(8)).unwrap();
    let wrong = std::thread::spawn(move || connect_channel(addr, &secret(2), [2; 32], soon()).err());
    let rpc = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(addr).unwrap();
        let terms = Terms::new(ClusterId(0), &secret(1), Purpose::Rpc);
        blocking(&mut stream, Initiator::start(terms, "", [3; 32], handshake::nonce()))
    });
    let (done, finished) = std::sync::mpsc::channel();
    let member = std::thread::spawn(move || {
        let refused = (wrong.join().unwrap().unwrap(), rpc.join().unwrap().unwrap_err());
        done.send(refused).unwrap();
        connect_channel(addr, &secret(1), [1; 32], soon()).unwrap()
    });
    let (_channel, hello) = listener.accept(&secret(1), soon()).unwrap();
    assert_eq!(hello, [1; 32]);
    let (wrong, rpc) = finished.recv().unwrap();
    assert!(matches!(wrong, ChannelError::Refused(HandshakeError::WrongSecret)), "{wrong}");
    assert_eq!(rpc, HandshakeError::WrongPurpose);
    drop((silent, member.join().unwrap()));
}

/// A handshake by hand on a blocking socket.
fn blocking(
    stream: &mut TcpStream,
    (mut machine, hello): (Initiator, Vec<u8>),
) -> Result<(), HandshakeError> {
    stream.write_all(&hello).unwrap();
    loop {
        let mut message = vec![0; machine.wants()];
        stream.read_exact(&mut message).map_err(|e| HandshakeError::Ended(e.to_string()))?;
        let advance = machine.feed(&message);
        stream.write_all(&advance.send).unwrap();
        if let Some(done) = advance.done {
            return done.map(drop);
        }
    }
}

#[test]
fn deadlines_hold_on_both_sides() {
    let brief = || Instant::now() + Duration::from_millis(30);
    let error = listener().accept(&secret(1), brief()).err().unwrap();
    assert!(matches!(error, ChannelError::Deadline(_)), "{error}");
    // A server that accepts and says nothing.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = mute.local_addr().unwrap();
    let error = connect_channel(addr, &secret(1), [0; 32], brief()).err().unwrap();
    assert!(matches!(error, ChannelError::Deadline(_)), "{error}");
    drop(mute);
    let error = connect_channel(addr, &secret(1), [0; 32], soon()).err().unwrap();
    assert!(matches!(error, ChannelError::Unreachable { .. }), "{error}");
}

#[test]
fn an_impostor_that_accepts_is_refused() {
    let impostor = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = impostor.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = impostor.accept().unwrap();
        let terms = Terms::new(ClusterId(0), &secret(9), Purpose::Channel);
        let mut machine = Responder::new(terms, handshake::nonce());
        let mut message = vec![0; machine.wants()];
        stream.read_exact(&mut message).unwrap();
        stream.write_all(&machine.feed(&message).send).unwrap();
        let mut message = vec![0; machine.wants()];
        stream.read_exact(&mut message).unwrap();
        stream.write_all(&[0; 34]).unwrap();
    });
    let error = connect_channel(addr, &secret(1), [0; 32], soon()).err().unwrap();
    assert!(matches!(error, ChannelError::Refused(HandshakeError::WrongSecret)), "{error}");
    thread.join().unwrap();
}

#[test]
fn a_member_that_sends_garbage_gets_a_precise_error() {
    let good = {
        let mut wire = [0; 80];
        wire[..4].copy_from_slice(b"FFCH");
        wire
    };
    for (what, at, byte) in [("magic", 0, b'X'), ("reserved", 5, 1), ("limit", 15, 0xFF)] {
        let listener = listener();
        let addr = listener.local_addr();
        let thread = std::thread::spawn(move || {
            let mut stream = TcpStream::connect(addr).unwrap();
            let terms = Terms::new(ClusterId(0), &secret(1), Purpose::Channel);
            blocking(&mut stream, Initiator::start(terms, "", [0; 32], handshake::nonce())).unwrap();
            let mut wire = good;
            wire[at] = byte;
            stream.write_all(&wire).unwrap();
            stream
        });
        let (channel, _) = listener.accept(&secret(1), soon()).unwrap();
        let error = until_error(&mut Rank::new(channel, vec![]));
        assert!(matches!(&error, ChannelError::Protocol(text) if text.contains(what)), "{what}: {error}");
        drop(thread.join().unwrap());
    }
}
