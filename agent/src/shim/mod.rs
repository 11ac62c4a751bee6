//! The shim: one small process per rank, in a session of its own. It holds the rank at the
//! barrier, runs it, keeps its output and records its end. One thread, one poll loop.

mod launch;
mod output;
mod port;

use crate::files::{self, Prepare, Start, State, Status, Stop};
use crate::spool::Writer;
use crate::sys;
use output::{Pipe, now_lines};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, WaitOptions, wait};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often leases and deadlines are looked at.
const TICK: Duration = Duration::from_millis(250);
/// How long output of descendants is awaited once the rank and they have been killed.
const DRAIN: Duration = Duration::from_millis(500);
/// Exit codes of the shim itself, for its log.
const EXIT_USAGE: i32 = 2;
const EXIT_TAKEN: i32 = 3;

/// Runs a shim until its rank is over. `arguments`: `--dir DIR`, the rank's folder.
pub fn shim_main(arguments: impl IntoIterator<Item = OsString>) -> ! {
    let mut arguments = arguments.into_iter();
    let dir = match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(flag), Some(dir), None) if flag == "--dir" => PathBuf::from(dir),
        _ => {
            eprintln!("the shim is started by the agent, with --dir DIR");
            std::process::exit(EXIT_USAGE);
        }
    };
    let code = match Shim::open(&dir) {
        Ok(Some(mut shim)) => match shim.run() {
            Ok(()) => 0,
            Err(e) => {
                eprintln!("{e}");
                shim.kill_all();
                shim.finish(None, format!("its shim failed: {e}"));
                1
            }
        },
        Ok(None) => {
            eprintln!("another shim has {}", dir.display());
            EXIT_TAKEN
        }
        Err(e) => {
            eprintln!("{}: {e}", dir.display());
            1
        }
    };
    std::process::exit(code)
}

struct Shim {
    dir: PathBuf,
    state_dir: PathBuf,
    prepare: Prepare,
    status: Status,
    log: Writer,
    signals: OwnedFd,
    control: File,
    stdout: Option<Pipe>,
    stderr: Option<Pipe>,
    claim: Option<port::Claim>,
    /// When the rank must be gone.
    deadline: Option<Instant>,
    stop_detail: Option<String>,
    born: Duration,
    /// Held for life: who holds it is alive.
    _lock: File,
}

