//! Power cuts: what was durable survives, and what is found is some state in between.

use super::*;
use rand::SeedableRng;
use std::collections::BTreeMap;

/// One chunk's history in a run: contents by version.
#[derive(Default)]
struct History {
    /// `None`: the version that removed it.
    states: BTreeMap<u64, Option<Bytes>>,
    /// Newest version known to be durable, at least as pending.
    durable: u64,
    /// Commits that were asked for.
    committed: u64,
}

impl History {
    fn at(&self, version: u64) -> Option<&Bytes> {
        self.states.get(&version)?.as_ref()
    }
}

pub(super) struct Run {
    pub(super) seed: u64,
    pub(super) options: EngineOptions,
    pub(super) rounds: u32,
    /// Disk operations until the power cut, at most.
    pub(super) fuse: u64,
    pub(super) sector: u32,
    pub(super) lying: bool,
}

impl Run {
    pub(super) fn new(seed: u64) -> Self {
        let sector = if seed.is_multiple_of(3) { 512 } else { 4096 };
        // Some with a log of a few sectors: a checkpoint is nearly always under way.
        let log_bytes = if seed % 2 == 1 { 24 << 10 } else { SMALL.log_bytes };
        Self {
            seed,
            options: EngineOptions { log_bytes, ..SMALL },
            rounds: 6,
            fuse: 60,
            sector,
            lying: false,
        }
    }

    /// Runs, and says what went wrong.
    pub(super) fn go(&self) -> Result<(), String> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let disk = MemDisk::default();
        disk.set_sector(self.sector);
        disk.lie_about_sync(self.lying);
        let (mut engine, _) = open(&disk, self.options);
        let mut chunks: BTreeMap<ChunkId, History> = BTreeMap::new();
        for round in 0..self.rounds {
            let at = |what: String| format!("seed {} round {round}: {what}", self.seed);
            disk.fail_after(Some(rng.random_range(0..self.fuse)));
            'work: for _ in 0..60 {
                // A few writes at once, each on a chunk of its own.
                let mut group = BTreeMap::new();
                for _ in 0..rng.random_range(1..5) {
                    let id = chunk(rng.random_range(0..6));
                    let exists = chunks.get(&id).is_some_and(|h| h.at(h.committed).is_some());
                    group.entry(id).or_insert_with(|| match exists && rng.random_bool(0.08) {
                        true => update(id, Kind::Remove, 0, 0, None),
                        false => random_update(&mut rng, id),
                    });
                }
                // Some take effect as they are written: what a target that is being filled does.
                let at_once = rng.random_bool(0.15);
                for (n, (id, update)) in group.iter().enumerate() {
                    let history = chunks.entry(*id).or_default();
                    let before = history.at(history.committed).cloned();
                    let base = if before.is_some() { history.committed } else { 0 };
                    let mut next = before.unwrap_or_default();
                    model(&mut next, update);
                    let version = history.committed + 1;
                    history.states.insert(version, (update.kind != Kind::Remove).then_some(next));
                    engine.write(n as u64, base, version, update.clone(), at_once);
                }
                // Disk requests are carried out in any order that the engine leaves open.
                let done = engine.run_in_order(&disk, |n| rng.random_range(0..n));
                for done in done {
                    let Done::Written { chunk, result, .. } = done else {
                        return Err(at(format!("{done:?}")));
                    };
                    let history = chunks.get_mut(&chunk).expect("it was written");
                    match result {
                        Ok(meta) => {
                            history.durable = meta.version;
                            history.committed += u64::from(at_once);
                        }
                        Err(WriteError::Failed) => break 'work,
                        Err(WriteError::NoSpace) => return Err(at("no space".into())),
                    }
                }
                for id in group.keys().filter(|_| !at_once) {
                    let history = chunks.get_mut(id).expect("it was written");
                    if rng.random_bool(0.1) {
                        engine.drop_pending(*id, history.committed + 1);
                        history.durable = history.committed;
                        engine.run(&disk);
                        if engine.failed().is_some() {
                            // It may be there or not.
                            break 'work;
                        }
                        history.states.remove(&(history.committed + 1));
                    } else {
                        engine.commit(*id, history.committed + 1);
                        history.committed += 1;
                    }
                }
                if rng.random_bool(0.3) {
                    engine.run_in_order(&disk, |n| rng.random_range(0..n));
                }
                if engine.failed().is_some() {
                    break;
                }
                if rng.random_bool(0.2) {
                    for (id, history) in &chunks {
                        let held = read(&engine, &disk, *id, false).map_err(|e| at(e.to_string()))?;
                        if held.as_ref().map(|(_, bytes)| bytes) != history.at(history.committed) {
                            return Err(at(format!("{id} version {} reads wrong", history.committed)));
                        }
                    }
                }
            }
            drop(engine);
            disk.crash(|n| rng.random_range(0..n));
            // Opening can be cut short too.
            while rng.random_bool(0.3) {
                disk.fail_after(Some(rng.random_range(0..3)));
                let _ = Core::<Bytes>::open(&disk, HEADER, self.options);
                disk.crash(|n| rng.random_range(0..n));
            }
            disk.fail_after(None);
            let recovered;
            (engine, recovered) = Core::open(&disk, HEADER, self.options).map_err(|e| at(e.to_string()))?;
            let audited = engine.audit(&disk).map_err(|e| at(e.to_string()));
            if !self.lying {
                audited?;
            }
            for (id, history) in &mut chunks {
                let committed =
                    recovered.committed.iter().find(|(c, _)| c == id).map_or(0, |(_, m)| m.version);
                let pending = recovered.pending.iter().find(|p| p.chunk == *id).map(|p| p.meta.version);
                // A chunk that is not there is in one of the states in which it is not.
                let most = history.durable.max(history.committed + 1);
                let absent = || {
                    let none = |v: &u64| *v == 0 || history.states.get(v) == Some(&None);
                    (history.durable..=most).find(none).unwrap_or(0)
                };
                let newest = pending.unwrap_or_else(|| if committed == 0 { absent() } else { committed });
                if committed > most || newest < history.durable || newest > most {
                    return Err(at(format!(
                        "{id}: {committed} committed and {pending:?} pending, but {} was durable and {} committed",
                        history.durable, history.committed
                    )));
                }
                for pending in [false, true] {
                    let held = read(&engine, &disk, *id, pending).map_err(|e| at(e.to_string()))?;
                    if let Some((meta, bytes)) = held
                        && (history.at(meta.version).unwrap_or(&Bytes::new()) != &bytes
                            || meta.digest != Digest::of(&bytes))
                    {
                        return Err(at(format!("{id} version {} has other content", meta.version)));
                    }
                }
                if let Some(version) = pending {
                    engine.commit(*id, version);
                }
                (history.durable, history.committed) = (newest, newest);
                history.states.retain(|version, _| *version <= newest);
            }
        }
        Ok(())
    }
}

