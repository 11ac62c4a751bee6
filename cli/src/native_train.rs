//! The built-in model of `ff quickstart --native`: softmax regression on the digits, data-parallel
//! over `reduce`, reading its samples file by file through the mount and checkpointing to it. It
//! is what a rank of the job runs (`ff native-train`), started by an agent like any other program.

use crate::digits::{self, CLASSES, PIXELS, Sample};
use anyhow::{Context as _, Result, bail, ensure};
use firefly_reduce::{Communicator, ReduceOp};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Weights and one bias for each class.
const PARAMETERS: usize = CLASSES * (PIXELS + 1);
const LEARNING_RATE: f32 = 2.0;
const MOMENTUM: f32 = 0.9;
/// Samples per step over all ranks.
const GLOBAL_BATCH: usize = 120;
/// First bytes of a checkpoint; the number is the format's version.
const MAGIC: &[u8; 8] = b"FFNATIV1";

/// What a rank of the native training job is told.
#[derive(clap::Args, Clone, Debug)]
pub struct NativeTrainArgs {
    /// Folder with the digits, written by the quickstart
    #[arg(long)]
    pub data: PathBuf,
    /// Folder for checkpoints
    #[arg(long)]
    pub checkpoint: PathBuf,
    /// Passes over the training samples
    #[arg(long, default_value_t = 24)]
    pub epochs: u32,
}

/// Trainable state: what a checkpoint holds.
#[derive(Clone, Debug, PartialEq)]
struct Model {
    epoch: u32,
    weights: Vec<f32>,
    velocity: Vec<f32>,
}

impl Model {
    fn new() -> Self {
        Self { epoch: 0, weights: vec![0.0; PARAMETERS], velocity: vec![0.0; PARAMETERS] }
    }

    fn scores(&self, features: &[f32; PIXELS]) -> [f32; CLASSES] {
        std::array::from_fn(|class| {
            let row = &self.weights[class * (PIXELS + 1)..][..PIXELS + 1];
            row[PIXELS] + row[..PIXELS].iter().zip(features).map(|(w, x)| w * x).sum::<f32>()
        })
    }

    /// Adds the gradient of the cross entropy on `sample` to `gradient`; returns the loss.
    fn accumulate(&self, sample: &Sample, gradient: &mut [f32]) -> f32 {
        let features = sample.features();
        let scores = self.scores(&features);
        let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps = scores.map(|s| (s - most).exp());
        let sum: f32 = exps.iter().sum();
        for class in 0..CLASSES {
            let error = exps[class] / sum - f32::from(u8::from(class == usize::from(sample.label)));
            let row = &mut gradient[class * (PIXELS + 1)..][..PIXELS + 1];
            for (g, x) in row[..PIXELS].iter_mut().zip(&features) {
                *g += error * x;
            }
            row[PIXELS] += error;
        }
        sum.ln() + most - scores[usize::from(sample.label)]
    }

    fn step(&mut self, mean_gradient: &[f32]) {
        for ((w, v), g) in self.weights.iter_mut().zip(&mut self.velocity).zip(mean_gradient) {
            *v = MOMENTUM * *v + g;
            *w -= LEARNING_RATE * (1.0 - MOMENTUM) * *v;
        }
    }

    fn accuracy(&self, samples: &[Sample]) -> f64 {
        let right = samples
            .iter()
            .filter(|s| {
                let scores = self.scores(&s.features());
                let best = (0..CLASSES).max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
                best == Some(usize::from(s.label))
            })
            .count();
        right as f64 / samples.len() as f64
    }

    /// Writes a checkpoint so that at every moment a whole one is there: to a new name, synced,
    /// then renamed over the old.
    fn save(&self, dir: &Path) -> Result<u64> {
        let mut bytes = Vec::with_capacity(16 + 8 * PARAMETERS);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.epoch.to_le_bytes());
        for value in self.weights.iter().chain(&self.velocity) {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        let new = dir.join("last.new");
        let mut file = fs::File::create(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&new, dir.join("last"))?;
        fs::File::open(dir)?.sync_all()?;
        Ok(bytes.len() as u64)
    }

