//! The core against a scheduler that anybody can check by reading: no index, no class, no memory,
//! everything looked at after every event.

use crate::unit_tests::{Bench, exit, spec};
use crate::*;
use firefly_types::{JobId, NodeId};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// The naive scheduler: priority, then age; strictly in this order; whole nodes by number, shared
/// ones where least is left.
struct Naive {
    /// Free slots of each node, and who has the whole.
    nodes: BTreeMap<NodeId, (u32, u32, BTreeSet<JobId>)>,
    waiting: Vec<(JobId, JobSpec)>,
    running: BTreeMap<JobId, (JobSpec, Vec<NodeId>)>,
}

impl Naive {
    fn new(slots: &[u32]) -> Self {
        let ids = (1..).map(NodeId);
        let nodes = ids.zip(slots).map(|(id, s)| (id, (*s, *s, BTreeSet::new()))).collect();
        Self { nodes, waiting: Vec::new(), running: BTreeMap::new() }
    }

    fn submit(&mut self, id: JobId, spec: JobSpec) {
        self.waiting.push((id, spec));
        self.waiting.sort_by_key(|(id, spec)| (-spec.priority, *id));
        self.serve();
    }

    fn end(&mut self, id: JobId) {
        let Some((spec, nodes)) = self.running.remove(&id) else { return };
        for node in nodes {
            let (free, all, jobs) = self.nodes.get_mut(&node).unwrap();
            jobs.remove(&id);
            *free = if spec.whole() { *all } else { *free + spec.ranks_per_node };
        }
        self.serve();
    }

    fn find(&self, spec: &JobSpec, empty: bool) -> Option<Vec<NodeId>> {
        let each = spec.ranks_per_node;
        if spec.whole() {
            let idle =
                self.nodes.iter().filter(|(_, (_, all, jobs))| *all >= each && (empty || jobs.is_empty()));
            let found: Vec<NodeId> = idle.map(|(id, _)| *id).take(spec.nodes as usize).collect();
            (found.len() == spec.nodes as usize).then_some(found)
        } else {
            let free = |n: &(u32, u32, BTreeSet<JobId>)| if empty { n.1 } else { n.0 };
            let room = self.nodes.iter().filter(|(_, n)| free(n) >= each);
            room.min_by_key(|(id, n)| (free(n), n.1, **id)).map(|(id, _)| vec![*id])
        }
    }

    fn serve(&mut self) {
        let mut i = 0;
        while i < self.waiting.len() {
            let (id, spec) = self.waiting[i].clone();
            match self.find(&spec, false) {
                Some(nodes) => {
                    self.waiting.remove(i);
                    for node in &nodes {
                        let (free, _, jobs) = self.nodes.get_mut(node).unwrap();
                        *free = if spec.whole() { 0 } else { *free - spec.ranks_per_node };
                        jobs.insert(id);
                    }
                    self.running.insert(id, (spec, nodes));
                }
                // It would fit if they were empty: nobody passes it.
                None if self.find(&spec, true).is_some() => return,
                None => i += 1,
            }
        }
    }

    fn placed(&self) -> BTreeMap<JobId, Vec<NodeId>> {
        self.running.iter().map(|(id, (_, nodes))| (*id, nodes.clone())).collect()
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    /// Nodes, ranks on each, exclusive, priority.
    Submit(u32, u32, bool, i32),
    /// The oldest, or the youngest, running job ends.
    EndOldest,
    EndYoungest,
}

fn compare(slots: &[u32], ops: &[Op]) -> Result<(), String> {
    let policy = Policy {
        order: vec![OrderBy::Priority, OrderBy::Age],
        backfill: Backfill::None,
        displace: Vec::new(),
        packing: Packing::FirstFit,
        overdue_after_ms: 0,
        ..Policy::default()
    };
    let mut bench = Bench::with(policy, slots);
    let mut naive = Naive::new(slots);
    for (i, op) in ops.iter().enumerate() {
        match *op {
            Op::Submit(nodes, each, exclusive, priority) => {
                let spec = JobSpec { exclusive, ..spec(nodes, each, priority, 0) };
                let id = bench.submit_spec(spec.clone());
                naive.submit(id, spec);
            }
            Op::EndOldest | Op::EndYoungest => {
                let mut running = naive.running.keys();
                let job = if matches!(op, Op::EndOldest) { running.next() } else { running.next_back() };
                let Some(job) = job.copied() else { continue };
                // All of its nodes come free in one event, as in the naive one.
                bench.run_if_needed(job);
                bench.end_at_once(job);
                naive.end(job);
            }
        }
        let placed: BTreeMap<JobId, Vec<NodeId>> = bench
            .core
            .jobs()
            .filter(|j| !j.state.is_final())
            .filter_map(|j| Some((j.id, j.attempt()?.seats.iter().map(|s| s.node).collect())))
            .collect();
        if placed != naive.placed() {
            return Err(format!("after {i} of {ops:?}: {placed:?}, expected {:?}", naive.placed()));
        }
    }
    Ok(())
}

impl Bench {
    fn run_if_needed(&mut self, job: JobId) {
        if self.state(job) == JobState::Starting {
            self.run(job);
        }
    }

