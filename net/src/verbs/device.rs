//! Owners of verbs objects: a device with its protection domain, registrations, and a queue pair
//! with its completion queue and channel. Each destroys what it made, in the order that the
//! library asks for.

use super::ffi::{self, Api, mask};
use crate::buf::{Buf, BufMut};
use crate::error::LinkError;
use std::any::Any;
use std::ffi::{CStr, c_int, c_uint, c_void};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Work requests in flight on the send side, and receives posted.
pub(crate) const DEPTH: usize = 64;
/// READs in flight at one time; every verbs device takes as many.
const READS: u8 = 4;
const PORT: u8 = 1;

/// Names fabric instances, as registrations are kept with pool blocks by this number.
static NEXT_FABRIC: AtomicU64 = AtomicU64::new(1);

/// An open device.
pub(crate) struct Device {
    api: &'static Api,
    name: String,
    context: NonNull<ffi::ibv_context>,
    pd: NonNull<ffi::ibv_pd>,
    gid: ffi::ibv_gid,
    gid_index: u8,
    mtu: c_uint,
    fabric: u64,
    registrations: AtomicUsize,
}

// SAFETY: verbs objects may be used from any thread; the library locks where it must.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// Builds the error of a failed call from `errno`.
fn failed(device: &str, what: &'static str) -> LinkError {
    refused(device, what, &io::Error::last_os_error().to_string())
}

fn refused(device: &str, what: &'static str, reason: &str) -> LinkError {
    LinkError::Device { device: device.to_owned(), what, reason: reason.to_owned() }
}

/// Verbs calls that return an error number.
fn check(code: c_int, device: &str, what: &'static str) -> Result<(), LinkError> {
    match code {
        0 => Ok(()),
        code => Err(refused(device, what, &io::Error::from_raw_os_error(code.abs()).to_string())),
    }
}

impl Device {
    /// Opens `name` (such as "mlx5_0"). Fails where there is no library, no such device, or no
    /// usable port: the caller then falls back to TCP.
    pub(crate) fn open(name: &str) -> Result<Arc<Device>, LinkError> {
        let api = ffi::api().map_err(|reason| refused("libibverbs", "loading it", reason))?;
        let mut count = 0;
        // SAFETY: an out parameter; the list is freed below.
        let list = unsafe { (api.ibv_get_device_list)(&mut count) };
        if list.is_null() {
            return Err(failed(name, "listing the devices"));
        }
        let mut context = None;
        for i in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: the list has `count` valid entries until it is freed.
            let device = unsafe { *list.add(i) };
            // SAFETY: a device of the list; its name is a C string that lives with it.
            let found = unsafe { CStr::from_ptr((api.ibv_get_device_name)(device)) };
            if found.to_bytes() == name.as_bytes() {
                // SAFETY: a device of the list.
                context = Some(unsafe { (api.ibv_open_device)(device) });
            }
        }
        // SAFETY: made by ibv_get_device_list; an open device stays good without it.
        unsafe { (api.ibv_free_device_list)(list) };
        let context = context.ok_or_else(|| refused(name, "finding it", "no RDMA device has this name"))?;
        let context = NonNull::new(context).ok_or_else(|| failed(name, "opening it"))?;
        // SAFETY: an open device.
        let Some(pd) = NonNull::new(unsafe { (api.ibv_alloc_pd)(context.as_ptr()) }) else {
            let error = failed(name, "making a protection domain");
            // SAFETY: opened above, nothing else uses it.
            unsafe { (api.ibv_close_device)(context.as_ptr()) };
            return Err(error);
        };
        let fabric = NEXT_FABRIC.fetch_add(1, Ordering::Relaxed);
        let mut device = Device {
            api,
            name: name.to_owned(),
            context,
            pd,
            gid: ffi::ibv_gid::default(),
            gid_index: 0,
            mtu: 0,
            fabric,
            registrations: AtomicUsize::new(0),
        };
        device.look_at_port()?;
        Ok(Arc::new(device))
    }

    fn look_at_port(&mut self) -> Result<(), LinkError> {
        let mut port = ffi::ibv_port_attr::default();
        // SAFETY: an open device and an out parameter that is larger than what the call writes.
        let code = unsafe { (self.api.ibv_query_port)(self.context.as_ptr(), PORT, &mut port) };
        check(code, &self.name, "querying its port")?;
        if port.state != ffi::IBV_PORT_ACTIVE {
            return Err(refused(&self.name, "using its port", "the port is not active"));
        }
        self.mtu = port.active_mtu;
        // RoCE v2 over IPv4 routes everywhere; its GID is the address mapped into IPv6. The first
        // such entry of type "v2", else whatever the first entry is (InfiniBand).
        for index in 0..port.gid_tbl_len.clamp(0, 255) {
            let mut gid = ffi::ibv_gid::default();
            // SAFETY: an open device and an out parameter.
            if unsafe { (self.api.ibv_query_gid)(self.context.as_ptr(), PORT, index, &mut gid) } != 0 {
                continue;
            }
            let path = format!("/sys/class/infiniband/{}/ports/{PORT}/gid_attrs/types/{index}", self.name);
            let v2 = std::fs::read_to_string(path).is_ok_and(|t| t.trim() == "RoCE v2");
            let v4 = gid.raw[..10] == [0; 10] && gid.raw[10..12] == [0xFF; 2];
            if index == 0 || (v2 && v4) {
                (self.gid, self.gid_index) = (gid, index as u8);
                if v2 && v4 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// As the system names it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Registrations made so far: blocks are registered once, so it stops growing.
    #[cfg(test)]
    pub(crate) fn registrations_made(&self) -> usize {
        self.registrations.load(Ordering::Relaxed)
    }

    fn register(
        self: &Arc<Self>,
        address: *mut u8,
        len: usize,
    ) -> Result<Arc<dyn Any + Send + Sync>, LinkError> {
        let access = ffi::IBV_ACCESS_LOCAL_WRITE | ffi::IBV_ACCESS_REMOTE_WRITE | ffi::IBV_ACCESS_REMOTE_READ;
        // SAFETY: the memory is a pool block's, which drops this registration before it is freed.
        let mr = unsafe { (self.api.ibv_reg_mr)(self.pd.as_ptr(), address.cast(), len, access) };
        let mr = NonNull::new(mr).ok_or_else(|| failed(&self.name, "registering memory"))?;
        self.registrations.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Registration { mr, device: self.clone() }))
    }

    /// The keys of a receive buffer's block.
    pub(crate) fn keys_of_mut(self: &Arc<Self>, buf: &BufMut) -> Result<Keys, LinkError> {
        Ok(Keys::of(&buf.registration(self.fabric, |p, n| self.register(p, n))?))
    }

    /// The keys of a shared buffer's block.
    pub(crate) fn keys_of(self: &Arc<Self>, buf: &Buf) -> Result<Keys, LinkError> {
        Ok(Keys::of(&buf.registration(self.fabric, |p, n| self.register(p, n))?))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: registrations and queues hold the device, so nothing uses either any more.
        unsafe {
            (self.api.ibv_dealloc_pd)(self.pd.as_ptr());
            (self.api.ibv_close_device)(self.context.as_ptr());
        }
    }
}

