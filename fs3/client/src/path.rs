//! Paths over inodes, for programs without a mount: the command line's `ls`, `stat`, `put`, `get`,
//! `rm`.

use crate::{Credentials, Durability, Entry, Fs3, FsError, Inode, InodeKind, OpenMode, ROOT};
use firefly_types::ErrorKind;

/// Symbolic links followed in one path before it counts as a loop, as Linux does.
const MOST_LINKS: u32 = 40;

/// Entries asked for at once.
const PAGE: u32 = 1000;

/// Bytes read or written at once by the copying helpers.
pub const COPY_BYTES: usize = 4 << 20;

fn parts(path: &str) -> impl DoubleEndedIterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty() && *part != ".")
}

/// Joins a directory's path and a name.
pub fn join(dir: &str, name: &str) -> String {
    format!("{}/{name}", dir.trim_end_matches('/'))
}

fn about(path: &str, error: FsError) -> FsError {
    FsError::invalid(error.kind(), format!("{path}: {error}"))
}

impl Fs3 {
    /// The inode at `path`, from the root; symbolic links are followed, the last one only if
    /// `follow`.
    pub async fn stat_path(&self, who: &Credentials, path: &str, follow: bool) -> Result<Inode, FsError> {
        self.walk(who, path, follow).await.map_err(|error| about(path, error))
    }

    async fn walk(&self, who: &Credentials, path: &str, follow: bool) -> Result<Inode, FsError> {
        let mut rest: Vec<String> = parts(path).rev().map(str::to_owned).collect();
        let mut trail = vec![self.getattr(ROOT).await?];
        let mut links = 0;
        while let Some(part) = rest.pop() {
            if part == ".." {
                if trail.len() > 1 {
                    trail.pop();
                }
                continue;
            }
            let parent = trail.last().map_or(ROOT, |i| i.inode_id);
            let inode = self.lookup(who, parent, part.as_bytes()).await?;
            if inode.kind() == InodeKind::Symlink && (follow || !rest.is_empty()) {
                links += 1;
                if links > MOST_LINKS {
                    return Err(FsError::invalid(ErrorKind::Loop, "too many symbolic links"));
                }
                let target = String::from_utf8_lossy(crate::symlink_target(&inode));
                if target.starts_with('/') {
                    trail.truncate(1);
                }
                rest.extend(parts(&target).rev().map(str::to_owned));
                continue;
            }
            if !rest.is_empty() && inode.kind() != InodeKind::Directory {
                return Err(FsError::invalid(
                    ErrorKind::NotDirectory,
                    format!("{part:?} is not a directory"),
                ));
            }
            trail.push(inode);
        }
        trail.pop().ok_or_else(|| FsError::invalid(ErrorKind::Internal, "a path without a root"))
    }

