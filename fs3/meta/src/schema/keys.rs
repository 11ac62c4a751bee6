//! Keys. Numbers are big-endian so that they sort; the first byte `m` keeps the namespace apart
//! from whatever else shares the store, the second says what the key is for.

use crate::error::MetaError;
use firefly_types::{ClientId, DataId, Generation, InodeId};

/// Kinds of key. Never reused.
mod tag {
    pub(super) const INODE: u8 = b'I';
    pub(super) const DIR_TIMES: u8 = b'T';
    pub(super) const DIR_LINKS: u8 = b'L';
    pub(super) const DENTRY: u8 = b'D';
    pub(super) const XATTR: u8 = b'X';
    pub(super) const SESSION: u8 = b'S';
    pub(super) const CLIENT_SESSION: u8 = b'K';
    pub(super) const CLIENT: u8 = b'C';
    pub(super) const JOB: u8 = b'J';
    pub(super) const LANE: u8 = b'R';
    pub(super) const USAGE: u8 = b'F';
    pub(super) const GARBAGE: u8 = b'G';
    pub(super) const COUNTER: u8 = b'N';
}

/// Half-open range of keys.
pub type KeyRange = (Vec<u8>, Vec<u8>);

fn key(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let mut key = Vec::with_capacity(2 + parts.iter().map(|p| p.len()).sum::<usize>());
    key.extend([b'm', tag]);
    for part in parts {
        key.extend_from_slice(part);
    }
    key
}

/// Everything that starts with `prefix`.
fn under(prefix: Vec<u8>) -> KeyRange {
    let mut end = prefix.clone();
    // The first two bytes are letters, so some byte can always be raised.
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    (prefix, end)
}

/// The key right after `key`: where a scan goes on.
pub fn after(key: &[u8]) -> Vec<u8> {
    let mut next = key.to_vec();
    next.push(0);
    next
}

/// An inode.
pub fn inode(id: InodeId) -> Vec<u8> {
    key(tag::INODE, &[&id.0.to_be_bytes()])
}

/// All inodes.
pub fn inodes() -> KeyRange {
    under(key(tag::INODE, &[]))
}

/// Times of a directory's content. Apart from the inode so that creating two names in one
/// directory does not conflict: both write this blindly, neither reads it.
pub fn dir_times(id: InodeId) -> Vec<u8> {
    key(tag::DIR_TIMES, &[&id.0.to_be_bytes()])
}

/// How many directories a directory has in it. Apart from the inode so that making a directory
/// conflicts only with making or removing another one beside it.
pub fn dir_links(id: InodeId) -> Vec<u8> {
    key(tag::DIR_LINKS, &[&id.0.to_be_bytes()])
}

/// A name in a directory.
pub fn dentry(parent: InodeId, name: &[u8]) -> Vec<u8> {
    key(tag::DENTRY, &[&parent.0.to_be_bytes(), name])
}

/// All names in a directory, in byte order.
pub fn dentries(parent: InodeId) -> KeyRange {
    under(dentry(parent, b""))
}

/// The name in a dentry's key.
pub fn dentry_name(key: &[u8]) -> Result<&[u8], MetaError> {
    key.get(10..).filter(|name| !name.is_empty()).ok_or_else(|| short("directory entry key"))
}

/// An extended attribute.
pub fn xattr(id: InodeId, name: &[u8]) -> Vec<u8> {
    key(tag::XATTR, &[&id.0.to_be_bytes(), name])
}

/// All extended attributes of an inode.
pub fn xattrs(id: InodeId) -> KeyRange {
    under(xattr(id, b""))
}

/// The name in an attribute's key.
pub fn xattr_name(key: &[u8]) -> Result<&[u8], MetaError> {
    key.get(10..).ok_or_else(|| short("attribute key"))
}

/// An open session on a file.
pub fn session(id: InodeId, session: u64) -> Vec<u8> {
    key(tag::SESSION, &[&id.0.to_be_bytes(), &session.to_be_bytes()])
}

/// All open sessions on a file.
pub fn sessions(id: InodeId) -> KeyRange {
    under(key(tag::SESSION, &[&id.0.to_be_bytes()]))
}

/// The same session by client; the value is the inode's number, big-endian.
pub fn client_session(client: ClientId, session: u64) -> Vec<u8> {
    key(tag::CLIENT_SESSION, &[&client.0.to_be_bytes(), &session.to_be_bytes()])
}

/// All sessions of a client.
pub fn client_sessions(client: ClientId) -> KeyRange {
    under(key(tag::CLIENT_SESSION, &[&client.0.to_be_bytes()]))
}

/// The session in a key of [`client_sessions`].
pub fn client_session_id(key: &[u8]) -> Result<u64, MetaError> {
    number(key, 10, "client session key")
}

/// What is known of a client.
pub fn client(id: ClientId) -> Vec<u8> {
    key(tag::CLIENT, &[&id.0.to_be_bytes()])
}

/// All clients.
pub fn clients() -> KeyRange {
    under(key(tag::CLIENT, &[]))
}

