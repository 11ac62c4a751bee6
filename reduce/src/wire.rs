//! Matching: which message belongs to which operation, whatever order ranks issue and links
//! deliver in.
//!
//! * A part of a collective up to [`EAGER_BYTES`] is sent at once and kept by a receiver that is
//!   not there yet. A larger one waits for the receiver's Clear, which it sends as soon as its
//!   memory is posted. So a message at the head of a link never blocks those behind it.
//! * Point-to-point messages match by (sender, tag) in issue order, apart from collectives; small
//!   ones are sent at once (at most [`p2p::EAGER_CREDIT`] unmatched ones per peer), others are offered.
//! * Every message of a collective carries the operation's [`Descriptor`]; it is compared with
//!   what this rank issued, or will issue, at that place of the sequence.

mod p2p;
mod peers;

use crate::ReduceError;
use crate::fork::{self, Guarded};
use crate::header::{Descriptor, Header, MessageKind};
use firefly_net::{Channel, Completion};
use p2p::{PostedP2p, UnexpectedP2p};
pub use peers::Reach;
use peers::lose;
pub(crate) use peers::{Carried, Standing};
use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// Largest message sent without asking.
pub(crate) const EAGER_BYTES: usize = 16 << 10;
/// Bytes kept for parts of collectives that this rank has not reached; beyond, the link waits.
const UNEXPECTED_BYTES: usize = 64 << 20;
/// Own descriptors remembered for messages that come late.
const HISTORY: usize = 1024;
/// Longest failure text taken from a peer.
const NOTICE_BYTES: usize = 4096;

/// What happened to a transfer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Event {
    /// This rank's part for `peer` has left its memory.
    Sent { sequence: u64, part: u32 },
    /// `peer`'s part has arrived in the posted memory; `extra` is from its header.
    Received { sequence: u64, peer: u32, part: u32, extra: u64 },
    /// A point-to-point send is done.
    P2pSent { id: u64 },
    /// A point-to-point receive is done.
    P2pReceived { id: u64, source: u32 },
}

struct PendingSend {
    ptr: *const u8,
    len: usize,
    descriptor: Descriptor,
    extra: u64,
}

#[derive(Clone, Copy)]
struct PostedRecv {
    ptr: *mut u8,
    len: usize,
}

/// A payload on its way in whose checksum is known.
struct Expected {
    ptr: *const u8,
    len: usize,
    checksum: u32,
}

/// What a link's token stands for.
enum InFlight {
    Sent { sequence: u64, part: u32 },
    P2pSent { id: u64 },
    Control { _payload: Box<[u8]> },
    Received { sequence: u64, part: u32, extra: u64 },
    Kept { header: Header, data: Vec<u8> },
    P2pReceived { id: u64 },
    Notice { header: Header, data: Vec<u8> },
    Nothing,
}

struct Peer {
    /// Dropped before the link closes its descriptors.
    _guards: Vec<Guarded>,
    link: Box<dyn Channel>,
    local: bool,
    standing: Standing,
    sends: HashMap<(u64, u32), PendingSend>,
    recvs: HashMap<(u64, u32), PostedRecv>,
    cleared: HashMap<(u64, u32), u64>,
    kept: HashMap<(u64, u32), (Vec<u8>, u64)>,
    kept_bytes: usize,
    /// What the peer has said about operations that this rank has not issued yet.
    announced: HashMap<u64, Descriptor>,
    offered: HashMap<u64, PendingSend>,
    landing_p2p: HashMap<u64, (u64, PostedRecv)>,
    eager_unmatched: u32,
    last_heard: Instant,
    /// Bytes received by then.
    heard_bytes: u64,
    /// The newest operation that the peer has said it is at, and when it said so.
    here: Option<(u64, Instant)>,
    /// The operation about which the peer has asked, and which this rank has not issued yet.
    asked: Option<u64>,
    lost_at: Option<Instant>,
    bye_seen: bool,
}

