//! A rank's segment: what it holds and where, and its mapping.
//!
//! ```text
//! 0        control page: who, flags, failure notice, progress counters, slot labels
//! 4096     what the owner has issued lately
//! 8192     one ring per local rank, written by the owner, read by that rank
//! ...      SLOTS staging slots, each [input | output], written by the owner, read by all
//! ```
//!
//! Peers never write payload into a rank's segment, only the read position of their ring and the
//! doorbell flag; and a segment never holds user memory. So a peer that goes wild can disturb
//! messages, but cannot write a user's tensor.

use crate::ReduceError;
use crate::header::Descriptor;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

/// Payload bytes of one ring: half of a usual second-level cache.
pub(crate) const RING_BYTES: usize = 512 << 10;
/// Staging slots per rank: enough that copying in, reducing and copying out overlap.
pub(crate) const SLOTS: usize = 4;
/// Bytes of a slot's input half, and of its output half. With all of a node's slots this stays
/// about the size of a second-level cache per rank, and the overhead per step stays small.
pub(crate) const SLOT_BYTES: usize = 256 << 10;

const PAGE: usize = 4096;
/// Control page and the page of issued operations.
const CONTROL: usize = 2 * PAGE;
/// Operations that a rank remembers for its peers to compare with theirs.
const ISSUED: usize = 64;
const MAGIC: u64 = 0x3167_6573_5246_4646; // "FFFRseg1"
/// Longest failure text kept for peers.
const NOTICE_BYTES: usize = 1024;

/// A value alone on its cache lines (two: the prefetcher fetches pairs).
#[repr(C, align(128))]
pub(crate) struct Apart<T>(pub(crate) T);

/// What a slot holds: readers compare it with what they are about to read.
#[repr(C, align(64))]
pub(crate) struct Label {
    sequence: AtomicU64,
    /// op, dtype, redop, in three low bytes.
    kinds: AtomicU64,
    root: AtomicU64,
    count: AtomicU64,
    factor: AtomicU64,
}

impl Label {
    pub(crate) fn set(&self, sequence: u64, d: &Descriptor, factor: f64) {
        self.sequence.store(sequence, Ordering::Relaxed);
        self.set_descriptor(d, factor);
    }

    fn set_descriptor(&self, d: &Descriptor, factor: f64) {
        let kinds = u64::from(d.op) | u64::from(d.dtype) << 8 | u64::from(d.redop) << 16;
        self.kinds.store(kinds, Ordering::Relaxed);
        self.root.store(u64::from(d.root), Ordering::Relaxed);
        self.count.store(d.count, Ordering::Relaxed);
        self.factor.store(factor.to_bits(), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> (u64, Descriptor, f64) {
        let kinds = self.kinds.load(Ordering::Relaxed);
        let descriptor = Descriptor {
            op: kinds as u8,
            dtype: (kinds >> 8) as u8,
            redop: (kinds >> 16) as u8,
            root: self.root.load(Ordering::Relaxed) as u32,
            count: self.count.load(Ordering::Relaxed),
        };
        let factor = f64::from_bits(self.factor.load(Ordering::Relaxed));
        (self.sequence.load(Ordering::Relaxed), descriptor, factor)
    }
}

/// The first page of a segment.
#[repr(C)]
pub(crate) struct Control {
    magic: AtomicU64,
    rank: AtomicU64,
    group: AtomicU64,
    /// 1: the owner waits for its doorbell; who changes it to 0 rings.
    pub(crate) sleeping: Apart<AtomicU32>,
    /// 1: the owner has left in order.
    pub(crate) left: AtomicU32,
    /// Not 0: the owner's group is broken; code of the error. The texts are written before it.
    failed: AtomicU32,
    failed_dead: AtomicU32,
    failed_len: AtomicU32,
    failed_text: [AtomicU32; NOTICE_BYTES / 4],
    /// Steps whose input the owner has staged.
    pub(crate) staged: Apart<AtomicU64>,
    /// Steps whose output the owner has reduced.
    pub(crate) reduced: Apart<AtomicU64>,
    /// Steps of which the owner will read nothing more.
    pub(crate) consumed: Apart<AtomicU64>,
    pub(crate) labels: [Label; SLOTS],
}

/// Positions of one ring.
#[repr(C)]
pub(crate) struct RingControl {
    /// Bytes ever written.
    pub(crate) head: Apart<AtomicU64>,
    /// Bytes ever read.
    pub(crate) tail: Apart<AtomicU64>,
}

const RING_STRIDE: usize = PAGE + RING_BYTES;

/// Mappings alive in this process, for tests of resource release.
static MAPPED: AtomicUsize = AtomicUsize::new(0);

/// Number of segments mapped by this process.
pub(crate) fn mapped_segments() -> usize {
    MAPPED.load(Ordering::Relaxed)
}

/// A mapped segment, one's own or a peer's.
pub(crate) struct Segment {
    base: NonNull<u8>,
    len: usize,
    local_size: usize,
}

// SAFETY: the mapping is shared memory that other processes change at any time anyway; all access
// goes through atomics or raw copies whose order the protocols of ring and arena establish.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

/// Bytes of a segment in a node of `local_size` ranks.
fn segment_bytes(local_size: usize) -> usize {
    CONTROL + local_size * RING_STRIDE + SLOTS * 2 * SLOT_BYTES
}

impl Segment {
    /// Makes this rank's segment; the descriptor is for handing to peers.
    pub(crate) fn create(rank: u32, group: u32, local_size: usize) -> Result<(Self, OwnedFd), ReduceError> {
        const { assert!(size_of::<Control>() <= PAGE && ISSUED * size_of::<Label>() <= PAGE) };
        let fd = rustix::fs::memfd_create("firefly-reduce", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| ReduceError::system("memfd_create", e))?;
        rustix::fs::ftruncate(&fd, segment_bytes(local_size) as u64)
            .map_err(|e| ReduceError::system("ftruncate of a shared memory segment", e))?;
        // Sealed, so that no peer can shrink it under another's feet (SIGBUS).
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|e| ReduceError::system("sealing a shared memory segment", e))?;
        let segment = Self::map(fd.as_fd(), local_size)?;
        let control = segment.control();
        control.rank.store(u64::from(rank), Ordering::Relaxed);
        control.group.store(u64::from(group), Ordering::Relaxed);
        control.magic.store(MAGIC, Ordering::Release);
        Ok((segment, fd))
    }

    /// Maps the segment that `rank` sent, after checking that it is one and cannot shrink.
    pub(crate) fn open(
        fd: BorrowedFd<'_>,
        rank: u32,
        group: u32,
        local_size: usize,
    ) -> Result<Self, ReduceError> {
        let bad =
            |what: &str| ReduceError::protocol(format!("rank {rank} sent a shared memory segment {what}"));
        let size = rustix::fs::fstat(fd).map_err(|e| ReduceError::system("fstat", e))?.st_size;
        if size != segment_bytes(local_size) as i64 {
            return Err(bad(&format!("of {size} bytes instead of {}", segment_bytes(local_size))));
        }
        let seals = rustix::fs::fcntl_get_seals(fd).map_err(|_| bad("that cannot be sealed"))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(bad("that is not sealed"));
        }
        let segment = Self::map(fd, local_size)?;
        let control = segment.control();
        if control.magic.load(Ordering::Acquire) != MAGIC
            || control.rank.load(Ordering::Relaxed) != u64::from(rank)
            || control.group.load(Ordering::Relaxed) != u64::from(group)
        {
            return Err(bad("of another rank, group or version"));
        }
        Ok(segment)
    }

