//! Bounds the bytes of replies on their way to one client from all servers together, so that many
//! servers that answer at one time do not flood the switch port before it (incast).
//!
//! A call whose reply fits takes its tokens at once and costs no extra round trip. One that does not
//! is sent with the flag "ask": its server says [`Ready`](super::frame::FrameKind::Ready) when the
//! reply is there and sends it when granted, first come, first served. Tokens come back when the
//! reply has landed or the call has ended otherwise.
//!
//! Two rules keep a server that is stuck from holding up the others: tokens taken at once, for
//! replies that nobody has seen yet, are never more than half of all; and a call that was given up
//! gives its tokens back, although its reply may still come.

use super::connection::Connection;
use firefly_types::lock;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, Weak};

/// The count, pure: bytes in, tickets to grant out.
#[derive(Debug)]
struct Budget {
    limit: usize,
    used: usize,
    /// Of `used`, what was taken at once.
    at_once: usize,
    /// The most that was ever in use.
    high: usize,
    waiting: VecDeque<(u64, usize)>,
}

impl Budget {
    fn new(limit: usize) -> Budget {
        Budget { limit, used: 0, at_once: 0, high: 0, waiting: VecDeque::new() }
    }

    fn take(&mut self, bytes: usize) {
        self.used += bytes;
        self.high = self.high.max(self.used);
    }

    /// Takes `bytes` for a reply that is not there yet.
    fn try_at_once(&mut self, bytes: usize) -> bool {
        let fits = self.at_once + bytes <= self.limit / 2 && self.used + bytes <= self.limit;
        if !fits || !self.waiting.is_empty() {
            return false;
        }
        self.at_once += bytes;
        self.take(bytes);
        true
    }

    /// Gets in line with a reply that is there.
    fn wait(&mut self, ticket: u64, bytes: usize) {
        self.waiting.push_back((ticket, bytes));
    }

    fn forget(&mut self, ticket: u64) {
        self.waiting.retain(|(t, _)| *t != ticket);
    }

    fn give_back(&mut self, bytes: usize, at_once: bool) {
        self.used -= bytes;
        if at_once {
            self.at_once -= bytes;
        }
    }

    /// The next in line, if it fits. One that is larger than all there is goes alone.
    fn grant(&mut self) -> Option<(u64, usize)> {
        let (ticket, bytes) = *self.waiting.front()?;
        if self.used > 0 && self.used + bytes > self.limit {
            return None;
        }
        self.waiting.pop_front();
        self.take(bytes);
        Some((ticket, bytes))
    }
}

struct State {
    budget: Budget,
    next: u64,
    asked: HashMap<u64, (Weak<Connection>, u64)>,
}

/// One client's bound on replies on their way.
pub(super) struct Incast(Mutex<State>);

/// Tokens that a call holds; they come back when this is dropped. Dropping grants others, so it
/// must not happen under a connection's lock.
pub(super) struct Tokens {
    incast: Arc<Incast>,
    bytes: usize,
    at_once: bool,
}

/// A place in line, given up when this is dropped.
pub(super) struct Place {
    incast: Arc<Incast>,
    ticket: u64,
}

impl Incast {
    pub(super) fn new(limit: usize) -> Arc<Incast> {
        let state = State { budget: Budget::new(limit.max(1)), next: 0, asked: HashMap::new() };
        Arc::new(Incast(Mutex::new(state)))
    }

    /// Tokens for a reply that is not there yet, if they may be had at once.
    pub(super) fn try_take(self: &Arc<Self>, bytes: usize) -> Option<Tokens> {
        let taken = lock(&self.0).budget.try_at_once(bytes);
        taken.then(|| Tokens { incast: self.clone(), bytes, at_once: true })
    }

    /// Gets in line for the reply to `call` on `connection`, which is there. [`Incast::grant`] must
    /// follow.
    pub(super) fn wait(self: &Arc<Self>, connection: &Arc<Connection>, call: u64, bytes: usize) -> Place {
        let mut state = lock(&self.0);
        let ticket = state.next;
        state.next += 1;
        state.budget.wait(ticket, bytes);
        state.asked.insert(ticket, (Arc::downgrade(connection), call));
        Place { incast: self.clone(), ticket }
    }

