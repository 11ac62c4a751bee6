//! `ff status`: what runs, whether the data is whole, and by what the servers are reached.

use crate::cmd::network;
use crate::context::Global;
use crate::local::LocalCluster;
use anyhow::Result;
use comfy_table::Table;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use firefly_proto::mgmtd::{PublicState, RoutingTable};
use firefly_proto::scheduler::ListNodesRequest;

/// Show what runs, whether the data is whole, and by what the servers are reached
///
/// For each storage and meta server: the transport that this machine reaches it by (RDMA or TCP, and
/// why not RDMA), and what its own connections use. Fails if a role does not run, if data has no
/// copy left that serves, or if a server that runs does not answer.
#[derive(clap::Args, Clone, Debug)]
pub struct StatusArgs {}

/// Health of the chains, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ChainHealth {
    /// All copies serve.
    pub whole: usize,
    /// Serves, with copies missing or being filled.
    pub degraded: usize,
    /// No copy serves.
    pub down: usize,
}

impl ChainHealth {
    /// Counts the chains of `table`.
    pub fn of(table: &RoutingTable) -> Self {
        let mut health = Self::default();
        for chain in &table.chains {
            let serving = chain.states.iter().filter(|&&s| s == PublicState::Serving as i32).count();
            match serving {
                0 => health.down += 1,
                n if n == chain.states.len() => health.whole += 1,
                _ => health.degraded += 1,
            }
        }
        health
    }

    /// Every chain has all its copies.
    pub fn is_whole(&self) -> bool {
        self.degraded == 0 && self.down == 0 && self.whole > 0
    }
}

/// A table in the house style.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY).set_header(header.to_vec());
    table
}

/// Runs `ff status`.
pub async fn run(_: &StatusArgs, global: &Global) -> Result<()> {
    let context = global.open()?;
    let cluster = LocalCluster::at(&context.state);
    let roles = cluster.roles()?;
    let processes: Vec<_> = roles.iter().map(|name| (name.clone(), cluster.running(name))).collect();

    let routing = match context.manager().await {
        Ok(mut manager) => Ok(crate::connect::routing(&mut manager).await?),
        Err(error) => Err(error),
    };
    let nodes = match context.scheduler().await {
        Ok(mut scheduler) => Ok(scheduler
            .list_nodes(ListNodesRequest {})
            .await
            .map_err(|s| crate::connect::sentence(&s))?
            .into_inner()
            .nodes),
        Err(error) => Err(error),
    };
    let health = routing.as_ref().ok().map(ChainHealth::of);
    let network = match &routing {
        Ok(routing) => Some(network::look(&context, &routing.nodes).await),
        Err(_) => None,
    };

    if global.json {
        let value = serde_json::json!({
            "cluster_id": context.cluster.cluster_id,
            "processes": processes.iter().map(|(name, record)| serde_json::json!({
                "name": name,
                "running": record.is_some(),
                "pid": record.as_ref().map(|r| r.pid),
                "address": record.as_ref().map(|r| r.address.clone()),
            })).collect::<Vec<_>>(),
            "chains": health,
            "network": network.as_ref().and_then(|n| n.as_ref().ok()),
            "agents": nodes.as_ref().ok().map(|nodes| nodes.iter().map(|n| serde_json::json!({
                "node_id": n.node_id, "host": n.host, "state": n.state,
            })).collect::<Vec<_>>()),
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        let mut shown = table(&["role", "state", "pid", "address"]);
        for (name, record) in &processes {
            match record {
                Some(r) => shown.add_row([name.clone(), "up".into(), r.pid.to_string(), r.address.clone()]),
                None => shown.add_row([name.clone(), "DOWN".into(), String::new(), String::new()]),
            };
        }
        println!("{shown}");
        match (&health, &routing) {
            (Some(h), Ok(routing)) => println!(
                "chains: {} whole, {} degraded, {} down (replication {})",
                h.whole, h.degraded, h.down, routing.replication
            ),
            (_, Err(error)) => println!("chains: unknown: {error:#}"),
            _ => {}
        }
        match &network {
            Some(Ok(network)) => network.print(),
            Some(Err(error)) => println!("network: {error:#}"),
            None => {}
        }
        match &nodes {
            Ok(nodes) => {
                let ready = nodes.iter().filter(|n| n.state == "ready").count();
                println!("compute nodes: {ready} of {} ready", nodes.len());
            }
            Err(error) => println!("compute nodes: unknown: {error:#}"),
        }
    }
    let broken = processes.iter().any(|(_, record)| record.is_none()) || health.is_none_or(|h| h.down > 0);
    if broken {
        anyhow::bail!(
            "the cluster is not whole: `ff up` starts what does not run; logs are in {}",
            cluster.logs().display()
        );
    }
    if let Some(network) = network.transpose()?
        && let [first, others @ ..] = network.unreachable().as_slice()
    {
        anyhow::bail!(
            "{} does not answer here{}: {}",
            first.name,
            if others.is_empty() { String::new() } else { format!(", nor do {} others", others.len()) },
            first.error.as_deref().unwrap_or_default()
        );
    }
    Ok(())
}
