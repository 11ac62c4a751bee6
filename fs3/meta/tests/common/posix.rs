//! An independent model of a POSIX namespace: plain maps, link counts by counting, ancestry by
//! walking down. For each operation it lists every reason for which POSIX lets it be refused (which
//! one is reported first is open) and, if there is none, what changes.

use firefly_types::ErrorKind::{self, *};
use std::collections::{BTreeMap, BTreeSet};

pub type Name = Vec<u8>;

/// Who asks.
#[derive(Clone, Debug)]
pub struct Who {
    pub client: u64,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

/// A time: of which operation, or set by hand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    Step(u64),
    At(i64, u32),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sort {
    File,
    Dir,
    Link,
    Fifo,
    Device,
}

#[derive(Clone, Debug)]
pub struct Node {
    pub sort: Sort,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub length: u64,
    pub atime: When,
    pub mtime: When,
    pub ctime: When,
    pub names: BTreeMap<Name, u64>,
    pub xattrs: BTreeMap<Name, Vec<u8>>,
    pub target: Vec<u8>,
    pub data: u64,
    pub generation: u32,
    pub cuts: u64,
}

#[derive(Clone, Debug)]
pub struct Session {
    pub inode: u64,
    pub client: u64,
    pub uid: u32,
    pub write: bool,
    pub cuts: u64,
}

#[derive(Clone, Debug, Default)]
pub struct Change {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub length: Option<u64>,
    pub mtime: Option<Option<(i64, u32)>>,
    pub atime: Option<Option<(i64, u32)>>,
}

#[derive(Clone, Debug)]
pub struct Posix {
    pub step: u64,
    pub nodes: BTreeMap<u64, Node>,
    pub sessions: BTreeMap<u64, Session>,
    pub garbage: BTreeSet<(u64, u32)>,
}

pub type Refusals = Vec<ErrorKind>;

impl Posix {
    pub fn new(step: u64) -> Self {
        let now = When::Step(step);
        let root = Node {
            sort: Sort::Dir,
            mode: 0o777,
            uid: 0,
            gid: 0,
            length: 0,
            atime: now,
            mtime: now,
            ctime: now,
            names: BTreeMap::new(),
            xattrs: BTreeMap::new(),
            target: vec![],
            data: 0,
            generation: 0,
            cuts: 0,
        };
        Self { step, nodes: BTreeMap::from([(1, root)]), sessions: BTreeMap::new(), garbage: BTreeSet::new() }
    }

    pub fn links(&self, id: u64) -> u32 {
        let node = &self.nodes[&id];
        if node.sort == Sort::Dir {
            let inside = node.names.values().filter(|c| self.nodes[c].sort == Sort::Dir).count();
            return 2 + inside as u32;
        }
        self.nodes.values().flat_map(|n| n.names.values()).filter(|c| **c == id).count() as u32
    }

    pub fn parent(&self, dir: u64) -> u64 {
        self.nodes.iter().find(|(_, n)| n.names.values().any(|c| *c == dir)).map_or(1, |(id, _)| *id)
    }

    fn inside(&self, top: u64, id: u64) -> bool {
        top == id
            || self.nodes[&top].names.values().any(|c| self.nodes[c].sort == Sort::Dir && self.inside(*c, id))
    }

    pub fn may(&self, who: &Who, id: u64, wanted: u32) -> bool {
        let node = &self.nodes[&id];
        if who.uid == 0 {
            return true;
        }
        let member = who.gid == node.gid || who.groups.contains(&node.gid);
        let bits = match (who.uid == node.uid, member) {
            (true, _) => (node.mode & 0o700) / 0o100,
            (false, true) => (node.mode & 0o070) / 0o010,
            (false, false) => node.mode & 0o007,
        };
        bits & wanted == wanted
    }

    fn is_owner(&self, who: &Who, id: u64) -> bool {
        who.uid == 0 || who.uid == self.nodes[&id].uid
    }

    fn sticky_blocks(&self, who: &Who, dir: u64, victim: u64) -> bool {
        self.nodes[&dir].mode & 0o1000 != 0 && !self.is_owner(who, dir) && !self.is_owner(who, victim)
    }

