//! Two cores joined by simulated devices: work is carried out late, completions and arrivals come
//! late, callers post and take as they like. Every seed must end with every message delivered, in
//! order and intact; planted bugs must be found.

use super::super::wire::{Place, WIRE_HEADER, WireHeader};
use super::super::{ChannelError, Completion, HEADER_BYTES};
use super::core::{Bug, Core, Key, Shape, To, Work};
use super::credit::{Credit, MIN_RECEIVES, MIN_RING};
use super::note::Note;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{HashMap, VecDeque};

/// What arrives at a side's device and is taken by its driver.
enum Arrival {
    Piece { len: usize, imm: u32 },
    Note(Vec<u8>),
}

/// How often each way was taken, so that the seeds cover them all.
#[derive(Default, Debug)]
struct Reached {
    ring_wraps: u64,
    credit_notes: u64,
    straight_from_region: u64,
    straight_from_stage: u64,
    ring_from_region: u64,
    late: u64,
    held_back: u64,
    several_receives: u64,
}

struct Message {
    bytes: Vec<u8>,
    key: Option<u32>,
}

struct Side {
    core: Core,
    ring: Vec<u8>,
    _stage: Vec<u8>,
    receives_posted: usize,
    arrivals: VecDeque<Arrival>,
    /// Posted, not carried out.
    work: VecDeque<Work>,
    /// Carried out; the completion is on its way.
    done: VecDeque<u64>,
    to_post: VecDeque<Message>,
    posted: VecDeque<Message>,
    sent: u64,
    /// Contents that the other side will send, in order.
    expected: Vec<Vec<u8>>,
    landing: VecDeque<(u64, Vec<u8>, Option<u32>)>,
    received: usize,
    /// Receives that this caller posts at once.
    window: usize,
    /// Takes nothing before all of its own is sent.
    selfish: bool,
    /// Share of receives that are posted in a region.
    regions: f64,
    /// What a remote key names: address and length.
    keys: HashMap<u32, (*mut u8, usize)>,
}

const CANARY: usize = 16;

fn header(n: u64) -> [u8; HEADER_BYTES] {
    let mut out = [0x5A; HEADER_BYTES];
    out[..8].copy_from_slice(&n.to_le_bytes());
    out
}

fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed | 1;
    (0..len)
        .map(|_| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 56) as u8
        })
        .collect()
}

struct World {
    rng: ChaCha8Rng,
    sides: [Side; 2],
    next_key: u32,
    reached: Reached,
}

impl World {
    fn new(seed: u64, bug: Option<Bug>) -> World {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // In some worlds small messages use up the receives, in the others large ones the ring.
        let small = rng.random_bool(0.3);
        // In some, one large message comes before many that have no payload.
        let headers = !small && rng.random_bool(0.15);
        let shape = |rng: &mut ChaCha8Rng| Shape {
            ring: rng.random_range(MIN_RING..3000) + if small { 6000 } else { 0 },
            receives: if small { MIN_RECEIVES } else { rng.random_range(MIN_RECEIVES..24) },
        };
        let shapes = [shape(&mut rng), shape(&mut rng)];
        let offer = rng.random_range(200..1500);
        let lists: [Vec<Vec<u8>>; 2] = std::array::from_fn(|_| {
            let busy = rng.random_range(0..60);
            (0..busy)
                .map(|n| {
                    if headers {
                        let len = if n == 0 { rng.random_range(offer..9000) } else { 0 };
                        return content(rng.random(), len);
                    }
                    let len = match rng.random_range(0..if small { 6 } else { 10 }) {
                        0..3 => 0,
                        3..6 => rng.random_range(1..80),
                        6..8 => rng.random_range(1..offer),
                        _ => rng.random_range(offer..9000),
                    };
                    content(rng.random(), len)
                })
                .collect()
        });
        let selfish = rng.random_bool(0.2);
        let mut next_key = 1;
        let sides = std::array::from_fn(|i| {
            let mut ring = vec![0u8; shapes[i].ring];
            let mut stage = vec![0; rng.random_range(512..2500)];
            let parts = ((ring.as_mut_ptr().cast_const(), shapes[i]), (stage.as_mut_ptr(), stage.len()));
            // SAFETY: both live as long as the core, in the same struct, and are not reallocated.
            let mut core = unsafe { Core::new(parts.0, parts.1, shapes[1 - i], rng.random_range(4..64)) };
            core.offer_bytes = offer;
            core.bug = bug;
            let registered: f64 = rng.random();
            let to_post = lists[i]
                .iter()
                .map(|bytes| {
                    next_key += 1;
                    Message { bytes: bytes.clone(), key: rng.random_bool(registered).then_some(next_key) }
                })
                .collect();
            Side {
                core,
                ring,
                _stage: stage,
                receives_posted: shapes[i].receives,
                arrivals: VecDeque::new(),
                work: VecDeque::new(),
                done: VecDeque::new(),
                to_post,
                posted: VecDeque::new(),
                sent: 0,
                expected: lists[1 - i].clone(),
                landing: VecDeque::new(),
                received: 0,
                window: if rng.random_bool(0.5) { 1 } else { rng.random_range(2..30) },
                selfish: selfish && i == 0,
                regions: rng.random(),
                keys: HashMap::new(),
            }
        });
        World { rng, sides, next_key, reached: Reached::default() }
    }

