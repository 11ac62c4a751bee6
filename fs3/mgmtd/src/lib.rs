//! The fs3 cluster manager: membership, leases and chain tables.
