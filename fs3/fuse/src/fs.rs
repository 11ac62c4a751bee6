//! The kernel's requests, each handed to the runtime. What they do is in `names` and `io`.

use crate::caller::Caller;
use crate::handles::{Dir, Files, Handles};
use crate::known::Known;
use crate::mount::MountOptions;
use fs3_client::{Fs3, Inode, OpenMode};
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, Filesystem, INodeNo,
    InitFlags, KernelConfig, LockOwner, Notifier, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

/// Largest read or write, bytes: what this kernel's limit of pages per request allows, and one
/// read-ahead block.
const MOST_IO: u32 = 1 << 20;

/// Requests that the kernel may have on their way for read-ahead and asynchronous direct I/O.
const BACKGROUND: u16 = 128;

/// In the flags of an open: the kernel opens a program to run it (FMODE_EXEC).
const OPENED_TO_RUN: i32 = 0x20;

/// One mount's state, shared by its threads and the operations that run.
pub(crate) struct Core {
    pub(crate) fs: Arc<Fs3>,
    pub(crate) options: MountOptions,
    pub(crate) files: Files,
    pub(crate) dirs: Handles<Dir>,
    pub(crate) known: Known,
    runtime: tokio::runtime::Handle,
    notifier: OnceLock<Notifier>,
    running: AtomicUsize,
    changes: AtomicU64,
}

impl Core {
    pub(crate) fn new(fs: Arc<Fs3>, runtime: tokio::runtime::Handle, options: MountOptions) -> Self {
        Self {
            fs,
            options,
            files: Files::default(),
            dirs: Handles::default(),
            known: Known::default(),
            runtime,
            notifier: OnceLock::new(),
            running: AtomicUsize::new(0),
            changes: AtomicU64::new(0),
        }
    }

    pub(crate) fn set_notifier(&self, notifier: Notifier) {
        // Set once, by the one call of `mount`.
        let _ = self.notifier.set(notifier);
    }

    /// Something that a listing shows has changed through this mount.
    pub(crate) fn changed_here(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// How many changes there were.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// No operation runs.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.load(Ordering::Acquire) == 0
    }

    /// Runs an operation on the runtime.
    pub(crate) fn run(self: &Arc<Self>, operation: impl Future<Output = ()> + Send + 'static) {
        struct Running(Arc<Core>);
        impl Drop for Running {
            fn drop(&mut self) {
                self.0.running.fetch_sub(1, Ordering::AcqRel);
            }
        }
        self.running.fetch_add(1, Ordering::AcqRel);
        let running = Running(self.clone());
        self.runtime.spawn(async move {
            let _running = running;
            operation.await;
        });
    }

    /// The kernel's form of attributes that it is about to be told.
    pub(crate) fn tell(&self, inode: &Inode) -> FileAttr {
        self.known.told(inode);
        crate::attr::attr(inode)
    }

    /// Makes the kernel ask for the attributes of an inode again.
    pub(crate) fn drop_attributes(&self, id: u64) {
        if let Some(notifier) = self.notifier.get()
            && let Err(error) = notifier.inval_inode(INodeNo(id), -1, 0)
        {
            tracing::debug!(inode = id, %error, "the kernel did not drop attributes");
        }
    }
}

/// How a file is opened, from the flags of open(2).
pub(crate) fn open_mode(flags: i32) -> OpenMode {
    let access = OpenFlags(flags).acc_mode();
    OpenMode {
        write: access != OpenAccMode::O_RDONLY,
        read: access != OpenAccMode::O_WRONLY,
        execute: flags & OPENED_TO_RUN != 0,
        truncate: flags & libc::O_TRUNC != 0,
    }
}

/// The file system as fuser calls it.
pub(crate) struct MountFs(pub(crate) Arc<Core>);

impl MountFs {
    fn core(&self) -> Arc<Core> {
        self.0.clone()
    }
}

