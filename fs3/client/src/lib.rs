//! The fs3 file system as a library: routing, striping, retry, buffering.
