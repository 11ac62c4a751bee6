//! How a client connects and how much it may hold.

use firefly_net::Identity;
use std::time::Duration;

/// How to connect to a cluster. Every limit has a reason beside its default.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Address of the manager: `http://ip:port`, or `ip:port`.
    pub manager: String,
    /// Address of the meta server, `ip:port`; `None` takes it from the routing table.
    pub meta: Option<String>,
    /// Who we are on the data path.
    pub identity: Identity,
    /// Who we are, for people: host, process, mount point.
    pub description: String,
    /// Written bytes that may wait in memory. Default 64 MiB: a quarter of a second of a fast
    /// network, so that writers and the network both stay busy.
    pub dirty_bytes: usize,
    /// Bytes of read-ahead kept over all files. Default 64 MiB.
    pub readahead_bytes: usize,
    /// How far one sequential reader reads ahead. Default 4 MiB: several chunks in parallel.
    pub readahead_per_file: usize,
    /// Data updates in flight, and so exactly-once lanes. Default 64.
    pub update_lanes: usize,
    /// Data reads in flight. Default 64.
    pub reads_in_flight: usize,
    /// Metadata changes in flight. Default 64.
    pub meta_lanes: usize,
    /// Longest wait for one answer to a read or a metadata call. Default 3 s: a silent server is
    /// asked no longer than a fail-over takes.
    pub call_timeout: Duration,
    /// Longest wait for one answer to a data update. Default 6 s: longer than the head itself
    /// waits for its successor's fail-over, since asking again sooner only adds load.
    pub update_timeout: Duration,
    /// How often written data and lengths are published while a file stays open. Default 1 s.
    pub publish_every: Duration,
    /// Attempt epoch and job of the process, zero outside jobs.
    pub attempt: (u32, u64),
    /// Whether payload checksums of reads are compared. Always true outside negative tests.
    #[doc(hidden)]
    pub verify_reads: bool,
}

impl ClientOptions {
    /// Defaults for `manager` and `identity`.
    pub fn new(manager: impl Into<String>, identity: Identity) -> Self {
        Self {
            manager: manager.into(),
            meta: None,
            description: format!("{} pid {}", identity.name, std::process::id()),
            identity,
            dirty_bytes: 64 << 20,
            readahead_bytes: 64 << 20,
            readahead_per_file: 4 << 20,
            update_lanes: 64,
            reads_in_flight: 64,
            meta_lanes: 64,
            call_timeout: Duration::from_secs(3),
            update_timeout: Duration::from_secs(6),
            publish_every: Duration::from_secs(1),
            attempt: (0, 0),
            verify_reads: true,
        }
    }
}
