//! `ff fs`: the file system without and with a mount.

use super::status::table;
use crate::context::{Context, Global, Usage};
use crate::mount::{self, MountProcess, SOURCE_PREFIX};
use anyhow::{Context as _, Result, bail};
use firefly_proto::mgmtd::{LocalState, NodeRole, PublicState, RoutingTable};
use firefly_types::ByteSize;
use fs3_client::path::{COPY_BYTES, join};
use fs3_client::{ClientOptions, Credentials, Durability, Entry, Fs3, Inode, InodeKind};
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Files copied at once by put and get: hides the round trips of small files.
const FILES_AT_ONCE: usize = 8;

/// Paths of the file system begin at its root, with or without a leading `/`.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum FsCommand {
    /// Mount the file system on a directory
    ///
    /// Returns once the mount serves; a process in the background goes on serving it until
    /// `ff fs umount`. Needs root and /dev/fuse. What it logs goes to logs/mount.log in the state
    /// folder.
    Mount {
        /// An empty directory; made if it does not exist
        dir: PathBuf,
        /// Serve the mount in this process until it is unmounted or this process is ended
        #[arg(long)]
        foreground: bool,
    },
    /// Unmount the file system from a directory
    ///
    /// What programs have written is published first. A mount that is in use is taken out of the
    /// tree at once and ends when its last file is closed.
    Umount {
        /// Where it is mounted
        dir: PathBuf,
    },
    /// List a directory
    Ls {
        /// What to list
        #[arg(default_value = "/")]
        path: String,
        /// Modes, owners, sizes and times too
        #[arg(short = 'l', long)]
        long: bool,
    },
    /// Show everything about one file or directory, and where its data is
    Stat {
        /// Which
        path: String,
    },
    /// Copy local files into the file system
    Put {
        /// Copy directories with what is in them
        #[arg(short = 'r', long)]
        recursive: bool,
        /// Local files, then the path in the file system to copy to
        #[arg(required = true, num_args = 2.., value_names = ["LOCAL", "PATH"])]
        paths: Vec<PathBuf>,
    },
    /// Copy files from the file system to the local disk
    Get {
        /// Copy directories with what is in them
        #[arg(short = 'r', long)]
        recursive: bool,
        /// Paths in the file system, then the local path to copy to
        #[arg(required = true, num_args = 2.., value_names = ["PATH", "LOCAL"])]
        paths: Vec<PathBuf>,
    },
    /// Remove files
    Rm {
        /// Remove directories with everything in them
        #[arg(short = 'r', long)]
        recursive: bool,
        /// What to remove
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<String>,
    },
    /// See the replication chains
    #[command(subcommand)]
    Chain(ListCommand),
    /// See the storage targets
    #[command(subcommand)]
    Target(ListCommand),
    /// See the storage and meta servers
    #[command(subcommand)]
    Node(ListCommand),
    /// Show the counters of this cluster's mounts on this machine
    Stats {
        /// Only the mount on this directory
        dir: Option<PathBuf>,
    },
}

/// What there is to see.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum ListCommand {
    /// List all
    Ls,
}

/// Runs `ff fs …`.
pub async fn run(command: FsCommand, global: &Global) -> Result<()> {
    match command {
        FsCommand::Mount { dir, foreground: true } => serve_mount(&dir, global).await,
        FsCommand::Mount { dir, foreground: false } => start_mount(&dir, global),
        FsCommand::Umount { dir } => umount(&dir, global),
        FsCommand::Ls { path, long } => ls(&path, long, global).await,
        FsCommand::Stat { path } => stat(&path, global).await,
        FsCommand::Put { recursive, paths } => put(paths, recursive, global).await,
        FsCommand::Get { recursive, paths } => get(paths, recursive, global).await,
        FsCommand::Rm { recursive, paths } => rm(&paths, recursive, global).await,
        FsCommand::Chain(ListCommand::Ls) => chains(&routing(global).await?, global.json),
        FsCommand::Target(ListCommand::Ls) => targets(&routing(global).await?, global.json),
        FsCommand::Node(ListCommand::Ls) => nodes(&routing(global).await?, global.json),
        FsCommand::Stats { dir } => stats(dir.as_deref(), global),
    }
}

