//! Asynchronous collectives on the CPU and the wire.
