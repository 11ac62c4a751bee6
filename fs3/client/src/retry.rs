//! One operation's retries: how long to wait, when to give up, what to count.

use crate::FsError;
use crate::stats::{Stats, add};
use firefly_types::Backoff;
use std::time::Instant;

pub(crate) struct Retry<'a> {
    what: &'a str,
    stats: &'a Stats,
    start: Instant,
    attempts: u32,
}

impl<'a> Retry<'a> {
    pub(crate) fn new(what: &'a str, stats: &'a Stats) -> Self {
        Self { what, stats, start: Instant::now(), attempts: 0 }
    }

    /// Failed tries so far.
    pub(crate) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Waits for the next try: the policy's delay, or less if `news` (a newer routing table) comes
    /// first. Gives up with the last failure when the policy says so.
    pub(crate) async fn again(
        &mut self,
        failure: FsError,
        news: impl Future<Output = ()>,
    ) -> Result<(), FsError> {
        self.attempts += 1;
        add(&self.stats.retries, 1);
        let elapsed = self.start.elapsed();
        let Some(delay) = Backoff::CLUSTER.delay(self.attempts, elapsed, rand::random()) else {
            self.stats.paused(elapsed);
            return Err(FsError::GaveUp {
                what: self.what.to_owned(),
                attempts: self.attempts,
                elapsed,
                kind: failure.kind(),
                last: failure.to_string(),
            });
        };
        tracing::debug!(error = %failure, attempt = self.attempts, ?delay, "trying again");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = news => {
                // A storm of routing changes must not become a storm of requests.
                tokio::time::sleep(Backoff::CLUSTER.first).await;
            }
        }
        Ok(())
    }

    /// The operation ended: its pause counts if there was one.
    pub(crate) fn done(&self) {
        if self.attempts > 0 {
            self.stats.paused(self.start.elapsed());
        }
    }
}
