//! The C ABI of firefly-reduce; the documented contract is `include/ffreduce.h`.
//!
//! This file only translates: C structs to requests, outcomes to status numbers and text. No
//! function unwinds into C; a panic of ours ends as `FFR_ERR_INTERNAL`.

mod store;
mod types;

pub use types::*;

use firefly_reduce::{
    Communicator, Config, DType, Handle, Meeting, Operation, RawBuf, ReduceError, ReduceOp, Request,
    SubmitOptions, bind_address_from_env, node_key_from_env, secret_from_env,
};
use firefly_types::ClusterSecret;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_void};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Version of the ABI; equal to `FFR_ABI_VERSION`.
const ABI_VERSION: u32 = 1;
/// `sizeof(ffr_config)` when the ABI began.
const CONFIG_BYTES_V1: usize = std::mem::offset_of!(FfrConfig, form_timeout_ms);
const SUBMIT_INLINE: u32 = 1;
const SUBMIT_WAIT_FOLLOWS: u32 = 2;

/// One group, seen from one rank.
pub struct FfrComm {
    communicator: Communicator,
}

/// One operation in flight or completed.
pub struct FfrOp {
    handle: Handle,
}

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

fn set_last_error(text: String) {
    LAST_ERROR.with(|last| *last.borrow_mut() = text);
}

fn status_of(error: &ReduceError) -> i32 {
    match error {
        ReduceError::Invalid { .. } => FFR_ERR_INVALID,
        ReduceError::Unsupported { .. } => FFR_ERR_UNSUPPORTED,
        ReduceError::Bootstrap { .. } => FFR_ERR_UNAVAILABLE,
        ReduceError::PeerDied { .. } => FFR_ERR_PEER_DIED,
        ReduceError::Timeout { .. } => FFR_ERR_TIMEOUT,
        ReduceError::Mismatch { .. } => FFR_ERR_MISMATCH,
        ReduceError::Protocol { .. } => FFR_ERR_CORRUPT,
        ReduceError::Aborted { .. } => FFR_ERR_ABORTED,
        _ => FFR_ERR_INTERNAL,
    }
}

fn report(error: &ReduceError) -> i32 {
    set_last_error(error.to_string());
    status_of(error)
}

fn invalid(text: &str) -> i32 {
    set_last_error(text.to_owned());
    FFR_ERR_INVALID
}

/// Runs `body`; a panic becomes an internal error.
fn guarded(body: impl FnOnce() -> i32) -> i32 {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        set_last_error("a bug in firefly-reduce: a panic was caught at the C boundary".into());
        FFR_ERR_INTERNAL
    })
}

/// # Safety
/// `buf` is null or has `len` bytes.
unsafe fn copy_text(text: &str, buf: *mut c_char, len: usize) -> usize {
    if !buf.is_null() && len > 0 {
        let n = text.len().min(len - 1);
        // SAFETY: n < len.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), buf.cast(), n);
            *buf.add(n) = 0;
        }
    }
    text.len()
}

/// # Safety
/// `text` is null or a C string.
unsafe fn text<'a>(text: *const c_char) -> Result<Option<&'a str>, ReduceError> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: a C string by the caller's promise.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| ReduceError::Invalid { detail: "a string is not UTF-8".into() })
}

/// See `ffreduce.h`.
#[unsafe(no_mangle)]
pub extern "C" fn ffr_abi_version() -> u32 {
    ABI_VERSION
}

/// See `ffreduce.h`.
#[unsafe(no_mangle)]
pub extern "C" fn ffr_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// See `ffreduce.h`.
#[unsafe(no_mangle)]
pub extern "C" fn ffr_dtype_size(dtype: i32) -> usize {
    DType::from_code(dtype).map_or(0, DType::size)
}

/// See `ffreduce.h`.
///
/// # Safety
/// `buf` is null or has `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_last_error(buf: *mut c_char, len: usize) -> usize {
    // SAFETY: the caller's promise is the callee's.
    LAST_ERROR.with(|last| unsafe { copy_text(&last.borrow(), buf, len) })
}

/// See `ffreduce.h`.
///
/// # Safety
/// `config` is null or a valid struct of its `struct_size` bytes whose pointers are valid; `out`
/// is null or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_comm_create(config: *const FfrConfig, out: *mut *mut FfrComm) -> i32 {
    guarded(|| {
        if config.is_null() || out.is_null() {
            return invalid("ffr_comm_create: config and out must not be NULL");
        }
        // SAFETY: valid by the caller's promise.
        match unsafe { create(config) } {
            Ok(communicator) => {
                // SAFETY: valid for writing by the caller's promise.
                unsafe { *out = Box::into_raw(Box::new(FfrComm { communicator })) };
                FFR_OK
            }
            Err(error) => report(&error),
        }
    })
}

