//! The mount as a process of its own, seen from the command line: start it, wait until it serves,
//! read its counters, take it down.

use crate::local::detached;
use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

/// What a mount calls itself in the table of mounts, before the cluster's identity.
pub const SOURCE_PREFIX: &str = "fs3:";

/// A mounted file system and the process that serves it.
#[derive(Debug)]
pub struct MountProcess {
    mountpoint: PathBuf,
    child: Option<Child>,
}

impl MountProcess {
    /// Runs `ff fs mount --foreground` on `mountpoint`, which is made if it does not exist, and
    /// waits until the kernel shows it mounted.
    pub fn start(ff: &Path, state: &Path, mountpoint: &Path) -> Result<Self> {
        fs::create_dir_all(mountpoint).with_context(|| format!("cannot make {}", mountpoint.display()))?;
        let log_path = state.join("logs").join("mount.log");
        let mut command = detached(ff, &log_path)?;
        command.arg("--state").arg(state).args(["fs", "mount", "--foreground"]).arg(mountpoint);
        let mut child = command.spawn().with_context(|| format!("cannot start {}", ff.display()))?;
        let started = Instant::now();
        loop {
            if mounts()?.iter().any(|m| m.mountpoint == mountpoint) {
                return Ok(Self { mountpoint: mountpoint.to_owned(), child: Some(child) });
            }
            if let Some(status) = child.try_wait()? {
                let text = fs::read_to_string(&log_path).unwrap_or_default();
                let last = text.lines().last().unwrap_or("it said nothing");
                bail!("mounting {} failed ({status}): {last}", mountpoint.display());
            }
            if started.elapsed() > Duration::from_secs(30) {
                let _ = child.kill();
                bail!("mounting {} takes too long; see {}", mountpoint.display(), log_path.display());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Unmounts, and waits for the process to publish what it still holds and end.
    pub fn unmount(mut self) -> Result<()> {
        let result = unmount(&self.mountpoint);
        if let Some(mut child) = self.child.take() {
            let started = Instant::now();
            while child.try_wait()?.is_none() {
                if started.elapsed() > Duration::from_secs(10) {
                    child.kill()?;
                    child.wait()?;
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        result
    }

    /// Lets the mount outlive this value.
    pub fn leave_running(mut self) {
        self.child = None;
    }
}

impl Drop for MountProcess {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = unmount(&self.mountpoint);
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One line of the table of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Where.
    pub mountpoint: PathBuf,
    /// `fs3:` and the cluster's identity.
    pub source: String,
}

/// The fs3 mounts that this process can see.
pub fn mounts() -> Result<Vec<MountEntry>> {
    Ok(parse_mountinfo(
        &fs::read_to_string("/proc/self/mountinfo").context("cannot read the table of mounts")?,
    ))
}

/// Lines as proc(5) describes them: optional fields end at a lone `-`; the mount point has spaces
/// and the like as octal escapes.
fn parse_mountinfo(text: &str) -> Vec<MountEntry> {
    let parse = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mountpoint = left.split(' ').nth(4)?;
        let source = right.split(' ').nth(1)?;
        source
            .starts_with(SOURCE_PREFIX)
            .then(|| MountEntry { mountpoint: PathBuf::from(unescape(mountpoint)), source: unescape(source) })
    };
    text.lines().filter_map(parse).collect()
}

fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Unmounts `mountpoint`; if files on it are open, takes it out of the tree at once and lets the
/// kernel finish when they are closed.
pub fn unmount(mountpoint: &Path) -> Result<()> {
    let path = CString::new(mountpoint.as_os_str().as_bytes()).context("a path cannot hold a NUL")?;
    for flags in [0, libc::MNT_DETACH] {
        // SAFETY: `path` is a NUL-terminated string that outlives the call.
        if unsafe { libc::umount2(path.as_ptr(), flags) } == 0 {
            return Ok(());
        }
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            // Not mounted (any more).
            Some(libc::EINVAL | libc::ENOENT) => return Ok(()),
            Some(libc::EBUSY) => continue,
            _ => return Err(error).with_context(|| format!("cannot unmount {}", mountpoint.display())),
        }
    }
    bail!("cannot unmount {}: it stays busy", mountpoint.display())
}

/// Counters of a mount since it started.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MountStats {
    /// Payload bytes read from storage servers.
    pub bytes_read: u64,
    /// Payload bytes written to storage servers and acknowledged.
    pub bytes_written: u64,
    /// Calls repeated after a failure.
    pub retries: u64,
    /// Longest time that one retried call took, milliseconds.
    pub longest_pause_ms: u64,
}

/// Name of the extended attribute on a mount's root that holds its counters as JSON.
pub const STATS_XATTR: &str = "user.firefly.stats";

/// Reads the counters of the mount at `mountpoint`.
pub fn stats(mountpoint: &Path) -> Result<MountStats> {
    let mut value = vec![0u8; 64 << 10];
    let length = rustix::fs::getxattr(mountpoint, STATS_XATTR, &mut value).with_context(|| {
        format!("{} does not tell its counters: is it an fs3 mount?", mountpoint.display())
    })?;
    serde_json::from_slice(&value[..length]).context("the mount's counters are malformed")
}

impl crate::local::LocalCluster {
    /// Unmounts every mount of this cluster. Returns where they were.
    pub fn unmount_all(&self) -> Result<Vec<PathBuf>> {
        if !self.exists() {
            return Ok(Vec::new());
        }
        let source = format!("{SOURCE_PREFIX}{}", self.context()?.cluster.cluster_id);
        let mut unmounted = Vec::new();
        for entry in mounts()?.into_iter().filter(|m| m.source == source) {
            unmount(&entry.mountpoint)?;
            unmounted.push(entry.mountpoint);
        }
        Ok(unmounted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_mounts_is_read_as_the_kernel_writes_it() {
        let text = "22 1 0:21 / /proc rw shared:5 - proc proc rw\n\
                    90 22 0:50 / /mnt/a\\040b rw,nosuid shared:7 master:2 - fuse fs3:feed rw,user_id=0\n\
                    91 22 0:51 / /mnt/c rw - fuse.sshfs host:/x rw\n";
        let found = parse_mountinfo(text);
        assert_eq!(found, [MountEntry { mountpoint: PathBuf::from("/mnt/a b"), source: "fs3:feed".into() }]);
    }
}
