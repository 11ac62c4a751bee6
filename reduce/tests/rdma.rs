//! Groups over real verbs: run inside the virtual machine of `tests/rdma-vm`, which has two Soft-RoCE
//! devices on a veth pair. `FIREFLY_RDMA_DEVICES` names them; ranks take them in turn, so that
//! packets cross the wire between neighbours.

mod common;

use common::{Memory, Rank, await_note, launch, run, world};
use firefly_net::{ChannelOptions, Fabric, NetOptions, Transport};
use firefly_reduce::doctor::{Effort, examine};
use firefly_reduce::{Communicator, DType, Operation, ReduceError, ReduceOp};

/// A group of this test whose ranks reach each other as asked.
fn group(rank: &Rank, name: &str, transport: Transport) -> Communicator {
    let names = std::env::var("FIREFLY_RDMA_DEVICES").expect("FIREFLY_RDMA_DEVICES names the devices");
    let names: Vec<&str> = names.split(',').collect();
    let device = names[rank.rank as usize % names.len()].to_owned();
    let options = NetOptions { transport, devices: vec![device], ..NetOptions::default() };
    let mut config = rank.config(name);
    config.channels = Some(ChannelOptions { fabric: Fabric::open(options).unwrap(), sockets: 1 });
    rank.create(&config).unwrap()
}

/// Bytes of `rank` that tell orders of addition apart for floats and are valid for any type.
fn input(rank: u32, dtype: DType, count: usize) -> Memory {
    let mut x = u64::from(rank) * 0x9E37_79B9 + 1;
    let mut bytes = Vec::with_capacity(count * dtype.size());
    for _ in 0..count {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let unit = (x >> 40) as f32 / (1u64 << 24) as f32;
        let value = (unit - 0.5) * f32::from_bits((107 + (x >> 8) as u32 % 40) << 23);
        match dtype {
            DType::F32 => bytes.extend(value.to_le_bytes()),
            DType::BF16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
            _ => bytes.extend(&x.to_le_bytes()[..dtype.size()]),
        }
    }
    Memory::new(&bytes)
}

/// What every rank has after an all-reduce, a broadcast and an all-gather of `count` elements.
fn results(group: &Communicator, dtype: DType, count: usize) -> Vec<Memory> {
    let (rank, size) = (group.rank(), group.size());
    let mut reduced = input(rank, dtype, count);
    let buf = [reduced.buf(dtype)];
    run(group, Operation::AllReduce(ReduceOp::Sum), dtype, &buf, &buf).unwrap();
    let mut broadcast = input(rank, dtype, count);
    let root = size - 1;
    let buf = [broadcast.buf(dtype)];
    run(group, Operation::Broadcast { root }, dtype, if rank == root { &buf } else { &[] }, &buf).unwrap();
    let mut mine = input(rank, dtype, count);
    let mut gathered = Memory::zeroed(count * dtype.size() * size as usize);
    run(group, Operation::AllGather, dtype, &[mine.buf(dtype)], &[gathered.buf(dtype)]).unwrap();
    vec![reduced, broadcast, gathered]
}

#[test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh reduce"]
fn the_bits_are_those_of_tcp() {
    for nodes in ["ab", "abcd", "aabb"] {
        world("the_bits_are_those_of_tcp", nodes, |rank| {
            let (tcp, rdma) = (group(rank, "tcp", Transport::Tcp), group(rank, "rdma", Transport::Rdma));
            for peer in (0..rank.size).filter(|&p| p != rank.rank) {
                let local = nodes.as_bytes()[peer as usize] == nodes.as_bytes()[rank.rank as usize];
                let (over_tcp, over_rdma) = (tcp.reach(peer).unwrap(), rdma.reach(peer).unwrap());
                assert_eq!(over_tcp.transport, if local { "shm" } else { "tcp" });
                assert_eq!(over_rdma.transport, if local { "shm" } else { "rdma" });
                if !local {
                    assert!(over_tcp.why_not_rdma.unwrap().contains("TCP was asked for"));
                    assert_eq!(over_rdma.why_not_rdma, None);
                }
            }
            for dtype in [DType::F32, DType::BF16, DType::I64, DType::U8] {
                for count in [1, 1000, 20_000, 400_001] {
                    let (a, b) = (results(&tcp, dtype, count), results(&rdma, dtype, count));
                    assert!(a == b, "{dtype} x {count}");
                }
            }
            let effort = Effort { round_trips: 3, bytes: 100_000, messages: 1 };
            let found = examine(&rdma, &effort).unwrap();
            assert!(found.pairs.iter().any(|p| p.transport == "rdma"), "{found:?}");
            rdma.barrier().unwrap();
            let (a, b) = (tcp.stats(), rdma.stats());
            println!("tcp {a:?}\nrdma {b:?}");
            assert!(a.tcp_bytes_sent > 0 && a.tcp_bytes_received > 0 && a.rdma_bytes_sent == 0);
            assert!(b.rdma_bytes_sent > 0 && b.rdma_bytes_received > 0);
            assert_eq!((b.tcp_bytes_sent, b.tcp_bytes_received), (0, 0));
            assert!(a.transport().ends_with("tcp") && b.transport().ends_with("rdma"));
            tcp.barrier().unwrap();
        });
    }
}

