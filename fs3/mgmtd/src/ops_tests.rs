//! Orders and workers, one by one, without a clock.

use crate::event::{Event, Order, Reply};
use crate::state::ManagerState;
use crate::state_tests::{Bench, status};
use crate::{Cause, MgmtdSettings, bootstrap};
use firefly_types::{ChainId, ErrorKind, Incarnation, NodeId, TargetId};
use fs3_core::chain::{LocalState, PublicState};
use fs3_core::worker::Activity;
use std::collections::{BTreeMap, BTreeSet};

const ALL: [(u32, u64); 3] = [(3, 1), (4, 1), (5, 1)];

impl Bench {
    fn order(&mut self, order: Order) -> Result<String, ErrorKind> {
        match self.step(Event::Order(order)).reply {
            Ok(Reply::Accepted(message)) => Ok(message),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.kind),
        }
    }

    /// Half a second in which `beating` nodes report, targets that are being filled finish, and
    /// targets that are asked to stop do.
    fn round(&mut self, beating: &[(u32, u64)]) {
        self.run(500, beating);
        for &(node, incarnation) in beating {
            let mut beat = self.heartbeat(node, incarnation);
            for (target, report) in &mut beat.targets {
                let (_, id) = self.state.owners[target];
                let chain = self.state.chain(id).unwrap();
                if chain.state_of(*target) == Some(PublicState::Syncing) {
                    *report = status(LocalState::UpToDate, chain.version.0);
                }
            }
            self.step(Event::Heartbeat(beat)).reply.unwrap();
        }
        for entry in self.state.chains.values() {
            assert_eq!(entry.chain.check(), Ok(()));
        }
    }

    fn held_by(&self, node: u32) -> Vec<TargetId> {
        self.state.owners.iter().filter(|(_, (n, _))| n.0 == node).map(|(t, _)| *t).collect()
    }

    fn all_serve(&self) -> bool {
        let k = self.state.replication as usize;
        self.state
            .chains
            .values()
            .all(|e| e.chain.members.len() == k && e.chain.in_state(PublicState::Serving).count() == k)
    }

    fn worker(&self, name: &str) -> fs3_core::worker::Status {
        self.state.workers().into_iter().find(|w| w.name == name).unwrap().status
    }

    /// What a restart finds.
    fn restart(&mut self) {
        self.state = ManagerState::new(self.settings.clone(), self.state.tables(), self.now);
    }
}

#[test]
fn chains_turn_back_to_their_preferred_order_one_at_a_time_once_everything_is_filled() {
    let mut bench = Bench::running();
    bench.run(3000, &[(3, 1), (4, 1)]);
    bench.beat(5, 1);
    let turned = |bench: &Bench| {
        let is_turned =
            |e: &&crate::ChainEntry| e.chain.members.iter().map(|m| m.target).ne(e.preferred.iter().copied());
        bench.state.chains.values().filter(is_turned).count()
    };
    // Two chains have n5 as head, two as tail.
    assert_eq!((turned(&bench), bench.worker("rotate").activity), (2, Activity::Idle));
    bench.round(&ALL);
    assert!(bench.all_serve());
    assert_eq!((turned(&bench), bench.worker("rotate").activity), (2, Activity::Working));
    bench.run(700, &ALL);
    assert_eq!(turned(&bench), 1, "one at a time");
    bench.run(700, &ALL);
    assert_eq!((turned(&bench), bench.worker("rotate").activity), (0, Activity::Idle));
}

#[test]
fn a_chain_is_not_turned_while_anything_is_filled() {
    let mut bench = Bench::running();
    bench.run(3000, &[(3, 1), (4, 1)]);
    bench.beat(5, 1);
    // One of n5's targets never gets done; the chains of the others are whole and turned.
    let stuck = bench.held_by(5)[0];
    for _ in 0..20 {
        bench.run(500, &[(3, 1), (4, 1)]);
        let mut beat = bench.heartbeat(5, 1);
        for (target, report) in beat.targets.iter_mut().filter(|(t, _)| **t != stuck) {
            let chain = bench.state.chain(bench.state.owners[target].1).unwrap();
            if chain.state_of(*target) == Some(PublicState::Syncing) {
                *report = status(LocalState::UpToDate, chain.version.0);
            }
        }
        bench.step(Event::Heartbeat(beat)).reply.unwrap();
    }
    let worker = bench.worker("rotate");
    assert_eq!(worker.activity, Activity::Blocked, "{worker:?}");
}

