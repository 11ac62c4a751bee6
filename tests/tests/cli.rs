//! The command line's doors: every wrong input gets one clear sentence and the documented exit
//! code (1 failed, 2 wrong usage), and changes nothing.

use firefly_cli::local::start_ticks;
use firefly_tests::{Cluster, eventually, ff, ran};
use std::process::Command;

fn bare(args: &[&str]) -> Command {
    let mut command = Command::new(ff());
    command.args(args);
    command
}

#[test]
fn without_a_cluster_every_command_says_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().to_str().unwrap();
    for args in [
        vec!["status"],
        vec!["fs", "ls", "/"],
        vec!["job", "ls"],
        vec!["node", "ls"],
        vec!["run", "--", "true"],
    ] {
        let mut all = vec!["--state", state];
        all.extend(args);
        ran(bare(&all)).fails(1, "ff up");
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for args in [
        vec!["frobnicate"],
        vec!["up", "--agents", "0"],
        vec!["up", "--port-base", "99999"],
        vec!["run"],
        vec!["run", "-n", "0", "--", "true"],
        vec!["run", "-n", "-1", "--", "true"],
        vec!["job", "status"],
        vec!["fs", "put", "one-argument"],
        vec!["completion", "tcsh"],
    ] {
        let run = ran(bare(&args));
        assert_eq!(run.code, 2, "{args:?}: {run:?}");
        assert!(!run.err.contains("panicked"), "{args:?}: {}", run.err);
    }
}

