//! `ff job`: submit, watch and stop jobs.

use super::run::{self, Printer, SpecArgs, is_final};
use super::status::table;
use crate::connect::{Authenticated, sentence};
use crate::context::{Context, Global, Usage};
use anyhow::{Context as _, Result, bail};
use firefly_proto::scheduler::scheduler_client::SchedulerClient;
use firefly_proto::scheduler::{
    Attempt, GetJobRequest, Job, JobSpec, JobState, ListJobsRequest, LogsRequest, StopJobRequest,
    WatchJobRequest,
};
use firefly_types::JobId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Largest answer of the scheduler: a job with thousands of ranks passes the default of 4 MiB.
const MOST_ANSWER_BYTES: usize = 64 << 20;

/// Work with jobs. JOB is an id (`j3` or `3`) or a name, which means the newest job of that name.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum JobCommand {
    /// Submit a job and return; print its id
    Submit {
        /// What the job asks for
        #[command(flatten)]
        spec: SpecArgs,
        /// Submit what `ff job describe` printed into this file; the other options do not apply
        #[arg(short = 'f', long, value_name = "FILE", conflicts_with_all = ["command", "nodes", "ranks_per_node", "priority", "name", "env", "max_restarts", "grace", "workdir"])]
        file: Option<PathBuf>,
        /// What to run; no shell is involved
        #[arg(last = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// List jobs that have not ended, or ended within the last hour
    Ls {
        /// All jobs that are kept
        #[arg(short = 'a', long)]
        all: bool,
        /// Only jobs of this user
        #[arg(short = 'u', long, default_value = "", hide_default_value = true)]
        user: String,
    },
    /// Show where a job stands: attempts, ranks, reasons
    Status {
        /// Which job
        job: String,
    },
    /// Print what a job's ranks wrote, over all its attempts
    Logs {
        /// Which job
        job: String,
        /// Go on until the job ends
        #[arg(short = 'f', long)]
        follow: bool,
        /// Only lines of this rank
        #[arg(long, value_name = "RANK")]
        rank: Option<u32>,
        /// Only the last LINES
        #[arg(short = 't', long, value_name = "LINES", default_value_t = 0, hide_default_value = true)]
        tail: u32,
    },
    /// Explain why a job waits and what would let it run, or what ended it
    Why {
        /// Which job
        job: String,
    },
    /// End jobs: SIGTERM to every rank, SIGKILL after the job's grace
    Stop {
        /// Which jobs
        #[arg(required = true, value_name = "JOB")]
        jobs: Vec<String>,
        /// Why, for the record
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
        /// Return only when they have ended
        #[arg(short = 'w', long)]
        wait: bool,
    },
    /// Print a job so that it can be submitted again: `ff job describe j3 > job.toml`, then
    /// `ff job submit -f job.toml`
    Describe {
        /// Which job
        job: String,
    },
}

/// What `describe` prints and `submit -f` reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JobFile {
    #[serde(default)]
    name: String,
    command: Vec<String>,
    #[serde(default)]
    working_directory: String,
    #[serde(default = "one")]
    nodes: u32,
    #[serde(default = "one")]
    ranks_per_node: u32,
    #[serde(default)]
    priority: i32,
    #[serde(default)]
    max_restarts: u32,
    #[serde(default = "ten_seconds")]
    grace_ms: u32,
    #[serde(default)]
    env: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

fn ten_seconds() -> u32 {
    10_000
}

