//! The fs3 namespace as transactions on the store.
