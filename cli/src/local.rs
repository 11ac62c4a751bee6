//! A whole cluster on one machine, every role a process of its own: what `ff up`, `ff quickstart`,
//! the end-to-end tests and the benches start. The processes are detached: `ff down` finds them
//! again by the records in the state folder, each with the pid and the start time of the process,
//! so that a pid that the kernel has given to somebody else is never signalled.

use crate::context::{ClusterDescription, Context};
use crate::serve::NodeConfig;
use anyhow::{Context as _, Result, bail};
use firefly_net::NetOptions;
pub use firefly_proto::process::start_ticks;
use firefly_types::{ClusterId, ClusterSecret};
use serde::{Deserialize, Serialize};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// First of the ports that `ff up` uses unless told otherwise.
pub const DEFAULT_PORT_BASE: u16 = 7400;

/// How long a role may take from its start to its first answer. Generous, because the machine may
/// be busy with a build; only a role that never comes up runs into it.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Node numbers of the roles on one machine.
const META_NODE: u32 = 2;
const FIRST_STORAGE_NODE: u32 = 3;

/// What to start.
#[derive(Clone, Debug)]
pub struct Shape {
    /// First port; the roles take the ports from here on. 0 lets the kernel choose each.
    pub port_base: u16,
    /// Storage servers.
    pub storage_servers: u32,
    /// Copies of each chunk.
    pub replication: u32,
    /// Agents, each of which stands for a compute node.
    pub agents: u32,
}

impl Default for Shape {
    fn default() -> Self {
        Self { port_base: DEFAULT_PORT_BASE, storage_servers: 3, replication: 2, agents: 2 }
    }
}

/// A role's process as the state folder remembers it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// `manager`, `meta`, `storage-3`, `scheduler`, `agent-1`.
    pub name: String,
    /// Process id.
    pub pid: i32,
    /// Start time of the process in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_ticks: u64,
    /// The address it listens on, empty if it does not.
    pub address: String,
}

/// One machine's cluster, running or not.
#[derive(Clone, Debug)]
pub struct LocalCluster {
    state: PathBuf,
}

impl LocalCluster {
    /// The cluster in the state folder `state`.
    pub fn at(state: &Path) -> Self {
        Self { state: state.to_owned() }
    }

    /// The state folder.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Where the roles write their logs.
    pub fn logs(&self) -> PathBuf {
        self.state.join("logs")
    }

    /// Whether a cluster has been laid out here.
    pub fn exists(&self) -> bool {
        self.state.join("cluster.toml").exists()
    }

    /// Lays out a new cluster: secret, addresses, one configuration per role. Starts nothing.
    /// Refuses a folder with other content and ports that are taken, before anything is written.
    pub fn create(&self, shape: &Shape) -> Result<()> {
        if shape.storage_servers == 0 || shape.replication == 0 || shape.replication > shape.storage_servers {
            bail!(
                "replication {} needs at least as many storage servers, and {} were asked for",
                shape.replication,
                shape.storage_servers
            );
        }
        if self.state.exists() && fs::read_dir(&self.state)?.next().is_some() {
            bail!(
                "{} is not empty and holds no cluster: choose another folder with --state",
                self.state.display()
            );
        }
        let mut ports = Ports::reserve(shape)?;
        fs::create_dir_all(&self.state).with_context(|| format!("cannot make {}", self.state.display()))?;
        fs::set_permissions(&self.state, fs::Permissions::from_mode(0o700))?;
        for dir in ["conf", "logs", "run"] {
            fs::create_dir_all(self.state.join(dir))?;
        }
        let secret = ClusterSecret::generate();
        write_private(&self.state.join("secret"), &format!("{}\n", secret.to_hex()))?;

        let cluster_id = ClusterId(rand::random()).to_string();
        let manager = ports.next();
        let scheduler = ports.next();
        let meta = ports.next();
        let storage_nodes: Vec<u32> =
            (FIRST_STORAGE_NODE..FIRST_STORAGE_NODE + shape.storage_servers).collect();
        let base = || NodeConfig::new(&cluster_id, &self.state.join("secret"));

        let mut configs = vec![
            (
                "manager".to_owned(),
                base().with_manager(&self.state.join("manager"), manager, &storage_nodes, shape.replication),
            ),
            ("meta".to_owned(), base().with_meta(&self.state.join("meta"), META_NODE, meta, manager)),
        ];
        for node in storage_nodes {
            let name = format!("storage-{node}");
            let dir = self.state.join(&name);
            configs.push((name, base().with_storage(&dir, node, ports.next(), manager)));
        }
        configs
            .push(("scheduler".to_owned(), base().with_scheduler(&self.state.join("scheduler"), scheduler)));
        for node in 1..=shape.agents {
            let name = format!("agent-{node}");
            let dir = self.state.join(&name);
            configs.push((name, base().with_agent(&dir, node, scheduler)));
        }
        for (name, config) in &configs {
            fs::write(self.config_path(name), toml::to_string_pretty(config)?)?;
        }
        let description = ClusterDescription {
            cluster_id,
            manager: manager.to_string(),
            scheduler: scheduler.to_string(),
            net: NetOptions::default(),
        };
        // Last: its presence says that the layout is complete.
        fs::write(self.state.join("cluster.toml"), toml::to_string_pretty(&description)?)?;
        Ok(())
    }

