//! The engine against a model, over disks that lose power, fill up and fail.

mod crash;
mod faults;
mod formats;
mod model;
mod planted;
mod real;

use super::*;
use firefly_types::{
    AttemptEpoch, ChunkId, ClientId, ClusterId, DataId, Generation, JobId, SessionEpoch, TargetId,
};
use fs3_core::target::{Context, Digest, Kind, Meta, Recovered, Update, WriteError};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

type Bytes = Vec<u8>;
type Engine = Core<Bytes>;

const HEADER: Header = Header { cluster: ClusterId(0xfeed), target: TargetId(7) };
/// Small enough that a test passes several laps of the log and evicts leaves.
const SMALL: EngineOptions = EngineOptions {
    capacity_bytes: u64::MAX,
    grow_bytes: 256 << 10,
    log_bytes: 64 << 10,
    cache_bytes: 16 << 10,
    group_bytes: 1 << 20,
    plant: None,
};

fn chunk(index: u32) -> ChunkId {
    ChunkId { data: DataId(1), generation: Generation(2), index }
}

fn context(sequence: u64) -> Context {
    Context {
        client: ClientId(9),
        session_epoch: SessionEpoch(1),
        channel: 3,
        sequence,
        attempt: AttemptEpoch(4),
        job: JobId(5),
    }
}

fn update(chunk: ChunkId, kind: Kind, offset: u32, length: u32, payload: Option<Bytes>) -> Update<Bytes> {
    Update { context: context(1), chunk, kind, offset, length, crc: 0, chunk_bytes: 1 << 20, payload }
}

fn open(disk: &MemDisk, options: EngineOptions) -> (Engine, Recovered) {
    Core::open(disk, HEADER, options).unwrap()
}

fn written(done: Vec<Done<Bytes>>) -> Result<Meta, WriteError> {
    match <[Done<Bytes>; 1]>::try_from(done) {
        Ok([Done::Written { result, .. }]) => result,
        other => panic!("expected one write to end, got {other:?}"),
    }
}

/// Writes and commits.
fn apply(engine: &Engine, disk: &MemDisk, base: u64, update: Update<Bytes>) -> Result<Meta, WriteError> {
    let chunk = update.chunk;
    engine.write(1, base, base + 1, update, false);
    let meta = written(engine.run(disk))?;
    engine.commit(chunk, base + 1);
    Ok(meta)
}

fn read(
    engine: &Engine,
    disk: &MemDisk,
    id: ChunkId,
    pending: bool,
) -> Result<Option<(Meta, Bytes)>, EngineError> {
    let Some(mut plan) = engine.plan_read(id, pending, 0..u32::MAX) else { return Ok(None) };
    let mut out = vec![0xee; plan.meta().length as usize];
    engine.read(disk, &mut plan, 0, &mut out)?;
    Ok(Some((plan.meta(), out)))
}

fn content(engine: &Engine, disk: &MemDisk, id: ChunkId) -> Option<Bytes> {
    let (meta, out) = read(engine, disk, id, false).unwrap()?;
    assert_eq!(meta.digest, Digest::of(&out), "the digest of {id} is that of its content");
    Some(out)
}

/// What an update does, the plain way.
fn model(content: &mut Bytes, update: &Update<Bytes>) {
    let (from, length) = (update.offset as usize, update.length as usize);
    match update.kind {
        Kind::Write => {
            let payload = update.payload.as_ref().unwrap();
            content.resize(content.len().max(from + payload.len()), 0);
            content[from..from + payload.len()].copy_from_slice(payload);
        }
        Kind::Truncate => content.resize(length, 0),
        Kind::Replace => content.clone_from(update.payload.as_ref().unwrap()),
        Kind::Punch => {
            let (a, b) = (from.min(content.len()), (from + length).min(content.len()));
            content[a..b].fill(0);
        }
        Kind::Remove => content.clear(),
    }
}

fn random_update(rng: &mut ChaCha8Rng, chunk: ChunkId) -> Update<Bytes> {
    let small = rng.random_bool(0.4);
    let most = if small { 12_000 } else { 1_500_000 };
    let aligned = rng.random_bool(0.5);
    let mut number = |most: u32| {
        let n = rng.random_range(0..most);
        if aligned { n / 4096 * 4096 } else { n }
    };
    let offset = number(most);
    let length = number(if small { 9_000 } else { 60_000 }).max(1);
    let kind = match rng.random_range(0..10) {
        0..6 => Kind::Write,
        6 => Kind::Truncate,
        7 => Kind::Replace,
        _ => Kind::Punch,
    };
    let length = if kind == Kind::Truncate { offset } else { length };
    let byte: u8 = rng.random_range(0..4);
    let payload = matches!(kind, Kind::Write | Kind::Replace).then(|| {
        // Some blocks alike, some different.
        (0..length).map(|i| if byte == 3 { (i / 512) as u8 } else { byte }).collect()
    });
    update(chunk, kind, offset, length, payload)
}
