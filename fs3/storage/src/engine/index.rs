//! The table of committed chunks, in memory as it is on disk: pages of neighbouring chunks, each
//! small enough for one block. A checkpoint writes the pages that changed; opening a target reads
//! all pages and nothing else, since a page says of a chunk all that replication needs, and of its
//! map where the leaves are.
//!
//! A million chunks of 1 MiB take about 60 MB.

use super::BLOCK_BYTES;
use super::format::{FormatError, HOLE, MAX_VERSION, PagePtr, Reader, damaged, put_chunk};
use super::leaf::{BlockPtr, LEAF_BLOCKS};
use firefly_types::ChunkId;
use fs3_core::target::{MAX_CHUNK_BYTES, Meta};
use std::collections::BTreeMap;

/// Bytes of records that a page holds.
const ROOM: usize = BLOCK_BYTES - 2;
/// Entries are added to a page's memory in steps of this: doubling would waste a quarter of it.
const STEP: usize = 16;

/// `PagePtr::block` of a leaf whose newest state is in memory only.
pub(super) const DIRTY: u32 = u32::MAX - 1;
pub(super) const NO_LEAF: PagePtr = PagePtr { block: HOLE, crc: 0 };
pub(super) const DIRTY_LEAF: PagePtr = PagePtr { block: DIRTY, crc: 0 };

/// Blocks of a chunk of this length.
pub(super) fn blocks_of(length: u32) -> u32 {
    length.div_ceil(BLOCK_BYTES as u32)
}

/// Leaves of a chunk of this length.
pub(super) fn leaves_of(length: u32) -> u32 {
    blocks_of(length).div_ceil(LEAF_BLOCKS)
}

/// How a chunk's map is found. Which form it has follows from the chunk's length.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Map {
    /// A chunk of at most one block has its pointer here and no leaf.
    Block(Option<BlockPtr>),
    One(PagePtr),
    Many(Box<[PagePtr]>),
}

/// A committed chunk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) version: u64,
    pub(super) length: u32,
    pub(super) digest: u32,
    pub(super) map: Map,
}

impl Default for Entry {
    fn default() -> Self {
        Self { version: 0, length: 0, digest: 0, map: Map::Block(None) }
    }
}

impl Entry {
    pub(super) fn meta(&self) -> Meta {
        Meta { version: self.version, length: self.length, digest: self.digest }
    }

    pub(super) fn leaves(&self) -> &[PagePtr] {
        match &self.map {
            Map::Block(_) => &[],
            Map::One(leaf) => std::slice::from_ref(leaf),
            Map::Many(leaves) => leaves,
        }
    }

    pub(super) fn leaves_mut(&mut self) -> &mut [PagePtr] {
        match &mut self.map {
            Map::Block(_) => &mut [],
            Map::One(leaf) => std::slice::from_mut(leaf),
            Map::Many(leaves) => leaves,
        }
    }

    /// A map for `length` bytes with these leaves, cut or extended with holes.
    pub(super) fn map_for(length: u32, leaves: &[PagePtr]) -> Map {
        let leaf = |i: usize| leaves.get(i).copied().unwrap_or(NO_LEAF);
        match leaves_of(length) {
            _ if blocks_of(length) <= 1 => Map::Block(None),
            1 => Map::One(leaf(0)),
            n => Map::Many((0..n as usize).map(leaf).collect()),
        }
    }

    fn encoded_len(&self) -> usize {
        31 + match &self.map {
            Map::Block(None) => 0,
            Map::Block(Some(_)) => 14,
            Map::One(_) => 8,
            Map::Many(leaves) => leaves.len() * 8,
        }
    }

    fn encode(&self, id: ChunkId, out: &mut Vec<u8>) {
        put_chunk(out, id);
        out.extend(&self.version.to_le_bytes()[..6]);
        out.extend(self.length.to_le_bytes());
        out.extend(self.digest.to_le_bytes());
        match &self.map {
            Map::Block(None) => out.push(0),
            Map::Block(Some(ptr)) => {
                out.push(1);
                out.extend(ptr.block.to_le_bytes());
                out.extend(ptr.crc.to_le_bytes());
                out.extend(&ptr.version.to_le_bytes()[..6]);
            }
            Map::One(_) | Map::Many(_) => {
                out.push(2);
                for leaf in self.leaves() {
                    debug_assert_ne!(leaf.block, DIRTY, "a leaf is written before what points to it");
                    out.extend(leaf.block.to_le_bytes());
                    out.extend(leaf.crc.to_le_bytes());
                }
            }
        }
    }

