//! The node agent and the per-rank shim.
