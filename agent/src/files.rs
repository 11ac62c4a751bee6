//! What agent and shim tell each other: small JSON files, each written whole and renamed into
//! place, in one folder per rank. A fifo in each direction only says "look".
//!
//! ```text
//! state_dir/
//!   agent.lock          held by the agent
//!   wake                fifo: shims -> agent
//!   lease               boot-time clock of the last sign of life of the scheduler
//!   ended.json          job -> newest attempt that is over here: older orders are refused
//!   ranks/j3.a1.r0/
//!     lock              held by the shim for its life
//!     prepare.json      agent -> shim: what to run (mode 0600: holds the job's secret)
//!     start.json        agent -> shim: the barrier is open
//!     stop.json         agent -> shim: end it
//!     status.json       shim -> agent
//!     ctl               fifo: agent -> shim
//!     log.<offset>      output; see `spool`
//!     status/           FIREFLY_STATUS of the rank, owned by its user
//! ```

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Version of these files; a shim of the release before speaks the same.
pub(crate) const VERSION: u32 = 1;

/// What to run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Prepare {
    pub(crate) version: u32,
    pub(crate) job: u64,
    pub(crate) epoch: u32,
    pub(crate) rank: u32,
    pub(crate) local_rank: u32,
    pub(crate) world_size: u32,
    pub(crate) local_world_size: u32,
    pub(crate) node_rank: u32,
    pub(crate) node_id: u32,
    pub(crate) nodes: u32,
    pub(crate) restart_count: u32,
    pub(crate) max_restarts: u32,
    pub(crate) name: String,
    pub(crate) command: Vec<String>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) working_directory: String,
    /// Empty: run as the agent's own user.
    pub(crate) user: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) grace_ms: u64,
    pub(crate) orphan_lease_ms: u64,
    pub(crate) job_secret: String,
}

/// The barrier is open.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Start {
    pub(crate) master_address: String,
    pub(crate) master_port: u16,
}

/// End it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Stop {
    pub(crate) grace_ms: u64,
}

/// Where a rank stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    #[default]
    Prepared,
    Running,
    Exited,
}

/// What the shim says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) state: State,
    pub(crate) shim: Process,
    /// Leader of the rank's session and process group.
    pub(crate) process: Option<Process>,
    pub(crate) master_port: u16,
    pub(crate) exit_code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) detail: String,
    /// Where the log ends; final once exited.
    pub(crate) log_end: u64,
}

/// A process that can be told from a later one with the same id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// Field 22 of /proc/pid/stat: ticks since boot.
    pub(crate) start: u64,
}

/// Largest of these files that is read: bounds what a damaged one can cost.
const MOST_BYTES: u64 = 4 << 20;

/// Replaces `path` by `value`, durably. `mode` is that of a new file.
pub(crate) fn write<T: Serialize>(path: &Path, value: &T, mode: u32) -> io::Result<()> {
    let bytes = serde_json::to_vec(value).map_err(io::Error::other)?;
    replace(path, &bytes, mode, true)
}

/// Replaces the content of `path` in one step.
pub(crate) fn replace(path: &Path, bytes: &[u8], mode: u32, durable: bool) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
    file.write_all(bytes)?;
    if durable {
        file.sync_all()?;
    }
    fs::rename(&temporary, path)?;
    if durable && let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Reads a file of ours; `None` if it does not exist.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let size = match fs::metadata(path) {
        Ok(meta) => meta.len(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    if size > MOST_BYTES {
        return Err(io::Error::other(format!("{} is too large ({size} bytes)", path.display())));
    }
    let bytes = fs::read(path)?;
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", path.display())))
}

/// Rings a fifo. Nobody listening is no error: what matters is in the files.
pub(crate) fn ring(fifo: &Path) {
    let opened = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(fifo);
    if let Ok(mut fifo) = opened {
        // A full fifo rings anyway.
        let _ = fifo.write(b".");
    }
}