    fn dir(&self, id: u64) -> Result<&Node, ErrorKind> {
        match self.nodes.get(&id) {
            None => Err(NotFound),
            Some(node) if node.sort == Sort::Dir => Ok(node),
            Some(_) => Err(NotDirectory),
        }
    }

    fn change_rights(&self, who: &Who, dir: u64, refusals: &mut Refusals) {
        if !self.may(who, dir, 1) || !self.may(who, dir, 2) {
            refusals.push(AccessDenied);
        }
    }

    fn touch(&mut self, dir: u64) {
        let now = When::Step(self.step);
        let node = self.nodes.get_mut(&dir).unwrap();
        (node.mtime, node.ctime) = (now, now);
    }

    fn node(&mut self, id: u64) -> &mut Node {
        self.nodes.get_mut(&id).unwrap()
    }

    /// Forgets what neither a name nor a session holds.
    fn sweep(&mut self, id: u64) {
        let open = self.sessions.values().any(|s| s.inode == id);
        let is_dir = self.nodes[&id].sort == Sort::Dir;
        if is_dir || (self.links(id) == 0 && !open) {
            let node = self.nodes.remove(&id).unwrap();
            if node.sort == Sort::File {
                self.garbage.insert((node.data, node.generation));
            }
        }
    }

    fn no_set_id(&mut self, id: u64) {
        let node = self.node(id);
        if node.sort != Sort::Dir {
            node.mode &= !0o4000;
            if node.mode & 0o010 != 0 {
                node.mode &= !0o2000;
            }
        }
    }

    pub fn lookup(&self, who: &Who, parent: u64, name: &[u8]) -> Result<u64, Refusals> {
        let dir = self.dir(parent).map_err(|e| vec![e])?;
        if !self.may(who, parent, 1) {
            return Err(vec![AccessDenied]);
        }
        match name {
            b"." => Ok(parent),
            b".." => Ok(self.parent(parent)),
            _ => dir.names.get(name).copied().ok_or(vec![NotFound]),
        }
    }

    /// Refusals, or the inode that is there already (not exclusive).
    pub fn may_create(
        &self,
        who: &Who,
        parent: u64,
        name: &[u8],
        sort: Sort,
        exclusive: bool,
        open: (bool, bool),
    ) -> Result<Option<u64>, Refusals> {
        let dir = self.dir(parent).map_err(|e| vec![e])?;
        let mut no = vec![];
        if !self.may(who, parent, 1) {
            no.push(AccessDenied);
        }
        if name == b".." {
            no.push(AlreadyExists);
            return Err(no);
        }
        if let Some(there) = dir.names.get(name).copied() {
            let node = &self.nodes[&there];
            if exclusive || sort != Sort::File {
                no.push(AlreadyExists);
            } else if node.sort == Sort::Dir {
                no.push(IsDirectory);
            } else if node.sort != Sort::File {
                no.push(AlreadyExists);
            } else if (open.0 && !self.may(who, there, 2)) || (open.1 && !self.may(who, there, 4)) {
                no.push(AccessDenied);
            }
            return if no.is_empty() { Ok(Some(there)) } else { Err(no) };
        }
        if !self.may(who, parent, 2) {
            no.push(AccessDenied);
        }
        if sort == Sort::Device && who.uid != 0 {
            no.push(PermissionDenied);
        }
        if no.is_empty() { Ok(None) } else { Err(no) }
    }

