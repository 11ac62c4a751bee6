//! How channels are made, and what TCP adds to the contract.

use super::contract::{LONG, Pair, Rank, channel_contract, header};
use super::negotiate::Frame;
use super::*;
use crate::handshake::{self, Initiator, Purpose, Responder, Terms};
use firefly_types::{ClusterId, ClusterSecret};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

fn secret(n: u8) -> ClusterSecret {
    ClusterSecret::from_bytes([n; 32])
}

fn soon() -> Instant {
    Instant::now() + LONG
}

fn tcp(sockets: usize) -> ChannelOptions {
    ChannelOptions { fabric: Fabric::tcp(), sockets }
}

fn listener() -> ChannelListener {
    ChannelListener::bind("127.0.0.1:0".parse().unwrap()).unwrap()
}

fn pair_of(dialler: ChannelOptions, acceptor: ChannelOptions) -> Pair {
    let listener = ChannelListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = listener.local_addr();
    let dialled =
        std::thread::spawn(move || connect_channel(addr, &secret(1), [42; 32], soon(), &dialler).unwrap());
    let (accepted, hello) = listener.accept(&secret(1), soon(), &acceptor).unwrap();
    assert_eq!(hello, [42; 32]);
    (dialled.join().unwrap(), accepted)
}

#[test]
fn one_socket_keeps_the_contract() {
    channel_contract(&Fabric::tcp(), &|| pair_of(tcp(1), tcp(1)));
}

#[test]
fn several_sockets_keep_the_contract() {
    channel_contract(&Fabric::tcp(), &|| pair_of(tcp(3), tcp(3)));
    channel_contract(&Fabric::tcp(), &|| pair_of(tcp(4), tcp(2)));
}

#[test]
fn both_sides_know_the_carrier_and_why() {
    for (ours, theirs, sockets) in [(1, 1, 1), (8, 3, 3), (1, 5, 1), (99, 99, MOST_SOCKETS)] {
        let (left, right) = pair_of(tcp(ours), tcp(theirs));
        for channel in [left, right] {
            assert_eq!(channel.transport(), "tcp");
            let why = channel.why_not_rdma().unwrap();
            assert!(why.contains("TCP was asked for"), "{why}");
            let mut fds = Vec::new();
            channel.fork_fds(&mut fds);
            assert_eq!(fds.len(), sockets);
        }
    }
}

#[test]
fn what_is_sent_is_header_and_payload_and_no_more() {
    let (left, right) = pair_of(tcp(1), tcp(1));
    let (mut left, mut right) =
        (Rank::new(left, vec![vec![1; 100], vec![2; 100_000]]), Rank::new(right, vec![]));
    while right.received.len() < 2 {
        left.step().unwrap();
        right.step().unwrap();
    }
    let (sent, received) = (left.channel.counters(), right.channel.counters());
    assert_eq!((sent.bytes_sent, received.bytes_received), (100_260, 100_260));
    assert_eq!((sent.bytes_copied, received.bytes_copied), (0, 0));
}

#[test]
fn packets_are_marked() {
    let fabric = Fabric::open(crate::NetOptions {
        transport: crate::Transport::Tcp,
        collective: crate::fabric::Class { service_level: 0, traffic_class: 0x68 },
        ..Default::default()
    })
    .unwrap();
    let options = ChannelOptions { fabric, sockets: 2 };
    let (left, right) = pair_of(options.clone(), options);
    for channel in [left, right] {
        let mut fds = Vec::new();
        channel.fork_fds(&mut fds);
        for fd in fds {
            // SAFETY: the channel owns the descriptor and outlives this borrow.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
            assert_eq!(socket2::SockRef::from(&fd).tos_v4().unwrap(), 0x68);
        }
    }
}

/// One of several connections ends: the channel says which.
#[test]
fn the_end_of_one_connection_ends_the_channel_by_name() {
    let (left, right) = pair_of(tcp(3), tcp(3));
    let mut fds = Vec::new();
    left.fork_fds(&mut fds);
    // SAFETY: a plain system call on a live descriptor.
    assert_eq!(unsafe { libc::shutdown(fds[2], libc::SHUT_RDWR) }, 0);
    // Both stay until both have noticed.
    let mut ranks = [left, right].map(|channel| Rank::new(channel, vec![]));
    for rank in &mut ranks {
        let error = rank.until_error();
        let text = error.to_string();
        assert!(matches!(error, ChannelError::Closed { .. }) && text.contains("connection 3 of 3"), "{text}");
    }
}

