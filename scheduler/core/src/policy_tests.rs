//! The policy's promises one by one.

use crate::unit_tests::{Bench, exit, orders, spec};
use crate::*;
use firefly_types::{AttemptEpoch, JobId, NodeId, Rank};
use std::collections::BTreeSet;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);

/// A bench whose nodes stay heard for ever: these tests are about policy, not silence.
fn quiet(policy: Policy) -> Policy {
    const FOREVER: u64 = 1 << 40;
    Policy { silent_after_ms: FOREVER, agent_lease_ms: FOREVER, ..policy }
}

/// `n` nodes that can suspend.
fn bench(n: u32, policy: Policy) -> Bench {
    bench_of(n, policy, |info, _| info.can_suspend = true)
}

fn bench_of(n: u32, policy: Policy, change: impl Fn(&mut NodeInfo, u32)) -> Bench {
    let mut bench = Bench::with(quiet(policy), &[]);
    for id in 1..=n {
        let mut info = NodeInfo { slots: 4, cores: 4, gpus: 4, ..NodeInfo::default() };
        change(&mut info, id);
        bench.join(id, info, Vec::new());
    }
    bench
}

/// A job on whole nodes that can be suspended.
fn gang(nodes: u32, user: &str, priority: i32) -> JobSpec {
    JobSpec { user: user.into(), exclusive: true, suspendable: true, ..spec(nodes, 1, priority, 0) }
}

fn firm(nodes: u32, user: &str, priority: i32) -> JobSpec {
    JobSpec { suspendable: false, ..gang(nodes, user, priority) }
}

impl Bench {
    fn end(&mut self, job: JobId, code: i32) -> Vec<Decision> {
        let ranks = self.core.job(job).unwrap().spec.world_size();
        (0..ranks).flat_map(|r| self.say(job, r, exit(code))).collect()
    }

    fn wait(&mut self, seconds: u64) -> Vec<Decision> {
        self.pass(Duration::from_secs(seconds), &[])
    }

    fn explain(&self, job: JobId) -> Explanation {
        self.core.explain(job, self.now).unwrap()
    }

    fn nodes_of(&self, job: JobId) -> Vec<u32> {
        self.core.job(job).unwrap().attempt().unwrap().seats.iter().map(|s| s.node.0).collect()
    }
}

/// Jobs that are asked to give way by these decisions.
fn asked(decisions: &[Decision]) -> BTreeSet<JobId> {
    let suspends = orders(decisions).into_iter().filter(|o| matches!(o, Order::Suspend { .. }));
    suspends.map(|o| o.key().job).collect()
}

fn refusal(bench: &mut Bench, spec: JobSpec) -> Refusal {
    match bench.step(Event::Submit { spec, key: String::new() }).pop() {
        Some(Decision::Answer(Answer::Refused(refusal))) => refusal,
        other => panic!("{other:?}"),
    }
}

fn quota(user: &str, nodes: u32) -> Quota {
    Quota { user: user.into(), nodes: Some(nodes), ..Quota::default() }
}

#[test]
fn beyond_its_quota_a_user_waits_unless_the_job_can_give_way() {
    let policy = Policy { quotas: vec![quota("a", 1)], ..Policy::default() };
    let mut b = bench(3, policy);
    let first = b.submit_spec(firm(1, "a", 0));
    let second = b.submit_spec(firm(1, "a", 0));
    assert_eq!([b.state(first), b.state(second)], [JobState::Starting, JobState::Pending]);
    let why = b.explain(second);
    assert_eq!(why.binding, Binding::Quota);
    assert_eq!(why.change, Change::Quota { user: "a".into(), jobs: [first].into() });
    // On idle nodes, giving way on demand.
    let borrower = b.submit_spec(gang(2, "a", 0));
    b.run(borrower);
    let attempt = b.core.job(borrower).unwrap().attempt().unwrap();
    assert_eq!(attempt.opportunistic, Some(Opportunistic::OverQuota));
    b.core.check_quotas().unwrap();
    // Who is entitled gets the nodes at once, whatever the priorities.
    let d = b.step(Event::Submit { spec: firm(1, "b", -5), key: String::new() });
    assert_eq!(asked(&d), [borrower].into());
    // The change that was named is true.
    b.run(first);
    b.end(first, 0);
    assert_eq!(b.state(second), JobState::Starting);
}

