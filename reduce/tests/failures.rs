//! What goes wrong ends in an error that names the rank, on every survivor: deaths, silence,
//! different operations, aborts. No test here asserts a duration; a watchdog ends what hangs.

mod common;

use common::{Memory, Rank, await_note, launch, run, start, world};
use firefly_reduce::{Communicator, DType, Operation, RawBuf, ReduceError, ReduceOp};
use std::time::Duration;

const VICTIM: u32 = 2;

/// All collectives, with the victim where the others need it most.
const OPERATIONS: [Operation; 9] = [
    Operation::AllReduce(ReduceOp::Sum),
    Operation::Reduce { op: ReduceOp::Sum, root: 0 },
    Operation::Broadcast { root: VICTIM },
    Operation::AllGather,
    Operation::ReduceScatter(ReduceOp::Max),
    Operation::AllToAll,
    Operation::Gather { root: 0 },
    Operation::Scatter { root: VICTIM },
    Operation::Barrier,
];

/// One round of `operation` with `count` elements per block.
fn round(group: &Communicator, operation: Operation, count: usize) -> Result<(), ReduceError> {
    let n = group.size() as usize;
    let (mut one, mut all) = (Memory::zeroed(count * 4), Memory::zeroed(count * 4 * n));
    let (mut one_out, mut all_out) = (one.clone(), all.clone());
    let d = DType::F32;
    let (one, all) = (vec![one.buf(d)], vec![all.buf(d)]);
    let (one_out, all_out) = (vec![one_out.buf(d)], vec![all_out.buf(d)]);
    let (input, output): (Vec<RawBuf>, Vec<RawBuf>) = match operation {
        Operation::AllReduce(_) | Operation::Reduce { .. } | Operation::Broadcast { .. } => (one, one_out),
        Operation::AllGather | Operation::Gather { .. } => (one, all_out),
        Operation::ReduceScatter(_) | Operation::Scatter { .. } => (all, one_out),
        Operation::AllToAll => (all, all_out),
        _ => (vec![], vec![]),
    };
    run(group, operation, d, &input, &output)
}

/// Works until something breaks.
fn until_error(group: &Communicator, operation: Operation, count: usize) -> ReduceError {
    loop {
        if let Err(error) = round(group, operation, count).and_then(|()| round(group, Operation::Barrier, 0))
        {
            return error;
        }
    }
}

/// A child that shares every descriptor of its parent and outlives it, like a DataLoader worker.
fn fork_a_bystander() {
    // SAFETY: the child only sleeps and exits, which is allowed after a fork.
    unsafe {
        if libc::fork() == 0 {
            libc::sleep(100);
            libc::_exit(0);
        }
    }
}

