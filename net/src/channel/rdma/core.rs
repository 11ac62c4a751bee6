//! The RDMA channel without its device: what is written where, and when.
//!
//! ```text
//!   sender                                       receiver
//!   messages ──copy──> stage ──WRITE+imm──>  ring ──copy──> posted memory      (through the ring)
//!            <──────────── credit (imm, notes) ─────
//!   offer    ──────────────────WRITE+imm──>  ring                              (straight)
//!            <───────── note: clear(address, key) ──
//!   region   ──────────────────WRITE+imm──────────────────> region             no copy
//!   other    ──copy──> stage ──WRITE+imm──────────────────> region             one copy
//! ```
//!
//! The stream of the ring is wire headers and payloads, one after the other, cut into pieces where
//! the ring or the stage ends. Payloads of [`OFFER_BYTES`] and more are offered by their header
//! alone. The receiver answers once memory is posted: "write it here" if that memory lies in a
//! registered region, else "through the ring". While an offer is unanswered or its payload is still
//! to go through the ring, only headers without a payload may follow it in the stream, at most
//! [`AHEAD`] of them; the receiver reads as far ahead. So a payload that a posted receive waits for
//! is never behind one that nobody has posted memory for, offers overlap, and what is kept is
//! bounded.
//!
//! Everything that comes from the peer is copied once and checked. A peer that lies can spoil what
//! it sends and end the channel, no more.

use super::super::wire::{MAX_LEN, Place, WIRE_HEADER, WireHeader};
use super::super::{ChannelError, Completion, HEADER_BYTES, Incoming, pop_if};
use super::credit::{Credit, Inward, Outward};
use super::note::{NOTE_BYTES, Note};
use std::collections::VecDeque;

/// Payloads of this size and more are offered: the round trip then costs less than the copies.
pub(super) const OFFER_BYTES: usize = 32 << 10;
/// Headers that may follow an offer whose payload is not settled.
pub(super) const AHEAD: u64 = 16;
/// Largest WRITE: notes wait behind it, so not the whole of a large tensor.
const DIRECT_CHUNK: usize = 16 << 20;
/// Work whose completion is not asked for, at most, so that the stage and the queue come free.
const UNSIGNALED: usize = 8;

/// What both sides tell each other about their receiving half.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    /// Bytes of the ring.
    pub(super) ring: usize,
    /// Receives posted.
    pub(super) receives: usize,
}

/// Whose key names the local memory of a [`Work`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Key {
    Stage,
    Region(u32),
}

/// Where a [`Work`] goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum To {
    /// A SEND: a note.
    Note,
    /// A WRITE with immediate, `at` bytes into the peer's ring.
    Ring { at: usize, imm: u32 },
    /// A WRITE to the peer's memory; with immediate if it is a payload's end.
    Memory { address: u64, key: u32, imm: Option<u32> },
}

/// One work request. Requests are carried out in the order given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Work {
    /// Counts up from 0; [`Core::completed`] takes it.
    pub(super) id: u64,
    pub(super) from: *const u8,
    pub(super) len: usize,
    pub(super) key: Key,
    pub(super) to: To,
    /// Whether a completion is wanted.
    pub(super) signaled: bool,
}

/// What this side did with payload bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct Moved {
    pub(super) sent: u64,
    pub(super) received: u64,
    /// Payload bytes copied in user space, in and out together.
    pub(super) copied: u64,
}

enum Stage {
    Queued,
    /// Its header is in the stream.
    Offered {
        offer: u64,
        record: u64,
    },
    /// The peer has said where it goes.
    Direct {
        address: u64,
        key: u32,
        done: usize,
    },
    /// The peer wants it through the ring.
    Late {
        record: u64,
    },
    Streaming,
    /// Done when this work is.
    Posted {
        id: u64,
    },
    Done,
}

struct Send {
    token: u64,
    header: [u8; HEADER_BYTES],
    ptr: *const u8,
    len: usize,
    key: Option<u32>,
    stage: Stage,
}

/// The record that is being put into the stream: a wire header and what of its payload follows.
struct Streaming {
    number: u64,
    wire: [u8; WIRE_HEADER],
    payload: *const u8,
    /// Payload bytes that go through the stream: none for an offer.
    len: usize,
    /// The device takes the payload from this region, where it lies.
    region: Option<u32>,
    done: usize,
}

impl Streaming {
    fn left(&self) -> usize {
        WIRE_HEADER + self.len - self.done
    }

