//! A reliable connected queue pair with its own completion queue and event channel.
//!
//! Completions are taken by poll-then-arm, which loses none and costs an event only when there is
//! something to wait for:
//!
//! ```text
//!   poll until empty ── something came ──> handle it, poll again
//!        │ nothing
//!      arm ──> poll once more ── something came ──> handle it (the event comes later, or not)
//!        │ nothing
//!   wait for the descriptor ──> take_events ──> poll
//! ```

use super::device::{Device, QueueAlarm, check, failed, refused, set_nonblocking};
use super::ffi::{self, mask};
use super::port::{LinkLayer, Port};
use super::status::WorkError;
use super::window::MemoryWindow;
use crate::error::LinkError;
use crate::fabric::Class;
use firefly_types::lock;
use std::ffi::{c_int, c_uint, c_void};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How a queue pair is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueOptions {
    /// Send-side requests that may be in flight.
    pub(crate) sends: u32,
    /// Receives that may be posted.
    pub(crate) receives: u32,
    /// Pieces of local memory that one send-side request may have.
    pub(crate) pieces: u32,
    /// Bytes that a SEND or WRITE should be able to carry inline; [`Queue::inline_limit`] tells what
    /// came of it.
    pub(crate) inline: u32,
    /// How packets are marked.
    pub(crate) class: Class,
    /// Times that a SEND (or WRITE with immediate) to a peer without a posted receive is repeated
    /// before it is an error: 0 to 6; 7 would be for ever. Senders with credits never need one; the
    /// few allowed cover a receive that is being posted right now.
    pub(crate) rnr_retries: u8,
    /// READs that each side may have in flight.
    pub(crate) reads: u8,
}

impl Default for QueueOptions {
    fn default() -> Self {
        QueueOptions {
            sends: 128,
            receives: 128,
            pieces: 2,
            inline: 256,
            class: Class::default(),
            rnr_retries: 3,
            reads: 16,
        }
    }
}

/// A piece of the peer's memory, by the peer's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Remote {
    pub(crate) address: u64,
    pub(crate) key: u32,
}

/// What a send-side request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// Local memory into the peer's next receive.
    Send,
    /// Local memory into the peer's memory, unnoticed by its program.
    Write(Remote),
    /// The same, and the peer's next receive completes with this number.
    WriteImm(Remote, u32),
    /// The peer's memory into local memory.
    Read(Remote),
    /// As `Send`; on arrival the peer's window with this key is free again.
    SendInvalidate(u32),
    /// This side's window with this key is free again. Takes no memory.
    Invalidate(u32),
}

/// One send-side request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    /// Comes back in the completion.
    pub(crate) id: u64,
    pub(crate) op: Op,
    /// Without it there is no completion if all goes well. The send queue has room again only when
    /// a later request has completed: signal at least one in each `sends`.
    pub(crate) signaled: bool,
    /// The bytes are copied while posting: the memory may be changed at once and needs no key. At
    /// most [`Queue::inline_limit`] bytes, SEND and WRITE only.
    pub(crate) inline: bool,
}

/// What a peer may do through a memory window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WindowAccess {
    Read,
    Write,
}

/// A piece of local memory, as a device reads it.
pub(crate) type Piece = ffi::ibv_sge;

/// A piece of registered local memory; an inline request ignores the key.
pub(crate) fn piece(address: *const u8, len: usize, key: u32) -> Piece {
    debug_assert!(len <= u32::MAX as usize);
    ffi::ibv_sge { addr: address as u64, length: len as u32, lkey: key }
}

/// A completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Completion {
    /// As given with the request or the receive.
    pub(crate) id: u64,
    pub(crate) result: Result<Done, WorkError>,
    /// A window of this side's that the SEND which arrived has set free.
    pub(crate) invalidated: Option<u32>,
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// A send-side request.
    Request,
    /// A SEND arrived in this receive.
    Received {
        /// Its bytes.
        len: u32,
    },
    /// A WRITE with immediate used up this receive.
    Written {
        /// The bytes written.
        len: u32,
        /// The number given by the peer.
        imm: u32,
    },
}

