//! What this machine can reach its peers by: RDMA devices (rails) beside TCP, and how each kind of
//! traffic is marked on the wire. Opened once per process, because registrations of memory belong
//! to an open device.
//!
//! Selection: `transport = auto` uses every port of every RDMA device that is up, and TCP beside
//! and below it; `devices` narrows it. Which rail reaches which peer is found out for each
//! connection (`rpc::carrier`, `channel::connect`). What was found, what is used and why something
//! is not is in the [`FabricReport`].

use crate::verbs::{Device, Rail, Watcher};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

/// Environment variable that overrides [`NetOptions::transport`].
pub const TRANSPORT_VARIABLE: &str = "FIREFLY_TRANSPORT";
/// Environment variable that overrides [`NetOptions::devices`]: names with commas between.
pub const DEVICES_VARIABLE: &str = "FIREFLY_RDMA_DEVICES";

/// Which transports may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// RDMA where both sides have an active device and reach each other by it, TCP elsewhere.
    #[default]
    Auto,
    /// TCP only.
    Tcp,
    /// RDMA only: a peer that cannot be reached by it is an error that says why.
    Rdma,
}

impl FromStr for Transport {
    type Err = FabricError;

    fn from_str(s: &str) -> Result<Self, FabricError> {
        match s {
            "auto" => Ok(Transport::Auto),
            "tcp" => Ok(Transport::Tcp),
            "rdma" => Ok(Transport::Rdma),
            other => Err(FabricError::Transport(other.to_owned())),
        }
    }
}

/// What a connection carries; each kind may be marked differently so that switches can tell them
/// apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// File data.
    Storage,
    /// Metadata and other small calls.
    Control,
    /// Collectives.
    Collective,
}

/// How one kind of traffic is marked. Zero is the network's default class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Class {
    /// InfiniBand service level, 0 to 15.
    pub service_level: u8,
    /// Traffic class of RoCE packets and type of service (IP_TOS) of TCP's: the DSCP times four.
    pub traffic_class: u8,
}

/// What can be told about the network. What is left out is found out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetOptions {
    /// Which transports may be used. Default auto. `FIREFLY_TRANSPORT` overrides it.
    pub transport: Transport,
    /// RDMA devices to use: "mlx5_0" (all its ports), "mlx5_0:2" (one port), "mlx5_*" (all whose
    /// name begins so, perhaps none). Default: all. `FIREFLY_RDMA_DEVICES` (with commas between)
    /// overrides it.
    pub devices: Vec<String>,
    /// Whether calls give their peers a right to memory that ends with the call (memory windows of
    /// type 2), where a device has them, instead of one that lasts as long as the memory is
    /// registered. Default false, because it depends on the driver doing it well: Soft-RoCE of Linux
    /// 6.12 does it wrong when packets are lost. Costs a request for each payload.
    pub memory_windows: bool,
    /// Encrypt what goes between members, by TLS 1.3 on TCP: for networks that others can read or
    /// write. Default no: members are trusted to deliver what they send, and encrypting takes the
    /// processor's time. RDMA is not used then. Must be alike on all.
    pub tls: bool,
    /// File data.
    pub storage: Class,
    /// Metadata and other small calls.
    pub control: Class,
    /// Collectives.
    pub collective: Class,
}

impl NetOptions {
    /// How `traffic` is marked.
    pub fn class(&self, traffic: Traffic) -> Class {
        match traffic {
            Traffic::Storage => self.storage,
            Traffic::Control => self.control,
            Traffic::Collective => self.collective,
        }
    }

    /// These options with what the environment overrides.
    ///
    /// # Errors
    /// A variable holds a value that means nothing.
    pub fn overridden(self) -> Result<NetOptions, FabricError> {
        let read = |name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        self.overridden_by(read(TRANSPORT_VARIABLE), read(DEVICES_VARIABLE))
    }

    fn overridden_by(
        mut self,
        transport: Option<String>,
        devices: Option<String>,
    ) -> Result<NetOptions, FabricError> {
        if let Some(value) = transport {
            self.transport = value.parse()?;
        }
        if let Some(value) = devices {
            self.devices = value.split(',').map(|name| name.trim().to_owned()).collect();
        }
        Ok(self)
    }
}

