//! The ranks of this node, as the agent sees them: folders, shims and what was said about them.

use crate::error::AgentError;
use crate::files::{self, Prepare, Start, State, Status, Stop};
use crate::{spool, sys};
use firefly_proto::scheduler as wire;
use firefly_types::NodeId;
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// A shim that has not said anything for so long after its start has failed.
const SHIM_START: Duration = Duration::from_secs(20);
/// What a shim gets beyond the rank's grace before the agent ends both.
const SHIM_STOP: Duration = Duration::from_secs(15);
/// A forgotten rank waits so long for the rest of its log to be taken.
const LOG_PATIENCE: Duration = Duration::from_secs(30);
/// Jobs of which it is remembered which attempts are over here.
const ENDED_KEPT: usize = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) job: u64,
    pub(crate) epoch: u32,
    pub(crate) rank: u32,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "j{}.a{}.r{}", self.job, self.epoch, self.rank)
    }
}

impl Key {
    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('.');
        let key = Key {
            job: parts.next()?.strip_prefix('j')?.parse().ok()?,
            epoch: parts.next()?.strip_prefix('a')?.parse().ok()?,
            rank: parts.next()?.strip_prefix('r')?.parse().ok()?,
        };
        (key.to_string() == name).then_some(key)
    }
}

/// One rank.
pub(crate) struct Rank {
    pub(crate) key: Key,
    pub(crate) dir: PathBuf,
    /// `None` until the shim has said something.
    pub(crate) status: Option<Status>,
    /// As last reported on this stream.
    told: Option<Status>,
    born: Instant,
    stop_by: Option<Instant>,
    forgotten: Option<Instant>,
    /// Whether the scheduler has said from where it wants the log.
    pub(crate) log_wanted: bool,
    pub(crate) log_sent: u64,
    pub(crate) log_acked: u64,
}

impl Rank {
    fn new(key: Key, dir: PathBuf, status: Option<Status>) -> Self {
        Self {
            key,
            dir,
            status,
            told: None,
            born: Instant::now(),
            stop_by: None,
            forgotten: None,
            log_wanted: false,
            log_sent: 0,
            log_acked: 0,
        }
    }

    fn is_over(&self) -> bool {
        self.status.as_ref().is_some_and(|s| s.state == State::Exited)
    }

    fn report(&self) -> Option<wire::RankReport> {
        let status = self.status.as_ref()?;
        let state = match status.state {
            State::Prepared => "prepared",
            State::Running => "running",
            State::Exited => "exited",
        };
        Some(wire::RankReport {
            job_id: self.key.job,
            epoch: self.key.epoch,
            rank: self.key.rank,
            state: state.into(),
            exit_code: status.exit_code,
            signal: status.signal,
            pid: status.process.map_or(0, |p| u32::try_from(p.pid).unwrap_or(0)),
            detail: status.detail.clone(),
            master_port: status.master_port.into(),
            log_end: status.log_end,
        })
    }

    /// The end of a rank that its shim cannot tell: the shim is gone.
    fn bury(&mut self, detail: &str) -> io::Result<()> {
        sys::kill_marked(&format!("FIREFLY_STATUS={}", self.dir.join("status").display()));
        let mut status = self.status.clone().unwrap_or_default();
        status.state = State::Exited;
        (status.exit_code, status.signal) = (None, None);
        status.detail = detail.into();
        status.log_end = spool::end(&self.dir).unwrap_or(0);
        files::write(&self.dir.join("status.json"), &status, 0o600)?;
        self.status = Some(status);
        Ok(())
    }
}

/// All ranks of this node.
pub(crate) struct Ranks {
    state_dir: PathBuf,
    node_id: NodeId,
    shim_command: Vec<String>,
    pub(crate) map: BTreeMap<Key, Rank>,
    ended: BTreeMap<u64, u32>,
}

