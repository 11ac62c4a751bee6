//! Values of every type for tests, and a model of every reduction in f64 that shares no code with
//! the kernels. Inputs are small enough that every reduction of them is exact in every type.

use firefly_reduce::{DType, ReduceOp};

/// Value of a small float code by its definition.
pub(crate) fn small_float(code: u8, exponent_bits: u32, finite_only: bool) -> f64 {
    let mantissa_bits = 7 - exponent_bits;
    let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
    let exponent = i32::from((code & 0x7f) >> mantissa_bits);
    let mantissa = f64::from(code & ((1 << mantissa_bits) - 1)) / f64::from(1 << mantissa_bits);
    let bias = (1 << (exponent_bits - 1)) - 1;
    let top = (1 << exponent_bits) - 1;
    if finite_only && code & 0x7f == 0x7f {
        return f64::NAN;
    }
    if !finite_only && exponent == top {
        return if mantissa == 0.0 { sign * f64::INFINITY } else { f64::NAN };
    }
    if exponent == 0 {
        sign * mantissa * 2f64.powi(1 - bias)
    } else {
        sign * (1.0 + mantissa) * 2f64.powi(exponent - bias)
    }
}

/// The bytes of one real value. The value must be exact in the type (checked for fp8).
pub(crate) fn encode(dtype: DType, value: f64, out: &mut Vec<u8>) {
    match dtype {
        DType::U8 => out.push(value as u8),
        DType::Bool => out.push(u8::from(value != 0.0)),
        DType::I8 => out.push(value as i8 as u8),
        DType::I16 => out.extend((value as i16).to_le_bytes()),
        DType::U16 => out.extend((value as u16).to_le_bytes()),
        DType::I32 => out.extend((value as i32).to_le_bytes()),
        DType::U32 => out.extend((value as u32).to_le_bytes()),
        DType::I64 => out.extend((value as i64).to_le_bytes()),
        DType::U64 => out.extend((value as u64).to_le_bytes()),
        DType::F16 => out.extend(half::f16::from_f64(value).to_le_bytes()),
        DType::BF16 => out.extend(half::bf16::from_f64(value).to_le_bytes()),
        DType::F32 => out.extend((value as f32).to_le_bytes()),
        DType::F64 => out.extend(value.to_le_bytes()),
        DType::Complex64 => {
            out.extend((value as f32).to_le_bytes());
            out.extend((-value as f32).to_le_bytes());
        }
        DType::Complex128 => {
            out.extend(value.to_le_bytes());
            out.extend((-value).to_le_bytes());
        }
        DType::F8E4M3FN | DType::F8E5M2 => {
            let (bits, finite) = if dtype == DType::F8E4M3FN { (4, true) } else { (5, false) };
            let code = (0..=255u8).find(|&c| small_float(c, bits, finite) == value);
            out.push(code.unwrap_or_else(|| panic!("{value} is not exact in {dtype}")));
        }
    }
}

/// Inputs repeat after this many elements, so that the model need not be computed for each. A
/// prime: no piece, slot or share of ours is a multiple of it.
const PERIOD: usize = 997;

/// The first `count` elements of a pattern that repeats.
fn repeated(dtype: DType, one_period: &[u8], count: usize) -> Vec<u8> {
    one_period.iter().copied().cycle().take(count * dtype.size()).collect()
}

/// Rank's element `i` for a reduction: small, so that every reduction over up to 4 ranks is exact.
pub(crate) fn element(dtype: DType, op: ReduceOp, rank: u32, i: usize) -> f64 {
    let mixed = (u64::from(rank) + 1).wrapping_mul(0x9e37_79b9).wrapping_add((i % PERIOD) as u64 * 7) >> 3;
    match (op, dtype) {
        (_, DType::Bool) => f64::from((mixed & 1) as u8),
        // Products of up to four of these are exact everywhere.
        (ReduceOp::Product, d) if unsigned(d) => [1.0, 2.0, 3.0][(mixed % 3) as usize],
        (ReduceOp::Product, _) => [1.0, -1.0, 2.0][(mixed % 3) as usize],
        (ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor, _) => (mixed % 128) as f64,
        // Multiples of 12 divide by 2, 3 and 4.
        (ReduceOp::Avg, d) if !d.is_float() => {
            (12 * (mixed % 4)) as f64 / if d.size() == 1 { 3.0 } else { 1.0 }
        }
        (ReduceOp::Avg, _) => 1.0,
        (_, d) if unsigned(d) => (mixed % 5) as f64,
        _ => (mixed % 5) as f64 - 2.0,
    }
}

fn unsigned(dtype: DType) -> bool {
    matches!(dtype, DType::U8 | DType::U16 | DType::U32 | DType::U64)
}

