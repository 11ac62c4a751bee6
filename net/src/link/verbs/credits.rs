//! Credits for SENDs: how a sender knows that a receive is posted for it, so that nobody relies on
//! receiver-not-ready retries. Pure: counts in, decisions out.
//!
//! Each message carries the number of receives that its sender has posted since the beginning
//! (modulo 2^32): a grant for the other direction. It is a running total and not a difference, so
//! nothing has to be remembered about which message carried what.
//!
//! * A message of data needs two credits and leaves one. The last one is for a message that carries
//!   nothing but a grant: without it, two sides that have filled each other's receives would each
//!   wait for a grant that the other cannot send.
//! * A grant travels alone only when half of the receives are owed. It takes up a receive itself,
//!   which is then owed by the peer, far below that half: grants answer no grants.

/// What a peer did that its credits do not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("a message came for which no receive had been granted")]
    Overrun,
    #[error("a grant of {granted} receives, of which there are {receives}")]
    Grant { granted: u32, receives: u32 },
}

/// One side's account.
#[derive(Debug)]
pub(super) struct Credits {
    /// Messages sent so far.
    sent: u32,
    /// Messages that the peer has granted so far.
    limit: u32,
    /// The peer's receives.
    theirs: u32,
    /// Messages that came so far.
    arrived: u32,
    /// Receives posted so far.
    posted: u32,
    /// What the peer was last told of `posted`.
    told: u32,
    /// This side's receives.
    ours: u32,
    /// Credits that data leaves over; 1 but in a test.
    reserve: i64,
}

impl Credits {
    /// Fewest receives of a side: two for the exchange of grants and two that move data.
    pub(super) const LEAST: u32 = 4;

    /// Both sides have posted their receives and told each other how many.
    pub(super) fn new(ours: u32, theirs: u32) -> Credits {
        debug_assert!(ours >= Self::LEAST && theirs >= Self::LEAST);
        Credits { sent: 0, limit: theirs, theirs, arrived: 0, posted: ours, told: ours, ours, reserve: 1 }
    }

    fn available(&self) -> u32 {
        self.limit.wrapping_sub(self.sent)
    }

    /// Takes a credit for a message of data, if there is one.
    pub(super) fn take(&mut self) -> bool {
        let may = i64::from(self.available()) > self.reserve;
        self.sent = self.sent.wrapping_add(u32::from(may));
        may
    }

    /// Takes a credit for a grant that travels alone, if one is due and there is one.
    pub(super) fn take_for_grant(&mut self) -> bool {
        let may = self.owed() >= self.ours / 2 && self.available() > 0;
        self.sent = self.sent.wrapping_add(u32::from(may));
        may
    }

    /// Receives posted that the peer has not been told of.
    fn owed(&self) -> u32 {
        self.posted.wrapping_sub(self.told)
    }

    /// The grant for the message that is about to be sent.
    pub(super) fn grant(&mut self) -> u32 {
        self.told = self.posted;
        self.told
    }

    /// A message came, with this grant.
    pub(super) fn came(&mut self, grant: u32) -> Result<(), Violation> {
        if self.arrived == self.told {
            return Err(Violation::Overrun);
        }
        self.arrived = self.arrived.wrapping_add(1);
        // A total below the last one shows as a huge one: it is what wraps around.
        let granted = grant.wrapping_sub(self.sent);
        if granted > self.theirs || grant.wrapping_sub(self.limit) > self.theirs {
            return Err(Violation::Grant { granted, receives: self.theirs });
        }
        self.limit = grant;
        Ok(())
    }

    /// Sends whether there are credits or not: the control of tests.
    #[cfg(test)]
    pub(super) fn ignore(&mut self) {
        self.reserve = -1;
    }

