//! The part of libibverbs that Firefly uses: types of its stable ABI (symbol version IBVERBS_1.x)
//! and its exported calls, looked up at run time.
//!
//! Own declarations rather than a binding crate: the library must not become a DT_NEEDED of `ff`
//! (one binary starts on machines with and without RDMA), and building must need neither libclang
//! nor libibverbs' headers. The layouts are checked against the C header by
//! `layout_matches_the_header`, which `tests/rdma-vm/run.sh` runs. Enums are plain integers: a
//! value of a newer library is then a number, not undefined behaviour.

#![allow(non_camel_case_types, reason = "the names of the C header")]

use libloading::Library;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

macro_rules! opaque {
    ($($name:ident),*) => { $(
        #[repr(C)]
        pub(crate) struct $name {
            _private: [u8; 0],
        }
    )* };
}

opaque!(ibv_device, ibv_srq, ibv_pd);

#[repr(C)]
pub(crate) struct ibv_context_ops {
    _before_alloc_mw: [*mut c_void; 7],
    pub(crate) alloc_mw: Option<unsafe extern "C" fn(*mut ibv_pd, c_uint) -> *mut ibv_mw>,
    _bind_mw: *mut c_void,
    pub(crate) dealloc_mw: Option<unsafe extern "C" fn(*mut ibv_mw) -> c_int>,
    _before_poll_cq: [*mut c_void; 1],
    pub(crate) poll_cq: unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int,
    pub(crate) req_notify_cq: unsafe extern "C" fn(*mut ibv_cq, c_int) -> c_int,
    _before_post_send: [*mut c_void; 12],
    pub(crate) post_send: unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int,
    pub(crate) post_recv: unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int,
    _after_post_recv: [*mut c_void; 5],
}

/// Only the beginning; made by the library.
#[repr(C)]
pub(crate) struct ibv_context {
    pub(crate) device: *mut ibv_device,
    pub(crate) ops: ibv_context_ops,
    pub(crate) cmd_fd: c_int,
    pub(crate) async_fd: c_int,
}

/// What a device can do; the whole struct, because the library writes all of it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_device_attr {
    pub(crate) fw_ver: [c_char; 64],
    pub(crate) node_guid: u64,
    pub(crate) sys_image_guid: u64,
    pub(crate) max_mr_size: u64,
    pub(crate) page_size_cap: u64,
    pub(crate) vendor_id: u32,
    pub(crate) vendor_part_id: u32,
    pub(crate) hw_ver: u32,
    pub(crate) max_qp: c_int,
    pub(crate) max_qp_wr: c_int,
    pub(crate) device_cap_flags: c_uint,
    pub(crate) max_sge: c_int,
    pub(crate) max_sge_rd: c_int,
    pub(crate) max_cq: c_int,
    pub(crate) max_cqe: c_int,
    pub(crate) max_mr: c_int,
    pub(crate) max_pd: c_int,
    pub(crate) max_qp_rd_atom: c_int,
    pub(crate) max_ee_rd_atom: c_int,
    pub(crate) max_res_rd_atom: c_int,
    pub(crate) max_qp_init_rd_atom: c_int,
    pub(crate) max_ee_init_rd_atom: c_int,
    pub(crate) atomic_cap: c_uint,
    pub(crate) max_ee: c_int,
    pub(crate) max_rdd: c_int,
    pub(crate) max_mw: c_int,
    _counts: [c_int; 11],
    pub(crate) max_pkeys: u16,
    pub(crate) local_ca_ack_delay: u8,
    pub(crate) phys_port_cnt: u8,
}

/// `element` is a union: a port's number, or the object that the event is about.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_async_event {
    pub(crate) element: *mut c_void,
    pub(crate) event_type: c_uint,
}

#[repr(C)]
pub(crate) struct ibv_mw {
    pub(crate) context: *mut ibv_context,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) rkey: u32,
    pub(crate) handle: u32,
    pub(crate) kind: c_uint,
}