    /// Carries out the oldest work of side `i`.
    fn execute(&mut self, i: usize) -> Result<(), String> {
        let Some(work) = self.sides[i].work.pop_front() else { return Ok(()) };
        // SAFETY: the core keeps the memory valid until the completion; that is what is tested,
        // and a violation shows as wrong bytes, because stages and messages are never freed here.
        let bytes = unsafe { std::slice::from_raw_parts(work.from, work.len) }.to_vec();
        let peer = &mut self.sides[1 - i];
        let arrival = match work.to {
            To::Note => Some(Arrival::Note(bytes)),
            To::Ring { at, imm } => {
                if at + work.len > peer.ring.len() {
                    return Err(format!("a WRITE beyond the ring: {work:?}"));
                }
                if at + work.len == peer.ring.len() {
                    self.reached.ring_wraps += 1;
                }
                if matches!(work.key, Key::Region(_)) {
                    self.reached.ring_from_region += 1;
                }
                peer.ring[at..at + work.len].copy_from_slice(&bytes);
                Some(Arrival::Piece { len: work.len, imm })
            }
            To::Memory { address, key, imm } => {
                let Some((base, len)) = peer.keys.get(&key) else {
                    return Err(format!("a stale key: {work:?}"));
                };
                let at = address - *base as u64;
                if at + work.len as u64 > *len as u64 {
                    return Err(format!("a WRITE outside its region: {work:?}"));
                }
                match work.key {
                    Key::Stage => self.reached.straight_from_stage += 1,
                    Key::Region(_) => self.reached.straight_from_region += 1,
                }
                // SAFETY: inside the landing memory, which lives until its key is removed.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), base.add(at as usize), work.len) };
                imm.map(|imm| Arrival::Piece { len: work.len, imm })
            }
        };
        if let Some(arrival) = arrival {
            if peer.receives_posted == 0 {
                return Err(format!("no receive was posted for {work:?}"));
            }
            peer.receives_posted -= 1;
            peer.arrivals.push_back(arrival);
        }
        if work.signaled {
            self.sides[i].done.push_back(work.id);
        }
        Ok(())
    }

    fn deliver(&mut self, i: usize) -> Result<bool, String> {
        let side = &mut self.sides[i];
        let Some(arrival) = side.arrivals.pop_front() else { return Ok(false) };
        side.receives_posted += 1;
        let taken = match arrival {
            Arrival::Piece { len, imm } => side.core.piece_arrived(len, imm),
            Arrival::Note(bytes) => side.core.note_arrived(&bytes),
        };
        taken.map(|()| true).map_err(|e| e.to_string())
    }

