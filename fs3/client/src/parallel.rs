//! Several requests of one operation at once, bounded.

use futures::StreamExt;
use futures::future::BoxFuture;

/// Requests of one operation in flight at once.
const PARALLEL: usize = 16;

/// Runs all of `work`, some at once; results in order of completion.
///
/// Boxed futures and not a generic stream of closures: the compiler cannot prove `Send` for
/// closures over references inside spawned futures.
pub(crate) async fn all<T: Send>(work: Vec<BoxFuture<'_, T>>) -> Vec<T> {
    futures::stream::iter(work).buffer_unordered(PARALLEL).collect().await
}
