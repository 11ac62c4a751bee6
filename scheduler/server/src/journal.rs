//! The core's records in the store.
//!
//! ```text
//! scheduler/v1/job/     <id u64 BE> <part u16 BE>   JSON of the job, cut into parts
//! scheduler/v1/node/    <id u32 BE> <part u16 BE>   JSON of the node
//! scheduler/v1/account/ <user> <part u16 BE>        JSON of what the user's removed jobs used
//! scheduler/v1/window/  <id u32 BE> <part u16 BE>   JSON of the maintenance window
//! ```
//!
//! Jobs with thousands of ranks are larger than one value may be, hence the parts.

use crate::error::SchedulerError;
use firefly_store::{Kv, StoreError};
use scheduler_core::Record;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

const JOB: &[u8] = b"scheduler/v1/job/";
const NODE: &[u8] = b"scheduler/v1/node/";
const ACCOUNT: &[u8] = b"scheduler/v1/account/";
const WINDOW: &[u8] = b"scheduler/v1/window/";
/// Bytes of one part: half of what a value may have.
const PART_BYTES: usize = firefly_store::MAX_VALUE_BYTES / 2;
/// Pairs read at a time while loading.
const PAGE: usize = 256;

/// The records' store.
pub(crate) struct Journal {
    kv: Arc<dyn Kv>,
    /// Parts that each key has now, so that a shorter record removes what it no longer covers.
    parts: HashMap<Vec<u8>, usize>,
}

impl Journal {
    /// Opens the journal and reads everything in it.
    pub(crate) fn load(kv: Arc<dyn Kv>) -> Result<(Self, Vec<Record>), SchedulerError> {
        let mut values: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut parts: HashMap<Vec<u8>, usize> = HashMap::new();
        for prefix in [JOB, NODE, ACCOUNT, WINDOW] {
            let end = successor(prefix);
            let mut from = prefix.to_vec();
            loop {
                // A new snapshot per page is sound: nobody else writes here.
                let page = kv.begin().snapshot_range(&from, &end, PAGE)?;
                let Some((last, _)) = page.last() else { break };
                from.clone_from(last);
                from.push(0);
                for (key, value) in page {
                    let record = key[..key.len().saturating_sub(2)].to_vec();
                    values.entry(record.clone()).or_default().extend(value);
                    *parts.entry(record).or_default() += 1;
                }
            }
        }
        let mut records = Vec::with_capacity(values.len());
        for (key, value) in values {
            let record = serde_json::from_slice(&value)
                .map_err(|e| SchedulerError::Damaged(format!("{}: {e}", key.escape_ascii())))?;
            records.push(record);
        }
        Ok((Self { kv, parts }, records))
    }

    /// Makes the records durable, all or none. Later records of one key replace earlier ones.
    pub(crate) async fn commit(&mut self, records: Vec<Record>) -> Result<(), StoreError> {
        let mut txn = self.kv.begin();
        let mut latest: BTreeMap<Vec<u8>, Option<Record>> = BTreeMap::new();
        for record in records {
            let (prefix, id) = match &record {
                Record::Job(job) => (JOB, job.id.0.to_be_bytes().to_vec()),
                Record::RemoveJob(id) => (JOB, id.0.to_be_bytes().to_vec()),
                Record::Node(node) => (NODE, node.id.0.to_be_bytes().to_vec()),
                Record::Account(account) => (ACCOUNT, account.user.as_bytes().to_vec()),
                Record::Maintenance(window) => (WINDOW, window.id.to_be_bytes().to_vec()),
                Record::RemoveMaintenance(id) => (WINDOW, id.to_be_bytes().to_vec()),
            };
            let removes = matches!(record, Record::RemoveJob(_) | Record::RemoveMaintenance(_));
            latest.insert([prefix, &id].concat(), (!removes).then_some(record));
        }
        for (key, record) in latest {
            let part_key = |part: usize| {
                [key.as_slice(), &u16::try_from(part).unwrap_or(u16::MAX).to_be_bytes()].concat()
            };
            let bytes = match &record {
                Some(record) => serde_json::to_vec(record)
                    .map_err(|e| StoreError::Failed(format!("a record cannot be encoded: {e}")))?,
                None => Vec::new(),
            };
            let mut count = 0;
            for part in bytes.chunks(PART_BYTES) {
                txn.put(&part_key(count), part);
                count += 1;
            }
            for stale in count..self.parts.get(&key).copied().unwrap_or(0) {
                txn.delete(&part_key(stale));
            }
            if count == 0 {
                self.parts.remove(&key);
            } else {
                self.parts.insert(key, count);
            }
        }
        txn.commit().await.map(|_| ())
    }
}

/// The first key after all that begin with `prefix`.
fn successor(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    // The prefixes end in '/', which has a successor.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use firefly_store::MemKv;
    use firefly_types::{JobId, Nanos};
    use scheduler_core::{Answer, Core, Decision, Event, JobSpec, Now, Policy};

    fn submitted(nodes: u32, name: &str) -> Core {
        let mut core = Core::new(Policy::default());
        let spec = JobSpec {
            name: name.into(),
            command: vec!["x".into()],
            nodes,
            ranks_per_node: 1,
            env: [("A".to_owned(), "\u{1}".repeat(60_000))].into(),
            ..JobSpec::default()
        };
        let now = Now { mono: Nanos(1), unix_ms: 1 };
        let decisions = core.step(Event::Submit { spec, key: "k".into() }, now);
        assert!(matches!(decisions.last(), Some(Decision::Answer(Answer::Job(JobId(1))))));
        core
    }

    /// The durable part: what a restart makes anew (points on the monotonic clock) is left out.
    fn durable(records: &[Record]) -> Vec<Record> {
        serde_json::from_str(&serde_json::to_string(records).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn records_come_back_whole_whatever_their_size() {
        let kv: Arc<dyn Kv> = Arc::new(MemKv::new());
        let (mut journal, records) = Journal::load(kv.clone()).unwrap();
        assert!(records.is_empty());
        let core = submitted(1, "a");
        journal.commit(core.records()).await.unwrap();
        let (_, back) = Journal::load(kv.clone()).unwrap();
        assert_eq!(back, durable(&core.records()));
        // A record of several parts, then a short one in its place, then none.
        let mut large = core.records();
        if let Record::Job(job) = &mut large[0] {
            job.reason = "r".repeat(3 * PART_BYTES);
        }
        journal.commit(large.clone()).await.unwrap();
        assert_eq!(Journal::load(kv.clone()).unwrap().1, durable(&large));
        journal.commit(core.records()).await.unwrap();
        assert_eq!(Journal::load(kv.clone()).unwrap().1, durable(&core.records()));
        journal.commit(vec![Record::RemoveJob(JobId(1))]).await.unwrap();
        assert!(Journal::load(kv).unwrap().1.is_empty());
    }
}