    /// Splits `path` into the inode of its directory and its last name.
    async fn parent_of<'a>(&self, who: &Credentials, path: &'a str) -> Result<(Inode, &'a str), FsError> {
        let trimmed = path.trim_end_matches('/');
        let (dir, name) = trimmed.rsplit_once('/').unwrap_or(("", trimmed));
        if name.is_empty() || name == "." || name == ".." {
            return Err(FsError::invalid(
                ErrorKind::InvalidArgument,
                format!("{path:?} names no entry of a directory"),
            ));
        }
        let parent = self.stat_path(who, dir, true).await?;
        if parent.kind() != InodeKind::Directory {
            return Err(FsError::invalid(ErrorKind::NotDirectory, format!("{dir}: not a directory")));
        }
        Ok((parent, name))
    }

    /// All entries of the directory at `path`, with attributes, by name.
    pub async fn list(&self, who: &Credentials, path: &str) -> Result<Vec<Entry>, FsError> {
        let dir = self.stat_path(who, path, true).await?;
        if dir.kind() != InodeKind::Directory {
            return Err(FsError::invalid(ErrorKind::NotDirectory, format!("{path}: not a directory")));
        }
        self.list_inode(who, dir.inode_id).await.map_err(|error| about(path, error))
    }

    /// All entries of a directory, with attributes.
    pub async fn list_inode(&self, who: &Credentials, id: u64) -> Result<Vec<Entry>, FsError> {
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let cursor = entries.last().map(|e| e.cursor.clone()).unwrap_or_default();
            let page = self.readdir(who, id, &cursor, PAGE, true).await?;
            entries.extend(page.entries);
            if page.end {
                return Ok(entries);
            }
        }
    }

    /// Makes the directory at `path` and those above it; existing ones are fine.
    pub async fn mkdir_all(&self, who: &Credentials, path: &str, mode: u32) -> Result<Inode, FsError> {
        let mut at = self.getattr(ROOT).await?;
        let mut reached = String::new();
        for part in parts(path) {
            reached = join(&reached, part);
            at = match self.stat_path(who, &reached, true).await {
                Ok(inode) => inode,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    match self.mkdir(who, at.inode_id, part.as_bytes(), mode).await {
                        Ok(inode) => inode,
                        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                            self.stat_path(who, &reached, true).await?
                        }
                        Err(error) => return Err(about(&reached, error)),
                    }
                }
                Err(error) => return Err(error),
            };
            if at.kind() != InodeKind::Directory {
                return Err(FsError::invalid(ErrorKind::NotDirectory, format!("{reached}: not a directory")));
            }
        }
        Ok(at)
    }

    /// Opens (making it if needed) the file at `path` for writing, emptied.
    pub async fn create_path(
        &self,
        who: &Credentials,
        path: &str,
        mode: u32,
    ) -> Result<crate::File, FsError> {
        let (parent, name) = self.parent_of(who, path).await?;
        let open = OpenMode { write: true, truncate: true, ..OpenMode::default() };
        let (_, file) = self
            .create(who, parent.inode_id, name.as_bytes(), mode, false, open)
            .await
            .map_err(|error| about(path, error))?;
        Ok(file)
    }

    /// Opens the file at `path` for reading.
    pub async fn open_path(&self, who: &Credentials, path: &str) -> Result<crate::File, FsError> {
        let inode = self.stat_path(who, path, true).await?;
        match inode.kind() {
            InodeKind::File => {}
            InodeKind::Directory => {
                return Err(FsError::invalid(ErrorKind::IsDirectory, format!("{path}: is a directory")));
            }
            _ => {
                return Err(FsError::invalid(
                    ErrorKind::InvalidArgument,
                    format!("{path}: not a regular file"),
                ));
            }
        }
        let (_, file) =
            self.open(who, inode.inode_id, OpenMode::default()).await.map_err(|error| about(path, error))?;
        Ok(file)
    }

    /// Writes a whole file.
    pub async fn write_file(&self, who: &Credentials, path: &str, data: &[u8]) -> Result<(), FsError> {
        let file = self.create_path(who, path, 0o644).await?;
        file.write_at(0, data, Durability::Buffered).await?;
        file.close().await
    }

    /// Reads a whole file into memory.
    pub async fn read_file(&self, who: &Credentials, path: &str) -> Result<Vec<u8>, FsError> {
        let file = self.open_path(who, path).await?;
        let mut out = Vec::new();
        loop {
            let data = file.read_at(out.len() as u64, COPY_BYTES, false).await?;
            if data.is_empty() {
                file.close().await?;
                return Ok(out);
            }
            out.extend_from_slice(&data);
        }
    }

    /// Removes what `path` names; a directory with everything in it if `recursive`. Returns how
    /// many names it removed.
    pub async fn remove_path(&self, who: &Credentials, path: &str, recursive: bool) -> Result<u64, FsError> {
        let (parent, name) = self.parent_of(who, path).await?;
        let inode =
            self.lookup(who, parent.inode_id, name.as_bytes()).await.map_err(|error| about(path, error))?;
        if inode.kind() != InodeKind::Directory {
            self.unlink(who, parent.inode_id, name.as_bytes(), false).await?;
            return Ok(1);
        }
        if !recursive {
            return Err(FsError::invalid(
                ErrorKind::IsDirectory,
                format!("{path}: is a directory; use -r to remove it with its content"),
            ));
        }
        // Depth first without recursion: a directory is met twice, before and after its content.
        let mut removed = 0;
        let mut stack = vec![(parent.inode_id, name.as_bytes().to_vec(), inode.inode_id, false)];
        while let Some((parent, name, id, emptied)) = stack.pop() {
            if emptied {
                self.unlink(who, parent, &name, true).await.map_err(|error| about(path, error))?;
                removed += 1;
                continue;
            }
            stack.push((parent, name, id, true));
            for entry in self.list_inode(who, id).await? {
                if entry.kind() == InodeKind::Directory {
                    stack.push((id, entry.name, entry.inode_id, false));
                } else {
                    self.unlink(who, id, &entry.name, false).await.map_err(|error| about(path, error))?;
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }
}
