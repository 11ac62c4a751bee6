//! `ff`: the command line of Firefly.

use clap::{CommandFactory, Parser, Subcommand};
use firefly_cli::cmd::{fs, job, node, quickstart, reduce, run, status, up};
use firefly_cli::context::{Global, Usage};
use firefly_cli::{native_train, serve};
use std::process::ExitCode;

/// Firefly: a file system, collectives and a scheduler for training large models
///
/// `ff quickstart` shows the whole stack on this machine; `ff up` starts a cluster to work with.
#[derive(Parser, Debug)]
#[command(name = "ff", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Up(up::UpArgs),
    Down(up::DownArgs),
    Status(status::StatusArgs),
    Serve(serve::ServeArgs),
    Quickstart(quickstart::QuickstartArgs),
    /// Work with the file system: mount it, move data, see its chains
    #[command(subcommand)]
    Fs(fs::FsCommand),
    Run(run::RunArgs),
    /// Measure collectives, and how ranks reach each other
    #[command(subcommand)]
    Reduce(reduce::ReduceCommand),
    /// Submit, watch and stop jobs
    #[command(subcommand)]
    Job(job::JobCommand),
    /// See the compute nodes, and keep jobs off them
    #[command(subcommand)]
    Node(node::NodeCommand),
    /// Print shell completion; load it with, for example, `source <(ff completion bash)`
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write man pages of all commands into a folder
    Man {
        /// Where to
        dir: std::path::PathBuf,
    },
    /// One rank's guardian, started by an agent
    #[command(hide = true)]
    Shim {
        /// What the agent says
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<std::ffi::OsString>,
    },
    /// One rank of the quickstart's built-in model, started by an agent
    #[command(hide = true)]
    NativeTrain(native_train::NativeTrainArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = dispatch(cli);
    match result {
        Ok(code) => code,
        Err(error) if error.downcast_ref::<Usage>().is_some() => {
            eprintln!("ff: {error:#}\n\nFor more information, try '--help'.");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("ff: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    // Before any thread exists: the shim forks.
    match cli.command {
        Command::Shim { arguments } => firefly_agent::shim_main(arguments),
        Command::NativeTrain(args) => {
            native_train::run(&args)?;
            Ok(ExitCode::SUCCESS)
        }
        // Collectives have threads of their own; the runtime's would only be in their way.
        Command::Reduce(command) => {
            log_to_stderr("warn");
            reduce::run(&command, &cli.global)
        }
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "ff", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { dir } => {
            std::fs::create_dir_all(&dir)?;
            clap_mangen::generate_to(Cli::command(), &dir)?;
            Ok(ExitCode::SUCCESS)
        }
        command => {
            log_to_stderr(if matches!(command, Command::Serve(_)) { "info" } else { "warn" });
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            let result = runtime.block_on(run_async(command, &cli.global));
            // Tasks that serve connections never end by themselves.
            runtime.shutdown_background();
            result
        }
    }
}

/// Logs what `FIREFLY_LOG` asks for, else from `level` on.
fn log_to_stderr(level: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("FIREFLY_LOG").unwrap_or_else(|_| level.into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

async fn run_async(command: Command, global: &Global) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(args) => up::up(&args, global).await?,
        Command::Down(args) => up::down(&args, global).await?,
        Command::Status(args) => status::run(&args, global).await?,
        Command::Serve(args) => serve::run(&args).await?,
        Command::Quickstart(args) => quickstart::run(&args, global).await?,
        Command::Fs(command) => fs::run(command, global).await?,
        Command::Run(args) => return run::run(args, global).await,
        Command::Job(command) => job::run(command, global).await?,
        Command::Node(command) => node::run(command, global).await?,
        Command::Completion { .. }
        | Command::Man { .. }
        | Command::Shim { .. }
        | Command::Reduce(_)
        | Command::NativeTrain(_) => {
            unreachable!("handled before the runtime starts")
        }
    }
    Ok(ExitCode::SUCCESS)
}