    /// The caller of side `i` posts a send, if it has one.
    fn post(&mut self, i: usize) -> bool {
        let side = &mut self.sides[i];
        let Some(message) = side.to_post.pop_front() else { return false };
        let token = side.sent + side.posted.len() as u64;
        let memory = (message.bytes.as_ptr(), message.bytes.len());
        side.core.post_send(token, &header(token), memory, message.key).unwrap();
        side.posted.push_back(message);
        true
    }

    /// The caller of side `i` takes the next message, if it is there and wanted.
    fn take(&mut self, i: usize) -> Result<bool, String> {
        let side = &mut self.sides[i];
        let own_unsent = !(side.to_post.is_empty() && side.posted.is_empty());
        if side.landing.len() >= side.window || (side.selfish && own_unsent) {
            return Ok(false);
        }
        let Some(next) = side.core.peek() else { return Ok(false) };
        let n = (side.received + side.landing.len()) as u64;
        if next.header != header(n) || side.expected.get(n as usize).is_none_or(|e| e.len() != next.len) {
            return Err(format!("message {n} is not the next: {next:?}"));
        }
        let mut memory = vec![0xEE; next.len + CANARY];
        self.next_key += 1;
        let key = self.rng.random_bool(side.regions).then_some(self.next_key);
        if let Some(key) = key {
            side.keys.insert(key, (memory.as_mut_ptr(), next.len));
        }
        side.core.post_recv(n, (memory.as_mut_ptr(), next.len), key).map_err(|e| e.to_string())?;
        side.landing.push_back((n, memory, key));
        if side.landing.len() > 1 {
            self.reached.several_receives += 1;
        }
        Ok(true)
    }

    fn completions(&mut self, i: usize) -> Result<bool, String> {
        let side = &mut self.sides[i];
        let mut out = Vec::new();
        side.core.read_stream().map_err(|e| e.to_string())?;
        let any = side.core.take_completions(&mut out);
        for completion in out {
            match completion {
                Completion::Sent { token } => {
                    let mut message = side.posted.pop_front().ok_or("a send too many")?;
                    if token != side.sent {
                        return Err(format!("send {token} was reported instead of {}", side.sent));
                    }
                    // The caller uses its memory again; it stays allocated for the device model.
                    message.bytes.fill(0xDD);
                    std::mem::forget(message.bytes);
                    side.sent += 1;
                }
                Completion::Received { token } => {
                    let (n, memory, key) = side.landing.pop_front().ok_or("a receive too many")?;
                    let (bytes, canary) = memory.split_at(memory.len() - CANARY);
                    if token != n || bytes != side.expected[n as usize] || canary != [0xEE; CANARY] {
                        return Err(format!("message {n} (token {token}) arrived damaged"));
                    }
                    if let Some(key) = key {
                        side.keys.remove(&key);
                    }
                    side.received += 1;
                }
            }
        }
        Ok(any)
    }

    fn pump(&mut self, i: usize, most: usize) -> bool {
        let mut any = false;
        for _ in 0..most {
            let Some(work) = self.sides[i].core.next() else {
                let waits = !self.sides[i].posted.is_empty();
                self.reached.held_back += u64::from(waits && self.sides[i].work.is_empty());
                return any;
            };
            if work.to == To::Note {
                // SAFETY: as in `execute`.
                let bytes = unsafe { std::slice::from_raw_parts(work.from, work.len) };
                self.reached.credit_notes += u64::from(bytes[4] == 1);
                self.reached.late += u64::from(bytes[4] == 4);
            }
            self.sides[i].work.push_back(work);
            any = true;
        }
        any
    }

    fn finished(&self) -> bool {
        self.sides
            .iter()
            .all(|s| s.to_post.is_empty() && s.posted.is_empty() && s.received == s.expected.len())
    }

