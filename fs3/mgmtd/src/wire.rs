//! Between the wire's messages and the state's own types: requests are validated here, the routing
//! table is built here.

use crate::event::{Event, Heartbeat, Order, Role, ScrubProgress, TargetStatus, WorkerReport};
use crate::moves::Cause;
use crate::state::ManagerState;
use firefly_proto::mgmtd as pb;
use firefly_types::{
    AttemptEpoch, ChainVersion, ClientId, ErrorKind, Incarnation, JobId, Nanos, NodeId, RoutingVersion,
    SessionEpoch, TargetId, WireError,
};
use fs3_core::chain::{LocalState, PublicState};
use fs3_core::worker::Activity;
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Targets in one heartbeat at most.
const MAX_TARGETS: usize = 4096;
/// Longest description of a client, bytes.
const MAX_DESCRIPTION: usize = 1024;
/// A target's reason is cut to this many bytes: all of them travel in every routing table.
const MAX_REASON: usize = 160;

fn invalid(message: String) -> WireError {
    WireError::new(ErrorKind::InvalidArgument, message)
}

pub(crate) fn heartbeat(request: pb::HeartbeatRequest) -> Result<Event, WireError> {
    let role = match request.role() {
        pb::NodeRole::Storage => Role::Storage,
        pb::NodeRole::Meta => Role::Meta,
        pb::NodeRole::Unspecified => {
            return Err(invalid("a heartbeat names no role that this release knows".into()));
        }
    };
    if request.node_id == 0 || request.incarnation == 0 {
        return Err(invalid("a heartbeat needs a node id and an incarnation above 0".into()));
    }
    match request.address.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 && !address.ip().is_unspecified() => {}
        _ => {
            return Err(invalid(format!(
                "address {:?} cannot be reached by others; send ip:port",
                cut(&request.address, 100)
            )));
        }
    }
    if request.targets.len() > MAX_TARGETS {
        return Err(invalid(format!(
            "{} targets in a heartbeat; at most {MAX_TARGETS}",
            request.targets.len()
        )));
    }
    let mut targets = BTreeMap::new();
    for report in request.targets {
        let target = TargetId(report.target_id);
        let local = match report.state() {
            pb::LocalState::UpToDate => LocalState::UpToDate,
            pb::LocalState::Online => LocalState::Online,
            pb::LocalState::Offline => LocalState::Offline,
            pb::LocalState::Unspecified => {
                return Err(invalid(format!("{target} is reported in no state that this release knows")));
            }
        };
        let status = TargetStatus {
            local,
            synced_at: ChainVersion(report.synced_at_version),
            used_bytes: report.used_bytes,
            capacity_bytes: report.capacity_bytes,
            reason: cut(&report.reason, MAX_REASON).to_owned(),
            is_volatile: report.is_volatile,
            scrub: report.scrub.map(scrub).unwrap_or_default(),
        };
        if targets.insert(target, status).is_some() {
            return Err(invalid(format!("{target} is reported twice")));
        }
    }
    Ok(Event::Heartbeat(Heartbeat {
        node: NodeId(request.node_id),
        role,
        incarnation: Incarnation(request.incarnation),
        address: request.address,
        targets,
        routing_version: RoutingVersion(request.routing_version),
    }))
}

fn scrub(progress: pb::ScrubProgress) -> ScrubProgress {
    let pb::ScrubProgress {
        pass,
        done,
        chunks_checked,
        chunks_total,
        bytes_checked,
        blocks_repaired,
        chunks_bad,
    } = progress;
    ScrubProgress { pass, done, chunks_checked, chunks_total, bytes_checked, blocks_repaired, chunks_bad }
}

fn scrub_info(progress: &ScrubProgress) -> pb::ScrubProgress {
    let ScrubProgress {
        pass,
        done,
        chunks_checked,
        chunks_total,
        bytes_checked,
        blocks_repaired,
        chunks_bad,
    } = *progress;
    pb::ScrubProgress { pass, done, chunks_checked, chunks_total, bytes_checked, blocks_repaired, chunks_bad }
}