#[test]
fn what_fills_gives_way_when_the_head_fits_and_goes_on_later() {
    let mut b = bench(2, Policy::default());
    let running = b.submit_spec(firm(1, "a", 0));
    b.run(running);
    let head = b.submit_spec(firm(2, "b", 0));
    let filler = b.submit_spec(gang(1, "c", 0));
    let firm_one = b.submit_spec(firm(1, "d", 0));
    assert_eq!(b.state(head), JobState::Pending);
    assert_eq!(b.state(firm_one), JobState::Pending, "it could not give way");
    b.run(filler);
    assert_eq!(b.core.job(filler).unwrap().attempt().unwrap().opportunistic, Some(Opportunistic::Fill));
    assert_eq!(b.explain(firm_one).binding, Binding::NoRoom);
    let why = b.explain(head);
    assert_eq!(
        why.change,
        Change::Free { jobs: [running, filler].into(), nodes: [NodeId(1), NodeId(2)].into() }
    );
    b.wait(10);
    let d = b.end(running, 0);
    assert_eq!(asked(&d), [filler].into());
    assert_eq!(b.state(filler), JobState::Suspending);
    b.say(filler, 0, Reported::Saved(7));
    b.now.mono = b.now.mono.after(SECOND);
    b.say(filler, 0, exit(0));
    let j = b.core.job(filler).unwrap();
    assert_eq!(j.attempts[0].cause, Some(EndCause::Suspended));
    assert_eq!((j.state, j.suspensions, j.saved_step, j.failures), (JobState::Pending, 1, 7, 0));
    assert_eq!(b.state(head), JobState::Starting);
    b.run(head);
    b.end(head, 0);
    assert_eq!(b.core.job(filler).unwrap().epoch(), AttemptEpoch(2), "it goes on where there is room");
    b.wait(1);
    b.run(filler);
    assert!(b.core.job(filler).unwrap().suspend_cost_ms >= 1_000, "the cost was measured");
}

#[test]
fn where_agents_cannot_suspend_nothing_fills_and_nobody_is_asked() {
    let mut b = bench_of(2, Policy::default(), |_, _| {});
    let running = b.submit_spec(gang(1, "a", 0));
    b.run(running);
    let head = b.submit_spec(gang(2, "b", 9));
    let filler = b.submit_spec(gang(1, "c", 0));
    assert_eq!([b.state(head), b.state(filler)], [JobState::Pending, JobState::Pending]);
    let d = b.wait(100_000);
    assert!(asked(&d).is_empty());
    let refused = b.step(Event::Suspend { job: running, reason: String::new() }).pop();
    assert!(matches!(refused, Some(Decision::Answer(Answer::Refused(Refusal::NotNow(_))))), "{refused:?}");
}

#[test]
fn nobody_is_displaced_in_vain_or_before_the_quantum() {
    let mut b = bench(2, Policy::default());
    let (low, stays) = (b.submit_spec(gang(1, "a", 0)), b.submit_spec(firm(1, "b", 0)));
    b.run(low);
    b.run(stays);
    b.wait(3_600);
    let d = b.step(Event::Submit { spec: firm(2, "c", 5), key: String::new() });
    assert!(asked(&d).is_empty(), "it would not fit: {stays} stays");
    let d = b.end(stays, 0);
    assert_eq!(asked(&d), [low].into(), "now it fits");
    // A fresh one: not before its quantum, which is 30 times the assumed cost of a minute.
    let mut b = bench(1, Policy::default());
    let low = b.submit_spec(gang(1, "a", 0));
    b.run(low);
    b.submit_spec(firm(1, "c", 5));
    assert!(asked(&[b.wait(899), b.wait(900)].concat()).is_empty());
    let d = b.wait(1);
    assert_eq!(asked(&d), [low].into());
}

