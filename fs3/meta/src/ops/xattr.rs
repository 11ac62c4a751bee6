//! Extended attributes: `user.`, `trusted.`, `security.` and the two POSIX ACLs, kept as blobs,
//! and `fs3.layout` of directories, which says how new files in them are laid out.

use crate::error::MetaError;
use crate::layout::MAX_STRIPE;
use crate::limits::{MAX_XATTR_LIST, MAX_XATTR_NAME, MAX_XATTR_TOTAL, MAX_XATTR_VALUE};
use crate::op::Op;
use crate::perm::{Right, S_ISVTX};
use crate::schema::{FileLayout, InodeRecord, Kind, keys};
use firefly_types::{ByteSize, InodeId};
use fs3_core::layout::{MAX_CHUNK_BYTES, MIN_CHUNK_BYTES};

/// Fails if the attribute exists.
const CREATE: u32 = 1;
/// Fails if it does not.
const REPLACE: u32 = 2;

/// Layout of new files in a directory, as text: `chunk=4MiB stripe=8`, either part may be absent.
const LAYOUT: &[u8] = b"fs3.layout";

/// What a name's prefix means for who may do what.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Space {
    User,
    Trusted,
    Security,
    Acl,
    Layout,
}

fn space(name: &[u8]) -> Result<Space, MetaError> {
    match name {
        LAYOUT => Ok(Space::Layout),
        b"system.posix_acl_access" | b"system.posix_acl_default" => Ok(Space::Acl),
        _ if has_more(name, b"user.") => Ok(Space::User),
        _ if has_more(name, b"trusted.") => Ok(Space::Trusted),
        _ if has_more(name, b"security.") => Ok(Space::Security),
        _ => Err(MetaError::Unsupported(format!(
            "attribute {:?}: names start with user., trusted. or security., or are system.posix_acl_*",
            String::from_utf8_lossy(name)
        ))),
    }
}

fn has_more(name: &[u8], prefix: &[u8]) -> bool {
    name.starts_with(prefix) && name.len() > prefix.len()
}

/// Looks at a name.
pub(crate) fn check_name(name: &[u8]) -> Result<(), MetaError> {
    if name.len() > MAX_XATTR_NAME {
        return Err(MetaError::NameTooLong { got: name.len(), most: MAX_XATTR_NAME });
    }
    if name.is_empty() || name.contains(&0) {
        return Err(MetaError::Invalid("an attribute name is empty or has a NUL in it".into()));
    }
    Ok(())
}

/// Looks at what is to be set.
pub(crate) fn check_set(name: &[u8], value: &[u8], flags: u32) -> Result<(), MetaError> {
    check_name(name)?;
    if value.len() > MAX_XATTR_VALUE {
        return Err(MetaError::TooLarge {
            what: "an attribute value",
            got: value.len() as u64,
            most: MAX_XATTR_VALUE as u64,
        });
    }
    if flags & !(CREATE | REPLACE) != 0 || flags == CREATE | REPLACE {
        return Err(MetaError::Invalid(format!("attribute flags {flags:#x}: 1 (create) or 2 (replace)")));
    }
    Ok(())
}

fn no_attribute(inode: InodeId, name: &[u8]) -> MetaError {
    MetaError::NoAttribute { inode, name: String::from_utf8_lossy(name).into_owned() }
}

fn may_have_user(inode: &InodeRecord) -> bool {
    matches!(inode.kind, Kind::File | Kind::Directory)
}

fn need_set(op: &mut Op<'_>, inode: &InodeRecord, space: Space) -> Result<(), MetaError> {
    let uid = op.cred.uid;
    match space {
        Space::User if !may_have_user(inode) => Err(MetaError::Permission {
            uid,
            wanted: "put user attributes on other than files and directories",
        }),
        Space::User if inode.kind == Kind::Directory && inode.mode & S_ISVTX != 0 => {
            op.cred.need_owner(inode, "set attributes of another's sticky directory")
        }
        Space::User => op.cred.need(inode, Right::Write),
        Space::Trusted | Space::Security if !op.cred.is_root() => {
            Err(MetaError::Permission { uid, wanted: "set trusted or security attributes" })
        }
        Space::Trusted | Space::Security => Ok(()),
        Space::Acl if inode.kind == Kind::Symlink => {
            Err(MetaError::Unsupported("a symbolic link has no access list".into()))
        }
        Space::Acl => op.cred.need_owner(inode, "change the access list of another's file"),
        Space::Layout if inode.kind != Kind::Directory => Err(MetaError::Unsupported(
            "fs3.layout is for directories: a file keeps the layout it was made with".into(),
        )),
        Space::Layout => op.cred.need_owner(inode, "change the layout of another's directory"),
    }
}

/// Sets an attribute.
pub(crate) fn set(
    op: &mut Op<'_>,
    id: InodeId,
    name: &[u8],
    value: &[u8],
    flags: u32,
) -> Result<(), MetaError> {
    let space = space(name)?;
    let mut inode = op.inode(id)?;
    need_set(op, &inode, space)?;
    if name == b"system.posix_acl_default" && inode.kind != Kind::Directory {
        return Err(MetaError::Access { inode: id, uid: op.cred.uid, wanted: "have a default access list" });
    }
    let present = if space == Space::Layout {
        inode.layout != FileLayout::default()
    } else {
        op.tx.get(&keys::xattr(id, name))?.is_some()
    };
    match flags {
        CREATE if present => return Err(MetaError::exists(id, name)),
        REPLACE if !present => return Err(no_attribute(id, name)),
        _ => {}
    }
    if space == Space::Layout {
        inode.layout = parse_layout(value)?;
    } else {
        need_room(op, id, name, value)?;
        op.tx.put(&keys::xattr(id, name), value);
    }
    inode.ctime = op.now;
    op.save(&mut inode);
    Ok(())
}

