//! iperf3 on loopback, as the measure of throughput. `deploy/setup.sh bench` installs it.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

/// A server of iperf3, and how many streams its clients use.
pub(crate) struct Iperf {
    server: Child,
    port: String,
    streams: usize,
}

impl Iperf {
    pub(crate) fn new(streams: usize) -> Result<Iperf, String> {
        // A free port now is free a moment later, too, on a machine that measures.
        let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
        let port = listener.local_addr().map_err(|e| e.to_string())?.port().to_string();
        drop(listener);
        let server = Command::new("iperf3")
            .args(["--server", "--bind", "127.0.0.1", "--port", &port])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("cannot start iperf3 ({e}); deploy/setup.sh bench installs it"))?;
        while std::net::TcpStream::connect(("127.0.0.1", port.parse().unwrap_or(0))).is_err() {
            std::thread::yield_now();
        }
        Ok(Iperf { server, port, streams })
    }

    /// Gigabytes a second of one run of a second, received.
    pub(crate) fn run(&mut self) -> f64 {
        let streams = self.streams.to_string();
        // The server takes one test at a time and needs a moment between two.
        loop {
            let out = Command::new("iperf3")
                .args(["--client", "127.0.0.1", "--port", &self.port, "--parallel", &streams])
                .args(["--time", "1", "--length", "1M", "--json"])
                .output()
                .expect("iperf3 started before");
            let report = serde_json::from_slice::<serde_json::Value>(&out.stdout).unwrap_or_default();
            if let Some(bits) = report["end"]["sum_received"]["bits_per_second"].as_f64() {
                return bits / 8e9;
            }
        }
    }
}

impl Drop for Iperf {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