    fn map(fd: BorrowedFd<'_>, local_size: usize) -> Result<Self, ReduceError> {
        let len = segment_bytes(local_size);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        }
        .map_err(|e| ReduceError::system("mmap of a shared memory segment", e))?;
        // A forked child has no business in it. Failure would only waste address space.
        // SAFETY: the range was mapped just now.
        let _ = unsafe { rustix::mm::madvise(base, len, rustix::mm::Advice::LinuxDontFork) };
        MAPPED.fetch_add(1, Ordering::Relaxed);
        Ok(Self { base: NonNull::new(base.cast()).expect("mmap returns no null"), len, local_size })
    }

    pub(crate) fn control(&self) -> &Control {
        // SAFETY: the mapping is at least a page long, page aligned, and all fields are atomics.
        unsafe { self.base.cast::<Control>().as_ref() }
    }

    fn issued(&self, sequence: u64) -> &Label {
        let at = PAGE + (sequence as usize % ISSUED) * size_of::<Label>();
        // SAFETY: inside the second page, aligned to 64, atomics only.
        unsafe { self.base.add(at).cast::<Label>().as_ref() }
    }

    /// Records what the owner has issued as `sequence`, for [`Segment::issued_as`] of its peers.
    pub(crate) fn announce(&self, sequence: u64, descriptor: &Descriptor) {
        let label = self.issued(sequence);
        // Sequence 0 is never issued: readers skip an entry that is being written.
        label.sequence.store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        label.set_descriptor(descriptor, 1.0);
        label.sequence.store(sequence, Ordering::Release);
        // Of two ranks that announce and then look, at least one sees the other's entry.
        fence(Ordering::SeqCst);
    }

    /// What the owner has issued as `sequence`, if it has and still remembers.
    pub(crate) fn issued_as(&self, sequence: u64) -> Option<Descriptor> {
        let label = self.issued(sequence);
        if label.sequence.load(Ordering::Acquire) != sequence {
            return None;
        }
        let (_, descriptor, _) = label.get();
        fence(Ordering::Acquire);
        (label.sequence.load(Ordering::Relaxed) == sequence).then_some(descriptor)
    }

    fn ring_offset(&self, local: usize) -> usize {
        assert!(local < self.local_size);
        CONTROL + local * RING_STRIDE
    }

    /// Positions of the ring from the owner to local rank `local`.
    pub(crate) fn ring_control(&self, local: usize) -> &RingControl {
        // SAFETY: inside the mapping, page aligned, atomics only.
        unsafe { self.base.add(self.ring_offset(local)).cast::<RingControl>().as_ref() }
    }

    /// The ring's bytes, [`RING_BYTES`] of them.
    pub(crate) fn ring_data(&self, local: usize) -> *mut u8 {
        // SAFETY: inside the mapping.
        unsafe { self.base.as_ptr().add(self.ring_offset(local) + PAGE) }
    }

    fn slot(&self, step: u64) -> usize {
        CONTROL + self.local_size * RING_STRIDE + (step as usize % SLOTS) * 2 * SLOT_BYTES
    }

    /// Input half of the slot of `step`, [`SLOT_BYTES`] long.
    pub(crate) fn slot_input(&self, step: u64) -> *mut u8 {
        // SAFETY: inside the mapping.
        unsafe { self.base.as_ptr().add(self.slot(step)) }
    }

    /// Output half of the slot of `step`, [`SLOT_BYTES`] long.
    pub(crate) fn slot_output(&self, step: u64) -> *mut u8 {
        // SAFETY: inside the mapping.
        unsafe { self.base.as_ptr().add(self.slot(step) + SLOT_BYTES) }
    }

    /// Leaves word for the peers that this rank's group is broken.
    pub(crate) fn leave_notice(&self, error: &ReduceError, dead: u32) {
        let control = self.control();
        let text = error.to_string();
        let text = &text.as_bytes()[..text.len().min(NOTICE_BYTES)];
        for (word, bytes) in control.failed_text.iter().zip(text.chunks(4)) {
            let mut padded = [0; 4];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(u32::from_le_bytes(padded), Ordering::Relaxed);
        }
        control.failed_len.store(text.len() as u32, Ordering::Relaxed);
        control.failed_dead.store(dead, Ordering::Relaxed);
        control.failed.store(error.code(), Ordering::Release);
    }

    /// The owner's notice, if it left one: code, dead rank, text.
    pub(crate) fn notice(&self) -> Option<(u32, u32, String)> {
        let control = self.control();
        let code = control.failed.load(Ordering::Acquire);
        if code == 0 {
            return None;
        }
        let len = (control.failed_len.load(Ordering::Relaxed) as usize).min(NOTICE_BYTES);
        let words = control.failed_text.iter().flat_map(|w| w.load(Ordering::Relaxed).to_le_bytes());
        let text: Vec<u8> = words.take(len).collect();
        let text = String::from_utf8_lossy(&text).into_owned();
        Some((code, control.failed_dead.load(Ordering::Relaxed), text))
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length; links and arena hold the segment by Arc, so no
        // pointer into it is used any more.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        MAPPED.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_of_the_wrong_shape_is_refused() {
        let (mine, fd) = Segment::create(1, 7, 2).unwrap();
        assert!(Segment::open(fd.as_fd(), 1, 7, 2).is_ok());
        for (rank, group, local) in [(0, 7, 2), (1, 8, 2), (1, 7, 3)] {
            assert!(Segment::open(fd.as_fd(), rank, group, local).is_err());
        }
        let plain = rustix::fs::memfd_create("x", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&plain, segment_bytes(2) as u64).unwrap();
        let error = match Segment::open(plain.as_fd(), 1, 7, 2) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("an unsealed segment was accepted"),
        };
        assert!(error.contains("not sealed"), "{error}");
        drop(mine);
    }

    #[test]
    fn issued_operations_are_remembered_for_a_while() {
        let (mine, fd) = Segment::create(1, 7, 2).unwrap();
        let theirs = Segment::open(fd.as_fd(), 1, 7, 2).unwrap();
        let d = |count| Descriptor { op: 1, dtype: 2, redop: 3, root: 4, count };
        assert_eq!(theirs.issued_as(5), None);
        for sequence in 1..100 {
            mine.announce(sequence, &d(sequence * 10));
        }
        assert_eq!(theirs.issued_as(99), Some(d(990)));
        assert_eq!(theirs.issued_as(40), Some(d(400)));
        assert_eq!(theirs.issued_as(35), None, "overwritten");
        assert_eq!(theirs.issued_as(100), None, "not yet");
    }

    #[test]
    fn a_notice_crosses_the_segment() {
        let (mine, fd) = Segment::create(1, 7, 2).unwrap();
        let theirs = Segment::open(fd.as_fd(), 1, 7, 2).unwrap();
        assert_eq!(theirs.notice(), None);
        let error = ReduceError::PeerDied { rank: 3, detail: "rank 3 is gone".into() };
        mine.leave_notice(&error, 3);
        assert_eq!(theirs.notice(), Some((error.code(), 3, "rank 3 is gone".into())));
    }
}
