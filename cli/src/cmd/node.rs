//! `ff node`: the compute nodes.

use super::job::duration;
use super::status::table;
use crate::connect::sentence;
use crate::context::Global;
use anyhow::Result;
use firefly_proto::scheduler::{CordonNodeRequest, ListNodesRequest, Node};
use firefly_types::{ByteSize, JobId, NodeId};
use std::time::Duration;

/// Compute nodes. NODE is an id, `n1` or `1`.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum NodeCommand {
    /// List the nodes: what they have and what runs on them
    Ls,
    /// Give a node no new ranks; what runs on it goes on
    Cordon {
        /// Which node
        node: NodeId,
        /// Why, for whoever wonders later
        #[arg(long, default_value = "set aside by a person")]
        reason: String,
    },
    /// Give a node new ranks again
    Uncordon {
        /// Which node
        node: NodeId,
    },
}

/// Runs `ff node …`.
pub async fn run(command: NodeCommand, global: &Global) -> Result<()> {
    let context = global.open()?;
    let mut scheduler = context.scheduler().await?;
    let nodes = match command {
        NodeCommand::Ls => {
            let reply = scheduler.list_nodes(ListNodesRequest {}).await;
            reply.map_err(|s| sentence(&s))?.into_inner().nodes
        }
        NodeCommand::Cordon { node, reason } => {
            let request = CordonNodeRequest { node_id: node.0, cordon: true, reason };
            vec![scheduler.cordon_node(request).await.map_err(|s| sentence(&s))?.into_inner()]
        }
        NodeCommand::Uncordon { node } => {
            let request = CordonNodeRequest { node_id: node.0, cordon: false, reason: String::new() };
            vec![scheduler.cordon_node(request).await.map_err(|s| sentence(&s))?.into_inner()]
        }
    };
    if global.json {
        let nodes: Vec<_> = nodes.iter().map(to_json).collect();
        println!("{}", serde_json::to_string_pretty(&nodes)?);
        return Ok(());
    }
    if nodes.is_empty() {
        println!("no node has joined yet: an agent joins by `ff serve` with an [agent] section");
        return Ok(());
    }
    let mut shown =
        table(&["node", "state", "host", "address", "slots", "cores", "memory", "gpus", "jobs", "reason"]);
    for node in &nodes {
        let jobs: Vec<String> = node.jobs.iter().map(|j| JobId(*j).to_string()).collect();
        shown.add_row([
            NodeId(node.node_id).to_string(),
            node.state.clone(),
            node.host.clone(),
            node.address.clone(),
            format!("{}/{}", node.slots_used, node.slots),
            node.cores.to_string(),
            ByteSize(node.memory_bytes).to_string(),
            node.gpus.to_string(),
            jobs.join(" "),
            reason(node),
        ]);
    }
    println!("{shown}");
    Ok(())
}

fn reason(node: &Node) -> String {
    if node.state == "lost" {
        return format!("silent for {}", duration(Duration::from_millis(node.silent_ms)));
    }
    node.reason.clone()
}

fn to_json(node: &Node) -> serde_json::Value {
    serde_json::json!({
        "node": NodeId(node.node_id).to_string(),
        "node_id": node.node_id,
        "state": node.state,
        "host": node.host,
        "address": node.address,
        "slots": node.slots,
        "slots_used": node.slots_used,
        "cores": node.cores,
        "memory_bytes": node.memory_bytes,
        "gpus": node.gpus,
        "jobs": node.jobs,
        "silent_ms": node.silent_ms,
        "reason": node.reason,
    })
}
