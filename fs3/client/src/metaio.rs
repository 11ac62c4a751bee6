//! Calls to the meta server, retried; changes travel on exactly-once lanes.

use crate::FsError;
use crate::chunkio::decode;
use crate::lanes::Lanes;
use crate::manager::Session;
use crate::options::ClientOptions;
use crate::retry::Retry;
use crate::routing::RoutingCache;
use crate::stats::{Stats, add};
use firefly_net::{Call, Client};
use firefly_proto::meta::Caller;
use prost::Message;
use std::sync::Arc;
use std::time::Duration;

/// On whose behalf an operation runs.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Credentials {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl Credentials {
    /// The superuser: for operations that the kernel has already authorized.
    pub const ROOT: Credentials = Credentials { uid: 0, gid: 0, groups: Vec::new() };

    /// A user without supplementary groups.
    pub fn user(uid: u32, gid: u32) -> Self {
        Self { uid, gid, groups: Vec::new() }
    }
}

pub(crate) struct MetaIo {
    net: Client,
    routing: RoutingCache,
    session: Arc<Session>,
    lanes: Lanes,
    fixed: Option<String>,
    timeout: Duration,
    stats: Arc<Stats>,
}

impl MetaIo {
    pub(crate) fn new(
        options: &ClientOptions,
        net: Client,
        routing: RoutingCache,
        session: Arc<Session>,
        stats: Arc<Stats>,
    ) -> Self {
        Self {
            net,
            routing,
            session,
            lanes: Lanes::new(options.meta_lanes),
            fixed: options.meta.clone(),
            timeout: options.call_timeout,
            stats,
        }
    }

    fn caller(&self, who: &Credentials, lane: (u32, u64)) -> Caller {
        Caller {
            client_id: self.session.client_id,
            session_epoch: self.session.epoch(),
            channel: lane.0,
            sequence: lane.1,
            uid: who.uid,
            gid: who.gid,
            groups: who.groups.clone(),
            trace_id: rand::random(),
            attempt_epoch: self.session.attempt.0,
            job_id: self.session.attempt.1,
        }
    }

    /// A question: may be asked twice.
    pub(crate) async fn ask<Q: Message, R: Message + Default>(
        &self,
        what: &str,
        method: u16,
        who: &Credentials,
        request: impl Fn(Caller) -> Q,
    ) -> Result<R, FsError> {
        self.call(what, method, |session| {
            let mut caller = self.caller(who, (0, 0));
            caller.session_epoch = session;
            request(caller).encode_to_vec()
        })
        .await
    }

    /// A change: a retry repeats its lane and number, so that it happens once.
    pub(crate) async fn change<Q: Message, R: Message + Default>(
        &self,
        what: &str,
        method: u16,
        who: &Credentials,
        request: impl Fn(Caller) -> Q,
    ) -> Result<R, FsError> {
        let lane = self.lanes.take().await;
        let result = self
            .call(what, method, |session| {
                let mut caller = self.caller(who, (lane.channel(), lane.sequence()));
                caller.session_epoch = session;
                request(caller).encode_to_vec()
            })
            .await;
        match &result {
            Err(FsError::GaveUp { .. }) => drop(lane),
            _ => lane.answered(),
        }
        result
    }

    async fn call<R: Message + Default>(
        &self,
        what: &str,
        method: u16,
        head: impl Fn(u64) -> Vec<u8>,
    ) -> Result<R, FsError> {
        let mut retry = Retry::new(what, &self.stats);
        loop {
            let routing = self.routing.current();
            let servers = routing.meta_servers();
            let turn = retry.attempts() as usize;
            let server = match &self.fixed {
                Some(fixed) => Some(fixed),
                None => servers.get(turn % servers.len().max(1)),
            };
            let failure = match server {
                None => FsError::NoServer {
                    what: what.to_owned(),
                    missing: "the routing table names no meta server".into(),
                },
                Some(server) => {
                    let call = Call {
                        method,
                        head: head(self.session.epoch()).into(),
                        send: None,
                        recv: None,
                        timeout: self.timeout,
                    };
                    match self.net.call(server, call).await {
                        Ok(response) => {
                            add(&self.stats.meta_calls, 1);
                            retry.done();
                            return decode(what, &response.head);
                        }
                        Err(error) => FsError::call(what, error),
                    }
                }
            };
            if !failure.kind().is_retryable() {
                retry.done();
                return Err(failure);
            }
            let news = self.routing.wait_newer(routing.version(), Duration::from_secs(60));
            retry.again(failure, news).await?;
        }
    }
}