/// # Safety
/// As [`ffr_comm_create`].
unsafe fn create(config: *const FfrConfig) -> Result<Communicator, ReduceError> {
    let bad = |detail: &str| ReduceError::Invalid { detail: format!("ffr_comm_create: {detail}") };
    // SAFETY: the first field is there in every version.
    let size = unsafe { (*config).struct_size } as usize;
    if size < CONFIG_BYTES_V1 || size > size_of::<FfrConfig>() {
        return Err(bad("struct_size is not sizeof(ffr_config) of this version or an earlier one"));
    }
    let mut whole = MaybeUninit::<FfrConfig>::zeroed();
    // SAFETY: size bytes are there by the caller's promise, and fit; fields that an older caller does
    // not have are zero, which is their default and a valid value of each.
    let c = unsafe {
        std::ptr::copy_nonoverlapping(config.cast::<u8>(), whole.as_mut_ptr().cast(), size);
        whole.assume_init()
    };
    if c.flags != 0 {
        return Err(bad("flags must be 0"));
    }
    let (Ok(rank), Ok(size)) = (u32::try_from(c.rank), u32::try_from(c.size)) else {
        return Err(bad("rank and size must not be negative"));
    };
    let mut made = Config::new(rank, size);
    // SAFETY: C strings by the caller's promise.
    let (group, node, master, bind) =
        unsafe { (text(c.group_name)?, text(c.node_key)?, text(c.master_addr)?, text(c.bind_address)?) };
    if let Some(group) = group {
        made.group = group.into();
    }
    made.node_key = node.map(Into::into).or_else(|| node_key_from_env(rank));
    let from_env = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    made.bind_address = match bind {
        Some(address) => Some(address.into()),
        None => bind_address_from_env()?,
    };
    made.master_address = master.map(Into::into).or_else(|| from_env("MASTER_ADDR"));
    if c.timeout_ms > 0 {
        made.timeout = Duration::from_millis(c.timeout_ms);
    }
    if c.form_timeout_ms > 0 {
        made.form_timeout = Some(Duration::from_millis(c.form_timeout_ms));
    }
    if c.heartbeat_timeout_ms > 0 {
        made.heartbeat_timeout = Duration::from_millis(u64::from(c.heartbeat_timeout_ms));
    }
    made.secret = match (c.secret.is_null(), c.secret_len) {
        (true, 0) => secret_from_env()?,
        (false, 32) => {
            let mut bytes = [0; 32];
            // SAFETY: 32 bytes by the caller's promise.
            unsafe { std::ptr::copy_nonoverlapping(c.secret, bytes.as_mut_ptr(), 32) };
            Some(ClusterSecret::from_bytes(bytes))
        }
        _ => return Err(bad("a secret is 32 bytes")),
    };
    if size == 1 {
        return Communicator::create(&made, &firefly_reduce::MemoryStore::default());
    }
    if c.store.is_null() {
        let mut meeting = Meeting::from_env();
        if let Some(host) = &made.master_address {
            meeting.host = host.clone();
        }
        if c.master_port != 0 {
            meeting.port = c.master_port;
        }
        return Communicator::meet(&made, &meeting);
    }
    // SAFETY: valid by the caller's promise for the duration of this call.
    let store =
        unsafe { store::CallbackStore::new(&*c.store) }.ok_or_else(|| bad("store.set or .get is NULL"))?;
    Communicator::create(&made, &store)
}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_comm_rank`]; `name` is a C string or null, `ranks` has `ranks_n` entries, `out` is valid
/// for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_comm_split(
    comm: *mut FfrComm,
    name: *const c_char,
    ranks: *const i32,
    ranks_n: usize,
    timeout_ms: u64,
    out: *mut *mut FfrComm,
) -> i32 {
    guarded(|| {
        // SAFETY: valid by the caller's promise.
        let Some(comm) = (unsafe { comm.as_ref() }) else { return invalid("ffr_comm_split: comm is NULL") };
        if out.is_null() || (ranks.is_null() && ranks_n > 0) {
            return invalid("ffr_comm_split: out, and ranks if there are any, must not be NULL");
        }
        // SAFETY: valid for writing by the caller's promise.
        unsafe { *out = std::ptr::null_mut() };
        // SAFETY: an array of that length by the caller's promise.
        let ranks = if ranks_n == 0 { &[] } else { unsafe { std::slice::from_raw_parts(ranks, ranks_n) } };
        // A negative rank becomes one that no group has.
        let ranks: Vec<u32> = ranks.iter().map(|&r| u32::try_from(r).unwrap_or(u32::MAX)).collect();
        // SAFETY: a C string by the caller's promise.
        let name = match unsafe { text(name) } {
            Ok(name) => name.unwrap_or("split"),
            Err(error) => return report(&error),
        };
        let timeout = Duration::from_millis(if timeout_ms == 0 { 600_000 } else { timeout_ms });
        match comm.communicator.split(name, &ranks, timeout) {
            Ok(None) => FFR_OK,
            Ok(Some(communicator)) => {
                // SAFETY: valid for writing by the caller's promise.
                unsafe { *out = Box::into_raw(Box::new(FfrComm { communicator })) };
                FFR_OK
            }
            Err(error) => report(&error),
        }
    })
}

/// See `ffreduce.h`.
///
/// # Safety
/// `comm` came from `ffr_comm_create` and was not destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_comm_rank(comm: *const FfrComm) -> i32 {
    // SAFETY: valid by the caller's promise.
    unsafe { comm.as_ref() }.map_or(-1, |c| c.communicator.rank() as i32)
}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_comm_rank`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_comm_size(comm: *const FfrComm) -> i32 {
    // SAFETY: valid by the caller's promise.
    unsafe { comm.as_ref() }.map_or(-1, |c| c.communicator.size() as i32)
}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_comm_rank`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_comm_sequence(comm: *const FfrComm) -> u64 {
    // SAFETY: valid by the caller's promise.
    unsafe { comm.as_ref() }.map_or(0, |c| c.communicator.sequence())
}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_comm_rank`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_comm_set_timeout(comm: *mut FfrComm, timeout_ms: u64) {
    // SAFETY: valid by the caller's promise.
    if let Some(comm) = unsafe { comm.as_ref() }
        && timeout_ms > 0
    {
        comm.communicator.set_timeout(Duration::from_millis(timeout_ms));
    }
}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_comm_rank`]; `buf` is null or has `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_comm_error(comm: *const FfrComm, buf: *mut c_char, len: usize) -> i32 {
    // SAFETY: valid by the caller's promise.
    let failure = unsafe { comm.as_ref() }.and_then(|c| c.communicator.failure());
    let (status, text) = failure.map_or((FFR_OK, String::new()), |e| (status_of(&e), e.to_string()));
    // SAFETY: the caller's promise is the callee's.
    unsafe { copy_text(&text, buf, len) };
    status
}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_comm_rank`]; `reason` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_comm_abort(comm: *mut FfrComm, reason: *const c_char) {
    guarded(|| {
        // SAFETY: valid by the caller's promise.
        let (comm, reason) = unsafe { (comm.as_ref(), text(reason)) };
        if let Some(comm) = comm {
            comm.communicator.abort(reason.ok().flatten().unwrap_or("ffr_comm_abort"));
        }
        FFR_OK
    });
}

/// See `ffreduce.h`.
///
/// # Safety
/// `comm` is null, or came from `ffr_comm_create` and is used by nobody else, now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_comm_destroy(comm: *mut FfrComm) {
    guarded(|| {
        if !comm.is_null() {
            // SAFETY: made by Box::into_raw, given back once.
            let comm = unsafe { Box::from_raw(comm) };
            if comm.communicator.is_forked() {
                // The descriptors were closed at the fork; their numbers may be somebody else's.
                std::mem::forget(comm);
            }
        }
        FFR_OK
    });
}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_comm_rank`]; `stats` is null or valid for its `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_comm_stats(comm: *const FfrComm, stats: *mut FfrStats) -> i32 {
    guarded(|| {
        // SAFETY: valid by the caller's promise.
        let Some(comm) = (unsafe { comm.as_ref() }) else { return invalid("ffr_comm_stats: comm is NULL") };
        if stats.is_null() {
            return invalid("ffr_comm_stats: stats is NULL");
        }
        // SAFETY: the first field is there in every version.
        let wanted = unsafe { (*stats).struct_size };
        let s = comm.communicator.stats();
        let filled = FfrStats {
            struct_size: wanted,
            reserved0: 0,
            ops_submitted: s.submitted,
            ops_completed: s.completed,
            ops_failed: s.failed,
            shm_bytes_sent: s.shm_bytes_sent,
            shm_bytes_received: s.shm_bytes_received,
            tcp_bytes_sent: s.tcp_bytes_sent,
            tcp_bytes_received: s.tcp_bytes_received,
            reduced_bytes: s.reduced_bytes,
            local_peers: s.local_peers,
            remote_peers: s.remote_peers,
            rdma_bytes_sent: s.rdma_bytes_sent,
            rdma_bytes_received: s.rdma_bytes_received,
            copied_bytes: s.copied_bytes,
            rdma_peers: s.rdma_peers,
            reserved1: 0,
        };
        let n = (wanted as usize).min(size_of::<FfrStats>());
        if n < 8 {
            return invalid("ffr_comm_stats: set stats->struct_size to sizeof(ffr_stats)");
        }
        // SAFETY: `n` bytes are there by the caller's promise, and in `filled`.
        unsafe { std::ptr::copy_nonoverlapping((&raw const filled).cast::<u8>(), stats.cast::<u8>(), n) };
        FFR_OK
    })
}

/// The caller's context pointer, carried to the callback's thread.
struct Context(*mut c_void);
// SAFETY: the header says on which threads the callback runs; the pointer is the caller's to share.
unsafe impl Send for Context {}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_comm_rank`]; `args` is valid, its memory is as the header asks; `op` is null or valid
/// for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_submit(comm: *mut FfrComm, args: *const FfrArgs, op: *mut *mut FfrOp) -> i32 {
    guarded(|| {
        // SAFETY: valid by the caller's promise.
        let (Some(comm), Some(args)) = (unsafe { comm.as_ref() }, unsafe { args.as_ref() }) else {
            return invalid("ffr_submit: comm and args must not be NULL");
        };
        // SAFETY: the caller's promise is the callee's.
        match unsafe { submit(&comm.communicator, args) } {
            Ok(handle) => {
                if !op.is_null() {
                    // SAFETY: valid for writing by the caller's promise.
                    unsafe { *op = Box::into_raw(Box::new(FfrOp { handle })) };
                }
                FFR_OK
            }
            Err(error) => report(&error),
        }
    })
}