#[test]
fn strangers_are_refused_and_hold_up_nobody() {
    let listener = listener();
    let addr = listener.local_addr();
    // One says nothing, one talks nonsense, one has the wrong secret, one speaks RPC.
    let silent = TcpStream::connect(addr).unwrap();
    let mut web = TcpStream::connect(addr).unwrap();
    web.write_all(&b"GET / HTTP/1.1\r\n".repeat(8)).unwrap();
    let wrong = std::thread::spawn(move || connect_channel(addr, &secret(2), [2; 32], soon(), &tcp(1)).err());
    let rpc = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(addr).unwrap();
        let terms = Terms::new(ClusterId(0), &secret(1), Purpose::Rpc);
        blocking(&mut stream, Initiator::start(terms, "", [3; 32], handshake::nonce()))
    });
    let (done, finished) = std::sync::mpsc::channel();
    let member = std::thread::spawn(move || {
        let refused = (wrong.join().unwrap().unwrap(), rpc.join().unwrap().unwrap_err());
        done.send(refused).unwrap();
        connect_channel(addr, &secret(1), [1; 32], soon(), &tcp(1)).unwrap()
    });
    let (_channel, hello) = listener.accept(&secret(1), soon(), &tcp(1)).unwrap();
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
    let error = listener().accept(&secret(1), brief(), &tcp(1)).err().unwrap();
    assert!(matches!(error, ChannelError::Deadline(_)), "{error}");
    // A server that accepts and says nothing.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = mute.local_addr().unwrap();
    let error = connect_channel(addr, &secret(1), [0; 32], brief(), &tcp(1)).err().unwrap();
    assert!(matches!(error, ChannelError::Deadline(_)), "{error}");
    drop(mute);
    let error = connect_channel(addr, &secret(1), [0; 32], soon(), &tcp(1)).err().unwrap();
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
    let error = connect_channel(addr, &secret(1), [0; 32], soon(), &tcp(1)).err().unwrap();
    assert!(matches!(error, ChannelError::Refused(HandshakeError::WrongSecret)), "{error}");
    thread.join().unwrap();
}

/// A member that speaks by hand: proves itself and offers TCP.
fn by_hand(addr: std::net::SocketAddr, sockets: usize) -> TcpStream {
    let mut stream = TcpStream::connect(addr).unwrap();
    let terms = Terms::new(ClusterId(0), &secret(1), Purpose::Channel);
    blocking(&mut stream, Initiator::start(terms, "", [0; 32], handshake::nonce())).unwrap();
    let wishes = negotiate::Wishes {
        policy: crate::Transport::Tcp,
        sockets,
        rails: Vec::new(),
        why_none: String::new(),
    };
    stream.write_all(&Frame::Offer { id: [7; 16], wishes }.encode()).unwrap();
    let mut prefix = [0; 2];
    stream.read_exact(&mut prefix).unwrap();
    let mut body = vec![0; Frame::body_len(prefix).unwrap()];
    stream.read_exact(&mut body).unwrap();
    assert!(matches!(Frame::decode(&body).unwrap(), Frame::Tcp { .. }));
    stream
}

#[test]
fn a_member_that_sends_garbage_gets_a_precise_error() {
    let good = {
        let mut wire = [0; 80];
        wire[..4].copy_from_slice(b"FFCH");
        wire
    };
    let spoilt =
        [("magic", 0, b'X'), ("place 1", 4, 1), ("place 3", 4, 3), ("reserved", 5, 1), ("limit", 15, 0xFF)];
    for (what, at, byte) in spoilt {
        let listener = listener();
        let addr = listener.local_addr();
        let thread = std::thread::spawn(move || {
            let mut stream = by_hand(addr, 1);
            let mut wire = good;
            wire[at] = byte;
            stream.write_all(&wire).unwrap();
            stream
        });
        let (channel, _) = listener.accept(&secret(1), soon(), &tcp(1)).unwrap();
        let error = Rank::new(channel, vec![]).until_error();
        assert!(matches!(&error, ChannelError::Protocol(text) if text.contains(what)), "{what}: {error}");
        drop(thread.join().unwrap());
    }
}

