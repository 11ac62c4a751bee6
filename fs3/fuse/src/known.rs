//! What the kernel was told of inodes and may still believe.
//!
//! A reply to open carries no attributes. To be coherent at open, the mount compares the version
//! that it just got with the one that the kernel was told last: the same means that the kernel's
//! pages and length are good; another means that both must go.

use fs3_client::Inode;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Inodes remembered. Forgetting one costs a needless invalidation, nothing else.
const MOST: usize = 1 << 17;

#[derive(Clone, Copy, PartialEq, Eq)]
struct Seen {
    data: u64,
    generation: u32,
    version: u64,
}

impl Seen {
    fn of(inode: &Inode) -> Self {
        Self { data: inode.data_id, generation: inode.generation, version: inode.version }
    }
}

#[derive(Default)]
struct Entry {
    /// Attributes that the kernel has.
    attributes: Option<Seen>,
    /// State of the file when it was last opened: that of the kernel's pages.
    pages: Option<Seen>,
}

#[derive(Default)]
pub(crate) struct Known {
    entries: Mutex<HashMap<u64, Entry>>,
}

/// What to do at an open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AtOpen {
    /// The kernel's pages are those of this version.
    pub(crate) keep_pages: bool,
    /// The kernel's attributes are of another version.
    pub(crate) drop_attributes: bool,
}

impl Known {
    fn with<T>(&self, id: u64, f: impl FnOnce(&mut Entry) -> T) -> T {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.len() >= MOST && !entries.contains_key(&id) {
            entries.clear();
        }
        f(entries.entry(id).or_default())
    }

    /// The kernel gets `inode` in an answer.
    pub(crate) fn told(&self, inode: &Inode) {
        self.with(inode.inode_id, |entry| entry.attributes = Some(Seen::of(inode)));
    }

    /// A file is being opened and was found as `inode`.
    pub(crate) fn opening(&self, inode: &Inode) -> AtOpen {
        let seen = Seen::of(inode);
        self.with(inode.inode_id, |entry| {
            let answer = AtOpen {
                keep_pages: entry.pages == Some(seen),
                drop_attributes: entry.attributes != Some(seen),
            };
            entry.pages = Some(seen);
            answer
        })
    }

    /// This mount changed the file: the next open starts anew.
    pub(crate) fn changed(&self, id: u64) {
        self.with(id, |entry| *entry = Entry::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_kept_only_for_the_same_version() {
        let known = Known::default();
        let at = |version| Inode { inode_id: 5, data_id: 1, version, ..Inode::default() };
        assert_eq!(known.opening(&at(1)), AtOpen { keep_pages: false, drop_attributes: true });
        known.told(&at(1));
        assert_eq!(known.opening(&at(1)), AtOpen { keep_pages: true, drop_attributes: false });
        assert_eq!(known.opening(&at(2)), AtOpen { keep_pages: false, drop_attributes: true });
        known.told(&at(2));
        assert_eq!(known.opening(&at(2)), AtOpen { keep_pages: true, drop_attributes: false });
        known.changed(5);
        assert_eq!(known.opening(&at(2)), AtOpen { keep_pages: false, drop_attributes: true });
    }
}
