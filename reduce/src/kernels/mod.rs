//! Reduction of N inputs in one pass over memory, along the canonical tree.
//!
//! **The canonical tree.** The inputs are those of ranks 0..N in order. A range of ranks of
//! length n > 1 is combined as `tree(first m) op tree(rest)`, m the largest power of two below n:
//!
//! ```text
//! N = 2: 0+1      N = 3: (0+1)+2      N = 4: (0+1)+(2+3)      N = 7: ((0+1)+(2+3))+((4+5)+6)
//! ```
//!
//! It depends on the group's size alone: not on the message's size, on how it is cut into pieces,
//! on where ranks run or on what carries the bytes. Every algorithm of this crate evaluates
//! exactly this tree, so one result has one bit pattern. Low-precision elements are widened to
//! f32 at the leaves and rounded once at the root.
//!
//! Kernels run with the default floating point environment whatever the calling thread has set
//! (flush-to-zero would otherwise make the bits depend on which thread drove the progress).

mod elem;
mod tree;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::dtype::{DType, ReduceOp};
use elem::{Bf16, Complex32, Complex64, F8E4M3, F8E5M2, F16, Flag};

/// Which implementation runs; all give the same bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Tier {
    /// Plain loops.
    Portable,
    /// 256-bit vectors.
    Avx2,
    /// 512-bit vectors.
    Avx512,
}

impl Tier {
    /// The best tier of this machine.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
            {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

/// One evaluation of a part of the canonical tree: the whole of it, or a subtree whose result others
/// go on with in the partial type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Stage {
    pub(crate) from: DType,
    pub(crate) to: DType,
    pub(crate) op: ReduceOp,
    /// Divide at the end: of an average, by the number of all ranks.
    pub(crate) divide: Option<u32>,
}

/// The type of partial results: low-precision elements are rounded once, at the root.
pub(crate) fn partial(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 | DType::F8E4M3FN | DType::F8E5M2 => DType::F32,
        other => other,
    }
}

impl Stage {
    /// The whole tree over `ranks`.
    pub(crate) fn whole(dtype: DType, op: ReduceOp, ranks: usize) -> Self {
        Self { from: dtype, to: dtype, op, divide: (op == ReduceOp::Avg).then_some(ranks as u32) }
    }

    /// A subtree with ranks' inputs as leaves.
    pub(crate) fn leaves(dtype: DType, op: ReduceOp) -> Self {
        let op = if op == ReduceOp::Avg { ReduceOp::Sum } else { op };
        Self { from: dtype, to: partial(dtype), op, divide: None }
    }

    /// Partial results to a partial result.
    pub(crate) fn inner(dtype: DType, op: ReduceOp) -> Self {
        let op = if matches!(op, ReduceOp::Avg | ReduceOp::PremulSum(_)) { ReduceOp::Sum } else { op };
        Self { from: partial(dtype), to: partial(dtype), op, divide: None }
    }

    /// Partial results to the result, over `ranks` in all.
    pub(crate) fn root(dtype: DType, op: ReduceOp, ranks: usize) -> Self {
        Self { to: dtype, divide: (op == ReduceOp::Avg).then_some(ranks as u32), ..Self::inner(dtype, op) }
    }
}

/// Reduces `srcs` (one per rank, in rank order) into `dst` along the canonical tree.
///
/// `factors` holds one factor per rank for [`ReduceOp::PremulSum`] and is not read otherwise.
///
/// # Safety
/// `dst` and every source point to `count` elements of `dtype`, aligned for it; sources are
/// readable and `dst` writable for the whole call. `dst` may be one of the sources; any other
/// overlap of `dst` with a source is forbidden. The combination has passed [`ReduceOp::check`].
pub unsafe fn reduce(
    tier: Tier,
    dtype: DType,
    op: ReduceOp,
    dst: *mut u8,
    srcs: &[*const u8],
    factors: &[f64],
    count: usize,
) {
    // SAFETY: the caller's promises are the callee's.
    unsafe { reduce_stage(tier, Stage::whole(dtype, op, srcs.len()), dst, srcs, factors, count) }
}

