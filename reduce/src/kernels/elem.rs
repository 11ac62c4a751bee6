//! What one element is: how it is widened to what the sums are kept in, and rounded back.
//!
//! Rounding is done with integers only (nearest, ties to even), because the hardware's bf16
//! conversion flushes subnormals and would make the bits depend on the machine.

/// Canonical quiet NaNs: which NaN an addition returns depends on operand order, so results are
/// normalised.
const NAN_F32: f32 = f32::from_bits(0x7fc0_0000);
const NAN_F64: f64 = f64::from_bits(0x7ff8_0000_0000_0000);

/// A type that reductions are computed in.
pub(crate) trait Acc: Copy {
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// NaN wins; equal values give the left one.
    fn lesser(self, other: Self) -> Self;
    /// NaN wins; equal values give the left one.
    fn greater(self, other: Self) -> Self;
    fn and(self, other: Self) -> Self;
    fn or(self, other: Self) -> Self;
    fn xor(self, other: Self) -> Self;
    fn scale(self, factor: f64) -> Self;
    fn divide(self, by: u32) -> Self;
}

/// One element as it lies in memory.
pub(crate) trait Element: Copy {
    /// What it is reduced in.
    type Acc: Acc;
    fn widen(self) -> Self::Acc;
    fn narrow(acc: Self::Acc) -> Self;
}

macro_rules! float_acc {
    ($t:ty, $nan:ident) => {
        impl Acc for $t {
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self * other
            }
            #[inline(always)]
            fn lesser(self, other: Self) -> Self {
                if self.is_nan() || other.is_nan() {
                    $nan
                } else if other < self {
                    other
                } else {
                    self
                }
            }
            #[inline(always)]
            fn greater(self, other: Self) -> Self {
                if self.is_nan() || other.is_nan() {
                    $nan
                } else if other > self {
                    other
                } else {
                    self
                }
            }
            // Bitwise operations are refused for floats before a kernel is chosen.
            fn and(self, _: Self) -> Self {
                self
            }
            fn or(self, _: Self) -> Self {
                self
            }
            fn xor(self, _: Self) -> Self {
                self
            }
            #[inline(always)]
            fn scale(self, factor: f64) -> Self {
                self * factor as $t
            }
            #[inline(always)]
            fn divide(self, by: u32) -> Self {
                self / by as $t
            }
        }
        impl Element for $t {
            type Acc = $t;
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(acc: $t) -> $t {
                if acc.is_nan() { $nan } else { acc }
            }
        }
    };
}
float_acc!(f32, NAN_F32);
float_acc!(f64, NAN_F64);

macro_rules! int_acc {
    ($($t:ty),*) => {$(
        impl Acc for $t {
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn lesser(self, other: Self) -> Self {
                Ord::min(self, other)
            }
            #[inline(always)]
            fn greater(self, other: Self) -> Self {
                Ord::max(self, other)
            }
            #[inline(always)]
            fn and(self, other: Self) -> Self {
                self & other
            }
            #[inline(always)]
            fn or(self, other: Self) -> Self {
                self | other
            }
            #[inline(always)]
            fn xor(self, other: Self) -> Self {
                self ^ other
            }
            #[inline(always)]
            fn scale(self, factor: f64) -> Self {
                // The factor is a whole number of the same type, as in NCCL.
                self.wrapping_mul(factor as i64 as $t)
            }
            #[inline(always)]
            fn divide(self, by: u32) -> Self {
                // Through 128 bits: `by` need not fit the type.
                (self as i128 / i128::from(by)) as $t
            }
        }
        impl Element for $t {
            type Acc = $t;
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(acc: $t) -> $t {
                acc
            }
        }
    )*};
}
int_acc!(u8, i8, u16, i16, u32, i32, u64, i64);

/// A bool: any nonzero byte counts as true, so a peer's odd byte cannot become an invalid value.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(transparent)]
pub(crate) struct Flag(pub(crate) u8);

impl Acc for Flag {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Flag(self.0 | other.0)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Flag(self.0 & other.0)
    }
    #[inline(always)]
    fn lesser(self, other: Self) -> Self {
        Flag(self.0 & other.0)
    }
    #[inline(always)]
    fn greater(self, other: Self) -> Self {
        Flag(self.0 | other.0)
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Flag(self.0 & other.0)
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Flag(self.0 | other.0)
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Flag(self.0 ^ other.0)
    }
    fn scale(self, _: f64) -> Self {
        self
    }
    fn divide(self, _: u32) -> Self {
        self
    }
}

impl Element for Flag {
    type Acc = Flag;
    #[inline(always)]
    fn widen(self) -> Flag {
        Flag(u8::from(self.0 != 0))
    }
    #[inline(always)]
    fn narrow(acc: Flag) -> Flag {
        acc
    }
}