/// The client in a key of [`clients`].
pub fn client_id(key: &[u8]) -> Result<ClientId, MetaError> {
    number(key, 2, "client key").map(ClientId)
}

/// The newest attempt of a job that was seen; the value is four bytes, big-endian.
pub fn job(id: u64) -> Vec<u8> {
    key(tag::JOB, &[&id.to_be_bytes()])
}

/// The last request executed on one lane of one client, with its reply.
pub fn lane(client: ClientId, channel: u32) -> Vec<u8> {
    key(tag::LANE, &[&client.0.to_be_bytes(), &channel.to_be_bytes()])
}

/// All lanes of a client.
pub fn lanes(client: ClientId) -> KeyRange {
    under(key(tag::LANE, &[&client.0.to_be_bytes()]))
}

/// What the requests of one lane have added to the totals of the file system. One per lane since
/// a lane never has two requests at once: the totals cost no conflict.
pub fn usage(client: ClientId, channel: u32) -> Vec<u8> {
    key(tag::USAGE, &[&client.0.to_be_bytes(), &channel.to_be_bytes()])
}

/// Where workers count, and where the counts of expired clients are folded in.
pub fn usage_base() -> Vec<u8> {
    usage(ClientId(0), 0)
}

/// All counts: their sum is the total.
pub fn usages() -> KeyRange {
    under(key(tag::USAGE, &[]))
}

/// The counts of one client.
pub fn client_usages(client: ClientId) -> KeyRange {
    under(key(tag::USAGE, &[&client.0.to_be_bytes()]))
}

/// Data whose chunks are to be removed.
pub fn garbage(data: DataId, generation: Generation) -> Vec<u8> {
    key(tag::GARBAGE, &[&data.0.to_be_bytes(), &generation.0.to_be_bytes()])
}

/// The whole garbage queue.
pub fn garbages() -> KeyRange {
    under(key(tag::GARBAGE, &[]))
}

/// The data in a key of [`garbages`].
pub fn garbage_id(key: &[u8]) -> Result<(DataId, Generation), MetaError> {
    let data = number(key, 2, "garbage key")?;
    let generation = key
        .get(10..14)
        .and_then(|b| b.try_into().ok())
        .map(u32::from_be_bytes)
        .ok_or_else(|| short("garbage key"))?;
    Ok((DataId(data), Generation(generation)))
}

/// The next unused number of one sort (`inode`, `data`, `session`), eight bytes big-endian.
pub fn counter(name: &str) -> Vec<u8> {
    key(tag::COUNTER, &[name.as_bytes()])
}

fn number(key: &[u8], at: usize, what: &'static str) -> Result<u64, MetaError> {
    key.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes).ok_or_else(|| short(what))
}

fn short(what: &'static str) -> MetaError {
    MetaError::Corrupt { what, why: "it is too short".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_keys() {
        let id = InodeId(0x0102_0304_0506_0708);
        let n = [1, 2, 3, 4, 5, 6, 7, 8];
        let joined = |tag: u8, parts: &[&[u8]]| {
            let mut all = vec![b'm', tag];
            parts.iter().for_each(|p| all.extend_from_slice(p));
            all
        };
        assert_eq!(inode(id), joined(b'I', &[&n]));
        assert_eq!(dir_times(id), joined(b'T', &[&n]));
        assert_eq!(dir_links(id), joined(b'L', &[&n]));
        assert_eq!(dentry(id, b"a\xff"), joined(b'D', &[&n, b"a\xff"]));
        assert_eq!(xattr(id, b"user.x"), joined(b'X', &[&n, b"user.x"]));
        assert_eq!(session(id, 9), joined(b'S', &[&n, &[0, 0, 0, 0, 0, 0, 0, 9]]));
        assert_eq!(client_session(ClientId(id.0), 9), joined(b'K', &[&n, &[0, 0, 0, 0, 0, 0, 0, 9]]));
        assert_eq!(client(ClientId(id.0)), joined(b'C', &[&n]));
        assert_eq!(job(id.0), joined(b'J', &[&n]));
        assert_eq!(lane(ClientId(id.0), 3), joined(b'R', &[&n, &[0, 0, 0, 3]]));
        assert_eq!(usage(ClientId(id.0), 3), joined(b'F', &[&n, &[0, 0, 0, 3]]));
        assert_eq!(garbage(DataId(id.0), Generation(3)), joined(b'G', &[&n, &[0, 0, 0, 3]]));
        assert_eq!(counter("inode"), b"mNinode");
    }

    #[test]
    fn a_range_holds_its_own_and_nothing_else() {
        let (from, to) = dentries(InodeId(0xff));
        assert!(from.as_slice() <= dentry(InodeId(0xff), b"\xff\xff").as_slice());
        assert!(dentry(InodeId(0xff), b"\xff\xff") < to);
        assert!(to <= dentry(InodeId(0x100), b""));
        let (_, to) = client_sessions(ClientId(u64::MAX));
        assert!(client_session(ClientId(u64::MAX), u64::MAX) < to);
        assert!(to <= vec![b'm', b'L']);
    }
}
