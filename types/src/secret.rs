//! The cluster secret: who holds it is a member. It never leaves the process: on the wire travel
//! only proofs (HMAC-SHA-256, RFC 2104) of holding it.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use std::fmt;
use std::path::Path;

/// Bytes in a secret.
pub const SECRET_BYTES: usize = 32;

/// A secret shared by the members of one cluster, or by the ranks of one job.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterSecret([u8; SECRET_BYTES]);

/// Why a secret could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read.
    #[error("cannot read the cluster secret {path}: {source}")]
    Read {
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file's content is something else.
    #[error("{0} does not hold a cluster secret: expected 64 hexadecimal digits")]
    Malformed(String),
}

impl ClusterSecret {
    /// Wraps raw key bytes.
    pub fn from_bytes(bytes: [u8; SECRET_BYTES]) -> Self {
        Self(bytes)
    }

    /// Makes a new secret from the system's random source.
    pub fn generate() -> Self {
        let mut bytes = [0; SECRET_BYTES];
        rand::Rng::fill_bytes(&mut rand::rng(), &mut bytes);
        Self(bytes)
    }

    /// Reads the 64 hexadecimal digits in `path`.
    pub fn load(path: &Path) -> Result<Self, SecretError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| SecretError::Read { path: path.display().to_string(), source })?;
        Self::from_hex(text.trim()).ok_or_else(|| SecretError::Malformed(path.display().to_string()))
    }

    /// Parses 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        if text.len() != 2 * SECRET_BYTES || !text.is_ascii() {
            return None;
        }
        let mut bytes = [0; SECRET_BYTES];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }

    /// The text that [`ClusterSecret::load`] reads. Write it only to a file of mode 0600 or into
    /// the environment of a process of the same user.
    pub fn to_hex(&self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Proof of holding the secret, bound to `parts`. Each part is length-prefixed, so no two
    /// lists of parts give the same message.
    pub fn prove(&self, parts: &[&[u8]]) -> [u8; 32] {
        self.mac(parts).finalize().into_bytes().into()
    }

    /// Checks a proof in constant time.
    pub fn verify(&self, parts: &[&[u8]], proof: &[u8]) -> bool {
        self.mac(parts).verify_slice(proof).is_ok()
    }

    fn mac(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        for part in parts {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }

    /// The bearer token of the gRPC services: derived, so that a token seen on a wire does not
    /// give away the key of the data path.
    pub fn bearer_token(&self) -> String {
        Self(self.prove(&[b"firefly grpc bearer v1"])).to_hex()
    }
}

impl fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterSecret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proofs_bind_every_part() {
        let secret = ClusterSecret::from_bytes([7; 32]);
        let proof = secret.prove(&[b"ab", b"c"]);
        assert!(secret.verify(&[b"ab", b"c"], &proof));
        assert!(!secret.verify(&[b"a", b"bc"], &proof));
        assert!(!secret.verify(&[b"ab", b"c"], &proof[..31]));
        assert!(!ClusterSecret::from_bytes([8; 32]).verify(&[b"ab", b"c"], &proof));
    }

    #[test]
    fn hex_round_trips_and_debug_is_silent() {
        let secret = ClusterSecret::generate();
        assert_eq!(ClusterSecret::from_hex(&secret.to_hex()), Some(secret.clone()));
        assert!(!format!("{secret:?}").contains(&secret.to_hex()[..8]));
        assert!(ClusterSecret::from_hex("12").is_none());
        assert!(ClusterSecret::from_hex(&"zz".repeat(32)).is_none());
    }
}
