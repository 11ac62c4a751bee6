//! An open device with its protection domain, and memory registered with it.

use super::ffi::{self, Api};
use super::port::{self, Gid, LinkLayer, Port};
use crate::buf::{Buf, BufMut};
use crate::error::LinkError;
use firefly_types::lock;
use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CStr, c_int};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Names device instances, as registrations are kept with pool blocks by this number.
static NEXT_INSTANCE: AtomicU64 = AtomicU64::new(1);

/// What a device allows, of what is used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Work requests of one queue.
    pub(crate) queue: u32,
    /// Completions of one completion queue.
    pub(crate) completions: u32,
    /// Pieces of local memory in one request.
    pub(crate) pieces: u32,
    /// READs that a queue pair may have in flight.
    pub(crate) reads: u8,
    /// Memory windows of type 2 that may be used; 0 without them.
    pub(crate) windows: u32,
    /// Ports, numbered from 1.
    pub(crate) ports: u8,
}

/// What was done with one device since it was opened.
#[derive(Debug, Default)]
pub(crate) struct DeviceCounters {
    pub(crate) registrations: AtomicU64,
    pub(crate) queue_pairs: AtomicU64,
    pub(crate) sends: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) reads: AtomicU64,
    /// Bytes of all of these, as posted.
    pub(crate) bytes: AtomicU64,
    pub(crate) receives: AtomicU64,
    pub(crate) completions: AtomicU64,
    pub(crate) events: AtomicU64,
    pub(crate) inline: AtomicU64,
    pub(crate) binds: AtomicU64,
    pub(crate) invalidations: AtomicU64,
}

/// Called with the reason when a queue pair has failed outside of any work of its own.
pub(super) type QueueAlarm = Arc<dyn Fn(&str) + Send + Sync>;

/// An open device.
pub(crate) struct Device {
    pub(super) api: &'static Api,
    name: String,
    pub(super) context: NonNull<ffi::ibv_context>,
    pub(super) pd: NonNull<ffi::ibv_pd>,
    instance: u64,
    limits: Limits,
    pub(crate) counters: DeviceCounters,
    /// Live queue pairs that want to hear of their failure, by number.
    pub(super) alarms: Mutex<HashMap<u32, QueueAlarm>>,
    /// Registrations of pool blocks by local key, as windows are bound to them: addresses of
    /// `ibv_mr`.
    blocks: Mutex<HashMap<u32, usize>>,
}

// SAFETY: verbs objects may be used from any thread; the library locks where it must.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// Builds the error of a failed call from `errno`.
pub(super) fn failed(device: &str, what: &'static str) -> LinkError {
    refused(device, what, &io::Error::last_os_error().to_string())
}

pub(super) fn refused(device: &str, what: &'static str, reason: &str) -> LinkError {
    LinkError::Device { device: device.to_owned(), what, reason: reason.to_owned() }
}

/// Verbs calls that return an error number.
pub(super) fn check(code: c_int, device: &str, what: &'static str) -> Result<(), LinkError> {
    match code {
        0 => Ok(()),
        code => Err(refused(device, what, &io::Error::from_raw_os_error(code.abs()).to_string())),
    }
}

/// The devices that the library lists, until dropped.
struct List {
    api: &'static Api,
    first: NonNull<*mut ffi::ibv_device>,
    count: usize,
}

impl List {
    /// The error is a reason in words.
    fn get() -> Result<List, String> {
        let api = ffi::api().map_err(str::to_owned)?;
        let mut count = 0;
        // SAFETY: an out parameter; the list is freed in drop.
        let list = unsafe { (api.ibv_get_device_list)(&mut count) };
        // A kernel without RDMA is told by errno: ENOSYS.
        let first = NonNull::new(list).ok_or_else(|| {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::ENOSYS) => "no RDMA device: the kernel has no RDMA support loaded".to_owned(),
                _ => format!("libibverbs cannot list the RDMA devices: {error}"),
            }
        })?;
        Ok(List { api, first, count: usize::try_from(count).unwrap_or(0) })
    }

    fn names(&self) -> impl Iterator<Item = (String, *mut ffi::ibv_device)> {
        (0..self.count).map(|i| {
            // SAFETY: the list has `count` valid entries until it is freed.
            let device = unsafe { *self.first.as_ptr().add(i) };
            // SAFETY: a device of the list; its name is a C string that lives with it.
            let name = unsafe { CStr::from_ptr((self.api.ibv_get_device_name)(device)) };
            (name.to_string_lossy().into_owned(), device)
        })
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: made by ibv_get_device_list; an open device stays good without it.
        unsafe { (self.api.ibv_free_device_list)(self.first.as_ptr()) };
    }
}

