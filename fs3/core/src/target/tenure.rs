//! When a target may keep what its folder holds, and when the chain has gone on without it.

use crate::chain::PublicState;
use firefly_types::ChainVersion;

/// What to do with a target's folder under a new routing table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Open it with what it holds.
    Open,
    /// Go on.
    Keep,
    /// Empty it and open it: the chain went on without it, and it is going to be filled.
    Empty,
    /// Close it and stay out until the manager has taken it out of the chain: a fill under way
    /// does not repeat what was copied before this process started.
    Hold,
    /// Report it offline: it should hold everything and holds nothing.
    Lost,
}

/// One target's right to its data, for the life of one process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tenure {
    started: bool,
    /// It holds, or may hold, what its chain had committed when it last served.
    complete: bool,
    /// Closed, by [`Verdict::Hold`].
    held: bool,
    ignore_up_to: ChainVersion,
}

impl Default for Tenure {
    fn default() -> Self {
        // What a process finds at its start may be anything, also half a fill; only a public state
        // that implies completeness lets it stand.
        Self { started: false, complete: true, held: false, ignore_up_to: ChainVersion(0) }
    }
}

impl Tenure {
    /// The target is in `state` at `version`. `is_empty` says whether its folder holds nothing;
    /// asked at the start only.
    pub fn settle(&mut self, state: PublicState, version: ChainVersion, is_empty: bool) -> Verdict {
        let first = !std::mem::replace(&mut self.started, true);
        match state {
            PublicState::Serving | PublicState::LastSrv => {
                self.complete = true;
                // The fill had ended, and had been reported, before this process started.
                let first = first || std::mem::take(&mut self.held);
                // A chain begins at version 1 (nobody serves) or 2 (it was just let begin); after
                // that, empty is not complete.
                match first {
                    true if is_empty && version > ChainVersion(2) => Verdict::Lost,
                    true => Verdict::Open,
                    false => Verdict::Keep,
                }
            }
            PublicState::Syncing if self.complete => {
                self.ignore_up_to = version;
                self.held = true;
                Verdict::Hold
            }
            PublicState::Waiting | PublicState::Offline if self.complete => {
                (self.complete, self.held) = (false, false);
                self.ignore_up_to = version.max(self.ignore_up_to);
                Verdict::Empty
            }
            PublicState::Syncing | PublicState::Waiting | PublicState::Offline => Verdict::Keep,
        }
    }

    /// Whether the machine should be told of the chain at `version`.
    pub fn follows(&self, version: ChainVersion) -> bool {
        version > self.ignore_up_to
    }

    /// Whether to report the target as up to date rather than only online.
    pub fn is_complete(&self) -> bool {
        self.complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use PublicState::*;

    fn lives(steps: &[(PublicState, u64)], is_empty: bool) -> Vec<Verdict> {
        let mut tenure = Tenure::default();
        steps.iter().map(|(s, v)| tenure.settle(*s, ChainVersion(*v), is_empty)).collect()
    }

    #[test]
    fn data_is_kept_by_those_who_are_complete_and_by_nobody_else() {
        use Verdict::*;
        assert_eq!(lives(&[(LastSrv, 1), (Serving, 2), (Serving, 3)], true), [Open, Keep, Keep]);
        assert_eq!(lives(&[(LastSrv, 9), (Serving, 10)], false), [Open, Keep]);
        assert_eq!(lives(&[(LastSrv, 9)], true), [Lost]);
        // Out after it served: emptied once, then filled, then complete again.
        let life = [
            (Serving, 2),
            (Offline, 3),
            (Syncing, 4),
            (Waiting, 5),
            (Syncing, 6),
            (Serving, 7),
            (Waiting, 8),
        ];
        assert_eq!(lives(&life, false), [Open, Empty, Keep, Keep, Keep, Keep, Empty]);
        // Restarted in the middle of a fill.
        let life = [(Syncing, 4), (Offline, 5), (Syncing, 6), (Serving, 7)];
        assert_eq!(lives(&life, false), [Hold, Empty, Keep, Keep]);
        // Restarted when the fill was done: the manager has heard so, or has not noticed the restart.
        assert_eq!(lives(&[(Syncing, 4), (Serving, 5), (Serving, 6)], false), [Hold, Open, Keep]);
        assert_eq!(lives(&[(Syncing, 4), (Syncing, 5), (LastSrv, 6)], false), [Hold, Hold, Open]);
    }
}
