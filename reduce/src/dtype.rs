//! Element types and reductions. Their numbers are part of the C ABI and of the wire format.

use crate::ReduceError;
use std::fmt;

/// Type of one element.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum DType {
    /// Unsigned byte.
    U8 = 0,
    /// Signed byte.
    I8 = 1,
    /// 16-bit signed.
    I16 = 2,
    /// 32-bit signed.
    I32 = 3,
    /// 64-bit signed.
    I64 = 4,
    /// 16-bit unsigned.
    U16 = 5,
    /// 32-bit unsigned.
    U32 = 6,
    /// 64-bit unsigned.
    U64 = 7,
    /// One byte, 0 or 1: sum and max are OR, product and min are AND.
    Bool = 8,
    /// IEEE half.
    F16 = 9,
    /// bfloat16.
    BF16 = 10,
    /// IEEE single.
    F32 = 11,
    /// IEEE double.
    F64 = 12,
    /// Two singles.
    Complex64 = 13,
    /// Two doubles.
    Complex128 = 14,
    /// fp8 with 4 exponent bits, no infinities; overflow is NaN.
    F8E4M3FN = 15,
    /// fp8 with 5 exponent bits; overflow is infinity.
    F8E5M2 = 16,
}

impl DType {
    /// All of them, in the order of their numbers.
    pub const ALL: [DType; 17] = [
        Self::U8,
        Self::I8,
        Self::I16,
        Self::I32,
        Self::I64,
        Self::U16,
        Self::U32,
        Self::U64,
        Self::Bool,
        Self::F16,
        Self::BF16,
        Self::F32,
        Self::F64,
        Self::Complex64,
        Self::Complex128,
        Self::F8E4M3FN,
        Self::F8E5M2,
    ];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool | Self::F8E4M3FN | Self::F8E5M2 => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::I64 | Self::U64 | Self::F64 | Self::Complex64 => 8,
            Self::Complex128 => 16,
        }
    }

    /// Alignment that a buffer of this type needs.
    pub const fn align(self) -> usize {
        match self {
            Self::Complex64 => 4,
            Self::Complex128 => 8,
            other => other.size(),
        }
    }

    /// From its number.
    pub fn from_code(code: i32) -> Option<Self> {
        usize::try_from(code).ok().and_then(|i| Self::ALL.get(i).copied())
    }

    /// Whether values are rounded (floating, fp8 and complex types).
    pub const fn is_float(self) -> bool {
        matches!(
            self,
            Self::F16
                | Self::BF16
                | Self::F32
                | Self::F64
                | Self::Complex64
                | Self::Complex128
                | Self::F8E4M3FN
                | Self::F8E5M2
        )
    }

    const fn is_complex(self) -> bool {
        matches!(self, Self::Complex64 | Self::Complex128)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::I16 => "i16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U16 => "u16",
            Self::U32 => "u32",
            Self::U64 => "u64",
            Self::Bool => "bool",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Complex64 => "complex64",
            Self::Complex128 => "complex128",
            Self::F8E4M3FN => "f8e4m3fn",
            Self::F8E5M2 => "f8e5m2",
        })
    }
}

/// How elements are combined.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum ReduceOp {
    /// Sum.
    Sum,
    /// Sum, divided once by the group size (integers: toward zero).
    Avg,
    /// Product.
    Product,
    /// Minimum; NaN wins.
    Min,
    /// Maximum; NaN wins.
    Max,
    /// Bitwise and.
    BitAnd,
    /// Bitwise or.
    BitOr,
    /// Bitwise exclusive or.
    BitXor,
    /// Sum of each rank's contribution times that rank's factor.
    PremulSum(f64),
}

impl ReduceOp {
    /// Its number.
    pub const fn code(self) -> u8 {
        match self {
            Self::Sum => 0,
            Self::Avg => 1,
            Self::Product => 2,
            Self::Min => 3,
            Self::Max => 4,
            Self::BitAnd => 5,
            Self::BitOr => 6,
            Self::BitXor => 7,
            Self::PremulSum(_) => 8,
        }
    }

    /// From its number; `factor` is for number 8 alone.
    pub fn from_code(code: i32, factor: f64) -> Option<Self> {
        Some(match code {
            0 => Self::Sum,
            1 => Self::Avg,
            2 => Self::Product,
            3 => Self::Min,
            4 => Self::Max,
            5 => Self::BitAnd,
            6 => Self::BitOr,
            7 => Self::BitXor,
            8 => Self::PremulSum(factor),
            _ => return None,
        })
    }

    /// This rank's factor: 1 except for [`ReduceOp::PremulSum`].
    pub const fn factor(self) -> f64 {
        match self {
            Self::PremulSum(factor) => factor,
            _ => 1.0,
        }
    }

    /// Refuses combinations that have no meaning.
    pub fn check(self, dtype: DType) -> Result<(), ReduceError> {
        let fits = match self {
            Self::Sum | Self::Product => true,
            Self::Avg | Self::PremulSum(_) => dtype != DType::Bool,
            Self::Min | Self::Max => !dtype.is_complex(),
            Self::BitAnd | Self::BitOr | Self::BitXor => !dtype.is_float(),
        };
        if fits {
            Ok(())
        } else {
            Err(ReduceError::Unsupported {
                detail: format!(
                    "{self} has no meaning for {dtype}; convert the elements or choose another one"
                ),
            })
        }
    }
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(redop_name(self.code()))
    }
}

/// Name of a reduction by its number, for messages about a peer's operation.
pub(crate) fn redop_name(code: u8) -> &'static str {
    match code {
        0 => "sum",
        1 => "avg",
        2 => "product",
        3 => "min",
        4 => "max",
        5 => "bit and",
        6 => "bit or",
        7 => "bit xor",
        8 => "premul sum",
        _ => "no reduction",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_pinned() {
        for (i, dtype) in DType::ALL.into_iter().enumerate() {
            assert_eq!(dtype as usize, i);
            assert_eq!(DType::from_code(i as i32), Some(dtype));
            assert_eq!(dtype.size() % dtype.align(), 0);
        }
        assert_eq!(DType::from_code(17), None);
        assert_eq!(DType::from_code(-1), None);
        for code in 0..9 {
            assert_eq!(ReduceOp::from_code(code, 1.0).map(|op| i32::from(op.code())), Some(code));
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let error = ReduceOp::BitXor.check(DType::F32).unwrap_err().to_string();
        assert!(error.contains("bit xor") && error.contains("f32"), "{error}");
        assert!(ReduceOp::Max.check(DType::Complex64).is_err());
        assert!(ReduceOp::Avg.check(DType::Bool).is_err());
        assert!(ReduceOp::PremulSum(2.0).check(DType::BF16).is_ok());
    }
}
