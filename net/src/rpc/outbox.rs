//! What one side of a connection still has to say. Whoever has something to say says it at once,
//! from its own task, if nobody else is speaking and the carrier takes it without waiting; the rest
//! is the writer's ([`Outbox::run`]). So a small call costs no change of task, and a peer that is
//! slow to read stops nobody but the writer.

use crate::error::LinkError;
use crate::link::{LinkTx, Outgoing};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Longest message that its sender writes by itself. Copying more into a socket takes longer than
/// the change of task that it saves, and the sender has other things to do.
const INLINE: usize = 32 << 10;

struct Speaker<T> {
    tx: T,
    /// What is being sent; the peer may have seen the first of it when `begun`.
    batch: VecDeque<Outgoing>,
    begun: bool,
}

struct State<T> {
    queue: VecDeque<Outgoing>,
    /// Absent while somebody speaks; whoever brings it back looks at the queue again.
    speaker: Option<Speaker<T>>,
    failed: Option<LinkError>,
    /// What is queued holds something long: the writer's affair.
    long: bool,
    over: bool,
}

pub(super) struct Outbox<T> {
    state: Mutex<State<T>>,
    /// For the writer: there is something to send, or an error.
    work: Notify,
    /// For `close`: the speaker is back.
    back: Notify,
}

/// An outbox of any carrier.
pub(super) trait Say: Send + Sync {
    /// Sends `message` now if that needs no waiting, else leaves it to the writer. Gives it back if
    /// the connection is over. Never waits.
    fn say(&self, message: Outgoing) -> Result<(), Box<Outgoing>>;

    /// Queues `message`; a [`Say::flush`] must follow before its sender waits for anything.
    fn queue(&self, message: Outgoing) -> Result<(), Box<Outgoing>>;

    /// Sends what [`Say::queue`] left.
    fn flush(&self);
}

impl<T: LinkTx> Outbox<T> {
    pub(super) fn new(tx: T) -> Outbox<T> {
        let speaker = Some(Speaker { tx, batch: VecDeque::new(), begun: false });
        let state = State { queue: VecDeque::new(), speaker, failed: None, long: false, over: false };
        Outbox { state: Mutex::new(state), work: Notify::new(), back: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the right to speak, with all that is to be said.
    fn speaker(state: &mut State<T>) -> Option<Speaker<T>> {
        let mut speaker = state.speaker.take()?;
        state.long = false;
        if speaker.batch.is_empty() {
            std::mem::swap(&mut speaker.batch, &mut state.queue);
        } else {
            speaker.batch.append(&mut state.queue);
        }
        if speaker.batch.is_empty() {
            state.speaker = Some(speaker);
            return None;
        }
        Some(speaker)
    }

    /// Gives the right to speak back. Says whether there is more to do for the writer.
    fn give_back(&self, mut speaker: Speaker<T>, result: Result<(), LinkError>) -> bool {
        let mut state = self.lock();
        speaker.begun = !speaker.batch.is_empty();
        let more = result.is_err() || speaker.begun || !state.queue.is_empty();
        if let Err(error) = result {
            state.failed.get_or_insert(error);
        }
        state.speaker = Some(speaker);
        if state.over {
            self.back.notify_one();
        }
        more
    }

    fn speak_now(&self, mut state: MutexGuard<'_, State<T>>) {
        if state.failed.is_some() || state.long || state.speaker.as_ref().is_none_or(|s| s.begun) {
            // Somebody is speaking, or the carrier takes no more for now: the writer's affair.
            let waits = state.speaker.is_some();
            drop(state);
            if waits {
                self.work.notify_one();
            }
            return;
        }
        let Some(mut speaker) = Self::speaker(&mut state) else { return };
        drop(state);
        let result = speaker.tx.try_send(&mut speaker.batch);
        if self.give_back(speaker, result) {
            self.work.notify_one();
        }
    }

    /// Writes what could not be written at once, until the link fails or `stop` says so.
    pub(super) async fn run(&self, stop: &CancellationToken) -> Result<(), LinkError> {
        loop {
            tokio::select! {
                () = self.work.notified() => {}
                () = stop.cancelled() => return Ok(()),
            }
            loop {
                let speaker = {
                    let mut state = self.lock();
                    if let Some(error) = state.failed.take() {
                        state.over = true;
                        return Err(error);
                    }
                    Self::speaker(&mut state)
                };
                let Some(mut speaker) = speaker else { break };
                let (result, stopped) = tokio::select! {
                    sent = speaker.tx.send(&mut speaker.batch) => (sent, false),
                    () = stop.cancelled() => (Ok(()), true),
                };
                self.give_back(speaker, result);
                if stopped {
                    return Ok(());
                }
            }
        }
    }

    /// Ends it and destroys the sending half. Returns what the peer has certainly not seen.
    pub(super) async fn close(&self) -> Vec<Outgoing> {
        loop {
            let speaker = {
                let mut state = self.lock();
                state.over = true;
                state.speaker.take().map(|speaker| (speaker, std::mem::take(&mut state.queue)))
            };
            if let Some((speaker, queue)) = speaker {
                let seen = usize::from(speaker.begun);
                return speaker.batch.into_iter().skip(seen).chain(queue).collect();
            }
            // Somebody is within a `try_send`, which does not wait.
            self.back.notified().await;
        }
    }
}

impl<T: LinkTx> Say for Outbox<T> {
    fn say(&self, message: Outgoing) -> Result<(), Box<Outgoing>> {
        let small = message.bytes() <= INLINE;
        let mut state = self.lock();
        if state.over {
            return Err(Box::new(message));
        }
        state.queue.push_back(message);
        state.long |= !small;
        self.speak_now(state);
        Ok(())
    }

    fn queue(&self, message: Outgoing) -> Result<(), Box<Outgoing>> {
        let mut state = self.lock();
        if state.over {
            return Err(Box::new(message));
        }
        state.long |= message.bytes() > INLINE;
        state.queue.push_back(message);
        Ok(())
    }

    fn flush(&self) {
        let state = self.lock();
        if !state.queue.is_empty() {
            self.speak_now(state);
        }
    }
}
