//! The simulated world that drives the step machines, and its checkers.
