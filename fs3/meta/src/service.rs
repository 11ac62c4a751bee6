//! The namespace as a service on net frames.

use crate::meta::{Meta, method_name};
use firefly_net::{Reply, Request, Service};
use firefly_types::{ErrorKind, WireError};
use futures::future::BoxFuture;
use std::sync::Arc;

/// Answers calls from the wire.
pub struct MetaService(Arc<Meta>);

impl MetaService {
    /// Serves `meta`.
    pub fn new(meta: Arc<Meta>) -> Self {
        Self(meta)
    }
}

impl Service for MetaService {
    /// Every message of the namespace fits in a head.
    fn payload_limit(&self, _method: u16) -> usize {
        0
    }

    fn handle<'a>(&'a self, request: Request) -> BoxFuture<'a, Result<Reply, WireError>> {
        Box::pin(async move {
            match self.0.handle(request.method, &request.head).await {
                Ok(reply) => Ok(Reply::head(reply)),
                Err(error) => {
                    let (method, peer) = (method_name(request.method), request.peer.as_str());
                    match error.kind() {
                        ErrorKind::Corrupt | ErrorKind::Internal | ErrorKind::Unavailable => {
                            tracing::error!(method, peer, %error, "a request could not be served");
                        }
                        _ => tracing::debug!(method, peer, %error, "refused"),
                    }
                    Err(error.to_wire())
                }
            }
        })
    }
}
