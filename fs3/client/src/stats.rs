//! Counters of one client.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What the client did since it connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientStats {
    /// Payload bytes received from storage.
    pub bytes_read: u64,
    /// Payload bytes sent to storage and acknowledged.
    pub bytes_written: u64,
    /// Chunk reads answered.
    pub reads: u64,
    /// Chunk updates acknowledged.
    pub writes: u64,
    /// Metadata calls answered.
    pub meta_calls: u64,
    /// Calls repeated after a failure, data and metadata.
    pub retries: u64,
    /// Reads served by another replica after one had failed.
    pub replica_switches: u64,
    /// Payloads that failed their checksum.
    pub checksum_mismatches: u64,
    /// Longest time that one call took including its retries, of calls that were retried.
    pub longest_pause: Duration,
    /// Written bytes that wait in memory now.
    pub dirty_bytes: u64,
    /// Read-ahead blocks used.
    pub readahead_hits: u64,
    /// Routing tables received.
    pub routing_updates: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) bytes_read: AtomicU64,
    pub(crate) bytes_written: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) meta_calls: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) replica_switches: AtomicU64,
    pub(crate) checksum_mismatches: AtomicU64,
    pub(crate) longest_pause_nanos: AtomicU64,
    pub(crate) readahead_hits: AtomicU64,
    pub(crate) routing_updates: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

impl Stats {
    pub(crate) fn paused(&self, elapsed: Duration) {
        let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        self.longest_pause_nanos.fetch_max(nanos, Relaxed);
    }

    pub(crate) fn snapshot(&self, dirty_bytes: u64) -> ClientStats {
        let get = |counter: &AtomicU64| counter.load(Relaxed);
        ClientStats {
            bytes_read: get(&self.bytes_read),
            bytes_written: get(&self.bytes_written),
            reads: get(&self.reads),
            writes: get(&self.writes),
            meta_calls: get(&self.meta_calls),
            retries: get(&self.retries),
            replica_switches: get(&self.replica_switches),
            checksum_mismatches: get(&self.checksum_mismatches),
            longest_pause: Duration::from_nanos(get(&self.longest_pause_nanos)),
            dirty_bytes,
            readahead_hits: get(&self.readahead_hits),
            routing_updates: get(&self.routing_updates),
        }
    }
}
