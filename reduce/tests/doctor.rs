//! What the doctor finds out about a group on this machine.

mod common;

use common::world;
use firefly_reduce::doctor::{Effort, examine};
use std::time::Duration;

#[test]
fn every_pair_is_examined_and_all_ranks_know() {
    for nodes in ["a", "ab", "aab", "abca"] {
        world("every_pair_is_examined_and_all_ranks_know", nodes, |rank| {
            let group = rank.group("g");
            let effort = Effort { round_trips: 5, bytes: 300_000, messages: 2 };
            let report = examine(&group, &effort).unwrap();
            let n = rank.size;
            assert_eq!((report.size, report.pairs.len() as u32), (n, n * (n - 1) / 2));
            let mut expected = (0..n).flat_map(|a| (a + 1..n).map(move |b| (a, b)));
            for pair in &report.pairs {
                assert_eq!(Some((pair.a, pair.b)), expected.next());
                let same = nodes.as_bytes()[pair.a as usize] == nodes.as_bytes()[pair.b as usize];
                let network = ["tcp", "rdma"].contains(&pair.transport.as_str());
                assert!(if same { pair.transport == "shm" } else { network }, "{pair:?}");
                assert_eq!(pair.why_not_rdma.is_some(), pair.transport == "tcp", "{pair:?}");
                assert!(pair.round_trip > Duration::ZERO && pair.there > 0.0 && pair.back > 0.0, "{pair:?}");
                // One machine has one clock: the truth, zero, is within the error that is claimed.
                assert!(pair.clock_offset_ns.unsigned_abs() <= pair.clock_error_ns + 1, "{pair:?}");
            }
            group.barrier().unwrap();
        });
    }
}
