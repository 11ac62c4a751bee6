//! Orders to the manager, and the workers that carry them out: `ff fs rebalance`, `scrub`, `workers`.

use super::super::status::table;
use super::print;
use crate::connect::{Operator, routing, sentence};
use crate::context::Global;
use anyhow::{Result, bail};
use firefly_proto::mgmtd::administer_request::Order;
use firefly_proto::mgmtd::{
    AdministerRequest, ListWorkersRequest, PublicState, Rebalance, RoutingTable, Scrub, WorkerInfo,
    WorkerState,
};
use firefly_types::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::time::Duration;

/// How often progress is asked for.
const POLL: Duration = Duration::from_millis(250);

/// `ff fs scrub …`
#[derive(clap::Subcommand, Clone, Debug)]
pub enum ScrubCommand {
    /// Begin, or change the rate of the one that is under way
    ///
    /// Every server reads all that it serves, in the background, and repairs from another copy what
    /// fails its checksum. Goes on over restarts.
    Start {
        /// Bytes per second that each server may read; 64MiB unless told otherwise
        #[arg(long, value_name = "SIZE")]
        rate: Option<ByteSize>,
        /// Wait until it is done, with a progress bar; exit code 1 if something is beyond repair
        #[arg(long)]
        wait: bool,
    },
    /// Stop
    Stop,
    /// Show how far each target is and what was found
    Status,
}

/// Gives an order. Prints what the manager says to it, unless more is to be printed later.
pub(super) async fn order(order: Order, quiet: bool, global: &Global) -> Result<()> {
    let mut operator = global.open()?.operator().await?;
    let request = AdministerRequest { order: Some(order) };
    let said = operator.administer(request).await.map_err(|s| sentence(&s))?.into_inner().message;
    match (global.json, quiet) {
        (true, true) => Ok(()),
        (true, false) => print(&json!({ "message": said })),
        (false, _) => {
            println!("{said}");
            Ok(())
        }
    }
}

async fn workers(operator: &mut Operator) -> Result<Vec<WorkerInfo>> {
    let request = ListWorkersRequest {};
    Ok(operator.list_workers(request).await.map_err(|s| sentence(&s))?.into_inner().workers)
}

