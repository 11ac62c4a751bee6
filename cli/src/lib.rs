//! ff, the one binary a person types.