async fn connect(global: &Global, purpose: &str) -> Result<(Context, Arc<Fs3>)> {
    let context = global.open()?;
    context.open_network()?;
    let identity = context.identity(&format!("ff fs {purpose}"))?;
    let fs = Fs3::connect(ClientOptions::new(context.cluster.manager.clone(), identity)).await?;
    Ok((context, fs))
}

fn myself() -> Result<Credentials> {
    use rustix::process::{getegid, geteuid, getgroups};
    let groups = getgroups()?.into_iter().map(|g| g.as_raw()).collect();
    Ok(Credentials { uid: geteuid().as_raw(), gid: getegid().as_raw(), groups })
}

fn print(value: &Value) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

// ---------------------------------------------------------------------------------------------
// Mounting

fn start_mount(dir: &Path, global: &Global) -> Result<()> {
    let context = global.open()?;
    if !rustix::process::geteuid().is_root() {
        bail!(fs3_fuse::MountError::NotRoot);
    }
    let dir = std::path::absolute(dir)?;
    if mount::mounts()?.iter().any(|m| m.mountpoint == dir) {
        bail!("{} is mounted already: unmount it first with `ff fs umount {}`", dir.display(), dir.display());
    }
    let ff = std::env::current_exe().context("cannot find this program's own file")?;
    MountProcess::start(&ff, &context.state, &dir)?.leave_running();
    if global.json {
        return print(&json!({ "mounted": dir }));
    }
    println!("mounted on {}; `ff fs umount {}` ends it", dir.display(), dir.display());
    Ok(())
}

async fn serve_mount(dir: &Path, global: &Global) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let dir = std::path::absolute(dir)?;
    let (context, fs) = connect(global, &format!("mount {}", dir.display())).await?;
    let source = format!("{SOURCE_PREFIX}{}", context.cluster.cluster_id);
    let options = fs3_fuse::MountOptions { source, ..Default::default() };
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mounted = fs3_fuse::mount(fs.clone(), &dir, options)?;
    // umount(8) ends the mount from outside and tells nobody.
    while !mounted.ended() {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
    }
    let ended = tokio::task::spawn_blocking(move || mounted.unmount()).await?;
    let published = fs.shutdown().await;
    ended.with_context(|| format!("unmounting {}", dir.display()))?;
    published.context("what was written last is not published")?;
    Ok(())
}

fn umount(dir: &Path, global: &Global) -> Result<()> {
    let dir = std::path::absolute(dir)?;
    if !mount::mounts()?.iter().any(|m| m.mountpoint == dir) {
        bail!("{} is not a mount of fs3: `ff fs stats` lists them", dir.display());
    }
    mount::unmount(&dir)?;
    if global.json {
        return print(&json!({ "unmounted": dir }));
    }
    Ok(())
}

fn stats(only: Option<&Path>, global: &Global) -> Result<()> {
    let context = global.open()?;
    let source = format!("{SOURCE_PREFIX}{}", context.cluster.cluster_id);
    let mut dirs: Vec<PathBuf> =
        mount::mounts()?.into_iter().filter(|m| m.source == source).map(|m| m.mountpoint).collect();
    if let Some(only) = only {
        let only = std::path::absolute(only)?;
        dirs.retain(|dir| *dir == only);
        if dirs.is_empty() {
            bail!("{} is not a mount of this cluster", only.display());
        }
    }
    let mut found = Vec::new();
    for dir in dirs {
        let stats = mount::stats(&dir)?;
        found.push((dir, stats));
    }
    if global.json {
        let all: Vec<Value> = found.iter().map(|(dir, s)| json!({ "mountpoint": dir, "stats": s })).collect();
        return print(&json!(all));
    }
    if found.is_empty() {
        println!("no mount of this cluster on this machine; `ff fs mount DIR` makes one");
        return Ok(());
    }
    let mut out = table(&["MOUNT", "READ", "WRITTEN", "RETRIES", "LONGEST PAUSE"]);
    for (dir, s) in found {
        out.add_row([
            dir.display().to_string(),
            ByteSize(s.bytes_read).to_string(),
            ByteSize(s.bytes_written).to_string(),
            s.retries.to_string(),
            format!("{} ms", s.longest_pause_ms),
        ]);
    }
    println!("{out}");
    Ok(())
}

