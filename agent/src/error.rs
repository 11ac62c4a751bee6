//! Why an agent cannot run.

use firefly_types::ErrorKind;

/// Why an agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The state folder cannot be used.
    #[error("cannot use the agent's state folder: {what}: {source}")]
    State {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Another agent has the folder.
    #[error("another agent runs on {0}: stop it, or give each agent a folder of its own")]
    Taken(String),
    /// The scheduler's address is not one.
    #[error("{0:?} is not the address of a scheduler (expected ip:port)")]
    Address(String),
}

impl AgentError {
    /// For programs.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::State { .. } => ErrorKind::Unavailable,
            Self::Taken(_) => ErrorKind::Busy,
            Self::Address(_) => ErrorKind::InvalidArgument,
        }
    }

    pub(crate) fn state(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::State { what, source }
    }
}
