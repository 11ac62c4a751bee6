//! The chunk engine: chunks on one disk, with every byte checked.
//!
//! * **Redirect on write.** A chunk is a map of 16 KiB blocks; an update writes new blocks and a
//!   log record with the changed part of the map, so a 4 KiB overwrite costs one block, and the
//!   committed version stays readable beside the pending one.
//! * **Checksums live in the map**, not with the block, and cover chunk, block index and version:
//!   a lost or misdirected write shows. Every read verifies.
//! * **Group commit.** All pending operations share data writes → fdatasync of the data → one
//!   log frame → fdatasync of the log. A frame counts whole or not at all.
//! * **Blocks are reused** only after the record that frees them is durable and no read that began
//!   before holds them.
//! * **A failed write or flush ends the target** (`fsync` may report an error once and forget it:
//!   Rebello et al., ATC 2020). Nothing is retried.
//!
//! The engine is a value without threads: one caller at a time runs [`Engine::run_batch`], others
//! read. Bytes go through [`Disk`], so that tests and the simulator can lose what was not synced.

mod alloc;
mod buffer;
mod disk;
mod file_disk;
mod format;
mod image;
mod recovery;
mod store;
mod write;

#[cfg(test)]
mod tests;

pub use buffer::AlignedBuf;
pub use disk::{Disk, MemDisk};
pub use file_disk::FileDisk;
pub use format::{FORMAT_VERSION, FormatError, Header, LogRecord};
pub use store::{Done, Engine, EngineError, EngineOptions, ReadPlan, Usage};

/// Bytes in a block: the unit of redirection and of checksums. Format 1 fixes it to the unit of
/// the checksums that replicas compare.
pub const BLOCK_BYTES: usize = fs3_core::target::DIGEST_UNIT;