    #[allow(clippy::too_many_arguments, reason = "a test's table row")]
    pub fn create(
        &mut self,
        who: &Who,
        parent: u64,
        name: &[u8],
        sort: Sort,
        mode: u32,
        target: &[u8],
        id: u64,
        data: u64,
    ) {
        let now = When::Step(self.step);
        let dir = &self.nodes[&parent];
        let (mut mode, mut gid) = (mode, who.gid);
        if dir.mode & 0o2000 != 0 {
            gid = dir.gid;
            if sort == Sort::Dir {
                mode |= 0o2000;
            } else if mode & 0o2010 == 0o2010 && who.uid != 0 && who.gid != gid && !who.groups.contains(&gid)
            {
                mode &= !0o2000;
            }
        }
        if sort == Sort::Link {
            mode = 0o777;
        }
        let node = Node {
            sort,
            mode,
            uid: who.uid,
            gid,
            length: target.len() as u64,
            atime: now,
            mtime: now,
            ctime: now,
            names: BTreeMap::new(),
            xattrs: BTreeMap::new(),
            target: target.to_vec(),
            data,
            generation: 0,
            cuts: 0,
        };
        assert!(self.nodes.insert(id, node).is_none(), "inode {id} was given twice");
        self.node(parent).names.insert(name.to_vec(), id);
        self.touch(parent);
    }

    pub fn open_session(&mut self, who: &Who, inode: u64, session: u64, write: bool) {
        let cuts = self.nodes[&inode].cuts;
        let session_is_new = self
            .sessions
            .insert(session, Session { inode, client: who.client, uid: who.uid, write, cuts })
            .is_none();
        assert!(session_is_new && session != 0);
    }

    pub fn link(&mut self, who: &Who, id: u64, parent: u64, name: &[u8]) -> Result<(), Refusals> {
        let dir = self.dir(parent).map_err(|e| vec![e]);
        let Some(node) = self.nodes.get(&id) else {
            return Err([vec![NotFound], dir.err().unwrap_or(vec![AccessDenied])].concat());
        };
        let dir = dir?;
        let mut no = vec![];
        if node.sort == Sort::Dir {
            no.push(PermissionDenied);
        } else if self.links(id) == 0 {
            no.push(NotFound);
        }
        if dir.names.contains_key(name) {
            no.push(AlreadyExists);
        }
        self.change_rights(who, parent, &mut no);
        if !no.is_empty() {
            return Err(no);
        }
        self.node(parent).names.insert(name.to_vec(), id);
        self.node(id).ctime = When::Step(self.step);
        self.touch(parent);
        Ok(())
    }

    pub fn unlink(&mut self, who: &Who, parent: u64, name: &[u8], directory: bool) -> Result<(), Refusals> {
        let dir = self.dir(parent).map_err(|e| vec![e])?;
        let mut no = vec![];
        self.change_rights(who, parent, &mut no);
        let Some(victim) = dir.names.get(name).copied() else {
            no.push(NotFound);
            return Err(no);
        };
        if self.sticky_blocks(who, parent, victim) {
            no.push(PermissionDenied);
        }
        let node = &self.nodes[&victim];
        match (directory, node.sort == Sort::Dir) {
            (true, false) => no.push(NotDirectory),
            (false, true) => no.push(IsDirectory),
            (true, true) if !node.names.is_empty() => no.push(NotEmpty),
            _ => {}
        }
        if !no.is_empty() {
            return Err(no);
        }
        self.node(parent).names.remove(name);
        self.node(victim).ctime = When::Step(self.step);
        self.touch(parent);
        self.sweep(victim);
        Ok(())
    }

