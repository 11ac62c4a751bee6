//! Drives a queue pair with the core's decisions. The TCP connection over which both sides proved
//! themselves stays open beside it: it carried the addresses, and its end is how a peer's death is
//! noticed when nothing is under way.
//!
//! Teardown: the queue pair is destroyed first, then the registrations, then the memory. So a
//! write that is under way when a channel is dropped lands in the channel's own ring, in a region
//! that its owner still holds, or nowhere.

use super::core::{Core, Key, Shape, To, Work};
use super::credit::{MAX_RECEIVES, MAX_RING, MIN_RECEIVES, MIN_RING};
use super::note::NOTE_BYTES;
use crate::channel::region;
use crate::channel::{Channel, ChannelCounters, ChannelError, Completion, HEADER_BYTES, Incoming};
use crate::error::{LinkError, WorkError};
use crate::fabric::Class;
use crate::verbs::queue::piece;
use crate::verbs::{
    self, Address, Completion as Completed, Device, Done, Op, Port, Queue, QueueOptions, Reach, Remote,
    Request,
};
use firefly_types::lock;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes of the ring, and of the stage: four of the largest pieces, each far above the size from
/// which a WRITE runs at the wire's speed. A group with a thousand remote peers then pins half a
/// gigabyte per rank.
const RING: usize = 256 << 10;
const STAGE: usize = 256 << 10;
/// Receives posted, and requests in flight.
const RECEIVES: usize = 128;
const SENDS: usize = 128;
/// Memory of a receive: a note, with room for a longer one of a later version to be refused as such.
const SLOT: usize = 64;
/// Completions taken by one `progress` before it returns, so that a fast peer does not keep the
/// caller from its other channels.
const BATCHES: usize = 16;
/// A channel that is dropped waits so long for what it has sent to be acknowledged, as the kernel
/// would for a socket. Only a peer whose machine is gone takes all of it.
const FLUSH: Duration = Duration::from_millis(200);
/// Marks completions of receives.
const RECEIVE: u64 = 1 << 63;

/// Pages of this channel: ring, stage, memory of receives.
struct Pages {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory.
unsafe impl Send for Pages {}

impl Pages {
    fn new(len: usize) -> Pages {
        let layout = Layout::from_size_align(len, 4096).expect("a fixed, small size");
        // SAFETY: the size is not zero.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) });
        Pages { base: base.unwrap_or_else(|| handle_alloc_error(layout)), layout }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < self.layout.size());
        // SAFETY: within the allocation.
        unsafe { self.base.as_ptr().add(offset) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// What the peer needs to know to write to this side.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::channel) struct Endpoint {
    pub(in crate::channel) address: Address,
    pub(in crate::channel) ring_at: u64,
    pub(in crate::channel) ring_key: u32,
    pub(in crate::channel) ring: u32,
    pub(in crate::channel) receives: u32,
}

impl Endpoint {
    /// Whether it can be an endpoint at all: what a peer says is not trusted.
    pub(in crate::channel) fn check(&self) -> Result<(), ChannelError> {
        let Endpoint { address, ring_at, ring, receives, .. } = self;
        let sizes = (MIN_RING..=MAX_RING).contains(&(*ring as usize))
            && (MIN_RECEIVES..=MAX_RECEIVES).contains(&(*receives as usize));
        let address = address.qp <= 0xFF_FFFF && (1..=5).contains(&address.mtu) && address.gid != [0; 16];
        match sizes && address && ring_at.checked_add(u64::from(*ring)).is_some() {
            true => Ok(()),
            false => Err(ChannelError::Protocol("an RDMA endpoint that cannot be one".into())),
        }
    }
}

/// This side's half: receives are posted, nobody is connected yet. Fields in the order in which
/// they must go.
pub(in crate::channel) struct Half {
    queue: Queue,
    ring: verbs::Region,
    rest: verbs::Region,
    pages: Pages,
}

impl Half {
    /// Makes a queue pair and its memory on `port` of `device`.
    pub(in crate::channel) fn new(
        device: &Arc<Device>,
        port: &Port,
        class: Class,
    ) -> Result<Half, LinkError> {
        let options = QueueOptions {
            sends: SENDS as u32,
            receives: RECEIVES as u32,
            pieces: 1,
            class,
            ..QueueOptions::default()
        };
        let pages = Pages::new(RING + STAGE + RECEIVES * SLOT);
        // SAFETY: the pages are freed after the registrations (order of fields), and are accessed
        // by raw pointers only.
        let (ring, rest) = unsafe {
            let rest = STAGE + RECEIVES * SLOT;
            (
                verbs::Region::new(device, pages.at(0), RING, Reach::Peer)?,
                verbs::Region::new(device, pages.at(RING), rest, Reach::Local)?,
            )
        };
        let queue = Queue::new(device, port, &options)?;
        let half = Half { queue, ring, rest, pages };
        for slot in 0..half.receives() {
            half.post_receive(slot)?;
        }
        Ok(half)
    }

