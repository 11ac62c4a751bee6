//! The RDMA channel: messages through a ring in the receiver's registered memory, large payloads
//! straight between registered regions.
//!
//! [`core`] decides what is written where, without any I/O; [`credit`] says how much may be under
//! way; [`note`] is what both sides say beside the ring; [`verbs`] drives a queue pair with it.

mod core;
mod credit;
mod note;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;
mod verbs;

pub(super) use verbs::{Endpoint, Half, VerbsChannel};
