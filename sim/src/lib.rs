//! The simulated world: step machines under a seeded network, disks that lose power, clocks and
//! crashes, with checkers that watch every step.
//!
//! One number, the seed, decides everything: the same seed replays the same world, event by event.
//! Faults stop after a while and the world must then come to rest (liveness); what may never happen
//! is checked all the time (safety). Planted bugs ([`chain::Mutant`]) prove that the checkers see.
//!
//! * [`chain`]: replication targets of fs3 over the real chunk engine, with a manager that runs the
//!   real chain table, and clients that retry.

pub mod chain;
