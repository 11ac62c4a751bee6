//! The first tables of a cluster: chains laid over the nodes, targets numbered.

use crate::MgmtdError;
use crate::config::MgmtdSettings;
use crate::event::Role;
use crate::state::{ChainEntry, NodeEntry, Tables};
use firefly_types::{ChainId, RoutingVersion, TargetId};
use fs3_core::chain::Chain;
use fs3_core::placement;

/// Tables for a cluster that has never run. Chains are numbered from 1 in stripe order; the targets
/// of chain c are (c−1)·k+1 to c·k, head first.
pub fn first_tables(settings: &MgmtdSettings) -> Result<Tables, MgmtdError> {
    let k = settings.effective_replication();
    let placed =
        placement::place(&settings.storage_nodes, k as usize, settings.effective_chains_per_node() as usize)?;
    let traffic = placement::recovery_traffic(&placed.chains);
    tracing::info!(chains = placed.chains.len(), %traffic, "chains are laid; copying after the loss of a node");
    let mut tables = Tables {
        routing_version: RoutingVersion(1),
        next_client: 1,
        next_epoch: 1,
        next_target: placed.chains.len() as u32 * k + 1,
        replication: k,
        ..Tables::default()
    };
    for node in &settings.storage_nodes {
        tables.nodes.insert(*node, NodeEntry::new(Role::Storage));
    }
    for (nodes, id) in placed.chains.iter().zip(1..) {
        let chain = ChainId(id);
        let targets: Vec<TargetId> = (0..k).map(|p| TargetId((id - 1) * k + p + 1)).collect();
        for (target, node) in targets.iter().zip(nodes) {
            tables.owners.insert(*target, (*node, chain));
        }
        tables.chains.insert(
            chain,
            ChainEntry { chain: Chain::new(chain, &targets), preferred: targets, moving: None },
        );
    }
    Ok(tables)
}
