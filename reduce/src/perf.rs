//! Measuring collectives the way nccl-tests do, so that people can compare: sizes, repeats, checks,
//! algorithm and bus bandwidth. What is printed is the caller's; `ff reduce perf` does.

use crate::comm::Communicator;
use crate::cutoffs::{Algorithm, Cutoffs};
use crate::dtype::{DType, ReduceOp};
use crate::group::SubmitOptions;
use crate::options::Options;
use crate::request::{Operation, RawBuf, Request};
use crate::{Handle, ReduceError};
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// What is measured; names are nccl-tests'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// `all_reduce`
    AllReduce,
    /// `all_gather`
    AllGather,
    /// `reduce_scatter`
    ReduceScatter,
    /// `broadcast`
    Broadcast,
    /// `reduce`
    Reduce,
    /// `alltoall`
    AllToAll,
    /// `gather`
    Gather,
    /// `scatter`
    Scatter,
    /// `sendrecv`: each rank sends to the next and receives from the one before.
    SendRecv,
}

impl Collective {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::AllReduce,
        Self::AllGather,
        Self::ReduceScatter,
        Self::Broadcast,
        Self::Reduce,
        Self::AllToAll,
        Self::Gather,
        Self::Scatter,
        Self::SendRecv,
    ];

    /// As nccl-tests call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::Broadcast => "broadcast",
            Self::Reduce => "reduce",
            Self::AllToAll => "alltoall",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::SendRecv => "sendrecv",
        }
    }

    /// Whether a reduction is part of it.
    pub fn reduces(self) -> bool {
        matches!(self, Self::AllReduce | Self::ReduceScatter | Self::Reduce)
    }

    /// Whether it has a root.
    pub fn rooted(self) -> bool {
        matches!(self, Self::Broadcast | Self::Reduce | Self::Gather | Self::Scatter)
    }

    /// Bus bandwidth over algorithm bandwidth: what the slowest link carries per byte of the message.
    pub fn bus_factor(self, ranks: u32) -> f64 {
        let n = f64::from(ranks);
        match self {
            Self::AllReduce => 2.0 * (n - 1.0) / n,
            Self::Broadcast | Self::Reduce | Self::SendRecv => 1.0,
            _ => (n - 1.0) / n,
        }
    }

    /// Whether the message is made of one block per rank.
    fn in_blocks(self) -> bool {
        matches!(self, Self::AllGather | Self::ReduceScatter | Self::AllToAll | Self::Gather | Self::Scatter)
    }

    fn has_in_place(self) -> bool {
        !matches!(self, Self::AllToAll | Self::SendRecv)
    }
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Collective {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let plain = name.trim_end_matches("_perf");
        Self::ALL.into_iter().find(|c| c.name() == plain).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|c| c.name()).collect();
            format!("{name:?} is no collective; there are {}", known.join(", "))
        })
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// What.
    pub collective: Collective,
    /// Element type.
    pub dtype: DType,
    /// Reduction, where there is one.
    pub op: ReduceOp,
    /// Root, where there is one.
    pub root: u32,
    /// Repeats that count.
    pub iterations: u32,
    /// Repeats before them.
    pub warmup: u32,
    /// Compare the results with what they must be.
    pub check: bool,
}

/// What one measurement gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Of one operation, by the slowest rank.
    pub time: Duration,
    /// Message bytes per second.
    pub algorithm_bandwidth: f64,
    /// What that is on the busiest link, bytes per second.
    pub bus_bandwidth: f64,
    /// Wrong elements over all ranks; `None`: not checked.
    pub wrong: Option<u64>,
}

/// One line: a size, out of place and in place.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Bytes of the message.
    pub bytes: usize,
    /// Elements, of a rank's block where the message is made of blocks.
    pub count: usize,
    /// Input and output apart.
    pub out_of_place: Sample,
    /// Input and output the same memory, where the collective has that.
    pub in_place: Option<Sample>,
}

