//! Requests that make no sense are refused at the door, each with the right kind.

mod common;

use common::{Client, ROOT, call, in_memory, kind};
use firefly_proto::meta::*;
use firefly_proto::methods::meta as method;
use firefly_types::ErrorKind::{self, *};
use fs3_meta::limits::*;
use fs3_meta::{Meta, MetaError};
use prost::Message;

async fn refused<Q: Message>(meta: &Meta, number: u16, request: &Q) -> ErrorKind {
    kind(meta.handle(number, &request.encode_to_vec()).await)
}

#[tokio::test]
async fn names_are_bytes_within_limits() {
    let (_, meta) = in_memory().await;
    let mut root = Client::root();
    let longest = vec![b'x'; MAX_NAME];
    let cases: [(&[u8], Option<ErrorKind>); 9] = [
        (b"", Some(InvalidArgument)),
        (b"a/b", Some(InvalidArgument)),
        (b"a\0b", Some(InvalidArgument)),
        (&[b'x'; MAX_NAME + 1], Some(NameTooLong)),
        (&longest, None),
        (b"\xff\x80 not UTF-8", None),
        (b"...", None),
        (b" \n\t", None),
        (b".a", None),
    ];
    for (name, refusal) in cases {
        let made = root.create(&meta, ROOT, name).await;
        assert_eq!(made.as_ref().err().map(MetaError::kind), refusal, "{name:?}");
        let found = root.lookup(&meta, ROOT, name).await;
        assert_eq!(found.err().map(|e| e.kind()), refusal, "{name:?}");
        if let Some(refusal) = refusal {
            assert_eq!(kind(root.rename(&meta, (ROOT, name), (ROOT, b"y"), 0).await), refusal);
            assert_eq!(kind(root.rename(&meta, (ROOT, b"y"), (ROOT, name), 0).await), refusal);
            assert_eq!(kind(root.unlink(&meta, ROOT, name, false).await), refusal);
            assert_eq!(kind(root.link(&meta, ROOT, ROOT, name).await), refusal);
        } else {
            root.rename(&meta, (ROOT, name), (ROOT, b"moved"), 0).await.unwrap();
            root.rename(&meta, (ROOT, b"moved"), (ROOT, name), 0).await.unwrap();
            let id = made.unwrap().inode.unwrap().inode_id;
            root.link(&meta, id, ROOT, b"linked").await.unwrap();
            root.unlink(&meta, ROOT, b"linked", false).await.unwrap();
            root.unlink(&meta, ROOT, name, false).await.unwrap();
        }
    }
}

#[tokio::test]
async fn dots_are_not_made_removed_or_renamed() {
    let (_, meta) = in_memory().await;
    let mut root = Client::root();
    let dir = root.mkdir(&meta, ROOT, b"d").await.unwrap();
    for dots in [&b"."[..], b".."] {
        assert_eq!(kind(root.create(&meta, dir, dots).await), AlreadyExists);
        assert_eq!(kind(root.mkdir(&meta, dir, dots).await), AlreadyExists);
        assert_eq!(kind(root.unlink(&meta, dir, dots, true).await), InvalidArgument);
        assert_eq!(kind(root.rename(&meta, (dir, dots), (ROOT, b"x"), 0).await), InvalidArgument);
        assert_eq!(kind(root.rename(&meta, (ROOT, b"d"), (dir, dots), 0).await), InvalidArgument);
    }
    assert_eq!(root.lookup(&meta, dir, b"..").await.unwrap().inode_id, ROOT);
    assert_eq!(root.lookup(&meta, dir, b".").await.unwrap().inode_id, dir);
    assert_eq!(root.lookup(&meta, ROOT, b"..").await.unwrap().inode_id, ROOT);
}

#[tokio::test]
async fn the_caller_must_say_who_it_is() {
    let (_, meta) = in_memory().await;
    let ask = |caller| GetAttrRequest { caller, inode_id: ROOT };
    let good = Client::root().same().unwrap();
    let bad: Vec<(&str, Option<Caller>)> = vec![
        ("absent", None),
        ("no client", Some(Caller { client_id: 0, ..good.clone() })),
        ("no session", Some(Caller { session_epoch: 0, ..good.clone() })),
        ("an epoch that none can follow", Some(Caller { session_epoch: u64::MAX, ..good.clone() })),
        ("a lane beyond the limit", Some(Caller { channel: MAX_CHANNELS, ..good.clone() })),
        ("too many groups", Some(Caller { groups: vec![1; MAX_GROUPS + 1], ..good.clone() })),
        ("nobody's user number", Some(Caller { uid: u32::MAX, ..good.clone() })),
    ];
    for (what, caller) in bad {
        assert_eq!(refused(&meta, method::GET_ATTR, &ask(caller.clone())).await, InvalidArgument, "{what}");
        let change = SetAttrRequest { caller, inode_id: ROOT, ..Default::default() };
        assert_eq!(refused(&meta, method::SET_ATTR, &change).await, InvalidArgument, "{what}");
    }
    // A question needs no sequence, a change does.
    call::<_, InodeReply>(&meta, method::GET_ATTR, &ask(Some(good.clone()))).await.unwrap();
    for number in [method::SET_ATTR, method::SYNC, method::CLOSE] {
        let request = SyncRequest { caller: Some(good.clone()), inode_id: ROOT, ..Default::default() };
        assert_eq!(refused(&meta, number, &request).await, InvalidArgument);
    }
}

