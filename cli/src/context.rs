//! What every command needs: where the cluster is, whom to prove membership to, how to print.

use anyhow::{Context as _, Result, bail};
use firefly_net::{Fabric, NetOptions};
use firefly_types::{ClusterId, ClusterSecret};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Options that every command takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Global {
    /// Folder that holds the cluster's description, secret, data and logs
    #[arg(long, env = "FIREFLY_STATE", global = true, value_name = "DIR")]
    pub state: Option<PathBuf>,

    /// Print JSON for programs instead of tables for people
    #[arg(long, global = true)]
    pub json: bool,
}

/// How to reach a cluster; `ff up` writes it as `cluster.toml` into the state folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterDescription {
    /// Identity of the cluster, 32 hexadecimal digits.
    pub cluster_id: String,
    /// gRPC address of the fs3 manager, "ip:port".
    pub manager: String,
    /// gRPC address of the scheduler, "ip:port".
    pub scheduler: String,
    /// How commands on this machine, mounts among them, reach the servers.
    #[serde(default, skip_serializing_if = "crate::serve::is_default")]
    pub net: NetOptions,
}

/// The cluster that a command talks to.
#[derive(Clone, Debug)]
pub struct Context {
    /// The state folder.
    pub state: PathBuf,
    /// Print JSON.
    pub json: bool,
    /// Addresses.
    pub cluster: ClusterDescription,
    /// Membership.
    pub secret: ClusterSecret,
}

impl Global {
    /// The state folder: given, or `$XDG_STATE_HOME/firefly`, or `~/.local/state/firefly`.
    pub fn state_dir(&self) -> Result<PathBuf> {
        if let Some(dir) = &self.state {
            return Ok(std::path::absolute(dir)?);
        }
        if let Some(dir) = std::env::var_os("XDG_STATE_HOME").filter(|d| !d.is_empty()) {
            return Ok(PathBuf::from(dir).join("firefly"));
        }
        let home = std::env::var_os("HOME")
            .filter(|d| !d.is_empty())
            .context("HOME is not set: say where the cluster's state is with --state DIR")?;
        Ok(PathBuf::from(home).join(".local/state/firefly"))
    }

    /// Opens the cluster described in the state folder.
    pub fn open(&self) -> Result<Context> {
        let state = self.state_dir()?;
        Context::open(&state, self.json)
    }
}

impl Context {
    /// Opens the cluster described in `state`.
    pub fn open(state: &Path, json: bool) -> Result<Context> {
        let description = state.join("cluster.toml");
        if !description.exists() {
            bail!("no cluster in {}: start one with `ff up`, or point --state at one", state.display());
        }
        let cluster: ClusterDescription = firefly_types::config::load(&description)?;
        let secret = ClusterSecret::load(&state.join("secret"))?;
        Ok(Context { state: state.to_owned(), json, cluster, secret })
    }

    /// Opens this process's network as the cluster's description wants it: before the data path is
    /// used for the first time.
    pub fn open_network(&self) -> Result<Fabric> {
        Fabric::install(self.cluster.net.clone()).map_err(anyhow::Error::msg)?;
        Ok(Fabric::shared())
    }

    /// Who we are on the data path.
    pub fn identity(&self, name: &str) -> Result<firefly_net::Identity> {
        let cluster: ClusterId = self.cluster.cluster_id.parse().context("cluster.toml: cluster_id")?;
        Ok(firefly_net::Identity { cluster, secret: self.secret.clone(), name: name.to_owned() })
    }
}

/// A mistake in how a command was called, found after parsing: exit code 2.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}