    /// Fewer where the device allows no more.
    fn receives(&self) -> usize {
        self.queue.options().receives as usize
    }

    fn slot(&self, slot: usize) -> *mut u8 {
        self.pages.at(RING + STAGE + slot * SLOT)
    }

    fn post_receive(&self, slot: usize) -> Result<(), LinkError> {
        let into = piece(self.slot(slot), SLOT, self.rest.keys().local);
        // SAFETY: the slot is left alone until its completion, and freed after the queue.
        unsafe { self.queue.post_recv(RECEIVE | slot as u64, Some(into)) }
    }

    pub(in crate::channel) fn endpoint(&self) -> Endpoint {
        Endpoint {
            address: self.queue.address(),
            ring_at: self.pages.at(0) as u64,
            ring_key: self.ring.keys().remote,
            ring: RING as u32,
            receives: self.receives() as u32,
        }
    }

    /// Connects to the peer's half. [`VerbsChannel::attach`] comes when both sides are content.
    pub(in crate::channel) fn connect(self, peer: Endpoint) -> Result<VerbsChannel, LinkError> {
        self.queue.connect(&peer.address)?;
        let alarm = Arc::new(Mutex::new(None));
        let heard = alarm.clone();
        self.queue.on_failure(move |reason| {
            lock(&heard).get_or_insert_with(|| reason.to_owned());
        });
        let mine = Shape { ring: RING, receives: self.receives() };
        let theirs = Shape { ring: peer.ring as usize, receives: peer.receives as usize };
        let stage = (self.pages.at(RING), STAGE);
        let depth = self.queue.options().sends as usize;
        // SAFETY: the pages live as long as the half, which the channel holds beside the core.
        let core = unsafe { Core::new((self.pages.at(0).cast_const(), mine), stage, theirs, depth) };
        Ok(VerbsChannel {
            half: self,
            core,
            peer,
            side: None,
            alarm,
            // As the queue was made.
            armed: true,
            batch: Vec::new(),
            ending: None,
            failed: None,
            operations: 0,
            completions: 0,
        })
    }
}

pub(in crate::channel) struct VerbsChannel {
    /// Destroyed first, and its queue pair before its memory.
    half: Half,
    core: Core,
    peer: Endpoint,
    /// Absent as long as the negotiation is spoken on it.
    side: Option<TcpStream>,
    /// What the device has said about the queue pair outside of any work.
    alarm: Arc<Mutex<Option<String>>>,
    /// The next completion makes an event.
    armed: bool,
    batch: Vec<Completed>,
    /// Nothing more comes, for this reason; what has come is still to be taken.
    ending: Option<ChannelError>,
    failed: Option<ChannelError>,
    operations: u64,
    completions: u64,
}

// SAFETY: the raw pointers are handed to the device or copied from and to, under promises made for
// the time until completion and not for a thread.
unsafe impl Send for VerbsChannel {}

impl VerbsChannel {
    fn device(&self) -> &Arc<Device> {
        self.half.queue.device()
    }

    fn check(&self) -> Result<(), ChannelError> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn broken(&self, error: LinkError) -> ChannelError {
        ChannelError::device(self.device().name(), error)
    }

    /// Says "can you hear me?".
    pub(in crate::channel) fn probe(&mut self) -> Result<(), ChannelError> {
        self.core.probe();
        self.progress(&mut Vec::new()).map(drop)
    }

    /// Whether both directions are proven: the peer's probe has come and this side's was
    /// acknowledged.
    pub(in crate::channel) fn heard(&self) -> bool {
        self.core.probed() && !self.core.unacknowledged()
    }

    /// `side` stays open beside the queue pair.
    pub(in crate::channel) fn attach(&mut self, side: TcpStream) {
        self.side = Some(side);
    }

    /// Nobody will use it: what is under way is not worth waiting for.
    pub(in crate::channel) fn give_up(&mut self) {
        self.failed = Some(ChannelError::Closed { reason: "it was given up".into() });
    }

