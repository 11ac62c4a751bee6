//! The fs3 namespace: directories, names, attributes, sessions and extended attributes as
//! serializable transactions on [`firefly_store::Kv`], served over [`firefly_net`].
//!
//! ```text
//! bytes ─▶ door (decode, limits) ─▶ Meta ─▶ gate (epochs, exactly-once) ─▶ ops ─▶ commit ─▶ bytes
//!                                                     one transaction
//! garbage queue ─▶ garbage worker ─▶ chunks        silent clients ─▶ client worker ─▶ sessions
//! ```
//!
//! Invariants:
//!
//! * An operation is one transaction: it has happened entirely and durably when its reply leaves,
//!   or not at all. Its exactly-once record commits with it, so a retry gets the same reply.
//! * A request of an older session epoch or job attempt than one that has had an effect has none.
//! * An inode lives as long as a name points to it or a session has it open. A file's data goes to
//!   the garbage queue in the transaction that takes its last reference, and only then.
//! * A published length only grows, unless the file is cut; a length that was measured before a
//!   cut is never published after it.
//! * The server holds no state that a restart loses.
//!
//! Creating names in one directory does not conflict: the directory's times are written blindly
//! beside its inode, its link count is a record of its own, and the totals are counted per lane.

mod caller;
mod clients;
pub mod clock;
mod door;
mod error;
pub mod garbage;
mod gate;
mod ids;
pub mod layout;
pub mod limits;
mod manager;
mod meta;
mod op;
mod ops;
mod perm;
pub mod schema;
mod serve;
mod service;

pub use error::MetaError;
pub use meta::{Meta, RootOwner};
pub use op::ROOT;
pub use serve::{MetaConfig, MetaSettings, Running, ServeError, serve, serve_with};
pub use service::MetaService;
