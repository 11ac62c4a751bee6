//! Faults and clients: what happens to the world from outside.

use super::{Body, CHUNKS, CLIENTS_END, FAULTS_END, Happens, Said, World};
use crate::chain::View;
use crate::chain::client::{Current, Operation};
use crate::chain::node::Caller;
use firefly_types::WireError;
use fs3_core::target::Answer;
use rand::RngExt;
use std::time::Duration;

impl World {
    pub(super) fn crash(&mut self, node: usize) {
        let delay = match self.rng.random_bool(0.5) {
            true => self.micros(500, 30_000),
            false => self.micros(30_000, 800_000),
        };
        self.crash_for(node, delay);
    }

    fn crash_for(&mut self, node: usize, delay: Duration) {
        let rng = &mut self.rng;
        self.nodes[node].crash(|n| rng.random_range(0..n));
        self.reach("crashes");
        self.at(delay, Happens::Restart { node });
    }

    pub(super) fn fault(&mut self) {
        if self.now >= FAULTS_END {
            for node in 0..self.nodes.len() {
                (self.cut[node], self.cut_manager[node]) = (false, false);
            }
            return;
        }
        let delay = self.micros(20_000, 350_000);
        self.at(delay, Happens::Fault);
        let node = self.rng.random_range(0..self.nodes.len());
        match self.rng.random_range(0..10) {
            0..5 => {
                if self.nodes[node].up {
                    self.crash(node);
                }
            }
            5 => {
                self.reach("total outages");
                // Half of them are power cuts: everybody is back at about the same time, long after
                // the last lease.
                let power_cut = self.rng.random_bool(0.5).then(|| self.micros(250_000, 600_000));
                for node in 0..self.nodes.len() {
                    let jitter = self.micros(0, 80_000);
                    match power_cut {
                        _ if !self.nodes[node].up => {}
                        Some(dark) => self.crash_for(node, dark + jitter),
                        None => self.crash(node),
                    }
                }
            }
            6 | 7 => {
                self.cut[node] = true;
                let delay = self.micros(10_000, 500_000);
                self.at(delay, Happens::Heal { node, manager: false });
            }
            _ => {
                self.reach("nodes cut off from the manager");
                self.cut_manager[node] = true;
                let delay = self.micros(50_000, 600_000);
                self.at(delay, Happens::Heal { node, manager: true });
            }
        }
    }

    /// Operators and background workers change the chain while it works.
    pub(super) fn operate(&mut self) {
        if self.now >= FAULTS_END {
            return;
        }
        let delay = self.micros(10_000, 200_000);
        self.at(delay, Happens::Operator);
        let moves = self.rng.random_bool(0.4);
        let rng = &mut self.rng;
        match moves {
            true => self.manager.begin_move(|n| rng.random_range(0..n)),
            false => self.manager.rotate(|n| rng.random_range(0..n)),
        }
        self.manager.settle(self.now);
    }

    // ---- clients ----

    pub(super) fn act(&mut self, client: usize) {
        if self.now >= CLIENTS_END || self.clients[client].current.is_some() {
            return;
        }
        let chunk = self.clients[client].begin(&mut self.rng, CHUNKS);
        let shown = self.truth.shown(chunk);
        if let Some(current) = &mut self.clients[client].current {
            current.shown = shown;
        }
        self.attempt(client);
    }

    /// A client that is killed, or whose caller lost patience: what it asked for may happen yet.
    pub(super) fn give_up(&mut self, client: usize) {
        self.reach("operations given up");
        self.clients[client].current = None;
        let delay = self.micros(100, 30_000);
        self.at(delay, Happens::Act { client });
    }

    pub(super) fn try_again(&mut self, client: usize) {
        // It keeps an old view sometimes: servers must refuse what is out of date.
        if self.rng.random_bool(0.8) {
            self.clients[client].view =
                View { version: self.manager.version(), serving: self.manager.serving() };
        }
        self.attempt(client);
    }

    pub(super) fn attempt(&mut self, client: usize) {
        let random: u64 = self.rng.random();
        let me = &mut self.clients[client];
        me.attempts += 1;
        let attempt = me.attempts;
        let Some(current) = &mut me.current else { return };
        current.attempt = attempt;
        let Current { chunk, operation, ask_tail, .. } = current.clone();
        if matches!(operation, Operation::Read) {
            // A read is each attempt by itself.
            current.shown = self.truth.shown(chunk);
        }
        let serving = &me.view.serving;
        let to = match operation {
            Operation::Update(_) => serving.first().copied(),
            Operation::Read if ask_tail => serving.last().copied(),
            Operation::Read => serving.get(random as usize % serving.len().max(1)).copied(),
        };
        let timeout = Duration::from_millis(20 + random % 300);
        let body = match operation {
            Operation::Update(effect) => Body::Update(me.view.version, me.update(chunk, effect)),
            Operation::Read => Body::Read(me.context(), me.view.version, chunk),
        };
        self.at(timeout, Happens::AttemptTimeout { client, attempt });
        if let Some(to) = to {
            for delay in self.transit(self.cut[to]) {
                let from = Caller::Client { client, attempt };
                let at = self.nodes[to].incarnation;
                self.at(delay, Happens::Request { to, at, from, body: body.clone() });
            }
        }
    }

    pub(super) fn client_answered(&mut self, client: usize, attempt: u64, result: Result<Said, WireError>) {
        let Some(current) = self.clients[client].current.clone() else { return };
        let is_update = matches!(current.operation, Operation::Update(_));
        // An update's answer counts whichever attempt it belongs to; `attempt` names the operation
        // only for reads.
        if attempt != current.attempt {
            return;
        }
        match (result, &current.operation) {
            (Ok(Said::Answer(Answer::Updated(meta))), Operation::Update(effect)) => {
                self.truth.updated(current.chunk, current.shown, meta.version, *effect);
            }
            (Ok(Said::Content { dirty: true, .. }), Operation::Read) if !current.ask_tail => {
                if let Some(current) = &mut self.clients[client].current {
                    current.ask_tail = true;
                }
                return self.attempt(client);
            }
            (Ok(Said::Content { dirty: false, version, tags }), Operation::Read) => {
                self.truth.read(current.chunk, current.shown, version, tags);
            }
            (Ok(_), _) => return,
            (Err(error), _) => {
                if !error.kind.is_retryable() {
                    let detail = format!("{:?}: {error}", current.operation);
                    self.truth.fail("valid operations are not refused for good", detail);
                }
                if is_update && error.message.contains("late duplicate") {
                    let detail = format!("{:?}: {error}", current.operation);
                    self.truth.fail("an operation under way is not called old", detail);
                }
                let delay = self.micros(500, 20_000);
                return self.at(delay, Happens::AttemptTimeout { client, attempt });
            }
        }
        let me = &mut self.clients[client];
        me.current = None;
        me.finished += 1;
        let delay = self.micros(100, 10_000);
        self.at(delay, Happens::Act { client });
    }
}
