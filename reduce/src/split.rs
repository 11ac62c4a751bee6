//! A group out of a group: its ranks meet through the links that they have, not through a store.
//!
//! Two all-gathers of the parent: the first says who forms which group, and carries the seeds of their
//! secrets; the second carries what a store would hold, each rank's card. Every rank of the parent
//! takes part in both, whatever happens to it in between, so that no other rank waits for it in vain.

use crate::comm::{Communicator, Config};
use crate::options::Options;
use crate::store::{Store, StoreError};
use crate::{DType, Operation, ReduceError, Request, SubmitOptions};
use firefly_types::ClusterSecret;
use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Duration;

/// Bytes of a rank's entry in the second all-gather: a key and a card.
const ENTRY: usize = 8192;
/// Seed, and what names the group that the rank joins.
const FIRST: usize = 32 + 8;

/// FNV-1a, for comparing lists. Not for secrets.
fn hash(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

impl Communicator {
    /// Forms a group of `ranks` of this group, in that order: rank i of the new group is `ranks[i]`.
    ///
    /// Collective over this group: all its ranks call it, those that join no group with an empty
    /// `ranks`, for which the result is `None`. Ranks that name the same group must name the same
    /// list. Blocks up to `timeout`. The new group has this one's settings, and lives and fails apart
    /// from it; a rank that fails to join leaves its new group unformed, and this one whole.
    pub fn split(
        &self,
        name: &str,
        ranks: &[u32],
        timeout: Duration,
    ) -> Result<Option<Communicator>, ReduceError> {
        self.split_as(name, ranks, timeout, self.options())
    }

    /// Forms a group of the same ranks under other options, rank 0's; collective over this group.
    pub fn retuned(&self, name: &str, options: Options) -> Result<Communicator, ReduceError> {
        let everyone: Vec<u32> = (0..self.size()).collect();
        let formed = self.split_as(name, &everyone, self.config().timeout, options)?;
        Ok(formed.expect("every rank is in the list"))
    }

    fn split_as(
        &self,
        name: &str,
        ranks: &[u32],
        timeout: Duration,
        options: Options,
    ) -> Result<Option<Communicator>, ReduceError> {
        let parent = self.config();
        let position = ranks.iter().position(|&r| r == parent.rank);
        let mut seen = vec![false; parent.size as usize];
        let sound = ranks
            .iter()
            .all(|&r| seen.get_mut(r as usize).is_some_and(|seen| !std::mem::replace(seen, true)));
        // Said before anything is sent, but the others still get this rank's part.
        let wrong = if !sound {
            Some(format!("{ranks:?} is no list of different ranks of a group of {}", parent.size))
        } else if !ranks.is_empty() && position.is_none() {
            Some(format!(
                "rank {} is not among the ranks {ranks:?} of the group that it wants to join",
                parent.rank
            ))
        } else {
            None
        };
        let plan = if wrong.is_some() { 0 } else { plan_of(name, ranks) };
        let seed: [u8; 32] = rand::random();
        let mut first = [0; FIRST];
        first[..32].copy_from_slice(&seed);
        first[32..].copy_from_slice(&plan.to_le_bytes());
        let firsts = self.exchange(&first, timeout)?;
        let exchange = Exchange { parent: self, timeout, entries: RefCell::new(None) };
        let formed = match (wrong, position) {
            (Some(wrong), _) => Err(ReduceError::invalid(wrong)),
            (None, None) => Ok(None),
            (None, Some(position)) => agree(&firsts, ranks, plan).and_then(|()| {
                let secret = parent.secret.clone().unwrap_or_else(|| {
                    let leader = ranks[0] as usize * FIRST;
                    let mut seed = [0; 32];
                    seed.copy_from_slice(&firsts[leader..leader + 32]);
                    ClusterSecret::from_bytes(
                        ClusterSecret::from_bytes(seed).prove(&[b"reduce split v1", name.as_bytes()]),
                    )
                });
                let config = Config {
                    rank: position as u32,
                    size: ranks.len() as u32,
                    group: name.into(),
                    timeout: parent.timeout,
                    form_timeout: Some(timeout),
                    secret: Some(secret),
                    options: Some(options.clone()),
                    ..parent.clone()
                };
                Communicator::create(&config, &exchange).map(Some)
            }),
        };
        // A group of one needs no card, and who has failed before has sent none.
        let last = exchange.finish();
        let formed = formed?;
        last?;
        Ok(formed)
    }

    /// All ranks' `mine`, in rank order.
    fn exchange(&self, mine: &[u8], timeout: Duration) -> Result<Vec<u8>, ReduceError> {
        let mut all = vec![0u8; mine.len() * self.size() as usize];
        let input = [crate::RawBuf { ptr: mine.as_ptr().cast_mut(), count: mine.len() }];
        let output = [crate::RawBuf { ptr: all.as_mut_ptr(), count: all.len() }];
        let request =
            Request { operation: Operation::AllGather, dtype: DType::U8, input: &input, output: &output };
        let options = SubmitOptions { inline: true, wait_follows: true, timeout: Some(timeout) };
        // SAFETY: both buffers live until wait() has returned, and nobody else touches them.
        unsafe { self.submit(&request, options, None) }?.wait()?;
        Ok(all)
    }
}

/// What names a group in the making; 0 is none.
fn plan_of(name: &str, ranks: &[u32]) -> u64 {
    if ranks.is_empty() {
        return 0;
    }
    hash(name.bytes().chain([0]).chain(ranks.iter().flat_map(|r| r.to_le_bytes()))).max(1)
}

/// Whether all of `ranks` want this group.
fn agree(firsts: &[u8], ranks: &[u32], plan: u64) -> Result<(), ReduceError> {
    let others: Vec<String> = ranks
        .iter()
        .filter(|&&r| {
            let at = r as usize * FIRST + 32;
            firsts[at..at + 8] != plan.to_le_bytes()
        })
        .map(u32::to_string)
        .collect();
    if others.is_empty() {
        return Ok(());
    }
    Err(ReduceError::Mismatch {
        detail: format!(
            "ranks disagree about a split: a group of the ranks {ranks:?} is to be formed, but not by ranks {}; all \
             ranks of a new group must give the same name and list",
            others.join(", ")
        ),
    })
}

/// The store of a split: what is set goes to all ranks of the parent at once.
struct Exchange<'a> {
    parent: &'a Communicator,
    timeout: Duration,
    entries: RefCell<Option<HashMap<String, Vec<u8>>>>,
}

