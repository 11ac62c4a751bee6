//! Where a byte of a file is: file offset → (chunk index, chain, offset in the chunk). Chunk `i` of
//! a file lies on `chains[i % chains.len()]`, so a file is striped over its chains and a reader
//! needs no directory of chunks.

use firefly_types::ChainId;

/// Largest chunk that a layout may ask for, bytes: one chunk is one payload of a request.
pub const MAX_CHUNK_BYTES: u32 = 64 << 20;

/// Smallest chunk, bytes: one page, so that O_DIRECT requests never straddle chunks needlessly.
pub const MIN_CHUNK_BYTES: u32 = 4096;

/// Most chains that one file is striped over: bounds the fan-out of truncate and remove.
pub const MAX_CHAINS: usize = 4096;

/// How a file's bytes are spread. Valid by construction: it comes from a wire and is checked once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    chunk_bytes: u32,
    chains: Vec<ChainId>,
}

/// Why numbers from a wire are not a layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The chunk size is out of range.
    #[error("chunk size {0} is not between {MIN_CHUNK_BYTES} and {MAX_CHUNK_BYTES} bytes")]
    ChunkBytes(u32),
    /// No chain, or too many.
    #[error("a layout of {0} chains: between 1 and {MAX_CHAINS} are possible")]
    Chains(usize),
    /// The offset lies past the last byte that chunk indices can name.
    #[error("offset {offset} is past the largest file of this layout, {most} bytes")]
    TooFar {
        /// What was asked.
        offset: u64,
        /// Largest length.
        most: u64,
    },
}

/// A part of a range of a file that lies in one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the chunk in the file.
    pub index: u32,
    /// Chain that holds the chunk.
    pub chain: ChainId,
    /// Where the part begins in the chunk, bytes.
    pub chunk_offset: u32,
    /// Length of the part, bytes; at least 1.
    pub len: u32,
    /// Where the part begins in the file, bytes.
    pub file_offset: u64,
}

impl Layout {
    /// A layout of chunks of `chunk_bytes` over `chains`.
    pub fn new(chunk_bytes: u32, chains: Vec<ChainId>) -> Result<Self, LayoutError> {
        if !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&chunk_bytes) {
            return Err(LayoutError::ChunkBytes(chunk_bytes));
        }
        if chains.is_empty() || chains.len() > MAX_CHAINS {
            return Err(LayoutError::Chains(chains.len()));
        }
        Ok(Self { chunk_bytes, chains })
    }

    /// Bytes in a whole chunk.
    pub fn chunk_bytes(&self) -> u32 {
        self.chunk_bytes
    }

    /// The chains, in striping order.
    pub fn chains(&self) -> &[ChainId] {
        &self.chains
    }

    /// Chain that holds chunk `index`.
    pub fn chain_of(&self, index: u32) -> ChainId {
        self.chains[index as usize % self.chains.len()]
    }

    /// Largest file of this layout, bytes: chunk indices have 32 bits, and offsets stay in i64.
    pub fn max_length(&self) -> u64 {
        (u64::from(self.chunk_bytes) << 32).min(i64::MAX as u64)
    }

    /// Where the byte at `offset` is: its chunk, and its place in it.
    pub fn locate(&self, offset: u64) -> Result<(u32, u32), LayoutError> {
        if offset >= self.max_length() {
            return Err(LayoutError::TooFar { offset, most: self.max_length() });
        }
        let chunk = u64::from(self.chunk_bytes);
        // Both fit: offset < chunk << 32 bounds the quotient, and chunk is a u32 the remainder.
        Ok(((offset / chunk) as u32, (offset % chunk) as u32))
    }

    /// Chunks that a file of `length` bytes may have: indices 0 up to this, exclusive.
    pub fn chunk_count(&self, length: u64) -> u64 {
        length.div_ceil(u64::from(self.chunk_bytes))
    }

    /// Splits `offset .. offset + len` at chunk boundaries, in order.
    pub fn pieces(&self, offset: u64, len: u64) -> Result<Pieces<'_>, LayoutError> {
        let end = offset
            .checked_add(len)
            .filter(|end| *end <= self.max_length())
            .ok_or(LayoutError::TooFar { offset: offset.saturating_add(len), most: self.max_length() })?;
        Ok(Pieces { layout: self, offset, end })
    }
}

/// Iterator of [`Layout::pieces`].
#[derive(Clone, Debug)]
pub struct Pieces<'a> {
    layout: &'a Layout,
    offset: u64,
    end: u64,
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.offset >= self.end {
            return None;
        }
        let (index, chunk_offset) = self.layout.locate(self.offset).ok()?;
        let room = self.layout.chunk_bytes - chunk_offset;
        let len = u64::from(room).min(self.end - self.offset) as u32;
        let piece =
            Piece { index, chain: self.layout.chain_of(index), chunk_offset, len, file_offset: self.offset };
        self.offset += u64::from(len);
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(chunk_bytes: u32, chains: u32) -> Layout {
        Layout::new(chunk_bytes, (10..10 + chains).map(ChainId).collect()).unwrap()
    }

    #[test]
    fn a_range_is_split_at_chunk_boundaries() {
        let pieces: Vec<Piece> = layout(4096, 2).pieces(4000, 4300).unwrap().collect();
        let at = |index, chain, chunk_offset, len, file_offset| Piece {
            index,
            chain: ChainId(chain),
            chunk_offset,
            len,
            file_offset,
        };
        assert_eq!(pieces, [at(0, 10, 4000, 96, 4000), at(1, 11, 0, 4096, 4096), at(2, 10, 0, 108, 8192)]);
        assert_eq!(layout(4096, 2).pieces(5, 0).unwrap().count(), 0);
    }

    #[test]
    fn impossible_layouts_and_offsets_are_refused() {
        assert!(Layout::new(0, vec![ChainId(1)]).is_err());
        assert!(Layout::new(MAX_CHUNK_BYTES + 1, vec![ChainId(1)]).is_err());
        assert!(Layout::new(4096, vec![]).is_err());
        let small = layout(4096, 1);
        assert!(small.locate(small.max_length()).is_err());
        assert_eq!(small.locate(small.max_length() - 1), Ok((u32::MAX, 4095)));
        assert!(small.pieces(small.max_length() - 1, 2).is_err());
        assert!(small.pieces(u64::MAX, u64::MAX).is_err());
    }

    proptest! {
        /// Pieces tile the range without gap or overlap, never leave their chunk, and every byte
        /// lies where `locate` says, on the chain that its index names.
        #[test]
        fn pieces_tile_the_range(
            chunk_shift in 12u32..24, extra in 0u32..4096, chains in 1u32..40,
            offset in 0u64..1 << 44, len in 0u64..1 << 26,
        ) {
            let layout = layout((1 << chunk_shift) + extra, chains);
            let mut at = offset;
            for piece in layout.pieces(offset, len).unwrap() {
                prop_assert_eq!(piece.file_offset, at);
                prop_assert!(piece.len >= 1);
                prop_assert!(piece.chunk_offset + piece.len <= layout.chunk_bytes());
                prop_assert_eq!(layout.locate(at), Ok((piece.index, piece.chunk_offset)));
                let last = at + u64::from(piece.len) - 1;
                prop_assert_eq!(layout.locate(last).unwrap().0, piece.index);
                prop_assert_eq!(piece.chain, layout.chains()[(piece.index % chains) as usize]);
                prop_assert!(u64::from(piece.index) < layout.chunk_count(offset + len));
                at += u64::from(piece.len);
            }
            prop_assert_eq!(at, offset + len);
        }
    }
}
