//! `ff serve`: runs the roles that a configuration names, on one node of a cluster of any size.

use anyhow::{Context as _, Result, bail};
use firefly_net::{Fabric, Identity, NetOptions};
use firefly_types::{ByteSize, ClusterId, ClusterSecret, NodeId};
use fs3_meta::MetaSettings;
use fs3_mgmtd::MgmtdSettings;
use scheduler_server::Policy;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tokio_util::sync::CancellationToken;

/// One node's configuration: identity, and a section for each role that the node plays.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Identity of the cluster, 32 hexadecimal digits; the same on every node.
    pub cluster_id: String,
    /// File with the cluster secret, 64 hexadecimal digits, mode 0600.
    pub secret_file: PathBuf,
    /// How the node reaches its peers. Default: RDMA where both sides have it, else TCP.
    #[serde(default, skip_serializing_if = "is_default")]
    pub net: NetOptions,
    /// Runs the fs3 manager here.
    pub manager: Option<ManagerSection>,
    /// Runs a metadata server here.
    pub meta: Option<MetaSection>,
    /// Runs a storage server here.
    pub storage: Option<StorageSection>,
    /// Runs the scheduler here.
    pub scheduler: Option<SchedulerSection>,
    /// Runs an agent here.
    pub agent: Option<AgentSection>,
}

/// Keeps `[net]` out of files that say nothing about it.
pub(crate) fn is_default(options: &NetOptions) -> bool {
    *options == NetOptions::default()
}

/// The fs3 manager.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManagerSection {
    /// Folder for the chain tables.
    pub data_dir: PathBuf,
    /// gRPC address.
    pub listen: SocketAddr,
    /// What the cluster looks like and how quickly it reacts.
    pub settings: MgmtdSettings,
}

/// A metadata server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetaSection {
    /// Folder for the namespace.
    pub data_dir: PathBuf,
    /// The node's number, unique in the fs3 cluster.
    pub node_id: u32,
    /// Address of its net service.
    pub listen: SocketAddr,
    /// gRPC address of the manager.
    pub manager: String,
    /// What may be tuned.
    #[serde(default)]
    pub settings: MetaSettings,
}

/// A storage server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageSection {
    /// Folder that holds the node's targets, one folder each.
    pub data_dir: PathBuf,
    /// The node's number, unique in the fs3 cluster.
    pub node_id: u32,
    /// Address of its net service.
    pub listen: SocketAddr,
    /// gRPC address of the manager.
    pub manager: String,
    /// Most bytes that each target may hold. Default: what the disk takes.
    pub capacity: Option<ByteSize>,
}

/// The scheduler.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SchedulerSection {
    /// Folder for jobs and logs.
    pub data_dir: PathBuf,
    /// gRPC address.
    pub listen: SocketAddr,
    /// Times and limits.
    #[serde(default)]
    pub policy: Policy,
}

/// An agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentSection {
    /// Folder for the ranks' records and logs.
    pub data_dir: PathBuf,
    /// The node's number, unique in the scheduler.
    pub node_id: u32,
    /// gRPC address of the scheduler.
    pub scheduler: String,
    /// Address at which the node's ranks are reached by other nodes' ranks.
    pub address: String,
    /// Ranks that the node takes. Default: one per core.
    pub slots: Option<u32>,
}

impl NodeConfig {
    /// A node without roles.
    pub fn new(cluster_id: &str, secret_file: &Path) -> Self {
        Self {
            cluster_id: cluster_id.to_owned(),
            secret_file: secret_file.to_owned(),
            net: NetOptions::default(),
            manager: None,
            meta: None,
            storage: None,
            scheduler: None,
            agent: None,
        }
    }

    /// Adds a manager as `ff up` runs it.
    pub fn with_manager(
        mut self,
        dir: &Path,
        listen: SocketAddr,
        storage_nodes: &[u32],
        replication: u32,
    ) -> Self {
        let mut settings = MgmtdSettings::new(storage_nodes.iter().copied().map(NodeId).collect());
        settings.replication = Some(replication);
        // All servers share one machine: refusing writes while one is gone would protect nothing.
        settings.min_write_replicas = Some(1);
        self.manager = Some(ManagerSection { data_dir: dir.to_owned(), listen, settings });
        self
    }

