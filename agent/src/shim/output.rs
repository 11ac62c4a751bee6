//! Output of a rank, cut into lines.

use crate::spool::{Line, MOST_LINE_BYTES};
use crate::sys;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// An unfinished line (a prompt, a progress bar) is shown after this time.
const PARTIAL: Duration = Duration::from_secs(1);
/// Most bytes taken from a pipe at a time, so that the other one and the control get their turn.
const READ_BYTES: usize = 256 << 10;

/// One of the rank's output pipes.
pub(crate) struct Pipe {
    file: File,
    stderr: bool,
    partial: Vec<u8>,
    since: Instant,
}

impl Pipe {
    pub(crate) fn new(fd: OwnedFd, stderr: bool) -> io::Result<Self> {
        sys::set_nonblocking(&fd)?;
        Ok(Self { file: fd.into(), stderr, partial: Vec::new(), since: Instant::now() })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Takes what is there. False at the end of the pipe.
    pub(crate) fn read(&mut self, lines: &mut Vec<Line>) -> bool {
        let mut buffer = [0; 64 << 10];
        let mut taken = 0;
        while taken < READ_BYTES {
            match self.file.read(&mut buffer) {
                Ok(0) => {
                    self.flush(lines);
                    return false;
                }
                Ok(n) => {
                    taken += n;
                    self.take(&buffer[..n], lines);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.flush(lines);
                    return false;
                }
            }
        }
        if !self.partial.is_empty() && self.since.elapsed() >= PARTIAL {
            self.flush(lines);
        }
        true
    }

    fn take(&mut self, bytes: &[u8], lines: &mut Vec<Line>) {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            if self.partial.is_empty() {
                self.since = Instant::now();
            }
            let (body, ended) = match piece.split_last() {
                Some((b'\n', body)) => (body, true),
                _ => (piece, false),
            };
            self.partial.extend_from_slice(body);
            if ended {
                emit(&mut self.partial, self.stderr, true, lines);
            } else {
                // Of a progress bar that redraws itself only the newest picture matters.
                if let Some(at) = self.partial.iter().rposition(|b| *b == b'\r')
                    && at + 1 < self.partial.len()
                {
                    self.partial.drain(..=at);
                }
            }
            while self.partial.len() > MOST_LINE_BYTES {
                let rest = self.partial.split_off(MOST_LINE_BYTES);
                emit(&mut self.partial, self.stderr, false, lines);
                self.partial = rest;
            }
        }
    }

    /// Gives out an unfinished line.
    pub(crate) fn flush(&mut self, lines: &mut Vec<Line>) {
        if !self.partial.is_empty() {
            emit(&mut self.partial, self.stderr, false, lines);
            self.since = Instant::now();
        }
    }
}

/// One line, or several if it is longer than allowed. Of pictures drawn over each other with
/// carriage returns the last is kept.
fn emit(line: &mut Vec<u8>, stderr: bool, ended: bool, lines: &mut Vec<Line>) {
    let bytes = std::mem::take(line);
    let end = bytes.iter().rposition(|b| *b != b'\r').map_or(0, |i| i + 1);
    let start = bytes[..end].iter().rposition(|b| *b == b'\r').map_or(0, |i| i + 1);
    let shown = &bytes[start..end];
    if shown.is_empty() {
        // An empty line is a line; the flush of nothing is not.
        if ended {
            lines.push(Line { stderr, unix_ms: sys::unix_ms(), bytes: Vec::new() });
        }
        return;
    }
    for piece in shown.chunks(MOST_LINE_BYTES) {
        lines.push(Line { stderr, unix_ms: sys::unix_ms(), bytes: piece.to_vec() });
    }
}

/// A text of ours as lines.
pub(crate) fn now_lines(text: &str, stderr: bool) -> Vec<Line> {
    text.lines().map(|l| Line { stderr, unix_ms: sys::unix_ms(), bytes: l.as_bytes().to_vec() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn lines_of(writes: &[&[u8]]) -> Vec<String> {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let mut pipe = Pipe::new(read, false).unwrap();
        let mut write = File::from(write);
        let mut lines = Vec::new();
        for bytes in writes {
            write.write_all(bytes).unwrap();
            assert!(pipe.read(&mut lines));
        }
        drop(write);
        assert!(!pipe.read(&mut lines));
        lines.iter().map(|l| String::from_utf8(l.bytes.clone()).unwrap()).collect()
    }

    #[test]
    fn lines_are_whole_however_they_are_written() {
        assert_eq!(lines_of(&[b"a\nb", b"c\n", b"\n", b"end"]), ["a", "bc", "", "end"]);
        assert_eq!(lines_of(&[b"dos\r\n"]), ["dos"]);
    }

    #[test]
    fn of_a_progress_bar_the_last_picture_stays() {
        assert_eq!(lines_of(&[b"1%\r2%\r", b"50%", b"\r100%\n", b"done\n"]), ["100%", "done"]);
    }

    #[test]
    fn an_endless_line_is_cut() {
        let long = vec![b'x'; 2 * MOST_LINE_BYTES + 5];
        let lines = lines_of(&[&long[..30_000], &long[30_000..]]);
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [MOST_LINE_BYTES, MOST_LINE_BYTES, 5]);
    }
}
