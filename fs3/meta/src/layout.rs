//! Where new files' chunks go: the cluster's stripe list, rotated by the file's data id so that
//! the first chunks of many small files spread over all chains.

use crate::error::MetaError;
use crate::schema::FileLayout;
use firefly_types::DataId;

/// Most chains that one file is striped over: the list lies in each inode. Enough to use every
/// disk of a large cluster from one file.
pub const MAX_STRIPE: u32 = 128;

/// What the manager says about new files.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ClusterLayout {
    /// Bytes in a chunk, where the directory does not say otherwise.
    pub chunk_bytes: u32,
    /// Chains in placement order.
    pub stripe_chains: Vec<u32>,
}

impl ClusterLayout {
    /// The layout of a new file with data `data` in a directory with the default `wanted`.
    pub fn place(&self, data: DataId, wanted: &FileLayout) -> Result<FileLayout, MetaError> {
        let chains = &self.stripe_chains;
        if chains.is_empty() || self.chunk_bytes == 0 {
            return Err(MetaError::Unavailable(
                "the manager has not named any chains for new files yet: is it running, and are the storage nodes up?"
                    .into(),
            ));
        }
        let stripe = if wanted.stripe == 0 { MAX_STRIPE } else { wanted.stripe.min(MAX_STRIPE) };
        let count = chains.len().min(stripe as usize);
        let first = (data.0 % chains.len() as u64) as usize;
        Ok(FileLayout {
            chunk_bytes: if wanted.chunk_bytes == 0 { self.chunk_bytes } else { wanted.chunk_bytes },
            stripe: 0,
            chains: chains.iter().cycle().skip(first).take(count).copied().collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_start_on_different_chains_and_directories_choose() {
        let cluster = ClusterLayout { chunk_bytes: 1 << 20, stripe_chains: vec![10, 11, 12] };
        let plain = FileLayout::default();
        let at = |data| cluster.place(DataId(data), &plain).unwrap().chains;
        assert_eq!([at(0), at(1), at(5)], [vec![10, 11, 12], vec![11, 12, 10], vec![12, 10, 11]]);
        let wanted = FileLayout { chunk_bytes: 1 << 16, stripe: 2, chains: vec![] };
        assert_eq!(
            cluster.place(DataId(4), &wanted).unwrap(),
            FileLayout { chunk_bytes: 1 << 16, stripe: 0, chains: vec![11, 12] }
        );
        assert!(matches!(ClusterLayout::default().place(DataId(1), &plain), Err(MetaError::Unavailable(_))));
    }
}
