//! Output of jobs. One log per job over all its ranks and attempts, in segment files:
//!
//! ```text
//! logs/j3.00000000.log    record = length u32 | AgentLog message (protobuf)
//! ```
//!
//! When the segments of a job reach the limit, the oldest goes. Each segment begins with the
//! positions that were reached before it, so that they survive the older ones.
//!
//! Lines are written to the page cache, not synced: they survive every death of the daemon, and a
//! power failure costs the last seconds of them. A torn end is cut off when a log is opened.

use firefly_proto::scheduler as wire;
use firefly_types::{AttemptEpoch, JobId, lock};
use prost::Message;
use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// Segments of a job's log: removing one of four keeps at least three quarters of the limit.
const SEGMENTS: u64 = 4;
/// Largest record that is read back: more than one message from an agent can have.
const MOST_RECORD_BYTES: usize = 8 << 20;

type RankKey = (u32, u32);

/// The logs of all jobs.
pub(crate) struct JobLogs {
    dir: PathBuf,
    segment_bytes: u64,
    jobs: Mutex<HashMap<JobId, Arc<JobLog>>>,
}

/// The log of one job.
pub(crate) struct JobLog {
    job: JobId,
    dir: PathBuf,
    segment_bytes: u64,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    /// Sequence number and length of each segment, oldest first.
    segments: VecDeque<(u32, u64)>,
    /// Position reached in each rank's own log.
    offsets: HashMap<RankKey, u64>,
    /// Where the logs of ranks that have exited end.
    ends: HashMap<RankKey, u64>,
}

/// A place in a job's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    segment: u32,
    at: u64,
}

impl JobLogs {
    pub(crate) fn open(dir: PathBuf, bytes_per_job: u64) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let segment_bytes = (bytes_per_job / SEGMENTS).max(4096);
        Ok(Self { dir, segment_bytes, jobs: Mutex::default() })
    }

    /// A job's log; made by the first write.
    pub(crate) fn job(&self, job: JobId) -> io::Result<Arc<JobLog>> {
        if let Some(log) = lock(&self.jobs).get(&job) {
            return Ok(log.clone());
        }
        let log = Arc::new(JobLog::open(job, &self.dir, self.segment_bytes)?);
        // Another task may have opened it meanwhile: the first one in counts.
        Ok(lock(&self.jobs).entry(job).or_insert(log).clone())
    }

    /// A line of the system.
    pub(crate) fn note(&self, job: JobId, epoch: AttemptEpoch, text: &str) {
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let chunk = wire::LogChunk {
            epoch: epoch.0,
            rank: 0,
            unix_ms: u64::try_from(unix_ms).unwrap_or(u64::MAX),
            line: text.as_bytes().to_vec(),
            is_stderr: false,
            is_system: true,
        };
        let message = wire::AgentLog { job_id: job.0, chunks: vec![chunk], offset: 0, start: 0 };
        let written = self.job(job).and_then(|log| log.append_record(&mut lock(&log.state), &message));
        if let Err(e) = written {
            tracing::warn!(%job, error = %e, "cannot write to the job's log");
        }
    }

    /// The job is no longer kept.
    pub(crate) fn remove(&self, job: JobId) {
        let removed = self.job(job).and_then(|log| {
            lock(&self.jobs).remove(&job);
            for (sequence, _) in &lock(&log.state).segments {
                fs::remove_file(log.path(*sequence))?;
            }
            Ok(())
        });
        if let Err(e) = removed {
            tracing::warn!(%job, error = %e, "cannot remove the job's log");
        }
    }
}

