//! A rail: one port of one device, which goes down and comes up again while the process runs; and
//! the thread that hears of it.

use super::device::Device;
use super::port::Port;
use super::status::{Concerns, concerns};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use tokio::sync::watch;

/// One port of one device.
pub(crate) struct Rail {
    pub(crate) device: Arc<Device>,
    number: u8,
    /// The port as it was when it last came up, or why it is down.
    state: watch::Sender<Result<Port, String>>,
    /// The device does no more work, whatever its port says.
    dead: AtomicBool,
}

impl Rail {
    /// Port `number` of `device`, up or down.
    pub(crate) fn new(device: &Arc<Device>, number: u8) -> Arc<Rail> {
        let state = watch::Sender::new(device.port(number));
        Arc::new(Rail { device: device.clone(), number, state, dead: AtomicBool::new(false) })
    }

    /// The port's number.
    pub(crate) fn number(&self) -> u8 {
        self.number
    }

    /// "mlx5_0", or "mlx5_0:2" for another port than the first.
    pub(crate) fn name(&self) -> String {
        match self.number {
            1 => self.device.name().to_owned(),
            n => format!("{}:{n}", self.device.name()),
        }
    }

    /// The port, if it is up.
    ///
    /// # Errors
    /// Why it is down, in words: "port 1 is down".
    pub(crate) fn port(&self) -> Result<Port, String> {
        self.state.borrow().clone()
    }

    /// Looks at the port again. Events tell of changes by themselves; this is for whoever is about
    /// to depend on a port that was down.
    pub(crate) fn refresh(&self) -> Result<Port, String> {
        if self.dead.load(Ordering::Relaxed) {
            return self.port();
        }
        let now = self.device.port(self.number);
        self.set(now.clone());
        now
    }

    fn set(&self, now: Result<Port, String>) {
        let changed = self.state.send_if_modified(|state| {
            let changed = *state != now;
            state.clone_from(&now);
            changed
        });
        if changed {
            match now {
                Ok(port) => {
                    tracing::info!(rail = self.name(), address = %port.gid.address(), "an RDMA rail is up")
                }
                Err(reason) => tracing::warn!(rail = self.name(), %reason, "an RDMA rail is down"),
            }
        }
    }

    /// Waits until the rail is down; returns why.
    pub(crate) async fn until_down(&self) -> String {
        let mut state = self.state.subscribe();
        let down = state.wait_for(Result::is_err).await;
        // The sender is `self`, which is borrowed.
        down.map_or_else(|_| "the rail is gone".to_owned(), |state| state.clone().err().unwrap_or_default())
    }

    /// Acts on an asynchronous event of the device about `port` (0: it names none).
    fn hear(&self, event: u32, port: u8) {
        match concerns(event) {
            Concerns::Device(reason) => {
                self.dead.store(true, Ordering::Relaxed);
                self.set(Err(reason.to_owned()));
            }
            Concerns::PortDown(_) if port == self.number => {
                self.set(Err(format!("port {} is down", self.number)));
            }
            Concerns::PortUp if port == self.number => {
                let _ = self.refresh();
            }
            _ => {}
        }
    }
}

impl std::fmt::Debug for Rail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rail").field("name", &self.name()).field("state", &*self.state.borrow()).finish()
    }
}

/// The thread that takes asynchronous events of the devices of `rails` and acts on them. A thread of
/// its own, because channels live without a runtime, and a queue pair cannot be destroyed while an
/// event of it waits to be acknowledged.
pub(crate) struct Watcher {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts it.
    pub(crate) fn start(rails: Vec<Arc<Rail>>) -> io::Result<Watcher> {
        // SAFETY: a plain system call.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, owned by nobody else.
        let stop = unsafe { OwnedFd::from_raw_fd(fd) };
        let heard = stop.try_clone()?;
        let thread =
            std::thread::Builder::new().name("rdma-events".into()).spawn(move || listen(&rails, &heard))?;
        Ok(Watcher { stop, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let one = 1u64;
        // SAFETY: eight bytes of a live variable to a live descriptor.
        unsafe { libc::write(self.stop.as_raw_fd(), (&raw const one).cast(), 8) };
        if let Some(thread) = self.thread.take() {
            // It waits for nothing but the descriptors; a panic in it was reported there.
            let _ = thread.join();
        }
    }
}

fn listen(rails: &[Arc<Rail>], stop: &OwnedFd) {
    let mut devices: Vec<&Arc<Device>> = Vec::new();
    for rail in rails {
        if !devices.iter().any(|d| Arc::ptr_eq(d, &rail.device)) {
            devices.push(&rail.device);
        }
    }
    let fds = std::iter::once(stop.as_raw_fd()).chain(devices.iter().map(|d| d.event_fd()));
    let mut fds: Vec<libc::pollfd> =
        fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    loop {
        // SAFETY: a live array of its length.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if ready < 0 {
            if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
                continue;
            }
            tracing::error!(error = %io::Error::last_os_error(), "cannot wait for events of RDMA devices");
            return;
        }
        if fds[0].revents != 0 {
            return;
        }
        for (device, fd) in devices.iter().zip(&mut fds[1..]) {
            if fd.revents == 0 {
                continue;
            }
            while let Some((event, port)) = device.next_event() {
                tracing::debug!(device = device.name(), event, port, "an RDMA event");
                for rail in rails.iter().filter(|r| Arc::ptr_eq(&r.device, device)) {
                    rail.hear(event, port);
                }
            }
            // A device that was removed reads as an error for ever.
            if fd.revents & (libc::POLLERR | libc::POLLHUP | libc::POLLNVAL) != 0 {
                for rail in rails.iter().filter(|r| Arc::ptr_eq(&r.device, device)) {
                    rail.hear(super::ffi::event::DEVICE_FATAL, 0);
                }
                fd.fd = -1;
            }
        }
    }
}
