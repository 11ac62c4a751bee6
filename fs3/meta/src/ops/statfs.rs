//! Totals of the file system: the sum of what each lane has added.

use crate::error::MetaError;
use crate::op::Op;
use crate::schema::{Usage, keys};
use firefly_proto::meta::StatFsReply;

/// The totals.
pub(crate) fn statfs(op: &mut Op<'_>) -> Result<StatFsReply, MetaError> {
    let (from, to) = keys::usages();
    let mut total = Usage::default();
    for (_, value) in op.all(from, to)? {
        total = total.plus(Usage::decode(&value)?);
    }
    let positive = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok(StatFsReply { inodes: positive(total.inodes), logical_bytes: positive(total.bytes) })
}
