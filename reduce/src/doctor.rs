//! How well the ranks of a group reach each other: transport, round trip, bandwidth and clocks of
//! every pair, measured with the group's own messages.

use crate::{Communicator, ReduceError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Round trips per pair; the median counts. Default 200: a few milliseconds.
    pub round_trips: u32,
    /// Bytes of one message for the bandwidth. Default 8 MiB: far above what any layer buffers.
    pub bytes: usize,
    /// Such messages in each direction; the median counts. Default 5.
    pub messages: u32,
}

impl Default for Effort {
    fn default() -> Self {
        Self { round_trips: 200, bytes: 8 << 20, messages: 5 }
    }
}

/// What was found about one pair, `a < b`.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The lower rank.
    pub a: u32,
    /// The higher rank.
    pub b: u32,
    /// "shm", "rdma" or "tcp".
    pub transport: String,
    /// Why ranks of different nodes do not use RDMA.
    pub why_not_rdma: Option<String>,
    /// Median time of 8 bytes there and 24 back.
    pub round_trip: Duration,
    /// Bytes per second from `a` to `b`, one message at a time, memory to memory.
    pub there: f64,
    /// Bytes per second from `b` to `a`.
    pub back: f64,
    /// Nanoseconds by which `b`'s clock is ahead of `a`'s, by the fastest round trip.
    pub clock_offset_ns: i64,
    /// The offset is right to within so many nanoseconds, if the way takes as long there as back:
    /// half of the fastest round trip.
    pub clock_error_ns: u64,
}

impl Pair {
    /// The worse direction, bytes per second.
    pub fn bandwidth(&self) -> f64 {
        self.there.min(self.back)
    }
}

/// What was found about a group.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Ranks of the group.
    pub size: u32,
    /// All pairs, by their ranks.
    pub pairs: Vec<Pair>,
}

/// A pair is slow if it has less than this share of the median bandwidth of its transport.
const SLOW: f64 = 0.5;
/// Below so many pairs of one transport a median says nothing.
const ENOUGH: usize = 3;

impl Report {
    /// Pairs that are much slower than most of their transport, the slowest first.
    pub fn slow(&self) -> Vec<&Pair> {
        let mut slow: Vec<&Pair> = self
            .pairs
            .iter()
            .filter(|pair| {
                let like = self.pairs.iter().filter(|p| p.transport == pair.transport);
                let mut all: Vec<f64> = like.map(Pair::bandwidth).collect();
                all.sort_by(f64::total_cmp);
                all.len() >= ENOUGH && pair.bandwidth() < SLOW * all[all.len() / 2]
            })
            .collect();
        slow.sort_by(|x, y| x.bandwidth().total_cmp(&y.bandwidth()));
        slow
    }

    /// The rank that most of the slow pairs have in common, if it is in all of them and they are
    /// more than one: then it is that rank's host, not a link.
    pub fn slow_rank(&self) -> Option<u32> {
        let slow = self.slow();
        let [first, _, ..] = slow[..] else { return None };
        [first.a, first.b].into_iter().find(|r| slow.iter().all(|p| p.a == *r || p.b == *r))
    }
}

/// Who meets whom in round `round` of `size` ranks: every rank has at most one partner per round, and
/// after `rounds(size)` of them each pair has met once (circle method).
fn partner(rank: u32, size: u32, round: u32) -> Option<u32> {
    // One rank stays, the others move round; with an odd number one pauses.
    let seats = size + size % 2;
    let turning = seats - 1;
    let partner = if rank == turning {
        // The seat that is its own mirror image: 2 x = round (mod turning), which is odd.
        let half = turning.div_ceil(2);
        round * half % turning
    } else {
        let mirror = (round + turning - rank) % turning;
        if mirror == rank { turning } else { mirror }
    };
    (partner < size).then_some(partner)
}

fn rounds(size: u32) -> u32 {
    size + size % 2 - 1
}

fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

const PING: u32 = 0x646f_6300;
const BULK: u32 = PING + 1;

