//! The kernels against models that share no code with them: the tree by recursion with one
//! rounding, and the exact sum in f64 with an error bound.

use super::*;
use proptest::prelude::*;

/// The canonical tree by its definition.
fn tree_model(values: &[f32]) -> f32 {
    match values {
        [one] => *one,
        _ => {
            let mut left = 1;
            while left * 2 < values.len() {
                left *= 2;
            }
            tree_model(&values[..left]) + tree_model(&values[left..])
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    F32,
    Bf16,
    F16,
    E4m3,
    E5m2,
}

const KINDS: [(Kind, DType); 5] = [
    (Kind::F32, DType::F32),
    (Kind::Bf16, DType::BF16),
    (Kind::F16, DType::F16),
    (Kind::E4m3, DType::F8E4M3FN),
    (Kind::E5m2, DType::F8E5M2),
];

impl Kind {
    fn widen(self, code: u32) -> f32 {
        use elem::Element;
        match self {
            Kind::F32 => f32::from_bits(code),
            Kind::Bf16 => half::bf16::from_bits(code as u16).to_f32(),
            Kind::F16 => half::f16::from_bits(code as u16).to_f32(),
            // Checked code by code against their definition in `elem`.
            Kind::E4m3 => elem::F8E4M3(code as u8).widen(),
            Kind::E5m2 => elem::F8E5M2(code as u8).widen(),
        }
    }

    fn narrow(self, value: f32) -> u32 {
        use elem::Element;
        match self {
            Kind::F32 if value.is_nan() => 0x7fc0_0000,
            Kind::F32 => value.to_bits(),
            Kind::Bf16 if value.is_nan() => 0x7fc0,
            Kind::Bf16 => u32::from(half::bf16::from_f32(value).to_bits()),
            Kind::F16 if value.is_nan() => 0x7e00,
            Kind::F16 => u32::from(half::f16::from_f32(value).to_bits()),
            Kind::E4m3 => u32::from(elem::F8E4M3::narrow(value).0),
            Kind::E5m2 => u32::from(elem::F8E5M2::narrow(value).0),
        }
    }

    fn put(self, code: u32, out: &mut Vec<u8>) {
        let width = match self {
            Kind::F32 => 4,
            Kind::Bf16 | Kind::F16 => 2,
            Kind::E4m3 | Kind::E5m2 => 1,
        };
        out.extend_from_slice(&code.to_le_bytes()[..width]);
    }
}

/// Bytes at an address that is aligned for every type, plus `shift` elements.
struct Aligned {
    words: Vec<u128>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(bytes: &[u8], start: usize) -> Self {
        let mut made =
            Self { words: vec![0; (start + bytes.len()).div_ceil(16) + 1], start, len: bytes.len() };
        // SAFETY: the vector holds start + len bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), made.ptr(), bytes.len()) };
        made
    }

    fn ptr(&mut self) -> *mut u8 {
        // SAFETY: start lies inside.
        unsafe { self.words.as_mut_ptr().cast::<u8>().add(self.start) }
    }

    fn bytes(&mut self) -> Vec<u8> {
        // SAFETY: len bytes from start lie inside.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len) }.to_vec()
    }
}

fn tiers() -> Vec<Tier> {
    [Tier::Portable, Tier::Avx2, Tier::Avx512].into_iter().filter(|&t| t <= Tier::best()).collect()
}

/// Runs the kernel out of place and in place at every position; all must agree.
fn run(tier: Tier, dtype: DType, op: ReduceOp, inputs: &[Vec<u8>], factors: &[f64], shift: usize) -> Vec<u8> {
    let count = inputs[0].len() / dtype.size();
    let start = shift * dtype.size();
    let mut buffers: Vec<Aligned> = inputs.iter().map(|i| Aligned::new(i, start)).collect();
    let srcs: Vec<*const u8> = buffers.iter_mut().map(|b| b.ptr().cast_const()).collect();
    let mut out = Aligned::new(&vec![0xee; inputs[0].len()], start);
    // SAFETY: the buffers hold `count` elements each and do not overlap.
    unsafe { reduce(tier, dtype, op, out.ptr(), &srcs, factors, count) };
    let result = out.bytes();
    for place in [0, inputs.len() - 1] {
        let mut buffers: Vec<Aligned> = inputs.iter().map(|i| Aligned::new(i, start)).collect();
        let dst = buffers[place].ptr();
        let srcs: Vec<*const u8> = buffers.iter_mut().map(|b| b.ptr().cast_const()).collect();
        // SAFETY: as above, with the output exactly one of the inputs.
        unsafe { reduce(tier, dtype, op, dst, &srcs, factors, count) };
        assert_eq!(buffers[place].bytes(), result, "in place at {place}");
    }
    result
}

/// Bit patterns that find mistakes: everything, and many specials.
fn code() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => any::<u32>(),
        // Moderate f32 values, whose sums neither overflow nor vanish.
        4 => (-1000.0f32..1000.0).prop_map(f32::to_bits),
        1 => prop::sample::select(vec![
            0, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0001, 0xffff_ffff, 1, 0x007f_ffff, 0x7f7f_ffff,
            0x8000, 0x7c00, 0x7c01, 0x3c00, 0x0001, 0x7bff, 0x7f, 0xff, 0x7e, 0x80,
        ]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn low_precision_sums_follow_the_tree_and_round_once(
        ranks in 1usize..=19,
        count in 0usize..80,
        shift in 0usize..5,
        average in any::<bool>(),
        seed in prop::collection::vec(code(), 80),
    ) {
        for (kind, dtype) in KINDS {
            let at = |rank: usize, i: usize| seed[(i * 7 + rank * 13) % seed.len()].rotate_left(rank as u32 % 3 * 8);
            let mask = if dtype.size() == 4 { u32::MAX } else { (1 << (8 * dtype.size())) - 1 };
            let inputs: Vec<Vec<u8>> = (0..ranks)
                .map(|rank| {
                    let mut bytes = Vec::new();
                    (0..count).for_each(|i| kind.put(at(rank, i) & mask, &mut bytes));
                    bytes
                })
                .collect();
            let mut wanted = Vec::new();
            for i in 0..count {
                let values: Vec<f32> = (0..ranks).map(|rank| kind.widen(at(rank, i) & mask)).collect();
                let mut sum = tree_model(&values);
                if average {
                    sum /= ranks as f32;
                }
                kind.put(kind.narrow(sum), &mut wanted);
            }
            let op = if average { ReduceOp::Avg } else { ReduceOp::Sum };
            for tier in tiers() {
                let got = run(tier, dtype, op, &inputs, &[], shift);
                prop_assert_eq!(&got, &wanted, "{} {:?} {} ranks", dtype, tier, ranks);
            }
        }
    }

    #[test]
    fn sums_are_near_the_exact_value(
        ranks in 2usize..=16,
        values in prop::collection::vec(-1e6f32..1e6, 16 * 40),
    ) {
        let count = values.len() / 16;
        let inputs: Vec<Vec<u8>> = (0..ranks)
            .map(|r| values[r * count..][..count].iter().flat_map(|v| v.to_le_bytes()).collect())
            .collect();
        let got = run(Tier::best(), DType::F32, ReduceOp::Sum, &inputs, &[], 0);
        for i in 0..count {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&got[i * 4..][..4]);
            let got = f64::from(f32::from_le_bytes(bytes));
            let terms = (0..ranks).map(|r| f64::from(values[r * count + i]));
            let exact: f64 = terms.clone().sum();
            let magnitude: f64 = terms.map(f64::abs).sum();
            // A tree of depth d rounds each path d times, by half a unit in the last place each.
            let depth = f64::from(usize::BITS - (ranks - 1).leading_zeros());
            prop_assert!((got - exact).abs() <= depth * f64::from(f32::EPSILON) / 2.0 * magnitude * 1.0001);
        }
    }

    #[test]
    fn integers_wrap_and_average_toward_zero(
        ranks in 1usize..=9,
        values in prop::collection::vec(any::<i64>(), 9 * 20),
    ) {
        let count = 20;
        macro_rules! check {
            ($($t:ty => $dtype:ident),*) => {$({
                let at = |r: usize, i: usize| values[r * count + i] as $t;
                let inputs: Vec<Vec<u8>> = (0..ranks)
                    .map(|r| (0..count).flat_map(|i| at(r, i).to_le_bytes()).collect())
                    .collect();
                let factors: Vec<f64> = (0..ranks).map(|r| r as f64 + 1.0).collect();
                let fold = |f: fn($t, $t) -> $t| -> Vec<u8> {
                    (0..count)
                        .flat_map(|i| (0..ranks).map(|r| at(r, i)).reduce(f).unwrap().to_le_bytes())
                        .collect()
                };
                let avg: Vec<u8> = (0..count)
                    .flat_map(|i| {
                        let sum = (0..ranks).fold(0 as $t, |a, r| a.wrapping_add(at(r, i)));
                        ((sum as i128 / ranks as i128) as $t).to_le_bytes()
                    })
                    .collect();
                let premul: Vec<u8> = (0..count)
                    .flat_map(|i| {
                        (0..ranks)
                            .fold(0 as $t, |a, r| a.wrapping_add(at(r, i).wrapping_mul(r as $t + 1)))
                            .to_le_bytes()
                    })
                    .collect();
                for (op, wanted) in [
                    (ReduceOp::Sum, fold(|a, b| a.wrapping_add(b))),
                    (ReduceOp::Product, fold(|a, b| a.wrapping_mul(b))),
                    (ReduceOp::Min, fold(|a, b| a.min(b))),
                    (ReduceOp::Max, fold(|a, b| a.max(b))),
                    (ReduceOp::BitAnd, fold(|a, b| a & b)),
                    (ReduceOp::BitOr, fold(|a, b| a | b)),
                    (ReduceOp::BitXor, fold(|a, b| a ^ b)),
                    (ReduceOp::Avg, avg),
                    (ReduceOp::PremulSum(1.0), premul),
                ] {
                    let got = run(Tier::best(), DType::$dtype, op, &inputs, &factors, 1);
                    prop_assert_eq!(got, wanted, "{} {}", DType::$dtype, op);
                }
            })*};
        }
        check!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64);
    }
}

