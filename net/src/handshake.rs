//! Mutual proof of holding the cluster's secret, as a value without I/O: the async RPC and the
//! blocking channels drive the same two machines.
//!
//! ```text
//! client -> HELLO      magic, versions min..max, purpose, cluster, client nonce
//! server -> CHALLENGE  status, server's versions, version chosen, server nonce
//! client -> PROOF      name, hello, HMAC(secret, "client" | transcript)
//! server -> VERDICT    status, HMAC(secret, "server" | transcript)
//! ```
//!
//! The transcript is everything said before plus name and hello, so nothing can be changed on the
//! way; both nonces are in it, so no proof is good for another connection (replay); the role is in
//! it, so no proof can be sent back to its maker (reflection). The client proves first, so a
//! stranger who dials a server gets no MAC to work on. A refusal is not proven: it says why, and a
//! liar can only refuse, which a liar on the path can do anyway.
//!
//! What it does not do: it neither encrypts nor authenticates the bytes after it. The data network
//! is trusted to deliver what members send; end-to-end checksums are the file system's affair.

use crate::error::HandshakeError;
use firefly_types::{ClusterId, ClusterSecret};

const MAGIC: [u8; 8] = *b"FFNET\x00\x01\n";
const LABEL: &[u8] = b"firefly net handshake 1";

/// Protocol versions that this build speaks. Raise the upper one with each change of a frame,
/// the lower one only after a release that spoke both.
pub(crate) const VERSION_MIN: u16 = 1;
/// See [`VERSION_MIN`].
pub(crate) const VERSION_MAX: u16 = 2;
/// Since this version a reply may wait for its grant (`rpc::incast`), and servers answer
/// `rpc::INFO_METHOD`.
pub(crate) const VERSION_GRANTS: u16 = 2;

/// Bytes of a random challenge.
const NONCE: usize = 32;
/// Longest name of a process; longer ones are cut.
const NAME_MAX: usize = 100;
const HELLO_BYTES: usize = 8 + 2 + 2 + 2 + 2 + 16 + NONCE;
const CHALLENGE_BYTES: usize = 8 + 2 + 2 + 2 + 2 + NONCE;
const PROOF_BYTES: usize = 2 + NAME_MAX + 32 + 32;
const VERDICT_BYTES: usize = 2 + 32;

/// What the connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub(crate) enum Purpose {
    /// RPC frames follow.
    Rpc = 1,
    /// Channel messages follow.
    Channel = 2,
}

/// What both sides must agree on.
#[derive(Clone)]
pub(crate) struct Terms {
    pub(crate) cluster: ClusterId,
    pub(crate) secret: ClusterSecret,
    pub(crate) purpose: Purpose,
    /// Versions offered; tests offer others.
    pub(crate) versions: (u16, u16),
}

impl Terms {
    pub(crate) fn new(cluster: ClusterId, secret: &ClusterSecret, purpose: Purpose) -> Terms {
        Terms { cluster, secret: secret.clone(), purpose, versions: (VERSION_MIN, VERSION_MAX) }
    }
}

/// What a finished handshake established.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Agreed {
    /// Highest version that both speak.
    pub(crate) version: u16,
    /// The client's name (empty on the client's side).
    pub(crate) name: String,
    /// The client's hello.
    pub(crate) hello: [u8; 32],
}

/// What to do next.
#[derive(Debug, Default)]
pub(crate) struct Advance {
    /// Send these bytes first.
    pub(crate) send: Vec<u8>,
    /// Then: `None` reads the next message (of `wants()` bytes), otherwise the handshake is over.
    pub(crate) done: Option<Result<Agreed, HandshakeError>>,
}

impl Advance {
    fn fail(send: Vec<u8>, error: HandshakeError) -> Advance {
        Advance { send, done: Some(Err(error)) }
    }
}

/// A fresh challenge.
pub(crate) fn nonce() -> [u8; NONCE] {
    let mut bytes = [0; NONCE];
    rand::Rng::fill_bytes(&mut rand::rng(), &mut bytes);
    bytes
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
enum Status {
    Ok = 0,
    Version = 1,
    WrongCluster = 2,
    WrongPurpose = 3,
    WrongSecret = 4,
    Full = 5,
    Malformed = 6,
    TlsWanted = 7,
}

impl Status {
    fn from_code(code: u16) -> Status {
        match code {
            0 => Status::Ok,
            1 => Status::Version,
            2 => Status::WrongCluster,
            3 => Status::WrongPurpose,
            4 => Status::WrongSecret,
            5 => Status::Full,
            7 => Status::TlsWanted,
            // A reason of a newer server is some refusal to this one.
            _ => Status::Malformed,
        }
    }
}

fn proof_parts<'a>(role: &'a [u8], transcript: &'a [u8]) -> [&'a [u8]; 3] {
    [LABEL, role, transcript]
}

