//! The C ABI of firefly-reduce.