/// Why options of the network cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FabricError {
    /// No such transport.
    #[error("{0:?} is no transport: give auto, tcp or rdma (option net.transport, or {TRANSPORT_VARIABLE})")]
    Transport(String),
    /// Not the name of a device.
    #[error(
        "{0:?} names no RDMA device: give names such as mlx5_0, mlx5_0:1 or mlx5_* (option net.devices, or {DEVICES_VARIABLE})"
    )]
    DeviceName(String),
    /// A device that was named is not there.
    #[error(
        "there is no RDMA device {name:?} (option net.devices, or {DEVICES_VARIABLE}); this machine has: {found}. A name such as mlx5_* may match none"
    )]
    NoSuchDevice {
        /// As asked for.
        name: String,
        /// What there is.
        found: String,
    },
    /// An InfiniBand service level is a number of four bits.
    #[error("service level {0} is over 15")]
    ServiceLevel(u8),
    /// [`Fabric::install`] came after the first use.
    #[error("the process's network is in use already: options given now would have no effect")]
    InUse,
}

/// Which ports `devices` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    name: String,
    /// `name` is a prefix.
    prefix: bool,
    port: Option<u8>,
}

impl Wanted {
    fn parse(text: &str) -> Result<Wanted, FabricError> {
        let bad = || FabricError::DeviceName(text.to_owned());
        let (name, port) = match text.split_once(':') {
            Some((name, port)) => (name, Some(port.parse().ok().filter(|p| *p > 0).ok_or_else(bad)?)),
            None => (text, None),
        };
        let (name, prefix) = match name.strip_suffix('*') {
            Some(name) => (name, true),
            None => (name, false),
        };
        let known = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if (name.is_empty() && !prefix) || !name.chars().all(known) {
            return Err(bad());
        }
        Ok(Wanted { name: name.to_owned(), prefix, port })
    }

    fn takes_device(&self, device: &str) -> bool {
        if self.prefix { device.starts_with(&self.name) } else { device == self.name }
    }

    fn takes(&self, device: &str, port: u8) -> bool {
        self.takes_device(device) && self.port.is_none_or(|p| p == port)
    }
}

/// One rail as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RailReport {
    /// As the system names it, such as "mlx5_0"; with ":2" for a second port.
    pub name: String,
    /// Whether it can be used.
    pub up: bool,
    /// Why it cannot, in words: "port 1 is down".
    pub why_not: Option<String>,
    /// "infiniband" or "ethernet".
    pub link_layer: Option<String>,
    /// IP address of a RoCE port.
    pub address: Option<IpAddr>,
    /// The GID that connections use, and its place in the port's table.
    pub gid: Option<String>,
    /// See `gid`.
    pub gid_index: Option<u8>,
    /// "RoCE v2" or "IB/RoCE v1".
    pub gid_kind: Option<String>,
    /// Bytes of the largest packet.
    pub mtu: Option<u32>,
    /// Network interface of a RoCE port.
    pub interface: Option<String>,
    /// Whether rights given to peers end with their calls.
    pub memory_windows: bool,
    /// What this process has done with its device.
    pub work: RailWork,
}

/// Work that this process gave to a device, since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RailWork {
    /// Queue pairs made.
    pub queue_pairs: u64,
    /// Memory regions registered.
    pub registrations: u64,
    /// SENDs posted.
    pub sends: u64,
    /// WRITEs posted, those with immediate included.
    pub writes: u64,
    /// READs posted.
    pub reads: u64,
    /// Bytes of all of these.
    pub bytes: u64,
    /// Receives posted.
    pub receives: u64,
    /// Completions taken.
    pub completions: u64,
    /// Completion events taken.
    pub events: u64,
    /// Of the SENDs and WRITEs, those carried within the request itself.
    pub inline: u64,
    /// Memory windows bound: rights given to a peer for one call.
    pub binds: u64,
    /// Memory windows taken back by this side; peers take back most of them with their answers.
    pub invalidations: u64,
}

