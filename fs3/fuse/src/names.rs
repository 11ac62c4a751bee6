//! Names, attributes and directories.

use crate::attr::{attr, errno, kind};
use crate::caller::Caller;
use crate::fs::Core;
use crate::handles::{Dir, Fetched, Listed};
use crate::io::answer;
use firefly_types::ErrorKind;
use fs3_client::{Credentials, Entry, FsError, Inode, InodeKind, NewNode, SetAttr};
use fuser::{
    Errno, FileType, Generation, INodeNo, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyStatfs, ReplyXattr,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

/// Block size in answers to statfs.
const STATFS_BLOCK: u32 = 4096;

/// Entries of a directory fetched at once.
const PAGE: u32 = 500;

/// As [`PAGE`], where the directory's files change while it is read, so that most would be fetched
/// in vain: what one of the kernel's requests takes.
const SMALL_PAGE: u32 = 40;

/// Extended attributes that the mount does not offer, and for which nobody is asked: capabilities
/// of files, and ACLs, which would be kept and not obeyed.
pub(crate) fn xattr_not_offered(name: &[u8]) -> bool {
    name == b"security.capability" || name.starts_with(b"system.posix_acl_")
}

/// Extended attribute of the root directory that holds the mount's counters as JSON. It belongs to
/// the mount, not to the file system: each mount answers with its own.
const STATS_XATTR: &[u8] = b"user.firefly.stats";

fn stats_json(stats: &fs3_client::ClientStats) -> String {
    format!(
        "{{\"bytes_read\":{},\"bytes_written\":{},\"reads\":{},\"writes\":{},\"meta_calls\":{},\"retries\":{},\
         \"replica_switches\":{},\"checksum_mismatches\":{},\"longest_pause_ms\":{},\"dirty_bytes\":{},\
         \"readahead_hits\":{},\"routing_updates\":{}}}",
        stats.bytes_read,
        stats.bytes_written,
        stats.reads,
        stats.writes,
        stats.meta_calls,
        stats.retries,
        stats.replica_switches,
        stats.checksum_mismatches,
        stats.longest_pause.as_millis(),
        stats.dirty_bytes,
        stats.readahead_hits,
        stats.routing_updates,
    )
}

fn reply_bytes(bytes: &[u8], size: u32, reply: ReplyXattr) {
    if size == 0 {
        reply.size(bytes.len() as u32);
    } else if bytes.len() > size as usize {
        reply.error(Errno::ERANGE);
    } else {
        reply.data(bytes);
    }
}

impl Core {
    fn entry(&self, result: Result<Inode, FsError>, reply: ReplyEntry) {
        match result {
            Ok(inode) => {
                let attr = self.tell(&inode);
                let options = &self.options;
                reply.entry_with_ttls(&options.attr_ttl, &options.entry_ttl, &attr, Generation(0));
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    // The kernel has checked the right to search: no need to know who asks.
    pub(crate) async fn lookup(&self, parent: u64, name: &[u8], reply: ReplyEntry) {
        self.entry(self.fs.lookup(&Credentials::ROOT, parent, name).await, reply);
    }

    pub(crate) async fn getattr(&self, id: u64, handle: Option<u64>, reply: ReplyAttr) {
        let result = match (self.fs.getattr(id).await, handle.and_then(|h| self.files.get(h))) {
            // The server has forgotten a file that is removed; who has it open may still ask.
            (Err(error), Some(file)) if error.kind() == ErrorKind::NotFound => {
                Ok(Inode { nlink: 0, ..file.attributes() })
            }
            (result, _) => result,
        };
        match result {
            Ok(inode) => reply.attr(&self.options.attr_ttl, &self.tell(&inode)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    // The meta server knows what its rules say of who has the file open for writing, and that a
    // writer without privilege takes set-id bits away.
    pub(crate) async fn setattr(&self, caller: Caller, id: u64, change: SetAttr, reply: ReplyAttr) {
        let changed = self.fs.setattr(&caller.credentials(), id, &change).await;
        self.changed_here();
        match changed {
            Ok(inode) => {
                if change.length.is_some() {
                    self.known.changed(id);
                }
                reply.attr(&self.options.attr_ttl, &self.tell(&inode));
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub(crate) async fn readlink(&self, id: u64, reply: ReplyData) {
        match self.fs.getattr(id).await {
            Ok(inode) => reply.data(fs3_client::symlink_target(&inode)),
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub(crate) async fn make(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        node: NewNode,
        reply: ReplyEntry,
    ) {
        let made = self.fs.make(&caller.credentials(), parent, name, &node).await;
        self.changed_here();
        self.entry(made, reply);
    }

    pub(crate) async fn unlink(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        directory: bool,
        reply: ReplyEmpty,
    ) {
        let removed = self.fs.unlink(&caller.credentials(), parent, name, directory).await;
        self.changed_here();
        answer(removed, reply);
    }

    pub(crate) async fn rename(
        &self,
        caller: Caller,
        from: (u64, &[u8]),
        to: (u64, &[u8]),
        flags: u32,
        reply: ReplyEmpty,
    ) {
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return reply.error(Errno::EINVAL);
        }
        let renamed = self.fs.rename(&caller.credentials(), from, to, flags).await;
        self.changed_here();
        answer(renamed, reply);
    }

    pub(crate) async fn link(&self, caller: Caller, id: u64, parent: u64, name: &[u8], reply: ReplyEntry) {
        let linked = self.fs.link(&caller.credentials(), id, parent, name).await;
        self.changed_here();
        self.entry(linked, reply);
    }

    /// Makes sure that entry `index` of the directory is listed, if there is one.
    async fn list_to(&self, dir: &Dir, listed: &mut Listed, index: usize, plus: bool) -> Result<(), FsError> {
        let mut limit = PAGE;
        if plus && index < listed.entries.len() && !self.page_is_fresh(listed, index) {
            // Attributes that the kernel is told must not be older than what this mount did.
            listed.entries.truncate(index);
            listed.end = false;
            limit = SMALL_PAGE;
        }
        while !listed.end && (listed.entries.len() <= index || listed.parent == 0) {
            let fetched = Fetched { at: Instant::now(), changes: self.changes() };
            let cursor = listed.entries.last().map(|e| e.cursor.clone()).unwrap_or_default();
            let page = self.fs.readdir(&Credentials::ROOT, dir.id, &cursor, limit, plus).await?;
            listed.page_from = listed.entries.len();
            listed.fetched = Some(fetched);
            listed.entries.extend(page.entries);
            listed.end = page.end;
            listed.parent = page.parent.max(1);
        }
        Ok(())
    }

    fn page_is_fresh(&self, listed: &Listed, index: usize) -> bool {
        let attributes = listed.entries.get(index).is_some_and(|e| e.inode.is_some());
        let recent = listed
            .fetched
            .is_some_and(|f| f.changes == self.changes() && f.at.elapsed() < self.options.attr_ttl);
        attributes && recent && index >= listed.page_from
    }

    /// Calls `add` for each entry from `offset` on until it says that the answer is full. An entry
    /// without inode is "." or "..".
    async fn each_entry(
        &self,
        dir: &Dir,
        offset: u64,
        plus: bool,
        mut add: impl FnMut(u64, u64, &OsStr, Option<&fs3_client::Entry>) -> bool,
    ) -> Result<(), FsError> {
        let mut listed = dir.listed.lock().await;
        if offset == 0 {
            // rewinddir: what has changed meanwhile must show.
            *listed = Listed::default();
        }
        for position in offset.. {
            let index = usize::try_from(position).unwrap_or(usize::MAX);
            self.list_to(dir, &mut listed, index.saturating_sub(2), plus).await?;
            let full = match index {
                0 => add(dir.id, 1, OsStr::new("."), None),
                1 => add(listed.parent, 2, OsStr::new(".."), None),
                _ => match listed.entries.get(index - 2) {
                    Some(entry) => {
                        add(entry.inode_id, position + 1, OsStr::from_bytes(&entry.name), Some(entry))
                    }
                    None => return Ok(()),
                },
            };
            if full {
                return Ok(());
            }
        }
        Ok(())
    }

    pub(crate) async fn readdir(&self, dir: &Dir, offset: u64, mut reply: ReplyDirectory) {
        let result = self
            .each_entry(dir, offset, false, |id, next, name, entry| {
                let kind = entry.map_or(FileType::Directory, |e| kind(e.kind()));
                reply.add(INodeNo(id), next, kind, name)
            })
            .await;
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub(crate) async fn readdirplus(&self, dir: &Dir, offset: u64, mut reply: ReplyDirectoryPlus) {
        let result = self
            .each_entry(dir, offset, true, |id, next, name, entry| {
                let (attr, ttl) = match entry {
                    // What a file that is open here has become since it was listed counts.
                    Some(Entry { inode: Some(inode), .. }) => {
                        (self.tell(&self.fs.as_seen(inode.clone())), self.options.attr_ttl)
                    }
                    // Of "." and ".." the kernel takes name and number only.
                    other => {
                        let kind = other.map_or(InodeKind::Directory.into(), |e| e.kind);
                        (attr(&Inode { inode_id: id, kind, ..Inode::default() }), Duration::ZERO)
                    }
                };
                reply.add(INodeNo(id), next, name, &ttl.min(self.options.entry_ttl), &attr, Generation(0))
            })
            .await;
        match result {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub(crate) async fn statfs(&self, reply: ReplyStatfs) {
        match self.fs.statfs().await {
            Ok(now) => {
                let block = u64::from(STATFS_BLOCK);
                let free = now.free_bytes / block;
                // Inodes are limited by space alone.
                reply.statfs(
                    now.total_bytes / block,
                    free,
                    free,
                    now.inodes + free,
                    free,
                    STATFS_BLOCK,
                    fs3_client::NAME_MAX as u32,
                    STATFS_BLOCK,
                );
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub(crate) async fn setxattr(
        &self,
        caller: Caller,
        id: u64,
        name: &[u8],
        value: &[u8],
        flags: u32,
        reply: ReplyEmpty,
    ) {
        if xattr_not_offered(name) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let set = self.fs.setxattr(&caller.credentials(), id, name, value, flags).await;
        self.changed_here();
        answer(set, reply);
    }

    pub(crate) async fn getxattr(&self, caller: Caller, id: u64, name: &[u8], size: u32, reply: ReplyXattr) {
        if id == fs3_client::ROOT && name == STATS_XATTR {
            return reply_bytes(stats_json(&self.fs.stats()).as_bytes(), size, reply);
        }
        match self.fs.getxattr(&caller.credentials(), id, name).await {
            Ok(value) => reply_bytes(&value, size, reply),
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub(crate) async fn listxattr(&self, caller: Caller, id: u64, size: u32, reply: ReplyXattr) {
        match self.fs.listxattr(&caller.credentials(), id).await {
            Ok(names) => {
                let mut list = Vec::new();
                for name in names {
                    list.extend_from_slice(&name);
                    list.push(0);
                }
                reply_bytes(&list, size, reply);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub(crate) async fn removexattr(&self, caller: Caller, id: u64, name: &[u8], reply: ReplyEmpty) {
        if xattr_not_offered(name) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let removed = self.fs.removexattr(&caller.credentials(), id, name).await;
        self.changed_here();
        answer(removed, reply);
    }
}
