//! Every collective, for every type, on one node, on several, and mixed, against a model.

mod common;

use common::values::{bytes_of, input, ops, reduced, same};
use common::{Memory, Rank, run, start, world};
use firefly_reduce::{Communicator, DType, Operation, RawBuf, ReduceOp};

/// One node, one rank per node, and mixtures that interleave.
const WORLDS: [&str; 6] = ["aa", "ab", "aaa", "aba", "aabb", "abca"];

/// Around every threshold between algorithms: nothing, one, a small odd number, beyond eager and
/// direct, beyond a slot and a piece.
fn counts(dtype: DType) -> [usize; 5] {
    let beyond = |bytes: usize| bytes / dtype.size() + 3;
    [0, 1, 77, beyond(20 << 10), beyond(600 << 10)]
}

fn expect(rank: &Rank, what: &str, dtype: DType, got: &Memory, wanted: &[u8]) {
    if !same(dtype, got.bytes(), wanted) {
        let at = got.bytes().iter().zip(wanted).position(|(a, b)| a != b);
        panic!("rank {}: {what} {dtype} of {} bytes differs at byte {at:?}", rank.rank, wanted.len());
    }
}

fn with_factor(op: ReduceOp, rank: u32) -> ReduceOp {
    match op {
        ReduceOp::PremulSum(_) => ReduceOp::PremulSum(factor(rank)),
        other => other,
    }
}

/// Each rank its own factor, whole so that integers take it too.
fn factor(rank: u32) -> f64 {
    f64::from(rank % 2 + 1)
}

fn everywhere(test: &str, body: impl Fn(&Rank, &Communicator)) {
    for nodes in WORLDS {
        world(test, nodes, |rank| {
            let group = rank.group("g");
            body(rank, &group);
            group.barrier().unwrap();
        });
    }
}

#[test]
fn allreduce() {
    everywhere("allreduce", |rank, group| {
        for dtype in DType::ALL {
            for (k, count) in counts(dtype).into_iter().enumerate() {
                for op in ops(dtype) {
                    // The large ones only for the reductions that have kernels of their own.
                    if k > 2 && !matches!(op, ReduceOp::Sum | ReduceOp::Avg | ReduceOp::PremulSum(_)) {
                        continue;
                    }
                    let mine = with_factor(op, rank.rank);
                    let mut data = Memory::new(&input(dtype, op, rank.rank, count));
                    let mut out = Memory::zeroed(data.bytes().len());
                    let wanted = reduced(dtype, op, rank.size, count, factor);
                    let bufs = ([data.buf(dtype)], [out.buf(dtype)]);
                    run(group, Operation::AllReduce(mine), dtype, &bufs.0, &bufs.1).unwrap();
                    expect(rank, &format!("allreduce {op}"), dtype, &out, &wanted);
                    run(group, Operation::AllReduce(mine), dtype, &bufs.0, &bufs.0).unwrap();
                    expect(rank, &format!("in-place allreduce {op}"), dtype, &data, &wanted);
                }
            }
        }
    });
}

#[test]
fn reduce() {
    everywhere("reduce", |rank, group| {
        for dtype in DType::ALL {
            for (k, count) in counts(dtype).into_iter().enumerate() {
                for (j, op) in ops(dtype).into_iter().enumerate() {
                    if k > 2 && op != ReduceOp::Sum {
                        continue;
                    }
                    let root = (k + j) as u32 % rank.size;
                    let mut data = Memory::new(&input(dtype, op, rank.rank, count));
                    let before = data.clone();
                    let mut out = Memory::zeroed(data.bytes().len());
                    let mine = with_factor(op, rank.rank);
                    let output = if rank.rank == root { vec![out.buf(dtype)] } else { vec![] };
                    let operation = Operation::Reduce { op: mine, root };
                    run(group, operation, dtype, &[data.buf(dtype)], &output).unwrap();
                    assert_eq!(data, before, "the input is not written");
                    if rank.rank == root {
                        let wanted = reduced(dtype, op, rank.size, count, factor);
                        expect(rank, &format!("reduce {op}"), dtype, &out, &wanted);
                    }
                }
            }
        }
    });
}