#[test]
fn the_quantum_grows_with_the_measured_cost() {
    let mut b = bench(1, Policy { suspend_cost_ms: 1_000, ..Policy::default() });
    let low = b.submit_spec(gang(1, "a", 0));
    b.run(low);
    for (cost, quantum) in [(1_000, 900), (60_000, 1_800), (600_000, 18_000)] {
        b.core.jobs.get_mut(&low).unwrap().suspend_cost_ms = cost;
        assert_eq!(b.core.quantum(b.core.job(low).unwrap()).as_secs(), quantum);
    }
}

#[test]
fn the_victim_is_the_one_that_loses_least() {
    let mut b = bench(3, Policy::default());
    let jobs: Vec<JobId> = (0..3).map(|_| b.submit_spec(gang(1, "a", 0))).collect();
    for job in &jobs {
        b.run(*job);
    }
    b.wait(3_600);
    let epoch = AttemptEpoch(1);
    b.step(Event::Progress { job: jobs[1], epoch, step: 5, saved: true });
    b.wait(60);
    b.step(Event::Progress { job: jobs[2], epoch, step: 5, saved: false });
    let d = b.step(Event::Submit { spec: firm(1, "c", 5), key: String::new() });
    assert_eq!(asked(&d), [jobs[1]].into(), "only it has saved");
}

#[test]
fn a_large_job_of_low_priority_starts_within_the_bound() {
    let policy = Policy { overdue_after_ms: 3_600_000, ..Policy::default() };
    let mut b = bench(4, policy);
    let large = gang(4, "low", -9);
    let mut running: Vec<JobId> = (0..4).map(|i| b.submit_spec(gang(1, &format!("u{i}"), 9))).collect();
    let large = b.submit_spec(large);
    let mut waited = 0;
    // More work of high priority than fits, all the time.
    while b.state(large) == JobState::Pending && waited < 100_000 {
        while b.core.queued() < 3 {
            running.push(b.submit_spec(gang(1, "busy", 9)));
        }
        for job in running.clone() {
            match b.state(job) {
                JobState::Starting if b.core.job(job).unwrap().attempt().unwrap().cause.is_none() => {
                    b.run(job)
                }
                JobState::Starting => drop(b.end(job, 143)),
                JobState::Suspending => drop(b.end(job, 85)),
                JobState::Running if waited % 600 == 0 => drop(b.end(job, 0)),
                _ => {}
            }
        }
        running.retain(|j| b.core.job(*j).is_some_and(|j| !j.state.is_final()));
        b.wait(60);
        waited += 60;
    }
    let bound = 3_600 + 1_800 + 60;
    assert_eq!(b.state(large), JobState::Starting);
    assert!((3_600..=bound + 60).contains(&waited), "{waited} s");
}

#[test]
fn equals_take_turns_by_time_slice() {
    let mut b = bench(1, Policy::default());
    let first = b.submit_spec(gang(1, "a", 0));
    b.run(first);
    b.submit_spec(gang(1, "a", 0));
    b.submit_spec(gang(1, "b", 0));
    assert!(asked(&b.wait(4 * 3_600 - 1)).is_empty());
    assert_eq!(asked(&b.wait(1)), [first].into(), "for the other user, who has had nothing");
    let why = b.core.why(first, b.now).join(" ");
    assert!(why.contains("giving way: j3"), "{why}");
}

#[test]
fn fair_share_alternates_between_users_within_one_pass() {
    let mut b = bench(0, Policy::default());
    let jobs: Vec<JobId> =
        ["a", "a", "a", "b", "b"].into_iter().map(|u| b.submit_spec(gang(1, u, 0))).collect();
    let info = NodeInfo { slots: 4, cores: 4, ..NodeInfo::default() };
    for id in 1..=4 {
        b.join(id, info.clone(), Vec::new());
    }
    let started: Vec<bool> = jobs.iter().map(|j| b.state(*j) == JobState::Starting).collect();
    assert_eq!(started, [true, true, false, true, true]);
}

