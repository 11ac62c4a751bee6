//! What the machine keeps: options, roles, and the chunks that something is going on with.

use super::types::*;
use firefly_types::{ChainVersion, Nanos, TargetId, WireError};
use std::collections::VecDeque;
use std::time::Duration;

/// Planted bugs, so that the simulator can prove that its checkers see them. Never set in a server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutation {
    /// The tail commits without the prefix-durable token.
    OmitToken,
    /// Exactly-once records are kept in memory only.
    VolatileRecords,
    /// The head commits and answers without waiting for its successor.
    CommitBeforeSuccessor,
    /// Requests are served after the lease has run out.
    IgnoreLease,
    /// A tail serves the committed version though the pending one may have been committed.
    ServeUnresolved,
    /// A tail serves what a target that it fills may have replaced, being promoted meanwhile.
    ServeHandedOver,
    /// Filling a target leaves out chunks that were pending when it began.
    FillOmitsPending,
}

/// Limits and intervals.
#[derive(Clone, Copy, Debug)]
pub struct TargetOptions {
    /// Updates that may wait for one chunk. More are refused as busy: memory is bounded, and a
    /// client that queues deeper gains nothing.
    pub queue: usize,
    /// Delay before a failed forward or copy is tried again.
    pub retry: Duration,
    /// Age at which a pending update that nobody mentions is asked about.
    pub resolve: Duration,
    /// Chunks in flight to a target that is being filled. Few: client traffic comes first.
    pub copies: usize,
    /// How often the driver sends [`Event::Tick`].
    pub tick: Duration,
    /// For the simulator's negative controls.
    pub mutation: Option<Mutation>,
}

impl Default for TargetOptions {
    fn default() -> Self {
        Self {
            queue: 64,
            retry: Duration::from_millis(100),
            resolve: Duration::from_millis(500),
            copies: 4,
            tick: Duration::from_millis(25),
            mutation: None,
        }
    }
}

/// How far the update has gone down the chain under the current membership.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Out {
    Idle,
    /// Its whole content is being read, to be forwarded.
    Reading(u64),
    Sent(Stamp),
    Failed(Nanos),
}

pub(super) struct Pending<B> {
    pub(super) base: u64,
    pub(super) version: u64,
    pub(super) context: Context,
    pub(super) removes: bool,
    /// `None` after a restart: only the content is known then.
    pub(super) update: Option<Update<B>>,
    /// Committed when durable: this target is being filled.
    pub(super) at_once: bool,
    pub(super) write: Option<u64>,
    pub(super) written: Option<Meta>,
    /// The token: durable on all predecessors, whose state of the chunk is given.
    pub(super) prefix: Option<Meta>,
    /// The token went on from here, so somebody further down may have committed.
    pub(super) passed: bool,
    /// As above under an earlier membership or before a restart. While this holds, a tail can
    /// serve neither the old nor the new version.
    pub(super) may_be_committed: bool,
    pub(super) stamp_in: Option<Stamp>,
    pub(super) out: Out,
    pub(super) token_sent: bool,
    pub(super) down: Option<Meta>,
    /// Refused below; ends when the local write has ended.
    pub(super) doomed: Option<WireError>,
    pub(super) clients: Vec<Handle>,
    pub(super) upstream: Vec<Handle>,
    /// Changes whenever the update is confirmed: an answer to an older question is void.
    pub(super) touch: u64,
    pub(super) resolve_at: Nanos,
    /// It is the removal of what is not there, rather than of something known.
    pub(super) reports_absence: bool,
}

impl<B> Pending<B> {
    /// Version of the chunk once this is committed.
    pub(super) fn result_version(&self) -> u64 {
        if self.removes { 0 } else { self.version }
    }
}

pub(super) struct Queued<B> {
    pub(super) reply: Vec<Handle>,
    pub(super) chain_version: ChainVersion,
    pub(super) update: Update<B>,
}

/// A chunk that something is going on with.
pub(super) struct Active<B> {
    pub(super) pending: Option<Pending<B>>,
    pub(super) queue: VecDeque<Queued<B>>,
    /// Being copied to the successor: which read or forward.
    pub(super) copy: Option<Out>,
    /// A token that overtook its forward.
    pub(super) early: Option<(Token, Nanos)>,
    /// A forward that replaces the pending update once its write has ended.
    pub(super) next: Option<(Handle, Forward<B>)>,
}

impl<B> Default for Active<B> {
    fn default() -> Self {
        Self { pending: None, queue: VecDeque::new(), copy: None, early: None, next: None }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Successor {
    None,
    Serving(TargetId),
    Syncing(TargetId),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    Out,
    Serving { predecessor: Option<TargetId>, successor: Successor },
    Syncing { predecessor: TargetId },
}
