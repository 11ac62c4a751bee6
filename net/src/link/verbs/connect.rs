//! A link in the making: a queue pair with its receives posted, which becomes a link once a probe
//! has made its way over it and back. Dropped before that, it leaves nothing behind.

use super::{
    Half, INLINE, Kind, LinkOptions, LinkWork, RECEIVES, SEND_SLOTS, SENDS, SLOT, Shared, State, VerbsRx,
    VerbsTx, pump,
};
use crate::error::LinkError;
use crate::link::verbs::How;
use crate::link::verbs::credits::Credits;
use crate::verbs::negotiate::{End, Place};
use crate::verbs::slab::Slab;
use crate::verbs::{Port, Queue, QueueOptions, Rail};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Time for the probe. A path that carries nothing shows in the device's own retransmissions a
/// little later; a handshake (5 s) must have time left to go on with TCP.
pub(crate) const PROBE_TIME: Duration = Duration::from_secs(2);

/// A queue pair that is not a link yet.
pub(crate) struct Draft {
    shared: Arc<Shared>,
    tx: VerbsTx,
    rx: VerbsRx,
    events: AsyncFd<OwnedFd>,
    place: Place,
}

impl Draft {
    /// Makes a queue pair at `port` of `rail`; `place` describes it to the peer.
    pub(crate) fn new(
        rail: &Arc<Rail>,
        port: &Port,
        place: Place,
        link: &LinkOptions,
    ) -> Result<Draft, LinkError> {
        let options = QueueOptions {
            sends: SENDS as u32,
            receives: RECEIVES as u32,
            pieces: 1,
            inline: INLINE as u32,
            class: link.class,
            ..QueueOptions::default()
        };
        let slab = Slab::new(&rail.device, SLOT, RECEIVES + SEND_SLOTS)?;
        let queue = Queue::new(&rail.device, port, &options)?;
        if (queue.options().sends as usize) < SENDS || (queue.options().receives as usize) < RECEIVES {
            let reason = format!("it takes queues of {} requests only", rail.device.limits().queue);
            return Err(LinkError::Device { device: rail.name(), what: "making a queue pair", reason });
        }
        let inline_limit = queue.inline_limit();
        let events = queue.events()?;
        let shared = Arc::new(Shared {
            rail: rail.clone(),
            state: Mutex::new(State {
                queue: Some(queue),
                slab,
                credits: Credits::new(RECEIVES as u32, RECEIVES as u32),
                next: 0,
                posted: VecDeque::new(),
                unsignaled: 0,
                free: (RECEIVES..RECEIVES + SEND_SLOTS).collect(),
                arrived: VecDeque::new(),
                probes: Some(VecDeque::new()),
                free_windows: Vec::new(),
                bound: HashMap::new(),
                calls: HashMap::new(),
                sources: HashMap::new(),
                invalidate_theirs: false,
                over: None,
                halves: 2,
            }),
            arrival: Notify::new(),
            room: Notify::new(),
            stop: CancellationToken::new(),
            counters: link.counters.clone(),
            work: LinkWork::default(),
            heads: link.heads.clone(),
            stall: link.stall,
            inline_limit,
            windows: rail.device.has_windows(),
            gone: CancellationToken::new(),
        });
        let tx = VerbsTx { half: Half(shared.clone()), begun: 0, pushed: false, named: None };
        let rx = VerbsRx { half: Half(shared.clone()) };
        {
            let state = shared.lock();
            for index in 0..RECEIVES {
                shared.post_slot(&state, index)?;
            }
            if let Some(queue) = &state.queue {
                // Weak: the device outlives its queue pairs.
                let weak = Arc::downgrade(&shared);
                queue.on_failure(move |reason| {
                    if let Some(shared) = weak.upgrade() {
                        shared.end(shared.device_says("keeping the queue pair", reason.to_owned()));
                    }
                });
            }
        }
        // SAFETY: the descriptor is owned by the `AsyncFd` and stays open until it is dropped.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) };
        let events = events.map_err(std::io::Error::from)?;
        Ok(Draft { shared, tx, rx, events, place })
    }