    /// Lays out one more storage server, which the manager has been told of; returns its name.
    pub fn add_storage(&self, node: u32) -> Result<String> {
        let name = format!("storage-{node}");
        if self.config_path(&name).exists() {
            bail!("{} exists: choose another number", self.config_path(&name).display());
        }
        let context = self.context()?;
        let manager = context.cluster.manager.parse().context("cluster.toml: the manager's address")?;
        let listen = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let config = NodeConfig::new(&context.cluster.cluster_id, &self.state.join("secret")).with_storage(
            &self.state.join(&name),
            node,
            listen,
            manager,
        );
        fs::write(self.config_path(&name), toml::to_string_pretty(&config)?)?;
        Ok(name)
    }

    fn config_path(&self, name: &str) -> PathBuf {
        self.state.join("conf").join(format!("{name}.toml"))
    }

    fn record_path(&self, name: &str) -> PathBuf {
        self.state.join("run").join(format!("{name}.json"))
    }

    /// The roles laid out here, in the order in which they must start.
    pub fn roles(&self) -> Result<Vec<String>> {
        let rank = |name: &str| {
            ["manager", "meta", "storage", "scheduler", "agent"].iter().position(|p| name.starts_with(p))
        };
        let dir = self.state.join("conf");
        let mut names: Vec<String> = fs::read_dir(&dir)
            .with_context(|| format!("no cluster in {}: start one with `ff up`", self.state.display()))?
            .filter_map(|entry| {
                entry.ok()?.file_name().into_string().ok()?.strip_suffix(".toml").map(str::to_owned)
            })
            .filter(|name| rank(name).is_some())
            .collect();
        names.sort_by_key(|name| (rank(name), name.clone()));
        Ok(names)
    }

    /// The record of a role's process, if it was started and still runs.
    pub fn running(&self, name: &str) -> Option<ProcessRecord> {
        let text = fs::read(self.record_path(name)).ok()?;
        let record: ProcessRecord = serde_json::from_slice(&text).ok()?;
        (start_ticks(record.pid) == Some(record.start_ticks)).then_some(record)
    }

