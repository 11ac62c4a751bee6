//! `ff fs chain`, `target` and `node`: the servers, what they hold, and orders about it.

use super::super::status::table;
use super::print;
use super::workers::{order, wait_for};
use crate::connect::routing;
use crate::context::{Global, Usage};
use crate::local::LocalCluster;
use anyhow::{Context as _, Result, bail};
use firefly_proto::mgmtd::administer_request::Order;
use firefly_proto::mgmtd::{
    AddNode, DrainNode, DrainTarget, LocalState, MoveCause, NodeRole, PublicState, RemoveNode, ReplaceTarget,
    RoutingTable, TargetInfo,
};
use firefly_types::{ByteSize, NodeId};
use fs3_core::placement::{RecoveryTraffic, recovery_traffic};
use serde_json::{Value, json};

/// `ff fs chain …`
#[derive(clap::Subcommand, Clone, Debug)]
pub enum ChainCommand {
    /// List all, with how evenly servers would share the copying after a loss
    Ls,
    /// Show everything about one
    Show {
        /// Which, as `ff fs chain ls` names it
        chain: String,
    },
}

/// `ff fs target …`
#[derive(clap::Subcommand, Clone, Debug)]
pub enum TargetCommand {
    /// List all
    Ls,
    /// Move a target to another server
    ///
    /// It goes on serving until the new one has been filled.
    Drain {
        /// Which, as `ff fs target ls` names it
        target: String,
        /// Wait until it is done, with a progress bar
        #[arg(long)]
        wait: bool,
    },
    /// Put a new target in the place of one, on the same server
    ///
    /// For a target whose files are damaged, or after its disk was exchanged.
    Replace {
        /// Which, as `ff fs target ls` names it
        target: String,
        /// Wait until it is done, with a progress bar
        #[arg(long)]
        wait: bool,
    },
}

/// `ff fs node …`
#[derive(clap::Subcommand, Clone, Debug)]
pub enum NodeCommand {
    /// List all
    Ls,
    /// Let a storage server join
    ///
    /// It holds nothing until `ff fs rebalance` moves targets to it. Its own configuration has a
    /// [storage] section with the same number.
    Add {
        /// Its number; default: the next free one
        node: Option<String>,
        /// Lay the server out in the state folder and start it on this machine too
        #[arg(long)]
        local: bool,
    },
    /// Move a storage server's targets to others; it gets no new ones
    Drain {
        /// Which, as `ff fs node ls` names it
        node: String,
        /// Take the order back
        #[arg(long)]
        cancel: bool,
        /// Wait until it is done, with a progress bar
        #[arg(long, conflicts_with = "cancel")]
        wait: bool,
    },
    /// Take a storage server that holds nothing out of the cluster
    Remove {
        /// Which, as `ff fs node ls` names it
        node: String,
    },
}

/// A number as tables show it (`t5`) or plain.
fn number(text: &str, letter: char) -> Result<u32> {
    let digits = text.strip_prefix(letter).unwrap_or(text);
    digits.parse().map_err(|_| Usage(format!("{text:?} is not a number such as {letter}5")).into())
}

async fn table_of(global: &Global) -> Result<RoutingTable> {
    routing(&mut global.open()?.manager().await?).await
}

/// Runs `ff fs chain …`.
pub(super) async fn chain(command: ChainCommand, global: &Global) -> Result<()> {
    match command {
        ChainCommand::Ls => chains(&table_of(global).await?, None, global.json),
        ChainCommand::Show { chain } => {
            let chain = number(&chain, 'c')?;
            show_chain(&table_of(global).await?, chain, global.json)
        }
    }
}

/// Runs `ff fs target …`.
pub(super) async fn target(command: TargetCommand, global: &Global) -> Result<()> {
    let (target, wanted, wait) = match command {
        TargetCommand::Ls => return targets(&table_of(global).await?, global.json),
        TargetCommand::Drain { target, wait } => {
            let target_id = number(&target, 't')?;
            (target_id, Order::DrainTarget(DrainTarget { target_id }), wait)
        }
        TargetCommand::Replace { target, wait } => {
            let target_id = number(&target, 't')?;
            (target_id, Order::ReplaceTarget(ReplaceTarget { target_id }), wait)
        }
    };
    order(wanted, wait, global).await?;
    if wait {
        wait_for("drain", global, |table| table.targets.iter().all(|t| t.target_id != target)).await?;
    }
    Ok(())
}

