//! Opening, reading and writing files.

use crate::attr::errno;
use crate::caller::Caller;
use crate::fs::{Core, open_mode};
use fs3_client::{Credentials, Durability, File, FsError, Inode, SetAttr};
use fuser::{
    Errno, FileHandle, FopenFlags, Generation, ReplyCreate, ReplyData, ReplyEmpty, ReplyLseek, ReplyOpen,
    ReplyWrite,
};

/// What a write must have reached when it returns, from the flags of open(2).
pub(crate) fn durability(flags: i32) -> Durability {
    // O_SYNC includes the bit of O_DSYNC; both want the length that a reader needs.
    if flags & libc::O_DSYNC != 0 {
        Durability::Synced
    } else if flags & libc::O_DIRECT != 0 {
        Durability::Direct
    } else {
        Durability::Buffered
    }
}

/// Mode without the bits that a write by somebody without privilege takes away, if it has them:
/// set-user-id, and set-group-id where the group may execute.
pub(crate) fn without_privilege(mode: u32) -> Option<u32> {
    let mut left = mode & !libc::S_ISUID;
    if mode & libc::S_IXGRP != 0 {
        left &= !libc::S_ISGID;
    }
    (left != mode).then_some(left & 0o7777)
}

pub(crate) fn answer(result: Result<(), FsError>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error)),
    }
}

pub(crate) async fn read(file: &File, offset: u64, size: u32, direct: bool, reply: ReplyData) {
    match file.read_at(offset, size as usize, direct).await {
        Ok(data) => reply.data(&data),
        Err(error) => {
            tracing::warn!(inode = file.inode_id(), offset, size, %error, "read failed");
            reply.error(errno(&error));
        }
    }
}

/// Holes are not tracked: a file is data up to its length, which POSIX allows.
pub(crate) fn lseek(file: &File, offset: i64, whence: i32, reply: ReplyLseek) {
    let length = file.length().min(i64::MAX as u64) as i64;
    match whence {
        libc::SEEK_DATA | libc::SEEK_HOLE if offset < 0 || offset >= length => reply.error(Errno::ENXIO),
        libc::SEEK_DATA => reply.offset(offset),
        libc::SEEK_HOLE => reply.offset(length),
        _ => reply.error(Errno::EINVAL),
    }
}

impl Core {
    /// Flags of an opened file, and what the kernel must forget first.
    fn opened(&self, inode: &Inode, flags: i32) -> FopenFlags {
        let at_open = self.known.opening(inode);
        if at_open.drop_attributes {
            self.drop_attributes(inode.inode_id);
        }
        let mut answer = FopenFlags::empty();
        if flags & libc::O_DIRECT != 0 {
            answer |= FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        } else if at_open.keep_pages {
            answer |= FopenFlags::FOPEN_KEEP_CACHE;
        }
        answer
    }

    pub(crate) async fn open(&self, caller: Caller, id: u64, flags: i32, reply: ReplyOpen) {
        match self.fs.open(&caller.credentials(), id, open_mode(flags)).await {
            Ok((inode, file)) => {
                if flags & libc::O_TRUNC != 0 {
                    self.changed_here();
                    self.known.changed(id);
                }
                let answer = self.opened(&inode, flags);
                reply.opened(FileHandle(self.files.add(file)), answer);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    pub(crate) async fn create(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        mode: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let exclusive = flags & libc::O_EXCL != 0;
        match self.fs.create(&caller.credentials(), parent, name, mode, exclusive, open_mode(flags)).await {
            Ok((inode, file)) => {
                self.changed_here();
                let attr = self.tell(&inode);
                let answer = self.opened(&inode, flags);
                let handle = FileHandle(self.files.add(file));
                reply.created(&self.options.entry_ttl, &attr, Generation(0), handle, answer);
            }
            Err(error) => reply.error(errno(&error)),
        }
    }

    /// Close of one descriptor.
    pub(crate) async fn flush(&self, file: &File, reply: ReplyEmpty) {
        let result = file.flush().await;
        if file.writable() {
            self.changed_here();
        }
        answer(result, reply);
    }

    /// Close of the last one.
    pub(crate) async fn release(&self, file: &File, reply: ReplyEmpty) {
        let result = file.close().await;
        if file.writable() {
            self.changed_here();
        }
        answer(result, reply);
    }

    #[allow(clippy::too_many_arguments, reason = "one request's fields")]
    pub(crate) async fn write(
        &self,
        id: u64,
        file: &File,
        offset: u64,
        data: &[u8],
        durability: Durability,
        kill: bool,
        reply: ReplyWrite,
    ) {
        if kill {
            self.drop_privilege(id, file).await;
        }
        match file.write_at(offset, data, durability).await {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => {
                tracing::warn!(inode = id, offset, bytes = data.len(), %error, "write failed");
                reply.error(errno(&error));
            }
        }
    }

    async fn drop_privilege(&self, id: u64, file: &File) {
        if let Some(mode) = without_privilege(file.attributes().mode) {
            let change = SetAttr { mode: Some(mode), ..SetAttr::default() };
            match self.fs.setattr(&Credentials::ROOT, id, &change).await {
                Ok(_) => self.drop_attributes(id),
                Err(error) => tracing::warn!(inode = id, %error, "set-user-id not cleared"),
            }
        }
    }

    pub(crate) async fn fallocate(
        &self,
        id: u64,
        file: &File,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        const KNOWN: i32 =
            libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        if mode & !KNOWN != 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        let result = if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
            file.zero_range(offset, length, keep_size).await
        } else if keep_size {
            // Space is not reserved, so there is nothing to do.
            Ok(())
        } else {
            file.extend(offset.saturating_add(length)).await
        };
        self.changed_here();
        self.known.changed(id);
        answer(result, reply);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privilege_bits_go_as_linux_takes_them() {
        assert_eq!(without_privilege(0o4755), Some(0o755));
        assert_eq!(without_privilege(0o6755), Some(0o755));
        // Set-group-id without group execute is mandatory locking, not privilege.
        assert_eq!(without_privilege(0o2745), None);
        assert_eq!(without_privilege(0o644), None);
    }

    #[test]
    fn durability_follows_the_open_flags() {
        assert_eq!(durability(libc::O_WRONLY), Durability::Buffered);
        assert_eq!(durability(libc::O_DIRECT), Durability::Direct);
        assert_eq!(durability(libc::O_SYNC | libc::O_DIRECT), Durability::Synced);
        assert_eq!(durability(libc::O_DSYNC), Durability::Synced);
    }
}