/// Waits until `done` holds of the routing table, showing the worker's progress meanwhile. A worker
/// that is blocked ends the waiting: nothing would happen before somebody does something.
pub(super) async fn wait_for(
    name: &str,
    global: &Global,
    done: impl Fn(&RoutingTable) -> bool,
) -> Result<()> {
    let context = global.open()?;
    let (mut manager, mut operator) = (context.manager().await?, context.operator().await?);
    let is_shown = !global.json && std::io::stderr().is_terminal();
    let bar = if is_shown { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:32} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar.set_prefix(name.to_owned());
    // A worker looks every half second: what it says before that is about the time before the order.
    let mut blocked = 0;
    loop {
        let worker = workers(&mut operator).await?.into_iter().find(|w| w.name == name);
        let table = routing(&mut manager).await?;
        if done(&table) {
            bar.finish_and_clear();
            return match worker.filter(|_| global.json) {
                Some(worker) => print(&worker_json(&worker)),
                None => Ok(()),
            };
        }
        if let Some(worker) = worker {
            bar.set_length(worker.total);
            bar.set_position(worker.done);
            bar.set_message(worker.detail.clone());
            blocked = if worker.state() == WorkerState::Blocked { blocked + 1 } else { 0 };
            if blocked > 20 {
                bar.finish_and_clear();
                bail!("{name} cannot go on: {}", worker.detail);
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

fn state_name(state: WorkerState) -> &'static str {
    match state {
        WorkerState::Idle => "idle",
        WorkerState::Working => "working",
        WorkerState::Blocked => "blocked",
        WorkerState::Unspecified => "unknown",
    }
}

fn worker_json(w: &WorkerInfo) -> Value {
    json!({
        "worker": w.name, "state": state_name(w.state()), "done": w.done, "total": w.total,
        "detail": w.detail, "throttle": w.throttle,
    })
}

/// Runs `ff fs workers`.
pub(super) async fn list(global: &Global) -> Result<()> {
    let workers = workers(&mut global.open()?.operator().await?).await?;
    if global.json {
        return print(&workers.iter().map(worker_json).collect());
    }
    let mut out = table(&["WORKER", "STATE", "DONE", "DETAIL", "THROTTLE"]);
    for w in &workers {
        let done = if w.total > 0 { format!("{} of {}", w.done, w.total) } else { String::new() };
        out.add_row([
            w.name.clone(),
            state_name(w.state()).to_owned(),
            done,
            w.detail.clone(),
            w.throttle.clone(),
        ]);
    }
    println!("{out}");
    Ok(())
}

/// Runs `ff fs rebalance`.
pub(super) async fn rebalance(stop: bool, wait: bool, global: &Global) -> Result<()> {
    order(Order::Rebalance(Rebalance { stop }), wait, global).await?;
    if !wait {
        return Ok(());
    }
    // What the order began shows as moves, or as a worker at work; both end.
    let mut operator = global.open()?.operator().await?;
    loop {
        wait_for_nothing_moving(global).await?;
        let worker = workers(&mut operator).await?.into_iter().find(|w| w.name == "rebalance");
        match worker {
            Some(w) if w.state() == WorkerState::Idle => {
                return if global.json { print(&worker_json(&w)) } else { Ok(()) };
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
}

async fn wait_for_nothing_moving(global: &Global) -> Result<()> {
    let quiet = Global { json: false, ..global.clone() };
    wait_for("rebalance", &quiet, |table| table.chains.iter().all(|c| c.moving.is_none())).await
}

/// Runs `ff fs scrub …`.
pub(super) async fn scrub(command: ScrubCommand, global: &Global) -> Result<()> {
    match command {
        ScrubCommand::Start { rate, wait } => {
            let wanted = Scrub { stop: false, rate_bytes: rate.map_or(0, |r| r.0) };
            order(Order::Scrub(wanted), wait, global).await?;
            if wait {
                let over = |table: &RoutingTable| table.scrub.is_some_and(|s| !s.active);
                let quiet = Global { json: false, ..global.clone() };
                wait_for("scrub", &quiet, over).await?;
                return scrub_status(true, global).await;
            }
            Ok(())
        }
        ScrubCommand::Stop => order(Order::Scrub(Scrub { stop: true, rate_bytes: 0 }), false, global).await,
        ScrubCommand::Status => scrub_status(false, global).await,
    }
}

async fn scrub_status(fails_if_bad: bool, global: &Global) -> Result<()> {
    let table_now = routing(&mut global.open()?.manager().await?).await?;
    let order = table_now.scrub.unwrap_or_default();
    let serving = |t: &&firefly_proto::mgmtd::TargetInfo| t.state() == PublicState::Serving;
    let of_pass =
        |t: &firefly_proto::mgmtd::TargetInfo| t.scrub.filter(|s| s.pass == order.pass).unwrap_or_default();
    let targets: Vec<_> = table_now.targets.iter().filter(serving).map(|t| (t, of_pass(t))).collect();
    let repaired: u64 = targets.iter().map(|(_, s)| s.blocks_repaired).sum();
    let bad: u64 = targets.iter().map(|(_, s)| s.chunks_bad).sum();
    if global.json {
        let all: Vec<Value> = targets
            .iter()
            .map(|(t, s)| {
                json!({
                    "target": t.target_id, "node": t.node_id, "done": s.done,
                    "chunks_checked": s.chunks_checked, "chunks_total": s.chunks_total,
                    "bytes_checked": s.bytes_checked, "blocks_repaired": s.blocks_repaired,
                    "chunks_bad": s.chunks_bad,
                })
            })
            .collect();
        print(&json!({
            "pass": order.pass, "active": order.active, "rate_bytes": order.rate_bytes,
            "blocks_repaired": repaired, "chunks_bad": bad, "targets": all,
        }))?;
    } else if order.pass == 0 {
        println!("nothing has been scrubbed yet: `ff fs scrub start`");
    } else {
        let mut out = table(&["TARGET", "NODE", "DONE", "CHUNKS", "READ", "REPAIRED", "BEYOND REPAIR"]);
        for (t, s) in &targets {
            out.add_row([
                format!("t{}", t.target_id),
                format!("n{}", t.node_id),
                if s.done { "yes" } else { "no" }.to_owned(),
                format!("{} of {}", s.chunks_checked, s.chunks_total),
                ByteSize(s.bytes_checked).to_string(),
                s.blocks_repaired.to_string(),
                s.chunks_bad.to_string(),
            ]);
        }
        println!("{out}");
        let state = if order.active { "goes on" } else { "is over" };
        println!(
            "pass {} {state}, {}/s per node: {repaired} blocks repaired, {bad} chunks beyond repair",
            order.pass,
            ByteSize(order.rate_bytes)
        );
    }
    if fails_if_bad && bad > 0 {
        bail!("{bad} chunks are beyond repair: no copy of them is whole; restore the files from elsewhere");
    }
    Ok(())
}