/// Runs `ff fs node …`.
pub(super) async fn node(command: NodeCommand, global: &Global) -> Result<()> {
    match command {
        NodeCommand::Ls => nodes(&table_of(global).await?, global.json),
        NodeCommand::Add { node, local } => {
            let table = table_of(global).await?;
            let next = table.nodes.iter().map(|n| n.node_id).max().unwrap_or(0) + 1;
            let node_id = node.map_or(Ok(next), |text| number(&text, 'n'))?;
            order(Order::AddNode(AddNode { node_id }), local, global).await?;
            if local {
                let cluster = LocalCluster::at(&global.state_dir()?);
                let ff = std::env::current_exe().context("cannot find this program's own file")?;
                let name = cluster.add_storage(node_id)?;
                let record = cluster.start_role(&ff, &name)?;
                match global.json {
                    true => print(&serde_json::to_value(&record)?)?,
                    false => println!("{name} serves on {} (pid {})", record.address, record.pid),
                }
            }
            Ok(())
        }
        NodeCommand::Drain { node, cancel, wait } => {
            let node_id = number(&node, 'n')?;
            order(Order::DrainNode(DrainNode { node_id, cancel }), wait, global).await?;
            if wait {
                wait_for("drain", global, |table| table.targets.iter().all(|t| t.node_id != node_id)).await?;
            }
            Ok(())
        }
        NodeCommand::Remove { node } => {
            order(Order::RemoveNode(RemoveNode { node_id: number(&node, 'n')? }), false, global).await
        }
    }
}

fn cause_name(cause: MoveCause) -> &'static str {
    match cause {
        MoveCause::Rebuild => "rebuild",
        MoveCause::Drain => "drain",
        MoveCause::Rebalance => "rebalance",
        MoveCause::Replace => "replace",
        MoveCause::Unspecified => "unknown",
    }
}

fn state_name(state: PublicState) -> &'static str {
    match state {
        PublicState::Serving => "serving",
        PublicState::Syncing => "syncing",
        PublicState::Waiting => "waiting",
        PublicState::Lastsrv => "lastsrv",
        PublicState::Offline => "offline",
        PublicState::Unspecified => "unknown",
    }
}

fn local_name(state: LocalState) -> &'static str {
    match state {
        LocalState::UpToDate => "up-to-date",
        LocalState::Online => "online",
        LocalState::Offline => "offline",
        LocalState::Unspecified => "unknown",
    }
}

fn role_name(role: NodeRole) -> &'static str {
    match role {
        NodeRole::Storage => "storage",
        NodeRole::Meta => "meta",
        NodeRole::Unspecified => "unknown",
    }
}

fn chains(routing: &RoutingTable, only: Option<u32>, as_json: bool) -> Result<()> {
    let wanted = || routing.chains.iter().filter(move |c| only.is_none_or(|id| c.chain_id == id));
    let node_of =
        |target: u32| routing.targets.iter().find(|t| t.target_id == target).map_or(0, |t| t.node_id);
    let members = |chain: &firefly_proto::mgmtd::ChainInfo| -> Vec<(u32, u32, &'static str)> {
        chain
            .targets
            .iter()
            .zip(chain.states())
            .map(|(target, state)| (*target, node_of(*target), state_name(state)))
            .collect()
    };
    if as_json {
        let all: Vec<Value> = wanted()
            .map(|chain| {
                let targets: Vec<Value> = members(chain)
                    .into_iter()
                    .map(|(target, node, state)| json!({ "target": target, "node": node, "state": state }))
                    .collect();
                json!({
                    "chain": chain.chain_id, "version": chain.version, "targets": targets,
                    "preferred": chain.preferred,
                    "moving": chain.moving.map(|m| json!({
                        "from": m.from, "to": m.to, "cause": cause_name(m.cause()),
                    })),
                })
            })
            .collect();
        return match only {
            Some(_) => print(all.first().unwrap_or(&Value::Null)),
            None => print(&json!(all)),
        };
    }
    let mut out = table(&["CHAIN", "VERSION", "HEALTH", "TARGETS, HEAD FIRST"]);
    for chain in wanted() {
        let members = members(chain);
        let serving = members.iter().filter(|m| m.2 == "serving").count();
        let health = match serving {
            0 => "down",
            n if n == members.len() => "whole",
            n if n < routing.min_write_replicas as usize => "read-only",
            _ => "degraded",
        };
        let shown: Vec<String> = members.iter().map(|(t, n, state)| format!("t{t}@n{n} {state}")).collect();
        out.add_row([
            format!("c{}", chain.chain_id),
            chain.version.to_string(),
            health.to_owned(),
            shown.join(", "),
        ]);
    }
    println!("{out}");
    if only.is_none() {
        println!("copying after the loss of one node: {}", traffic(routing));
    }
    Ok(())
}

