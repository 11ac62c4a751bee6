//! What dies, comes back, and what goes on meanwhile.

mod support;

use firefly_proto::scheduler as wire;
use std::process::{Child, Command, Stdio};
use support::{Cluster, PATIENCE, alive, kill, quick, running, script, until};
use wire::JobState;

/// A job whose ranks say that they are up, wait for a file and end.
fn waits_for(go: &std::path::Path, nodes: u32) -> wire::JobSpec {
    script(
        nodes,
        1,
        &format!("echo up; until [ -e {} ]; do sleep 0.05; done; echo done by $RANK", go.display()),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_killed_costs_nothing() {
    let mut cluster = Cluster::start(quick(), &[1, 1]).await;
    let go = cluster.dir.path().join("go");
    let job = cluster.submit(waits_for(&go, 2)).await;
    let up = cluster.wait(job, "both ranks run", running).await;
    let pid = up.attempts[0].ranks[1].pid;
    cluster.kill_agent(2);
    assert!(alive(pid), "the rank lives on without its agent");
    cluster.start_agent(2, 1, None);
    cluster.nodes_ready(2).await;
    assert!(alive(pid));
    std::fs::write(&go, "").unwrap();
    let done = cluster.wait_state(job, JobState::Succeeded).await;
    assert_eq!(done.epoch, 1);
    assert_eq!(done.attempts[0].ranks[1].pid, pid, "the same process");
    let mut lines = cluster.lines(job).await;
    lines.sort();
    assert_eq!(lines, ["0: done by 0", "0: up", "1: done by 1", "1: up"], "each line once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_that_ends_while_its_agent_is_dead_is_reported_by_the_next() {
    let mut cluster = Cluster::start(quick(), &[1]).await;
    let go = cluster.dir.path().join("go");
    let job = cluster.submit(waits_for(&go, 1)).await;
    let up = cluster.wait(job, "the rank runs", running).await;
    cluster.kill_agent(1);
    std::fs::write(&go, "").unwrap();
    let pid = up.attempts[0].ranks[0].pid;
    until("the rank has ended", async || (!alive(pid)).then_some(())).await;
    cluster.start_agent(1, 1, None);
    cluster.wait_state(job, JobState::Succeeded).await;
    assert_eq!(cluster.lines(job).await, ["0: up", "0: done by 0"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scheduler_that_is_restarted_adopts_the_job() {
    let mut cluster = Cluster::start(quick(), &[1, 1]).await;
    let go = cluster.dir.path().join("go");
    let job = cluster.submit(waits_for(&go, 2)).await;
    let up = cluster.wait(job, "both ranks run", running).await;
    cluster.stop_scheduler().await;
    cluster.start_scheduler().await;
    cluster.nodes_ready(2).await;
    assert!(up.attempts[0].ranks.iter().all(|r| alive(r.pid)));
    std::fs::write(&go, "").unwrap();
    let done = cluster.wait_state(job, JobState::Succeeded).await;
    assert_eq!(done.epoch, 1);
    let mut lines = cluster.lines(job).await;
    lines.sort();
    assert_eq!(lines, ["0: done by 0", "0: up", "1: done by 1", "1: up"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_ends_during_the_schedulers_outage_is_known_afterwards() {
    let mut cluster = Cluster::start(quick(), &[1]).await;
    let go = cluster.dir.path().join("go");
    let job = cluster.submit(waits_for(&go, 1)).await;
    let up = cluster.wait(job, "the rank runs", running).await;
    cluster.stop_scheduler().await;
    std::fs::write(&go, "").unwrap();
    let pid = up.attempts[0].ranks[0].pid;
    until("the rank has ended", async || (!alive(pid)).then_some(())).await;
    cluster.start_scheduler().await;
    cluster.wait_state(job, JobState::Succeeded).await;
    assert_eq!(cluster.lines(job).await, ["0: up", "0: done by 0"]);
}

/// Not a test by itself: the test below runs this in a process of its own, to kill it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scheduler_in_a_process_of_its_own() {
    let Ok(dir) = std::env::var("FIREFLY_TEST_SCHEDULER") else { return };
    let dir = std::path::PathBuf::from(dir);
    let secret = firefly_types::ClusterSecret::load(&dir.join("secret")).unwrap();
    let listen = std::env::var("FIREFLY_TEST_LISTEN").unwrap().parse().unwrap();
    let mut config = scheduler_server::SchedulerConfig::new(listen, dir.join("scheduler"), secret);
    config.policy = quick();
    let running = scheduler_server::serve(config, tokio_util::sync::CancellationToken::new()).await.unwrap();
    running.wait().await;
}

fn scheduler_process(cluster: &Cluster) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "scheduler_in_a_process_of_its_own", "--nocapture"])
        .env("FIREFLY_TEST_SCHEDULER", cluster.dir.path())
        .env("FIREFLY_TEST_LISTEN", cluster.addr.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scheduler_that_is_killed_again_and_again_loses_nothing() {
    let mut cluster = Cluster::start(quick(), &[2, 2]).await;
    cluster.stop_scheduler().await;
    let mut process = scheduler_process(&cluster);
    cluster.nodes_ready(2).await;
    let go = cluster.dir.path().join("go");
    let job = cluster.submit(waits_for(&go, 2)).await;
    let mut keys = Vec::new();
    for round in 0..4 {
        // A submit, and SIGKILL right after its answer: it must be there afterwards.
        let request = wire::SubmitRequest {
            spec: Some(script(1, 1, "echo small")),
            idempotency_key: format!("round {round}"),
        };
        let small = until("the submit is answered", async || {
            Some(cluster.client().await.submit(request.clone()).await.ok()?.into_inner().job_id)
        })
        .await;
        keys.push((request, small));
        process.kill().unwrap();
        process.wait().unwrap();
        process = scheduler_process(&cluster);
    }
    let up = cluster.wait(job, "both ranks run", running).await;
    assert_eq!(up.epoch, 1);
    std::fs::write(&go, "").unwrap();
    assert_eq!(cluster.wait_state(job, JobState::Succeeded).await.epoch, 1);
    for (request, id) in keys {
        let again = cluster.client().await.submit(request).await.unwrap().into_inner().job_id;
        assert_eq!(again, id, "one key, one job");
        assert_eq!(cluster.wait_state(id, JobState::Succeeded).await.epoch, 1);
        assert_eq!(cluster.lines(id).await, ["0: small"]);
    }
    process.kill().unwrap();
    process.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_gone_loses_its_attempt_and_the_next_waits_for_the_orphan_lease() {
    let policy = scheduler_server::Policy {
        // Three reports of an agent, so that a busy machine does not make a second node look lost.
        silent_after_ms: 1_500,
        agent_lease_ms: 3_000,
        orphan_lease_ms: 5_000,
        orphan_margin_ms: 1_000,
        ..quick()
    };
    let mut cluster = Cluster::start(policy, &[1, 1]).await;
    // The second attempt proves that the first one was over before it.
    let mark = cluster.dir.path().join("first");
    let text = format!(
        "if [ $FIREFLY_EPOCH = 1 ]; then echo $$ > {0}.$RANK; exec sleep 1000; fi
         kill -0 $(cat {0}.1) 2>/dev/null && echo twice; echo second",
        mark.display()
    );
    let job = cluster.submit(script(2, 1, &text)).await;
    let up = cluster.wait(job, "both ranks run", running).await;
    cluster.kill_agent(2);
    cluster.start_agent(3, 1, None);
    let lost = cluster.wait(job, "the attempt has ended", |j| j.attempts[0].ended_unix_ms > 0).await;
    assert!(lost.attempts[0].end_reason.contains("n2 has been silent"), "{:?}", lost.attempts[0]);
    let why = cluster.client().await.why_job(wire::GetJobRequest { job: job.to_string() }).await.unwrap();
    let why = why.into_inner().lines.join("\n");
    assert!(why.contains("rank 1 of attempt 1 may still run on n2"), "{why}");
    let done = cluster.wait_state(job, JobState::Succeeded).await;
    assert_eq!((done.epoch, done.attempts[1].ranks[1].node_id), (2, 3));
    assert!(!alive(up.attempts[0].ranks[1].pid), "its shim ended it by the orphan lease");
    let lines = cluster.lines(job).await;
    assert!(!lines.iter().any(|l| l.contains("twice")), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_that_is_killed_takes_its_rank_along_and_is_named() {
    let cluster = Cluster::start(quick(), &[1]).await;
    let job = cluster.submit(script(1, 1, "sleep 1000 & sleep 1000")).await;
    let up = cluster.wait(job, "the rank runs", running).await;
    let status = std::fs::read_to_string(cluster.rank_dir(1, "j1.a1.r0").join("status.json")).unwrap();
    let shim = status.split_once("\"shim\":{\"pid\":").unwrap().1;
    let shim: u32 = shim[..shim.find(',').unwrap()].parse().unwrap();
    kill(shim);
    let done = cluster.wait_state(job, JobState::Failed).await;
    assert!(done.reason.contains("rank 0 on n1 ended: its shim was killed"), "{}", done.reason);
    let pid = up.attempts[0].ranks[0].pid;
    until("nothing of the rank is left", async || (!alive(pid)).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_agent_per_folder() {
    let cluster = Cluster::start(quick(), &[1]).await;
    let config = firefly_agent::AgentConfig::new(
        firefly_types::NodeId(7),
        cluster.addr.to_string(),
        cluster.agent_dir(1),
        cluster.secret.clone(),
    );
    let result = firefly_agent::serve(config, tokio_util::sync::CancellationToken::new()).await;
    let error = result.expect_err("the folder is taken");
    assert_eq!(error.kind(), firefly_types::ErrorKind::Busy);
    let _ = PATIENCE;
}
