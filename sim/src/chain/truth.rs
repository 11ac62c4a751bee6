//! What has happened, as an observer sees it who looks into every replica, and what may not be.

use super::Tags;
use firefly_types::ChunkId;
use std::collections::BTreeMap;
use std::fmt;

/// A promise was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub rule: &'static str,
    /// How.
    pub detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.detail)
    }
}

/// Effect of a client's update on a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Effect {
    Write { slot: usize, tag: u64 },
    Punch { slot: usize },
    Truncate { slots: usize },
    Remove,
}

#[derive(Default)]
struct History {
    /// Each version that was committed anywhere: its content, `None` if it removed the chunk.
    versions: BTreeMap<u64, Option<Tags>>,
    /// Highest version that an answered operation has shown, at each moment: an operation that
    /// begins later must not see less.
    shown: u64,
    /// tag → version at which it took effect.
    effects: BTreeMap<u64, u64>,
}

/// The observer.
#[derive(Default)]
pub(super) struct Truth {
    chunks: BTreeMap<ChunkId, History>,
    pub(super) violation: Option<Violation>,
    pub(super) commits: u64,
}

impl Truth {
    pub(super) fn fail(&mut self, rule: &'static str, detail: String) {
        if self.violation.is_none() {
            self.violation = Some(Violation { rule, detail });
        }
    }

    /// A replica committed a version: every replica must ever say the same about it.
    pub(super) fn committed(&mut self, who: usize, chunk: ChunkId, version: u64, content: Option<Tags>) {
        self.commits += 1;
        let history = self.chunks.entry(chunk).or_default();
        if let Some(known) = history.versions.get(&version) {
            if *known != content {
                let detail = format!(
                    "target {who} commits chunk {chunk} version {version} as {content:?}, it was {known:?} before"
                );
                self.fail("a committed version never changes or vanishes", detail);
            }
            return;
        }
        // What took effect with it?
        let before = history.versions.range(..version).next_back().map(|(v, c)| (*v, c.clone()));
        let newest = before.as_ref().is_none_or(|_| history.versions.range(version..).next().is_none());
        let mut repeated = None;
        if let (Some(tags), true) = (&content, newest) {
            let old = before.and_then(|(_, c)| c).unwrap_or_default();
            for (slot, tag) in tags.iter().enumerate() {
                if *tag != 0 && old.get(slot) != Some(tag) {
                    if let Some(first) = history.effects.get(tag).filter(|first| **first != version) {
                        repeated = Some(format!(
                            "write {tag} took effect on chunk {chunk} at version {first} and again at {version}"
                        ));
                    }
                    history.effects.insert(*tag, version);
                }
            }
        }
        history.versions.insert(version, content);
        if let Some(detail) = repeated {
            self.fail("a request takes effect at most once", detail);
        }
    }

    /// Whether nothing of the chunk from this version on is known.
    pub(super) fn is_after_all(&self, chunk: ChunkId, version: u64) -> bool {
        self.chunks.get(&chunk).is_none_or(|h| h.versions.range(version..).next().is_none())
    }

    /// Highest version that an operation beginning now must see.
    pub(super) fn shown(&self, chunk: ChunkId) -> u64 {
        self.chunks.get(&chunk).map_or(0, |h| h.shown)
    }

    /// A client's update, begun when `shown` held, was answered.
    pub(super) fn updated(&mut self, chunk: ChunkId, shown: u64, version: u64, effect: Effect) {
        let history = self.chunks.entry(chunk).or_default();
        if version == 0 {
            // Without effect, because the chunk did not exist.
            return self.seen(chunk, shown, 0, &None, "an update");
        }
        let content = history.versions.get(&version).cloned();
        if version <= shown {
            let detail = format!("{effect:?} on chunk {chunk} got version {version} after {shown} was seen");
            self.fail("operations on a chunk are linearizable", detail);
            return;
        }
        history.shown = history.shown.max(version);
        let holds = match (&content, effect) {
            (None, _) => false,
            (Some(c), Effect::Remove) => c.is_none(),
            (Some(None), _) => false,
            (Some(Some(tags)), Effect::Write { slot, tag }) => tags.get(slot) == Some(&tag),
            (Some(Some(tags)), Effect::Punch { slot }) => tags.get(slot).is_none_or(|t| *t == 0),
            (Some(Some(tags)), Effect::Truncate { slots }) => tags.len() == slots,
        };
        if !holds {
            let detail = format!(
                "{effect:?} on chunk {chunk} was acknowledged as version {version}, which is {content:?}"
            );
            self.fail("an acknowledged update is in its version", detail);
        }
    }

    /// A client has read; the read began when `shown` held.
    pub(super) fn read(&mut self, chunk: ChunkId, shown: u64, version: u64, content: Option<Tags>) {
        if version > 0 {
            let history = self.chunks.entry(chunk).or_default();
            let known = history.versions.get(&version).cloned();
            if known.as_ref() != Some(&content) {
                let detail =
                    format!("chunk {chunk} version {version} was read as {content:?}, it is {known:?}");
                self.fail("a read returns a committed version", detail);
            }
        }
        self.seen(chunk, shown, version, &content, "a read");
    }

    fn seen(&mut self, chunk: ChunkId, shown: u64, version: u64, content: &Option<Tags>, what: &str) {
        let history = self.chunks.entry(chunk).or_default();
        let fine = if version > 0 {
            debug_assert!(content.is_some());
            version >= shown
        } else {
            // Absent: never written, or removed by what was seen or something later.
            shown == 0 || history.versions.range(shown..).any(|(_, c)| c.is_none())
        };
        if fine {
            history.shown = history.shown.max(version);
        } else {
            let detail = format!("{what} of chunk {chunk} saw version {version} after {shown} was seen");
            self.fail("operations on a chunk are linearizable", detail);
        }
    }

    /// At rest: what a serving replica holds must be the end of the history.
    pub(super) fn at_rest(&mut self, who: usize, chunk: ChunkId, held: Option<(u64, Tags)>) {
        let Some(history) = self.chunks.get(&chunk) else {
            if held.is_some() {
                self.fail(
                    "replicas at rest are equal",
                    format!("target {who} holds chunk {chunk} from nowhere"),
                );
            }
            return;
        };
        let last = history.versions.iter().next_back().map(|(v, c)| (*v, c.clone()));
        let expected = match last {
            Some((version, Some(tags))) => Some((version, tags)),
            _ => None,
        };
        if held != expected {
            let detail =
                format!("target {who} holds chunk {chunk} as {held:?}, the history ends with {expected:?}");
            self.fail("replicas at rest are equal and hold everything", detail);
        }
    }

    pub(super) fn chunks(&self) -> Vec<ChunkId> {
        self.chunks.keys().copied().collect()
    }

    /// A number that differs for different histories.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut sum = 0u64;
        for (chunk, history) in &self.chunks {
            for (version, content) in &history.versions {
                let tags = content.iter().flatten().fold(1u64, |a, t| a.wrapping_mul(31).wrapping_add(*t));
                sum = sum.wrapping_mul(1_000_003).wrapping_add(tags ^ version ^ u64::from(chunk.index));
            }
        }
        sum
    }
}
