//! Sums of f32, bf16 and f16 with 256- and 512-bit vectors. Same tree, same rounding, same bits
//! as the portable loops; the tests compare them. Each vector of the output is made from one
//! vector of each input, all in registers, for up to [`MOST`] inputs.

use super::Tier;
use super::elem::{Bf16, F16};
use super::tree;
use crate::dtype::{DType, ReduceOp};
use std::arch::x86_64::*;

/// More inputs than this do not fit the registers; the portable loops take over.
const MOST: usize = 8;

/// Returns false when there is no vector path for this type, tier or number of inputs.
///
/// # Safety
/// As [`super::reduce`]; the machine has `tier`.
pub(super) unsafe fn sum(
    tier: Tier,
    dtype: DType,
    dst: *mut u8,
    srcs: &[*const u8],
    divide: Option<u32>,
    count: usize,
) -> bool {
    if !(2..=MOST).contains(&srcs.len()) {
        return false;
    }
    // SAFETY: the caller's promises are the callees'; the machine has the tier's features.
    unsafe {
        match (tier, dtype) {
            (Tier::Avx512, DType::F32) => avx512::<f32>(dst.cast(), srcs, divide, count),
            (Tier::Avx512, DType::BF16) => avx512::<Bf16>(dst.cast(), srcs, divide, count),
            (Tier::Avx512, DType::F16) => avx512::<F16>(dst.cast(), srcs, divide, count),
            (Tier::Avx2, DType::F32) => avx2::<f32>(dst.cast(), srcs, divide, count),
            (Tier::Avx2, DType::BF16) => avx2::<Bf16>(dst.cast(), srcs, divide, count),
            (Tier::Avx2, DType::F16) => avx2::<F16>(dst.cast(), srcs, divide, count),
            _ => return false,
        }
    }
    true
}

/// An element type as vectors of f32.
///
/// # Safety
/// All methods need the features of their width; pointers have a whole vector of elements.
trait Wide: super::elem::Element {
    unsafe fn load512(from: *const Self) -> __m512;
    unsafe fn store512(to: *mut Self, value: __m512);
    unsafe fn load256(from: *const Self) -> __m256;
    unsafe fn store256(to: *mut Self, value: __m256);
}

impl Wide for f32 {
    #[inline(always)]
    unsafe fn load512(from: *const Self) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store512(to: *mut Self, value: __m512) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn load256(from: *const Self) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store256(to: *mut Self, value: __m256) {
        // SAFETY: the trait's contract.
        unsafe { _mm256_storeu_ps(to, value) }
    }
}

impl Wide for Bf16 {
    #[inline(always)]
    unsafe fn load512(from: *const Self) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe {
            let half = _mm256_loadu_si256(from.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        }
    }
    #[inline(always)]
    unsafe fn store512(to: *mut Self, value: __m512) {
        // SAFETY: the trait's contract. NaNs are canonical already and end in zeros, so rounding
        // leaves them alone.
        unsafe {
            let bits = _mm512_castps_si512(value);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, bias));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(rounded));
        }
    }
    #[inline(always)]
    unsafe fn load256(from: *const Self) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe {
            let half = _mm_loadu_si128(from.cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
        }
    }
    #[inline(always)]
    unsafe fn store256(to: *mut Self, value: __m256) {
        // SAFETY: as for 512 bits.
        unsafe {
            let bits = _mm256_castps_si256(value);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bias));
            // Packs within each half; the permutation brings both results together.
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(rounded, rounded));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        }
    }
}

impl Wide for F16 {
    #[inline(always)]
    unsafe fn load512(from: *const Self) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store512(to: *mut Self, value: __m512) {
        // SAFETY: the trait's contract.
        unsafe {
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(value);
            _mm256_storeu_si256(to.cast(), half);
        }
    }
    #[inline(always)]
    unsafe fn load256(from: *const Self) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store256(to: *mut Self, value: __m256) {
        // SAFETY: the trait's contract.
        unsafe { _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)) }
    }
}

/// Evaluates the canonical tree over an array: neighbours at distance 1, then 2, then 4. What has
/// no partner moves up unchanged, which is exactly how the tree treats a short right side.
macro_rules! fold_tree {
    ($values:ident, $n:ident, $add:ident) => {
        let mut step = 1;
        while step < $n {
            let mut i = 0;
            while i + step < $n {
                $values[i] = $add($values[i], $values[i + step]);
                i += 2 * step;
            }
            step *= 2;
        }
    };
}