/// All links of this rank and what is under way on them.
pub(crate) struct Wire {
    rank: u32,
    group: u32,
    peers: Vec<Option<Peer>>,
    in_flight: HashMap<(u32, u64), InFlight>,
    /// Payloads are checked: senders add checksums.
    pub(crate) checksums: bool,
    /// By link and token, as `in_flight`.
    expected: HashMap<(u32, u64), Expected>,
    next_token: u64,
    next_send_id: u64,
    issued: VecDeque<(u64, Descriptor)>,
    posted_p2p: VecDeque<PostedP2p>,
    unexpected_p2p: VecDeque<UnexpectedP2p>,
    events: Vec<Event>,
    completions: Vec<Completion>,
    /// A failure that a peer reported.
    notice: Option<ReduceError>,
}

// SAFETY: the raw pointers are memory of submitted operations, which stays valid until they are
// complete; whoever holds the Wire is the only one to use them.
unsafe impl Send for Wire {}

/// Forked children shall close the link's descriptors.
fn guards(link: &dyn Channel) -> Vec<Guarded> {
    let mut fds = Vec::new();
    link.fork_fds(&mut fds);
    // SAFETY: the link owns the descriptors and outlives this borrow.
    fds.into_iter().map(|fd| fork::guard(unsafe { BorrowedFd::borrow_raw(fd) })).collect()
}

fn control(kind: MessageKind, group: u32, sequence: u64, part: u32) -> Header {
    let descriptor = Descriptor { op: 0, dtype: 0, redop: 0, root: 0, count: 0 };
    Header { kind, group, sequence, part, descriptor, len: 0, extra: 0, checksum: None }
}

impl Wire {
    /// `links[r]` leads to rank r; whether through shared memory.
    pub(crate) fn new(
        rank: u32,
        group: u32,
        links: Vec<Option<(Box<dyn Channel>, bool)>>,
        now: Instant,
    ) -> Self {
        let peers = links
            .into_iter()
            .map(|link| {
                link.map(|(link, local)| Peer {
                    _guards: guards(&*link),
                    link,
                    local,
                    standing: Standing::Present,
                    sends: HashMap::new(),
                    recvs: HashMap::new(),
                    cleared: HashMap::new(),
                    kept: HashMap::new(),
                    kept_bytes: 0,
                    announced: HashMap::new(),
                    offered: HashMap::new(),
                    landing_p2p: HashMap::new(),
                    eager_unmatched: 0,
                    last_heard: now,
                    heard_bytes: 0,
                    here: None,
                    asked: None,
                    lost_at: None,
                    bye_seen: false,
                })
            })
            .collect();
        Self {
            rank,
            group,
            peers,
            in_flight: HashMap::new(),
            checksums: false,
            expected: HashMap::new(),
            next_token: 0,
            next_send_id: 0,
            issued: VecDeque::new(),
            posted_p2p: VecDeque::new(),
            unexpected_p2p: VecDeque::new(),
            events: Vec::new(),
            completions: Vec::new(),
            notice: None,
        }
    }

    /// Records what this rank issued as `sequence`; an error if a peer has said something else.
    pub(crate) fn issue(&mut self, sequence: u64, descriptor: Descriptor) -> Result<(), ReduceError> {
        if self.issued.len() == HISTORY {
            self.issued.pop_front();
        }
        self.issued.push_back((sequence, descriptor));
        for rank in 0..self.peers.len() {
            let Some(peer) = &mut self.peers[rank] else { continue };
            if let Some(theirs) = peer.announced.remove(&sequence) {
                self.compare(sequence, &descriptor, rank as u32, &theirs)?;
            }
            if self.peer(rank as u32).asked.is_some_and(|asked| asked <= sequence) {
                self.peer(rank as u32).asked = None;
                self.say_here(rank as u32, sequence);
            }
        }
        Ok(())
    }

    /// Compares both sides' operation at one place of the sequence.
    pub(crate) fn compare(
        &self,
        sequence: u64,
        mine: &Descriptor,
        peer: u32,
        theirs: &Descriptor,
    ) -> Result<(), ReduceError> {
        if mine == theirs {
            return Ok(());
        }
        Err(ReduceError::Mismatch {
            detail: format!(
                "ranks disagree about operation {sequence}: rank {} issued {mine}, rank {peer} issued {theirs}; \
                 all ranks must issue the same collectives in the same order",
                self.rank
            ),
        })
    }

