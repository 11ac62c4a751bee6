//! How much a sender may have under way: bytes of the peer's ring and pieces that the peer has
//! receives posted for. Both come back in 32 bits that travel with every piece and every note.
//!
//! ```text
//! bit  31      the piece is the end of a payload written straight to its place, not ring bytes
//! bits 16..31  bytes read from the ring so far, in units of 64, modulo 2^15
//! bits  0..16  pieces received so far, modulo 2^16
//! ```
//!
//! Why nobody can be stuck: see [`Outward::may_send`] and [`Inward::due`].

use super::super::ChannelError;

/// Bytes of a unit in which ring bytes are given back.
pub(super) const UNIT: usize = 64;
const UNITS: u64 = 1 << 15;
const PIECES: u64 = 1 << 16;
/// Largest ring: its units stay unambiguous by a factor of two.
pub(super) const MAX_RING: usize = UNIT * (UNITS as usize) / 2;
/// Smallest ring: holds a message's header and the part of a unit that is not given back yet.
pub(super) const MIN_RING: usize = 512;
/// Receives that a side posts: with fewer, notes about notes would never end.
pub(super) const MIN_RECEIVES: usize = 8;
/// Most receives: their count stays unambiguous by a factor of two.
pub(super) const MAX_RECEIVES: usize = (PIECES / 2) as usize;

const DIRECT: u32 = 1 << 31;

/// What a piece or note says besides its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Credit {
    pub(super) direct: bool,
    units: u16,
    pieces: u16,
}

impl Credit {
    pub(super) fn encode(self) -> u32 {
        let direct = if self.direct { DIRECT } else { 0 };
        direct | u32::from(self.units) << 16 | u32::from(self.pieces)
    }

    /// Every value has a meaning; [`Outward::returned`] checks it.
    pub(super) fn decode(bits: u32) -> Credit {
        Credit { direct: bits & DIRECT != 0, units: (bits >> 16) as u16 & 0x7FFF, pieces: bits as u16 }
    }
}

/// What this side has sent and the peer has given back.
pub(super) struct Outward {
    ring: u64,
    receives: u64,
    /// Ring bytes ever sent, and known to be read.
    pub(super) head: u64,
    read: u64,
    /// Units ever given back.
    units: u64,
    pieces: u64,
    taken: u64,
}

impl Outward {
    pub(super) fn new(ring: usize, receives: usize) -> Outward {
        Outward {
            ring: ring as u64,
            receives: receives as u64,
            head: 0,
            read: 0,
            units: 0,
            pieces: 0,
            taken: 0,
        }
    }

    /// Bytes of the peer's ring.
    pub(super) fn ring(&self) -> usize {
        self.ring as usize
    }

    /// Bytes that fit into the peer's ring now.
    pub(super) fn room(&self) -> usize {
        (self.ring - (self.head - self.read)) as usize
    }

    /// Where in the peer's ring the next byte goes, and how many follow before the ring's end.
    pub(super) fn place(&self) -> (usize, usize) {
        let at = (self.head % self.ring) as usize;
        (at, self.ring as usize - at)
    }

    /// Receives that the peer has posted for this side and that are not used.
    fn receives_left(&self) -> u64 {
        self.receives - (self.pieces - self.taken)
    }

    /// Whether another piece may be sent. The last receive is kept for a note that gives back at
    /// least one piece (`returns_pieces`), so that two sides which have filled each other can still
    /// say so.
    ///
    /// Both sides at zero cannot happen: a side's last receive is used by a note that gives back a
    /// piece `x` which it has received. For its peer to be at zero too, the peer must have sent a
    /// whole window that the note does not give back, so after `x`, while `x` itself was still
    /// owed: one more than the window holds.
    pub(super) fn may_send(&self, returns_pieces: bool) -> bool {
        self.receives_left() > u64::from(!returns_pieces)
    }

    /// Counts a piece of `ring_bytes` (0: it does not go to the ring) as sent.
    pub(super) fn sent(&mut self, ring_bytes: usize) {
        self.head += ring_bytes as u64;
        self.pieces += 1;
        debug_assert!(self.head - self.read <= self.ring && self.pieces - self.taken <= self.receives);
    }

    /// Takes what the peer gives back.
    pub(super) fn returned(&mut self, credit: Credit) -> Result<(), ChannelError> {
        let units = self.units + (u64::from(credit.units).wrapping_sub(self.units) % UNITS);
        let taken = self.taken + (u64::from(credit.pieces).wrapping_sub(self.taken) % PIECES);
        if units * UNIT as u64 > self.head || taken > self.pieces {
            return Err(ChannelError::Protocol(format!(
                "the peer gives back credit for {} ring bytes and {taken} pieces; {} and {} were sent",
                units * UNIT as u64,
                self.head,
                self.pieces
            )));
        }
        (self.units, self.read, self.taken) = (units, units * UNIT as u64, taken);
        Ok(())
    }
}

