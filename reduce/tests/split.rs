//! Groups out of groups: formed through the parent, apart from it afterwards.

mod common;

use common::world;
use firefly_reduce::{ReduceError, ReduceOp};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn all_parts_are_formed_at_once_and_without_a_store() {
    for nodes in ["aaaa", "abcd", "aabb"] {
        world("all_parts_are_formed_at_once_and_without_a_store", nodes, |rank| {
            let parent = rank.group("g");
            // From here on the store is of no use.
            parent.barrier().unwrap();
            if rank.rank == 0 {
                for entry in std::fs::read_dir(&rank.dir).unwrap() {
                    let path = entry.unwrap().path();
                    if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("ffr_")) {
                        std::fs::remove_file(path).unwrap();
                    }
                }
            }
            let mine: &[u32] = if rank.rank % 2 == 0 { &[2, 0] } else { &[3] };
            let part = if rank.rank == 1 {
                // Joins nothing this time.
                assert!(parent.split("part", &[], LIMIT).unwrap().is_none());
                None
            } else {
                parent.split("part", mine, LIMIT).unwrap()
            };
            if let Some(part) = &part {
                let position = mine.iter().position(|&r| r == rank.rank).unwrap();
                assert_eq!((part.rank() as usize, part.size() as usize), (position, mine.len()));
                let mut data = [rank.rank as f32, 1.0];
                part.allreduce_f32(&mut data, ReduceOp::Sum).unwrap();
                let sum: u32 = mine.iter().sum();
                assert_eq!(data, [sum as f32, mine.len() as f32]);
                // A part of a part.
                let again =
                    part.split("again", &(0..part.size()).collect::<Vec<_>>(), LIMIT).unwrap().unwrap();
                again.barrier().unwrap();
                part.abort("to see that the parent lives");
            }
            let mut data = [1.0f32; 5];
            parent.allreduce_f32(&mut data, ReduceOp::Sum).unwrap();
            assert_eq!(data, [rank.size as f32; 5]);
            drop(part);
            parent.barrier().unwrap();
        });
    }
}

#[test]
fn what_ranks_disagree_about_is_said_and_harms_nobody() {
    for nodes in ["aaa", "abc"] {
        world("what_ranks_disagree_about_is_said_and_harms_nobody", nodes, |rank| {
            let parent = rank.group("g");
            // Rank 2 wants rank 1, which goes with rank 0.
            let mine: &[u32] = if rank.rank == 2 { &[2, 1] } else { &[0, 1] };
            let split = parent.split("part", mine, LIMIT);
            if rank.rank == 2 {
                let error = split.err().expect("rank 1 did not come");
                assert!(matches!(error, ReduceError::Mismatch { .. }), "{error:?}");
                assert!(error.to_string().contains("not by ranks 1"), "{error}");
            } else {
                split.unwrap().unwrap().barrier().unwrap();
            }
            // Nonsense on one rank does not keep the others waiting.
            let nonsense: &[u32] = if rank.rank == 0 { &[0, 0] } else { &[1, 2] };
            let split = parent.split("part", nonsense, LIMIT);
            match rank.rank {
                0 => assert!(matches!(split.err(), Some(ReduceError::Invalid { .. }))),
                _ => split.unwrap().unwrap().barrier().unwrap(),
            }
            let stranger = parent.split("part", &[(rank.rank + 1) % 3], LIMIT);
            assert!(stranger.err().is_some_and(|e| e.to_string().contains("not among the ranks")));
            parent.barrier().unwrap();
        });
    }
}
