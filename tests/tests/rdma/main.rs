//! The whole system over real verbs. These run in the virtual machines of `tests/rdma-vm`, whose
//! scenarios call them one by one on the network that each needs.

mod faults;
mod fs3;
mod nolib;
mod pair;
mod wire;