    fn issued(&self, sequence: u64) -> Option<&Descriptor> {
        let &(newest, _) = self.issued.back()?;
        let back = newest.checked_sub(sequence)?;
        let index = self.issued.len().checked_sub(1 + usize::try_from(back).ok()?)?;
        self.issued.get(index).map(|(_, d)| d)
    }

    fn peer(&mut self, rank: u32) -> &mut Peer {
        self.peers[rank as usize].as_mut().expect("operations name only other ranks of the group")
    }

    fn post(&mut self, rank: u32, header: &Header, ptr: *const u8, len: usize, what: InFlight) {
        let token = self.next_token;
        self.next_token += 1;
        self.in_flight.insert((rank, token), what);
        let mut header = *header;
        if self.checksums && len > 0 {
            // SAFETY: ptr has len bytes, which nobody writes while the message is under way.
            header.checksum = Some(crc32c::crc32c(unsafe { std::slice::from_raw_parts(ptr, len) }));
        }
        let bytes = header.encode();
        let peer = self.peer(rank);
        // SAFETY: the memory is that of a submitted operation or of the InFlight entry, and stays
        // until the completion or until the link is dropped.
        if let Err(error) = unsafe { peer.link.post_send(token, &bytes, ptr, len) } {
            lose(peer, error);
        }
    }

    fn post_control(&mut self, rank: u32, header: Header) {
        self.post(rank, &header, std::ptr::null(), 0, InFlight::Nothing);
    }

    /// Sends a part of a collective.
    #[allow(clippy::too_many_arguments, reason = "they are the fields of one message")]
    pub(crate) fn send(
        &mut self,
        peer: u32,
        sequence: u64,
        part: u32,
        descriptor: Descriptor,
        extra: u64,
        ptr: *const u8,
        len: usize,
    ) {
        let kind = if len <= EAGER_BYTES {
            MessageKind::Eager
        } else if let Some(expected) = self.peer(peer).cleared.remove(&(sequence, part)) {
            if expected != len as u64 {
                let error = self.length_mismatch(sequence, peer, len as u64, expected);
                self.notice.get_or_insert(error);
                return;
            }
            MessageKind::Data
        } else {
            let pending = PendingSend { ptr, len, descriptor, extra };
            self.peer(peer).sends.insert((sequence, part), pending);
            return;
        };
        let len64 = len as u64;
        let header =
            Header { kind, group: self.group, sequence, part, descriptor, len: len64, extra, checksum: None };
        self.post(peer, &header, ptr, len, InFlight::Sent { sequence, part });
    }

    /// Posts memory for a part of a collective.
    pub(crate) fn recv(
        &mut self,
        peer: u32,
        sequence: u64,
        part: u32,
        descriptor: Descriptor,
        ptr: *mut u8,
        len: usize,
    ) {
        let entry = self.peer(peer);
        if let Some((data, extra)) = entry.kept.remove(&(sequence, part)) {
            entry.kept_bytes -= data.len();
            if data.len() != len {
                let error = self.length_mismatch(sequence, peer, data.len() as u64, len as u64);
                self.notice.get_or_insert(error);
                return;
            }
            if len > 0 {
                // SAFETY: ptr has len bytes by the operation's promise.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), ptr, len) };
            }
            self.events.push(Event::Received { sequence, peer, part, extra });
            return;
        }
        entry.recvs.insert((sequence, part), PostedRecv { ptr, len });
        if len > EAGER_BYTES {
            let header = Header {
                descriptor,
                len: len as u64,
                ..control(MessageKind::Clear, self.group, sequence, part)
            };
            self.post_control(peer, header);
        }
    }

    fn length_mismatch(&self, sequence: u64, peer: u32, sent: u64, wanted: u64) -> ReduceError {
        ReduceError::Mismatch {
            detail: format!(
                "rank {} and rank {peer} disagree about the size of a block in operation {sequence}: one side has \
                 {sent} bytes to send, the other expects {wanted}",
                self.rank
            ),
        }
    }

    /// Moves what can be moved. `Err` is a failure of the whole group; lost peers are a matter of
    /// [`Wire::standing`], because what they had sent before may still complete operations.
    pub(crate) fn progress(&mut self, now: Instant) -> Result<bool, ReduceError> {
        let mut moved = false;
        for rank in 0..self.peers.len() as u32 {
            moved |= self.progress_peer(rank, now)?;
        }
        // What a failing peer had sent before still counts: its notice waits until all is in.
        match self.notice.take_if(|_| !moved) {
            Some(error) => Err(error),
            None => Ok(moved),
        }
    }