/// Memory aligned for all types.
struct Memory(Vec<u128>);

impl Memory {
    fn new(bytes: usize) -> Self {
        Self(vec![0; bytes.div_ceil(16).max(1)])
    }

    fn at(&mut self, offset_bytes: usize, count: usize) -> RawBuf {
        // wrapping_add: an empty block may begin at the end.
        RawBuf { ptr: self.0.as_mut_ptr().cast::<u8>().wrapping_add(offset_bytes), count }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: u128 has no padding, and the length is the vector's.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 16) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and every bit pattern is a valid u128.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len() * 16) }
    }
}

macro_rules! numbers {
    ($($dtype:ident => $t:ty),* $(,)?) => {
        fn write(dtype: DType, to: &mut [u8], value: f64) {
            match dtype {
                $(DType::$dtype => to.copy_from_slice(&(value as $t).to_le_bytes()),)*
                DType::F16 => to.copy_from_slice(&half::f16::from_f64(value).to_le_bytes()),
                DType::BF16 => to.copy_from_slice(&half::bf16::from_f64(value).to_le_bytes()),
                other => unreachable!("{other} is refused by check()"),
            }
        }

        fn read(dtype: DType, from: &[u8]) -> f64 {
            match dtype {
                $(DType::$dtype => <$t>::from_le_bytes(from.try_into().expect("one element")) as f64,)*
                DType::F16 => half::f16::from_le_bytes(from.try_into().expect("one element")).to_f64(),
                DType::BF16 => half::bf16::from_le_bytes(from.try_into().expect("one element")).to_f64(),
                other => unreachable!("{other} is refused by check()"),
            }
        }

        /// Element types that can be measured, as nccl-tests name them where they do.
        pub const TYPES: [(&str, DType); 12] = [
            ("int8", DType::I8), ("uint8", DType::U8), ("int16", DType::I16), ("uint16", DType::U16),
            ("int32", DType::I32), ("uint32", DType::U32), ("int64", DType::I64), ("uint64", DType::U64),
            ("half", DType::F16), ("float", DType::F32), ("double", DType::F64), ("bfloat16", DType::BF16),
        ];
    };
}
numbers! {
    I8 => i8, U8 => u8, I16 => i16, U16 => u16, I32 => i32, U32 => u32, I64 => i64, U64 => u64, F32 => f32,
    F64 => f64,
}

/// Small whole numbers, which every type holds and whose sums over a few ranks every type holds.
fn value(rank: u32, index: usize) -> f64 {
    f64::from(1 + ((index as u32).wrapping_mul(7).wrapping_add(rank * 3)) % 3)
}

fn reduced(op: ReduceOp, ranks: u32, index: usize) -> f64 {
    let values = (0..ranks).map(|r| value(r, index));
    match op {
        ReduceOp::Avg => values.sum::<f64>() / f64::from(ranks),
        ReduceOp::Product => values.product(),
        ReduceOp::Min => values.fold(f64::INFINITY, f64::min),
        ReduceOp::Max => values.fold(0.0, f64::max),
        _ => values.sum(),
    }
}

/// The buffers of one size on one rank.
struct Bench<'a> {
    group: &'a Communicator,
    spec: Spec,
    /// Elements of a block, or of the message.
    count: usize,
    in_place: bool,
    input: Memory,
    output: Memory,
}

