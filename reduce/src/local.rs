//! How ranks of one node meet: over a unix socket each pair exchanges proofs of the group's
//! secret, memory segments and doorbells (as passed descriptors), and learns the other's process.

use crate::ReduceError;
use crate::shm::segment::Segment;
use firefly_types::ClusterSecret;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

const MAGIC: [u8; 8] = *b"ffrlocl1";
/// magic, rank, proof.
const HELLO_BYTES: usize = 8 + 4 + 32;
/// `SO_PEERPIDFD` (Linux 6.5), not yet in libc for every target.
const SO_PEERPIDFD: i32 = 77;
/// A stranger that connects and says nothing is dropped after this long.
const STRANGER: Duration = Duration::from_secs(2);

/// A rank of this node, met.
pub(crate) struct LocalPeer {
    pub(crate) rank: u32,
    pub(crate) segment: Segment,
    pub(crate) doorbell: OwnedFd,
    /// Readable when its process is gone.
    pub(crate) process: OwnedFd,
}

/// What the ranks of a node know before they meet.
pub(crate) struct Meeting<'a> {
    pub(crate) group: &'a str,
    pub(crate) tag: u32,
    pub(crate) rank: u32,
    /// All ranks of this node.
    pub(crate) local: &'a [u32],
    /// Their sockets.
    pub(crate) sockets: Vec<&'a str>,
    pub(crate) secret: &'a ClusterSecret,
    pub(crate) deadline: Instant,
}

