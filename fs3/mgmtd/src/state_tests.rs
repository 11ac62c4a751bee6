//! The manager's rules one by one, without a clock.

use crate::event::{Decisions, Event, Heartbeat, Reply, Role, TargetStatus};
use crate::state::ManagerState;
use crate::{MgmtdSettings, bootstrap};
use firefly_types::{
    AttemptEpoch, ChainId, ChainVersion, ClientId, ErrorKind, Incarnation, JobId, Nanos, NodeId,
    RoutingVersion, SessionEpoch, TargetId,
};
use fs3_core::chain::{LocalState, PublicState};
use std::time::Duration;

pub(crate) struct Bench {
    pub(crate) state: ManagerState,
    pub(crate) settings: MgmtdSettings,
    pub(crate) now: Nanos,
}

impl Bench {
    /// Three storage nodes, six chains of two.
    pub(crate) fn new() -> Self {
        let settings = MgmtdSettings::new(vec![NodeId(3), NodeId(4), NodeId(5)]);
        let tables = bootstrap::first_tables(&settings).unwrap();
        let now = Nanos(1);
        Self { state: ManagerState::new(settings.clone(), tables, now), settings, now }
    }

    /// All nodes have come and all chains serve.
    pub(crate) fn running() -> Self {
        let mut bench = Self::new();
        for node in [3, 4, 5] {
            bench.beat(node, 1);
        }
        for id in bench.state.tables().chains.keys() {
            assert_eq!(bench.states(id.0), [PublicState::Serving; 2]);
        }
        bench
    }

    pub(crate) fn step(&mut self, event: Event) -> Decisions {
        self.state.step(event, self.now)
    }

    /// Lets time pass in ticks, while `beating` nodes go on.
    pub(crate) fn run(&mut self, ms: u64, beating: &[(u32, u64)]) {
        for passed in (0..ms).step_by(100) {
            self.now = self.now.after(Duration::from_millis(100));
            if passed % 500 == 0 {
                for &(node, incarnation) in beating {
                    self.beat(node, incarnation);
                }
            }
            self.step(Event::Tick);
        }
    }

    pub(crate) fn heartbeat(&self, node: u32, incarnation: u64) -> Heartbeat {
        // What has been asked to stop serving does, and a grave is cleared.
        let retires = |t: &TargetId| {
            self.state.chains.values().filter_map(|e| e.moving).any(|m| m.retiring && m.from == *t)
        };
        let own = self.state.owners.iter().filter(|(_, (owner, _))| owner.0 == node);
        Heartbeat {
            node: NodeId(node),
            role: Role::Storage,
            incarnation: Incarnation(incarnation),
            address: format!("127.0.0.1:{node}"),
            targets: own
                .map(|(t, _)| {
                    let local = if retires(t) { LocalState::Offline } else { LocalState::Online };
                    (*t, status(local, 0))
                })
                .collect(),
            routing_version: self.state.routing_version(),
        }
    }