    fn progress_peer(&mut self, rank: u32, now: Instant) -> Result<bool, ReduceError> {
        let mut moved = false;
        loop {
            let mut again = false;
            let Some(peer) = &mut self.peers[rank as usize] else { return Ok(false) };
            if matches!(peer.standing, Standing::Lost(_)) {
                return Ok(moved);
            }
            let mut completions = std::mem::take(&mut self.completions);
            match peer.link.progress(&mut completions) {
                Ok(any) => again |= any,
                Err(error) => lose(peer, error),
            }
            // Only what comes in is a sign of life: a stopped host's buffers still take what we send.
            let heard = peer.link.counters().bytes_received;
            if heard != peer.heard_bytes {
                (peer.heard_bytes, peer.last_heard) = (heard, now);
            }
            for completion in completions.drain(..) {
                self.complete(rank, completion)?;
            }
            self.completions = completions;
            let peer = self.peer(rank);
            if peer.kept_bytes <= UNEXPECTED_BYTES {
                match peer.link.peek() {
                    Ok(Some(incoming)) => {
                        again = true;
                        let header = Header::decode(&incoming.header);
                        let Some(header) = header.filter(|h| h.group == self.group) else {
                            return Err(ReduceError::protocol(format!(
                                "rank {rank} sent a message that is not one of this group and version"
                            )));
                        };
                        self.arrive(rank, header, incoming.len)?;
                    }
                    Ok(None) => {}
                    Err(error) => lose(peer, error),
                }
            }
            if !again {
                return Ok(moved);
            }
            moved = true;
        }
    }

