//! Events, actions and the values they carry.

use super::records::RecordPage;
use firefly_types::{
    AttemptEpoch, ChainId, ChainVersion, ChunkId, ClientId, JobId, Nanos, RequestId, SessionEpoch, TargetId,
    WireError,
};

/// Names a caller who waits for a [`Action::Reply`]; chosen by the driver.
pub type Handle = u64;

/// Most bytes that any chunk may have.
pub const MAX_CHUNK_BYTES: u32 = 64 << 20;

/// Who asks, under which epochs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Context {
    /// The client; 0 for updates that the target makes itself (collection of ranges).
    pub client: ClientId,
    /// Epoch of the client's session.
    pub session_epoch: SessionEpoch,
    /// Exactly-once lane.
    pub channel: u32,
    /// Number on the lane.
    pub sequence: u64,
    /// Attempt epoch of the job.
    pub attempt: AttemptEpoch,
    /// The job, 0 outside jobs.
    pub job: JobId,
}

impl Context {
    /// Identity for exactly-once execution, if the update is a client's.
    pub fn request(&self) -> Option<RequestId> {
        (self.client.0 != 0).then_some(RequestId {
            client: self.client,
            channel: self.channel,
            sequence: self.sequence,
        })
    }
}

/// What an update does to a chunk. The numbers are stored and travel: never reused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Payload replaces bytes at `offset`; holes read as zeros.
    Write = 1,
    /// Length becomes `length`.
    Truncate = 2,
    /// The chunk ceases to exist.
    Remove = 3,
    /// Payload is the whole content.
    Replace = 4,
    /// `length` bytes at `offset` become zeros; the length stays.
    Punch = 5,
}

/// One update of one chunk.
#[derive(Clone, PartialEq, Debug)]
pub struct Update<B> {
    /// Who asks.
    pub context: Context,
    /// Which chunk.
    pub chunk: ChunkId,
    /// What to do.
    pub kind: Kind,
    /// First byte concerned.
    pub offset: u32,
    /// Bytes concerned; the new length for truncate.
    pub length: u32,
    /// CRC-32C of the payload. The driver has verified it before the event.
    pub crc: u32,
    /// Most bytes that this chunk may have.
    pub chunk_bytes: u32,
    /// The bytes, opaque to the machine.
    pub payload: Option<B>,
}

/// State of a chunk's content at one version.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Meta {
    /// Version on the chain.
    pub version: u64,
    /// Bytes.
    pub length: u32,
    /// [`super::Digest`] of the content.
    pub digest: u32,
}

/// Order of a sender's forwards, across its restarts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Stamp {
    /// The sender's incarnation; grows with each start.
    pub incarnation: u64,
    /// Grows with each forward.
    pub sequence: u64,
}

/// The chain as one routing table has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChainView {
    /// Which chain.
    pub id: ChainId,
    /// Version of its membership.
    pub version: ChainVersion,
    /// Serving targets, head first.
    pub serving: Vec<TargetId>,
    /// The target that the last serving one fills.
    pub syncing: Option<TargetId>,
    /// Client updates are refused with fewer serving targets.
    pub min_write_replicas: u32,
}

/// An update on its way down the chain.
#[derive(Clone, PartialEq, Debug)]
pub struct Forward<B> {
    /// Who sends it.
    pub from: TargetId,
    /// Under which membership.
    pub chain_version: ChainVersion,
    /// Its place among the sender's forwards.
    pub stamp: Stamp,
    /// Version that it builds on; 0 creates the chunk.
    pub base: u64,
    /// Version that it creates.
    pub version: u64,
    /// The update itself.
    pub update: Update<B>,
    /// Given if the update is durable on the sender and all its predecessors: the token, with
    /// the sender's state of the chunk.
    pub prefix: Option<Meta>,
}

/// "Durable on me and on all my predecessors."
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token {
    /// Who sends it.
    pub from: TargetId,
    /// Under which membership.
    pub chain_version: ChainVersion,
    /// Which chunk.
    pub chunk: ChunkId,
    /// The forward that it belongs to.
    pub stamp: Stamp,
    /// The chunk's state on the sender.
    pub meta: Meta,
}