    /// What to tell the peer.
    pub(crate) fn end(&self) -> Option<End> {
        let state = self.shared.lock();
        let address = state.queue.as_ref()?.address();
        let place = self.place.clone();
        Some(End {
            place,
            address,
            receives: RECEIVES as u32,
            bytes: SLOT as u32,
            windows: self.shared.windows,
        })
    }

    /// Connects to the peer's queue pair. The kernel asks for the hardware address of the peer's
    /// (or the router's) port on the way and waits for seconds if nobody answers, hence a thread of
    /// its own.
    pub(crate) async fn connect(&self, peer: &End) -> Result<(), LinkError> {
        if peer.bytes < SLOT as u32 {
            let what = format!("receives of {} bytes; this side sends up to {SLOT}", peer.bytes);
            return Err(LinkError::Protocol(what));
        }
        let (shared, peer) = (self.shared.clone(), peer.clone());
        let connecting = tokio::task::spawn_blocking(move || {
            // Out of its place meanwhile: whoever gives up waiting must not wait for the lock.
            let queue = {
                let mut state = shared.lock();
                state.credits = Credits::new(RECEIVES as u32, peer.receives);
                state.invalidate_theirs = peer.windows && shared.windows;
                state.queue.take().ok_or(LinkError::Closed)?
            };
            let connected = queue.connect(&peer.address);
            let mut state = shared.lock();
            if state.halves > 0 {
                state.queue = Some(queue);
            } else {
                // Given up: the queue pair goes, and only then the slots, which `shared` holds.
                drop(state);
                drop(queue);
            }
            connected
        });
        connecting
            .await
            .unwrap_or_else(|e| Err(LinkError::Protocol(format!("connecting was cut short: {e}"))))
    }

    /// Sends `probe` to the peer.
    fn send_probe(&self, probe: u64) -> Result<(), LinkError> {
        let mut state = self.shared.lock();
        self.shared.send_part(
            &mut state,
            Kind::Probe,
            [&probe.to_le_bytes(), &[]],
            How { signaled: true, ..How::default() },
        )
    }

    async fn next_probe(&self) -> Result<u64, LinkError> {
        loop {
            self.shared.pump()?;
            {
                let mut state = self.shared.lock();
                if let Some(probe) = state.probes.as_mut().and_then(VecDeque::pop_front) {
                    return Ok(probe);
                }
                if state.over.is_some() {
                    return Err(self.shared.ended(&state));
                }
            }
            tokio::select! {
                ready = self.events.readable() => ready?.clear_ready(),
                () = self.shared.stop.cancelled() => {}
            }
        }
    }

    /// The client's part of the probe: a message over the queue pair, and the same back.
    pub(crate) async fn probe(&self) -> Result<(), LinkError> {
        let probe = rand::Rng::next_u64(&mut rand::rng());
        self.send_probe(probe)?;
        match tokio::time::timeout(PROBE_TIME, self.next_probe()).await {
            Ok(Ok(back)) if back == probe => Ok(()),
            Ok(Ok(_)) => Err(LinkError::Protocol("another probe came back".into())),
            Ok(Err(e)) => Err(e),
            Err(_) => {
                let reason = format!("no message came back over it within {PROBE_TIME:?}");
                Err(self.shared.device_says("probing the path", reason))
            }
        }
    }

    /// The server's part: sends back what comes. Ends with an error only; the client says over TCP
    /// when it is content.
    pub(crate) async fn answer_probes(&self) -> LinkError {
        loop {
            let answered = match self.next_probe().await {
                Ok(probe) => self.send_probe(probe),
                Err(e) => Err(e),
            };
            if let Err(e) = answered {
                return e;
            }
        }
    }

    /// Both sides are content: a link. `side` is the connection beside it.
    pub(crate) fn finish(self, side: TcpStream) -> (VerbsTx, VerbsRx) {
        let Draft { shared, tx, rx, events, .. } = self;
        shared.lock().probes = None;
        tokio::spawn(pump(shared, events, side));
        (tx, rx)
    }
}
