//! The pure decisions of fs3: chain states, the replication target, placement.
