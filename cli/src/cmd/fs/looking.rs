//! `ff fs ls`, `stat` and `rm`.

use super::super::status::table;
use super::{connect, myself, print};
use crate::context::Global;
use anyhow::Result;
use firefly_types::ByteSize;
use fs3_client::{Entry, Inode, InodeKind};
use serde_json::{Value, json};

pub(super) fn kind_name(kind: InodeKind) -> &'static str {
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

pub(super) async fn ls(path: &str, long: bool, global: &Global) -> Result<()> {
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

pub(super) async fn stat(path: &str, global: &Global) -> Result<()> {
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

pub(super) async fn rm(paths: &[String], recursive: bool, global: &Global) -> Result<()> {
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
}