macro_rules! complex_acc {
    ($name:ident, $t:ty) => {
        /// A complex number: real part, imaginary part.
        #[derive(Clone, Copy, PartialEq, Debug)]
        #[repr(C)]
        pub(crate) struct $name(pub(crate) $t, pub(crate) $t);

        impl Acc for $name {
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                $name(self.0 + other.0, self.1 + other.1)
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                $name(self.0 * other.0 - self.1 * other.1, self.0 * other.1 + self.1 * other.0)
            }
            // Order and bits of complex numbers are refused before a kernel is chosen.
            fn lesser(self, _: Self) -> Self {
                self
            }
            fn greater(self, _: Self) -> Self {
                self
            }
            fn and(self, _: Self) -> Self {
                self
            }
            fn or(self, _: Self) -> Self {
                self
            }
            fn xor(self, _: Self) -> Self {
                self
            }
            #[inline(always)]
            fn scale(self, factor: f64) -> Self {
                $name(self.0.scale(factor), self.1.scale(factor))
            }
            #[inline(always)]
            fn divide(self, by: u32) -> Self {
                $name(self.0.divide(by), self.1.divide(by))
            }
        }
        impl Element for $name {
            type Acc = $name;
            #[inline(always)]
            fn widen(self) -> $name {
                self
            }
            #[inline(always)]
            fn narrow(acc: $name) -> $name {
                $name(<$t as Element>::narrow(acc.0), <$t as Element>::narrow(acc.1))
            }
        }
    };
}
complex_acc!(Complex32, f32);
complex_acc!(Complex64, f64);

/// bfloat16.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(transparent)]
pub(crate) struct Bf16(pub(crate) u16);

impl Element for Bf16 {
    type Acc = f32;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn narrow(acc: f32) -> Self {
        let bits = acc.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        Bf16(if acc.is_nan() { 0x7fc0 } else { rounded as u16 })
    }
}

/// IEEE half.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(transparent)]
pub(crate) struct F16(pub(crate) u16);

impl Element for F16 {
    type Acc = f32;
    #[inline(always)]
    fn widen(self) -> f32 {
        decode::<5, 10>(u32::from(self.0), 0x7c00)
    }
    #[inline(always)]
    fn narrow(acc: f32) -> Self {
        F16(encode::<5, 10>(acc, 0x7c00, 0x7e00) as u16)
    }
}

/// fp8, 5 exponent bits.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(transparent)]
pub(crate) struct F8E5M2(pub(crate) u8);

const E5M2: [f32; 256] = table::<5, 2>(0x7c);

impl Element for F8E5M2 {
    type Acc = f32;
    #[inline(always)]
    fn widen(self) -> f32 {
        E5M2[self.0 as usize]
    }
    #[inline(always)]
    fn narrow(acc: f32) -> Self {
        F8E5M2(encode::<5, 2>(acc, 0x7c, 0x7f) as u8)
    }
}

/// fp8, 4 exponent bits, no infinities: what would overflow is NaN.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(transparent)]
pub(crate) struct F8E4M3(pub(crate) u8);

// No infinity: the pattern that would be one is a number, only 0x7f is NaN.
const E4M3: [f32; 256] = table::<4, 3>(0x7f);

impl Element for F8E4M3 {
    type Acc = f32;
    #[inline(always)]
    fn widen(self) -> f32 {
        E4M3[self.0 as usize]
    }
    #[inline(always)]
    fn narrow(acc: f32) -> Self {
        F8E4M3(encode::<4, 3>(acc, 0x7f, 0x7f) as u8)
    }
}

const fn table<const EXP: u32, const MAN: u32>(top: u32) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code as usize] = decode::<EXP, MAN>(code, top);
        code += 1;
    }
    values
}

/// Value of a small float with `EXP` exponent and `MAN` mantissa bits. Codes above `top` are NaN;
/// `top` itself is infinity, or NaN where the mantissa is not 0 (fp8 e4m3fn).
#[inline(always)]
const fn decode<const EXP: u32, const MAN: u32>(code: u32, top: u32) -> f32 {
    let sign = (code >> (EXP + MAN)) << 31;
    let body = code & ((1 << (EXP + MAN)) - 1);
    let bias = (1u32 << (EXP - 1)) - 1;
    if body >= top {
        let infinite = body == top && top & ((1 << MAN) - 1) == 0;
        return f32::from_bits(if infinite { sign | 0x7f80_0000 } else { 0x7fc0_0000 });
    }
    if body >> MAN == 0 {
        // Subnormal: a whole number of the smallest step, exact in f32.
        let step = f32::from_bits((127 + 1 - bias - MAN) << 23);
        let value = body as f32 * step;
        return f32::from_bits(value.to_bits() | sign);
    }
    f32::from_bits(sign | ((body + ((127 - bias) << MAN)) << (23 - MAN)))
}

