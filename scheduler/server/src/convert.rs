//! Between the wire's messages and the core's values.

use firefly_proto::scheduler as wire;
use firefly_types::{AttemptEpoch, ClusterSecret, ErrorKind, JobId, Rank, WireError};
use scheduler_core::{
    Attempt, Core, Exit, Job, JobSpec, JobState, NodeInfo, NodeState, Now, Order, RankKey, RankReport,
    RankState, Reported,
};
use tonic::Status;

/// Ranks beyond which a listing leaves them out.
const RANKS_LISTED: usize = 64;
/// Most ranks that a node can claim to take.
const MOST_SLOTS: u32 = 4_096;

pub(crate) fn status(kind: ErrorKind, message: impl Into<String>) -> Status {
    firefly_proto::status::to_status(&WireError::new(kind, message))
}

pub(crate) fn spec_from(spec: wire::JobSpec) -> JobSpec {
    JobSpec {
        name: spec.name,
        command: spec.command,
        env: spec.env.into_iter().collect(),
        working_directory: spec.working_directory,
        nodes: spec.nodes,
        ranks_per_node: spec.ranks_per_node,
        priority: spec.priority,
        max_restarts: spec.max_restarts,
        uid: spec.uid,
        gid: spec.gid,
        user: spec.user,
        grace_ms: spec.grace_ms,
        // The wire does not carry the rest yet.
        ..JobSpec::default()
    }
}

fn spec_to(spec: &JobSpec) -> wire::JobSpec {
    wire::JobSpec {
        name: spec.name.clone(),
        command: spec.command.clone(),
        env: spec.env.clone().into_iter().collect(),
        working_directory: spec.working_directory.clone(),
        nodes: spec.nodes,
        ranks_per_node: spec.ranks_per_node,
        priority: spec.priority,
        max_restarts: spec.max_restarts,
        uid: spec.uid,
        gid: spec.gid,
        user: spec.user.clone(),
        grace_ms: spec.grace_ms,
    }
}

fn state_to(state: JobState) -> wire::JobState {
    match state {
        // `reason` and `why` tell the finer states apart.
        JobState::Pending | JobState::Held => wire::JobState::Pending,
        JobState::Starting => wire::JobState::Starting,
        JobState::Running | JobState::Suspending => wire::JobState::Running,
        JobState::Stopping => wire::JobState::Stopping,
        JobState::Succeeded => wire::JobState::Succeeded,
        JobState::Failed => wire::JobState::Failed,
        JobState::Stopped => wire::JobState::Stopped,
    }
}

fn attempt_to(attempt: &Attempt, all_ranks: bool) -> wire::Attempt {
    let listed = all_ranks || attempt.ranks.len() <= RANKS_LISTED;
    let ranks = attempt.ranks.iter().filter(|_| listed).map(|slot| {
        let (state, exit) = match &slot.state {
            RankState::Assigned => ("preparing", None),
            RankState::Held => ("held", None),
            RankState::Running => ("running", None),
            RankState::Exited(exit) => ("exited", Some(exit)),
            RankState::Lost | RankState::Fenced => ("lost", None),
        };
        wire::RankStatus {
            rank: slot.rank.0,
            node_id: slot.node.0,
            state: state.into(),
            exit_code: exit.and_then(|e| e.code),
            signal: exit.and_then(|e| e.signal),
            pid: slot.pid,
        }
    });
    wire::Attempt {
        epoch: attempt.epoch.0,
        started_unix_ms: attempt.started_unix_ms,
        running_unix_ms: attempt.running_unix_ms,
        ended_unix_ms: attempt.ended_unix_ms,
        end_reason: attempt.end_reason.clone(),
        ranks: ranks.collect(),
    }
}

/// `full`: with every rank, however many.
pub(crate) fn job_to(job: &Job, full: bool) -> wire::Job {
    wire::Job {
        job_id: job.id.0,
        spec: Some(spec_to(&job.spec)),
        state: state_to(job.state).into(),
        epoch: job.epoch().0,
        restarts: job.epoch().0.saturating_sub(1),
        submitted_unix_ms: job.submitted_unix_ms,
        ended_unix_ms: job.ended_unix_ms,
        reason: job.reason.clone(),
        attempts: job.attempts.iter().map(|a| attempt_to(a, full)).collect(),
        version: job.version,
    }
}

