//! Background work, so that people can see it and know what holds it back.

/// What a worker is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Activity {
    /// Nothing to do.
    Idle,
    /// At it.
    Working,
    /// There is work that cannot be done now; [`Status::detail`] says why.
    Blocked,
}

/// How far a worker is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    /// What it is at.
    pub activity: Activity,
    /// Finished, in the worker's own unit, which `detail` names.
    pub done: u64,
    /// Of how many; zero if that is not known.
    pub total: u64,
    /// In words.
    pub detail: String,
}

impl Status {
    /// Nothing to do.
    pub fn idle(detail: impl Into<String>) -> Self {
        Self { activity: Activity::Idle, done: 0, total: 0, detail: detail.into() }
    }
}

/// A background worker over some state `S`. It keeps nothing of its own that a restart could lose:
/// what is left to do follows from the state.
pub trait Worker<S: ?Sized> {
    /// Short and unique; what a person calls it.
    fn name(&self) -> &'static str;
    /// What bounds it, in words.
    fn throttle(&self, state: &S) -> String;
    /// How far it is.
    fn status(&self, state: &S) -> Status;
}