    /// Starts one role and waits until it serves. `ff` is the binary to run.
    pub fn start_role(&self, ff: &Path, name: &str) -> Result<ProcessRecord> {
        if let Some(record) = self.running(name) {
            return Ok(record);
        }
        let config_path = self.config_path(name);
        let config: NodeConfig = firefly_types::config::load(&config_path)?;
        let log_path = self.logs().join(format!("{name}.log"));
        let ready = self.state.join("run").join(format!("{name}.ready"));
        let _ = fs::remove_file(&ready);
        let mut command = detached(ff, &log_path)?;
        command.args(["serve", "--config"]).arg(&config_path).arg("--ready-file").arg(&ready);
        command.current_dir(&self.state);
        let mut child = command.spawn().with_context(|| format!("cannot start {}", ff.display()))?;
        let pid = child.id() as i32;
        let started = Instant::now();
        let record = ProcessRecord {
            name: name.to_owned(),
            pid,
            start_ticks: start_ticks(pid).unwrap_or(0),
            address: config.address(),
        };
        fs::write(self.record_path(name), serde_json::to_vec_pretty(&record)?)?;
        loop {
            if ready.exists() {
                return Ok(record);
            }
            if let Some(status) = child.try_wait()? {
                bail!(
                    "{name} ended at its start ({status}); the end of {}:\n{}",
                    log_path.display(),
                    last_lines(&log_path, 5)
                );
            }
            if started.elapsed() > READY_WITHIN {
                bail!(
                    "{name} does not answer after {} s; see {}",
                    READY_WITHIN.as_secs(),
                    log_path.display()
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts every role that does not run. Calls `progress` with each role's record as it serves.
    pub fn start(&self, ff: &Path, mut progress: impl FnMut(&ProcessRecord)) -> Result<()> {
        for name in self.roles()? {
            progress(&self.start_role(ff, &name)?);
        }
        Ok(())
    }

    /// Ends a role at once, as a crash would. Returns whether it ran.
    pub fn kill_role(&self, name: &str) -> Result<bool> {
        let Some(record) = self.running(name) else { return Ok(false) };
        signal(&record, libc::SIGKILL)?;
        wait_gone(&record, Duration::from_secs(10));
        Ok(true)
    }

    /// Stops every role: politely, and after `grace` by force. The reverse order of their start, but
    /// the manager before the storage servers: nobody is left then to take the servers out of their
    /// chains one by one, so that all of them are complete when they start again, and none has to be
    /// filled. Calls `progress` with each name. Returns how many ran.
    pub fn stop(&self, grace: Duration, mut progress: impl FnMut(&str)) -> Result<usize> {
        let mut stopped = 0;
        let mut names: Vec<String> = self.roles()?.into_iter().rev().collect();
        names.sort_by_key(|name| match name.as_str() {
            storage if storage.starts_with("storage") => 2,
            "manager" => 1,
            _ => 0,
        });
        for name in names {
            if let Some(record) = self.running(&name) {
                signal(&record, libc::SIGTERM)?;
                if !wait_gone(&record, grace) {
                    signal(&record, libc::SIGKILL)?;
                    wait_gone(&record, Duration::from_secs(10));
                }
                stopped += 1;
                progress(&name);
            }
            let _ = fs::remove_file(self.record_path(&name));
        }
        Ok(stopped)
    }

    /// How a command reaches this cluster.
    pub fn context(&self) -> Result<Context> {
        Context::open(&self.state, false)
    }
}

/// Listeners hold the ports while the layout is written, so that a port in use shows before
/// anything else happens.
struct Ports {
    addresses: std::vec::IntoIter<SocketAddr>,
    _held: Vec<TcpListener>,
}

impl Ports {
    fn reserve(shape: &Shape) -> Result<Self> {
        let count = 3 + shape.storage_servers as u16;
        let mut held = Vec::new();
        for i in 0..count {
            let port = match shape.port_base {
                0 => 0,
                base => base
                    .checked_add(i)
                    .with_context(|| format!("--port-base {base} leaves no room for {count} ports"))?,
            };
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|error| {
                anyhow::anyhow!(
                    "port {port} on 127.0.0.1 cannot be used ({error}): another cluster may be running \
                     (`ff status`); choose other ports with --port-base"
                )
            })?;
            held.push(listener);
        }
        let addresses = held.iter().map(TcpListener::local_addr).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { addresses: addresses.into_iter(), _held: held })
    }

    fn next(&mut self) -> SocketAddr {
        self.addresses.next().expect("as many ports were reserved as the shape has listening roles")
    }
}

/// A command that outlives the terminal: a session of its own, no input, and what it says appended
/// to the file `log`.
pub(crate) fn detached(program: &Path, log: &Path) -> Result<Command> {
    let log = fs::OpenOptions::new().create(true).append(true).open(log)?;
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // SAFETY: setsid is async-signal-safe and touches nothing of the parent's memory.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(|_| ()).map_err(Into::into));
    }
    Ok(command)
}

fn signal(record: &ProcessRecord, signal: i32) -> Result<()> {
    if start_ticks(record.pid) != Some(record.start_ticks) {
        return Ok(());
    }
    // SAFETY: kill takes no pointers; the pid was just seen to be the process that we started.
    if unsafe { libc::kill(record.pid, signal) } != 0 {
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ESRCH) {
            return Err(error).with_context(|| format!("cannot signal {} (pid {})", record.name, record.pid));
        }
    }
    Ok(())
}

fn wait_gone(record: &ProcessRecord, within: Duration) -> bool {
    let started = Instant::now();
    while start_ticks(record.pid) == Some(record.start_ticks) {
        if started.elapsed() > within {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    Ok(())
}

fn last_lines(path: &Path, count: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
