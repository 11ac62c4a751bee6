//! Identifiers, versions and epochs. Each is a newtype: mixing two of them does not compile.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The bare number, for the wire and for arithmetic that the type does not define.
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl From<$inner> for $name {
            fn from(raw: $inner) -> Self {
                Self(raw)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = std::num::ParseIntError;

            /// Accepts the displayed form and the bare number.
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                s.strip_prefix($prefix).unwrap_or(s).parse().map(Self)
            }
        }
    };
}

id! {
    /// One machine (or, on one machine, one process that plays a node's role).
    NodeId(u32), "n"
}
id! {
    /// One storage target: a folder or device that holds replicas of chunks.
    TargetId(u32), "t"
}
id! {
    /// One replication chain: an ordered list of targets.
    ChainId(u32), "c"
}
id! {
    /// Version of a chain's membership; every change adds one. Requests carry it and are refused
    /// when it is not the server's.
    ChainVersion(u64), "cv"
}
id! {
    /// Version of one chunk's content on its chain; the head adds one for each update.
    ChunkVersion(u64), "v"
}
id! {
    /// Version of the whole routing table.
    RoutingVersion(u64), "rv"
}
id! {
    /// An inode of the namespace.
    InodeId(u64), "i"
}
id! {
    /// A file's data, apart from its inode: never reused, so that inodes can share or replace
    /// their data (clone, snapshot, truncate-by-replacement) without copying.
    DataId(u64), "d"
}
id! {
    /// Generation of a [`DataId`]: part of the chunk identifier, so that chunks of an older
    /// generation can be collected after the newer one has been published.
    Generation(u32), "g"
}
id! {
    /// A client of fs3: one mount or one process that uses the library.
    ClientId(u64), "cl"
}
id! {
    /// Epoch of a client's session with the cluster. Servers refuse an older one.
    SessionEpoch(u64), "se"
}
id! {
    /// One start of one process. A process that comes back under a new incarnation has provably
    /// lost what the old one held in memory.
    Incarnation(u64), "in"
}
id! {
    /// A job as its user sees it: restarts do not change it.
    JobId(u64), "j"
}
id! {
    /// One attempt to run a job. Effects of an older attempt are refused.
    AttemptEpoch(u32), "a"
}
id! {
    /// A process's index in its job, 0..world size.
    Rank(u32), "r"
}

/// Identifies one chunk. Ordered so that the chunks of one file lie together.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct ChunkId {
    /// Whose data.
    pub data: DataId,
    /// Which generation of it.
    pub generation: Generation,
    /// Position in the file, in chunks.
    pub index: u32,
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.data, self.generation, self.index)
    }
}

/// Names one client request for exactly-once execution: a retry carries the same three numbers.
/// A client has at most one unacknowledged update per channel, so a server keeps one record per
/// (client, channel).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct RequestId {
    /// Who asks.
    pub client: ClientId,
    /// One of the client's serial lanes.
    pub channel: u32,
    /// Increases by one for each new request on the channel.
    pub sequence: u64,
}

/// Names one cluster. Data of one cluster is never served to another.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClusterId(pub u128);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for ClusterId {
    type Err = std::num::ParseIntError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        u128::from_str_radix(s, 16).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_through_their_displayed_form() {
        let job = JobId(42);
        assert_eq!(job.to_string(), "j42");
        assert_eq!("j42".parse(), Ok(job));
        assert_eq!("42".parse(), Ok(job));
        assert!("n42".parse::<JobId>().is_err());
        let cluster = ClusterId(0xfeed);
        assert_eq!(cluster.to_string().parse(), Ok(cluster));
    }

    #[test]
    fn chunks_of_one_file_are_neighbours() {
        let at = |d, g, i| ChunkId { data: DataId(d), generation: Generation(g), index: i };
        assert!(at(1, 0, 9) < at(1, 1, 0));
        assert!(at(1, 9, 9) < at(2, 0, 0));
    }
}
