//! The namespace: takes a request's bytes, runs its operation as one transaction, returns the
//! reply's bytes. Knows nothing of sockets; holds nothing that a restart would lose.

use crate::caller::Caller;
use crate::clients::LastSeen;
use crate::clock::{Clock, stamp};
use crate::door::{self, Change, Question};
use crate::error::MetaError;
use crate::gate;
use crate::ids::Ids;
use crate::layout::ClusterLayout;
use crate::op::{Fresh, Op, ROOT};
use crate::ops::{attr, create, link, names, open, readdir, rename, statfs, xattr};
use crate::perm::Cred;
use crate::schema::{InodeRecord, Kind, LaneReply, Usage, keys};
use firefly_proto::meta as wire;
use firefly_proto::methods::meta as method;
use firefly_store::{Kv, Txn, transact};
use firefly_types::{ClientId, InodeId};
use prost::Message;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use tokio::sync::Notify;

/// Who owns the root directory of a new file system, and what it allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootOwner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permission bits.
    pub mode: u32,
}

/// The namespace on a store.
pub struct Meta {
    pub(crate) kv: Arc<dyn Kv>,
    pub(crate) clock: Arc<dyn Clock>,
    ids: Ids,
    layout: RwLock<Arc<ClusterLayout>>,
    /// Rung when something is put into the garbage queue.
    pub(crate) garbage: Notify,
    pub(crate) seen: LastSeen,
    /// Off only in the test that shows what it is for.
    dedupe: AtomicBool,
}

/// What came of running a change.
enum Outcome {
    Ran(Vec<u8>),
    Replayed(LaneReply),
}

impl Meta {
    /// Opens the namespace in `kv`; a store without one gets an empty root directory.
    pub async fn open(
        kv: Arc<dyn Kv>,
        clock: Arc<dyn Clock>,
        root: RootOwner,
    ) -> Result<Arc<Self>, MetaError> {
        let tick = clock.tick();
        let cred = Cred { uid: 0, gid: 0, groups: Vec::new() };
        transact(kv.as_ref(), |tx| {
            if tx.get(&keys::inode(ROOT))?.is_some() {
                return Ok(());
            }
            let mut op = running(tx, &cred, ClientId(0), 0, tick);
            let mut inode = op.new_inode(ROOT, Kind::Directory, root.uid, root.gid, root.mode);
            inode.parent = ROOT;
            op.save(&mut inode);
            gate::add_usage(tx, &keys::usage_base(), Usage { inodes: 1, bytes: 0 })
        })
        .await?;
        let seen = LastSeen::new(clock.monotonic());
        Ok(Arc::new(Self {
            kv,
            clock,
            ids: Ids::new(),
            layout: RwLock::default(),
            garbage: Notify::new(),
            seen,
            dedupe: AtomicBool::new(true),
        }))
    }

    /// What the manager says about new files now.
    pub fn set_layout(&self, layout: ClusterLayout) {
        *self.layout.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::new(layout);
    }