#[test]
fn a_target_that_is_out_too_long_is_rebuilt_elsewhere_and_its_remains_are_cleared() {
    let mut bench = Bench::running();
    let lost = bench.held_by(5);
    bench.run(599_000, &[(3, 1), (4, 1)]);
    assert_eq!(bench.held_by(5), lost, "not yet");
    assert_eq!(bench.worker("rebuild").activity, Activity::Idle);
    let mut most_at_once = 0;
    for _ in 0..40 {
        bench.round(&[(3, 1), (4, 1)]);
        let filled =
            bench.state.chains.values().filter(|e| e.chain.in_state(PublicState::Syncing).count() > 0);
        most_at_once = most_at_once.max(filled.count());
    }
    assert!(bench.all_serve(), "{:?}", bench.state.tables().chains);
    assert!(bench.held_by(5).is_empty());
    assert!(most_at_once <= 2, "{most_at_once} targets were filled at once on two nodes");
    // New ids, never used before.
    assert!(bench.state.owners.keys().filter(|t| t.0 > 12).count() == lost.len());
    // The lost node comes back, with the old process and an old table; its remains are named to it
    // until it has read so.
    let graves: BTreeMap<TargetId, NodeId> = lost.iter().map(|t| (*t, NodeId(5))).collect();
    assert_eq!(bench.state.tables().graves, graves);
    let mut late = bench.heartbeat(5, 1);
    late.targets = lost.iter().map(|t| (*t, status(LocalState::Online, 0))).collect();
    late.routing_version = firefly_types::RoutingVersion(3);
    bench.step(Event::Heartbeat(late)).reply.unwrap();
    assert_eq!(bench.state.tables().graves, graves);
    bench.beat(5, 1);
    assert!(bench.state.tables().graves.is_empty());
}

#[test]
fn a_target_whose_server_returns_in_time_is_not_rebuilt() {
    let mut bench = Bench::running();
    bench.run(500_000, &[(3, 1), (4, 1)]);
    for _ in 0..400 {
        bench.round(&ALL);
    }
    assert!(bench.all_serve());
    assert!(bench.state.owners.keys().all(|t| t.0 <= 12));
}

#[test]
fn with_no_node_to_go_to_the_rebuild_says_so() {
    let mut settings = MgmtdSettings::new(vec![NodeId(3), NodeId(4)]);
    settings.min_write_replicas = Some(1);
    let tables = bootstrap::first_tables(&settings).unwrap();
    let mut bench = Bench::running();
    bench.state = ManagerState::new(settings.clone(), tables, bench.now);
    bench.settings = settings;
    bench.round(&[(3, 1), (4, 1)]);
    bench.run(700_000, &[(3, 1)]);
    let worker = bench.worker("rebuild");
    assert_eq!(worker.activity, Activity::Blocked);
    assert!(worker.detail.contains("ff fs node add"), "{worker:?}");
    // Added, it takes over, and goes on doing so over a restart of the manager.
    bench.order(Order::AddNode(NodeId(6))).unwrap();
    bench.round(&[(3, 1), (6, 1)]);
    bench.restart();
    bench.run(610_000, &[(3, 1), (6, 1)]);
    for _ in 0..10 {
        bench.round(&[(3, 1), (6, 1)]);
    }
    assert!(bench.all_serve(), "{:?}", bench.state.tables().chains);
}

#[test]
fn a_drained_node_is_emptied_copy_before_removal_and_can_then_be_removed() {
    let mut bench = Bench::running();
    assert_eq!(bench.order(Order::RemoveNode(NodeId(5))), Err(ErrorKind::Conflict), "it holds targets");
    assert_eq!(bench.order(Order::DrainNode(NodeId(9))), Err(ErrorKind::NotFound));
    bench.order(Order::DrainNode(NodeId(5))).unwrap();
    assert_eq!(
        bench.order(Order::DrainNode(NodeId(4))),
        Err(ErrorKind::InvalidArgument),
        "too few would be left"
    );
    for round in 0..60 {
        // A restart in the middle changes nothing.
        if round == 7 {
            bench.restart();
            bench.run(4000, &ALL);
        }
        bench.round(&ALL);
        for entry in bench.state.chains.values() {
            assert!(entry.chain.in_state(PublicState::Serving).count() >= 2, "{:?}", entry.chain);
        }
    }
    assert!(bench.held_by(5).is_empty() && bench.all_serve());
    assert_eq!(bench.worker("drain").activity, Activity::Idle);
    bench.order(Order::RemoveNode(NodeId(5))).unwrap();
    let gone = bench.heartbeat(5, 1);
    assert_eq!(bench.refusal(Event::Heartbeat(gone)), ErrorKind::NotFound);
    bench.order(Order::AddNode(NodeId(5))).unwrap();
    bench.beat(5, 1);
}

