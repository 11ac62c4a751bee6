//! The built-in bootstrap store: rank 0 serves a [`MemoryStore`] over TCP. Both sides prove that
//! they hold the job's secret before anything is said.
//!
//! Frames (little-endian): a request is `op u8, timeout ms u64, key length u16, value length u32,
//! key, value`; an answer is `status u8, value length u32, value`.

use crate::fork::{self, Guarded};
use crate::store::{MemoryStore, Store, StoreError};
use firefly_types::lock;
use firefly_types::{Backoff, ClusterSecret};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

const NONCE_BYTES: usize = 16;
const MOST_KEY: usize = 512;
const MOST_VALUE: usize = 64 << 10;
/// Threads serving clients at once; more are refused and come again.
const MOST_CLIENTS: usize = 8192;
/// A client that says nothing for this long is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Servers of this process by address. They live as long as the process: later groups of the same
/// job meet there again.
static SERVERS: LazyLock<Mutex<HashMap<SocketAddr, Arc<MemoryStore>>>> = LazyLock::new(Mutex::default);

/// A client of the rendezvous, and on rank 0 its server.
pub struct Rendezvous {
    stream: Mutex<TcpStream>,
    _guard: Guarded,
}

fn failed(e: impl std::fmt::Display) -> StoreError {
    StoreError::Failed(e.to_string())
}

impl Rendezvous {
    /// Meets at `address` ("host:port"). Rank 0 listens there; the others try until `timeout`.
    pub fn join(
        address: &str,
        rank: u32,
        secret: &ClusterSecret,
        timeout: Duration,
    ) -> Result<Self, StoreError> {
        let start = Instant::now();
        if rank == 0 {
            serve(resolve(address)?, secret)?;
        }
        let mut attempt = 0;
        loop {
            let error = match resolve(address).and_then(|a| Self::connect(a, secret)) {
                Ok(client) => return Ok(client),
                Err(error) => error,
            };
            attempt += 1;
            let policy = Backoff { total: timeout, ..Backoff::CLUSTER };
            match policy.delay(attempt, start.elapsed(), rand::random()) {
                Some(delay) => std::thread::sleep(delay),
                None => {
                    return Err(StoreError::Failed(format!(
                        "cannot reach the rendezvous at {address} within {timeout:?} ({error}); is rank 0 running, \
                         and are MASTER_ADDR and MASTER_PORT the same everywhere?"
                    )));
                }
            }
        }
    }

    fn connect(address: SocketAddr, secret: &ClusterSecret) -> Result<Self, StoreError> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2)).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_read_timeout(Some(HANDSHAKE)).map_err(failed)?;
        let guard = fork::guard(stream.as_fd());
        let mut theirs = [0; NONCE_BYTES];
        stream.read_exact(&mut theirs).map_err(failed)?;
        let mine: [u8; NONCE_BYTES] = rand::random();
        stream.write_all(&mine).map_err(failed)?;
        stream.write_all(&secret.prove(&[b"rendezvous client", &theirs, &mine])).map_err(failed)?;
        let mut proof = [0; 32];
        stream
            .read_exact(&mut proof)
            .map_err(|_| failed("it refused this rank: the job's secret differs (FIREFLY_JOB_SECRET)"))?;
        if !secret.verify(&[b"rendezvous server", &theirs, &mine], &proof) {
            return Err(failed("it does not hold the job's secret"));
        }
        Ok(Self { stream: Mutex::new(stream), _guard: guard })
    }

    fn call(&self, op: u8, key: &str, value: &[u8], timeout: Duration) -> Result<Vec<u8>, StoreError> {
        if key.len() > MOST_KEY || value.len() > MOST_VALUE {
            return Err(failed(format!("{key} or its value of {} bytes is too long", value.len())));
        }
        let mut stream = lock(&self.stream);
        stream.set_read_timeout(Some(timeout + HANDSHAKE)).map_err(failed)?;
        let mut frame = vec![op];
        frame.extend_from_slice(&(timeout.as_millis() as u64).to_le_bytes());
        frame.extend_from_slice(&(key.len() as u16).to_le_bytes());
        frame.extend_from_slice(&(value.len() as u32).to_le_bytes());
        frame.extend_from_slice(key.as_bytes());
        frame.extend_from_slice(value);
        stream.write_all(&frame).map_err(failed)?;
        let mut head = [0; 5];
        stream
            .read_exact(&mut head)
            .map_err(|e| failed(format!("rank 0, which serves the rendezvous, is gone ({e})")))?;
        let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if len > MOST_VALUE {
            return Err(failed(format!("an answer of {len} bytes")));
        }
        let mut value = vec![0; len];
        stream.read_exact(&mut value).map_err(failed)?;
        match head[0] {
            0 => Ok(value),
            1 => Err(StoreError::Timeout { key: key.to_owned(), waited: timeout }),
            _ => Err(failed(String::from_utf8_lossy(&value))),
        }
    }
}

