//! Deaths and stops of a rank before, in and after every collective, at 2, 3, 4 and 8 ranks, within and
//! across nodes, with a forked child of the victim alive. Every survivor gets an error that names the
//! rank; a stopped rank that goes on gets one, too. Nothing hangs: a watchdog ends what does.
//!
//! `cargo test` runs a sample drawn by a seed, which it prints. `make kill-matrix` runs all of it:
//! FIREFLY_KILL_MATRIX=all; another sample: FIREFLY_KILL_MATRIX=COUNT:SEED.

mod common;

use common::{Memory, await_note, launch, start};
use firefly_reduce::{Communicator, DType, Handle, Operation, RawBuf, ReduceError, ReduceOp};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::time::Duration;

/// Of operations where a rank is stopped: what they wait before they say so.
const LIMIT: Duration = Duration::from_secs(3);
const SAMPLE: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// The victim never issues the operation.
    Before,
    /// The victim has issued it, and its progress thread is at it.
    In,
    /// The victim has completed it.
    After,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Signal {
    Kill,
    /// Stopped, and resumed when all others have failed.
    Stop,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    nodes: &'static str,
    victim: u32,
    operation: usize,
    phase: Phase,
    signal: Signal,
}

const LAYOUTS: [&str; 11] =
    ["aa", "ab", "aaa", "abc", "aab", "aaaa", "abcd", "aabb", "aaaaaaaa", "abcdefgh", "aaaabbbb"];
const OPERATIONS: usize = 10;

/// All collectives, and a ring of point-to-point messages.
fn operation(index: usize, victim: u32) -> Option<Operation> {
    Some(match index {
        0 => Operation::AllReduce(ReduceOp::Sum),
        1 => Operation::Reduce { op: ReduceOp::Sum, root: u32::from(victim == 0) },
        2 => Operation::Broadcast { root: victim },
        3 => Operation::AllGather,
        4 => Operation::ReduceScatter(ReduceOp::Max),
        5 => Operation::AllToAll,
        6 => Operation::Gather { root: u32::from(victim == 0) },
        7 => Operation::Scatter { root: victim },
        8 => Operation::Barrier,
        _ => return None,
    })
}

fn matrix() -> Vec<Case> {
    let mut cases = Vec::new();
    for nodes in LAYOUTS {
        for operation in 0..OPERATIONS {
            for phase in [Phase::Before, Phase::In, Phase::After] {
                for signal in [Signal::Kill, Signal::Stop] {
                    // Every rank has its turn, spread over the matrix.
                    let victim = ((operation + phase as usize) % nodes.len()) as u32;
                    cases.push(Case { nodes, victim, operation, phase, signal });
                }
            }
        }
    }
    cases
}

/// What this run takes from the matrix; the same in the ranks' processes.
fn chosen() -> Vec<Case> {
    let all = matrix();
    let wanted = std::env::var("FIREFLY_KILL_MATRIX").unwrap_or_default();
    if wanted == "all" {
        return all;
    }
    let number = |text: Option<&str>| text.and_then(|t| t.parse::<u64>().ok());
    let mut parts = wanted.split(':');
    let count = number(parts.next()).map_or(SAMPLE, |n| n as usize);
    let seed = number(parts.next()).unwrap_or(20_261_125);
    println!("seed {seed}: {count} of {} cases", all.len());
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut left = all;
    (0..count.min(left.len())).map(|_| left.swap_remove(random.next_u64() as usize % left.len())).collect()
}

/// The memory of operations that a rank has issued, kept until it ends.
struct Issued {
    handles: Vec<Handle>,
    _memory: Vec<Memory>,
}

fn issue(group: &Communicator, index: usize, victim: u32, count: usize) -> Result<Issued, ReduceError> {
    let n = group.size() as usize;
    let d = DType::F32;
    let (mut one, mut all) = (Memory::zeroed(count * 4), Memory::zeroed(count * 4 * n));
    let (mut one_out, mut all_out) = (one.clone(), all.clone());
    let (a, b) = (vec![one.buf(d)], vec![all.buf(d)]);
    let (a_out, b_out) = (vec![one_out.buf(d)], vec![all_out.buf(d)]);
    let mut handles = Vec::new();
    match operation(index, victim) {
        Some(operation) => {
            let (input, output): (Vec<RawBuf>, Vec<RawBuf>) = match operation {
                Operation::AllReduce(_) | Operation::Reduce { .. } | Operation::Broadcast { .. } => {
                    (a, a_out)
                }
                Operation::AllGather | Operation::Gather { .. } => (a, b_out),
                Operation::ReduceScatter(_) | Operation::Scatter { .. } => (b, a_out),
                Operation::AllToAll => (b, b_out),
                _ => (vec![], vec![]),
            };
            handles.push(start(group, operation, d, &input, &output, None)?);
        }
        None => {
            let (me, n) = (group.rank(), group.size());
            let (next, previous) = ((me + 1) % n, (me + n - 1) % n);
            handles.push(start(group, Operation::Recv { peer: previous, tag: 1 }, d, &[], &a_out, None)?);
            handles.push(start(group, Operation::Send { peer: next, tag: 1 }, d, &a, &[], None)?);
        }
    }
    Ok(Issued { handles, _memory: vec![one, all, one_out, all_out] })
}