macro_rules! by_count {
    ($f:ident::<$t:ident>($($arg:expr),*); $srcs:expr) => {
        match $srcs.len() {
            2 => $f::<$t, 2>($($arg),*),
            3 => $f::<$t, 3>($($arg),*),
            4 => $f::<$t, 4>($($arg),*),
            5 => $f::<$t, 5>($($arg),*),
            6 => $f::<$t, 6>($($arg),*),
            7 => $f::<$t, 7>($($arg),*),
            _ => $f::<$t, 8>($($arg),*),
        }
    };
}

/// # Safety
/// As [`sum`], with AVX-512.
unsafe fn avx512<T: Wide>(dst: *mut T, srcs: &[*const u8], divide: Option<u32>, count: usize) {
    // SAFETY: the caller's promises are the callee's; the count selects the array's length.
    unsafe { by_count!(avx512_n::<T>(dst, srcs, divide, count); srcs) }
}

/// # Safety
/// As [`sum`], with AVX-512 and N sources.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn avx512_n<T: Wide, const N: usize>(
    dst: *mut T,
    srcs: &[*const u8],
    divide: Option<u32>,
    count: usize,
) {
    const LANES: usize = 16;
    let sources: [*const T; N] = std::array::from_fn(|i| srcs[i].cast());
    let nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc0_0000));
    let by = _mm512_set1_ps(divide.unwrap_or(1) as f32);
    let whole = count / LANES * LANES;
    let mut at = 0;
    while at < whole {
        // SAFETY: at + LANES <= count, the length of every source and of dst.
        let mut values: [__m512; N] = std::array::from_fn(|i| unsafe { T::load512(sources[i].add(at)) });
        fold_tree!(values, N, _mm512_add_ps);
        let mut value = values[0];
        if divide.is_some() {
            value = _mm512_div_ps(value, by);
        }
        let unordered = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
        // SAFETY: as above.
        unsafe { T::store512(dst.add(at), _mm512_mask_mov_ps(value, unordered, nan)) };
        at += LANES;
    }
    // SAFETY: the rest of the same memory.
    unsafe { rest(dst, srcs, divide, at, count) };
}

/// # Safety
/// As [`sum`], with AVX2 and F16C.
unsafe fn avx2<T: Wide>(dst: *mut T, srcs: &[*const u8], divide: Option<u32>, count: usize) {
    // SAFETY: the caller's promises are the callee's; the count selects the array's length.
    unsafe { by_count!(avx2_n::<T>(dst, srcs, divide, count); srcs) }
}

/// # Safety
/// As [`sum`], with AVX2, F16C and N sources.
#[target_feature(enable = "avx2,f16c")]
unsafe fn avx2_n<T: Wide, const N: usize>(
    dst: *mut T,
    srcs: &[*const u8],
    divide: Option<u32>,
    count: usize,
) {
    const LANES: usize = 8;
    let sources: [*const T; N] = std::array::from_fn(|i| srcs[i].cast());
    let nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc0_0000));
    let by = _mm256_set1_ps(divide.unwrap_or(1) as f32);
    let whole = count / LANES * LANES;
    let mut at = 0;
    while at < whole {
        // SAFETY: at + LANES <= count, the length of every source and of dst.
        let mut values: [__m256; N] = std::array::from_fn(|i| unsafe { T::load256(sources[i].add(at)) });
        fold_tree!(values, N, _mm256_add_ps);
        let mut value = values[0];
        if divide.is_some() {
            value = _mm256_div_ps(value, by);
        }
        let unordered = _mm256_cmp_ps::<_CMP_UNORD_Q>(value, value);
        // SAFETY: as above.
        unsafe { T::store256(dst.add(at), _mm256_blendv_ps(value, nan, unordered)) };
        at += LANES;
    }
    // SAFETY: the rest of the same memory.
    unsafe { rest(dst, srcs, divide, at, count) };
}

/// The elements from `at` on, fewer than a vector.
///
/// # Safety
/// As [`sum`]; at <= count.
unsafe fn rest<T: Wide>(dst: *mut T, srcs: &[*const u8], divide: Option<u32>, at: usize, count: usize) {
    if at == count {
        return;
    }
    let left: [*const u8; MOST] = std::array::from_fn(|i| match srcs.get(i) {
        // SAFETY: at <= count, inside every buffer.
        Some(src) => unsafe { src.cast::<T>().add(at).cast() },
        None => std::ptr::null(),
    });
    // SAFETY: as above; the slice holds as many sources as there are.
    unsafe { tree::run::<T, T>(ReduceOp::Sum, dst.add(at), &left[..srcs.len()], None, divide, count - at) };
}
