//! Which way into the kernel is the shortest: blocking calls, epoll, io_uring, and sends without a
//! copy. The same two loops over each: an echo of 64 bytes, and a stream of 1 MiB pieces. What
//! `docs/benchmarks.md` says about the choice comes from here.

use crate::{MIB, PINGS, VOLUME, gigabytes, micros};
use io_uring::{IoUring, opcode, squeue::Flags, types};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Instant;

/// One end of a connection.
pub(crate) trait End: Send {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn recv(&mut self, into: &mut [u8]) -> io::Result<()>;

    fn exchange(&mut self, out: &[u8], into: &mut [u8]) -> io::Result<()> {
        self.send(out)?;
        self.recv(into)
    }

    /// Sends that the kernel copied although it was asked not to, of all.
    fn copied(&self) -> Option<(usize, usize)> {
        None
    }
}

struct Epoll {
    stream: TcpStream,
    poll: i32,
    readable: bool,
}

impl Epoll {
    fn new(stream: TcpStream) -> Epoll {
        stream.set_nonblocking(true).unwrap();
        // SAFETY: plain calls with valid arguments; the descriptor lives as long as the process.
        let poll = unsafe { libc::epoll_create1(0) };
        let events = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLET) as u32;
        let mut event = libc::epoll_event { events, u64: 0 };
        // SAFETY: as above.
        let rc = unsafe { libc::epoll_ctl(poll, libc::EPOLL_CTL_ADD, stream.as_raw_fd(), &raw mut event) };
        assert_eq!(rc, 0);
        Epoll { stream, poll, readable: false }
    }

    fn wait(&mut self) {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: room for one event.
        unsafe { libc::epoll_wait(self.poll, &raw mut event, 1, -1) };
        self.readable |= event.events & libc::EPOLLIN as u32 != 0;
    }
}