#[test]
fn help_completion_and_man_pages_exist() {
    let dir = tempfile::tempdir().unwrap();
    let help = ran(bare(&["--help"])).ok();
    for command in ["quickstart", "up", "down", "status", "fs", "run", "job", "node"] {
        assert!(help.contains(command), "{command}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(ran(bare(&["completion", shell])).ok().contains("quickstart"));
    }
    ran(bare(&["man", dir.path().to_str().unwrap()])).ok();
    assert!(dir.path().join("ff-quickstart.1").exists());
}

#[test]
fn every_door_refuses_bad_input_with_a_sentence() {
    let cluster = Cluster::start();
    let long = "n".repeat(256);
    let long_path = format!("/{long}");
    let cases: [(&[&str], i32, &str); 12] = [
        (&["job", "status", "j999"], 1, "999"),
        (&["job", "stop", "nobody"], 1, "nobody"),
        (&["job", "logs", "j999"], 1, "999"),
        (&["job", "why", "j999"], 1, "999"),
        (&["node", "cordon", "77"], 1, "77"),
        (&["fs", "ls", "/missing"], 1, "missing"),
        (&["fs", "stat", "/missing"], 1, "missing"),
        (&["fs", "get", "/missing", "/tmp/never-written"], 1, "missing"),
        (&["fs", "put", "/nonexistent-local-file", "/x"], 1, "nonexistent-local-file"),
        (&["fs", "rm", "/missing"], 1, "missing"),
        (&["fs", "put", "/etc/hostname", &long_path], 1, "name"),
        (&["fs", "mount", "/etc/hostname"], 1, "hostname"),
    ];
    for (args, code, what) in cases {
        let run = cluster.ff(args);
        assert_eq!(run.code, code, "{args:?}: {run:?}");
        assert!(run.err.to_lowercase().contains(what), "{args:?}: {what:?} is not in {}", run.err);
        assert!(!run.err.contains("panicked"), "{args:?}: {}", run.err);
    }
    assert!(!std::path::Path::new("/tmp/never-written").exists());
    assert!(cluster.ff(&["--json", "fs", "ls", "/"]).ok().trim_start().starts_with(['[', '{']));
}

#[test]
fn a_stranger_with_the_wrong_secret_is_refused() {
    let cluster = Cluster::start();
    let other = cluster.dir().join("stranger");
    std::fs::create_dir(&other).unwrap();
    std::fs::copy(cluster.local.state().join("cluster.toml"), other.join("cluster.toml")).unwrap();
    std::fs::write(other.join("secret"), format!("{}\n", "ab".repeat(32))).unwrap();
    let state = other.to_str().unwrap();
    for args in [["fs", "ls", "/"].as_slice(), &["job", "ls"], &["node", "ls"], &["run", "--", "true"]] {
        let mut all = vec!["--state", state];
        all.extend(args);
        let run = ran(bare(&all));
        assert_eq!(run.code, 1, "{args:?}: {run:?}");
        assert!(run.err.contains("token") || run.err.contains("secret"), "{args:?}: {}", run.err);
    }
}

#[test]
fn up_again_brings_back_what_was_ended_and_down_ends_all() {
    let cluster = Cluster::start();
    cluster.ff(&["status"]).ok();
    let before = cluster.local.running("meta").unwrap();
    assert!(cluster.local.kill_role("meta").unwrap());
    cluster.ff(&["status"]).fails(1, "ff up");
    cluster.ff(&["up"]).ok();
    assert_ne!(cluster.local.running("meta").unwrap().pid, before.pid);
    let rank = cluster.dir().join("rank");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 1000", rank.display());
    cluster.ff(&["run", "-d", "--", "sh", "-c", &script]).ok();
    eventually("the rank runs", || rank.exists());
    let pid = std::fs::read_to_string(&rank).unwrap().trim().parse().unwrap();
    let down = cluster.ff(&["down"]).ok();
    assert!(down.contains("manager"), "{down}");
    assert!(start_ticks(pid).is_none(), "a rank outlived `ff down`");
    for role in cluster.local.roles().unwrap() {
        assert!(cluster.local.running(&role).is_none(), "{role} still runs");
    }
    assert!(cluster.ff(&["down"]).ok().contains("nothing was running"));
}

/// libibverbs is looked up at run time, so that one binary starts on machines with and without it.
#[test]
fn no_binary_is_linked_against_the_rdma_libraries() {
    let library = ff().with_file_name("libffreduce.so");
    assert!(library.exists(), "{} is not built: run `cargo build --workspace`", library.display());
    for file in [ff(), library] {
        let mut command = Command::new("readelf");
        command.arg("--dynamic").arg("--wide").arg(&file);
        let table = ran(command).ok();
        let needed: Vec<&str> = table.lines().filter(|line| line.contains("(NEEDED)")).collect();
        // The control: what is linked shows.
        assert!(needed.iter().any(|line| line.contains("libc.so.6")), "{table}");
        for line in needed {
            assert!(!line.contains("ibverbs") && !line.contains("rdmacm"), "{}: {line}", file.display());
        }
    }
}

#[test]
fn status_says_which_transport_is_used_and_why_not_rdma() {
    let cluster = Cluster::start();
    let status = |transport: &str, devices: Option<&str>| {
        let mut command = bare(&["--json", "status", "--state"]);
        command.arg(cluster.local.state()).env("FIREFLY_TRANSPORT", transport);
        devices.map(|devices| command.env("FIREFLY_RDMA_DEVICES", devices));
        ran(command)
    };
    let told: serde_json::Value = serde_json::from_str(&status("tcp", None).ok()).unwrap();
    let network = &told["network"];
    assert_eq!(network["here"]["why_not"], "TCP was asked for", "{network:#}");
    let servers = network["servers"].as_array().unwrap();
    assert_eq!(servers.len(), 4, "{network:#}");
    for server in servers {
        assert_eq!(server["from_here"]["connections"][0]["transport"], "tcp", "{server:#}");
        assert_eq!(server["there"]["fabric"]["transport"], "auto", "{server:#}");
    }
    // Options that mean nothing are refused, not passed over.
    status("udp", None).fails(1, "auto, tcp or rdma");
    let files = |transport: &str| {
        let mut command = bare(&["fs", "ls", "/", "--state"]);
        command.arg(cluster.local.state()).env("FIREFLY_TRANSPORT", transport);
        ran(command)
    };
    files("udp").fails(1, "auto, tcp or rdma");
    files("tcp").ok();
}