impl JobLog {
    fn open(job: JobId, dir: &Path, segment_bytes: u64) -> io::Result<Self> {
        let (changed, _) = watch::channel(0);
        let log = Self { job, dir: dir.to_owned(), segment_bytes, state: Mutex::default(), changed };
        let prefix = format!("{job}.");
        let mut sequences: Vec<u32> = Vec::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            let sequence: Option<u32> =
                name.to_str().and_then(|n| n.strip_prefix(&prefix)?.strip_suffix(".log")?.parse().ok());
            sequences.extend(sequence);
        }
        sequences.sort_unstable();
        let mut state = State::default();
        for sequence in sequences {
            let length = log.scan(sequence, &mut state.offsets)?;
            state.segments.push_back((sequence, length));
        }
        *lock(&log.state) = state;
        Ok(log)
    }

    fn path(&self, sequence: u32) -> PathBuf {
        self.dir.join(format!("{}.{sequence:08}.log", self.job))
    }

    /// Finds the positions in a segment and cuts off a torn end. Returns its length.
    fn scan(&self, sequence: u32, offsets: &mut HashMap<RankKey, u64>) -> io::Result<u64> {
        let path = self.path(sequence);
        let bytes = fs::read(&path)?;
        let mut at = 0;
        while let Some((message, used)) = decode(&bytes[at..]) {
            note_offset(offsets, &message);
            at += used;
        }
        if at < bytes.len() {
            tracing::warn!(path = %path.display(), bytes = bytes.len() - at, "cut off a torn end");
            OpenOptions::new().write(true).open(&path)?.set_len(at as u64)?;
        }
        Ok(at as u64)
    }

    /// Keeps lines of one rank. Lines that are here already are left out. Returns the position
    /// from which the node should go on.
    pub(crate) fn append(&self, epoch: u32, rank: u32, mut message: wire::AgentLog) -> io::Result<u64> {
        let mut state = lock(&self.state);
        let known = state.offsets.get(&(epoch, rank)).copied().unwrap_or(0);
        // A message is kept whole or not at all; the sender goes on from where we say.
        if message.offset <= known || message.start < known {
            return Ok(known);
        }
        if message.start > known {
            let lost = message.start - known;
            let unix_ms = message.chunks.first().map_or(0, |c| c.unix_ms);
            let line = format!("[{lost} bytes of output were lost here]").into_bytes();
            let note = wire::LogChunk { epoch, rank, unix_ms, line, is_stderr: true, is_system: false };
            message.chunks.insert(0, note);
        }
        for chunk in &mut message.chunks {
            // What a node says about its lines is limited to its own.
            (chunk.epoch, chunk.rank, chunk.is_system) = (epoch, rank, false);
        }
        self.append_record(&mut state, &message)?;
        Ok(message.offset)
    }

    fn append_record(&self, state: &mut State, message: &wire::AgentLog) -> io::Result<()> {
        let full = state.segments.back().is_none_or(|(_, length)| *length >= self.segment_bytes);
        if full {
            let next = state.segments.back().map_or(0, |(s, _)| s + 1);
            state.segments.push_back((next, 0));
            let offsets: Vec<(RankKey, u64)> = state.offsets.iter().map(|(k, o)| (*k, *o)).collect();
            for ((epoch, rank), offset) in offsets {
                let chunks = vec![wire::LogChunk { epoch, rank, ..wire::LogChunk::default() }];
                // `start` == `offset`: a position, no line.
                let position = wire::AgentLog { job_id: self.job.0, chunks, offset, start: offset };
                self.write(state, &position)?;
            }
            while state.segments.len() as u64 > SEGMENTS {
                if let Some((oldest, _)) = state.segments.pop_front() {
                    fs::remove_file(self.path(oldest))?;
                }
            }
        }
        self.write(state, message)?;
        note_offset(&mut state.offsets, message);
        self.changed.send_modify(|n| *n += 1);
        Ok(())
    }

    fn write(&self, state: &mut State, message: &wire::AgentLog) -> io::Result<()> {
        let Some((sequence, length)) = state.segments.back_mut() else { return Ok(()) };
        let body = message.encode_to_vec();
        let mut bytes = u32::try_from(body.len()).map_err(io::Error::other)?.to_le_bytes().to_vec();
        bytes.extend_from_slice(&body);
        let path = self.dir.join(format!("{}.{sequence:08}.log", self.job));
        let mut file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        if let Err(e) = file.write_all(&bytes) {
            // Readers go by `length`; the torn end must not come before the next record.
            file.set_len(*length)?;
            return Err(e);
        }
        *length += bytes.len() as u64;
        Ok(())
    }

    /// Position reached in a rank's log.
    pub(crate) fn offset(&self, epoch: u32, rank: u32) -> u64 {
        lock(&self.state).offsets.get(&(epoch, rank)).copied().unwrap_or(0)
    }

    /// A rank has exited and its log ends at `end`.
    pub(crate) fn set_end(&self, epoch: u32, rank: u32, end: u64) {
        lock(&self.state).ends.insert((epoch, rank), end);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Whether everything that the rank is known to have said is here.
    pub(crate) fn is_complete(&self, epoch: u32, rank: u32) -> bool {
        let state = lock(&self.state);
        let key = (epoch, rank);
        state.ends.get(&key).is_none_or(|end| state.offsets.get(&key).copied().unwrap_or(0) >= *end)
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Lines from `cursor` on, about `most` bytes of them, and where to go on. Blocks on the disk.
    pub(crate) fn read(&self, cursor: Cursor, most: u64) -> io::Result<(Vec<wire::LogChunk>, Cursor)> {
        // A segment may go between looking and opening: then look again.
        for _ in 0..3 {
            match self.read_once(cursor, most) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => return other,
            }
        }
        Ok((Vec::new(), cursor))
    }

    fn read_once(&self, mut cursor: Cursor, most: u64) -> io::Result<(Vec<wire::LogChunk>, Cursor)> {
        let mut chunks = Vec::new();
        let segments: Vec<(u32, u64)> = lock(&self.state).segments.iter().copied().collect();
        for (sequence, length) in segments {
            if sequence < cursor.segment {
                continue;
            }
            if sequence > cursor.segment {
                cursor = Cursor { segment: sequence, at: 0 };
            }
            if cursor.at >= length {
                continue;
            }
            let mut file = File::open(self.path(sequence))?;
            file.seek(SeekFrom::Start(cursor.at))?;
            let want = (length - cursor.at).min(most + MOST_RECORD_BYTES as u64);
            let mut bytes = Vec::new();
            file.take(want).read_to_end(&mut bytes)?;
            let mut at = 0;
            while at as u64 <= most
                && let Some((message, used)) = decode(&bytes[at..])
            {
                if message.offset == 0 || message.start != message.offset {
                    chunks.extend(message.chunks);
                }
                at += used;
            }
            cursor.at += at as u64;
            if at == 0 {
                // Damaged in the middle: nothing beyond it can be told apart.
                cursor.at = length;
            }
            if !chunks.is_empty() {
                break;
            }
        }
        Ok((chunks, cursor))
    }
}

