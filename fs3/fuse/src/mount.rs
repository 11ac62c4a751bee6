//! Mounting, and unmounting without losing what programs wrote.

use crate::fs::{Core, MountFs};
use fs3_client::Fs3;
use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use rustix::mount::{UnmountFlags, unmount};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest wait for open files to be closed after an unmount.
const CLOSING: Duration = Duration::from_secs(10);

/// How to mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Refuse changes. Default no.
    pub read_only: bool,
    /// Let users other than root in; their rights are checked. Default yes.
    pub allow_other: bool,
    /// Honour set-user-id bits and device nodes. Default no, as for every mount that other
    /// machines write to.
    pub suid_and_devices: bool,
    /// Threads that read requests. Default 2: they only hand over.
    pub threads: usize,
    /// How long the kernel may believe names. Default 1 s.
    pub entry_ttl: Duration,
    /// How long the kernel may believe attributes. Default 1 s.
    pub attr_ttl: Duration,
    /// Source shown in the mount table. Default "firefly".
    pub source: String,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            allow_other: true,
            suid_and_devices: false,
            threads: 2,
            entry_ttl: Duration::from_secs(1),
            attr_ttl: Duration::from_secs(1),
            source: "firefly".into(),
        }
    }
}

/// Why a mount failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Only root may mount.
    #[error(
        "mounting needs root: run the command with sudo, or use `ff fs get` and `ff fs put` without a mount"
    )]
    NotRoot,
    /// The kernel has no FUSE.
    #[error(
        "/dev/fuse cannot be opened ({0}): load the kernel's fuse module, or pass the device to this container"
    )]
    NoFuse(io::Error),
    /// The mount point does not exist or cannot be looked at.
    #[error("cannot mount on {}: {source}; make the directory first", path.display())]
    Missing {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A mount whose server is gone lies there.
    #[error("{} is a mount whose server is gone: run `ff fs umount {}` first", .0.display(), .0.display())]
    Dead(PathBuf),
    /// The mount point is not a directory.
    #[error("cannot mount on {}: it is not a directory", .0.display())]
    NotDirectory(PathBuf),
    /// The mount point has entries, which the mount would hide.
    #[error("cannot mount on {}: the directory is not empty, and a mount would hide its entries", .0.display())]
    NotEmpty(PathBuf),
    /// Something is mounted there.
    #[error("{} is a mount point already: unmount it first, or choose another directory", .0.display())]
    Busy(PathBuf),
    /// The root directory cannot be had from the cluster.
    #[error("the cluster does not answer for its root directory: {0}")]
    Cluster(fs3_client::FsError),
    /// There is no tokio runtime to run operations on.
    #[error("mount was called outside a tokio runtime")]
    NoRuntime,
    /// The kernel refused.
    #[error("mounting on {} failed: {source}", path.display())]
    Kernel {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Checks that the mount point can be used, so that the error says what is wrong with it.
fn check(path: &Path) -> Result<(), MountError> {
    if !rustix::process::geteuid().is_root() {
        return Err(MountError::NotRoot);
    }
    std::fs::File::options().read(true).write(true).open("/dev/fuse").map_err(MountError::NoFuse)?;
    let own = match std::fs::metadata(path) {
        Ok(own) => own,
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            return Err(MountError::Dead(path.to_owned()));
        }
        Err(source) => return Err(MountError::Missing { path: path.to_owned(), source }),
    };
    if !own.is_dir() {
        return Err(MountError::NotDirectory(path.to_owned()));
    }
    let missing = |source| MountError::Missing { path: path.to_owned(), source };
    let above = std::fs::metadata(path.join("..")).map_err(missing)?;
    if own.dev() != above.dev() || own.ino() == above.ino() {
        return Err(MountError::Busy(path.to_owned()));
    }
    if std::fs::read_dir(path).map_err(missing)?.next().is_some() {
        return Err(MountError::NotEmpty(path.to_owned()));
    }
    Ok(())
}

/// Mounts `fs` on `mountpoint`. Returns once the mount answers; operations run on the tokio
/// runtime that is current at the call.
pub fn mount(fs: Arc<Fs3>, mountpoint: &Path, options: MountOptions) -> Result<Mounted, MountError> {
    check(mountpoint)?;
    let path = mountpoint
        .canonicalize()
        .map_err(|source| MountError::Missing { path: mountpoint.to_owned(), source })?;
    let runtime = tokio::runtime::Handle::try_current().map_err(|_| MountError::NoRuntime)?;
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(options.source.clone()),
        MountOption::Subtype("fs3".into()),
        MountOption::DefaultPermissions,
        if options.read_only { MountOption::RO } else { MountOption::RW },
    ];
    if options.suid_and_devices {
        config.mount_options.extend([MountOption::Suid, MountOption::Dev]);
    }
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(options.threads.max(1));
    config.clone_fd = options.threads > 1;
    let core = Arc::new(Core::new(fs, runtime, options));
    let kernel = |source| MountError::Kernel { path: path.clone(), source };
    let session = Session::new(MountFs(core.clone()), &path, &config).map_err(kernel)?;
    core.set_notifier(session.notifier());
    let session = session.spawn().map_err(kernel)?;
    Ok(Mounted { path, core, session: Some(session) })
}

/// A mounted file system; unmounted when dropped.
pub struct Mounted {
    path: PathBuf,
    core: Arc<Core>,
    session: Option<BackgroundSession>,
}

impl Mounted {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the kernel has ended the mount, for example by umount(8).
    pub fn ended(&self) -> bool {
        self.session.as_ref().is_none_or(|session| session.guard.is_finished())
    }

    /// Unmounts: waits for what is buffered, and detaches the mount from its directory even if
    /// programs still use it; those keep it until they close their files, at most ten seconds.
    /// Blocks; call it off the runtime's threads, for example in `spawn_blocking`.
    pub fn unmount(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(session) = self.session.take() else { return Ok(()) };
        let mut result = Ok(());
        let mut detached = false;
        if !session.guard.is_finished() {
            result = match unmount(&self.path, UnmountFlags::empty()) {
                Ok(()) => Ok(()),
                Err(error) => {
                    tracing::warn!(path = %self.path.display(), %error, "still in use; detaching the mount");
                    detached = true;
                    unmount(&self.path, UnmountFlags::DETACH).map_err(io::Error::from)
                }
            };
        }
        // The kernel ends the session once the last user is gone; releases follow in its wake.
        let deadline = Instant::now() + CLOSING;
        while Instant::now() < deadline && !(session.guard.is_finished() && self.core.is_idle()) {
            std::thread::sleep(Duration::from_millis(5));
        }
        if session.guard.is_finished() {
            // Nothing is mounted any more: only its thread is left to be taken in.
            match session.join() {
                Ok(()) => {}
                Err(error) if result.is_ok() => result = Err(error),
                Err(_) => {}
            }
        } else if detached {
            tracing::warn!(path = %self.path.display(), "programs still use the detached mount");
            // Dropping the session would try to unmount whatever is mounted there next.
            std::mem::forget(session);
        }
        result
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!(path = %self.path.display(), %error, "unmounting failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_mount_point_is_refused_with_its_reason() {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            eprintln!("SKIPPED: needs root and /dev/fuse");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(check(&dir.path().join("absent")), Err(MountError::Missing { .. })));
        assert!(matches!(check(&file), Err(MountError::NotDirectory(_))));
        assert!(matches!(check(dir.path()), Err(MountError::NotEmpty(_))));
        assert!(matches!(check(Path::new("/proc")), Err(MountError::Busy(_))));
        std::fs::remove_file(&file).unwrap();
        assert!(check(dir.path()).is_ok());
    }
}
