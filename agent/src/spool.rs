//! A rank's output on its node: records in segment files. The shim appends, the agent reads and
//! removes segments that the scheduler has. Positions count bytes since the rank began, so they
//! survive every restart.
//!
//! ```text
//! file log.<16 hexadecimal digits: position of its first byte>
//! record = length u32 | flags u8 (1: stderr) | milliseconds since 1970 u64 | the line
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A segment is closed when it is this long.
const SEGMENT_BYTES: u64 = 4 << 20;
/// Segments that a rank may have: 64 MiB. Beyond it (the scheduler is away, or the rank writes
/// faster than the network carries) lines are dropped and counted; the rank is never held up.
const MOST_SEGMENTS: usize = 16;
/// Longer lines are cut into pieces.
pub(crate) const MOST_LINE_BYTES: usize = 16 << 10;
const HEADER: usize = 13;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) stderr: bool,
    pub(crate) unix_ms: u64,
    pub(crate) bytes: Vec<u8>,
}

/// Segments in order of position.
fn segments(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let start = name.to_str().and_then(|n| n.strip_prefix("log.")).filter(|n| n.len() == 16);
        if let Some(start) = start.and_then(|n| u64::from_str_radix(n, 16).ok()) {
            found.push((start, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The shim's end.
pub(crate) struct Writer {
    dir: PathBuf,
    file: Option<File>,
    in_segment: u64,
    end: u64,
    dropped: u64,
    segment_bytes: u64,
}

impl Writer {
    pub(crate) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            file: None,
            in_segment: 0,
            end: 0,
            dropped: 0,
            segment_bytes: SEGMENT_BYTES,
        }
    }

    /// Position after the last record.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Appends lines. A full disk or spool drops them: the rank must not wait for its log.
    pub(crate) fn append(&mut self, lines: &[Line]) {
        for chunk in lines.chunks(256) {
            if self.write(chunk).is_err() {
                self.file = None;
                self.dropped += chunk.len() as u64;
            }
        }
    }

    fn write(&mut self, lines: &[Line]) -> io::Result<()> {
        if self.file.is_none() || self.in_segment >= self.segment_bytes {
            if segments(&self.dir)?.len() >= MOST_SEGMENTS {
                return Err(io::Error::other("the spool is full"));
            }
            let path = self.dir.join(format!("log.{:016x}", self.end));
            self.file = Some(OpenOptions::new().create(true).append(true).mode(0o600).open(path)?);
            self.in_segment = 0;
        }
        let mut bytes = Vec::new();
        if self.dropped > 0 {
            let text = format!("[{} lines were dropped: the log was full]", self.dropped);
            encode(&mut bytes, true, lines.first().map_or(0, |l| l.unix_ms), text.as_bytes());
        }
        for line in lines {
            encode(&mut bytes, line.stderr, line.unix_ms, &line.bytes);
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        // A write that stops half way leaves a torn record in this segment: the next goes to a
        // new segment, which readers find by its name.
        let before = self.end;
        self.end += bytes.len() as u64;
        if let Err(e) = file.write_all(&bytes) {
            let torn = file.metadata().map_or(0, |m| m.len());
            let _ = file.set_len(torn.min(self.in_segment));
            self.end = before;
            return Err(e);
        }
        self.in_segment += bytes.len() as u64;
        self.dropped = 0;
        Ok(())
    }
}

fn encode(out: &mut Vec<u8>, stderr: bool, unix_ms: u64, line: &[u8]) {
    out.extend_from_slice(&u32::try_from(line.len()).unwrap_or(0).to_le_bytes());
    out.push(u8::from(stderr));
    out.extend_from_slice(&unix_ms.to_le_bytes());
    out.extend_from_slice(line);
}

/// What [`read`] found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Batch {
    pub(crate) lines: Vec<Line>,
    /// Position of the first line: later than asked if what was before is gone.
    pub(crate) start: u64,
    /// Position after the last.
    pub(crate) end: u64,
}

/// Lines from position `from` on, at most about `most` bytes of them.
pub(crate) fn read(dir: &Path, from: u64, most: usize) -> io::Result<Batch> {
    let segments = segments(dir)?;
    let mut batch = Batch { lines: Vec::new(), start: from, end: from };
    for (i, (start, path)) in segments.iter().enumerate() {
        let next = segments.get(i + 1).map(|(s, _)| *s);
        if next.is_some_and(|n| n <= from) {
            continue;
        }
        if from < *start {
            (batch.start, batch.end) = (*start, *start);
        }
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(batch.end.saturating_sub(*start)))?;
        let mut bytes = Vec::new();
        file.take(most as u64 + (HEADER + MOST_LINE_BYTES) as u64).read_to_end(&mut bytes)?;
        let used = decode(&bytes, most, &mut batch.lines);
        batch.end += used as u64;
        if !batch.lines.is_empty() || next.is_none() {
            return Ok(batch);
        }
        // Nothing whole is left in a closed segment: go on with the next.
        let Some(next) = next else { break };
        (batch.start, batch.end) = (next, next);
    }
    Ok(batch)
}

/// Decodes whole records; returns the bytes used.
fn decode(bytes: &[u8], most: usize, lines: &mut Vec<Line>) -> usize {
    let mut at = 0;
    while at < most && bytes.len() - at >= HEADER {
        let head = &bytes[at..at + HEADER];
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if length > MOST_LINE_BYTES || bytes.len() - at - HEADER < length {
            break;
        }
        let mut stamp = [0; 8];
        stamp.copy_from_slice(&head[5..13]);
        lines.push(Line {
            stderr: head[4] & 1 != 0,
            unix_ms: u64::from_le_bytes(stamp),
            bytes: bytes[at + HEADER..at + HEADER + length].to_vec(),
        });
        at += HEADER + length;
    }
    at
}

/// Position after everything that is there.
pub(crate) fn end(dir: &Path) -> io::Result<u64> {
    match segments(dir)?.last() {
        Some((start, path)) => Ok(start + fs::metadata(path)?.len()),
        None => Ok(0),
    }
}

/// Removes the segments that lie wholly before `acked`, except the one being written.
pub(crate) fn trim(dir: &Path, acked: u64) -> io::Result<()> {
    let segments = segments(dir)?;
    for pair in segments.windows(2) {
        if pair[1].0 <= acked {
            fs::remove_file(&pair[0].1)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(n: usize) -> Line {
        Line { stderr: n.is_multiple_of(3), unix_ms: n as u64, bytes: format!("line {n}").into_bytes() }
    }

    #[test]
    fn lines_come_back_in_order_across_segments_and_from_any_position() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(dir.path());
        writer.segment_bytes = 100;
        for n in 0..60 {
            writer.append(&[line(n)]);
        }
        let (mut at, mut got) = (0, Vec::new());
        loop {
            let batch = read(dir.path(), at, 50).unwrap();
            if batch.lines.is_empty() {
                break;
            }
            assert_eq!(batch.start, at);
            at = batch.end;
            got.extend(batch.lines);
        }
        assert_eq!(at, writer.end());
        assert_eq!(got, (0..60).map(line).collect::<Vec<_>>());
    }

    #[test]
    fn acknowledged_segments_go_and_a_reader_behind_them_skips() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(dir.path());
        writer.segment_bytes = 100;
        for n in 0..30 {
            writer.append(&[line(n)]);
        }
        let half = read(dir.path(), 0, 300).unwrap().end;
        trim(dir.path(), half).unwrap();
        let first = segments(dir.path()).unwrap()[0].0;
        assert!(first > 0 && first <= half);
        let batch = read(dir.path(), 0, 50).unwrap();
        assert_eq!(batch.start, first);
        assert!(!batch.lines.is_empty());
    }

    #[test]
    fn a_full_spool_drops_and_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(dir.path());
        writer.segment_bytes = 20;
        for n in 0..40 {
            writer.append(&[line(n)]);
        }
        assert_eq!(segments(dir.path()).unwrap().len(), MOST_SEGMENTS);
        trim(dir.path(), writer.end()).unwrap();
        writer.append(&[line(99)]);
        let mut at = 0;
        let mut last = Vec::new();
        while let Ok(batch) = read(dir.path(), at, 1 << 20) {
            if batch.lines.is_empty() {
                break;
            }
            at = batch.end;
            last.extend(batch.lines);
        }
        let texts: Vec<_> = last.iter().map(|l| String::from_utf8_lossy(&l.bytes).into_owned()).collect();
        assert!(texts.iter().any(|t| t.contains("lines were dropped")), "{texts:?}");
        assert_eq!(texts.last().unwrap(), "line 99");
    }

    #[test]
    fn a_torn_record_waits_for_its_rest() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::new(dir.path());
        writer.append(&[line(1), line(2)]);
        let path = segments(dir.path()).unwrap()[0].1.clone();
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let batch = read(dir.path(), 0, 1 << 20).unwrap();
            assert!(batch.lines.len() <= 1, "cut at {cut}");
            assert!(batch.end <= cut as u64);
        }
    }
}