impl Completion {
    fn of(wc: &ffi::ibv_wc) -> Completion {
        // Of a failed completion only id and status are defined.
        let result = if wc.status != ffi::IBV_WC_SUCCESS {
            Err(WorkError::of(wc.status))
        } else if wc.opcode == ffi::IBV_WC_RECV_RDMA_WITH_IMM {
            Ok(Done::Written { len: wc.byte_len, imm: u32::from_be(wc.imm_data) })
        } else if wc.opcode & ffi::IBV_WC_RECV != 0 {
            Ok(Done::Received { len: wc.byte_len })
        } else {
            Ok(Done::Request)
        };
        let frees = wc.wc_flags & (ffi::IBV_WC_WITH_INV | ffi::RXE_WC_WITH_INV) != 0
            && wc.wc_flags & ffi::IBV_WC_WITH_IMM == 0;
        let invalidated = (result.is_ok() && frees).then_some(wc.imm_data);
        Completion { id: wc.wr_id, result, invalidated }
    }
}

/// What the peer needs to know about a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) qp: u32,
    /// First packet sequence number.
    pub(crate) psn: u32,
    pub(crate) gid: [u8; 16],
    pub(crate) lid: u16,
    /// As `ibv_mtu`.
    pub(crate) mtu: u32,
    /// READs that it serves at one time.
    pub(crate) reads: u8,
}

/// The queue pair. Not to be shared between threads without a lock around it.
pub(crate) struct Queue {
    device: Arc<Device>,
    port: Port,
    options: QueueOptions,
    channel: NonNull<ffi::ibv_comp_channel>,
    cq: NonNull<ffi::ibv_cq>,
    qp: NonNull<ffi::ibv_qp>,
    psn: u32,
    inline_limit: usize,
}

// SAFETY: verbs objects may be used from any thread; the library locks where it must.
unsafe impl Send for Queue {}