pub(crate) fn nodes_to(core: &Core, now: Now) -> Vec<wire::Node> {
    core.nodes()
        .map(|node| {
            let state = match node.state() {
                NodeState::Ready => "ready",
                NodeState::Lost => "lost",
                NodeState::Cordoned => "cordoned",
            };
            let jobs: Vec<u64> = node.jobs().map(|job| job.0).collect();
            let info = &node.record.info;
            wire::Node {
                node_id: node.record.id.0,
                host: info.host.clone(),
                state: state.into(),
                cores: info.cores,
                memory_bytes: info.memory_bytes,
                gpus: info.gpus,
                jobs,
                silent_ms: u64::try_from(node.silent(now.mono).as_millis()).unwrap_or(u64::MAX),
                reason: node.record.cordon.clone().unwrap_or_default(),
                address: info.address.clone(),
                slots: info.slots,
                slots_used: node.used(),
            }
        })
        .collect()
}

pub(crate) fn info_from(hello: &wire::AgentHello) -> NodeInfo {
    NodeInfo {
        host: hello.host.clone(),
        address: hello.address.clone(),
        cores: hello.cores,
        slots: if hello.slots == 0 { hello.cores } else { hello.slots }.min(MOST_SLOTS),
        memory_bytes: hello.memory_bytes,
        gpus: hello.gpus,
        // Agents do not say yet where they stand, and do not take part in the suspend handshake.
        can_suspend: false,
        ..NodeInfo::default()
    }
}

/// `None` for a state that this version does not know.
pub(crate) fn report_from(report: wire::RankReport) -> Option<RankReport> {
    let state = match report.state.as_str() {
        "prepared" => Reported::Prepared,
        "running" => Reported::Running,
        "exited" => {
            Reported::Exited(Exit { code: report.exit_code, signal: report.signal, detail: report.detail })
        }
        _ => return None,
    };
    Some(RankReport {
        key: RankKey {
            job: JobId(report.job_id),
            epoch: AttemptEpoch(report.epoch),
            rank: Rank(report.rank),
        },
        state,
        pid: report.pid,
        master_port: u16::try_from(report.master_port).unwrap_or(0),
    })
}

/// An order as the agent gets it; `None` if what it is about is gone by now.
pub(crate) fn order_to(order: Order, core: &Core, secret: &ClusterSecret) -> Option<wire::AgentOrder> {
    use wire::agent_order::Order as Wire;
    let RankKey { job, epoch, rank } = order.key();
    let (job_id, epoch, rank) = (job.0, epoch.0, rank.0);
    let order = match order {
        Order::Prepare { node_rank, local_rank, .. } => {
            let job = core.job(job)?;
            Wire::Prepare(wire::PrepareRank {
                job_id,
                epoch,
                rank,
                local_rank,
                world_size: job.spec.world_size(),
                local_world_size: job.spec.ranks_per_node,
                node_rank,
                restart_count: epoch.saturating_sub(1),
                spec: Some(spec_to(&job.spec)),
                job_secret: job_secret(secret, job_id, epoch),
                orphan_lease_ms: core.policy().orphan_lease_ms,
            })
        }
        Order::Start { master, master_port, .. } => Wire::Start(wire::StartRank {
            job_id,
            epoch,
            rank,
            master_address: core.node(master)?.record.info.address.clone(),
            master_port: master_port.into(),
        }),
        // Nodes that cannot suspend are never asked to: see `info_from`.
        Order::Suspend { .. } => return None,
        Order::Stop { grace, .. } => Wire::Stop(wire::StopRank {
            job_id,
            epoch,
            rank,
            grace_ms: u32::try_from(grace.as_millis()).unwrap_or(u32::MAX),
        }),
        Order::Forget { .. } => Wire::Forget(wire::ForgetRank { job_id, epoch, rank }),
    };
    Some(wire::AgentOrder { order: Some(order) })
}

/// The secret of one attempt: derived, so that a restarted scheduler gives the same one without
/// having written it anywhere.
fn job_secret(secret: &ClusterSecret, job: u64, epoch: u32) -> String {
    let parts: [&[u8]; 3] = [b"firefly job secret v1", &job.to_be_bytes(), &epoch.to_be_bytes()];
    ClusterSecret::from_bytes(secret.prove(&parts)).to_hex()
}
