//! A transaction as it travels in a log entry: what it read, at which version, and what it
//! writes. `docs/formats.md`, section "store transaction", is the specification.

use crate::{MAX_KEY_BYTES, MAX_TXN_BYTES, MAX_TXN_OPS, MAX_VALUE_BYTES, StoreError};
use std::collections::{BTreeMap, BTreeSet};

const RECORD_VERSION: u8 = 1;
const OP_DELETE: u8 = 0;
const OP_PUT: u8 = 1;

/// Everything that decides whether a transaction commits, and what it does then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TxnRecord {
    /// Log index of the snapshot that it read from.
    pub read_version: u64,
    pub keys: BTreeSet<Vec<u8>>,
    /// Half-open ranges, by their start and end.
    pub ranges: BTreeSet<(Vec<u8>, Vec<u8>)>,
    /// `None` deletes.
    pub writes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
}

impl TxnRecord {
    /// Bytes in the log.
    pub(crate) fn encoded_bytes(&self) -> usize {
        let keys: usize = self.keys.iter().map(|k| 4 + k.len()).sum();
        let ranges: usize = self.ranges.iter().map(|(a, b)| 8 + a.len() + b.len()).sum();
        let writes: usize =
            self.writes.iter().map(|(k, v)| 5 + k.len() + v.as_ref().map_or(0, |v| 4 + v.len())).sum();
        1 + 8 + 12 + keys + ranges + writes
    }

    pub(crate) fn ops(&self) -> usize {
        self.keys.len() + self.ranges.len() + self.writes.len()
    }

    pub(crate) fn check_size(&self) -> Result<(), StoreError> {
        let (ops, bytes) = (self.ops(), self.encoded_bytes());
        if ops > MAX_TXN_OPS || bytes > MAX_TXN_BYTES {
            return Err(StoreError::TxnTooLarge { ops, bytes });
        }
        Ok(())
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_bytes());
        out.push(RECORD_VERSION);
        out.extend_from_slice(&self.read_version.to_le_bytes());
        for count in [self.keys.len(), self.ranges.len(), self.writes.len()] {
            out.extend_from_slice(&(count as u32).to_le_bytes());
        }
        for key in &self.keys {
            put_bytes(&mut out, key);
        }
        for (from, to) in &self.ranges {
            put_bytes(&mut out, from);
            put_bytes(&mut out, to);
        }
        for (key, value) in &self.writes {
            out.push(if value.is_some() { OP_PUT } else { OP_DELETE });
            put_bytes(&mut out, key);
            if let Some(value) = value {
                put_bytes(&mut out, value);
            }
        }
        out
    }

    /// `None` if the bytes are not a transaction of a version known here.
    pub(crate) fn decode(mut bytes: &[u8]) -> Option<Self> {
        if bytes.len() > MAX_TXN_BYTES || take(&mut bytes, 1)?[0] != RECORD_VERSION {
            return None;
        }
        let mut record = TxnRecord {
            read_version: u64::from_le_bytes(take(&mut bytes, 8)?.try_into().ok()?),
            ..Default::default()
        };
        let (keys, ranges, writes) = (take_u32(&mut bytes)?, take_u32(&mut bytes)?, take_u32(&mut bytes)?);
        if keys.checked_add(ranges)?.checked_add(writes)? > MAX_TXN_OPS {
            return None;
        }
        for _ in 0..keys {
            record.keys.insert(take_bytes(&mut bytes, MAX_KEY_BYTES)?);
        }
        for _ in 0..ranges {
            // A range's end may be a key's successor, one byte longer than the longest key.
            let from = take_bytes(&mut bytes, MAX_KEY_BYTES + 1)?;
            let to = take_bytes(&mut bytes, MAX_KEY_BYTES + 1)?;
            if from >= to {
                return None;
            }
            record.ranges.insert((from, to));
        }
        for _ in 0..writes {
            let op = take(&mut bytes, 1)?[0];
            let key = take_bytes(&mut bytes, MAX_KEY_BYTES)?;
            let value = match op {
                OP_DELETE => None,
                OP_PUT => Some(take_bytes(&mut bytes, MAX_VALUE_BYTES)?),
                _ => return None,
            };
            record.writes.insert(key, value);
        }
        bytes.is_empty().then_some(record)
    }
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

pub(crate) fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(head)
}

pub(crate) fn take_u32(bytes: &mut &[u8]) -> Option<usize> {
    Some(u32::from_le_bytes(take(bytes, 4)?.try_into().ok()?) as usize)
}

pub(crate) fn take_bytes(bytes: &mut &[u8], most: usize) -> Option<Vec<u8>> {
    let n = take_u32(bytes)?;
    if n > most {
        return None;
    }
    Some(take(bytes, n)?.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::{btree_map, btree_set, vec};
    use proptest::prelude::*;

    fn sample() -> TxnRecord {
        TxnRecord {
            read_version: 0x0102,
            keys: [b"k".to_vec()].into(),
            ranges: [(b"a".to_vec(), b"b".to_vec())].into(),
            writes: [(b"x".to_vec(), None), (b"y".to_vec(), Some(b"z".to_vec()))].into(),
        }
    }

    #[test]
    fn golden_bytes() {
        let hex: String = sample().encode().iter().map(|b| format!("{b:02x}")).collect();
        let wanted = [
            "01",                       // version
            "0201000000000000",         // read version
            "010000000100000002000000", // counts: keys, ranges, writes
            "010000006b",               // key read
            "01000000610100000062",     // range read
            "000100000078",             // delete x
            "010100000079",             // put y ...
            "010000007a",               // ... z
        ]
        .concat();
        assert_eq!(hex, wanted);
        assert_eq!(TxnRecord::decode(&sample().encode()), Some(sample()));
        assert_eq!(sample().encode().len(), sample().encoded_bytes());
    }

    fn key() -> impl Strategy<Value = Vec<u8>> {
        vec(any::<u8>(), 1..6)
    }

    prop_compose! {
        fn record()(
            read_version in any::<u64>(),
            keys in btree_set(key(), 0..4),
            starts in btree_map(key(), vec(any::<u8>(), 1..3), 0..3),
            writes in btree_map(key(), proptest::option::of(vec(any::<u8>(), 0..9)), 0..4),
        ) -> TxnRecord {
            let ranges = starts.into_iter().map(|(from, more)| {
                let to = [from.clone(), more].concat();
                (from, to)
            }).collect();
            TxnRecord { read_version, keys, ranges, writes }
        }
    }

    proptest! {
        #[test]
        fn records_round_trip(record in record()) {
            let bytes = record.encode();
            prop_assert_eq!(bytes.len(), record.encoded_bytes());
            prop_assert_eq!(TxnRecord::decode(&bytes), Some(record));
        }

        #[test]
        fn damaged_records_are_read_without_panic(
            record in record(), at in any::<proptest::sample::Index>(), to in any::<u8>(), cut in any::<proptest::sample::Index>(),
        ) {
            let mut bytes = record.encode();
            let at = at.index(bytes.len());
            bytes[at] = to;
            let _ = TxnRecord::decode(&bytes);
            let cut = cut.index(bytes.len());
            prop_assert_eq!(TxnRecord::decode(&record.encode()[..cut]), None);
        }
    }
}