impl Ranks {
    /// Adopts what earlier agents left in `state_dir`.
    pub(crate) fn open(
        state_dir: &Path,
        node_id: NodeId,
        shim_command: Vec<String>,
    ) -> Result<Self, AgentError> {
        let root = state_dir.join("ranks");
        // Ranks of other users must reach their status folders through it.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&root)
            .map_err(AgentError::state(format!("make {}", root.display())))?;
        let ended = files::read(&state_dir.join("ended.json"))
            .map_err(AgentError::state("read ended.json"))?
            .unwrap_or_default();
        let mut ranks =
            Self { state_dir: state_dir.to_owned(), node_id, shim_command, map: BTreeMap::new(), ended };
        let entries = fs::read_dir(&root).map_err(AgentError::state(format!("list {}", root.display())))?;
        for entry in entries {
            let entry = entry.map_err(AgentError::state("list ranks"))?;
            let dir = entry.path();
            match entry.file_name().to_str().and_then(Key::parse) {
                Some(key) => ranks.adopt(key, dir).map_err(AgentError::state(format!("adopt {key}")))?,
                // Half made or half removed.
                None => fs::remove_dir_all(&dir).map_err(AgentError::state("remove a leftover"))?,
            }
        }
        Ok(ranks)
    }

    fn adopt(&mut self, key: Key, dir: PathBuf) -> io::Result<()> {
        let status: Option<Status> = files::read(&dir.join("status.json"))?;
        if status.is_none()
            && let Some(_lock) = sys::lock(&dir.join("lock"))?
        {
            // The agent died between making the folder and the shim's first word, and no shim has
            // it; while we hold the lock none can take it. The scheduler will order it again.
            return fs::remove_dir_all(&dir);
        }
        tracing::info!(rank = %key, "adopted");
        self.map.insert(key, Rank::new(key, dir, status));
        Ok(())
    }

    /// A new stream knows nothing of what was said on the one before.
    pub(crate) fn new_stream(&mut self) {
        for rank in self.map.values_mut() {
            rank.told = None;
            rank.log_wanted = false;
        }
    }

    /// Looks at every rank. Cheap: a small file and a lock for each.
    pub(crate) fn refresh(&mut self) {
        for rank in self.map.values_mut() {
            if let Err(e) = refresh(rank) {
                tracing::warn!(rank = %rank.key, error = %e, "cannot look after the rank");
            }
        }
        self.sweep();
    }

    /// Everything, for a hello.
    pub(crate) fn inventory(&mut self) -> Vec<wire::RankReport> {
        self.refresh();
        let mut all = Vec::new();
        for rank in self.map.values_mut() {
            rank.told.clone_from(&rank.status);
            all.extend(rank.report());
        }
        all
    }

    /// What has changed since it was last told.
    pub(crate) fn changes(&mut self) -> Vec<wire::RankReport> {
        self.refresh();
        let mut changed = Vec::new();
        for rank in self.map.values_mut().filter(|r| r.told != r.status) {
            rank.told.clone_from(&rank.status);
            changed.extend(rank.report());
        }
        changed
    }

    /// Makes a rank. `Some`: it is refused, or already there.
    pub(crate) fn prepare(&mut self, order: wire::PrepareRank) -> Option<wire::RankReport> {
        let key = Key { job: order.job_id, epoch: order.epoch, rank: order.rank };
        if let Some(rank) = self.map.get(&key) {
            return rank.report();
        }
        if self.ended.get(&key.job).is_some_and(|ended| *ended >= key.epoch) {
            return Some(never_ran(key, format!("attempt {} is over on n{}", key.epoch, self.node_id.0)));
        }
        // At most one attempt has effects: the last line of defence, on the node itself.
        let other =
            self.map.values().find(|r| r.key.job == key.job && r.key.epoch != key.epoch && !r.is_over());
        if let Some(other) = other {
            return Some(never_ran(
                key,
                format!("attempt {} of the job still runs on n{}", other.key.epoch, self.node_id.0),
            ));
        }
        match self.create(key, order) {
            Ok(mut rank) => {
                rank.log_wanted = true;
                self.map.insert(key, rank);
                None
            }
            Err(e) => Some(never_ran(key, format!("n{} cannot prepare it: {e}", self.node_id.0))),
        }
    }

