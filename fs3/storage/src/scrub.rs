//! The scrub: reads everything that the node's serving targets hold, so that what has rotted is
//! found, and put right from another replica, while there still is one.
//!
//! A manager's order names a pass and a rate. Each target keeps how far it is in a file beside its
//! folder, `t<ID>.scrub`, so that a restart goes on where it was; losing the file costs a pass over
//! the same chunks again. Chunks are visited in order of their ids: those that come or go meanwhile
//! were written, and thereby checked, after the pass began.

use crate::engine::EngineError;
use crate::node::{Node, TargetHost};
use firefly_proto::mgmtd as pb;
use firefly_types::{Backoff, ChunkId, DataId, Generation, TargetId, lock};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Progress is written down after this many chunks: a restart repeats at most these.
const KEEP_EVERY: u64 = 64;
/// For a block that no replica has: longer than a fail-over, since the others may be on their way.
const PATIENCE: Backoff =
    Backoff { first: Duration::from_millis(20), most: Duration::from_secs(1), total: Duration::from_secs(8) };
/// A rate of zero would never end; nobody means it.
const LEAST_RATE: u64 = 4096;

/// What the manager wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Order {
    pub(crate) pass: u64,
    pub(crate) active: bool,
    /// Bytes per second on this node.
    pub(crate) rate: u64,
}

/// How far one target is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Progress {
    pass: u64,
    done: bool,
    /// Everything up to this chunk has been checked.
    after: Option<ChunkId>,
    chunks: u64,
    total: u64,
    bytes: u64,
    repaired: u64,
    bad: u64,
}

impl Progress {
    pub(crate) fn message(&self) -> pb::ScrubProgress {
        pb::ScrubProgress {
            pass: self.pass,
            done: self.done,
            chunks_checked: self.chunks,
            chunks_total: self.total.max(self.chunks),
            bytes_checked: self.bytes,
            blocks_repaired: self.repaired,
            chunks_bad: self.bad,
        }
    }

    /// One line of numbers: pass, done, chunks, total, bytes, repaired, bad, and the last chunk's
    /// data id, generation and index if there is one.
    fn line(&self) -> String {
        let Self { pass, done, chunks, total, bytes, repaired, bad, after } = self;
        let after =
            after.map(|c| format!(" {} {} {}", c.data.0, c.generation.0, c.index)).unwrap_or_default();
        format!("{pass} {} {chunks} {total} {bytes} {repaired} {bad}{after}\n", u8::from(*done))
    }

    fn parse(line: &str) -> Option<Self> {
        let numbers: Vec<u64> =
            line.split_whitespace().map(|n| n.parse().ok()).collect::<Option<Vec<u64>>>()?;
        let (&[pass, done, chunks, total, bytes, repaired, bad], rest) = numbers.split_first_chunk()?;
        let after = match *rest {
            [] => None,
            [data, generation, index] => Some(ChunkId {
                data: DataId(data),
                generation: Generation(generation.try_into().ok()?),
                index: index.try_into().ok()?,
            }),
            _ => return None,
        };
        Some(Self { pass, done: done == 1, after, chunks, total, bytes, repaired, bad })
    }
}

fn file(data_dir: &Path, target: TargetId) -> PathBuf {
    data_dir.join(format!("{target}.scrub"))
}

/// The progress of a target of this pass, or of none yet.
fn load(data_dir: &Path, target: TargetId, pass: u64) -> Progress {
    let found = std::fs::read_to_string(file(data_dir, target)).ok();
    let progress = found.as_deref().and_then(Progress::parse).filter(|p| p.pass == pass);
    progress.unwrap_or(Progress { pass, ..Progress::default() })
}

fn keep(data_dir: &Path, target: TargetId, progress: &Progress) {
    let (path, temporary) = (file(data_dir, target), data_dir.join(format!("{target}.scrub.new")));
    // Not flushed: after a power cut some chunks are checked once more.
    let kept = std::fs::write(&temporary, progress.line()).and_then(|()| std::fs::rename(temporary, path));
    if let Err(error) = kept {
        tracing::warn!(%target, %error, "the progress of the scrub cannot be kept");
    }
}

/// Forgets a target that is gone.
pub(crate) fn forget(data_dir: &Path, target: TargetId) {
    let _ = std::fs::remove_file(file(data_dir, target));
}