    /// Adds a metadata server.
    pub fn with_meta(mut self, dir: &Path, node_id: u32, listen: SocketAddr, manager: SocketAddr) -> Self {
        self.meta = Some(MetaSection {
            data_dir: dir.to_owned(),
            node_id,
            listen,
            manager: manager.to_string(),
            settings: MetaSettings::default(),
        });
        self
    }

    /// Adds a storage server.
    pub fn with_storage(mut self, dir: &Path, node_id: u32, listen: SocketAddr, manager: SocketAddr) -> Self {
        self.storage = Some(StorageSection {
            data_dir: dir.to_owned(),
            node_id,
            listen,
            manager: manager.to_string(),
            capacity: None,
        });
        self
    }

    /// Adds a scheduler.
    pub fn with_scheduler(mut self, dir: &Path, listen: SocketAddr) -> Self {
        self.scheduler =
            Some(SchedulerSection { data_dir: dir.to_owned(), listen, policy: Policy::default() });
        self
    }

    /// Adds an agent.
    pub fn with_agent(mut self, dir: &Path, node_id: u32, scheduler: SocketAddr) -> Self {
        self.agent = Some(AgentSection {
            data_dir: dir.to_owned(),
            node_id,
            scheduler: scheduler.to_string(),
            address: "127.0.0.1".to_owned(),
            // Several agents share one machine's cores here, so that cores would say little.
            slots: Some(8),
        });
        self
    }

    /// The first address that the node listens on, for tables; empty if it only connects.
    pub fn address(&self) -> String {
        let listens = [
            self.manager.as_ref().map(|s| s.listen),
            self.meta.as_ref().map(|s| s.listen),
            self.storage.as_ref().map(|s| s.listen),
            self.scheduler.as_ref().map(|s| s.listen),
        ];
        listens.into_iter().flatten().next().map(|a| a.to_string()).unwrap_or_default()
    }
}

/// Run the roles that a configuration names, on one node
///
/// One file may name several roles: sections [manager], [meta], [storage], [scheduler] and
/// [agent]; [net] says how the node reaches its peers. `deploy/examples` holds files to start from, docs/operations.md explains the keys.
/// Ends cleanly at SIGTERM and SIGINT. FIREFLY_LOG sets what is logged (info by default).
#[derive(clap::Args, Clone, Debug)]
pub struct ServeArgs {
    /// The node's configuration (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Write this file once every role serves
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
}

/// What waits for a role's end.
type Ending = futures::future::BoxFuture<'static, Result<()>>;

/// Runs `ff serve`.
pub async fn run(args: &ServeArgs) -> Result<()> {
    let config: NodeConfig = firefly_types::config::load(&args.config)?;
    let stop = CancellationToken::new();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let endings = start(config, &stop).await?;
    if let Some(path) = &args.ready_file {
        std::fs::write(path, "").with_context(|| format!("cannot write {}", path.display()))?;
    }
    let mut all = futures::future::select_all(endings);
    let outcome = loop {
        tokio::select! {
            // A role that ends unasked takes the process down, so that whoever watches it sees it.
            (outcome, _, rest) = &mut all => {
                outcome?;
                if !stop.is_cancelled() {
                    bail!("a role ended by itself; see the log above");
                }
                if rest.is_empty() {
                    break Ok(());
                }
                all = futures::future::select_all(rest);
            }
            _ = terminate.recv(), if !stop.is_cancelled() => stop.cancel(),
            _ = tokio::signal::ctrl_c(), if !stop.is_cancelled() => stop.cancel(),
        }
    };
    tracing::info!("stopped");
    outcome
}

