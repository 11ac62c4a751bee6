//! Bugs planted on purpose: each is found by a test that passes without it. So the tests can fail.

use super::crash::Run;
use super::faults::{readers_keep_their_version, with_fault};
use super::*;

fn found_by_crashes(plant: Plant) -> Option<(u64, String)> {
    (0..600).find_map(|seed| {
        let mut run = Run::new(seed);
        run.options.plant = Some(plant);
        // What panics has found something too: two owners of a block, for instance.
        let result = std::panic::catch_unwind(|| run.go());
        match result {
            Ok(Ok(())) => None,
            Ok(Err(why)) => Some((seed, why)),
            Err(_) => Some((seed, "an assertion failed".into())),
        }
    })
}

#[test]
fn every_planted_bug_is_found() {
    for plant in [
        Plant::SkipSync,
        Plant::BelieveTail,
        Plant::ReusePages,
        Plant::ReuseUnrecorded,
        Plant::SuperblockFirst,
        Plant::ForgetLogEarly,
        Plant::LeakLeaving,
    ] {
        match found_by_crashes(plant) {
            Some((seed, why)) => println!("{plant:?} found by seed {seed}: {why}"),
            None => panic!("{plant:?} was not found"),
        }
    }
}

#[test]
fn a_checksum_beside_the_block_is_found() {
    let options = EngineOptions { plant: Some(Plant::ChecksumBesideBlock), ..SMALL };
    for fault in [WriteFault::Lost, WriteFault::Misdirected(8192)] {
        let found = (0..150).find_map(|seed| with_fault(seed, options, fault).err());
        println!("{fault:?}: {}", found.expect("a lost write passes for a good one"));
    }
}

#[test]
fn reuse_under_a_read_is_found() {
    let options = EngineOptions { plant: Some(Plant::ReuseUnderReads), ..SMALL };
    let why = readers_keep_their_version(options).unwrap_err();
    println!("{why}");
}

#[test]
fn a_frame_that_is_ignored_with_later_ones_behind_it_is_found() {
    // The disk loses one write; the log must not end there as if nothing had followed.
    let lost_frames = |plant| {
        let options = EngineOptions { plant, log_bytes: 1 << 20, ..SMALL };
        let disk = MemDisk::default();
        let (engine, _) = open(&disk, options);
        for version in 0..6 {
            if version == 3 {
                // Data first, then the frame.
                disk.plant(1, WriteFault::Lost);
            }
            apply(&engine, &disk, version, update(chunk(0), Kind::Write, 0, 0, Some(vec![1; 100]))).unwrap();
        }
        drop(engine);
        Core::<Bytes>::open(&disk, HEADER, options).map(|(_, recovered)| recovered.committed[0].1.version)
    };
    assert!(matches!(lost_frames(None), Err(EngineError::Format(FormatError::Damaged(_)))));
    // With the bug, three acknowledged versions are gone in silence.
    assert_eq!(lost_frames(Some(Plant::IgnoreLaterFrames)).unwrap(), 2);
}

#[test]
fn a_disk_that_lies_about_flushes_is_found() {
    let found = (0..100).find_map(|seed| Run { lying: true, ..Run::new(seed) }.go().err());
    println!("{}", found.expect("lost data is noticed"));
}