/// Carries out orders until stopped.
pub(crate) async fn run(node: Arc<Node>, stop: CancellationToken) {
    let mut orders = node.scrub_orders();
    loop {
        let order = *orders.borrow_and_update();
        if order.active {
            let pass = async {
                while step(&node, order).await {}
                // All that serve now are done; others may come to serve before the pass ends.
                tokio::time::sleep(Duration::from_secs(1)).await;
            };
            tokio::select! {
                () = stop.cancelled() => return,
                changed = orders.changed() => if changed.is_err() { return },
                () = pass => {}
            }
        } else {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = orders.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// Checks the next chunk of some serving target; `false` if there is none.
async fn step(node: &Arc<Node>, order: Order) -> bool {
    for host in node.serving_hosts() {
        let target = host.id();
        let known = lock(&node.scrubs).get(&target).copied().filter(|p| p.pass == order.pass);
        let mut progress = known.unwrap_or_else(|| load(node.data_dir(), target, order.pass));
        if progress.done {
            lock(&node.scrubs).insert(target, progress);
            continue;
        }
        let (next, total) = host.chunk_after(progress.after);
        progress.total = total;
        let mut bytes = 0;
        match next {
            None => {
                progress.done = true;
                tracing::info!(
                    %target,
                    pass = order.pass,
                    chunks = progress.chunks,
                    repaired = progress.repaired,
                    bad = progress.bad,
                    "scrubbed"
                );
            }
            Some(chunk) => {
                bytes = check(&host, chunk, &mut progress).await;
                progress.after = Some(chunk);
                progress.chunks += 1;
                progress.bytes += bytes;
            }
        }
        if progress.done || progress.chunks.is_multiple_of(KEEP_EVERY) {
            let (node, kept) = (Arc::clone(node), progress);
            let _ = tokio::task::spawn_blocking(move || keep(node.data_dir(), target, &kept)).await;
        }
        lock(&node.scrubs).insert(target, progress);
        tokio::time::sleep(Duration::from_secs_f64(bytes as f64 / order.rate.max(LEAST_RATE) as f64)).await;
        return true;
    }
    false
}

/// Reads one chunk. What cannot be repaired is tried again before it counts: under writes the other
/// replicas may be at another version than the one that is read here, and a later write may have
/// replaced the block anyway.
async fn check(host: &Arc<TargetHost>, chunk: ChunkId, progress: &mut Progress) -> u64 {
    let (started, mut attempt) = (Instant::now(), 0);
    loop {
        match host.check_chunk(chunk).await {
            Ok((bytes, repaired)) => {
                progress.repaired += repaired;
                return bytes;
            }
            Err(EngineError::Corrupt { chunk, index, block }) => {
                attempt += 1;
                match PATIENCE.delay(attempt, started.elapsed(), 1.0) {
                    Some(delay) => tokio::time::sleep(delay).await,
                    None => {
                        tracing::error!(target_id = %host.id(), %chunk, index, block, "no replica can repair this block");
                        progress.bad += 1;
                        return 0;
                    }
                }
            }
            // The target is on its way out, which is reported elsewhere.
            Err(_) => return 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_survives_a_restart_of_its_pass_and_of_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let chunk = ChunkId { data: DataId(7), generation: Generation(2), index: 3 };
        let progress = Progress {
            pass: 4,
            done: false,
            after: Some(chunk),
            chunks: 5,
            total: 9,
            bytes: 6,
            repaired: 1,
            bad: 0,
        };
        let target = TargetId(12);
        assert_eq!(load(dir.path(), target, 4).chunks, 0);
        keep(dir.path(), target, &progress);
        assert_eq!(progress.line(), "4 0 5 9 6 1 0 7 2 3\n");
        assert_eq!(load(dir.path(), target, 4), progress);
        assert_eq!(load(dir.path(), target, 5), Progress { pass: 5, ..Progress::default() });
        for damaged in ["", "4", "4 0 5 9 6 1 0 7", "x 0 5 9 6 1 0", "4 0 5 9 6 1 0 7 99999999999 3"] {
            assert_eq!(Progress::parse(damaged), None, "{damaged:?}");
        }
        forget(dir.path(), target);
        assert_eq!(load(dir.path(), target, 4).chunks, 0);
    }
}