#[test]
fn a_site_orders_its_rules() {
    let started_first = |order: Vec<OrderBy>| {
        let mut b = bench(2, Policy { order, ..Policy::default() });
        // All become ready in one moment, with all nodes free.
        let before = b.submit_spec(firm(2, "z", 0));
        b.run(before);
        let after = vec![Dependency { job: before, after: After::End }];
        let specs = [
            JobSpec { hint_ms: 9, ..gang(2, "a", 0) },
            JobSpec { hint_ms: 5, ..gang(1, "a", 0) },
            JobSpec { hint_ms: 7, user_rank: -1, ..gang(2, "a", 1) },
        ];
        let jobs = specs.map(|s| b.submit_spec(JobSpec { after: after.clone(), ..s }));
        b.end(before, 0);
        jobs.into_iter().position(|j| b.state(j) == JobState::Starting).unwrap()
    };
    assert_eq!(started_first(vec![OrderBy::Age]), 0);
    assert_eq!(started_first(vec![OrderBy::Smallest, OrderBy::Age]), 1);
    assert_eq!(started_first(vec![OrderBy::Shortest]), 1);
    assert_eq!(started_first(vec![OrderBy::Priority, OrderBy::Age]), 2);
    assert_eq!(started_first(vec![OrderBy::UserRank, OrderBy::Smallest]), 2);
}

#[test]
fn a_job_is_demoted_after_its_time() {
    let demotions = vec![Demotion { from: 20, to: 10, after_ms: 1_800_000 }];
    let mut b = bench(1, Policy { demotions, ..Policy::default() });
    let job = b.submit_spec(gang(1, "a", 20));
    b.run(job);
    b.wait(1_799);
    assert_eq!(b.core.job(job).unwrap().priority, 20);
    b.wait(1);
    assert_eq!(b.core.job(job).unwrap().priority, 10);
}

#[test]
fn standbys_are_for_those_that_a_fault_has_ended() {
    let groups = [(String::new(), GroupPolicy { nodes: 3, standbys: 1 })].into();
    let mut b = bench(3, Policy { groups, ..Policy::default() });
    let one = b.submit_spec(firm(1, "a", 0));
    let two = b.submit_spec(firm(1, "a", 0));
    let three = b.submit_spec(firm(1, "a", 0));
    assert_eq!(b.state(three), JobState::Pending);
    assert_eq!(b.explain(three).binding, Binding::Standbys);
    b.run(one);
    b.run(two);
    let node = NodeId(b.nodes_of(one)[0]);
    let evidence = "Xid 79".to_owned();
    b.step(Event::Health { node, fault: Fault::Gpu, critical: true, evidence });
    b.say(one, 0, exit(143));
    let j = b.core.job(one).unwrap();
    assert_eq!(j.attempts[0].cause, Some(EndCause::GpuFault));
    assert!(b.core.node(node).unwrap().record.cordon.as_deref().unwrap().contains("Xid 79"));
    b.wait(2);
    assert_eq!(b.state(one), JobState::Starting, "on the standby");
    assert_ne!(b.nodes_of(one)[0], node.0);
    assert_eq!(b.state(three), JobState::Pending);
}

#[test]
fn a_node_that_harms_several_jobs_is_set_aside_and_alarms_are_capped() {
    let policy = Policy { auto_cordon_percent: 20, auto_cordon_leaf_percent: 50, ..Policy::default() };
    let mut b = bench(10, policy);
    let jobs: Vec<JobId> = (0..10).map(|_| b.submit_spec(firm(1, "a", 0))).collect();
    for job in &jobs {
        b.run(*job);
    }
    let fault = |b: &mut Bench, node: u32, critical| {
        let evidence = "flap".to_owned();
        b.step(Event::Health { node: NodeId(node), fault: Fault::Network, critical, evidence });
    };
    let cordoned = |b: &Bench| b.core.nodes().filter(|n| n.record.cordon.is_some()).count();
    // The same job again and again is one strike.
    for _ in 0..5 {
        fault(&mut b, 1, false);
    }
    assert_eq!(cordoned(&b), 0);
    for node in 1..=10 {
        fault(&mut b, node, true);
    }
    assert_eq!(cordoned(&b), 2, "a fifth of ten");
    assert!(jobs.iter().all(|j| b.core.job(*j).unwrap().attempt().unwrap().cause.is_some()));
}

