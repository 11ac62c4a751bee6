//! The recent writes against which a transaction is checked when it is applied.
//!
//! The verdict must be the same on every replica and in every replay, so it depends only on the
//! log: bounds count log indices and key bytes, never time or memory, and they are part of the
//! format. A checkpoint stores the window beside the data, because entries after the checkpoint
//! are judged again, against writes before it, when the log is replayed.

use crate::record::{TxnRecord, take, take_bytes, take_u32};
use crate::{MAX_KEY_BYTES, MAX_TXN_OPS};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

/// Log indices that the window spans at most. Format, not a knob.
pub(crate) const WINDOW_INDICES: u64 = 16_384;
/// Key bytes that the window holds at most. Format, not a knob.
pub(crate) const WINDOW_KEY_BYTES: usize = 4 << 20;

const VERSION: u8 = 1;

type Key = Arc<[u8]>;

/// Which keys were written at which of the recent log indices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Window {
    /// Writes at or below this index are forgotten; snapshots older than it cannot be judged.
    floor: u64,
    newest: BTreeMap<Key, u64>,
    order: VecDeque<(u64, Vec<Key>)>,
    bytes: usize,
}

impl Window {
    /// Whether nothing that `txn` read was written after its snapshot.
    pub(crate) fn admits(&self, txn: &TxnRecord) -> bool {
        if txn.keys.is_empty() && txn.ranges.is_empty() {
            return true;
        }
        if txn.read_version < self.floor {
            return false;
        }
        let newer = |index: &u64| *index > txn.read_version;
        if txn.keys.iter().any(|k| self.newest.get(k.as_slice()).is_some_and(newer)) {
            return false;
        }
        !txn.ranges.iter().any(|(from, to)| {
            let bounds = (Bound::Included(from.as_slice()), Bound::Excluded(to.as_slice()));
            self.newest.range::<[u8], _>(bounds).any(|(_, index)| newer(index))
        })
    }

    /// Remembers what the entry at `index` wrote, and forgets what is too old.
    pub(crate) fn record<'a>(&mut self, index: u64, keys: impl Iterator<Item = &'a [u8]>) {
        let keys: Vec<Key> = keys.map(Key::from).collect();
        if !keys.is_empty() {
            for key in &keys {
                self.newest.insert(key.clone(), index);
                self.bytes += key.len();
            }
            self.order.push_back((index, keys));
        }
        let oldest_kept = index.saturating_sub(WINDOW_INDICES);
        while let Some((at, _)) = self.order.front() {
            if *at > oldest_kept && self.bytes <= WINDOW_KEY_BYTES {
                break;
            }
            let Some((at, keys)) = self.order.pop_front() else { break };
            self.floor = at;
            for key in keys {
                self.bytes -= key.len();
                if self.newest.get(&key) == Some(&at) {
                    self.newest.remove(&key);
                }
            }
        }
    }

    /// For the checkpoint.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.extend_from_slice(&self.floor.to_le_bytes());
        out.extend_from_slice(&(self.order.len() as u32).to_le_bytes());
        for (index, keys) in &self.order {
            out.extend_from_slice(&index.to_le_bytes());
            out.extend_from_slice(&(keys.len() as u32).to_le_bytes());
            for key in keys {
                out.extend_from_slice(&(key.len() as u32).to_le_bytes());
                out.extend_from_slice(key);
            }
        }
        out
    }

    /// From a checkpoint; `None` if the bytes are something else.
    pub(crate) fn decode(mut bytes: &[u8]) -> Option<Self> {
        if take(&mut bytes, 1)?[0] != VERSION {
            return None;
        }
        let floor = take_u64(&mut bytes)?;
        let mut window = Window { floor, ..Default::default() };
        for _ in 0..take_u32(&mut bytes)? {
            let index = take_u64(&mut bytes)?;
            if index <= window.order.back().map_or(floor, |(at, _)| *at) {
                return None;
            }
            let count = take_u32(&mut bytes)?;
            if count == 0 || count > MAX_TXN_OPS {
                return None;
            }
            let mut keys = Vec::new();
            for _ in 0..count {
                let key = Key::from(take_bytes(&mut bytes, MAX_KEY_BYTES)?);
                window.newest.insert(key.clone(), index);
                window.bytes += key.len();
                keys.push(key);
            }
            window.order.push_back((index, keys));
        }
        bytes.is_empty().then_some(window)
    }
}

fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(take(bytes, 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reads(version: u64, keys: &[&str], ranges: &[(&str, &str)]) -> TxnRecord {
        TxnRecord {
            read_version: version,
            keys: keys.iter().map(|k| k.as_bytes().to_vec()).collect(),
            ranges: ranges.iter().map(|(a, b)| (a.as_bytes().to_vec(), b.as_bytes().to_vec())).collect(),
            writes: BTreeMap::new(),
        }
    }

    fn write(window: &mut Window, index: u64, keys: &[&str]) {
        window.record(index, keys.iter().map(|k| k.as_bytes()));
    }

    #[test]
    fn a_read_conflicts_with_a_later_write_only() {
        let mut window = Window::default();
        write(&mut window, 5, &["b"]);
        assert!(window.admits(&reads(5, &["b"], &[])));
        assert!(!window.admits(&reads(4, &["b"], &[])));
        assert!(window.admits(&reads(4, &["a"], &[("a", "b")])));
        assert!(!window.admits(&reads(4, &[], &[("a", "c")])));
        assert!(window.admits(&reads(4, &[], &[("b0", "c")])));
    }

    #[test]
    fn a_snapshot_older_than_the_window_is_refused_but_blind_writes_pass() {
        let mut window = Window::default();
        write(&mut window, 1, &["a"]);
        write(&mut window, 2 + WINDOW_INDICES, &["b"]);
        assert!(!window.admits(&reads(0, &["z"], &[])), "a write that was forgotten might have hit it");
        assert!(window.admits(&reads(1, &["z"], &[])));
        assert!(window.admits(&reads(0, &[], &[])));
    }

    #[test]
    fn the_window_is_bounded_by_key_bytes() {
        let mut window = Window::default();
        for index in 1..=2_000u64 {
            let key = [index.to_le_bytes().as_slice(), &[0; 4000]].concat();
            window.record(index, std::iter::once(key.as_slice()));
        }
        assert!(window.bytes <= WINDOW_KEY_BYTES);
        assert!(window.floor > 0 && window.order.len() == window.newest.len());
    }

    proptest! {
        #[test]
        fn windows_round_trip(keys in proptest::collection::vec(proptest::collection::vec("[a-d]{1,2}", 0..4), 0..20)) {
            let mut window = Window::default();
            for (index, keys) in keys.iter().enumerate() {
                let unique: std::collections::BTreeSet<_> = keys.iter().collect();
                window.record(index as u64 * 1000 + 1, unique.iter().map(|k| k.as_bytes()));
            }
            let bytes = window.encode();
            prop_assert_eq!(Window::decode(&bytes), Some(window));
            for cut in 0..bytes.len() {
                prop_assert_eq!(Window::decode(&bytes[..cut]), None);
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Window::decode(&bytes);
            let _ = Window::decode(&[&[VERSION], bytes.as_slice()].concat());
        }
    }
}
