//! Method numbers of the services that travel on net frames. Never reused.

/// Namespace.
pub mod meta {
    pub const LOOKUP: u16 = 0x0101;
    pub const GET_ATTR: u16 = 0x0102;
    pub const SET_ATTR: u16 = 0x0103;
    pub const CREATE: u16 = 0x0104;
    pub const LINK: u16 = 0x0105;
    pub const UNLINK: u16 = 0x0106;
    pub const RENAME: u16 = 0x0107;
    pub const READ_DIR: u16 = 0x0108;
    pub const OPEN: u16 = 0x0109;
    pub const CLOSE: u16 = 0x010a;
    pub const SYNC: u16 = 0x010b;
    pub const STAT_FS: u16 = 0x010c;
    pub const SET_XATTR: u16 = 0x010d;
    pub const GET_XATTR: u16 = 0x010e;
    pub const LIST_XATTR: u16 = 0x010f;
    pub const REMOVE_XATTR: u16 = 0x0110;
}

/// Chunks.
pub mod storage {
    pub const READ: u16 = 0x0201;
    pub const UPDATE: u16 = 0x0202;
    pub const FORWARD: u16 = 0x0203;
    pub const PREFIX_DURABLE: u16 = 0x0204;
    pub const REMOVE_RANGE: u16 = 0x0205;
    pub const QUERY_LAST_CHUNK: u16 = 0x0206;
    pub const SYNC_DONE: u16 = 0x0207;
    pub const RESOLVE: u16 = 0x0208;
    pub const SYNC_RECORDS: u16 = 0x0209;
}
