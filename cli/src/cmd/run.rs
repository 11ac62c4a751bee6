//! `ff run`: submit a job and follow it.

use crate::connect::{Authenticated, sentence};
use crate::context::{Context, Global, Usage};
use anyhow::{Context as _, Result};
use firefly_proto::scheduler::scheduler_client::SchedulerClient;
use firefly_proto::scheduler::{GetJobRequest, Job, JobSpec, JobState, LogChunk, LogsRequest, SubmitRequest};
use firefly_types::{Backoff, ErrorKind, JobId};
use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Exit code after Ctrl-C, as shells use it: the job goes on.
const EXIT_DETACHED: u8 = 130;
/// Variables of the caller that a job gets unless told otherwise: what finds programs and
/// libraries, and what steers the stack below. Everything else stays here; `--env NAME` sends more.
const PASSED: [&str; 11] = [
    "PATH",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "CONDA_DEFAULT_ENV",
    "LANG",
    "LC_ALL",
    "TZ",
    "TERM",
];
const PASSED_PREFIXES: [&str; 5] = ["FIREFLY_", "TORCH_", "NCCL_", "OMP_", "CUDA_"];
/// Of those, what belongs to this command and not to the job: the launcher sets some itself.
const KEPT_BACK: [&str; 7] = [
    "FIREFLY_STATE",
    "FIREFLY_LOG",
    "FIREFLY_STATUS",
    "FIREFLY_NODE_ID",
    "FIREFLY_JOB_ID",
    "FIREFLY_EPOCH",
    "FIREFLY_JOB_SECRET",
];

/// What a job asks for; shared by `ff run` and `ff job submit`.
#[derive(clap::Args, Clone, Debug)]
pub struct SpecArgs {
    /// Nodes that the job runs on, all or none
    #[arg(short = 'n', long, default_value_t = 1, value_name = "NODES", value_parser = clap::value_parser!(u32).range(1..))]
    pub nodes: u32,

    /// Processes (ranks) on each node; each takes one of the node's slots
    #[arg(short = 'r', long, default_value_t = 1, value_name = "RANKS", value_parser = clap::value_parser!(u32).range(1..))]
    pub ranks_per_node: u32,

    /// Jobs of higher priority go first
    #[arg(short = 'p', long, default_value_t = 0, allow_negative_numbers = true)]
    pub priority: i32,

    /// Name of the job; several may share one, and commands take the newest [default: the program's]
    #[arg(long)]
    pub name: Option<String>,

    /// Variable for the job: `NAME=VALUE`, or `NAME` to pass on the caller's. May be repeated
    ///
    /// Without it, the job gets the caller's PATH, LD_LIBRARY_PATH, PYTHONPATH, VIRTUAL_ENV, CONDA_*,
    /// LANG, LC_ALL, TZ, TERM and what begins with FIREFLY_, TORCH_, NCCL_, OMP_ or CUDA_.
    #[arg(short = 'e', long = "env", value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,

    /// Restarts after failures of the job itself; faults of nodes do not count
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub max_restarts: u32,

    /// Seconds between SIGTERM and SIGKILL when the job is ended
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    pub grace: f64,

    /// Folder to run in, the same on every node [default: the current one]
    #[arg(short = 'w', long, value_name = "DIR")]
    pub workdir: Option<std::path::PathBuf>,
}

/// Submit a job and follow it
///
/// Runs COMMAND as one process per rank, with the environment that torchrun sets (RANK, WORLD_SIZE,
/// LOCAL_RANK, MASTER_ADDR, MASTER_PORT, …). No rank starts before all are ready. If one fails, all
/// are ended, and the job starts again as often as --max-restarts allows.
///
/// Lines of the job are shown as they come, with the rank before each. Ctrl-C stops following, not
/// the job: it says how to follow again and how to stop.
///
/// Exit code: 0 if the job succeeded, 1 if it failed or was stopped, 2 for wrong usage, 130 after
/// Ctrl-C.
#[derive(clap::Args, Clone, Debug)]
#[command(
    after_help = "Examples:\n  ff run -- python train.py\n  ff run -n 2 -r 4 --max-restarts 3 -- python train.py --epochs 10\n  ff run -d --name eval -- ./eval.sh   (then: ff job logs -f eval)"
)]
pub struct RunArgs {
    #[command(flatten)]
    spec: SpecArgs,

