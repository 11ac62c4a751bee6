//! The order of waiting jobs: small rules, each of which gives a job a number. Lower goes first.

use crate::job::Job;
use firefly_types::Nanos;
use serde::{Deserialize, Serialize};

/// Most rules of one order.
pub(crate) const MOST_PIECES: usize = 8;

/// A job's numbers by the rules of an order.
pub(crate) type Key = [i64; MOST_PIECES];

/// One rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OrderBy {
    /// Jobs that have waited beyond the bound, the longest first.
    Overdue,
    /// Higher priority.
    Priority,
    /// Jobs that a fault of a node has ended.
    Recovering,
    /// The team, and in it the user, that has used least of its share lately.
    FairShare,
    /// The user's own order.
    UserRank,
    /// Earlier submission.
    Age,
    /// Fewer nodes, then fewer ranks.
    Smallest,
    /// Less service (node-time) so far, in classes that double: least attained service.
    Attained,
    /// Less expected time left, as the submission claims (an oracle in simulations).
    Shortest,
}

impl OrderBy {
    /// The job's number; `None` for the rule that belongs to users, not jobs.
    pub(crate) fn of(self, job: &Job) -> Option<i64> {
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Some(match self {
            OrderBy::FairShare => return None,
            OrderBy::Overdue => job.overdue_since.map_or(i64::MAX, |Nanos(n)| signed(n)),
            OrderBy::Priority => -i64::from(job.priority),
            OrderBy::Recovering => i64::from(!job.recovering),
            OrderBy::UserRank => i64::from(job.spec.user_rank),
            OrderBy::Age => signed(job.id.0),
            OrderBy::Smallest => (i64::from(job.spec.nodes) << 16) + i64::from(job.spec.ranks_per_node),
            OrderBy::Attained => i64::from(
                u64::BITS - (job.ran_ms.saturating_mul(job.spec.nodes.into()) >> 20).leading_zeros(),
            ),
            OrderBy::Shortest => signed(job.spec.hint_ms.saturating_sub(job.ran_ms)),
        })
    }
}

/// The numbers before and after the users' rule. Without that rule everything comes before it.
pub(crate) fn keys(order: &[OrderBy], job: &Job) -> (Key, Key) {
    let (mut head, mut tail) = ([0; MOST_PIECES], [0; MOST_PIECES]);
    let fair = order.iter().position(|piece| *piece == OrderBy::FairShare);
    for (i, piece) in order.iter().take(MOST_PIECES).enumerate() {
        let Some(number) = piece.of(job) else { continue };
        match fair {
            Some(f) if i < f => head[i] = number,
            _ => tail[i] = number,
        }
    }
    (head, tail)
}

/// Whether users take turns by fair share at all.
pub(crate) fn by_user(order: &[OrderBy]) -> bool {
    order.contains(&OrderBy::FairShare)
}
