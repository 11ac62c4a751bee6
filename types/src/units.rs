//! Units: byte sizes that people type and read, and a monotonic time for step machines.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::time::Duration;

/// A point on some monotonic clock, in nanoseconds. Step machines take it as an argument; what
/// clock it comes from (CLOCK_BOOTTIME for leases, simulated time in tests) is the driver's affair.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Nanos(pub u64);

impl Nanos {
    /// The zero of the clock.
    pub const ZERO: Nanos = Nanos(0);

    /// `self + d`, saturating at the end of time.
    pub fn after(self, d: Duration) -> Nanos {
        Nanos(self.0.saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// Time from `earlier` to `self`, zero if `earlier` is later.
    pub fn since(self, earlier: Nanos) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A number of bytes; parses and prints with binary suffixes (`4KiB`, `1.5GiB`) and also accepts
/// `K`, `M`, `G`, `T` as their short forms.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

/// Why a text is not a byte size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a size: expected a number with an optional suffix K, M, G or T, such as 64MiB")]
pub struct ParseByteSizeError(String);

const SUFFIXES: [(&str, u64); 5] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

impl std::str::FromStr for ByteSize {
    type Err = ParseByteSizeError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = || ParseByteSizeError(s.to_owned());
        let text = s.trim();
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, suffix) = text.split_at(split);
        let suffix = suffix.trim();
        let unit = if suffix.is_empty() {
            1
        } else {
            SUFFIXES
                .iter()
                .find(|(name, _)| {
                    name.eq_ignore_ascii_case(suffix)
                        || (suffix.len() == 1 && name[..1].eq_ignore_ascii_case(suffix))
                })
                .ok_or_else(bad)?
                .1
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(unit).map(ByteSize).ok_or_else(bad);
        }
        let value = number.parse::<f64>().map_err(|_| bad())? * unit as f64;
        if value.is_finite() && value >= 0.0 && value < u64::MAX as f64 {
            Ok(ByteSize(value as u64))
        } else {
            Err(bad())
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = SUFFIXES.iter().rev().find(|(_, u)| self.0 >= *u).unwrap_or(&SUFFIXES[0]);
        if self.0.is_multiple_of(*unit) {
            write!(f, "{}{name}", self.0 / unit)
        } else {
            write!(f, "{:.1}{name}", self.0 as f64 / *unit as f64)
        }
    }
}

impl fmt::Debug for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes or a text such as \"64MiB\"")
            }

            fn visit_u64<E>(self, v: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(v))
            }

            fn visit_i64<E: serde::de::Error>(self, v: i64) -> Result<ByteSize, E> {
                u64::try_from(v).map(ByteSize).map_err(|_| E::custom("a size cannot be negative"))
            }

            fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<ByteSize, E> {
                v.parse().map_err(E::custom)
            }
        }
        d.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_as_people_type_them() {
        for (text, bytes) in
            [("0", 0), ("17", 17), ("4k", 4096), ("64MiB", 64 << 20), ("1.5 GiB", 3 << 29), ("2T", 2 << 40)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "x", "-1", "4 KB", "1e9", "99999999999T", "."] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn whole_sizes_round_trip(n in 0u64..1 << 20, shift in proptest::sample::select(vec![0u32, 10, 20, 30])) {
            let size = ByteSize(n << shift);
            if size.to_string().contains('.') { return Ok(()); }
            proptest::prop_assert_eq!(size.to_string().parse(), Ok(size));
        }
    }

    #[test]
    fn time_saturates() {
        assert_eq!(Nanos(5).since(Nanos(9)), Duration::ZERO);
        assert_eq!(Nanos(u64::MAX).after(Duration::from_secs(1)), Nanos(u64::MAX));
    }
}
