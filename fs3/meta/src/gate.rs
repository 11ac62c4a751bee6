//! What every request passes before its operation runs, inside the same transaction: fencing by
//! session and attempt epochs, and the exactly-once record of its lane.

use crate::caller::Caller;
use crate::error::MetaError;
use crate::schema::{ClientRecord, LaneRecord, LaneReply, Usage, keys};
use firefly_store::Txn;

/// What is known of a client; nothing yet is the zero record.
pub(crate) fn client_record(tx: &mut Txn, caller: &Caller) -> Result<ClientRecord, MetaError> {
    Ok(match tx.get(&keys::client(caller.client))? {
        Some(bytes) => ClientRecord::decode(&bytes)?,
        None => ClientRecord::default(),
    })
}

/// Refuses an older session epoch of the client and an older attempt of the job. Of a change,
/// newer ones are noted, so that from its commit on the older are refused.
pub(crate) fn pass(tx: &mut Txn, caller: &Caller, is_change: bool) -> Result<(), MetaError> {
    let mut client = client_record(tx, caller)?;
    let known = client.lowest_epoch();
    if caller.epoch < known {
        return Err(MetaError::StaleEpoch { client: caller.client, got: caller.epoch, known });
    }
    if is_change && caller.epoch > client.epoch {
        client.epoch = caller.epoch;
        tx.put(&keys::client(caller.client), &client.encode());
    }
    let Some((job, got)) = caller.attempt else { return Ok(()) };
    let key = keys::job(job);
    let known = match tx.get(&key)? {
        Some(bytes) => bytes.as_slice().try_into().map(u32::from_be_bytes).map_err(|_| {
            MetaError::Corrupt { what: "job's attempt", why: format!("{} bytes", bytes.len()) }
        })?,
        None => 0,
    };
    if got < known {
        return Err(MetaError::StaleAttempt { job, got, known });
    }
    if is_change && got > known {
        tx.put(&key, &got.to_be_bytes());
    }
    Ok(())
}

/// What the lane says about a change.
pub(crate) enum Lane {
    /// It is new: execute it.
    New,
    /// It was executed: this was the outcome.
    Done(LaneReply),
}

/// Looks the request up on its lane.
pub(crate) fn lane(tx: &mut Txn, caller: &Caller, method: u16) -> Result<Lane, MetaError> {
    let Some(bytes) = tx.get(&keys::lane(caller.client, caller.channel))? else { return Ok(Lane::New) };
    let last = LaneRecord::decode(&bytes)?;
    if caller.sequence > last.sequence {
        return Ok(Lane::New);
    }
    if caller.sequence < last.sequence {
        return Err(MetaError::StaleSequence {
            client: caller.client,
            channel: caller.channel,
            got: caller.sequence,
            known: last.sequence,
        });
    }
    if method != last.method {
        return Err(MetaError::Invalid(format!(
            "sequence {} of channel {} was used for method {:#06x} before, and is for {method:#06x} now",
            caller.sequence, caller.channel, last.method
        )));
    }
    Ok(Lane::Done(last.reply))
}

/// Notes the outcome; commits with the request's effects.
pub(crate) fn record(tx: &mut Txn, caller: &Caller, method: u16, reply: LaneReply) {
    let record = LaneRecord { epoch: caller.epoch, sequence: caller.sequence, method, reply };
    tx.put(&keys::lane(caller.client, caller.channel), &record.encode());
}

/// Adds to the totals of `key`.
pub(crate) fn add_usage(tx: &mut Txn, key: &[u8], delta: Usage) -> Result<(), MetaError> {
    if delta == Usage::default() {
        return Ok(());
    }
    let old = match tx.get(key)? {
        Some(bytes) => Usage::decode(&bytes)?,
        None => Usage::default(),
    };
    tx.put(key, &old.plus(delta).encode());
    Ok(())
}
