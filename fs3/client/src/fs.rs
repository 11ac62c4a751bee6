//! The file system at inode level: what the mount calls.

use crate::chunkio::ChunkIo;
use crate::file::File;
use crate::manager::{Manager, Session};
use crate::metaio::MetaIo;
use crate::options::ClientOptions;
use crate::routing::RoutingCache;
use crate::shared::Shared;
use crate::stats::{ClientStats, Stats};
use crate::{Credentials, FsError};
use firefly_proto::meta::*;
use firefly_proto::methods::meta as method;
use firefly_types::ErrorKind;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Inode number of the root directory.
pub const ROOT: u64 = 1;

/// Longest name of a directory entry, bytes.
pub const NAME_MAX: usize = 255;

/// A connected client.
pub struct Fs3 {
    pub(crate) shared: Arc<Shared>,
}

/// What to change of an inode. Absent fields stay.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Length of a regular file.
    pub length: Option<u64>,
    /// Time of last access.
    pub atime: Option<SetTime>,
    /// Time of last modification.
    pub mtime: Option<SetTime>,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SetTime {
    /// The server's present.
    Now,
    /// This one.
    At(Time),
}

/// What to make.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NewNode {
    /// Sort of inode.
    pub kind: InodeKind,
    /// Permission bits, after the umask.
    pub mode: u32,
    /// Target of a symbolic link.
    pub symlink: Vec<u8>,
    /// Number of a device.
    pub rdev: u32,
}

/// How to open a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenMode {
    /// For writing.
    pub write: bool,
    /// With `write`: for reading as well, so that permission to read is checked. Without `write`
    /// it is implied.
    pub read: bool,
    /// To run it: permission to execute is enough.
    pub execute: bool,
    /// Drop the content (O_TRUNC).
    pub truncate: bool,
}

/// A page of a directory.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Entries without "." and "..".
    pub entries: Vec<Entry>,
    /// No more pages.
    pub end: bool,
    /// Inode of the parent directory.
    pub parent: u64,
}

/// Space and use of the file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatFs {
    /// Bytes that files could occupy, after replication.
    pub total_bytes: u64,
    /// Bytes still free, after replication.
    pub free_bytes: u64,
    /// Inodes in use.
    pub inodes: u64,
    /// Sum of file lengths.
    pub logical_bytes: u64,
}

fn inode(what: &str, inode: Option<Inode>) -> Result<Inode, FsError> {
    inode.ok_or_else(|| FsError::protocol(what, "no inode in the answer"))
}

/// Target of a symbolic link.
pub fn symlink_target(inode: &Inode) -> &[u8] {
    if inode.symlink_target.is_empty() { inode.symlink.as_bytes() } else { &inode.symlink_target }
}

fn check_name(name: &[u8]) -> Result<(), FsError> {
    if name.len() > NAME_MAX {
        return Err(FsError::invalid(
            ErrorKind::NameTooLong,
            format!("a name of {} bytes: at most {NAME_MAX} are possible", name.len()),
        ));
    }
    Ok(())
}

fn shown(name: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(name)
}

impl Fs3 {
    /// Connects: waits for a routing table and opens a session.
    pub async fn connect(options: ClientOptions) -> Result<Arc<Self>, FsError> {
        let stop = CancellationToken::new();
        let guard = stop.clone().drop_guard();
        let stats = Arc::new(Stats::default());
        let manager = Manager::new(&options.manager, &options.identity.secret)?;
        let routing = RoutingCache::start(manager.clone(), stats.clone(), stop.clone()).await?;
        let session = Session::open(manager, &options.description, options.attempt, stop.clone()).await?;
        if !session.cluster_id.is_empty() && session.cluster_id != options.identity.cluster.to_string() {
            return Err(FsError::invalid(
                ErrorKind::Unauthenticated,
                format!(
                    "the manager at {} belongs to cluster {}, this client to {}: check the address",
                    options.manager, session.cluster_id, options.identity.cluster
                ),
            ));
        }
        let net = firefly_net::Client::of(options.identity.clone(), firefly_net::Traffic::Storage);
        let io = ChunkIo::new(&options, net.clone(), routing.clone(), session.clone(), stats.clone());
        let meta = MetaIo::new(&options, net, routing, session.clone(), stats.clone());
        let every = options.publish_every;
        guard.disarm();
        let shared = Arc::new(Shared::new(options, io, meta, session, stats, stop.clone()));
        tokio::spawn(Shared::publish_periodically(Arc::downgrade(&shared), every, stop));
        Ok(Arc::new(Self { shared }))
    }

