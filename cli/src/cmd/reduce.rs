//! `ff reduce`: measures collectives, and how ranks reach each other.

use crate::cmd::{doctor, perf};
use crate::context::Global;
use anyhow::Result;
use std::process::ExitCode;

/// Measure collectives, and how ranks reach each other
#[derive(clap::Subcommand, Clone, Debug)]
pub enum ReduceCommand {
    /// Measure collectives: latency and bandwidth by size, in the columns of nccl-tests
    ///
    /// Within a job (WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT as torchrun or `ff job` set them) run it
    /// as every rank; rank 0 prints. Elsewhere it starts ranks on this machine by itself.
    Perf(perf::PerfArgs),
    /// Measure every pair of ranks: transport, why not RDMA, round trip, bandwidth, clocks
    ///
    /// Within a job (WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT as torchrun or `ff job` set them) run it
    /// as every rank; rank 0 prints. Elsewhere it starts ranks on this machine by itself.
    Doctor(doctor::DoctorArgs),
}

/// Runs `ff reduce`.
pub fn run(command: &ReduceCommand, global: &Global) -> Result<ExitCode> {
    match command {
        ReduceCommand::Perf(args) => perf::run(args, global),
        ReduceCommand::Doctor(args) => doctor::run(args, global),
    }
}
