//! What a forked child inherits: none of our sockets.
//!
//! A DataLoader worker is a fork without exec: it would keep this rank's connections open, and a
//! SIGKILL of the rank would go unnoticed by its peers as long as the worker lives. So every
//! descriptor whose end means something is registered here, and the child closes them all before
//! it runs anything else (`pthread_atfork`). Processes that are started by exec close them by
//! CLOEXEC. Shared memory is excluded from forks by `MADV_DONTFORK`.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, Ordering};

/// Descriptors that can be registered at once; beyond, a child closes them late (at its end).
const PLACES: usize = 16384;

static REGISTERED: [AtomicI32; PLACES] = [const { AtomicI32::new(-1) }; PLACES];
static INSTALL: Once = Once::new();

/// A registered descriptor; registered until dropped. Drop it before the descriptor is closed.
pub(crate) struct Guarded(Option<usize>);

/// Has forked children close this descriptor.
pub(crate) fn guard(fd: BorrowedFd<'_>) -> Guarded {
    INSTALL.call_once(|| {
        // SAFETY: the handler only loads atomics and calls close, both allowed in a forked child
        // of a threaded process.
        unsafe { libc::pthread_atfork(None, None, Some(close_all)) };
    });
    let raw = fd.as_raw_fd();
    let place = REGISTERED
        .iter()
        .position(|p| p.compare_exchange(-1, raw, Ordering::AcqRel, Ordering::Relaxed).is_ok());
    Guarded(place)
}

extern "C" fn close_all() {
    for place in &REGISTERED {
        let fd = place.swap(-1, Ordering::AcqRel);
        if fd >= 0 {
            // SAFETY: in the child only; whoever owns the descriptor there must not use the group
            // (checked by process id) and leaks it.
            unsafe { libc::close(fd) };
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(place) = self.0 {
            REGISTERED[place].store(-1, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_forked_child_does_not_hold_a_guarded_descriptor() {
        let (mine, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (kept, kept_peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let _guard = guard(theirs.as_fd());
        // SAFETY: the child calls only functions that are safe after fork: pause-like sleep, exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe {
                libc::sleep(60);
                libc::_exit(0);
            }
        }
        drop((theirs, kept_peer));
        let ends = |stream: &std::os::unix::net::UnixStream| {
            stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
            let mut byte = [0; 1];
            std::io::Read::read(&mut &*stream, &mut byte)
        };
        assert_eq!(ends(&mine).unwrap(), 0, "the end is seen although the child lives");
        // The control: without the guard the living child hides the end.
        kept.set_nonblocking(true).unwrap();
        let error = std::io::Read::read(&mut &kept, &mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        // SAFETY: our own child.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
    }
}