pub(crate) fn order(request: pb::AdministerRequest) -> Result<Event, WireError> {
    use pb::administer_request::Order as Wanted;
    let node = |id: u32| match id {
        0 => Err(invalid("a node id is a number above 0".into())),
        id => Ok(NodeId(id)),
    };
    let order = match request.order {
        Some(Wanted::AddNode(o)) => Order::AddNode(node(o.node_id)?),
        Some(Wanted::RemoveNode(o)) => Order::RemoveNode(node(o.node_id)?),
        Some(Wanted::DrainNode(o)) if o.cancel => Order::UndrainNode(node(o.node_id)?),
        Some(Wanted::DrainNode(o)) => Order::DrainNode(node(o.node_id)?),
        Some(Wanted::DrainTarget(o)) => Order::DrainTarget(TargetId(o.target_id)),
        Some(Wanted::ReplaceTarget(o)) => Order::ReplaceTarget(TargetId(o.target_id)),
        Some(Wanted::Rebalance(o)) => Order::Rebalance { start: !o.stop },
        Some(Wanted::Scrub(o)) => Order::Scrub { start: !o.stop, rate_bytes: o.rate_bytes },
        None => return Err(invalid("an order that this release does not know".into())),
    };
    Ok(Event::Order(order))
}

pub(crate) fn workers(reports: Vec<WorkerReport>) -> pb::ListWorkersReply {
    let info = |report: WorkerReport| pb::WorkerInfo {
        name: report.name.to_owned(),
        state: match report.status.activity {
            Activity::Idle => pb::WorkerState::Idle,
            Activity::Working => pb::WorkerState::Working,
            Activity::Blocked => pb::WorkerState::Blocked,
        } as i32,
        done: report.status.done,
        total: report.status.total,
        detail: report.status.detail,
        throttle: report.throttle,
    };
    pb::ListWorkersReply { workers: reports.into_iter().map(info).collect() }
}

pub(crate) fn open_session(request: pb::OpenSessionRequest) -> Result<Event, WireError> {
    if request.description.len() > MAX_DESCRIPTION {
        return Err(invalid(format!(
            "a description of {} bytes; at most {MAX_DESCRIPTION}",
            request.description.len()
        )));
    }
    if request.job_id == 0 && request.attempt_epoch != 0 {
        return Err(invalid("an attempt epoch needs its job id".into()));
    }
    Ok(Event::OpenSession {
        client: (request.client_id != 0).then_some(ClientId(request.client_id)),
        description: request.description,
        job: (request.job_id != 0).then_some((JobId(request.job_id), AttemptEpoch(request.attempt_epoch))),
    })
}

pub(crate) fn session(client: u64, epoch: u64) -> Result<(ClientId, SessionEpoch), WireError> {
    if client == 0 || epoch == 0 {
        return Err(invalid("client id and session epoch are numbers above 0; open a session first".into()));
    }
    Ok((ClientId(client), SessionEpoch(epoch)))
}

/// At most `most` bytes of `text`, whole characters.
fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    &text[..end]
}

fn public(state: PublicState) -> pb::PublicState {
    match state {
        PublicState::Serving => pb::PublicState::Serving,
        PublicState::Syncing => pb::PublicState::Syncing,
        PublicState::Waiting => pb::PublicState::Waiting,
        PublicState::LastSrv => pb::PublicState::Lastsrv,
        PublicState::Offline => pb::PublicState::Offline,
    }
}