impl Bench<'_> {
    fn size(&self) -> usize {
        self.spec.dtype.size()
    }

    fn whole(&self) -> usize {
        if self.spec.collective.in_blocks() { self.count * self.group.size() as usize } else { self.count }
    }

    fn root_here(&self) -> bool {
        self.group.rank() == self.spec.root
    }

    /// Elements of this rank's input and output.
    fn lengths(&self) -> (usize, usize) {
        let (one, all) = (self.count, self.whole());
        match self.spec.collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce | Collective::SendRecv => {
                (one, one)
            }
            Collective::AllGather => (one, all),
            Collective::ReduceScatter => (all, one),
            Collective::AllToAll => (all, all),
            Collective::Gather => (one, if self.root_here() { all } else { 0 }),
            Collective::Scatter => (if self.root_here() { all } else { 0 }, one),
        }
    }

    /// This rank's block of the larger side, in bytes from its start.
    fn own_block(&self) -> usize {
        self.group.rank() as usize * self.count * self.size()
    }

    /// (input, output) as the operation takes them. In place the smaller is a part of the larger.
    fn buffers(&mut self) -> (RawBuf, RawBuf) {
        let (input, output) = self.lengths();
        if !self.in_place {
            return (self.input.at(0, input), self.output.at(0, output));
        }
        let own = self.own_block();
        match self.spec.collective {
            Collective::AllGather => (self.output.at(own, input), self.output.at(0, output)),
            Collective::Gather if self.root_here() => (self.output.at(own, input), self.output.at(0, output)),
            Collective::ReduceScatter => (self.output.at(0, input), self.output.at(own, output)),
            Collective::Scatter if self.root_here() => {
                (self.output.at(0, input), self.output.at(own, output))
            }
            _ => (self.output.at(0, input), self.output.at(0, output)),
        }
    }

    /// Fills the input, and the output with what no result is.
    fn fill(&mut self) {
        let (dtype, size, rank) = (self.spec.dtype, self.size(), self.group.rank());
        let (input, output) = self.buffers();
        let own = if self.in_place { input.ptr as usize - self.output.0.as_ptr() as usize } else { 0 };
        for element in self.output.bytes_mut()[..output.count * size].chunks_exact_mut(size) {
            write(dtype, element, 0.0);
        }
        let memory = if self.in_place { &mut self.output } else { &mut self.input };
        let bytes = &mut memory.bytes_mut()[own..own + input.count * size];
        for (index, element) in bytes.chunks_exact_mut(size).enumerate() {
            write(dtype, element, value(rank, index));
        }
    }

    /// What element `index` of this rank's output must be; `None`: nothing is written there.
    fn wanted(&self, index: usize) -> Option<f64> {
        let (rank, ranks) = (self.group.rank(), self.group.size());
        let block = index / self.count.max(1);
        let within = index % self.count.max(1);
        Some(match self.spec.collective {
            Collective::AllReduce => reduced(self.spec.op, ranks, index),
            Collective::Reduce if self.root_here() => reduced(self.spec.op, ranks, index),
            Collective::Reduce => return None,
            Collective::ReduceScatter => reduced(self.spec.op, ranks, rank as usize * self.count + index),
            Collective::Broadcast => value(self.spec.root, index),
            Collective::AllGather | Collective::Gather => value(block as u32, within),
            Collective::AllToAll => value(block as u32, rank as usize * self.count + within),
            Collective::Scatter => value(self.spec.root, rank as usize * self.count + index),
            Collective::SendRecv => value((rank + ranks - 1) % ranks, index),
        })
    }

    fn wrong(&mut self) -> u64 {
        let (dtype, size) = (self.spec.dtype, self.size());
        let output = self.buffers().1;
        let from = if self.in_place { output.ptr as usize - self.output.0.as_ptr() as usize } else { 0 };
        let bytes = &self.output.bytes()[from..from + output.count * size];
        let mut rounded = vec![0; size];
        let differs = bytes.chunks_exact(size).enumerate().filter(|(index, element)| {
            self.wanted(*index).is_some_and(|wanted| {
                write(dtype, &mut rounded, wanted);
                read(dtype, element) != read(dtype, &rounded)
            })
        });
        differs.count() as u64
    }

    fn start(&mut self) -> Result<Vec<Handle>, ReduceError> {
        let (input, output) = self.buffers();
        let Spec { collective, dtype, op, root, .. } = self.spec;
        let (rank, ranks) = (self.group.rank(), self.group.size());
        let submit = |operation: Operation, input: &[RawBuf], output: &[RawBuf]| {
            let request = Request { operation, dtype, input, output };
            let options = SubmitOptions { inline: true, ..SubmitOptions::default() };
            // SAFETY: the memory is this bench's, which waits for the handles before it touches it.
            unsafe { self.group.submit(&request, options, None) }
        };
        let operation = match collective {
            Collective::AllReduce => Operation::AllReduce(op),
            Collective::AllGather => Operation::AllGather,
            Collective::ReduceScatter => Operation::ReduceScatter(op),
            Collective::Broadcast => Operation::Broadcast { root },
            Collective::Reduce => Operation::Reduce { op, root },
            Collective::AllToAll => Operation::AllToAll,
            Collective::Gather => Operation::Gather { root },
            Collective::Scatter => Operation::Scatter { root },
            Collective::SendRecv => {
                let (to, from) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
                let receive = submit(Operation::Recv { peer: from, tag: 1 }, &[], &[output])?;
                return Ok(vec![receive, submit(Operation::Send { peer: to, tag: 1 }, &[input], &[])?]);
            }
        };
        Ok(vec![submit(operation, &[input], &[output])?])
    }

    fn once(&mut self) -> Result<(), ReduceError> {
        self.start()?.iter().try_for_each(Handle::wait)
    }

    fn sample(&mut self) -> Result<Sample, ReduceError> {
        let wrong = if self.spec.check {
            self.fill();
            self.once()?;
            let mut wrong = [self.wrong()];
            self.group.allreduce(&mut wrong, ReduceOp::Sum)?;
            Some(wrong[0])
        } else {
            None
        };
        for _ in 0..self.spec.warmup {
            self.once()?;
        }
        self.group.barrier()?;
        let started = Instant::now();
        for _ in 0..self.spec.iterations {
            self.once()?;
        }
        let mut seconds = [started.elapsed().as_secs_f64() / f64::from(self.spec.iterations.max(1))];
        self.group.allreduce(&mut seconds, ReduceOp::Max)?;
        let algorithm_bandwidth = (self.whole() * self.size()) as f64 / seconds[0];
        Ok(Sample {
            time: Duration::from_secs_f64(seconds[0]),
            algorithm_bandwidth,
            bus_bandwidth: algorithm_bandwidth * self.spec.collective.bus_factor(self.group.size()),
            wrong,
        })
    }
}