impl Store for Rendezvous {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.call(0, key, value, Duration::ZERO).map(|_| ())
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        self.call(1, key, &[], timeout)
    }
}

fn resolve(address: &str) -> Result<SocketAddr, StoreError> {
    let mut addresses =
        address.to_socket_addrs().map_err(|e| failed(format!("{address} is no address to meet at: {e}")))?;
    addresses.next().ok_or_else(|| failed(format!("{address} has no address")))
}

/// Serves at `address` for the rest of the process's life, once.
fn serve(address: SocketAddr, secret: &ClusterSecret) -> Result<(), StoreError> {
    let mut servers = lock(&SERVERS);
    if servers.contains_key(&address) {
        return Ok(());
    }
    let listener = TcpListener::bind(address).map_err(|e| {
        failed(format!("cannot listen at {address} for the rendezvous: {e}; set MASTER_PORT to a free port"))
    })?;
    let store = Arc::new(MemoryStore::default());
    servers.insert(address, store.clone());
    let secret = secret.clone();
    std::thread::Builder::new()
        .name("ffreduce-rdzv".into())
        .spawn(move || {
            let _guard = fork::guard(listener.as_fd());
            let clients = Arc::new(());
            for stream in listener.incoming().flatten() {
                if Arc::strong_count(&clients) > MOST_CLIENTS {
                    continue;
                }
                let (store, secret, token) = (store.clone(), secret.clone(), clients.clone());
                let client = std::thread::Builder::new().name("ffreduce-rdzv".into()).stack_size(128 << 10);
                let spawned = client.spawn(move || {
                    let _token = token;
                    if let Err(error) = attend(stream, &store, &secret) {
                        tracing::debug!(%error, "a rendezvous client ended");
                    }
                });
                if let Err(error) = spawned {
                    tracing::warn!(%error, "cannot serve a rendezvous client");
                }
            }
        })
        .map_err(failed)?;
    Ok(())
}

/// Serves one client until it closes.
fn attend(mut stream: TcpStream, store: &MemoryStore, secret: &ClusterSecret) -> std::io::Result<()> {
    let guard = fork::guard(stream.as_fd());
    let result = talk(&mut stream, store, secret);
    drop(guard);
    result
}

fn talk(stream: &mut TcpStream, store: &MemoryStore, secret: &ClusterSecret) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HANDSHAKE))?;
    let mine: [u8; NONCE_BYTES] = rand::random();
    stream.write_all(&mine)?;
    let (mut theirs, mut proof) = ([0; NONCE_BYTES], [0; 32]);
    stream.read_exact(&mut theirs)?;
    stream.read_exact(&mut proof)?;
    if !secret.verify(&[b"rendezvous client", &mine, &theirs], &proof) {
        tracing::warn!(peer = ?stream.peer_addr(), "refused at the rendezvous: another secret");
        return Ok(());
    }
    stream.write_all(&secret.prove(&[b"rendezvous server", &mine, &theirs]))?;
    stream.set_read_timeout(None)?;
    loop {
        let mut head = [0; 15];
        stream.read_exact(&mut head)?;
        let timeout =
            u64::from_le_bytes([head[1], head[2], head[3], head[4], head[5], head[6], head[7], head[8]]);
        let key_len = u16::from_le_bytes([head[9], head[10]]) as usize;
        let value_len = u32::from_le_bytes([head[11], head[12], head[13], head[14]]) as usize;
        if key_len > MOST_KEY || value_len > MOST_VALUE {
            return Ok(());
        }
        let (mut key, mut value) = (vec![0; key_len], vec![0; value_len]);
        stream.read_exact(&mut key)?;
        stream.read_exact(&mut value)?;
        let key = String::from_utf8_lossy(&key).into_owned();
        let answer = match head[0] {
            0 => store.set(&key, &value).map(|()| Vec::new()),
            _ => store.get(&key, Duration::from_millis(timeout.min(1 << 40))),
        };
        let (status, value) = match answer {
            Ok(value) => (0u8, value),
            Err(StoreError::Timeout { .. }) => (1, Vec::new()),
            Err(error) => (2, error.to_string().into_bytes()),
        };
        let mut frame = vec![status];
        frame.extend_from_slice(&(value.len() as u32).to_le_bytes());
        frame.extend_from_slice(&value);
        stream.write_all(&frame)?;
    }
}
