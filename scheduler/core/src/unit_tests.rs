//! Promises one by one.

use crate::*;
use firefly_types::{AttemptEpoch, JobId, Nanos, NodeId, Rank};
use std::time::Duration;

/// A core with nodes, driven event by event; every invariant is checked after each.
pub(crate) struct Bench {
    pub(crate) core: Core,
    pub(crate) now: Now,
}

impl Bench {
    fn new(slots: &[u32]) -> Self {
        Self::with(Policy::default(), slots)
    }

    pub(crate) fn with(policy: Policy, slots: &[u32]) -> Self {
        let core = Core::new(policy);
        let mut bench = Self { core, now: Now { mono: Nanos(1), unix_ms: 1 } };
        for (i, slots) in slots.iter().enumerate() {
            bench.hello(u32::try_from(i).unwrap() + 1, *slots, Vec::new());
        }
        bench
    }

    fn hello(&mut self, node: u32, slots: u32, inventory: Vec<RankReport>) -> Vec<Decision> {
        let info = NodeInfo { slots, cores: slots, ..NodeInfo::default() };
        self.join(node, info, inventory)
    }

    pub(crate) fn join(&mut self, node: u32, info: NodeInfo, inventory: Vec<RankReport>) -> Vec<Decision> {
        self.step(Event::Hello { node: NodeId(node), info, inventory })
    }

    pub(crate) fn step(&mut self, event: Event) -> Vec<Decision> {
        let decisions = self.core.step(event, self.now);
        self.core.check().unwrap();
        decisions
    }

    /// Time passes; `beat` nodes are heard.
    pub(crate) fn pass(&mut self, time: Duration, beat: &[u32]) -> Vec<Decision> {
        self.now.mono = self.now.mono.after(time);
        self.now.unix_ms += u64::try_from(time.as_millis()).unwrap();
        for node in beat {
            self.step(Event::Beat { node: NodeId(*node) });
        }
        self.step(Event::Tick)
    }

    fn submit(&mut self, nodes: u32, each: u32, priority: i32, max_restarts: u32) -> JobId {
        self.submit_spec(spec(nodes, each, priority, max_restarts))
    }