impl Device {
    /// Names of this machine's devices, such as "mlx5_0".
    ///
    /// # Errors
    /// Why there can be none, in words: no library, or a kernel without RDMA.
    pub(crate) fn names() -> Result<Vec<String>, String> {
        let mut names: Vec<String> = List::get()?.names().map(|(name, _)| name).collect();
        names.sort();
        Ok(names)
    }

    /// Opens `name`. With `windows`, peers are given keys of memory windows, if it has them.
    ///
    /// # Errors
    /// There is no library, no such device, or the device says no.
    pub(crate) fn open(name: &str, windows: bool) -> Result<Arc<Device>, LinkError> {
        let list = List::get().map_err(|reason| refused(name, "finding it", &reason))?;
        let api = list.api;
        let found = list.names().find(|(n, _)| n == name);
        let (_, device) = found.ok_or_else(|| refused(name, "finding it", "no RDMA device has this name"))?;
        // SAFETY: a device of the list, which is alive.
        let context = NonNull::new(unsafe { (api.ibv_open_device)(device) });
        let context = context.ok_or_else(|| failed(name, "opening it"))?;
        drop(list);
        let close = |error| {
            // SAFETY: opened above, nothing else uses it.
            unsafe { (api.ibv_close_device)(context.as_ptr()) };
            Err(error)
        };
        let mut attr = MaybeUninit::<ffi::ibv_device_attr>::zeroed();
        // SAFETY: an open device and an out parameter of the library's own layout.
        let code = unsafe { (api.ibv_query_device)(context.as_ptr(), attr.as_mut_ptr()) };
        if let Err(e) = check(code, name, "asking for its limits") {
            return close(e);
        }
        // SAFETY: plain numbers: zeros are valid, and the call succeeded.
        let attr = unsafe { attr.assume_init() };
        // A descriptor that is read when it is readable must not block when it is not after all.
        // SAFETY: an open device.
        if let Err(e) = set_nonblocking(unsafe { context.as_ref() }.async_fd) {
            return close(LinkError::Io(e));
        }
        // SAFETY: an open device.
        let Some(pd) = NonNull::new(unsafe { (api.ibv_alloc_pd)(context.as_ptr()) }) else {
            return close(failed(name, "making a protection domain"));
        };
        let at_least_1 = |n: c_int| u32::try_from(n).unwrap_or(0).max(1);
        let type_2 = ffi::IBV_DEVICE_MEM_WINDOW_TYPE_2A | ffi::IBV_DEVICE_MEM_WINDOW_TYPE_2B;
        let windows = if windows && attr.device_cap_flags & type_2 != 0 { attr.max_mw } else { 0 };
        let limits = Limits {
            queue: at_least_1(attr.max_qp_wr),
            completions: at_least_1(attr.max_cqe),
            pieces: at_least_1(attr.max_sge),
            reads: at_least_1(attr.max_qp_rd_atom.min(attr.max_qp_init_rd_atom)).min(16) as u8,
            windows: u32::try_from(windows).unwrap_or(0),
            ports: attr.phys_port_cnt,
        };
        Ok(Arc::new(Device {
            api,
            name: name.to_owned(),
            context,
            pd,
            instance: NEXT_INSTANCE.fetch_add(1, Ordering::Relaxed),
            limits,
            counters: DeviceCounters::default(),
            alarms: Mutex::default(),
            blocks: Mutex::default(),
        }))
    }

    /// As the system names it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What it allows.
    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether peers are given keys of memory windows rather than of whole blocks.
    pub(crate) fn has_windows(&self) -> bool {
        self.limits.windows > 0
    }

    /// The key of a block that goes into a [`Window`](crate::link::Window): what windows are bound
    /// by where there are windows, else what the peer uses.
    pub(crate) fn key_of(&self, keys: Keys) -> u32 {
        if self.has_windows() { keys.local } else { keys.remote }
    }

    /// The registration of the pool block with this local key.
    pub(super) fn block(&self, local: u32) -> Option<*mut ffi::ibv_mr> {
        lock(&self.blocks).get(&local).map(|mr| *mr as *mut ffi::ibv_mr)
    }

