//! `ff fs`: the file system without and with a mount, and the servers behind it.

mod cluster;
mod copying;
mod looking;
mod mounting;
mod workers;

pub use cluster::{ChainCommand, NodeCommand, TargetCommand};
pub use workers::ScrubCommand;

use crate::context::{Context, Global};
use anyhow::Result;
use fs3_client::{ClientOptions, Credentials, Fs3};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;

/// Paths of the file system begin at its root, with or without a leading `/`.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum FsCommand {
    /// Mount the file system on a directory
    ///
    /// Returns once the mount serves; a process in the background goes on serving it until
    /// `ff fs umount`. Needs root and /dev/fuse. What it logs goes to logs/mount.log in the state
    /// folder.
    Mount {
        /// An empty directory; made if it does not exist
        dir: PathBuf,
        /// Serve the mount in this process until it is unmounted or this process is ended
        #[arg(long)]
        foreground: bool,
    },
    /// Unmount the file system from a directory
    ///
    /// What programs have written is published first. A mount that is in use is taken out of the
    /// tree at once and ends when its last file is closed.
    Umount {
        /// Where it is mounted
        dir: PathBuf,
    },
    /// List a directory
    Ls {
        /// What to list
        #[arg(default_value = "/")]
        path: String,
        /// Modes, owners, sizes and times too
        #[arg(short = 'l', long)]
        long: bool,
    },
    /// Show everything about one file or directory, and where its data is
    Stat {
        /// Which
        path: String,
    },
    /// Copy local files into the file system
    Put {
        /// Copy directories with what is in them
        #[arg(short = 'r', long)]
        recursive: bool,
        /// Local files, then the path in the file system to copy to
        #[arg(required = true, num_args = 2.., value_names = ["LOCAL", "PATH"])]
        paths: Vec<PathBuf>,
    },
    /// Copy files from the file system to the local disk
    Get {
        /// Copy directories with what is in them
        #[arg(short = 'r', long)]
        recursive: bool,
        /// Paths in the file system, then the local path to copy to
        #[arg(required = true, num_args = 2.., value_names = ["PATH", "LOCAL"])]
        paths: Vec<PathBuf>,
    },
    /// Remove files
    Rm {
        /// Remove directories with everything in them
        #[arg(short = 'r', long)]
        recursive: bool,
        /// What to remove
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<String>,
    },
    /// See the replication chains
    #[command(subcommand)]
    Chain(ChainCommand),
    /// See the storage targets, move or replace one
    #[command(subcommand)]
    Target(TargetCommand),
    /// See the storage and meta servers, add, empty or remove one
    #[command(subcommand)]
    Node(NodeCommand),
    /// Spread the targets evenly over the storage servers
    ///
    /// For after servers were added. Goes on in the background while clients work, one target at a
    /// time per receiving server, and over a restart of the manager.
    Rebalance {
        /// Begin no more moves; those under way are finished
        #[arg(long)]
        stop: bool,
        /// Wait until it is done, with a progress bar
        #[arg(long, conflicts_with = "stop")]
        wait: bool,
    },
    /// Check everything that is stored and repair what has rotted
    #[command(subcommand)]
    Scrub(ScrubCommand),
    /// Show the background workers: how far each is, and what bounds it
    Workers,
    /// Show the counters of this cluster's mounts on this machine
    Stats {
        /// Only the mount on this directory
        dir: Option<PathBuf>,
    },
}

/// Runs `ff fs …`.
pub async fn run(command: FsCommand, global: &Global) -> Result<()> {
    match command {
        FsCommand::Mount { dir, foreground: true } => mounting::serve_mount(&dir, global).await,
        FsCommand::Mount { dir, foreground: false } => mounting::start_mount(&dir, global),
        FsCommand::Umount { dir } => mounting::umount(&dir, global),
        FsCommand::Ls { path, long } => looking::ls(&path, long, global).await,
        FsCommand::Stat { path } => looking::stat(&path, global).await,
        FsCommand::Put { recursive, paths } => copying::put(paths, recursive, global).await,
        FsCommand::Get { recursive, paths } => copying::get(paths, recursive, global).await,
        FsCommand::Rm { recursive, paths } => looking::rm(&paths, recursive, global).await,
        FsCommand::Chain(command) => cluster::chain(command, global).await,
        FsCommand::Target(command) => cluster::target(command, global).await,
        FsCommand::Node(command) => cluster::node(command, global).await,
        FsCommand::Rebalance { stop, wait } => workers::rebalance(stop, wait, global).await,
        FsCommand::Scrub(command) => workers::scrub(command, global).await,
        FsCommand::Workers => workers::list(global).await,
        FsCommand::Stats { dir } => mounting::stats(dir.as_deref(), global),
    }
}

async fn connect(global: &Global, purpose: &str) -> Result<(Context, Arc<Fs3>)> {
    let context = global.open()?;
    context.open_network()?;
    let identity = context.identity(&format!("ff fs {purpose}"))?;
    let fs = Fs3::connect(ClientOptions::new(context.cluster.manager.clone(), identity)).await?;
    Ok((context, fs))
}

fn myself() -> Result<Credentials> {
    use rustix::process::{getegid, geteuid, getgroups};
    let groups = getgroups()?.into_iter().map(|g| g.as_raw()).collect();
    Ok(Credentials { uid: geteuid().as_raw(), gid: getegid().as_raw(), groups })
}

fn print(value: &Value) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}