    /// Submit only; print the job's id and return
    #[arg(short = 'd', long)]
    detach: bool,

    /// What to run; no shell is involved
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs `ff run`.
pub async fn run(args: RunArgs, global: &Global) -> Result<ExitCode> {
    let context = global.open()?;
    let spec = args.spec.to_spec(args.command)?;
    let ranks = spec.nodes.saturating_mul(spec.ranks_per_node);
    let mut scheduler = context.scheduler().await?;
    let id = submit(&mut scheduler, spec).await?;
    if args.detach {
        announce(&context, id, global.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    if !global.json {
        eprintln!("ff: {id} submitted");
    }
    let mut printer = Printer::new(global.json, ranks > 1);
    let follow = follow(
        &context,
        id,
        LogsRequest { job: id.to_string(), follow: true, ..Default::default() },
        &mut printer,
    );
    tokio::select! {
        result = follow => result?,
        _ = tokio::signal::ctrl_c() => {
            eprintln!("\nff: not following {id} any more; it goes on. Follow: ff job logs -f {id}   Stop: ff job stop {id}");
            return Ok(ExitCode::from(EXIT_DETACHED));
        }
    }
    let job = context.scheduler().await?.get_job(GetJobRequest { job: id.to_string() }).await;
    let job = job.map_err(|s| sentence(&s))?.into_inner();
    if global.json {
        println!("{}", super::job::to_json(&job));
    }
    Ok(match job.state() {
        JobState::Succeeded => ExitCode::SUCCESS,
        _ => {
            if !global.json {
                eprintln!("ff: {id} {}: {}", super::job::state_word(&job), job.reason);
            }
            ExitCode::FAILURE
        }
    })
}

impl SpecArgs {
    /// The wire's form; checks what only the caller's side can know.
    pub fn to_spec(&self, command: Vec<String>) -> Result<JobSpec> {
        let program = command.first().filter(|c| !c.is_empty());
        let program = program.ok_or_else(|| Usage("there is no command after `--`".into()))?;
        if !(0.0..=3600.0).contains(&self.grace) {
            return Err(Usage("--grace is from 0 to 3600 seconds".into()).into());
        }
        let name = match &self.name {
            Some(name) => name.clone(),
            None => default_name(program),
        };
        let working_directory = match &self.workdir {
            Some(dir) => std::path::absolute(dir)?,
            None => std::env::current_dir().context("the current folder is gone: say --workdir")?,
        };
        let mut env: HashMap<String, String> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| is_passed(name))
            .collect();
        for item in &self.env {
            let (name, value) = match item.split_once('=') {
                Some((name, value)) => (name, value.to_owned()),
                None => {
                    let value = std::env::var(item).map_err(|_| {
                        Usage(format!("--env {item}: the variable is not set here (or write {item}=VALUE)"))
                    })?;
                    (item.as_str(), value)
                }
            };
            env.insert(name.to_owned(), value);
        }
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        Ok(JobSpec {
            name,
            command,
            env,
            working_directory: working_directory
                .into_os_string()
                .into_string()
                .map_err(|_| Usage("the working folder's name is not UTF-8".into()))?,
            nodes: self.nodes,
            ranks_per_node: self.ranks_per_node,
            priority: self.priority,
            max_restarts: self.max_restarts,
            uid,
            gid,
            user: user_name(uid),
            grace_ms: (self.grace * 1000.0) as u32,
        })
    }
}

/// The program's name, unless it reads like a job id (`j3`), which no name may.
fn default_name(program: &str) -> String {
    let base = program.rsplit('/').next().unwrap_or(program);
    if base.parse::<JobId>().is_ok() { format!("run-{base}") } else { base.to_owned() }
}

fn is_passed(name: &str) -> bool {
    let known = PASSED.contains(&name) || PASSED_PREFIXES.iter().any(|p| name.starts_with(p));
    known && !KEPT_BACK.contains(&name)
}

fn user_name(uid: u32) -> String {
    for variable in ["USER", "LOGNAME"] {
        if let Ok(name) = std::env::var(variable)
            && !name.is_empty()
        {
            return name;
        }
    }
    if uid == 0 { "root".into() } else { format!("uid{uid}") }
}

/// Submits; tries again while the scheduler is away, always under one key, so that there is one job.
pub async fn submit(scheduler: &mut SchedulerClient<Authenticated>, spec: JobSpec) -> Result<JobId> {
    let request =
        SubmitRequest { spec: Some(spec), idempotency_key: format!("{:032x}", rand::random::<u128>()) };
    let begun = Instant::now();
    let mut tries = 0;
    loop {
        match scheduler.submit(request.clone()).await {
            Ok(reply) => return Ok(JobId(reply.into_inner().job_id)),
            Err(status) => {
                let kind = firefly_proto::status::from_status(&status).kind;
                tries += 1;
                let delay = Backoff::CLUSTER.delay(tries, begun.elapsed(), rand::random());
                match delay.filter(|_| kind.is_retryable()) {
                    Some(delay) => tokio::time::sleep(delay).await,
                    // What no cluster would take is wrong usage.
                    None if kind == ErrorKind::InvalidArgument => {
                        return Err(Usage(status.message().to_owned()).into());
                    }
                    None => return Err(sentence(&status).context("the job was not submitted")),
                }
            }
        }
    }
}

/// Prints the id of a job that runs on without us.
pub fn announce(context: &Context, id: JobId, json: bool) -> Result<()> {
    let _ = context;
    if json {
        println!("{}", serde_json::json!({ "job": id.to_string(), "job_id": id.0 }));
    } else {
        println!("{id}");
        if std::io::stderr().is_terminal() {
            eprintln!("follow: ff job logs -f {id}   stop: ff job stop {id}");
        }
    }
    Ok(())
}

/// Prints a job's log. When following, an outage of the scheduler is bridged.
pub async fn follow(context: &Context, id: JobId, request: LogsRequest, printer: &mut Printer) -> Result<()> {
    let mut seen: u64 = 0;
    let mut outage: Option<Instant> = None;
    let mut tries = 0;
    loop {
        let result = follow_once(context, &request, &mut seen, printer).await;
        let Err(error) = result else { return Ok(()) };
        // The cluster may be down for good, but the job is not: keep trying as long as a
        // scheduler outage may last.
        let begun = *outage.get_or_insert_with(|| {
            eprintln!("ff: the scheduler does not answer; {id} goes on, waiting to follow it again");
            Instant::now()
        });
        if printer.progress() {
            tries = 0;
            outage = Some(Instant::now());
        }
        tries += 1;
        let patience =
            Backoff { most: Duration::from_secs(2), total: Duration::from_secs(600), ..Backoff::CLUSTER };
        let retryable = request.follow && error.1;
        match patience.delay(tries, begun.elapsed(), rand::random()).filter(|_| retryable) {
            Some(delay) => tokio::time::sleep(delay).await,
            None => return Err(error.0),
        }
    }
}

/// One stream. The error says whether another try makes sense.
async fn follow_once(
    context: &Context,
    request: &LogsRequest,
    seen: &mut u64,
    printer: &mut Printer,
) -> std::result::Result<(), (anyhow::Error, bool)> {
    let retryable = |status: &tonic::Status| {
        let kind = firefly_proto::status::from_status(status).kind;
        // A stream that the scheduler's end cut off reads as an internal or cancelled one.
        kind.is_retryable() || matches!(kind, ErrorKind::Cancelled | ErrorKind::Internal)
    };
    let mut scheduler = context.scheduler().await.map_err(|e| (e, true))?;
    let reply = scheduler.logs(request.clone()).await.map_err(|s| (sentence(&s), retryable(&s)))?;
    let mut stream = reply.into_inner();
    let mut skip = *seen;
    loop {
        match stream.message().await {
            Ok(Some(chunk)) => {
                // A new stream begins at the beginning.
                if skip > 0 {
                    skip -= 1;
                    continue;
                }
                *seen += 1;
                printer.print(&chunk).map_err(|e| (e.into(), false))?;
            }
            Ok(None) if request.follow => {
                // The end of the job, or of the scheduler?
                let job = GetJobRequest { job: request.job.clone() };
                let job =
                    scheduler.get_job(job).await.map_err(|s| (sentence(&s), retryable(&s)))?.into_inner();
                if is_final(&job) {
                    return Ok(());
                }
                return Err((anyhow::anyhow!("the log broke off"), true));
            }
            Ok(None) => return Ok(()),
            Err(status) => return Err((sentence(&status), retryable(&status))),
        }
    }
}

/// Whether nothing can follow.
pub fn is_final(job: &Job) -> bool {
    matches!(job.state(), JobState::Succeeded | JobState::Failed | JobState::Stopped)
}

/// Prints lines of a job.
pub struct Printer {
    json: bool,
    prefix: bool,
    colour: bool,
    moved: bool,
}

impl Printer {
    /// `prefix`: say which rank each line is from.
    pub fn new(json: bool, prefix: bool) -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { json, prefix, colour, moved: false }
    }

    /// Whether anything was printed since the last call.
    fn progress(&mut self) -> bool {
        std::mem::take(&mut self.moved)
    }

    /// Prints one line: the job's output to stdout, its errors and what the system says to stderr.
    pub fn print(&mut self, chunk: &LogChunk) -> std::io::Result<()> {
        self.moved = true;
        if self.json {
            let line = serde_json::json!({
                "epoch": chunk.epoch,
                "rank": (!chunk.is_system).then_some(chunk.rank),
                "unix_ms": chunk.unix_ms,
                "stream": if chunk.is_system { "system" } else if chunk.is_stderr { "stderr" } else { "stdout" },
                "line": String::from_utf8_lossy(&chunk.line),
            });
            return writeln!(std::io::stdout(), "{line}");
        }
        let text = self.render(chunk);
        if chunk.is_stderr || chunk.is_system {
            std::io::stderr().write_all(&text)
        } else {
            std::io::stdout().write_all(&text)
        }
    }

    fn render(&self, chunk: &LogChunk) -> Vec<u8> {
        // Six colours that are readable on dark and light ground.
        const COLOURS: [u8; 6] = [36, 32, 33, 35, 34, 31];
        let mut text = Vec::with_capacity(chunk.line.len() + 24);
        if chunk.is_system {
            let (on, off) = if self.colour { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
            text.extend_from_slice(on.as_bytes());
            text.extend_from_slice(b"-- ");
            text.extend_from_slice(&chunk.line);
            text.extend_from_slice(off.as_bytes());
        } else {
            if self.prefix {
                let rank = chunk.rank;
                let prefix = if self.colour {
                    format!("\x1b[{}mr{rank} |\x1b[0m ", COLOURS[rank as usize % COLOURS.len()])
                } else {
                    format!("r{rank} | ")
                };
                text.extend_from_slice(prefix.as_bytes());
            }
            text.extend_from_slice(&chunk.line);
        }
        text.push(b'\n');
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jobs_environment_is_the_useful_part_of_the_callers() {
        for name in ["PATH", "FIREFLY_INSTALL_AS", "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES"] {
            assert!(is_passed(name), "{name}");
        }
        for name in ["FIREFLY_STATE", "FIREFLY_JOB_SECRET", "AWS_SECRET_ACCESS_KEY", "RANK", "SSH_AUTH_SOCK"]
        {
            assert!(!is_passed(name), "{name}");
        }
    }

    #[test]
    fn a_name_never_reads_like_an_id() {
        assert_eq!(default_name("/usr/bin/python3"), "python3");
        assert_eq!(default_name("./j12"), "run-j12");
        assert_eq!(default_name("7"), "run-7");
    }

    #[test]
    fn lines_say_whose_they_are() {
        let printer = Printer { json: false, prefix: true, colour: false, moved: false };
        let chunk = LogChunk { rank: 3, line: b"loss 0.1".to_vec(), ..LogChunk::default() };
        assert_eq!(printer.render(&chunk), b"r3 | loss 0.1\n");
        let alone = Printer { prefix: false, ..printer };
        assert_eq!(alone.render(&chunk), b"loss 0.1\n");
        let system = LogChunk { is_system: true, line: b"attempt 2 starts".to_vec(), ..LogChunk::default() };
        assert_eq!(alone.render(&system), b"-- attempt 2 starts\n");
    }
}
