//! What a process says about its network, for people: every [`Server`](super::Server) answers
//! [`Client::info`](super::Client::info) by itself, and [`Client::peers`](super::Client::peers) says
//! the same of the calling side. The answer travels as JSON, so that `ff status` of one release
//! reads the answer of another: fields may be added, and those that are missing read as nothing.

use super::NetStats;
use crate::fabric::{Fabric, FabricReport};
use crate::link::Counters;
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// The method that every server answers by itself. A service never sees it.
pub const INFO_METHOD: u16 = u16::MAX;
/// Connections told of: each takes up to some 400 bytes of a head of at most 1 MiB.
const MOST_TOLD: usize = 2000;

/// What a server says about its network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetInfo {
    /// The process, such as "storage n3".
    pub name: String,
    /// What it has to reach its peers by.
    pub fabric: FabricReport,
    /// Connections that others hold to it now.
    pub connections_now: usize,
    /// Some thousand of them, by name and address.
    pub connections: Vec<ConnectionInfo>,
    /// Connections made since its start, those that ended included.
    pub connections_made: u64,
    /// Connections refused by the handshake since its start.
    pub connections_refused: u64,
    /// Calls taken up since its start.
    pub calls: u64,
}

/// One connection, seen from either side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConnectionInfo {
    /// The other side's name; empty on the calling side, which knows addresses only.
    pub name: String,
    /// The other side's address, "ip:port".
    pub address: String,
    /// "tcp" or "rdma".
    pub transport: String,
    /// This side's RDMA device, if one is used.
    pub device: Option<String>,
    /// Bytes sent, headers included.
    pub bytes_sent: u64,
    /// Bytes received, headers included.
    pub bytes_received: u64,
    /// Calls whose answers are not complete.
    pub calls_in_flight: usize,
    /// Seconds since it was made.
    pub age_seconds: u64,
}

/// One server and this client's connections to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PeerInfo {
    /// "ip:port".
    pub address: String,
    /// The connections that live, the one for small calls first.
    pub connections: Vec<ConnectionInfo>,
    /// Why RDMA is not used, or not all of it, if so.
    pub why_not_rdma: Option<String>,
}

/// What can be told about a connection beside its calls.
pub(super) struct About {
    pub(super) transport: &'static str,
    pub(super) device: Option<String>,
    pub(super) counters: std::sync::Arc<Counters>,
    pub(super) since: Instant,
}

impl About {
    pub(super) fn info(&self, name: &str, address: &str, calls_in_flight: usize) -> ConnectionInfo {
        ConnectionInfo {
            name: name.to_owned(),
            address: address.to_owned(),
            transport: self.transport.to_owned(),
            device: self.device.clone(),
            bytes_sent: self.counters.sent.load(Ordering::Relaxed),
            bytes_received: self.counters.received.load(Ordering::Relaxed),
            calls_in_flight,
            age_seconds: self.since.elapsed().as_secs(),
        }
    }
}

impl NetInfo {
    pub(super) fn new(
        name: &str,
        fabric: &Fabric,
        mut connections: Vec<ConnectionInfo>,
        stats: NetStats,
    ) -> NetInfo {
        let connections_now = connections.len();
        connections.sort_by(|a, b| (&a.name, &a.address).cmp(&(&b.name, &b.address)));
        connections.truncate(MOST_TOLD);
        NetInfo {
            name: name.to_owned(),
            fabric: fabric.report(),
            connections_now,
            connections,
            connections_made: stats.connections,
            connections_refused: stats.refused,
            calls: stats.calls,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::RailReport;

    #[test]
    fn another_releases_answer_is_read() {
        let newer = r#"{"name":"storage n1","fabric":{"transport":"auto","rails":[{"name":"mlx5_0","speed":400}],"more":1},
            "connections":[{"address":"10.0.0.2:1","transport":"rdma","colour":"red"}],"more":{}}"#;
        let info: NetInfo = serde_json::from_str(newer).unwrap();
        assert_eq!(
            (info.fabric.rails, info.connections[0].transport.as_str()),
            (vec![RailReport { name: "mlx5_0".into(), ..Default::default() }], "rdma")
        );
        assert_eq!(serde_json::from_str::<NetInfo>("{}").unwrap(), NetInfo::default());
    }

    proptest::proptest! {
        #[test]
        fn whatever_is_told_does_no_harm(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            let _ = serde_json::from_slice::<NetInfo>(&bytes);
            let mut text = serde_json::to_vec(&NetInfo::default()).unwrap();
            for (at, byte) in bytes.iter().enumerate().take(8) {
                let at = (at * 37 + usize::from(*byte)) % text.len();
                text[at] = *byte;
            }
            let _ = serde_json::from_slice::<NetInfo>(&text);
        }
    }

    #[test]
    fn what_is_told_comes_back() {
        let connection =
            ConnectionInfo { name: "a".into(), device: Some("rxe0".into()), ..Default::default() };
        let info =
            NetInfo::new("b", &Fabric::tcp(), vec![connection], NetStats { calls: 7, ..Default::default() });
        let text = serde_json::to_string(&info).unwrap();
        assert_eq!(serde_json::from_str::<NetInfo>(&text).unwrap(), info);
        assert_eq!(info.fabric.why_not.as_deref(), Some("TCP was asked for"));
    }
}