/// The side that measures: `a`.
fn measure(group: &Communicator, peer: u32, effort: &Effort) -> Result<[f64; 5], ReduceError> {
    let mut trips = Vec::with_capacity(effort.round_trips as usize);
    let mut best: Option<(u64, i64)> = None;
    for _ in 0..effort.round_trips {
        // In this order: a pause between the two then counts as part of the trip, and the claimed
        // error stays true.
        let start = Instant::now();
        let sent = now_ns();
        group.send(&[sent], peer, PING)?;
        let mut theirs = [0i64; 3];
        group.recv(&mut theirs, peer, PING)?;
        let trip = start.elapsed().as_nanos() as u64;
        trips.push(trip as f64);
        // The peer's clock when it had the ping, against the middle of the trip here.
        let offset = theirs[1].saturating_sub(sent.saturating_add((trip / 2) as i64));
        if best.is_none_or(|(fastest, _)| trip < fastest) {
            best = Some((trip, offset));
        }
    }
    let trip = median(&mut trips);
    let mut data = vec![0u8; effort.bytes];
    let (mut there, mut back) = (Vec::new(), Vec::new());
    for _ in 0..effort.messages {
        let start = Instant::now();
        group.send(&data, peer, BULK)?;
        group.recv(&mut [0u8], peer, BULK)?;
        there.push(start.elapsed().as_nanos() as f64);
        let start = Instant::now();
        group.send(&[0u8], peer, BULK)?;
        group.recv(&mut data, peer, BULK)?;
        back.push(start.elapsed().as_nanos() as f64);
    }
    // A way there and a way back of a small message are in each.
    let rate = |times: &mut Vec<f64>| effort.bytes as f64 / (median(times) - trip).max(1.0) * 1e9;
    let (fastest, offset) = best.unwrap_or_default();
    Ok([trip, rate(&mut there), rate(&mut back), offset as f64, (fastest / 2) as f64])
}