#[tokio::test]
async fn what_is_no_request_is_refused() {
    let (_, meta) = in_memory().await;
    assert_eq!(kind(meta.handle(0x01ff, &[]).await), Unsupported);
    assert_eq!(kind(meta.handle(0x0201, &[]).await), Unsupported);
    assert_eq!(kind(meta.handle(method::CREATE, &[0xff; 40]).await), InvalidArgument);
    assert_eq!(kind(meta.handle(method::LOOKUP, &vec![0; MAX_REQUEST + 1]).await), TooLarge);
    assert_eq!(kind(meta.handle(method::SET_XATTR, &vec![0; MAX_SET_XATTR_REQUEST + 1]).await), TooLarge);
}

#[tokio::test]
async fn fields_out_of_range_are_refused() {
    let (_, meta) = in_memory().await;
    let mut root = Client::root();
    let make = |client: &mut Client| CreateRequest {
        caller: client.next(),
        parent: ROOT,
        name: b"n".to_vec(),
        kind: InodeKind::File as i32,
        ..Default::default()
    };
    let symlink = InodeKind::Symlink as i32;
    let bad: Vec<(CreateRequest, ErrorKind)> = vec![
        (CreateRequest { kind: 0, ..make(&mut root) }, InvalidArgument),
        (CreateRequest { kind: 8, ..make(&mut root) }, InvalidArgument),
        (CreateRequest { kind: -1, ..make(&mut root) }, InvalidArgument),
        (CreateRequest { mode: 0o10777, ..make(&mut root) }, InvalidArgument),
        (CreateRequest { symlink: "t".into(), ..make(&mut root) }, InvalidArgument),
        (CreateRequest { kind: symlink, ..make(&mut root) }, InvalidArgument),
        (CreateRequest { kind: symlink, symlink: "a\0b".into(), ..make(&mut root) }, InvalidArgument),
        (
            CreateRequest { kind: symlink, symlink: "x".repeat(MAX_TARGET + 1), ..make(&mut root) },
            NameTooLong,
        ),
        (
            CreateRequest { kind: symlink, symlink: "t".into(), open_read: true, ..make(&mut root) },
            InvalidArgument,
        ),
        (CreateRequest { parent: 77, ..make(&mut root) }, NotFound),
    ];
    for (request, wanted) in bad {
        assert_eq!(refused(&meta, method::CREATE, &request).await, wanted, "{request:?}");
    }
    let file = root.create(&meta, ROOT, b"f").await.unwrap().inode.unwrap().inode_id;
    let late = Some(Time { seconds: 0, nanos: 1_000_000_000 });
    let bad: Vec<(SetAttrRequest, ErrorKind)> = vec![
        (SetAttrRequest { mode: Some(0o100644), ..Default::default() }, InvalidArgument),
        (SetAttrRequest { uid: Some(u32::MAX), ..Default::default() }, InvalidArgument),
        (SetAttrRequest { gid: Some(u32::MAX), ..Default::default() }, InvalidArgument),
        (SetAttrRequest { length: Some(MAX_LENGTH + 1), ..Default::default() }, TooLarge),
        (SetAttrRequest { atime: late, ..Default::default() }, InvalidArgument),
        (SetAttrRequest { mtime: late, ..Default::default() }, InvalidArgument),
    ];
    for (request, wanted) in bad {
        let request = SetAttrRequest { inode_id: file, caller: root.next(), ..request };
        assert_eq!(refused(&meta, method::SET_ATTR, &request).await, wanted, "{request:?}");
    }
    for flags in [3, 4, 0x8000_0000] {
        assert_eq!(kind(root.rename(&meta, (ROOT, b"f"), (ROOT, b"g"), flags).await), InvalidArgument);
        assert_eq!(kind(root.setxattr(&meta, file, b"user.x", b"", flags).await), InvalidArgument);
    }
    let listing =
        ReadDirRequest { caller: root.same(), inode_id: ROOT, cursor: vec![b'x'; 256], ..Default::default() };
    assert_eq!(refused(&meta, method::READ_DIR, &listing).await, InvalidArgument);
    let sync =
        SyncRequest { caller: root.next(), inode_id: file, length: Some(u64::MAX), ..Default::default() };
    assert_eq!(refused(&meta, method::SYNC, &sync).await, TooLarge);
    assert_eq!(root.names(&meta, ROOT, 0).await.unwrap().len(), 1, "something was made after all");
}

