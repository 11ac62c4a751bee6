//! The same binary on a machine without libibverbs.

use crate::fs3::{check, cluster_on_rdma, content, write};
use crate::wire::Wire;
use firefly_net::NetOptions;
use firefly_tests::{ff, ran};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::process::Command;

/// The scenario has taken the library away; the device is still there.
#[test]
#[ignore = "needs a machine that its library was taken from: tests/rdma-vm/run.sh no-library"]
fn without_the_library_everything_works_over_tcp_and_says_why() {
    let mut help = Command::new(ff());
    help.arg("--help");
    assert!(ran(help).ok().contains("quickstart"));
    let mut cluster = cluster_on_rdma(&NetOptions::default());
    let status = cluster.status();
    let servers = status["network"]["servers"].as_array().unwrap();
    let whys = servers.iter().map(|s| &s["there"]["fabric"]["why_not"]);
    for why in whys.chain([&status["network"]["here"]["why_not"]]) {
        assert!(why.as_str().is_some_and(|why| why.contains("libibverbs")), "{status:#}");
    }
    assert_eq!(servers.len(), 4);
    let words = cluster.ff(&["status"]).ok();
    assert!(words.contains("no RDMA here: ") && words.contains("libibverbs"), "{words}");

    let before = Wire::now();
    let bytes = content(&mut ChaCha8Rng::seed_from_u64(3), 2_000_000);
    let mount = cluster.mount();
    write(&mount.join("f"), &bytes);
    let cold = cluster.mount();
    check(&cold.join("f"), &bytes);
    assert_eq!(Wire::now().rdma_packets, before.rdma_packets);
}