/// Who copies what in a large all-reduce: contributions once, when they leave the caller's memory;
/// results once when they leave and once when they arrive. Never more, and nothing is registered
/// after the first operation.
#[test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh reduce"]
fn a_large_allreduce_copies_at_most_once_on_each_side() {
    for nodes in ["ab", "abcd"] {
        world("a_large_allreduce_copies_at_most_once_on_each_side", nodes, |rank| {
            let group = group(rank, "g", Transport::Rdma);
            let mut data = vec![1.0f32; 1 << 20];
            group.allreduce_f32(&mut data, ReduceOp::Sum).unwrap();
            group.barrier().unwrap();
            let before = group.stats();
            group.allreduce_f32(&mut data, ReduceOp::Avg).unwrap();
            let after = group.stats();
            group.barrier().unwrap();
            // A rank sends its contributions to the others' slices and its own slice's result to
            // all others, (N-1)/N of the data each, and receives as much.
            let bytes = 4usize << 20;
            let share = (bytes / rank.size as usize * (rank.size as usize - 1)) as u64;
            let copied = after.copied_bytes - before.copied_bytes;
            println!("{share} bytes out and in, twice; {copied} copied");
            assert!(copied <= 3 * share + 4096, "{copied} bytes copied of {share} moved four times");
            // Contributions landed where they are reduced.
            assert!(copied >= 2 * share, "the control: what leaves the caller's memory is counted");
        });
    }
}

const VICTIM: u32 = 1;

#[test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh reduce"]
fn a_death_in_mid_allreduce_is_named() {
    const TEST: &str = "a_death_in_mid_allreduce_is_named";
    for nodes in ["ab", "abcd"] {
        let outcome = launch(
            TEST,
            nodes,
            |rank| {
                let group = group(rank, "g", Transport::Rdma);
                if rank.rank == VICTIM {
                    // Like a DataLoader worker, it shares every descriptor and outlives its parent:
                    // neither the side connection nor the queue pair may stay open through it.
                    // SAFETY: the child only sleeps and exits, which is allowed after a fork.
                    unsafe {
                        if libc::fork() == 0 {
                            libc::sleep(100);
                            libc::_exit(0);
                        }
                    }
                }
                let mut data = vec![1.0f32; 1 << 20];
                let error = loop {
                    if let Err(error) = group.allreduce_f32(&mut data, ReduceOp::Avg) {
                        break error;
                    }
                    rank.note(&format!("went {}", rank.rank));
                };
                println!("{error}");
                assert!(matches!(error, ReduceError::PeerDied { rank: VICTIM, .. }), "{error:?}");
                // By the end of its connections, not by its silence.
                let text = error.to_string();
                assert!(text.contains("rank 1") && !text.contains("no sign of life"), "{text}");
                // And it stays broken, with the same cause.
                let again = group.allreduce_f32(&mut data, ReduceOp::Avg).unwrap_err();
                assert!(matches!(again, ReduceError::PeerDied { rank: VICTIM, .. }), "{again:?}");
            },
            |dir, children| {
                for rank in 0..nodes.len() {
                    await_note(dir, &format!("went {rank}"));
                }
                // SAFETY: a process of this test.
                assert_eq!(unsafe { libc::kill(children[VICTIM as usize].id() as i32, libc::SIGKILL) }, 0);
            },
        );
        if let Some(outcome) = outcome {
            for (rank, (status, output)) in outcome.iter().enumerate() {
                let wanted = rank as u32 != VICTIM;
                assert!(status.success() == wanted, "{nodes}: rank {rank} ended with {status}:\n{output}");
            }
        }
    }
}

/// Descriptors of RDMA devices that a process holds.
fn device_descriptors(pid: &str) -> usize {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return 0 };
    let links = entries.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.filter(|link| link.to_string_lossy().contains("infiniband")).count()
}

/// Through a descriptor of the device the queue pairs of a killed parent would live on, and its
/// memory stay pinned, as long as a DataLoader worker of it lives.
#[test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh reduce"]
fn a_forked_child_holds_no_device() {
    world("a_forked_child_holds_no_device", "ab", |rank| {
        let group = group(rank, "g", Transport::Rdma);
        assert!(device_descriptors("self") > 0, "the control: the parent holds some");
        // SAFETY: the child only sleeps and exits, which is allowed after a fork.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe {
                libc::sleep(100);
                libc::_exit(0);
            }
        }
        // It closes them before it runs anything else; the watchdog ends a wait for ever.
        while device_descriptors(&child.to_string()) > 0 {
            std::thread::yield_now();
        }
        // SAFETY: our own child.
        let ended = unsafe { libc::waitpid(child, std::ptr::null_mut(), libc::WNOHANG) };
        assert_eq!(ended, 0, "it let go of them by itself, not by its end");
        let mut data = [1.0f32; 1000];
        group.allreduce_f32(&mut data, ReduceOp::Sum).unwrap();
        assert_eq!(data, [2.0; 1000]);
        // SAFETY: as above.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
    });
}

/// Every type of point-to-point message, and many groups one after the other: queue pairs and
/// registrations go with their groups.
#[test]
#[ignore = "needs RDMA devices: tests/rdma-vm/run.sh reduce"]
fn groups_come_and_go() {
    world("groups_come_and_go", "ab", |rank| {
        for n in 0..5 {
            let group = group(rank, &format!("g{n}"), Transport::Rdma);
            let peer = 1 - rank.rank;
            for count in [0usize, 10, 5_000, 300_000] {
                let mut data = vec![rank.rank; count];
                if rank.rank == 0 {
                    group.send(&data, peer, 7).unwrap();
                    group.recv(&mut data, peer, 8).unwrap();
                } else {
                    let mut got = vec![9; count];
                    group.recv(&mut got, peer, 7).unwrap();
                    assert!(got.iter().all(|v| *v == 0));
                    group.send(&data, peer, 8).unwrap();
                }
                assert!(data.iter().all(|v| *v == 1 || count == 0));
            }
        }
    });
}