    pub fn rename(
        &mut self,
        who: &Who,
        (p, n): (u64, &[u8]),
        (q, m): (u64, &[u8]),
        flags: u32,
    ) -> Result<(), Refusals> {
        let mut no: Refusals = [p, q].into_iter().filter_map(|d| self.dir(d).err()).collect();
        if !no.is_empty() {
            // The other directory's permissions may be looked at first.
            no.push(AccessDenied);
            return Err(no);
        }
        self.change_rights(who, p, &mut no);
        self.change_rights(who, q, &mut no);
        let Some(source) = self.nodes[&p].names.get(n).copied() else {
            no.push(NotFound);
            return Err(no);
        };
        let target = self.nodes[&q].names.get(m).copied();
        match flags {
            1 if target.is_some() => no.push(AlreadyExists),
            2 if target.is_none() => no.push(NotFound),
            _ => {}
        }
        let is_dir = |id: u64| self.nodes[&id].sort == Sort::Dir;
        let mut movable = |what: u64, to: u64, from: u64| {
            if is_dir(what) && from != to {
                if self.inside(what, to) {
                    no.push(InvalidArgument);
                }
                if !self.may(who, what, 2) {
                    no.push(AccessDenied);
                }
            }
        };
        movable(source, q, p);
        if let Some(target) = target.filter(|t| *t != source) {
            if flags == 2 {
                movable(target, p, q);
            } else {
                match (is_dir(source), is_dir(target)) {
                    (true, false) => no.push(NotDirectory),
                    (false, true) => no.push(IsDirectory),
                    (true, true) if !self.nodes[&target].names.is_empty() => no.push(NotEmpty),
                    _ => {}
                }
            }
            if self.sticky_blocks(who, q, target) {
                no.push(PermissionDenied);
            }
        }
        if self.sticky_blocks(who, p, source) {
            no.push(PermissionDenied);
        }
        if !no.is_empty() {
            return Err(no);
        }
        if target == Some(source) {
            return Ok(());
        }
        let now = When::Step(self.step);
        self.node(p).names.remove(n);
        self.node(q).names.insert(m.to_vec(), source);
        self.node(source).ctime = now;
        if let Some(target) = target {
            self.node(target).ctime = now;
            if flags == 2 {
                self.node(p).names.insert(n.to_vec(), target);
            } else {
                self.sweep(target);
            }
        }
        self.touch(p);
        self.touch(q);
        Ok(())
    }

    fn writes_by_session(&self, who: &Who, id: u64) -> bool {
        self.sessions.values().any(|s| s.inode == id && s.write && s.client == who.client && s.uid == who.uid)
    }

    fn may_write(&self, who: &Who, id: u64) -> bool {
        self.may(who, id, 2) || self.writes_by_session(who, id)
    }

    pub fn setattr(&mut self, who: &Who, id: u64, change: &Change) -> Result<(), Refusals> {
        let Some(node) = self.nodes.get(&id) else { return Err(vec![NotFound]) };
        let (owner, root) = (self.is_owner(who, id), who.uid == 0);
        let mut no = vec![];
        if change.length.is_some() {
            match node.sort {
                Sort::File if !self.may_write(who, id) => no.push(AccessDenied),
                Sort::File => {}
                Sort::Dir => no.push(IsDirectory),
                _ => no.push(InvalidArgument),
            }
        }
        if !root {
            let mine = who.uid == node.uid;
            if change.uid.is_some_and(|uid| !mine || uid != node.uid) {
                no.push(PermissionDenied);
            }
            let joins = |gid: u32| gid == node.gid || gid == who.gid || who.groups.contains(&gid);
            if change.gid.is_some_and(|gid| !mine || !joins(gid)) {
                no.push(PermissionDenied);
            }
        }
        if let Some(mode) = change.mode
            && !owner
        {
            let drops = node.mode & !mode;
            let kills = node.sort == Sort::File && {
                let full = 0o4000 | if node.mode & 0o010 != 0 { 0o2000 } else { 0 };
                mode & !node.mode == 0 && drops != 0 && drops == node.mode & full
            };
            if !(kills && self.may_write(who, id)) {
                no.push(PermissionDenied);
            }
        }
        let times = [change.atime, change.mtime];
        if times.iter().any(Option::is_some) && !owner {
            if times.iter().flatten().any(Option::is_some) {
                no.push(PermissionDenied);
            } else if !self.may_write(who, id) {
                no.push(AccessDenied);
            }
        }
        if !no.is_empty() {
            return Err(no);
        }
        let now = When::Step(self.step);
        if let Some(length) = change.length {
            self.node(id).length = length;
            self.node(id).mtime = now;
            if !root {
                self.no_set_id(id);
            }
            self.cut(who, id);
        }
        if change.uid.is_some() || change.gid.is_some() {
            let node = self.node(id);
            node.uid = change.uid.unwrap_or(node.uid);
            node.gid = change.gid.unwrap_or(node.gid);
            self.no_set_id(id);
        }
        if let Some(mode) = change.mode {
            let node = self.node(id);
            node.mode = mode;
            if !root && who.gid != node.gid && !who.groups.contains(&node.gid) {
                node.mode &= !0o2000;
            }
        }
        let node = self.node(id);
        let pick = |t: Option<(i64, u32)>| t.map_or(now, |(s, n)| When::At(s, n));
        if let Some(t) = change.atime {
            node.atime = pick(t);
        }
        if let Some(t) = change.mtime {
            node.mtime = pick(t);
        }
        node.ctime = now;
        Ok(())
    }