    fn take(&mut self, completed: Completed) -> Result<(), ChannelError> {
        let receive = completed.id & RECEIVE != 0;
        let done = completed.result.map_err(|error| {
            // A queue pair flushes what was posted when it fails; the cause is told elsewhere.
            let what = if receive { "receiving" } else { "writing to the peer" };
            let reason = match (error, lock(&self.alarm).take()) {
                (WorkError::Flushed, Some(alarm)) => alarm,
                _ => error.to_string(),
            };
            ChannelError::Device {
                device: self.device().name().to_owned(),
                what: format!("{what} failed"),
                reason,
            }
        })?;
        let slot = (completed.id & !RECEIVE) as usize;
        match done {
            Done::Request => {
                self.core.completed(completed.id);
                Ok(())
            }
            Done::Received { .. } | Done::Written { .. } if slot >= self.half.receives() => {
                Err(ChannelError::Protocol("a receive that was not posted".into()))
            }
            Done::Received { len } => {
                let mut note = [0; SLOT];
                let len = (len as usize).min(SLOT);
                // SAFETY: the slot is ours until it is posted again, and holds SLOT bytes.
                unsafe { std::ptr::copy_nonoverlapping(self.half.slot(slot), note.as_mut_ptr(), len) };
                self.repost(slot)?;
                self.core.note_arrived(&note[..len])
            }
            Done::Written { len, imm } => {
                self.repost(slot)?;
                self.core.piece_arrived(len as usize, imm)
            }
        }
    }

    fn repost(&self, slot: usize) -> Result<(), ChannelError> {
        self.half.post_receive(slot).map_err(|e| self.broken(e))
    }

    /// Takes what the device has done; whether it was anything.
    fn poll(&mut self) -> Result<bool, ChannelError> {
        let mut any = false;
        for _ in 0..BATCHES {
            let mut batch = std::mem::take(&mut self.batch);
            let mut polled = self.half.queue.poll(&mut batch);
            if let (Ok(0), false) = (&polled, self.armed) {
                self.half.queue.take_events();
                polled = self.half.queue.arm().and_then(|()| {
                    self.armed = true;
                    self.half.queue.poll(&mut batch)
                });
            }
            let n = polled.map_err(|e| self.broken(e))?;
            self.completions += n as u64;
            let taken = batch.drain(..).try_for_each(|completed| self.take(completed));
            self.batch = batch;
            taken?;
            if n == 0 {
                break;
            }
            // Its event has come, or is about to.
            self.armed = false;
            any = true;
            self.post()?;
        }
        Ok(any)
    }

    /// Gives the device what may be sent; whether it was anything.
    fn post(&mut self) -> Result<bool, ChannelError> {
        let mut any = false;
        while let Some(work) = self.core.next() {
            self.post_work(&work).map_err(|e| self.broken(e))?;
            self.operations += 1;
            any = true;
        }
        Ok(any)
    }

    fn post_work(&self, work: &Work) -> Result<(), LinkError> {
        let key = match work.key {
            Key::Stage => self.half.rest.keys().local,
            Key::Region(key) => key,
        };
        let op = match work.to {
            To::Note => Op::Send,
            To::Ring { at, imm } => {
                let remote = Remote { address: self.peer.ring_at + at as u64, key: self.peer.ring_key };
                Op::WriteImm(remote, imm)
            }
            To::Memory { address, key, imm: Some(imm) } => Op::WriteImm(Remote { address, key }, imm),
            To::Memory { address, key, imm: None } => Op::Write(Remote { address, key }),
        };
        let inline = work.key == Key::Stage && work.len <= self.half.queue.inline_limit();
        let request = Request { id: work.id, op, signaled: work.signaled, inline };
        // SAFETY: the core keeps the memory until it is told of the completion: the stage is this
        // channel's, freed after the queue; a region is registered memory, which posting promised
        // to keep until the send is reported or the channel destroyed.
        unsafe { self.half.queue.post(&request, &[piece(work.from, work.len, key)]) }
    }

    /// Whether the peer is still there, as far as the side connection tells.
    fn look_at_side(&self) -> Result<(), ChannelError> {
        let Some(side) = &self.side else { return Ok(()) };
        let mut byte = [0u8; 1];
        let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
        // SAFETY: one byte of a live variable.
        let got = unsafe { libc::recv(side.as_raw_fd(), byte.as_mut_ptr().cast(), 1, flags) };
        match got {
            0 => Err(ChannelError::Closed { reason: "the peer closed it".into() }),
            1.. => Err(ChannelError::Protocol("bytes beside the queue pair".into())),
            _ => {
                let e = io::Error::last_os_error();
                match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                    _ => Err(ChannelError::closed("the connection beside the queue pair failed", &e)),
                }
            }
        }
    }