/// Starts every role of `config`; returns once each serves.
async fn start(config: NodeConfig, stop: &CancellationToken) -> Result<Vec<Ending>> {
    let cluster: ClusterId = config.cluster_id.parse().context("cluster_id is not 32 hexadecimal digits")?;
    let secret = ClusterSecret::load(&config.secret_file)?;
    Fabric::install(config.net).map_err(anyhow::Error::msg)?;
    let identity = |name: String| Identity { cluster, secret: secret.clone(), name };
    let mut endings: Vec<Ending> = Vec::new();
    if let Some(section) = config.manager {
        let running = fs3_mgmtd::serve(
            fs3_mgmtd::MgmtdConfig {
                listen: section.listen,
                data_dir: section.data_dir,
                identity: identity("manager".into()),
                settings: section.settings,
            },
            stop.clone(),
        )
        .await?;
        endings.push(Box::pin(async move { Ok(running.finished().await?) }));
    }
    if let Some(section) = config.meta {
        let running = fs3_meta::serve(
            fs3_meta::MetaConfig {
                node_id: NodeId(section.node_id),
                listen: section.listen,
                manager: section.manager,
                data_dir: section.data_dir,
                identity: identity(format!("meta n{}", section.node_id)),
                settings: section.settings,
            },
            stop.clone(),
        )
        .await?;
        endings.push(Box::pin(async move {
            running.stopped().await;
            Ok(())
        }));
    }
    if let Some(section) = config.storage {
        let running = fs3_storage::serve(
            fs3_storage::StorageConfig {
                node_id: NodeId(section.node_id),
                listen: section.listen,
                manager: section.manager,
                data_dir: section.data_dir,
                identity: identity(format!("storage n{}", section.node_id)),
                capacity_bytes: section.capacity.map_or(u64::MAX, |c| c.0),
            },
            stop.clone(),
        )
        .await?;
        endings.push(Box::pin(async move {
            running.stopped().await;
            Ok(())
        }));
    }
    if let Some(section) = config.scheduler {
        let mut wanted =
            scheduler_server::SchedulerConfig::new(section.listen, section.data_dir, secret.clone());
        wanted.policy = section.policy;
        let running = scheduler_server::serve(wanted, stop.clone()).await?;
        endings.push(Box::pin(async move {
            running.wait().await;
            Ok(())
        }));
    }
    if let Some(section) = config.agent {
        let mut wanted = firefly_agent::AgentConfig::new(
            NodeId(section.node_id),
            section.scheduler,
            section.data_dir,
            secret.clone(),
        );
        wanted.address = section.address;
        wanted.slots = section.slots;
        let running = firefly_agent::serve(wanted, stop.clone()).await?;
        endings.push(Box::pin(async move {
            running.wait().await;
            Ok(())
        }));
    }
    if endings.is_empty() {
        bail!("the configuration names no role: add a section such as [storage]");
    }
    Ok(endings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use firefly_net::Transport;

    #[test]
    fn the_examples_are_what_serve_reads() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
        let load = |path: &Path| firefly_types::config::load::<NodeConfig>(path);
        let mut seen = 0;
        for entry in std::fs::read_dir(examples).unwrap() {
            let path = entry.unwrap().path();
            let config = load(&path).unwrap();
            assert!(config.manager.is_some() || config.storage.is_some(), "{}", path.display());
            // What an example shows commented out is right too.
            let text = std::fs::read_to_string(&path).unwrap();
            let all: Vec<&str> = text
                .lines()
                .map(|line| {
                    line.strip_prefix("# ")
                        .filter(|l| l.starts_with('[') || l.contains(" = "))
                        .unwrap_or(line)
                })
                .collect();
            let dir = tempfile::tempdir().unwrap();
            let uncommented = dir.path().join("all.toml");
            std::fs::write(&uncommented, all.join("\n")).unwrap();
            let config = load(&uncommented).unwrap();
            if config.storage.is_some() {
                assert_eq!(config.net.devices, ["mlx5_0"]);
                assert_eq!((config.net.storage.service_level, config.net.storage.traffic_class), (3, 104));
            }
            seen += 1;
        }
        assert!(seen >= 2);
    }

    #[test]
    fn net_is_optional_kept_and_checked() {
        let base = "cluster_id = \"x\"\nsecret_file = \"s\"\n";
        let config: NodeConfig = toml::from_str(base).unwrap();
        assert_eq!(config.net, NetOptions::default());
        assert!(!toml::to_string(&config).unwrap().contains("net"), "files stay as small as they were");
        let config: NodeConfig = toml::from_str(&format!("{base}[net]\ntransport = \"rdma\"\n")).unwrap();
        assert_eq!(config.net.transport, Transport::Rdma);
        let again: NodeConfig = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again.net, config.net);
        for wrong in ["transport = \"udp\"", "device = [\"mlx5_0\"]", "devices = \"mlx5_0\""] {
            let error = toml::from_str::<NodeConfig>(&format!("{base}[net]\n{wrong}\n")).unwrap_err();
            assert!(error.to_string().contains(wrong), "{error}");
        }
    }
}