/// Cuts fixed fields from a message whose length was checked.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        head
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let bytes = self.take(N);
        out[..bytes.len()].copy_from_slice(bytes);
        out
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }
}

/// The side that dialled.
pub(crate) struct Initiator {
    terms: Terms,
    name: Vec<u8>,
    hello: [u8; 32],
    transcript: Vec<u8>,
    version: u16,
    proven: bool,
}

impl Initiator {
    /// Starts; the bytes go to the server.
    pub(crate) fn start(
        terms: Terms,
        name: &str,
        hello: [u8; 32],
        nonce: [u8; NONCE],
    ) -> (Initiator, Vec<u8>) {
        let mut message = Vec::with_capacity(HELLO_BYTES);
        message.extend_from_slice(&MAGIC);
        message.extend_from_slice(&terms.versions.0.to_le_bytes());
        message.extend_from_slice(&terms.versions.1.to_le_bytes());
        message.extend_from_slice(&(terms.purpose as u16).to_le_bytes());
        message.extend_from_slice(&[0, 0]);
        message.extend_from_slice(&terms.cluster.0.to_le_bytes());
        message.extend_from_slice(&nonce);
        let mut cut = name.len().min(NAME_MAX);
        while !name.is_char_boundary(cut) {
            cut -= 1;
        }
        let name = name.as_bytes()[..cut].to_vec();
        let me = Initiator { terms, name, hello, transcript: message.clone(), version: 0, proven: false };
        (me, message)
    }

    /// Bytes of the next message to read.
    pub(crate) fn wants(&self) -> usize {
        if self.proven { VERDICT_BYTES } else { CHALLENGE_BYTES }
    }

    /// Takes the next message.
    pub(crate) fn feed(&mut self, message: &[u8]) -> Advance {
        if message.len() != self.wants() {
            return Advance::fail(Vec::new(), HandshakeError::NotFirefly);
        }
        if self.proven { self.verdict(message) } else { self.challenge(message) }
    }

    fn refused(&self, status: Status, server: (u16, u16)) -> HandshakeError {
        match status {
            Status::Version => HandshakeError::Version {
                client_min: self.terms.versions.0,
                client_max: self.terms.versions.1,
                server_min: server.0,
                server_max: server.1,
            },
            Status::WrongCluster => HandshakeError::WrongCluster,
            Status::WrongPurpose => HandshakeError::WrongPurpose,
            Status::WrongSecret => HandshakeError::WrongSecret,
            Status::Full => HandshakeError::Full,
            Status::TlsWanted => HandshakeError::TlsWanted,
            Status::Ok | Status::Malformed => HandshakeError::Malformed("the server says so"),
        }
    }

    fn challenge(&mut self, message: &[u8]) -> Advance {
        let mut fields = Fields(message);
        if fields.take(MAGIC.len()) != MAGIC {
            return Advance::fail(Vec::new(), HandshakeError::NotFirefly);
        }
        let status = Status::from_code(fields.u16());
        let server = (fields.u16(), fields.u16());
        self.version = fields.u16();
        if status != Status::Ok {
            return Advance::fail(Vec::new(), self.refused(status, server));
        }
        // The choice must be the one that both would make, so that nobody talks us down.
        if self.version != self.terms.versions.1.min(server.1) || self.version < self.terms.versions.0 {
            return Advance::fail(
                Vec::new(),
                HandshakeError::Malformed("the version chosen was not offered"),
            );
        }
        let mut proof = Vec::with_capacity(PROOF_BYTES);
        proof.extend_from_slice(&(self.name.len() as u16).to_le_bytes());
        proof.extend_from_slice(&self.name);
        proof.resize(2 + NAME_MAX, 0);
        proof.extend_from_slice(&self.hello);
        self.transcript.extend_from_slice(message);
        self.transcript.extend_from_slice(&proof);
        let mac = self.terms.secret.prove(&proof_parts(b"client", &self.transcript));
        proof.extend_from_slice(&mac);
        self.proven = true;
        Advance { send: proof, done: None }
    }

    fn verdict(&mut self, message: &[u8]) -> Advance {
        let mut fields = Fields(message);
        let status = Status::from_code(fields.u16());
        if status != Status::Ok {
            return Advance::fail(Vec::new(), self.refused(status, (0, 0)));
        }
        if !self.terms.secret.verify(&proof_parts(b"server", &self.transcript), fields.take(32)) {
            return Advance::fail(Vec::new(), HandshakeError::WrongSecret);
        }
        let agreed = Agreed { version: self.version, name: String::new(), hello: self.hello };
        Advance { send: Vec::new(), done: Some(Ok(agreed)) }
    }
}

