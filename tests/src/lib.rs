//! What crosses rooms: end to end, faults, POSIX.