/// Runs `ff job …`.
pub async fn run(command: JobCommand, global: &Global) -> Result<()> {
    // What is wrong with the call itself is said before looking for a cluster.
    let submitted = match &command {
        JobCommand::Submit { spec, file, command } => Some(spec_to_submit(spec, file.as_ref(), command)?),
        _ => None,
    };
    let context = global.open()?;
    let mut scheduler = context.scheduler().await?.max_decoding_message_size(MOST_ANSWER_BYTES);
    match command {
        JobCommand::Submit { .. } => {
            let spec = submitted.context("a submit has a description")?;
            let id = run::submit(&mut scheduler, spec).await?;
            run::announce(&context, id, global.json)
        }
        JobCommand::Ls { all, user } => list(&mut scheduler, all, user, global.json).await,
        JobCommand::Status { job } => {
            let job = get(&mut scheduler, &job).await?;
            if global.json {
                println!("{}", to_json(&job))
            } else {
                print_status(&job)
            }
            Ok(())
        }
        JobCommand::Logs { job, follow, rank, tail } => {
            logs(&context, &mut scheduler, LogsRequest { job, follow, rank, tail }, global.json).await
        }
        JobCommand::Why { job } => {
            let reply = scheduler.why_job(GetJobRequest { job: job.clone() }).await;
            let lines = reply.map_err(|s| sentence(&s))?.into_inner().lines;
            if global.json {
                println!("{}", serde_json::json!({ "job": job, "why": lines }));
            } else {
                for line in lines {
                    println!("{line}");
                }
            }
            Ok(())
        }
        JobCommand::Stop { jobs, reason, wait } => {
            stop(&mut scheduler, jobs, reason, wait, global.json).await
        }
        JobCommand::Describe { job } => {
            let job = get(&mut scheduler, &job).await?;
            let file = JobFile::from(job.spec.clone().unwrap_or_default());
            if global.json {
                println!("{}", serde_json::to_string_pretty(&file)?);
            } else {
                println!("# {} ({})", JobId(job.job_id), state_word(&job));
                print!("{}", toml::to_string(&file)?);
            }
            Ok(())
        }
    }
}

fn spec_to_submit(spec: &SpecArgs, file: Option<&PathBuf>, command: &[String]) -> Result<JobSpec> {
    let Some(path) = file else {
        if command.is_empty() {
            return Err(Usage("give a command after `--`, or a file with -f".into()).into());
        }
        return spec.to_spec(command.to_vec());
    };
    let file: JobFile = firefly_types::config::load(path)?;
    // Whose job it is, is who submits it, not who wrote the file.
    let mine = spec.to_spec(file.command.clone())?;
    Ok(JobSpec { uid: mine.uid, gid: mine.gid, user: mine.user, ..file.into() })
}

impl From<JobSpec> for JobFile {
    fn from(spec: JobSpec) -> Self {
        Self {
            name: spec.name,
            command: spec.command,
            working_directory: spec.working_directory,
            nodes: spec.nodes,
            ranks_per_node: spec.ranks_per_node,
            priority: spec.priority,
            max_restarts: spec.max_restarts,
            grace_ms: spec.grace_ms,
            env: spec.env.into_iter().collect(),
        }
    }
}

impl From<JobFile> for JobSpec {
    fn from(file: JobFile) -> Self {
        Self {
            name: file.name,
            command: file.command,
            env: file.env.into_iter().collect(),
            working_directory: file.working_directory,
            nodes: file.nodes,
            ranks_per_node: file.ranks_per_node,
            priority: file.priority,
            max_restarts: file.max_restarts,
            grace_ms: file.grace_ms,
            ..Self::default()
        }
    }
}

async fn get(scheduler: &mut SchedulerClient<Authenticated>, job: &str) -> Result<Job> {
    let reply = scheduler.get_job(GetJobRequest { job: job.to_owned() }).await;
    Ok(reply.map_err(|s| sentence(&s))?.into_inner())
}

async fn list(
    scheduler: &mut SchedulerClient<Authenticated>,
    all: bool,
    user: String,
    json: bool,
) -> Result<()> {
    let reply = scheduler.list_jobs(ListJobsRequest { all, user }).await.map_err(|s| sentence(&s))?;
    let jobs = reply.into_inner().jobs;
    if json {
        let jobs: Vec<_> = jobs.iter().map(to_json).collect();
        println!("{}", serde_json::to_string_pretty(&jobs)?);
        return Ok(());
    }
    if jobs.is_empty() {
        println!(
            "no jobs{}; start one with `ff run -- COMMAND`",
            if all { "" } else { " now (`--all` shows older ones)" }
        );
        return Ok(());
    }
    let mut shown =
        table(&["job", "name", "state", "ranks", "priority", "user", "time", "restarts", "reason"]);
    for job in &jobs {
        let spec = job.spec.clone().unwrap_or_default();
        shown.add_row([
            JobId(job.job_id).to_string(),
            spec.name,
            state_word(job).to_owned(),
            format!("{}x{}", spec.nodes, spec.ranks_per_node),
            spec.priority.to_string(),
            spec.user,
            duration(time_of(job)),
            job.restarts.to_string(),
            shorten(&job.reason, 60),
        ]);
    }
    println!("{shown}");
    Ok(())
}

