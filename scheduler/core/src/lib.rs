//! The pure scheduler: one event in, decisions out.
