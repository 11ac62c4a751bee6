//! Who is there: signs of life, notices of failure, leaving, and what the links have carried.

use super::{InFlight, Peer, Wire, control};
use crate::ReduceError;
use crate::header::{Descriptor, Header, MessageKind};
use crate::wire::NOTICE_BYTES;
use firefly_net::{ChannelError, Completion};
use std::time::{Duration, Instant};

/// How long a failing group holds its links for its notice to leave.
const FLUSH_FAILURE: Duration = Duration::from_millis(20);

/// How a peer stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Present,
    /// Has said that it leaves in order.
    Left,
    /// Its link ended without a word; what the link said.
    Lost(String),
}

impl Wire {
    /// Says something that needs no answer to every peer that is still there.
    pub(crate) fn tell_all(&mut self, kind: MessageKind, sequence: u64) {
        for rank in 0..self.peers.len() as u32 {
            if self.standing(rank) == Some(&Standing::Present) {
                self.post_control(rank, control(kind, self.group, sequence, 0));
            }
        }
    }

    /// A sign of life on links that have no other means to notice a dead host.
    pub(crate) fn heartbeat(&mut self) {
        for rank in 0..self.peers.len() as u32 {
            if self.peers[rank as usize].as_ref().is_some_and(|p| !p.local && p.standing == Standing::Present)
            {
                self.post_control(rank, control(MessageKind::Heartbeat, self.group, 0, 0));
            }
        }
    }

    /// "I have issued operation `sequence`": who waits for it must look elsewhere.
    pub(super) fn say_here(&mut self, rank: u32, sequence: u64) {
        if self.standing(rank) == Some(&Standing::Present) {
            self.post_control(rank, control(MessageKind::Here, self.group, sequence, 0));
        }
    }

    /// Ranks that have not said since `asked` that they have issued `sequence`.
    pub(crate) fn not_here(&self, sequence: u64, asked: Instant) -> Vec<u32> {
        (0..self.peers.len() as u32)
            .filter(|&r| {
                self.peers[r as usize]
                    .as_ref()
                    .is_some_and(|p| !p.here.is_some_and(|(said, at)| said >= sequence && at >= asked))
            })
            .collect()
    }

    /// "I wait for you in operation `sequence`."
    pub(crate) fn probe(&mut self, rank: u32, sequence: u64, descriptor: Descriptor) {
        if self.standing(rank) == Some(&Standing::Present) {
            let header = Header { descriptor, ..control(MessageKind::Probe, self.group, sequence, 0) };
            self.post_control(rank, header);
        }
    }

    /// Tells remote peers why this rank's group is broken. Best effort.
    pub(crate) fn tell_failure(&mut self, error: &ReduceError, dead: u32) {
        let text = error.to_string();
        let text: Box<[u8]> = text.as_bytes()[..text.len().min(NOTICE_BYTES)].into();
        for rank in 0..self.peers.len() as u32 {
            if self.peers[rank as usize].as_ref().is_none_or(|p| p.local || p.standing != Standing::Present) {
                continue;
            }
            let payload = text.clone();
            let header = Header {
                len: payload.len() as u64,
                extra: u64::from(error.code()) | u64::from(dead) << 32,
                ..control(MessageKind::Failed, self.group, 0, 0)
            };
            let (ptr, len) = (payload.as_ptr(), payload.len());
            self.post(rank, &header, ptr, len, InFlight::Control { _payload: payload });
        }
    }

    /// Tries briefly to get the failure's notice out, before the links go.
    pub(crate) fn flush_failure(&mut self) {
        let until = Instant::now() + FLUSH_FAILURE;
        let mut completions = Vec::new();
        while Instant::now() < until {
            for (rank, peer) in self.peers.iter_mut().enumerate() {
                if let Some(peer) = peer
                    && !peer.local
                    && peer.link.progress(&mut completions).is_err()
                {
                    // Its notice cannot arrive any more.
                    self.in_flight.retain(|(r, _), _| *r as usize != rank);
                }
                for completion in completions.drain(..) {
                    let (Completion::Sent { token } | Completion::Received { token }) = completion;
                    self.in_flight.remove(&(rank as u32, token));
                }
            }
            if !self.in_flight.values().any(|f| matches!(f, InFlight::Control { .. })) {
                return;
            }
            std::thread::yield_now();
        }
    }