async fn logs(
    context: &Context,
    scheduler: &mut SchedulerClient<Authenticated>,
    mut request: LogsRequest,
    json: bool,
) -> Result<()> {
    let job = get(scheduler, &request.job).await?;
    let id = JobId(job.job_id);
    // By id from here on: a newer job of the name must not take its place.
    request.job = id.to_string();
    let spec = job.spec.unwrap_or_default();
    let ranks = spec.nodes.saturating_mul(spec.ranks_per_node);
    if request.rank.is_some_and(|r| r >= ranks) {
        bail!("{id} has ranks 0 to {}", ranks.saturating_sub(1));
    }
    let mut printer = Printer::new(json, ranks > 1 && request.rank.is_none());
    tokio::select! {
        result = run::follow(context, id, request, &mut printer) => match result {
            // Whoever reads us has seen enough (`| head`).
            Err(e) if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) => Ok(()),
            other => other,
        },
        // Following is all that ends.
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

async fn stop(
    scheduler: &mut SchedulerClient<Authenticated>,
    jobs: Vec<String>,
    reason: String,
    wait: bool,
    json: bool,
) -> Result<()> {
    let mut stopped = Vec::new();
    let mut failed = None;
    for wanted in jobs {
        let request = StopJobRequest { job: wanted.clone(), reason: reason.clone() };
        match scheduler.stop_job(request).await {
            Ok(reply) => stopped.push(reply.into_inner()),
            // The others shall end all the same.
            Err(status) => failed = Some(sentence(&status)),
        }
    }
    for job in &mut stopped {
        while wait && !is_final(job) {
            let request = WatchJobRequest { job: JobId(job.job_id).to_string(), known_version: job.version };
            let mut changes = scheduler.watch_job(request).await.map_err(|s| sentence(&s))?.into_inner();
            match changes.message().await.map_err(|s| sentence(&s))? {
                Some(newer) => *job = newer,
                None => bail!("the scheduler went away while {} was being stopped", JobId(job.job_id)),
            }
        }
        if !json {
            println!("{} {}", JobId(job.job_id), state_word(job));
        }
    }
    if json {
        let stopped: Vec<_> = stopped.iter().map(to_json).collect();
        println!("{}", serde_json::to_string_pretty(&stopped)?);
    }
    failed.map_or(Ok(()), Err)
}

/// The state as people say it.
pub fn state_word(job: &Job) -> &'static str {
    match job.state() {
        JobState::Unspecified => "unknown",
        JobState::Pending => "pending",
        JobState::Starting => "starting",
        JobState::Running => "running",
        JobState::Stopping => "stopping",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Stopped => "stopped",
    }
}

/// A job for programs. Variables of its environment are left out: they may hold secrets, and
/// `describe` shows them to whoever wants them.
pub fn to_json(job: &Job) -> serde_json::Value {
    let spec = job.spec.clone().unwrap_or_default();
    let attempt = |a: &Attempt| {
        let ranks: Vec<_> = a
            .ranks
            .iter()
            .map(|r| {
                serde_json::json!({
                    "rank": r.rank, "node": r.node_id, "state": r.state,
                    "exit_code": r.exit_code, "signal": r.signal, "pid": r.pid,
                })
            })
            .collect();
        serde_json::json!({
            "epoch": a.epoch,
            "started_unix_ms": a.started_unix_ms,
            "running_unix_ms": a.running_unix_ms,
            "ended_unix_ms": a.ended_unix_ms,
            "end_reason": a.end_reason,
            "ranks": ranks,
        })
    };
    serde_json::json!({
        "job": JobId(job.job_id).to_string(),
        "job_id": job.job_id,
        "name": spec.name,
        "state": state_word(job),
        "reason": job.reason,
        "user": spec.user,
        "command": spec.command,
        "working_directory": spec.working_directory,
        "nodes": spec.nodes,
        "ranks_per_node": spec.ranks_per_node,
        "priority": spec.priority,
        "max_restarts": spec.max_restarts,
        "epoch": job.epoch,
        "restarts": job.restarts,
        "submitted_unix_ms": job.submitted_unix_ms,
        "ended_unix_ms": job.ended_unix_ms,
        "attempts": job.attempts.iter().map(attempt).collect::<Vec<_>>(),
    })
}

