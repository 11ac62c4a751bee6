//! This rank's status page, written here, and those of other processes, read here. What a page holds
//! is [`firefly_types::rank_status`].

use crate::ReduceError;
use crate::fork::{self, Guarded};
use firefly_types::RankStatus;
use firefly_types::rank_status::{PAGE_BYTES, PAGE_NAME, turn};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

const MAPPED_BYTES: usize = 4096;
const TURN_WORD: usize = 1;
/// A page is written in well under a microsecond; a reader that meets a writer that was stopped in
/// between gives up after this many tries.
const READ_TRIES: usize = 1000;

/// Nanoseconds of the clock that all processes of a machine share and that counts suspend.
pub(crate) fn boottime() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The page of one group, seen by its writer.
pub(crate) struct Page {
    base: NonNull<AtomicU64>,
    turn: u64,
    _guard: Guarded,
    _file: OwnedFd,
}

// SAFETY: the mapping is written through atomics only, by whoever holds the Page.
unsafe impl Send for Page {}

impl Page {
    pub(crate) fn create() -> Result<Self, ReduceError> {
        let file = rustix::fs::memfd_create(PAGE_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| ReduceError::system("memfd_create of the status page", e))?;
        rustix::fs::ftruncate(&file, MAPPED_BYTES as u64)
            .map_err(|e| ReduceError::system("ftruncate of the status page", e))?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|e| ReduceError::system("sealing the status page", e))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                MAPPED_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }
        .map_err(|e| ReduceError::system("mmap of the status page", e))?;
        // SAFETY: the range was mapped just now. A forked child must not write this rank's page.
        let _ = unsafe { rustix::mm::madvise(base, MAPPED_BYTES, rustix::mm::Advice::LinuxDontFork) };
        let guard = fork::guard(file.as_fd());
        let base = NonNull::new(base.cast()).expect("mmap returns no null");
        Ok(Self { base, turn: 0, _guard: guard, _file: file })
    }

    pub(crate) fn write(&mut self, status: &RankStatus) {
        // SAFETY: the mapping holds as many words, aligned, and is only ever accessed atomically here.
        let words = unsafe { std::slice::from_raw_parts(self.base.as_ptr(), PAGE_BYTES / 8) };
        self.turn += 2;
        words[TURN_WORD].store(self.turn - 1, Ordering::Relaxed);
        fence(Ordering::Release);
        for (i, (word, bytes)) in words.iter().zip(status.encode(self.turn).chunks_exact(8)).enumerate() {
            if i != TURN_WORD {
                let bytes = bytes.try_into().expect("chunks of eight");
                word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
            }
        }
        words[TURN_WORD].store(self.turn, Ordering::Release);
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length, and used by nobody else.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), MAPPED_BYTES) };
    }
}

/// The status pages of a process: one for each of its groups, in no particular order. Needs the right
/// to look at the process's descriptors (same user, or root).
pub fn of_process(pid: u32) -> std::io::Result<Vec<RankStatus>> {
    let wanted = format!("/memfd:{PAGE_NAME}");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        // A descriptor may be closed while we look.
        let Ok(target) = std::fs::read_link(&path) else { continue };
        if !target.to_string_lossy().starts_with(&wanted) {
            continue;
        }
        let Ok(file) = std::fs::File::open(&path) else { continue };
        if let Some(status) = read(&file) {
            found.push(status);
        }
    }
    Ok(found)
}

fn read(file: &std::fs::File) -> Option<RankStatus> {
    let mut page = [0; PAGE_BYTES];
    let mut again = [0; 16];
    for _ in 0..READ_TRIES {
        file.read_exact_at(&mut page, 0).ok()?;
        file.read_exact_at(&mut again, 0).ok()?;
        if let Some(status) = RankStatus::decode(&page)
            && turn(&again) == turn(&page)
        {
            return Some(status);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_found_and_never_read_half_written() {
        let mut page = Page::create().unwrap();
        let sample = |n: u64| RankStatus {
            pid: std::process::id(),
            rank: 5,
            issued: n,
            completed: n,
            group: format!("page {n}"),
            ..RankStatus::default()
        };
        page.write(&sample(1));
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut n = 1;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    page.write(&sample(n));
                }
            });
            for _ in 0..200 {
                let pages = of_process(std::process::id()).unwrap();
                for read in pages.iter().filter(|p| p.rank == 5) {
                    assert_eq!(read.issued, read.completed);
                    assert_eq!(read.group, format!("page {}", read.issued));
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        let pages = of_process(std::process::id()).unwrap();
        assert!(pages.iter().any(|p| p.rank == 5), "{pages:?}");
    }
}
