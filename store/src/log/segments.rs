//! The log as a sequence of segment files: recovery, appending, rotation, compaction.

use super::disk::{Disk, DiskFile};
use super::format::{
    FrameBuilder, Parsed, Record, SEGMENT_HEADER_BYTES, SegmentHeader, find_frame, parse_frame,
};
use crate::StoreError;
use raft::eraftpb::{Entry, HardState};
use std::sync::Arc;

/// What recovery found.
#[derive(Default)]
pub(crate) struct Recovered {
    /// Contiguous by index; an entry that was written again replaces it and all after it.
    pub entries: Vec<Entry>,
    pub hard_state: HardState,
    /// Bytes cut off as the unacknowledged tail.
    pub torn_bytes: u64,
}

struct Closed {
    segment: u64,
    /// Highest entry index in it; it may be removed once a checkpoint covers that.
    last_index: u64,
}

/// The open log. Every error of [`SegmentLog::append`] is final: after a failed fdatasync nobody
/// knows what is on the disk, so the owner stops and opens again.
pub(crate) struct SegmentLog {
    disk: Arc<dyn Disk>,
    store_id: u64,
    closed: Vec<Closed>,
    segment: u64,
    file: Box<dyn DiskFile>,
    next_frame: u64,
    last_index: u64,
    hard_state: HardState,
    /// Appended since the current segment began.
    segment_bytes: u64,
    syncs: u64,
}

fn file_name(segment: u64) -> String {
    format!("{segment:016x}.log")
}

fn segment_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}

impl SegmentLog {
    /// Reads everything, cuts off a torn tail and starts a new segment. `first_needed` is the
    /// oldest segment that the state machine's checkpoint relies on; 0 if the store is new.
    pub(crate) fn open(
        disk: Arc<dyn Disk>,
        store_id: u64,
        first_needed: u64,
    ) -> Result<(Self, Recovered), StoreError> {
        let listing = disk.list().map_err(|e| StoreError::io("listing the log folder", e))?;
        let mut segments: Vec<u64> = listing.iter().filter_map(|n| segment_of(n)).collect();
        segments.sort_unstable();
        // Older ones are leftovers of a compaction that was cut short.
        segments.retain(|&s| s >= first_needed);
        let contiguous = segments.windows(2).all(|w| w[1] == w[0] + 1);
        if !contiguous || (first_needed > 0 && segments.first() != Some(&first_needed)) {
            return Err(StoreError::Corrupt(format!(
                "segments {first_needed:#x} and up are wanted in the log, {segments:x?} are there"
            )));
        }

        let mut state = Replay { recovered: Recovered::default(), next_frame: None };
        let mut closed = Vec::new();
        for (at, &segment) in segments.iter().enumerate() {
            let is_last = at + 1 == segments.len();
            let keep = state.read_segment(&*disk, store_id, segment, is_last)?;
            if keep {
                let last_index = state.recovered.entries.last().map_or(0, |e| e.index);
                closed.push(Closed { segment, last_index });
            }
        }
        for segment in stale_segments(&listing, first_needed) {
            disk.remove(&file_name(segment)).map_err(|e| StoreError::io("removing an old segment", e))?;
        }
        // The number of a segment whose creation was cut short is free again.
        let segment = closed.last().map_or(first_needed.max(1), |c| c.segment + 1);
        let recovered = state.recovered;
        let next_frame = state.next_frame.unwrap_or(1);
        let file = new_segment(&*disk, SegmentHeader { store_id, segment, first_frame: next_frame })?;
        let mut log = Self {
            disk,
            store_id,
            closed,
            segment,
            file,
            next_frame,
            last_index: recovered.entries.last().map_or(0, |e| e.index),
            hard_state: recovered.hard_state.clone(),
            segment_bytes: 0,
            syncs: 0,
        };
        log.write_hard_state()?;
        Ok((log, recovered))
    }

    /// Writes `entries` and, if given, the hard state as one frame, durable on return.
    pub(crate) fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<&HardState>,
    ) -> Result<(), StoreError> {
        let mut frame = FrameBuilder::new();
        if let Some(state) = hard_state {
            frame.hard_state(state);
            self.hard_state = state.clone();
        }
        for entry in entries {
            frame.entry(entry);
        }
        if let Some(last) = entries.last() {
            self.last_index = self.last_index.max(last.index);
        }
        self.write(frame)
    }

    fn write_hard_state(&mut self) -> Result<(), StoreError> {
        let mut frame = FrameBuilder::new();
        frame.hard_state(&self.hard_state);
        self.write(frame)
    }

    fn write(&mut self, frame: FrameBuilder) -> Result<(), StoreError> {
        if frame.is_empty() {
            return Ok(());
        }
        let bytes = frame.finish(self.store_id, self.segment, self.next_frame);
        let name = file_name(self.segment);
        self.file.append(&bytes).map_err(|e| StoreError::io(format!("appending to {name}"), e))?;
        self.file.sync().map_err(|e| StoreError::io(format!("fdatasync of {name}"), e))?;
        self.next_frame += 1;
        self.segment_bytes += bytes.len() as u64;
        self.syncs += 1;
        Ok(())
    }

    /// Closes the current segment and starts the next, which begins with the hard state so that
    /// the older ones can go. Returns the new segment's number.
    pub(crate) fn rotate(&mut self) -> Result<u64, StoreError> {
        let header = SegmentHeader {
            store_id: self.store_id,
            segment: self.segment + 1,
            first_frame: self.next_frame,
        };
        let file = new_segment(&*self.disk, header)?;
        self.closed.push(Closed { segment: self.segment, last_index: self.last_index });
        self.file = file;
        self.segment += 1;
        self.segment_bytes = 0;
        self.write_hard_state()?;
        Ok(self.segment)
    }

    /// The oldest segment still needed once everything up to `index` is in a checkpoint.
    pub(crate) fn first_needed_after(&self, index: u64) -> u64 {
        self.closed.iter().find(|c| c.last_index > index).map_or(self.segment, |c| c.segment)
    }

    /// Removes segments older than `first_needed`, after the checkpoint that says so is durable.
    pub(crate) fn remove_before(&mut self, first_needed: u64) -> Result<(), StoreError> {
        let gone: Vec<u64> =
            self.closed.iter().map(|c| c.segment).take_while(|&s| s < first_needed).collect();
        for &segment in &gone {
            self.disk
                .remove(&file_name(segment))
                .map_err(|e| StoreError::io(format!("removing {}", file_name(segment)), e))?;
        }
        self.closed.drain(..gone.len());
        self.disk.sync_dir().map_err(|e| StoreError::io("syncing the log folder", e))
    }

    pub(crate) fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    pub(crate) fn syncs(&self) -> u64 {
        self.syncs
    }
}