/// The other side: `b`.
fn answer(group: &Communicator, peer: u32, effort: &Effort) -> Result<(), ReduceError> {
    for _ in 0..effort.round_trips {
        let mut sent = [0i64];
        group.recv(&mut sent, peer, PING)?;
        group.send(&[sent[0], now_ns(), 0], peer, PING)?;
    }
    let mut data = vec![0u8; effort.bytes];
    for _ in 0..effort.messages {
        group.recv(&mut data, peer, BULK)?;
        group.send(&[0u8], peer, BULK)?;
        group.recv(&mut [0u8], peer, BULK)?;
        group.send(&data, peer, BULK)?;
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Longest reason that is passed on.
const WHY: usize = 256;
/// Numbers, transport, reason.
const RECORD: usize = 5 * 8 + 8 + 2 + WHY;

fn encode(numbers: [f64; 5], transport: &str, why: &str) -> [u8; RECORD] {
    let mut out = [0; RECORD];
    for (slot, n) in out.chunks_exact_mut(8).zip(numbers) {
        slot.copy_from_slice(&n.to_le_bytes());
    }
    let transport = &transport.as_bytes()[..transport.len().min(8)];
    out[40..40 + transport.len()].copy_from_slice(transport);
    let mut end = why.len().min(WHY);
    while !why.is_char_boundary(end) {
        end -= 1;
    }
    out[48..50].copy_from_slice(&(end as u16).to_le_bytes());
    out[50..50 + end].copy_from_slice(&why.as_bytes()[..end]);
    out
}

fn decode(a: u32, b: u32, record: &[u8]) -> Pair {
    let number = |i: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&record[8 * i..][..8]);
        f64::from_le_bytes(bytes)
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    let len = usize::from(u16::from_le_bytes([record[48], record[49]])).min(WHY);
    let why = text(&record[50..50 + len]);
    Pair {
        a,
        b,
        transport: text(&record[40..48]),
        why_not_rdma: (!why.is_empty()).then_some(why),
        round_trip: Duration::from_nanos(number(0) as u64),
        there: number(1),
        back: number(2),
        clock_offset_ns: number(3) as i64,
        clock_error_ns: number(4) as u64,
    }
}

/// Measures every pair of the group. All ranks call it with the same effort, and all get the report.
/// Ranks meet in rounds, each with one partner at a time, so pairs of one round share what they share
/// in a collective.
///
/// # Errors
/// As of any operation of the group.
pub fn examine(group: &Communicator, effort: &Effort) -> Result<Report, ReduceError> {
    let (me, size) = (group.rank(), group.size());
    let mut mine = vec![0u8; RECORD * size as usize];
    for round in 0..rounds(size) {
        group.barrier()?;
        let Some(peer) = partner(me, size, round) else { continue };
        if me < peer {
            let numbers = measure(group, peer, effort)?;
            let reach = group.reach(peer);
            let (transport, why) = reach.map_or(("", None), |r| (r.transport, r.why_not_rdma));
            let record = encode(numbers, transport, &why.unwrap_or_default());
            mine[RECORD * peer as usize..][..RECORD].copy_from_slice(&record);
        } else {
            answer(group, peer, effort)?;
        }
    }
    let mut all = vec![0u8; mine.len() * size as usize];
    group.allgather(&mine, &mut all)?;
    let mut pairs = Vec::new();
    for a in 0..size {
        for b in a + 1..size {
            let at = mine.len() * a as usize + RECORD * b as usize;
            pairs.push(decode(a, b, &all[at..at + RECORD]));
        }
    }
    Ok(Report { size, pairs })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_meets_once_and_nobody_has_two_partners() {
        for size in 1..=17u32 {
            let mut met = std::collections::HashSet::new();
            for round in 0..rounds(size) {
                for rank in 0..size {
                    let Some(other) = partner(rank, size, round) else { continue };
                    assert!(
                        other != rank && partner(other, size, round) == Some(rank),
                        "{size} {round} {rank}"
                    );
                    if rank < other {
                        assert!(met.insert((rank, other)), "{size}: {rank} and {other} meet twice");
                    }
                }
            }
            assert_eq!(met.len() as u32, size * (size - 1) / 2, "{size}");
        }
    }

    fn pair(a: u32, b: u32, transport: &str, bandwidth: f64) -> Pair {
        let numbers = [2e3, bandwidth, 2.0 * bandwidth, -5.0, 1e3];
        decode(a, b, &encode(numbers, transport, "rxe0: port 1 is down"))
    }

    #[test]
    fn records_round_trip() {
        let pair = pair(1, 2, "tcp", 1e9);
        assert_eq!((pair.transport.as_str(), pair.round_trip), ("tcp", Duration::from_micros(2)));
        assert_eq!(pair.why_not_rdma.as_deref(), Some("rxe0: port 1 is down"));
        assert_eq!((pair.there, pair.back, pair.clock_offset_ns, pair.clock_error_ns), (1e9, 2e9, -5, 1000));
        let long = decode(0, 1, &encode([0.0; 5], "rdma", &"ä".repeat(400)));
        assert_eq!(long.why_not_rdma.unwrap(), "ä".repeat(WHY / 2));
    }

    #[test]
    fn the_slow_link_is_named_and_told_from_a_slow_host() {
        let report = |slow: &[(u32, u32)]| {
            let mut pairs = Vec::new();
            for a in 0..4 {
                for b in a + 1..4 {
                    let speed = if slow.contains(&(a, b)) { 4e8 } else { 1e9 };
                    pairs.push(pair(a, b, "tcp", speed));
                }
            }
            // Shared memory is another league and no measure for TCP.
            pairs.push(pair(4, 5, "shm", 1e10));
            Report { size: 6, pairs }
        };
        let names = |report: &Report| report.slow().iter().map(|p| (p.a, p.b)).collect::<Vec<_>>();
        assert_eq!(names(&report(&[])), []);
        let one = report(&[(1, 3)]);
        assert_eq!((names(&one), one.slow_rank()), (vec![(1, 3)], None));
        let host = report(&[(0, 2), (1, 2)]);
        assert_eq!(host.slow_rank(), Some(2));
    }
}
