//! The port of a job's rendezvous: chosen on the node of rank 0 by its shim, from a range below
//! the kernel's ephemeral ports, so that no outgoing connection takes it by accident.
//!
//! Two jobs must not get one port even while neither listens yet (importing torch takes seconds).
//! So each shim claims its number for its whole life by an abstract socket of that name: the
//! kernel allows one holder per network namespace and frees it when the holder dies, however that
//! happens. Until the rank starts, the shim also keeps the port itself bound.

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;

/// First port of the range.
const FIRST: u16 = 20_000;
/// Ports in the range: up to 31,999; ephemeral ports start at 32,768 on Linux.
const COUNT: u16 = 12_000;

/// A port that no other job of this machine gets.
pub(crate) struct Claim {
    port: u16,
    listener: Option<TcpListener>,
    _name: OwnedFd,
}

impl Claim {
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Leaves the port to the rank; the claim on its number stays.
    pub(crate) fn release_socket(&mut self) {
        self.listener = None;
    }
}

/// Claims a port. The search starts at a place that depends on the attempt, so that a port is
/// seldom used twice in a row.
pub(crate) fn claim(job: u64, epoch: u32) -> io::Result<Claim> {
    let mixed = job.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(epoch) * 7919) >> 16;
    let start = u16::try_from(mixed % u64::from(COUNT)).unwrap_or(0);
    for i in 0..COUNT {
        let port = FIRST + (start + i) % COUNT;
        if let Some(claim) = try_claim(port) {
            return Ok(claim);
        }
    }
    Err(io::Error::other(format!("no free port from {FIRST} to {}", FIRST + COUNT - 1)))
}

fn try_claim(port: u16) -> Option<Claim> {
    let name = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
    let address = SocketAddrUnix::new_abstract_name(format!("firefly-port-{port}").as_bytes()).ok()?;
    bind(&name, &address).ok()?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).ok()?;
    Some(Claim { port, listener: Some(listener), _name: name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_claimed_once_until_its_holder_is_gone() {
        let mut first = claim(1 << 40, 1).unwrap();
        let second = claim(1 << 40, 1).unwrap();
        assert_ne!(first.port(), second.port());
        first.release_socket();
        assert!(try_claim(first.port()).is_none(), "still claimed although nobody listens");
        let port = first.port();
        drop(first);
        assert!(try_claim(port).is_some());
    }
}