    fn create(&self, key: Key, order: wire::PrepareRank) -> io::Result<Rank> {
        let spec = order.spec.unwrap_or_default();
        let prepare = Prepare {
            version: files::VERSION,
            job: key.job,
            epoch: key.epoch,
            rank: key.rank,
            local_rank: order.local_rank,
            world_size: order.world_size,
            local_world_size: order.local_world_size,
            node_rank: order.node_rank,
            node_id: self.node_id.0,
            nodes: spec.nodes,
            restart_count: order.restart_count,
            max_restarts: spec.max_restarts,
            name: spec.name,
            command: spec.command,
            env: spec.env.into_iter().collect(),
            working_directory: spec.working_directory,
            user: spec.user,
            uid: spec.uid,
            gid: spec.gid,
            grace_ms: spec.grace_ms.into(),
            orphan_lease_ms: order.orphan_lease_ms,
            job_secret: order.job_secret,
        };
        let root = self.state_dir.join("ranks");
        let (dir, making) = (root.join(key.to_string()), root.join(format!("{key}.new")));
        if making.exists() {
            fs::remove_dir_all(&making)?;
        }
        fs::DirBuilder::new().mode(0o711).create(&making)?;
        files::write(&making.join("prepare.json"), &prepare, 0o600)?;
        mkfifo(&making.join("ctl"))?;
        fs::rename(&making, &dir)?;
        fs::File::open(&root)?.sync_all()?;
        self.spawn(&dir)?;
        Ok(Rank::new(key, dir, None))
    }

    fn spawn(&self, dir: &Path) -> io::Result<()> {
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(dir.join("shim.log"))?;
        let (program, arguments) = match self.shim_command.split_first() {
            Some((program, arguments)) => (PathBuf::from(program), arguments.to_vec()),
            None => (std::env::current_exe()?, vec!["shim".to_owned()]),
        };
        let mut command = tokio::process::Command::new(&program);
        command.args(arguments).arg("--dir").arg(dir);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // A folder that stays, whatever happens to the agent's own.
        command.current_dir("/").kill_on_drop(false);
        let mut child = command.spawn().map_err(|e| {
            io::Error::new(e.kind(), format!("cannot start the shim {}: {e}", program.display()))
        })?;
        let wake = self.state_dir.join("wake");
        tokio::spawn(async move {
            // As long as we are its parent we reap it; its end is news.
            let _ = child.wait().await;
            files::ring(&wake);
        });
        Ok(())
    }

    pub(crate) fn start(&mut self, order: &wire::StartRank) {
        let key = Key { job: order.job_id, epoch: order.epoch, rank: order.rank };
        let Some(rank) = self.map.get(&key) else {
            tracing::warn!(rank = %key, "ordered to start, but not here");
            return;
        };
        let start = Start {
            master_address: order.master_address.clone(),
            master_port: u16::try_from(order.master_port).unwrap_or(0),
        };
        let path = rank.dir.join("start.json");
        if !path.exists()
            && let Err(e) = files::write(&path, &start, 0o600)
        {
            // The scheduler sees that it does not start and ends the attempt in the end.
            tracing::error!(rank = %key, error = %e, "cannot open the barrier");
        }
        files::ring(&rank.dir.join("ctl"));
    }

    /// `Some`: there is nothing to stop.
    pub(crate) fn stop(&mut self, order: &wire::StopRank) -> Option<wire::RankReport> {
        let key = Key { job: order.job_id, epoch: order.epoch, rank: order.rank };
        let Some(rank) = self.map.get_mut(&key) else {
            return Some(never_ran(key, format!("it is not on n{}", self.node_id.0)));
        };
        let grace = Duration::from_millis(order.grace_ms.into());
        rank.stop_by = Some(Instant::now() + grace + SHIM_STOP);
        let stop = Stop { grace_ms: order.grace_ms.into() };
        if let Err(e) = files::write(&rank.dir.join("stop.json"), &stop, 0o600) {
            tracing::error!(rank = %key, error = %e, "cannot tell the shim to stop; it will be killed");
        }
        files::ring(&rank.dir.join("ctl"));
        rank.report().filter(|_| rank.is_over())
    }

