//! `ff reduce doctor`: measures every pair of ranks.

use crate::cmd::ranks;
use crate::cmd::status::table;
use crate::context::Global;
use anyhow::Result;
use firefly_net::{Fabric, FabricReport};
use firefly_reduce::Communicator;
use firefly_reduce::doctor::{Effort, Report, examine};
use std::process::ExitCode;

/// What to measure.
#[derive(clap::Args, Clone, Debug)]
pub struct DoctorArgs {
    /// Ranks to start on this machine, outside of a job
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=64))]
    ranks: u32,
    /// Let the ranks that are started here reach each other by the network instead of shared memory
    #[arg(long)]
    network: bool,
    /// MiB of one message for the bandwidth
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    mib: u32,
}

/// Runs `ff reduce doctor`.
pub fn run(args: &DoctorArgs, global: &Global) -> Result<ExitCode> {
    match std::env::var_os("WORLD_SIZE") {
        Some(_) => rank(args, global),
        None => ranks::start(args.ranks, |rank| args.network.then(|| format!("rank {rank}"))),
    }
}

/// One rank of the group.
fn rank(args: &DoctorArgs, global: &Global) -> Result<ExitCode> {
    let group = Communicator::from_env()?;
    let effort = Effort { bytes: args.mib as usize * (1 << 20), ..Effort::default() };
    let report = examine(&group, &effort)?;
    if group.rank() == 0 {
        print(&report, &Fabric::shared().report(), global.json)?;
    }
    // Nobody leaves while another still reads.
    group.barrier()?;
    Ok(ExitCode::SUCCESS)
}

fn micros(ns: f64) -> String {
    format!("{:.1}", ns / 1e3)
}

fn print(report: &Report, fabric: &FabricReport, json: bool) -> Result<()> {
    let slow = report.slow();
    if json {
        let pairs: Vec<_> = report
            .pairs
            .iter()
            .map(|p| {
                serde_json::json!({
                    "a": p.a,
                    "b": p.b,
                    "transport": p.transport,
                    "why_not_rdma": p.why_not_rdma,
                    "round_trip_us": p.round_trip.as_nanos() as f64 / 1e3,
                    "there_bytes_per_second": p.there,
                    "back_bytes_per_second": p.back,
                    "clock_offset_ns": p.clock_offset_ns,
                    "clock_error_ns": p.clock_error_ns,
                    "slow": slow.contains(&p),
                })
            })
            .collect();
        let value = serde_json::json!({
            "ranks": report.size,
            "pairs": pairs,
            "slow_rank": report.slow_rank(),
            "network_of_rank_0": fabric,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let header = ["pair", "transport", "round trip us", "there GB/s", "back GB/s", "clock us", ""];
    let mut rows = table(&header);
    for p in &report.pairs {
        rows.add_row([
            format!("{} - {}", p.a, p.b),
            p.transport.clone(),
            micros(p.round_trip.as_nanos() as f64),
            format!("{:.2}", p.there / 1e9),
            format!("{:.2}", p.back / 1e9),
            format!("{} ± {}", micros(p.clock_offset_ns as f64), micros(p.clock_error_ns as f64)),
            if slow.contains(&p) { "SLOW".into() } else { String::new() },
        ]);
    }
    println!("{rows}");
    // Each reason once, with the pairs that it is about.
    let mut reasons: Vec<(&str, Vec<String>)> = Vec::new();
    for p in &report.pairs {
        let Some(why) = &p.why_not_rdma else { continue };
        let pair = format!("{} - {}", p.a, p.b);
        match reasons.iter_mut().find(|(known, _)| known == why) {
            Some((_, pairs)) => pairs.push(pair),
            None => reasons.push((why, vec![pair])),
        }
    }
    for (why, pairs) in reasons {
        println!("no RDMA between {}: {why}", pairs.join(", "));
    }
    match (report.slow_rank(), slow.first()) {
        (Some(rank), _) => println!("slow: every pair with rank {rank}; look at its host"),
        (None, Some(pair)) => {
            println!("slow: between ranks {} and {}, less than half of what most pairs have", pair.a, pair.b);
        }
        (None, None) => {}
    }
    Ok(())
}