// ---------------------------------------------------------------------------------------------
// Looking

fn kind_name(kind: InodeKind) -> &'static str {
    match kind {
        InodeKind::Directory => "directory",
        InodeKind::Symlink => "symlink",
        InodeKind::Fifo => "fifo",
        InodeKind::Socket => "socket",
        InodeKind::CharDevice => "char-device",
        InodeKind::BlockDevice => "block-device",
        InodeKind::File | InodeKind::Unspecified => "file",
    }
}

/// As `ls -l` shows it.
fn mode_text(inode: &Inode) -> String {
    let kind = match inode.kind() {
        InodeKind::Directory => 'd',
        InodeKind::Symlink => 'l',
        InodeKind::Fifo => 'p',
        InodeKind::Socket => 's',
        InodeKind::CharDevice => 'c',
        InodeKind::BlockDevice => 'b',
        InodeKind::File | InodeKind::Unspecified => '-',
    };
    let mut text = String::from(kind);
    for (shift, special, with, without) in
        [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')]
    {
        let bits = inode.mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (inode.mode & special != 0, bits & 1 != 0) {
            (true, true) => with,
            (true, false) => without,
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// ISO 8601 in UTC, from the civil-from-days algorithm of Howard Hinnant's date notes.
fn time_text(time: Option<&fs3_client::Time>) -> String {
    let Some(time) = time else { return "-".into() };
    let (days, second) = (time.seconds.div_euclid(86_400), time.seconds.rem_euclid(86_400));
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

fn name_text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

fn inode_json(name: Option<&[u8]>, inode: &Inode) -> Value {
    let time = |t: Option<&fs3_client::Time>| t.map(|t| json!({ "seconds": t.seconds, "nanos": t.nanos }));
    let mut value = json!({
        "inode": inode.inode_id,
        "kind": kind_name(inode.kind()),
        "mode": format!("{:04o}", inode.mode),
        "uid": inode.uid,
        "gid": inode.gid,
        "links": inode.nlink,
        "length": inode.length,
        "mtime": time(inode.mtime.as_ref()),
    });
    if let Some(name) = name {
        value["name"] = name_text(name).into();
    }
    if inode.kind() == InodeKind::Symlink {
        value["target"] = name_text(fs3_client::symlink_target(inode)).into();
    }
    value
}

async fn ls(path: &str, long: bool, global: &Global) -> Result<()> {
    let (_, fs) = connect(global, "ls").await?;
    let who = myself()?;
    let found = fs.stat_path(&who, path, true).await?;
    let mut entries = if found.kind() == InodeKind::Directory {
        fs.list(&who, path).await?
    } else {
        let entry =
            Entry { name: path.into(), inode_id: found.inode_id, kind: found.kind, ..Entry::default() };
        vec![Entry { inode: Some(found), ..entry }]
    };
    fs.shutdown().await?;
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    if global.json {
        let all: Vec<Value> =
            entries.iter().map(|e| inode_json(Some(&e.name), &e.inode.clone().unwrap_or_default())).collect();
        return print(&json!(all));
    }
    if !long {
        for entry in &entries {
            let slash = if entry.kind() == InodeKind::Directory { "/" } else { "" };
            println!("{}{slash}", name_text(&entry.name));
        }
        return Ok(());
    }
    let mut out = table(&["MODE", "LINKS", "UID", "GID", "SIZE", "MODIFIED", "NAME"]);
    for entry in &entries {
        let inode = entry.inode.clone().unwrap_or_default();
        let mut name = name_text(&entry.name);
        if inode.kind() == InodeKind::Symlink {
            name = format!("{name} -> {}", name_text(fs3_client::symlink_target(&inode)));
        }
        out.add_row([
            mode_text(&inode),
            inode.nlink.to_string(),
            inode.uid.to_string(),
            inode.gid.to_string(),
            inode.length.to_string(),
            time_text(inode.mtime.as_ref()),
            name,
        ]);
    }
    println!("{out}");
    Ok(())
}

async fn stat(path: &str, global: &Global) -> Result<()> {
    let (_, fs) = connect(global, "stat").await?;
    let inode = fs.stat_path(&myself()?, path, false).await?;
    fs.shutdown().await?;
    let layout = inode.layout.clone();
    if global.json {
        let mut value = inode_json(None, &inode);
        value["path"] = path.into();
        if let Some(layout) = layout {
            value["data"] = json!({
                "data_id": inode.data_id,
                "generation": inode.generation,
                "chunk_bytes": layout.chunk_bytes,
                "chains": layout.chains,
            });
        }
        return print(&value);
    }
    let mut rows = vec![
        ("path", path.to_owned()),
        ("kind", kind_name(inode.kind()).to_owned()),
        ("inode", inode.inode_id.to_string()),
        ("mode", format!("{} ({:04o})", mode_text(&inode), inode.mode)),
        ("owner", format!("{}:{}", inode.uid, inode.gid)),
        ("links", inode.nlink.to_string()),
        ("size", format!("{} ({} bytes)", ByteSize(inode.length), inode.length)),
        ("modified", time_text(inode.mtime.as_ref())),
        ("changed", time_text(inode.ctime.as_ref())),
    ];
    if inode.kind() == InodeKind::Symlink {
        rows.push(("target", name_text(fs3_client::symlink_target(&inode))));
    }
    if let Some(layout) = layout {
        rows.push(("data", format!("d{} generation {}", inode.data_id, inode.generation)));
        let chunks = inode.length.div_ceil(u64::from(layout.chunk_bytes.max(1)));
        rows.push(("chunks", format!("{chunks} of {}", ByteSize(layout.chunk_bytes.into()))));
        let chains: Vec<String> = layout.chains.iter().map(|c| format!("c{c}")).collect();
        rows.push(("chains", chains.join(" ")));
    }
    for (name, value) in rows {
        println!("{name:>9}  {value}");
    }
    Ok(())
}

async fn rm(paths: &[String], recursive: bool, global: &Global) -> Result<()> {
    let (_, fs) = connect(global, "rm").await?;
    let who = myself()?;
    let mut removed = 0;
    for path in paths {
        removed += fs.remove_path(&who, path, recursive).await?;
    }
    fs.shutdown().await?;
    if global.json {
        return print(&json!({ "removed": removed }));
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------
// Copying

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

async fn put(paths: Vec<PathBuf>, recursive: bool, global: &Global) -> Result<()> {
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

async fn get(paths: Vec<PathBuf>, recursive: bool, global: &Global) -> Result<()> {
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

// ---------------------------------------------------------------------------------------------
// The cluster

async fn routing(global: &Global) -> Result<RoutingTable> {
    crate::connect::routing(&mut global.open()?.manager().await?).await
}

fn state_name(state: PublicState) -> &'static str {
    match state {
        PublicState::Serving => "serving",
        PublicState::Syncing => "syncing",
        PublicState::Waiting => "waiting",
        PublicState::Lastsrv => "lastsrv",
        PublicState::Offline => "offline",
        PublicState::Unspecified => "unknown",
    }
}

fn local_name(state: LocalState) -> &'static str {
    match state {
        LocalState::UpToDate => "up-to-date",
        LocalState::Online => "online",
        LocalState::Offline => "offline",
        LocalState::Unspecified => "unknown",
    }
}

fn role_name(role: NodeRole) -> &'static str {
    match role {
        NodeRole::Storage => "storage",
        NodeRole::Meta => "meta",
        NodeRole::Unspecified => "unknown",
    }
}

fn chains(routing: &RoutingTable, as_json: bool) -> Result<()> {
    let node_of =
        |target: u32| routing.targets.iter().find(|t| t.target_id == target).map_or(0, |t| t.node_id);
    let members = |chain: &firefly_proto::mgmtd::ChainInfo| -> Vec<(u32, u32, &'static str)> {
        chain
            .targets
            .iter()
            .zip(chain.states())
            .map(|(target, state)| (*target, node_of(*target), state_name(state)))
            .collect()
    };
    if as_json {
        let all: Vec<Value> = routing
            .chains
            .iter()
            .map(|chain| {
                let targets: Vec<Value> = members(chain)
                    .into_iter()
                    .map(|(target, node, state)| json!({ "target": target, "node": node, "state": state }))
                    .collect();
                json!({ "chain": chain.chain_id, "version": chain.version, "targets": targets })
            })
            .collect();
        return print(&json!(all));
    }
    let mut out = table(&["CHAIN", "VERSION", "HEALTH", "TARGETS, HEAD FIRST"]);
    for chain in &routing.chains {
        let members = members(chain);
        let serving = members.iter().filter(|m| m.2 == "serving").count();
        let health = match serving {
            0 => "down",
            n if n == members.len() => "whole",
            n if n < routing.min_write_replicas as usize => "read-only",
            _ => "degraded",
        };
        let shown: Vec<String> = members.iter().map(|(t, n, state)| format!("t{t}@n{n} {state}")).collect();
        out.add_row([
            format!("c{}", chain.chain_id),
            chain.version.to_string(),
            health.to_owned(),
            shown.join(", "),
        ]);
    }
    println!("{out}");
    Ok(())
}

fn targets(routing: &RoutingTable, as_json: bool) -> Result<()> {
    if as_json {
        let all: Vec<Value> = routing
            .targets
            .iter()
            .map(|t| {
                json!({
                    "target": t.target_id, "node": t.node_id, "chain": t.chain_id,
                    "state": state_name(t.state()), "local_state": local_name(t.local_state()),
                    "used_bytes": t.used_bytes, "capacity_bytes": t.capacity_bytes,
                    "reason": t.reason, "volatile": t.is_volatile,
                })
            })
            .collect();
        return print(&json!(all));
    }
    let mut out = table(&["TARGET", "NODE", "CHAIN", "STATE", "LOCALLY", "USED", "CAPACITY", "REMARK"]);
    for t in &routing.targets {
        let remark = if t.is_volatile && t.reason.is_empty() { "lost at power cut" } else { &t.reason };
        out.add_row([
            format!("t{}", t.target_id),
            format!("n{}", t.node_id),
            format!("c{}", t.chain_id),
            state_name(t.state()).to_owned(),
            local_name(t.local_state()).to_owned(),
            ByteSize(t.used_bytes).to_string(),
            ByteSize(t.capacity_bytes).to_string(),
            remark.to_owned(),
        ]);
    }
    println!("{out}");
    Ok(())
}

fn nodes(routing: &RoutingTable, as_json: bool) -> Result<()> {
    if as_json {
        let all: Vec<Value> = routing
            .nodes
            .iter()
            .map(|n| {
                json!({
                    "node": n.node_id, "role": role_name(n.role()), "address": n.address,
                    "alive": n.alive, "silent_ms": n.silent_ms,
                })
            })
            .collect();
        return print(&json!(all));
    }
    let mut out = table(&["NODE", "ROLE", "ADDRESS", "STATE", "LAST HEARD"]);
    for n in &routing.nodes {
        out.add_row([
            format!("n{}", n.node_id),
            role_name(n.role()).to_owned(),
            n.address.clone(),
            if n.alive { "alive" } else { "dead" }.to_owned(),
            format!("{} ms ago", n.silent_ms),
        ]);
    }
    println!("{out}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_and_times_read_as_people_know_them() {
        let mode = |mode, kind: InodeKind| mode_text(&Inode { mode, kind: kind.into(), ..Inode::default() });
        assert_eq!(mode(0o644, InodeKind::File), "-rw-r--r--");
        assert_eq!(mode(0o1777, InodeKind::Directory), "drwxrwxrwt");
        assert_eq!(mode(0o6744, InodeKind::File), "-rwsr-Sr--");
        let time = |seconds| time_text(Some(&fs3_client::Time { seconds, nanos: 0 }));
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(time(-1), "1969-12-31T23:59:59Z");
    }

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