    pub(crate) fn submit_spec(&mut self, spec: JobSpec) -> JobId {
        match self.step(Event::Submit { spec, key: String::new() }).pop() {
            Some(Decision::Answer(Answer::Job(id))) => id,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn say(&mut self, job: JobId, rank: u32, state: Reported) -> Vec<Decision> {
        let attempt = self.core.job(job).unwrap().attempt().unwrap();
        let node = attempt.ranks[rank as usize].node;
        let key = RankKey { job, epoch: attempt.epoch, rank: Rank(rank) };
        self.step(Event::Rank { node, report: RankReport { key, state, pid: 7, master_port: 20_001 } })
    }

    pub(crate) fn state(&self, job: JobId) -> JobState {
        self.core.job(job).unwrap().state
    }

    pub(crate) fn run(&mut self, job: JobId) {
        for rank in 0..self.core.job(job).unwrap().spec.world_size() {
            self.say(job, rank, Reported::Prepared);
        }
        assert_eq!(self.state(job), JobState::Running);
    }
}

pub(crate) fn spec(nodes: u32, each: u32, priority: i32, max_restarts: u32) -> JobSpec {
    JobSpec {
        command: vec!["x".into()],
        nodes,
        ranks_per_node: each,
        priority,
        max_restarts,
        ..JobSpec::default()
    }
}

pub(crate) fn orders(decisions: &[Decision]) -> Vec<&Order> {
    decisions
        .iter()
        .filter_map(|d| match d {
            Decision::Order { order, .. } => Some(order),
            _ => None,
        })
        .collect()
}

pub(crate) fn exit(code: i32) -> Reported {
    Reported::Exited(Exit { code: Some(code), ..Exit::default() })
}

#[test]
fn the_barrier_opens_when_the_last_rank_is_held() {
    let mut b = Bench::new(&[2, 2]);
    let job = b.submit(2, 2, 0, 0);
    for rank in 0..3 {
        let d = b.say(job, rank, Reported::Prepared);
        assert!(orders(&d).is_empty(), "{d:?}");
    }
    let d = b.say(job, 3, Reported::Prepared);
    assert!(matches!(d[0], Decision::Persist(_)), "the intent comes first: {d:?}");
    let starts = orders(&d);
    assert_eq!(starts.len(), 4);
    assert!(starts.iter().all(|o| matches!(o, Order::Start { master: NodeId(1), master_port: 20_001, .. })));
    for rank in 0..4 {
        b.say(job, rank, Reported::Running);
        assert_eq!(b.state(job), JobState::Running);
        b.say(job, rank, exit(0));
    }
    assert_eq!(b.state(job), JobState::Succeeded);
}

#[test]
fn a_death_is_named_and_the_job_restarts_with_the_next_epoch() {
    let mut b = Bench::new(&[1, 1]);
    let job = b.submit(2, 1, 0, 1);
    b.run(job);
    let d = b.say(job, 1, Reported::Exited(Exit { signal: Some(9), ..Exit::default() }));
    assert!(matches!(orders(&d)[..], [Order::Stop { key: RankKey { rank: Rank(0), .. }, .. }]), "{d:?}");
    b.say(job, 0, exit(143));
    let j = b.core.job(job).unwrap();
    assert_eq!(j.attempts[0].end_reason, "rank 1 on n2 was ended by signal 9 (SIGKILL)");
    assert_eq!(j.state, JobState::Pending);
    b.pass(Duration::from_secs(2), &[1, 2]);
    assert_eq!(b.core.job(job).unwrap().epoch(), AttemptEpoch(2));
    b.run(job);
    b.say(job, 0, exit(3));
    b.say(job, 1, exit(0));
    let j = b.core.job(job).unwrap();
    assert_eq!((j.state, j.failures), (JobState::Failed, 1));
    assert_eq!(j.reason, "rank 0 on n1 exited with code 3 (all 1 restarts are used up)");
}

#[test]
fn a_lost_node_costs_no_restart_and_the_next_attempt_waits_for_proof() {
    let mut b = Bench::new(&[1, 1, 1]);
    let job = b.submit(2, 1, 0, 0);
    b.run(job);
    b.pass(Duration::from_secs(61), &[1, 3]);
    assert_eq!(b.core.job(job).unwrap().attempt().unwrap().cause, Some(EndCause::NodeLost));
    b.say(job, 0, exit(143));
    b.pass(Duration::from_secs(2), &[1, 3]);
    assert_eq!(b.state(job), JobState::Pending, "rank 1 may still run on n2");
    let why = b.core.why(job, b.now).join("\n");
    assert!(why.contains("rank 1 of attempt 1 may still run on n2"), "{why}");
    // The node comes back and knows nothing of it: that is the proof.
    b.hello(2, 1, Vec::new());
    assert_eq!(b.core.job(job).unwrap().epoch(), AttemptEpoch(2));
}

#[test]
fn the_orphan_lease_is_proof_too() {
    let mut b = Bench::new(&[1, 1, 1]);
    let job = b.submit(2, 1, 0, 0);
    b.run(job);
    b.pass(Duration::from_secs(61), &[1, 3]);
    b.say(job, 0, exit(143));
    b.pass(Duration::from_secs(560), &[1, 3]);
    assert_eq!(b.state(job), JobState::Pending);
    b.pass(Duration::from_secs(10), &[1, 3]);
    let j = b.core.job(job).unwrap();
    assert_eq!((j.epoch(), j.failures), (AttemptEpoch(2), 0));
}

#[test]
fn a_large_job_is_not_starved_by_small_ones_behind_it() {
    let mut b = Bench::new(&[2, 2]);
    let first = b.submit(1, 2, 0, 0);
    let large = b.submit(2, 2, 0, 0);
    let small = b.submit(1, 1, 0, 0);
    assert_eq!(
        [b.state(first), b.state(large), b.state(small)],
        [JobState::Starting, JobState::Pending, JobState::Pending]
    );
    let why = b.core.why(small, b.now).join("\n");
    assert!(why.contains(&format!("{large} (priority 0) is ahead of it")), "{why}");
    let why = b.core.why(large, b.now).join("\n");
    assert!(why.contains("n1: 0 of 2 slots free (taken by j1)"), "{why}");
    // Higher priority goes first.
    let urgent = b.submit(1, 1, 5, 0);
    assert_eq!(b.state(urgent), JobState::Starting);
}

#[test]
fn a_job_larger_than_the_cluster_waits_without_holding_back_others() {
    let mut b = Bench::new(&[2]);
    let huge = b.submit(3, 1, 9, 0);
    let small = b.submit(1, 1, 0, 0);
    assert_eq!([b.state(huge), b.state(small)], [JobState::Pending, JobState::Starting]);
    let why = b.core.why(huge, b.now).join("\n");
    assert!(why.contains("2 more with at least 1 slots are needed"), "{why}");
}

#[test]
fn a_crash_loop_slows_down() {
    let mut b = Bench::new(&[1]);
    let job = b.submit(1, 1, 0, 10);
    let mut delays = Vec::new();
    for _ in 0..6 {
        b.run(job);
        b.say(job, 0, exit(1));
        delays.push(b.core.job(job).unwrap().delay_ms);
        b.pass(Duration::from_millis(*delays.last().unwrap()), &[1]);
    }
    assert_eq!(delays, [1_000, 2_000, 4_000, 8_000, 16_000, 32_000]);
}

#[test]
fn a_restarted_scheduler_adopts_what_runs() {
    let mut b = Bench::new(&[1, 1]);
    let job = b.submit(2, 1, 0, 0);
    b.run(job);
    b.core = Core::restore(Policy::default(), b.core.records(), b.now);
    b.core.check().unwrap();
    let key = |rank| RankKey { job, epoch: AttemptEpoch(1), rank: Rank(rank) };
    let report = |rank, state| RankReport { key: key(rank), state, pid: 1, master_port: 0 };
    assert!(orders(&b.hello(1, 1, vec![report(0, Reported::Running)])).is_empty());
    // The start order to n2 was lost with the old scheduler.
    let d = b.hello(2, 1, vec![report(1, Reported::Prepared)]);
    assert!(matches!(orders(&d)[..], [Order::Start { .. }]), "{d:?}");
    b.say(job, 0, exit(0));
    b.say(job, 1, exit(0));
    assert_eq!(b.state(job), JobState::Succeeded);
}

#[test]
fn a_rank_of_an_older_attempt_is_ended_at_once() {
    let mut b = Bench::new(&[1]);
    let job = b.submit(1, 1, 0, 1);
    b.run(job);
    b.say(job, 0, exit(1));
    b.pass(Duration::from_secs(1), &[1]);
    let key = RankKey { job, epoch: AttemptEpoch(1), rank: Rank(0) };
    let stale = RankReport { key, state: Reported::Running, pid: 1, master_port: 0 };
    let d = b.step(Event::Rank { node: NodeId(1), report: stale });
    assert!(matches!(orders(&d)[..], [Order::Stop { grace: Duration::ZERO, .. }]), "{d:?}");
}

#[test]
fn one_key_is_one_job_and_nonsense_is_refused() {
    let mut b = Bench::new(&[]);
    let submit = |b: &mut Bench, key: &str, spec| b.step(Event::Submit { spec, key: key.into() }).pop();
    let first = submit(&mut b, "a", spec(1, 1, 0, 0));
    assert_eq!(submit(&mut b, "a", spec(1, 1, 0, 0)), first);
    assert_ne!(submit(&mut b, "b", spec(1, 1, 0, 0)), first);
    let named = |name: &str| JobSpec { name: name.into(), ..spec(1, 1, 0, 0) };
    let env = |key: &str| JobSpec { env: [(key.into(), "x".into())].into(), ..spec(1, 1, 0, 0) };
    for bad in [
        spec(0, 1, 0, 0),
        spec(1, 0, 0, 0),
        spec(u32::MAX, u32::MAX, 0, 0),
        JobSpec { command: vec![], ..spec(1, 1, 0, 0) },
        JobSpec { working_directory: "here".into(), ..spec(1, 1, 0, 0) },
        JobSpec { command: vec!["a\0b".into()], ..spec(1, 1, 0, 0) },
        named("j3"),
        named("12"),
        env("RANK"),
        env("A=B"),
        env(""),
    ] {
        let answer = submit(&mut b, "", bad.clone());
        assert!(matches!(answer, Some(Decision::Answer(Answer::Refused(Refusal::Invalid(_))))), "{bad:?}");
    }
    let d = b.step(Event::Stop { job: JobId(99), reason: String::new() }).pop();
    assert_eq!(d, Some(Decision::Answer(Answer::Refused(Refusal::NoJob(JobId(99))))));
}

#[test]
fn a_stop_ends_every_rank_and_wins_over_a_restart() {
    let mut b = Bench::new(&[1, 1]);
    let job = b.submit(2, 1, 0, 5);
    b.run(job);
    b.say(job, 1, exit(1));
    b.step(Event::Stop { job, reason: "enough".into() });
    assert_eq!(b.state(job), JobState::Stopping);
    b.say(job, 0, exit(143));
    assert_eq!(b.state(job), JobState::Stopped);
    assert_eq!(b.core.job(job).unwrap().reason, "enough");
}

#[test]
fn a_cordoned_node_keeps_its_ranks_and_gets_no_new_ones() {
    let mut b = Bench::new(&[2]);
    let job = b.submit(1, 1, 0, 0);
    b.step(Event::Cordon { node: NodeId(1), cordon: true, reason: "fan".into() });
    b.run(job);
    let second = b.submit(1, 1, 0, 0);
    assert_eq!(b.state(second), JobState::Pending);
    assert!(b.core.why(second, b.now).join("\n").contains("n1 is cordoned: fan"));
    b.step(Event::Cordon { node: NodeId(1), cordon: false, reason: String::new() });
    assert_eq!(b.state(second), JobState::Starting);
}