/// How a block's memory is named: locally and by the peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keys {
    pub(crate) local: u32,
    pub(crate) remote: u32,
}

impl Keys {
    fn of(registration: &Arc<dyn Any + Send + Sync>) -> Keys {
        let registration: &Registration =
            registration.downcast_ref().expect("a fabric's number finds its own registrations");
        // SAFETY: the registration is alive.
        let mr = unsafe { registration.mr.as_ref() };
        Keys { local: mr.lkey, remote: mr.rkey }
    }
}

struct Registration {
    mr: NonNull<ffi::ibv_mr>,
    device: Arc<Device>,
}

// SAFETY: see `Device`.
unsafe impl Send for Registration {}
// SAFETY: see `Device`.
unsafe impl Sync for Registration {}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: registered by this device and not used by work in flight, which holds its buffers.
        unsafe { (self.device.api.ibv_dereg_mr)(self.mr.as_ptr()) };
    }
}

/// What the peer needs to know about a queue pair.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) qp: u32,
    pub(crate) psn: u32,
    pub(crate) gid: [u8; 16],
    pub(crate) mtu: u32,
}

/// A reliable connected queue pair with its own completion queue and event channel.
pub(crate) struct Queue {
    device: Arc<Device>,
    channel: NonNull<ffi::ibv_comp_channel>,
    cq: NonNull<ffi::ibv_cq>,
    qp: NonNull<ffi::ibv_qp>,
    psn: u32,
}

// SAFETY: see `Device`.
unsafe impl Send for Queue {}

