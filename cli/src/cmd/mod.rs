//! The commands, one file each.

pub mod doctor;
pub mod fs;
pub mod job;
pub mod network;
pub mod node;
pub mod perf;
pub mod quickstart;
pub mod ranks;
pub mod reduce;
pub mod run;
pub mod status;
pub mod up;
