//! The commands, one file each.

pub mod fs;
pub mod job;
pub mod node;
pub mod perf;
pub mod quickstart;
pub mod reduce;
pub mod run;
pub mod status;
pub mod up;
