//! The manager's state as records of the store. `docs/formats.md`, section "manager state", is the
//! specification; the golden test pins it.

use crate::MgmtdError;
use crate::config::MgmtdSettings;
use crate::event::{Role, Write};
use crate::moves::{Cause, Move};
use crate::sessions::Session;
use crate::state::{ChainEntry, ManagerState, NodeEntry, Tables, Tasks};
use firefly_store::{Kv, Txn};
use firefly_types::{
    AttemptEpoch, ChainId, ChainVersion, ClientId, ClusterId, Incarnation, JobId, NodeId, RoutingVersion,
    SessionEpoch, TargetId,
};
use fs3_core::chain::{Chain, Member, PublicState};
use prost::Message;

const FORMAT: u32 = 1;

#[derive(Clone, PartialEq, Message)]
struct ClusterRecord {
    #[prost(uint32, tag = "1")]
    format: u32,
    #[prost(string, tag = "2")]
    cluster: String,
    #[prost(uint32, tag = "3")]
    placement_version: u32,
    #[prost(uint32, tag = "4")]
    replication: u32,
    #[prost(uint32, tag = "5")]
    chains_per_node: u32,
    #[prost(uint32, repeated, tag = "6")]
    storage_nodes: Vec<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct CountersRecord {
    #[prost(uint64, tag = "1")]
    routing_version: u64,
    #[prost(uint64, tag = "2")]
    next_client: u64,
    #[prost(uint64, tag = "3")]
    next_epoch: u64,
    #[prost(uint32, tag = "4")]
    next_target: u32,
}

#[derive(Clone, PartialEq, Message)]
struct ChainRecord {
    #[prost(uint64, tag = "1")]
    version: u64,
    /// In chain order; as long as `states`.
    #[prost(uint32, repeated, tag = "2")]
    targets: Vec<u32>,
    #[prost(uint32, repeated, tag = "3")]
    states: Vec<u32>,
    /// In the preferred order; as long as `nodes`, which says where each of them is.
    #[prost(uint32, repeated, tag = "4")]
    preferred: Vec<u32>,
    #[prost(uint32, repeated, tag = "5")]
    nodes: Vec<u32>,
    /// A target on its way in, the one that goes for it, and why; zero if there is none.
    #[prost(uint32, tag = "6")]
    move_to: u32,
    #[prost(uint32, tag = "7")]
    move_from: u32,
    #[prost(uint32, tag = "8")]
    move_cause: u32,
    #[prost(bool, tag = "9")]
    retiring: bool,
}

#[derive(Clone, PartialEq, Message)]
struct NodeRecord {
    #[prost(uint32, tag = "1")]
    role: u32,
    #[prost(string, tag = "2")]
    address: String,
    #[prost(bool, tag = "3")]
    alive: bool,
    #[prost(fixed64, tag = "4")]
    incarnation: u64,
    #[prost(fixed64, repeated, tag = "5")]
    retired: Vec<u64>,
    #[prost(bool, tag = "6")]
    draining: bool,
}

#[derive(Clone, PartialEq, Message)]
struct GraveRecord {
    #[prost(uint32, tag = "1")]
    node: u32,
}

#[derive(Clone, PartialEq, Message)]
struct TasksRecord {
    #[prost(bool, tag = "1")]
    rebalancing: bool,
    #[prost(uint64, tag = "2")]
    rebalance_moves: u64,
    #[prost(uint64, tag = "3")]
    scrub_pass: u64,
    #[prost(bool, tag = "4")]
    scrubbing: bool,
    #[prost(uint64, tag = "5")]
    scrub_rate: u64,
}

#[derive(Clone, PartialEq, Message)]
struct SessionRecord {
    #[prost(uint64, tag = "1")]
    epoch: u64,
    #[prost(string, tag = "2")]
    description: String,
    #[prost(uint64, tag = "3")]
    job: u64,
    #[prost(uint32, tag = "4")]
    attempt: u32,
}

const CLUSTER: &[u8] = b"cluster";
const COUNTERS: &[u8] = b"counters";
const CHAIN: &[u8] = b"chain/";
const NODE: &[u8] = b"node/";
const SESSION: &[u8] = b"session/";
const GRAVE: &[u8] = b"grave/";
const TASKS: &[u8] = b"tasks";

fn key(prefix: &[u8], id: &[u8]) -> Vec<u8> {
    [prefix, id].concat()
}

const STATES: [(PublicState, u32); 5] = [
    (PublicState::Serving, 1),
    (PublicState::Syncing, 2),
    (PublicState::Waiting, 3),
    (PublicState::LastSrv, 4),
    (PublicState::Offline, 5),
];

const CAUSES: [Cause; 4] = [Cause::Rebuild, Cause::Drain, Cause::Rebalance, Cause::Replace];

fn state_code(state: PublicState) -> u32 {
    STATES.iter().find(|(s, _)| *s == state).map_or(0, |(_, code)| *code)
}

impl ChainRecord {
    fn new(entry: &ChainEntry, node_of: impl Fn(TargetId) -> NodeId) -> Self {
        let members = &entry.chain.members;
        Self {
            version: entry.chain.version.0,
            targets: members.iter().map(|m| m.target.0).collect(),
            states: members.iter().map(|m| state_code(m.state)).collect(),
            preferred: entry.preferred.iter().map(|t| t.0).collect(),
            nodes: entry.preferred.iter().map(|&t| node_of(t).0).collect(),
            move_to: entry.moving.map_or(0, |m| m.to.0),
            move_from: entry.moving.map_or(0, |m| m.from.0),
            move_cause: entry.moving.map_or(0, |m| m.cause as u32),
            retiring: entry.moving.is_some_and(|m| m.retiring),
        }
    }

