//! The fs3 mount.