    /// How `rank` stands; `None` for this rank itself.
    pub(crate) fn standing(&self, rank: u32) -> Option<&Standing> {
        self.peers[rank as usize].as_ref().map(|p| &p.standing)
    }

    /// The peer whose link ended first without a word, when, and what the link said.
    pub(crate) fn first_lost(&self) -> Option<(u32, Instant, &str)> {
        let lost = self.peers.iter().enumerate().filter_map(|(rank, peer)| {
            let peer = peer.as_ref()?;
            match (&peer.standing, peer.lost_at) {
                (Standing::Lost(why), Some(at)) => Some((rank as u32, at, why.as_str())),
                _ => None,
            }
        });
        lost.min_by_key(|&(_, at, _)| at)
    }

    /// Ranks whose host has been silent since before `limit`.
    pub(crate) fn silent_since(&self, limit: Instant) -> Option<u32> {
        (0..self.peers.len() as u32).find(|&r| {
            self.peers[r as usize]
                .as_ref()
                .is_some_and(|p| !p.local && p.standing == Standing::Present && p.last_heard < limit)
        })
    }

    /// Whether every peer that needs it has confirmed this rank's Bye.
    pub(crate) fn bye_confirmed(&self) -> bool {
        self.peers.iter().flatten().all(|p| p.local || p.bye_seen || p.standing != Standing::Present)
    }

    /// Whether everything posted has left.
    pub(crate) fn flushed(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Marks a peer that was seen dead or leaving by other means.
    pub(crate) fn mark(&mut self, rank: u32, standing: Standing) {
        if let Some(peer) = &mut self.peers[rank as usize]
            && peer.standing == Standing::Present
        {
            peer.standing = standing;
        }
    }

    /// Descriptors to poll: (descriptor, wants writing).
    pub(crate) fn poll_fds(&self) -> impl Iterator<Item = (std::os::fd::RawFd, bool)> + '_ {
        self.peers.iter().flatten().filter(|p| !matches!(p.standing, Standing::Lost(_))).flat_map(|p| {
            let mut fds = Vec::new();
            p.link.poll_fds(&mut fds);
            fds
        })
    }

    /// What the links have carried, by transport.
    pub(crate) fn carried(&self) -> Carried {
        let mut sums = Carried::default();
        for peer in self.peers.iter().flatten() {
            let counters = peer.link.counters();
            let sum = match peer.link.transport() {
                "shm" => &mut sums.shm,
                "rdma" => {
                    sums.rdma_peers += 1;
                    &mut sums.rdma
                }
                _ => &mut sums.tcp,
            };
            sum.0 += counters.bytes_sent;
            sum.1 += counters.bytes_received;
            sums.copied += counters.bytes_copied;
        }
        sums
    }

    /// How `rank` is reached. `None` for this rank itself.
    pub(crate) fn reach(&self, rank: u32) -> Option<Reach> {
        let link = &self.peers.get(rank as usize)?.as_ref()?.link;
        Some(Reach { transport: link.transport(), why_not_rdma: link.why_not_rdma().map(str::to_owned) })
    }
}

/// How another rank is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// "shm" (the same node), "rdma" or "tcp".
    pub transport: &'static str,
    /// Why a rank of another node is not reached by RDMA, if it is not.
    pub why_not_rdma: Option<String>,
}

/// Bytes sent and received, by transport.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Carried {
    pub(crate) shm: (u64, u64),
    pub(crate) tcp: (u64, u64),
    pub(crate) rdma: (u64, u64),
    pub(crate) rdma_peers: u32,
    /// Payload bytes copied in user space on their way through the network.
    pub(crate) copied: u64,
}

/// The link has ended.
pub(super) fn lose(peer: &mut Peer, error: ChannelError) {
    if peer.standing == Standing::Present {
        peer.standing = Standing::Lost(error.to_string());
        peer.lost_at = Some(Instant::now());
    }
}
