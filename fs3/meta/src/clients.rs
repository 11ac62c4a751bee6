//! Clients that are not heard of any more: their sessions are closed, so that files without a name
//! go, and their exactly-once records are removed.
//!
//! When a client was last heard of is kept in memory only. After a restart every client counts as
//! heard of just then: it is given up later than it could be, never earlier.

use crate::error::MetaError;
use crate::gate;
use crate::meta::{Meta, running};
use crate::op::PAGE;
use crate::perm::Cred;
use crate::schema::{ClientRecord, InodeRecord, LaneRecord, SessionRecord, Usage, keys};
use firefly_store::{Txn, transact};
use firefly_types::{ClientId, InodeId, Nanos};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Sessions closed in one transaction at most: each may take a file's thousands of attributes with
/// it, and a transaction has at most 65,536 keys.
const STEP: usize = 8;

/// When each client was last heard of.
pub(crate) struct LastSeen {
    opened: Nanos,
    by_client: Mutex<HashMap<ClientId, Nanos>>,
}

impl LastSeen {
    /// A server that starts at `now`.
    pub(crate) fn new(now: Nanos) -> Self {
        Self { opened: now, by_client: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ClientId, Nanos>> {
        self.by_client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client has been heard of.
    pub(crate) fn note(&self, client: ClientId, now: Nanos) {
        self.lock().insert(client, now);
    }

    fn silent_for(&self, client: ClientId, now: Nanos) -> Duration {
        now.since(self.lock().get(&client).copied().unwrap_or(self.opened))
    }

    fn forget(&self, client: ClientId) {
        self.lock().remove(&client);
    }
}

impl Meta {
    /// Gives up every client that was not heard of for `timeout`, and finishes what an earlier
    /// call had begun. Returns how many clients were given up.
    pub async fn expire_clients(&self, timeout: Duration) -> Result<usize, MetaError> {
        let now = self.clock.monotonic();
        let mut expired = 0;
        let (mut from, to) = keys::clients();
        loop {
            let page = self.kv.begin().range(&from, &to, PAGE)?;
            let Some((last, _)) = page.last() else { return Ok(expired) };
            from = keys::after(last);
            for (key, value) in &page {
                let (client, record) = (keys::client_id(key)?, ClientRecord::decode(value)?);
                let alive = record.epoch > record.expired_through;
                if alive && self.seen.silent_for(client, now) >= timeout {
                    self.expire(client, record.epoch).await?;
                    expired += 1;
                } else if record.drained_through < record.expired_through {
                    self.drain(client, record.expired_through).await?;
                }
            }
        }
    }

    /// Gives `client` up: requests under `epoch` and older ones are refused from now on.
    async fn expire(&self, client: ClientId, epoch: u64) -> Result<(), MetaError> {
        tracing::info!(%client, epoch, "giving up a client that was not heard of");
        transact(self.kv.as_ref(), |tx| {
            let mut record = read_client(tx, client)?;
            record.expired_through = record.expired_through.max(epoch);
            tx.put(&keys::client(client), &record.encode());
            Ok::<_, MetaError>(())
        })
        .await?;
        self.seen.forget(client);
        self.drain(client, epoch).await
    }

    /// Removes what sessions up to `epoch` have left, in bounded steps.
    async fn drain(&self, client: ClientId, epoch: u64) -> Result<(), MetaError> {
        while self.close_some(client, epoch).await? {}
        while self.drop_lanes(client, epoch).await? {}
        transact(self.kv.as_ref(), |tx| {
            let mut record = read_client(tx, client)?;
            record.drained_through = record.drained_through.max(epoch);
            tx.put(&keys::client(client), &record.encode());
            Ok::<_, MetaError>(())
        })
        .await
    }

    /// Closes some sessions; true if there may be more.
    async fn close_some(&self, client: ClientId, epoch: u64) -> Result<bool, MetaError> {
        let cred = Cred { uid: 0, gid: 0, groups: Vec::new() };
        let (from, to) = keys::client_sessions(client);
        let mut after = from.clone();
        loop {
            // Sessions of a newer epoch stay, so the scan steps over them.
            let page = self.kv.begin().range(&after, &to, STEP)?;
            let Some((last, _)) = page.last() else { return Ok(false) };
            after = keys::after(last);
            let (closed, garbage) = transact(self.kv.as_ref(), |tx| {
                let mut op = running(tx, &cred, client, epoch, self.clock.tick());
                let mut closed = 0;
                for (key, value) in &page {
                    let session = keys::client_session_id(key)?;
                    let inode = value.as_slice().try_into().map(u64::from_be_bytes).map(InodeId);
                    let inode = inode.map_err(|_| MetaError::Corrupt {
                        what: "client's session",
                        why: format!("{} bytes", value.len()),
                    })?;
                    let Some(bytes) = op.tx.get(&keys::session(inode, session))? else { continue };
                    if SessionRecord::decode(&bytes)?.epoch > epoch {
                        continue;
                    }
                    let Some(bytes) = op.tx.get(&keys::inode(inode))? else { continue };
                    op.close_session(&InodeRecord::decode(inode, &bytes)?, client, session)?;
                    closed += 1;
                }
                let (usage, garbage) = (op.usage, op.made_garbage);
                gate::add_usage(tx, &keys::usage_base(), usage)?;
                Ok::<_, MetaError>((closed, garbage))
            })
            .await?;
            if garbage {
                self.garbage.notify_one();
            }
            if closed > 0 {
                tracing::debug!(%client, closed, "closed sessions of a client that was given up");
            }
        }
    }

    /// Removes some exactly-once records and folds the lanes' counts into the base; true if there
    /// may be more.
    async fn drop_lanes(&self, client: ClientId, epoch: u64) -> Result<bool, MetaError> {
        transact(self.kv.as_ref(), |tx| {
            let (from, to) = keys::lanes(client);
            let mut removed = 0;
            for (key, value) in tx.range(&from, &to, PAGE)? {
                if LaneRecord::decode(&value)?.epoch > epoch {
                    continue;
                }
                tx.delete(&key);
                removed += 1;
            }
            let (from, to) = keys::client_usages(client);
            let mut folded = Usage::default();
            for (key, value) in tx.range(&from, &to, PAGE)? {
                folded = folded.plus(Usage::decode(&value)?);
                tx.delete(&key);
                removed += 1;
            }
            gate::add_usage(tx, &keys::usage_base(), folded)?;
            Ok(removed >= PAGE)
        })
        .await
    }
}

fn read_client(tx: &mut Txn, client: ClientId) -> Result<ClientRecord, MetaError> {
    Ok(match tx.get(&keys::client(client))? {
        Some(bytes) => ClientRecord::decode(&bytes)?,
        None => ClientRecord::default(),
    })
}
