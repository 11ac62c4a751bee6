//! The canonical tree over blocks that stay in the first-level cache: each input is read once,
//! the output written once, for any number of inputs.

use super::elem::{Acc, Element};
use crate::dtype::ReduceOp;
use std::mem::MaybeUninit;

/// Bytes of one block of partial results. With [`LEVELS`] of them the scratch fits 32 KiB.
const BLOCK_BYTES: usize = 2048;
/// Partial results alive at once: one per bit of the largest group size (4096), and one in hand.
const LEVELS: usize = 14;

/// # Safety
/// As [`super::reduce_stage`]; `T` is the type of `from`, `O` of `to`.
pub(super) unsafe fn run<T: Element, O: Element<Acc = T::Acc>>(
    op: ReduceOp,
    dst: *mut O,
    srcs: &[*const u8],
    factors: Option<&[f64]>,
    divide: Option<u32>,
    count: usize,
) {
    macro_rules! with {
        ($combine:expr) => {
            // SAFETY: the caller's promises are the callee's.
            unsafe { tree::<T, O>(dst, srcs, factors, divide, count, $combine) }
        };
    }
    match op {
        ReduceOp::Sum | ReduceOp::Avg | ReduceOp::PremulSum(_) => with!(|a, b| a.add(b)),
        ReduceOp::Product => with!(|a, b| a.mul(b)),
        ReduceOp::Min => with!(|a, b| a.lesser(b)),
        ReduceOp::Max => with!(|a, b| a.greater(b)),
        ReduceOp::BitAnd => with!(|a, b| a.and(b)),
        ReduceOp::BitOr => with!(|a, b| a.or(b)),
        ReduceOp::BitXor => with!(|a, b| a.xor(b)),
    }
}

/// # Safety
/// As [`super::reduce`].
#[inline(always)]
unsafe fn tree<T: Element, O: Element<Acc = T::Acc>>(
    dst: *mut O,
    srcs: &[*const u8],
    factors: Option<&[f64]>,
    divide: Option<u32>,
    count: usize,
    combine: impl Fn(T::Acc, T::Acc) -> T::Acc + Copy,
) {
    let block = BLOCK_BYTES / size_of::<T::Acc>();
    assert!(srcs.len() < 1 << (LEVELS - 1), "more ranks than a group may have");
    // A local scratch aliases nothing, so the loops vectorise although dst may be a source. Left
    // uninitialised: clearing it would cost more than a small reduction.
    let mut scratch = MaybeUninit::<[u128; LEVELS * BLOCK_BYTES / 16]>::uninit();
    let scratch = scratch.as_mut_ptr().cast::<T::Acc>();
    let mut start = 0;
    while start < count {
        let len = block.min(count - start);
        let mut depth = 0;
        let mut i = 0;
        while i < srcs.len() {
            // SAFETY: depth < LEVELS, because fewer than 2^(LEVELS-1) inputs leave at most LEVELS - 1
            // partial results; the scratch holds LEVELS blocks, and u128 is aligned for every Acc.
            let level = unsafe { scratch.add(depth * block) };
            // SAFETY: start + len <= count, and source i has count elements.
            let first = unsafe { srcs[i].cast::<T>().add(start) };
            let pair = (i + 1 < srcs.len()).then(|| {
                // SAFETY: as above for source i + 1.
                unsafe { srcs[i + 1].cast::<T>().add(start) }
            });
            match (pair, factors) {
                (Some(second), None) => {
                    for k in 0..len {
                        // SAFETY: k < len.
                        let (a, b) = unsafe { (first.add(k).read(), second.add(k).read()) };
                        // SAFETY: k < len <= block.
                        unsafe { level.add(k).write(combine(a.widen(), b.widen())) };
                    }
                }
                (Some(second), Some(factors)) => {
                    for k in 0..len {
                        // SAFETY: k < len.
                        let (a, b) = unsafe { (first.add(k).read(), second.add(k).read()) };
                        let value = combine(a.widen().scale(factors[i]), b.widen().scale(factors[i + 1]));
                        // SAFETY: k < len <= block.
                        unsafe { level.add(k).write(value) };
                    }
                }
                (None, None) => {
                    for k in 0..len {
                        // SAFETY: k < len <= block.
                        unsafe { level.add(k).write(first.add(k).read().widen()) };
                    }
                }
                (None, Some(factors)) => {
                    for k in 0..len {
                        // SAFETY: k < len <= block.
                        unsafe { level.add(k).write(first.add(k).read().widen().scale(factors[i])) };
                    }
                }
            }
            depth += 1;
            if pair.is_some() {
                // Like carries of a binary counter: equal subtrees merge as soon as both exist.
                let mut pairs = i / 2;
                while pairs & 1 == 1 {
                    // SAFETY: the two topmost levels are written up to len.
                    unsafe { fold(scratch, &mut depth, block, len, combine) };
                    pairs >>= 1;
                }
            }
            i += 2;
        }
        while depth > 1 {
            // SAFETY: the two topmost levels are written up to len.
            unsafe { fold(scratch, &mut depth, block, len, combine) };
        }
        // SAFETY: start + len <= count, and dst has count elements; all reads of this block are done.
        let out = unsafe { dst.add(start) };
        match divide {
            None => {
                for k in 0..len {
                    // SAFETY: k < len, and level 0 is written up to len.
                    unsafe { out.add(k).write(O::narrow(scratch.add(k).read())) };
                }
            }
            Some(by) => {
                for k in 0..len {
                    // SAFETY: k < len, and level 0 is written up to len.
                    unsafe { out.add(k).write(O::narrow(scratch.add(k).read().divide(by))) };
                }
            }
        }
        start += len;
    }
}

/// Combines the two topmost partial results into one.
///
/// # Safety
/// `depth >= 2`, and the levels `depth - 1` and `depth - 2` hold `len` written values.
#[inline(always)]
unsafe fn fold<A: Acc>(
    scratch: *mut A,
    depth: &mut usize,
    block: usize,
    len: usize,
    combine: impl Fn(A, A) -> A,
) {
    // SAFETY: both levels lie inside the scratch and do not overlap, since len <= block.
    let (left, right) = unsafe {
        (
            std::slice::from_raw_parts_mut(scratch.add((*depth - 2) * block), len),
            std::slice::from_raw_parts(scratch.add((*depth - 1) * block), len),
        )
    };
    for (a, &b) in left.iter_mut().zip(right) {
        *a = combine(*a, b);
    }
    *depth -= 1;
}