/// Refuses what would be over the limits of one inode together with the other attributes.
fn need_room(op: &mut Op<'_>, id: InodeId, name: &[u8], value: &[u8]) -> Result<(), MetaError> {
    let (mut listing, mut total) = (name.len() + 1, name.len() + value.len());
    let (from, to) = keys::xattrs(id);
    for (key, value) in op.all(from, to)? {
        let other = keys::xattr_name(&key)?;
        if other != name {
            listing += other.len() + 1;
            total += other.len() + value.len();
        }
    }
    if listing > MAX_XATTR_LIST || total > MAX_XATTR_TOTAL {
        return Err(MetaError::NoAttributeSpace(id));
    }
    Ok(())
}

/// The value of an attribute.
pub(crate) fn get(op: &mut Op<'_>, id: InodeId, name: &[u8]) -> Result<Vec<u8>, MetaError> {
    let space = space(name)?;
    let inode = op.inode(id)?;
    match space {
        Space::User if !may_have_user(&inode) => return Err(no_attribute(id, name)),
        Space::User => op.cred.need(&inode, Right::Read)?,
        // To others, trusted attributes do not exist.
        Space::Trusted if !op.cred.is_root() => return Err(no_attribute(id, name)),
        Space::Layout => {
            return if inode.kind == Kind::Directory && inode.layout != FileLayout::default() {
                Ok(show_layout(&inode.layout).into_bytes())
            } else {
                Err(no_attribute(id, name))
            };
        }
        _ => {}
    }
    op.tx.get(&keys::xattr(id, name))?.ok_or_else(|| no_attribute(id, name))
}

/// The names of all attributes that the caller may know of.
pub(crate) fn list(op: &mut Op<'_>, id: InodeId) -> Result<Vec<Vec<u8>>, MetaError> {
    let inode = op.stored(id)?;
    let mut all = names(op, id)?;
    if !op.cred.is_root() {
        all.retain(|name| !name.starts_with(b"trusted."));
    }
    if inode.kind == Kind::Directory && inode.layout != FileLayout::default() {
        all.insert(0, LAYOUT.to_vec());
    }
    Ok(all)
}

fn names(op: &mut Op<'_>, id: InodeId) -> Result<Vec<Vec<u8>>, MetaError> {
    let (from, to) = keys::xattrs(id);
    op.all(from, to)?.iter().map(|(key, _)| keys::xattr_name(key).map(<[u8]>::to_vec)).collect()
}

/// Removes an attribute.
pub(crate) fn remove(op: &mut Op<'_>, id: InodeId, name: &[u8]) -> Result<(), MetaError> {
    let space = space(name)?;
    let mut inode = op.inode(id)?;
    need_set(op, &inode, space)?;
    if space == Space::Layout {
        if inode.layout == FileLayout::default() {
            return Err(no_attribute(id, name));
        }
        inode.layout = FileLayout::default();
    } else {
        let key = keys::xattr(id, name);
        if op.tx.get(&key)?.is_none() {
            return Err(no_attribute(id, name));
        }
        op.tx.delete(&key);
    }
    inode.ctime = op.now;
    op.save(&mut inode);
    Ok(())
}

fn parse_layout(value: &[u8]) -> Result<FileLayout, MetaError> {
    let bad = |why: String| {
        MetaError::Invalid(format!("fs3.layout: {why}; expected a text such as \"chunk=4MiB stripe=8\""))
    };
    let text = std::str::from_utf8(value).map_err(|_| bad("not a text".into()))?;
    let mut layout = FileLayout::default();
    for part in text.split_ascii_whitespace() {
        match part.split_once('=') {
            Some(("chunk", size)) => {
                let size: ByteSize = size.parse().map_err(|e| bad(format!("{e}")))?;
                layout.chunk_bytes = u32::try_from(size.0)
                    .ok()
                    .filter(|n| n.is_power_of_two() && (MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(n))
                    .ok_or_else(|| {
                        bad(format!(
                            "a chunk is a power of two from {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} bytes"
                        ))
                    })?;
            }
            Some(("stripe", n)) => {
                layout.stripe = n
                    .parse()
                    .ok()
                    .filter(|n| (1..=MAX_STRIPE).contains(n))
                    .ok_or_else(|| bad(format!("a stripe is 1 to {MAX_STRIPE} chains")))?;
            }
            _ => return Err(bad(format!("{part:?} is unknown"))),
        }
    }
    if layout == FileLayout::default() {
        return Err(bad("nothing is set".into()));
    }
    Ok(layout)
}

fn show_layout(layout: &FileLayout) -> String {
    let mut parts = Vec::new();
    if layout.chunk_bytes != 0 {
        parts.push(format!("chunk={}", ByteSize(layout.chunk_bytes.into())));
    }
    if layout.stripe != 0 {
        parts.push(format!("stripe={}", layout.stripe));
    }
    parts.join(" ")
}
