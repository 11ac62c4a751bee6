//! The error file by which torchelastic, and Firefly's agent, learn why a rank failed.
//!
//! The format is torchelastic's (`torch.distributed.elastic.multiprocessing.errors`): the launcher
//! names the file in `TORCHELASTIC_ERROR_FILE`, and takes the earliest of its ranks' files for the
//! first cause. A trainer under `@record` overwrites it with its Python traceback.

use crate::ReduceError;
use serde_json::json;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Whether the file that is there is ours.
static WRITTEN: AtomicBool = AtomicBool::new(false);

fn file() -> Option<std::path::PathBuf> {
    std::env::var_os("TORCHELASTIC_ERROR_FILE").filter(|path| !path.is_empty()).map(Into::into)
}

/// Leaves word of what broke a group. Best effort: whatever goes wrong here must not hide the error.
pub(crate) fn report(us: &str, error: &ReduceError) {
    let Some(path) = file() else { return };
    if path.exists() {
        return; // the first cause counts
    }
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    match write(&path, us, error, seconds) {
        Ok(()) => WRITTEN.store(true, Ordering::Relaxed),
        Err(e) => tracing::warn!(path = %path.display(), error = %e, "the error file cannot be written"),
    }
}

/// Takes back what this process has left: it has formed a group again.
pub(crate) fn retract() {
    if WRITTEN.swap(false, Ordering::Relaxed)
        && let Some(path) = file()
    {
        let _ = std::fs::remove_file(path);
    }
}

fn write(path: &Path, us: &str, error: &ReduceError, seconds: u64) -> std::io::Result<()> {
    let kind = match error {
        ReduceError::PeerDied { .. } => "PeerDied",
        ReduceError::Timeout { .. } => "Timeout",
        ReduceError::Mismatch { .. } => "Mismatch",
        ReduceError::Protocol { .. } => "Protocol",
        ReduceError::Aborted { .. } => "Aborted",
        _ => "Error",
    };
    let ranks = match error {
        ReduceError::PeerDied { rank, .. } => vec![*rank],
        ReduceError::Timeout { missing, .. } => missing.clone(),
        _ => Vec::new(),
    };
    let record = json!({
        "message": {
            "message": format!("ffreduce {kind}: {us}: {error}"),
            "extraInfo": { "timestamp": seconds.to_string(), "py_callstack": null, "kind": kind, "ranks": ranks },
        }
    });
    let made = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&made, record.to_string())?;
    std::fs::rename(made, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_is_what_torchelastic_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("error.json");
        let error = ReduceError::Timeout { missing: vec![3], detail: "\"allreduce\" took\nlong".into() };
        write(&path, "rank 1 of 4", &error, 1_764_000_000).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let message = &record["message"];
        assert_eq!(message["message"], "ffreduce Timeout: rank 1 of 4: \"allreduce\" took\nlong");
        assert_eq!(message["extraInfo"]["timestamp"], "1764000000");
        assert_eq!(message["extraInfo"]["ranks"][0], 3);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing half-written stays");
    }
}
