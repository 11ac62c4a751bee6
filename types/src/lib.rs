//! What every room of Firefly shares and nothing else: identifiers, versions and epochs as
//! newtypes, units, the small public error kind, the retry policy, secrets and the
//! configuration loader.
//!
//! Invariants kept here:
//!
//! * an identifier of one sort can never be passed where another is wanted;
//! * a secret never appears in `Debug` or `Display` output;
//! * nothing in this crate reads a clock, a socket or (except [`config`] and [`secret`], which
//!   load one named file) the file system.

pub mod backoff;
pub mod config;
pub mod error;
pub mod ids;
pub mod rank_status;
pub mod secret;
pub mod sync;
pub mod units;

pub use backoff::Backoff;
pub use error::{ErrorKind, WireError};
pub use ids::*;
pub use rank_status::{RankState, RankStatus};
pub use secret::ClusterSecret;
pub use sync::lock;
pub use units::{ByteSize, Nanos};
