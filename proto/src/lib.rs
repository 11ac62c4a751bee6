//! Every wire contract of Firefly: the gRPC services (manager, scheduler, agent gateway) and the
//! messages that travel as heads of `net` frames (fs3 namespace and chunks).
//!
//! Compatibility: fields are only added, numbers are never reused; releases N and N−1 work
//! together. A field that comes from a wire is validated by the room that reads it.

#![allow(missing_docs, clippy::doc_markdown, reason = "generated items carry the .proto comments")]

pub mod auth;
pub mod dial;
pub mod methods;
pub mod process;
pub mod status;

/// Cluster manager of fs3.
pub mod mgmtd {
    tonic::include_proto!("firefly.fs3.mgmtd.v1");
}

/// Namespace of fs3.
pub mod meta {
    tonic::include_proto!("firefly.fs3.meta.v1");
}

/// Chunks of fs3.
pub mod storage {
    tonic::include_proto!("firefly.fs3.storage.v1");
}

/// Scheduler and agents.
pub mod scheduler {
    tonic::include_proto!("firefly.scheduler.v1");
}
