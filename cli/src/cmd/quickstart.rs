//! `ff quickstart`: the whole stack on this machine, seen working and seen failing.
//!
//! The run is a script of steps over one event loop: follow the job's log, and at marks in the log
//! do the next fault. Whatever ends it (success, error, Ctrl-C) goes through one clean-up.

use crate::cmd::status::{ChainHealth, table};
use crate::connect::{Authenticated, routing, sentence};
use crate::context::{Context, Global};
use crate::digits;
use crate::local::{DEFAULT_PORT_BASE, LocalCluster, Shape};
use crate::mount::MountProcess;
use crate::native_train::{CHECKPOINT_PREFIX, RESULT_PREFIX, TrainResult};
use crate::probe::Probe;
use anyhow::{Context as _, Result, bail};
use firefly_proto::mgmtd::manager_client::ManagerClient;
use firefly_proto::mgmtd::{GetRoutingRequest, PublicState, RoutingTable};
use firefly_proto::scheduler::scheduler_client::SchedulerClient;
use firefly_proto::scheduler::{GetJobRequest, Job, JobSpec, JobState, LogChunk, LogsRequest, SubmitRequest};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Ranks of the training job, one on each of the two agents.
const RANKS: u32 = 2;
/// The rank that is ended in mid-run: not rank 0, whose log the person is reading.
const VICTIM_RANK: u32 = 1;
/// The storage server that is ended in mid-run.
const VICTIM_SERVER: u32 = 4;
/// Accuracy below which the run has failed its purpose.
const ACCURACY_WANTED: f64 = 0.95;

/// See the whole stack work, and survive faults, on this machine
///
/// Starts a cluster (1 manager, 1 metadata server, 3 storage servers with 2 copies of everything,
/// 1 scheduler, 2 agents), mounts its file system, puts the handwritten digits on it, and submits
/// a training job of two ranks that reads its samples through the mount and sums its gradients
/// over our collectives. In mid-run it ends one rank and one storage server with SIGKILL and shows
/// what happens. Ends with a table. Ctrl-C cleans up at any time.
#[derive(clap::Args, Clone, Debug)]
pub struct QuickstartArgs {
    /// Train a small built-in model instead of PyTorch's: needs no Python
    #[arg(long)]
    pub native: bool,
    /// Leave the cluster and the mount running at the end, to look around
    #[arg(long)]
    pub keep: bool,
    /// Do not end anything in mid-run
    #[arg(long)]
    pub no_faults: bool,
    /// First of the ports used on 127.0.0.1; 0 lets the kernel choose
    #[arg(long, default_value_t = DEFAULT_PORT_BASE, value_name = "PORT")]
    pub port_base: u16,
    /// Python with torch and firefly [default: the project's .venv, then python3]
    #[arg(long, value_name = "FILE")]
    pub python: Option<PathBuf>,
    /// scikit-learn's digits.csv.gz, for --native [default: the copy that `make` fetched]
    #[arg(long, value_name = "FILE")]
    pub digits: Option<PathBuf>,
    /// Passes over the training samples [default: enough for about 20 seconds]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub epochs: Option<u32>,
}

/// Runs `ff quickstart`.
pub async fn run(args: &QuickstartArgs, global: &Global) -> Result<()> {
    let state = match &global.state {
        Some(dir) => std::path::absolute(dir)?,
        None => global.state_dir()?.with_file_name("firefly-quickstart"),
    };
    let mut show = Show { started: Instant::now(), colour: std::io::stdout().is_terminal() };
    let plan = Plan::check(args, &state)?;
    show.line(&format!(
        "Firefly quickstart{}; state in {}",
        if args.native { " (native)" } else { "" },
        state.display()
    ));

    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut stage = Stage { cluster: LocalCluster::at(&state), mount: None };
    let outcome = tokio::select! {
        outcome = play(args, &plan, &mut stage, &mut show) => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        _ = terminated.recv() => Err(anyhow::anyhow!("ended by SIGTERM")),
    };
    match (outcome, args.keep) {
        (Ok(()), true) => {
            show.step("left running");
            show.line(&format!(
                "  try:  ff --state {0} status;  ls {1};  ff --state {0} job ls",
                state.display(),
                stage.mountpoint().display()
            ));
            show.line(&format!("  end:  ff --state {} down", state.display()));
            if let Some(mount) = stage.mount.take() {
                mount.leave_running();
            }
            Ok(())
        }
        (outcome, _) => {
            show.step("cleaning up");
            // Ranks outlive their agents: they are ended first, while somebody can still ask them to.
            let stopped = super::up::stop_jobs(&stage.cluster, "the quickstart ends").await.map(|_| ());
            let cleaned = stage.clean_up().and(stopped);
            if outcome.is_ok() {
                show.line(&format!(
                    "  stopped and unmounted; logs stay in {}",
                    stage.cluster.logs().display()
                ));
                show.line("  next:  ff quickstart --keep   leaves it running;   ff up   starts a cluster to work with");
            }
            outcome.and(cleaned)
        }
    }
}

