//! Point-to-point messages: matched by (sender, tag) in issue order, apart from collectives.

use super::{Event, InFlight, PendingSend, PostedRecv, Wire, control};
use crate::ReduceError;
use crate::header::{Header, MessageKind};
use crate::wire::EAGER_BYTES;

/// Eager point-to-point messages to one peer that may wait for their receives.
pub(super) const EAGER_CREDIT: u32 = 64;

/// A receive that nothing has matched yet.
pub(super) struct PostedP2p {
    pub(super) id: u64,
    pub(super) peer: Option<u32>,
    pub(super) tag: u32,
    pub(super) ptr: *mut u8,
    pub(super) len: usize,
}

/// A message that no receive has matched yet.
pub(super) struct UnexpectedP2p {
    pub(super) peer: u32,
    pub(super) tag: u32,
    pub(super) send_id: u64,
    pub(super) len: usize,
    /// The bytes of an eager message; `None`: an offer.
    pub(super) data: Option<Vec<u8>>,
}

impl Wire {
    /// Starts a point-to-point send.
    pub(crate) fn send_p2p(&mut self, id: u64, peer: u32, tag: u32, ptr: *const u8, len: usize) {
        let send_id = self.next_send_id;
        self.next_send_id += 1;
        let eager = len <= EAGER_BYTES && self.peer(peer).eager_unmatched < EAGER_CREDIT;
        let kind = if eager { MessageKind::EagerP2p } else { MessageKind::Offer };
        let header = Header { len: len as u64, ..control(kind, self.group, send_id, tag) };
        if eager {
            self.peer(peer).eager_unmatched += 1;
            self.post(peer, &header, ptr, len, InFlight::P2pSent { id });
        } else {
            let pending = PendingSend { ptr, len, descriptor: header.descriptor, extra: id };
            self.peer(peer).offered.insert(send_id, pending);
            self.post_control(peer, header);
        }
    }

    /// Posts memory for a point-to-point message from `peer`, or from anyone.
    pub(crate) fn recv_p2p(&mut self, id: u64, peer: Option<u32>, tag: u32, ptr: *mut u8, len: usize) {
        let found = self
            .unexpected_p2p
            .iter()
            .position(|m| m.tag == tag && peer.is_none_or(|wanted| wanted == m.peer));
        let posted = PostedP2p { id, peer, tag, ptr, len };
        match found.and_then(|i| self.unexpected_p2p.remove(i)) {
            Some(message) => self.match_p2p(posted, message),
            None => self.posted_p2p.push_back(posted),
        }
    }

    /// Takes back a receive that nothing has matched yet; false if it is under way.
    pub(crate) fn cancel_p2p(&mut self, id: u64) -> bool {
        let before = self.posted_p2p.len();
        self.posted_p2p.retain(|posted| posted.id != id);
        self.posted_p2p.len() != before
    }

    pub(super) fn match_p2p(&mut self, posted: PostedP2p, message: UnexpectedP2p) {
        if posted.len != message.len {
            self.notice.get_or_insert(ReduceError::Mismatch {
                detail: format!(
                    "rank {} receives {} bytes with tag {} from rank {}, which sent {}",
                    self.rank, posted.len, posted.tag, message.peer, message.len
                ),
            });
            return;
        }
        match message.data {
            Some(data) => {
                if posted.len > 0 {
                    // SAFETY: ptr has len bytes by the operation's promise.
                    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), posted.ptr, posted.len) };
                }
                self.taken(message.peer, message.send_id);
                self.events.push(Event::P2pReceived { id: posted.id, source: message.peer });
            }
            None => {
                let place = PostedRecv { ptr: posted.ptr, len: posted.len };
                self.peer(message.peer).landing_p2p.insert(message.send_id, (posted.id, place));
                let header = control(MessageKind::ClearP2p, self.group, message.send_id, posted.tag);
                self.post_control(message.peer, header);
            }
        }
    }

    pub(super) fn taken(&mut self, peer: u32, send_id: u64) {
        let header = control(MessageKind::Taken, self.group, send_id, 0);
        self.post_control(peer, header);
    }

    pub(super) fn find_posted(&mut self, peer: u32, tag: u32) -> Option<PostedP2p> {
        let i = self
            .posted_p2p
            .iter()
            .position(|p| p.tag == tag && p.peer.is_none_or(|wanted| wanted == peer))?;
        self.posted_p2p.remove(i)
    }
}