/// How evenly survivors share the copying, as the chains lie now.
fn traffic(routing: &RoutingTable) -> RecoveryTraffic {
    let node_of =
        |target: &u32| routing.targets.iter().find(|t| t.target_id == *target).map(|t| NodeId(t.node_id));
    let chains: Vec<Vec<NodeId>> =
        routing.chains.iter().map(|c| c.targets.iter().filter_map(node_of).collect()).collect();
    recovery_traffic(&chains)
}

fn show_chain(routing: &RoutingTable, chain: u32, as_json: bool) -> Result<()> {
    let Some(info) = routing.chains.iter().find(|c| c.chain_id == chain) else {
        bail!("there is no chain c{chain}: `ff fs chain ls` lists them");
    };
    if as_json {
        return chains(routing, Some(chain), true);
    }
    chains(routing, Some(chain), false)?;
    let preferred: Vec<String> = info.preferred.iter().map(|t| format!("t{t}")).collect();
    println!("preferred order: {}", preferred.join(", "));
    if let Some(m) = &info.moving {
        println!("t{} takes the place of t{} ({})", m.to, m.from, cause_name(m.cause()));
    }
    let members = |t: &&TargetInfo| t.chain_id == chain;
    target_table(routing.targets.iter().filter(members));
    Ok(())
}

fn targets(routing: &RoutingTable, as_json: bool) -> Result<()> {
    if as_json {
        let all: Vec<Value> = routing
            .targets
            .iter()
            .map(|t| {
                json!({
                    "target": t.target_id, "node": t.node_id, "chain": t.chain_id,
                    "state": state_name(t.state()), "local_state": local_name(t.local_state()),
                    "used_bytes": t.used_bytes, "capacity_bytes": t.capacity_bytes,
                    "reason": t.reason, "volatile": t.is_volatile, "retiring": t.retiring,
                })
            })
            .collect();
        return print(&json!(all));
    }
    target_table(routing.targets.iter());
    Ok(())
}

fn target_table<'a>(targets: impl Iterator<Item = &'a TargetInfo>) {
    let mut out = table(&["TARGET", "NODE", "CHAIN", "STATE", "LOCALLY", "USED", "CAPACITY", "REMARK"]);
    for t in targets {
        let remark = match (t.reason.as_str(), t.retiring, t.is_volatile) {
            ("", true, _) => "stops serving",
            ("", false, true) => "lost at power cut",
            (reason, ..) => reason,
        };
        out.add_row([
            format!("t{}", t.target_id),
            format!("n{}", t.node_id),
            format!("c{}", t.chain_id),
            state_name(t.state()).to_owned(),
            local_name(t.local_state()).to_owned(),
            ByteSize(t.used_bytes).to_string(),
            ByteSize(t.capacity_bytes).to_string(),
            remark.to_owned(),
        ]);
    }
    println!("{out}");
}

fn nodes(routing: &RoutingTable, as_json: bool) -> Result<()> {
    let held = |node: u32| routing.targets.iter().filter(|t| t.node_id == node).count();
    if as_json {
        let all: Vec<Value> = routing
            .nodes
            .iter()
            .map(|n| {
                json!({
                    "node": n.node_id, "role": role_name(n.role()), "address": n.address,
                    "alive": n.alive, "silent_ms": n.silent_ms, "draining": n.draining,
                    "targets": held(n.node_id),
                })
            })
            .collect();
        return print(&json!(all));
    }
    let mut out = table(&["NODE", "ROLE", "ADDRESS", "STATE", "TARGETS", "LAST HEARD"]);
    for n in &routing.nodes {
        out.add_row([
            format!("n{}", n.node_id),
            role_name(n.role()).to_owned(),
            n.address.clone(),
            match (n.alive, n.draining) {
                (true, false) => "alive",
                (true, true) => "alive, being emptied",
                (false, false) => "dead",
                (false, true) => "dead, being emptied",
            }
            .to_owned(),
            held(n.node_id).to_string(),
            format!("{} ms ago", n.silent_ms),
        ]);
    }
    println!("{out}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_taken_as_tables_show_them() {
        assert_eq!((number("t5", 't').unwrap(), number("5", 't').unwrap()), (5, 5));
        for wrong in ["", "t", "n5", "5t", "-1"] {
            assert!(number(wrong, 't').unwrap_err().to_string().contains("t5"), "{wrong:?}");
        }
    }
}