/// What was found out before anything starts.
struct Plan {
    /// The interpreter, unless native.
    python: Option<PathBuf>,
    /// The digits, if native.
    digits: Option<PathBuf>,
    ff: PathBuf,
}

impl Plan {
    /// Refuses, in one clear line, what would only fail later. Starts nothing; removes the remains
    /// of an earlier quickstart, and only of a quickstart.
    fn check(args: &QuickstartArgs, state: &Path) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!(
                "the quickstart mounts a file system and needs root: run it with sudo, or in a container of your own"
            );
        }
        if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/fuse") {
            bail!(
                "/dev/fuse cannot be used ({error}): load the module (modprobe fuse), or give the container the device (--device /dev/fuse)"
            );
        }
        let ff = std::env::current_exe().context("cannot find this program's own file")?;
        let (python, digits) = if args.native {
            (None, Some(find_digits(args.digits.as_deref(), &ff)?))
        } else {
            (Some(find_python(args.python.as_deref(), &ff)?), None)
        };
        let marker = state.join("quickstart");
        if marker.exists() {
            let cluster = LocalCluster::at(state);
            cluster.unmount_all()?;
            cluster.stop(Duration::from_secs(5), |_| ())?;
            std::fs::remove_dir_all(state)
                .with_context(|| format!("cannot remove the earlier quickstart in {}", state.display()))?;
        } else if state.exists() && std::fs::read_dir(state)?.next().is_some() {
            bail!(
                "{} is in use and not by a quickstart: choose another folder with --state",
                state.display()
            );
        }
        Ok(Self { python, digits, ff })
    }
}

/// What runs, so that one clean-up ends it.
struct Stage {
    cluster: LocalCluster,
    mount: Option<MountProcess>,
}

impl Stage {
    fn mountpoint(&self) -> PathBuf {
        self.cluster.state().join("mnt")
    }

    fn clean_up(&mut self) -> Result<()> {
        if let Some(mount) = self.mount.take() {
            mount.unmount()?;
        }
        if self.cluster.exists() {
            self.cluster.stop(Duration::from_secs(5), |_| ())?;
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.mount.is_some() {
            let _ = self.clean_up();
        }
    }
}

/// What people see.
struct Show {
    started: Instant,
    colour: bool,
}

impl Show {
    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn step(&mut self, text: &str) {
        let at = format!("[{:5.1} s]", self.started.elapsed().as_secs_f64());
        println!("{} {}", self.paint("2", &at), self.paint("1;36", text));
    }

    fn fault(&mut self, text: &str) {
        let at = format!("[{:5.1} s]", self.started.elapsed().as_secs_f64());
        println!("{} {}", self.paint("2", &at), self.paint("1;33", text));
    }

    fn line(&mut self, text: &str) {
        println!("{text}");
    }