#[test]
fn crashes_lose_nothing_that_was_durable_and_invent_nothing() {
    for seed in 0..400 {
        Run::new(seed).go().unwrap();
    }
}

/// The same short history, with the power cut after every single disk operation of it.
#[test]
fn a_power_cut_after_any_disk_operation_is_survived() {
    let mut operation = 0;
    let mut ended = false;
    while !ended {
        for seed in 0..3u64 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed * 1_000_003 + operation);
            let disk = MemDisk::default();
            disk.set_sector(512);
            // Ten sectors: a checkpoint every few groups.
            let options = EngineOptions { log_bytes: 16 << 10, ..SMALL };
            disk.fail_after(Some(operation));
            let mut durable: BTreeMap<ChunkId, (u64, Bytes)> = BTreeMap::new();
            let mut attempted: Option<(ChunkId, Bytes)> = None;
            if let Ok((engine, _)) = Core::<Bytes>::open(&disk, HEADER, options) {
                ended = true;
                for n in 0..40u64 {
                    let id = chunk((n % 3) as u32);
                    let (version, mut bytes) = durable.get(&id).cloned().unwrap_or_default();
                    let update =
                        update(id, Kind::Write, (n as u32 * 2741) % 9000, 0, Some(vec![n as u8 + 1; 6000]));
                    model(&mut bytes, &update);
                    attempted = Some((id, bytes.clone()));
                    if apply(&engine, &disk, version, update).is_err() {
                        ended = false;
                        break;
                    }
                    durable.insert(id, (version + 1, bytes));
                    attempted = None;
                }
            }
            disk.crash(|n| rng.random_range(0..n));
            let (engine, recovered) = Core::<Bytes>::open(&disk, HEADER, options)
                .unwrap_or_else(|e| panic!("operation {operation} seed {seed}: {e}"));
            engine.audit(&disk).unwrap_or_else(|e| panic!("operation {operation} seed {seed}: {e}"));
            recovered.pending.iter().for_each(|p| engine.commit(p.chunk, p.meta.version));
            for (id, (version, bytes)) in &durable {
                let (meta, held) = read(&engine, &disk, *id, false).unwrap().expect("it was durable");
                let newer = attempted
                    .as_ref()
                    .is_some_and(|(a, b)| a == id && *b == held && meta.version == version + 1);
                assert!(
                    newer || (meta.version == *version && held == *bytes),
                    "operation {operation} seed {seed}: {id}"
                );
            }
        }
        operation += 1;
    }
    assert!(operation > 150, "only {operation} operations");
    println!("{operation} operations");
}