impl Meeting<'_> {
    fn socket_of(&self, rank: u32) -> &str {
        let index = self.local.iter().position(|&r| r == rank).expect("a rank of this node");
        self.sockets[index]
    }

    /// `from` shows `to` that it holds the secret. The sockets' random names make it fresh.
    fn proof(&self, from: u32, to: u32) -> [u8; 32] {
        self.secret.prove(&[
            b"reduce local v1",
            self.group.as_bytes(),
            &from.to_le_bytes(),
            &to.to_le_bytes(),
            self.socket_of(from).as_bytes(),
            self.socket_of(to).as_bytes(),
        ])
    }

    fn fail(&self, peer: u32, what: &str, e: impl std::fmt::Display) -> ReduceError {
        ReduceError::bootstrap(format!(
            "rank {peer} of this node cannot be met: {what}: {e}; ranks that do not share a network namespace need \
             different FIREFLY_NODE_ID"
        ))
    }

    /// Meets all other ranks of this node.
    pub(crate) fn exchange(
        &self,
        listener: &UnixListener,
        segment: &OwnedFd,
        doorbell: &OwnedFd,
    ) -> Result<Vec<LocalPeer>, ReduceError> {
        let mut peers = Vec::new();
        for &peer in self.local.iter().filter(|&&r| r < self.rank) {
            let address = SocketAddr::from_abstract_name(self.socket_of(peer))
                .map_err(|e| self.fail(peer, "its socket's name", e))?;
            let stream = UnixStream::connect_addr(&address).map_err(|e| self.fail(peer, "connect", e))?;
            self.limit(&stream, self.left());
            self.send(&stream, peer, segment, doorbell).map_err(|e| self.fail(peer, "sending", e))?;
            peers.push((peer, stream));
        }
        let mut met = Vec::new();
        for (peer, stream) in peers {
            let (from, fds) = self.receive(&stream).map_err(|e| self.fail(peer, "its answer", e))?;
            if from != peer {
                return Err(self.fail(peer, "its answer", "it is another rank"));
            }
            met.push(self.open(peer, &stream, fds)?);
        }
        let mut expected: Vec<u32> = self.local.iter().copied().filter(|&r| r > self.rank).collect();
        listener.set_nonblocking(true).map_err(|e| ReduceError::system("fcntl", e))?;
        while !expected.is_empty() {
            let stream = self.accept(listener, &expected)?;
            self.limit(&stream, self.left().min(STRANGER));
            match self.receive(&stream) {
                Ok((peer, fds)) if expected.contains(&peer) => {
                    self.send(&stream, peer, segment, doorbell).map_err(|e| self.fail(peer, "sending", e))?;
                    met.push(self.open(peer, &stream, fds)?);
                    expected.retain(|&r| r != peer);
                }
                Ok((peer, _)) => tracing::warn!(peer, "refused a local rank that is not expected"),
                Err(error) => tracing::warn!(%error, "refused a local stranger"),
            }
        }
        Ok(met)
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
    }

    fn limit(&self, stream: &UnixStream, limit: Duration) {
        // A failure here can only make a broken peer be noticed late.
        let _ = stream.set_nonblocking(false);
        let _ = stream.set_read_timeout(Some(limit));
        let _ = stream.set_write_timeout(Some(limit));
    }

    fn accept(&self, listener: &UnixListener, expected: &[u32]) -> Result<UnixStream, ReduceError> {
        loop {
            match listener.accept() {
                Ok((stream, _)) => return Ok(stream),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(ReduceError::system("accepting a local rank", e)),
            }
            if Instant::now() >= self.deadline {
                let missing: Vec<String> = expected.iter().map(u32::to_string).collect();
                return Err(ReduceError::bootstrap(format!(
                    "missing ranks of this node: {}",
                    missing.join(", ")
                )));
            }
            let left = self.left();
            let timeout = rustix::event::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [rustix::event::PollFd::new(listener, rustix::event::PollFlags::IN)];
            let _ = rustix::event::poll(&mut fds, Some(&timeout));
        }
    }

    fn send(
        &self,
        stream: &UnixStream,
        to: u32,
        segment: &OwnedFd,
        doorbell: &OwnedFd,
    ) -> std::io::Result<()> {
        let mut hello = [0; HELLO_BYTES];
        hello[..8].copy_from_slice(&MAGIC);
        hello[8..12].copy_from_slice(&self.rank.to_le_bytes());
        hello[12..].copy_from_slice(&self.proof(self.rank, to));
        let fds = [segment.as_fd(), doorbell.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = rustix::net::sendmsg(stream, &[IoSlice::new(&hello)], &mut control, SendFlags::NOSIGNAL)?;
        if sent != hello.len() {
            return Err(std::io::Error::other("the hello was cut"));
        }
        Ok(())
    }

    fn receive(&self, stream: &UnixStream) -> std::io::Result<(u32, [OwnedFd; 2])> {
        let refuse = |what: &str| std::io::Error::other(what.to_owned());
        let mut hello = [0; HELLO_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut hello)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                fds.extend(passed);
            }
        }
        if received.bytes != HELLO_BYTES || hello[..8] != MAGIC {
            return Err(refuse("it does not speak this version"));
        }
        let from = u32::from_le_bytes([hello[8], hello[9], hello[10], hello[11]]);
        if !self.local.contains(&from) || from == self.rank {
            return Err(refuse("it claims an impossible rank"));
        }
        let fresh = [
            b"reduce local v1".as_slice(),
            self.group.as_bytes(),
            &from.to_le_bytes(),
            &self.rank.to_le_bytes(),
            self.socket_of(from).as_bytes(),
            self.socket_of(self.rank).as_bytes(),
        ];
        if !self.secret.verify(&fresh, &hello[12..]) {
            return Err(refuse("it does not hold the group's secret"));
        }
        let fds: [OwnedFd; 2] = fds.try_into().map_err(|_| refuse("it did not pass its segment"))?;
        Ok((from, fds))
    }

    fn open(&self, peer: u32, stream: &UnixStream, fds: [OwnedFd; 2]) -> Result<LocalPeer, ReduceError> {
        let [segment, doorbell] = fds;
        let segment = Segment::open(segment.as_fd(), peer, self.tag, self.local.len())?;
        // A blocking descriptor could stop this rank's progress inside a peer's doorbell.
        rustix::fs::fcntl_setfl(&doorbell, rustix::fs::OFlags::NONBLOCK)
            .map_err(|e| ReduceError::system("fcntl", e))?;
        let process = peer_process(stream).map_err(|e| self.fail(peer, "watching its process", e))?;
        Ok(LocalPeer { rank: peer, segment, doorbell, process })
    }
}

/// A descriptor that becomes readable when the process at the other end is gone, whoever else
/// still holds its sockets.
fn peer_process(stream: &UnixStream) -> std::io::Result<OwnedFd> {
    let mut fd = -1i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: fd and len are valid for the kernel to write an int and its length to.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if result == 0 && fd >= 0 {
        // SAFETY: the kernel has just given us this descriptor.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    // Older kernels: by number. The peer has just spoken, so the number is still its own.
    let credentials = rustix::net::sockopt::socket_peercred(stream)?;
    Ok(rustix::process::pidfd_open(credentials.pid, rustix::process::PidfdFlags::empty())?)
}