#[tokio::test]
async fn attributes_have_limits_and_spaces() {
    let (_, meta) = in_memory().await;
    let mut root = Client::root();
    let mut user = Client::new(2, 1, 1000);
    let file = user.create(&meta, ROOT, b"f").await.unwrap().inode.unwrap().inode_id;
    let longest = [b"user.".as_slice(), &[b'n'; 250]].concat();
    user.setxattr(&meta, file, &longest, &vec![7; MAX_XATTR_VALUE], 0).await.unwrap();
    assert_eq!(user.getxattr(&meta, file, &longest).await.unwrap().len(), MAX_XATTR_VALUE);
    let too_long = [longest.as_slice(), b"n"].concat();
    assert_eq!(kind(user.setxattr(&meta, file, &too_long, b"", 0).await), NameTooLong);
    assert_eq!(kind(user.setxattr(&meta, file, b"user.v", &vec![0; MAX_XATTR_VALUE + 1], 0).await), TooLarge);
    for name in [&b""[..], b"user.a\0", b"user.\0"] {
        assert_eq!(kind(user.setxattr(&meta, file, name, b"", 0).await), InvalidArgument, "{name:?}");
    }
    for name in [&b"x"[..], b"user.", b"os2.x", b"system.other"] {
        assert_eq!(kind(user.setxattr(&meta, file, name, b"", 0).await), Unsupported, "{name:?}");
    }
    // Who may what.
    assert_eq!(kind(user.setxattr(&meta, file, b"trusted.t", b"1", 0).await), PermissionDenied);
    assert_eq!(kind(user.setxattr(&meta, file, b"security.s", b"1", 0).await), PermissionDenied);
    root.setxattr(&meta, file, b"trusted.t", b"1", 1).await.unwrap();
    root.setxattr(&meta, file, b"security.s", b"2", 0).await.unwrap();
    assert_eq!(kind(user.getxattr(&meta, file, b"trusted.t").await), NoAttribute);
    assert_eq!(user.getxattr(&meta, file, b"security.s").await.unwrap(), b"2");
    user.setxattr(&meta, file, b"system.posix_acl_access", b"blob", 0).await.unwrap();
    let mut other = Client::new(3, 1, 1001);
    assert_eq!(kind(other.setxattr(&meta, file, b"system.posix_acl_access", b"", 0).await), PermissionDenied);
    assert_eq!(kind(user.setxattr(&meta, file, b"system.posix_acl_default", b"", 0).await), AccessDenied);
    assert_eq!(user.listxattr(&meta, file).await.unwrap().len(), 3);
    assert_eq!(root.listxattr(&meta, file).await.unwrap().len(), 4);
    // As many names as a listing may hold.
    let mut refusal = None;
    for n in 0..200 {
        let name = [b"user.".as_slice(), format!("{n:0250}").as_bytes()].concat();
        if let Err(error) = user.setxattr(&meta, file, &name, b"", 0).await {
            refusal = Some(error.kind());
            break;
        }
    }
    assert_eq!(refusal, Some(NoSpace));
    // And as many bytes.
    let big = user.create(&meta, ROOT, b"big").await.unwrap().inode.unwrap().inode_id;
    let mut refusal = None;
    for n in 0..20 {
        if let Err(error) =
            user.setxattr(&meta, big, format!("user.{n}").as_bytes(), &vec![0; MAX_XATTR_VALUE], 0).await
        {
            refusal = Some((n, error.kind()));
            break;
        }
    }
    assert_eq!(refusal, Some((15, NoSpace)));
    user.setxattr(&meta, big, b"user.0", &vec![1; MAX_XATTR_VALUE], 0).await.unwrap();
    // A chown takes file capabilities away.
    root.setxattr(&meta, file, b"security.capability", b"cap", 0).await.unwrap();
    root.setattr(&meta, SetAttrRequest { inode_id: file, uid: Some(5), ..Default::default() }).await.unwrap();
    assert_eq!(kind(root.getxattr(&meta, file, b"security.capability").await), NoAttribute);
}