    fn decode(reader: &mut Reader<'_>) -> Result<(ChunkId, Self), FormatError> {
        let id = reader.chunk()?;
        let (version, length, digest) = (reader.u48()?, reader.u32()?, reader.u32()?);
        if length > MAX_CHUNK_BYTES || version > MAX_VERSION {
            return Err(damaged(format!("chunk {id} of {length} bytes, version {version}")));
        }
        let inline = blocks_of(length) <= 1;
        let map = match (reader.u8()?, inline) {
            (0, true) => Map::Block(None),
            (1, true) => {
                let (block, crc, version) = (reader.u32()?, reader.u32()?, reader.u48()?);
                Map::Block(Some(BlockPtr { block, crc, version }))
            }
            (2, false) => {
                let leaves = (0..leaves_of(length)).map(|_| reader.page()).collect::<Result<Vec<_>, _>>()?;
                if leaves.iter().any(|leaf| leaf.block == DIRTY) {
                    return Err(damaged(format!("a leaf of chunk {id} was never written")));
                }
                Self::map_for(length, &leaves)
            }
            (kind, _) => return Err(damaged(format!("map {kind} of chunk {id} of {length} bytes"))),
        };
        Ok((id, Self { version, length, digest, map }))
    }
}

pub(super) struct IndexPage {
    entries: Vec<(ChunkId, Entry)>,
    /// Bytes of its records.
    bytes: usize,
    dirty: bool,
    /// Where the last checkpoint has it.
    at: Option<PagePtr>,
}

impl IndexPage {
    fn new(entries: Vec<(ChunkId, Entry)>, at: Option<PagePtr>) -> Self {
        let bytes = entries.iter().map(|(_, e)| e.encoded_len()).sum();
        Self { entries, bytes, dirty: at.is_none(), at }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = (self.entries.len() as u16).to_le_bytes().to_vec();
        for (id, entry) in &self.entries {
            entry.encode(*id, &mut out);
        }
        assert!(out.len() <= BLOCK_BYTES, "a page of {} bytes", out.len());
        out.resize(BLOCK_BYTES, 0);
        out
    }
}

/// Reads the entries of a page.
pub(super) fn decode_page(bytes: &[u8]) -> Result<Vec<(ChunkId, Entry)>, FormatError> {
    let mut reader = Reader(bytes);
    let count = reader.u16()?;
    let mut entries: Vec<(ChunkId, Entry)> = Vec::new();
    for _ in 0..count {
        let entry = Entry::decode(&mut reader)?;
        if entries.last().is_some_and(|(id, _)| *id >= entry.0) {
            return Err(damaged("the chunks of a page are not in order"));
        }
        entries.push(entry);
    }
    entries.shrink_to_fit();
    Ok(entries)
}

/// All committed chunks, by id.
#[derive(Default)]
pub(super) struct Index {
    /// By their first chunk; the first page also takes smaller ones.
    pages: BTreeMap<ChunkId, IndexPage>,
    chunks: usize,
    /// Where pages that no longer exist lie in the last checkpoint.
    gone: Vec<PagePtr>,
}

impl Index {
    fn key_for(&self, id: ChunkId) -> Option<ChunkId> {
        let at_or_before = self.pages.range(..=id).next_back();
        at_or_before.or_else(|| self.pages.first_key_value()).map(|(key, _)| *key)
    }

    pub(super) fn chunks(&self) -> usize {
        self.chunks
    }

    pub(super) fn pages(&self) -> usize {
        self.pages.len()
    }

    pub(super) fn get(&self, id: ChunkId) -> Option<&Entry> {
        let page = &self.pages[&self.key_for(id)?];
        let at = page.entries.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        Some(&page.entries[at].1)
    }

    /// Changes leaves of a chunk in place.
    pub(super) fn leaves_mut(&mut self, id: ChunkId) -> Option<&mut [PagePtr]> {
        let key = self.key_for(id)?;
        let page = self.pages.get_mut(&key)?;
        let at = page.entries.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        page.dirty = true;
        Some(page.entries[at].1.leaves_mut())
    }