/// Measures one size; collective over the group. `bytes` is cut to whole elements, and to whole blocks.
pub fn measure(group: &Communicator, spec: &Spec, bytes: usize) -> Result<Row, ReduceError> {
    check(group, spec)?;
    let elements = bytes / spec.dtype.size();
    let count = if spec.collective.in_blocks() { elements / group.size() as usize } else { elements };
    let samples = [false, true].map(|in_place| {
        if in_place && !spec.collective.has_in_place() {
            return Ok(None);
        }
        let mut bench =
            Bench { group, spec: *spec, count, in_place, input: Memory::new(0), output: Memory::new(0) };
        let (input, output) = bench.lengths();
        let size = spec.dtype.size();
        if in_place {
            bench.output = Memory::new(input.max(output) * size);
        } else {
            bench.input = Memory::new(input * size);
            bench.output = Memory::new(output * size);
        }
        bench.sample().map(Some)
    });
    let [out_of_place, in_place] = samples;
    let whole = if spec.collective.in_blocks() { count * group.size() as usize } else { count };
    Ok(Row {
        bytes: whole * spec.dtype.size(),
        count,
        out_of_place: out_of_place?.expect("every collective has it"),
        in_place: in_place?,
    })
}

fn check(group: &Communicator, spec: &Spec) -> Result<(), ReduceError> {
    if spec.collective == Collective::SendRecv && group.size() < 2 {
        return Err(ReduceError::invalid("sendrecv needs two ranks"));
    }
    if spec.root >= group.size() {
        return Err(ReduceError::invalid(format!(
            "root {} is no rank of a group of {}",
            spec.root,
            group.size()
        )));
    }
    if !TYPES.iter().any(|(_, dtype)| *dtype == spec.dtype) {
        return Err(ReduceError::invalid(format!("elements of {} are not measured", spec.dtype)));
    }
    Ok(())
}

