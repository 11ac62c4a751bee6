//! The structs and numbers of `ffreduce.h`, field for field.

use std::ffi::{c_char, c_void};

/// Success.
pub const FFR_OK: i32 = 0;
/// Not complete yet.
pub const FFR_PENDING: i32 = 1;
/// A bug of ours.
pub const FFR_ERR_INTERNAL: i32 = -1;
/// Arguments make no sense.
pub const FFR_ERR_INVALID: i32 = -2;
/// The group could not be formed.
pub const FFR_ERR_UNAVAILABLE: i32 = -8;
/// Not done in time.
pub const FFR_ERR_TIMEOUT: i32 = -9;
/// A peer broke the protocol.
pub const FFR_ERR_CORRUPT: i32 = -12;
/// This dtype has no such reduction.
pub const FFR_ERR_UNSUPPORTED: i32 = -20;
/// Aborted or closed.
pub const FFR_ERR_ABORTED: i32 = -21;
/// Ranks issued different operations.
pub const FFR_ERR_MISMATCH: i32 = -22;
/// A rank died.
pub const FFR_ERR_PEER_DIED: i32 = -24;

/// `ffr_store`.
#[repr(C)]
pub struct FfrStore {
    /// Passed back.
    pub ctx: *mut c_void,
    /// Publishes.
    pub set: Option<unsafe extern "C" fn(*mut c_void, *const c_char, *const u8, usize) -> i32>,
    /// Waits for and reads.
    pub get: Option<unsafe extern "C" fn(*mut c_void, *const c_char, *mut u8, usize, *mut usize, u64) -> i32>,
}

/// `ffr_config`.
#[repr(C)]
pub struct FfrConfig {
    /// `sizeof(ffr_config)`.
    pub struct_size: u32,
    /// This rank.
    pub rank: i32,
    /// Ranks in the group.
    pub size: i32,
    /// 0.
    pub flags: u32,
    /// Milliseconds; 0 is the default.
    pub timeout_ms: u64,
    /// C string or null.
    pub group_name: *const c_char,
    /// C string or null.
    pub node_key: *const c_char,
    /// 32 bytes or null.
    pub secret: *const u8,
    /// 32 or 0.
    pub secret_len: usize,
    /// Store or null.
    pub store: *const FfrStore,
    /// C string or null.
    pub master_addr: *const c_char,
    /// Port or 0.
    pub master_port: u16,
    /// 0.
    pub reserved0: u16,
    /// Milliseconds; 0 is the default.
    pub heartbeat_timeout_ms: u32,
    /// C string or null.
    pub bind_address: *const c_char,
    /// Milliseconds; 0 is `timeout_ms`.
    pub form_timeout_ms: u64,
}

/// `ffr_stats`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct FfrStats {
    /// Set by the caller.
    pub struct_size: u32,
    /// 0.
    pub reserved0: u32,
    /// All operations submitted.
    pub ops_submitted: u64,
    /// Ended well.
    pub ops_completed: u64,
    /// Ended with an error.
    pub ops_failed: u64,
    /// Through shared memory.
    pub shm_bytes_sent: u64,
    /// Through shared memory.
    pub shm_bytes_received: u64,
    /// Through TCP.
    pub tcp_bytes_sent: u64,
    /// Through TCP.
    pub tcp_bytes_received: u64,
    /// Input bytes reduced here.
    pub reduced_bytes: u64,
    /// Ranks reached through shared memory.
    pub local_peers: u32,
    /// Ranks reached through the network.
    pub remote_peers: u32,
    /// Through RDMA devices.
    pub rdma_bytes_sent: u64,
    /// Through RDMA devices.
    pub rdma_bytes_received: u64,
    /// Payload copied in user space between channels and operations.
    pub copied_bytes: u64,
    /// Of the remote peers, those reached by RDMA.
    pub rdma_peers: u32,
    /// 0.
    pub reserved1: u32,
}

/// `ffr_buf`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FfrBuf {
    /// First element.
    pub ptr: *mut c_void,
    /// Elements.
    pub count: u64,
}

/// `ffr_done_fn`.
pub type FfrDone = unsafe extern "C" fn(*mut c_void, i32, *const c_char);

/// `ffr_args`.
#[repr(C)]
pub struct FfrArgs {
    /// `sizeof(ffr_args)`.
    pub struct_size: u32,
    /// Operation.
    pub kind: i32,
    /// Element type.
    pub dtype: i32,
    /// Reduction.
    pub redop: i32,
    /// Root rank.
    pub root: i32,
    /// Peer rank.
    pub peer: i32,
    /// Tag.
    pub tag: u32,
    /// `FFR_SUBMIT_*`.
    pub flags: u32,
    /// Of PREMUL_SUM.
    pub factor: f64,
    /// Milliseconds; 0 is the group's.
    pub timeout_ms: u64,
    /// `in`.
    pub input: *const FfrBuf,
    /// `in_n`.
    pub in_n: usize,
    /// `out`.
    pub output: *const FfrBuf,
    /// `out_n`.
    pub out_n: usize,
    /// Callback or null.
    pub done: Option<FfrDone>,
    /// Passed back.
    pub done_ctx: *mut c_void,
}
