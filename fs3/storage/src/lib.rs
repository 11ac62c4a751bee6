//! The fs3 storage server: chunk engine and chain replication.