    fn layout(&self) -> Arc<ClusterLayout> {
        self.layout.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Negative control for the exactly-once tests: without the records, a retry runs again.
    #[doc(hidden)]
    pub fn switch_off_dedupe(&self) {
        self.dedupe.store(false, Ordering::Relaxed);
    }

    /// Carries out one request: `number` is of [`firefly_proto::methods::meta`], `head` the
    /// request's message. Returns the reply's message.
    pub async fn handle(&self, number: u16, head: &[u8]) -> Result<Vec<u8>, MetaError> {
        match door::look(number, head)? {
            door::Asked::Question(caller, question) => self.answer(&caller, &question),
            door::Asked::Change(caller, change) => self.change(number, &caller, &change).await,
        }
    }

    /// Answers from one snapshot, which holds everything acknowledged before.
    fn answer(&self, caller: &Caller, question: &Question) -> Result<Vec<u8>, MetaError> {
        let mut tx = self.kv.begin();
        gate::pass(&mut tx, caller, false)?;
        self.seen.note(caller.client, self.clock.monotonic());
        let mut op = running(&mut tx, &caller.cred, caller.client, caller.epoch, 0);
        let op = &mut op;
        Ok(match question {
            Question::Lookup { parent, name } => inode_reply(&names::lookup(op, *parent, name)?),
            Question::GetAttr { inode } => inode_reply(&op.inode(*inode)?),
            Question::ReadDir(request) => readdir::read(op, request)?.encode_to_vec(),
            Question::StatFs => statfs::statfs(op)?.encode_to_vec(),
            Question::GetXattr { inode, name } => {
                wire::GetXattrReply { value: xattr::get(op, *inode, name)? }.encode_to_vec()
            }
            Question::ListXattr { inode } => {
                wire::ListXattrReply { names: xattr::list(op, *inode)? }.encode_to_vec()
            }
        })
    }

    /// Runs a change once, however often it is asked for.
    async fn change(&self, number: u16, caller: &Caller, change: &Change) -> Result<Vec<u8>, MetaError> {
        let fresh = match change {
            Change::Create(new) if new.kind == Kind::File => self.ids.for_file(self.kv.as_ref()).await?,
            Change::Create(_) => self.ids.for_inode(self.kv.as_ref()).await?,
            Change::Open(_) => Fresh {
                session: self.ids.for_session(self.kv.as_ref()).await?,
                ..Fresh { inode: InodeId(0), data: Default::default(), session: 0 }
            },
            _ => Fresh { inode: InodeId(0), data: Default::default(), session: 0 },
        };
        let layout = self.layout();
        let dedupe = self.dedupe.load(Ordering::Relaxed);
        let mut made_garbage = false;
        let outcome: Result<_, MetaError> = transact(self.kv.as_ref(), |tx| {
            if let Some(reply) = admit(tx, number, caller, dedupe)? {
                return Ok(Outcome::Replayed(reply));
            }
            let mut op = running(tx, &caller.cred, caller.client, caller.epoch, self.clock.tick());
            let reply = run(&mut op, change, fresh, &layout)?;
            made_garbage = op.made_garbage;
            let usage = op.usage;
            gate::add_usage(tx, &keys::usage(caller.client, caller.channel), usage)?;
            gate::record(tx, caller, number, LaneReply::Done(reply.clone()));
            Ok(Outcome::Ran(reply))
        })
        .await;
        let outcome = match outcome {
            Err(error) if error.is_answer() => self.record_refusal(number, caller, error, dedupe).await?,
            other => other?,
        };
        self.seen.note(caller.client, self.clock.monotonic());
        if made_garbage {
            self.garbage.notify_one();
        }
        match outcome {
            Outcome::Ran(reply) | Outcome::Replayed(LaneReply::Done(reply)) => Ok(reply),
            Outcome::Replayed(LaneReply::Refused(error)) => Err(MetaError::Recorded(error)),
        }
    }

    /// A refusal is an answer too: without its record, a late duplicate of the request could
    /// succeed after its client was told that it had failed. The transaction that met the refusal
    /// holds half of the operation's writes, so this is a new one; between the two a duplicate may
    /// have been executed, whose outcome then counts.
    async fn record_refusal(
        &self,
        number: u16,
        caller: &Caller,
        error: MetaError,
        dedupe: bool,
    ) -> Result<Outcome, MetaError> {
        transact(self.kv.as_ref(), |tx| {
            if let Some(reply) = admit(tx, number, caller, dedupe)? {
                return Ok(Outcome::Replayed(reply));
            }
            let reply = LaneReply::Refused(error.to_wire());
            gate::record(tx, caller, number, reply.clone());
            Ok(Outcome::Replayed(reply))
        })
        .await
    }
}

/// Fencing, and the recorded outcome if there is one.
fn admit(tx: &mut Txn, number: u16, caller: &Caller, dedupe: bool) -> Result<Option<LaneReply>, MetaError> {
    gate::pass(tx, caller, true)?;
    if !dedupe {
        return Ok(None);
    }
    match gate::lane(tx, caller, number)? {
        gate::Lane::New => Ok(None),
        gate::Lane::Done(reply) => Ok(Some(reply)),
    }
}

/// The operation's frame.
pub(crate) fn running<'a>(
    tx: &'a mut Txn,
    cred: &'a Cred,
    client: ClientId,
    epoch: u64,
    tick: u64,
) -> Op<'a> {
    Op { tx, cred, client, epoch, now: stamp(tick), tick, usage: Usage::default(), made_garbage: false }
}

fn inode_reply(inode: &InodeRecord) -> Vec<u8> {
    wire::InodeReply { inode: Some(inode.to_wire()) }.encode_to_vec()
}

fn run(op: &mut Op<'_>, change: &Change, fresh: Fresh, layout: &ClusterLayout) -> Result<Vec<u8>, MetaError> {
    Ok(match change {
        Change::SetAttr { inode, change } => inode_reply(&attr::set(op, *inode, change)?),
        Change::Create(new) => create::create(op, new, fresh, layout)?.encode_to_vec(),
        Change::Link { inode, parent, name } => inode_reply(&link::link(op, *inode, *parent, name)?),
        Change::Unlink { parent, name, directory } => {
            if *directory {
                link::rmdir(op, *parent, name)?;
            } else {
                link::unlink(op, *parent, name)?;
            }
            wire::UnlinkReply {}.encode_to_vec()
        }
        Change::Rename(to_do) => {
            rename::rename(op, to_do)?;
            wire::RenameReply {}.encode_to_vec()
        }
        Change::Open(request) => open::open(op, request, fresh.session)?.encode_to_vec(),
        Change::Close { inode, session, written } => {
            let inode = open::close(op, *inode, *session, written)?;
            wire::CloseReply { inode: Some(inode.to_wire()) }.encode_to_vec()
        }
        Change::Sync { inode, written } => inode_reply(&open::sync(op, *inode, written)?),
        Change::SetXattr { inode, name, value, flags } => {
            xattr::set(op, *inode, name, value, *flags)?;
            wire::XattrReply {}.encode_to_vec()
        }
        Change::RemoveXattr { inode, name } => {
            xattr::remove(op, *inode, name)?;
            wire::XattrReply {}.encode_to_vec()
        }
    })
}

/// For logs.
pub(crate) fn method_name(number: u16) -> &'static str {
    match number {
        method::LOOKUP => "lookup",
        method::GET_ATTR => "getattr",
        method::SET_ATTR => "setattr",
        method::CREATE => "create",
        method::LINK => "link",
        method::UNLINK => "unlink",
        method::RENAME => "rename",
        method::READ_DIR => "readdir",
        method::OPEN => "open",
        method::CLOSE => "close",
        method::SYNC => "sync",
        method::STAT_FS => "statfs",
        method::SET_XATTR => "setxattr",
        method::GET_XATTR => "getxattr",
        method::LIST_XATTR => "listxattr",
        method::REMOVE_XATTR => "removexattr",
        _ => "unknown method",
    }
}