    fn cut(&mut self, who: &Who, id: u64) {
        self.node(id).cuts += 1;
        let cuts = self.nodes[&id].cuts;
        for session in self.sessions.values_mut().filter(|s| s.inode == id && s.client == who.client) {
            session.cuts = cuts;
        }
    }

    pub fn open(
        &mut self,
        who: &Who,
        id: u64,
        write: bool,
        read: bool,
        truncate: bool,
    ) -> Result<(), Refusals> {
        let Some(node) = self.nodes.get(&id) else { return Err(vec![NotFound]) };
        match node.sort {
            Sort::File => {}
            Sort::Dir => return Err(vec![IsDirectory]),
            _ => return Err(vec![InvalidArgument]),
        }
        let wanted = if write || truncate { 2 } else { 0 } | if read || !write { 4 } else { 0 };
        if !self.may(who, id, wanted) {
            return Err(vec![AccessDenied]);
        }
        if truncate {
            let now = When::Step(self.step);
            let node = self.node(id);
            let old = (node.data, node.generation);
            (node.length, node.mtime, node.ctime) = (0, now, now);
            node.generation += 1;
            self.garbage.insert(old);
            if who.uid != 0 {
                self.no_set_id(id);
            }
            self.cut(who, id);
        }
        Ok(())
    }

    fn publish(&mut self, who: &Who, id: u64, length: u64, known: u64) {
        let now = When::Step(self.step);
        let node = self.node(id);
        node.ctime = now;
        if node.cuts == known && length > node.length {
            node.length = length;
            node.mtime = now;
        }
        if who.uid != 0 {
            self.no_set_id(id);
        }
    }

    pub fn sync(&mut self, who: &Who, id: u64, length: u64) -> Result<(), Refusals> {
        let Some(node) = self.nodes.get(&id) else { return Err(vec![NotFound]) };
        if node.sort != Sort::File {
            return Err(vec![InvalidArgument]);
        }
        if !self.may_write(who, id) {
            return Err(vec![AccessDenied]);
        }
        let mine = self.sessions.values().filter(|s| s.inode == id && s.client == who.client && s.write);
        let known = mine.map(|s| s.cuts).max().unwrap_or(node.cuts);
        self.publish(who, id, length, known);
        Ok(())
    }

    pub fn close(&mut self, who: &Who, session: u64, length: Option<u64>) -> Result<(), Refusals> {
        let held = self.sessions[&session].clone();
        if held.client != who.client {
            return Err(vec![PermissionDenied]);
        }
        if let Some(length) = length.filter(|_| held.write) {
            self.publish(who, held.inode, length, held.cuts);
        }
        self.sessions.remove(&session);
        self.sweep(held.inode);
        Ok(())
    }

    /// Rights of the `user.` space.
    pub fn user_xattr_refusals(&self, who: &Who, id: u64, set: bool) -> Refusals {
        let Some(node) = self.nodes.get(&id) else { return vec![NotFound] };
        let plain = matches!(node.sort, Sort::File | Sort::Dir);
        match set {
            true if !plain => vec![PermissionDenied],
            true if node.sort == Sort::Dir && node.mode & 0o1000 != 0 => {
                if self.is_owner(who, id) {
                    vec![]
                } else {
                    vec![PermissionDenied]
                }
            }
            true if !self.may(who, id, 2) => vec![AccessDenied],
            false if !plain => vec![NoAttribute],
            false if !self.may(who, id, 4) => vec![AccessDenied],
            _ => vec![],
        }
    }

    pub fn bytes(&self) -> u64 {
        self.nodes.values().filter(|n| n.sort == Sort::File).map(|n| n.length).sum()
    }
}
