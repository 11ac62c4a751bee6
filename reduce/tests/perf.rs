//! Every collective measured and checked, out of place and in place, and a table of algorithms made.

mod common;

use common::world;
use firefly_reduce::perf::{Collective, Spec, measure, tune};
use firefly_reduce::{DType, ReduceOp};

#[test]
fn every_collective_is_measured_and_right() {
    for nodes in ["aa", "abc", "aabb"] {
        world("every_collective_is_measured_and_right", nodes, |rank| {
            let group = rank.group("g");
            for collective in Collective::ALL {
                for (dtype, op) in
                    [(DType::F32, ReduceOp::Sum), (DType::BF16, ReduceOp::Avg), (DType::I8, ReduceOp::Max)]
                {
                    for bytes in [0, 256, 100_000] {
                        let spec =
                            Spec { collective, dtype, op, root: 1, iterations: 2, warmup: 1, check: true };
                        let row = measure(&group, &spec, bytes).unwrap();
                        let context = format!("{collective} {dtype} {bytes} on {nodes}");
                        assert!(row.bytes <= bytes, "{context}");
                        assert_eq!(row.out_of_place.wrong, Some(0), "{context}");
                        assert!(row.in_place.is_none_or(|s| s.wrong == Some(0)), "{context}, in place");
                        let alone = matches!(collective, Collective::AllToAll | Collective::SendRecv);
                        assert_eq!(row.in_place.is_none(), alone, "{context}");
                    }
                }
            }
            group.barrier().unwrap();
        });
    }
}

#[test]
fn tuning_makes_one_table_for_all_ranks() {
    world("tuning_makes_one_table_for_all_ranks", "abc", |rank| {
        let group = rank.group("g");
        let table = tune(&group, &[256, 16 << 10, 256 << 10], 3).unwrap();
        let text = table.to_file();
        assert_eq!(text.parse(), Ok(table.clone()));
        // All ranks must have chosen alike: the length and a sum over the text tell.
        let sum: i64 = text.bytes().enumerate().map(|(i, b)| (i as i64 + 1) * i64::from(b)).sum();
        let mut most = [sum];
        group.allreduce(&mut most, ReduceOp::Max).unwrap();
        assert_eq!(most, [sum]);
        group.barrier().unwrap();
    });
    world("tuning_makes_one_table_for_all_ranks", "aa", |rank| {
        let group = rank.group("h");
        assert!(tune(&group, &[256], 1).unwrap_err().to_string().contains("one node"));
        group.barrier().unwrap();
    });
}
