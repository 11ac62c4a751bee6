//! The handwritten digits of the quickstart (1,797 images of 8×8 grey levels 0..=16, the "optical
//! recognition of handwritten digits" set of the UCI repository, as scikit-learn's package carries
//! it), parsed from its `digits.csv.gz`, and laid out on the mount both ways in which training
//! data comes: one small file per sample, and one packed array.

use anyhow::{Context as _, Result, bail, ensure};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Pixels of one image.
pub const PIXELS: usize = 64;
/// Classes.
pub const CLASSES: usize = 10;
/// Every fifth sample is held out.
const HOLD_OUT: usize = 5;
/// First bytes of the packed file; the number is the format's version.
const MAGIC: &[u8; 8] = b"FFDIGIT1";
const SAMPLE_BYTES: usize = PIXELS + 1;
/// Files that are written at a time.
const WRITERS: usize = 16;

/// One image and what it shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Grey levels, 0..=16.
    pub pixels: [u8; PIXELS],
    /// 0..=9.
    pub label: u8,
}

impl Sample {
    fn to_bytes(&self) -> [u8; SAMPLE_BYTES] {
        let mut bytes = [0; SAMPLE_BYTES];
        bytes[..PIXELS].copy_from_slice(&self.pixels);
        bytes[PIXELS] = self.label;
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        ensure!(bytes.len() == SAMPLE_BYTES, "a sample has {SAMPLE_BYTES} bytes, not {}", bytes.len());
        let mut pixels = [0; PIXELS];
        pixels.copy_from_slice(&bytes[..PIXELS]);
        let label = bytes[PIXELS];
        ensure!(
            pixels.iter().all(|&p| p <= 16) && usize::from(label) < CLASSES,
            "not a digit: a value is out of range"
        );
        Ok(Self { pixels, label })
    }

    /// Pixels scaled to 0..=1.
    pub fn features(&self) -> [f32; PIXELS] {
        self.pixels.map(|p| f32::from(p) / 16.0)
    }
}

/// Parses scikit-learn's `digits.csv.gz`: 64 grey levels and the label per line.
pub fn parse_csv_gz(path: &Path) -> Result<Vec<Sample>> {
    let file = fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut text = String::new();
    flate2::read::GzDecoder::new(file)
        // The real one unpacks to 240 kB; a limit keeps a wrong file from filling the memory.
        .take(16 << 20)
        .read_to_string(&mut text)
        .with_context(|| format!("{} is not gzip", path.display()))?;
    let mut samples = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let bytes = line
            .split(',')
            .map(|field| {
                field.trim().parse::<f32>().ok().filter(|v| (0.0..=16.0).contains(v)).map(|v| v as u8)
            })
            .collect::<Option<Vec<u8>>>()
            .with_context(|| format!("{} line {}: not numbers from 0 to 16", path.display(), number + 1))?;
        samples.push(
            Sample::from_bytes(&bytes).with_context(|| format!("{} line {}", path.display(), number + 1))?,
        );
    }
    ensure!(samples.len() > HOLD_OUT, "{} holds only {} samples", path.display(), samples.len());
    Ok(samples)
}

/// Writes the samples below `dir`: `train/` and `test/` with a file per sample, and `packed.bin`.
/// Calls `progress` with the number of files written, from several threads.
pub fn write(samples: &[Sample], dir: &Path, progress: impl Fn(usize) + Sync) -> Result<()> {
    for part in ["train", "test"] {
        fs::create_dir_all(dir.join(part))?;
    }
    // A new file on a distributed file system is a round trip or two: many at a time.
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let write_some = || -> Result<()> {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(sample) = samples.get(i) else { return Ok(()) };
            let part = if i % HOLD_OUT == 0 { "test" } else { "train" };
            let path = dir.join(part).join(format!("{i:04}.bin"));
            fs::write(&path, sample.to_bytes())
                .with_context(|| format!("cannot write {}", path.display()))?;
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        }
    };
    std::thread::scope(|scope| -> Result<()> {
        let writers: Vec<_> = (0..WRITERS).map(|_| scope.spawn(write_some)).collect();
        for writer in writers {
            writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(())
    })?;
    let mut packed = Vec::with_capacity(16 + samples.len() * SAMPLE_BYTES);
    packed.extend_from_slice(MAGIC);
    packed.extend_from_slice(&(samples.len() as u64).to_le_bytes());
    for sample in samples {
        packed.extend_from_slice(&sample.to_bytes());
    }
    let mut file = fs::File::create(dir.join("packed.bin"))?;
    file.write_all(&packed)?;
    file.sync_all()?;
    Ok(())
}

/// Reads the held-out samples from the packed file.
pub fn read_held_out(dir: &Path) -> Result<Vec<Sample>> {
    let path = dir.join("packed.bin");
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let Some((header, body)) = bytes.split_at_checked(16) else { bail!("{} is cut off", path.display()) };
    ensure!(&header[..8] == MAGIC, "{} is not a packed digits file", path.display());
    let count = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
    ensure!(body.len() as u64 == count * SAMPLE_BYTES as u64, "{} is cut off", path.display());
    body.chunks_exact(SAMPLE_BYTES).step_by(HOLD_OUT).map(Sample::from_bytes).collect()
}

/// The training samples' files, sorted, so that every rank sees the same order.
pub fn train_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let train = dir.join("train");
    let mut files = fs::read_dir(&train)
        .with_context(|| format!("cannot list {}", train.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    files.sort();
    ensure!(!files.is_empty(), "{} is empty", train.display());
    Ok(files)
}

/// Reads one sample's file.
pub fn read_file(path: &Path) -> Result<Sample> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Sample::from_bytes(&bytes).with_context(|| format!("{} is damaged", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(i: usize) -> Sample {
        let mut pixels = [0; PIXELS];
        pixels[i % PIXELS] = (i % 17) as u8;
        Sample { pixels, label: (i % 10) as u8 }
    }

    #[test]
    fn both_layouts_give_the_samples_back() {
        let dir = tempfile::tempdir().unwrap();
        let samples: Vec<_> = (0..23).map(sample).collect();
        write(&samples, dir.path(), |_| ()).unwrap();
        let held_out = read_held_out(dir.path()).unwrap();
        assert_eq!(held_out, samples.iter().step_by(HOLD_OUT).cloned().collect::<Vec<_>>());
        let train: Vec<_> = train_files(dir.path()).unwrap().iter().map(|f| read_file(f).unwrap()).collect();
        let expected: Vec<_> =
            samples.iter().enumerate().filter(|(i, _)| i % HOLD_OUT != 0).map(|(_, s)| s.clone()).collect();
        assert_eq!(train, expected);
    }

    #[test]
    fn damage_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        write(&(0..23).map(sample).collect::<Vec<_>>(), dir.path(), |_| ()).unwrap();
        let packed = dir.path().join("packed.bin");
        let mut bytes = fs::read(&packed).unwrap();
        bytes.pop();
        fs::write(&packed, &bytes).unwrap();
        assert!(read_held_out(dir.path()).is_err());
        let file = &train_files(dir.path()).unwrap()[0];
        fs::write(file, [99; SAMPLE_BYTES]).unwrap();
        assert!(read_file(file).is_err());
    }

    #[test]
    fn csv_errors_name_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("digits.csv.gz");
        let line = vec!["3"; SAMPLE_BYTES].join(",");
        let text = format!("{line}\n{line}\n3,x\n");
        let mut encoder = flate2::write::GzEncoder::new(fs::File::create(&path).unwrap(), Default::default());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap();
        assert!(format!("{:#}", parse_csv_gz(&path).unwrap_err()).contains("line 3"));
    }
}