#[test]
fn a_target_leaves_only_after_it_has_stopped_and_is_wanted_back_if_all_others_go() {
    let mut bench = Bench::running();
    bench.order(Order::AddNode(NodeId(6))).unwrap();
    bench.beat(6, 1);
    let from = bench.state.chain(ChainId(1)).unwrap().members[0].target;
    bench.order(Order::DrainTarget(from)).unwrap();
    assert_eq!(bench.order(Order::DrainTarget(from)), Err(ErrorKind::Conflict), "one move per chain");
    let moving = |bench: &Bench| bench.state.chains[&ChainId(1)].moving;
    assert_eq!(moving(&bench).unwrap().cause, Cause::Drain);
    let to = moving(&bench).unwrap().to;
    // Filled on n5 or n6 without n3 being told anything yet.
    let owner = bench.state.owners[&to].0.0;
    bench.beat(owner, 1);
    let version = bench.state.chain(ChainId(1)).unwrap().version.0;
    let mut beat = bench.heartbeat(owner, 1);
    beat.targets.insert(to, status(LocalState::UpToDate, version));
    bench.step(Event::Heartbeat(beat)).reply.unwrap();
    assert!(moving(&bench).unwrap().retiring);
    assert_eq!(bench.states(1), [PublicState::Serving; 3], "it serves until it has stopped");
    // All go at once before it has: it is complete, and wanted back.
    bench.run(3000, &[]);
    assert_eq!(bench.states(1), [PublicState::LastSrv; 3]);
    assert!(!moving(&bench).unwrap().retiring);
    bench.beat(3, 2);
    bench.run(2000, &[(3, 2)]);
    assert_eq!(bench.states(1)[0], PublicState::Serving);
    assert_eq!(bench.state.chain(ChainId(1)).unwrap().members[0].target, from);
    // The node that was to take it over is dead, so it keeps its place; with all back it can go.
    assert!(moving(&bench).is_none());
    for round in 0..20 {
        bench.round(&[(3, 2), (4, 2), (5, 2), (6, 2)]);
        if round == 10 {
            bench.order(Order::DrainTarget(from)).unwrap();
        }
    }
    assert!(moving(&bench).is_none() && !bench.state.owners.contains_key(&from));
    assert!(bench.all_serve());
}

#[test]
fn a_move_to_a_node_that_dies_or_refuses_is_taken_back_and_tried_elsewhere() {
    let mut bench = Bench::running();
    bench.order(Order::AddNode(NodeId(6))).unwrap();
    let up = [(3, 1), (4, 1), (5, 1), (6, 1)];
    bench.round(&up);
    let from = bench.state.chain(ChainId(1)).unwrap().members[0].target;
    bench.order(Order::DrainTarget(from)).unwrap();
    let to = bench.state.chains[&ChainId(1)].moving.unwrap().to;
    assert_eq!(bench.state.owners[&to].0, NodeId(6), "the emptiest node");
    let mut beat = bench.heartbeat(6, 1);
    let refusal = crate::TargetStatus { reason: "the disk is full".into(), ..status(LocalState::Offline, 0) };
    beat.targets.insert(to, refusal);
    bench.step(Event::Heartbeat(beat)).reply.unwrap();
    let entry = &bench.state.chains[&ChainId(1)];
    assert!(entry.moving.is_none());
    assert_eq!(entry.preferred[0], from, "it has its place again");
    assert_eq!(bench.states(1), [PublicState::Serving; 2]);
    // Not the same node again at once.
    bench.order(Order::DrainTarget(from)).unwrap();
    let to = bench.state.chains[&ChainId(1)].moving.unwrap().to;
    assert_eq!(bench.state.owners[&to].0, NodeId(5));
    bench.run(3000, &[(3, 1), (4, 1), (6, 1)]);
    assert!(bench.state.chains[&ChainId(1)].moving.is_none(), "n5 died");
}

#[test]
fn a_target_can_be_replaced_on_its_node() {
    let mut bench = Bench::running();
    let from = bench.held_by(4)[0];
    bench.order(Order::ReplaceTarget(from)).unwrap();
    for _ in 0..6 {
        bench.round(&ALL);
    }
    assert!(bench.all_serve() && !bench.state.owners.contains_key(&from));
    assert_eq!(bench.held_by(4).len(), 4);
    bench.run(3000, &[(3, 1), (4, 1)]);
    let dead = bench.held_by(5)[0];
    assert_eq!(bench.order(Order::ReplaceTarget(dead)), Err(ErrorKind::Unavailable));
    assert_eq!(bench.order(Order::ReplaceTarget(TargetId(99))), Err(ErrorKind::NotFound));
}

