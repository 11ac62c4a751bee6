//! What the kernel has counted on the RDMA device and on loopback: not our word for it.

/// Payload of one packet: the network's MTU admits the largest that RDMA knows.
pub(crate) const PACKET_BYTES: u64 = 4096;

/// Counters at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wire {
    /// Packets that the RDMA device sent.
    pub(crate) rdma_packets: u64,
    /// Packets that the RDMA device received.
    pub(crate) rdma_received: u64,
    /// Bytes that TCP moved between the addresses of this machine.
    pub(crate) tcp_bytes: u64,
}

fn number(path: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    text.trim().parse().unwrap()
}

/// Requests that the devices of a veth pair had to send again.
pub(crate) fn resent() -> u64 {
    let of =
        |device| number(&format!("/sys/class/infiniband/{device}/ports/1/hw_counters/completer_retry_err"));
    of("rxe0") + of("rxe1")
}

impl Wire {
    pub(crate) fn now() -> Self {
        Self {
            rdma_packets: number("/sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts"),
            rdma_received: number("/sys/class/infiniband/rxe0/ports/1/hw_counters/rcvd_pkts"),
            tcp_bytes: number("/sys/class/net/lo/statistics/tx_bytes"),
        }
    }

    /// Asserts that since `before` at least `bytes` were sent by RDMA.
    #[track_caller]
    pub(crate) fn sent_by_rdma(self, before: Self, what: &str, bytes: u64) {
        let rdma = (self.rdma_packets - before.rdma_packets) * PACKET_BYTES;
        println!("{what}: {bytes} bytes of payload; at most {rdma} by RDMA");
        assert!(rdma >= bytes, "{what}: {bytes} bytes of payload, and at most {rdma} went by RDMA");
    }

    /// Asserts that since `before` at least `bytes` moved by RDMA, and by TCP only what control
    /// takes.
    #[track_caller]
    pub(crate) fn moved_by_rdma(self, before: Self, what: &str, bytes: u64) {
        self.sent_by_rdma(before, what, bytes);
        let tcp = self.tcp_bytes - before.tcp_bytes;
        println!("{what}: {tcp} bytes by TCP");
        assert!(tcp < bytes / 4, "{what}: {bytes} bytes of payload, and {tcp} bytes went by TCP");
    }
}
