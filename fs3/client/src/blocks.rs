//! Read-ahead: blocks of a file that were fetched before they were asked for.
//!
//! Coherence: a block is forgotten when a write to its range is buffered and again when that write
//! has reached storage. So as long as a block is in the map, every write that it may lack is still
//! in the write buffer, and laying the buffer over the block gives the newest bytes. Blocks live a
//! second at most, which bounds what other clients' writes can be missed.

use firefly_net::Buf;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

/// Largest block, bytes.
const MOST_BLOCK: u32 = 1 << 20;

/// Age at which a block is fetched anew.
const MOST_AGE: Duration = Duration::from_secs(1);

/// How far behind a reader blocks of other readers are left alone, in blocks.
const BEHIND: u64 = 16;

pub(crate) type Cell = Arc<OnceCell<Buf>>;

#[derive(Default)]
pub(crate) struct Blocks {
    held: BTreeMap<u64, Block>,
}

struct Block {
    cell: Cell,
    made: Instant,
    _permit: OwnedSemaphorePermit,
}

/// Size of the blocks of a file with chunks of `chunk_bytes`: a block never straddles chunks.
pub(crate) fn block_bytes(chunk_bytes: u32) -> u32 {
    if chunk_bytes.is_multiple_of(MOST_BLOCK) { MOST_BLOCK } else { chunk_bytes }
}

impl Blocks {
    /// The block, and whether it is new, or `None` if the budget has no room for it.
    pub(crate) fn get(&mut self, block: u64, bytes: u32, budget: &Arc<Semaphore>) -> Option<(Cell, bool)> {
        if let Some(held) = self.held.get(&block)
            && held.made.elapsed() < MOST_AGE
        {
            return Some((held.cell.clone(), false));
        }
        self.held.remove(&block);
        let permit = budget.clone().try_acquire_many_owned(bytes).ok()?;
        let cell = Cell::default();
        self.held.insert(block, Block { cell: cell.clone(), made: Instant::now(), _permit: permit });
        Some((cell, true))
    }

    /// Forgets every block of `range` (block numbers, inclusive).
    pub(crate) fn forget(&mut self, first: u64, last: u64) {
        if !self.held.is_empty() {
            self.held.retain(|block, _| !(first..=last).contains(block));
        }
    }

    /// A sequential reader has passed `block`.
    pub(crate) fn passed(&mut self, block: u64) {
        self.held.retain(|held, _| *held >= block || held + BEHIND < block);
    }

    pub(crate) fn expire(&mut self) {
        self.held.retain(|_, block| block.made.elapsed() < MOST_AGE);
    }

    pub(crate) fn clear(&mut self) {
        self.held.clear();
    }
}