fn print_status(job: &Job) {
    let id = JobId(job.job_id);
    let spec = job.spec.clone().unwrap_or_default();
    println!("{id} ({}): {}", spec.name, state_word(job));
    if !job.reason.is_empty() {
        println!("  reason    {}", job.reason);
    }
    println!("  command   {}", spec.command.join(" "));
    println!(
        "  size      {} nodes with {} ranks each, priority {}",
        spec.nodes, spec.ranks_per_node, spec.priority
    );
    println!("  user      {} in {}", spec.user, spec.working_directory);
    println!("  restarts  {} so far, {} allowed for failures of its own", job.restarts, spec.max_restarts);
    println!("  time      {}", duration(time_of(job)));
    if job.attempts.is_empty() {
        if !is_final(job) {
            println!("it has not been placed yet: `ff job why {id}` says why");
        }
        return;
    }
    let mut attempts = table(&["attempt", "ran for", "ended by"]);
    for a in &job.attempts {
        let end = if a.ended_unix_ms == 0 { now_ms() } else { a.ended_unix_ms };
        let ran = if a.running_unix_ms == 0 {
            "-".into()
        } else {
            duration(ms(end.saturating_sub(a.running_unix_ms)))
        };
        attempts.add_row([a.epoch.to_string(), ran, a.end_reason.clone()]);
    }
    println!("{attempts}");
    if let Some(newest) = job.attempts.last() {
        let mut ranks = table(&["rank", "node", "state", "pid", "exit"]);
        for r in &newest.ranks {
            let exit = match (r.signal, r.exit_code) {
                (Some(signal), _) => format!("signal {signal}"),
                (None, Some(code)) => format!("code {code}"),
                (None, None) => String::new(),
            };
            let pid = if r.pid == 0 { String::new() } else { r.pid.to_string() };
            ranks.add_row([r.rank.to_string(), format!("n{}", r.node_id), r.state.clone(), pid, exit]);
        }
        println!("{ranks}");
    }
}

/// Since its submit, or how long it took.
fn time_of(job: &Job) -> Duration {
    let end = if job.ended_unix_ms == 0 { now_ms() } else { job.ended_unix_ms };
    ms(end.saturating_sub(job.submitted_unix_ms))
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// As people say it: two units at most.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        0..=9 => format!("{:.1}s", d.as_secs_f64()),
        10..=59 => format!("{s}s"),
        60..=3599 => format!("{}m{:02}s", s / 60, s % 60),
        3600..=86_399 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d{:02}h", s / 86_400, s % 86_400 / 3600),
    }
}

fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_describe_prints_can_be_submitted_again() {
        let spec = JobSpec {
            name: "train \"big\"".into(),
            command: vec!["python".into(), "-c".into(), "print('a\nb')".into()],
            env: [("A".to_owned(), "x=1".to_owned())].into(),
            working_directory: "/data".into(),
            nodes: 4,
            ranks_per_node: 8,
            priority: -3,
            max_restarts: 2,
            grace_ms: 5_000,
            ..JobSpec::default()
        };
        let text = toml::to_string(&JobFile::from(spec.clone())).unwrap();
        let back: JobFile = toml::from_str(&text).unwrap();
        assert_eq!(JobSpec::from(back), spec);
        assert!(
            toml::from_str::<JobFile>("command = [\"x\"]\nprio = 1").is_err(),
            "an unknown key is an error"
        );
    }

    #[test]
    fn durations_read_well() {
        for (seconds, text) in
            [(0.25, "0.2s"), (42.0, "42s"), (61.0, "1m01s"), (7_260.0, "2h01m"), (90_000.0, "1d01h")]
        {
            assert_eq!(duration(Duration::from_secs_f64(seconds)), text);
        }
    }
}