    fn entry(&self, id: ChainId) -> Result<ChainEntry, String> {
        let state = |code: &u32| STATES.iter().find(|(_, c)| c == code).map(|(s, _)| *s);
        let states: Option<Vec<_>> = self.states.iter().map(state).collect();
        let states = states.ok_or("it has a state of another release")?;
        let mut sorted = [self.targets.clone(), self.preferred.clone()];
        sorted.iter_mut().for_each(|t| t.sort_unstable());
        if states.len() != self.targets.len()
            || sorted[0] != sorted[1]
            || self.nodes.len() != self.preferred.len()
        {
            return Err("its lists do not fit together".into());
        }
        let members = self
            .targets
            .iter()
            .zip(states)
            .map(|(&t, state)| Member { target: TargetId(t), state })
            .collect();
        let chain = Chain { id, version: ChainVersion(self.version), members };
        chain.check()?;
        let moving = match self.move_to {
            0 => None,
            to => {
                let cause = CAUSES.into_iter().find(|c| *c as u32 == self.move_cause);
                let cause = cause.ok_or("it is moved for a reason of another release")?;
                let from = TargetId(self.move_from);
                Some(Move { to: TargetId(to), from, cause, retiring: self.retiring })
            }
        };
        if moving.is_some_and(|m| chain.state_of(m.to).is_none() || chain.state_of(m.from).is_none()) {
            return Err("a target is moved that is not a member".into());
        }
        Ok(ChainEntry { chain, preferred: self.preferred.iter().copied().map(TargetId).collect(), moving })
    }
}

impl NodeRecord {
    fn new(node: &NodeEntry) -> Self {
        Self {
            role: match node.role {
                Role::Storage => 1,
                Role::Meta => 2,
            },
            address: node.address.clone(),
            alive: node.alive,
            incarnation: node.incarnation.0,
            retired: node.retired.iter().map(|i| i.0).collect(),
            draining: node.draining,
        }
    }

    fn entry(self) -> Result<NodeEntry, String> {
        Ok(NodeEntry {
            role: match self.role {
                1 => Role::Storage,
                2 => Role::Meta,
                other => return Err(format!("it has role {other}")),
            },
            address: self.address,
            alive: self.alive,
            incarnation: Incarnation(self.incarnation),
            retired: self.retired.into_iter().map(Incarnation).collect(),
            draining: self.draining,
        })
    }
}

impl TasksRecord {
    fn new(tasks: &Tasks) -> Self {
        let Tasks { rebalancing, rebalance_moves, scrub_pass, scrubbing, scrub_rate } = *tasks;
        Self { rebalancing, rebalance_moves, scrub_pass, scrubbing, scrub_rate }
    }

    fn entry(self) -> Tasks {
        let Self { rebalancing, rebalance_moves, scrub_pass, scrubbing, scrub_rate } = self;
        Tasks { rebalancing, rebalance_moves, scrub_pass, scrubbing, scrub_rate }
    }
}

impl SessionRecord {
    fn new(session: &Session) -> Self {
        let (job, attempt) = session.job.map_or((0, 0), |(job, attempt)| (job.0, attempt.0));
        Self { epoch: session.epoch.0, description: session.description.clone(), job, attempt }
    }

