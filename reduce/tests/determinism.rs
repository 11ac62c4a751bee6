//! One result, one bit pattern: whatever the message's size, the layout over nodes, the transport,
//! the algorithm, and who drives the progress.

mod common;

use common::{Memory, run, start, world};
use firefly_reduce::{Algorithm, Cutoffs, DType, Operation, Options, RawBuf, ReduceOp};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

const SEED: u64 = 20_241_125;
const COUNT: usize = 200_003;

/// Values whose sum depends on the order of addition: magnitudes over 40 binary orders.
fn values(rank: u32) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(SEED + u64::from(rank));
    (0..COUNT)
        .map(|_| {
            let bits = random.next_u64();
            let exponent = 107 + (bits >> 32) as u32 % 40;
            f32::from_bits((bits as u32 & 0x807f_ffff) | exponent << 23)
        })
        .collect()
}

/// The canonical tree by its definition.
fn tree(values: &[f32]) -> f32 {
    match values {
        [one] => *one,
        _ => {
            let mut left = 1;
            while left * 2 < values.len() {
                left *= 2;
            }
            tree(&values[..left]) + tree(&values[left..])
        }
    }
}

fn model(size: u32, round: fn(f32) -> f32) -> Vec<f32> {
    let inputs: Vec<Vec<f32>> = (0..size).map(values).collect();
    (0..COUNT)
        .map(|i| {
            let column: Vec<f32> = inputs.iter().map(|v| round(v[i])).collect();
            round(tree(&column))
        })
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn the_bits_do_not_depend_on_size_layout_or_algorithm() {
    println!("seed {SEED}");
    for nodes in ["aa", "ab", "aaa", "abc", "aba", "aaaa", "abcd", "aabb", "abab", "aaaaa", "aabbc"] {
        world("the_bits_do_not_depend_on_size_layout_or_algorithm", nodes, |rank| {
            let group = rank.group("g");
            let wanted = bits(&model(rank.size, |v| v));
            let inputs: Vec<Vec<f32>> = (0..rank.size).map(values).collect();
            let left_to_right: Vec<f32> = (0..1000).map(|i| inputs.iter().map(|v| v[i]).sum()).collect();
            if rank.size > 3 {
                // The control: these inputs tell one order from another.
                assert_ne!(bits(&left_to_right), wanted[..1000]);
            }
            // As one message, and cut into messages of many sizes.
            for cut in [COUNT, 65_536, 9_999, 1_024, 977] {
                let mut data = values(rank.rank);
                let pending: Vec<_> = data
                    .chunks_mut(cut)
                    .map(|chunk| group.allreduce_async(chunk, ReduceOp::Sum).unwrap())
                    .collect();
                for one in pending {
                    one.wait().unwrap();
                }
                assert_eq!(bits(&data), wanted, "cut into {cut}");
            }
            // Reduce and reduce-scatter give the same bits.
            let mut input =
                Memory::new(&values(rank.rank).iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
            let mut out = Memory::zeroed(COUNT * 4);
            let d = DType::F32;
            let root = rank.size - 1;
            let output = [out.buf(d)];
            run(&group, Operation::Reduce { op: ReduceOp::Sum, root }, d, &[input.buf(d)], &output).unwrap();
            let wanted_bytes: Vec<u8> = wanted.iter().flat_map(|b| b.to_le_bytes()).collect();
            if rank.rank == root {
                assert!(out.bytes() == wanted_bytes, "reduce");
            }
            let each = COUNT / rank.size as usize;
            let whole = RawBuf { count: each * rank.size as usize, ..input.buf(d) };
            let mine = [RawBuf { count: each, ..out.buf(d) }];
            run(&group, Operation::ReduceScatter(ReduceOp::Sum), d, &[whole], &mine).unwrap();
            let start = rank.rank as usize * each * 4;
            assert!(out.bytes()[..each * 4] == wanted_bytes[start..][..each * 4], "reduce-scatter");
            group.barrier().unwrap();
        });
    }
}

/// An all-reduce of the first `count` values under a table with one algorithm.
fn forced(rank: &common::Rank, algorithm: Algorithm, group: &str) -> firefly_reduce::Communicator {
    let mut config = rank.config(group);
    config.options = Some(Options { cutoffs: Cutoffs::always(algorithm), ..Options::default() });
    rank.create(&config).unwrap()
}

#[test]
fn the_bits_do_not_depend_on_the_algorithm_or_the_number_of_levels() {
    println!("seed {SEED}");
    let layouts = [
        "aab", "abc", "aaa", "aaab", "aabb", "abcd", "aaaa", "abba", "aabbc", "aaaabbbb", "aabbccdd",
        "aaaabbb", "abcdefgh",
    ];
    for nodes in layouts {
        world("the_bits_do_not_depend_on_the_algorithm_or_the_number_of_levels", nodes, |rank| {
            let wanted = bits(&model(rank.size, |v| v));
            let round = |v: f32| half::bf16::from_f32(v).to_f32();
            let wanted_bf16 = bits(&model(rank.size, round));
            for algorithm in Algorithm::ALL {
                let group = forced(rank, algorithm, algorithm.name());
                // Small, not a whole number of cache lines, and more than one chunk of two levels.
                for count in [1usize, 7, 1000, 40_000, COUNT] {
                    let mut data = values(rank.rank)[..count].to_vec();
                    group.allreduce(&mut data, ReduceOp::Sum).unwrap();
                    assert!(bits(&data) == wanted[..count], "{algorithm}, {count} elements");
                    let mut low: Vec<half::bf16> =
                        values(rank.rank)[..count].iter().map(|&v| half::bf16::from_f32(v)).collect();
                    group.allreduce(&mut low, ReduceOp::Sum).unwrap();
                    let got: Vec<f32> = low.iter().map(|v| v.to_f32()).collect();
                    assert!(bits(&got) == wanted_bf16[..count], "{algorithm}, {count} of bf16");
                }
                // Several chunks, averaged, with a factor of each rank's own.
                let many = 700_001;
                let mut data: Vec<f32> = values(rank.rank).into_iter().cycle().take(many).collect();
                group.allreduce(&mut data, ReduceOp::Avg).unwrap();
                let n = rank.size as f32;
                let average: Vec<f32> = wanted.iter().map(|&b| f32::from_bits(b) / n).collect();
                assert!(
                    (0..many).all(|i| data[i].to_bits() == average[i % COUNT].to_bits()),
                    "{algorithm}, average"
                );
                let mut ones = vec![1.0f32; many];
                let factor = f64::from(rank.rank + 1);
                group.allreduce(&mut ones, ReduceOp::PremulSum(factor)).unwrap();
                let total = (rank.size * (rank.size + 1) / 2) as f32;
                assert!(ones.iter().all(|&v| v == total), "{algorithm}, factors");
                let mut most = vec![rank.rank as i64; 100_000];
                group.allreduce(&mut most, ReduceOp::Max).unwrap();
                assert!(most.iter().all(|&v| v == i64::from(rank.size) - 1), "{algorithm}, maximum");
                group.barrier().unwrap();
            }
        });
    }
}

#[test]
fn a_small_last_piece_does_not_overtake_a_large_one() {
    for nodes in ["ab", "abc"] {
        world("a_small_last_piece_does_not_overtake_a_large_one", nodes, |rank| {
            let group = rank.group("g");
            // Slices of one piece of 512 KiB and one of a few elements, which goes without asking.
            let count = rank.size as usize * (131_072 + 16);
            for round in 0..20 {
                let mut data = vec![(rank.rank + round) as f32; count];
                group.allreduce(&mut data, ReduceOp::Sum).unwrap();
                let wanted = (0..rank.size).map(|r| (r + round) as f32).sum::<f32>();
                assert!(data.iter().all(|&v| v == wanted), "round {round}");
            }
        });
    }
}

#[test]
fn two_levels_send_each_byte_between_nodes_once() {
    // The control of the test above: it is the leaders who talk, and the others send nothing.
    world("two_levels_send_each_byte_between_nodes_once", "aabb", |rank| {
        let bytes = 8usize << 20;
        let group = forced(rank, Algorithm::Direct, "g");
        let before = group.stats().tcp_bytes_sent;
        let mut data = vec![1.0f32; bytes / 4];
        group.allreduce(&mut data, ReduceOp::Sum).unwrap();
        let sent = (group.stats().tcp_bytes_sent - before) as usize;
        if rank.rank % 2 == 0 {
            assert!(sent >= bytes && sent < bytes + bytes / 50, "a leader sent {sent} bytes");
        } else {
            assert!(sent < 10_000, "a rank that leads nobody sent {sent} bytes");
        }
        group.barrier().unwrap();
    });
}

#[test]
fn bf16_keeps_f32_partials_and_rounds_once() {
    for nodes in ["aaa", "abc", "aabb"] {
        world("bf16_keeps_f32_partials_and_rounds_once", nodes, |rank| {
            let group = rank.group("g");
            let round = |v: f32| half::bf16::from_f32(v).to_f32();
            let wanted = bits(&model(rank.size, round));
            for cut in [COUNT, 5_000] {
                let mut data: Vec<half::bf16> =
                    values(rank.rank).into_iter().map(half::bf16::from_f32).collect();
                for chunk in data.chunks_mut(cut) {
                    group.allreduce(chunk, ReduceOp::Sum).unwrap();
                }
                let got: Vec<f32> = data.iter().map(|v| v.to_f32()).collect();
                assert_eq!(bits(&got), wanted, "cut into {cut}");
            }
            group.barrier().unwrap();
        });
    }
}

#[test]
fn callbacks_run_once_before_waiters_wake_and_may_submit() {
    for nodes in ["aa", "ab"] {
        world("callbacks_run_once_before_waiters_wake_and_may_submit", nodes, |rank| {
            let group = std::sync::Arc::new(rank.group("g"));
            for count in [1usize, 100_000] {
                let (sender, calls) = std::sync::mpsc::channel();
                let mut data = Memory::zeroed(count * 4);
                let buf = [data.buf(DType::F32)];
                let inner = group.clone();
                let callback = Box::new(move |outcome: &Result<(), firefly_reduce::ReduceError>| {
                    outcome.as_ref().unwrap();
                    let next = start(&inner, Operation::Barrier, DType::U8, &[], &[], None).unwrap();
                    sender.send(next).unwrap();
                });
                let operation = Operation::AllReduce(ReduceOp::Sum);
                let handle = start(&group, operation, DType::F32, &buf, &buf, Some(callback)).unwrap();
                handle.wait().unwrap();
                // It has run by now, and once.
                let next = calls.try_recv().unwrap();
                next.wait().unwrap();
                assert!(calls.try_recv().is_err());
            }
        });
    }
}

#[test]
fn ranks_meet_at_the_built_in_rendezvous() {
    world("ranks_meet_at_the_built_in_rendezvous", "abb", |rank| {
        // SAFETY: the only thread that reads or writes the environment in this process.
        unsafe {
            std::env::set_var("RANK", rank.rank.to_string());
            std::env::set_var("WORLD_SIZE", rank.size.to_string());
            std::env::set_var("FIREFLY_NODE_ID", &rank.node);
            std::env::set_var("FIREFLY_JOB_SECRET", "5a".repeat(32));
            std::env::set_var("MASTER_ADDR", "127.0.0.1");
        }
        let port = if rank.rank == 0 {
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            std::fs::write(rank.dir.join("port.new"), port.to_string()).unwrap();
            std::fs::rename(rank.dir.join("port.new"), rank.dir.join("port")).unwrap();
            u32::from(port)
        } else {
            rank.await_note("port")
        };
        // SAFETY: as above.
        unsafe { std::env::set_var("MASTER_PORT", port.to_string()) };
        // Two groups of one job, one after the other and at the same time.
        let one = firefly_reduce::Communicator::from_env().unwrap();
        let two = firefly_reduce::Communicator::from_env().unwrap();
        for group in [&one, &two] {
            let mut data = [rank.rank as f32, 1.0];
            group.allreduce_f32(&mut data, ReduceOp::Sum).unwrap();
            assert_eq!(data, [3.0, 3.0]);
        }
        drop(one);
        two.barrier().unwrap();
        let stats = two.stats();
        assert_eq!((stats.submitted, stats.completed, stats.failed), (2, 2, 0));
        let local = if rank.rank == 0 { 0 } else { 1 };
        assert_eq!((stats.local_peers, stats.remote_peers), (local, 2 - local));
        assert!(stats.tcp_bytes_sent + stats.rdma_bytes_sent > 0);
        // A stranger without the secret is not let in.
        if rank.rank == 1 {
            let stranger = firefly_reduce::Rendezvous::join(
                &format!("127.0.0.1:{port}"),
                1,
                &firefly_types::ClusterSecret::from_bytes([1; 32]),
                std::time::Duration::from_millis(50),
            );
            assert!(stranger.err().is_some_and(|e| e.to_string().contains("secret")));
        }
        two.barrier().unwrap();
    });
}
