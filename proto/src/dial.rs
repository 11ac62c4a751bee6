//! How a process dials the gRPC servers: one form of address, one limit of a routing table.

use crate::auth::AddToken;
use crate::mgmtd::manager_client::ManagerClient;
use firefly_types::ClusterSecret;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Error};

/// Largest answer of a manager, bytes: a routing table of a hundred thousand targets passes
/// gRPC's default of 4 MiB.
const MOST_ANSWER_BYTES: usize = 64 << 20;

/// A connection that proves membership with every request.
pub type Authenticated = InterceptedService<Channel, AddToken>;

/// The server at `address`, `ip:port` or `http://ip:port`, not connected yet; the caller adds its
/// timeouts.
pub fn endpoint(address: &str) -> Result<Endpoint, Error> {
    let uri = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    Ok(Endpoint::from_shared(uri)?.tcp_nodelay(true))
}

/// The fs3 manager over `channel`.
pub fn manager(channel: Channel, secret: &ClusterSecret) -> ManagerClient<Authenticated> {
    ManagerClient::with_interceptor(channel, AddToken::new(secret))
        .max_decoding_message_size(MOST_ANSWER_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_an_address_dial_the_same_server() {
        let uri = |address| endpoint(address).unwrap().uri().clone();
        assert_eq!(uri("127.0.0.1:7400"), uri("http://127.0.0.1:7400"));
        assert!(endpoint("not an address").is_err());
    }
}