    /// Grants what fits now. Not to be called under a connection's lock.
    pub(super) fn grant(self: &Arc<Self>) {
        loop {
            let granted = {
                let mut state = lock(&self.0);
                let granted = state.budget.grant();
                granted.map(|(ticket, bytes)| (state.asked.remove(&ticket), bytes))
            };
            let Some((asked, bytes)) = granted else { return };
            let tokens = Tokens { incast: self.clone(), bytes, at_once: false };
            if let Some((connection, call)) = asked
                && let Some(connection) = connection.upgrade()
            {
                connection.granted(call, tokens);
            }
        }
    }

    /// The most bytes that ever were on their way.
    #[cfg(test)]
    pub(super) fn high(&self) -> usize {
        lock(&self.0).budget.high
    }

    /// Bytes on their way now, and replies in line.
    #[cfg(test)]
    pub(super) fn now(&self) -> (usize, usize) {
        let state = lock(&self.0);
        (state.budget.used, state.budget.waiting.len())
    }
}

impl Drop for Tokens {
    fn drop(&mut self) {
        lock(&self.incast.0).budget.give_back(self.bytes, self.at_once);
        self.incast.grant();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.incast.0);
            state.asked.remove(&self.ticket);
            state.budget.forget(self.ticket);
        }
        self.incast.grant();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn half_is_taken_at_once_and_the_rest_in_line() {
        let mut budget = Budget::new(100);
        assert!(budget.try_at_once(30) && budget.try_at_once(20));
        assert!(!budget.try_at_once(1), "the other half is for replies that are there");
        budget.wait(1, 40);
        budget.wait(2, 20);
        budget.wait(3, 5);
        assert_eq!(budget.grant(), Some((1, 40)));
        assert_eq!(budget.grant(), None, "the second does not fit");
        budget.give_back(30, true);
        assert!(!budget.try_at_once(1), "those in line come first");
        assert_eq!((budget.grant(), budget.grant(), budget.grant()), (Some((2, 20)), Some((3, 5)), None));
        assert_eq!((budget.used, budget.high), (85, 90));
        // Larger than all: alone.
        budget.wait(4, 1000);
        assert_eq!(budget.grant(), None);
        for (bytes, at_once) in [(20, true), (40, false), (20, false), (5, false)] {
            budget.give_back(bytes, at_once);
        }
        assert_eq!(budget.grant(), Some((4, 1000)));
    }

    proptest! {
        /// Whatever comes in whatever order: never over the limit (but for one alone), first come
        /// first served, and everything in line is granted once those before it are done.
        #[test]
        fn the_limit_holds_and_nobody_waits_for_ever(
            limit in 1usize..200,
            events in prop::collection::vec((0u8..5, 1usize..120, any::<prop::sample::Index>()), 1..120),
        ) {
            let mut budget = Budget::new(limit);
            let mut held: Vec<(usize, bool)> = Vec::new();
            let mut line: VecDeque<u64> = VecDeque::new();
            let mut next = 0;
            for (what, bytes, index) in events {
                match what {
                    0 if budget.try_at_once(bytes) => {
                        prop_assert!(line.is_empty());
                        held.push((bytes, true));
                    }
                    1 | 2 => {
                        budget.wait(next, bytes);
                        line.push_back(next);
                        next += 1;
                    }
                    3 if !held.is_empty() => {
                        let (bytes, at_once) = held.swap_remove(index.index(held.len()));
                        budget.give_back(bytes, at_once);
                    }
                    4 if !line.is_empty() => {
                        if let Some(gone) = line.remove(index.index(line.len())) {
                            budget.forget(gone);
                        }
                    }
                    _ => {}
                }
                while let Some((ticket, bytes)) = budget.grant() {
                    prop_assert_eq!(line.pop_front(), Some(ticket));
                    held.push((bytes, false));
                }
                let used: usize = held.iter().map(|(bytes, _)| bytes).sum();
                prop_assert_eq!(used, budget.used);
                prop_assert!(used <= limit || held.len() == 1);
                let at_once: usize = held.iter().filter(|(_, a)| *a).map(|(b, _)| b).sum();
                prop_assert!(at_once <= limit / 2);
                // Somebody is in line only because somebody else holds tokens.
                prop_assert!(line.is_empty() || !held.is_empty());
            }
            while let Some((bytes, at_once)) = held.pop() {
                budget.give_back(bytes, at_once);
                while let Some((ticket, bytes)) = budget.grant() {
                    prop_assert_eq!(line.pop_front(), Some(ticket));
                    held.push((bytes, false));
                }
            }
            prop_assert!(line.is_empty());
            prop_assert_eq!((budget.used, budget.at_once), (0, 0));
        }
    }
}
