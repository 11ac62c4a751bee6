//! What all ranks of a group must do alike. Rank 0's options are the group's: they travel with its
//! card, so ranks that were started with different environments cannot disagree.

use crate::ReduceError;
use crate::cutoffs::Cutoffs;
use std::fmt;
use std::str::FromStr;

/// Options of a group; see [`Options::from_env`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Every payload carries a checksum, and all data take the links instead of the shared slots.
    /// Costs about one pass over memory on each side.
    pub checksums: bool,
    /// Which algorithm from which size on.
    pub cutoffs: Cutoffs,
}

/// A switch in the environment: unset, empty, 0 and 1.
fn switch(name: &str, default: bool) -> Result<bool, ReduceError> {
    match std::env::var(name).as_deref() {
        Err(_) | Ok("") => Ok(default),
        Ok("0") => Ok(false),
        Ok("1") => Ok(true),
        Ok(other) => Err(ReduceError::invalid(format!("{name} must be 0 or 1, not {other:?}"))),
    }
}

impl Options {
    /// `FIREFLY_REDUCE_CHECKSUM` (0), and the cut-off table in
    /// `FIREFLY_REDUCE_TUNING`, as `ff reduce perf --tune` writes it.
    pub fn from_env() -> Result<Self, ReduceError> {
        let cutoffs = match std::env::var("FIREFLY_REDUCE_TUNING") {
            Ok(path) if !path.is_empty() => {
                let text = std::fs::read_to_string(&path).map_err(|e| {
                    ReduceError::invalid(format!("FIREFLY_REDUCE_TUNING: cannot read {path}: {e}"))
                })?;
                text.parse()
                    .map_err(|e| ReduceError::invalid(format!("FIREFLY_REDUCE_TUNING: {path}: {e}")))?
            }
            _ => Cutoffs::default(),
        };
        Ok(Self { checksums: switch("FIREFLY_REDUCE_CHECKSUM", false)?, cutoffs })
    }
}

/// One line, for rank 0's card.
impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", u8::from(self.checksums), self.cutoffs)
    }
}

impl FromStr for Options {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let (checksums, cutoffs) = line.split_once(' ').ok_or("the cut-off table is missing")?;
        let checksums = match checksums {
            "0" => false,
            "1" => true,
            other => return Err(format!("checksums is {other:?}")),
        };
        Ok(Self { checksums, cutoffs: cutoffs.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_round_trip() {
        for checksums in [false, true] {
            let options = Options { checksums, ..Options::default() };
            assert_eq!(options.to_string().parse(), Ok(options));
        }
        assert!("2 all_reduce direct max".parse::<Options>().is_err());
        assert!("1".parse::<Options>().is_err());
    }
}