    /// Decides where a message's payload lands.
    fn arrive(&mut self, rank: u32, header: Header, payload: usize) -> Result<(), ReduceError> {
        let key = (header.sequence, header.part);
        let carries = matches!(
            header.kind,
            MessageKind::Eager
                | MessageKind::Data
                | MessageKind::EagerP2p
                | MessageKind::DataP2p
                | MessageKind::Failed
        );
        let bounded = match header.kind {
            MessageKind::Eager | MessageKind::EagerP2p => payload <= EAGER_BYTES,
            MessageKind::Failed => payload <= NOTICE_BYTES,
            _ => true,
        };
        if !bounded || payload as u64 != if carries { header.len } else { 0 } {
            return Err(ReduceError::protocol(format!(
                "rank {rank} sent a {:?} message of {payload} bytes that announces {}",
                header.kind, header.len
            )));
        }
        if matches!(
            header.kind,
            MessageKind::Eager | MessageKind::Data | MessageKind::Clear | MessageKind::Probe
        ) {
            self.check(rank, &header)?;
        }
        let (what, ptr) = match header.kind {
            MessageKind::Eager | MessageKind::Data => match self.peer(rank).recvs.remove(&key) {
                Some(posted) if posted.len != payload => {
                    return Err(self.length_mismatch(
                        header.sequence,
                        rank,
                        payload as u64,
                        posted.len as u64,
                    ));
                }
                Some(posted) => (
                    InFlight::Received { sequence: header.sequence, part: header.part, extra: header.extra },
                    posted.ptr,
                ),
                None if header.kind == MessageKind::Eager => keep(header, payload),
                None => {
                    return Err(ReduceError::protocol(format!(
                        "rank {rank} sent data that nobody asked for"
                    )));
                }
            },
            MessageKind::EagerP2p => match self.find_posted(rank, header.part) {
                Some(posted) if posted.len == payload => {
                    self.taken(rank, header.sequence);
                    (InFlight::P2pReceived { id: posted.id }, posted.ptr)
                }
                Some(posted) => {
                    let message = UnexpectedP2p {
                        peer: rank,
                        tag: header.part,
                        send_id: header.sequence,
                        len: payload,
                        data: None,
                    };
                    self.match_p2p(posted, message);
                    return Ok(());
                }
                None => keep(header, payload),
            },
            MessageKind::DataP2p => match self.peer(rank).landing_p2p.remove(&header.sequence) {
                Some((id, place)) if place.len == payload => (InFlight::P2pReceived { id }, place.ptr),
                _ => {
                    return Err(ReduceError::protocol(format!(
                        "rank {rank} sent data that nobody asked for"
                    )));
                }
            },
            MessageKind::Failed => {
                let mut data = vec![0; payload];
                let ptr = data.as_mut_ptr();
                (InFlight::Notice { header, data }, ptr)
            }
            MessageKind::Clear => {
                match self.peer(rank).sends.remove(&key) {
                    Some(send) if send.len as u64 != header.len => {
                        return Err(self.length_mismatch(header.sequence, rank, send.len as u64, header.len));
                    }
                    Some(send) => {
                        let data = Header {
                            kind: MessageKind::Data,
                            descriptor: send.descriptor,
                            extra: send.extra,
                            ..header
                        };
                        let what = InFlight::Sent { sequence: header.sequence, part: header.part };
                        self.post(rank, &data, send.ptr, send.len, what);
                    }
                    None => {
                        self.peer(rank).cleared.insert(key, header.len);
                    }
                }
                (InFlight::Nothing, std::ptr::null_mut())
            }
            MessageKind::Offer => {
                let message = UnexpectedP2p {
                    peer: rank,
                    tag: header.part,
                    send_id: header.sequence,
                    len: usize::try_from(header.len).unwrap_or(usize::MAX),
                    data: None,
                };
                match self.find_posted(rank, header.part) {
                    Some(posted) => self.match_p2p(posted, message),
                    None => self.unexpected_p2p.push_back(message),
                }
                (InFlight::Nothing, std::ptr::null_mut())
            }
            MessageKind::ClearP2p => {
                let Some(send) = self.peer(rank).offered.remove(&header.sequence) else {
                    return Err(ReduceError::protocol(format!(
                        "rank {rank} asked for data that was not offered"
                    )));
                };
                let data = Header {
                    len: send.len as u64,
                    ..control(MessageKind::DataP2p, self.group, header.sequence, header.part)
                };
                self.post(rank, &data, send.ptr, send.len, InFlight::P2pSent { id: send.extra });
                (InFlight::Nothing, std::ptr::null_mut())
            }
            MessageKind::Taken => {
                let peer = self.peer(rank);
                peer.eager_unmatched = peer.eager_unmatched.saturating_sub(1);
                (InFlight::Nothing, std::ptr::null_mut())
            }
            MessageKind::Bye => {
                self.post_control(rank, control(MessageKind::ByeSeen, self.group, 0, 0));
                self.mark(rank, Standing::Left);
                (InFlight::Nothing, std::ptr::null_mut())
            }
            MessageKind::ByeSeen => {
                self.peer(rank).bye_seen = true;
                (InFlight::Nothing, std::ptr::null_mut())
            }
            MessageKind::Probe => {
                if self.issued.back().is_some_and(|(newest, _)| *newest >= header.sequence) {
                    self.say_here(rank, header.sequence);
                } else {
                    self.peer(rank).asked = Some(header.sequence);
                }
                (InFlight::Nothing, std::ptr::null_mut())
            }
            MessageKind::Here => {
                let now = Instant::now();
                self.peer(rank).here = Some((header.sequence, now));
                (InFlight::Nothing, std::ptr::null_mut())
            }
            MessageKind::Heartbeat => (InFlight::Nothing, std::ptr::null_mut()),
        };
        let token = self.next_token;
        self.next_token += 1;
        self.in_flight.insert((rank, token), what);
        if let Some(checksum) = header.checksum {
            self.expected.insert((rank, token), Expected { ptr, len: payload, checksum });
        }
        let peer = self.peer(rank);
        // SAFETY: ptr is memory of a submitted operation or of the InFlight entry (a Vec's heap
        // block, which does not move), with `payload` bytes; it stays until the completion or
        // until the link is dropped.
        if let Err(error) = unsafe { peer.link.post_recv(token, ptr, payload) } {
            lose(peer, error);
        }
        Ok(())
    }