    /// A receive was posted again.
    pub(super) fn reposted(&mut self) {
        self.posted = self.posted.wrapping_add(1);
        debug_assert!(self.posted.wrapping_sub(self.arrived) <= self.ours);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use std::collections::VecDeque;

    /// One side of a simulated pair. `receives` is what really is posted, whatever the account says.
    struct Side {
        credits: Credits,
        receives: u32,
        to_send: u32,
        unread: u32,
        read: u32,
        /// Messages on their way to the other side: (data, grant).
        wire: VecDeque<(bool, u32)>,
        grants_alone: u32,
    }

    #[derive(Debug, PartialEq)]
    enum Failure {
        /// A message met no posted receive: on a device, receiver not ready.
        NotReady,
        Violation(Violation),
        /// Nothing can happen any more, and data is left.
        Deadlock,
    }

    impl Side {
        fn new(ours: u32, theirs: u32, to_send: u32, start: u32) -> Side {
            let mut credits = Credits::new(ours, theirs);
            // As if so many messages had gone each way before: totals wrap around.
            for total in [&mut credits.sent, &mut credits.arrived] {
                *total = start;
            }
            credits.limit = start.wrapping_add(theirs);
            (credits.posted, credits.told) = (start.wrapping_add(ours), start.wrapping_add(ours));
            Side {
                credits,
                receives: ours,
                to_send,
                unread: 0,
                read: 0,
                wire: VecDeque::new(),
                grants_alone: 0,
            }
        }

        fn send(&mut self) -> bool {
            let sent = self.to_send > 0 && self.credits.take();
            if sent {
                self.to_send -= 1;
                self.wire.push_back((true, self.credits.grant()));
            }
            sent
        }

        fn give_back(&mut self) {
            if self.credits.take_for_grant() {
                self.grants_alone += 1;
                self.wire.push_back((false, self.credits.grant()));
            }
        }

        fn repost(&mut self) {
            self.receives += 1;
            self.credits.reposted();
        }

        fn receive(&mut self, (data, grant): (bool, u32)) -> Result<(), Failure> {
            self.receives = self.receives.checked_sub(1).ok_or(Failure::NotReady)?;
            self.credits.came(grant).map_err(Failure::Violation)?;
            if data {
                self.unread += 1;
            } else {
                self.repost();
            }
            self.give_back();
            Ok(())
        }

        fn consume(&mut self) -> bool {
            let some = self.unread > 0;
            if some {
                self.unread -= 1;
                self.read += 1;
                self.repost();
                self.give_back();
            }
            some
        }
    }

    /// Runs a random schedule, then everything that can still happen. `plant` changes a side first.
    fn simulate(seed: u64, plant: impl Fn(&mut Credits)) -> Result<u32, Failure> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut size = || rng.random_range(Credits::LEAST..12);
        let (a, b) = (size(), size());
        let start = if rng.random() { u32::MAX - rng.random_range(0..40u32) } else { 0 };
        let data = [rng.random_range(0..200u32), rng.random_range(0..200u32)];
        let mut sides = [Side::new(a, b, data[0], start), Side::new(b, a, data[1], start)];
        for side in &mut sides {
            plant(&mut side.credits);
        }
        let act = |sides: &mut [Side; 2], who: usize, what: u32| -> Result<bool, Failure> {
            match what {
                0 => Ok(sides[who].send()),
                1 => Ok(sides[who].consume()),
                _ => match sides[1 - who].wire.pop_front() {
                    Some(message) => sides[who].receive(message).map(|()| true),
                    None => Ok(false),
                },
            }
        };
        for _ in 0..rng.random_range(0..1500) {
            act(&mut sides, rng.random_range(0..2), rng.random_range(0..3))?;
        }
        loop {
            let mut moved = false;
            for who in 0..2 {
                for what in 0..3 {
                    moved |= act(&mut sides, who, what)?;
                }
            }
            if !moved {
                break;
            }
        }
        let all = sides[0].read == data[1] && sides[1].read == data[0];
        if all { Ok(sides[0].grants_alone + sides[1].grants_alone) } else { Err(Failure::Deadlock) }
    }

    const SEEDS: u64 = 3000;

    #[test]
    fn no_overrun_and_no_deadlock() {
        let mut alone = 0;
        for seed in 0..SEEDS {
            alone += simulate(seed, |_| {}).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
        }
        // The interesting state was visited.
        assert!(alone > 1000, "{alone}");
    }

    /// The controls: each rule switched off is found out by the simulation.
    #[test]
    fn the_simulation_finds_each_rule_that_is_missing() {
        let found = |expected: Failure, plant: fn(&mut Credits)| {
            (0..SEEDS).any(|seed| simulate(seed, plant).is_err_and(|e| e == expected))
        };
        assert!(found(Failure::Deadlock, |c| c.reserve = 0), "the last credit spent on data");
        assert!(found(Failure::NotReady, Credits::ignore), "data sent without credits");
        assert!(found(Failure::Deadlock, |c| c.ours = 1000), "grants that never travel alone");
    }

    #[test]
    fn a_peer_that_cheats_is_found_out() {
        let mut c = Credits::new(4, 4);
        for _ in 0..4 {
            c.came(4).unwrap();
        }
        assert_eq!(c.came(4), Err(Violation::Overrun));
        // Posting again helps the peer only once it was told.
        c.reposted();
        assert_eq!(c.came(4), Err(Violation::Overrun));
        c.grant();
        c.came(4).unwrap();
        for bad in [3, 0, 9, 1 << 31, u32::MAX] {
            let mut c = Credits::new(4, 4);
            let error = c.came(bad).unwrap_err();
            assert!(matches!(error, Violation::Grant { receives: 4, .. }), "{bad}: {error}");
        }
    }
}
