//! The few system calls that need `unsafe`, each behind a safe function, and /proc.

use crate::files::Process;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

/// Time since boot, suspend included.
pub(crate) fn boottime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Milliseconds since 1970.
pub(crate) fn unix_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Takes the exclusive lock of `path`, or `None` if somebody holds it.
pub(crate) fn lock(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(e) if e == rustix::io::Errno::WOULDBLOCK => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Start time of a process, in ticks since boot.
pub(crate) fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may contain anything; fields are counted after its closing bracket.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The process `pid` as it is now.
pub(crate) fn identify(pid: i32) -> Process {
    Process { pid, start: start_time(pid).unwrap_or(0) }
}

/// Whether this very process (not a later one with its id) exists.
pub(crate) fn exists(process: Process) -> bool {
    process.pid > 0 && process.start != 0 && start_time(process.pid) == Some(process.start)
}

/// Signals one process, if it is still the one meant.
pub(crate) fn signal(process: Process, signal: Signal) {
    if exists(process)
        && let Some(pid) = Pid::from_raw(process.pid)
    {
        let _ = kill_process(pid, signal);
    }
}

/// Signals the process group that `leader` leads or led. The group outlives its leader, and while
/// it exists its id is given to no new process.
pub(crate) fn signal_group(leader: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(leader).filter(|_| leader > 1) {
        let _ = kill_process_group(pid, signal);
    }
}

/// Children of the calling process, including those that it reaps for others.
pub(crate) fn children() -> Vec<i32> {
    let pid = std::process::id();
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|p| p.parse().ok()).collect()
}

/// A descriptor that becomes readable when one of `signals` arrives; they are blocked otherwise.
pub(crate) fn signal_fd(signals: &[i32]) -> io::Result<OwnedFd> {
    // SAFETY: `set` is initialised by sigemptyset before any other use; all pointers are to locals
    // that live across the calls; the descriptor returned is owned by nobody else.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Next signal from a [`signal_fd`].
pub(crate) fn next_signal(fd: &OwnedFd) -> Option<i32> {
    let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
    let n = rustix::io::read(fd, &mut info).ok()?;
    // `ssi_signo` is the first field, a u32.
    (n == info.len()).then(|| i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
}

/// Makes reads of `fd` return at once.
pub(crate) fn set_nonblocking(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the descriptor is open for the duration of the call; fcntl with F_SETFL touches no
    // memory of ours.
    let result = unsafe {
        let fd = fd.as_raw_fd();
        libc::fcntl(fd, libc::F_SETFL, libc::fcntl(fd, libc::F_GETFL) | libc::O_NONBLOCK)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whom a rank runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Credentials {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// Turns the freshly forked child into what a rank starts from. Runs between fork and exec: only
/// system calls, no allocation.
pub(crate) fn become_rank(credentials: Option<&Credentials>, directory: &std::ffi::CStr) -> io::Result<()> {
    fn check(result: libc::c_int) -> io::Result<()> {
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
    // SAFETY: plain system calls on this process; every pointer is to a live local or to memory
    // borrowed for the call. All of them are async-signal-safe.
    unsafe {
        let mut none = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()))?;
        if libc::setsid() < 0 {
            return Err(io::Error::last_os_error());
        }
        // RDMA registers memory: unlimited if we may, else as much as we may. Best effort.
        raise_limit(libc::RLIMIT_MEMLOCK, libc::RLIM_INFINITY);
        raise_limit(libc::RLIMIT_NOFILE, 1 << 20);
        if let Some(who) = credentials {
            check(libc::setgroups(who.groups.len(), who.groups.as_ptr()))?;
            check(libc::setresgid(who.gid, who.gid, who.gid))?;
            check(libc::setresuid(who.uid, who.uid, who.uid))?;
        }
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        // After the change of user, which clears it. If the shim is killed, so is the rank.
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
        check(libc::chdir(directory.as_ptr()))
    }
}

/// # Safety
/// Only system calls on locals; callable anywhere.
unsafe fn raise_limit(resource: libc::__rlimit_resource_t, wanted: libc::rlim_t) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` and `raised` are live locals.
    unsafe {
        if libc::getrlimit(resource, &raw mut limit) != 0 {
            return;
        }
        let raised = libc::rlimit { rlim_cur: wanted, rlim_max: wanted.max(limit.rlim_max) };
        if libc::setrlimit(resource, &raw const raised) != 0 {
            let most = libc::rlimit { rlim_cur: limit.rlim_max.min(wanted), rlim_max: limit.rlim_max };
            libc::setrlimit(resource, &raw const most);
        }
    }
}

/// All groups of a user, by the system's name service.
pub(crate) fn groups_of(user: &std::ffi::CStr, gid: u32) -> Vec<u32> {
    let mut groups = vec![0u32; 256];
    let mut count: libc::c_int = 256;
    // SAFETY: `user` is NUL-terminated; `groups` has room for the `count` entries that it states.
    let result = unsafe { libc::getgrouplist(user.as_ptr(), gid, groups.as_mut_ptr(), &raw mut count) };
    if result < 0 {
        return vec![gid];
    }
    groups.truncate(usize::try_from(count).unwrap_or(0));
    groups
}

/// Home folder of a user, by the system's name service.
pub(crate) fn home_of(uid: u32) -> Option<String> {
    let mut buffer = vec![0u8; 16 << 10];
    let mut result = std::ptr::null_mut();
    // SAFETY: `entry` and `buffer` live until their last use below; getpwuid_r writes only into
    // them; `result` is checked before `entry` is read, and pw_dir is then a NUL-terminated string
    // inside `buffer`.
    unsafe {
        let mut entry = std::mem::zeroed::<libc::passwd>();
        let code =
            libc::getpwuid_r(uid, &raw mut entry, buffer.as_mut_ptr().cast(), buffer.len(), &raw mut result);
        if code != 0 || result.is_null() || entry.pw_dir.is_null() {
            return None;
        }
        std::ffi::CStr::from_ptr(entry.pw_dir).to_str().ok().map(str::to_owned)
    }
}

/// Kills every process that has `marker` among its environment variables: what is left of a rank
/// whose shim is gone. Names by content, because process ids may belong to somebody else by now.
pub(crate) fn kill_marked(marker: &str) -> usize {
    let mut killed = 0;
    let Ok(entries) = std::fs::read_dir("/proc") else { return 0 };
    for pid in entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok()) {
        let Some(raw) = Pid::from_raw(pid).filter(|_| pid > 1) else { continue };
        // The pidfd is opened before the check: what is checked is what is signalled.
        let Ok(fd) = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty()) else { continue };
        let Ok(environ) = std::fs::read(format!("/proc/{pid}/environ")) else { continue };
        if environ.split(|b| *b == 0).any(|v| v == marker.as_bytes())
            && rustix::process::pidfd_send_signal(&fd, Signal::KILL).is_ok()
        {
            killed += 1;
        }
    }
    killed
}