    /// Flushes what waits and ends the session. Handles that are still open fail afterwards.
    pub async fn shutdown(&self) -> Result<(), FsError> {
        let flushed = self.shared.flush_everything().await;
        self.shared.session.close().await;
        self.shared.stop.cancel();
        flushed
    }

    /// Sends and publishes everything that any file of this client holds back.
    pub async fn sync(&self) -> Result<(), FsError> {
        self.shared.flush_everything().await
    }

    /// Counters since the connection.
    pub fn stats(&self) -> ClientStats {
        self.shared.stats.snapshot(self.shared.budget.in_use() as u64)
    }

    /// The routing table's cache.
    pub fn routing(&self) -> &RoutingCache {
        self.shared.io.routing()
    }

    /// Our id in the cluster.
    pub fn client_id(&self) -> u64 {
        self.shared.session.client_id
    }

    /// Attributes with what this client has written and not published.
    fn view(&self, attr: Inode) -> Inode {
        match self.shared.find(attr.inode_id) {
            Some(open) => {
                let mut state = open.state();
                state.apply(&attr);
                let view = state.view();
                // A link count of zero is known to the server alone, and older versions lose.
                if attr.version >= view.version { view } else { Inode { nlink: attr.nlink, ..view } }
            }
            None => attr,
        }
    }

    /// Attributes that a server sent, as this client sees them: with what has been written to the
    /// file here and is not published yet.
    pub fn as_seen(&self, attr: Inode) -> Inode {
        self.view(attr)
    }

    /// The inode that `name` in `parent` leads to.
    pub async fn lookup(&self, who: &Credentials, parent: u64, name: &[u8]) -> Result<Inode, FsError> {
        check_name(name)?;
        let what = format!("looking up {:?}", shown(name));
        let reply: InodeReply = self
            .shared
            .meta
            .ask(&what, method::LOOKUP, who, |caller| LookupRequest {
                caller: Some(caller),
                parent,
                name: name.to_vec(),
            })
            .await?;
        Ok(self.view(inode(&what, reply.inode)?))
    }

    /// Attributes of an inode.
    pub async fn getattr(&self, id: u64) -> Result<Inode, FsError> {
        let what = format!("attributes of inode {id}");
        let reply: InodeReply = self
            .shared
            .meta
            .ask(&what, method::GET_ATTR, &Credentials::ROOT, |caller| GetAttrRequest {
                caller: Some(caller),
                inode_id: id,
            })
            .await?;
        Ok(self.view(inode(&what, reply.inode)?))
    }

    /// Changes attributes; a new length cuts the chunks first.
    pub async fn setattr(&self, who: &Credentials, id: u64, change: &SetAttr) -> Result<Inode, FsError> {
        let what = format!("changing inode {id}");
        let Some(length) = change.length else {
            let attr = self.send_setattr(&what, who, id, change).await?;
            if let Some(open) = self.shared.find(id) {
                let mut state = open.state();
                if change.mtime.is_some() {
                    state.mtime_set(attr.mtime);
                }
                state.apply(&attr);
                return Ok(state.view());
            }
            return Ok(attr);
        };
        let known = self.getattr(id).await?;
        if known.kind() == InodeKind::Directory {
            return Err(FsError::invalid(
                ErrorKind::IsDirectory,
                format!("inode {id} is a directory: it has no length to set"),
            ));
        }
        let open = self.shared.opened(&known)?;
        let _alone = open.gate.write().await;
        open.flush_data().await;
        let most = open.state().layout().max_length();
        if length > most {
            return Err(FsError::invalid(
                ErrorKind::TooLarge,
                format!("a file of this layout holds at most {most} bytes"),
            ));
        }
        let before = open.state().length();
        open.cut(before, length).await?;
        let _one = open.publishing.lock().await;
        let mut change = change.clone();
        change.mtime.get_or_insert(SetTime::Now);
        let attr = self.send_setattr(&what, who, id, &change).await?;
        let mut state = open.state();
        state.reset(&attr);
        Ok(state.view())
    }

