//! The group's state as one value: what was submitted, what is under way, who is alive. Whoever
//! holds it (the progress thread, or a thread that waits for an operation) moves everything.

use crate::ReduceError;
use crate::elastic;
use crate::header::{Descriptor, MessageKind};
use crate::kernels::Tier;
use crate::op::OpState;
use crate::ops::{Body, Context};
use crate::request::Plan;
use crate::scratch::Scratch;
use crate::shm::arena::Arena;
use crate::shm::segment::Segment;
use crate::status::{self, Page};
use crate::wire::{Event, Standing, Wire};
use firefly_types::{RankState, RankStatus};
use std::collections::{HashMap, VecDeque};
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often time and life are looked at while things move; a deadline is looked at when it comes.
const TICK: Duration = Duration::from_millis(20);
/// A waiting operation asks its missing peers what they are doing after this long.
const PROBE_AFTER: Duration = Duration::from_millis(100);
/// And again after this long: an answer is good for one such time.
const PROBE_AGAIN: Duration = Duration::from_millis(500);
/// Groups up to this size ask all ranks, so that who waits only because of others is not blamed.
const ASK_ALL: u32 = 256;
/// A link that ends without a word condemns its rank only after this long: the cause may be
/// another rank's death, of which the ranks that fail because of it tell first.
const VERDICT_AFTER: Duration = Duration::from_millis(150);
/// Links of a broken group stay open this long, so that peers read why it broke before they see
/// the end of the connection. Nobody drives them any more, and a link touches memory only while
/// it is driven.
const LINGER: Duration = Duration::from_millis(500);
/// Signs of life on links to other nodes.
const HEARTBEAT_EVERY: Duration = Duration::from_millis(250);

/// Names of things in messages.
pub(crate) struct Names {
    pub(crate) group: String,
    pub(crate) rank: u32,
    pub(crate) size: u32,
}

impl Names {
    pub(crate) fn us(&self) -> String {
        format!("rank {} of {} in group {:?}", self.rank, self.size, self.group)
    }
}

/// A submission on its way to the engine.
pub(crate) struct Submission {
    pub(crate) plan: Plan,
    pub(crate) op: Arc<OpState>,
    pub(crate) submitted: Instant,
    pub(crate) timeout: Duration,
}

struct Active {
    sequence: u64,
    descriptor: Descriptor,
    body: Body,
    op: Arc<OpState>,
    submitted: Instant,
    timeout: Duration,
    began: Option<Instant>,
    /// When its peers were last asked what they are doing.
    probed: Option<Instant>,
}

struct ActiveP2p {
    op: Arc<OpState>,
    what: String,
    receive: bool,
    peer: Option<u32>,
    submitted: Instant,
    timeout: Duration,
}

/// Death watch of a process on this node.
pub(crate) struct Watch {
    pub(crate) rank: u32,
    /// Readable when the process is gone.
    pub(crate) process: Arc<OwnedFd>,
}

/// See the module.
pub(crate) struct Engine {
    pub(crate) names: Arc<Names>,
    pub(crate) wire: Option<Wire>,
    pub(crate) arena: Option<Arena>,
    /// This rank's segment, if it shares memory with anyone, and those of its local peers.
    pub(crate) segment: Option<Arc<Segment>>,
    pub(crate) local_peers: Vec<(u32, Arc<Segment>)>,
    pub(crate) watches: Vec<Watch>,
    pub(crate) tier: Tier,
    pub(crate) heartbeat_timeout: Duration,
    /// Off in tests that prove that the watch is what finds deaths.
    pub(crate) liveness: bool,
    pub(crate) scratch: Scratch,
    collectives: VecDeque<Active>,
    p2p: HashMap<u64, ActiveP2p>,
    next_p2p: u64,
    finished: Vec<(Arc<OpState>, Result<(), ReduceError>)>,
    /// The links of a broken group and when they go; see [`LINGER`].
    lingering: Option<(Wire, Instant)>,
    last_heartbeat: Instant,
    last_tick: Instant,
    pub(crate) failure: Option<ReduceError>,
    reduced_bytes: u64,
    /// Sequence numbers of the last collective issued, and completed here.
    issued: u64,
    completed: u64,
    /// What others may read about this rank; `None` where it cannot be had, which hinders nothing.
    page: Option<Page>,
}

