//! A small cluster of real processes: a scheduler in this process (or one of its own, to be
//! killed), agents as processes, shims and ranks below them.

#![allow(dead_code, reason = "each test file uses its part")]

use firefly_proto::auth::AddToken;
use firefly_proto::scheduler as wire;
use firefly_proto::scheduler::scheduler_client::SchedulerClient;
use firefly_types::ClusterSecret;
use scheduler_server::{Policy, Running, SchedulerConfig};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;

/// Nothing here takes long; a test that hangs must end all the same.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) type Client = SchedulerClient<InterceptedService<Channel, AddToken>>;

pub(crate) struct Cluster {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) secret: ClusterSecret,
    pub(crate) policy: Policy,
    pub(crate) addr: SocketAddr,
    scheduler: Option<(CancellationToken, Running)>,
    agents: Vec<(u32, Child)>,
}

pub(crate) fn quick() -> Policy {
    Policy { restart_first_ms: 50, ..Policy::default() }
}

impl Cluster {
    /// A scheduler and agents n1.. with these slots.
    pub(crate) async fn start(policy: Policy, slots: &[u32]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let secret = ClusterSecret::generate();
        std::fs::write(dir.path().join("secret"), secret.to_hex()).unwrap();
        let addr = "127.0.0.1:0".parse().unwrap();
        let mut cluster = Self { dir, secret, policy, addr, scheduler: None, agents: Vec::new() };
        cluster.start_scheduler().await;
        for (i, slots) in slots.iter().enumerate() {
            cluster.start_agent(u32::try_from(i).unwrap() + 1, *slots, None);
        }
        cluster.nodes_ready(slots.len()).await;
        cluster
    }

    pub(crate) fn config(&self) -> SchedulerConfig {
        let mut config =
            SchedulerConfig::new(self.addr, self.dir.path().join("scheduler"), self.secret.clone());
        config.policy = self.policy.clone();
        config
    }

    pub(crate) async fn start_scheduler(&mut self) {
        let stop = CancellationToken::new();
        let running = scheduler_server::serve(self.config(), stop.clone()).await.unwrap();
        self.addr = running.addr;
        self.scheduler = Some((stop, running));
    }

    pub(crate) async fn stop_scheduler(&mut self) {
        let (stop, running) = self.scheduler.take().unwrap();
        stop.cancel();
        tokio::time::timeout(PATIENCE, running.wait()).await.expect("the scheduler ends when told");
    }

    pub(crate) fn agent_dir(&self, node: u32) -> PathBuf {
        self.dir.path().join(format!("agent{node}"))
    }

    pub(crate) fn rank_dir(&self, node: u32, key: &str) -> PathBuf {
        self.agent_dir(node).join("ranks").join(key)
    }