    /// Compares a peer's operation with this rank's, now or when this rank gets there.
    fn check(&mut self, rank: u32, header: &Header) -> Result<(), ReduceError> {
        match self.issued(header.sequence) {
            Some(mine) => self.compare(header.sequence, mine, rank, &header.descriptor),
            None => {
                let newest = self.issued.back().map_or(0, |(s, _)| *s);
                if header.sequence > newest {
                    let peer = self.peer(rank);
                    if peer.announced.len() < HISTORY {
                        peer.announced.insert(header.sequence, header.descriptor);
                    }
                }
                Ok(())
            }
        }
    }

    fn complete(&mut self, rank: u32, completion: Completion) -> Result<(), ReduceError> {
        let (Completion::Sent { token } | Completion::Received { token }) = completion;
        let Some(what) = self.in_flight.remove(&(rank, token)) else { return Ok(()) };
        if let Some(expected) = self.expected.remove(&(rank, token)) {
            self.verify(rank, &expected)?;
        }
        match what {
            InFlight::Sent { sequence, part } => self.events.push(Event::Sent { sequence, part }),
            InFlight::P2pSent { id } => self.events.push(Event::P2pSent { id }),
            InFlight::Received { sequence, part, extra } => {
                self.events.push(Event::Received { sequence, peer: rank, part, extra });
            }
            InFlight::P2pReceived { id } => self.events.push(Event::P2pReceived { id, source: rank }),
            InFlight::Kept { header, data } if header.kind == MessageKind::EagerP2p => {
                let message = UnexpectedP2p {
                    peer: rank,
                    tag: header.part,
                    send_id: header.sequence,
                    len: data.len(),
                    data: Some(data),
                };
                // A receive may have been posted while the bytes came in.
                match self.find_posted(rank, header.part) {
                    Some(posted) => self.match_p2p(posted, message),
                    None => self.unexpected_p2p.push_back(message),
                }
            }
            InFlight::Kept { header, data } => {
                let key = (header.sequence, header.part);
                let peer = self.peer(rank);
                let posted = peer.recvs.remove(&key);
                peer.kept_bytes += data.len();
                peer.kept.insert(key, (data, header.extra));
                if let Some(posted) = posted {
                    self.recv(rank, key.0, key.1, header.descriptor, posted.ptr, posted.len);
                }
            }
            InFlight::Notice { header, data } => {
                let text = String::from_utf8_lossy(&data);
                let error =
                    ReduceError::from_notice(header.extra as u32, (header.extra >> 32) as u32, rank, &text);
                self.notice.get_or_insert(error);
            }
            InFlight::Control { .. } | InFlight::Nothing => {}
        }
        Ok(())
    }

    /// Compares what has arrived with what was sent.
    fn verify(&self, rank: u32, expected: &Expected) -> Result<(), ReduceError> {
        // SAFETY: memory of a submitted operation or of an InFlight entry, as posted, fully received.
        let bytes = unsafe { std::slice::from_raw_parts(expected.ptr, expected.len) };
        let got = crc32c::crc32c(bytes);
        if got == expected.checksum {
            return Ok(());
        }
        Err(ReduceError::protocol(format!(
            "{} bytes from rank {rank} arrived at rank {} damaged (checksum {got:08x}, sent {:08x}): memory, a network \
             card or a cable on the way corrupts data; check both hosts before you go on",
            expected.len, self.rank, expected.checksum
        )))
    }

    /// Peers that have not taken or not sent their part of a collective.
    pub(crate) fn waiting_for(&self, sequence: u64) -> Vec<u32> {
        let under_way = |rank: u32| {
            self.in_flight.iter().any(|((r, _), what)| {
                *r == rank
                    && match what {
                        InFlight::Sent { sequence: s, .. } | InFlight::Received { sequence: s, .. } => {
                            *s == sequence
                        }
                        _ => false,
                    }
            })
        };
        (0..self.peers.len() as u32)
            .filter(|&rank| {
                self.peers[rank as usize].as_ref().is_some_and(|p| {
                    p.recvs.keys().any(|k| k.0 == sequence)
                        || p.sends.keys().any(|k| k.0 == sequence)
                        || under_way(rank)
                })
            })
            .collect()
    }

    /// What happened since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }
}

fn keep(header: Header, payload: usize) -> (InFlight, *mut u8) {
    let mut data = vec![0; payload];
    let ptr = data.as_mut_ptr();
    (InFlight::Kept { header, data }, ptr)
}

#[cfg(test)]
mod tests;