/// "I hold this pending update: what do you know of it?"
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resolve {
    /// Who asks.
    pub from: TargetId,
    /// Under which membership.
    pub chain_version: ChainVersion,
    /// Which chunk.
    pub chunk: ChunkId,
    /// Version that the update builds on.
    pub base: u64,
    /// Version that it creates.
    pub version: u64,
    /// The chunk ceases to exist by it.
    pub removes: bool,
}

/// Answer to [`Resolve`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resolution {
    /// Committed on the predecessor, whose state is given (`None`: the chunk is gone).
    Committed(Option<Meta>),
    /// Pending there too; it will be forwarded again or its token sent.
    Pending,
    /// Not known there, so committed nowhere.
    Unknown,
}

/// Why a local write failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteError {
    /// No free blocks; nothing changed.
    NoSpace,
    /// The disk cannot be trusted any more.
    Failed,
}

/// What a caller gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The update is committed here.
    Updated(Meta),
    /// To [`Event::Resolve`].
    Resolved(Resolution),
    /// Accepted.
    Done,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event<B> {
    /// A routing table says this about the chain.
    Chain(ChainView),
    /// The lease was prolonged: requests may be served until then.
    Lease(Nanos),
    /// A client's update.
    Update {
        /// Who waits.
        reply: Handle,
        /// Chain version that the client believes in.
        chain_version: ChainVersion,
        /// What it wants.
        update: Update<B>,
    },
    /// From the predecessor.
    Forward {
        /// Who waits.
        reply: Handle,
        /// What came.
        forward: Forward<B>,
    },
    /// From the predecessor.
    Token {
        /// Who waits.
        reply: Handle,
        /// What came.
        token: Token,
    },
    /// From the successor.
    Resolve {
        /// Who waits.
        reply: Handle,
        /// What came.
        query: Resolve,
    },
    /// From the predecessor, which fills this target.
    SyncRecords {
        /// Who waits.
        reply: Handle,
        /// Who sends.
        from: TargetId,
        /// Under which membership.
        chain_version: ChainVersion,
        /// What came.
        page: RecordPage,
    },
    /// From the predecessor: everything has been copied.
    SyncDone {
        /// Who waits.
        reply: Handle,
        /// Who sends.
        from: TargetId,
        /// Under which membership.
        chain_version: ChainVersion,
    },
    /// Answer to [`Action::Forward`]; each gets exactly one, a time-out included.
    ForwardAnswer {
        /// Which chunk.
        chunk: ChunkId,
        /// Which forward.
        stamp: Stamp,
        /// The successor's state, or why not.
        result: Result<Meta, WireError>,
    },
    /// Answer to [`Action::Token`].
    TokenAnswer {
        /// Which chunk.
        chunk: ChunkId,
        /// Which forward's token.
        stamp: Stamp,
        /// Whether it arrived.
        delivered: bool,
    },
    /// Answer to [`Action::Resolve`]; a failure need not be reported.
    ResolveAnswer {
        /// Which chunk.
        chunk: ChunkId,
        /// As given in the action.
        touch: u64,
        /// What the predecessor said.
        resolution: Resolution,
    },
    /// Answer to [`Action::SyncRecords`] and [`Action::SyncDone`].
    SyncAnswer {
        /// As given in the action.
        id: u64,
        /// Whether it arrived and was accepted.
        accepted: bool,
    },
    /// [`Action::Write`] has ended; `Ok` means durable.
    Written {
        /// Which chunk.
        chunk: ChunkId,
        /// As given in the action.
        id: u64,
        /// The chunk's new state (length 0 and digest 0 after a removal).
        result: Result<Meta, WriteError>,
    },
    /// [`Action::Read`] has ended.
    Content {
        /// Which chunk.
        chunk: ChunkId,
        /// As given in the action.
        id: u64,
        /// State and whole content, or `None` if it could not be read now.
        content: Option<(Meta, B)>,
    },
    /// [`Action::Flush`] has ended.
    Flushed {
        /// As given in the action.
        id: u64,
        /// Durable, or the disk is lost.
        ok: bool,
    },
    /// Time passed. Sent every [`super::TargetOptions::tick`] or so.
    Tick,
}

