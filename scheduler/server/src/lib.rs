//! The scheduler daemon: gRPC and persistence around scheduler-core.
