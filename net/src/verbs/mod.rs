//! Verbs objects that RPC's links and reduce's channels share: declarations, devices, queue pairs.

pub(crate) mod device;
pub(crate) mod ffi;

pub(crate) use device::Device;