/// Nearest code, ties to even. What rounds to `top` or above becomes `top`; NaN becomes `nan`.
#[inline(always)]
fn encode<const EXP: u32, const MAN: u32>(value: f32, top: u32, nan: u32) -> u32 {
    let bits = value.to_bits();
    let sign = (bits >> 31) << (EXP + MAN);
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return nan;
    }
    let bias = (1u32 << (EXP - 1)) - 1;
    let smallest_normal = 127 + 1 - bias;
    let exponent = magnitude >> 23;
    let code = if exponent >= smallest_normal {
        let shift = 23 - MAN;
        let rounded = magnitude + ((1 << (shift - 1)) - 1) + ((magnitude >> shift) & 1);
        (rounded >> shift) - ((127 - bias) << MAN)
    } else {
        let shift = (23 - MAN) + (smallest_normal - exponent);
        if shift > 24 {
            0
        } else {
            let mantissa = (magnitude & 0x007f_ffff) | 0x0080_0000;
            (mantissa + ((1 << (shift - 1)) - 1) + ((mantissa >> shift) & 1)) >> shift
        }
    };
    if code >= top && top == nan {
        return nan;
    }
    sign | Ord::min(code, top)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_agrees_with_the_half_crate_on_every_code_and_between() {
        for code in 0..=u16::MAX {
            let theirs = half::f16::from_bits(code);
            let ours = F16(code).widen();
            assert!(ours == theirs.to_f32() || (ours.is_nan() && theirs.is_nan()), "{code:#x}");
            if ours.is_nan() {
                continue;
            }
            assert_eq!(F16::narrow(ours).0, code, "{code:#x}");
            // Around the value and around the midpoint to its neighbour, where rounding decides.
            let next = F16(code.wrapping_add(1)).widen();
            let middle = ((f64::from(ours) + f64::from(next)) / 2.0) as f32;
            for near in [ours, middle] {
                for bits in near.to_bits().saturating_sub(2)..=near.to_bits().saturating_add(2) {
                    let value = f32::from_bits(bits);
                    if !value.is_nan() {
                        assert_eq!(F16::narrow(value).0, half::f16::from_f32(value).to_bits(), "{value:e}");
                    }
                }
            }
        }
        assert_eq!(F16::narrow(f32::NAN).0, 0x7e00);
        assert_eq!(F16::narrow(65520.0).0, 0x7c00);
        assert_eq!(F16::narrow(-1e9).0, 0xfc00);
    }

    #[test]
    fn bf16_agrees_with_the_half_crate() {
        for code in 0..=u16::MAX {
            let value = Bf16(code).widen();
            if value.is_nan() {
                assert_eq!(Bf16::narrow(value).0, 0x7fc0);
                continue;
            }
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let near = f32::from_bits(value.to_bits() | low);
                if !near.is_nan() {
                    assert_eq!(Bf16::narrow(near).0, half::bf16::from_f32(near).to_bits(), "{near:e}");
                }
            }
        }
    }

    /// The nearest representable value by search, ties to the even code.
    fn nearest(widen: impl Fn(u8) -> f32, value: f32) -> u8 {
        let sign = if value.is_sign_negative() { 0x80 } else { 0 };
        (0..0x7f_u8)
            .map(|code| code | sign)
            .filter(|&code| widen(code).is_finite())
            .min_by(|&a, &b| {
                let distance = |c: u8| (f64::from(widen(c)) - f64::from(value)).abs();
                distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)))
            })
            .unwrap()
    }

    #[test]
    fn fp8_rounds_to_the_nearest_code() {
        for code in 0..=255u8 {
            for (widen, round, most) in [
                ((|c| F8E4M3(c).widen()) as fn(u8) -> f32, (|v| F8E4M3::narrow(v).0) as fn(f32) -> u8, 448.0),
                (|c| F8E5M2(c).widen(), |v| F8E5M2::narrow(v).0, 57344.0),
            ] {
                let value = widen(code);
                if !value.is_finite() {
                    continue;
                }
                assert_eq!(round(value), code);
                let next = widen(code.wrapping_add(1));
                if !next.is_finite() || next.is_sign_negative() != value.is_sign_negative() {
                    continue;
                }
                for weight in [0.25f32, 0.5, 0.75] {
                    let between = value * (1.0 - weight) + next * weight;
                    assert!(between.abs() <= most);
                    assert_eq!(round(between), nearest(widen, between), "{code:#x} {between}");
                }
            }
        }
        assert_eq!(F8E4M3::narrow(448.0).0, 0x7e);
        assert_eq!(F8E4M3::narrow(464.0).0, 0x7e, "tie to even");
        assert_eq!(F8E4M3::narrow(465.0).0, 0x7f);
        assert_eq!(F8E4M3::narrow(f32::INFINITY).0, 0x7f);
        assert_eq!(F8E5M2::narrow(61440.0).0, 0x7c);
        assert_eq!(F8E5M2::narrow(f32::NEG_INFINITY).0, 0xfc);
        assert_eq!(F8E5M2::narrow(f32::NAN).0, 0x7f);
    }
}