    fn load(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("last");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        ensure!(bytes.len() == 12 + 8 * PARAMETERS + 4, "{} has the wrong length", path.display());
        let (body, crc) = bytes.split_at(bytes.len() - 4);
        ensure!(crc32c::crc32c(body).to_le_bytes() == crc, "{} is damaged", path.display());
        ensure!(&body[..8] == MAGIC, "{} is not a checkpoint of this model", path.display());
        let epoch = u32::from_le_bytes(body[8..12].try_into().expect("four bytes"));
        let values: Vec<f32> = body[12..]
            .chunks_exact(4)
            .map(|c| f32::from_le_bytes(c.try_into().expect("four bytes")))
            .collect();
        let (weights, velocity) = values.split_at(PARAMETERS);
        Ok(Some(Self { epoch, weights: weights.to_vec(), velocity: velocity.to_vec() }))
    }
}

/// What the last line of the job says, for the quickstart's closing table.
#[derive(serde::Serialize, serde::Deserialize, Clone, Debug, Default)]
#[serde(default)]
pub struct TrainResult {
    /// Share of held-out digits that are recognised, 0..=1.
    pub accuracy: f64,
    /// Optimiser steps over all attempts.
    pub steps: u64,
    /// Restarts that the job has seen.
    pub restart_count: u32,
    /// Allreduce calls of rank 0 in the last attempt.
    pub allreduce_calls: u64,
    /// Bytes that rank 0 gave to allreduce in the last attempt.
    pub allreduce_bytes: u64,
    /// Seconds that rank 0 spent in allreduce in the last attempt, waiting for peers included.
    pub allreduce_seconds: f64,
    /// `shm`, `tcp`, `shm+tcp`, or `none` for a single rank.
    pub transport: String,
}

/// How the result line begins; PyTorch's trainer and the built-in one print the same keys.
pub const RESULT_PREFIX: &str = "{\"accuracy\"";
/// Marks a saved checkpoint in the log.
pub const CHECKPOINT_PREFIX: &str = "checkpoint";

/// Runs one rank.
pub fn run(args: &NativeTrainArgs) -> Result<()> {
    let mut comm = Communicator::from_env().context("cannot join the other ranks")?;
    let (rank, world) = (comm.rank(), comm.size());
    let result = train(args, &mut comm);
    if let Err(error) = &result {
        eprintln!("rank {rank} of {world} gives up: {error:#}");
    }
    result
}

fn train(args: &NativeTrainArgs, comm: &mut Communicator) -> Result<()> {
    let (rank, world) = (comm.rank() as usize, comm.size() as usize);
    ensure!(GLOBAL_BATCH.is_multiple_of(world), "{world} ranks do not divide the batch of {GLOBAL_BATCH}");
    let files = digits::train_files(&args.data)?;
    let held_out = digits::read_held_out(&args.data)?;
    let mut model = Model::load(&args.checkpoint)?.unwrap_or_else(Model::new);
    if rank == 0 {
        if model.epoch > 0 {
            println!("resuming after epoch {} from {}", model.epoch, args.checkpoint.display());
        }
        println!("{} training samples, {} held out, {world} ranks", files.len(), held_out.len());
    }
    let steps_per_epoch = files.len() / GLOBAL_BATCH;
    let (mut calls, mut bytes, mut in_allreduce) = (0u64, 0u64, Duration::ZERO);
    while model.epoch < args.epochs {
        // Seeded by the epoch alone: every rank, and every attempt, sees the same order.
        let mut order: Vec<usize> = (0..files.len()).collect();
        order.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(u64::from(model.epoch)));
        let started = Instant::now();
        let mut loss = 0.0;
        for batch in order.chunks_exact(GLOBAL_BATCH) {
            // The gradient, and the loss behind it, in one allreduce.
            let mut gradient = vec![0.0f32; PARAMETERS + 1];
            for &index in batch.iter().skip(rank).step_by(world) {
                let sample = digits::read_file(&files[index])?;
                let sample_loss = model.accumulate(&sample, &mut gradient[..PARAMETERS]);
                gradient[PARAMETERS] += sample_loss;
            }
            let before = Instant::now();
            comm.allreduce_f32(&mut gradient, ReduceOp::Sum)?;
            in_allreduce += before.elapsed();
            calls += 1;
            bytes += 4 * gradient.len() as u64;
            for value in &mut gradient {
                *value /= GLOBAL_BATCH as f32;
            }
            loss += gradient[PARAMETERS];
            model.step(&gradient[..PARAMETERS]);
        }
        model.epoch += 1;
        if rank == 0 {
            println!(
                "epoch {:2}/{}  loss {:.4}  accuracy {:.1} %  {:.0} samples/s",
                model.epoch,
                args.epochs,
                loss / steps_per_epoch as f32,
                100.0 * model.accuracy(&held_out),
                (steps_per_epoch * GLOBAL_BATCH) as f64 / started.elapsed().as_secs_f64(),
            );
            let written = model.save(&args.checkpoint)?;
            println!("{CHECKPOINT_PREFIX} of epoch {} saved ({written} bytes)", model.epoch);
        }
    }
    comm.barrier()?;
    if rank == 0 {
        let stats = comm.stats();
        let result = TrainResult {
            accuracy: model.accuracy(&held_out),
            steps: u64::from(args.epochs) * steps_per_epoch as u64,
            restart_count: restart_count()?,
            allreduce_calls: calls,
            allreduce_bytes: bytes,
            allreduce_seconds: in_allreduce.as_secs_f64(),
            transport: stats.transport(),
        };
        println!("{}", serde_json::to_string(&result)?);
    }
    Ok(())
}