    /// A job on several nodes ends rank by rank; nothing that needs more than one node may start
    /// in between, so the last event is the one to compare after.
    fn end_at_once(&mut self, job: JobId) {
        for rank in 0..self.core.job(job).unwrap().spec.world_size() {
            self.say(job, rank, exit(0));
        }
    }
}

/// Every sequence of so many operations on small clusters.
#[test]
fn every_short_history_is_the_naive_one() {
    let ops = [
        Op::Submit(1, 1, false, 0),
        Op::Submit(1, 2, false, 1),
        Op::Submit(1, 1, true, 0),
        Op::EndOldest,
        Op::EndYoungest,
    ];
    let mut histories = 0;
    for slots in [&[2][..], &[2, 1], &[2, 2, 3]] {
        for length in 1..=6_u32 {
            for code in 0..ops.len().pow(length) {
                let history: Vec<Op> =
                    (0..length).map(|i| ops[code / ops.len().pow(i) % ops.len()]).collect();
                compare(slots, &history).unwrap();
                histories += 1;
            }
        }
    }
    println!("{histories} histories");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn long_histories_are_the_naive_ones(
        slots in prop::collection::vec(1..5u32, 1..7),
        ops in prop::collection::vec(
            prop_oneof![
                3 => (1..5u32, -1..2i32).prop_map(|(each, priority)| Op::Submit(1, each, false, priority)),
                2 => (1..3u32, -1..2i32).prop_map(|(each, priority)| Op::Submit(1, each, true, priority)),
                2 => Just(Op::EndOldest),
                1 => Just(Op::EndYoungest),
            ],
            1..60,
        ),
    ) {
        prop_assert_eq!(compare(&slots, &ops), Ok(()));
    }

    /// Whatever is in the way by the explanation: when it is gone, the job starts.
    #[test]
    fn the_change_that_is_named_lets_the_job_start(
        jobs in prop::collection::vec((1..4u32, 1..4u32, any::<bool>(), -1..2i32, 0..3usize), 4..30),
    ) {
        // Without fair share and quotas: an end changes whose turn it is, and who is within.
        let policy = Policy { order: vec![OrderBy::Priority, OrderBy::Age], ..Policy::default() };
        let mut bench = Bench::with(policy, &[4, 4, 4]);
        let mut newest = None;
        for (nodes, each, exclusive, priority, user) in jobs {
            let exclusive = exclusive || nodes > 1;
            let user = ["a", "b", "c"][user].to_owned();
            let spec = JobSpec { exclusive, user, ..spec(nodes, each, priority, 0) };
            let event = Event::Submit { spec, key: String::new() };
            if let Some(Decision::Answer(Answer::Job(id))) = bench.step(event).pop() {
                newest = Some(id);
            }
        }
        // The head of the queue: nobody else is in its way.
        let head = bench.core.heads.values().next().copied();
        for job in head.into_iter().chain(newest) {
            let why = bench.core.explain(job, bench.now).unwrap();
            let ends: Vec<JobId> = match &why.change {
                Change::Free { jobs, .. } if why.binding == Binding::NoRoom && Some(job) == head => {
                    jobs.iter().copied().collect()
                }
                _ => continue,
            };
            prop_assert!(!ends.is_empty());
            for (i, other) in ends.iter().enumerate() {
                prop_assert_eq!(bench.state(job), JobState::Pending, "{} of {:?} were enough", i, ends);
                bench.run_if_needed(*other);
                bench.end_at_once(*other);
            }
            prop_assert_eq!(bench.state(job), JobState::Starting, "{:?}", why);
        }
    }
}