    fn run(mut self) -> Result<Reached, String> {
        let patience = [self.rng.random_range(1..40), self.rng.random_range(1..40)];
        // Worlds differ in what is slow: devices, drivers or callers.
        let weights: [u32; 7] = std::array::from_fn(|_| 1 << self.rng.random_range(0..7));
        let total: u32 = weights.iter().sum();
        for _ in 0..4_000_000 {
            if self.finished() {
                let [a, b] = &self.sides;
                let idle = [a, b].iter().all(|s| s.work.is_empty() && s.arrivals.is_empty());
                if idle
                    && (a.core.moved().sent, b.core.moved().sent)
                        != (b.core.moved().received, a.core.moved().received)
                {
                    return Err("what one side counts as sent the other did not receive".into());
                }
                return Ok(self.reached);
            }
            let i = self.rng.random_range(0..2);
            let mut pick = self.rng.random_range(0..total);
            let action = weights.iter().position(|w| {
                let here = pick < *w;
                pick = pick.saturating_sub(*w);
                here
            });
            match action.unwrap_or(6) {
                0 => drop(self.post(i)),
                1 => drop(self.take(i)?),
                2 => self.execute(i)?,
                3 => drop(self.deliver(i)?),
                4 => {
                    if let Some(id) = self.sides[i].done.pop_front() {
                        self.sides[i].core.completed(id);
                    }
                }
                5 => drop(self.completions(i)?),
                _ => drop(self.pump(i, patience[i])),
            }
            // Now and then everything moves on as far as it can; then nothing may be left waiting.
            if self.rng.random_ratio(1, 400) && !self.settle()? && !self.finished() {
                return Err("stuck".into());
            }
        }
        Err("never ends".into())
    }

    /// Whether anything could move.
    fn settle(&mut self) -> Result<bool, String> {
        let mut any = false;
        loop {
            let mut moved = false;
            for i in 0..2 {
                moved |= self.post(i) | self.take(i)? | self.pump(i, 64);
                while !self.sides[i].work.is_empty() {
                    self.execute(i)?;
                    moved = true;
                    // A device takes a receive only if one is posted; the driver keeps up here.
                    while self.deliver(1 - i)? {}
                }
                while self.deliver(i)? {
                    moved = true;
                }
                while let Some(id) = self.sides[i].done.pop_front() {
                    self.sides[i].core.completed(id);
                    moved = true;
                }
                moved |= self.completions(i)?;
            }
            if !moved {
                return Ok(any);
            }
            any = true;
        }
    }
}

const SEEDS: u64 = 1500;

fn base_seed() -> u64 {
    let seed = rand::rng().random_range(0..1 << 40);
    println!("seeds from {seed}");
    seed
}

#[test]
fn every_message_arrives_in_order_and_intact() {
    let first = base_seed();
    let mut sum = Reached::default();
    for seed in first..first + SEEDS {
        let reached = World::new(seed, None).run().unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        sum.ring_wraps += reached.ring_wraps;
        sum.credit_notes += reached.credit_notes;
        sum.straight_from_region += reached.straight_from_region;
        sum.straight_from_stage += reached.straight_from_stage;
        sum.ring_from_region += reached.ring_from_region;
        sum.late += reached.late;
        sum.held_back += reached.held_back;
        sum.several_receives += reached.several_receives;
    }
    println!("{sum:?}");
    let counts = [
        sum.ring_wraps,
        sum.credit_notes,
        sum.straight_from_region,
        sum.straight_from_stage,
        sum.ring_from_region,
        sum.late,
        sum.held_back,
        sum.several_receives,
    ];
    assert!(counts.iter().all(|n| *n > 100), "the seeds cover every way: {sum:?}");
}

#[test]
fn every_planted_bug_is_found() {
    // Bugs that a peer's honesty hides have their own tests below.
    for bug in [
        Bug::CreditTooMuch,
        Bug::WriteAcrossTheEnd,
        Bug::ReadAcrossTheEnd,
        Bug::StageTooEarly,
        Bug::SentTooEarly,
        Bug::LastReceive,
        Bug::PayloadPastOffer,
        Bug::AnyNumberAhead,
        Bug::NoCreditNotes,
        Bug::OutOfOrder,
    ] {
        let found = (0..SEEDS).find_map(|seed| {
            let outcome = std::panic::catch_unwind(|| World::new(seed, Some(bug)).run());
            match outcome {
                Ok(Ok(_)) => None,
                Ok(Err(e)) => Some((seed, e)),
                Err(_) => Some((seed, "an assertion".into())),
            }
        });
        let (seed, how) = found.unwrap_or_else(|| panic!("{bug:?} was not found in {SEEDS} seeds"));
        println!("{bug:?}: seed {seed}: {how}");
    }
}