/// A member that breaks the negotiation's rules costs its own connection, and the next one is served.
#[test]
fn a_member_that_negotiates_nonsense_is_refused() {
    let listener = listener();
    let addr = listener.local_addr();
    let talk = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(addr).unwrap();
        let terms = Terms::new(ClusterId(0), &secret(1), Purpose::Channel);
        let bytes = bytes.to_vec();
        std::thread::spawn(move || {
            blocking(&mut stream, Initiator::start(terms, "", [0; 32], handshake::nonce())).unwrap();
            stream.write_all(&bytes).unwrap();
            // The end is the refusal.
            stream.read_to_end(&mut Vec::new())
        })
    };
    let strangers = [
        talk(&[0, 0]),
        talk(&[0xFF, 0xFF]),
        talk(&[1, 0, 99]),
        talk(&Frame::Done.encode()),
        talk(&Frame::Lane { id: [1; 16], index: 1 }.encode()),
        talk(&Frame::Lane { id: [1; 16], index: 0 }.encode()),
    ];
    let member = std::thread::spawn(move || {
        let ended: Vec<_> = strangers.into_iter().map(|s| s.join().unwrap()).collect();
        (ended, connect_channel(addr, &secret(1), [1; 32], soon(), &tcp(1)).unwrap())
    });
    let (_channel, hello) = listener.accept(&secret(1), soon(), &tcp(1)).unwrap();
    assert_eq!(hello, [1; 32]);
    assert_eq!(member.join().unwrap().0.len(), 6);
}

/// Rules of the further connections: the right channel, each once, in step with its message.
#[test]
fn parts_out_of_step_are_noticed() {
    let listener = ChannelListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = listener.local_addr();
    let thread = std::thread::spawn(move || {
        let mut first = by_hand(addr, 2);
        let mut second = TcpStream::connect(addr).unwrap();
        let terms = Terms::new(ClusterId(0), &secret(1), Purpose::Channel);
        blocking(&mut second, Initiator::start(terms, "", [0; 32], handshake::nonce())).unwrap();
        second.write_all(&Frame::Lane { id: [7; 16], index: 1 }.encode()).unwrap();
        let mut ready = [0; 3];
        second.read_exact(&mut ready).unwrap();
        // A message in two parts, and a part of message 5 where that of message 0 is due.
        let wire = |place, len, header| wire::WireHeader { place, len, header }.encode();
        first.write_all(&wire(wire::Place::Striped, 512 << 10, header(0))).unwrap();
        let mut part = [0; HEADER_BYTES];
        part[..8].copy_from_slice(b"FFSTRIPE");
        (part[8], part[16]) = (5, 1);
        second.write_all(&wire(wire::Place::Follows, 256 << 10, part)).unwrap();
        (first, second)
    });
    let (channel, _) = listener.accept(&secret(1), soon(), &tcp(2)).unwrap();
    let error = Rank::new(channel, vec![]).until_error();
    let text = error.to_string();
    assert!(text.contains("connection 2 of 2") && text.contains("is not that of message 0"), "{text}");
    drop(thread.join().unwrap());
}

/// RDMA that is demanded and cannot be had is an error on both sides.
#[test]
fn a_demand_for_rdma_is_honoured_or_refused() {
    let demanding = || {
        let options = crate::NetOptions { transport: crate::Transport::Rdma, ..Default::default() };
        ChannelOptions { fabric: Fabric::open(options).unwrap(), sockets: 1 }
    };
    if demanding().fabric.why_not().is_none() {
        // A machine with a device of its own: what happens then is tested in the virtual machine.
        return;
    }
    for (dialler, acceptor) in [(demanding(), tcp(1)), (tcp(1), demanding())] {
        let listener = ChannelListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = listener.local_addr();
        let dialled = std::thread::spawn(move || {
            connect_channel(addr, &secret(1), [0; 32], soon(), &dialler).err().unwrap()
        });
        let here = listener.accept(&secret(1), soon(), &acceptor).err().unwrap();
        for error in [here, dialled.join().unwrap()] {
            assert!(matches!(error, ChannelError::NoRdma { .. }), "{error}");
        }
    }
}