/// The routing table as of `now`: versions and states are those published, usage and silence the
/// newest known.
pub(crate) fn routing_table(state: &ManagerState, now: Nanos) -> pb::RoutingTable {
    let nodes = state.nodes.iter().map(|(id, node)| pb::NodeInfo {
        node_id: id.0,
        role: match node.role {
            Role::Storage => pb::NodeRole::Storage,
            Role::Meta => pb::NodeRole::Meta,
        } as i32,
        address: node.address.clone(),
        alive: node.alive,
        incarnation: node.incarnation.0,
        silent_ms: state.heard_of(*id, now).map_or(0, |d| d.as_millis() as u64),
        draining: node.draining,
    });
    let moving = |chain| state.chains.get(&chain).and_then(|entry| entry.moving);
    let targets = state.owners.iter().map(|(id, (node, chain))| {
        let status = state.target_status(*id);
        let local = match status.map(|s| s.local) {
            Some(LocalState::UpToDate) => pb::LocalState::UpToDate,
            Some(LocalState::Online) => pb::LocalState::Online,
            Some(LocalState::Offline) => pb::LocalState::Offline,
            None => pb::LocalState::Unspecified,
        };
        let public_state =
            state.chain(*chain).and_then(|c| c.state_of(*id)).map_or(pb::PublicState::Unspecified, public);
        pb::TargetInfo {
            target_id: id.0,
            node_id: node.0,
            chain_id: chain.0,
            state: public_state as i32,
            local_state: local as i32,
            used_bytes: status.map_or(0, |s| s.used_bytes),
            capacity_bytes: status.map_or(0, |s| s.capacity_bytes),
            reason: status.map(|s| s.reason.clone()).unwrap_or_default(),
            is_volatile: status.is_some_and(|s| s.is_volatile),
            retiring: moving(*chain).is_some_and(|m| m.retiring && m.from == *id),
            scrub: status.map(|s| scrub_info(&s.scrub)).filter(|s| s.pass > 0),
        }
    });
    let chains = state.chains.iter().map(|(id, entry)| pb::ChainInfo {
        chain_id: id.0,
        version: entry.chain.version.0,
        targets: entry.chain.members.iter().map(|m| m.target.0).collect(),
        states: entry.chain.members.iter().map(|m| public(m.state) as i32).collect(),
        preferred: entry.preferred.iter().map(|t| t.0).collect(),
        moving: entry.moving.map(|m| pb::MoveInfo {
            from: m.from.0,
            to: m.to.0,
            cause: match m.cause {
                Cause::Rebuild => pb::MoveCause::Rebuild,
                Cause::Drain => pb::MoveCause::Drain,
                Cause::Rebalance => pb::MoveCause::Rebalance,
                Cause::Replace => pb::MoveCause::Replace,
            } as i32,
        }),
    });
    let graves = state.graves.iter().map(|(t, (n, _))| pb::Grave { target_id: t.0, node_id: n.0 });
    pb::RoutingTable {
        version: state.routing_version.0,
        nodes: nodes.collect(),
        targets: targets.collect(),
        chains: chains.collect(),
        min_write_replicas: state.settings.effective_min_write_replicas(),
        replication: state.replication,
        chunk_bytes: state.settings.chunk_bytes.0 as u32,
        // Chains are numbered in stripe order.
        stripe_chains: state.chains.keys().map(|c| c.0).collect(),
        graves: graves.collect(),
        scrub: Some(pb::ScrubOrder {
            pass: state.tasks.scrub_pass,
            active: state.tasks.scrubbing,
            rate_bytes: state.tasks.scrub_rate,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> pb::HeartbeatRequest {
        pb::HeartbeatRequest {
            node_id: 3,
            role: pb::NodeRole::Storage as i32,
            incarnation: 1,
            address: "127.0.0.1:9".into(),
            targets: vec![pb::TargetReport { target_id: 1, state: 2, ..Default::default() }],
            ..Default::default()
        }
    }

    #[test]
    fn malformed_heartbeats_are_refused() {
        heartbeat(request()).unwrap();
        let refused = |change: fn(&mut pb::HeartbeatRequest)| {
            let mut request = request();
            change(&mut request);
            assert_eq!(heartbeat(request).unwrap_err().kind, ErrorKind::InvalidArgument);
        };
        refused(|r| r.node_id = 0);
        refused(|r| r.incarnation = 0);
        refused(|r| r.role = 0);
        refused(|r| r.role = 77);
        refused(|r| r.address = "nowhere".into());
        refused(|r| r.address = "0.0.0.0:9".into());
        refused(|r| r.address = "127.0.0.1:0".into());
        refused(|r| r.targets[0].state = 0);
        refused(|r| r.targets[0].state = -5);
        refused(|r| r.targets.push(r.targets[0].clone()));
        refused(|r| r.targets = vec![r.targets[0].clone(); MAX_TARGETS + 1]);
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(cut("aé", 3), "aé");
        assert_eq!(cut("aé", 99), "aé");
    }
}