    pub(super) fn set(&mut self, id: ChunkId, entry: Entry) {
        let Some(mut key) = self.key_for(id) else {
            self.pages.insert(id, IndexPage::new(vec![(id, entry)], None));
            self.chunks += 1;
            return;
        };
        if id < key
            && let Some(page) = self.pages.remove(&key)
        {
            self.pages.insert(id, page);
            key = id;
        }
        let Some(page) = self.pages.get_mut(&key) else { return };
        page.dirty = true;
        page.bytes += entry.encoded_len();
        let at = match page.entries.binary_search_by_key(&id, |(id, _)| *id) {
            Ok(at) => {
                let old = std::mem::replace(&mut page.entries[at].1, entry);
                page.bytes -= old.encoded_len();
                at
            }
            Err(at) => {
                if page.entries.len() == page.entries.capacity() {
                    page.entries.reserve_exact(STEP);
                }
                page.entries.insert(at, (id, entry));
                self.chunks += 1;
                at
            }
        };
        if page.bytes > ROOM {
            // Chunks are mostly made in order: a full last place starts a new page, which leaves
            // this one full.
            let last = at + 1 == page.entries.len();
            self.split(key, last);
        }
    }

    fn split(&mut self, key: ChunkId, at_end: bool) {
        let Some(page) = self.pages.get_mut(&key) else { return };
        let mut at = page.entries.len() - 1;
        if !at_end {
            let mut bytes = 0;
            let mut half = |(_, e): &(ChunkId, Entry)| {
                bytes += e.encoded_len();
                bytes < page.bytes / 2
            };
            at = page.entries.iter().take_while(|e| half(e)).count().clamp(1, at);
        }
        let tail = page.entries.split_off(at);
        page.entries.shrink_to(at + STEP);
        page.bytes = page.entries.iter().map(|(_, e)| e.encoded_len()).sum();
        let mut tail = IndexPage::new(tail, None);
        tail.entries.shrink_to_fit();
        self.pages.insert(tail.entries[0].0, tail);
    }

    pub(super) fn remove(&mut self, id: ChunkId) -> Option<Entry> {
        let key = self.key_for(id)?;
        let page = self.pages.get_mut(&key)?;
        let at = page.entries.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        let (_, entry) = page.entries.remove(at);
        page.dirty = true;
        page.bytes -= entry.encoded_len();
        self.chunks -= 1;
        self.merge(key);
        Some(entry)
    }

    /// Drops an empty page, and joins a page with its successor when both are mostly empty.
    fn merge(&mut self, key: ChunkId) {
        let Some(page) = self.pages.get(&key) else { return };
        if page.entries.is_empty() {
            let page = self.pages.remove(&key);
            self.gone.extend(page.and_then(|p| p.at));
            return;
        }
        let bytes = page.bytes;
        let mut behind = self.pages.range(key..).skip(1);
        let Some((next, _)) = behind.next().filter(|(_, n)| n.bytes + bytes < ROOM / 2) else { return };
        let next = *next;
        let Some(next) = self.pages.remove(&next) else { return };
        self.gone.extend(next.at);
        if let Some(page) = self.pages.get_mut(&key) {
            page.bytes += next.bytes;
            page.entries.extend(next.entries);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (ChunkId, &Entry)> + '_ {
        self.pages.values().flat_map(|page| page.entries.iter().map(|(id, entry)| (*id, entry)))
    }

    /// Pages that a checkpoint has to write.
    pub(super) fn dirty_pages(&self) -> usize {
        self.pages.values().filter(|p| p.dirty).count()
    }

    /// Encodes every changed page and notes where it will lie: `place` is given its bytes. Returns
    /// the blocks where the previous checkpoint had what changed.
    pub(super) fn write_dirty(&mut self, mut place: impl FnMut(Vec<u8>) -> PagePtr) -> Vec<PagePtr> {
        let mut replaced = std::mem::take(&mut self.gone);
        for page in self.pages.values_mut().filter(|p| p.dirty) {
            replaced.extend(page.at.replace(place(page.encode())));
            page.dirty = false;
        }
        replaced
    }

    /// Where the pages lie, in order. All of them have been written.
    pub(super) fn places(&self) -> impl Iterator<Item = PagePtr> + '_ {
        self.pages.values().filter_map(|p| p.at)
    }

