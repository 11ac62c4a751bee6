//! The measure of all: blocking sockets, one thread at each end.

use crate::{MIB, PINGS, VOLUME, gigabytes, micros};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

/// One connected pair; the far end echoes and streams as it is asked.
pub(crate) struct Pair {
    near: TcpStream,
    far: Option<std::thread::JoinHandle<()>>,
    memory: Vec<u8>,
}

impl Pair {
    pub(crate) fn new() -> Pair {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let far = std::thread::spawn(move || {
            let (mut s, _) = listener.accept().unwrap();
            s.set_nodelay(true).unwrap();
            let (mut small, big) = ([0; 64], vec![1; MIB]);
            while s.read_exact(&mut small).is_ok() {
                match small[0] {
                    0 => s.write_all(&small).unwrap(),
                    _ => (0..VOLUME / MIB).for_each(|_| s.write_all(&big).unwrap()),
                }
            }
        });
        let near = TcpStream::connect(addr).unwrap();
        near.set_nodelay(true).unwrap();
        Pair { near, far: Some(far), memory: vec![0; MIB] }
    }

    pub(crate) fn ping(&mut self) -> f64 {
        let start = Instant::now();
        for _ in 0..PINGS {
            self.near.write_all(&[0; 64]).unwrap();
            self.near.read_exact(&mut self.memory[..64]).unwrap();
        }
        micros(start, PINGS)
    }

    pub(crate) fn stream(&mut self) -> f64 {
        self.near.write_all(&[1; 64]).unwrap();
        let start = Instant::now();
        for _ in 0..VOLUME / MIB {
            self.near.read_exact(&mut self.memory).unwrap();
        }
        gigabytes(start, VOLUME)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = self.near.shutdown(std::net::Shutdown::Both);
        let far = self.far.take().expect("taken here only");
        far.join().unwrap();
    }
}