impl End for Epoll {
    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.wait(),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn recv(&mut self, into: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while at < into.len() {
            if !self.readable {
                self.wait();
                continue;
            }
            match self.stream.read(&mut into[at..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    at += n;
                    // Less than asked for: the socket is empty, as event loops conclude.
                    self.readable = at == into.len() && n == into.len();
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.readable = false,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

struct Uring {
    stream: TcpStream,
    ring: IoUring,
}

impl Uring {
    fn new(stream: TcpStream) -> io::Result<Uring> {
        // Without DEFER_TASKRUN, which binds a ring to the thread that made it: ends are made by one
        // thread and used by another. COOP_TASKRUN saves the same interrupts.
        let ring = IoUring::builder().setup_coop_taskrun().build(8)?;
        Ok(Uring { stream, ring })
    }

    fn fd(&self) -> types::Fd {
        types::Fd(self.stream.as_raw_fd())
    }

    /// Submits, waits for `n` completions and returns the last one's result by user data 1.
    fn wait(&mut self, n: usize) -> io::Result<[i32; 2]> {
        self.ring.submit_and_wait(n)?;
        let mut results = [0; 2];
        for done in self.ring.completion() {
            results[done.user_data() as usize] = done.result();
        }
        Ok(results)
    }

    fn push(&mut self, entry: &io_uring::squeue::Entry) {
        // SAFETY: the memory named is borrowed by the caller until the completion was reaped.
        unsafe { self.ring.submission().push(entry).expect("room for two") };
    }
}

fn moved(result: i32) -> io::Result<usize> {
    match result {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        n if n < 0 => Err(io::Error::from_raw_os_error(-n)),
        n => Ok(n as usize),
    }
}

impl End for Uring {
    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let entry = opcode::Send::new(self.fd(), bytes.as_ptr(), bytes.len() as u32)
                .flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL)
                .build();
            self.push(&entry);
            let n = moved(self.wait(1)?[0])?;
            bytes = &bytes[n..];
        }
        Ok(())
    }

    fn recv(&mut self, into: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while at < into.len() {
            let rest = &mut into[at..];
            let entry = opcode::Recv::new(self.fd(), rest.as_mut_ptr(), rest.len() as u32)
                .flags(libc::MSG_WAITALL)
                .build();
            self.push(&entry);
            at += moved(self.wait(1)?[0])?;
        }
        Ok(())
    }

    fn exchange(&mut self, out: &[u8], into: &mut [u8]) -> io::Result<()> {
        // Both with one call: what io_uring is good at.
        let send = opcode::Send::new(self.fd(), out.as_ptr(), out.len() as u32)
            .build()
            .flags(Flags::IO_LINK)
            .user_data(0);
        let recv = opcode::Recv::new(self.fd(), into.as_mut_ptr(), into.len() as u32)
            .flags(libc::MSG_WAITALL)
            .build()
            .user_data(1);
        self.push(&send);
        self.push(&recv);
        moved(self.wait(2)?[1]).map(drop)
    }
}

/// Blocking calls; with `zero`, sends without a copy where the kernel can.
struct Blocking {
    stream: TcpStream,
    zero: bool,
    sent: usize,
    copied: usize,
    outstanding: usize,
}

impl Blocking {
    fn new(stream: TcpStream, zero: bool) -> Blocking {
        if zero {
            let on: libc::c_int = 1;
            // SAFETY: an option of an integer.
            let rc = unsafe {
                let at = (&raw const on).cast();
                libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, at, 4)
            };
            assert_eq!(rc, 0, "SO_ZEROCOPY: {}", io::Error::last_os_error());
        }
        Blocking { stream, zero, sent: 0, copied: 0, outstanding: 0 }
    }

    /// Takes notices that the kernel has let go of memory; says of each whether it copied after all.
    fn reap(&mut self) {
        while self.outstanding > 0 {
            let mut control = [0u64; 16];
            // SAFETY: a zeroed header with a control buffer of the length given.
            let (rc, header) = unsafe {
                let mut header: libc::msghdr = std::mem::zeroed();
                header.msg_control = control.as_mut_ptr().cast();
                header.msg_controllen = size_of_val(&control);
                (libc::recvmsg(self.stream.as_raw_fd(), &raw mut header, libc::MSG_ERRQUEUE), header)
            };
            if rc < 0 {
                // Waits for the next: the memory must not be reused before.
                let mut poll = libc::pollfd { fd: self.stream.as_raw_fd(), events: 0, revents: 0 };
                // SAFETY: one valid entry.
                unsafe { libc::poll(&raw mut poll, 1, 1000) };
                continue;
            }
            // SAFETY: the kernel filled one control message with an extended error.
            let error = unsafe {
                let cmsg = libc::CMSG_FIRSTHDR(&raw const header);
                std::ptr::read_unaligned(libc::CMSG_DATA(cmsg).cast::<libc::sock_extended_err>())
            };
            // SO_EE_ORIGIN_ZEROCOPY tells a range of sends; SO_EE_CODE_ZEROCOPY_COPIED is 1.
            let range = (error.ee_data - error.ee_info + 1) as usize;
            self.outstanding -= range.min(self.outstanding);
            self.copied += if error.ee_code == 1 { range } else { 0 };
        }
    }
}

impl End for Blocking {
    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if !self.zero {
            return self.stream.write_all(bytes);
        }
        while !bytes.is_empty() {
            let flags = libc::MSG_ZEROCOPY | libc::MSG_NOSIGNAL;
            // SAFETY: the bytes stay borrowed until `reap` saw that the kernel let go of them.
            let n = unsafe { libc::send(self.stream.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
            if n < 0 {
                return Err(io::Error::last_os_error());
            }
            (self.sent, self.outstanding) = (self.sent + 1, self.outstanding + 1);
            bytes = &bytes[n as usize..];
        }
        self.reap();
        Ok(())
    }

    fn recv(&mut self, into: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(into)
    }

    fn copied(&self) -> Option<(usize, usize)> {
        self.zero.then_some((self.copied, self.sent))
    }
}

/// How a pair's ends reach the kernel.
#[derive(Clone, Copy)]
pub(crate) enum Way {
    Blocking,
    Epoll,
    Uring,
    ZeroCopy,
}

fn end(way: Way, stream: TcpStream) -> io::Result<Box<dyn End>> {
    stream.set_nodelay(true)?;
    Ok(match way {
        Way::Blocking => Box::new(Blocking::new(stream, false)),
        Way::ZeroCopy => Box::new(Blocking::new(stream, true)),
        Way::Epoll => Box::new(Epoll::new(stream)),
        Way::Uring => Box::new(Uring::new(stream)?),
    })
}

/// One connected pair; the far end echoes and takes streams as it is asked.
pub(crate) struct Pair {
    near: Option<Box<dyn End>>,
    far: Option<std::thread::JoinHandle<()>>,
    big: Vec<u8>,
}

impl Pair {
    pub(crate) fn new(way: Way) -> io::Result<Pair> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let near = end(way, TcpStream::connect(listener.local_addr()?)?)?;
        let mut far = end(way, listener.accept()?.0)?;
        let far = std::thread::spawn(move || {
            let (mut small, mut big) = ([0; 64], vec![1; MIB]);
            let mut next = far.recv(&mut small).is_ok();
            while next {
                let out = small;
                next = match small[0] {
                    0 => far.exchange(&out, &mut small).is_ok(),
                    _ => {
                        (0..VOLUME / MIB).for_each(|_| far.recv(&mut big).unwrap());
                        far.exchange(&out, &mut small).is_ok()
                    }
                };
            }
        });
        Ok(Pair { near: Some(near), far: Some(far), big: vec![1; MIB] })
    }

    fn near(&mut self) -> &mut dyn End {
        self.near.as_deref_mut().expect("taken when dropped only")
    }

    pub(crate) fn ping(&mut self) -> f64 {
        let mut small = [0; 64];
        let start = Instant::now();
        for _ in 0..PINGS {
            self.near().exchange(&[0; 64], &mut small).unwrap();
        }
        micros(start, PINGS)
    }

    pub(crate) fn stream(&mut self) -> f64 {
        let mut small = [1; 64];
        let start = Instant::now();
        self.near().send(&small).unwrap();
        for _ in 0..VOLUME / MIB {
            let near = self.near.as_deref_mut().expect("taken when dropped only");
            near.send(&self.big).unwrap();
        }
        self.near().recv(&mut small).unwrap();
        gigabytes(start, VOLUME)
    }

    pub(crate) fn copied(&self) -> Option<(usize, usize)> {
        self.near.as_ref()?.copied()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Its end is what ends the far thread.
        drop(self.near.take());
        let far = self.far.take().expect("taken here only");
        far.join().unwrap();
    }
}