#[test]
fn rebalancing_gives_a_new_node_its_share_of_targets_and_heads_and_survives_a_restart() {
    let mut bench = Bench::running();
    bench.order(Order::AddNode(NodeId(6))).unwrap();
    let up = [(3, 1), (4, 1), (5, 1), (6, 1)];
    bench.round(&up);
    bench.order(Order::Rebalance { start: true }).unwrap();
    for round in 0..60 {
        if round == 5 {
            let before = bench.state.tables().tasks;
            bench.restart();
            assert_eq!(bench.state.tables().tasks, before);
            bench.run(4000, &up);
        }
        bench.round(&up);
    }
    assert_eq!(bench.worker("rebalance").activity, Activity::Idle, "{:?}", bench.worker("rebalance"));
    assert!(bench.all_serve());
    assert_eq!([3, 4, 5, 6].map(|n| bench.held_by(n).len()), [3; 4]);
    let heads: Vec<NodeId> =
        bench.state.chains.values().map(|e| bench.state.owners[&e.chain.members[0].target].0).collect();
    let distinct: BTreeSet<NodeId> = heads.iter().copied().collect();
    assert_eq!(distinct.len(), 4, "{heads:?}");
    for entry in bench.state.chains.values() {
        let nodes: BTreeSet<NodeId> =
            entry.chain.members.iter().map(|m| bench.state.owners[&m.target].0).collect();
        assert_eq!(nodes.len(), 2, "two copies on one node");
        assert!(entry.chain.members.iter().map(|m| m.target).eq(entry.preferred.iter().copied()));
    }
}

#[test]
fn a_scrub_goes_on_until_every_serving_target_has_checked_everything() {
    let mut bench = Bench::running();
    assert_eq!(bench.worker("scrub").activity, Activity::Idle);
    bench.order(Order::Scrub { start: true, rate_bytes: 1000 }).unwrap();
    let pass = bench.state.tables().tasks.scrub_pass;
    let report = |bench: &mut Bench, node: u32, done: bool| {
        let mut beat = bench.heartbeat(node, 1);
        for status in beat.targets.values_mut() {
            status.scrub = crate::ScrubProgress {
                pass,
                done,
                chunks_checked: 5,
                chunks_total: 10,
                blocks_repaired: 1,
                ..Default::default()
            };
        }
        bench.step(Event::Heartbeat(beat)).reply.unwrap();
    };
    for node in [3, 4] {
        report(&mut bench, node, true);
    }
    report(&mut bench, 5, false);
    bench.run(400, &[]);
    let worker = bench.worker("scrub");
    assert_eq!((worker.activity, worker.done, worker.total), (Activity::Working, 60, 120), "{worker:?}");
    bench.restart();
    bench.run(3500, &ALL);
    assert!(bench.state.tables().tasks.scrubbing, "durable");
    for node in [3, 4, 5] {
        report(&mut bench, node, true);
    }
    bench.run(600, &[]);
    assert!(!bench.state.tables().tasks.scrubbing);
    assert!(bench.worker("scrub").detail.contains("12 blocks repaired"), "{:?}", bench.worker("scrub"));
    bench.order(Order::Scrub { start: true, rate_bytes: 0 }).unwrap();
    assert_eq!(bench.state.tables().tasks.scrub_pass, pass + 1);
    bench.order(Order::Scrub { start: false, rate_bytes: 0 }).unwrap();
    assert!(!bench.state.tables().tasks.scrubbing);
}

#[test]
fn a_process_that_is_seen_to_have_ended_is_replaced_at_once_and_for_good() {
    let mut bench = Bench::running();
    let ended = |incarnation| Event::Ended { node: NodeId(5), incarnation: Incarnation(incarnation) };
    bench.step(ended(7));
    assert_eq!(bench.states(2), [PublicState::Serving; 2], "another start of it");
    bench.step(ended(1));
    assert_eq!(bench.states(2), [PublicState::Serving, PublicState::Offline]);
    // A heartbeat that was under way comes late.
    let late = bench.heartbeat(5, 1);
    assert_eq!(bench.refusal(Event::Heartbeat(late)), ErrorKind::Stale);
    bench.beat(5, 2);
    assert_eq!(bench.states(2), [PublicState::Serving, PublicState::Syncing]);
}

#[test]
fn orders_that_make_no_sense_leave_no_trace() {
    let mut bench = Bench::running();
    for order in [
        Order::AddNode(NodeId(3)),
        Order::RemoveNode(NodeId(3)),
        Order::RemoveNode(NodeId(99)),
        Order::DrainTarget(TargetId(99)),
        Order::ReplaceTarget(TargetId(99)),
        // Both other nodes hold... none is left for a third node's copy.
        Order::DrainNode(NodeId(99)),
    ] {
        bench.refusal(Event::Order(order));
    }
}
