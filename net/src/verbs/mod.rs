//! Verbs objects that RPC's links and reduce's channels share: declarations, devices, ports,
//! queue pairs. Each owner destroys what it made, in the order that the library asks for: queue
//! pair, completion queue, channel; then memory regions; then the device.

#![allow(
    dead_code,
    unused_imports,
    reason = "channels over RDMA use the rest; they come with another change"
)]

pub(crate) mod device;
pub(crate) mod ffi;
pub(crate) mod negotiate;
pub(crate) mod port;
pub(crate) mod queue;
pub(crate) mod rail;
pub(crate) mod slab;
pub(crate) mod status;
pub(crate) mod window;

pub(crate) use device::{Device, Keys, Reach, Region};
pub(crate) use port::Port;
pub(crate) use queue::{Address, Completion, Done, Op, Queue, QueueOptions, Remote, Request};
pub(crate) use rail::{Rail, Watcher};
pub(crate) use window::MemoryWindow;