// --- a peer that lies -------------------------------------------------------------------------------

/// A core whose peer is the test.
struct Victim {
    core: Core,
    ring: Vec<u8>,
    _stage: Vec<u8>,
}

impl Victim {
    fn new(bug: Option<Bug>) -> Victim {
        let (mut ring, mut stage) = (vec![0; 1024], vec![0; 1024]);
        let shape = Shape { ring: 1024, receives: 8 };
        let parts = ((ring.as_mut_ptr().cast_const(), shape), (stage.as_mut_ptr(), 1024));
        // SAFETY: both live in the same struct and are not reallocated.
        let mut core = unsafe { Core::new(parts.0, parts.1, shape, 16) };
        core.offer_bytes = 200;
        core.bug = bug;
        Victim { core, ring, _stage: stage }
    }

    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), String> {
        self.ring[at..at + bytes.len()].copy_from_slice(bytes);
        self.core.piece_arrived(bytes.len(), 0).map_err(|e| e.to_string())
    }
}

fn record(place: Place, len: usize) -> [u8; WIRE_HEADER] {
    let header = if place == Place::Late { [0; HEADER_BYTES] } else { header(0) };
    WireHeader { place, len, header }.encode()
}

#[test]
fn more_than_the_ring_holds_ends_the_channel() {
    let overrun = |bug| {
        let mut victim = Victim::new(bug);
        // A header whose payload nobody takes, then more than fits behind it.
        victim.write(0, &record(Place::Follows, 100))?;
        victim.core.piece_arrived(900, 0).map_err(|e| e.to_string())?;
        victim.core.piece_arrived(200, 0).map_err(|e| e.to_string())
    };
    let error = overrun(None).unwrap_err();
    assert!(error.contains("a piece of 200 bytes came into a ring of 1024 bytes with 900 unread"), "{error}");
    // The control: nothing else notices.
    assert_eq!(overrun(Some(Bug::UncheckedPiece)), Ok(()));
}

#[test]
fn a_late_payload_of_another_length_ends_the_channel() {
    let lie = |bug, len| {
        let mut victim = Victim::new(bug);
        let mut memory = vec![0; 300];
        victim.write(0, &record(Place::Offered, 300))?;
        victim.core.post_recv(1, (memory.as_mut_ptr(), 300), None).map_err(|e| e.to_string())?;
        victim.write(WIRE_HEADER, &record(Place::Late, len))
    };
    assert_eq!(lie(None, 300), Ok(()));
    let error = lie(None, 301).unwrap_err();
    assert!(error.contains("a late payload of 301 bytes that no posted memory waits for"), "{error}");
    assert_eq!(lie(Some(Bug::UncheckedLate), 301), Ok(()));
}