impl Shim {
    /// `None`: another shim has the rank.
    fn open(dir: &Path) -> io::Result<Option<Self>> {
        let Some(lock) = sys::lock(&dir.join("lock"))? else { return Ok(None) };
        // Fails only if we lead a group already; the agent starts us so that we do not.
        let _ = rustix::process::setsid();
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let signals = sys::signal_fd(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP])?;
        let prepare: Prepare = files::read(&dir.join("prepare.json"))?
            .ok_or_else(|| io::Error::other("prepare.json is missing"))?;
        if let Some(old) = files::read::<Status>(&dir.join("status.json"))? {
            // The rank has had a shim before: it is over, whatever it says.
            return Err(io::Error::other(format!("the rank has been {:?} under another shim", old.state)));
        }
        let control =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(dir.join("ctl"))?;
        let state_dir = dir
            .parent()
            .and_then(Path::parent)
            .ok_or_else(|| io::Error::other("the folder is not a rank's"))?;
        let pid = i32::try_from(std::process::id()).unwrap_or(0);
        Ok(Some(Self {
            dir: dir.to_owned(),
            state_dir: state_dir.to_owned(),
            prepare,
            status: Status { shim: sys::identify(pid), ..Status::default() },
            log: Writer::new(dir),
            signals,
            control,
            stdout: None,
            stderr: None,
            claim: None,
            deadline: None,
            stop_detail: None,
            born: sys::boottime(),
            _lock: lock,
        }))
    }

    fn run(&mut self) -> io::Result<()> {
        if self.prepare.rank == 0 {
            let claim = port::claim(self.prepare.job, self.prepare.epoch)?;
            self.status.master_port = claim.port();
            self.claim = Some(claim);
        }
        self.publish()?;
        loop {
            self.wait()?;
            let mut buffer = [0; 64];
            while self.control.read(&mut buffer).is_ok_and(|n| n > 0) {}
            while let Some(signal) = sys::next_signal(&self.signals) {
                // The machine goes down, or somebody means us: the rank gets its grace.
                if signal != libc::SIGCHLD {
                    self.stop(self.prepare.grace_ms, format!("its shim got {}", name(signal)));
                }
            }
            if let Some(stop) = files::read::<Stop>(&self.dir.join("stop.json"))? {
                self.stop(stop.grace_ms, String::new());
            }
            self.check_lease();
            self.pump();
            if self.status.state == State::Prepared {
                if let Some(detail) = self.stop_detail.take() {
                    let detail = if detail.is_empty() { "stopped before it started".into() } else { detail };
                    self.finish(None, detail);
                    return Ok(());
                }
                if let Some(start) = files::read::<Start>(&self.dir.join("start.json"))?
                    && !self.launch(&start)?
                {
                    return Ok(());
                }
            }
            if let Some(exit) = self.reap()? {
                self.kill_all();
                self.drain();
                let detail = self.stop_detail.take().unwrap_or_default();
                self.finish(Some(exit), detail);
                return Ok(());
            }
            if self.deadline.is_some_and(|d| Instant::now() >= d) {
                self.signal_all(Signal::KILL);
            }
        }
    }

    fn wait(&self) -> io::Result<()> {
        let mut fds =
            vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.control, PollFlags::IN)];
        for pipe in [&self.stdout, &self.stderr].into_iter().flatten() {
            fds.push(PollFd::new(pipe.file(), PollFlags::IN));
        }
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos().into() };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Opens the barrier. False if the command could not be run.
    fn launch(&mut self, start: &Start) -> io::Result<bool> {
        // From here on the port is the rank's; the claim on its number stays.
        if let Some(claim) = &mut self.claim {
            claim.release_socket();
        }
        match launch::spawn(&self.prepare, start, &self.dir) {
            Ok(child) => {
                self.status.state = State::Running;
                self.status.process = Some(sys::identify(child.pid));
                self.stdout = Some(Pipe::new(child.stdout, false)?);
                self.stderr = Some(Pipe::new(child.stderr, true)?);
                self.publish()?;
                Ok(true)
            }
            Err(failure) => {
                self.log.append(&now_lines(&failure.message, true));
                self.status.exit_code = Some(failure.code);
                self.finish(None, failure.message);
                Ok(false)
            }
        }
    }

    /// Begins to end the rank; a shorter grace than before counts.
    fn stop(&mut self, grace_ms: u64, detail: String) {
        let deadline = Instant::now() + Duration::from_millis(grace_ms);
        if self.stop_detail.is_none() {
            self.stop_detail = Some(detail);
            self.signal_all(if grace_ms == 0 { Signal::KILL } else { Signal::TERM });
            self.deadline = Some(deadline);
        } else if self.deadline.is_none_or(|d| deadline < d) {
            self.deadline = Some(deadline);
        }
    }

    /// Ends the rank when nobody has heard the scheduler for too long.
    fn check_lease(&mut self) {
        let lease = Duration::from_millis(self.prepare.orphan_lease_ms);
        if lease.is_zero() || self.stop_detail.is_some() {
            return;
        }
        let now = sys::boottime();
        let text = std::fs::read_to_string(self.state_dir.join("lease")).unwrap_or_default();
        let told = text.trim().parse().map_or(Duration::ZERO, Duration::from_nanos);
        // A later time than now is from before a reboot: it says nothing.
        let told = if told > now { Duration::ZERO } else { told };
        if now.saturating_sub(told.max(self.born)) > lease {
            let detail = format!("no scheduler was heard for {} s (orphan lease)", lease.as_secs());
            self.stop(0, detail);
        }
    }

    /// Moves output to the log.
    fn pump(&mut self) {
        let mut lines = Vec::new();
        for slot in [&mut self.stdout, &mut self.stderr] {
            if let Some(pipe) = slot
                && !pipe.read(&mut lines)
            {
                *slot = None;
            }
        }
        if !lines.is_empty() {
            self.log.append(&lines);
            files::ring(&self.state_dir.join("wake"));
        }
    }

    /// After the end: what is left in the pipes.
    fn drain(&mut self) {
        let until = Instant::now() + DRAIN;
        while (self.stdout.is_some() || self.stderr.is_some()) && Instant::now() < until {
            self.pump();
            if self.stdout.is_some() || self.stderr.is_some() {
                let _ = self.wait();
            }
        }
        let mut lines = Vec::new();
        for pipe in [&mut self.stdout, &mut self.stderr].into_iter().flatten() {
            pipe.flush(&mut lines);
        }
        self.log.append(&lines);
    }

    /// Collects dead children; the rank's own end is returned.
    fn reap(&self) -> io::Result<Option<(Option<i32>, Option<i32>)>> {
        let main = self.status.process.map_or(0, |p| p.pid);
        let mut ended = None;
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if pid.as_raw_nonzero().get() == main {
                        ended = Some((status.exit_status(), status.terminating_signal()));
                    }
                }
                Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(ended),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn signal_all(&self, signal: Signal) {
        let Some(process) = self.status.process else { return };
        sys::signal_group(process.pid, signal);
        // Those that made sessions of their own: direct children now, deeper ones as they fall
        // to us when their parents die.
        for child in sys::children() {
            if child != process.pid
                && let Some(pid) = Pid::from_raw(child)
            {
                let _ = rustix::process::kill_process(pid, signal);
            }
        }
    }

    /// Kills every descendant: each that dies hands its children to us, until there are none.
    fn kill_all(&self) {
        let until = Instant::now() + Duration::from_secs(5);
        loop {
            self.signal_all(Signal::KILL);
            let _ = self.reap();
            if sys::children().is_empty() || Instant::now() > until {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn publish(&mut self) -> io::Result<()> {
        self.status.log_end = self.log.end();
        files::write(&self.dir.join("status.json"), &self.status, 0o600)?;
        files::ring(&self.state_dir.join("wake"));
        Ok(())
    }

    fn finish(&mut self, exit: Option<(Option<i32>, Option<i32>)>, detail: String) {
        if let Some((code, signal)) = exit {
            (self.status.exit_code, self.status.signal) = (code, signal);
        }
        self.status.state = State::Exited;
        self.status.detail = match launch::error_file(&self.dir) {
            Some(error) if detail.is_empty() => error,
            _ => detail,
        };
        // Full disk: the end must be told all the same, so try for a while. If it stays in vain the
        // agent finds the lock free and says so itself.
        for _ in 0..50 {
            match self.publish() {
                Ok(()) => return,
                Err(e) => eprintln!("cannot record the end of the rank: {e}"),
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGTERM => "SIGTERM",
        libc::SIGINT => "SIGINT",
        libc::SIGHUP => "SIGHUP",
        _ => "a signal",
    }
}

/// What the launcher hands over.
pub(crate) struct Child {
    pid: i32,
    stdout: OwnedFd,
    stderr: OwnedFd,
}