    pub(crate) fn forget(&mut self, order: &wire::ForgetRank) {
        let key = Key { job: order.job_id, epoch: order.epoch, rank: order.rank };
        if let Some(rank) = self.map.get_mut(&key).filter(|r| r.is_over()) {
            rank.forgotten.get_or_insert_with(Instant::now);
        }
        self.sweep();
    }

    pub(crate) fn log_ack(&mut self, ack: &wire::LogAck) {
        let key = Key { job: ack.job_id, epoch: ack.epoch, rank: ack.rank };
        let Some(rank) = self.map.get_mut(&key) else { return };
        rank.log_acked = rank.log_acked.max(ack.offset);
        if !rank.log_wanted {
            rank.log_wanted = true;
            rank.log_sent = ack.offset;
        }
        if let Err(e) = spool::trim(&rank.dir, rank.log_acked) {
            tracing::warn!(rank = %key, error = %e, "cannot trim the log");
        }
    }

    /// Removes ranks that the scheduler has recorded and whose log it has.
    fn sweep(&mut self) {
        let gone: Vec<Key> = self
            .map
            .values()
            .filter(|r| {
                r.forgotten.is_some_and(|since| {
                    let end = r.status.as_ref().map_or(0, |s| s.log_end);
                    r.log_acked >= end || since.elapsed() > LOG_PATIENCE
                })
            })
            .map(|r| r.key)
            .collect();
        if gone.is_empty() {
            return;
        }
        for key in &gone {
            let ended = self.ended.entry(key.job).or_default();
            *ended = (*ended).max(key.epoch);
        }
        while self.ended.len() > ENDED_KEPT {
            self.ended.pop_first();
        }
        // First the memory that it is over, then its files.
        if let Err(e) = files::write(&self.state_dir.join("ended.json"), &self.ended, 0o600) {
            tracing::warn!(error = %e, "cannot remember which attempts are over");
            return;
        }
        for key in gone {
            if let Some(rank) = self.map.remove(&key)
                && let Err(e) = fs::remove_dir_all(&rank.dir)
            {
                tracing::warn!(rank = %key, error = %e, "cannot remove the rank's folder");
            }
        }
    }
}

fn refresh(rank: &mut Rank) -> io::Result<()> {
    if rank.is_over() {
        return Ok(());
    }
    let path = rank.dir.join("status.json");
    if let Some(status) = files::read::<Status>(&path)? {
        rank.status = Some(status);
    }
    if rank.is_over() {
        return Ok(());
    }
    if rank.stop_by.is_some_and(|by| Instant::now() > by) {
        // The shim does not do its work: it was stopped, or the rank cannot die.
        if let Some(status) = &rank.status {
            sys::kill_marked(&format!("FIREFLY_STATUS={}", rank.dir.join("status").display()));
            sys::signal(status.shim, Signal::KILL);
        }
    }
    // A shim takes its lock before its first word: before that, looking at the lock could take it
    // away from it.
    if (rank.status.is_some() || rank.born.elapsed() > SHIM_START)
        && let Some(_lock) = sys::lock(&rank.dir.join("lock"))?
    {
        // It may have ended properly just now.
        if let Some(status) = files::read::<Status>(&path)?.filter(|s| s.state == State::Exited) {
            rank.status = Some(status);
            return Ok(());
        }
        let detail = match rank.status {
            Some(_) => "its shim was killed",
            None => "its shim did not start (see shim.log in its folder on the node)",
        };
        rank.bury(detail)?;
    }
    Ok(())
}

/// A rank that has never been here.
fn never_ran(key: Key, detail: String) -> wire::RankReport {
    wire::RankReport {
        job_id: key.job,
        epoch: key.epoch,
        rank: key.rank,
        state: "exited".into(),
        detail,
        ..wire::RankReport::default()
    }
}

/// Makes a fifo, unless it exists.
pub(crate) fn mkfifo(path: &Path) -> io::Result<()> {
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    match rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0) {
        Err(e) if e != rustix::io::Errno::EXIST => Err(e.into()),
        _ => Ok(()),
    }
}