pub(crate) fn bytes_of(dtype: DType, values: impl Iterator<Item = f64>) -> Vec<u8> {
    let mut out = Vec::new();
    for value in values {
        encode(dtype, value, &mut out);
    }
    out
}

pub(crate) fn input(dtype: DType, op: ReduceOp, rank: u32, count: usize) -> Vec<u8> {
    let one_period = bytes_of(dtype, (0..PERIOD).map(|i| element(dtype, op, rank, i)));
    repeated(dtype, &one_period, count)
}

/// The bytes that a reduction over `size` ranks must give.
pub(crate) fn reduced(
    dtype: DType,
    op: ReduceOp,
    size: u32,
    count: usize,
    factor: impl Fn(u32) -> f64,
) -> Vec<u8> {
    if matches!(dtype, DType::Complex64 | DType::Complex128) && op == ReduceOp::Product {
        return repeated(dtype, &complex_product(dtype, size, PERIOD), count);
    }
    let values = |i| (0..size).map(move |r| (r, element(dtype, op, r, i)));
    let one_period = bytes_of(dtype, (0..PERIOD).map(|i| model(dtype, op, values(i), size, &factor)));
    repeated(dtype, &one_period, count)
}

fn model(
    dtype: DType,
    op: ReduceOp,
    values: impl Iterator<Item = (u32, f64)>,
    size: u32,
    factor: &impl Fn(u32) -> f64,
) -> f64 {
    let values: Vec<(u32, f64)> = values.collect();
    let fold = |f: fn(f64, f64) -> f64| values.iter().map(|v| v.1).reduce(f).unwrap();
    let bits = |f: fn(u64, u64) -> u64| values.iter().map(|v| v.1 as u64).reduce(f).unwrap() as f64;
    if dtype == DType::Bool {
        return match op {
            ReduceOp::Sum | ReduceOp::Max | ReduceOp::BitOr => fold(f64::max),
            ReduceOp::BitXor => fold(|a, b| (a + b) % 2.0),
            _ => fold(f64::min),
        };
    }
    match op {
        ReduceOp::Sum => fold(|a, b| a + b),
        ReduceOp::Avg => {
            let mean = fold(|a, b| a + b) / f64::from(size);
            if dtype.is_float() { mean } else { mean.trunc() }
        }
        ReduceOp::Product => fold(|a, b| a * b),
        ReduceOp::Min => fold(f64::min),
        ReduceOp::Max => fold(f64::max),
        ReduceOp::BitAnd => bits(|a, b| a & b),
        ReduceOp::BitOr => bits(|a, b| a | b),
        ReduceOp::BitXor => bits(|a, b| a ^ b),
        ReduceOp::PremulSum(_) => values.iter().map(|(r, v)| v * factor(*r)).sum(),
    }
}

fn complex_product(dtype: DType, size: u32, count: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for i in 0..count {
        let (mut re, mut im) = (1.0, 0.0);
        for rank in 0..size {
            // encode() makes (v, -v) of v.
            let v = element(dtype, ReduceOp::Product, rank, i);
            (re, im) = (re * v + im * v, im * v - re * v);
        }
        // Exact in both; signs of zero are not compared here, because -0 + 0 depends on the order.
        let (re, im) = (re + 0.0, im + 0.0);
        if dtype == DType::Complex64 {
            out.extend((re as f32).to_le_bytes());
            out.extend((im as f32).to_le_bytes());
        } else {
            out.extend(re.to_le_bytes());
            out.extend(im.to_le_bytes());
        }
    }
    out
}

/// Whether two results are the same, zeros of either sign being equal in floating types.
pub(crate) fn same(dtype: DType, a: &[u8], b: &[u8]) -> bool {
    let normal = |bytes: &[u8]| -> Vec<u8> {
        let width = match dtype {
            DType::Complex64 => 4,
            DType::Complex128 => 8,
            d => d.size(),
        };
        let mut bytes = bytes.to_vec();
        if dtype.is_float() {
            for element in bytes.chunks_mut(width) {
                let (last, rest) = element.split_last_mut().unwrap();
                if *last == 0x80 && rest.iter().all(|&b| b == 0) {
                    *last = 0;
                }
            }
        }
        bytes
    };
    a.len() == b.len() && (a == b || normal(a) == normal(b))
}

/// All reductions that have a meaning for `dtype`.
pub(crate) fn ops(dtype: DType) -> Vec<ReduceOp> {
    [
        ReduceOp::Sum,
        ReduceOp::Avg,
        ReduceOp::Product,
        ReduceOp::Min,
        ReduceOp::Max,
        ReduceOp::BitAnd,
        ReduceOp::BitOr,
        ReduceOp::BitXor,
        ReduceOp::PremulSum(2.0),
    ]
    .into_iter()
    .filter(|op| op.check(dtype).is_ok())
    .collect()
}
