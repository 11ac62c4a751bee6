//! The network as `ff status` shows it: what this machine has to reach the data servers by, how it
//! reaches each of them, what each says about its own peers, and why something is not RDMA.

use crate::cmd::status::table;
use crate::context::Context;
use anyhow::Result;
use firefly_net::rpc::{NetInfo, PeerInfo};
use firefly_net::{Client, ClientOptions, FabricReport, RailReport};
use firefly_proto::mgmtd::{NodeInfo, NodeRole};
use futures::StreamExt;
use std::collections::BTreeMap;
use std::time::Duration;

/// Time for a server to say something about its network; one that is asked has just sent a
/// heartbeat.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Our name on the servers' side.
const MYSELF: &str = "ff status";
/// Servers asked at one time.
const AT_ONCE: usize = 64;

/// The network, seen from here.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Network {
    /// What commands and mounts on this machine reach servers by.
    pub here: FabricReport,
    /// The servers of file data and names, in the order of their numbers.
    pub servers: Vec<ServerNetwork>,
}

/// One server.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ServerNetwork {
    /// Such as "storage n3".
    pub name: String,
    /// "ip:port".
    pub address: String,
    /// Whether the manager hears of it.
    pub alive: bool,
    /// How this machine has just reached it; nothing if it did not.
    pub from_here: Option<PeerInfo>,
    /// What it says about its network and its peers.
    pub there: Option<NetInfo>,
    /// Why it did not answer.
    pub error: Option<String>,
}

/// Asks every server that lives.
///
/// # Errors
/// This machine's options for the network cannot be followed.
pub async fn look(context: &Context, nodes: &[NodeInfo]) -> Result<Network> {
    let fabric = context.open_network()?;
    let options = ClientOptions {
        pool_bytes: 1 << 20,
        connect_time: ANSWER_WITHIN,
        fabric: fabric.clone(),
        ..ClientOptions::default()
    };
    let client = Client::with_options(context.identity(MYSELF)?, options);
    let mut nodes = nodes.to_vec();
    nodes.sort_by_key(|node| node.node_id);
    let ask = |node: NodeInfo| {
        let client = client.clone();
        async move {
            let answer = match node.alive {
                true => Some(client.info(&node.address, ANSWER_WITHIN).await),
                false => None,
            };
            (node, answer)
        }
    };
    let answers: Vec<_> = futures::stream::iter(nodes).map(ask).buffered(AT_ONCE).collect().await;
    let mut peers: BTreeMap<String, PeerInfo> =
        client.peers().into_iter().map(|peer| (peer.address.clone(), peer)).collect();
    let servers = answers
        .into_iter()
        .map(|(node, answer)| {
            let (there, error) = match answer {
                Some(Ok(info)) => (Some(info), None),
                Some(Err(error)) => (None, Some(error.to_string())),
                None => (None, None),
            };
            let role = match node.role() {
                NodeRole::Storage => "storage",
                NodeRole::Meta => "meta",
                NodeRole::Unspecified => "unknown",
            };
            ServerNetwork {
                name: format!("{role} n{}", node.node_id),
                from_here: there.as_ref().and_then(|_| peers.remove(&node.address)),
                address: node.address,
                alive: node.alive,
                there,
                error,
            }
        })
        .collect();
    Ok(Network { here: fabric.report(), servers })
}

impl Network {
    /// Servers that live and do not answer this machine.
    pub fn unreachable(&self) -> Vec<&ServerNetwork> {
        self.servers.iter().filter(|server| server.error.is_some()).collect()
    }

    /// For people.
    pub fn print(&self) {
        println!("{}", here_in_words(&self.here));
        let mut shown = table(&["server", "address", "from here", "its connections"]);
        for server in &self.servers {
            shown.add_row([
                server.name.clone(),
                server.address.clone(),
                server.from_here.as_ref().map_or("-".into(), way_in_words),
                server.there.as_ref().map_or("-".into(), connections_in_words),
            ]);
        }
        println!("{shown}");
        for server in &self.servers {
            if let Some(note) = self.note(server) {
                println!("{}: {note}", server.name);
            }
        }
    }

    /// What is worth saying about a server beyond what is said about this machine already.
    fn note(&self, server: &ServerNetwork) -> Option<String> {
        if !server.alive {
            return Some("the manager does not hear of it".into());
        }
        if server.error.is_some() {
            return server.error.clone();
        }
        let here = self.here.why_not.as_deref();
        let told = |why: Option<&str>, place: &str| {
            why.filter(|why| Some(*why) != here).map(|why| format!("no RDMA {place}: {why}"))
        };
        let there = server.there.as_ref().and_then(|info| info.fabric.why_not.as_deref());
        let from_here = server.from_here.as_ref().and_then(|peer| peer.why_not_rdma.as_deref());
        told(there, "there").or_else(|| told(from_here, "from here"))
    }
}

fn here_in_words(here: &FabricReport) -> String {
    let asked = match here.transport {
        firefly_net::Transport::Auto => "auto",
        firefly_net::Transport::Tcp => "tcp",
        firefly_net::Transport::Rdma => "rdma",
    };
    let why_not = here.why_not.iter().map(|why| format!("no RDMA here: {why}"));
    let rails = here.rails.iter().map(rail_in_words);
    format!("transport: {asked}; {}", why_not.chain(rails).collect::<Vec<_>>().join("; "))
}