impl Engine {
    #[allow(clippy::too_many_arguments, reason = "the parts of a formed group")]
    pub(crate) fn new(
        names: Arc<Names>,
        wire: Wire,
        arena: Option<Arena>,
        segment: Option<Arc<Segment>>,
        local_peers: Vec<(u32, Arc<Segment>)>,
        watches: Vec<Watch>,
        heartbeat_timeout: Duration,
        now: Instant,
    ) -> Self {
        let mut engine = Self {
            names,
            wire: Some(wire),
            arena,
            segment,
            local_peers,
            watches,
            tier: Tier::best(),
            heartbeat_timeout,
            liveness: true,
            scratch: Scratch::default(),
            collectives: VecDeque::new(),
            p2p: HashMap::new(),
            next_p2p: 1,
            finished: Vec::new(),
            lingering: None,
            last_heartbeat: now,
            last_tick: now,
            failure: None,
            reduced_bytes: 0,
            issued: 0,
            completed: 0,
            page: Page::create()
                .inspect_err(|error| tracing::warn!(%error, "this rank has no status page"))
                .ok(),
        };
        engine.publish(now);
        engine
    }

    /// Operations under way.
    pub(crate) fn busy(&self) -> bool {
        !self.collectives.is_empty() || !self.p2p.is_empty()
    }

    /// Whether any peer is on another node.
    pub(crate) fn has_remote_peers(&self) -> bool {
        self.local_peers.len() + 1 < self.names.size as usize
    }

    /// Completed operations; deliver them without holding the engine.
    pub(crate) fn take_finished(&mut self) -> Vec<(Arc<OpState>, Result<(), ReduceError>)> {
        std::mem::take(&mut self.finished)
    }

    /// Accepts submissions in their order.
    pub(crate) fn accept(&mut self, submission: Submission) {
        let Submission { plan, op, submitted, timeout } = submission;
        if let Some(failure) = &self.failure {
            let context = self.names.us();
            self.finished.push((op, Err(failure.during(&context))));
            return;
        }
        let wire = self.wire.as_mut().expect("present until the group fails");
        match plan {
            Plan::Collective { descriptor, body } => {
                let sequence = op.sequence;
                self.issued = sequence;
                let mut issued = wire.issue(sequence, descriptor);
                if let Some(segment) = &self.segment {
                    segment.announce(sequence, &descriptor);
                    for (rank, theirs) in &self.local_peers {
                        if let Some(theirs) = theirs.issued_as(sequence) {
                            issued = issued.and(wire.compare(sequence, &descriptor, *rank, &theirs));
                        }
                    }
                }
                self.collectives.push_back(Active {
                    sequence,
                    descriptor,
                    body,
                    op,
                    submitted,
                    timeout,
                    began: None,
                    probed: None,
                });
                if let Err(error) = issued {
                    self.fail(error);
                }
            }
            Plan::Send { peer, tag, ptr, len } => {
                let id = self.next_p2p;
                self.next_p2p += 1;
                let what = format!("send of {len} bytes to rank {peer} with tag {tag}");
                let active = ActiveP2p { op, what, receive: false, peer: Some(peer), submitted, timeout };
                self.p2p.insert(id, active);
                wire.send_p2p(id, peer, tag, ptr, len);
            }
            Plan::Recv { peer, tag, ptr, len } => {
                let id = self.next_p2p;
                self.next_p2p += 1;
                let from = peer.map_or("any rank".to_owned(), |p| format!("rank {p}"));
                let what = format!("receive of {len} bytes from {from} with tag {tag}");
                let active = ActiveP2p { op, what, receive: true, peer, submitted, timeout };
                self.p2p.insert(id, active);
                wire.recv_p2p(id, peer, tag, ptr, len);
            }
        }
    }

