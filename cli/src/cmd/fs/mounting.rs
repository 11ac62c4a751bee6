//! `ff fs mount`, `umount` and `stats`.

use super::super::status::table;
use super::{connect, print};
use crate::context::Global;
use crate::mount::{self, MountProcess, SOURCE_PREFIX};
use anyhow::{Context as _, Result, bail};
use firefly_types::ByteSize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) fn start_mount(dir: &Path, global: &Global) -> Result<()> {
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

pub(super) async fn serve_mount(dir: &Path, global: &Global) -> Result<()> {
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

pub(super) fn umount(dir: &Path, global: &Global) -> Result<()> {
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

pub(super) fn stats(only: Option<&Path>, global: &Global) -> Result<()> {
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
