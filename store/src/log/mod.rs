//! The durable raft log: append-only segment files, one frame and one fdatasync per batch.

pub(crate) mod disk;
pub(crate) mod format;
mod segments;

pub(crate) use segments::{Recovered, SegmentLog};