#[test]
fn loops_are_broken() {
    let mut b = bench(1, Policy::default());
    let spec = JobSpec { max_restarts: 99, ..gang(1, "a", 0) };
    let job = b.submit_spec(spec);
    for step in 1..=3 {
        b.run(job);
        let epoch = b.core.job(job).unwrap().epoch();
        b.step(Event::Progress { job, epoch, step, saved: false });
        b.say(job, 0, exit(1));
        b.wait(300);
    }
    let j = b.core.job(job).unwrap();
    assert_eq!(j.state, JobState::Held);
    assert!(j.reason.contains("3 attempts in a row ended without a new saved step"), "{}", j.reason);
    assert_eq!(b.explain(job).change, Change::Resume);
    b.step(Event::Resume { job });
    assert_eq!(b.state(job), JobState::Starting);
    // It has crashed three times in a row: it displaces nobody.
    b.run(job);
    b.say(job, 0, exit(1));
    let low = b.submit_spec(gang(1, "b", -1));
    b.run(low);
    b.step(Event::SetPriority { job, priority: 9 });
    let d = b.wait(100_000);
    assert!(asked(&d).is_empty());
}

#[test]
fn arrays_dependencies_and_limits() {
    let mut b = bench(4, Policy::default());
    let array = JobSpec { array: 3, array_parallel: 2, ..firm(1, "a", 0) };
    let first = b.submit_spec(array);
    let jobs = [first, JobId(first.0 + 1), JobId(first.0 + 2)];
    assert_eq!(jobs.map(|j| b.state(j)), [JobState::Starting, JobState::Starting, JobState::Pending]);
    assert_eq!(b.explain(jobs[2]).binding, Binding::Array);
    let after = |job, after| vec![Dependency { job, after }];
    let good = b.submit_spec(JobSpec { after: after(jobs[0], After::Success), ..firm(1, "a", 0) });
    let bad = b.submit_spec(JobSpec { after: after(jobs[1], After::Success), ..firm(1, "a", 0) });
    let chained = b.submit_spec(JobSpec { after: after(bad, After::Success), ..firm(1, "a", 0) });
    let any = b.submit_spec(JobSpec { after: after(bad, After::End), ..firm(1, "a", 0) });
    assert_eq!(b.explain(good).binding, Binding::Dependency(jobs[0]));
    b.run(jobs[0]);
    b.run(jobs[1]);
    b.end(jobs[0], 0);
    assert_eq!([b.state(good), b.state(jobs[2])], [JobState::Starting, JobState::Starting]);
    b.end(jobs[1], 1);
    assert_eq!([b.state(bad), b.state(chained)], [JobState::Failed, JobState::Failed]);
    assert_eq!(b.state(any), JobState::Starting);
    assert!(matches!(
        refusal(&mut b, JobSpec { after: after(bad, After::Success), ..firm(1, "a", 0) }),
        Refusal::NotNow(_)
    ));
    let limited = b.submit_spec(JobSpec { time_limit_ms: 60_000, ..firm(1, "a", 0) });
    b.run(limited);
    b.wait(59);
    assert_eq!(b.state(limited), JobState::Running);
    b.wait(1);
    b.say(limited, 0, exit(143));
    let j = b.core.job(limited).unwrap();
    assert_eq!((j.state, j.attempts[0].cause), (JobState::Failed, Some(EndCause::TimeLimit)));
}

#[test]
fn a_hang_is_ended() {
    let mut b = bench(1, Policy::default());
    let job = b.submit_spec(JobSpec { progress_timeout_ms: 60_000, ..firm(1, "a", 0) });
    b.run(job);
    b.wait(59);
    b.step(Event::Progress { job, epoch: AttemptEpoch(1), step: 1, saved: false });
    b.wait(59);
    assert_eq!(b.core.job(job).unwrap().attempt().unwrap().cause, None);
    b.wait(1);
    assert_eq!(b.core.job(job).unwrap().attempt().unwrap().cause, Some(EndCause::Hang));
}

