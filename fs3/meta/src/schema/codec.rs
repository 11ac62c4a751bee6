//! Fixed-width little-endian fields, length-prefixed bytes. What cannot be read is an error, never
//! a panic: records come from a disk.

use crate::error::MetaError;

/// Appends fields.
pub struct Writer(Vec<u8>);

impl Writer {
    /// A record of format `version`.
    pub fn new(version: u8) -> Self {
        Self(vec![version])
    }

    /// One byte.
    pub fn u8(&mut self, n: u8) -> &mut Self {
        self.0.push(n);
        self
    }

    /// Four bytes.
    pub fn u32(&mut self, n: u32) -> &mut Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    /// Eight bytes.
    pub fn u64(&mut self, n: u64) -> &mut Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    /// Eight bytes, two's complement.
    pub fn i64(&mut self, n: i64) -> &mut Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    /// Length in four bytes, then the bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        let len = u32::try_from(bytes.len()).expect("a record's parts are bounded far below 4 GiB");
        self.u32(len);
        self.0.extend_from_slice(bytes);
        self
    }

    /// The record.
    pub fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}

/// Takes fields off the front.
pub struct Reader<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads a record of format `version`; `what` names it in errors.
    pub fn new(what: &'static str, bytes: &'a [u8], version: u8) -> Result<Self, MetaError> {
        let mut reader = Self { what, rest: bytes };
        match reader.u8()? {
            v if v == version => Ok(reader),
            v => Err(reader.bad(format!("format {v}, this version reads {version}"))),
        }
    }

    /// An error about this record.
    pub fn bad(&self, why: impl Into<String>) -> MetaError {
        MetaError::Corrupt { what: self.what, why: why.into() }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], MetaError> {
        if n > self.rest.len() {
            return Err(self.bad(format!("{n} more bytes expected, {} left", self.rest.len())));
        }
        let (head, rest) = self.rest.split_at(n);
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], MetaError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, MetaError> {
        Ok(self.array::<1>()?[0])
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, MetaError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, MetaError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Eight bytes, two's complement.
    pub fn i64(&mut self) -> Result<i64, MetaError> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// Length-prefixed bytes.
    pub fn bytes(&mut self) -> Result<Vec<u8>, MetaError> {
        let len = self.u32()? as usize;
        Ok(self.take(len)?.to_vec())
    }

    /// A list of numbers, length first.
    pub fn list(&mut self) -> Result<Vec<u32>, MetaError> {
        let len = self.u32()? as usize;
        if len > self.rest.len() / 4 {
            return Err(self.bad(format!("a list of {len} numbers does not fit")));
        }
        (0..len).map(|_| self.u32()).collect()
    }

    /// Nothing may be left.
    pub fn end(&self) -> Result<(), MetaError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.bad(format!("{} bytes too many", self.rest.len())))
        }
    }
}
