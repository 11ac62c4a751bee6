//! What the cluster agrees on: a transactional key-value store replicated with raft.
