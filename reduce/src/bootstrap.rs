//! Forming a group: every rank publishes its card, reads all cards, and connects to each peer:
//! ranks of one node exchange memory segments over a unix socket, others open a channel.
//!
//! The higher rank of a pair dials, the lower one accepts. Both sides prove the group's secret.

use crate::ReduceError;
use crate::comm::Config;
use crate::engine::{Engine, Names, Watch};
use crate::fork;
use crate::group::Parts;
use crate::local::{self, LocalPeer};
use crate::network;
use crate::options::Options;
use crate::placement::Placement;
use crate::scratch::Scratch;
use crate::shm::arena::Arena;
use crate::shm::ring::{Doorbell, RingLink};
use crate::shm::segment::Segment;
use crate::store::{Store, StoreError};
use crate::wire::Wire;
use firefly_net::{Channel, ChannelListener, ChannelOptions, connect_channel};
use firefly_types::ClusterSecret;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Largest group: what the reduction's scratch is laid out for.
pub(crate) const MOST_RANKS: u32 = 4096;
const HELLO_MAGIC: [u8; 8] = *b"ffrhelo1";

/// What a rank tells the others about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Card {
    node: String,
    /// Abstract name of its unix socket: random, so it is a nonce as well.
    socket: String,
    address: SocketAddr,
    /// Rank 0's are the group's.
    options: Options,
}

impl Card {
    fn encode(&self) -> Vec<u8> {
        format!("ffr2\n{}\n{}\n{}\n{}", self.node, self.socket, self.address, self.options).into_bytes()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut lines = text.splitn(5, '\n');
        if lines.next()? != "ffr2" {
            return None;
        }
        Some(Self {
            node: lines.next()?.to_owned(),
            socket: lines.next()?.to_owned(),
            address: lines.next()?.parse().ok()?,
            options: lines.next()?.parse().ok()?,
        })
    }
}

