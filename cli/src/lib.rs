//! `ff`, the one binary a person types: commands are thin over the rooms below.
//!
//! Exit codes: 0 done, 1 the operation failed, 2 wrong usage. Tables for people, `--json` for
//! programs; errors say what to do next. The library half exists for the end-to-end tests and the
//! benches, which start clusters the way `ff up` does ([`local::LocalCluster`]).

pub mod cmd;
pub mod connect;
pub mod context;
pub mod digits;
pub mod local;
pub mod mount;
pub mod native_train;
pub mod probe;
pub mod serve;
