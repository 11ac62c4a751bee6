//! The caller's key-value store as ours.

use crate::types::FfrStore;
use firefly_reduce::{Store, StoreError};
use std::ffi::CString;
use std::time::Duration;

const MOST_VALUE: usize = 64 << 10;
const TIMED_OUT: i32 = 110; // ETIMEDOUT on Linux

/// See the module.
pub(crate) struct CallbackStore<'a> {
    store: &'a FfrStore,
}

impl<'a> CallbackStore<'a> {
    /// `None` if a callback is missing.
    pub(crate) fn new(store: &'a FfrStore) -> Option<Self> {
        (store.set.is_some() && store.get.is_some()).then_some(Self { store })
    }
}

fn c_key(key: &str) -> Result<CString, StoreError> {
    CString::new(key).map_err(|_| StoreError::Failed(format!("the key {key:?} contains a NUL")))
}

impl Store for CallbackStore<'_> {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        let c = c_key(key)?;
        let set = self.store.set.expect("checked by new");
        // SAFETY: the caller's function with the caller's context, key and value valid for the call.
        match unsafe { set(self.store.ctx, c.as_ptr(), value.as_ptr(), value.len()) } {
            0 => Ok(()),
            code => Err(StoreError::Failed(format!("set of {key} returned {code}"))),
        }
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        let c = c_key(key)?;
        let get = self.store.get.expect("checked by new");
        let mut value = vec![0; MOST_VALUE];
        let mut len = 0usize;
        let ms = timeout.as_millis().clamp(1, u128::from(u64::MAX)) as u64;
        // SAFETY: the caller's function with the caller's context; the buffer has the given size.
        let code =
            unsafe { get(self.store.ctx, c.as_ptr(), value.as_mut_ptr(), value.len(), &raw mut len, ms) };
        match code {
            0 if len <= value.len() => {
                value.truncate(len);
                Ok(value)
            }
            0 => Err(StoreError::Failed(format!("the value of {key} has {len} bytes"))),
            TIMED_OUT => Err(StoreError::Timeout { key: key.to_owned(), waited: timeout }),
            code => Err(StoreError::Failed(format!("get of {key} returned {code}"))),
        }
    }
}