impl Queue {
    /// Makes a queue pair in the INIT state: receives may be posted.
    pub(crate) fn new(device: &Arc<Device>, psn: u32) -> Result<Queue, LinkError> {
        let (api, name) = (device.api, device.name.as_str());
        // SAFETY: an open device.
        let channel = unsafe { (api.ibv_create_comp_channel)(device.context.as_ptr()) };
        let channel = NonNull::new(channel).ok_or_else(|| failed(name, "making a completion channel"))?;
        let size = 2 * DEPTH as c_int;
        let none = std::ptr::null_mut::<c_void>();
        // SAFETY: an open device and a live channel of it.
        let cq = unsafe { (api.ibv_create_cq)(device.context.as_ptr(), size, none, channel.as_ptr(), 0) };
        let Some(cq) = NonNull::new(cq) else {
            let error = failed(name, "making a completion queue");
            // SAFETY: made above, used by nothing.
            unsafe { (api.ibv_destroy_comp_channel)(channel.as_ptr()) };
            return Err(error);
        };
        let mut init = ffi::ibv_qp_init_attr {
            qp_context: none,
            send_cq: cq.as_ptr(),
            recv_cq: cq.as_ptr(),
            srq: std::ptr::null_mut(),
            cap: ffi::ibv_qp_cap {
                max_send_wr: DEPTH as u32,
                max_recv_wr: DEPTH as u32,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: ffi::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: live objects of one device.
        let Some(qp) = NonNull::new(unsafe { (api.ibv_create_qp)(device.pd.as_ptr(), &mut init) }) else {
            let error = failed(name, "making a queue pair");
            // SAFETY: made above, used by nothing.
            unsafe {
                (api.ibv_destroy_cq)(cq.as_ptr());
                (api.ibv_destroy_comp_channel)(channel.as_ptr());
            }
            return Err(error);
        };
        let queue = Queue { device: device.clone(), channel, cq, qp, psn: psn & 0xFF_FFFF };
        set_nonblocking(queue.fd()).map_err(LinkError::Io)?;
        queue.arm()?;
        let mut attr = ffi::ibv_qp_attr {
            qp_state: ffi::IBV_QPS_INIT,
            port_num: PORT,
            qp_access_flags: (ffi::IBV_ACCESS_REMOTE_WRITE | ffi::IBV_ACCESS_REMOTE_READ) as c_uint,
            ..Default::default()
        };
        queue.modify(
            &mut attr,
            mask::STATE | mask::PKEY_INDEX | mask::PORT | mask::ACCESS,
            "initialising",
        )?;
        Ok(queue)
    }

    fn modify(&self, attr: &mut ffi::ibv_qp_attr, mask: c_int, what: &'static str) -> Result<(), LinkError> {
        // SAFETY: a live queue pair and a complete attribute struct.
        let code = unsafe { (self.device.api.ibv_modify_qp)(self.qp.as_ptr(), attr, mask) };
        check(code, &self.device.name, what)
    }

    pub(crate) fn address(&self) -> Address {
        // SAFETY: a live queue pair.
        let qp = unsafe { self.qp.as_ref() }.qp_num;
        Address { qp, psn: self.psn, gid: self.device.gid.raw, mtu: self.device.mtu }
    }

    /// Connects to the peer's queue pair: both may send once both have done this.
    pub(crate) fn connect(&self, peer: &Address) -> Result<(), LinkError> {
        let mut attr = ffi::ibv_qp_attr {
            qp_state: ffi::IBV_QPS_RTR,
            path_mtu: self.device.mtu.min(peer.mtu),
            dest_qp_num: peer.qp,
            rq_psn: peer.psn & 0xFF_FFFF,
            max_dest_rd_atomic: READS,
            // 10 microseconds before a sender that found no receive posted tries again.
            min_rnr_timer: 1,
            ah_attr: ffi::ibv_ah_attr {
                grh: ffi::ibv_global_route {
                    dgid: ffi::ibv_gid { raw: peer.gid },
                    sgid_index: self.device.gid_index,
                    hop_limit: 64,
                    ..Default::default()
                },
                is_global: 1,
                port_num: PORT,
                ..Default::default()
            },
            ..Default::default()
        };
        let rtr = mask::AV | mask::PATH_MTU | mask::DEST_QPN | mask::RQ_PSN | mask::MAX_DEST_RD_ATOMIC;
        self.modify(&mut attr, mask::STATE | rtr | mask::MIN_RNR_TIMER, "connecting (to ready-to-receive)")?;
        attr.qp_state = ffi::IBV_QPS_RTS;
        // 4.096 us * 2^16 = 268 ms before a retransmission, seven times: a dead path shows in two
        // seconds. A peer that is alive but has no receive posted is waited for (7 = for ever); the
        // stall timer bounds that.
        (attr.timeout, attr.retry_cnt, attr.rnr_retry) = (16, 7, 7);
        (attr.sq_psn, attr.max_rd_atomic) = (self.psn, READS);
        let rts = mask::TIMEOUT | mask::RETRY_CNT | mask::RNR_RETRY | mask::SQ_PSN | mask::MAX_RD_ATOMIC;
        self.modify(&mut attr, mask::STATE | rts, "connecting (to ready-to-send)")
    }

    /// Posts one send-side work request.
    ///
    /// # Safety
    /// The memory of `sge` must stay valid (for a READ, untouched) until its completion was polled
    /// or the queue was destroyed.
    pub(crate) unsafe fn post(
        &self,
        id: u64,
        opcode: c_uint,
        mut sge: ffi::ibv_sge,
        remote: (u64, u32),
    ) -> Result<(), LinkError> {
        let mut wr = ffi::ibv_send_wr::new(id, opcode, &mut sge);
        (wr.remote_addr, wr.rkey) = remote;
        let mut bad = std::ptr::null_mut();
        // SAFETY: the context's table has this entry; the request and its list outlive the call.
        let code = unsafe {
            let post_send = (*self.device.context.as_ptr()).ops.post_send;
            post_send(self.qp.as_ptr(), &mut wr, &mut bad)
        };
        check(code, &self.device.name, "posting work")
    }

    /// Posts one receive.
    ///
    /// # Safety
    /// The memory of `sge` must stay valid and untouched until its completion was polled or the
    /// queue was destroyed.
    pub(crate) unsafe fn post_recv(&self, id: u64, mut sge: ffi::ibv_sge) -> Result<(), LinkError> {
        let mut wr =
            ffi::ibv_recv_wr { wr_id: id, next: std::ptr::null_mut(), sg_list: &mut sge, num_sge: 1 };
        let mut bad = std::ptr::null_mut();
        // SAFETY: the context's table has this entry; the request and its list outlive the call.
        let code = unsafe {
            let post_recv = (*self.device.context.as_ptr()).ops.post_recv;
            post_recv(self.qp.as_ptr(), &mut wr, &mut bad)
        };
        check(code, &self.device.name, "posting a receive")
    }

    fn fd(&self) -> RawFd {
        // SAFETY: a live channel.
        unsafe { self.channel.as_ref() }.fd
    }

    /// A descriptor of the event channel with a life of its own.
    pub(crate) fn events(&self) -> io::Result<OwnedFd> {
        // SAFETY: a plain system call on a live descriptor.
        let fd = unsafe { libc::fcntl(self.fd(), libc::F_DUPFD_CLOEXEC, 0) };
        // SAFETY: just made, owned by nobody else.
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
    }

    fn arm(&self) -> Result<(), LinkError> {
        // SAFETY: the context's table has this entry; a live completion queue.
        let code = unsafe { ((*self.device.context.as_ptr()).ops.req_notify_cq)(self.cq.as_ptr(), 0) };
        check(code, &self.device.name, "arming the completion queue")
    }

    /// Takes events off the channel, arms it again and takes all completions: whatever completes
    /// after the last look makes a new event. Returns the number of events.
    pub(crate) fn drain(&self, out: &mut Vec<ffi::ibv_wc>) -> Result<usize, LinkError> {
        let mut events = 0;
        let (mut cq, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a live, non-blocking channel and out parameters.
        while unsafe { (self.device.api.ibv_get_cq_event)(self.channel.as_ptr(), &mut cq, &mut context) } == 0
        {
            events += 1;
            // SAFETY: the channel's only completion queue is ours.
            unsafe { (self.device.api.ibv_ack_cq_events)(cq, 1) };
        }
        self.arm()?;
        loop {
            let mut some = [ffi::ibv_wc::default(); 16];
            // SAFETY: the context's table has this entry; room for 16.
            let n = unsafe {
                ((*self.device.context.as_ptr()).ops.poll_cq)(self.cq.as_ptr(), 16, some.as_mut_ptr())
            };
            let Ok(n) = usize::try_from(n) else {
                return Err(refused(&self.device.name, "polling completions", "the library says no"));
            };
            out.extend_from_slice(&some[..n.min(16)]);
            if n == 0 {
                return Ok(events);
            }
        }
    }

    /// What a failed completion means.
    pub(crate) fn error(&self, wc: &ffi::ibv_wc, what: &'static str) -> LinkError {
        // SAFETY: returns a constant C string for any number.
        let text = unsafe { CStr::from_ptr((self.device.api.ibv_wc_status_str)(wc.status)) };
        refused(&self.device.name, what, &text.to_string_lossy())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let api = self.device.api;
        // SAFETY: made by `new`, destroyed once, in the order queue pair, completion queue, channel;
        // all events have been acknowledged. After the first no memory is touched any more.
        unsafe {
            (api.ibv_destroy_qp)(self.qp.as_ptr());
            (api.ibv_destroy_cq)(self.cq.as_ptr());
            (api.ibv_destroy_comp_channel)(self.channel.as_ptr());
        }
    }
}

fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: plain system calls on a live descriptor.
    let done = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        flags >= 0 && libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) >= 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}
