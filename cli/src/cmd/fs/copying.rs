//! `ff fs put` and `get`.

use super::looking::kind_name;
use super::{connect, myself, print};
use crate::context::{Global, Usage};
use anyhow::{Context as _, Result, bail};
use firefly_types::ByteSize;
use fs3_client::path::{COPY_BYTES, join};
use fs3_client::{Credentials, Durability, Fs3, InodeKind};
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::io::{IsTerminal, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Files copied at once by put and get: hides the round trips of small files.
const FILES_AT_ONCE: usize = 8;

/// One thing to copy, made before any copying starts, so that the bar knows its total.
struct Job {
    from: PathBuf,
    to: PathBuf,
    kind: JobKind,
    mode: u32,
    bytes: u64,
}

enum JobKind {
    Directory,
    File,
    Symlink(Vec<u8>),
}

fn bar(total: u64, verb: &'static str, global: &Global) -> ProgressBar {
    if global.json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let bar = ProgressBar::new(total).with_message(verb);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

fn summary(jobs: &[Job], start: Instant, global: &Global) -> Result<()> {
    let files = jobs.iter().filter(|j| matches!(j.kind, JobKind::File)).count();
    let bytes: u64 = jobs.iter().map(|j| j.bytes).sum();
    let seconds = start.elapsed().as_secs_f64();
    if global.json {
        return print(&json!({ "files": files, "bytes": bytes, "seconds": seconds }));
    }
    let rate = ByteSize((bytes as f64 / seconds.max(1e-9)) as u64);
    println!("{files} files, {} in {seconds:.2} s ({rate}/s)", ByteSize(bytes));
    Ok(())
}

fn split_last(mut paths: Vec<PathBuf>) -> Result<(Vec<PathBuf>, PathBuf)> {
    let last = paths.pop().filter(|_| !paths.is_empty());
    let last = last.ok_or_else(|| Usage("say what to copy, and where to".into()))?;
    Ok((paths, last))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| {
        format!("{}: names that are not UTF-8 can be copied through a mount only", path.display())
    })
}

fn last_name(path: &Path) -> Result<PathBuf> {
    match path.file_name() {
        Some(name) => Ok(name.into()),
        // `.` and `..` and `/`.
        None => Ok(path.canonicalize()?.file_name().map(Into::into).unwrap_or_default()),
    }
}

pub(super) async fn put(paths: Vec<PathBuf>, recursive: bool, global: &Global) -> Result<()> {
    let (sources, to) = split_last(paths)?;
    let mut jobs = Vec::new();
    let (_, fs) = connect(global, "put").await?;
    let who = myself()?;
    let into =
        matches!(fs.stat_path(&who, text(&to)?, true).await, Ok(i) if i.kind() == InodeKind::Directory);
    if sources.len() > 1 && !into {
        bail!("{} is not a directory: several files cannot be copied to one name", to.display());
    }
    for source in &sources {
        let to = if into { to.join(last_name(source)?) } else { to.clone() };
        local_jobs(source, &to, recursive, &mut jobs)?;
    }
    let start = Instant::now();
    let bar = bar(jobs.iter().map(|j| j.bytes).sum(), "put", global);
    for job in jobs.iter().filter(|j| matches!(j.kind, JobKind::Directory)) {
        fs.mkdir_all(&who, text(&job.to)?, job.mode).await?;
    }
    let copies = jobs
        .iter()
        .filter(|j| !matches!(j.kind, JobKind::Directory))
        .map(|job| put_one(&fs, &who, job, &bar));
    let mut copies = futures::stream::iter(copies).buffer_unordered(FILES_AT_ONCE);
    while let Some(result) = copies.next().await {
        result?;
    }
    fs.shutdown().await?;
    bar.finish_and_clear();
    summary(&jobs, start, global)
}

fn local_jobs(source: &Path, to: &Path, recursive: bool, jobs: &mut Vec<Job>) -> Result<()> {
    let shown = source.display();
    // A link that is named is followed; one that is met on the way is copied as a link.
    let found = std::fs::metadata(source).with_context(|| format!("cannot read {shown}"))?;
    if found.is_dir() && !recursive {
        bail!("{shown} is a directory: use -r to copy it with its content");
    }
    let mut stack = vec![(source.to_owned(), to.to_owned(), found)];
    while let Some((from, to, found)) = stack.pop() {
        let mode = found.permissions().mode() & 0o7777;
        let kind = found.file_type();
        if kind.is_dir() {
            let listing =
                std::fs::read_dir(&from).with_context(|| format!("cannot list {}", from.display()))?;
            for entry in listing {
                let entry = entry?;
                stack.push((entry.path(), to.join(entry.file_name()), entry.metadata()?));
            }
            jobs.push(Job { from, to, kind: JobKind::Directory, mode, bytes: 0 });
        } else if kind.is_symlink() {
            let target = std::fs::read_link(&from)?.into_os_string().into_vec();
            jobs.push(Job { from, to, kind: JobKind::Symlink(target), mode, bytes: 0 });
        } else if kind.is_file() {
            jobs.push(Job { from, to, kind: JobKind::File, mode, bytes: found.len() });
        } else {
            bail!("{} is neither file, directory nor link", from.display());
        }
    }
    Ok(())
}

async fn put_one(fs: &Fs3, who: &Credentials, job: &Job, bar: &ProgressBar) -> Result<()> {
    let to = text(&job.to)?;
    if let JobKind::Symlink(target) = &job.kind {
        let (dir, name) = to.rsplit_once('/').unwrap_or(("", to));
        let parent = fs.stat_path(who, dir, true).await?;
        fs.symlink(who, parent.inode_id, name.as_bytes(), target).await?;
        return Ok(());
    }
    let mut from =
        std::fs::File::open(&job.from).with_context(|| format!("cannot read {}", job.from.display()))?;
    let file = fs.create_path(who, to, job.mode).await?;
    let mut buffer = vec![0; COPY_BYTES.min(job.bytes as usize + 1)];
    let mut offset = 0;
    loop {
        let got = from.read(&mut buffer).with_context(|| format!("cannot read {}", job.from.display()))?;
        if got == 0 {
            break;
        }
        file.write_at(offset, &buffer[..got], Durability::Buffered).await?;
        offset += got as u64;
        bar.inc(got as u64);
    }
    file.close().await.with_context(|| format!("writing {to}"))?;
    Ok(())
}

pub(super) async fn get(paths: Vec<PathBuf>, recursive: bool, global: &Global) -> Result<()> {
    let (sources, to) = split_last(paths)?;
    let into = to.is_dir();
    if sources.len() > 1 && !into {
        bail!("{} is not a directory: several files cannot be copied to one name", to.display());
    }
    let (_, fs) = connect(global, "get").await?;
    let who = myself()?;
    let mut jobs = Vec::new();
    for source in &sources {
        let name = source.file_name().unwrap_or_default();
        let to = if into { to.join(name) } else { to.clone() };
        remote_jobs(&fs, &who, text(source)?, &to, recursive, &mut jobs).await?;
    }
    let start = Instant::now();
    let bar = bar(jobs.iter().map(|j| j.bytes).sum(), "get", global);
    for job in jobs.iter().filter(|j| matches!(j.kind, JobKind::Directory)) {
        std::fs::create_dir_all(&job.to).with_context(|| format!("cannot make {}", job.to.display()))?;
    }
    let copies = jobs
        .iter()
        .filter(|j| !matches!(j.kind, JobKind::Directory))
        .map(|job| get_one(&fs, &who, job, &bar));
    let mut copies = futures::stream::iter(copies).buffer_unordered(FILES_AT_ONCE);
    while let Some(result) = copies.next().await {
        result?;
    }
    // After their content: a directory may not be writable.
    for job in jobs.iter().rev().filter(|j| matches!(j.kind, JobKind::Directory)) {
        std::fs::set_permissions(&job.to, std::fs::Permissions::from_mode(job.mode))?;
    }
    fs.shutdown().await?;
    bar.finish_and_clear();
    summary(&jobs, start, global)
}

async fn remote_jobs(
    fs: &Fs3,
    who: &Credentials,
    source: &str,
    to: &Path,
    recursive: bool,
    jobs: &mut Vec<Job>,
) -> Result<()> {
    let found = fs.stat_path(who, source, true).await?;
    if found.kind() == InodeKind::Directory && !recursive {
        bail!("{source} is a directory: use -r to copy it with its content");
    }
    let mut stack = vec![(source.to_owned(), to.to_owned(), found)];
    while let Some((from, to, found)) = stack.pop() {
        let (path, mode) = (PathBuf::from(&from), found.mode & 0o7777);
        match found.kind() {
            InodeKind::Directory => {
                for entry in fs.list_inode(who, found.inode_id).await? {
                    let name = String::from_utf8(entry.name).map_err(|name| {
                        let name = String::from_utf8_lossy(name.as_bytes()).into_owned();
                        anyhow::anyhow!(
                            "{from}/{name}: names that are not UTF-8 can be copied through a mount only"
                        )
                    })?;
                    let inode = entry.inode.with_context(|| format!("{from}/{name} has no attributes"))?;
                    stack.push((join(&from, &name), to.join(&name), inode));
                }
                jobs.push(Job { from: path, to, kind: JobKind::Directory, mode, bytes: 0 });
            }
            InodeKind::Symlink => {
                let target = fs3_client::symlink_target(&found).to_vec();
                jobs.push(Job { from: path, to, kind: JobKind::Symlink(target), mode, bytes: 0 });
            }
            InodeKind::File => {
                jobs.push(Job { from: path, to, kind: JobKind::File, mode, bytes: found.length });
            }
            other => bail!("{from} is a {}: only files, directories and links are copied", kind_name(other)),
        }
    }
    Ok(())
}

async fn get_one(fs: &Fs3, who: &Credentials, job: &Job, bar: &ProgressBar) -> Result<()> {
    let writing = || format!("cannot write {}", job.to.display());
    if let JobKind::Symlink(target) = &job.kind {
        return std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target), &job.to)
            .with_context(writing);
    }
    // Whole or not at all: under another name until it is complete.
    let mut part = job.to.clone().into_os_string();
    part.push(".ff-part");
    let part = PathBuf::from(part);
    let result: Result<()> = async {
        let mut out = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(job.mode & 0o777)
            .open(&part)
            .with_context(writing)?;
        let file = fs.open_path(who, text(&job.from)?).await?;
        let mut offset = 0;
        loop {
            let data = file.read_at(offset, COPY_BYTES, false).await?;
            if data.is_empty() {
                break;
            }
            out.write_all(&data).with_context(writing)?;
            offset += data.len() as u64;
            bar.inc(data.len() as u64);
        }
        file.close().await?;
        std::fs::rename(&part, &job.to).with_context(writing)
    }
    .await;
    if result.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_trees_become_jobs_directories_before_their_content() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/b/f"), "12345").unwrap();
        std::os::unix::fs::symlink("b/f", dir.path().join("a/l")).unwrap();
        let mut jobs = Vec::new();
        assert!(local_jobs(&dir.path().join("a"), Path::new("/x"), false, &mut jobs).is_err());
        local_jobs(&dir.path().join("a"), Path::new("/x"), true, &mut jobs).unwrap();
        let mut shown: Vec<_> = jobs.iter().map(|j| (j.to.display().to_string(), j.bytes)).collect();
        let position = |name: &str| shown.iter().position(|(to, _)| to == name).unwrap();
        assert!(position("/x") < position("/x/b") && position("/x/b") < position("/x/b/f"));
        shown.sort();
        assert_eq!(shown.iter().map(|(_, bytes)| bytes).sum::<u64>(), 5);
        assert_eq!(shown.len(), 4);
    }
}
