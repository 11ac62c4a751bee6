//! The file system over a wire that is bad: the servers use rxe1, the mount rxe0, and packets cross
//! the veth pair between them. The servers' addresses are not on that wire, so that TCP works
//! whatever happens to it.

use crate::fs3::{check, cluster_at, content, write};
use crate::wire::{PACKET_BYTES, Wire, resent};
use firefly_net::NetOptions;
use firefly_tests::{Cluster, eventually, ran};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::process::Command;
use std::sync::mpsc;

fn cluster() -> Cluster {
    let on = |device: &str| NetOptions { devices: vec![device.to_owned()], ..NetOptions::default() };
    cluster_at(|_| IpAddr::from([10, 9, 0, 1]), &on("rxe1"), &on("rxe0"))
}

fn set_link(state: &str) {
    let mut command = Command::new("/usr/bin/ip");
    command.args(["link", "set", "d1", state]);
    ran(command).ok();
}

/// The scenario has made packets late and lets some get lost.
#[test]
#[ignore = "needs two RDMA devices on a bad wire: tests/rdma-vm/run.sh faults"]
fn files_survive_delay_and_loss() {
    let seed = 0x1055;
    println!("seed {seed:#x}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut cluster = cluster();
    let mount = cluster.mount();
    let (before, resent_before) = (Wire::now(), resent());
    let mut files = BTreeMap::new();
    for i in 0..6 {
        let (name, len) = (format!("f{i}"), rng.random_range(100_000..1_000_000));
        let bytes = content(&mut rng, len);
        write(&mount.join(&name), &bytes);
        files.insert(name, bytes);
    }
    let total = files.values().map(|f| f.len() as u64).sum::<u64>();
    Wire::now().moved_by_rdma(before, "writing", total);
    let cold = cluster.mount();
    for (name, bytes) in &files {
        check(&cold.join(name), bytes);
    }
    let resent = resent() - resent_before;
    println!("{resent} requests were sent again");
    assert!(resent > 0, "nothing was lost: nothing was tested");
}

#[test]
#[ignore = "needs two RDMA devices on one wire: tests/rdma-vm/run.sh faults"]
fn a_link_that_goes_down_in_mid_write_is_replaced_by_tcp_and_used_again_when_it_is_up() {
    let seed = 0xd0;
    println!("seed {seed:#x}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut cluster = cluster();
    let mount = cluster.mount();
    let piece = content(&mut rng, 700_000);
    let pieces = 20;
    let before = Wire::now();
    let (progress, seen) = mpsc::channel();
    let writer = std::thread::spawn({
        let (path, piece) = (mount.join("long"), piece.clone());
        move || {
            let mut file = File::create(path).unwrap();
            for i in 0..pieces {
                progress.send(i).unwrap();
                file.write_all(&piece).expect("writing goes on without the link");
                file.sync_all().expect("and so does fsync");
            }
        }
    });
    assert!(seen.iter().any(|i| i == 4), "the writer came to its fifth piece");
    Wire::now().moved_by_rdma(before, "before the link went", 4 * piece.len() as u64);
    let before = Wire::now();
    set_link("down");
    let reached = seen.try_iter().last().unwrap_or(4);
    assert!(reached < pieces - 1, "the writer was done before the link went: nothing was tested");
    writer.join().expect("the writer");
    let rest = (pieces - reached - 2) as u64 * piece.len() as u64;
    let by_tcp = Wire::now().tcp_bytes - before.tcp_bytes;
    println!("without the link: {rest} bytes of payload, {by_tcp} bytes by TCP");
    assert!(by_tcp >= rest);
    let status = cluster.status();
    let rail = &status["network"]["here"]["rails"][0];
    assert_eq!(rail["up"], false, "{rail:#}");
    assert!(rail["why_not"].as_str().is_some_and(|why| why.contains("down")), "{rail:#}");
    for server in status["network"]["servers"].as_array().unwrap() {
        assert_eq!(server["from_here"]["connections"][0]["transport"], "tcp", "{server:#}");
    }

    set_link("up");
    eventually("the mount uses RDMA again", || {
        let before = Wire::now();
        write(&mount.join("again"), &piece);
        (Wire::now().rdma_packets - before.rdma_packets) * PACKET_BYTES >= piece.len() as u64
    });
    let cold = cluster.mount();
    check(&cold.join("long"), &piece.repeat(pieces));
    check(&cold.join("again"), &piece);
}
