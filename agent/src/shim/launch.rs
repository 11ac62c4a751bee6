//! Starting the user's command.

use super::Child;
use crate::files::{Prepare, Start};
use crate::{sys, user};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Why the command could not be run.
pub(crate) struct Failure {
    /// As a shell would exit: 127 not found, 126 not runnable.
    pub(crate) code: i32,
    pub(crate) message: String,
}

/// Largest error file that is read.
const ERROR_FILE_BYTES: u64 = 1 << 20;

/// The rank's environment: a clean base, the job's own variables, then the launcher's, so that the
/// last word on a rank's identity is ours.
pub(crate) fn environment(prepare: &Prepare, start: &Start, dir: &Path) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    env.insert(
        "PATH".to_owned(),
        std::env::var("PATH").unwrap_or_else(|_| "/usr/local/bin:/usr/bin:/bin".into()),
    );
    for name in ["LANG", "LC_ALL", "TZ"] {
        if let Ok(value) = std::env::var(name) {
            env.insert(name.to_owned(), value);
        }
    }
    let uid = if prepare.user.is_empty() { rustix::process::geteuid().as_raw() } else { prepare.uid };
    env.insert("HOME".to_owned(), sys::home_of(uid).unwrap_or_else(|| "/".into()));
    if !prepare.user.is_empty() {
        env.insert("USER".to_owned(), prepare.user.clone());
        env.insert("LOGNAME".to_owned(), prepare.user.clone());
    }
    env.extend(prepare.env.clone());
    let status = dir.join("status");
    let ours: [(&str, String); 22] = [
        ("RANK", prepare.rank.to_string()),
        ("LOCAL_RANK", prepare.local_rank.to_string()),
        ("WORLD_SIZE", prepare.world_size.to_string()),
        ("LOCAL_WORLD_SIZE", prepare.local_world_size.to_string()),
        ("GROUP_RANK", prepare.node_rank.to_string()),
        ("GROUP_WORLD_SIZE", prepare.nodes.to_string()),
        ("ROLE_NAME", "default".to_owned()),
        ("ROLE_RANK", prepare.rank.to_string()),
        ("ROLE_WORLD_SIZE", prepare.world_size.to_string()),
        ("MASTER_ADDR", start.master_address.clone()),
        ("MASTER_PORT", start.master_port.to_string()),
        ("TORCHELASTIC_RESTART_COUNT", prepare.restart_count.to_string()),
        ("TORCHELASTIC_MAX_RESTARTS", prepare.max_restarts.to_string()),
        ("TORCHELASTIC_RUN_ID", format!("j{}", prepare.job)),
        ("TORCHELASTIC_ERROR_FILE", status.join("error.json").display().to_string()),
        ("FIREFLY_NODE_ID", prepare.node_id.to_string()),
        ("FIREFLY_JOB_ID", prepare.job.to_string()),
        ("FIREFLY_JOB_NAME", prepare.name.clone()),
        ("FIREFLY_EPOCH", prepare.epoch.to_string()),
        ("FIREFLY_JOB_SECRET", prepare.job_secret.clone()),
        ("FIREFLY_STATUS", status.display().to_string()),
        ("PYTHONUNBUFFERED", prepare.env.get("PYTHONUNBUFFERED").cloned().unwrap_or_else(|| "1".into())),
    ];
    env.extend(ours.map(|(name, value)| (name.to_owned(), value)));
    env
}