#[test]
fn reduce_scatter() {
    everywhere("reduce_scatter", |rank, group| {
        let n = rank.size as usize;
        for dtype in DType::ALL {
            for (k, count) in counts(dtype).into_iter().enumerate() {
                for op in ops(dtype) {
                    if k > 2 && op != ReduceOp::Sum {
                        continue;
                    }
                    let mine = Operation::ReduceScatter(with_factor(op, rank.rank));
                    let mut data = Memory::new(&input(dtype, op, rank.rank, count * n));
                    let all = reduced(dtype, op, rank.size, count * n, factor);
                    let bytes = count * dtype.size();
                    let wanted = &all[rank.rank as usize * bytes..][..bytes];
                    let mut out = Memory::zeroed(bytes);
                    run(group, mine, dtype, &[data.buf(dtype)], &[out.buf(dtype)]).unwrap();
                    expect(rank, &format!("reduce-scatter {op}"), dtype, &out, wanted);
                }
            }
            // Uneven blocks, some empty.
            let lens: Vec<usize> = (0..n).map(|r| if r == 1 { 0 } else { 100 * r + 33 }).collect();
            let total: usize = lens.iter().sum();
            let mut data = Memory::new(&input(dtype, ReduceOp::Sum, rank.rank, total));
            let whole = data.buf(dtype);
            let blocks = cut(whole, dtype, &lens);
            let start: usize = lens[..rank.rank as usize].iter().sum();
            let bytes = lens[rank.rank as usize] * dtype.size();
            let mut out = Memory::zeroed(bytes);
            run(group, Operation::ReduceScatter(ReduceOp::Sum), dtype, &blocks, &[out.buf(dtype)]).unwrap();
            let all = reduced(dtype, ReduceOp::Sum, rank.size, total, factor);
            expect(rank, "uneven reduce-scatter", dtype, &out, &all[start * dtype.size()..][..bytes]);
        }
    });
}

fn cut(whole: RawBuf, dtype: DType, lens: &[usize]) -> Vec<RawBuf> {
    let mut at = 0;
    lens.iter()
        .map(|&count| {
            let ptr = whole.ptr.wrapping_add(at * dtype.size());
            at += count;
            RawBuf { ptr, count }
        })
        .collect()
}

fn pattern(dtype: DType, seed: u32, count: usize) -> Vec<u8> {
    let period = bytes_of(dtype, (0..977).map(|i| f64::from((seed * 3 + i) % 8)));
    period.into_iter().cycle().take(count * dtype.size()).collect()
}

#[test]
fn broadcast() {
    everywhere("broadcast", |rank, group| {
        for dtype in DType::ALL {
            for count in counts(dtype) {
                for root in 0..rank.size {
                    let mut data = Memory::new(&pattern(dtype, rank.rank, count));
                    let mut out = Memory::zeroed(data.bytes().len());
                    let operation = Operation::Broadcast { root };
                    let wanted = pattern(dtype, root, count);
                    let input = if rank.rank == root { vec![data.buf(dtype)] } else { vec![] };
                    run(group, operation, dtype, &input, &[out.buf(dtype)]).unwrap();
                    expect(rank, "broadcast", dtype, &out, &wanted);
                    let buf = [data.buf(dtype)];
                    run(group, operation, dtype, &buf, &buf).unwrap();
                    expect(rank, "in-place broadcast", dtype, &data, &wanted);
                }
            }
        }
    });
}

