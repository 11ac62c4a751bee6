//! Quotas: how much a user may hold of a group at a priority, and who holds what.

use crate::job::Job;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// One limit. Of several that match, the one that names most (user before group before priority)
/// counts; of equals the last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quota {
    /// Whose; `*`: each user's.
    pub user: String,
    /// Of which pool; `*`: of each.
    pub group: String,
    /// At which priority; none: at each.
    pub priority: Option<i32>,
    /// Most whole nodes at a time.
    pub nodes: Option<u32>,
    /// Most accelerators at a time, those of whole nodes included.
    pub gpus: Option<u32>,
    /// Most cores at a time, those of whole nodes included.
    pub cores: Option<u32>,
}

impl Default for Quota {
    fn default() -> Self {
        Self { user: "*".into(), group: "*".into(), priority: None, nodes: None, gpus: None, cores: None }
    }
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [("nodes", self.nodes), ("GPUs", self.gpus), ("cores", self.cores)];
        let named: Vec<String> =
            parts.into_iter().filter_map(|(what, n)| n.map(|n| format!("{n} {what}"))).collect();
        f.write_str(&if named.is_empty() { "unlimited".into() } else { named.join(", ") })
    }
}

/// What is held against a quota.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) nodes: u32,
    pub(crate) gpus: u32,
    pub(crate) cores: u32,
}

impl Held {
    pub(crate) fn plus(self, other: Held) -> Held {
        Held {
            nodes: self.nodes.saturating_add(other.nodes),
            gpus: self.gpus.saturating_add(other.gpus),
            cores: self.cores.saturating_add(other.cores),
        }
    }

    pub(crate) fn minus(self, other: Held) -> Held {
        Held {
            nodes: self.nodes.saturating_sub(other.nodes),
            gpus: self.gpus.saturating_sub(other.gpus),
            cores: self.cores.saturating_sub(other.cores),
        }
    }
}

impl Quota {
    /// How specific it is for this owner, or `None` if it does not match.
    fn weight(&self, owner: &Owner) -> Option<u8> {
        let part = |rule: &str, name: &str, weight| match rule {
            "*" => Some(0),
            _ => (rule == name).then_some(weight),
        };
        let priority = match self.priority {
            None => Some(0),
            Some(p) => (p == owner.priority).then_some(1),
        };
        Some(part(&self.user, &owner.user, 4)? + part(&self.group, &owner.group, 2)? + priority?)
    }

    /// Whether `held` stays within it.
    pub(crate) fn allows(&self, held: Held) -> bool {
        let within = |limit: Option<u32>, n: u32| limit.is_none_or(|l| n <= l);
        within(self.nodes, held.nodes) && within(self.gpus, held.gpus) && within(self.cores, held.cores)
    }
}

/// Whose account a job is on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner {
    pub(crate) user: String,
    pub(crate) group: String,
    pub(crate) priority: i32,
}

impl Owner {
    pub(crate) fn of(job: &Job) -> Self {
        Self { user: job.spec.user.clone(), group: job.spec.group.clone(), priority: job.priority }
    }
}

/// The limit that counts for this owner.
pub(crate) fn limit<'a>(quotas: &'a [Quota], owner: &Owner) -> Option<&'a Quota> {
    let matching = quotas.iter().filter_map(|q| q.weight(owner).map(|w| (w, q)));
    // `max_by_key` gives the last of equals.
    matching.max_by_key(|(w, _)| *w).map(|(_, q)| q)
}

/// What every owner holds; who holds nothing is not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ledger(BTreeMap<Owner, Held>);

impl Ledger {
    pub(crate) fn held(&self, owner: &Owner) -> Held {
        self.0.get(owner).copied().unwrap_or_default()
    }

    pub(crate) fn charge(&mut self, owner: Owner, more: Held) {
        if more != Held::default() {
            let sum = self.0.entry(owner).or_default();
            *sum = sum.plus(more);
        }
    }

    pub(crate) fn release(&mut self, owner: &Owner, less: Held) {
        if let Some(sum) = self.0.get_mut(owner) {
            *sum = sum.minus(less);
            if *sum == Held::default() {
                self.0.remove(owner);
            }
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Owner, &Held)> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_limit_counts() {
        let quotas = [
            Quota { nodes: Some(1), ..Quota::default() },
            Quota { user: "a".into(), nodes: Some(2), ..Quota::default() },
            Quota { group: "g".into(), nodes: Some(3), ..Quota::default() },
            Quota { group: "g".into(), priority: Some(5), nodes: Some(4), ..Quota::default() },
            Quota { user: "a".into(), group: "g".into(), nodes: Some(5), ..Quota::default() },
            Quota { user: "a".into(), group: "g".into(), nodes: Some(6), ..Quota::default() },
        ];
        let nodes = |user: &str, group: &str, priority| {
            let owner = Owner { user: user.into(), group: group.into(), priority };
            limit(&quotas, &owner).and_then(|q| q.nodes)
        };
        assert_eq!(nodes("b", "h", 0), Some(1));
        assert_eq!(nodes("a", "h", 0), Some(2));
        assert_eq!(nodes("b", "g", 0), Some(3));
        assert_eq!(nodes("b", "g", 5), Some(4));
        assert_eq!(nodes("a", "g", 5), Some(6), "a user's own limit is stronger; of equals the last");
        assert_eq!(
            limit(&quotas[1..2], &Owner { user: "z".into(), group: String::new(), priority: 0 }),
            None
        );
    }

    #[test]
    fn each_dimension_is_a_limit_of_its_own() {
        let quota = Quota { nodes: Some(2), gpus: Some(16), ..Quota::default() };
        assert!(quota.allows(Held { nodes: 2, gpus: 16, cores: 9_999 }));
        assert!(!quota.allows(Held { nodes: 3, gpus: 0, cores: 0 }));
        assert!(!quota.allows(Held { nodes: 0, gpus: 17, cores: 0 }));
    }
}
