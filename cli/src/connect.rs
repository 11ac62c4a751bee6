//! gRPC connections from the command line to the cluster's servers.

use crate::context::Context;
use anyhow::{Context as _, Result};
use firefly_proto::auth::AddToken;
use firefly_proto::dial;
pub use firefly_proto::dial::Authenticated;
use firefly_proto::mgmtd::manager_client::ManagerClient;
use firefly_proto::mgmtd::operator_client::OperatorClient;
use firefly_proto::mgmtd::{GetRoutingRequest, RoutingTable};
use firefly_proto::scheduler::scheduler_client::SchedulerClient;
use std::time::Duration;
use tonic::transport::Channel;

/// The fs3 manager, for operators.
pub type Operator = OperatorClient<Authenticated>;

async fn channel(what: &str, address: &str) -> Result<Channel> {
    dial::endpoint(address)
        .with_context(|| format!("cluster.toml: {address:?} is not an address"))?
        .connect_timeout(Duration::from_secs(5))
        .connect()
        .await
        .with_context(|| format!("the {what} at {address} does not answer: is the cluster up? (`ff status`)"))
}

impl Context {
    /// The fs3 manager.
    pub async fn manager(&self) -> Result<ManagerClient<Authenticated>> {
        let channel = channel("fs3 manager", &self.cluster.manager).await?;
        Ok(dial::manager(channel, &self.secret))
    }

    /// What the fs3 manager answers to operators.
    pub async fn operator(&self) -> Result<Operator> {
        let channel = channel("fs3 manager", &self.cluster.manager).await?;
        Ok(OperatorClient::with_interceptor(channel, AddToken::new(&self.secret)))
    }

    /// The scheduler.
    pub async fn scheduler(&self) -> Result<SchedulerClient<Authenticated>> {
        let channel = channel("scheduler", &self.cluster.scheduler).await?;
        Ok(SchedulerClient::with_interceptor(channel, AddToken::new(&self.secret)))
    }
}

/// The sentence of a gRPC error, without the transport's decoration.
pub fn sentence(status: &tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}

/// The routing table as it is now.
pub async fn routing(manager: &mut ManagerClient<Authenticated>) -> Result<RoutingTable> {
    let request = GetRoutingRequest { known_version: 0, wait_ms: 0 };
    Ok(manager.get_routing(request).await.map_err(|s| sentence(&s))?.into_inner())
}