/// # Safety
/// As [`ffr_submit`].
unsafe fn submit(communicator: &Communicator, args: &FfrArgs) -> Result<Handle, ReduceError> {
    let bad = |detail: String| ReduceError::Invalid { detail: format!("ffr_submit: {detail}") };
    if args.struct_size as usize != size_of::<FfrArgs>() {
        return Err(bad("struct_size is not sizeof(ffr_args) of this version".into()));
    }
    if args.flags & !(SUBMIT_INLINE | SUBMIT_WAIT_FOLLOWS) != 0 {
        return Err(bad(format!("flags {:#x} are unknown", args.flags)));
    }
    let dtype = DType::from_code(args.dtype).ok_or_else(|| bad(format!("{} is no dtype", args.dtype)))?;
    let redop = || {
        ReduceOp::from_code(args.redop, args.factor)
            .ok_or_else(|| bad(format!("{} is no reduction", args.redop)))
    };
    let rank =
        |what: &str, value: i32| u32::try_from(value).map_err(|_| bad(format!("{what} {value} is no rank")));
    let operation = match args.kind {
        0 => Operation::AllReduce(redop()?),
        1 => Operation::Reduce { op: redop()?, root: rank("root", args.root)? },
        2 => Operation::Broadcast { root: rank("root", args.root)? },
        3 => Operation::AllGather,
        4 => Operation::ReduceScatter(redop()?),
        5 => Operation::AllToAll,
        6 => Operation::Gather { root: rank("root", args.root)? },
        7 => Operation::Scatter { root: rank("root", args.root)? },
        8 => Operation::Send { peer: rank("peer", args.peer)?, tag: args.tag },
        9 => Operation::Recv { peer: rank("peer", args.peer)?, tag: args.tag },
        10 => Operation::RecvAny { tag: args.tag },
        11 => Operation::Barrier,
        other => return Err(bad(format!("{other} is no operation"))),
    };
    // SAFETY: arrays of that length by the caller's promise.
    let (input, output) = unsafe { (buffers(args.input, args.in_n)?, buffers(args.output, args.out_n)?) };
    let options = SubmitOptions {
        inline: args.flags & SUBMIT_INLINE != 0,
        wait_follows: args.flags & SUBMIT_WAIT_FOLLOWS != 0,
        timeout: (args.timeout_ms > 0).then(|| Duration::from_millis(args.timeout_ms)),
    };
    let callback = args.done.map(|done| {
        let context = Context(args.done_ctx);
        Box::new(move |outcome: &Result<(), ReduceError>| {
            let context = context;
            let (status, message) = match outcome {
                Ok(()) => (FFR_OK, CString::default()),
                Err(error) => {
                    let text = error.to_string().replace('\0', " ");
                    (status_of(error), CString::new(text).unwrap_or_default())
                }
            };
            // SAFETY: the caller gave this function for this context; it is called once.
            unsafe { done(context.0, status, message.as_ptr()) };
        }) as firefly_reduce::Callback
    });
    let request = Request { operation, dtype, input: &input, output: &output };
    // SAFETY: the caller's promise about the memory is the callee's.
    unsafe { communicator.submit(&request, options, callback) }
}

