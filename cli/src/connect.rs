//! gRPC connections from the command line to the cluster's servers.

use crate::context::Context;
use anyhow::{Context as _, Result};
use firefly_proto::auth::AddToken;
use firefly_proto::mgmtd::manager_client::ManagerClient;
use firefly_proto::scheduler::scheduler_client::SchedulerClient;
use std::time::Duration;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

/// A connection that proves membership with every request.
pub type Authenticated = InterceptedService<Channel, AddToken>;

async fn channel(what: &str, address: &str) -> Result<Channel> {
    Endpoint::from_shared(format!("http://{address}"))
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
        Ok(ManagerClient::with_interceptor(channel, AddToken::new(&self.secret))
            // A routing table of a large cluster passes the default of 4 MiB.
            .max_decoding_message_size(64 << 20))
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