impl Exchange<'_> {
    fn send(&self, key: &str, value: &[u8]) -> Result<(), ReduceError> {
        let mut entry = vec![0; ENTRY];
        let (k, v) = (key.len(), value.len());
        if 4 + k + v > ENTRY {
            return Err(ReduceError::invalid(format!("a card of {v} bytes is too long for a split")));
        }
        entry[..2].copy_from_slice(&(k as u16).to_le_bytes());
        entry[2..4].copy_from_slice(&(v as u16).to_le_bytes());
        entry[4..4 + k].copy_from_slice(key.as_bytes());
        entry[4 + k..4 + k + v].copy_from_slice(value);
        let all = self.parent.exchange(&entry, self.timeout)?;
        *self.entries.borrow_mut() = Some(all.chunks_exact(ENTRY).filter_map(decode).collect());
        Ok(())
    }

    /// Takes part with nothing, if this rank has not yet.
    fn finish(&self) -> Result<(), ReduceError> {
        if self.entries.borrow().is_some() {
            return Ok(());
        }
        self.send("", &[])
    }
}

fn decode(entry: &[u8]) -> Option<(String, Vec<u8>)> {
    let len = |at: usize| usize::from(u16::from_le_bytes([entry[at], entry[at + 1]]));
    let (k, v) = (len(0), len(2));
    let key = std::str::from_utf8(entry.get(4..4 + k)?).ok()?;
    let value = entry.get(4 + k..4 + k + v)?;
    (!key.is_empty()).then(|| (key.to_owned(), value.to_owned()))
}

impl Store for Exchange<'_> {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.send(key, value).map_err(|e| StoreError::Failed(e.to_string()))
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        let entries = self.entries.borrow();
        let found = entries.as_ref().and_then(|entries| entries.get(key));
        found.cloned().ok_or_else(|| StoreError::Timeout { key: key.into(), waited: timeout })
    }
}