/// As [`reduce`], for a part of the tree.
///
/// # Safety
/// As [`reduce`], where sources hold elements of `stage.from` and `dst` of `stage.to`; `dst` may be a
/// source only if the two are equal.
pub(crate) unsafe fn reduce_stage(
    tier: Tier,
    stage: Stage,
    dst: *mut u8,
    srcs: &[*const u8],
    factors: &[f64],
    count: usize,
) {
    let Stage { from, to, op, divide } = stage;
    debug_assert!(!srcs.is_empty());
    let _environment = DefaultFloatEnvironment::enter();
    let factors = match op {
        ReduceOp::PremulSum(_) => {
            assert_eq!(factors.len(), srcs.len(), "one factor per rank");
            Some(factors)
        }
        _ => None,
    };
    #[cfg(target_arch = "x86_64")]
    if from == to && factors.is_none() && matches!(op, ReduceOp::Sum | ReduceOp::Avg) {
        // SAFETY: the caller's promises are the callee's; `tier` is what the machine has.
        if unsafe { x86::sum(tier.min(Tier::best()), from, dst, srcs, divide, count) } {
            return;
        }
    }
    let _ = tier;
    macro_rules! run {
        ($($dtype:ident => $element:ty),* ; $($low:ident => $low_element:ty),* $(,)?) => {
            match (from, to) {
                $((DType::$dtype, DType::$dtype) => {
                    // SAFETY: the caller's promises are the callee's.
                    unsafe { tree::run::<$element, $element>(op, dst.cast(), srcs, factors, divide, count) }
                })*
                $((DType::$low, DType::$low) => {
                    // SAFETY: as above.
                    unsafe { tree::run::<$low_element, $low_element>(op, dst.cast(), srcs, factors, divide, count) }
                }
                (DType::$low, DType::F32) => {
                    // SAFETY: as above.
                    unsafe { tree::run::<$low_element, f32>(op, dst.cast(), srcs, factors, divide, count) }
                }
                (DType::F32, DType::$low) => {
                    // SAFETY: as above.
                    unsafe { tree::run::<f32, $low_element>(op, dst.cast(), srcs, factors, divide, count) }
                })*
                _ => unreachable!("{from} is no partial type of {to}, nor the other way round"),
            }
        };
    }
    run! {
        U8 => u8, I8 => i8, I16 => i16, I32 => i32, I64 => i64, U16 => u16, U32 => u32, U64 => u64,
        Bool => Flag, F32 => f32, F64 => f64, Complex64 => Complex32, Complex128 => Complex64;
        F16 => F16, BF16 => Bf16, F8E4M3FN => F8E4M3, F8E5M2 => F8E5M2,
    }
}

/// Saves the thread's SSE control word, sets the default, and restores on drop.
struct DefaultFloatEnvironment {
    #[cfg(target_arch = "x86_64")]
    saved: u32,
}

impl DefaultFloatEnvironment {
    #[cfg(target_arch = "x86_64")]
    fn enter() -> Self {
        const DEFAULT: u32 = 0x1f80;
        let mut saved = 0u32;
        // SAFETY: stmxcsr writes four bytes to the given address and nothing else.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut saved, options(nostack, preserves_flags)) };
        Self::load(DEFAULT);
        Self { saved }
    }

    #[cfg(target_arch = "x86_64")]
    fn load(word: u32) {
        // SAFETY: both values loaded here are valid control words: the default one, and one that
        // the processor had stored.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &word, options(nostack, preserves_flags)) };
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn enter() -> Self {
        Self {}
    }
}

impl Drop for DefaultFloatEnvironment {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        Self::load(self.saved);
    }
}

#[cfg(test)]
mod tests;