    /// Looks at port `number`.
    ///
    /// # Errors
    /// Why it cannot be used, in words: "port 1 is down".
    pub(crate) fn port(&self, number: u8) -> Result<Port, String> {
        let mut attr = ffi::ibv_port_attr::default();
        // SAFETY: an open device and an out parameter that is larger than what the call writes.
        let code = unsafe { (self.api.ibv_query_port)(self.context.as_ptr(), number, &mut attr) };
        if code != 0 {
            let error = io::Error::from_raw_os_error(code.abs());
            return Err(format!("port {number} cannot be queried: {error}"));
        }
        match attr.state {
            ffi::IBV_PORT_ACTIVE => {}
            1 => return Err(format!("port {number} is down")),
            2 | 3 => return Err(format!("port {number} waits for a subnet manager")),
            other => return Err(format!("port {number} is not active (state {other})")),
        }
        let link = match attr.link_layer {
            ffi::IBV_LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
            _ => LinkLayer::InfiniBand,
        };
        let folder = port::folder(&self.name, number);
        let (mut gids, mut netdev) = (Vec::new(), None);
        for index in 0..attr.gid_tbl_len.clamp(0, 255) {
            let mut gid = ffi::ibv_gid::default();
            // SAFETY: an open device and an out parameter.
            let code = unsafe { (self.api.ibv_query_gid)(self.context.as_ptr(), number, index, &mut gid) };
            if code == 0 && gid.raw != [0; 16] {
                let (kind, ndev) = port::gid_attributes(&folder, index as u8);
                gids.push(Gid { raw: gid.raw, index: index as u8, kind });
                netdev = netdev.or(ndev);
            }
        }
        let gids = port::sort_gids(link, gids);
        let Some(gid) = gids.first().copied() else {
            return Err(format!(
                "port {number} has no address: give its network interface an IP address and set it up"
            ));
        };
        if !(1..=5).contains(&attr.active_mtu) {
            return Err(format!("port {number} reports the MTU code {}", attr.active_mtu));
        }
        Ok(Port { number, link, mtu: attr.active_mtu, lid: attr.lid, gid, gids, netdev })
    }

    /// Descriptors that a forked child must close: while it holds them, the kernel keeps this
    /// process's queue pairs and registrations alive, even if this process is killed.
    pub(crate) fn fork_fds(&self) -> [RawFd; 2] {
        // SAFETY: an open device.
        let context = unsafe { self.context.as_ref() };
        [context.cmd_fd, context.async_fd]
    }

    /// Readable when an asynchronous event waits.
    pub(crate) fn event_fd(&self) -> RawFd {
        // SAFETY: an open device.
        unsafe { self.context.as_ref() }.async_fd
    }

    /// The next asynchronous event, if one waits: its number and the port that it names. Events of
    /// queue pairs go to their alarms here; the queue pair cannot be destroyed before that is done.
    pub(crate) fn next_event(&self) -> Option<(u32, u8)> {
        let mut event = ffi::ibv_async_event { element: std::ptr::null_mut(), event_type: 0 };
        // SAFETY: an open device and an out parameter.
        if unsafe { (self.api.ibv_get_async_event)(self.context.as_ptr(), &mut event) } != 0 {
            return None;
        }
        let kind = event.event_type;
        let mut port = 0;
        match super::status::concerns(kind) {
            super::status::Concerns::Queue(reason) if kind != ffi::event::CQ_ERR => {
                let qp = event.element.cast::<ffi::ibv_qp>();
                // SAFETY: the element of a queue pair's event; destroying a queue pair waits until
                // its events are acknowledged, which is below.
                let number = unsafe { (*qp).qp_num };
                let alarm = lock(&self.alarms).get(&number).cloned();
                if let Some(alarm) = alarm {
                    alarm(reason);
                }
            }
            // The union's number is an `int` at its beginning.
            _ => port = (event.element as usize & 0xFF) as u8,
        }
        // SAFETY: taken above, acknowledged once.
        unsafe { (self.api.ibv_ack_async_event)(&mut event) };
        Some((kind, port))
    }

    /// The keys of a receive buffer's block.
    pub(crate) fn keys_of_mut(self: &Arc<Self>, buf: &BufMut) -> Result<Keys, LinkError> {
        Ok(keys(&buf.registration(self.instance, |p, n| self.register_block(p, n))?))
    }

    /// The keys of a shared buffer's block.
    pub(crate) fn keys_of(self: &Arc<Self>, buf: &Buf) -> Result<Keys, LinkError> {
        Ok(keys(&buf.registration(self.instance, |p, n| self.register_block(p, n))?))
    }

