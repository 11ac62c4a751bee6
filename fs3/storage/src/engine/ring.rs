//! io_uring: requests of the engine carried out by the kernel, completions in any order.
//!
//! The engine's thread owns a [`Ring`] of its own for groups and checkpoints. Reads share another
//! one ([`super::reader`]). Both register the volume's file, and the memory of small requests.

use super::buffer::{AlignedBuf, Arena};
use super::disk::{Completion, Disk, Io, IoKind};
use io_uring::{IoUring, opcode, squeue, types};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// Requests that the kernel has at a time.
pub(super) const DEPTH: u32 = 256;
/// The registered file.
const VOLUME: types::Fixed = types::Fixed(0);
/// Completion of the request that watches for wake-ups.
const WAKE: u64 = u64::MAX;

/// Makes a ring with the file and the arena registered. Fails where io_uring is refused.
pub(super) fn make(file: BorrowedFd<'_>, arena: &Arc<Arena>) -> io::Result<(IoUring, bool)> {
    let ring = IoUring::new(DEPTH)?;
    ring.submitter().register_files(&[file.as_raw_fd()])?;
    let (base, len) = arena.whole();
    let whole = libc::iovec { iov_base: base.cast(), iov_len: len };
    // SAFETY: the arena outlives the ring: who holds the ring holds the arena beside it and drops
    // the ring first.
    let registered = unsafe { ring.submitter().register_buffers(&[whole]) }.is_ok();
    // Locked memory may be limited; requests work without.
    Ok((ring, registered))
}

/// A request of the kernel to fill or write `buf`. The caller keeps the buffer until the completion.
pub(super) fn entry(
    buf: &mut AlignedBuf,
    offset: u64,
    write: bool,
    arena: Option<&Arc<Arena>>,
) -> squeue::Entry {
    let len = u32::try_from(buf.len()).expect("no request has 4 GiB");
    let fixed = arena.is_some_and(|arena| buf.is_in(arena));
    match (write, fixed) {
        (false, false) => opcode::Read::new(VOLUME, buf.as_mut_ptr(), len).offset(offset).build(),
        (false, true) => opcode::ReadFixed::new(VOLUME, buf.as_mut_ptr(), len, 0).offset(offset).build(),
        (true, false) => opcode::Write::new(VOLUME, buf.as_ptr(), len).offset(offset).build(),
        (true, true) => opcode::WriteFixed::new(VOLUME, buf.as_ptr(), len, 0).offset(offset).build(),
    }
}

/// What a completion says: done, or to be done again in the plain way (interrupted, or cut short).
pub(super) fn outcome(result: i32, wanted: usize) -> Option<io::Result<()>> {
    match result {
        n if n >= 0 => (n as usize == wanted).then_some(Ok(())),
        n if [-libc::EINTR, -libc::EAGAIN].contains(&n) => None,
        n => Some(Err(io::Error::from_raw_os_error(-n))),
    }
}

/// A ring of one thread.
pub(super) struct Ring {
    /// Dropped first: then the kernel has no request and no buffer any more.
    ring: IoUring,
    in_flight: HashMap<u64, Io>,
    backlog: VecDeque<Io>,
    arena: Arc<Arena>,
    registered: bool,
    wake: Arc<rustix::fd::OwnedFd>,
    armed: bool,
}

impl Ring {
    /// `wake` is an eventfd whose counter ends a wait.
    pub(super) fn new(
        file: BorrowedFd<'_>,
        arena: Arc<Arena>,
        wake: Arc<rustix::fd::OwnedFd>,
    ) -> io::Result<Self> {
        let (ring, registered) = make(file, &arena)?;
        Ok(Self {
            ring,
            in_flight: HashMap::new(),
            backlog: VecDeque::new(),
            arena,
            registered,
            wake,
            armed: false,
        })
    }

    /// Nothing is with the kernel.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.is_empty() && self.backlog.is_empty()
    }

    /// Hands requests to the kernel.
    pub(super) fn start(&mut self, ios: Vec<Io>) -> io::Result<()> {
        self.backlog.extend(ios);
        self.submit_backlog()
    }

    /// As much as the kernel takes at a time.
    fn submit_backlog(&mut self) -> io::Result<()> {
        while self.in_flight.len() < DEPTH as usize - 1
            && let Some(mut io) = self.backlog.pop_front()
        {
            let arena = self.registered.then_some(&self.arena);
            let entry = match &mut io.kind {
                IoKind::Read { offset, buf } => entry(buf, *offset, false, arena),
                IoKind::Write { offset, buf } => entry(buf, *offset, true, arena),
                IoKind::Sync => opcode::Fsync::new(VOLUME).flags(types::FsyncFlags::DATASYNC).build(),
                IoKind::Grow(_) => opcode::Nop::new().build(),
            };
            self.push(entry.user_data(io.id))?;
            self.in_flight.insert(io.id, io);
        }
        self.ring.submit()?;
        Ok(())
    }

    fn push(&mut self, entry: squeue::Entry) -> io::Result<()> {
        // SAFETY: the buffer of the request is kept in `in_flight` until its completion has come,
        // or for good if the ring goes first; an eventfd poll has none.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }

    /// Waits until a request has ended or somebody wakes it, or for `timeout`.
    pub(super) fn wait<D: Disk + ?Sized>(
        &mut self,
        disk: &D,
        timeout: Option<Duration>,
    ) -> io::Result<Vec<Completion>> {
        // Completions have made room.
        self.submit_backlog()?;
        if !self.armed {
            let poll = opcode::PollAdd::new(types::Fd(self.wake.as_raw_fd()), libc::POLLIN as u32);
            self.push(poll.build().user_data(WAKE))?;
            self.armed = true;
        }
        let waited = match timeout {
            None => self.ring.submit_and_wait(1),
            Some(timeout) => {
                let time = types::Timespec::from(timeout);
                self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&time))
            }
        };
        match waited {
            Ok(_) => {}
            Err(error) if [libc::ETIME, libc::EINTR].contains(&error.raw_os_error().unwrap_or(0)) => {}
            Err(error) => return Err(error),
        }
        let ended: Vec<(u64, i32)> = self.ring.completion().map(|c| (c.user_data(), c.result())).collect();
        let mut completions = Vec::with_capacity(ended.len());
        for (id, result) in ended {
            if id == WAKE {
                self.armed = false;
                let mut count = [0; 8];
                // Nothing to read means that another wait has read it.
                let _ = rustix::io::read(&*self.wake, &mut count);
                continue;
            }
            let Some(io) = self.in_flight.remove(&id) else { continue };
            let wanted = match &io.kind {
                IoKind::Read { buf, .. } | IoKind::Write { buf, .. } => buf.len(),
                IoKind::Sync => 0,
                // Rare, and of several calls: done here and now.
                IoKind::Grow(_) => usize::MAX,
            };
            completions.push(match outcome(result, wanted) {
                Some(result) => {
                    let buf = match io.kind {
                        IoKind::Read { buf, .. } | IoKind::Write { buf, .. } => Some(buf),
                        _ => None,
                    };
                    Completion { id, buf, result }
                }
                // A sync is never done again: the first one's error may be lost with it.
                None if matches!(io.kind, IoKind::Sync) => {
                    Completion { id, buf: None, result: Err(io::Error::from_raw_os_error(-result)) }
                }
                None => io.perform(disk),
            });
        }
        Ok(completions)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may still write to these buffers; whoever fails in the middle leaks them.
        for (_, io) in self.in_flight.drain() {
            if let IoKind::Read { buf, .. } | IoKind::Write { buf, .. } = io.kind {
                std::mem::forget(buf);
            }
        }
    }
}
