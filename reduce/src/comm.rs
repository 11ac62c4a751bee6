//! The communicator: one group of ranks, seen from one of them.

use crate::ReduceError;
use crate::bootstrap;
use crate::dtype::{DType, ReduceOp};
use crate::environment::{bind_address_from_env, node_key_from_env};
use crate::group::{Group, Stats, SubmitOptions};
use crate::op::{Callback, OpState};
use crate::options::Options;
use crate::rendezvous::Rendezvous;
use crate::request::{Operation, RawBuf, Request};
use crate::store::Store;
use crate::wire::Reach;
use firefly_net::ChannelOptions;
use firefly_types::ClusterSecret;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

/// How to form a group.
#[derive(Clone, Debug)]
pub struct Config {
    /// This process's rank, 0..size.
    pub rank: u32,
    /// Ranks in the group, 1..=4096.
    pub size: u32,
    /// Equal on all ranks, different for groups that share a store.
    pub group: String,
    /// Of forming the group and, by default, of each operation. Default 10 minutes: long enough
    /// for a rank that writes a checkpoint, short enough not to waste a night.
    pub timeout: Duration,
    /// Of forming the group alone; default: `timeout`.
    pub form_timeout: Option<Duration>,
    /// Ranks with equal keys share memory; default `FIREFLY_NODE_ID`, else host name and boot.
    pub node_key: Option<String>,
    /// What the ranks share; default: rank 0 makes one and publishes it in the store.
    pub secret: Option<ClusterSecret>,
    /// Address that peers on other nodes reach this rank at; default: the one that routes to
    /// `master_address`.
    pub bind_address: Option<String>,
    /// Host of the rendezvous, to find out the own address with.
    pub master_address: Option<String>,
    /// How ranks on other nodes are reached. Default: by the process's network, as the environment
    /// describes it (`FIREFLY_TRANSPORT`, `FIREFLY_RDMA_DEVICES`, `FIREFLY_SOCKETS`; of NCCL's
    /// variables `NCCL_IB_DISABLE`, `NCCL_IB_HCA`, `NCCL_IB_SL` and `NCCL_IB_TC`).
    pub channels: Option<ChannelOptions>,
    /// Silence of a remote rank's process that counts as death. Default 10 s: a busy host may
    /// starve a process for seconds; the death of a process itself is seen at once.
    pub heartbeat_timeout: Duration,
    /// What all ranks must do alike; rank 0's count. Default: [`Options::from_env`], read when the
    /// group is formed.
    pub options: Option<Options>,
    /// Watch the peers' processes. Off only in tests that prove that the watch is what finds
    /// deaths.
    #[doc(hidden)]
    pub liveness: bool,
}

impl Config {
    /// A group named "default" with the default limits.
    pub fn new(rank: u32, size: u32) -> Self {
        Self {
            rank,
            size,
            group: "default".into(),
            timeout: Duration::from_secs(600),
            form_timeout: None,
            options: None,
            node_key: None,
            secret: None,
            bind_address: None,
            master_address: None,
            channels: None,
            heartbeat_timeout: Duration::from_secs(10),
            liveness: true,
        }
    }
}

/// Where the built-in rendezvous of a job is, from the environment.
pub struct Meeting {
    /// Host or address of rank 0.
    pub host: String,
    /// Port that rank 0 listens on.
    pub port: u16,
}

impl Meeting {
    /// `MASTER_ADDR` and `MASTER_PORT`, else 127.0.0.1 and 29555 (apart from torchrun's 29500).
    pub fn from_env() -> Self {
        let port = std::env::var("MASTER_PORT").ok().and_then(|p| p.parse().ok());
        Self {
            host: std::env::var("MASTER_ADDR").unwrap_or_else(|_| "127.0.0.1".into()),
            port: port.unwrap_or(29555),
        }
    }
}