    /// Moves what can be moved; whether anything was.
    pub(crate) fn progress(&mut self, now: Instant) -> bool {
        if self.failure.is_some() {
            return false;
        }
        let mut moved = false;
        match self.wire.as_mut().expect("present until the group fails").progress(now) {
            Ok(any) => moved |= any,
            Err(error) => {
                self.fail(error);
                return true;
            }
        }
        self.dispatch();
        match self.run_front(now) {
            Ok(any) => moved | any,
            Err(error) => {
                self.fail(error);
                true
            }
        }
    }

    fn dispatch(&mut self) {
        let events = self.wire.as_mut().expect("present until the group fails").take_events();
        for event in events {
            match event {
                Event::Sent { sequence, .. } | Event::Received { sequence, .. } => {
                    if let Some(front) = self.collectives.front_mut()
                        && front.sequence == sequence
                    {
                        front.body.event(event);
                    }
                }
                Event::P2pSent { id } => {
                    if let Some(active) = self.p2p.remove(&id) {
                        self.finished.push((active.op, Ok(())));
                    }
                }
                Event::P2pReceived { id, source } => {
                    if let Some(active) = self.p2p.remove(&id) {
                        active.op.set_source(source);
                        self.finished.push((active.op, Ok(())));
                    }
                }
            }
        }
    }

    /// Runs collectives one after the other: the next begins here when the last is complete here.
    fn run_front(&mut self, now: Instant) -> Result<bool, ReduceError> {
        let mut moved = false;
        while let Some(front) = self.collectives.front_mut() {
            let mut cx = Context {
                wire: self.wire.as_mut().expect("present until the group fails"),
                arena: self.arena.as_mut(),
                scratch: &mut self.scratch,
                rank: self.names.rank,
                size: self.names.size,
                tier: self.tier,
                sequence: front.sequence,
                descriptor: front.descriptor,
                reduced_bytes: &mut self.reduced_bytes,
            };
            if front.began.is_none() {
                front.began = Some(now);
                front.body.begin(&mut cx);
                moved = true;
            }
            let polled = front.body.poll(&mut cx)?;
            if polled {
                front.probed = None;
                front.began = Some(now);
            }
            moved |= polled;
            if !front.body.done() {
                break;
            }
            if let Some(done) = self.collectives.pop_front() {
                self.completed = done.sequence;
                self.finished.push((done.op, Ok(())));
            }
            self.scratch.trim();
            moved = true;
            // What the next one posted may have been kept already.
            self.dispatch();
        }
        Ok(moved)
    }

