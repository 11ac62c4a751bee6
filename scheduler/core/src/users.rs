//! Who owns jobs: users and their teams, what they hold, what they held lately.

use crate::fair::Decayed;
use crate::policy::Policy;
use firefly_types::Nanos;
use std::collections::BTreeMap;

/// One user.
#[derive(Clone, Debug)]
struct User {
    name: String,
    team: usize,
    shares: u32,
    usage: Decayed,
}

/// One team; a user without a team is one alone.
#[derive(Clone, Debug)]
struct Team {
    shares: u32,
    usage: Decayed,
}

/// Decayed usage per share: of the team, then of the user in it. Less goes first.
pub(crate) type Turn = (u128, u128);

/// All users that ever had a job here since the start.
#[derive(Clone, Debug)]
pub(crate) struct Users {
    ids: BTreeMap<String, u32>,
    users: Vec<User>,
    teams: Vec<Team>,
    team_ids: BTreeMap<String, usize>,
    half_life_ms: u64,
}

impl Users {
    pub(crate) fn new(policy: &Policy) -> Self {
        Self {
            ids: BTreeMap::new(),
            users: Vec::new(),
            teams: Vec::new(),
            team_ids: BTreeMap::new(),
            half_life_ms: policy.half_life_ms,
        }
    }

    /// The user's number.
    pub(crate) fn id(&mut self, name: &str, policy: &Policy, now: Nanos) -> u32 {
        if let Some(&id) = self.ids.get(name) {
            return id;
        }
        let id = u32::try_from(self.users.len()).unwrap_or(u32::MAX);
        self.ids.insert(name.to_owned(), id);
        let (team, shares) = self.team_of(name, policy, now);
        let usage = Decayed::new(now, self.half_life_ms);
        self.users.push(User { name: name.to_owned(), team, shares, usage });
        id
    }

    pub(crate) fn known(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }

    fn team_of(&mut self, name: &str, policy: &Policy, now: Nanos) -> (usize, u32) {
        let named = policy.teams.iter().find_map(|(team, t)| {
            t.users.get(name).map(|shares| (format!("team {team}"), t.shares, *shares))
        });
        // The prefixes keep a user apart from a team of the same name.
        let (key, team_shares, shares) = named.unwrap_or_else(|| (format!("user {name}"), 1, 1));
        let fresh = Team { shares: team_shares, usage: Decayed::new(now, self.half_life_ms) };
        let next = self.teams.len();
        let team = *self.team_ids.entry(key).or_insert(next);
        if team == next {
            self.teams.push(fresh);
        }
        (team, shares)
    }

    /// Takes over new teams, shares and half-life; what was used stays used.
    pub(crate) fn reconfigure(&mut self, policy: &Policy, now: Nanos) {
        let old = self.half_life_ms;
        for user in &mut self.users {
            user.usage.advance(now, old);
            user.usage = user.usage.realigned(now, policy.half_life_ms);
        }
        self.half_life_ms = policy.half_life_ms;
        self.teams.clear();
        self.team_ids.clear();
        for i in 0..self.users.len() {
            let name = self.users[i].name.clone();
            let (team, shares) = self.team_of(&name, policy, now);
            (self.users[i].team, self.users[i].shares) = (team, shares);
            let usage = self.users[i].usage;
            self.teams[team].usage.merge(&usage);
        }
    }

    /// The user holds so many more thousandths of nodes.
    pub(crate) fn take(&mut self, id: u32, milli: u64, now: Nanos) {
        self.change(id, now, |usage| usage.rate += milli);
    }

    /// The user holds so many less.
    pub(crate) fn give_back(&mut self, id: u32, milli: u64, now: Nanos) {
        self.change(id, now, |usage| usage.rate = usage.rate.saturating_sub(milli));
    }

    /// Charges for something in the past, after a restart.
    pub(crate) fn charge_past(&mut self, id: u32, milli_ms: u64, age_ms: u64, now: Nanos) {
        let half_life = self.half_life_ms;
        self.change(id, now, |usage| usage.charge_past(milli_ms, age_ms, half_life));
    }

    fn change(&mut self, id: u32, now: Nanos, change: impl Fn(&mut Decayed)) {
        let half_life = self.half_life_ms;
        let Some(user) = self.users.get_mut(id as usize) else { return };
        let Some(team) = self.teams.get_mut(user.team) else { return };
        for usage in [&mut user.usage, &mut team.usage] {
            usage.advance(now, half_life);
            change(usage);
        }
    }

    /// Whose turn is it? The least first. Does not bring anything forward for good: looking
    /// changes nothing.
    pub(crate) fn turn(&self, id: u32, now: Nanos) -> Turn {
        let at = |mut usage: Decayed, shares| {
            usage.advance(now, self.half_life_ms);
            usage.turn(shares, self.half_life_ms)
        };
        let Some(user) = self.users.get(id as usize) else { return (0, 0) };
        let Some(team) = self.teams.get(user.team) else { return (0, 0) };
        (at(team.usage, team.shares), at(user.usage, user.shares))
    }

    /// Thousandths of nodes held now, by user.
    pub(crate) fn rates(&self) -> BTreeMap<&str, u64> {
        let held = self.users.iter().filter(|u| u.usage.rate > 0);
        held.map(|u| (u.name.as_str(), u.usage.rate)).collect()
    }

    /// Decayed node-hours, by user.
    pub(crate) fn node_hours(&self, name: &str, now: Nanos) -> f64 {
        let Some(user) = self.known(name).and_then(|id| self.users.get(id as usize)) else { return 0.0 };
        let mut usage = user.usage;
        usage.advance(now, self.half_life_ms);
        usage.node_hours()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Team as TeamPolicy;

    const MINUTE: u64 = 60_000_000_000;

    #[test]
    fn teams_come_before_users_and_shares_count() {
        let team = |shares, users: &[(&str, u32)]| TeamPolicy {
            shares,
            users: users.iter().map(|(u, s)| ((*u).to_owned(), *s)).collect(),
        };
        let teams =
            [("t".to_owned(), team(1, &[("a", 1), ("b", 2)])), ("u".to_owned(), team(2, &[("c", 1)]))];
        let policy = Policy { teams: teams.into(), ..Policy::default() };
        let mut users = Users::new(&policy);
        let id = ["a", "b", "c", "d"].map(|n| users.id(n, &policy, Nanos(0)));
        for user in [id[0], id[2]] {
            users.take(user, 1_000, Nanos(0));
        }
        let now = Nanos(MINUTE);
        let turn = id.map(|u| users.turn(u, now));
        assert!(turn[3] < turn[2], "d, alone and idle, goes first");
        assert!(turn[2] < turn[1], "team u has twice the shares of team t");
        assert!(turn[1] < turn[0], "within team t, b has used nothing");
        // A team of the same members afterwards: usage moves with its users.
        let teams = [("v".to_owned(), team(1, &[("a", 1), ("c", 1)]))];
        let policy = Policy { teams: teams.into(), ..Policy::default() };
        users.reconfigure(&policy, now);
        let after = id.map(|u| users.turn(u, now));
        assert_eq!(after[0].0, after[2].0);
        assert_eq!(after[0].0, turn[0].0 + 2 * turn[2].0);
        assert_eq!(after[1], (0, 0));
    }
}