/// The secret in `FIREFLY_JOB_SECRET`, if there is one.
pub fn secret_from_env() -> Result<Option<ClusterSecret>, ReduceError> {
    match std::env::var("FIREFLY_JOB_SECRET") {
        Err(_) => Ok(None),
        Ok(text) if text.is_empty() => Ok(None),
        Ok(text) => ClusterSecret::from_hex(text.trim())
            .map(Some)
            .ok_or_else(|| ReduceError::invalid("FIREFLY_JOB_SECRET must be 64 hexadecimal digits")),
    }
}

/// Groups formed from the environment by this process, by name: each gets a number, so that the
/// second group of a job does not meet the first one's keys.
static FORMED: LazyLock<Mutex<HashMap<String, u64>>> = LazyLock::new(Mutex::default);

/// One group, seen from this rank. Dropping it leaves the group in order.
pub struct Communicator {
    group: Arc<Group>,
    config: Config,
}

impl Communicator {
    /// Forms a group whose ranks meet through `store`. Blocks until all are there.
    pub fn create(config: &Config, store: &dyn Store) -> Result<Self, ReduceError> {
        let group = Group::start(bootstrap::form(config, store)?)?;
        Ok(Self { group, config: config.clone() })
    }

    /// Forms a group whose ranks meet at rank 0.
    pub fn meet(config: &Config, meeting: &Meeting) -> Result<Self, ReduceError> {
        let mut config = config.clone();
        config.master_address.get_or_insert_with(|| meeting.host.clone());
        if config.size == 1 {
            return Self::create(&config, &crate::store::MemoryStore::default());
        }
        // Without a secret the rendezvous itself is open to whoever reaches the port.
        let secret = config.secret.clone().unwrap_or_else(|| {
            tracing::warn!("no FIREFLY_JOB_SECRET: anyone who reaches the rendezvous may join the group");
            ClusterSecret::from_bytes([0; 32])
        });
        let address = format!("{}:{}", meeting.host, meeting.port);
        let limit = config.form_timeout.unwrap_or(config.timeout);
        let store = Rendezvous::join(&address, config.rank, &secret, limit)
            .map_err(|e| ReduceError::bootstrap(format!("rank {}: {e}", config.rank)))?;
        Self::create(&config, &store)
    }

