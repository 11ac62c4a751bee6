//! Snapshots and the files they begin: how a target's state gets to disk and back.

use super::disk::Disk;
use super::format::{self, FormatError, LogRecord};
use super::image::Image;
use super::store::{EngineError, LogState};

/// Body bytes of a frame in a snapshot.
const SNAPSHOT_FRAME: usize = 1 << 20;

pub(super) fn log_name(generation: u64) -> String {
    format!("log.{generation}")
}

pub(super) fn snapshot_name(generation: u64) -> String {
    format!("snapshot.{generation}")
}

pub(super) fn begin_log<D: Disk>(disk: &D, generation: u64) -> Result<(), EngineError> {
    disk.write_file(&log_name(generation), &format::preamble(false, generation)).map_err(EngineError::Io)
}

pub(super) fn write_snapshot<D: Disk>(disk: &D, generation: u64, image: &Image) -> Result<(), EngineError> {
    let mut out = format::preamble(true, generation);
    let mut body = Vec::new();
    let (mut sequence, mut entries) = (0, 0);
    for record in image.snapshot() {
        entries += u64::from(matches!(record, LogRecord::Chunk { .. } | LogRecord::Pending { .. }));
        record.encode(&mut body);
        if body.len() > SNAPSHOT_FRAME {
            format::put_frame(&mut out, generation, sequence, &body);
            sequence += 1;
            body.clear();
        }
    }
    LogRecord::End { entries }.encode(&mut body);
    format::put_frame(&mut out, generation, sequence, &body);
    disk.write_file(&snapshot_name(generation), &out).map_err(EngineError::Io)?;
    disk.write_file("current", &generation.to_le_bytes()).map_err(EngineError::Io)
}

pub(super) fn recover<D: Disk>(disk: &D) -> Result<(Image, LogState), EngineError> {
    let damaged = |what: &str| EngineError::Format(FormatError::Damaged(what.to_owned()));
    let read = |name: &str| disk.read_file(name).map_err(EngineError::Io);
    let generation = read("current")?
        .and_then(|b| b.try_into().ok())
        .map(u64::from_le_bytes)
        .ok_or_else(|| damaged("the file `current` does not hold a generation"))?;
    let snapshot = read(&snapshot_name(generation))?.ok_or_else(|| damaged("the snapshot is missing"))?;
    format::check_preamble(&snapshot, true, generation)?;
    let frames = format::read_frames(&snapshot, generation)?;
    let mut image = Image::default();
    let (mut entries, mut end) = (0, None);
    for body in &frames.bodies {
        for record in LogRecord::decode_all(body)? {
            entries += u64::from(matches!(record, LogRecord::Chunk { .. } | LogRecord::Pending { .. }));
            if let LogRecord::End { entries } = record {
                end = Some(entries);
            }
            image.replay(record)?;
        }
    }
    if frames.end != snapshot.len() || end != Some(entries) {
        return Err(damaged("the snapshot is not whole"));
    }
    let name = log_name(generation);
    let bytes = read(&name)?.ok_or_else(|| damaged("the log is missing"))?;
    format::check_preamble(&bytes, false, generation)?;
    let frames = format::read_frames(&bytes, generation)?;
    for body in &frames.bodies {
        for record in LogRecord::decode_all(body)? {
            image.replay(record)?;
        }
    }
    if frames.end < bytes.len() {
        disk.truncate_file(&name, frames.end as u64).map_err(EngineError::Io)?;
    }
    // Left-overs of a compaction that a crash cut short.
    for old in [log_name(generation - 1), snapshot_name(generation - 1)] {
        disk.remove_file(&old).map_err(EngineError::Io)?;
    }
    let sequence = frames.bodies.len() as u64;
    Ok((image, LogState { generation, sequence, len: frames.end as u64 }))
}