#[repr(C)]
pub(crate) struct ibv_mr {
    pub(crate) context: *mut ibv_context,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) addr: *mut c_void,
    pub(crate) length: usize,
    pub(crate) handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

#[repr(C)]
pub(crate) struct ibv_comp_channel {
    pub(crate) context: *mut ibv_context,
    pub(crate) fd: c_int,
    pub(crate) refcnt: c_int,
}

/// Only the beginning; made by the library.
#[repr(C)]
pub(crate) struct ibv_cq {
    pub(crate) context: *mut ibv_context,
    pub(crate) channel: *mut ibv_comp_channel,
    pub(crate) cq_context: *mut c_void,
    pub(crate) handle: u32,
    pub(crate) cqe: c_int,
}

/// Only the beginning; made by the library.
#[repr(C)]
pub(crate) struct ibv_qp {
    pub(crate) context: *mut ibv_context,
    pub(crate) qp_context: *mut c_void,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) send_cq: *mut ibv_cq,
    pub(crate) recv_cq: *mut ibv_cq,
    pub(crate) srq: *mut ibv_srq,
    pub(crate) handle: u32,
    pub(crate) qp_num: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ibv_wc {
    pub(crate) wr_id: u64,
    pub(crate) status: c_uint,
    pub(crate) opcode: c_uint,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    /// Immediate data in network byte order, or the remote key that the peer has invalidated:
    /// `wc_flags` says which.
    pub(crate) imm_data: u32,
    pub(crate) qp_num: u32,
    pub(crate) src_qp: u32,
    pub(crate) wc_flags: c_uint,
    pub(crate) pkey_index: u16,
    pub(crate) slid: u16,
    pub(crate) sl: u8,
    pub(crate) dlid_path_bits: u8,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ibv_sge {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// The unions after `imm_data` are spelled as the members that RC queue pairs use.
#[repr(C)]
pub(crate) struct ibv_send_wr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut ibv_send_wr,
    pub(crate) sg_list: *mut ibv_sge,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: c_uint,
    pub(crate) send_flags: c_uint,
    /// Immediate data in network byte order, or the remote key to invalidate.
    pub(crate) imm_data: u32,
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
    _rest_of_wr: [u32; 5],
    _qp_type: u32,
    pub(crate) bind_mw: *mut ibv_mw,
    pub(crate) bind_rkey: u32,
    pub(crate) bind_info: ibv_mw_bind_info,
}

impl ibv_send_wr {
    /// A request that does nothing yet.
    pub(crate) fn new(wr_id: u64, opcode: c_uint, send_flags: c_uint) -> ibv_send_wr {
        ibv_send_wr {
            wr_id,
            next: std::ptr::null_mut(),
            sg_list: std::ptr::null_mut(),
            num_sge: 0,
            opcode,
            send_flags,
            imm_data: 0,
            remote_addr: 0,
            rkey: 0,
            _rest_of_wr: [0; 5],
            _qp_type: 0,
            bind_mw: std::ptr::null_mut(),
            bind_rkey: 0,
            bind_info: ibv_mw_bind_info { mr: std::ptr::null_mut(), addr: 0, length: 0, mw_access_flags: 0 },
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_mw_bind_info {
    pub(crate) mr: *mut ibv_mr,
    pub(crate) addr: u64,
    pub(crate) length: u64,
    pub(crate) mw_access_flags: c_uint,
}

#[repr(C)]
pub(crate) struct ibv_recv_wr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut ibv_recv_wr,
    pub(crate) sg_list: *mut ibv_sge,
    pub(crate) num_sge: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ibv_qp_cap {
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) max_recv_sge: u32,
    pub(crate) max_inline_data: u32,
}

#[repr(C)]
pub(crate) struct ibv_qp_init_attr {
    pub(crate) qp_context: *mut c_void,
    pub(crate) send_cq: *mut ibv_cq,
    pub(crate) recv_cq: *mut ibv_cq,
    pub(crate) srq: *mut ibv_srq,
    pub(crate) cap: ibv_qp_cap,
    pub(crate) qp_type: c_uint,
    pub(crate) sq_sig_all: c_int,
}

/// A union with a `__be64` pair in C, hence the alignment.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ibv_gid {
    pub(crate) raw: [u8; 16],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ibv_global_route {
    pub(crate) dgid: ibv_gid,
    pub(crate) flow_label: u32,
    pub(crate) sgid_index: u8,
    pub(crate) hop_limit: u8,
    pub(crate) traffic_class: u8,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ibv_ah_attr {
    pub(crate) grh: ibv_global_route,
    pub(crate) dlid: u16,
    pub(crate) sl: u8,
    pub(crate) src_path_bits: u8,
    pub(crate) static_rate: u8,
    pub(crate) is_global: u8,
    pub(crate) port_num: u8,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ibv_qp_attr {
    pub(crate) qp_state: c_uint,
    pub(crate) cur_qp_state: c_uint,
    pub(crate) path_mtu: c_uint,
    pub(crate) path_mig_state: c_uint,
    pub(crate) qkey: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) dest_qp_num: u32,
    pub(crate) qp_access_flags: c_uint,
    pub(crate) cap: ibv_qp_cap,
    pub(crate) ah_attr: ibv_ah_attr,
    pub(crate) alt_ah_attr: ibv_ah_attr,
    pub(crate) pkey_index: u16,
    pub(crate) alt_pkey_index: u16,
    pub(crate) en_sqd_async_notify: u8,
    pub(crate) sq_draining: u8,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) min_rnr_timer: u8,
    pub(crate) port_num: u8,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) alt_port_num: u8,
    pub(crate) alt_timeout: u8,
    pub(crate) rate_limit: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct ibv_port_attr {
    pub(crate) state: c_uint,
    pub(crate) max_mtu: c_uint,
    pub(crate) active_mtu: c_uint,
    pub(crate) gid_tbl_len: c_int,
    pub(crate) port_cap_flags: u32,
    pub(crate) max_msg_sz: u32,
    pub(crate) bad_pkey_cntr: u32,
    pub(crate) qkey_viol_cntr: u32,
    pub(crate) pkey_tbl_len: u16,
    pub(crate) lid: u16,
    pub(crate) sm_lid: u16,
    pub(crate) lmc: u8,
    pub(crate) max_vl_num: u8,
    pub(crate) sm_sl: u8,
    pub(crate) subnet_timeout: u8,
    pub(crate) init_type_reply: u8,
    pub(crate) active_width: u8,
    pub(crate) active_speed: u8,
    pub(crate) phys_state: u8,
    pub(crate) link_layer: u8,
    pub(crate) flags: u8,
    pub(crate) port_cap_flags2: u16,
    /// Newer libraries append fields; the exported call writes none of them.
    _newer: [u64; 4],
}

/// Port states (`ibv_port_state`).
pub(crate) const IBV_PORT_ACTIVE: c_uint = 4;
/// `ibv_port_attr::link_layer`; 0 of an old driver means InfiniBand.
pub(crate) const IBV_LINK_LAYER_ETHERNET: u8 = 2;

pub(crate) const IBV_QPT_RC: c_uint = 2;
pub(crate) const IBV_QPS_INIT: c_uint = 1;
pub(crate) const IBV_QPS_RTR: c_uint = 2;
pub(crate) const IBV_QPS_RTS: c_uint = 3;
pub(crate) const IBV_QPS_ERR: c_uint = 6;

pub(crate) const IBV_WR_RDMA_WRITE: c_uint = 0;
pub(crate) const IBV_WR_RDMA_WRITE_WITH_IMM: c_uint = 1;
pub(crate) const IBV_WR_SEND: c_uint = 2;
pub(crate) const IBV_WR_RDMA_READ: c_uint = 4;
pub(crate) const IBV_WR_LOCAL_INV: c_uint = 7;
pub(crate) const IBV_WR_BIND_MW: c_uint = 8;
pub(crate) const IBV_WR_SEND_WITH_INV: c_uint = 9;

pub(crate) const IBV_SEND_FENCE: c_uint = 1;
pub(crate) const IBV_SEND_SIGNALED: c_uint = 1 << 1;
pub(crate) const IBV_SEND_INLINE: c_uint = 1 << 3;

pub(crate) const IBV_ACCESS_LOCAL_WRITE: c_int = 1;
pub(crate) const IBV_ACCESS_REMOTE_WRITE: c_int = 1 << 1;
pub(crate) const IBV_ACCESS_REMOTE_READ: c_int = 1 << 2;
pub(crate) const IBV_ACCESS_MW_BIND: c_int = 1 << 4;
/// Of the optional range: a kernel or device that does not know it ignores it.
pub(crate) const IBV_ACCESS_RELAXED_ORDERING: c_int = 1 << 20;

pub(crate) const IBV_DEVICE_MEM_WINDOW_TYPE_2A: c_uint = 1 << 23;
pub(crate) const IBV_DEVICE_MEM_WINDOW_TYPE_2B: c_uint = 1 << 24;
pub(crate) const IBV_MW_TYPE_2: c_uint = 2;

pub(crate) const IBV_WC_SUCCESS: c_uint = 0;
pub(crate) const IBV_WC_RECV: c_uint = 1 << 7;
pub(crate) const IBV_WC_RECV_RDMA_WITH_IMM: c_uint = IBV_WC_RECV + 1;
/// `ibv_wc::wc_flags`.
pub(crate) const IBV_WC_WITH_IMM: c_uint = 1 << 1;
/// `ibv_wc::wc_flags`.
pub(crate) const IBV_WC_WITH_INV: c_uint = 1 << 3;
/// What Soft-RoCE sets for it (seen with Linux 6.12): the kernel's own number for the flag. To the
/// library it says that a checksum was right, of which reliable connections know nothing.
pub(crate) const RXE_WC_WITH_INV: c_uint = 1 << 2;

/// Asynchronous events (`ibv_event_type`) that something is done about.
pub(crate) mod event {
    use std::ffi::c_uint;

    pub(crate) const CQ_ERR: c_uint = 0;
    pub(crate) const QP_FATAL: c_uint = 1;
    pub(crate) const QP_REQ_ERR: c_uint = 2;
    pub(crate) const QP_ACCESS_ERR: c_uint = 3;
    pub(crate) const COMM_EST: c_uint = 4;
    pub(crate) const SQ_DRAINED: c_uint = 5;
    pub(crate) const PATH_MIG: c_uint = 6;
    pub(crate) const PATH_MIG_ERR: c_uint = 7;
    pub(crate) const DEVICE_FATAL: c_uint = 8;
    pub(crate) const PORT_ACTIVE: c_uint = 9;
    pub(crate) const PORT_ERR: c_uint = 10;
    pub(crate) const LID_CHANGE: c_uint = 11;
    pub(crate) const QP_LAST_WQE_REACHED: c_uint = 16;
    pub(crate) const GID_CHANGE: c_uint = 18;
}

/// Bits of `ibv_modify_qp`'s mask.
pub(crate) mod mask {
    use std::ffi::c_int;

    pub(crate) const STATE: c_int = 1;
    pub(crate) const ACCESS: c_int = 1 << 3;
    pub(crate) const PKEY_INDEX: c_int = 1 << 4;
    pub(crate) const PORT: c_int = 1 << 5;
    pub(crate) const AV: c_int = 1 << 7;
    pub(crate) const PATH_MTU: c_int = 1 << 8;
    pub(crate) const TIMEOUT: c_int = 1 << 9;
    pub(crate) const RETRY_CNT: c_int = 1 << 10;
    pub(crate) const RNR_RETRY: c_int = 1 << 11;
    pub(crate) const RQ_PSN: c_int = 1 << 12;
    pub(crate) const MAX_RD_ATOMIC: c_int = 1 << 13;
    pub(crate) const MIN_RNR_TIMER: c_int = 1 << 15;
    pub(crate) const SQ_PSN: c_int = 1 << 16;
    pub(crate) const MAX_DEST_RD_ATOMIC: c_int = 1 << 17;
    pub(crate) const DEST_QPN: c_int = 1 << 20;
}

/// Registers memory with access bits of the optional range (`ibv_reg_mr_iova2`).
type RegisterOptional = unsafe extern "C" fn(*mut ibv_pd, *mut c_void, usize, u64, c_uint) -> *mut ibv_mr;

macro_rules! api {
    ($(fn $name:ident($($arg:ty),*) $(-> $ret:ty)?;)*) => {
        /// The exported calls. The library stays loaded for the process's life.
        pub(crate) struct Api {
            $(pub(crate) $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
            /// Since rdma-core 28.
            pub(crate) ibv_reg_mr_iova2: Option<RegisterOptional>,
        }

        impl Api {
            fn load() -> Result<Api, String> {
                // SAFETY: libibverbs' initialisers are those that any linked program runs.
                let library = unsafe { Library::new("libibverbs.so.1") }
                    .map_err(|e| match e.to_string() {
                        text if text.contains("No such file") => "libibverbs.so.1 is not installed".to_owned(),
                        text => format!("libibverbs.so.1 cannot be loaded: {text}"),
                    })?;
                // SAFETY: the type is that of the C declaration.
                let optional = unsafe { library.get::<RegisterOptional>(b"ibv_reg_mr_iova2\0") };
                let optional = optional.ok().map(|symbol| *symbol);
                let api = Api {
                    $($name: {
                        // SAFETY: the type is that of the C declaration.
                        let symbol = unsafe {
                            library.get::<unsafe extern "C" fn($($arg),*) $(-> $ret)?>(
                                concat!(stringify!($name), "\0").as_bytes()
                            )
                        };
                        *symbol.map_err(|e| format!("libibverbs.so.1 is too old ({e})"))?
                    },)*
                    ibv_reg_mr_iova2: optional,
                };
                // Before any other call. Where the kernel copies pinned pages at fork by itself
                // (5.12) the library does nothing; elsewhere it keeps registered pages out of
                // children, so that a fork cannot move the parent's pages away from the device. It
                // fails only on kernels that know neither, and then a fork is as risky as it was.
                // SAFETY: no other verbs call has been made yet.
                if unsafe { (api.ibv_fork_init)() } != 0 {
                    tracing::warn!("this kernel protects RDMA memory from no fork: programs that fork should use TCP");
                }
                // The function pointers must stay good.
                std::mem::forget(library);
                Ok(api)
            }
        }
    };
}

api! {
    fn ibv_fork_init() -> c_int;
    fn ibv_get_device_list(*mut c_int) -> *mut *mut ibv_device;
    fn ibv_free_device_list(*mut *mut ibv_device);
    fn ibv_get_device_name(*mut ibv_device) -> *const c_char;
    fn ibv_open_device(*mut ibv_device) -> *mut ibv_context;
    fn ibv_close_device(*mut ibv_context) -> c_int;
    fn ibv_query_device(*mut ibv_context, *mut ibv_device_attr) -> c_int;
    fn ibv_get_async_event(*mut ibv_context, *mut ibv_async_event) -> c_int;
    fn ibv_ack_async_event(*mut ibv_async_event);
    fn ibv_query_port(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
    fn ibv_query_gid(*mut ibv_context, u8, c_int, *mut ibv_gid) -> c_int;
    fn ibv_alloc_pd(*mut ibv_context) -> *mut ibv_pd;
    fn ibv_dealloc_pd(*mut ibv_pd) -> c_int;
    fn ibv_reg_mr(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
    fn ibv_dereg_mr(*mut ibv_mr) -> c_int;
    fn ibv_create_comp_channel(*mut ibv_context) -> *mut ibv_comp_channel;
    fn ibv_destroy_comp_channel(*mut ibv_comp_channel) -> c_int;
    fn ibv_create_cq(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
    fn ibv_destroy_cq(*mut ibv_cq) -> c_int;
    fn ibv_get_cq_event(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    fn ibv_ack_cq_events(*mut ibv_cq, c_uint);
    fn ibv_create_qp(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
    fn ibv_modify_qp(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
    fn ibv_query_qp(*mut ibv_qp, *mut ibv_qp_attr, c_int, *mut ibv_qp_init_attr) -> c_int;
    fn ibv_destroy_qp(*mut ibv_qp) -> c_int;
}

/// The library, or why it cannot be had on this machine.
pub(crate) fn api() -> Result<&'static Api, &'static str> {
    static API: OnceLock<Result<Api, String>> = OnceLock::new();
    API.get_or_init(Api::load).as_ref().map_err(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    macro_rules! layout {
        ($($name:ident: $size:literal { $($field:ident),* })*) => {{
            let mut out = Vec::new();
            $(
                if $size { out.push(format!("{} size {}", stringify!($name), size_of::<$name>())); }
                $(out.push(format!("{} {} {}", stringify!($name), stringify!($field), offset_of!($name, $field)));)*
            )*
            out
        }};
    }

    /// `tests/rdma-vm/layout.c`, compiled against the installed header, prints the same lines.
    #[test]
    #[ignore = "needs the C header; tests/rdma-vm/run.sh makes the list and runs this"]
    fn layout_matches_the_header() {
        let path =
            std::env::var("FIREFLY_VERBS_LAYOUT").expect("FIREFLY_VERBS_LAYOUT names the C program's output");
        let text = std::fs::read_to_string(path).unwrap();
        let theirs: Vec<&str> = text.lines().collect();
        let ops = offset_of!(ibv_context, ops);
        let mut ours = vec![
            format!("ibv_context ops.alloc_mw {}", ops + offset_of!(ibv_context_ops, alloc_mw)),
            format!("ibv_context ops.dealloc_mw {}", ops + offset_of!(ibv_context_ops, dealloc_mw)),
            format!("ibv_context ops.poll_cq {}", ops + offset_of!(ibv_context_ops, poll_cq)),
            format!("ibv_context ops.req_notify_cq {}", ops + offset_of!(ibv_context_ops, req_notify_cq)),
            format!("ibv_context ops.post_send {}", ops + offset_of!(ibv_context_ops, post_send)),
            format!("ibv_context ops.post_recv {}", ops + offset_of!(ibv_context_ops, post_recv)),
        ];
        ours.extend(layout! {
            ibv_context: false { async_fd }
            ibv_device_attr: true { max_qp_wr, device_cap_flags, max_sge, max_cqe, max_qp_rd_atom,
                max_qp_init_rd_atom, max_mw, max_pkeys, phys_port_cnt }
            ibv_async_event: true { event_type }
            ibv_mw: true { rkey }
            ibv_mw_bind_info: true { addr, length, mw_access_flags }
            ibv_mr: true { lkey, rkey }
            ibv_comp_channel: true { fd }
            ibv_cq: false { channel, cqe }
            ibv_qp: false { qp_num }
            ibv_wc: true { wr_id, status, opcode, byte_len, imm_data, qp_num, wc_flags }
            ibv_sge: true { addr, length, lkey }
            ibv_send_wr: true { sg_list, num_sge, opcode, send_flags, imm_data, remote_addr, rkey, bind_mw,
                bind_rkey, bind_info }
            ibv_recv_wr: true { sg_list, num_sge }
            ibv_qp_cap: true { max_inline_data }
            ibv_qp_init_attr: true { send_cq, recv_cq, cap, qp_type, sq_sig_all }
            ibv_global_route: true { dgid, flow_label, sgid_index, hop_limit, traffic_class }
            ibv_ah_attr: true { grh, dlid, sl, is_global, port_num }
            ibv_qp_attr: true { path_mtu, rq_psn, dest_qp_num, qp_access_flags, ah_attr, pkey_index,
                max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, rnr_retry, rate_limit }
            ibv_port_attr: false { active_mtu, gid_tbl_len, lid, link_layer, port_cap_flags2 }
        });
        assert_eq!(ours, theirs);
    }
}
