//! The pure decisions of fs3: chain states, the replication target, placement.

pub mod layout;
pub mod target;

pub mod chain;
pub mod placement;
pub mod worker;