/// # Safety
/// `bufs` is null or an array of `n`.
unsafe fn buffers(bufs: *const FfrBuf, n: usize) -> Result<Vec<RawBuf>, ReduceError> {
    let bad = |detail: &str| ReduceError::Invalid { detail: format!("ffr_submit: {detail}") };
    if n == 0 {
        return Ok(Vec::new());
    }
    if bufs.is_null() || n > 4096 {
        return Err(bad("an array of buffers is NULL or longer than a group can be"));
    }
    // SAFETY: an array of n by the caller's promise.
    let bufs = unsafe { std::slice::from_raw_parts(bufs, n) };
    bufs.iter()
        .map(|b| {
            let count = usize::try_from(b.count).map_err(|_| bad("a buffer is larger than memory"))?;
            Ok(RawBuf { ptr: b.ptr.cast(), count })
        })
        .collect()
}

fn outcome(outcome: Option<Result<(), ReduceError>>) -> i32 {
    match outcome {
        None => FFR_PENDING,
        Some(Ok(())) => FFR_OK,
        Some(Err(error)) => report(&error),
    }
}

/// See `ffreduce.h`.
///
/// # Safety
/// `op` came from `ffr_submit` and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_op_wait(op: *mut FfrOp, timeout_ms: i64) -> i32 {
    guarded(|| {
        // SAFETY: valid by the caller's promise.
        let Some(op) = (unsafe { op.as_ref() }) else { return invalid("ffr_op_wait: op is NULL") };
        match u64::try_from(timeout_ms) {
            Err(_) => outcome(Some(op.handle.wait())),
            Ok(ms) => {
                // A limit beyond what the clock can express is no limit.
                let until = Instant::now().checked_add(Duration::from_millis(ms));
                outcome(op.handle.wait_until(until))
            }
        }
    })
}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_op_wait`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_op_test(op: *mut FfrOp) -> i32 {
    guarded(|| {
        // SAFETY: valid by the caller's promise.
        let Some(op) = (unsafe { op.as_ref() }) else { return invalid("ffr_op_test: op is NULL") };
        outcome(op.handle.test())
    })
}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_op_wait`]; `buf` is null or has `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_op_error(op: *const FfrOp, buf: *mut c_char, len: usize) -> usize {
    // SAFETY: valid by the caller's promise.
    let outcome = unsafe { op.as_ref() }.and_then(|op| op.handle.outcome());
    let text = match outcome {
        Some(Err(error)) => error.to_string(),
        _ => String::new(),
    };
    // SAFETY: the caller's promise is the callee's.
    unsafe { copy_text(&text, buf, len) }
}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_op_wait`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_op_sequence(op: *const FfrOp) -> u64 {
    // SAFETY: valid by the caller's promise.
    unsafe { op.as_ref() }.map_or(0, |op| op.handle.sequence())
}

/// See `ffreduce.h`.
///
/// # Safety
/// As [`ffr_op_wait`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_op_source(op: *const FfrOp) -> i32 {
    // SAFETY: valid by the caller's promise.
    unsafe { op.as_ref() }.and_then(|op| op.handle.source()).map_or(-1, |rank| rank as i32)
}

/// See `ffreduce.h`.
///
/// # Safety
/// `op` is null, or came from `ffr_submit` and is used by nobody else, now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ffr_op_free(op: *mut FfrOp) {
    guarded(|| {
        if !op.is_null() {
            // SAFETY: made by Box::into_raw, given back once.
            drop(unsafe { Box::from_raw(op) });
        }
        FFR_OK
    });
}
