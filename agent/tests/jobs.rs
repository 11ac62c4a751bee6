//! Jobs on a small cluster of real processes.

mod support;

use firefly_proto::scheduler as wire;
use firefly_types::ClusterSecret;
use support::{Cluster, alive, kill, quick, running, script, until};
use wire::JobState;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_ranks_run_behind_a_barrier_and_their_lines_arrive() {
    let cluster = Cluster::start(quick(), &[2, 2]).await;
    // Each rank looks, first of all, whether the other one has been prepared.
    let text = format!(
        "test -s {}/status.json && test -s {}/status.json && echo all-prepared
         echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE group $GROUP_RANK at $MASTER_ADDR
         echo port $MASTER_PORT; echo to-stderr >&2; echo secret ${{#FIREFLY_JOB_SECRET}}",
        cluster.rank_dir(1, "j1.a1.r0").display(),
        cluster.rank_dir(2, "j1.a1.r1").display()
    );
    let job = cluster.submit(script(2, 1, &text)).await;
    let lines = cluster.lines(job).await;
    let done = cluster.wait_state(job, JobState::Succeeded).await;
    assert_eq!((done.epoch, done.restarts), (1, 0));
    for rank in 0..2 {
        for line in [
            "all-prepared".to_owned(),
            format!("{rank}/2 0/1 group {rank} at 127.0.0.1"),
            "to-stderr".to_owned(),
            "secret 64".to_owned(),
        ] {
            assert!(lines.contains(&format!("{rank}: {line}")), "{line:?} is missing in {lines:#?}");
        }
    }
    let ports: Vec<_> = lines.iter().filter_map(|l| l.split_once("port ")?.1.parse::<u16>().ok()).collect();
    assert!(ports.len() == 2 && ports[0] == ports[1] && ports[0] >= 20_000, "{ports:?}");
    assert_eq!(lines.len(), 10, "{lines:#?}");
    // What the scheduler has recorded leaves the nodes.
    until("the ranks' folders are removed", async || {
        (1..=2)
            .all(|n| std::fs::read_dir(cluster.agent_dir(n).join("ranks")).unwrap().count() == 0)
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_starts_while_one_rank_is_not_prepared() {
    let mut cluster = Cluster::start(quick(), &[1]).await;
    let go = cluster.dir.path().join("go");
    cluster.start_agent(2, 1, Some(&go));
    cluster.nodes_ready(2).await;
    let started = cluster.dir.path().join("started");
    let text = format!("test -e {} || echo too-early; echo > {}.$RANK", go.display(), started.display());
    let job = cluster.submit(script(2, 1, &text)).await;
    let held = cluster
        .wait(job, "rank 0 is held", |j| j.attempts.last().is_some_and(|a| a.ranks[0].state == "held"))
        .await;
    assert_eq!(held.state(), JobState::Starting);
    let why = cluster.client().await.why_job(wire::GetJobRequest { job: job.to_string() }).await.unwrap();
    assert!(why.into_inner().lines.join("\n").contains("rank 1 on n2 is not ready yet"));
    assert!(!started.with_extension("0").exists());
    std::fs::write(&go, "").unwrap();
    assert_eq!(cluster.lines(job).await, Vec::<String>::new());
    cluster.wait_state(job, JobState::Succeeded).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_rank_is_named_and_the_job_runs_again() {
    let cluster = Cluster::start(quick(), &[1, 1]).await;
    let text = "if [ $FIREFLY_EPOCH = 1 ]; then echo first; exec sleep 1000; fi
                echo second with restart count $TORCHELASTIC_RESTART_COUNT";
    let job = cluster.submit(wire::JobSpec { max_restarts: 1, ..script(2, 1, text) }).await;
    let up = cluster.wait(job, "both ranks run", running).await;
    let (other, victim) = (up.attempts[0].ranks[0].pid, up.attempts[0].ranks[1].pid);
    kill(victim);
    let done = cluster.wait_state(job, JobState::Succeeded).await;
    assert_eq!((done.epoch, done.restarts), (2, 1));
    assert_eq!(done.attempts[0].end_reason, "rank 1 on n2 was ended by signal 9 (SIGKILL)");
    assert!(!alive(other), "the whole attempt was ended");
    let lines = cluster.lines(job).await;
    for rank in 0..2 {
        assert!(lines.contains(&format!("{rank}: second with restart count 1")), "{lines:#?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failure_ends_with_the_reason_and_the_whole_family_is_gone() {
    let cluster = Cluster::start(quick(), &[2]).await;
    let pids = cluster.dir.path().join("pids");
    // Rank 0 leaves a child in a session of its own and waits; rank 1 fails.
    let text = format!(
        "if [ $RANK = 0 ]; then setsid sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; sleep 1000; fi
         until [ -e {0} ]; do sleep 0.02; done; echo broken >&2; exit 3",
        pids.display()
    );
    let job = cluster.submit(script(1, 2, &text)).await;
    let done = cluster.wait_state(job, JobState::Failed).await;
    assert_eq!(done.reason, "rank 1 on n1 exited with code 3");
    let child: u32 = std::fs::read_to_string(&pids).unwrap().trim().parse().unwrap();
    assert!(!alive(child), "a descendant outlived its rank");
    assert_eq!(cluster.lines(job).await, ["1: broken"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_gives_grace_and_then_ends_it() {
    let cluster = Cluster::start(quick(), &[2]).await;
    let text = "trap 'echo saving; exit 0' TERM; if [ $RANK = 1 ]; then trap '' TERM; fi
                echo up; while :; do sleep 0.05; done";
    let job = cluster.submit(wire::JobSpec { grace_ms: 700, ..script(1, 2, text) }).await;
    cluster.wait(job, "both ranks run", running).await;
    until("both have set their traps", async || {
        let request = wire::LogsRequest { job: job.to_string(), follow: false, rank: None, tail: 0 };
        let mut stream = cluster.client().await.logs(request).await.ok()?.into_inner();
        let mut up = 0;
        while let Some(chunk) = tokio_stream::StreamExt::next(&mut stream).await {
            up += usize::from(chunk.ok()?.line == b"up");
        }
        (up == 2).then_some(())
    })
    .await;
    let request = wire::StopJobRequest { job: "test".into(), reason: "enough".into() };
    cluster.client().await.stop_job(request).await.unwrap();
    let done = cluster.wait_state(job, JobState::Stopped).await;
    assert_eq!(done.reason, "enough");
    let ranks = &done.attempts[0].ranks;
    assert_eq!((ranks[0].exit_code, ranks[1].signal), (Some(0), Some(9)), "{ranks:?}");
    assert!(cluster.lines(job).await.contains(&"0: saving".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_make_no_sense_are_refused_with_words() {
    let cluster = Cluster::start(quick(), &[1]).await;
    let mut client = cluster.client().await;
    let mut submit = async |spec| {
        let request = wire::SubmitRequest { spec, idempotency_key: String::new() };
        client.submit(request).await.unwrap_err()
    };
    for bad in [
        None,
        Some(script(0, 1, "true")),
        Some(script(1, 0, "true")),
        Some(script(u32::MAX, u32::MAX, "true")),
        Some(wire::JobSpec { command: vec![], ..script(1, 1, "") }),
    ] {
        let status = submit(bad.clone()).await;
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{bad:?}");
        assert!(!status.message().is_empty());
    }
    let status = client.get_job(wire::GetJobRequest { job: "j99".into() }).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::NotFound);
    assert!(status.message().contains("j99"), "{}", status.message());
    let mut stranger = cluster.client_with(&ClusterSecret::generate()).await;
    let status = stranger.list_nodes(wire::ListNodesRequest {}).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unauthenticated);
    // More than there is waits, and says for what.
    let job = cluster.submit(script(3, 1, "true")).await;
    let why = client.why_job(wire::GetJobRequest { job: job.to_string() }).await.unwrap().into_inner();
    assert!(why.lines.join("\n").contains("2 more with at least 1 slots are needed"), "{why:?}");
    // The same key is the same job.
    let request = || wire::SubmitRequest { spec: Some(script(1, 1, "true")), idempotency_key: "once".into() };
    let first = client.submit(request()).await.unwrap().into_inner().job_id;
    assert_eq!(client.submit(request()).await.unwrap().into_inner().job_id, first);
    // A command that does not exist.
    let missing = wire::JobSpec { command: vec!["/no/such/program".into()], ..script(1, 1, "") };
    let job = cluster.submit(missing).await;
    let done = cluster.wait_state(job, JobState::Failed).await;
    assert!(done.reason.contains("exited with code 127: cannot run \"/no/such/program\""), "{}", done.reason);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rank_runs_as_its_user_without_new_privileges() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("needs root to change the user: nothing to see here");
        return;
    }
    let cluster = Cluster::start(quick(), &[1]).await;
    // The test's own folder is private: let the other user through to the status folder.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    std::fs::set_permissions(cluster.dir.path(), open).unwrap();
    let text =
        "id -u; id -g; grep NoNewPrivs /proc/self/status; echo mine > $FIREFLY_STATUS/file && echo written
                cat /proc/$PPID/environ 2>&1 >/dev/null | grep -c denied";
    let spec = wire::JobSpec { user: "nobody".into(), uid: 65_534, gid: 65_534, ..script(1, 1, text) };
    let job = cluster.submit(spec).await;
    let lines = cluster.lines(job).await;
    assert_eq!(lines, ["0: 65534", "0: 65534", "0: NoNewPrivs:\t1", "0: written", "0: 1"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn much_output_arrives_whole_and_in_order() {
    let cluster = Cluster::start(quick(), &[1]).await;
    let job = cluster.submit(script(1, 1, "seq 1 200000")).await;
    let lines = cluster.lines(job).await;
    assert_eq!(lines.len(), 200_000);
    assert!(lines.iter().enumerate().all(|(i, l)| *l == format!("0: {}", i + 1)));
}
