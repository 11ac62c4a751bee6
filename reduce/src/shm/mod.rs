//! Shared memory within a node: one segment per rank (a sealed memfd that only this group's ranks
//! of this node have mapped), byte rings between pairs, staging slots that all ranks read, and
//! doorbells to wake sleepers.

pub(crate) mod arena;
pub(crate) mod ring;
pub(crate) mod segment;