    fn log(&mut self, chunk: &LogChunk) {
        let text = String::from_utf8_lossy(&chunk.line);
        let text = text.trim_end();
        if chunk.is_system {
            println!("  {}", self.paint("33", &format!("-- {text}")));
        } else {
            println!("  {} {text}", self.paint("2", &format!("rank {} |", chunk.rank)));
        }
    }
}

/// Where the script of faults stands.
#[derive(PartialEq, Eq, Debug)]
enum Act {
    AwaitFirstCheckpoint,
    AwaitComeback,
    AwaitCheckpointWithoutServer,
    Done,
}

/// Figures for the closing table.
#[derive(Default)]
struct Figures {
    result: Option<TrainResult>,
    submit_to_running: Option<Duration>,
    longest_read: Duration,
    longest_write: Duration,
    probe_operations: u64,
    fail_over: Option<Duration>,
    healed_in: Option<Duration>,
    restart_reason: String,
}

async fn play(args: &QuickstartArgs, plan: &Plan, stage: &mut Stage, show: &mut Show) -> Result<()> {
    show.step("starting the cluster, every role its own process");
    stage.cluster.create(&Shape { port_base: args.port_base, ..Shape::default() })?;
    std::fs::write(
        stage.cluster.state().join("quickstart"),
        "made by `ff quickstart`; removed by its next run\n",
    )?;
    stage.cluster.start(&plan.ff, |r| {
        println!("  {:<12} pid {:<8} {}", r.name, r.pid, r.address);
    })?;
    let context = stage.cluster.context()?;
    let mut manager = context.manager().await?;
    let routing = wait_whole(&mut manager, Duration::from_secs(60)).await?;
    show.line(&format!(
        "  {} chains of {} copies over 3 storage servers, all serving",
        routing.chains.len(),
        routing.replication
    ));

    let mountpoint = stage.mountpoint();
    show.step(&format!("mounting fs3 on {}", mountpoint.display()));
    stage.mount = Some(MountProcess::start(&plan.ff, stage.cluster.state(), &mountpoint)?);

    show.step("putting the data set on it: 1,797 handwritten digits, a file each and one packed array");
    let data = mountpoint.join("digits");
    let checkpoints = mountpoint.join("checkpoints");
    std::fs::create_dir_all(&checkpoints)?;
    put_data(plan, &data, show)?;

    show.step(&format!("submitting a training job of {RANKS} ranks on 2 nodes"));
    let mut scheduler = context.scheduler().await?;
    let mut figures = Figures::default();
    let job_id = submit(args, plan, &mut scheduler, &data, &checkpoints).await?;
    follow(args, plan, stage, show, &context, &mut figures, job_id).await?;

    closing_table(stage, show, &mut scheduler, job_id, figures).await
}

/// Copies the digits onto the mount.
fn put_data(plan: &Plan, data: &Path, show: &mut Show) -> Result<()> {
    let before = Instant::now();
    if let Some(source) = &plan.digits {
        let samples = digits::parse_csv_gz(source)?;
        let bar = progress_bar(samples.len() as u64);
        digits::write(&samples, data, |done| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        show.line(&format!("  {} samples in {:.1} s", samples.len(), before.elapsed().as_secs_f64()));
    } else if let Some(python) = &plan.python {
        let status = Command::new(python)
            .args(["-m", "firefly.examples.prepare_digits", "--out"])
            .arg(data)
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("cannot run {}", python.display()))?;
        if !status.success() {
            bail!("preparing the digits failed ({status})");
        }
        show.line(&format!("  done in {:.1} s", before.elapsed().as_secs_f64()));
    }
    Ok(())
}

fn progress_bar(length: u64) -> indicatif::ProgressBar {
    // indicatif draws nothing where stderr is no terminal.
    let bar = indicatif::ProgressBar::new(length);
    if let Ok(style) = indicatif::ProgressStyle::with_template("  {bar:40} {pos}/{len} files  {per_sec}") {
        bar.set_style(style);
    }
    bar
}

async fn submit(
    args: &QuickstartArgs,
    plan: &Plan,
    scheduler: &mut SchedulerClient<Authenticated>,
    data: &Path,
    checkpoints: &Path,
) -> Result<u64> {
    let text = |p: &Path| p.to_str().map(str::to_owned).context("the state folder's name is not UTF-8");
    let mut command = match &plan.python {
        Some(python) => vec![text(python)?, "-m".into(), "firefly.examples.digits_ddp".into()],
        None => vec![text(&plan.ff)?, "native-train".into()],
    };
    command.extend(["--data".into(), text(data)?, "--checkpoint".into(), text(checkpoints)?]);
    if let Some(epochs) = args.epochs {
        command.extend(["--epochs".into(), epochs.to_string()]);
    }
    let spec = JobSpec {
        name: "digits".into(),
        command,
        // Two ranks share two cores: more threads each would only get in each other's way.
        env: [
            ("OMP_NUM_THREADS".to_owned(), "1".to_owned()),
            ("PYTHONUNBUFFERED".to_owned(), "1".to_owned()),
        ]
        .into(),
        working_directory: "/".into(),
        nodes: RANKS,
        ranks_per_node: 1,
        max_restarts: 3,
        user: "root".into(),
        grace_ms: 5_000,
        ..JobSpec::default()
    };
    let key = format!("quickstart-{:016x}", rand::random::<u64>());
    let reply = scheduler
        .submit(SubmitRequest { spec: Some(spec), idempotency_key: key })
        .await
        .map_err(|s| sentence(&s))?
        .into_inner();
    Ok(reply.job_id)
}

/// Follows the job to its end and does the faults on the way.
async fn follow(
    args: &QuickstartArgs,
    plan: &Plan,
    stage: &Stage,
    show: &mut Show,
    context: &Context,
    figures: &mut Figures,
    job_id: u64,
) -> Result<()> {
    let mut scheduler = context.scheduler().await?;
    let mut manager = context.manager().await?;
    let routing = routing(&mut manager).await?;
    let probe = Probe::start(
        &stage.mountpoint().join(".probe"),
        routing.stripe_chains.len().max(1),
        u64::from(routing.chunk_bytes),
    )?;
    let mut act = if args.no_faults { Act::Done } else { Act::AwaitFirstCheckpoint };
    let mut healing: Option<tokio::task::JoinHandle<Result<Duration>>> = None;
    let mut server_killed_at = None;
    let mut logs = scheduler
        .clone()
        .logs(LogsRequest { job: job_id.to_string(), follow: true, rank: None, tail: 0 })
        .await
        .map_err(|s| sentence(&s))?
        .into_inner();

    while let Some(chunk) = logs.message().await.map_err(|s| sentence(&s))? {
        let text = String::from_utf8_lossy(&chunk.line).trim_end().to_owned();
        if text.starts_with(RESULT_PREFIX) && !chunk.is_system {
            figures.result = Some(serde_json::from_str(&text).context("the job's result line is malformed")?);
            continue;
        }
        show.log(&chunk);
        let is_checkpoint = !chunk.is_system && text.starts_with(CHECKPOINT_PREFIX);
        if !is_checkpoint {
            continue;
        }
        match act {
            Act::AwaitFirstCheckpoint => {
                let job = get_job(&mut scheduler, job_id).await?;
                let pid = kill_rank(&job, VICTIM_RANK)?;
                show.fault(&format!(
                    "SIGKILL to rank {VICTIM_RANK} (pid {pid}): the job must come back by itself"
                ));
                act = Act::AwaitComeback;
            }
            Act::AwaitComeback if chunk.epoch > 1 => {
                let job = get_job(&mut scheduler, job_id).await?;
                figures.restart_reason =
                    job.attempts.first().map(|a| a.end_reason.clone()).unwrap_or_default();
                show.step(&format!(
                    "the job is back as attempt {}; reason: {}",
                    chunk.epoch, figures.restart_reason
                ));
                probe.reset();
                server_killed_at = Some(Instant::now());
                stage.cluster.kill_role(&format!("storage-{VICTIM_SERVER}"))?;
                show.fault(&format!(
                    "SIGKILL to storage server n{VICTIM_SERVER}: reads and writes must go on"
                ));
                act = Act::AwaitCheckpointWithoutServer;
            }
            Act::AwaitCheckpointWithoutServer => {
                let table = crate::connect::routing(&mut manager).await?;
                if serves(&table, VICTIM_SERVER) {
                    // The manager has not taken it out yet; the next checkpoint will see it.
                    continue;
                }
                figures.fail_over = server_killed_at.map(|at| at.elapsed());
                let seen = probe.seen();
                figures.longest_read = seen.longest_read;
                figures.longest_write = seen.longest_write;
                let health = ChainHealth::of(&table);
                show.step(&format!(
                    "n{VICTIM_SERVER} is out: {} chains go on with one copy, {} are whole; longest pause: read {:.2} s, write {:.2} s",
                    health.degraded,
                    health.whole,
                    seen.longest_read.as_secs_f64(),
                    seen.longest_write.as_secs_f64()
                ));
                show.line("  degraded mode: those chains have a single copy until they have healed; losing that one too");
                show.line("  in this time would lose data (with min_write_replicas = 2 they would refuse writes instead)");
                show.fault(&format!(
                    "starting n{VICTIM_SERVER} again: it comes back empty and is filled from the other copies"
                ));
                stage.cluster.start_role(&plan.ff, &format!("storage-{VICTIM_SERVER}"))?;
                let mut manager = context.manager().await?;
                healing = Some(tokio::spawn(async move {
                    let started = Instant::now();
                    wait_whole(&mut manager, Duration::from_secs(120)).await?;
                    Ok(started.elapsed())
                }));
                act = Act::Done;
            }
            _ => {}
        }
    }
    if let Some(healing) = healing {
        let took = healing.await??;
        figures.healed_in = Some(took);
        show.step(&format!(
            "all chains are whole again, {:.1} s after the server's return",
            took.as_secs_f64()
        ));
    }
    let seen = probe.stop();
    figures.probe_operations = seen.operations;
    if seen.failures > 0 {
        bail!("{} of the probe's reads and writes failed; the last: {}", seen.failures, seen.last_failure);
    }
    let job = get_job(&mut scheduler, job_id).await?;
    if job.state() != JobState::Succeeded {
        bail!("the job ended as {}: {}", job.state().as_str_name(), job.reason);
    }
    if act != Act::Done {
        bail!("the job ended before every fault was shown (at {act:?}): give it more --epochs");
    }
    if let Some(first) = job.attempts.first().filter(|a| a.running_unix_ms >= job.submitted_unix_ms) {
        figures.submit_to_running =
            Some(Duration::from_millis(first.running_unix_ms - job.submitted_unix_ms));
    }
    Ok(())
}

async fn get_job(scheduler: &mut SchedulerClient<Authenticated>, job_id: u64) -> Result<Job> {
    let request = GetJobRequest { job: job_id.to_string() };
    Ok(scheduler.get_job(request).await.map_err(|s| sentence(&s))?.into_inner())
}

/// Ends one rank of the job's present attempt as a crash would. Returns its pid.
fn kill_rank(job: &Job, rank: u32) -> Result<u32> {
    let status = job
        .attempts
        .last()
        .and_then(|attempt| attempt.ranks.iter().find(|r| r.rank == rank))
        .filter(|r| r.pid > 1)
        .with_context(|| format!("the scheduler does not know the pid of rank {rank}"))?;
    // SAFETY: kill takes no pointers; the pid is one that our own agent reported a moment ago.
    if unsafe { libc::kill(status.pid as i32, libc::SIGKILL) } != 0 {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("cannot end rank {rank} (pid {})", status.pid));
    }
    Ok(status.pid)
}

