//! Starts this command again as the ranks of a group on this machine.

use anyhow::{Context as _, Result, bail};
use firefly_types::ClusterSecret;
use std::process::{Command, ExitCode};

/// Starts `size` ranks with this command's own arguments, in the environment that a launcher makes, and
/// waits for them. `node` names the node of a rank; `None` leaves it on this machine's own.
pub fn start(size: u32, node: impl Fn(u32) -> Option<String>) -> Result<ExitCode> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    // Free when asked, and asked right before it is used.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let secret = ClusterSecret::generate().to_hex();
    let mut children = Vec::new();
    for rank in 0..size {
        let mut command = Command::new(&program);
        command
            .args(std::env::args_os().skip(1))
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", size.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .env("FIREFLY_JOB_SECRET", &secret);
        if let Some(node) = node(rank) {
            command.env("FIREFLY_NODE_ID", node);
        }
        children.push((rank, command.spawn().with_context(|| format!("cannot start rank {rank}"))?));
    }
    let mut failed = Vec::new();
    for (rank, mut child) in children {
        if !child.wait()?.success() {
            failed.push(rank.to_string());
        }
    }
    if !failed.is_empty() {
        bail!("ranks that failed: {}; their messages are above", failed.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}