    /// Forms the group that the environment describes: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`,
    /// `MASTER_PORT`, `FIREFLY_NODE_ID`, `FIREFLY_BIND_ADDR` (see [`bind_address_from_env`]),
    /// `FIREFLY_JOB_SECRET`, `FIREFLY_JOB_ID`, `FIREFLY_EPOCH`. Without `WORLD_SIZE` it is a group of one.
    pub fn from_env() -> Result<Self, ReduceError> {
        let number = |name: &str, default: u32| match std::env::var(name) {
            Err(_) => Ok(default),
            Ok(text) => text
                .parse()
                .map_err(|_| ReduceError::invalid(format!("{name} must be a number, not {text:?}"))),
        };
        let mut config = Config::new(number("RANK", 0)?, number("WORLD_SIZE", 1)?);
        let or = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.into());
        let job = format!("job {} epoch {}", or("FIREFLY_JOB_ID", "0"), or("FIREFLY_EPOCH", "0"));
        let count = {
            let mut formed = firefly_types::lock(&FORMED);
            let count = formed.entry(job.clone()).or_default();
            *count += 1;
            *count
        };
        config.group = format!("{job} group {count}");
        config.secret = secret_from_env()?;
        config.bind_address = bind_address_from_env()?;
        config.node_key = node_key_from_env(config.rank);
        Self::meet(&config, &Meeting::from_env())
    }

    /// What all ranks of the group do alike.
    pub fn options(&self) -> Options {
        self.group.options().clone()
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.group.names.rank
    }

    /// Ranks in the group.
    pub fn size(&self) -> u32 {
        self.group.names.size
    }

    /// Sequence number of the last collective submitted; 0 before the first.
    pub fn sequence(&self) -> u64 {
        self.group.sequence()
    }

    /// Timeout of operations submitted from now on.
    pub fn set_timeout(&self, timeout: Duration) {
        self.group.set_timeout(timeout);
    }

    /// What broke the group, if it is broken.
    pub fn failure(&self) -> Option<ReduceError> {
        self.group.failure()
    }

    /// Breaks the group from here, without the peers' help: all operations end with
    /// [`ReduceError::Aborted`], all waiters wake, and no memory is touched any more on return.
    pub fn abort(&self, reason: &str) {
        self.group.abort(reason);
    }

    /// Counts so far.
    pub fn stats(&self) -> Stats {
        self.group.stats()
    }

    /// How `rank` is reached; `None` for this rank itself and once the group is broken.
    pub fn reach(&self, rank: u32) -> Option<Reach> {
        self.group.reach(rank)
    }

    /// Submits an operation on raw memory; never blocks on a peer. `callback` runs exactly once,
    /// before waiters wake, with no lock held; it must not wait for an operation or drop the
    /// communicator.
    ///
    /// # Safety
    /// The memory of the request is valid, and not accessed except for reading inputs, until the
    /// operation is complete (its handle says so, or the callback runs). Inputs and outputs
    /// overlap only as the table in `ffreduce.h` allows.
    pub unsafe fn submit(
        &self,
        request: &Request<'_>,
        options: SubmitOptions,
        callback: Option<Callback>,
    ) -> Result<Handle, ReduceError> {
        // SAFETY: the caller's promise is the callee's.
        let op = unsafe { self.group.submit(request, options, callback) }?;
        Ok(Handle { group: self.group.clone(), op })
    }

    /// Submits on borrowed memory and waits.
    fn run(
        &self,
        operation: Operation,
        dtype: DType,
        input: &[RawBuf],
        output: &[RawBuf],
    ) -> Result<(), ReduceError> {
        let request = Request { operation, dtype, input, output };
        let options = SubmitOptions { inline: true, wait_follows: true, timeout: None };
        // SAFETY: the callers below borrow the memory for the whole call, and `wait` returns only
        // when the operation is complete.
        unsafe { self.submit(&request, options, None) }?.wait()
    }

    /// Reduces `data` over all ranks, in place.
    pub fn allreduce<T: Scalar>(&self, data: &mut [T], op: ReduceOp) -> Result<(), ReduceError> {
        let buf = [raw(data)];
        self.run(Operation::AllReduce(op), T::DTYPE, &buf, &buf)
    }

    /// [`Communicator::allreduce`] of single precision numbers.
    pub fn allreduce_f32(&self, data: &mut [f32], op: ReduceOp) -> Result<(), ReduceError> {
        self.allreduce(data, op)
    }

    /// Starts an all-reduce in place; the memory is borrowed until the returned value is waited
    /// for or dropped (dropping waits).
    pub fn allreduce_async<'a, T: Scalar>(
        &self,
        data: &'a mut [T],
        op: ReduceOp,
    ) -> Result<Pending<'a>, ReduceError> {
        let buf = [raw(data)];
        let request =
            Request { operation: Operation::AllReduce(op), dtype: T::DTYPE, input: &buf, output: &buf };
        // SAFETY: `Pending` borrows the memory and completes before the borrow ends. Leaking it
        // would end the borrow early; see its documentation.
        let handle = unsafe { self.submit(&request, SubmitOptions::default(), None) }?;
        Ok(Pending { handle, _memory: PhantomData })
    }

    /// Gives every rank `root`'s data.
    pub fn broadcast<T: Scalar>(&self, data: &mut [T], root: u32) -> Result<(), ReduceError> {
        let buf = [raw(data)];
        self.run(Operation::Broadcast { root }, T::DTYPE, &buf, &buf)
    }

    /// Gives every rank all ranks' `input`, in rank order; `output` is `size` times as long.
    pub fn allgather<T: Scalar>(&self, input: &[T], output: &mut [T]) -> Result<(), ReduceError> {
        self.run(Operation::AllGather, T::DTYPE, &[raw_const(input)], &[raw(output)])
    }

    /// Gives rank i the reduction of all ranks' block i; `input` is `size` times as long.
    pub fn reduce_scatter<T: Scalar>(
        &self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<(), ReduceError> {
        self.run(Operation::ReduceScatter(op), T::DTYPE, &[raw_const(input)], &[raw(output)])
    }

    /// Returns when all ranks have called it.
    pub fn barrier(&self) -> Result<(), ReduceError> {
        self.run(Operation::Barrier, DType::U8, &[], &[])
    }

    /// Sends `data` to `peer`.
    pub fn send<T: Scalar>(&self, data: &[T], peer: u32, tag: u32) -> Result<(), ReduceError> {
        self.run(Operation::Send { peer, tag }, T::DTYPE, &[raw_const(data)], &[])
    }

    /// Receives `data` from `peer`.
    pub fn recv<T: Scalar>(&self, data: &mut [T], peer: u32, tag: u32) -> Result<(), ReduceError> {
        self.run(Operation::Recv { peer, tag }, T::DTYPE, &[], &[raw(data)])
    }

    /// Whether this process is a forked child of the one that formed the group.
    #[doc(hidden)]
    pub fn is_forked(&self) -> bool {
        self.group.forked()
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.group.close();
    }
}