/// Whether any target of `node` serves.
fn serves(table: &RoutingTable, node: u32) -> bool {
    table.targets.iter().any(|t| t.node_id == node && t.state == PublicState::Serving as i32)
}

/// Waits until every chain has all its copies.
async fn wait_whole(manager: &mut ManagerClient<Authenticated>, within: Duration) -> Result<RoutingTable> {
    let started = Instant::now();
    let mut known = 0;
    loop {
        let request = GetRoutingRequest { known_version: known, wait_ms: if known == 0 { 0 } else { 1_000 } };
        let table = manager.get_routing(request).await.map_err(|s| sentence(&s))?.into_inner();
        if ChainHealth::of(&table).is_whole() {
            return Ok(table);
        }
        if started.elapsed() > within {
            let health = ChainHealth::of(&table);
            bail!(
                "{} chains degraded and {} down after {} s: see the logs",
                health.degraded,
                health.down,
                within.as_secs()
            );
        }
        known = table.version;
    }
}

async fn closing_table(
    stage: &Stage,
    show: &mut Show,
    scheduler: &mut SchedulerClient<Authenticated>,
    job_id: u64,
    figures: Figures,
) -> Result<()> {
    let result = figures.result.context("the job ended without its result line")?;
    let job = get_job(scheduler, job_id).await?;
    let io = crate::mount::stats(&stage.mountpoint())?;
    let mut rows = table(&["what", "value"]);
    rows.add_row([
        "accuracy on held-out digits",
        &format!("{:.2} %  (wanted: at least {:.0} %)", 100.0 * result.accuracy, 100.0 * ACCURACY_WANTED),
    ]);
    rows.add_row(["training steps", &result.steps.to_string()]);
    rows.add_row([
        "restarts",
        &match figures.restart_reason.as_str() {
            "" => job.restarts.to_string(),
            reason => format!("{}  ({reason})", job.restarts),
        },
    ]);
    if figures.fail_over.is_some() {
        rows.add_row([
            "longest pause when a storage server was killed",
            &format!(
                "read {:.2} s, write {:.2} s  ({} probe operations, none failed)",
                figures.longest_read.as_secs_f64(),
                figures.longest_write.as_secs_f64(),
                figures.probe_operations
            ),
        ]);
    }
    if let Some(healed) = figures.healed_in {
        rows.add_row(["healed after its return", &format!("{:.1} s", healed.as_secs_f64())]);
    }
    let size = |n| firefly_types::ByteSize(n).to_string();
    rows.add_row([
        "through fs3",
        &format!("{} read, {} written", size(io.bytes_read), size(io.bytes_written)),
    ]);
    let bandwidth = if result.allreduce_seconds > 0.0 {
        format!("{:.1} MB/s incl. waiting", result.allreduce_bytes as f64 / result.allreduce_seconds / 1e6)
    } else {
        "-".into()
    };
    rows.add_row([
        "allreduce, rank 0, last attempt",
        &format!(
            "{} calls, {}, {bandwidth}, over {}",
            result.allreduce_calls,
            size(result.allreduce_bytes),
            result.transport
        ),
    ]);
    if let Some(time) = figures.submit_to_running {
        rows.add_row(["submit to running", &format!("{:.0} ms", time.as_secs_f64() * 1e3)]);
    }
    rows.add_row(["whole run", &format!("{:.1} s", show.started.elapsed().as_secs_f64())]);
    rows.add_row(["logs", &stage.cluster.logs().display().to_string()]);
    show.step("done");
    show.line(&rows.to_string());
    if result.accuracy < ACCURACY_WANTED {
        bail!("the accuracy is below {:.0} %", 100.0 * ACCURACY_WANTED);
    }
    Ok(())
}

