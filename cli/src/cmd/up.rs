//! `ff up` and `ff down`: a cluster on this machine.

use crate::cmd::run::is_final;
use crate::connect::sentence;
use crate::context::Global;
use crate::local::{DEFAULT_PORT_BASE, LocalCluster, Shape};
use anyhow::{Context as _, Result};
use firefly_proto::scheduler::{ListJobsRequest, StopJobRequest};
use std::time::{Duration, Instant};

/// How long `ff down` waits for a role to end by itself.
pub const STOP_GRACE: Duration = Duration::from_secs(10);

/// Start a cluster on this machine
///
/// Every role runs as a process of its own, detached from the terminal, on the loopback address
/// only. The first call lays the cluster out in the state folder; later calls start whatever does
/// not run, so that `ff up` also brings back a role that was ended.
#[derive(clap::Args, Clone, Debug)]
pub struct UpArgs {
    /// First of the ports used on 127.0.0.1; 0 lets the kernel choose
    #[arg(long, default_value_t = DEFAULT_PORT_BASE, value_name = "PORT")]
    pub port_base: u16,
    /// Storage servers
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub storage_servers: u32,
    /// Copies of each chunk, on as many servers
    #[arg(long, default_value_t = 2, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=8))]
    pub replication: u32,
    /// Agents, each of which stands for a compute node
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub agents: u32,
}

/// Stop the cluster on this machine
///
/// Stops the jobs that run (their ranks would outlive their agents otherwise), unmounts what `ff fs
/// mount` mounted from this state folder, and stops every role. Data and logs stay; `ff up` brings
/// the cluster back.
#[derive(clap::Args, Clone, Debug)]
pub struct DownArgs {}

/// Runs `ff up`.
pub async fn up(args: &UpArgs, global: &Global) -> Result<()> {
    let cluster = LocalCluster::at(&global.state_dir()?);
    if !cluster.exists() {
        cluster.create(&Shape {
            port_base: args.port_base,
            storage_servers: args.storage_servers,
            replication: args.replication,
            agents: args.agents,
        })?;
    }
    start(&cluster, global.json)?;
    if !global.json {
        println!("\nlogs: {}", cluster.logs().display());
        println!("next: ff status; ff fs mount DIR; ff run -n 2 -- hostname; ff down");
    }
    Ok(())
}

/// Starts what does not run, with a line per role.
pub fn start(cluster: &LocalCluster, json: bool) -> Result<()> {
    let ff = std::env::current_exe().context("cannot find this program's own file")?;
    let mut records = Vec::new();
    cluster.start(&ff, |record| {
        if !json {
            println!("  {:<12} up   pid {:<8} {}", record.name, record.pid, record.address);
        }
        records.push(record.clone());
    })?;
    if json {
        println!("{}", serde_json::to_string_pretty(&records)?);
    }
    Ok(())
}

/// Stops every job that has not ended and waits until its ranks are gone, as long as they may take
/// by their grace and no longer. Returns how many there were; without a scheduler nothing is done.
pub async fn stop_jobs(cluster: &LocalCluster, reason: &str) -> Result<usize> {
    if !cluster.exists() || cluster.running("scheduler").is_none() {
        return Ok(0);
    }
    let mut scheduler = cluster.context()?.scheduler().await?;
    let started = Instant::now();
    let mut stopped = 0;
    loop {
        let request = ListJobsRequest { all: false, user: String::new() };
        let jobs = scheduler.list_jobs(request).await.map_err(|s| sentence(&s))?.into_inner().jobs;
        let live: Vec<_> = jobs.into_iter().filter(|job| !is_final(job)).collect();
        let grace = live.iter().filter_map(|job| job.spec.as_ref()).map(|spec| spec.grace_ms).max();
        let Some(grace) = grace else { return Ok(stopped) };
        if stopped == 0 {
            stopped = live.len();
            for job in &live {
                let request = StopJobRequest { job: job.job_id.to_string(), reason: reason.to_owned() };
                scheduler.stop_job(request).await.map_err(|s| sentence(&s))?;
            }
        } else if started.elapsed() > Duration::from_millis(grace.into()) + STOP_GRACE {
            tracing::warn!(jobs = live.len(), "some jobs did not end; their shims will end them");
            return Ok(stopped);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs `ff down`.
pub async fn down(_: &DownArgs, global: &Global) -> Result<()> {
    let cluster = LocalCluster::at(&global.state_dir()?);
    let jobs = stop_jobs(&cluster, "the cluster was taken down").await?;
    let unmounted = cluster.unmount_all()?;
    let mut names = Vec::new();
    cluster.stop(STOP_GRACE, |name| {
        if !global.json {
            println!("  {name:<12} stopped");
        }
        names.push(name.to_owned());
    })?;
    if global.json {
        println!("{}", serde_json::json!({ "jobs": jobs, "stopped": names, "unmounted": unmounted }));
    } else if names.is_empty() {
        println!("nothing was running");
    }
    Ok(())
}
