//! The log: a ring of frames in a fixed part of the volume.
//!
//! A frame begins at a sector and never wraps: where it would not fit before the ring's end it
//! begins at the ring's start. So frame *n* + 1 is either right behind frame *n* or at the start.

use super::BLOCK_BYTES;
use super::format::{FormatError, damaged, frame_at};

/// Where frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Log {
    /// First block of the ring.
    pub(super) first: u32,
    /// Bytes of the ring.
    pub(super) bytes: u64,
    pub(super) sector: u64,
    /// Where replay begins, and with which frame.
    pub(super) head: u64,
    pub(super) head_sequence: u64,
    /// Where the next frame goes, and its number.
    pub(super) tail: u64,
    pub(super) sequence: u64,
}

impl Log {
    /// Bytes that replay has to read, gaps included.
    pub(super) fn used(&self) -> u64 {
        match self.sequence == self.head_sequence {
            true => 0,
            // A full ring has its tail at its head; it never gets that full.
            false => (self.tail + self.bytes - self.head) % self.bytes,
        }
    }

    /// Where a frame of `len` bytes goes, if it fits with `spare` bytes to spare.
    pub(super) fn place(&self, len: u64, spare: u64) -> Option<u64> {
        let len = len.next_multiple_of(self.sector);
        let at = if self.tail + len > self.bytes { 0 } else { self.tail };
        let skipped = if at == self.tail { 0 } else { self.bytes - self.tail };
        // One sector stays free, so that tail meets head only when the ring is empty.
        (self.used() + skipped + len + spare + self.sector <= self.bytes).then_some(at)
    }

    /// A frame of `len` bytes was written at `at`.
    pub(super) fn advance(&mut self, at: u64, len: u64) {
        self.tail = (at + len.next_multiple_of(self.sector)) % self.bytes;
        self.sequence += 1;
    }

    /// Byte offset in the volume of an offset in the ring.
    pub(super) fn offset(&self, at: u64) -> u64 {
        u64::from(self.first) * BLOCK_BYTES as u64 + at
    }
}

/// The frames behind a checkpoint.
pub(super) struct Frames {
    /// Where each begins, and its body, in order.
    pub(super) found: Vec<(u64, Vec<u8>)>,
    /// Where the log goes on.
    pub(super) tail: u64,
}

/// Reads the frames of a ring from where `log` says on. The log ends at the first frame that is not
/// there whole: it was being written when the power went, so nothing of it was acknowledged. A
/// later frame is only written after the flush of the one before has returned, so finding one means
/// that the disk lost data that it had promised to keep.
pub(super) fn read_frames(
    ring: &[u8],
    log: &Log,
    seed: u32,
    ignore_later: bool,
) -> Result<Frames, FormatError> {
    let mut frames = Frames { found: Vec::new(), tail: log.head };
    let mut next = log.head_sequence;
    loop {
        let at = |offset: u64| {
            let (sequence, body) = frame_at(ring.get(offset as usize..)?, seed)?;
            (sequence == next).then_some((offset, body))
        };
        let Some((offset, body)) = at(frames.tail).or_else(|| at(0)) else { break };
        let len = (super::format::FRAME_HEAD + body.len()) as u64;
        frames.found.push((offset, body.to_vec()));
        frames.tail = (offset + len.next_multiple_of(log.sector)) % log.bytes;
        next += 1;
    }
    for offset in (0..ring.len()).step_by(log.sector as usize) {
        if frame_at(&ring[offset..], seed).is_some_and(|(sequence, _)| sequence > next) && !ignore_later {
            return Err(damaged(format!(
                "frame {next} of the log is damaged and later ones are not: the disk lost data"
            )));
        }
    }
    Ok(frames)
}