fn decode(bytes: &[u8]) -> Option<(wire::AgentLog, usize)> {
    let (head, rest) = bytes.split_at_checked(4)?;
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    if length > MOST_RECORD_BYTES || length > rest.len() {
        return None;
    }
    Some((wire::AgentLog::decode(&rest[..length]).ok()?, 4 + length))
}

fn note_offset(offsets: &mut HashMap<RankKey, u64>, message: &wire::AgentLog) {
    if message.offset > 0
        && let Some(chunk) = message.chunks.first()
    {
        offsets.insert((chunk.epoch, chunk.rank), message.offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(n: std::ops::Range<u64>) -> wire::AgentLog {
        let chunk = |i: u64| wire::LogChunk {
            line: format!("line {i}").into_bytes(),
            unix_ms: i,
            ..Default::default()
        };
        wire::AgentLog {
            job_id: 1,
            chunks: n.clone().map(chunk).collect(),
            start: n.start * 10,
            offset: n.end * 10,
        }
    }

    fn all(log: &JobLog) -> Vec<String> {
        let (mut cursor, mut got) = (Cursor::default(), Vec::new());
        loop {
            let (chunks, next) = log.read(cursor, 100).unwrap();
            if chunks.is_empty() {
                return got;
            }
            cursor = next;
            got.extend(chunks.into_iter().map(|c| String::from_utf8(c.line).unwrap()));
        }
    }

    #[test]
    fn what_is_sent_again_is_kept_once_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let logs = JobLogs::open(dir.path().into(), 1 << 20).unwrap();
        let log = logs.job(JobId(1)).unwrap();
        assert_eq!(log.append(1, 0, lines(0..3)).unwrap(), 30);
        assert_eq!(log.append(1, 0, lines(0..3)).unwrap(), 30);
        assert_eq!(log.append(1, 0, lines(2..5)).unwrap(), 30, "an overlap is refused whole");
        logs.note(JobId(1), AttemptEpoch(1), "a note");
        let logs = JobLogs::open(dir.path().into(), 1 << 20).unwrap();
        let log = logs.job(JobId(1)).unwrap();
        assert_eq!(log.offset(1, 0), 30);
        assert_eq!(log.append(1, 0, lines(3..4)).unwrap(), 40);
        log.append(1, 1, lines(0..1)).unwrap();
        assert_eq!(all(&log), ["line 0", "line 1", "line 2", "a note", "line 3", "line 0"]);
        log.append(1, 1, lines(5..6)).unwrap();
        assert!(all(&log).iter().any(|l| l.contains("40 bytes of output were lost")));
        logs.remove(JobId(1));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_log_stays_within_its_limit_and_a_late_reader_skips() {
        let dir = tempfile::tempdir().unwrap();
        let logs = JobLogs::open(dir.path().into(), 4 * 4096).unwrap();
        let log = logs.job(JobId(1)).unwrap();
        for i in 0..3_000 {
            log.append(1, 0, lines(i..i + 1)).unwrap();
        }
        let size: u64 = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!(size <= 4 * 4096 + 4 * 200, "{size}");
        let got = all(&log);
        assert_eq!(got.last().unwrap(), "line 2999");
        assert!(got.len() > 300 && got.len() < 3_000, "{}", got.len());
        // Positions survive the segments in which they were reached.
        let log = JobLogs::open(dir.path().into(), 4 * 4096).unwrap().job(JobId(1)).unwrap();
        assert_eq!(log.offset(1, 0), 30_000);
    }

    #[test]
    fn a_torn_end_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = {
            let logs = JobLogs::open(dir.path().into(), 1 << 20).unwrap();
            let log = logs.job(JobId(1)).unwrap();
            log.append(1, 0, lines(0..1)).unwrap();
            log.append(1, 0, lines(1..2)).unwrap();
            log.path(0)
        };
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let log = JobLogs::open(dir.path().into(), 1 << 20).unwrap().job(JobId(1)).unwrap();
            let had = log.offset(1, 0) / 10;
            assert_eq!(log.append(1, 0, lines(had..had + 1)).unwrap(), (had + 1) * 10, "cut at {cut}");
            assert_eq!(all(&log).len() as u64, had + 1);
        }
    }
}