fn finish(issued: &Issued) -> Result<(), ReduceError> {
    issued.handles.iter().try_for_each(Handle::wait)
}

/// Works until something breaks.
fn until_error(group: &Communicator, case: &Case, count: usize) -> ReduceError {
    loop {
        let round = issue(group, case.operation, case.victim, count).and_then(|issued| finish(&issued));
        if let Err(error) = round.and_then(|()| group.barrier()) {
            return error;
        }
    }
}

fn names(error: &ReduceError, case: &Case) -> bool {
    let victim = case.victim;
    // The ranks that a text calls missing, its own or one that a peer has passed on.
    let missing = |text: &str| {
        text.split("missing rank").skip(1).any(|rest| {
            let list = rest.trim_start_matches("s: ").trim_start_matches(": ");
            list.split(|c: char| !c.is_ascii_digit() && c != ',' && c != ' ')
                .next()
                .is_some_and(|list| list.split(", ").any(|r| r.trim() == victim.to_string()))
        })
    };
    match (case.signal, error) {
        (_, ReduceError::PeerDied { rank, .. }) => *rank == victim,
        (Signal::Stop, ReduceError::Timeout { missing: ranks, .. }) => ranks.contains(&victim),
        (Signal::Stop, ReduceError::Aborted { detail }) => missing(detail),
        _ => false,
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

fn signal(pid: u32, signal: i32) {
    // SAFETY: a process of this test.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

fn run_case(test: &str, case: Case) {
    let size = case.nodes.len() as u32;
    let outcome = launch(
        test,
        case.nodes,
        |rank| {
            let mut config = rank.config("g");
            if case.signal == Signal::Stop {
                config.timeout = LIMIT;
                config.form_timeout = Some(Duration::from_secs(60));
            }
            let group = rank.create(&config).unwrap();
            let count = 100_000;
            finish(&issue(&group, case.operation, case.victim, 1000).unwrap()).unwrap();
            rank.note(&format!("warm {}", rank.rank));
            if rank.rank == case.victim {
                fork_a_bystander();
                let issued = match case.phase {
                    Phase::Before => None,
                    Phase::In => Some(issue(&group, case.operation, case.victim, count).unwrap()),
                    Phase::After => {
                        let issued = issue(&group, case.operation, case.victim, count).unwrap();
                        finish(&issued).unwrap();
                        Some(issued)
                    }
                };
                rank.note("here");
                // Killed here, or stopped and resumed.
                rank.await_note("resumed");
                let error = issued
                    .and_then(|issued| finish(&issued).err())
                    .unwrap_or_else(|| until_error(&group, &case, count));
                println!("{error}");
                return;
            }
            let error = until_error(&group, &case, count);
            assert!(names(&error, &case), "{case:?}: {error:?}");
            // And it stays broken, with the same cause.
            let again = until_error(&group, &case, 10);
            assert!(names(&again, &case), "{case:?}: {again:?}");
            rank.note(&format!("failed {}", rank.rank));
        },
        |dir, children| {
            let pid = children[case.victim as usize].id();
            // Nobody is still at the undisturbed operation, which the victim may have left before.
            for rank in 0..size {
                await_note(dir, &format!("warm {rank}"));
            }
            await_note(dir, "here");
            if case.signal == Signal::Kill {
                return signal(pid, libc::SIGKILL);
            }
            signal(pid, libc::SIGSTOP);
            for rank in (0..size).filter(|&r| r != case.victim) {
                await_note(dir, &format!("failed {rank}"));
            }
            std::fs::write(dir.join("resumed"), "1").unwrap();
            signal(pid, libc::SIGCONT);
        },
    );
    for (rank, (status, output)) in outcome.into_iter().flatten().enumerate() {
        let wanted = rank as u32 != case.victim || case.signal == Signal::Stop;
        assert!(status.success() == wanted, "{case:?}: rank {rank} ended with {status}:\n{output}");
    }
}

#[test]
fn every_survivor_names_the_rank() {
    for (i, case) in chosen().into_iter().enumerate() {
        if std::env::var("FFR_TEST_LAUNCH").is_err() {
            println!("{i}: {case:?}");
        }
        run_case("every_survivor_names_the_rank", case);
    }
}

/// The control of the matrix: a group that is left alone breaks nothing and names nobody.
#[test]
fn without_a_signal_nothing_breaks() {
    for nodes in LAYOUTS {
        common::world("without_a_signal_nothing_breaks", nodes, |rank| {
            let group = rank.group("g");
            for index in 0..OPERATIONS {
                finish(&issue(&group, index, 0, 100_000).unwrap()).unwrap();
            }
            group.barrier().unwrap();
            assert_eq!(group.failure(), None);
        });
    }
}