/// What to do.
#[derive(Clone, Debug)]
pub enum Action<B> {
    /// Write a chunk's next version durably, beside the committed one, replacing what was
    /// pending; the record of the context is part of it. Answer: [`Event::Written`].
    Write {
        /// To name it.
        id: u64,
        /// Version that it builds on; 0 if the chunk does not exist.
        base: u64,
        /// Version that it creates.
        version: u64,
        /// What to do.
        update: Update<B>,
        /// Committed at once: this target does not serve yet.
        commit: bool,
    },
    /// The pending version is the committed one from now on: readers see it at once, the record
    /// of it may become durable later, but in order.
    Commit {
        /// Which chunk.
        chunk: ChunkId,
        /// Which version.
        version: u64,
    },
    /// The pending version never was.
    Drop {
        /// Which chunk.
        chunk: ChunkId,
        /// Which version.
        version: u64,
    },
    /// Make durable: these chunks are gone, these records hold. Answer: [`Event::Flushed`].
    Flush {
        /// To name it.
        id: u64,
        /// Chunks to remove.
        remove: Vec<ChunkId>,
        /// Records to keep.
        page: RecordPage,
    },
    /// Read a whole chunk. Answer: [`Event::Content`].
    Read {
        /// To name it.
        id: u64,
        /// Which chunk.
        chunk: ChunkId,
        /// The pending version instead of the committed one.
        pending: bool,
    },
    /// Send down the chain.
    Forward {
        /// To whom.
        to: TargetId,
        /// What. `update.kind` is [`Kind::Replace`] or [`Kind::Remove`] for a target that is
        /// being filled.
        forward: Forward<B>,
        /// For a target that is being filled.
        is_sync: bool,
    },
    /// Send down the chain.
    Token {
        /// To whom.
        to: TargetId,
        /// What.
        token: Token,
    },
    /// Ask up the chain.
    Resolve {
        /// To whom.
        to: TargetId,
        /// What.
        query: Resolve,
        /// Comes back with the answer.
        touch: u64,
    },
    /// Send to the target that is being filled.
    SyncRecords {
        /// Comes back with the answer.
        id: u64,
        /// To whom.
        to: TargetId,
        /// Under which membership.
        chain_version: ChainVersion,
        /// What.
        page: RecordPage,
    },
    /// Send to the target that has been filled.
    SyncDone {
        /// Comes back with the answer.
        id: u64,
        /// To whom.
        to: TargetId,
        /// Under which membership.
        chain_version: ChainVersion,
    },
    /// Answer a caller.
    Reply {
        /// Whom.
        reply: Handle,
        /// What.
        result: Result<Answer, WireError>,
    },
    /// Tell the manager that this target has been filled at this chain version.
    Synced(ChainVersion),
    /// Tell the manager that this target cannot go on; nothing is served from now on.
    Offline(String),
}

/// Permission to read, and of what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReadGrant {
    /// Committed state; `None` if the chunk does not exist.
    pub meta: Option<Meta>,
    /// A newer version is pending: only the tail knows whether it is committed.
    pub dirty: bool,
}

/// A pending update found on disk at start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecoveredPending {
    /// Which chunk.
    pub chunk: ChunkId,
    /// Version that it builds on.
    pub base: u64,
    /// State that it creates.
    pub meta: Meta,
    /// The chunk ceases to exist by it.
    pub removes: bool,
    /// Whose it is.
    pub context: Context,
}

/// What a target finds on its disk at start.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Recovered {
    /// Committed chunks.
    pub committed: Vec<(ChunkId, Meta)>,
    /// Pending updates, at most one per chunk.
    pub pending: Vec<RecoveredPending>,
    /// Exactly-once records and epochs.
    pub records: RecordPage,
}