    /// `wait_for`: the agent's shims hold back until this file exists.
    pub(crate) fn start_agent(&mut self, node: u32, slots: u32, wait_for: Option<&Path>) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join(format!("agent{node}.log")))
            .unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_firefly-agent"));
        command
            .args([node.to_string(), self.addr.to_string()])
            .arg(self.agent_dir(node))
            .arg(self.dir.path().join("secret"))
            .arg(slots.to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        if let Some(file) = wait_for {
            command.env("FIREFLY_TEST_SHIM_WAITS_FOR", file);
        }
        self.agents.push((node, command.spawn().unwrap()));
    }

    /// SIGKILL.
    pub(crate) fn kill_agent(&mut self, node: u32) {
        let at = self.agents.iter().position(|(n, _)| *n == node).unwrap();
        let (_, mut child) = self.agents.remove(at);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub(crate) async fn client(&self) -> Client {
        self.client_with(&self.secret).await
    }

    pub(crate) async fn client_with(&self, secret: &ClusterSecret) -> Client {
        let channel = Channel::from_shared(format!("http://{}", self.addr)).unwrap().connect_lazy();
        SchedulerClient::with_interceptor(channel, AddToken::new(secret))
    }

    pub(crate) async fn nodes_ready(&self, count: usize) {
        let mut client = self.client().await;
        until("nodes are ready", async || {
            let nodes = client.list_nodes(wire::ListNodesRequest {}).await.ok()?.into_inner().nodes;
            (nodes.iter().filter(|n| n.state == "ready").count() == count).then_some(())
        })
        .await;
    }

    pub(crate) async fn submit(&self, spec: wire::JobSpec) -> u64 {
        let request = wire::SubmitRequest { spec: Some(spec), idempotency_key: String::new() };
        self.client().await.submit(request).await.unwrap().into_inner().job_id
    }

    /// The job, once it is as wanted.
    pub(crate) async fn wait(&self, job: u64, what: &str, wanted: impl Fn(&wire::Job) -> bool) -> wire::Job {
        let mut last = None;
        let watch = async {
            loop {
                let request = wire::WatchJobRequest { job: job.to_string(), known_version: 0 };
                let Ok(stream) = self.client().await.watch_job(request).await else {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                };
                let mut stream = stream.into_inner();
                while let Some(Ok(job)) = stream.next().await {
                    if wanted(&job) {
                        return job;
                    }
                    last = Some(job);
                }
            }
        };
        match tokio::time::timeout(PATIENCE, watch).await {
            Ok(job) => job,
            Err(_) => panic!("j{job} never was: {what}; last seen {last:?}; {}", self.agent_logs()),
        }
    }

    pub(crate) async fn wait_state(&self, job: u64, state: wire::JobState) -> wire::Job {
        self.wait(job, state.as_str_name(), |j| j.state() == state).await
    }

    /// All lines that the job's ranks wrote, as "rank: line", by following to the end.
    pub(crate) async fn lines(&self, job: u64) -> Vec<String> {
        let request = wire::LogsRequest { job: job.to_string(), follow: true, rank: None, tail: 0 };
        let mut stream = self.client().await.logs(request).await.unwrap().into_inner();
        let read = async {
            let mut lines = Vec::new();
            while let Some(chunk) = stream.next().await {
                let chunk = chunk.unwrap();
                if !chunk.is_system {
                    lines.push(format!("{}: {}", chunk.rank, String::from_utf8_lossy(&chunk.line)));
                }
            }
            lines
        };
        tokio::time::timeout(PATIENCE, read).await.expect("a followed log ends with its job")
    }

    pub(crate) fn agent_logs(&self) -> String {
        let mut text = String::new();
        for entry in std::fs::read_dir(self.dir.path()).unwrap().flatten() {
            if entry.path().extension().is_some_and(|e| e == "log") {
                text += &format!("\n{:?}:\n", entry.file_name());
                text += &std::fs::read_to_string(entry.path()).unwrap_or_default();
            }
        }
        text
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Shims outlive their agents on purpose: tell each to end.
        for (node, child) in &mut self.agents {
            let _ = node;
            let _ = child.kill();
            let _ = child.wait();
        }
        for node in 1..=4 {
            let Ok(ranks) = std::fs::read_dir(self.agent_dir(node).join("ranks")) else { continue };
            for rank in ranks.flatten() {
                let _ = std::fs::write(rank.path().join("stop.json"), r#"{"grace_ms":0}"#);
            }
        }
        // They look at least four times a second; their folder must not go before.
        for _ in 0..100 {
            let busy = (1..=4).any(|n| {
                std::fs::read_dir(self.agent_dir(n).join("ranks")).is_ok_and(|ranks| {
                    ranks.flatten().any(|r| {
                        let status =
                            std::fs::read_to_string(r.path().join("status.json")).unwrap_or_default();
                        !status.is_empty() && !status.contains("exited")
                    })
                })
            });
            if !busy {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Looks until there is a result.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let looking = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, looking).await.unwrap_or_else(|_| panic!("it never came that {what}"))
}

/// A job of `nodes` nodes that runs a shell script.
pub(crate) fn script(nodes: u32, each: u32, text: &str) -> wire::JobSpec {
    wire::JobSpec {
        name: "test".into(),
        command: vec!["sh".into(), "-c".into(), text.into()],
        nodes,
        ranks_per_node: each,
        grace_ms: 2_000,
        working_directory: "/".into(),
        ..wire::JobSpec::default()
    }
}

/// Whether a process exists and is not a zombie.
pub(crate) fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z')))
}

/// SIGKILL to a process that this test started (through an agent).
pub(crate) fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

pub(crate) fn running(job: &wire::Job) -> bool {
    job.attempts.last().is_some_and(|a| a.ranks.iter().all(|r| r.state == "running" && r.pid > 0))
}