#[test]
fn allgather() {
    everywhere("allgather", |rank, group| {
        let n = rank.size as usize;
        for dtype in DType::ALL {
            for count in counts(dtype) {
                let mut data = Memory::new(&pattern(dtype, rank.rank, count));
                let wanted: Vec<u8> = (0..rank.size).flat_map(|r| pattern(dtype, r, count)).collect();
                let mut out = Memory::zeroed(wanted.len());
                run(group, Operation::AllGather, dtype, &[data.buf(dtype)], &[out.buf(dtype)]).unwrap();
                expect(rank, "all-gather", dtype, &out, &wanted);
                // In place: the own block is the input.
                out.bytes_mut().fill(0);
                let bytes = count * dtype.size();
                out.bytes_mut()[rank.rank as usize * bytes..][..bytes].copy_from_slice(data.bytes());
                let whole = out.buf(dtype);
                let blocks = cut(whole, dtype, &vec![count; n]);
                run(group, Operation::AllGather, dtype, &[blocks[rank.rank as usize]], &blocks).unwrap();
                expect(rank, "in-place all-gather", dtype, &out, &wanted);
            }
            let lens: Vec<usize> = (0..n).map(|r| 50 * r).collect();
            let wanted: Vec<u8> = (0..n).flat_map(|r| pattern(dtype, r as u32, lens[r])).collect();
            let mut data = Memory::new(&pattern(dtype, rank.rank, lens[rank.rank as usize]));
            let mut out = Memory::zeroed(wanted.len());
            let blocks = cut(out.buf(dtype), dtype, &lens);
            run(group, Operation::AllGather, dtype, &[data.buf(dtype)], &blocks).unwrap();
            expect(rank, "uneven all-gather", dtype, &out, &wanted);
        }
    });
}

#[test]
fn gather_and_scatter() {
    everywhere("gather_and_scatter", |rank, group| {
        for dtype in DType::ALL {
            for count in counts(dtype) {
                for root in 0..rank.size {
                    let all: Vec<u8> = (0..rank.size).flat_map(|r| pattern(dtype, r, count)).collect();
                    let mine = pattern(dtype, rank.rank, count);
                    let mut data = Memory::new(&mine);
                    let mut out = Memory::zeroed(all.len());
                    let output = if rank.rank == root { vec![out.buf(dtype)] } else { vec![] };
                    run(group, Operation::Gather { root }, dtype, &[data.buf(dtype)], &output).unwrap();
                    if rank.rank == root {
                        expect(rank, "gather", dtype, &out, &all);
                    }
                    let mut whole = Memory::new(&all);
                    let mut block = Memory::zeroed(mine.len());
                    let input = if rank.rank == root { vec![whole.buf(dtype)] } else { vec![] };
                    run(group, Operation::Scatter { root }, dtype, &input, &[block.buf(dtype)]).unwrap();
                    expect(rank, "scatter", dtype, &block, &mine);
                }
            }
        }
    });
}

#[test]
fn alltoall() {
    everywhere("alltoall", |rank, group| {
        let n = rank.size;
        let me = rank.rank;
        for dtype in DType::ALL {
            for count in counts(dtype) {
                let block = |from: u32, to: u32| pattern(dtype, from * 5 + to, count);
                let mut data = Memory::new(&(0..n).flat_map(|to| block(me, to)).collect::<Vec<u8>>());
                let wanted: Vec<u8> = (0..n).flat_map(|from| block(from, me)).collect();
                let mut out = Memory::zeroed(wanted.len());
                run(group, Operation::AllToAll, dtype, &[data.buf(dtype)], &[out.buf(dtype)]).unwrap();
                expect(rank, "all-to-all", dtype, &out, &wanted);
            }
            let len = |from: u32, to: u32| ((from * 3 + to * 5) % 4 * 1111) as usize;
            let block = |from: u32, to: u32| pattern(dtype, from * 5 + to, len(from, to));
            let mut data = Memory::new(&(0..n).flat_map(|to| block(me, to)).collect::<Vec<u8>>());
            let wanted: Vec<u8> = (0..n).flat_map(|from| block(from, me)).collect();
            let mut out = Memory::zeroed(wanted.len());
            let lens_in: Vec<usize> = (0..n).map(|to| len(me, to)).collect();
            let lens_out: Vec<usize> = (0..n).map(|from| len(from, me)).collect();
            let input = cut(data.buf(dtype), dtype, &lens_in);
            let output = cut(out.buf(dtype), dtype, &lens_out);
            run(group, Operation::AllToAll, dtype, &input, &output).unwrap();
            expect(rank, "uneven all-to-all", dtype, &out, &wanted);
        }
    });
}

