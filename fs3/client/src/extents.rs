//! Written bytes of one chunk that are not on storage yet: a map of disjoint, non-adjacent ranges.
//! Pure.

use std::collections::BTreeMap;

/// Disjoint ranges, by their start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extents {
    ranges: BTreeMap<u32, Vec<u8>>,
    bytes: usize,
}

impl Extents {
    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &[u8])> {
        self.ranges.iter().map(|(start, data)| (*start, data.as_slice()))
    }

    /// Where the last range ends.
    pub(crate) fn end(&self) -> u64 {
        self.ranges.last_key_value().map_or(0, |(start, data)| u64::from(*start) + data.len() as u64)
    }

    /// Longest range, bytes.
    pub(crate) fn longest(&self) -> usize {
        // Writers are mostly sequential, so there is mostly one range.
        self.ranges.values().map(Vec::len).max().unwrap_or(0)
    }

    /// Puts `data` at `start`, over whatever was there.
    pub(crate) fn insert(&mut self, start: u32, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let end = start as usize + data.len();
        // The range that begins at or before us may reach or overlap us: extend it in place, which
        // makes a sequential writer's append cheap.
        if let Some((&before, held)) = self.ranges.range_mut(..=start).next_back() {
            let at = (start - before) as usize;
            if at <= held.len() {
                let old = held.len();
                let overlap = data.len().min(old - at);
                held[at..at + overlap].copy_from_slice(&data[..overlap]);
                held.extend_from_slice(&data[overlap..]);
                self.bytes += held.len() - old;
                if held.len() > old {
                    self.absorb_followers(before);
                }
                return;
            }
        }
        self.bytes += data.len();
        self.ranges.insert(start, data.to_vec());
        debug_assert!(end <= u32::MAX as usize + 1);
        self.absorb_followers(start);
    }

    /// Merges into the range at `start` those that it now overlaps or touches; its bytes are newer.
    fn absorb_followers(&mut self, start: u32) {
        let Some(mut held) = self.ranges.remove(&start) else { return };
        while let Some((&next, _)) = self.ranges.range(start..).next() {
            let end = start as usize + held.len();
            if next as usize > end {
                break;
            }
            if let Some(follower) = self.ranges.remove(&next) {
                let covered = end - next as usize;
                if follower.len() > covered {
                    held.extend_from_slice(&follower[covered..]);
                }
                self.bytes -= covered.min(follower.len());
            }
        }
        self.ranges.insert(start, held);
    }

    /// The parts of `start .. start + len` that are held: where each begins, and its bytes.
    pub(crate) fn cut(&self, start: u32, len: u32) -> impl Iterator<Item = (u32, &[u8])> {
        let end = u64::from(start) + u64::from(len);
        let first = self.ranges.range(..=start).next_back().map_or(start, |(s, _)| *s);
        self.ranges.range(first..).take_while(move |(at, _)| u64::from(**at) < end).filter_map(
            move |(&at, data)| {
                let from = at.max(start);
                let to = (u64::from(at) + data.len() as u64).min(end);
                (u64::from(from) < to)
                    .then(|| (from, &data[(from - at) as usize..(to - u64::from(at)) as usize]))
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a flat array: after any writes, cut shows exactly the newest bytes, and
        /// ranges are disjoint, non-adjacent and counted.
        #[test]
        fn extents_are_the_newest_bytes(
            writes in prop::collection::vec((0u32..200, 1usize..60), 1..40),
            probe in 0u32..200, probe_len in 1usize..100,
        ) {
            let mut model: Vec<Option<u8>> = vec![None; 400];
            let mut extents = Extents::default();
            for (nth, (start, len)) in writes.iter().enumerate() {
                let data = vec![nth as u8 + 1; *len];
                extents.insert(*start, &data);
                for cell in &mut model[*start as usize..*start as usize + len] {
                    *cell = Some(nth as u8 + 1);
                }
            }
            let mut out = vec![0xEE; probe_len];
            for (at, bytes) in extents.cut(probe, probe_len as u32) {
                out[(at - probe) as usize..][..bytes.len()].copy_from_slice(bytes);
            }
            let expected: Vec<u8> =
                model[probe as usize..probe as usize + probe_len].iter().map(|c| c.unwrap_or(0xEE)).collect();
            prop_assert_eq!(out, expected);
            prop_assert_eq!(extents.bytes(), model.iter().flatten().count());
            let mut last_end = None;
            for (start, data) in extents.iter() {
                prop_assert!(last_end.is_none_or(|end| (start as usize) > end));
                last_end = Some(start as usize + data.len());
            }
        }
    }
}