    /// Blocks of the last checkpoint that hold pages, also of those that are no more.
    pub(super) fn stored(&self) -> impl Iterator<Item = PagePtr> + '_ {
        self.places().chain(self.gone.iter().copied())
    }

    /// Appends a page that was read.
    pub(super) fn load(&mut self, at: PagePtr, bytes: &[u8]) -> Result<(), FormatError> {
        let entries = decode_page(bytes)?;
        let last = self.pages.last_key_value().and_then(|(_, p)| p.entries.last()).map(|(id, _)| *id);
        let Some((first, _)) = entries.first() else {
            return Err(damaged("a page of the chunk table is empty"));
        };
        if last.is_some_and(|last| last >= *first) {
            return Err(damaged("the pages of the chunk table are not in order"));
        }
        self.chunks += entries.len();
        self.pages.insert(*first, IndexPage::new(entries, Some(at)));
        Ok(())
    }
}

/// A page with one chunk of each kind, for the golden bytes.
#[cfg(test)]
pub(super) fn golden() -> Vec<u8> {
    use firefly_types::{DataId, Generation};
    let id = |index| ChunkId { data: DataId(1), generation: Generation(2), index };
    let block = BlockPtr { block: 5, crc: 0x0102_0304, version: 6 };
    let leaves = [PagePtr { block: 7, crc: 0x1112_1314 }, NO_LEAF];
    let entry = |length, map| Entry { version: 9, length, digest: 0x2122_2324, map };
    let page = IndexPage::new(
        vec![
            (id(0), entry(0, Map::Block(None))),
            (id(1), entry(100, Map::Block(Some(block)))),
            (id(2), entry(1 << 20, Map::One(leaves[0]))),
            (id(3), entry((1 << 20) + 1, Map::Many(leaves.into()))),
        ],
        None,
    );
    page.encode()[..2 + page.bytes].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use firefly_types::{DataId, Generation};
    use proptest::prelude::*;

    fn entry(version: u64, length: u32) -> Entry {
        let map = match Entry::map_for(length, &[PagePtr { block: 7, crc: 8 }]) {
            Map::Block(_) if length > 0 => Map::Block(Some(BlockPtr { block: 1, crc: 2, version })),
            map => map,
        };
        Entry { version, length, digest: 9, map }
    }

    proptest! {
        /// Against a plain map; what was written reads back the same.
        #[test]
        fn an_index_is_a_map(steps in proptest::collection::vec((0u32..400, 0u32..9, any::<bool>()), 1..600)) {
            let mut index = Index::default();
            let mut plain = BTreeMap::new();
            let sizes = [0, 1, 4096, 4097, 1 << 20, (1 << 20) + 1, 5 << 20, 40 << 20, 64 << 20];
            for (n, (at, size, set)) in steps.into_iter().enumerate() {
                let id = ChunkId { data: DataId(u64::from(at % 3)), generation: Generation(0), index: at };
                if set {
                    let new = entry(n as u64, sizes[size as usize]);
                    index.set(id, new.clone());
                    plain.insert(id, new);
                } else {
                    prop_assert_eq!(index.remove(id), plain.remove(&id));
                }
                prop_assert_eq!(index.get(id), plain.get(&id));
                prop_assert_eq!(index.chunks(), plain.len());
            }
            prop_assert!(index.iter().eq(plain.iter().map(|(id, e)| (*id, e))));
            let mut written = Vec::new();
            index.write_dirty(|bytes| {
                written.push(bytes);
                PagePtr { block: written.len() as u32, crc: 0 }
            });
            let mut copy = Index::default();
            for at in index.places() {
                copy.load(at, &written[at.block as usize - 1]).unwrap();
            }
            prop_assert!(copy.iter().eq(index.iter()));
            prop_assert_eq!((copy.dirty_pages(), index.dirty_pages()), (0, 0));
        }

        #[test]
        fn any_bytes_are_a_page_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode_page(&bytes);
        }
    }

    #[test]
    fn chunks_made_in_order_fill_their_pages() {
        let mut index = Index::default();
        for n in 0..10_000 {
            let id = ChunkId { data: DataId(1), generation: Generation(0), index: n };
            index.set(id, entry(1, 1 << 20));
        }
        assert!(index.pages() <= 10_000 / (ROOM / 39) + 1, "{} pages", index.pages());
    }
}