    async fn send_setattr(
        &self,
        what: &str,
        who: &Credentials,
        id: u64,
        change: &SetAttr,
    ) -> Result<Inode, FsError> {
        let at = |time: Option<SetTime>| match time {
            Some(SetTime::At(time)) => Some(time),
            _ => None,
        };
        let reply: InodeReply = self
            .shared
            .meta
            .change(what, method::SET_ATTR, who, |caller| SetAttrRequest {
                caller: Some(caller),
                inode_id: id,
                mode: change.mode,
                uid: change.uid,
                gid: change.gid,
                length: change.length,
                atime: at(change.atime),
                mtime: at(change.mtime),
                atime_now: change.atime == Some(SetTime::Now),
                mtime_now: change.mtime == Some(SetTime::Now),
            })
            .await?;
        inode(what, reply.inode)
    }

    async fn send_create(
        &self,
        who: &Credentials,
        parent: u64,
        name: &[u8],
        node: &NewNode,
        (exclusive, open_read, open_write): (bool, bool, bool),
    ) -> Result<CreateReply, FsError> {
        check_name(name)?;
        let what = format!("creating {:?}", shown(name));
        self.shared
            .meta
            .change(&what, method::CREATE, who, |caller| CreateRequest {
                caller: Some(caller),
                parent,
                name: name.to_vec(),
                kind: node.kind.into(),
                mode: node.mode,
                symlink: String::from_utf8(node.symlink.clone()).unwrap_or_default(),
                symlink_target: node.symlink.clone(),
                rdev: node.rdev,
                exclusive,
                open_write,
                open_read,
            })
            .await
    }

    /// Makes an inode of any kind; fails if the name exists.
    pub async fn make(
        &self,
        who: &Credentials,
        parent: u64,
        name: &[u8],
        node: &NewNode,
    ) -> Result<Inode, FsError> {
        let reply = self.send_create(who, parent, name, node, (true, false, false)).await?;
        inode("creating", reply.inode)
    }

    /// Makes a directory.
    pub async fn mkdir(
        &self,
        who: &Credentials,
        parent: u64,
        name: &[u8],
        mode: u32,
    ) -> Result<Inode, FsError> {
        let node = NewNode { kind: InodeKind::Directory, mode, ..NewNode::default() };
        self.make(who, parent, name, &node).await
    }

    /// Makes a symbolic link to `target`.
    pub async fn symlink(
        &self,
        who: &Credentials,
        parent: u64,
        name: &[u8],
        target: &[u8],
    ) -> Result<Inode, FsError> {
        let node = NewNode { kind: InodeKind::Symlink, mode: 0o777, symlink: target.to_vec(), rdev: 0 };
        self.make(who, parent, name, &node).await
    }

    /// Opens a file for reading and perhaps writing, making it if it does not exist.
    pub async fn create(
        &self,
        who: &Credentials,
        parent: u64,
        name: &[u8],
        mode: u32,
        exclusive: bool,
        open: OpenMode,
    ) -> Result<(Inode, File), FsError> {
        let node = NewNode { kind: InodeKind::File, mode, ..NewNode::default() };
        let reply = self.send_create(who, parent, name, &node, (exclusive, !open.write, open.write)).await?;
        let attr = inode("creating", reply.inode)?;
        if attr.kind() != InodeKind::File {
            let kind = match attr.kind() {
                InodeKind::Directory => ErrorKind::IsDirectory,
                _ => ErrorKind::AlreadyExists,
            };
            return Err(FsError::invalid(
                kind,
                format!("{:?} exists and is not a regular file", shown(name)),
            ));
        }
        if !reply.created && open.truncate {
            self.setattr(who, attr.inode_id, &SetAttr { length: Some(0), ..SetAttr::default() }).await?;
        }
        let file = File::new(self.shared.opened(&attr)?, reply.session, open.write);
        Ok((file.attributes(), file))
    }