#[test]
fn maintenance_comes_on_time() {
    let mut b = bench_of(2, Policy::default(), |info, id| info.can_suspend = id == 1);
    // The kinds differ, and the one that cannot suspend is taken first.
    let (two, one) = (b.submit_spec(gang(1, "a", 0)), b.submit_spec(gang(1, "a", 0)));
    assert_eq!([b.nodes_of(one), b.nodes_of(two)], [[1], [2]]);
    b.run(one);
    b.run(two);
    let from = b.now.unix_ms + 3_600_000;
    let window = Maintenance {
        id: 1,
        nodes: [NodeId(1), NodeId(2)].into(),
        from_unix_ms: from,
        until_unix_ms: from + 3_600_000,
        reason: "fans".into(),
    };
    b.step(Event::Maintain(window));
    b.end(two, 0);
    // One node cannot suspend: only what is over in time starts there.
    let long = b.submit_spec(gang(1, "a", 0));
    assert_eq!(b.explain(long).binding, Binding::NoRoom, "{:?}", b.explain(long));
    let short = b.submit_spec(JobSpec { time_limit_ms: 600_000, ..gang(1, "b", 0) });
    assert_eq!(b.state(short), JobState::Starting);
    b.run(short);
    b.end(short, 0);
    let d = b.wait(3_600);
    assert_eq!(asked(&d), [one].into());
    b.say(one, 0, exit(85));
    assert_eq!([b.state(one), b.state(long)], [JobState::Pending, JobState::Pending]);
    b.wait(3_600);
    assert_eq!([b.state(one), b.state(long)], [JobState::Starting, JobState::Starting]);
}

#[test]
fn one_job_at_a_time_spans_zones_and_only_if_it_must() {
    let zone = |info: &mut NodeInfo, id: u32| info.place.zone = format!("z{}", id.div_ceil(2));
    let mut b = bench_of(6, Policy::default(), zone);
    let spans = b.submit_spec(firm(3, "a", 0));
    let next = b.submit_spec(firm(3, "b", 0));
    assert_eq!([b.state(spans), b.state(next)], [JobState::Starting, JobState::Pending]);
    let why = b.explain(next);
    assert_eq!((why.binding, why.change), (Binding::CrossZone, Change::OneOf([spans].into())));
    let stays = b.submit_spec(JobSpec { one_zone: true, ..firm(3, "c", 0) });
    assert_eq!(b.explain(stays).change, Change::MoreNodes(1));
    // It would fit across, but a zone could hold it: it waits for one.
    let fits = b.submit_spec(firm(2, "d", 0));
    assert_eq!(b.state(fits), JobState::Starting);
    let more = b.submit_spec(firm(2, "e", 0));
    assert_eq!(b.explain(more).binding, Binding::NoRoom);
    b.run(spans);
    b.end(spans, 0);
    assert_eq!(b.state(more), JobState::Starting, "before {next}: {:?}", b.explain(next));
}

#[test]
fn accelerators_of_a_shared_node_are_given_once() {
    let mut b = bench(1, Policy::default());
    let share = |gpus| JobSpec { gpus_per_node: gpus, ..spec(1, 1, 0, 0) };
    let jobs = [b.submit_spec(share(1)), b.submit_spec(share(2)), b.submit_spec(share(2))];
    let set = |b: &Bench, j: JobId| b.core.job(j).unwrap().attempt().unwrap().seats[0].gpus;
    assert_eq!([set(&b, jobs[0]), set(&b, jobs[1])], [0b0001, 0b0110]);
    assert_eq!(b.state(jobs[2]), JobState::Pending);
    b.run(jobs[0]);
    b.end(jobs[0], 0);
    assert_eq!(set(&b, jobs[2]), 0b1001);
}