#[test]
fn point_to_point() {
    everywhere("point_to_point", |rank, group| {
        let (me, n) = (rank.rank, rank.size);
        for dtype in DType::ALL {
            for count in counts(dtype) {
                // Everybody sends to everybody first and receives later, tags in the wrong order,
                // with a collective in between: nothing here may wait for anything else.
                let mut sent = Vec::new();
                for to in (0..n).filter(|&r| r != me) {
                    for tag in [7, 8] {
                        let mut data = Memory::new(&pattern(dtype, me * 2 + tag, count));
                        let buf = [data.buf(dtype)];
                        let handle = start(group, Operation::Send { peer: to, tag }, dtype, &buf, &[], None);
                        sent.push((handle.unwrap(), data));
                    }
                }
                group.allreduce_f32(&mut [1.0; 10], ReduceOp::Sum).unwrap();
                for from in (0..n).filter(|&r| r != me) {
                    for tag in [8, 7] {
                        let wanted = pattern(dtype, from * 2 + tag, count);
                        let mut out = Memory::zeroed(wanted.len());
                        run(group, Operation::Recv { peer: from, tag }, dtype, &[], &[out.buf(dtype)])
                            .unwrap();
                        expect(rank, "receive", dtype, &out, &wanted);
                    }
                }
                for (handle, data) in sent {
                    handle.wait().unwrap();
                    drop(data);
                }
            }
        }
        // From whoever comes.
        if me == 0 {
            let mut seen = vec![false; n as usize];
            for _ in 1..n {
                let mut out = Memory::zeroed(4);
                let bufs = [out.buf(DType::U32)];
                let handle =
                    start(group, Operation::RecvAny { tag: 9 }, DType::U32, &[], &bufs, None).unwrap();
                handle.wait().unwrap();
                let source = handle.source().unwrap();
                assert_eq!(out.bytes(), source.to_le_bytes(), "the message is its sender's");
                assert!(!std::mem::replace(&mut seen[source as usize], true), "one from each");
            }
        } else {
            group.send(&[me], 0, 9).unwrap();
        }
    });
}

#[test]
fn many_operations_in_flight_complete_in_order() {
    everywhere("many_operations_in_flight_complete_in_order", |rank, group| {
        let mut inputs: Vec<Vec<f32>> =
            (0..200).map(|i| vec![(i + rank.rank) as f32; 1 + 37 * i as usize]).collect();
        let pending: Vec<_> =
            inputs.iter_mut().map(|data| group.allreduce_async(data, ReduceOp::Sum).unwrap()).collect();
        for one in pending {
            one.wait().unwrap();
        }
        for (i, data) in inputs.iter().enumerate() {
            let wanted: f32 = (0..rank.size).map(|r| (i as u32 + r) as f32).sum();
            assert!(data.iter().all(|&x| x == wanted), "operation {i}");
        }
        assert_eq!(group.sequence(), 200);
    });
}

#[test]
fn a_barrier_holds_everybody() {
    everywhere("a_barrier_holds_everybody", |rank, group| {
        for round in 0..20 {
            rank.note(&format!("arrived {round} {}", rank.rank));
            group.barrier().unwrap();
            for other in 0..rank.size {
                assert!(rank.dir.join(format!("arrived {round} {other}")).exists());
            }
        }
    });
}

#[test]
fn a_group_of_one_needs_nobody() {
    let group =
        Communicator::create(&firefly_reduce::Config::new(0, 1), &firefly_reduce::MemoryStore::default())
            .unwrap();
    let mut data = [3.0f32, 4.0];
    group.allreduce_f32(&mut data, ReduceOp::Avg).unwrap();
    assert_eq!(data, [3.0, 4.0]);
    let mut out = [0.0f32; 2];
    group.reduce_scatter(&data, &mut out, ReduceOp::PremulSum(2.0)).unwrap();
    assert_eq!(out, [6.0, 8.0]);
    group.allgather(&data, &mut out).unwrap();
    assert_eq!(out, data);
    group.broadcast(&mut data, 0).unwrap();
    group.barrier().unwrap();
    assert_eq!(group.stats().completed, 5);
}