    fn entry(self) -> Session {
        let job = (self.job != 0).then_some((JobId(self.job), AttemptEpoch(self.attempt)));
        Session { epoch: SessionEpoch(self.epoch), description: self.description, job }
    }
}

/// Puts the records that a decision names, as the state has them now.
pub(crate) fn write(state: &ManagerState, writes: &[Write], txn: &mut Txn) {
    for write in writes {
        match write {
            Write::Counters => {
                let record = CountersRecord {
                    routing_version: state.routing_version.0,
                    next_client: state.sessions.next_client,
                    next_epoch: state.sessions.next_epoch,
                    next_target: state.next_target,
                };
                txn.put(COUNTERS, &record.encode_to_vec());
            }
            Write::Chain(id) => {
                if let Some(entry) = state.chains.get(id) {
                    let node_of = |t| state.owners.get(&t).map_or(NodeId(0), |(node, _)| *node);
                    put_chain(txn, *id, entry, node_of);
                }
            }
            Write::Node(id) => {
                let key = key(NODE, &id.0.to_be_bytes());
                match state.nodes.get(id) {
                    Some(node) => txn.put(&key, &NodeRecord::new(node).encode_to_vec()),
                    None => txn.delete(&key),
                }
            }
            Write::Grave(target) => {
                let key = key(GRAVE, &target.0.to_be_bytes());
                match state.graves.get(target) {
                    Some((node, _)) => txn.put(&key, &GraveRecord { node: node.0 }.encode_to_vec()),
                    None => txn.delete(&key),
                }
            }
            Write::Tasks => txn.put(TASKS, &TasksRecord::new(&state.tasks).encode_to_vec()),
            Write::Session(client) => {
                let key = key(SESSION, &client.0.to_be_bytes());
                match state.sessions.get(*client) {
                    Some(session) => txn.put(&key, &SessionRecord::new(session).encode_to_vec()),
                    None => txn.delete(&key),
                }
            }
        }
    }
}

fn put_chain(txn: &mut Txn, id: ChainId, entry: &ChainEntry, node_of: impl Fn(TargetId) -> NodeId) {
    txn.put(&key(CHAIN, &id.0.to_be_bytes()), &ChainRecord::new(entry, node_of).encode_to_vec());
}

/// Reads the tables back, or makes the first ones with `first` and stores them.
pub(crate) async fn load_or_create(
    kv: &dyn Kv,
    cluster: ClusterId,
    settings: &MgmtdSettings,
    first: impl FnOnce() -> Result<Tables, MgmtdError>,
) -> Result<Tables, MgmtdError> {
    let wanted = ClusterRecord {
        format: FORMAT,
        cluster: cluster.to_string(),
        placement_version: fs3_core::placement::PLACEMENT_VERSION,
        replication: settings.effective_replication(),
        chains_per_node: settings.effective_chains_per_node(),
        storage_nodes: {
            let mut nodes: Vec<u32> = settings.storage_nodes.iter().map(|n| n.0).collect();
            nodes.sort_unstable();
            nodes
        },
    };
    let mut txn = kv.begin();
    match txn.get(CLUSTER)? {
        Some(bytes) => {
            let found = ClusterRecord::decode(bytes.as_slice())
                .map_err(|e| MgmtdError::Corrupt(format!("cluster record: {e}")))?;
            check_fit(&found, &wanted, settings)?;
            Ok(Tables { replication: found.replication, ..load(&mut txn)? })
        }
        None => {
            let tables = first()?;
            txn.put(CLUSTER, &wanted.encode_to_vec());
            let counters = CountersRecord {
                routing_version: tables.routing_version.0,
                next_client: tables.next_client,
                next_epoch: tables.next_epoch,
                next_target: tables.next_target,
            };
            txn.put(COUNTERS, &counters.encode_to_vec());
            for (id, entry) in &tables.chains {
                put_chain(&mut txn, *id, entry, |t| {
                    tables.owners.get(&t).map_or(NodeId(0), |(node, _)| *node)
                });
            }
            for (id, node) in &tables.nodes {
                txn.put(&key(NODE, &id.0.to_be_bytes()), &NodeRecord::new(node).encode_to_vec());
            }
            txn.commit().await?;
            Ok(tables)
        }
    }
}

fn check_fit(
    found: &ClusterRecord,
    wanted: &ClusterRecord,
    settings: &MgmtdSettings,
) -> Result<(), MgmtdError> {
    if found.format != FORMAT {
        return Err(MgmtdError::Mismatch(format!(
            "the manager's state has format {}, this release reads {FORMAT}",
            found.format
        )));
    }
    if found.cluster != wanted.cluster {
        return Err(MgmtdError::Mismatch(format!(
            "the manager's folder belongs to cluster {}, this process to {}: check --state",
            found.cluster, wanted.cluster
        )));
    }
    let differs = |name, found: &dyn std::fmt::Debug, wanted: &dyn std::fmt::Debug| {
        Err(MgmtdError::Mismatch(format!(
            "{name} is {wanted:?} in the configuration, but the cluster was made with {found:?}, and that cannot be \
             changed yet"
        )))
    };
    if found.storage_nodes != wanted.storage_nodes {
        return differs("storage_nodes", &found.storage_nodes, &wanted.storage_nodes);
    }
    if settings.replication.is_some() && found.replication != wanted.replication {
        return differs("replication", &found.replication, &wanted.replication);
    }
    if settings.chains_per_node.is_some() && found.chains_per_node != wanted.chains_per_node {
        return differs("chains_per_node", &found.chains_per_node, &wanted.chains_per_node);
    }
    Ok(())
}

fn load(txn: &mut Txn) -> Result<Tables, MgmtdError> {
    let corrupt = |what: String| MgmtdError::Corrupt(what);
    let counters = txn.get(COUNTERS)?.ok_or_else(|| corrupt("the counters are missing".into()))?;
    let counters =
        CountersRecord::decode(counters.as_slice()).map_err(|e| corrupt(format!("counters: {e}")))?;
    let mut tables = Tables {
        routing_version: RoutingVersion(counters.routing_version),
        next_client: counters.next_client,
        next_epoch: counters.next_epoch,
        next_target: counters.next_target,
        ..Tables::default()
    };
    if let Some(tasks) = txn.get(TASKS)? {
        let record = TasksRecord::decode(tasks.as_slice()).map_err(|e| corrupt(format!("tasks: {e}")))?;
        tables.tasks = record.entry();
    }
    for (id, bytes) in under(txn, GRAVE)? {
        let target = TargetId(
            number(&id).and_then(|n| u32::try_from(n).ok()).ok_or_else(|| corrupt("a grave's key".into()))?,
        );
        let record =
            GraveRecord::decode(bytes.as_slice()).map_err(|e| corrupt(format!("grave of {target}: {e}")))?;
        tables.graves.insert(target, NodeId(record.node));
    }
    for (id, bytes) in under(txn, CHAIN)? {
        let chain = ChainId(
            number(&id).and_then(|n| u32::try_from(n).ok()).ok_or_else(|| corrupt("a chain's key".into()))?,
        );
        let record = ChainRecord::decode(bytes.as_slice()).map_err(|e| corrupt(format!("{chain}: {e}")))?;
        let entry = record.entry(chain).map_err(|e| corrupt(format!("{chain}: {e}")))?;
        for (target, node) in record.preferred.iter().zip(&record.nodes) {
            if tables.owners.insert(TargetId(*target), (NodeId(*node), chain)).is_some() {
                return Err(corrupt(format!("{} is in two chains", TargetId(*target))));
            }
        }
        tables.chains.insert(chain, entry);
    }
    for (id, bytes) in under(txn, NODE)? {
        let node = NodeId(
            number(&id).and_then(|n| u32::try_from(n).ok()).ok_or_else(|| corrupt("a node's key".into()))?,
        );
        let record = NodeRecord::decode(bytes.as_slice()).map_err(|e| corrupt(format!("{node}: {e}")))?;
        tables.nodes.insert(node, record.entry().map_err(|e| corrupt(format!("{node}: {e}")))?);
    }
    for (id, bytes) in under(txn, SESSION)? {
        let client = ClientId(number(&id).ok_or_else(|| corrupt("a session's key".into()))?);
        let record =
            SessionRecord::decode(bytes.as_slice()).map_err(|e| corrupt(format!("{client}: {e}")))?;
        tables.sessions.insert(client, record.entry());
    }
    Ok(tables)
}

fn under(txn: &mut Txn, prefix: &[u8]) -> Result<firefly_store::Pairs, MgmtdError> {
    let pairs = txn.range(prefix, &key(prefix, &[0xff; 9]), usize::MAX)?;
    Ok(pairs.into_iter().map(|(k, v)| (k[prefix.len()..].to_vec(), v)).collect())
}

fn number(bytes: &[u8]) -> Option<u64> {
    match bytes.len() {
        4 => Some(u32::from_be_bytes(bytes.try_into().ok()?).into()),
        8 => Some(u64::from_be_bytes(bytes.try_into().ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn sample_chain() -> ChainEntry {
        let member = |t, state| Member { target: TargetId(t), state };
        let members = vec![member(2, PublicState::Serving), member(1, PublicState::Syncing)];
        let chain = Chain { id: ChainId(7), version: ChainVersion(300), members };
        ChainEntry { chain, preferred: vec![TargetId(1), TargetId(2)], moving: None }
    }

    fn moved_chain() -> ChainEntry {
        let moving =
            Some(Move { to: TargetId(1), from: TargetId(2), cause: Cause::Rebalance, retiring: true });
        ChainEntry { moving, ..sample_chain() }
    }

    #[test]
    fn golden_bytes() {
        let chain = ChainRecord::new(&sample_chain(), |t| NodeId(t.0 + 2));
        assert_eq!(
            hex(&chain.encode_to_vec()),
            "08ac0212020201".to_owned() + "1a020102" + "22020102" + "2a020304"
        );
        let node = NodeRecord {
            role: 1,
            address: "1.2.3.4:5".into(),
            alive: true,
            incarnation: 0x0102,
            retired: vec![3],
            draining: false,
        };
        let wanted = "0801".to_owned()
            + "1209312e322e332e343a35"
            + "1801"
            + "210201000000000000"
            + "2a080300000000000000";
        assert_eq!(hex(&node.encode_to_vec()), wanted);
        let drained = NodeRecord { draining: true, ..node };
        assert_eq!(hex(&drained.encode_to_vec()), wanted + "3001");
        let moved = ChainRecord::new(&moved_chain(), |t| NodeId(t.0 + 2));
        let end = "300138024003".to_owned() + "4801";
        assert!(hex(&moved.encode_to_vec()).ends_with(&end), "{}", hex(&moved.encode_to_vec()));
        let counters = CountersRecord { routing_version: 9, next_client: 8, next_epoch: 7, next_target: 6 };
        assert_eq!(hex(&counters.encode_to_vec()), "0809100818072006");
        assert_eq!(hex(&GraveRecord { node: 4 }.encode_to_vec()), "0804");
        let tasks = TasksRecord {
            rebalancing: true,
            rebalance_moves: 2,
            scrub_pass: 3,
            scrubbing: true,
            scrub_rate: 4,
        };
        assert_eq!(hex(&tasks.encode_to_vec()), "08011002180320012804");
        let session = SessionRecord { epoch: 5, description: "me".into(), job: 6, attempt: 7 };
        assert_eq!(hex(&session.encode_to_vec()), "080512026d6518062007");
        let cluster = ClusterRecord {
            format: 1,
            cluster: "ab".into(),
            placement_version: 1,
            replication: 2,
            chains_per_node: 2,
            storage_nodes: vec![3, 4],
        };
        assert_eq!(hex(&cluster.encode_to_vec()), "0801120261621801200228023202".to_owned() + "0304");
    }

    #[test]
    fn records_round_trip() {
        let entry = sample_chain();
        assert_eq!(ChainRecord::new(&entry, |_| NodeId(1)).entry(ChainId(7)), Ok(entry));
        let moved = moved_chain();
        let record = ChainRecord::new(&moved, |_| NodeId(1));
        assert_eq!(record.entry(ChainId(7)), Ok(moved));
        assert!(ChainRecord { move_cause: 9, ..record.clone() }.entry(ChainId(7)).is_err());
        assert!(ChainRecord { move_from: 9, ..record }.entry(ChainId(7)).is_err());
        let session = Session {
            epoch: SessionEpoch(1),
            description: "d".into(),
            job: Some((JobId(2), AttemptEpoch(3))),
        };
        assert_eq!(SessionRecord::new(&session).entry(), session);
    }

    proptest! {
        /// Any bytes that decode give a chain that keeps the rules, or an error.
        #[test]
        fn damaged_chains_are_refused(at in 0usize..20, to in any::<u8>()) {
            let mut bytes = ChainRecord::new(&sample_chain(), |t| NodeId(t.0)).encode_to_vec();
            let at = at % bytes.len();
            bytes[at] = to;
            if let Ok(record) = ChainRecord::decode(bytes.as_slice())
                && let Ok(entry) = record.entry(ChainId(7))
            {
                prop_assert_eq!(entry.chain.check(), Ok(()));
                prop_assert_eq!(entry.preferred.len(), entry.chain.members.len());
            }
        }
    }
}
