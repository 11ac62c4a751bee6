//! Log lines on their way to the scheduler.

use crate::rank::Ranks;
use crate::spool;
use firefly_proto::scheduler as wire;

/// Bytes of one message.
const BATCH_BYTES: usize = 256 << 10;
/// Bytes of one rank that may be sent and not yet acknowledged.
const WINDOW_BYTES: u64 = 1 << 20;

/// The next lines of all ranks, one message each. Call again while it returns some.
pub(crate) fn next(ranks: &mut Ranks) -> Vec<wire::AgentLog> {
    let mut messages = Vec::new();
    for rank in ranks.map.values_mut() {
        let in_flight = rank.log_sent.saturating_sub(rank.log_acked);
        if !rank.log_wanted || in_flight >= WINDOW_BYTES {
            continue;
        }
        let batch = match spool::read(&rank.dir, rank.log_sent, BATCH_BYTES) {
            Ok(batch) => batch,
            Err(e) => {
                tracing::warn!(rank = %rank.key, error = %e, "cannot read the log");
                continue;
            }
        };
        if batch.lines.is_empty() {
            continue;
        }
        let (epoch, index) = (rank.key.epoch, rank.key.rank);
        let chunks = batch.lines.into_iter().map(|line| wire::LogChunk {
            epoch,
            rank: index,
            unix_ms: line.unix_ms,
            line: line.bytes,
            is_stderr: line.stderr,
            is_system: false,
        });
        messages.push(wire::AgentLog {
            job_id: rank.key.job,
            chunks: chunks.collect(),
            offset: batch.end,
            start: batch.start,
        });
        rank.log_sent = batch.end;
    }
    messages
}