/// Measures every algorithm between nodes over `sizes` (ascending) and makes a table of the fastest;
/// collective over the group. For a group on one node, which needs none, an error.
pub fn tune(group: &Communicator, sizes: &[usize], iterations: u32) -> Result<Cutoffs, ReduceError> {
    if group.stats().remote_peers == 0 {
        return Err(ReduceError::invalid(
            "the group is on one node: only the way between nodes can be tuned",
        ));
    }
    let spec = Spec {
        collective: Collective::AllReduce,
        dtype: DType::F32,
        op: ReduceOp::Sum,
        root: 0,
        iterations,
        warmup: iterations.div_ceil(5),
        check: false,
    };
    let mut groups = Vec::new();
    for algorithm in Algorithm::ALL {
        let options = Options { cutoffs: Cutoffs::always(algorithm), ..group.options() };
        groups.push((algorithm, group.retuned(algorithm.name(), options)?));
    }
    let mut rows: Vec<(usize, Algorithm)> = Vec::new();
    for &bytes in sizes {
        let mut best: Option<(Duration, Algorithm)> = None;
        for (algorithm, tuned) in &groups {
            // The slowest rank's time, so that all ranks choose alike.
            let time = measure(tuned, &spec, bytes)?.out_of_place.time;
            if best.is_none_or(|(least, _)| time < least) {
                best = Some((time, *algorithm));
            }
        }
        let (_, algorithm) = best.expect("there are algorithms");
        match rows.last_mut() {
            Some(last) if last.1 == algorithm => last.0 = bytes,
            _ => rows.push((bytes, algorithm)),
        }
    }
    if let Some(last) = rows.last_mut() {
        last.0 = usize::MAX;
    }
    Cutoffs::new(rows).map_err(ReduceError::invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_factors_are_those_of_nccl_tests() {
        for collective in Collective::ALL {
            assert_eq!(collective.name().parse(), Ok(collective));
            assert_eq!(format!("{collective}_perf").parse(), Ok(collective));
        }
        assert!("hypercube".parse::<Collective>().unwrap_err().contains("all_reduce"));
        assert_eq!(Collective::AllReduce.bus_factor(4), 1.5);
        assert_eq!(Collective::AllToAll.bus_factor(4), 0.75);
        assert_eq!(Collective::Broadcast.bus_factor(4), 1.0);
    }

    #[test]
    fn numbers_round_trip_in_every_type() {
        for (name, dtype) in TYPES {
            let mut bytes = vec![0; dtype.size()];
            write(dtype, &mut bytes, 24.0);
            assert_eq!(read(dtype, &bytes), 24.0, "{name}");
        }
    }

    #[test]
    fn a_wrong_element_is_counted() {
        let group = Communicator::create(&crate::Config::new(0, 1), &crate::MemoryStore::default()).unwrap();
        let spec = Spec {
            collective: Collective::AllReduce,
            dtype: DType::F32,
            op: ReduceOp::Sum,
            root: 0,
            iterations: 1,
            warmup: 0,
            check: true,
        };
        let mut bench = Bench {
            group: &group,
            spec,
            count: 100,
            in_place: true,
            input: Memory::new(0),
            output: Memory::new(400),
        };
        bench.fill();
        bench.once().unwrap();
        assert_eq!(bench.wrong(), 0);
        write(DType::F32, &mut bench.output.bytes_mut()[40..44], 17.0);
        assert_eq!(bench.wrong(), 1);
    }
}