/// What this process reaches its peers by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FabricReport {
    /// What was asked for.
    pub transport: Transport,
    /// Why RDMA is not used at all, if it is not: "libibverbs.so.1 is not installed", "no RDMA
    /// device", "rxe0: port 1 is down", "TCP was asked for".
    pub why_not: Option<String>,
    /// The RDMA ports that may be used, up or down.
    pub rails: Vec<RailReport>,
}

struct Inner {
    options: NetOptions,
    rails: Vec<Arc<Rail>>,
    /// Why there are no rails.
    why_none: Option<String>,
    /// Options that could not be followed: nothing is reached then.
    invalid: Option<FabricError>,
    /// Before the rails it would be joined by: it holds them.
    _watcher: Option<Watcher>,
}

/// The transports of this process. Cloning shares the open devices.
#[derive(Clone)]
pub struct Fabric(Arc<Inner>);

impl Fabric {
    /// Opens what `options` allows and this machine has. A machine without RDMA uses TCP, and
    /// [`Fabric::why_not`] says why.
    ///
    /// # Errors
    /// The options name what does not exist.
    pub fn open(options: NetOptions) -> Result<Fabric, FabricError> {
        for class in [options.storage, options.control, options.collective] {
            if class.service_level > 15 {
                return Err(FabricError::ServiceLevel(class.service_level));
            }
        }
        let wanted = options.devices.iter().map(|text| Wanted::parse(text)).collect::<Result<Vec<_>, _>>()?;
        let (rails, why_none) = match options.transport {
            _ if options.tls => (Vec::new(), Some("TLS was asked for, which RDMA does not carry".to_owned())),
            Transport::Tcp => (Vec::new(), Some("TCP was asked for".to_owned())),
            Transport::Auto | Transport::Rdma => match Device::names() {
                Ok(names) => find_rails(&wanted, &names, options.memory_windows)?,
                Err(reason) => (Vec::new(), Some(reason)),
            },
        };
        let watcher = match rails.is_empty() {
            true => None,
            false => match Watcher::start(rails.clone()) {
                Ok(watcher) => Some(watcher),
                Err(e) => {
                    // Failures then show in the work itself, later.
                    tracing::warn!(error = %e, "cannot watch for events of RDMA devices");
                    None
                }
            },
        };
        Ok(Fabric(Arc::new(Inner { options, rails, why_none, invalid: None, _watcher: watcher })))
    }

    /// TCP only.
    pub fn tcp() -> Fabric {
        let options = NetOptions { transport: Transport::Tcp, ..NetOptions::default() };
        let why_none = Some("TCP was asked for".to_owned());
        Fabric(Arc::new(Inner { options, rails: Vec::new(), why_none, invalid: None, _watcher: None }))
    }

    /// The process's fabric: what [`Fabric::install`] opened, else one by the environment. If the
    /// environment asks for what does not exist, each attempt to connect fails with
    /// [`Fabric::invalid`].
    pub fn shared() -> Fabric {
        SHARED
            .get_or_init(|| {
                NetOptions::default().overridden().and_then(Fabric::open).unwrap_or_else(|error| {
                    tracing::error!(%error, "the network's options cannot be followed");
                    let options = NetOptions::default();
                    let why_none = Some(error.to_string());
                    let rails = Vec::new();
                    Fabric(Arc::new(Inner { options, rails, why_none, invalid: Some(error), _watcher: None }))
                })
            })
            .clone()
    }

    /// Opens the process's fabric, before its first use, with what the environment overrides.
    ///
    /// # Errors
    /// The options name what does not exist, or the network is in use already.
    pub fn install(options: NetOptions) -> Result<(), FabricError> {
        if SHARED.get().is_some() {
            return Err(FabricError::InUse);
        }
        SHARED.set(Fabric::open(options.overridden()?)?).map_err(|_| FabricError::InUse)
    }

    /// What was asked for.
    pub fn options(&self) -> &NetOptions {
        &self.0.options
    }

    /// Options that could not be followed: whoever connects must fail with it.
    pub fn invalid(&self) -> Option<&FabricError> {
        self.0.invalid.as_ref()
    }