impl Queue {
    /// Makes a queue pair in the INIT state: receives may be posted. `options` are cut to what the
    /// device allows.
    pub(crate) fn new(device: &Arc<Device>, port: &Port, options: &QueueOptions) -> Result<Queue, LinkError> {
        let (api, name, limits) = (device.api, device.name(), device.limits());
        let mut options = *options;
        options.sends = options.sends.clamp(1, limits.queue);
        options.receives = options.receives.clamp(1, limits.queue);
        options.pieces = options.pieces.clamp(1, limits.pieces);
        options.reads = options.reads.clamp(1, limits.reads);
        let completions = (options.sends + options.receives).min(limits.completions);
        // SAFETY: an open device.
        let channel = unsafe { (api.ibv_create_comp_channel)(device.context.as_ptr()) };
        let channel = NonNull::new(channel).ok_or_else(|| failed(name, "making a completion channel"))?;
        let none = std::ptr::null_mut::<c_void>();
        let size = completions as c_int;
        // SAFETY: an open device and a live channel of it.
        let cq = unsafe { (api.ibv_create_cq)(device.context.as_ptr(), size, none, channel.as_ptr(), 0) };
        let Some(cq) = NonNull::new(cq) else {
            let error = failed(name, "making a completion queue");
            // SAFETY: made above, used by nothing.
            unsafe { (api.ibv_destroy_comp_channel)(channel.as_ptr()) };
            return Err(error);
        };
        // There is no call that tells how much a device carries inline: ask for less until it agrees.
        let mut inline = options.inline;
        let (qp, cap) = loop {
            let mut init = ffi::ibv_qp_init_attr {
                qp_context: none,
                send_cq: cq.as_ptr(),
                recv_cq: cq.as_ptr(),
                srq: std::ptr::null_mut(),
                cap: ffi::ibv_qp_cap {
                    max_send_wr: options.sends,
                    max_recv_wr: options.receives,
                    max_send_sge: options.pieces,
                    max_recv_sge: 1,
                    max_inline_data: inline,
                },
                qp_type: ffi::IBV_QPT_RC,
                sq_sig_all: 0,
            };
            // SAFETY: live objects of one device.
            match NonNull::new(unsafe { (api.ibv_create_qp)(device.pd.as_ptr(), &mut init) }) {
                Some(qp) => break (qp, init.cap),
                None if inline > 0 => inline /= 2,
                None => {
                    let error = failed(name, "making a queue pair");
                    // SAFETY: made above, used by nothing.
                    unsafe {
                        (api.ibv_destroy_cq)(cq.as_ptr());
                        (api.ibv_destroy_comp_channel)(channel.as_ptr());
                    }
                    return Err(error);
                }
            }
        };
        device.counters.queue_pairs.fetch_add(1, Ordering::Relaxed);
        let psn = rand::Rng::next_u32(&mut rand::rng()) & 0xFF_FFFF;
        let inline_limit = cap.max_inline_data.min(inline) as usize;
        let (device, port) = (device.clone(), port.clone());
        let queue = Queue { device, port, options, channel, cq, qp, psn, inline_limit };
        set_nonblocking(queue.fd()).map_err(LinkError::Io)?;
        queue.arm()?;
        let mut attr = ffi::ibv_qp_attr {
            qp_state: ffi::IBV_QPS_INIT,
            port_num: queue.port.number,
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
        check(code, self.device.name(), what)
    }

    /// Its device.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// As made, cut to what the device allows.
    pub(crate) fn options(&self) -> &QueueOptions {
        &self.options
    }

    /// Most bytes of an inline request; 0 where the device has none.
    pub(crate) fn inline_limit(&self) -> usize {
        self.inline_limit
    }

    fn number(&self) -> u32 {
        // SAFETY: a live queue pair.
        unsafe { self.qp.as_ref() }.qp_num
    }

    /// What to tell the peer.
    pub(crate) fn address(&self) -> Address {
        Address {
            qp: self.number(),
            psn: self.psn,
            gid: self.port.gid.raw,
            lid: self.port.lid,
            mtu: self.port.mtu,
            reads: self.options.reads,
        }
    }

    /// Calls `alarm` with the reason when the device reports that this queue pair has failed, for
    /// which there may be no completion. It is called from the thread that takes the device's events
    /// and must not block.
    pub(crate) fn on_failure(&self, alarm: impl Fn(&str) + Send + Sync + 'static) {
        let alarm: QueueAlarm = Arc::new(alarm);
        lock(&self.device.alarms).insert(self.number(), alarm);
    }

    /// Connects to the peer's queue pair: both may send once both have done this.
    pub(crate) fn connect(&self, peer: &Address) -> Result<(), LinkError> {
        let mut attr = ffi::ibv_qp_attr {
            qp_state: ffi::IBV_QPS_RTR,
            path_mtu: self.port.mtu.min(peer.mtu),
            dest_qp_num: peer.qp & 0xFF_FFFF,
            rq_psn: peer.psn & 0xFF_FFFF,
            max_dest_rd_atomic: self.options.reads,
            // 10 microseconds before a sender that found no receive posted tries again.
            min_rnr_timer: 1,
            ah_attr: route(&self.port, peer, self.options.class),
            ..Default::default()
        };
        let rtr = mask::AV | mask::PATH_MTU | mask::DEST_QPN | mask::RQ_PSN | mask::MAX_DEST_RD_ATOMIC;
        self.modify(&mut attr, mask::STATE | rtr | mask::MIN_RNR_TIMER, "connecting (to ready-to-receive)")?;
        attr.qp_state = ffi::IBV_QPS_RTS;
        // 4.096 us * 2^16 = 268 ms before a retransmission, seven times: a dead path shows in two
        // seconds.
        (attr.timeout, attr.retry_cnt) = (16, 7);
        attr.rnr_retry = self.options.rnr_retries.min(7);
        (attr.sq_psn, attr.max_rd_atomic) = (self.psn, self.options.reads.min(peer.reads).max(1));
        let rts = mask::TIMEOUT | mask::RETRY_CNT | mask::RNR_RETRY | mask::SQ_PSN | mask::MAX_RD_ATOMIC;
        self.modify(&mut attr, mask::STATE | rts, "connecting (to ready-to-send)")
    }

    /// Ends all work: what is in flight completes as flushed.
    pub(crate) fn fail(&self) -> Result<(), LinkError> {
        let mut attr = ffi::ibv_qp_attr { qp_state: ffi::IBV_QPS_ERR, ..Default::default() };
        self.modify(&mut attr, mask::STATE, "ending")
    }

    /// How the packets of a connected queue pair are marked, as the device says.
    pub(crate) fn class(&self) -> Result<Class, LinkError> {
        let mut attr = ffi::ibv_qp_attr::default();
        let mut init = ffi::ibv_qp_init_attr {
            qp_context: std::ptr::null_mut(),
            send_cq: std::ptr::null_mut(),
            recv_cq: std::ptr::null_mut(),
            srq: std::ptr::null_mut(),
            cap: ffi::ibv_qp_cap::default(),
            qp_type: 0,
            sq_sig_all: 0,
        };
        // SAFETY: a live queue pair and out parameters.
        let code =
            unsafe { (self.device.api.ibv_query_qp)(self.qp.as_ptr(), &mut attr, mask::AV, &mut init) };
        check(code, self.device.name(), "querying the queue pair")?;
        let ah = &attr.ah_attr;
        Ok(Class { service_level: ah.sl, traffic_class: ah.grh.traffic_class })
    }

    /// Posts one send-side request on the memory of `pieces` (at most as many as in the options).
    ///
    /// # Safety
    /// Unless inline, the memory of `pieces` must stay valid (for a READ, untouched) until the
    /// completion of this request, or of a later one on this queue, was polled, or the queue was
    /// destroyed.
    pub(crate) unsafe fn post(&self, request: &Request, pieces: &[Piece]) -> Result<(), LinkError> {
        let mut flags = 0;
        if request.signaled {
            flags |= ffi::IBV_SEND_SIGNALED;
        }
        if request.inline {
            flags |= ffi::IBV_SEND_INLINE;
        }
        let mut wr = ffi::ibv_send_wr::new(request.id, ffi::IBV_WR_SEND, flags);
        // The library only reads the list.
        (wr.sg_list, wr.num_sge) = (pieces.as_ptr().cast_mut(), pieces.len() as c_int);
        let counters = &self.device.counters;
        let mut to = |remote: Remote| (wr.remote_addr, wr.rkey) = (remote.address, remote.key);
        let counter = match request.op {
            Op::Send => &counters.sends,
            Op::Write(remote) => {
                to(remote);
                wr.opcode = ffi::IBV_WR_RDMA_WRITE;
                &counters.writes
            }
            Op::WriteImm(remote, imm) => {
                to(remote);
                (wr.opcode, wr.imm_data) = (ffi::IBV_WR_RDMA_WRITE_WITH_IMM, imm.to_be());
                &counters.writes
            }
            Op::Read(remote) => {
                to(remote);
                wr.opcode = ffi::IBV_WR_RDMA_READ;
                &counters.reads
            }
            Op::SendInvalidate(key) => {
                (wr.opcode, wr.imm_data) = (ffi::IBV_WR_SEND_WITH_INV, key);
                &counters.sends
            }
            Op::Invalidate(key) => {
                (wr.opcode, wr.imm_data) = (ffi::IBV_WR_LOCAL_INV, key);
                &counters.invalidations
            }
        };
        // SAFETY: the request's list outlives the call.
        unsafe { self.post_wr(&mut wr) }?;
        counter.fetch_add(1, Ordering::Relaxed);
        counters.bytes.fetch_add(pieces.iter().map(|p| u64::from(p.length)).sum(), Ordering::Relaxed);
        counters.inline.fetch_add(u64::from(request.inline), Ordering::Relaxed);
        Ok(())
    }

    /// Hands a request to the library.
    ///
    /// # Safety
    /// Its list of pieces is alive; what else it points to is as `post` and `bind` ask for.
    unsafe fn post_wr(&self, wr: &mut ffi::ibv_send_wr) -> Result<(), LinkError> {
        let mut bad = std::ptr::null_mut();
        // SAFETY: the context's table has this entry; the request outlives the call.
        let code = unsafe {
            let post_send = (*self.device.context.as_ptr()).ops.post_send;
            post_send(self.qp.as_ptr(), wr, &mut bad)
        };
        check(code, self.device.name(), "posting work")
    }

    /// Binds `window` to part of a pool block and returns its key, good for requests of the peer
    /// that follow from requests posted after this one. The block is named by its local key.
    ///
    /// # Safety
    /// The peer may read (or write, as `access` says) the memory until the window is invalidated or
    /// dropped: it must stay valid, and what the peer may write untouched.
    pub(crate) unsafe fn bind(
        &self,
        id: u64,
        signaled: bool,
        window: &mut MemoryWindow,
        (address, len, local): (u64, u64, u32),
        access: WindowAccess,
    ) -> Result<u32, LinkError> {
        let Some(mr) = self.device.block(local) else {
            return Err(refused(self.device.name(), "binding a window", "the memory is not registered"));
        };
        let flags = if signaled { ffi::IBV_SEND_SIGNALED } else { 0 };
        let mut wr = ffi::ibv_send_wr::new(id, ffi::IBV_WR_BIND_MW, flags);
        let (mw, key) = window.next();
        (wr.bind_mw, wr.bind_rkey) = (mw, key);
        let mw_access_flags = match access {
            WindowAccess::Read => ffi::IBV_ACCESS_REMOTE_READ,
            WindowAccess::Write => ffi::IBV_ACCESS_REMOTE_WRITE,
        } as c_uint;
        wr.bind_info = ffi::ibv_mw_bind_info { mr, addr: address, length: len, mw_access_flags };
        // SAFETY: the window and the registration are alive; the caller's promise about the memory.
        unsafe { self.post_wr(&mut wr) }?;
        window.bound(key);
        self.device.counters.binds.fetch_add(1, Ordering::Relaxed);
        Ok(key)
    }

    /// Posts one receive; no piece for one that only a WRITE with immediate uses up.
    ///
    /// # Safety
    /// The memory must stay valid and untouched until the completion was polled or the queue was
    /// destroyed.
    pub(crate) unsafe fn post_recv(&self, id: u64, into: Option<Piece>) -> Result<(), LinkError> {
        let mut into = into;
        let (sg_list, num_sge) = match &mut into {
            Some(piece) => (std::ptr::from_mut(piece), 1),
            None => (std::ptr::null_mut(), 0),
        };
        let mut wr = ffi::ibv_recv_wr { wr_id: id, next: std::ptr::null_mut(), sg_list, num_sge };
        let mut bad = std::ptr::null_mut();
        // SAFETY: the context's table has this entry; the request and its list outlive the call.
        let code = unsafe {
            let post_recv = (*self.device.context.as_ptr()).ops.post_recv;
            post_recv(self.qp.as_ptr(), &mut wr, &mut bad)
        };
        check(code, self.device.name(), "posting a receive")?;
        self.device.counters.receives.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Readable after [`Queue::arm`] once something has completed. Non-blocking.
    pub(crate) fn fd(&self) -> RawFd {
        // SAFETY: a live channel.
        unsafe { self.channel.as_ref() }.fd
    }

    /// The same descriptor with a life of its own.
    pub(crate) fn events(&self) -> io::Result<OwnedFd> {
        // SAFETY: a plain system call on a live descriptor.
        let fd = unsafe { libc::fcntl(self.fd(), libc::F_DUPFD_CLOEXEC, 0) };
        // SAFETY: just made, owned by nobody else.
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
    }

    /// Asks for an event when the next completion comes. What came before makes none: poll again.
    pub(crate) fn arm(&self) -> Result<(), LinkError> {
        // SAFETY: the context's table has this entry; a live completion queue.
        let code = unsafe { ((*self.device.context.as_ptr()).ops.req_notify_cq)(self.cq.as_ptr(), 0) };
        check(code, self.device.name(), "arming the completion queue")
    }

    /// Takes all events off the channel; returns their number.
    pub(crate) fn take_events(&self) -> usize {
        let mut events = 0;
        let (mut cq, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a live, non-blocking channel and out parameters.
        while unsafe { (self.device.api.ibv_get_cq_event)(self.channel.as_ptr(), &mut cq, &mut context) } == 0
        {
            events += 1;
            // SAFETY: the channel's only completion queue is ours.
            unsafe { (self.device.api.ibv_ack_cq_events)(cq, 1) };
        }
        self.device.counters.events.fetch_add(events as u64, Ordering::Relaxed);
        events
    }

    /// Takes completions, 16 at most; returns their number.
    pub(crate) fn poll(&self, out: &mut Vec<Completion>) -> Result<usize, LinkError> {
        let mut some = [ffi::ibv_wc::default(); 16];
        // SAFETY: the context's table has this entry; room for 16.
        let n =
            unsafe { ((*self.device.context.as_ptr()).ops.poll_cq)(self.cq.as_ptr(), 16, some.as_mut_ptr()) };
        let Ok(n) = usize::try_from(n) else {
            return Err(refused(self.device.name(), "polling completions", "the library says no"));
        };
        let n = n.min(some.len());
        out.extend(some[..n].iter().map(Completion::of));
        self.device.counters.completions.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// How packets from `port` get to `peer`.
fn route(port: &Port, peer: &Address, class: Class) -> ffi::ibv_ah_attr {
    // InfiniBand within one subnet goes by LID and needs no global header.
    let local = port.link == LinkLayer::InfiniBand && port.gid.raw[..8] == peer.gid[..8];
    ffi::ibv_ah_attr {
        grh: ffi::ibv_global_route {
            dgid: ffi::ibv_gid { raw: peer.gid },
            sgid_index: port.gid.index,
            hop_limit: 64,
            traffic_class: class.traffic_class,
            ..Default::default()
        },
        dlid: peer.lid,
        sl: class.service_level,
        is_global: u8::from(!local),
        port_num: port.number,
        ..Default::default()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let (api, number) = (self.device.api, self.number());
        lock(&self.device.alarms).remove(&number);
        // SAFETY: made by `new`, destroyed once, in the order queue pair, completion queue, channel;
        // all events have been acknowledged. After the first no memory is touched any more.
        unsafe {
            (api.ibv_destroy_qp)(self.qp.as_ptr());
            (api.ibv_destroy_cq)(self.cq.as_ptr());
            (api.ibv_destroy_comp_channel)(self.channel.as_ptr());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verbs::port::{Gid, GidKind};

    #[test]
    fn routes_carry_the_class_and_infiniband_neighbours_go_by_lid() {
        let mut raw = [0; 16];
        raw[0] = 0xFE;
        let gid = Gid { raw, index: 3, kind: GidKind::Ib };
        let mut port = Port {
            number: 2,
            link: LinkLayer::InfiniBand,
            mtu: 5,
            lid: 7,
            gid,
            gids: vec![gid],
            netdev: None,
        };
        let mut peer = Address { qp: 1, psn: 2, gid: raw, lid: 9, mtu: 4, reads: 1 };
        let class = Class { service_level: 5, traffic_class: 104 };
        let near = route(&port, &peer, class);
        assert_eq!((near.sl, near.dlid, near.is_global, near.port_num), (5, 9, 0, 2));
        peer.gid[1] = 1;
        assert_eq!(route(&port, &peer, class).is_global, 1, "another subnet");
        port.link = LinkLayer::Ethernet;
        peer.gid = raw;
        let roce = route(&port, &peer, class);
        assert_eq!((roce.is_global, roce.grh.traffic_class, roce.grh.sgid_index), (1, 104, 3));
        assert!(roce.grh.dgid.raw == raw && roce.grh.hop_limit > 1);
    }

    #[test]
    fn completions_say_what_was_done() {
        let wc = |status, opcode| ffi::ibv_wc {
            wr_id: 4,
            status,
            opcode,
            byte_len: 100,
            imm_data: 77u32.to_be(),
            ..Default::default()
        };
        for (status, opcode, result) in [
            (0, 1, Ok(Done::Request)),
            (0, ffi::IBV_WC_RECV, Ok(Done::Received { len: 100 })),
            (0, ffi::IBV_WC_RECV_RDMA_WITH_IMM, Ok(Done::Written { len: 100, imm: 77 })),
            // The opcode of a failed completion means nothing.
            (10, ffi::IBV_WC_RECV, Err(WorkError::RemoteAccess)),
        ] {
            let expected = Completion { id: 4, result, invalidated: None };
            assert_eq!(Completion::of(&wc(status, opcode)), expected);
        }
        let freed = ffi::ibv_wc { wc_flags: ffi::IBV_WC_WITH_INV, imm_data: 9, ..wc(0, ffi::IBV_WC_RECV) };
        assert_eq!(Completion::of(&freed).invalidated, Some(9));
    }
}