/// A submitted operation.
pub struct Handle {
    group: Arc<Group>,
    op: Arc<OpState>,
}

impl Handle {
    /// Waits for the outcome, driving progress.
    pub fn wait(&self) -> Result<(), ReduceError> {
        self.wait_until(None).unwrap_or_else(|| {
            Err(ReduceError::invalid(
                "the operation belongs to the parent process; a forked child cannot wait for it",
            ))
        })
    }

    /// Waits at most until `until`; `None` if it is not complete by then.
    pub fn wait_until(&self, until: Option<Instant>) -> Option<Result<(), ReduceError>> {
        self.group.wait(&self.op, until);
        self.op.outcome()
    }

    /// The outcome, if there is one; tries a little progress.
    pub fn test(&self) -> Option<Result<(), ReduceError>> {
        if !self.op.is_complete() {
            self.group.test();
        }
        self.op.outcome()
    }

    /// The outcome, if there is one.
    pub fn outcome(&self) -> Option<Result<(), ReduceError>> {
        self.op.outcome()
    }

    /// Place in the group's sequence of collectives; 0 for point-to-point.
    pub fn sequence(&self) -> u64 {
        self.op.sequence
    }

    /// Sender of a completed receive.
    pub fn source(&self) -> Option<u32> {
        self.op.source()
    }
}

/// An operation that borrows its memory. Wait for it, or drop it, which waits.
///
/// Do not leak it (`mem::forget`): the group would go on writing memory that is borrowed no more.
#[must_use = "the operation is waited for when this is dropped"]
pub struct Pending<'a> {
    handle: Handle,
    _memory: PhantomData<&'a mut ()>,
}

impl Pending<'_> {
    /// Waits for the outcome.
    pub fn wait(self) -> Result<(), ReduceError> {
        self.handle.wait()
    }

    /// The outcome, if there is one; tries a little progress.
    pub fn test(&self) -> Option<Result<(), ReduceError>> {
        self.handle.test()
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let _ = self.handle.wait();
    }
}

/// A plain type that has a [`DType`].
///
/// # Safety
/// `DTYPE` describes exactly this type's memory, and every bit pattern that a reduction or a peer
/// can write is a valid value.
pub unsafe trait Scalar: Copy + Send {
    /// Which.
    const DTYPE: DType;
}

macro_rules! scalars {
    ($($t:ty => $dtype:ident),* $(,)?) => {$(
        // SAFETY: a number of that size, of which every bit pattern is valid.
        unsafe impl Scalar for $t {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}
scalars! {
    u8 => U8, i8 => I8, i16 => I16, i32 => I32, i64 => I64, u16 => U16, u32 => U32, u64 => U64,
    f32 => F32, f64 => F64, half::f16 => F16, half::bf16 => BF16,
}

fn raw<T>(data: &mut [T]) -> RawBuf {
    RawBuf { ptr: data.as_mut_ptr().cast(), count: data.len() }
}

fn raw_const<T>(data: &[T]) -> RawBuf {
    RawBuf { ptr: data.as_ptr().cast_mut().cast(), count: data.len() }
}