/// The interpreter that has torch and firefly.
fn find_python(given: Option<&Path>, ff: &Path) -> Result<PathBuf> {
    let mut candidates: Vec<PathBuf> = match given {
        Some(path) => vec![std::path::absolute(path)?],
        None => {
            let mut list = Vec::new();
            if let Some(venv) = std::env::var_os("VIRTUAL_ENV") {
                list.push(PathBuf::from(venv).join("bin/python"));
            }
            // A binary in PROJECT/target/release finds the environment that `make` made.
            list.extend(ff.ancestors().skip(1).take(4).map(|dir| dir.join(".venv/bin/python")));
            list.push(std::path::absolute(".venv/bin/python")?);
            list
        }
    };
    candidates.retain(|c| c.exists());
    for python in &candidates {
        // Not canonicalised: a virtual environment is found by the link's own place.
        let check = Command::new(python)
            .args(["-c", "import torch, firefly, sklearn; print(firefly.__name__)"])
            .stdin(Stdio::null())
            .output();
        match check {
            Ok(output) if output.status.success() => return Ok(python.clone()),
            Ok(output) if given.is_some() || python == candidates.last().unwrap_or(python) => {
                let why = String::from_utf8_lossy(&output.stderr);
                bail!(
                    "{} cannot import torch, firefly and scikit-learn ({}): `make quickstart` installs them, \
                     or use `ff quickstart --native`",
                    python.display(),
                    why.lines().last().unwrap_or("no message")
                );
            }
            _ => {}
        }
    }
    bail!(
        "no Python with torch and firefly was found: run `make quickstart`, name one with --python, or use `ff quickstart --native`"
    )
}

/// The digits for the native variant.
fn find_digits(given: Option<&Path>, ff: &Path) -> Result<PathBuf> {
    if let Some(path) = given {
        if !path.is_file() {
            bail!("{} does not exist", path.display());
        }
        return Ok(std::path::absolute(path)?);
    }
    let near = ff.ancestors().skip(1).take(4).map(|dir| dir.join(".cache/digits.csv.gz"));
    near.chain([std::path::absolute(".cache/digits.csv.gz")?]).find(|p| p.is_file()).context(
        "the digits are not here: `make digits` fetches them with pip, or name scikit-learn's digits.csv.gz with --digits",
    )
}
