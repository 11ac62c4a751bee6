//! Amounts of what a node has, and of what jobs used.

use serde::{Deserialize, Serialize};
use std::fmt;

/// An amount of each thing that a node has. The order compares accelerators first: the index of
/// free capacity walks from the scarcest fit upward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Amount {
    /// Accelerators, whole devices.
    pub gpus: u32,
    /// Ranks.
    pub slots: u32,
    /// Processor cores.
    pub cores: u32,
    /// Memory.
    pub memory_bytes: u64,
}

impl Amount {
    /// Whether `free` covers it.
    pub fn fits(&self, free: &Amount) -> bool {
        self.gpus <= free.gpus
            && self.slots <= free.slots
            && self.cores <= free.cores
            && self.memory_bytes <= free.memory_bytes
    }

    /// Both together.
    pub fn plus(&self, other: &Amount) -> Amount {
        Amount {
            gpus: self.gpus.saturating_add(other.gpus),
            slots: self.slots.saturating_add(other.slots),
            cores: self.cores.saturating_add(other.cores),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
        }
    }

    /// What is left without `other`, never below zero.
    pub fn minus(&self, other: &Amount) -> Amount {
        Amount {
            gpus: self.gpus.saturating_sub(other.gpus),
            slots: self.slots.saturating_sub(other.slots),
            cores: self.cores.saturating_sub(other.cores),
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
        }
    }

    /// The largest of its parts as thousandths of `whole` (dominant resource): what holding it
    /// keeps from others. At least 1, so that nothing is free of charge.
    pub fn milli_of(&self, whole: &Amount) -> u64 {
        let part = |used: u64, all: u64| (used * 1000).checked_div(all).unwrap_or(0);
        part(self.gpus.into(), whole.gpus.into())
            .max(part(self.slots.into(), whole.slots.into()))
            .max(part(self.cores.into(), whole.cores.into()))
            .max(part(self.memory_bytes >> 20, whole.memory_bytes >> 20))
            .clamp(1, 1000)
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = vec![format!("{} free slots", self.slots)];
        if self.gpus > 0 {
            parts.push(format!("{} GPUs", self.gpus));
        }
        if self.cores > 0 {
            parts.push(format!("{} cores", self.cores));
        }
        if self.memory_bytes > 0 {
            parts.push(format!("{} MiB of memory", self.memory_bytes >> 20));
        }
        f.write_str(&parts.join(" and "))
    }
}

/// What was held, times how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Node-milliseconds of whole nodes.
    pub node_ms: u64,
    /// GPU-milliseconds.
    pub gpu_ms: u64,
    /// Core-milliseconds.
    pub core_ms: u64,
    /// Slot-milliseconds.
    pub slot_ms: u64,
}

impl Usage {
    /// `amount` (of a whole node or of a shared one) held for `ms`.
    pub fn of(amount: &Amount, whole: bool, ms: u64) -> Self {
        Self {
            node_ms: u64::from(whole) * ms,
            gpu_ms: u64::from(amount.gpus) * ms,
            core_ms: u64::from(amount.cores) * ms,
            slot_ms: u64::from(amount.slots) * ms,
        }
    }

    /// Adds.
    pub fn add(&mut self, other: &Usage) {
        self.node_ms += other.node_ms;
        self.gpu_ms += other.gpu_ms;
        self.core_ms += other.core_ms;
        self.slot_ms += other.slot_ms;
    }
}
