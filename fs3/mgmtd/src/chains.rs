//! Chains as they follow from what is known about targets.

use crate::event::Write;
use crate::state::{ManagerState, Work};
use firefly_types::{ChainId, TargetId};
use fs3_core::chain::{Chain, PublicState, Report, next_chain, start_chain};

impl ManagerState {
    pub(crate) fn advance_chains(&mut self, work: &mut Work) {
        for id in std::mem::take(&mut self.dirty) {
            let Some(entry) = self.chains.get(&id) else { continue };
            let chain = &entry.chain;
            let next = if chain.is_new() {
                let all_up = chain.members.iter().all(|m| self.is_up(m.target));
                if !all_up && self.now < self.bootstraps_until {
                    // Looked at again with the next tick.
                    work.later.insert(id);
                    continue;
                }
                let next = start_chain(chain, |t| self.report(t));
                if next.is_none() {
                    work.later.insert(id);
                }
                next
            } else if self.waits_for_reunion(id) {
                work.later.insert(id);
                continue;
            } else {
                next_chain(&self.chains[&id].chain, |t| self.report(t))
            };
            if let Some(next) = next {
                self.adopt(next, work);
            }
        }
        self.dirty.append(&mut work.later);
    }

    /// Nobody serves the chain, and of those who served last some have come back and others may be
    /// about to: together they go on without copying anything.
    fn waits_for_reunion(&mut self, id: ChainId) -> bool {
        let complete: Vec<TargetId> = self.chains[&id].chain.in_state(PublicState::LastSrv).collect();
        let back = complete.iter().filter(|t| self.is_up(**t)).count();
        if back == 0 || back == complete.len() {
            self.reunions.remove(&id);
            return false;
        }
        let since = *self.reunions.entry(id).or_insert(self.now);
        let waits = self.now.since(since) < crate::config::ms(self.timing.reunite_ms);
        if !waits {
            self.reunions.remove(&id);
        }
        waits
    }

    fn is_up(&self, target: TargetId) -> bool {
        self.report(target).local != Report::SILENT.local
    }

    /// What counts as known about a target now.
    pub(crate) fn report(&self, target: TargetId) -> Report {
        let known = || {
            let (owner, _) = self.owners.get(&target)?;
            let (node, contact) = (self.nodes.get(owner)?, self.contacts.get(owner)?);
            let counts = node.alive && node.incarnation == contact.incarnation;
            let status = contact.targets.get(&target).filter(|_| counts)?;
            Some(Report { local: status.local, synced_at: status.synced_at })
        };
        known().unwrap_or(Report::SILENT)
    }

    pub(crate) fn adopt(&mut self, next: Chain, work: &mut Work) {
        debug_assert_eq!(next.check(), Ok(()));
        let id = next.id;
        let Some(entry) = self.chains.get_mut(&id) else { return };
        for target in entry.chain.in_state(PublicState::Serving) {
            if next.state_of(target) != Some(PublicState::Serving)
                && let Some((owner, _)) = self.owners.get(&target)
            {
                work.fenced.insert(*owner);
            }
        }
        work.note(format!("{id} {} -> {}", show(&entry.chain), show(&next)));
        for member in &next.members {
            if member.state != PublicState::Offline {
                self.out_since.remove(&member.target);
            } else {
                self.out_since.entry(member.target).or_insert(self.now);
            }
        }
        entry.chain = next;
        work.writes.insert(Write::Chain(id));
        work.publishes = true;
    }
}

fn show(chain: &Chain) -> String {
    let member = |m: &fs3_core::chain::Member| format!("{} {:?}", m.target, m.state).to_lowercase();
    let members: Vec<_> = chain.members.iter().map(member).collect();
    format!("{}: {}", chain.version, members.join(", "))
}
