//! An agent alone, without the rest of `ff`: `firefly-agent NODE SCHEDULER STATE_DIR SECRET_FILE
//! [SLOTS]`. It starts its shims from itself.

use firefly_types::{ClusterSecret, NodeId};
use std::path::{Path, PathBuf};
use tokio_util::sync::CancellationToken;

fn main() {
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.peek().is_some_and(|a| a == "shim") {
        firefly_agent::shim_main(arguments.skip(1));
    }
    if let Err(e) = run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        eprintln!("firefly-agent: {e}");
        std::process::exit(1);
    }
}

fn run(arguments: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let [node, scheduler, state_dir, secret, rest @ ..] = arguments else {
        return Err("usage: firefly-agent NODE SCHEDULER STATE_DIR SECRET_FILE [SLOTS]".into());
    };
    let node: NodeId = node.parse()?;
    let secret = ClusterSecret::load(Path::new(secret))?;
    let mut config =
        firefly_agent::AgentConfig::new(node, scheduler.clone(), PathBuf::from(state_dir), secret);
    // A hook of the tests: shims that are slow to come up.
    if let Ok(file) = std::env::var("FIREFLY_TEST_SHIM_WAITS_FOR") {
        let wait = format!("until [ -e '{file}' ]; do sleep 0.02; done; exec \"$0\" shim \"$@\"");
        let program = std::env::current_exe()?.display().to_string();
        config.shim_command = vec!["sh".into(), "-c".into(), wait, program];
    }
    config.slots = rest.first().map(|s| s.parse()).transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let running = firefly_agent::serve(config, stop.clone()).await?;
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        stop.cancel();
        running.wait().await;
        Ok(())
    })
}