    /// Moves what can be moved until nothing more comes.
    fn advance(&mut self) -> Result<bool, ChannelError> {
        if self.ending.is_some() {
            return self.core.read_stream().map(|()| false);
        }
        self.core.read_stream()?;
        let mut moved = self.post()?;
        moved |= self.poll()?;
        if moved {
            return Ok(true);
        }
        // What the peer sent before it closed is there by the time that the end is seen: one more
        // look. What else the device says by then is a consequence.
        if let Err(end) = self.look_at_side() {
            let _ = self.poll();
            return Err(end);
        }
        if let Some(reason) = lock(&self.alarm).take() {
            let device = self.device().name().to_owned();
            return Err(ChannelError::Device { device, what: "the queue pair failed".into(), reason });
        }
        Ok(false)
    }
}

impl Channel for VerbsChannel {
    unsafe fn post_send(
        &mut self,
        token: u64,
        header: &[u8; HEADER_BYTES],
        ptr: *const u8,
        len: usize,
    ) -> Result<(), ChannelError> {
        self.check()?;
        let key = self.core.wants_region(len).then(|| region::find(self.device(), ptr, len)).flatten();
        self.core.post_send(token, header, (ptr, len), key.map(|k| k.local))
    }

    fn peek(&mut self) -> Result<Option<Incoming>, ChannelError> {
        // What has arrived stays readable after a failure.
        match self.core.peek() {
            Some(incoming) => Ok(Some(incoming)),
            None => self.check().map(|()| None),
        }
    }

    unsafe fn post_recv(&mut self, token: u64, ptr: *mut u8, len: usize) -> Result<(), ChannelError> {
        self.check()?;
        let key = self.core.wants_region(len).then(|| region::find(self.device(), ptr, len)).flatten();
        self.core.post_recv(token, (ptr, len), key.map(|k| k.remote))
    }

    fn progress(&mut self, out: &mut Vec<Completion>) -> Result<bool, ChannelError> {
        self.check()?;
        let advanced = self.advance();
        let reported = self.core.take_completions(out);
        let moved = match advanced {
            Ok(moved) => moved,
            Err(error) => {
                // That the peer is gone explains what the device says.
                let error = match (&error, self.look_at_side()) {
                    (ChannelError::Device { .. }, Err(end @ ChannelError::Closed { .. })) => end,
                    _ => error,
                };
                // A lie ends it at once; an end lets the caller take what came before.
                let ending = self.ending.get_or_insert(error);
                if let (ChannelError::Protocol(_), false) = (&*ending, reported) {
                    self.failed = Some(ending.clone());
                    return Err(ending.clone());
                }
                false
            }
        };
        if reported {
            return Ok(true);
        }
        if let Some(ending) = &self.ending
            && self.core.nothing_to_take()
        {
            self.failed = Some(ending.clone());
            return Err(ending.clone());
        }
        Ok(moved)
    }

    fn poll_fds(&self, out: &mut Vec<(RawFd, bool)>) {
        out.push((self.half.queue.fd(), false));
        out.extend(self.side.iter().map(|side| (side.as_raw_fd(), false)));
    }

    fn fork_fds(&self, out: &mut Vec<RawFd>) {
        out.push(self.half.queue.fd());
        out.extend(self.side.iter().map(AsRawFd::as_raw_fd));
        // As long as a child holds the device open, the kernel keeps the queue pair alive.
        out.extend(self.device().fork_fds());
    }

    fn counters(&self) -> ChannelCounters {
        let moved = self.core.moved();
        ChannelCounters {
            bytes_sent: moved.sent,
            bytes_received: moved.received,
            bytes_copied: moved.copied,
            operations: self.operations,
            completions: self.completions,
            registrations: 2,
        }
    }

    fn transport(&self) -> &'static str {
        "rdma"
    }
}

impl Drop for VerbsChannel {
    fn drop(&mut self) {
        // Only completions are looked at: the memory of what is still posted may be gone.
        let until = Instant::now() + FLUSH;
        let healthy = self.ending.is_none() && self.failed.is_none();
        let mut batch = Vec::new();
        while healthy && self.core.unacknowledged() && self.look_at_side().is_ok() {
            let polled = self.half.queue.arm().and_then(|()| self.half.queue.poll(&mut batch));
            let idle = polled.as_ref().is_ok_and(|n| *n == 0);
            let failed = polled.is_err() || batch.iter().any(|c| c.result.is_err());
            for completed in batch.drain(..) {
                if completed.result == Ok(Done::Request) {
                    self.core.completed(completed.id);
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if failed || left.is_zero() {
                return;
            }
            if idle {
                let mut fds = Vec::new();
                self.poll_fds(&mut fds);
                let mut fds: Vec<_> = fds
                    .into_iter()
                    .map(|(fd, _)| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
                    .collect();
                // SAFETY: a live array of its length.
                unsafe {
                    libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, left.as_millis() as i32 + 1)
                };
                self.half.queue.take_events();
            }
        }
    }
}

const _: () = assert!(NOTE_BYTES <= SLOT && RING <= MAX_RING && RECEIVES <= MAX_RECEIVES);