#[test]
fn nan_wins_in_min_and_max_and_is_canonical() {
    let odd_nan = f32::from_bits(0xffc1_2345);
    for op in [ReduceOp::Min, ReduceOp::Max, ReduceOp::Sum, ReduceOp::Product] {
        for place in 0..3 {
            let inputs: Vec<Vec<u8>> = (0..3)
                .map(|r| if r == place { odd_nan } else { r as f32 }.to_le_bytes().repeat(40))
                .collect();
            for tier in tiers() {
                let got = run(tier, DType::F32, op, &inputs, &[], 0);
                assert_eq!(got, 0x7fc0_0000u32.to_le_bytes().repeat(40), "{op} {tier:?}");
            }
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn a_thread_that_flushes_subnormals_gets_the_same_bits() {
    let tiny = f32::from_bits(3);
    let inputs = vec![tiny.to_le_bytes().repeat(33); 2];
    let wanted = f32::from_bits(6).to_le_bytes().repeat(33);
    let mut word = 0u32;
    // SAFETY: reads, sets and restores this thread's control word; flush-to-zero is 0x8000,
    // denormals-are-zero 0x40.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut word) };
    let flushing = word | 0x8040;
    // SAFETY: as above.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &flushing) };
    let results: Vec<_> =
        tiers().into_iter().map(|tier| run(tier, DType::F32, ReduceOp::Sum, &inputs, &[], 0)).collect();
    let mut after = 0u32;
    // SAFETY: as above.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut after) };
    // SAFETY: as above.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &word) };
    assert!(results.iter().all(|r| *r == wanted));
    assert_eq!(after & 0xffc0, flushing & 0xffc0, "the thread's own setting is back");
}
