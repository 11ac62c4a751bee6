//! The status page of a rank: what it does and whom it waits for, readable by others while it runs.
//!
//! A rank keeps one page per group in a sealed memory file named [`PAGE_NAME`], which whoever may
//! read its `/proc/PID/fd` finds there: it needs no folder, and vanishes with the process. Layout
//! (little-endian, [`PAGE_BYTES`] bytes):
//!
//! ```text
//!   0 magic u64         8 turn u64: odd while the page is written
//!  16 pid, rank, size, state u32
//!  32 issued, completed, bytes sent, bytes received u64
//!  64 updated, stuck since u64: nanoseconds of CLOCK_BOOTTIME; 0: not stuck
//!  80 number of ranks waited for u32, 84 the first 32 of them u32
//! 212 group, 340 operation, 468 failure: length u16, then text; ends at 340, 468, 1024
//! ```

/// Name of the memory file.
pub const PAGE_NAME: &str = "firefly-status";
/// Bytes of a page.
pub const PAGE_BYTES: usize = 1024;

const MAGIC: u64 = 0x3174_6174_5352_4646; // "FFRStat1"
const TURN: usize = 8;
const MOST_RANKS: usize = 32;
const TEXTS: [(usize, usize); 3] = [(212, 340), (340, 468), (468, PAGE_BYTES)];

/// How a group stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RankState {
    /// Works, or waits for work.
    #[default]
    Working,
    /// Broken; see [`RankStatus::failure`].
    Failed,
}

/// What a status page says.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct RankStatus {
    /// Process that writes the page.
    pub pid: u32,
    /// Its rank.
    pub rank: u32,
    /// Ranks in the group.
    pub size: u32,
    /// How the group stands.
    pub state: RankState,
    /// Sequence number of the last collective issued.
    pub issued: u64,
    /// Sequence number of the last collective that is complete here.
    pub completed: u64,
    /// Payload and headers sent to other ranks.
    pub bytes_sent: u64,
    /// Payload and headers received from other ranks.
    pub bytes_received: u64,
    /// When the page was written: nanoseconds of CLOCK_BOOTTIME.
    pub updated: u64,
    /// Since when the operation has not moved, or 0.
    pub stuck_since: u64,
    /// Ranks that the operation waits for: at most 32 are named.
    pub waiting_for: Vec<u32>,
    /// How many those are in all.
    pub waiting_count: u32,
    /// Name of the group.
    pub group: String,
    /// The operation under way, or "".
    pub operation: String,
    /// Why the group is broken, or "".
    pub failure: String,
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

impl RankStatus {
    /// The page's bytes, with `turn` as they are to be left (even).
    pub fn encode(&self, turn: u64) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        put(&mut page, 0, &MAGIC.to_le_bytes());
        put(&mut page, TURN, &turn.to_le_bytes());
        let state = u32::from(self.state == RankState::Failed);
        for (i, value) in [self.pid, self.rank, self.size, state].into_iter().enumerate() {
            put(&mut page, 16 + 4 * i, &value.to_le_bytes());
        }
        let numbers = [
            self.issued,
            self.completed,
            self.bytes_sent,
            self.bytes_received,
            self.updated,
            self.stuck_since,
        ];
        for (i, value) in numbers.into_iter().enumerate() {
            put(&mut page, 32 + 8 * i, &value.to_le_bytes());
        }
        put(&mut page, 80, &self.waiting_count.to_le_bytes());
        for (i, rank) in self.waiting_for.iter().take(MOST_RANKS).enumerate() {
            put(&mut page, 84 + 4 * i, &rank.to_le_bytes());
        }
        for (text, (from, to)) in [&self.group, &self.operation, &self.failure].into_iter().zip(TEXTS) {
            let mut len = text.len().min(to - from - 2);
            while !text.is_char_boundary(len) {
                len -= 1;
            }
            put(&mut page, from, &(len as u16).to_le_bytes());
            put(&mut page, from + 2, &text.as_bytes()[..len]);
        }
        page
    }

    /// What a page says; `None` if it is none, or is being written: read it again then. A reader that
    /// may race with the writer reads [`turn`] again afterwards, and discards if it has changed.
    pub fn decode(page: &[u8]) -> Option<Self> {
        let page: &[u8; PAGE_BYTES] = page.get(..PAGE_BYTES)?.try_into().ok()?;
        let u32_at = |i: usize| u32::from_le_bytes([page[i], page[i + 1], page[i + 2], page[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) | u64::from(u32_at(i + 4)) << 32;
        if u64_at(0) != MAGIC || u64_at(TURN) % 2 == 1 {
            return None;
        }
        let text = |(from, to): (usize, usize)| {
            let len = usize::from(u16::from_le_bytes([page[from], page[from + 1]])).min(to - from - 2);
            String::from_utf8_lossy(&page[from + 2..from + 2 + len]).into_owned()
        };
        let waiting_count = u32_at(80);
        Some(Self {
            pid: u32_at(16),
            rank: u32_at(20),
            size: u32_at(24),
            state: if u32_at(28) == 0 { RankState::Working } else { RankState::Failed },
            issued: u64_at(32),
            completed: u64_at(40),
            bytes_sent: u64_at(48),
            bytes_received: u64_at(56),
            updated: u64_at(64),
            stuck_since: u64_at(72),
            waiting_for: (0..(waiting_count as usize).min(MOST_RANKS)).map(|i| u32_at(84 + 4 * i)).collect(),
            waiting_count,
            group: text(TEXTS[0]),
            operation: text(TEXTS[1]),
            failure: text(TEXTS[2]),
        })
    }
}

/// The turn of a page: even and unchanged before and after a read means that the read is whole.
pub fn turn(page: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(page.get(TURN..TURN + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> RankStatus {
        RankStatus {
            pid: 1234,
            rank: 3,
            size: 8,
            state: RankState::Failed,
            issued: 7,
            completed: 6,
            bytes_sent: 1 << 40,
            bytes_received: 5,
            updated: 99,
            stuck_since: 98,
            waiting_for: vec![1, 2],
            waiting_count: 2,
            group: "job 1 epoch 2".into(),
            operation: "allreduce sum f32 x 1000".into(),
            failure: "ä".repeat(1000),
        }
    }

    #[test]
    fn a_page_round_trips_and_cuts_what_is_too_long() {
        let page = sample().encode(4);
        let read = RankStatus::decode(&page).unwrap();
        assert_eq!(read.failure, "ä".repeat(277));
        assert_eq!(
            RankStatus { failure: String::new(), ..read },
            RankStatus { failure: String::new(), ..sample() }
        );
        assert_eq!(turn(&page), Some(4));
        let many = RankStatus { waiting_for: (0..100).collect(), waiting_count: 100, ..sample() };
        let read = RankStatus::decode(&many.encode(2)).unwrap();
        assert_eq!((read.waiting_for.len(), read.waiting_count), (32, 100));
    }

    #[test]
    fn what_is_no_whole_page_is_not_read() {
        assert_eq!(RankStatus::decode(&sample().encode(3)), None, "being written");
        assert_eq!(RankStatus::decode(&[0; PAGE_BYTES]), None);
        assert_eq!(RankStatus::decode(&sample().encode(2)[..1000]), None);
        let mut wild = sample().encode(2);
        wild[80..84].copy_from_slice(&u32::MAX.to_le_bytes());
        wild[212..214].copy_from_slice(&u16::MAX.to_le_bytes());
        assert!(RankStatus::decode(&wild).is_some(), "lengths are checked");
    }
}
