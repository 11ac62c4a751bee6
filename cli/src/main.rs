//! `ff`.
fn main() {}
