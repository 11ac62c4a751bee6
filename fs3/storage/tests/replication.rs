//! Storage nodes in one process, over loopback, with a manager that knows one chain.

mod support;

use firefly_proto::methods::storage as method;
use firefly_proto::storage as sp;
use firefly_types::TargetId;
use fs3_core::chain::PublicState;
use prost::Message;
use support::{Cluster, corrupt_block, is_stale, key, pattern};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_target_keeps_what_it_acknowledged() {
    let mut cluster = Cluster::start(1).await;
    let mut client = cluster.client(1);
    let whole = pattern(1, 300_000);
    let reply = client.write(0, 0, &whole).await;
    assert_eq!((reply.version, reply.chunk_length), (1, 300_000));
    // A retry under the same number is answered, not done again.
    let kind = sp::UpdateKind::Write;
    let again = client.repeat(kind, key(0), 0, whole.len() as u32, Some(&whole)).await.unwrap();
    assert_eq!(again, reply);
    // An unaligned overwrite over a block border, and a hole.
    client.write(0, 16_000, &[7; 1000]).await;
    client.write(0, 600_000, &[9; 10]).await;
    let mut model = whole.clone();
    model[16_000..17_000].fill(7);
    model.resize(600_000, 0);
    model.extend([9; 10]);
    assert_eq!(client.read_everywhere(0, 1 << 20).await, model);
    client.update(sp::UpdateKind::Punch, key(0), 5000, 100_000, None).await.unwrap();
    model[5000..105_000].fill(0);
    client.update(sp::UpdateKind::Truncate, key(0), 0, 250_001, None).await.unwrap();
    model.truncate(250_001);
    client.update(sp::UpdateKind::Truncate, key(0), 0, 400_000, None).await.unwrap();
    model.resize(400_000, 0);
    assert_eq!(client.read_everywhere(0, 1 << 20).await, model);
    let (part, bytes) = client.read_at(TargetId(1), 0, 4990, 20).await.unwrap();
    assert_eq!((part.version, part.chunk_length, &bytes[..]), (6, 400_000, &model[4990..5010]));

    // After a restart the data and the records are there, and old sessions stay refused.
    client.epoch = 2;
    let last = client.write(1, 0, &[1; 100]).await;
    cluster.stop_node(1).await;
    cluster.start_node(1).await;
    cluster.manager.wait_serving(1).await;
    assert_eq!(client.read_everywhere(0, 1 << 20).await, model);
    let again = client.repeat(kind, key(1), 0, 100, Some(&[1; 100])).await.unwrap();
    assert_eq!(again, last);
    let mut old = cluster.client(1);
    (old.epoch, old.sequence) = (1, 100);
    let refused = old.update(kind, key(1), 0, 100, Some(&[2; 100])).await.unwrap_err();
    assert!(is_stale(&refused), "{refused}");

    // Many files' chunks go in bounded steps.
    for index in 2..100 {
        client.write(index, 0, &[3; 10]).await;
    }
    let context = client.plain_context();
    let last: sp::QueryLastChunkReply = client
        .call_head(method::QUERY_LAST_CHUNK, |chain, head| {
            sp::QueryLastChunkRequest {
                context: Some(context),
                chain_id: 1,
                chain_version: chain.version.0,
                target_id: head.0,
                data_id: 5,
                generation: 0,
            }
            .encode_to_vec()
        })
        .await;
    assert_eq!((last.exists, last.index, last.chunk_length, last.chunks), (true, 99, 10, 100));
    let mut removed = 0;
    loop {
        let step: sp::RemoveRangeReply = client
            .call_head(method::REMOVE_RANGE, |chain, head| {
                sp::RemoveRangeRequest {
                    context: Some(context),
                    chain_id: 1,
                    chain_version: chain.version.0,
                    target_id: head.0,
                    data_id: 5,
                    generation: 0,
                    from_index: 1,
                }
                .encode_to_vec()
            })
            .await;
        removed += step.removed;
        if !step.remaining {
            break;
        }
    }
    assert_eq!(removed, 99);
    assert_eq!(client.read_at(TargetId(1), 50, 0, 10).await.unwrap().0.version, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chain_survives_the_loss_of_its_head_and_fills_it_when_it_returns() {
    let mut cluster = Cluster::start(3).await;
    let mut client = cluster.client(1);
    let mut model = Vec::new();
    for index in 0..20 {
        model.push(pattern(u64::from(index), 100_000));
        client.write(index, 0, &model[index as usize]).await;
    }
    cluster.stop_node(1).await;
    for index in 0..20 {
        let bytes = pattern(u64::from(index) + 100, 5000);
        model[index as usize][40_000..45_000].copy_from_slice(&bytes);
        client.write(index, 40_000, &bytes).await;
    }
    // One goes away while the head is out, so the copy must not bring it back.
    client.update(sp::UpdateKind::Remove, key(19), 0, 0, None).await.unwrap();
    cluster.start_node(1).await;
    // Writes go on while the target is filled.
    for index in 0..19 {
        let bytes = pattern(u64::from(index) + 200, 20_000);
        model[index as usize][70_000..90_000].copy_from_slice(&bytes);
        client.write(index, 70_000, &bytes).await;
    }
    cluster.manager.wait_serving(3).await;
    for index in 0..19 {
        assert!(client.read_everywhere(index, 1 << 20).await == model[index as usize], "chunk {index}");
    }
    assert_eq!(client.read_everywhere(19, 100).await, b"");
    // The records travelled: the returned target, alone, knows the last request.
    let last = client.write(0, 0, &[1; 10]).await;
    for node in [2, 3] {
        cluster.stop_node(node).await;
    }
    cluster.manager.wait(|c| c.in_state(PublicState::Serving).eq([TargetId(1)])).await;
    let again = client.repeat(sp::UpdateKind::Write, key(0), 0, 10, Some(&[1; 10])).await.unwrap();
    assert_eq!(again, last);
    assert!(client.read_everywhere(5, 1 << 20).await == model[5]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn corrupt_blocks_are_read_from_the_other_replica_and_healed() {
    let cluster = Cluster::start(2).await;
    let mut client = cluster.client(1);
    let whole = pattern(1, 200_000);
    client.write(0, 0, &whole).await;
    corrupt_block(&cluster.target_dir(1), &whole[32 << 10..33 << 10]);
    corrupt_block(&cluster.target_dir(2), &whole[64 << 10..65 << 10]);
    assert!(client.read_everywhere(0, 1 << 20).await == whole);
    let repaired = |n| cluster.nodes[&n].running.repaired_blocks();
    assert_eq!((repaired(1), repaired(2)), (1, 1));
    // An overwrite of part of a corrupt block heals it first.
    corrupt_block(&cluster.target_dir(2), &whole[64 << 10..65 << 10]);
    client.write(0, (64 << 10) + 100, &[1; 50]).await;
    let mut model = whole;
    model[(64 << 10) + 100..(64 << 10) + 150].fill(1);
    assert!(client.read_everywhere(0, 1 << 20).await == model);
    assert_eq!((repaired(1), repaired(2)), (1, 2));
    assert_eq!(cluster.manager.reason(2), "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrub_finds_what_nobody_reads_repairs_it_and_goes_on_after_a_restart() {
    let mut cluster = Cluster::start(2).await;
    let mut client = cluster.client(1);
    for index in 0..200 {
        client.write(index, 0, &pattern(u64::from(index), 40_000)).await;
    }
    let rotten = pattern(150, 40_000);
    corrupt_block(&cluster.target_dir(2), &rotten[16 << 10..17 << 10]);
    // Slow enough to be seen on its way.
    cluster.manager.scrub(7, 4_000_000);
    eventually(|| cluster.manager.scrubbed(2).chunks_checked > 70).await;
    assert!(!cluster.manager.scrubbed(2).done);
    cluster.stop_node(2).await;
    // The chain went on without it, and it is filled; its pass goes on behind what it has checked.
    cluster.start_node(2).await;
    cluster.manager.wait_serving(2).await;
    cluster.manager.scrub(7, 1 << 30);
    eventually(|| (1..=2).all(|t| cluster.manager.scrubbed(t).done)).await;
    let done = cluster.manager.scrubbed(2);
    assert_eq!((done.pass, done.chunks_checked, done.chunks_bad), (7, 200, 0));
    // A new pass over a block that rots now.
    corrupt_block(&cluster.target_dir(1), &rotten[16 << 10..17 << 10]);
    cluster.manager.scrub(8, 1 << 30);
    eventually(|| (1..=2).all(|t| cluster.manager.scrubbed(t).done && cluster.manager.scrubbed(t).pass == 8))
        .await;
    let repaired = [1, 2].map(|t| cluster.manager.scrubbed(t).blocks_repaired);
    assert_eq!(repaired, [1, 0]);
    assert!(client.read_everywhere(150, 1 << 20).await == rotten);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_replica_can_repair_is_counted() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(1);
    let whole = pattern(1, 40_000);
    client.write(0, 0, &whole).await;
    corrupt_block(&cluster.target_dir(1), &whole[16 << 10..17 << 10]);
    cluster.manager.scrub(1, 1 << 30);
    eventually(|| cluster.manager.scrubbed(1).done).await;
    assert_eq!((cluster.manager.scrubbed(1).chunks_bad, cluster.manager.scrubbed(1).blocks_repaired), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_asked_to_stop_does_and_is_removed_only_when_it_is_buried() {
    let mut cluster = Cluster::start(3).await;
    let mut client = cluster.client(1);
    let whole = pattern(1, 100_000);
    client.write(0, 0, &whole).await;
    cluster.manager.retire(Some(3));
    cluster.manager.wait_serving(2).await;
    assert!(cluster.manager.reason(3).contains("taken its place"), "{}", cluster.manager.reason(3));
    assert!(cluster.target_dir(3).join("volume").exists());
    // A restart does not bring it back.
    cluster.stop_node(3).await;
    cluster.start_node(3).await;
    client.write(0, 50_000, &[7; 100]).await;
    assert_eq!(cluster.manager.chain().in_state(PublicState::Serving).count(), 2);
    // Wanted back, it is filled like any other.
    cluster.manager.retire(None);
    cluster.manager.wait_serving(3).await;
    let mut model = whole;
    model[50_000..50_100].fill(7);
    assert!(client.read_everywhere(0, 1 << 20).await == model);
    cluster.manager.retire(Some(3));
    cluster.manager.wait_serving(2).await;
    cluster.manager.bury(3);
    let dir = cluster.target_dir(3);
    eventually(|| !dir.exists()).await;
    assert!(client.read_everywhere(0, 1 << 20).await == model);
}

/// Waits until `condition` holds; a hang fails.
async fn eventually(condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), waiting).await.expect("it does not come to be");
}