fn kill(pid: u32, signal: i32) {
    // SAFETY: a process of this test.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

fn survivors_succeed(test: &str, nodes: &str, outcome: &[(std::process::ExitStatus, String)]) {
    for (rank, (status, output)) in outcome.iter().enumerate() {
        let wanted = rank as u32 != VICTIM;
        assert!(status.success() == wanted, "{test} on {nodes}: rank {rank} ended with {status}:\n{output}");
    }
}

fn names_the_victim(error: &ReduceError, context: &str) {
    assert!(matches!(error, ReduceError::PeerDied { rank: VICTIM, .. }), "{context}: {error:?}");
    let text = error.to_string();
    assert!(text.contains("rank 2") && text.contains("group \"g\""), "{context}: {text}");
}

/// The victim stops taking part and is killed, while its fork lives on.
fn death(test: &str, nodes: &str, liveness: bool, operation: Operation, judge: impl Fn(&ReduceError)) {
    let outcome = launch(
        test,
        nodes,
        |rank| {
            let mut config = rank.config("g");
            config.liveness = liveness;
            if !liveness {
                config.timeout = Duration::from_secs(2);
            }
            let group = rank.create(&config).unwrap();
            round(&group, operation, 1000).unwrap();
            rank.note(&format!("ready {}", rank.rank));
            if rank.rank == VICTIM {
                fork_a_bystander();
                rank.note("victim");
                loop {
                    std::thread::park();
                }
            }
            judge(&until_error(&group, operation, 50_000));
            // And it stays broken, at once and with the same cause.
            judge(&round(&group, operation, 10).unwrap_err());
        },
        |dir, _| {
            for rank in 0..nodes.len() {
                await_note(dir, &format!("ready {rank}"));
            }
            kill(await_note(dir, "victim"), libc::SIGKILL);
        },
    );
    if let Some(outcome) = outcome {
        survivors_succeed(test, nodes, &outcome);
    }
}

#[test]
fn a_death_is_named_in_every_collective() {
    for nodes in ["aaa", "abc", "aab", "abb"] {
        for operation in OPERATIONS {
            death("a_death_is_named_in_every_collective", nodes, true, operation, |error| {
                names_the_victim(error, &format!("{operation:?} on {nodes}"));
            });
        }
    }
}

#[test]
fn without_the_watch_a_death_is_only_a_timeout() {
    // The control of the test above: what names the dead is the watch, not luck.
    for nodes in ["aaa", "abc"] {
        let operation = Operation::AllReduce(ReduceOp::Sum);
        death("without_the_watch_a_death_is_only_a_timeout", nodes, false, operation, |error| {
            // Whoever runs into its timeout second has been told by the first.
            match error {
                ReduceError::Timeout { missing, .. } => assert_eq!(missing, &[VICTIM], "{error}"),
                ReduceError::Aborted { detail } => assert!(detail.contains("missing ranks: 2"), "{error}"),
                other => panic!("{other:?}"),
            }
        });
    }
}

#[test]
fn a_death_in_mid_transfer_is_named() {
    const TEST: &str = "a_death_in_mid_transfer_is_named";
    for nodes in ["aaa", "abc", "aab"] {
        let outcome = launch(
            TEST,
            nodes,
            |rank| {
                let group = rank.group("g");
                if rank.rank == VICTIM {
                    fork_a_bystander();
                }
                let mut data = vec![1.0f32; 4 << 20];
                let error = loop {
                    if let Err(error) = group.allreduce_f32(&mut data, ReduceOp::Avg) {
                        break error;
                    }
                    rank.note(&format!("went {}", rank.rank));
                };
                names_the_victim(&error, nodes);
            },
            |dir, children| {
                for rank in 0..nodes.len() {
                    await_note(dir, &format!("went {rank}"));
                }
                kill(children[VICTIM as usize].id(), libc::SIGKILL);
            },
        );
        if let Some(outcome) = outcome {
            survivors_succeed(TEST, nodes, &outcome);
        }
    }
}

#[test]
fn a_stopped_rank_is_a_timeout_and_gets_an_error_when_it_goes_on() {
    const TEST: &str = "a_stopped_rank_is_a_timeout_and_gets_an_error_when_it_goes_on";
    for nodes in ["aaa", "abc"] {
        let outcome = launch(
            TEST,
            nodes,
            |rank| {
                let mut config = rank.config("g");
                config.timeout = Duration::from_secs(2);
                let group = rank.create(&config).unwrap();
                let operation = Operation::AllReduce(ReduceOp::Sum);
                round(&group, operation, 1000).unwrap();
                rank.note(&format!("ready {}", rank.rank));
                if rank.rank == VICTIM {
                    rank.await_note("stopped");
                }
                let error = until_error(&group, operation, 1000);
                let fits = match &error {
                    ReduceError::Timeout { missing, .. } => missing == &[VICTIM],
                    // Told by the first to run into it.
                    ReduceError::Aborted { detail } => detail.contains("missing ranks: 2"),
                    _ => false,
                };
                // The stopped one may also find the others' connections closed.
                assert!(fits || rank.rank == VICTIM, "{error:?}");
                rank.note(&format!("failed {}", rank.rank));
            },
            |dir, children| {
                for rank in 0..nodes.len() {
                    await_note(dir, &format!("ready {rank}"));
                }
                let victim = children[VICTIM as usize].id();
                kill(victim, libc::SIGSTOP);
                std::fs::write(dir.join("stopped"), "1").unwrap();
                for rank in 0..nodes.len() as u32 {
                    if rank != VICTIM {
                        await_note(dir, &format!("failed {rank}"));
                    }
                }
                kill(victim, libc::SIGCONT);
            },
        );
        for (rank, (status, output)) in outcome.into_iter().flatten().enumerate() {
            assert!(status.success(), "rank {rank} on {nodes} ended with {status}:\n{output}");
        }
    }
}

#[test]
fn a_timeout_names_all_missing_ranks_and_nobody_else() {
    for nodes in ["aaaa", "abcd", "aabb"] {
        for count in [10, 100_000] {
            world("a_timeout_names_all_missing_ranks_and_nobody_else", nodes, |rank| {
                let group = rank.group(&format!("g{count}"));
                group.barrier().unwrap();
                if rank.rank % 2 == 1 {
                    rank.await_note(&format!("failed {count} 0"));
                    rank.await_note(&format!("failed {count} 2"));
                    return;
                }
                group.set_timeout(Duration::from_millis(700));
                let error = round(&group, Operation::AllReduce(ReduceOp::Sum), count).unwrap_err();
                let text = error.to_string();
                assert!(text.contains("missing ranks: 1, 3"), "{text}");
                assert!(text.contains("allreduce sum f32") && text.contains("operation 2"), "{text}");
                rank.note(&format!("failed {count} {}", rank.rank));
            });
        }
    }
}

/// What rank 0 and rank 1 do at the same place.
fn mismatches() -> Vec<[(Operation, usize); 2]> {
    let sum = Operation::AllReduce(ReduceOp::Sum);
    vec![
        [(sum, 100), (sum, 101)],
        [(sum, 100_000), (sum, 100_001)],
        [(sum, 100), (Operation::AllReduce(ReduceOp::Max), 100)],
        [(sum, 100_000), (Operation::AllGather, 100_000)],
        [(sum, 100), (Operation::Barrier, 0)],
        [(Operation::Barrier, 0), (Operation::Broadcast { root: 0 }, 100)],
        // Both only send, or both only wait.
        [(Operation::Broadcast { root: 0 }, 10), (Operation::Broadcast { root: 1 }, 10)],
        [(Operation::Broadcast { root: 0 }, 100_000), (Operation::Broadcast { root: 1 }, 100_000)],
        [(Operation::Broadcast { root: 1 }, 10), (Operation::Broadcast { root: 0 }, 10)],
        [(Operation::Gather { root: 0 }, 10), (Operation::Scatter { root: 0 }, 10)],
        [(Operation::AllToAll, 100), (Operation::AllToAll, 200)],
    ]
}

#[test]
fn different_operations_are_an_error_on_both_sides() {
    for nodes in ["aa", "ab"] {
        for (i, pair) in mismatches().into_iter().enumerate() {
            let name = format!("g{i}");
            world("different_operations_are_an_error_on_both_sides", nodes, |rank| {
                let group = rank.group(&name);
                group.barrier().unwrap();
                let (operation, count) = pair[rank.rank as usize];
                // Who only sends has nothing to wait for; the next operation tells it.
                let error = until_error(&group, operation, count);
                assert!(matches!(error, ReduceError::Mismatch { .. }), "{pair:?}: {error:?}");
                let text = error.to_string();
                assert!(text.contains("rank 0") && text.contains("rank 1"), "{pair:?}: {text}");
            });
        }
    }
}

#[test]
fn a_wrong_size_of_a_message_is_an_error() {
    for nodes in ["aa", "ab"] {
        for (i, (sent, wanted)) in [(10usize, 20usize), (100_000, 20), (20, 100_000)].into_iter().enumerate()
        {
            world("a_wrong_size_of_a_message_is_an_error", nodes, |rank| {
                let group = rank.group(&format!("g{i}"));
                let error = if rank.rank == 0 {
                    let _ = group.send(&vec![1u8; sent], 1, 5);
                    group.barrier().unwrap_err()
                } else {
                    group.recv(&mut vec![0u8; wanted], 0, 5).unwrap_err()
                };
                assert!(matches!(error, ReduceError::Mismatch { .. }), "{error:?}");
            });
        }
    }
}

#[test]
fn an_abort_wakes_every_waiter_here_and_is_told_there() {
    for nodes in ["aa", "ab"] {
        world("an_abort_wakes_every_waiter_here_and_is_told_there", nodes, |rank| {
            let group = rank.group("g");
            let group = &group;
            if rank.rank == 1 {
                let error = until_error(group, Operation::Barrier, 0);
                assert!(matches!(error, ReduceError::Aborted { .. }), "{error:?}");
                assert!(error.to_string().contains("rank 0 aborted the group: enough"), "{error}");
                return;
            }
            group.barrier().unwrap();
            let (called, calls) = std::sync::mpsc::channel();
            std::thread::scope(|scope| {
                let waiters: Vec<_> = (0..4u32)
                    .map(|tag| {
                        let called = called.clone();
                        scope.spawn(move || {
                            let mut data = Memory::zeroed(400_000);
                            let buf = [data.buf(DType::F32)];
                            let operation = Operation::Recv { peer: 1, tag };
                            let callback = Box::new(move |outcome: &Result<(), ReduceError>| {
                                called.send(outcome.clone()).unwrap();
                            });
                            let handle =
                                start(group, operation, DType::F32, &[], &buf, Some(callback)).unwrap();
                            handle.wait().unwrap_err()
                        })
                    })
                    .collect();
                while group.stats().submitted < 5 {
                    std::thread::yield_now();
                }
                group.abort("enough");
                for waiter in waiters {
                    let error = waiter.join().unwrap();
                    assert!(matches!(error, ReduceError::Aborted { .. }), "{error:?}");
                }
            });
            drop(called);
            assert_eq!(calls.iter().filter(Result::is_err).count(), 4, "each callback ran once");
            assert!(group.failure().is_some());
            assert!(round(group, Operation::Barrier, 0).is_err());
        });
    }
}

#[test]
fn a_rank_that_leaves_is_named_by_those_that_need_it() {
    for nodes in ["aa", "ab"] {
        world("a_rank_that_leaves_is_named_by_those_that_need_it", nodes, |rank| {
            let group = rank.group("g");
            round(&group, Operation::AllReduce(ReduceOp::Sum), 100_000).unwrap();
            if rank.rank == 0 {
                let error = round(&group, Operation::AllReduce(ReduceOp::Sum), 1000).unwrap_err();
                assert!(matches!(error, ReduceError::Aborted { .. }), "{error:?}");
                assert!(error.to_string().contains("rank 1 has left the group"), "{error}");
            }
        });
    }
}

#[test]
fn a_receive_that_nobody_serves_times_out_alone() {
    for nodes in ["aa", "ab"] {
        world("a_receive_that_nobody_serves_times_out_alone", nodes, |rank| {
            let group = rank.group("g");
            if rank.rank == 0 {
                group.set_timeout(Duration::from_millis(200));
                let error = group.recv(&mut [0u8; 8], 1, 3).unwrap_err();
                assert!(
                    matches!(&error, ReduceError::Timeout { missing, .. } if missing == &[1]),
                    "{error:?}"
                );
                let mut memory = Memory::zeroed(8);
                let bufs = [memory.buf(DType::U8)];
                let error = run(&group, Operation::RecvAny { tag: 3 }, DType::U8, &[], &bufs).unwrap_err();
                assert!(matches!(error, ReduceError::Timeout { .. }), "{error:?}");
                group.set_timeout(Duration::from_secs(60));
            }
            group.barrier().unwrap();
            assert_eq!(group.failure(), None);
        });
    }
}

#[test]
fn nonsense_is_refused_and_harms_nothing() {
    world("nonsense_is_refused_and_harms_nothing", "aa", |rank| {
        let group = rank.group("g");
        let mut memory = Memory::zeroed(64);
        let buf = memory.buf(DType::F32);
        let shorter = RawBuf { count: 3, ..buf };
        let askew = RawBuf { ptr: buf.ptr.wrapping_add(1), count: 1 };
        let sum = Operation::AllReduce(ReduceOp::Sum);
        for (operation, input, output) in [
            (sum, vec![buf], vec![shorter]),
            (sum, vec![], vec![buf]),
            (sum, vec![askew], vec![askew]),
            (Operation::AllReduce(ReduceOp::BitXor), vec![buf], vec![buf]),
            (Operation::Broadcast { root: 2 }, vec![buf], vec![buf]),
            (Operation::Send { peer: rank.rank, tag: 0 }, vec![buf], vec![]),
            (Operation::AllGather, vec![buf], vec![shorter]),
        ] {
            let error = run(&group, operation, DType::F32, &input, &output).unwrap_err();
            assert!(
                matches!(error, ReduceError::Invalid { .. } | ReduceError::Unsupported { .. }),
                "{operation:?}: {error:?}"
            );
        }
        assert_eq!(group.sequence(), 0, "nothing was submitted");
        group.barrier().unwrap();
    });
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn groups_give_everything_back_and_can_follow_each_other() {
    for nodes in ["aa", "ab", "aab"] {
        world("groups_give_everything_back_and_can_follow_each_other", nodes, |rank| {
            let cycle = |i: usize| {
                let group = rank.group(&format!("g{i}"));
                round(&group, Operation::AllReduce(ReduceOp::Sum), 50_000).unwrap();
                if i % 3 == 2 {
                    // Either rank may be the first to abort, while the other is still in it.
                    let _ = group.barrier();
                    group.abort("to see what stays");
                }
            };
            cycle(0);
            let before = (open_descriptors(), firefly_reduce::mapped_segments(), threads());
            for i in 1..12 {
                cycle(i);
            }
            assert_eq!(before, (open_descriptors(), firefly_reduce::mapped_segments(), threads()));
            assert_eq!(before.1, 0);
        });
    }
}

/// A rank of another node is stopped, and nobody has anything to wait for: only its silence tells.
fn silence(test: &str, heartbeats: bool) {
    let outcome = launch(
        test,
        "abc",
        |rank| {
            let mut config = rank.config("g");
            config.heartbeat_timeout = Duration::from_secs(2);
            config.liveness = heartbeats;
            config.timeout = Duration::from_secs(if heartbeats { 100 } else { 4 });
            config.form_timeout = Some(Duration::from_secs(60));
            let group = rank.create(&config).unwrap();
            group.barrier().unwrap();
            rank.note(&format!("ready {}", rank.rank));
            rank.await_note("stopped");
            let error = until_error(&group, Operation::Barrier, 0);
            if heartbeats || rank.rank == VICTIM {
                // The stopped one may find the others gone, or hear why.
                let fits = matches!(error, ReduceError::PeerDied { rank: VICTIM, .. }) || rank.rank == VICTIM;
                assert!(fits && (rank.rank == VICTIM || error.to_string().contains("rank 2")), "{error:?}");
            } else {
                assert!(!matches!(error, ReduceError::PeerDied { .. }), "{error:?}");
            }
            rank.note(&format!("failed {}", rank.rank));
        },
        |dir, children| {
            for rank in 0..3 {
                await_note(dir, &format!("ready {rank}"));
            }
            let victim = children[VICTIM as usize].id();
            kill(victim, libc::SIGSTOP);
            std::fs::write(dir.join("stopped"), "1").unwrap();
            for rank in 0..2 {
                await_note(dir, &format!("failed {rank}"));
            }
            kill(victim, libc::SIGCONT);
        },
    );
    for (rank, (status, output)) in outcome.into_iter().flatten().enumerate() {
        assert!(status.success(), "rank {rank} ended with {status}:\n{output}");
    }
}

#[test]
fn a_silent_host_is_named_by_its_missing_heartbeats() {
    silence("a_silent_host_is_named_by_its_missing_heartbeats", true);
}

#[test]
fn without_heartbeats_silence_is_only_a_timeout() {
    // The control of the test above: it is the heartbeats that tell, well before the operation's time.
    silence("without_heartbeats_silence_is_only_a_timeout", false);
}

#[test]
fn heartbeats_keep_an_idle_group_alive() {
    world("heartbeats_keep_an_idle_group_alive", "ab", |rank| {
        let mut config = rank.config("g");
        config.heartbeat_timeout = Duration::from_secs(1);
        let group = rank.create(&config).unwrap();
        group.barrier().unwrap();
        // Long enough that a group without signs of life would have been given up: twelve heartbeats
        // are three seconds. Only they move bytes now.
        let idle = group.stats().tcp_bytes_received;
        while group.stats().tcp_bytes_received < idle + 12 * 64 {
            assert_eq!(group.failure(), None);
            std::thread::sleep(Duration::from_millis(1));
        }
        group.barrier().unwrap();
    });
}

#[test]
fn the_status_page_says_who_is_waited_for() {
    const TEST: &str = "the_status_page_says_who_is_waited_for";
    for nodes in ["aaa", "abc"] {
        let outcome = launch(
            TEST,
            nodes,
            |rank| {
                let group = rank.group("g");
                group.barrier().unwrap();
                rank.note(&format!("ready {}", rank.rank));
                if rank.rank == VICTIM {
                    rank.await_note("seen");
                }
                round(&group, Operation::AllReduce(ReduceOp::Sum), 50_000).unwrap();
                rank.note(&format!("done {}", rank.rank));
                rank.await_note("over");
            },
            |dir, children| {
                for rank in 0..nodes.len() {
                    await_note(dir, &format!("ready {rank}"));
                }
                let of = |rank: usize| {
                    let pages = firefly_reduce::status::of_process(children[rank].id()).unwrap();
                    pages.into_iter().find(|p| p.group == "g").expect("a page of the group")
                };
                let until = |rank: usize, what: &dyn Fn(&firefly_types::RankStatus) -> bool| {
                    loop {
                        let page = of(rank);
                        if what(&page) {
                            return page;
                        }
                        // Polls; the harness's watchdog ends what never comes.
                        std::thread::sleep(Duration::from_millis(1));
                    }
                };
                let page = until(0, &|p| p.stuck_since > 0 && p.waiting_for == [VICTIM]);
                assert_eq!((page.rank, page.size, page.issued, page.completed), (0, 3, 2, 1));
                assert_eq!(page.operation, "allreduce sum f32 x 50000");
                assert!(page.stuck_since <= page.updated && page.waiting_count == 1);
                let idle = until(VICTIM as usize, &|p| p.completed == 1);
                assert_eq!((idle.operation.as_str(), idle.stuck_since), ("", 0));
                std::fs::write(dir.join("seen"), "1").unwrap();
                for rank in 0..nodes.len() {
                    await_note(dir, &format!("done {rank}"));
                    until(rank, &|p| p.completed == 2 && p.operation.is_empty() && p.bytes_sent > 0);
                }
                std::fs::write(dir.join("over"), "1").unwrap();
            },
        );
        for (rank, (status, output)) in outcome.into_iter().flatten().enumerate() {
            assert!(status.success(), "rank {rank} on {nodes} ended with {status}:\n{output}");
        }
    }
}

#[test]
fn survivors_form_a_group_again_in_the_same_process() {
    const TEST: &str = "survivors_form_a_group_again_in_the_same_process";
    for nodes in ["aaa", "abc", "aab"] {
        let outcome = launch(
            TEST,
            nodes,
            |rank| {
                let group = rank.group("g");
                rank.note(&format!("ready {}", rank.rank));
                let error = until_error(&group, Operation::AllReduce(ReduceOp::Sum), 50_000);
                names_the_victim(&error, nodes);
                drop(group);
                let mut config = rank.config("again");
                config.size = 2;
                let again = rank.create(&config).unwrap();
                round(&again, Operation::AllReduce(ReduceOp::Sum), 50_000).unwrap();
                again.barrier().unwrap();
                drop(again);
                assert_eq!(firefly_reduce::mapped_segments(), 0);
            },
            |dir, children| {
                for rank in 0..nodes.len() {
                    await_note(dir, &format!("ready {rank}"));
                }
                kill(children[VICTIM as usize].id(), libc::SIGKILL);
            },
        );
        if let Some(outcome) = outcome {
            survivors_succeed(TEST, nodes, &outcome);
        }
    }
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn two_groups_of_the_same_ranks_do_not_disturb_each_other() {
    for nodes in ["aa", "ab"] {
        world("two_groups_of_the_same_ranks_do_not_disturb_each_other", nodes, |rank| {
            let (one, two) = (rank.group("one"), rank.group("two"));
            // Crossed order: rank 0 waits on one first, rank 1 on two.
            let mut data = vec![vec![1.0f32; 100_000]; 2];
            {
                let (first, second) = data.split_at_mut(1);
                let a = one.allreduce_async(&mut first[0], ReduceOp::Sum).unwrap();
                let b = two.allreduce_async(&mut second[0], ReduceOp::Sum).unwrap();
                let (sooner, later) = if rank.rank == 0 { (a, b) } else { (b, a) };
                sooner.wait().unwrap();
                later.wait().unwrap();
            }
            one.abort("only this one");
            assert!(one.barrier().is_err());
            two.barrier().unwrap();
            assert!(data.iter().flatten().all(|&x| x == 2.0));
        });
    }
}

#[test]
fn a_forked_child_cannot_use_or_harm_the_group() {
    for nodes in ["aa", "ab"] {
        world("a_forked_child_cannot_use_or_harm_the_group", nodes, |rank: &Rank| {
            let group = rank.group("g");
            group.barrier().unwrap();
            // SAFETY: the child makes one call that only reads, and exits without unwinding.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let refused = matches!(group.barrier(), Err(ReduceError::Invalid { .. }));
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(i32::from(!refused)) };
            }
            let mut status = 0;
            // SAFETY: our own child.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
            assert_eq!(status, 0, "the child was refused");
            round(&group, Operation::AllReduce(ReduceOp::Sum), 100_000).unwrap();
            group.barrier().unwrap();
        });
    }
}

#[test]
fn a_rank_that_never_comes_is_named() {
    world("a_rank_that_never_comes_is_named", "aab", |rank| {
        if rank.rank == 1 {
            return;
        }
        let mut config = rank.config("g");
        config.timeout = Duration::from_millis(800);
        let error = match rank.create(&config) {
            Err(error) => error,
            Ok(_) => panic!("formed without rank 1"),
        };
        assert!(matches!(error, ReduceError::Bootstrap { .. }), "{error:?}");
        assert!(error.to_string().contains("missing ranks") && error.to_string().contains('1'), "{error}");
    });
}