    /// Opens a file; its attributes are as fresh as the moment of opening.
    pub async fn open(&self, who: &Credentials, id: u64, mode: OpenMode) -> Result<(Inode, File), FsError> {
        let what = format!("opening inode {id}");
        let send = || {
            self.shared.meta.change::<_, OpenReply>(&what, method::OPEN, who, |caller| OpenRequest {
                caller: Some(caller),
                inode_id: id,
                write: mode.write,
                truncate: mode.truncate,
                read: mode.read,
                execute: mode.execute,
            })
        };
        let open = self.shared.find(id);
        if let (true, Some(open)) = (mode.truncate, &open) {
            // The file gets new data: nothing of ours may land between.
            let _alone = open.gate.write().await;
            open.discard().await;
            let _one = open.publishing.lock().await;
            let reply = send().await?;
            let attr = inode(&what, reply.inode)?;
            open.state().reset(&attr);
            return Ok((attr, File::new(open.clone(), reply.session, mode.write)));
        }
        let reply = send().await?;
        let attr = inode(&what, reply.inode)?;
        let file = File::new(self.shared.opened(&attr)?, reply.session, mode.write);
        Ok((file.attributes(), file))
    }

    /// Another name for a file.
    pub async fn link(&self, who: &Credentials, id: u64, parent: u64, name: &[u8]) -> Result<Inode, FsError> {
        check_name(name)?;
        let what = format!("linking inode {id} as {:?}", shown(name));
        let reply: InodeReply = self
            .shared
            .meta
            .change(&what, method::LINK, who, |caller| LinkRequest {
                caller: Some(caller),
                inode_id: id,
                parent,
                name: name.to_vec(),
            })
            .await?;
        Ok(self.view(inode(&what, reply.inode)?))
    }

    /// Removes a name: of a directory if `directory`, of anything else if not.
    pub async fn unlink(
        &self,
        who: &Credentials,
        parent: u64,
        name: &[u8],
        directory: bool,
    ) -> Result<(), FsError> {
        check_name(name)?;
        let what = format!("removing {:?}", shown(name));
        let _: UnlinkReply = self
            .shared
            .meta
            .change(&what, method::UNLINK, who, |caller| UnlinkRequest {
                caller: Some(caller),
                parent,
                name: name.to_vec(),
                directory,
            })
            .await?;
        Ok(())
    }

    /// Renames; `flags` are those of renameat2: NOREPLACE 1, EXCHANGE 2.
    pub async fn rename(
        &self,
        who: &Credentials,
        (parent, name): (u64, &[u8]),
        (new_parent, new_name): (u64, &[u8]),
        flags: u32,
    ) -> Result<(), FsError> {
        check_name(name)?;
        check_name(new_name)?;
        let what = format!("renaming {:?} to {:?}", shown(name), shown(new_name));
        let _: RenameReply = self
            .shared
            .meta
            .change(&what, method::RENAME, who, |caller| RenameRequest {
                caller: Some(caller),
                parent,
                name: name.to_vec(),
                new_parent,
                new_name: new_name.to_vec(),
                flags,
            })
            .await?;
        Ok(())
    }

