//! Which process a heartbeat comes from, in a form that lets a manager on the same machine see
//! that it is gone. A connection that breaks proves nothing (a firewall can refuse it); the kernel's
//! list of processes does.

use crate::mgmtd::ProcessIdentity;
use std::os::unix::fs::MetadataExt;

/// This process, or `None` where /proc does not tell.
pub fn of_self() -> Option<ProcessIdentity> {
    let (boot_id, pid_namespace) = place()?;
    let pid = std::process::id();
    let start_ticks = start_ticks(pid.try_into().ok()?)?;
    Some(ProcessIdentity { boot_id, pid_namespace, pid, start_ticks })
}

/// Whether it is certain that the process has ended: it ran under this very kernel, in this process
/// id namespace, and is not there any more. A zombie counts as gone: it serves nothing and its
/// files are closed.
pub fn is_gone(process: &ProcessIdentity) -> bool {
    let Ok(pid) = i32::try_from(process.pid) else { return false };
    is_here(process) && start_ticks(pid) != Some(process.start_ticks)
}

/// Whether the process runs where its end can be seen from here.
pub fn is_here(process: &ProcessIdentity) -> bool {
    process.pid != 0
        && process.start_ticks != 0
        && place().is_some_and(|(boot_id, namespace)| {
            boot_id == process.boot_id && namespace == process.pid_namespace
        })
}

fn place() -> Option<(String, u64)> {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = std::fs::metadata("/proc/self/ns/pid").ok()?.ino();
    Some((boot_id.trim().to_owned(), namespace))
}

/// Start time of a process in ticks since boot; `None` when there is no such process or it is a
/// zombie.
pub fn start_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in parentheses and may itself hold spaces and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_of_this_kernel_and_namespace_can_be_seen_to_be_gone() {
        let myself = of_self().unwrap();
        assert!(!is_gone(&myself));
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        let other = ProcessIdentity { pid, start_ticks: start_ticks(pid as i32).unwrap(), ..myself.clone() };
        assert!(!is_gone(&other));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_gone(&other));
        assert!(!is_gone(&ProcessIdentity { boot_id: "elsewhere".into(), ..other.clone() }));
        assert!(!is_gone(&ProcessIdentity { pid_namespace: 1, ..other.clone() }));
        assert!(!is_gone(&ProcessIdentity::default()));
        // The number was given out again.
        assert!(is_gone(&ProcessIdentity { start_ticks: 1, ..myself }));
    }
}
