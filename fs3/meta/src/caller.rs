//! Who asks: the part of every request that the door looks at first.

use crate::error::MetaError;
use crate::limits::{MAX_CHANNELS, MAX_GROUPS};
use crate::perm::Cred;
use firefly_proto::meta as wire;
use firefly_types::ClientId;

/// A caller that the door has looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Caller {
    pub(crate) client: ClientId,
    pub(crate) epoch: u64,
    pub(crate) channel: u32,
    pub(crate) sequence: u64,
    pub(crate) cred: Cred,
    /// The job and which attempt at it, if the client belongs to one.
    pub(crate) attempt: Option<(u64, u32)>,
}

impl Caller {
    /// Looks at what a request says about its sender.
    pub(crate) fn from_wire(caller: Option<wire::Caller>) -> Result<Self, MetaError> {
        let bad = |why: String| MetaError::Invalid(format!("the request's caller: {why}"));
        let caller = caller.ok_or_else(|| bad("absent".into()))?;
        if caller.client_id == 0 || caller.session_epoch == 0 {
            return Err(bad("client and session epoch are numbers above 0; open a session first".into()));
        }
        if caller.session_epoch == u64::MAX {
            return Err(bad("no session has this epoch".into()));
        }
        if caller.channel >= MAX_CHANNELS {
            return Err(bad(format!("channel {}, the limit is {MAX_CHANNELS}", caller.channel)));
        }
        if caller.groups.len() > MAX_GROUPS {
            return Err(bad(format!("{} groups, the limit is {MAX_GROUPS}", caller.groups.len())));
        }
        if caller.uid == u32::MAX || caller.gid == u32::MAX {
            return Err(bad("4294967295 is not the number of a user or a group".into()));
        }
        Ok(Self {
            client: ClientId(caller.client_id),
            epoch: caller.session_epoch,
            channel: caller.channel,
            sequence: caller.sequence,
            cred: Cred { uid: caller.uid, gid: caller.gid, groups: caller.groups },
            attempt: (caller.job_id != 0).then_some((caller.job_id, caller.attempt_epoch)),
        })
    }

    /// A change needs a number by which a retry is known.
    pub(crate) fn need_sequence(&self) -> Result<(), MetaError> {
        if self.sequence == 0 {
            return Err(MetaError::Invalid("a change without a sequence number: they start at 1".into()));
        }
        Ok(())
    }
}
