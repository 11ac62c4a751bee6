//! One chain of fs3: targets with their engines, a manager, clients, and the truth.

mod client;
mod manager;
mod node;
mod truth;
mod world;

pub use truth::Violation;
pub use world::{Mutant, Options, Outcome, run};

use firefly_types::{ChainVersion, ChunkId, DataId, Generation};
use std::sync::Arc;

/// A chunk is this many slots; a write fills one with copies of its tag, so that what is read says
/// which writes it consists of. Two blocks of the engine, with a slot over their border.
pub(crate) const SLOTS: usize = 4;
pub(crate) const SLOT_BYTES: usize = 6000;

/// Payload of the simulated messages.
#[derive(Clone, PartialEq, Debug)]
pub struct Bytes(pub(crate) Arc<[u8]>);

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Writes and reads tell slots by their tags; 0 is a hole.
pub(crate) type Tags = Vec<u64>;

pub(crate) fn chunk(index: u32) -> ChunkId {
    ChunkId { data: DataId(1), generation: Generation(0), index }
}

pub(crate) fn slot_bytes(tag: u64) -> Vec<u8> {
    tag.to_le_bytes().iter().copied().cycle().take(SLOT_BYTES).collect()
}

/// The tags of a chunk's content, or what is wrong with it.
pub(crate) fn tags_of(content: &[u8]) -> Result<Tags, String> {
    if !content.len().is_multiple_of(SLOT_BYTES) {
        return Err(format!("{} bytes are not whole slots", content.len()));
    }
    content
        .chunks(SLOT_BYTES)
        .enumerate()
        .map(|(slot, bytes)| {
            let mut tag = [0; 8];
            tag.copy_from_slice(&bytes[..8]);
            let whole = bytes.iter().zip(tag.iter().cycle()).all(|(a, b)| a == b);
            if whole { Ok(u64::from_le_bytes(tag)) } else { Err(format!("slot {slot} is torn")) }
        })
        .collect()
}

/// The chain as one party knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) version: ChainVersion,
    pub(crate) serving: Vec<usize>,
}