/// The side that was dialled.
pub(crate) struct Responder {
    terms: Terms,
    nonce: [u8; NONCE],
    transcript: Vec<u8>,
    version: u16,
    challenged: bool,
    /// Turns away whoever comes, for this reason.
    away: Option<Status>,
}

impl Responder {
    /// Starts; reads first.
    pub(crate) fn new(terms: Terms, nonce: [u8; NONCE]) -> Responder {
        Responder { terms, nonce, transcript: Vec::new(), version: 0, challenged: false, away: None }
    }

    /// Turns away whoever comes, with the reason that there is no room.
    pub(crate) fn full(terms: Terms) -> Responder {
        Responder { away: Some(Status::Full), ..Responder::new(terms, [0; NONCE]) }
    }

    /// Turns away whoever comes without TLS.
    pub(crate) fn tls_wanted(terms: Terms) -> Responder {
        Responder { away: Some(Status::TlsWanted), ..Responder::new(terms, [0; NONCE]) }
    }

    /// Bytes of the next message to read.
    pub(crate) fn wants(&self) -> usize {
        if self.challenged { PROOF_BYTES } else { HELLO_BYTES }
    }

    /// Takes the next message.
    pub(crate) fn feed(&mut self, message: &[u8]) -> Advance {
        if message.len() != self.wants() {
            return Advance::fail(Vec::new(), HandshakeError::NotFirefly);
        }
        if self.challenged { self.proof(message) } else { self.hello(message) }
    }

    fn challenge(&self, status: Status) -> Vec<u8> {
        let mut out = Vec::with_capacity(CHALLENGE_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&(status as u16).to_le_bytes());
        out.extend_from_slice(&self.terms.versions.0.to_le_bytes());
        out.extend_from_slice(&self.terms.versions.1.to_le_bytes());
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&self.nonce);
        out
    }

    fn hello(&mut self, message: &[u8]) -> Advance {
        let mut fields = Fields(message);
        if fields.take(MAGIC.len()) != MAGIC {
            // Say nothing to what is not of our kind.
            return Advance::fail(Vec::new(), HandshakeError::NotFirefly);
        }
        let (client_min, client_max) = (fields.u16(), fields.u16());
        let purpose = fields.u16();
        let reserved = fields.u16();
        let cluster = ClusterId(u128::from_le_bytes(fields.array()));
        let (server_min, server_max) = self.terms.versions;
        self.version = client_max.min(server_max);
        let refuse = |me: &Self, status, error| Advance::fail(me.challenge(status), error);
        if client_min > client_max || self.version < client_min || self.version < server_min {
            self.version = 0;
            let error = HandshakeError::Version { client_min, client_max, server_min, server_max };
            return refuse(self, Status::Version, error);
        }
        match self.away {
            None => {}
            Some(Status::TlsWanted) => return refuse(self, Status::TlsWanted, HandshakeError::TlsWanted),
            Some(status) => return refuse(self, status, HandshakeError::Full),
        }
        if reserved != 0 {
            return refuse(self, Status::Malformed, HandshakeError::Malformed("reserved bytes are not zero"));
        }
        if purpose != self.terms.purpose as u16 {
            return refuse(self, Status::WrongPurpose, HandshakeError::WrongPurpose);
        }
        if cluster != self.terms.cluster {
            return refuse(self, Status::WrongCluster, HandshakeError::WrongCluster);
        }
        let challenge = self.challenge(Status::Ok);
        self.transcript.extend_from_slice(message);
        self.transcript.extend_from_slice(&challenge);
        self.challenged = true;
        Advance { send: challenge, done: None }
    }

    fn proof(&mut self, message: &[u8]) -> Advance {
        let mut fields = Fields(message);
        self.transcript.extend_from_slice(&message[..PROOF_BYTES - 32]);
        let name_len = usize::from(fields.u16());
        let name = fields.take(NAME_MAX);
        let hello = fields.array();
        let mac = fields.take(32);
        let verdict = |status: Status, mac: [u8; 32]| {
            let mut out = (status as u16).to_le_bytes().to_vec();
            out.extend_from_slice(&mac);
            out
        };
        if !self.terms.secret.verify(&proof_parts(b"client", &self.transcript), mac) {
            return Advance::fail(verdict(Status::WrongSecret, [0; 32]), HandshakeError::WrongSecret);
        }
        // A member's name goes to logs and into messages: keep it printable.
        let Some(name) = name.get(..name_len) else {
            let error = HandshakeError::Malformed("the name is longer than its field");
            return Advance::fail(verdict(Status::Malformed, [0; 32]), error);
        };
        let name =
            String::from_utf8_lossy(name).chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        let mac = self.terms.secret.prove(&proof_parts(b"server", &self.transcript));
        let agreed = Agreed { version: self.version, name, hello };
        Advance { send: verdict(Status::Ok, mac), done: Some(Ok(agreed)) }
    }
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
