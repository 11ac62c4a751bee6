//! On whose behalf a request runs. The kernel sends user and primary group; supplementary groups
//! are read from /proc while the caller waits in its system call.

use fs3_client::Credentials;
use fuser::Request;

/// Ids of a request, before its groups are known.
#[derive(Clone, Copy)]
pub(crate) struct Caller {
    uid: u32,
    gid: u32,
    pid: u32,
}

impl Caller {
    pub(crate) fn of(request: &Request) -> Self {
        Self { uid: request.uid(), gid: request.gid(), pid: request.pid() }
    }

    /// With supplementary groups, which root does not need.
    pub(crate) fn credentials(self) -> Credentials {
        let groups = if self.uid == 0 || self.pid == 0 { Vec::new() } else { groups_of(self.pid) };
        Credentials { uid: self.uid, gid: self.gid, groups }
    }
}

fn groups_of(pid: u32) -> Vec<u32> {
    // A process that is gone or hidden has no groups that could grant it anything.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    parse_groups(&status)
}

fn parse_groups(status: &str) -> Vec<u32> {
    status
        .lines()
        .find_map(|line| line.strip_prefix("Groups:"))
        .map(|groups| groups.split_whitespace().filter_map(|g| g.parse().ok()).collect())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_read_from_the_status_text() {
        assert_eq!(parse_groups("Name:\tx\nGroups:\t4 24 1000 \nVmPeak: 1\n"), [4, 24, 1000]);
        assert!(parse_groups("Groups:\t\n").is_empty());
        assert!(parse_groups("").is_empty());
    }
}