/// Starts the command in a session of its own, with two pipes for its output.
pub(crate) fn spawn(prepare: &Prepare, start: &Start, dir: &Path) -> Result<Child, Failure> {
    let fail = |code, message: String| Failure { code, message };
    let credentials = user::credentials(prepare).map_err(|e| fail(126, e))?;
    let status = dir.join("status");
    let made = fs::create_dir_all(&status).and_then(|()| match &credentials {
        Some(who) => std::os::unix::fs::chown(&status, Some(who.uid), Some(who.gid)),
        None => Ok(()),
    });
    made.map_err(|e| fail(126, format!("cannot make {}: {e}", status.display())))?;
    let env = environment(prepare, start, dir);
    let directory = match prepare.working_directory.as_str() {
        "" => env.get("HOME").map_or("/", String::as_str),
        directory => directory,
    };
    let place =
        CString::new(directory).map_err(|_| fail(126, "the working directory contains a NUL".into()))?;
    let (Some(program), arguments) = (prepare.command.first(), prepare.command.get(1..).unwrap_or(&[]))
    else {
        return Err(fail(127, "the command is empty".into()));
    };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(&env);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: `become_rank` makes only async-signal-safe system calls, on memory prepared before
    // the fork.
    unsafe {
        command.pre_exec(move || sys::become_rank(credentials.as_ref(), &place));
    }
    let child = command.spawn().map_err(|e| {
        let code = if e.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 };
        fail(code, format!("cannot run {program:?} in {directory}: {e}"))
    })?;
    let pid = i32::try_from(child.id()).unwrap_or(0);
    match (child.stdout, child.stderr) {
        (Some(stdout), Some(stderr)) => Ok(Child { pid, stdout: stdout.into(), stderr: stderr.into() }),
        _ => Err(fail(126, "no pipes for the output".into())),
    }
}

/// What the rank left in its error file (the format of torch's elastic agent), in one line.
pub(crate) fn error_file(dir: &Path) -> Option<String> {
    let path = dir.join("status").join("error.json");
    // The folder belongs to the rank: a link in it could lead anywhere.
    let meta = fs::symlink_metadata(&path).ok().filter(|m| m.is_file() && m.len() <= ERROR_FILE_BYTES)?;
    let text = fs::read_to_string(&path).ok().filter(|t| t.len() as u64 <= meta.len())?;
    let value: serde_json::Value = serde_json::from_str(&text).ok()?;
    let message = value.get("message")?;
    let message = message.get("message").unwrap_or(message).as_str()?;
    message.lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_gets_torchruns_environment_and_cannot_be_told_otherwise() {
        let prepare = Prepare {
            job: 3,
            epoch: 2,
            rank: 5,
            local_rank: 1,
            world_size: 8,
            local_world_size: 4,
            node_rank: 1,
            nodes: 2,
            node_id: 7,
            restart_count: 1,
            job_secret: "s".into(),
            env: [("RANK".into(), "99".into()), ("MY".into(), "own".into())].into(),
            ..Prepare::default()
        };
        let start = Start { master_address: "10.0.0.1".into(), master_port: 20_001 };
        let env = environment(&prepare, &start, Path::new("/r"));
        for (name, value) in [
            ("RANK", "5"),
            ("LOCAL_RANK", "1"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("GROUP_RANK", "1"),
            ("MASTER_ADDR", "10.0.0.1"),
            ("MASTER_PORT", "20001"),
            ("TORCHELASTIC_RESTART_COUNT", "1"),
            ("TORCHELASTIC_RUN_ID", "j3"),
            ("FIREFLY_NODE_ID", "7"),
            ("FIREFLY_JOB_ID", "3"),
            ("FIREFLY_EPOCH", "2"),
            ("FIREFLY_JOB_SECRET", "s"),
            ("FIREFLY_STATUS", "/r/status"),
            ("MY", "own"),
        ] {
            assert_eq!(env.get(name).map(String::as_str), Some(value), "{name}");
        }
    }

    #[test]
    fn the_error_file_of_torch_is_read_and_a_link_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let status = dir.path().join("status");
        fs::create_dir(&status).unwrap();
        assert_eq!(error_file(dir.path()), None);
        let text = r#"{"message": {"message": "ValueError: no\nmore", "extraInfo": {"timestamp": "1"}}}"#;
        fs::write(status.join("error.json"), text).unwrap();
        assert_eq!(error_file(dir.path()).as_deref(), Some("ValueError: no"));
        fs::remove_file(status.join("error.json")).unwrap();
        fs::write(dir.path().join("other"), text).unwrap();
        std::os::unix::fs::symlink("../other", status.join("error.json")).unwrap();
        assert_eq!(error_file(dir.path()), None);
    }
}
