//! `ff quickstart` as a person runs it: the closing table, a second run, Ctrl-C, and the clear
//! refusals before anything starts.

use firefly_cli::mount::mounts;
use firefly_tests::{Ran, digits, eventually, ff, python, ran};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

fn quickstart(state: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(ff());
    command.arg("--state").arg(state).args(["quickstart", "--port-base", "0"]).args(args);
    command
}

#[track_caller]
fn assert_shows_everything(run: Ran) {
    let out = run.ok();
    for shown in [
        "accuracy on held-out digits",
        "SIGKILL to rank 1",
        "SIGKILL to storage server n4",
        "resuming",
        "longest pause",
        "whole again",
        "through fs3",
        "allreduce",
    ] {
        assert!(out.contains(shown), "{shown:?} is not in:\n{out}");
    }
}

/// No process and no mount of the cluster in `state` is left.
#[track_caller]
fn assert_nothing_left(state: &Path) {
    let state = state.to_str().expect("a UTF-8 path");
    assert!(mounts().unwrap().iter().all(|m| !m.mountpoint.starts_with(state)), "a mount is left");
    eventually("every process of the cluster ends", || processes_naming(state).is_empty());
}

fn processes_naming(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name();
        if name.to_str().and_then(|n| n.parse::<i32>().ok()).is_none_or(|p| p == std::process::id() as i32) {
            continue;
        }
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(text) {
            found.push(line);
        }
    }
    found
}

#[test]
fn native_shows_everything_and_can_run_again() {
    let Some(digits) = digits() else { return };
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("qs");
    for _ in 0..2 {
        let args = ["--native", "--digits", digits.to_str().unwrap()];
        assert_shows_everything(ran(quickstart(&state, &args)));
        assert_nothing_left(&state);
    }
}

#[test]
fn torch_shows_everything() {
    let Some(python) = python() else { return };
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("qs");
    assert_shows_everything(ran(quickstart(&state, &["--python", python.to_str().unwrap()])));
    assert_nothing_left(&state);
}

#[test]
fn ctrl_c_in_mid_run_leaves_nothing_behind() {
    let Some(digits) = digits() else { return };
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("qs");
    let mut child = quickstart(&state, &["--native", "--digits", digits.to_str().unwrap()])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("epoch")), "training never started");
    // SAFETY: kill takes no pointers; the child is ours and not yet waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGINT) }, 0);
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{rest:?}");
    assert_nothing_left(&state);
}

#[test]
fn a_folder_in_use_is_refused_before_anything_starts() {
    let Some(digits) = digits() else { return };
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("thesis.tex"), "years of work").unwrap();
    ran(quickstart(dir.path(), &["--native", "--digits", digits.to_str().unwrap()])).fails(1, "in use");
    assert_eq!(std::fs::read(dir.path().join("thesis.tex")).unwrap(), b"years of work");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_port_in_use_is_refused_before_anything_starts() {
    let Some(digits) = digits() else { return };
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("qs");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut command = Command::new(ff());
    command.arg("--state").arg(&state).args(["quickstart", "--native", "--port-base", &port]);
    command.args(["--digits", digits.to_str().unwrap()]);
    ran(command).fails(1, "--port-base");
    assert!(!state.exists());
}

#[test]
fn a_missing_interpreter_or_data_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("qs");
    ran(quickstart(&state, &["--python", "/nonexistent/python"])).fails(1, "--native");
    ran(quickstart(&state, &["--native", "--digits", "/nonexistent.gz"])).fails(1, "does not exist");
    ran(quickstart(&state, &["--epochs", "0"])).fails(2, "--epochs");
    assert!(!state.exists());
}

#[test]
fn without_root_or_fuse_it_says_so_before_anything_starts() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("qs");
    // A copy that another user may run, wherever the project lies.
    let copy = dir.path().join("ff");
    std::fs::copy(ff(), &copy).unwrap();
    for path in [dir.path(), &copy] {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&copy);
    nobody.arg("--state").arg(&state).args(["quickstart", "--native"]);
    ran(nobody).fails(1, "needs root");

    // A mount namespace of its own, with an empty /dev.
    let mut no_fuse = Command::new("unshare");
    no_fuse.args(["--mount", "sh", "-c", "mount -t tmpfs none /dev && exec \"$0\" \"$@\""]).arg(&copy);
    no_fuse.arg("--state").arg(&state).args(["quickstart", "--native"]);
    ran(no_fuse).fails(1, "/dev/fuse");
    assert!(!state.exists());
}