fn restart_count() -> Result<u32> {
    match std::env::var("TORCHELASTIC_RESTART_COUNT") {
        Ok(text) => text.parse().context("TORCHELASTIC_RESTART_COUNT is not a number"),
        Err(std::env::VarError::NotPresent) => Ok(0),
        Err(error) => bail!("TORCHELASTIC_RESTART_COUNT: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toy() -> Vec<Sample> {
        // Class k lights pixel k: separable, so that training must reach every sample.
        (0..200)
            .map(|i| {
                let label = (i % CLASSES) as u8;
                let mut pixels = [(i % 3) as u8; PIXELS];
                pixels[usize::from(label)] = 16;
                Sample { pixels, label }
            })
            .collect()
    }

    #[test]
    fn gradient_is_the_derivative_of_the_loss() {
        let mut model = Model::new();
        for (i, w) in model.weights.iter_mut().enumerate() {
            *w = ((i * 37 % 11) as f32 - 5.0) / 20.0;
        }
        let sample = &toy()[3];
        let mut gradient = vec![0.0; PARAMETERS];
        model.accumulate(sample, &mut gradient);
        for i in [0, 3, 64, 200, PARAMETERS - 1] {
            let h = 1e-2;
            let at = |delta: f32| {
                let mut moved = model.clone();
                moved.weights[i] += delta;
                moved.accumulate(sample, &mut vec![0.0; PARAMETERS])
            };
            let numeric = (at(h) - at(-h)) / (2.0 * h);
            assert!((numeric - gradient[i]).abs() < 1e-3, "{i}: {numeric} {}", gradient[i]);
        }
    }

    #[test]
    fn learns_separable_classes() {
        let samples = toy();
        let mut model = Model::new();
        for _ in 0..200 {
            let mut gradient = vec![0.0; PARAMETERS];
            for sample in &samples {
                model.accumulate(sample, &mut gradient);
            }
            gradient.iter_mut().for_each(|g| *g /= samples.len() as f32);
            model.step(&gradient);
        }
        assert_eq!(model.accuracy(&samples), 1.0);
    }

    #[test]
    fn checkpoints_round_trip_and_damage_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Model::load(dir.path()).unwrap(), None);
        let mut model = Model::new();
        model.epoch = 7;
        model.weights[5] = 0.25;
        model.save(dir.path()).unwrap();
        assert_eq!(Model::load(dir.path()).unwrap(), Some(model));
        let path = dir.path().join("last");
        let mut bytes = fs::read(&path).unwrap();
        bytes[100] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(Model::load(dir.path()).unwrap_err().to_string().contains("damaged"));
    }
}