    fn in_payload(&self) -> bool {
        self.done >= WIRE_HEADER
    }

    /// The next bytes that lie in one stretch.
    fn stretch(&self) -> (*const u8, usize) {
        if self.in_payload() {
            // SAFETY: done - WIRE_HEADER <= len, within the posted memory.
            (unsafe { self.payload.add(self.done - WIRE_HEADER) }, self.left())
        } else {
            (self.wire[self.done..].as_ptr(), WIRE_HEADER - self.done)
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Landing {
    /// Follows its header in the stream.
    Stream,
    Direct,
    /// Comes as a late payload.
    Late,
    Done,
}

struct Recv {
    token: u64,
    ptr: *mut u8,
    len: usize,
    landing: Landing,
}

struct Head {
    incoming: Incoming,
    /// Which offer it is; `None`: the payload follows.
    offer: Option<u64>,
}

struct Flight {
    id: u64,
    stage: usize,
}

/// A bug planted on purpose, to see that the tests find it.
#[cfg(test)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Bug {
    /// Gives back a unit more than was read.
    CreditTooMuch,
    /// Forgets that the ring ends.
    WriteAcrossTheEnd,
    /// Reads on past the ring's end from the wrong place.
    ReadAcrossTheEnd,
    /// Reuses the stage before the device is done with it.
    StageTooEarly,
    /// Reports a payload sent from its own memory as soon as it is posted.
    SentTooEarly,
    /// Spends the last receive on a payload.
    LastReceive,
    /// Lets payloads follow unsettled offers.
    PayloadPastOffer,
    /// Lets any number of headers follow an unsettled offer.
    AnyNumberAhead,
    /// Gives no credit unless it has something else to say.
    NoCreditNotes,
    /// Reports receives as they land, not in order.
    OutOfOrder,
    /// Does not check what comes into the ring against its size.
    UncheckedPiece,
    /// Does not compare a late payload's length with the posted memory's.
    UncheckedLate,
}

/// See the module.
pub(super) struct Core {
    ring: *const u8,
    ring_len: usize,
    stage: *mut u8,
    stage_len: usize,
    /// Work in flight at most.
    depth: usize,
    /// [`OFFER_BYTES`]; tests take less.
    pub(super) offer_bytes: usize,

    out: Outward,
    sends: VecDeque<Send>,
    /// Number of the first of `sends`.
    first_send: u64,
    /// Number of the first send that is not in the stream yet.
    next_stream: u64,
    streaming: Option<Streaming>,
    /// Numbers of sends whose offer is not settled, in order.
    offers: VecDeque<u64>,
    offers_made: u64,
    offers_answered: u64,
    records: u64,
    stage_head: u64,
    stage_done: u64,
    next_id: u64,
    last_signaled: Option<u64>,
    unsignaled: usize,
    unsignaled_stage: usize,
    flights: VecDeque<Flight>,

    inn: Inward,
    heads: VecDeque<Head>,
    recvs: VecDeque<Recv>,
    first_recv: u64,
    /// Receive that the stream's next bytes belong to, and how many.
    body: Option<(u64, usize)>,
    offers_seen: u64,
    answers: VecDeque<Note>,
    probed: bool,

    moved: Moved,
    #[cfg(test)]
    pub(super) bug: Option<Bug>,
}

impl Core {
    /// `ring` is written by the peer's device, `stage` read by ours.
    ///
    /// # Safety
    /// Both must stay valid as long as the core is used: `ring` for `mine.ring` bytes, `stage` for
    /// `stage_len`, of which nobody else reads or writes anything but the device.
    pub(super) unsafe fn new(
        (ring, mine): (*const u8, Shape),
        (stage, stage_len): (*mut u8, usize),
        peer: Shape,
        depth: usize,
    ) -> Core {
        Core {
            ring,
            ring_len: mine.ring,
            stage,
            stage_len,
            depth,
            offer_bytes: OFFER_BYTES,
            out: Outward::new(peer.ring, peer.receives),
            sends: VecDeque::new(),
            first_send: 0,
            next_stream: 0,
            streaming: None,
            offers: VecDeque::new(),
            offers_made: 0,
            offers_answered: 0,
            records: 0,
            stage_head: 0,
            stage_done: 0,
            next_id: 0,
            last_signaled: None,
            unsignaled: 0,
            unsignaled_stage: 0,
            flights: VecDeque::new(),
            inn: Inward::new(mine.ring, mine.receives),
            heads: VecDeque::new(),
            recvs: VecDeque::new(),
            first_recv: 0,
            body: None,
            offers_seen: 0,
            answers: VecDeque::new(),
            probed: false,
            moved: Moved::default(),
            #[cfg(test)]
            bug: None,
        }
    }

    #[cfg(test)]
    fn has(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    // --- the caller's side -----------------------------------------------------------------------

    /// Queues a message; `key` is the local key of a region that holds all of the payload.
    pub(super) fn post_send(
        &mut self,
        token: u64,
        header: &[u8; HEADER_BYTES],
        (ptr, len): (*const u8, usize),
        key: Option<u32>,
    ) -> Result<(), ChannelError> {
        if len as u64 > MAX_LEN {
            return Err(ChannelError::Misuse("a message is longer than a channel takes"));
        }
        self.sends.push_back(Send { token, header: *header, ptr, len, key, stage: Stage::Queued });
        Ok(())
    }

    /// The next message whose payload has no place yet.
    pub(super) fn peek(&self) -> Option<Incoming> {
        self.heads.front().map(|h| h.incoming)
    }

    /// Gives the peeked message its place; `key` is the remote key of a region that holds all of
    /// it.
    pub(super) fn post_recv(
        &mut self,
        token: u64,
        (ptr, len): (*mut u8, usize),
        key: Option<u32>,
    ) -> Result<(), ChannelError> {
        let Some(head) = pop_if(&mut self.heads, |h| h.incoming.len == len) else {
            return Err(ChannelError::Misuse(match self.heads.front() {
                None => "post_recv without a peeked message",
                Some(_) => "post_recv with another length than the peeked message's",
            }));
        };
        let landing = match (head.offer, key) {
            (None, _) if len == 0 => Landing::Done,
            (None, _) => {
                // Reading stopped behind its header, so the stream's next bytes are its.
                self.body = Some((self.first_recv + self.recvs.len() as u64, len));
                Landing::Stream
            }
            (Some(offer), Some(key)) => {
                self.answers.push_back(Note::Clear { offer, address: ptr as u64, key, len: len as u64 });
                Landing::Direct
            }
            (Some(offer), None) => {
                self.answers.push_back(Note::Ring { offer });
                Landing::Late
            }
        };
        self.recvs.push_back(Recv { token, ptr, len, landing });
        Ok(())
    }

    /// Asks the peer whether it hears this side.
    pub(super) fn probe(&mut self) {
        self.answers.push_back(Note::Probe);
    }

    /// Whether the peer has asked.
    pub(super) fn probed(&self) -> bool {
        self.probed
    }

    /// Reports what is done, in the order posted; whether anything was.
    pub(super) fn take_completions(&mut self, out: &mut Vec<Completion>) -> bool {
        let before = out.len();
        while let Some(send) = pop_if(&mut self.sends, |s| matches!(s.stage, Stage::Done)) {
            self.first_send += 1;
            out.push(Completion::Sent { token: send.token });
        }
        #[cfg(test)]
        if self.has(Bug::OutOfOrder)
            && let Some(at) = self.recvs.iter().position(|r| r.landing == Landing::Done)
            && at > 0
        {
            self.recvs.swap(0, at);
        }
        while let Some(recv) = pop_if(&mut self.recvs, |r| r.landing == Landing::Done) {
            self.first_recv += 1;
            out.push(Completion::Received { token: recv.token });
        }
        out.len() > before
    }

    /// Whether the caller can get nothing more if nothing more comes: receives are reported in
    /// order, so one that waits holds up those after it.
    pub(super) fn nothing_to_take(&self) -> bool {
        self.heads.is_empty() || !self.recvs.is_empty()
    }

    /// Whether it matters that a payload of `len` bytes lies in a region.
    pub(super) fn wants_region(&self, len: usize) -> bool {
        len >= self.offer_bytes
    }

    /// Whether work whose end will be reported is still under way.
    pub(super) fn unacknowledged(&self) -> bool {
        match (self.flights.front(), self.last_signaled) {
            (Some(first), Some(last)) => first.id <= last,
            _ => false,
        }
    }

    pub(super) fn moved(&self) -> Moved {
        self.moved
    }

    // --- what the device reports -----------------------------------------------------------------

    /// Work `id`, and with it all before it, is done: the device no longer reads its memory.
    pub(super) fn completed(&mut self, id: u64) {
        while let Some(flight) = pop_if(&mut self.flights, |f| f.id <= id) {
            self.stage_done += flight.stage as u64;
        }
        for send in &mut self.sends {
            match send.stage {
                Stage::Posted { id: last } if last <= id => send.stage = Stage::Done,
                Stage::Queued => break,
                _ => {}
            }
        }
    }

    /// A WRITE with immediate of `len` bytes has arrived.
    pub(super) fn piece_arrived(&mut self, len: usize, imm: u32) -> Result<(), ChannelError> {
        let credit = Credit::decode(imm);
        if credit.direct {
            self.inn.other_piece();
            let recv = self.recvs.iter_mut().find(|r| r.landing == Landing::Direct);
            let Some(recv) = recv.filter(|r| len <= r.len) else {
                return Err(ChannelError::Protocol(format!(
                    "the end of a payload ({len} bytes) that no posted memory waits for"
                )));
            };
            recv.landing = Landing::Done;
            self.moved.received += recv.len as u64;
        } else {
            #[cfg(test)]
            if self.has(Bug::UncheckedPiece) {
                self.inn.other_piece();
                self.inn.head += len as u64;
                return self.out.returned(credit).and_then(|()| self.read_stream());
            }
            self.inn.ring_piece(len)?;
            self.moved.received += len as u64;
        }
        self.out.returned(credit)?;
        self.read_stream()
    }

    /// A SEND has arrived.
    pub(super) fn note_arrived(&mut self, bytes: &[u8]) -> Result<(), ChannelError> {
        self.inn.other_piece();
        let (note, credit) = Note::decode(bytes)?;
        self.moved.received += NOTE_BYTES as u64;
        self.out.returned(credit)?;
        match note {
            Note::Credit => Ok(()),
            Note::Probe => {
                self.probed = true;
                Ok(())
            }
            Note::Clear { offer, address, key, len } => {
                let send = self.answered(offer)?;
                if len != send.len as u64 {
                    return Err(ChannelError::Protocol(format!(
                        "the peer has {len} bytes for an offer of {}",
                        send.len
                    )));
                }
                send.stage = Stage::Direct { address, key, done: 0 };
                Ok(())
            }
            Note::Ring { offer } => {
                let send = self.answered(offer)?;
                if let Stage::Offered { record, .. } = send.stage {
                    send.stage = Stage::Late { record };
                }
                Ok(())
            }
        }
    }

    /// The send whose offer is answered: answers come in the order of the offers.
    fn answered(&mut self, answer: u64) -> Result<&mut Send, ChannelError> {
        let first = self.first_send;
        let number = self.offers.iter().copied().find(|n| {
            let stage = &self.sends[(n - first) as usize].stage;
            matches!(stage, Stage::Offered { offer, .. } if *offer == self.offers_answered)
        });
        match number {
            Some(number) if answer == self.offers_answered => {
                self.offers_answered += 1;
                Ok(&mut self.sends[(number - first) as usize])
            }
            _ => Err(ChannelError::Protocol(format!(
                "the peer answers offer {answer}; {} of {} were answered",
                self.offers_answered, self.offers_made
            ))),
        }
    }

    // --- the incoming stream ---------------------------------------------------------------------

    /// Copies the next `len` bytes of the ring to `to`; they are there.
    fn take(&mut self, to: *mut u8, len: usize) {
        let at = (self.inn.tail % self.ring_len as u64) as usize;
        let first = len.min(self.ring_len - at);
        #[cfg(test)]
        let wrong = usize::from(self.has(Bug::ReadAcrossTheEnd) && len > first);
        #[cfg(not(test))]
        let wrong = 0;
        // SAFETY: at + first <= ring_len and len <= ring_len, because no more is available; `to`
        // has room for len by its caller. The device writes no byte that is not read yet, because
        // room is only given back by `tell` after this.
        unsafe {
            std::ptr::copy_nonoverlapping(self.ring.add(at), to, first);
            std::ptr::copy_nonoverlapping(self.ring.add(wrong), to.add(first), len - first);
        }
        self.inn.tail += len as u64;
    }

    /// Moves what has come: bodies to their places, headers to the queue of those to be peeked.
    pub(super) fn read_stream(&mut self) -> Result<(), ChannelError> {
        loop {
            let available = self.inn.available();
            if let Some((number, left)) = self.body {
                let n = left.min(available).min(self.ring_len);
                if n == 0 {
                    return Ok(());
                }
                let recv = &mut self.recvs[(number - self.first_recv) as usize];
                // SAFETY: len - left bytes of the posted memory are filled, so n <= left more fit.
                let to = unsafe { recv.ptr.add(recv.len - left) };
                if n == left {
                    recv.landing = Landing::Done;
                }
                self.take(to, n);
                self.moved.copied += n as u64;
                self.body = (left > n).then_some((number, left - n));
                continue;
            }
            let payload_waits = self.heads.back().is_some_and(|h| h.offer.is_none() && h.incoming.len > 0);
            if payload_waits || self.heads.len() as u64 > AHEAD || available < WIRE_HEADER {
                return Ok(());
            }
            let mut wire = [0; WIRE_HEADER];
            self.take(wire.as_mut_ptr(), WIRE_HEADER);
            let WireHeader { place, len, header } =
                WireHeader::decode(&wire, &[Place::Follows, Place::Offered, Place::Late])?;
            let incoming = Incoming { header, len };
            match place {
                Place::Late => {
                    let at = self.recvs.iter().position(|r| r.landing == Landing::Late);
                    #[cfg(test)]
                    let unchecked = self.has(Bug::UncheckedLate);
                    #[cfg(not(test))]
                    let unchecked = false;
                    let Some(at) = at.filter(|at| self.recvs[*at].len == len || unchecked) else {
                        return Err(ChannelError::Protocol(format!(
                            "a late payload of {len} bytes that no posted memory waits for"
                        )));
                    };
                    self.recvs[at].landing = Landing::Stream;
                    let len = if unchecked { len.min(self.recvs[at].len) } else { len };
                    self.body = Some((self.first_recv + at as u64, len));
                }
                Place::Offered => {
                    if len == 0 {
                        return Err(ChannelError::Protocol("an offer of nothing".into()));
                    }
                    self.heads.push_back(Head { incoming, offer: Some(self.offers_seen) });
                    self.offers_seen += 1;
                }
                Place::Follows | Place::Striped => {
                    let unsettled = self.heads.iter().any(|h| h.offer.is_some())
                        || self.recvs.iter().any(|r| r.landing == Landing::Late);
                    if len > 0 && unsettled {
                        return Err(ChannelError::Protocol(
                            "a payload in the stream behind an offer that is not settled".into(),
                        ));
                    }
                    self.heads.push_back(Head { incoming, offer: None });
                }
            }
        }
    }

    // --- what to send ----------------------------------------------------------------------------

    /// The next work request to post now, if there is one.
    pub(super) fn next(&mut self) -> Option<Work> {
        if self.flights.len() >= self.depth {
            return None;
        }
        if let Some(work) = self.next_note() {
            return Some(work);
        }
        self.next_direct().or_else(|| self.next_piece())
    }

    /// Bytes of the stage that can be filled in one stretch.
    fn stage_room(&self) -> usize {
        let at = (self.stage_head % self.stage_len as u64) as usize;
        let free = self.stage_len - (self.stage_head - self.stage_done) as usize;
        free.min(self.stage_len - at)
    }

    fn stage_at(&self) -> *mut u8 {
        // SAFETY: the remainder is below stage_len.
        unsafe { self.stage.add((self.stage_head % self.stage_len as u64) as usize) }
    }

    /// Copies to the stage behind what is filled already; the room was checked.
    fn fill(&mut self, filled: usize, from: *const u8, len: usize) {
        // SAFETY: filled + len is within `stage_room`, which the device is done with; `from` is
        // posted memory or a header of ours.
        unsafe { std::ptr::copy_nonoverlapping(from, self.stage_at().add(filled), len) };
    }

    fn post(&mut self, from: *const u8, len: usize, key: Key, to: To, want: bool) -> Work {
        let id = self.next_id;
        self.next_id += 1;
        let stage = if key == Key::Stage { len } else { 0 };
        self.stage_head += stage as u64;
        self.unsignaled += 1;
        self.unsignaled_stage += stage;
        let signaled = want
            || self.unsignaled >= UNSIGNALED.min(self.depth)
            || self.unsignaled_stage >= self.stage_len / 4;
        if signaled {
            (self.unsignaled, self.unsignaled_stage) = (0, 0);
            self.last_signaled = Some(id);
        }
        self.flights.push_back(Flight { id, stage });
        #[cfg(test)]
        if self.has(Bug::StageTooEarly) {
            self.stage_done = self.stage_head;
            self.flights.back_mut().expect("just pushed").stage = 0;
        }
        self.moved.sent += len as u64;
        Work { id, from, len, key, to, signaled }
    }

    fn tell(&mut self, direct: bool) -> Credit {
        #[cfg(test)]
        if self.has(Bug::CreditTooMuch) && self.inn.tail % 7 == 3 && self.inn.available() > 64 {
            let tail = self.inn.tail;
            self.inn.tail += 64;
            let credit = self.inn.tell(direct);
            self.inn.tail = tail;
            return credit;
        }
        self.inn.tell(direct)
    }

    fn may_send_payload(&self) -> bool {
        #[cfg(test)]
        if self.has(Bug::LastReceive) {
            return self.out.may_send(true);
        }
        self.out.may_send(false)
    }

    fn next_note(&mut self) -> Option<Work> {
        let answer = !self.answers.is_empty() && self.may_send_payload();
        let credit = self.inn.due() && self.out.may_send(self.inn.owes_pieces());
        #[cfg(test)]
        let credit = credit && !self.has(Bug::NoCreditNotes);
        if !(answer || credit) || !self.contiguous_stage(NOTE_BYTES) {
            return None;
        }
        let note = if answer { self.answers.pop_front()? } else { Note::Credit };
        let bytes = note.encode(self.tell(false));
        self.fill(0, bytes.as_ptr(), NOTE_BYTES);
        self.out.sent(0);
        let from = self.stage_at();
        Some(self.post(from, NOTE_BYTES, Key::Stage, To::Note, note == Note::Probe))
    }

    /// Whether the stage has `need` free bytes in one stretch; leaves out its end if that is too
    /// short for them.
    fn contiguous_stage(&mut self, need: usize) -> bool {
        let end = self.stage_len - (self.stage_head % self.stage_len as u64) as usize;
        let free = self.stage_len - (self.stage_head - self.stage_done) as usize;
        if end < need && free >= end + need {
            self.stage_head += end as u64;
            match self.flights.back_mut() {
                Some(last) => last.stage += end,
                None => self.stage_done += end as u64,
            }
        }
        self.stage_room() >= need
    }

    fn send_mut(&mut self, number: u64) -> &mut Send {
        &mut self.sends[(number - self.first_send) as usize]
    }

    /// The next part of a payload whose place the peer has named.
    fn next_direct(&mut self) -> Option<Work> {
        let first = self.first_send;
        let (at, number) = self
            .offers
            .iter()
            .copied()
            .enumerate()
            .find(|(_, n)| matches!(self.sends[(n - first) as usize].stage, Stage::Direct { .. }))?;
        let Send { ptr, len, key, ref stage, .. } = *self.send_mut(number);
        let Stage::Direct { address, key: remote, done } = *stage else { return None };
        let left = len - done;
        let n = match key {
            Some(_) => left.min(DIRECT_CHUNK),
            None => left.min(self.stage_room()).min(self.stage_len / 4),
        };
        let end = n == left;
        if n == 0 || (end && !self.may_send_payload()) {
            return None;
        }
        // SAFETY: done < len, within the posted memory.
        let from = unsafe { ptr.add(done) };
        let imm = end.then(|| self.tell(true).encode());
        if end {
            self.out.sent(0);
            self.offers.remove(at);
        }
        let to = To::Memory { address: address + done as u64, key: remote, imm };
        let work = match key {
            Some(key) => self.post(from, n, Key::Region(key), to, end),
            None => {
                self.fill(0, from, n);
                self.moved.copied += n as u64;
                let staged = self.stage_at();
                self.post(staged, n, Key::Stage, to, false)
            }
        };
        self.send_mut(number).stage = match (end, key) {
            (false, _) => Stage::Direct { address, key: remote, done: done + n },
            (true, Some(_)) => self.posted(work.id),
            (true, None) => Stage::Done,
        };
        Some(work)
    }

    fn posted(&self, id: u64) -> Stage {
        #[cfg(test)]
        if self.has(Bug::SentTooEarly) {
            return Stage::Done;
        }
        Stage::Posted { id }
    }

    /// What goes into the stream next, unless an unsettled offer forbids it.
    fn next_record(&mut self) -> Option<Streaming> {
        let first = self.first_send;
        let late = |n: &u64| matches!(self.sends[(n - first) as usize].stage, Stage::Late { .. });
        if let Some(number) = self.offers.iter().position(late).and_then(|at| self.offers.remove(at)) {
            let send = self.send_mut(number);
            send.stage = Stage::Streaming;
            let wire = WireHeader { place: Place::Late, len: send.len, header: [0; HEADER_BYTES] }.encode();
            let (payload, len, region) = (send.ptr, send.len, send.key);
            return Some(Streaming { number, wire, payload, len, region, done: 0 });
        }
        let number = self.next_stream;
        let unsettled = self.offers.iter().find_map(|n| match self.sends[(n - first) as usize].stage {
            Stage::Offered { record, .. } | Stage::Late { record } => Some(record),
            _ => None,
        });
        let send = self.sends.get((number - first) as usize)?;
        let offer = send.len >= self.offer_bytes;
        if let Some(unsettled) = unsettled {
            let payload_follows = !offer && send.len > 0;
            let far_ahead = self.records - unsettled > AHEAD;
            #[cfg(test)]
            let (payload_follows, far_ahead) = (
                payload_follows && !self.has(Bug::PayloadPastOffer),
                far_ahead && !self.has(Bug::AnyNumberAhead),
            );
            if payload_follows || far_ahead {
                return None;
            }
        }
        let place = if offer { Place::Offered } else { Place::Follows };
        let wire = WireHeader { place, len: send.len, header: send.header }.encode();
        let (payload, len) = (send.ptr, if offer { 0 } else { send.len });
        let stage = match offer {
            true => Stage::Offered { offer: self.offers_made, record: self.records },
            false => Stage::Streaming,
        };
        if offer {
            self.offers.push_back(number);
            self.offers_made += 1;
        }
        self.send_mut(number).stage = stage;
        self.records += 1;
        self.next_stream += 1;
        Some(Streaming { number, wire, payload, len, region: None, done: 0 })
    }

    /// The next piece of the stream: as many records as fit.
    fn next_piece(&mut self) -> Option<Work> {
        if !self.may_send_payload() {
            return None;
        }
        let mut record = match self.streaming.take() {
            Some(record) => record,
            None => self.next_record()?,
        };
        let (at, to_end) = self.out.place();
        #[cfg(test)]
        let to_end = if self.has(Bug::WriteAcrossTheEnd) { to_end + 1 } else { to_end };
        let room = self.out.room();
        // No crumbs. A small room grows: what the peer then owes is over its mark.
        if room < record.left().min(self.out.ring() / 8) {
            self.streaming = Some(record);
            return None;
        }
        let limit = room.min(to_end);
        if let (Some(key), true) = (record.region, record.in_payload()) {
            let (from, left) = record.stretch();
            let n = left.min(limit);
            record.done += n;
            let end = n == left;
            let work = self.post_piece(from, n, Key::Region(key), at, end);
            if end {
                let stage = self.posted(work.id);
                self.send_mut(record.number).stage = stage;
            } else {
                self.streaming = Some(record);
            }
            return Some(work);
        }
        let limit = limit.min(self.stage_room()).min(self.stage_len / 4);
        let mut filled = 0;
        let mut current = Some(record);
        while filled < limit {
            let Some(record) = &mut current else {
                current = self.next_record();
                if current.is_none() {
                    break;
                }
                continue;
            };
            if record.region.is_some() && record.in_payload() {
                break;
            }
            let (from, left) = record.stretch();
            let n = left.min(limit - filled);
            self.fill(filled, from, n);
            if record.in_payload() {
                self.moved.copied += n as u64;
            }
            filled += n;
            record.done += n;
            if record.left() == 0 {
                let send = self.send_mut(record.number);
                if matches!(send.stage, Stage::Streaming) {
                    send.stage = Stage::Done;
                }
                current = None;
            }
        }
        self.streaming = current;
        if filled == 0 {
            return None;
        }
        let idle = self.streaming.is_none() && self.next_stream == self.first_send + self.sends.len() as u64;
        let from = self.stage_at();
        Some(self.post_piece(from, filled, Key::Stage, at, idle))
    }

    fn post_piece(&mut self, from: *const u8, len: usize, key: Key, at: usize, want: bool) -> Work {
        let imm = self.tell(false).encode();
        self.out.sent(len);
        self.post(from, len, key, To::Ring { at, imm }, want)
    }
}
