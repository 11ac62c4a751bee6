//! Which algorithm carries out a collective, by size: a measured table with defaults.
//!
//! The table is text, one line per row, so that it can be read, edited and diffed:
//!
//! ```text
//! all_reduce gather 16384        up to this many bytes; every rank gathers all inputs and reduces
//! all_reduce doubling 65536      recursive doubling
//! all_reduce halving 1048576     halving and doubling with matched pairs
//! all_reduce direct max          direct exchange of slices
//! ```
//!
//! On one line (for a rank's card) the rows are separated by `;`.

use std::fmt;
use std::str::FromStr;

/// How an all-reduce between nodes is carried out. All evaluate the canonical tree: the bits are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Everyone gets every input and reduces: one round, N-1 times the bytes.
    Gather,
    /// Recursive doubling: log2 N rounds, each with the whole message.
    Doubling,
    /// Halving and doubling, pairs matched to the tree: 2 log2 N rounds, 2 (N-1)/N of the bytes.
    Halving,
    /// Each rank reduces its slice and gives it to all: two rounds, 2 (N-1)/N of the bytes.
    Direct,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Gather, Self::Doubling, Self::Halving, Self::Direct];

    /// As in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gather => "gather",
            Self::Doubling => "doubling",
            Self::Halving => "halving",
            Self::Direct => "direct",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|a| a.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|a| a.name()).collect();
            format!("{name:?} is no algorithm; there are {}", known.join(", "))
        })
    }
}

/// The table: for all-reduce between nodes, in order of size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cutoffs {
    /// (largest message in bytes, algorithm), ascending; the last is `usize::MAX`.
    rows: Vec<(usize, Algorithm)>,
}

impl Default for Cutoffs {
    /// For a few nodes on Ethernet; `ff reduce perf --tune` measures better ones.
    fn default() -> Self {
        Self {
            rows: vec![
                (16 << 10, Algorithm::Gather),
                (64 << 10, Algorithm::Doubling),
                (usize::MAX, Algorithm::Direct),
            ],
        }
    }
}

impl Cutoffs {
    /// A table from its rows: (largest message in bytes, algorithm).
    pub fn new(rows: Vec<(usize, Algorithm)>) -> Result<Self, String> {
        if !rows.windows(2).all(|pair| pair[0].0 < pair[1].0) {
            return Err("sizes must grow from row to row".into());
        }
        match rows.last() {
            Some((usize::MAX, _)) => Ok(Self { rows }),
            _ => Err("the last row must end in \"max\"".into()),
        }
    }

    /// One algorithm for all sizes: for measuring and for tests.
    pub fn always(algorithm: Algorithm) -> Self {
        Self { rows: vec![(usize::MAX, algorithm)] }
    }

    /// The algorithm for a message of `bytes`. Where it cannot be had (halving needs a power of two of
    /// members; rounds carry partial results, which must not be larger than elements), direct exchange
    /// takes its place.
    pub fn choose(&self, bytes: usize) -> Algorithm {
        self.rows.iter().find(|(most, _)| bytes <= *most).expect("the last row holds all sizes").1
    }

    /// The rows: (largest message in bytes, algorithm).
    pub fn rows(&self) -> &[(usize, Algorithm)] {
        &self.rows
    }

    /// The table as a file's text.
    pub fn to_file(&self) -> String {
        format!(
            "# Algorithms of firefly-reduce by message size in bytes.\n{}\n",
            self.to_string().replace(';', "\n")
        )
    }
}

impl fmt::Display for Cutoffs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (most, algorithm)) in self.rows.iter().enumerate() {
            if i > 0 {
                f.write_str(";")?;
            }
            write!(f, "all_reduce {algorithm} ")?;
            if *most == usize::MAX { f.write_str("max")? } else { write!(f, "{most}")? }
        }
        Ok(())
    }
}

impl FromStr for Cutoffs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut rows = Vec::new();
        for line in text.split(['\n', ';']) {
            let line = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [] => {}
                ["all_reduce", algorithm, most] => {
                    let most = match most {
                        "max" => usize::MAX,
                        _ => most.parse().map_err(|_| format!("{most:?} is no number of bytes"))?,
                    };
                    rows.push((most, algorithm.parse()?));
                }
                _ => {
                    return Err(format!("{line:?} is not \"all_reduce ALGORITHM BYTES\""));
                }
            }
        }
        Self::new(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_round_trips_and_chooses() {
        let table: Cutoffs =
            "# measured\nall_reduce gather 100\n\nall_reduce halving 1000 # here\nall_reduce direct max\n"
                .parse()
                .unwrap();
        assert_eq!(table.to_string().parse(), Ok(table.clone()));
        assert_eq!(table.to_file().parse(), Ok(table.clone()));
        assert_eq!(table.choose(100), Algorithm::Gather);
        assert_eq!(table.choose(101), Algorithm::Halving);
        assert_eq!(table.choose(usize::MAX), Algorithm::Direct);
    }

    #[test]
    fn a_wrong_table_is_refused_with_a_reason() {
        for (text, reason) in [
            ("", "last row"),
            ("all_reduce gather 10", "last row"),
            ("all_reduce gather 10\nall_reduce halving 10\nall_reduce direct max", "grow"),
            ("all_reduce swing max", "no algorithm"),
            ("all_reduce gather ten", "no number"),
            ("broadcast tree max", "is not"),
        ] {
            let error = text.parse::<Cutoffs>().unwrap_err();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }
}