    /// Why RDMA is not used at all, if it is not.
    pub fn why_not(&self) -> Option<String> {
        if self.0.why_none.is_some() {
            return self.0.why_none.clone();
        }
        let mut reasons = Vec::new();
        for rail in &self.0.rails {
            match rail.port() {
                Ok(_) => return None,
                Err(reason) => reasons.push(format!("{}: {reason}", rail.device.name())),
            }
        }
        Some(reasons.join("; "))
    }

    /// What there is, and what is used of it.
    pub fn report(&self) -> FabricReport {
        FabricReport {
            transport: self.0.options.transport,
            why_not: self.why_not(),
            rails: self.0.rails.iter().map(|rail| report(rail)).collect(),
        }
    }

    /// The ports that may be used, up or down; the order stays.
    pub(crate) fn rails(&self) -> &[Arc<Rail>] {
        &self.0.rails
    }
}

static SHARED: OnceLock<Fabric> = OnceLock::new();

impl std::fmt::Debug for Fabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fabric").field("options", &self.0.options).field("rails", &self.0.rails).finish()
    }
}

/// The ports of the devices `names` that are wanted; all if none was named.
fn find_rails(
    wanted: &[Wanted],
    names: &[String],
    windows: bool,
) -> Result<(Vec<Arc<Rail>>, Option<String>), FabricError> {
    let found = || if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    for one in wanted.iter().filter(|w| !w.prefix) {
        if !names.iter().any(|name| one.takes_device(name)) {
            return Err(FabricError::NoSuchDevice { name: one.name.clone(), found: found() });
        }
    }
    let (mut rails, mut problems) = (Vec::new(), Vec::new());
    for name in names.iter().filter(|n| wanted.is_empty() || wanted.iter().any(|w| w.takes_device(n))) {
        let device = match Device::open(name, windows) {
            Ok(device) => device,
            Err(e) => {
                problems.push(e.to_string());
                continue;
            }
        };
        let ports = 1..=device.limits().ports;
        for one in wanted.iter().filter(|w| !w.prefix && w.takes_device(name)) {
            if one.port.is_some_and(|port| !ports.contains(&port)) {
                let name = format!("{name}:{}", one.port.unwrap_or(0));
                return Err(FabricError::NoSuchDevice { name, found: found() });
            }
        }
        let ports = ports.filter(|port| wanted.is_empty() || wanted.iter().any(|w| w.takes(name, *port)));
        rails.extend(ports.map(|port| Rail::new(&device, port)));
    }
    let why_none = match (rails.is_empty(), problems.is_empty(), names.is_empty()) {
        (false, ..) => None,
        (true, false, _) => Some(problems.join("; ")),
        (true, true, true) => Some("no RDMA device".to_owned()),
        (true, true, false) => Some(format!("no RDMA device matches; this machine has: {}", found())),
    };
    for problem in problems {
        tracing::warn!(%problem, "an RDMA device is left out");
    }
    Ok((rails, why_none))
}

fn report(rail: &Rail) -> RailReport {
    let port = rail.port();
    let (up, why_not) = (port.is_ok(), port.as_ref().err().cloned());
    let port = port.ok();
    let port = port.as_ref();
    let counters = &rail.device.counters;
    let n = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    RailReport {
        name: rail.name(),
        up,
        why_not,
        link_layer: port.map(|p| p.link.name().to_owned()),
        address: port.map(|p| p.gid.address()),
        gid: port.map(|p| std::net::Ipv6Addr::from(p.gid.raw).to_string()),
        gid_index: port.map(|p| p.gid.index),
        gid_kind: port.map(|p| p.gid.kind.name().to_owned()),
        mtu: port.map(|p| p.mtu_bytes()),
        interface: port.and_then(|p| p.netdev.clone()),
        memory_windows: rail.device.has_windows(),
        work: RailWork {
            queue_pairs: n(&counters.queue_pairs),
            registrations: n(&counters.registrations),
            sends: n(&counters.sends),
            writes: n(&counters.writes),
            reads: n(&counters.reads),
            bytes: n(&counters.bytes),
            receives: n(&counters.receives),
            completions: n(&counters.completions),
            events: n(&counters.events),
            inline: n(&counters.inline),
            binds: n(&counters.binds),
            invalidations: n(&counters.invalidations),
        },
    }
}

#[cfg(test)]
#[path = "fabric_tests.rs"]
mod tests;
