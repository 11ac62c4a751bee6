//! A network of one's own: a namespace with a bridge for the test and one namespace per server, each
//! of which can be cut off without anybody being told. Nothing outside these is touched; all of it
//! goes away with the processes that hold it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// Address of the test, the manager and the meta server.
pub const HUB: &str = "10.77.0.1";

/// The namespaces.
pub struct Lab {
    servers: Vec<(u32, Child)>,
}

fn ip(args: &str) {
    let done = Command::new("ip").args(args.split(' ')).output().expect("ip runs");
    assert!(done.status.success(), "ip {args}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Moves this thread, and with it what it starts from now on, into a network namespace: that of
/// another process, or a new one.
fn enter(namespace: Option<&Path>) {
    let result = match namespace {
        // SAFETY: the call takes no pointer.
        None => unsafe { libc::unshare(libc::CLONE_NEWNET) },
        Some(path) => {
            let file = File::open(path).expect("the namespace is there");
            // SAFETY: the call takes no pointer; the descriptor is open.
            unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) }
        }
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

impl Lab {
    /// Moves this thread into a new network in which each of `servers` has a namespace of its own.
    /// `None`, said loudly, where that is not allowed.
    pub fn enter(servers: &[u32]) -> Option<Self> {
        let has_ip = Command::new("ip").arg("-V").output().is_ok_and(|o| o.status.success());
        // SAFETY: geteuid cannot fail and takes nothing.
        if unsafe { libc::geteuid() } != 0 || !has_ip {
            eprintln!("SKIPPED, LOUDLY: network namespaces need root and the ip command");
            return None;
        }
        enter(None);
        ip("link set lo up");
        ip("link add hub type bridge");
        ip(&format!("addr add {HUB}/24 dev hub"));
        ip("link set hub up");
        let mut lab = Self { servers: Vec::new() };
        for &server in servers {
            let mut holder = Command::new("sleep");
            holder.arg("infinity");
            // SAFETY: unshare is a bare system call; prctl makes the holder end with this thread.
            unsafe {
                holder.pre_exec(|| {
                    if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
                        || libc::unshare(libc::CLONE_NEWNET) != 0
                    {
                        return Err(std::io::Error::last_os_error());
                    }
                    Ok(())
                });
            }
            // `spawn` returns once the new program runs, so after the unshare.
            let holder = holder.spawn().expect("a process to hold the namespace");
            let pid = holder.id();
            ip(&format!("link add p{server} type veth peer name s{server}"));
            ip(&format!("link set s{server} netns {pid}"));
            lab.servers.push((server, holder));
            let inside = |command: &str| {
                let net = format!("--net={}", lab.namespace(server).display());
                let done = Command::new("nsenter").arg(net).arg("ip").args(command.split(' ')).output();
                assert!(done.expect("nsenter runs").status.success(), "{command}");
            };
            inside("link set lo up");
            inside(&format!("addr add {}/24 dev s{server}", Self::address(server)));
            inside(&format!("link set s{server} up"));
            ip(&format!("link set p{server} up"));
            lab.join(server);
        }
        Some(lab)
    }

    /// Address of a server.
    pub fn address(server: u32) -> String {
        format!("10.77.0.{server}")
    }

    fn namespace(&self, server: u32) -> PathBuf {
        let (_, holder) = self.servers.iter().find(|(s, _)| *s == server).expect("a server of this lab");
        format!("/proc/{}/ns/net", holder.id()).into()
    }

    /// From now on nothing reaches the server or comes from it, and nobody is told.
    pub fn cut(&self, server: u32) {
        ip(&format!("link set p{server} nomaster"));
    }

    /// Takes the cut back.
    pub fn join(&self, server: u32) {
        ip(&format!("link set p{server} master hub"));
    }

    /// A program that runs `program` in the server's namespace.
    pub fn wrapper(&self, server: u32, program: &Path, dir: &Path) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join(format!("in-{server}"));
        let net = self.namespace(server);
        let text = format!("#!/bin/sh\nexec nsenter --net={} {} \"$@\"\n", net.display(), program.display());
        std::fs::write(&path, text).expect("the wrapper");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("its mode");
        path
    }

    /// Starts a thread in the server's namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        server: u32,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let namespace = self.namespace(server);
        std::thread::spawn(move || {
            enter(Some(&namespace));
            work()
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for (_, holder) in &mut self.servers {
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}