    fn register_block(
        self: &Arc<Self>,
        address: *mut u8,
        len: usize,
    ) -> Result<Arc<dyn Any + Send + Sync>, LinkError> {
        let reach = if self.has_windows() { Reach::Windows } else { Reach::Peer };
        // SAFETY: the memory is a pool block's, which drops this registration before it is freed.
        let region = unsafe { Region::new(self, address, len, reach) }?;
        // A block is dropped with its registration, so the entry goes with it.
        lock(&self.blocks).insert(region.keys().local, region.mr.as_ptr() as usize);
        Ok(Arc::new(Block(region)))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: regions and queues hold the device, so nothing uses either any more.
        unsafe {
            (self.api.ibv_dealloc_pd)(self.pd.as_ptr());
            (self.api.ibv_close_device)(self.context.as_ptr());
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("name", &self.name).field("limits", &self.limits).finish()
    }
}

/// Who may touch registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// This side's own work and messages that arrive into receives posted by it.
    Local,
    /// Also a peer that was given the remote key: READ and WRITE, on any queue pair of the device
    /// instance, until the registration ends.
    Peer,
    /// Also a peer through a memory window bound to it; the registration itself gives peers no
    /// right.
    Windows,
}

/// How registered memory is named: locally and by the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keys {
    pub(crate) local: u32,
    pub(crate) remote: u32,
}

fn keys(registration: &Arc<dyn Any + Send + Sync>) -> Keys {
    let block: &Block =
        registration.downcast_ref().expect("a device instance's number finds its own registrations");
    block.0.keys()
}

/// The registration of a pool block, which the device can find by its local key.
struct Block(Region);

impl Drop for Block {
    fn drop(&mut self) {
        lock(&self.0.device.blocks).remove(&self.0.keys().local);
    }
}

/// Memory registered with a device for as long as this lives.
pub(crate) struct Region {
    mr: NonNull<ffi::ibv_mr>,
    device: Arc<Device>,
}

// SAFETY: see `Device`.
unsafe impl Send for Region {}
// SAFETY: see `Device`.
unsafe impl Sync for Region {}

impl Region {
    /// Registers `len` bytes at `address`.
    ///
    /// Relaxed ordering is asked for always, and where kernel or device do not offer it, it is
    /// ignored: the device's writes into this memory may then become visible in any order among
    /// themselves, which across sockets and on some hosts is worth tens of percent of the bandwidth.
    /// It is sound because nobody here looks at memory to learn that something has arrived: all
    /// readers wait for a completion first (of the SEND after a WRITE, of a WRITE with immediate, of
    /// a READ), and a completion entry is written in strict order, behind all data before it.
    ///
    /// # Safety
    /// The memory must stay mapped until this is dropped, and must not be touched through Rust
    /// references in conflict with what the device does with it: a peer that holds the remote key
    /// of a region with [`Reach::Peer`] may read and write it at any time.
    pub(crate) unsafe fn new(
        device: &Arc<Device>,
        address: *mut u8,
        len: usize,
        reach: Reach,
    ) -> Result<Region, LinkError> {
        let mut access = ffi::IBV_ACCESS_LOCAL_WRITE;
        match reach {
            Reach::Local => {}
            Reach::Peer => access |= ffi::IBV_ACCESS_REMOTE_WRITE | ffi::IBV_ACCESS_REMOTE_READ,
            Reach::Windows => access |= ffi::IBV_ACCESS_MW_BIND,
        }
        let (api, pd, at) = (device.api, device.pd.as_ptr(), address.cast());
        let relaxed = (access | ffi::IBV_ACCESS_RELAXED_ORDERING) as u32;
        let mr = match api.ibv_reg_mr_iova2 {
            // SAFETY: the caller's promise about the memory.
            Some(register) => unsafe { register(pd, at, len, address as u64, relaxed) },
            None => std::ptr::null_mut(),
        };
        let mr = NonNull::new(mr).or_else(|| {
            // SAFETY: as above.
            NonNull::new(unsafe { (api.ibv_reg_mr)(pd, at, len, access) })
        });
        let mr = mr.ok_or_else(|| {
            let error = io::Error::last_os_error();
            let hint = match error.raw_os_error() {
                Some(libc::ENOMEM) => " (is the memlock limit of this process too low? ulimit -l)",
                _ => "",
            };
            refused(&device.name, "registering memory", &format!("{error}{hint}"))
        })?;
        device.counters.registrations.fetch_add(1, Ordering::Relaxed);
        Ok(Region { mr, device: device.clone() })
    }

    /// Its names.
    pub(crate) fn keys(&self) -> Keys {
        // SAFETY: the registration is alive.
        let mr = unsafe { self.mr.as_ref() };
        Keys { local: mr.lkey, remote: mr.rkey }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: registered by this device and not used by work in flight, which holds its memory.
        unsafe { (self.device.api.ibv_dereg_mr)(self.mr.as_ptr()) };
    }
}

pub(super) fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: plain system calls on a live descriptor.
    let done = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        flags >= 0 && libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) >= 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}