    /// A page of a directory after `cursor`, which is empty for the first.
    pub async fn readdir(
        &self,
        who: &Credentials,
        id: u64,
        cursor: &[u8],
        limit: u32,
        with_attributes: bool,
    ) -> Result<Page, FsError> {
        let what = format!("listing inode {id}");
        let reply: ReadDirReply = self
            .shared
            .meta
            .ask(&what, method::READ_DIR, who, |caller| ReadDirRequest {
                caller: Some(caller),
                inode_id: id,
                cursor: cursor.to_vec(),
                limit,
                with_attributes,
            })
            .await?;
        let mut entries = reply.entries;
        for entry in &mut entries {
            if let Some(attr) = entry.inode.take() {
                entry.inode = Some(self.view(attr));
            }
        }
        if entries.is_empty() && !reply.end {
            return Err(FsError::protocol(&what, "an empty page that is not the last"));
        }
        Ok(Page { entries, end: reply.end, parent: reply.parent })
    }

    /// Space and use.
    pub async fn statfs(&self) -> Result<StatFs, FsError> {
        let reply: StatFsReply = self
            .shared
            .meta
            .ask("file system statistics", method::STAT_FS, &Credentials::ROOT, |caller| StatFsRequest {
                caller: Some(caller),
            })
            .await?;
        let routing = self.routing().current();
        let table = routing.table();
        // Targets of one node share its disk: count each node's capacity once.
        let mut nodes = std::collections::BTreeMap::new();
        for target in &table.targets {
            let node: &mut (u64, u64) = nodes.entry(target.node_id).or_default();
            node.0 = node.0.max(target.capacity_bytes);
            node.1 += target.used_bytes;
        }
        let copies = u64::from(table.replication.max(1));
        let total: u64 = nodes.values().map(|(capacity, _)| capacity).sum();
        let used: u64 = nodes.values().map(|(_, used)| used).sum();
        Ok(StatFs {
            total_bytes: total / copies,
            free_bytes: total.saturating_sub(used) / copies,
            inodes: reply.inodes,
            logical_bytes: reply.logical_bytes,
        })
    }

    /// Sets an extended attribute; `flags` are XATTR_CREATE 1, XATTR_REPLACE 2.
    pub async fn setxattr(
        &self,
        who: &Credentials,
        id: u64,
        name: &[u8],
        value: &[u8],
        flags: u32,
    ) -> Result<(), FsError> {
        let _: XattrReply = self
            .shared
            .meta
            .change("setting an extended attribute", method::SET_XATTR, who, |caller| SetXattrRequest {
                caller: Some(caller),
                inode_id: id,
                name: name.to_vec(),
                value: value.to_vec(),
                flags,
            })
            .await?;
        Ok(())
    }

    /// Value of an extended attribute.
    pub async fn getxattr(&self, who: &Credentials, id: u64, name: &[u8]) -> Result<Vec<u8>, FsError> {
        let reply: GetXattrReply = self
            .shared
            .meta
            .ask("reading an extended attribute", method::GET_XATTR, who, |caller| GetXattrRequest {
                caller: Some(caller),
                inode_id: id,
                name: name.to_vec(),
            })
            .await?;
        Ok(reply.value)
    }

    /// Names of the extended attributes.
    pub async fn listxattr(&self, who: &Credentials, id: u64) -> Result<Vec<Vec<u8>>, FsError> {
        let reply: ListXattrReply = self
            .shared
            .meta
            .ask("listing extended attributes", method::LIST_XATTR, who, |caller| ListXattrRequest {
                caller: Some(caller),
                inode_id: id,
            })
            .await?;
        Ok(reply.names)
    }

    /// Removes an extended attribute.
    pub async fn removexattr(&self, who: &Credentials, id: u64, name: &[u8]) -> Result<(), FsError> {
        let _: XattrReply = self
            .shared
            .meta
            .change("removing an extended attribute", method::REMOVE_XATTR, who, |caller| {
                RemoveXattrRequest { caller: Some(caller), inode_id: id, name: name.to_vec() }
            })
            .await?;
        Ok(())
    }
}

impl Drop for Fs3 {
    fn drop(&mut self) {
        // Handles may outlive us: they keep what they need, only the background loops end, and
        // those would otherwise outlive everybody.
        if Arc::strong_count(&self.shared) == 1 {
            self.shared.stop.cancel();
        }
    }
}