#[test]
fn impossible_requests_are_refused_with_the_reason() {
    let groups = [("a100".to_owned(), GroupPolicy { nodes: 4, standbys: 0 })].into();
    let policy = Policy { groups, quotas: vec![quota("a", 2)], borrow: false, ..Policy::default() };
    let mut b = bench(1, policy);
    let of = |spec: JobSpec| JobSpec { group: "a100".into(), ..spec };
    let said = |b: &mut Bench, spec| refusal(b, spec).to_string();
    assert!(said(&mut b, JobSpec { group: "h100".into(), ..firm(1, "b", 0) }).contains("there are a100"));
    assert!(said(&mut b, of(firm(5, "b", 0))).contains("has 4 nodes when all of it is there"));
    assert!(said(&mut b, of(firm(3, "a", 0))).contains("is 2 nodes, and this site does not lend"));
    let contradictions = [
        JobSpec { time_limit_ms: 10, progress_timeout_ms: 20, ..firm(1, "b", 0) },
        JobSpec { suspend_grace_ms: 5, ..firm(1, "b", 0) },
        JobSpec { array: 2, array_parallel: 3, ..firm(1, "b", 0) },
        JobSpec { gpus_per_node: 65, ..firm(1, "b", 0) },
        JobSpec { group: "*".into(), ..firm(1, "b", 0) },
    ];
    for spec in contradictions {
        assert!(matches!(refusal(&mut b, spec.clone()), Refusal::Invalid(_)), "{spec:?}");
    }
    for policy in [
        Policy { order: vec![OrderBy::Age, OrderBy::Age], ..Policy::default() },
        Policy { half_life_ms: 0, ..Policy::default() },
        Policy { demotions: vec![Demotion { from: 1, to: 1, after_ms: 0 }], ..Policy::default() },
    ] {
        let answer = b.step(Event::Configure(Box::new(policy.clone()))).pop();
        assert!(matches!(answer, Some(Decision::Answer(Answer::Refused(_)))), "{policy:?}");
    }
}

#[test]
fn a_clock_that_is_set_back_changes_nothing_but_times() {
    let run = |back: u64| {
        let mut b = bench(1, Policy::default());
        let job = b.submit_spec(firm(1, "a", 0));
        b.run(job);
        b.now.unix_ms = b.now.unix_ms.saturating_sub(back);
        b.wait(10);
        let d = b.end(job, 0);
        (orders(&d).into_iter().cloned().collect::<Vec<_>>(), b.state(job), b.core.used("a").node_ms)
    };
    let (plain, set_back) = (run(0), run(1 << 40));
    assert_eq!((&plain.0, plain.1), (&set_back.0, set_back.1));
    assert_eq!(plain.2, 10_000);
    assert!(set_back.2 <= 10_000);
}

#[test]
fn a_recorded_day_replays_to_the_same_decisions_and_another_policy_differs() {
    let start = |b: &Bench| Start {
        version: LOG_VERSION,
        now: b.now,
        policy: b.core.policy().clone(),
        records: b.core.records(),
    };
    let mut b = bench(0, Policy::default());
    let start = start(&b);
    let mut entries: Vec<Entry> = Vec::new();
    let mut step = |b: &mut Bench, event: Event| {
        let decisions = b.step(event.clone());
        entries.push(Entry { now: b.now, event, decisions });
    };
    for id in 1..=2 {
        let info = NodeInfo { slots: 4, cores: 4, can_suspend: true, ..NodeInfo::default() };
        step(&mut b, Event::Hello { node: NodeId(id), info, inventory: Vec::new() });
    }
    for spec in [firm(1, "a", 0), firm(2, "b", 0), gang(1, "c", 0)] {
        step(&mut b, Event::Submit { spec, key: String::new() });
        b.now.mono = b.now.mono.after(SECOND);
    }
    let key = RankKey { job: JobId(1), epoch: AttemptEpoch(1), rank: Rank(0) };
    for state in [Reported::Prepared, Reported::Running, exit(0)] {
        let report = RankReport { key, state, pid: 1, master_port: 20_000 };
        step(&mut b, Event::Rank { node: NodeId(1), report });
    }
    let differences = |policy: Option<Policy>| {
        let mut replay = Replay::new(start.clone(), policy);
        let found: Vec<Difference> = entries.iter().filter_map(|e| replay.step(e)).collect();
        (found, replay)
    };
    let (same, replay) = differences(None);
    assert_eq!(same, []);
    assert_eq!(replay.then, replay.now);
    let strict = Policy { backfill: Backfill::Unreserved, ..start.policy.clone() };
    let (found, replay) = differences(Some(strict));
    assert_eq!(found[0].entry, 4, "the filling job does not start");
    assert!(
        found[0].missing.iter().any(|d| matches!(d, Decision::Order { order: Order::Prepare { .. }, .. }))
    );
    // Then the filling job had to give way; now the head starts at once.
    assert_eq!((replay.then.starts, replay.now.starts), (2, 2));
    assert_eq!((replay.then.suspensions, replay.now.suspensions), (0, 0));
}