fn stale_segments(listing: &[String], first_needed: u64) -> impl Iterator<Item = u64> {
    listing.iter().filter_map(|n| segment_of(n)).filter(move |&s| s < first_needed)
}

/// Makes a segment whose header and name are durable before any frame is written, so that a bad
/// header can only mean that nothing was ever acknowledged in it.
fn new_segment(disk: &dyn Disk, header: SegmentHeader) -> Result<Box<dyn DiskFile>, StoreError> {
    let name = file_name(header.segment);
    let doing = |e| StoreError::io(format!("creating {name}"), e);
    let mut file = disk.create(&name).map_err(doing)?;
    file.append(&header.encode()).map_err(doing)?;
    file.sync().map_err(doing)?;
    disk.sync_dir().map_err(doing)?;
    Ok(file)
}

struct Replay {
    recovered: Recovered,
    /// Known once the first header has been read.
    next_frame: Option<u64>,
}

impl Replay {
    /// Takes in one segment; false if it held nothing and was removed.
    fn read_segment(
        &mut self,
        disk: &dyn Disk,
        store_id: u64,
        segment: u64,
        is_last: bool,
    ) -> Result<bool, StoreError> {
        let name = file_name(segment);
        let bytes = disk.read(&name).map_err(|e| StoreError::io(format!("reading {name}"), e))?;
        let corrupt = |what: String| StoreError::Corrupt(format!("{name}: {what}"));
        let header = match SegmentHeader::decode(&bytes) {
            Ok(header) => header,
            Err(what) => {
                let followed = find_frame(&bytes, 0, store_id, segment).is_some();
                if !is_last || followed || what.contains("not known to this release") {
                    return Err(corrupt(what));
                }
                // Its creation was cut short, before anything was acknowledged in it.
                self.recovered.torn_bytes += bytes.len() as u64;
                disk.remove(&name).map_err(|e| StoreError::io(format!("removing {name}"), e))?;
                disk.sync_dir().map_err(|e| StoreError::io("syncing the log folder", e))?;
                return Ok(false);
            }
        };
        if header.store_id != store_id || header.segment != segment {
            return Err(corrupt("it belongs to another store: the folder holds a mixture".into()));
        }
        let mut next_frame = self.next_frame.unwrap_or(header.first_frame);
        if header.first_frame != next_frame {
            return Err(corrupt(format!(
                "it starts with frame {}, {next_frame} is wanted",
                header.first_frame
            )));
        }
        let mut at = SEGMENT_HEADER_BYTES;
        loop {
            match parse_frame(&bytes[at.min(bytes.len())..], store_id, segment) {
                Parsed::End => break,
                Parsed::Frame(frame) => {
                    if frame.sequence != next_frame {
                        return Err(corrupt(format!(
                            "frame {} stands where {next_frame} is wanted",
                            frame.sequence
                        )));
                    }
                    next_frame += 1;
                    at += frame.bytes;
                    for record in frame.records {
                        self.take_record(record).map_err(corrupt)?;
                    }
                }
                Parsed::Bad(what) => {
                    if !is_last {
                        return Err(corrupt(format!("{what} at byte {at}, in a segment that was closed")));
                    }
                    if let Some(next) = find_frame(&bytes, at + 1, store_id, segment) {
                        return Err(corrupt(format!(
                            "{what} at byte {at}, and a valid frame follows at {next}: acknowledged data is lost"
                        )));
                    }
                    self.recovered.torn_bytes += (bytes.len() - at) as u64;
                    disk.truncate(&name, at as u64)
                        .map_err(|e| StoreError::io(format!("cutting the torn tail off {name}"), e))?;
                    break;
                }
            }
        }
        self.next_frame = Some(next_frame);
        Ok(true)
    }

    fn take_record(&mut self, record: Record) -> Result<(), String> {
        match record {
            Record::HardState(state) => self.recovered.hard_state = state,
            Record::Entry(entry) => {
                let entries = &mut self.recovered.entries;
                if let Some(first) = entries.first() {
                    // A follower that was told otherwise by a new leader writes an index again.
                    let keep = entry.index.saturating_sub(first.index);
                    if keep > entries.len() as u64 {
                        return Err(format!("entries before {} are missing", entry.index));
                    }
                    entries.truncate(keep as usize);
                }
                entries.push(entry);
            }
        }
        Ok(())
    }
}