impl Filesystem for MountFs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            // One request fewer for each open with O_TRUNC, and no moment between.
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            // Pages go when length or time show that another mount wrote.
            InitFlags::FUSE_AUTO_INVAL_DATA,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            // A link's target never changes.
            InitFlags::FUSE_CACHE_SYMLINKS,
            // Otherwise the kernel asks for file capabilities before every write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            // Files opened with O_DIRECT can still be mapped.
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ];
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "not offered by this kernel");
            }
        }
        let _ = config.set_max_write(MOST_IO);
        if let Err(most) = config.set_max_readahead(MOST_IO) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (core, name) = (self.core(), name.as_bytes().to_vec());
        self.0.run(async move { core.lookup(parent.0, &name, reply).await });
    }

    // Inode numbers are the cluster's own and are never reused: there is nothing to forget.
    fn forget(&self, _request: &Request, _ino: INodeNo, _nlookup: u64) {}

    fn getattr(&self, _request: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let core = self.core();
        self.0.run(async move { core.getattr(ino.0, fh.map(|fh| fh.0), reply).await });
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let time = |time| match time {
            TimeOrNow::Now => fs3_client::SetTime::Now,
            TimeOrNow::SpecificTime(at) => fs3_client::SetTime::At(crate::attr::wire_time(at)),
        };
        let change = fs3_client::SetAttr {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            length: size,
            atime: atime.map(time),
            mtime: mtime.map(time),
        };
        let (core, caller) = (self.core(), Caller::of(request));
        self.0.run(async move { core.setattr(caller, ino.0, change, reply).await });
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        let core = self.core();
        self.0.run(async move { core.readlink(ino.0, reply).await });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let Some(kind) = crate::attr::kind_of_mode(mode) else { return reply.error(Errno::EINVAL) };
        let node = fs3_client::NewNode { kind, mode: mode & 0o7777, symlink: Vec::new(), rdev };
        let (core, caller, name) = (self.core(), Caller::of(request), name.as_bytes().to_vec());
        self.0.run(async move { core.make(caller, parent.0, &name, node, reply).await });
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let kind = fs3_client::InodeKind::Directory;
        let node = fs3_client::NewNode { kind, mode: mode & 0o7777, ..Default::default() };
        let (core, caller, name) = (self.core(), Caller::of(request), name.as_bytes().to_vec());
        self.0.run(async move { core.make(caller, parent.0, &name, node, reply).await });
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (core, caller, name) = (self.core(), Caller::of(request), name.as_bytes().to_vec());
        self.0.run(async move { core.unlink(caller, parent.0, &name, false, reply).await });
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (core, caller, name) = (self.core(), Caller::of(request), name.as_bytes().to_vec());
        self.0.run(async move { core.unlink(caller, parent.0, &name, true, reply).await });
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let symlink = target.as_os_str().as_bytes().to_vec();
        let kind = fs3_client::InodeKind::Symlink;
        let node = fs3_client::NewNode { kind, mode: 0o777, symlink, rdev: 0 };
        let (core, caller, name) = (self.core(), Caller::of(request), link_name.as_bytes().to_vec());
        self.0.run(async move { core.make(caller, parent.0, &name, node, reply).await });
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (core, caller) = (self.core(), Caller::of(request));
        let (from, to) = (name.as_bytes().to_vec(), newname.as_bytes().to_vec());
        self.0.run(async move {
            core.rename(caller, (parent.0, &from), (newparent.0, &to), flags.bits(), reply).await;
        });
    }

    fn link(&self, request: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let (core, caller, name) = (self.core(), Caller::of(request), newname.as_bytes().to_vec());
        self.0.run(async move { core.link(caller, ino.0, newparent.0, &name, reply).await });
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (core, caller) = (self.core(), Caller::of(request));
        self.0.run(async move { core.open(caller, ino.0, flags.0, reply).await });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (core, caller, name) = (self.core(), Caller::of(request), name.as_bytes().to_vec());
        self.0.run(async move { core.create(caller, parent.0, &name, mode & 0o7777, flags, reply).await });
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(file) = self.0.files.get(fh.0) else { return reply.error(Errno::EBADF) };
        let direct = flags.0 & libc::O_DIRECT != 0;
        self.0.run(async move { crate::io::read(&file, offset, size, direct, reply).await });
    }

    fn write(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(file) = self.0.files.get(fh.0) else { return reply.error(Errno::EBADF) };
        // Pages of shared mappings come with whatever handle the kernel found.
        let from_mapping = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let flags = if from_mapping { 0 } else { flags.0 };
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let durability = crate::io::durability(flags);
        if !kill
            && durability == fs3_client::Durability::Buffered
            && let Some(result) = file.try_write_at(offset, data)
        {
            return match result {
                Ok(()) => reply.written(data.len() as u32),
                Err(error) => reply.error(crate::attr::errno(&error)),
            };
        }
        let (core, data) = (self.core(), data.to_vec());
        self.0.run(async move { core.write(ino.0, &file, offset, &data, durability, kill, reply).await });
    }

    fn flush(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        let Some(file) = self.0.files.get(fh.0) else { return reply.error(Errno::EBADF) };
        let core = self.core();
        self.0.run(async move { core.flush(&file, reply).await });
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let Some(file) = self.0.files.remove(fh.0) else { return reply.error(Errno::EBADF) };
        let core = self.core();
        self.0.run(async move { core.release(&file, reply).await });
    }

    fn fsync(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let Some(file) = self.0.files.get(fh.0) else { return reply.error(Errno::EBADF) };
        self.0.run(async move { crate::io::answer(file.fsync().await, reply) });
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let dir = Dir { id: ino.0, listed: tokio::sync::Mutex::default() };
        reply.opened(FileHandle(self.0.dirs.add(dir)), fuser::FopenFlags::empty());
    }

    fn readdir(&self, _request: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        let Some(dir) = self.0.dirs.get(fh.0) else { return reply.error(Errno::EBADF) };
        let core = self.core();
        self.0.run(async move { core.readdir(&dir, offset, reply).await });
    }

    fn readdirplus(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let Some(dir) = self.0.dirs.get(fh.0) else { return reply.error(Errno::EBADF) };
        let core = self.core();
        self.0.run(async move { core.readdirplus(&dir, offset, reply).await });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.0.dirs.remove(fh.0);
        reply.ok();
    }

    // Changes of directories are durable when they return.
    fn fsyncdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let core = self.core();
        self.0.run(async move { core.statfs(reply).await });
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (core, caller) = (self.core(), Caller::of(request));
        let (name, value) = (name.as_bytes().to_vec(), value.to_vec());
        self.0.run(async move { core.setxattr(caller, ino.0, &name, &value, flags as u32, reply).await });
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if crate::names::xattr_not_offered(name.as_bytes()) {
            // Asked for before many a write: answered without asking the server.
            return reply.error(Errno::ENODATA);
        }
        let (core, caller, name) = (self.core(), Caller::of(request), name.as_bytes().to_vec());
        self.0.run(async move { core.getxattr(caller, ino.0, &name, size, reply).await });
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let (core, caller) = (self.core(), Caller::of(request));
        self.0.run(async move { core.listxattr(caller, ino.0, size, reply).await });
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (core, caller, name) = (self.core(), Caller::of(request), name.as_bytes().to_vec());
        self.0.run(async move { core.removexattr(caller, ino.0, &name, reply).await });
    }

    // The kernel checks by itself: `default_permissions`.
    fn access(&self, _request: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(
        &self,
        _request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(file) = self.0.files.get(fh.0) else { return reply.error(Errno::EBADF) };
        let core = self.core();
        self.0.run(async move { core.fallocate(ino.0, &file, offset, length, mode, reply).await });
    }

    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let Some(file) = self.0.files.get(fh.0) else { return reply.error(Errno::EBADF) };
        crate::io::lseek(&file, offset, whence, reply);
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel then copies through its page cache.
        reply.error(Errno::ENOSYS);
    }
}
