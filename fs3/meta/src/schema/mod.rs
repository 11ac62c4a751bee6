//! What lies in the store: keys (ordered so that one scan answers one question) and records (each
//! with a version byte). docs/formats.md, "fs3 namespace", is the public description; the tests
//! here pin it byte by byte.

pub mod codec;
pub mod keys;
pub mod records;

pub use records::{
    ClientRecord, DentryRecord, DirTimes, FileLayout, GarbageRecord, InodeRecord, Kind, LaneRecord,
    LaneReply, SessionRecord, Stamp, Usage,
};

#[cfg(test)]
mod tests;