#[test]
fn what_nobody_asked_for_ends_the_channel() {
    let refused = |what: &str, act: &dyn Fn(&mut Victim) -> Result<(), ChannelError>| {
        let mut victim = Victim::new(None);
        let error = act(&mut victim).unwrap_err();
        assert!(matches!(&error, ChannelError::Protocol(text) if text.contains(what)), "{what}: {error}");
    };
    let credit = Credit::decode(0);
    refused("that no posted memory waits for", &|v| v.core.piece_arrived(10, 1 << 31));
    refused("gives back credit", &|v| v.core.note_arrived(&Note::Credit.encode(Credit::decode(1))));
    refused("gives back credit", &|v| v.core.note_arrived(&Note::Credit.encode(Credit::decode(1 << 16))));
    refused("answers offer 0", &|v| v.core.note_arrived(&Note::Ring { offer: 0 }.encode(credit)));
    refused("a note of 3 bytes", &|v| v.core.note_arrived(&[1, 2, 3]));
    refused("an offer of nothing", &|v| {
        v.ring[..WIRE_HEADER].copy_from_slice(&record(Place::Offered, 0));
        v.core.piece_arrived(WIRE_HEADER, 0)
    });
    refused("behind an offer that is not settled", &|v| {
        v.ring[..WIRE_HEADER].copy_from_slice(&record(Place::Offered, 300));
        v.ring[WIRE_HEADER..2 * WIRE_HEADER].copy_from_slice(&record(Place::Follows, 5));
        v.core.piece_arrived(2 * WIRE_HEADER, 0)
    });
    // An offer that was made, answered with memory of another size, or twice.
    let offered = |v: &mut Victim| {
        let memory = [0u8; 300];
        v.core.post_send(1, &header(0), (memory.as_ptr(), 300), None).unwrap();
        assert!(matches!(v.core.next().unwrap().to, To::Ring { .. }));
    };
    let clear = |len| Note::Clear { offer: 0, address: 0, key: 1, len }.encode(credit);
    refused("299 bytes for an offer of 300", &|v| {
        offered(v);
        v.core.note_arrived(&clear(299))
    });
    refused("answers offer 0; 1 of 1", &|v| {
        offered(v);
        v.core.note_arrived(&Note::Ring { offer: 0 }.encode(credit)).unwrap();
        v.core.note_arrived(&clear(300))
    });
}

/// Random arrivals, most of them wrong: no panic, no byte outside what was posted.
#[test]
fn a_random_peer_damages_nothing() {
    let first = base_seed();
    let mut ends = 0;
    for seed in first..first + 4000 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut victim = Victim::new(None);
        let mut landing: Vec<Vec<u8>> = Vec::new();
        let outgoing = vec![7u8; 500];
        for step in 0..60 {
            if rng.random_bool(0.3) {
                let len = rng.random_range(0..500);
                let key = rng.random_bool(0.5).then_some(9);
                victim.core.post_send(step, &header(step), (outgoing.as_ptr(), len), key).unwrap();
            }
            while victim.core.next().is_some() {}
            if let Some(next) = victim.core.peek()
                && next.len < 4096
            {
                let mut memory = vec![0xEE; next.len + 2 * CANARY];
                let (at, key) = (&raw mut memory[CANARY], rng.random_bool(0.5).then_some(3));
                victim.core.post_recv(step, (at, next.len), key).unwrap();
                landing.push(memory);
            }
            let credit = Credit::decode(rng.random_range(0..3) << 16 | rng.random_range(0..3));
            let arrived = match rng.random_range(0..6) {
                0 => {
                    let mut note = [0; 40];
                    rng.fill(&mut note);
                    victim.core.note_arrived(&note)
                }
                1 => victim.core.note_arrived(&Note::Ring { offer: rng.random_range(0..4) }.encode(credit)),
                2 => {
                    let len = rng.random_range(0..500);
                    let note = Note::Clear { offer: rng.random_range(0..4), address: 64, key: 2, len };
                    victim.core.note_arrived(&note.encode(credit))
                }
                3 => victim.core.piece_arrived(rng.random_range(0..600), credit.encode() | 1 << 31),
                _ => {
                    let place = [Place::Follows, Place::Offered, Place::Late][rng.random_range(0..3)];
                    let bytes = record(place, rng.random_range(0..400));
                    // Wherever the ring's position is by now: everywhere.
                    for at in 0..victim.ring.len() {
                        victim.ring[at] = bytes[at % WIRE_HEADER];
                    }
                    victim.core.piece_arrived(rng.random_range(0..400), credit.encode())
                }
            };
            victim.core.take_completions(&mut Vec::new());
            for memory in &landing {
                let end = memory.len() - CANARY;
                assert!(memory[..CANARY] == [0xEE; CANARY] && memory[end..] == [0xEE; CANARY], "seed {seed}");
            }
            if arrived.is_err() {
                ends += 1;
                break;
            }
        }
    }
    assert!(ends > 1000, "the lies are noticed: {ends}");
}
