//! What this machine can reach its peers by: RDMA devices (rails) beside TCP, and how each kind of
//! traffic is marked on the wire. Opened once per process, because registrations of memory belong
//! to an open device.

use crate::verbs::Device;
use serde::{Deserialize, Serialize};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

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
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Transport::Auto),
            "tcp" => Ok(Transport::Tcp),
            "rdma" => Ok(Transport::Rdma),
            other => Err(format!("{other:?} is no transport: auto, tcp or rdma")),
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
    /// RDMA devices to use, such as "mlx5_0". Default: all whose port is active.
    /// `FIREFLY_RDMA_DEVICES` (names with commas between) overrides it.
    pub devices: Vec<String>,
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
}

/// One RDMA device of this machine.
#[derive(Clone)]
pub(crate) struct Rail {
    pub(crate) device: Arc<Device>,
}

struct Inner {
    options: NetOptions,
    rails: Vec<Rail>,
    /// Why there are no rails.
    why_not: Option<String>,
}

/// The transports of this process. Cloning shares the open devices.
#[derive(Clone)]
pub struct Fabric(Arc<Inner>);

impl Fabric {
    /// Opens what `options` allows and this machine has. Never fails: a machine without RDMA uses
    /// TCP, and [`Fabric::why_not`] says why.
    pub fn open(options: NetOptions) -> Fabric {
        if options.tls {
            let why_not = Some("TLS was asked for, which RDMA does not carry".to_owned());
            return Fabric(Arc::new(Inner { options, rails: Vec::new(), why_not }));
        }
        let (mut rails, mut why_not) = (Vec::new(), None);
        if options.transport == Transport::Tcp {
            why_not = Some("TCP was asked for".to_owned());
        } else if options.devices.is_empty() {
            why_not = Some("no RDMA device was named".to_owned());
        }
        for name in options.devices.iter().filter(|_| options.transport != Transport::Tcp) {
            match Device::open(name) {
                Ok(device) => rails.push(Rail { device }),
                Err(error) => why_not = Some(error.to_string()),
            }
        }
        Fabric(Arc::new(Inner { options, rails, why_not }))
    }

    /// TCP only.
    pub fn tcp() -> Fabric {
        Fabric::open(NetOptions { transport: Transport::Tcp, ..NetOptions::default() })
    }

    /// The process's fabric: what [`Fabric::install`] opened, else one with default options.
    pub fn shared() -> Fabric {
        SHARED.get_or_init(|| Fabric::open(NetOptions::default())).clone()
    }

    /// Opens the process's fabric, before its first use.
    ///
    /// # Errors
    /// It is in use already: options given now would have no effect.
    pub fn install(options: NetOptions) -> Result<(), &'static str> {
        SHARED.set(Fabric::open(options)).map_err(|_| "the process's network is in use already")
    }

    /// What was asked for.
    pub fn options(&self) -> &NetOptions {
        &self.0.options
    }

    /// Why RDMA is not used, if it is not.
    pub fn why_not(&self) -> Option<&str> {
        self.0.why_not.as_deref().filter(|_| self.0.rails.is_empty())
    }

    pub(crate) fn rails(&self) -> &[Rail] {
        &self.0.rails
    }
}

static SHARED: OnceLock<Fabric> = OnceLock::new();

impl std::fmt::Debug for Fabric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fabric").field("options", &self.0.options).field("why_not", &self.0.why_not).finish()
    }
}