/// What has come in and this side has told the peer about.
pub(super) struct Inward {
    ring: u64,
    receives: u64,
    /// Ring bytes ever received, and read.
    pub(super) head: u64,
    pub(super) tail: u64,
    pieces: u64,
    told_units: u64,
    told_pieces: u64,
}

impl Inward {
    pub(super) fn new(ring: usize, receives: usize) -> Inward {
        Inward {
            ring: ring as u64,
            receives: receives as u64,
            head: 0,
            tail: 0,
            pieces: 0,
            told_units: 0,
            told_pieces: 0,
        }
    }

    /// Bytes in the ring that are not read.
    pub(super) fn available(&self) -> usize {
        (self.head - self.tail) as usize
    }

    /// Counts a piece that went to the ring.
    pub(super) fn ring_piece(&mut self, len: usize) -> Result<(), ChannelError> {
        self.pieces += 1;
        if len == 0 || self.head + len as u64 - self.tail > self.ring {
            return Err(ChannelError::Protocol(format!(
                "a piece of {len} bytes came into a ring of {} bytes with {} unread",
                self.ring,
                self.available()
            )));
        }
        self.head += len as u64;
        Ok(())
    }

    /// Counts anything else that used a receive.
    pub(super) fn other_piece(&mut self) {
        self.pieces += 1;
    }

    fn units(&self) -> u64 {
        self.tail / UNIT as u64
    }

    /// Whether the peer should be told now, even if nothing else is to be sent to it. A peer that
    /// is held back by the ring or by receives has used at least three quarters of them, so what
    /// it is owed once all is read is over these marks; and notes about notes die out.
    pub(super) fn due(&self) -> bool {
        self.units() - self.told_units >= (self.ring / UNIT as u64 / 4).max(1)
            || self.pieces - self.told_pieces >= self.receives / 4
    }

    /// Whether pieces have come that the peer has not been told of.
    pub(super) fn owes_pieces(&self) -> bool {
        self.pieces > self.told_pieces
    }

    /// What to tell with the next piece or note; the peer counts as told.
    pub(super) fn tell(&mut self, direct: bool) -> Credit {
        (self.told_units, self.told_pieces) = (self.units(), self.pieces);
        Credit { direct, units: (self.told_units % UNITS) as u16, pieces: (self.told_pieces % PIECES) as u16 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_value_is_its_own_encoding(bits: u32) {
            prop_assert_eq!(Credit::decode(bits).encode(), bits);
        }

        /// Positions stay right across any number of wraps, and a credit for what was not sent is
        /// refused.
        #[test]
        fn credit_survives_wraps_and_lies(steps in prop::collection::vec((1usize..1024, any::<u32>()), 1..400)) {
            let (mut out, mut back) = (Outward::new(1024, 8), Inward::new(1024, 8));
            // Far on, so that the counters wrap within the test.
            for _ in 0..40 {
                for _ in 0..7 {
                    out.sent(0);
                    back.other_piece();
                }
                out.returned(back.tell(false)).unwrap();
            }
            for (want, lie) in steps {
                let n = want.min(out.room());
                if n > 0 && out.may_send(false) {
                    let (at, _) = out.place();
                    prop_assert_eq!(at as u64, out.head % 1024);
                    out.sent(n);
                    back.ring_piece(n).unwrap();
                    back.tail += n as u64;
                }
                let before = (out.units, out.taken);
                let told = Credit::decode(lie);
                let honest = (u64::from(told.units).wrapping_sub(out.units) % UNITS) * UNIT as u64 <= out.head - out.units * UNIT as u64
                    && u64::from(told.pieces).wrapping_sub(out.taken) % PIECES <= out.pieces - out.taken;
                match out.returned(told) {
                    Ok(()) => prop_assert!(honest),
                    Err(_) => prop_assert!(!honest && before == (out.units, out.taken)),
                }
                if !honest {
                    out.returned(back.tell(false)).unwrap();
                    prop_assert!(out.room() > 1024 - UNIT, "all was read");
                    prop_assert_eq!(out.receives_left(), 8);
                } else {
                    // A lie within what was sent cannot be told from the truth; start over.
                    (out, back) = (Outward::new(1024, 8), Inward::new(1024, 8));
                }
            }
        }
    }

    #[test]
    fn more_than_the_ring_holds_is_refused() {
        let mut back = Inward::new(512, 8);
        back.ring_piece(500).unwrap();
        let error = back.ring_piece(13).unwrap_err().to_string();
        assert!(error.contains("13 bytes came into a ring of 512 bytes with 500 unread"), "{error}");
        assert!(back.ring_piece(0).is_err());
    }
}