/// FNV-1a: names a group in headers and keys. Not for secrets.
fn hash64(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Which node this process is on, if the environment does not say: host name and boot.
pub(crate) fn default_node_key() -> String {
    if let Ok(id) = std::env::var("FIREFLY_NODE_ID")
        && !id.is_empty()
    {
        return id;
    }
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let (host, boot) = (read("/proc/sys/kernel/hostname"), read("/proc/sys/kernel/random/boot_id"));
    format!("{}/{}", host.trim(), boot.trim())
}

/// The address that peers on other nodes reach this one at.
fn default_address(master: Option<&str>) -> IpAddr {
    // Connecting a datagram socket sends nothing; it only asks for the route.
    let route = |to: &str| -> Option<IpAddr> {
        let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.connect((to, 9)).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    master.and_then(route).unwrap_or(IpAddr::from([127, 0, 0, 1]))
}

fn missing_ranks(
    store: &dyn Store,
    key: impl Fn(u32) -> String,
    ranks: impl Iterator<Item = u32>,
) -> Vec<String> {
    ranks
        .filter(|&r| matches!(store.get(&key(r), Duration::from_millis(1)), Err(StoreError::Timeout { .. })))
        .map(|r| r.to_string())
        .collect()
}

/// Forms the group.
pub(crate) fn form(config: &Config, store: &dyn Store) -> Result<Parts, ReduceError> {
    let now = Instant::now();
    let limit = config.form_timeout.unwrap_or(config.timeout);
    let deadline = now + limit;
    let options = config.options.clone().map_or_else(Options::from_env, Ok)?;
    let (rank, size) = (config.rank, config.size);
    if size == 0 || size > MOST_RANKS || rank >= size {
        return Err(ReduceError::invalid(format!(
            "rank {rank} of {size}: the group has 1 to {MOST_RANKS} ranks, numbered from 0"
        )));
    }
    let names = Arc::new(Names { group: config.group.clone(), rank, size });
    let doorbell = rustix::event::eventfd(
        0,
        rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK,
    )
    .map_err(|e| ReduceError::system("eventfd", e))?;
    let group = hash64(&config.group);
    if size == 1 {
        let wire = Wire::new(0, 0, vec![None], now);
        let engine =
            Engine::new(names, wire, None, None, Vec::new(), Vec::new(), config.heartbeat_timeout, now);
        let placement = Placement::new(&[0]);
        return Ok(Parts { engine, doorbell, timeout: config.timeout, placement, options });
    }
    let us = names.us();
    let fail = |detail: String| ReduceError::bootstrap(format!("{us} cannot be formed: {detail}"));
    let key = |what: &str| format!("ffr/{group:016x}/{what}");
    let secret = shared_secret(config, store, &key("secret"), deadline).map_err(|e| fail(e.to_string()))?;

    let socket = format!("firefly-reduce-{:032x}", rand::random::<u128>());
    let local_address = std::os::unix::net::SocketAddr::from_abstract_name(socket.as_bytes())
        .map_err(|e| ReduceError::system("naming a unix socket", e))?;
    let unix = UnixListener::bind_addr(&local_address)
        .map_err(|e| ReduceError::system("listening on a unix socket", e))?;
    let _guard = fork::guard(std::os::fd::AsFd::as_fd(&unix));
    let address = match &config.bind_address {
        Some(address) => address
            .parse()
            .map_err(|_| ReduceError::invalid(format!("{address:?} is no IP address to bind to")))?,
        None => default_address(config.master_address.as_deref()),
    };
    let listener = ChannelListener::bind(SocketAddr::new(address, 0))
        .map_err(|e| fail(format!("cannot listen on {address}: {e}; set FIREFLY_BIND_ADDR")))?;
    let node = config.node_key.clone().unwrap_or_else(default_node_key);
    if node.contains('\n') {
        return Err(ReduceError::invalid("the node key must be one line"));
    }
    let card = Card { node, socket, address: listener.local_addr(), options };
    let card_key = |r: u32| key(&format!("r{r}"));
    store.set(&card_key(rank), &card.encode()).map_err(|e| fail(e.to_string()))?;
    let mut cards = Vec::with_capacity(size as usize);
    for r in 0..size {
        let left = deadline.saturating_duration_since(Instant::now());
        match store.get(&card_key(r), left) {
            Ok(bytes) => cards.push(
                Card::decode(&bytes)
                    .ok_or_else(|| fail(format!("rank {r} published a card of another version")))?,
            ),
            Err(StoreError::Timeout { .. }) => {
                let missing = missing_ranks(store, card_key, r..size);
                return Err(fail(format!(
                    "missing ranks after {limit:?}: {}",
                    if missing.is_empty() { r.to_string() } else { missing.join(", ") }
                )));
            }
            Err(e) => return Err(fail(e.to_string())),
        }
    }
    check_own_card(&cards, rank, &card).map_err(&fail)?;
    let tag = generation(&config.group, &cards);
    let options = cards[0].options.clone();

    let placement = Placement::new(&cards.iter().map(|c| c.node.as_str()).collect::<Vec<_>>());
    // The ranks of this node in rank order; a rank's index among them is its ring's.
    let local: Vec<u32> = (0..size).filter(|&r| cards[r as usize].node == card.node).collect();
    let my_local = local.iter().position(|&r| r == rank).expect("a rank is on its own node");
    let mut links: Vec<Option<(Box<dyn Channel>, bool)>> = (0..size).map(|_| None).collect();
    let mut watches = Vec::new();
    let mut local_peers = Vec::new();
    let mut segment = None;
    let mut arena = None;
    if local.len() > 1 {
        let (mine, fd) = Segment::create(rank, tag, local.len())?;
        let mine = Arc::new(mine);
        let meeting = local::Meeting {
            group: &config.group,
            tag,
            rank,
            local: &local,
            sockets: local.iter().map(|&r| cards[r as usize].socket.as_str()).collect(),
            secret: &secret,
            deadline,
        };
        let peers = meeting.exchange(&unix, &fd, &doorbell).map_err(|e| e.during(&us))?;
        let mut segments: Vec<Option<Arc<Segment>>> = vec![None; size as usize];
        segments[rank as usize] = Some(mine.clone());
        let mut bells = Vec::new();
        for LocalPeer { rank: peer, segment: theirs, doorbell, process } in peers {
            let theirs = Arc::new(theirs);
            let bell = Arc::new(Doorbell::new(theirs.clone(), doorbell));
            let peer_local = local.iter().position(|&r| r == peer).expect("met as a local rank");
            let link = RingLink::new(mine.clone(), my_local, theirs.clone(), peer_local, bell.clone());
            links[peer as usize] = Some((Box::new(link), true));
            segments[peer as usize] = Some(theirs.clone());
            bells.push(bell);
            if config.liveness {
                watches.push(Watch { rank: peer, process: Arc::new(process) });
            }
            local_peers.push((peer, theirs));
        }
        // Payloads that are to be checked take the links, which check them.
        if (local.len() == size as usize || placement.two_levels()) && !options.checksums {
            let segments = segments.into_iter().flatten().collect();
            arena = Some(Arena::new(my_local, local.clone(), segments, bells));
        }
        segment = Some(mine);
    }
    let mut regions = None;
    if local.len() < size as usize {
        let options = network::options(config)?;
        let channels =
            connect_remote(rank, tag, &cards, &card.node, &listener, (&secret, &options), deadline)
                .map_err(&fail)?;
        for (peer, channel) in channels {
            if channel.transport() == "rdma" {
                regions = Some(options.fabric.clone());
            }
            links[peer as usize] = Some((channel, false));
        }
    }
    let now = Instant::now();
    let mut wire = Wire::new(rank, tag, links, now);
    wire.checksums = options.checksums;
    let mut engine =
        Engine::new(names, wire, arena, segment, local_peers, watches, config.heartbeat_timeout, now);
    engine.liveness = config.liveness;
    engine.scratch = Scratch::new(regions);
    Ok(Parts { engine, doorbell, timeout: config.timeout, placement, options })
}

/// Names one forming of a group in headers, hellos and segments. The cards hold random names, so what
/// a rank of an earlier forming says is never taken for this one's.
fn generation(group: &str, cards: &[Card]) -> u32 {
    let all = cards.iter().fold(hash64(group), |h, card| {
        card.encode().iter().fold(h, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    });
    all as u32 ^ (all >> 32) as u32
}

/// A card that is not the one just published means that another group uses the same keys.
fn check_own_card(cards: &[Card], rank: u32, mine: &Card) -> Result<(), String> {
    if cards[rank as usize] == *mine {
        return Ok(());
    }
    Err(format!(
        "another process published itself as rank {rank} of this group: use another group name, or start each \
         rank once"
    ))
}

fn shared_secret(
    config: &Config,
    store: &dyn Store,
    key: &str,
    deadline: Instant,
) -> Result<ClusterSecret, StoreError> {
    if let Some(secret) = &config.secret {
        return Ok(secret.clone());
    }
    if config.rank == 0 {
        let secret = ClusterSecret::generate();
        store.set(key, secret.to_hex().as_bytes())?;
        return Ok(secret);
    }
    let bytes = store.get(key, deadline.saturating_duration_since(Instant::now()))?;
    std::str::from_utf8(&bytes)
        .ok()
        .and_then(ClusterSecret::from_hex)
        .ok_or_else(|| StoreError::Failed("rank 0 published something else than a secret".into()))
}

fn hello(rank: u32, tag: u32) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&HELLO_MAGIC);
    bytes[8..12].copy_from_slice(&rank.to_le_bytes());
    bytes[12..16].copy_from_slice(&tag.to_le_bytes());
    bytes
}

fn read_hello(bytes: &[u8; 32], tag: u32) -> Option<u32> {
    let rank = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    (*bytes == hello(rank, tag)).then_some(rank)
}

/// The ranks of other nodes and the channel to each.
type RemoteChannels = Vec<(u32, Box<dyn Channel>)>;

fn connect_remote(
    rank: u32,
    tag: u32,
    cards: &[Card],
    node: &str,
    listener: &ChannelListener,
    (secret, options): (&ClusterSecret, &ChannelOptions),
    deadline: Instant,
) -> Result<RemoteChannels, String> {
    let remote = |r: &u32| cards[*r as usize].node != node;
    let mut channels = Vec::new();
    for peer in (0..rank).filter(remote) {
        let address = cards[peer as usize].address;
        let channel = connect_channel(address, secret, hello(rank, tag), deadline, options)
            .map_err(|e| format!("rank {peer} cannot be reached at {address}: {e}"))?;
        channels.push((peer, channel));
    }
    let mut expected: Vec<u32> = (rank + 1..cards.len() as u32).filter(remote).collect();
    while !expected.is_empty() {
        let (channel, greeting) = listener.accept(secret, deadline, options).map_err(|e| {
            let missing: Vec<String> = expected.iter().map(u32::to_string).collect();
            format!("missing ranks: {} ({e})", missing.join(", "))
        })?;
        match read_hello(&greeting, tag) {
            Some(peer) if expected.contains(&peer) => {
                expected.retain(|&r| r != peer);
                channels.push((peer, channel));
            }
            _ => tracing::warn!("refused a channel of another group"),
        }
    }
    Ok(channels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_round_trips() {
        let card = Card {
            node: "host a/1".into(),
            socket: "firefly-reduce-00".into(),
            address: "127.0.0.1:80".parse().unwrap(),
            options: Options::default(),
        };
        assert_eq!(Card::decode(&card.encode()), Some(card));
        assert_eq!(Card::decode(b"ffr1\na\nb\n127.0.0.1:80\n0 all_reduce direct max"), None);
        assert!(Card::decode(b"ffr2\na\nb\n127.0.0.1:80\n0 all_reduce direct max").is_some());
        assert_eq!(Card::decode(b"ffr2\na\nb\nnowhere\n0 all_reduce direct max"), None);
    }

    #[test]
    fn each_forming_has_a_generation_of_its_own() {
        let card = |socket: &str| Card {
            node: "n".into(),
            socket: socket.into(),
            address: "127.0.0.1:80".parse().unwrap(),
            options: Options::default(),
        };
        let first = generation("g", &[card("a"), card("b")]);
        assert_eq!(first, generation("g", &[card("a"), card("b")]));
        // The second rank has come back: what it said before is not of this group.
        let second = generation("g", &[card("a"), card("c")]);
        assert_ne!(first, second);
        assert_eq!(read_hello(&hello(1, first), second), None);
        assert_ne!(first, generation("h", &[card("a"), card("b")]));
    }

    #[test]
    fn a_hello_of_another_group_is_refused() {
        assert_eq!(read_hello(&hello(3, 7), 7), Some(3));
        assert_eq!(read_hello(&hello(3, 8), 7), None);
        assert_eq!(read_hello(&[0; 32], 7), None);
    }
}