    /// The lease that the beat gets.
    pub(crate) fn beat(&mut self, node: u32, incarnation: u64) -> Duration {
        let beat = self.heartbeat(node, incarnation);
        match self.step(Event::Heartbeat(beat)).reply.unwrap() {
            Reply::Lease { lease, .. } => lease,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn refusal(&mut self, event: Event) -> ErrorKind {
        let before = self.state.tables();
        let decisions = self.step(event);
        assert_eq!(self.state.tables(), before, "a refused request left a trace");
        decisions.reply.unwrap_err().kind
    }

    pub(crate) fn states(&self, chain: u32) -> Vec<PublicState> {
        self.state.chain(ChainId(chain)).unwrap().members.iter().map(|m| m.state).collect()
    }

    pub(crate) fn open(
        &mut self,
        client: Option<u64>,
        job: Option<(u64, u32)>,
    ) -> Result<(ClientId, SessionEpoch), ErrorKind> {
        let event = Event::OpenSession {
            client: client.map(ClientId),
            description: "test".into(),
            job: job.map(|(j, a)| (JobId(j), AttemptEpoch(a))),
        };
        match self.step(event).reply {
            Ok(Reply::Session { client, epoch }) => Ok((client, epoch)),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.kind),
        }
    }

    fn renew(&mut self, client: ClientId, epoch: SessionEpoch) -> Result<Reply, ErrorKind> {
        self.step(Event::RenewSession { client, epoch }).reply.map_err(|e| e.kind)
    }
}

pub(crate) fn status(local: LocalState, synced_at: u64) -> TargetStatus {
    TargetStatus {
        local,
        synced_at: ChainVersion(synced_at),
        used_bytes: 0,
        capacity_bytes: 0,
        reason: String::new(),
        is_volatile: false,
        scrub: Default::default(),
    }
}

const LEASE: Duration = Duration::from_secs(2);

#[test]
fn new_chains_wait_for_all_of_their_servers_and_start_in_the_preferred_order() {
    let mut bench = Bench::new();
    bench.beat(4, 1);
    bench.beat(3, 1);
    // Chain 1 lies on n3 and n4, chain 2 on n4 and n5.
    assert_eq!(bench.states(1), [PublicState::Serving; 2]);
    assert_eq!(bench.states(2), [PublicState::LastSrv; 2]);
    let head = bench.state.chain(ChainId(1)).unwrap().members[0].target;
    assert_eq!(bench.state.owners[&head].0, NodeId(3));
    // The third never comes: after the bootstrap wait the others start without it.
    bench.run(16_000, &[(3, 1), (4, 1)]);
    assert_eq!(bench.states(2), [PublicState::Serving, PublicState::Offline]);
    bench.beat(5, 1);
    assert_eq!(bench.states(2), [PublicState::Serving, PublicState::Syncing]);
}

#[test]
fn a_silent_server_is_replaced_after_its_lease_and_before_five_seconds() {
    let mut bench = Bench::running();
    bench.run(2400, &[(3, 1), (4, 1)]);
    assert_eq!(bench.states(2), [PublicState::Serving; 2], "its lease may still run");
    bench.run(400, &[(3, 1), (4, 1)]);
    assert_eq!(bench.states(2), [PublicState::Serving, PublicState::Offline]);
    assert_eq!(bench.states(3), [PublicState::Serving, PublicState::Offline]);
    assert_eq!(bench.states(1), [PublicState::Serving; 2]);
}

#[test]
fn a_server_that_returns_gets_a_lease_only_once_it_acts_on_the_table_without_it() {
    let mut bench = Bench::running();
    let before = bench.state.routing_version();
    bench.run(3000, &[(3, 1), (4, 1)]);
    let mut late = bench.heartbeat(5, 1);
    late.routing_version = before;
    let reply = bench.step(Event::Heartbeat(late)).reply.unwrap();
    assert!(matches!(reply, Reply::Lease { lease: Duration::ZERO, .. }), "{reply:?}");
    assert_eq!(bench.states(2), [PublicState::Serving, PublicState::Syncing]);
    assert_eq!(bench.beat(5, 1), LEASE);
}

#[test]
fn filling_ends_only_with_a_report_for_this_chain_version() {
    let mut bench = Bench::running();
    bench.run(3000, &[(3, 1), (4, 1)]);
    bench.beat(5, 1);
    let chain = bench.state.chain(ChainId(2)).unwrap().clone();
    let target = chain.in_state(PublicState::Syncing).next().unwrap();
    let report = |bench: &mut Bench, version: u64| {
        let mut beat = bench.heartbeat(5, 1);
        beat.targets.insert(target, status(LocalState::UpToDate, version));
        bench.step(Event::Heartbeat(beat)).reply.unwrap();
    };
    report(&mut bench, chain.version.0 - 1);
    assert_eq!(bench.states(2), [PublicState::Serving, PublicState::Syncing]);
    report(&mut bench, chain.version.0);
    assert_eq!(bench.states(2), [PublicState::Serving; 2]);
}

#[test]
fn a_new_start_replaces_the_old_at_once_and_the_old_is_refused_for_good() {
    let mut bench = Bench::running();
    // The new process has read nothing yet, so it gets no lease before it has.
    let mut first = bench.heartbeat(5, 2);
    first.targets.clear();
    first.routing_version = RoutingVersion(0);
    let reply = bench.step(Event::Heartbeat(first)).reply.unwrap();
    assert!(matches!(reply, Reply::Lease { lease: Duration::ZERO, .. }), "{reply:?}");
    assert_eq!(bench.states(2), [PublicState::Serving, PublicState::Offline]);
    assert_eq!(bench.beat(5, 2), LEASE);
    assert_eq!(bench.states(2), [PublicState::Serving, PublicState::Syncing]);
    let late = bench.heartbeat(5, 1);
    assert_eq!(bench.refusal(Event::Heartbeat(late)), ErrorKind::Stale);
}

#[test]
fn after_a_total_outage_any_complete_replica_brings_the_chain_back_with_its_data() {
    let mut bench = Bench::running();
    bench.run(3000, &[]);
    assert_eq!(bench.states(1), [PublicState::LastSrv; 2]);
    // Not the head, but the other one comes back, as a new process. It waits for its like, but not
    // for long.
    bench.beat(4, 2);
    assert_eq!(bench.states(1), [PublicState::LastSrv; 2]);
    bench.run(1800, &[(4, 2)]);
    assert_eq!(bench.states(1), [PublicState::Serving, PublicState::Offline]);
    let serving = bench.state.chain(ChainId(1)).unwrap().members[0].target;
    assert_eq!(bench.state.owners[&serving].0, NodeId(4));
    bench.beat(3, 2);
    assert_eq!(bench.states(1), [PublicState::Serving, PublicState::Syncing]);
}

#[test]
fn a_target_that_reports_a_broken_disk_leaves_at_once() {
    let mut bench = Bench::running();
    let mut beat = bench.heartbeat(3, 1);
    let target = *beat.targets.keys().next().unwrap();
    let chain = bench.state.owners[&target].1;
    beat.targets.insert(target, status(LocalState::Offline, 0));
    bench.step(Event::Heartbeat(beat)).reply.unwrap();
    assert_eq!(bench.states(chain.0), [PublicState::Serving, PublicState::Offline]);
}

#[test]
fn a_late_heartbeat_without_targets_throws_nobody_out() {
    let mut bench = Bench::running();
    let early = Heartbeat { targets: Default::default(), ..bench.heartbeat(3, 1) };
    bench.step(Event::Heartbeat(early)).reply.unwrap();
    assert_eq!(bench.states(1), [PublicState::Serving; 2]);
}

#[test]
fn a_restarted_manager_renews_at_once_and_changes_nothing_before_it_has_settled() {
    let mut bench = Bench::running();
    let tables = bench.state.tables();
    bench.now = bench.now.after(Duration::from_secs(1));
    bench.state = ManagerState::new(bench.settings.clone(), tables.clone(), bench.now);
    assert_eq!(bench.beat(3, 1), LEASE, "renewed at once");
    assert_eq!(bench.beat(4, 9), Duration::ZERO, "a new start has to wait");
    bench.run(2800, &[(3, 1), (4, 9)]);
    assert_eq!(bench.state.tables().chains, tables.chains);
    bench.run(400, &[(3, 1), (4, 9)]);
    assert_eq!(bench.states(1), [PublicState::Serving, PublicState::Syncing], "n4 has started anew");
    // n5 has never come. It was in the last serving set as n4 was: n4 waits a while, then goes on
    // alone.
    assert_eq!(bench.states(2), [PublicState::LastSrv; 2]);
    bench.run(1500, &[(3, 1), (4, 9)]);
    assert_eq!(bench.states(2), [PublicState::Serving, PublicState::Offline]);
    assert_eq!(bench.states(3), [PublicState::Serving, PublicState::Offline]);
}

#[test]
fn after_everything_was_restarted_every_chain_serves_again_by_itself() {
    let mut bench = Bench::running();
    let tables = bench.state.tables();
    bench.state = ManagerState::new(bench.settings.clone(), tables, bench.now);
    bench.run(3200, &[(3, 2), (4, 2), (5, 2)]);
    for id in 1..=6 {
        assert_eq!(bench.states(id), [PublicState::Serving; 2], "c{id}: nobody has to be filled");
    }
}

#[test]
fn members_of_the_last_serving_set_that_come_back_in_time_are_not_filled() {
    let mut bench = Bench::running();
    bench.run(3000, &[]);
    bench.beat(3, 2);
    bench.run(1000, &[(3, 2)]);
    assert_eq!(bench.states(1), [PublicState::LastSrv; 2], "the other may be about to come");
    bench.beat(4, 2);
    assert_eq!(bench.states(1), [PublicState::Serving; 2]);
    // One that restarts while its chain waits does not end the waiting.
    assert_eq!(bench.states(3), [PublicState::LastSrv; 2]);
    bench.beat(3, 3);
    assert_eq!(bench.states(3), [PublicState::LastSrv; 2]);
    bench.beat(5, 2);
    assert_eq!(bench.states(2), [PublicState::Serving; 2]);
}

#[test]
fn a_pause_of_the_manager_proves_nothing_about_others() {
    let mut bench = Bench::running();
    bench.now = bench.now.after(Duration::from_secs(60));
    bench.step(Event::Tick);
    bench.run(400, &[]);
    assert_eq!(bench.states(1), [PublicState::Serving; 2]);
    // But the grace ends.
    bench.run(5000, &[]);
    assert_eq!(bench.states(1), [PublicState::LastSrv; 2]);
}

#[test]
fn heartbeats_that_make_no_sense_are_refused() {
    let mut bench = Bench::running();
    let stranger = Heartbeat { node: NodeId(9), targets: Default::default(), ..bench.heartbeat(3, 1) };
    assert_eq!(bench.refusal(Event::Heartbeat(stranger)), ErrorKind::NotFound);
    let foreign = Heartbeat { targets: bench.heartbeat(4, 1).targets, ..bench.heartbeat(3, 1) };
    assert_eq!(bench.refusal(Event::Heartbeat(foreign)), ErrorKind::InvalidArgument);
    let turncoat = Heartbeat { role: Role::Meta, ..bench.heartbeat(3, 1) };
    assert_eq!(bench.refusal(Event::Heartbeat(turncoat)), ErrorKind::InvalidArgument);
    let invented = [(TargetId(999), status(LocalState::Online, 0))].into();
    let unknown = Heartbeat { targets: invented, ..bench.heartbeat(3, 1) };
    assert_eq!(bench.refusal(Event::Heartbeat(unknown)), ErrorKind::InvalidArgument);
}

#[test]
fn meta_servers_come_and_go_without_being_listed() {
    let mut bench = Bench::running();
    let beat =
        Heartbeat { node: NodeId(2), role: Role::Meta, targets: Default::default(), ..bench.heartbeat(3, 1) };
    let decisions = bench.step(Event::Heartbeat(beat));
    assert!(decisions.publishes);
    assert!(matches!(decisions.reply.unwrap(), Reply::Lease { lease: LEASE, .. }));
    assert!(bench.state.nodes[&NodeId(2)].alive);
    bench.run(3000, &[(3, 1), (4, 1), (5, 1)]);
    assert!(!bench.state.nodes[&NodeId(2)].alive);
}

#[test]
fn sessions_end_by_time_by_close_and_by_a_newer_one() {
    let mut bench = Bench::running();
    let (client, epoch) = bench.open(None, None).unwrap();
    assert_eq!((client, epoch), (ClientId(1), SessionEpoch(1)));
    let (again, newer) = bench.open(Some(1), None).unwrap();
    assert_eq!((again, newer), (client, SessionEpoch(2)));
    assert_eq!(bench.renew(client, epoch), Err(ErrorKind::Stale));
    bench.run(20_000, &[]);
    bench.renew(client, newer).unwrap();
    bench.run(29_000, &[]);
    bench.renew(client, newer).unwrap();
    bench.run(31_000, &[]);
    assert_eq!(bench.renew(client, newer), Err(ErrorKind::Stale));
    let (other, epoch) = bench.open(None, None).unwrap();
    assert_eq!(other, ClientId(2));
    for _ in 0..2 {
        bench.step(Event::CloseSession { client: other, epoch }).reply.unwrap();
    }
    assert_eq!(bench.renew(other, epoch), Err(ErrorKind::Stale));
    assert_eq!(bench.open(Some(77), None), Err(ErrorKind::InvalidArgument), "an id that was never given out");
}

#[test]
fn a_newer_attempt_of_a_job_ends_the_sessions_of_older_ones() {
    let mut bench = Bench::running();
    let (old, old_epoch) = bench.open(None, Some((5, 1))).unwrap();
    let (other_job, other_epoch) = bench.open(None, Some((6, 1))).unwrap();
    let (new, new_epoch) = bench.open(None, Some((5, 2))).unwrap();
    assert_eq!(bench.renew(old, old_epoch), Err(ErrorKind::Stale));
    bench.renew(other_job, other_epoch).unwrap();
    bench.renew(new, new_epoch).unwrap();
    assert_eq!(bench.open(None, Some((5, 1))), Err(ErrorKind::Stale), "the old attempt cannot come back");
}

#[test]
fn epochs_and_ids_survive_a_restart_and_sessions_get_a_full_lease() {
    let mut bench = Bench::running();
    let (client, epoch) = bench.open(None, None).unwrap();
    bench.run(29_000, &[]);
    bench.state = ManagerState::new(bench.settings.clone(), bench.state.tables(), bench.now);
    bench.run(29_000, &[]);
    bench.renew(client, epoch).unwrap();
    assert_eq!(bench.open(None, None).unwrap(), (ClientId(2), SessionEpoch(2)));
}
