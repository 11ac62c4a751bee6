//! Channels next to the bare socket: an echo of 64 bytes and a one-way stream.

use crate::{MIB, PINGS, VOLUME, gigabytes, micros};
use firefly_net::{
    Channel, ChannelListener, ChannelOptions, Completion, Fabric, HEADER_BYTES, connect_channel,
};
use firefly_types::ClusterSecret;
use std::time::{Duration, Instant};

/// Waits as a progress thread would and moves what can move.
fn drive(channel: &mut dyn Channel, done: &mut Vec<Completion>) {
    if channel.progress(done).unwrap() {
        return;
    }
    let mut fds = Vec::new();
    channel.poll_fds(&mut fds);
    let events = |writable| libc::POLLIN | if writable { libc::POLLOUT } else { 0 };
    let mut fds: Vec<_> =
        fds.into_iter().map(|(fd, w)| libc::pollfd { fd, events: events(w), revents: 0 }).collect();
    // SAFETY: a live array of its length.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 1000) };
}

fn send(channel: &mut dyn Channel, memory: &[u8]) {
    let mut done = Vec::new();
    // SAFETY: `memory` outlives the loop, which ends when it was sent.
    unsafe { channel.post_send(1, &[0; HEADER_BYTES], memory.as_ptr(), memory.len()).unwrap() };
    channel.progress(&mut done).unwrap();
    while !done.contains(&Completion::Sent { token: 1 }) {
        drive(channel, &mut done);
    }
}

fn receive(channel: &mut dyn Channel, memory: &mut [u8]) {
    let mut done = Vec::new();
    let len = loop {
        match channel.peek().unwrap() {
            Some(next) => break next.len,
            None => drive(channel, &mut done),
        }
    };
    assert!(len <= memory.len());
    // SAFETY: `memory` outlives the loop, which ends when it was filled.
    unsafe { channel.post_recv(2, memory.as_mut_ptr(), len).unwrap() };
    channel.progress(&mut done).unwrap();
    while !done.contains(&Completion::Received { token: 2 }) {
        drive(channel, &mut done);
    }
}

/// One connected pair; the far end echoes and streams as it is asked.
pub(crate) struct Pair {
    near: Box<dyn Channel>,
    far: Option<std::thread::JoinHandle<()>>,
    memory: Vec<u8>,
}

impl Pair {
    pub(crate) fn new(sockets: usize) -> Pair {
        let options = ChannelOptions { fabric: Fabric::tcp(), sockets };
        let accepting = options.clone();
        let secret = ClusterSecret::from_bytes([1; 32]);
        let listener = ChannelListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let (addr, theirs) = (listener.local_addr(), secret.clone());
        let soon = || Instant::now() + Duration::from_secs(10);
        let far = std::thread::spawn(move || {
            let (mut c, _) = listener.accept(&theirs, soon(), &accepting).unwrap();
            let (mut small, big) = ([0; 64], vec![1; MIB]);
            loop {
                receive(&mut *c, &mut small);
                match small[0] {
                    0 => send(&mut *c, &small),
                    1 => (0..VOLUME / MIB).for_each(|_| send(&mut *c, &big)),
                    _ => return,
                }
            }
        });
        let near = connect_channel(addr, &secret, [0; 32], soon(), &options).unwrap();
        Pair { near, far: Some(far), memory: vec![0; MIB] }
    }

    pub(crate) fn ping(&mut self) -> f64 {
        let start = Instant::now();
        for _ in 0..PINGS {
            send(&mut *self.near, &[0; 64]);
            receive(&mut *self.near, &mut self.memory[..64]);
        }
        micros(start, PINGS)
    }

    pub(crate) fn stream(&mut self) -> f64 {
        send(&mut *self.near, &[1; 64]);
        let start = Instant::now();
        for _ in 0..VOLUME / MIB {
            receive(&mut *self.near, &mut self.memory);
        }
        gigabytes(start, VOLUME)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        send(&mut *self.near, &[2; 64]);
        let far = self.far.take().expect("taken here only");
        far.join().unwrap();
    }
}
