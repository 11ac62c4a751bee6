//! Measures all-reduces from 4 KiB to 64 MiB. Start one process per rank with torchrun's
//! environment (RANK, WORLD_SIZE, MASTER_PORT), or none to let it start two ranks itself.

use firefly_reduce::{Communicator, ReduceOp};
use std::time::{Duration, Instant};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::var_os("WORLD_SIZE").is_none() {
        return launch();
    }
    let group = Communicator::from_env()?;
    for bytes in [4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20] {
        let mut data = vec![1.0f32; bytes / 4];
        let repeats = ((256 << 20) / bytes).clamp(8, 2000);
        group.allreduce_f32(&mut data, ReduceOp::Avg)?;
        let mut times: Vec<Duration> = Vec::with_capacity(repeats);
        group.barrier()?;
        for _ in 0..repeats {
            let start = Instant::now();
            group.allreduce_f32(&mut data, ReduceOp::Avg)?;
            times.push(start.elapsed());
        }
        assert!(data.iter().all(|&x| x == 1.0));
        times.sort();
        if group.rank() == 0 {
            let (min, median) = (times[0], times[repeats / 2]);
            let speed = bytes as f64 / median.as_secs_f64() / 1e9;
            println!(
                "{:>8} KiB: median {median:>10.1?}, min {min:>10.1?}, algbw {speed:.2} GB/s",
                bytes >> 10
            );
        }
    }
    if group.rank() == 0 {
        println!("{:?}", group.stats());
    }
    Ok(())
}

fn launch() -> Result<(), Box<dyn std::error::Error>> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let ranks: u32 = std::env::args().nth(1).map_or(Ok(2), |n| n.parse())?;
    let apart = std::env::args().nth(2).is_some_and(|a| a == "tcp");
    let children = (0..ranks).map(|rank| {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", ranks.to_string())
            .env("MASTER_PORT", port.to_string())
            .env("FIREFLY_JOB_SECRET", "5a".repeat(32));
        if apart {
            command.env("FIREFLY_NODE_ID", format!("node{rank}"));
        }
        command.spawn()
    });
    let children: Vec<_> = children.collect::<Result<_, _>>()?;
    for mut child in children {
        let status = child.wait()?;
        if !status.success() {
            return Err(format!("a rank ended with {status}").into());
        }
    }
    Ok(())
}