    /// Time and life: timeouts, probes, heartbeats, deaths. Cheap to call often: it looks every
    /// [`TICK`].
    pub(crate) fn tick(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.last_tick);
        let due = since >= Duration::from_millis(1) && self.next_deadline().is_some_and(|d| now >= d);
        if since < TICK && !due {
            return;
        }
        self.last_tick = now;
        self.publish(now);
        if self.failure.is_some() {
            if self.lingering.as_ref().is_some_and(|(_, until)| now >= *until) {
                self.lingering = None;
            }
            return;
        }
        if let Err(error) = self.examine(now) {
            self.fail(error);
        }
    }

    fn examine(&mut self, now: Instant) -> Result<(), ReduceError> {
        if let Err(error) = self.read_notices() {
            // What the failing peer had published before still counts.
            while self.progress(now) {}
            return if self.failure.is_some() { Ok(()) } else { Err(error) };
        }
        if self.liveness {
            self.judge_lost(now)?;
        }
        self.check_left(now)?;
        if self.failure.is_some() {
            return Ok(());
        }
        self.check_timeouts(now)?;
        self.probe(now);
        if self.has_remote_peers() && self.liveness {
            let wire = self.wire.as_mut().expect("present until the group fails");
            if now.saturating_duration_since(self.last_heartbeat) >= HEARTBEAT_EVERY {
                self.last_heartbeat = now;
                wire.heartbeat();
            }
            if let Some(rank) = now.checked_sub(self.heartbeat_timeout).and_then(|t| wire.silent_since(t)) {
                return Err(ReduceError::PeerDied {
                    rank,
                    detail: format!(
                        "rank {rank} gave no sign of life for {:?}: its host is down, its network is cut or its \
                         process is stopped",
                        self.heartbeat_timeout
                    ),
                });
            }
        }
        Ok(())
    }

    fn read_notices(&self) -> Result<(), ReduceError> {
        for (rank, segment) in &self.local_peers {
            if let Some((code, dead, text)) = segment.notice() {
                return Err(ReduceError::from_notice(code, dead, *rank, &text));
            }
        }
        Ok(())
    }

    /// A process of this node has ended: what it had published still counts, what it owes never
    /// comes.
    pub(crate) fn process_gone(&mut self, rank: u32, now: Instant) {
        self.watches.retain(|w| w.rank != rank);
        while self.progress(now) {}
        if self.failure.is_some() {
            return;
        }
        // It may have said why before it ended.
        if let Err(error) = self.read_notices() {
            return self.fail(error);
        }
        let wire = self.wire.as_mut().expect("present until the group fails");
        if wire.standing(rank) == Some(&Standing::Present)
            || matches!(wire.standing(rank), Some(Standing::Lost(_)))
        {
            let error = ReduceError::PeerDied {
                rank,
                detail: format!("rank {rank} died: its process has ended without leaving the group"),
            };
            self.fail(error);
        }
    }

    fn judge_lost(&self, now: Instant) -> Result<(), ReduceError> {
        let wire = self.wire.as_ref().expect("present until the group fails");
        let Some((rank, since, why)) = wire.first_lost() else { return Ok(()) };
        if now.saturating_duration_since(since) < VERDICT_AFTER {
            return Ok(());
        }
        Err(ReduceError::PeerDied {
            rank,
            detail: format!("rank {rank} died: its connection ended without leaving the group ({why})"),
        })
    }

    /// A rank that this one waits for and that has left.
    fn awaited_but_left(&self) -> Option<u32> {
        let wire = self.wire.as_ref()?;
        let awaited = self.collectives.front().map(|f| f.body.missing(wire, self.arena.as_ref(), f.sequence));
        let others = self.p2p.values().filter_map(|p| p.peer);
        awaited.into_iter().flatten().chain(others).find(|&r| wire.standing(r) == Some(&Standing::Left))
    }

    fn check_left(&mut self, now: Instant) -> Result<(), ReduceError> {
        if self.awaited_but_left().is_none() {
            return Ok(());
        }
        // It did all its part before it left; what came in may only not have been looked at.
        while self.progress(now) {}
        match self.awaited_but_left() {
            Some(rank) => Err(ReduceError::Aborted {
                detail: format!("rank {rank} has left the group (destroyed it) without doing its part"),
            }),
            None => Ok(()),
        }
    }

    fn check_timeouts(&mut self, now: Instant) -> Result<(), ReduceError> {
        let wire = self.wire.as_mut().expect("present until the group fails");
        let late: Vec<u64> = self
            .p2p
            .iter()
            .filter(|(_, p)| now.saturating_duration_since(p.submitted) >= p.timeout)
            .map(|(&id, _)| id)
            .collect();
        for id in late {
            let alone = self.p2p[&id].receive && wire.cancel_p2p(id);
            let Some(active) = self.p2p.remove(&id) else { continue };
            let missing: Vec<u32> = active.peer.into_iter().collect();
            let error = ReduceError::Timeout {
                missing,
                detail: format!(
                    "{}: {} did not complete within {:?}: {}",
                    self.names.us(),
                    active.what,
                    active.timeout,
                    active.peer.map_or("no rank has sent".to_owned(), |p| format!("missing rank: {p}"))
                ),
            };
            if !alone {
                self.p2p.insert(id, active);
                return Err(error);
            }
            self.finished.push((active.op, Err(error)));
        }
        let late = self.collectives.iter().find(|c| now.saturating_duration_since(c.submitted) >= c.timeout);
        let (Some(late), Some(front)) = (late, self.collectives.front()) else { return Ok(()) };
        let mut missing = front.body.missing(wire, self.arena.as_ref(), front.sequence);
        // Whom this rank waits for may itself wait. Who has not come at all is to blame, as far as the
        // answers to the last question but this moment's tell.
        if let Some(asked) = front.probed.and_then(|at| at.checked_sub(PROBE_AGAIN))
            && self.names.size <= ASK_ALL
            && front.probed.is_some_and(|at| now.saturating_duration_since(at) >= TICK)
        {
            let absent = wire.not_here(front.sequence, asked);
            if !absent.is_empty() && absent.len() + 1 < self.names.size as usize || missing.is_empty() {
                missing = absent;
            }
        }
        let named: Vec<String> = missing.iter().map(u32::to_string).collect();
        let stuck = if late.sequence == front.sequence {
            String::new()
        } else {
            format!(" behind operation {} ({})", front.sequence, front.descriptor)
        };
        Err(ReduceError::Timeout {
            detail: format!(
                "operation {} ({}) did not complete within {:?}{stuck}: missing ranks: {}",
                late.sequence,
                late.descriptor,
                late.timeout,
                if named.is_empty() { "none, this rank itself is slow".to_owned() } else { named.join(", ") }
            ),
            missing,
        })
    }

    fn probe(&mut self, now: Instant) {
        let Some(front) = self.collectives.front_mut() else { return };
        let Some(began) = front.began else { return };
        let since = front.probed.unwrap_or(began);
        let wait = if front.probed.is_some() { PROBE_AGAIN } else { PROBE_AFTER };
        if now.saturating_duration_since(since) < wait {
            return;
        }
        front.probed = Some(now);
        let wire = self.wire.as_mut().expect("present until the group fails");
        let asked = if self.names.size <= ASK_ALL {
            (0..self.names.size).filter(|&r| r != self.names.rank).collect()
        } else {
            front.body.missing(wire, self.arena.as_ref(), front.sequence)
        };
        for rank in asked {
            wire.probe(rank, front.sequence, front.descriptor);
        }
    }

    /// Breaks the group because of a fault, of which the error file tells.
    pub(crate) fn fail(&mut self, error: ReduceError) {
        if self.failure.is_none() {
            elastic::report(&self.names.us(), &error);
        }
        self.break_off(error);
    }

    /// Breaks the group: tells the peers, drops the links, ends every operation.
    pub(crate) fn break_off(&mut self, error: ReduceError) {
        if self.failure.is_some() {
            return;
        }
        tracing::warn!(group = %self.names.group, rank = self.names.rank, %error, "group is broken");
        let dead = match &error {
            ReduceError::PeerDied { rank, .. } => *rank,
            _ => u32::MAX,
        };
        if let Some(segment) = &self.segment {
            segment.leave_notice(&error, dead);
        }
        if let Some(wire) = &mut self.wire {
            wire.tell_failure(&error, dead);
            wire.flush_failure();
        }
        if self.has_remote_peers() {
            self.lingering = self.wire.take().map(|wire| (wire, Instant::now() + LINGER));
        }
        self.end(error);
    }

    /// Ends the group quietly: peers have been told that this rank leaves.
    pub(crate) fn close(&mut self) {
        self.lingering = None;
        if self.failure.is_none() {
            self.end(ReduceError::Aborted { detail: format!("{} was closed", self.names.us()) });
        }
    }

    fn end(&mut self, error: ReduceError) {
        // First the links: after this nobody touches the operations' memory any more.
        self.wire = None;
        self.failure = Some(error.clone());
        self.publish(Instant::now());
        let us = self.names.us();
        for active in self.collectives.drain(..) {
            let context = format!("{us}: operation {} ({}) failed", active.sequence, active.descriptor);
            self.finished.push((active.op, Err(error.during(&context))));
        }
        for (_, active) in self.p2p.drain() {
            self.finished.push((active.op, Err(error.during(&format!("{us}: {} failed", active.what)))));
        }
        // Mappings and death watches go now; this rank's own segment stays for the peers to read
        // the notice until the group is dropped.
        self.arena = None;
        self.local_peers.clear();
        self.watches.clear();
        self.scratch = Scratch::default();
    }

    /// Says goodbye. Call [`Engine::parted`] until it is true or time is up.
    pub(crate) fn part(&mut self) {
        if self.busy() {
            let detail = format!("{} was closed", self.names.us());
            self.break_off(ReduceError::Aborted { detail });
        }
        if let Some(wire) = &mut self.wire {
            wire.tell_all(MessageKind::Bye, 0);
        }
    }

    /// Whether all that was sent has arrived.
    pub(crate) fn parted(&mut self, now: Instant) -> bool {
        self.progress(now);
        if let Some((_, until)) = &self.lingering {
            return now >= *until;
        }
        self.wire.as_ref().is_none_or(|w| w.bye_confirmed() && w.flushed())
    }

    /// Writes the status page.
    fn publish(&mut self, now: Instant) {
        let Some(page) = &mut self.page else { return };
        let mut status = RankStatus {
            pid: std::process::id(),
            rank: self.names.rank,
            size: self.names.size,
            issued: self.issued,
            completed: self.completed,
            updated: status::boottime(),
            group: self.names.group.clone(),
            ..RankStatus::default()
        };
        if let Some(error) = &self.failure {
            status.state = RankState::Failed;
            status.failure = error.to_string();
        }
        if let Some(wire) = &self.wire {
            let carried = wire.carried();
            let links = [carried.shm, carried.tcp, carried.rdma];
            let arena = self.arena.as_ref().map(|a| a.counted.get()).unwrap_or_default();
            status.bytes_sent = links.iter().map(|l| l.0).sum::<u64>() + arena.staged;
            status.bytes_received = links.iter().map(|l| l.1).sum::<u64>() + arena.read;
            if let Some(front) = self.collectives.front() {
                status.operation = front.descriptor.to_string();
                let idle = front.began.map(|at| now.saturating_duration_since(at)).unwrap_or_default();
                if idle >= TICK {
                    status.stuck_since = status.updated.saturating_sub(idle.as_nanos() as u64);
                    status.waiting_for = front.body.missing(wire, self.arena.as_ref(), front.sequence);
                }
            } else if let Some(oldest) = self.p2p.values().min_by_key(|p| p.submitted) {
                status.operation = oldest.what.clone();
                let idle = now.saturating_duration_since(oldest.submitted);
                status.stuck_since = status.updated.saturating_sub(idle.as_nanos() as u64);
                status.waiting_for = oldest.peer.into_iter().collect();
            }
            status.waiting_count = status.waiting_for.len() as u32;
        }
        page.write(&status);
    }

    /// What to poll besides the doorbell.
    pub(crate) fn poll_fds(&self, with_links: bool, out: &mut Vec<(RawFd, bool)>) {
        out.clear();
        if with_links && let Some(wire) = &self.wire {
            out.extend(wire.poll_fds());
        }
    }

    /// Time until something must be looked at even if nothing happens.
    pub(crate) fn patience(&self, now: Instant) -> Duration {
        let most = Duration::from_millis(if self.busy() { 50 } else { 100 });
        self.next_deadline().map_or(most, |d| d.saturating_duration_since(now).min(most))
    }

    fn next_deadline(&self) -> Option<Instant> {
        let collectives = self.collectives.iter().map(|c| c.submitted + c.timeout);
        collectives.chain(self.p2p.values().map(|p| p.submitted + p.timeout)).min()
    }

    /// Input bytes that kernels have reduced.
    pub(crate) fn reduced_bytes(&self) -> u64 {
        self.reduced_bytes + self.arena.as_ref().map_or(0, |a| a.counted.get().reduced)
    }
}
