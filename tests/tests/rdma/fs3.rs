//! The file system over RDMA: processes of their own on the addresses of one device.

use crate::wire::Wire;
use firefly_cli::local::Shape;
use firefly_net::{NetOptions, Transport};
use firefly_tests::{Cluster, eventually};
use firefly_types::ByteSize;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::Path;
use std::sync::mpsc;

/// Of each of a server's targets: the machine's disk is its memory.
pub(crate) const TARGET_CAPACITY: ByteSize = ByteSize(64 << 20);

/// A cluster whose meta and storage servers listen on `address(node number)`. The manager and the
/// scheduler speak gRPC on loopback.
pub(crate) fn cluster_at(
    address: impl Fn(u32) -> IpAddr,
    servers: &NetOptions,
    commands: &NetOptions,
) -> Cluster {
    let cluster = Cluster::laid_out(&Shape { port_base: 0, agents: 0, ..Shape::default() });
    for role in cluster.local.roles().unwrap() {
        cluster.configure(&role, |config| {
            config.net = servers.clone();
            if let Some(meta) = &mut config.meta {
                meta.listen.set_ip(address(meta.node_id));
            }
            if let Some(storage) = &mut config.storage {
                storage.capacity = Some(TARGET_CAPACITY);
                storage.listen.set_ip(address(storage.node_id));
            }
        });
    }
    cluster.configure_commands(|description| description.net = commands.clone());
    cluster.up();
    eventually("every chain serves", || cluster.is_whole());
    cluster
}

/// A cluster on the addresses of one RDMA device: 10.1.0.11 to 13 for the storage servers, 14 for
/// the meta server.
pub(crate) fn cluster_on_rdma(net: &NetOptions) -> Cluster {
    let last = |node| if node < 3 { 14 } else { 8 + node as u8 };
    cluster_at(|node| IpAddr::from([10, 1, 0, last(node)]), net, net)
}

pub(crate) fn content(rng: &mut ChaCha8Rng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes[..]);
    bytes
}

pub(crate) fn write(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
}

#[track_caller]
pub(crate) fn check(path: &Path, expected: &[u8]) {
    let mut found = Vec::new();
    File::open(path).unwrap().read_to_end(&mut found).unwrap();
    assert_eq!(found.len(), expected.len(), "length of {}", path.display());
    if let Some(at) = (0..found.len()).find(|&i| found[i] != expected[i]) {
        panic!("{} differs first at byte {at} of {}", path.display(), found.len());
    }
}

#[test]
#[ignore = "needs an RDMA device with several addresses: tests/rdma-vm/run.sh fs3"]
fn files_move_by_rdma_and_outlive_a_storage_server_killed_in_mid_write() {
    let seed = 0x3fdb;
    println!("seed {seed:#x}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut cluster = cluster_on_rdma(&NetOptions::default());
    let mount = cluster.mount();

    // Written: to the head of a chain, and from there to the second copy.
    let mut files = BTreeMap::new();
    let before = Wire::now();
    for i in 0..8 {
        let (name, len) = (format!("f{i}"), rng.random_range(200_000..3_000_000));
        let bytes = content(&mut rng, len);
        write(&mount.join(&name), &bytes);
        files.insert(name, bytes);
    }
    let total = files.values().map(|f| f.len() as u64).sum::<u64>();
    Wire::now().moved_by_rdma(before, "writing two copies", 2 * total);

    // The servers and the command line say the same.
    let status = cluster.status();
    assert_eq!(status["network"]["here"]["rails"][0]["name"], "rxe0", "{status:#}");
    let servers = status["network"]["servers"].as_array().unwrap();
    assert_eq!(servers.len(), 4, "{status:#}");
    for server in servers {
        let theirs = server["there"]["connections"].as_array().unwrap();
        let ours = server["from_here"]["connections"].as_array().unwrap();
        assert!(!theirs.is_empty() && !ours.is_empty(), "{server:#}");
        for connection in theirs.iter().chain(ours) {
            assert_eq!(connection["transport"], "rdma", "{server:#}");
        }
    }

    // Read back by a mount that has cached nothing.
    let before = Wire::now();
    let cold = cluster.mount();
    for (name, bytes) in &files {
        check(&cold.join(name), bytes);
    }
    Wire::now().moved_by_rdma(before, "reading", total);
    cluster.unmount();

    // A server dies while pieces are on their way to it; what was acknowledged stays.
    let piece = content(&mut rng, 700_000);
    let pieces = 24;
    let (progress, seen) = mpsc::channel();
    let writer = std::thread::spawn({
        let (path, piece) = (mount.join("long"), piece.clone());
        move || {
            let mut file = File::create(path).unwrap();
            for i in 0..pieces {
                progress.send(i).unwrap();
                file.write_all(&piece).unwrap();
                file.sync_all().unwrap();
            }
        }
    });
    assert!(seen.iter().any(|i| i == 4), "the writer came to its fifth piece");
    assert!(cluster.local.kill_role("storage-4").unwrap());
    let reached = seen.try_iter().last().unwrap_or(4);
    assert!(reached < pieces - 1, "the writer was done before the server died: nothing was tested");
    writer.join().expect("writing goes on without the server");
    files.insert("long".to_owned(), piece.repeat(pieces));

    // Back again: it is filled from the other copies, over RDMA too.
    let before = Wire::now();
    cluster.local.start_role(&firefly_tests::ff(), "storage-4").unwrap();
    eventually("every chain is whole again", || cluster.is_whole());
    let total = files.values().map(|f| f.len() as u64).sum::<u64>();
    // Two copies on three servers: each holds two thirds of the data.
    Wire::now().moved_by_rdma(before, "filling the server again", total / 2);
    let cold = cluster.mount();
    for (name, bytes) in &files {
        check(&cold.join(name), bytes);
    }
}

/// Also the control of the test above: its measure tells the two apart.
#[test]
#[ignore = "needs an RDMA device with several addresses: tests/rdma-vm/run.sh fs3"]
fn with_transport_tcp_nothing_moves_by_rdma() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut cluster = cluster_on_rdma(&NetOptions { transport: Transport::Tcp, ..NetOptions::default() });
    let mount = cluster.mount();
    let bytes = content(&mut rng, 3_000_000);
    let before = Wire::now();
    write(&mount.join("f"), &bytes);
    let cold = cluster.mount();
    check(&cold.join("f"), &bytes);
    let after = Wire::now();
    assert_eq!(after.rdma_packets, before.rdma_packets);
    assert!(after.tcp_bytes - before.tcp_bytes > 3 * bytes.len() as u64);
}
