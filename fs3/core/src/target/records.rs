//! Exactly-once records and the epochs seen: what makes retries and old sessions harmless.

use super::types::Context;
use firefly_types::{AttemptEpoch, ClientId, ErrorKind, JobId, SessionEpoch, WireError};
use std::collections::BTreeMap;

/// What the last update on one (client, channel) led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// Its sequence number.
    pub sequence: u64,
    /// The version that it created.
    pub version: u64,
    /// The chunk's length after it.
    pub length: u32,
}

/// A part of the table, as it travels to a target that is being filled and as it is stored.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RecordPage {
    /// (client, channel) → last update.
    pub channels: Vec<(ClientId, u32, Record)>,
    /// Newest session epoch seen of each client.
    pub sessions: Vec<(ClientId, SessionEpoch)>,
    /// Newest attempt epoch seen of each job.
    pub attempts: Vec<(JobId, AttemptEpoch)>,
    /// No removed chunk had a higher version: new chunks start above it.
    pub version_floor: u64,
}

/// The table. Ordered maps, so that a simulation replays.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Records {
    channels: BTreeMap<(ClientId, u32), Record>,
    sessions: BTreeMap<ClientId, SessionEpoch>,
    attempts: BTreeMap<JobId, AttemptEpoch>,
}

impl Records {
    /// Refuses a request of an older session or job attempt than was seen, and remembers newer ones.
    pub fn admit(&mut self, context: &Context) -> Result<(), WireError> {
        if context.client.0 != 0 {
            let seen = self.sessions.entry(context.client).or_default();
            if context.session_epoch < *seen {
                return Err(WireError::new(
                    ErrorKind::Stale,
                    format!(
                        "session {} of client {} was replaced by {seen}: open a new session",
                        context.session_epoch, context.client
                    ),
                ));
            }
            *seen = context.session_epoch;
        }
        if context.job.0 != 0 {
            let seen = self.attempts.entry(context.job).or_default();
            if context.attempt < *seen {
                return Err(WireError::new(
                    ErrorKind::Stale,
                    format!(
                        "attempt {} of job {} was replaced by {seen}: this process must end",
                        context.attempt, context.job
                    ),
                ));
            }
            *seen = context.attempt;
        }
        Ok(())
    }

    /// Remembers epochs without judging: what a predecessor forwards has been admitted by the head.
    pub fn observe(&mut self, context: &Context) {
        if context.client.0 != 0 {
            let seen = self.sessions.entry(context.client).or_default();
            *seen = context.session_epoch.max(*seen);
        }
        if context.job.0 != 0 {
            let seen = self.attempts.entry(context.job).or_default();
            *seen = context.attempt.max(*seen);
        }
    }

    /// The record of the request's lane.
    pub fn get(&self, context: &Context) -> Option<Record> {
        self.channels.get(&(context.client, context.channel)).copied()
    }

    /// Notes that the request took effect. Never goes back: a client that gave up on one request
    /// may have moved on before it took effect.
    pub fn commit(&mut self, context: &Context, version: u64, length: u32) {
        self.observe(context);
        if context.client.0 == 0 {
            return;
        }
        let record = Record { sequence: context.sequence, version, length };
        self.merge_channel(context.client, context.channel, record);
    }

    fn merge_channel(&mut self, client: ClientId, channel: u32, record: Record) {
        let slot = self.channels.entry((client, channel)).or_insert(record);
        if record.sequence >= slot.sequence {
            *slot = record;
        }
    }

    /// Takes over a page; newer entries win.
    pub fn merge(&mut self, page: &RecordPage) {
        for (client, channel, record) in &page.channels {
            self.merge_channel(*client, *channel, *record);
        }
        for (client, epoch) in &page.sessions {
            let seen = self.sessions.entry(*client).or_default();
            *seen = (*epoch).max(*seen);
        }
        for (job, attempt) in &page.attempts {
            let seen = self.attempts.entry(*job).or_default();
            *seen = (*attempt).max(*seen);
        }
    }

    /// Everything, in pages of at most `limit` entries; at least one page.
    pub fn pages(&self, limit: usize, version_floor: u64) -> Vec<RecordPage> {
        let mut pages = vec![RecordPage { version_floor, ..RecordPage::default() }];
        let mut room = limit;
        let mut slot = |pages: &mut Vec<RecordPage>| {
            if room == 0 {
                pages.push(RecordPage { version_floor, ..RecordPage::default() });
                room = limit;
            }
            room -= 1;
            pages.len() - 1
        };
        for ((client, channel), record) in &self.channels {
            let i = slot(&mut pages);
            pages[i].channels.push((*client, *channel, *record));
        }
        for (client, epoch) in &self.sessions {
            let i = slot(&mut pages);
            pages[i].sessions.push((*client, *epoch));
        }
        for (job, attempt) in &self.attempts {
            let i = slot(&mut pages);
            pages[i].attempts.push((*job, *attempt));
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_carry_everything_and_old_entries_lose() {
        let mut records = Records::default();
        for n in 1..=5u64 {
            let context = Context {
                client: ClientId(n),
                session_epoch: SessionEpoch(n),
                channel: 0,
                sequence: n,
                attempt: AttemptEpoch(1),
                job: JobId(n),
            };
            records.commit(&context, n, 0);
        }
        let pages = records.pages(4, 9);
        assert_eq!(pages.len(), 4);
        let mut copy = Records::default();
        for page in &pages {
            copy.merge(page);
        }
        assert_eq!(copy, records);
        let old = Record { sequence: 1, version: 1, length: 0 };
        copy.merge(&RecordPage { channels: vec![(ClientId(5), 0, old)], ..RecordPage::default() });
        assert_eq!(copy, records);
    }
}
