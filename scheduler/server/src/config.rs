//! The daemon's configuration.

use firefly_types::ClusterSecret;
use scheduler_core::Policy;
use std::net::SocketAddr;
use std::path::PathBuf;

/// How to run a scheduler.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// Where to serve gRPC; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Folder for state and logs. One daemon per folder.
    pub data_dir: PathBuf,
    /// Membership.
    pub secret: ClusterSecret,
    /// Times and limits.
    pub policy: Policy,
    /// Bytes of log that are kept of one job, over all its ranks and attempts; the oldest lines
    /// go first. Default 64 MiB: days of ordinary training output, and a thousand chatty jobs
    /// still fit a disk.
    pub log_bytes_per_job: u64,
}

impl SchedulerConfig {
    /// With defaults for all knobs.
    pub fn new(listen: SocketAddr, data_dir: PathBuf, secret: ClusterSecret) -> Self {
        Self { listen, data_dir, secret, policy: Policy::default(), log_bytes_per_job: 64 << 20 }
    }
}
