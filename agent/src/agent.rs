//! The agent's life: adopt, connect, serve, connect again.

use crate::config::AgentConfig;
use crate::error::AgentError;
use crate::rank::{Ranks, mkfifo};
use crate::stream::{Host, attach};
use crate::sys;
use firefly_types::Backoff;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Between two tries to connect. There is no giving up: an agent without scheduler keeps its ranks.
const RECONNECT: Backoff =
    Backoff { first: Duration::from_millis(50), most: Duration::from_secs(2), total: Duration::MAX };

/// An agent that runs.
#[derive(Debug)]
pub struct Running {
    task: JoinHandle<()>,
}

impl Running {
    /// Returns when the agent has ended. Its ranks live on.
    pub async fn wait(self) {
        // The task ends by its token; a panic in it has been reported by the runtime.
        let _ = self.task.await;
    }
}

/// Starts an agent, which adopts what an earlier one left in the state folder. It runs until
/// `stop` fires; that ends no rank.
pub async fn serve(config: AgentConfig, stop: CancellationToken) -> Result<Running, AgentError> {
    if !config.scheduler.contains(':') {
        return Err(AgentError::Address(config.scheduler));
    }
    let mut config = config;
    let shown = config.state_dir.display().to_string();
    config.state_dir = std::path::absolute(&config.state_dir).map_err(AgentError::state(shown.clone()))?;
    let dir = config.state_dir.clone();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(&dir)
        .map_err(AgentError::state(format!("make {shown}")))?;
    let lock = sys::lock(&dir.join("agent.lock")).map_err(AgentError::state("lock it"))?;
    let Some(lock) = lock else { return Err(AgentError::Taken(shown)) };
    let wake = dir.join("wake");
    mkfifo(&wake).map_err(AgentError::state("make the wake fifo"))?;
    // Opened for both ends: without a writer it would be at its end all the time.
    let mut wake = pipe::OpenOptions::new()
        .read_write(true)
        .open_receiver(&wake)
        .map_err(AgentError::state("open the wake fifo"))?;
    let mut ranks = Ranks::open(&dir, config.node_id, config.shim_command.clone())?;
    let host = Host::find_out();
    let task = tokio::spawn(async move {
        let _lock = lock;
        let mut tries = 0;
        while !stop.is_cancelled() {
            let mut connected = false;
            let outcome = attach(&config, &host, &mut ranks, &mut wake, &stop, &mut connected).await;
            if let Err(reason) = outcome {
                // One line per outage, not one per try.
                if connected || tries == 0 {
                    tracing::warn!(node = %config.node_id, scheduler = %config.scheduler, reason, "not connected to the scheduler");
                }
            }
            tries = if connected { 1 } else { tries + 1 };
            let delay = RECONNECT.delay(tries, Duration::ZERO, jitter()).unwrap_or(RECONNECT.most);
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(delay) => ranks.refresh(),
            }
        }
    });
    Ok(Running { task })
}

/// Spreads the tries of many agents after a restart of the scheduler.
fn jitter() -> f64 {
    let nanos = sys::boottime().subsec_nanos().wrapping_add(std::process::id().wrapping_mul(2_654_435_761));
    f64::from(nanos % 1000) / 1000.0
}