fn rail_in_words(rail: &RailReport) -> String {
    let mut words = vec![rail.name.clone()];
    words.extend(rail.interface.as_ref().map(|interface| format!("on {interface}")));
    words.extend(rail.address.map(|address| address.to_string()));
    words.extend(rail.gid_kind.clone());
    words.extend(rail.mtu.map(|mtu| format!("MTU {mtu}")));
    match &rail.why_not {
        Some(why) => words.push(format!("DOWN ({why})")),
        None => words.push("up".into()),
    }
    words.join(" ")
}

/// "rdma (rxe0)", "tcp", "rdma (rxe0) + tcp".
fn way_in_words(peer: &PeerInfo) -> String {
    let mut ways: Vec<String> = peer
        .connections
        .iter()
        .map(|c| match &c.device {
            Some(device) => format!("{} ({device})", c.transport),
            None => c.transport.clone(),
        })
        .collect();
    ways.sort();
    ways.dedup();
    if ways.is_empty() { "-".into() } else { ways.join(" + ") }
}

/// "5 rdma, 2 tcp": without the one that asked.
fn connections_in_words(info: &NetInfo) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for connection in info.connections.iter().filter(|c| c.name != MYSELF) {
        *counts.entry(&connection.transport).or_default() += 1;
    }
    let words: Vec<String> = counts.iter().map(|(transport, n)| format!("{n} {transport}")).collect();
    let untold = info.connections_now.saturating_sub(info.connections.len());
    let more = (untold > 0).then(|| format!("{untold} more"));
    let all: Vec<String> = words.into_iter().chain(more).collect();
    if all.is_empty() { "none".into() } else { all.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firefly_net::Transport;
    use firefly_net::rpc::ConnectionInfo;

    fn connection(transport: &str, device: Option<&str>) -> ConnectionInfo {
        ConnectionInfo {
            transport: transport.into(),
            device: device.map(str::to_owned),
            ..ConnectionInfo::default()
        }
    }

    fn without_rdma(why: &str) -> FabricReport {
        FabricReport { transport: Transport::Auto, why_not: Some(why.into()), rails: Vec::new() }
    }

    fn server(from_here: Option<&str>, there: Option<&str>) -> ServerNetwork {
        ServerNetwork {
            name: "storage n3".into(),
            address: "10.0.0.3:7403".into(),
            alive: true,
            from_here: Some(PeerInfo {
                why_not_rdma: from_here.map(str::to_owned),
                connections: vec![connection("tcp", None)],
                ..PeerInfo::default()
            }),
            there: Some(NetInfo {
                fabric: FabricReport { why_not: there.map(str::to_owned), ..FabricReport::default() },
                ..NetInfo::default()
            }),
            error: None,
        }
    }

    #[test]
    fn a_reason_is_told_once_and_where_it_lies() {
        let absent = "libibverbs.so.1 is not installed";
        let network = Network { here: without_rdma(absent), servers: Vec::new() };
        assert_eq!(here_in_words(&network.here), format!("transport: auto; no RDMA here: {absent}"));
        assert_eq!(network.note(&server(Some(absent), Some(absent))), None);
        assert_eq!(network.note(&server(Some(absent), None)), None);
        assert_eq!(
            network.note(&server(Some(absent), Some("no RDMA device"))).unwrap(),
            "no RDMA there: no RDMA device"
        );
        let rdma = FabricReport { why_not: None, ..without_rdma("") };
        let network = Network { here: rdma, servers: Vec::new() };
        assert_eq!(
            network.note(&server(Some("rxe0: no path"), None)).unwrap(),
            "no RDMA from here: rxe0: no path"
        );
        let mut dead = server(None, None);
        dead.alive = false;
        assert_eq!(network.note(&dead).unwrap(), "the manager does not hear of it");
        let mut mute = server(None, None);
        mute.error = Some("no answer".into());
        assert_eq!(network.note(&mute).unwrap(), "no answer");
    }

    #[test]
    fn ways_and_connections_are_summed_up() {
        let connections = vec![
            connection("tcp", None),
            connection("rdma", Some("rxe0")),
            connection("rdma", Some("rxe1")),
            connection("rdma", Some("rxe0")),
        ];
        let peer = PeerInfo { connections: connections.clone(), ..PeerInfo::default() };
        assert_eq!(way_in_words(&peer), "rdma (rxe0) + rdma (rxe1) + tcp");
        let mut info = NetInfo { connections, connections_now: 7, ..NetInfo::default() };
        info.connections.push(ConnectionInfo { name: MYSELF.into(), ..connection("tcp", None) });
        assert_eq!(connections_in_words(&info), "3 rdma, 1 tcp, 2 more");
    }

    #[test]
    fn rails_up_and_down_are_told_apart() {
        let up = RailReport {
            name: "rxe0".into(),
            up: true,
            why_not: None,
            link_layer: Some("ethernet".into()),
            address: Some("10.1.0.1".parse().unwrap()),
            gid: None,
            gid_index: Some(1),
            gid_kind: Some("RoCE v2".into()),
            mtu: Some(4096),
            interface: Some("d0".into()),
            memory_windows: false,
            work: Default::default(),
        };
        assert_eq!(rail_in_words(&up), "rxe0 on d0 10.1.0.1 RoCE v2 MTU 4096 up");
        let down = RailReport {
            why_not: Some("port 1 is down".into()),
            address: None,
            gid_kind: None,
            mtu: None,
            interface: None,
            ..up
        };
        assert_eq!(rail_in_words(&down), "rxe0 DOWN (port 1 is down)");
    }
}
