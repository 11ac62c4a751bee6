//! `ff reduce perf`: bandwidth and latency of collectives, in the words and columns of nccl-tests.

use crate::cmd::ranks;
use crate::context::{Global, Usage};
use anyhow::{Context, Result, bail};
use firefly_reduce::perf::{Collective, Row, Sample, Spec, TYPES, measure, tune};
use firefly_reduce::{Communicator, Cutoffs, DType, ReduceOp};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

/// What to measure. Flags are those of nccl-tests where those have them.
#[derive(clap::Args, Clone, Debug)]
pub struct PerfArgs {
    /// Collectives: all_reduce, all_gather, reduce_scatter, broadcast, reduce, alltoall, gather, scatter,
    /// sendrecv, or `all`
    #[arg(default_value = "all_reduce")]
    collectives: Vec<String>,
    /// Smallest message in bytes: 8, 4K, 1M
    #[arg(short = 'b', long, default_value = "8", value_parser = bytes)]
    minbytes: usize,
    /// Largest message in bytes
    #[arg(short = 'e', long, default_value = "64M", value_parser = bytes)]
    maxbytes: usize,
    /// From one size to the next: times this
    #[arg(short = 'f', long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..))]
    stepfactor: u32,
    /// From one size to the next: plus this many bytes, instead of -f
    #[arg(short = 'i', long, value_parser = bytes)]
    stepbytes: Option<usize>,
    /// Repeats that count
    #[arg(short = 'n', long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    iters: u32,
    /// Repeats before them
    #[arg(short = 'w', long, default_value_t = 5)]
    warmup_iters: u32,
    /// Check the results: 1 or 0
    #[arg(short = 'c', long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    check: u8,
    /// sum, prod, min, max or avg
    #[arg(short = 'o', long, default_value = "sum")]
    op: String,
    /// Element type: float, double, half, bfloat16, int8, uint8, int32, ...
    #[arg(short = 'd', long, default_value = "float")]
    datatype: String,
    /// Root of broadcast, reduce, gather and scatter
    #[arg(short = 'r', long, default_value_t = 0)]
    root: u32,
    /// Ranks to start on this machine, outside of a job (nccl-tests: -g)
    #[arg(short = 'g', long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    ranks: u32,
    /// Spread the ranks that are started here over this many nodes, which reach each other by the network
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    nodes: u32,
    /// Measure the algorithms between nodes and write the table of the fastest to this file, which
    /// FIREFLY_REDUCE_TUNING then names
    #[arg(long, value_name = "FILE")]
    tune: Option<PathBuf>,
}

/// "4K" is 4096, as in nccl-tests.
fn bytes(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.char_indices().find(|(_, c)| !c.is_ascii_digit()) {
        Some((at, _)) => text.split_at(at),
        None => (text, ""),
    };
    let shift = match unit.to_ascii_uppercase().trim_end_matches('B').trim_end_matches('I') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err(format!("{text:?} is no number of bytes: write 8, 4K, 1M or 1G")),
    };
    let number: usize =
        digits.parse().map_err(|_| format!("{text:?} is no number of bytes: write 8, 4K, 1M or 1G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

fn wrong_usage(text: String) -> anyhow::Error {
    Usage(text).into()
}

impl PerfArgs {
    fn sizes(&self) -> Vec<usize> {
        let mut sizes = Vec::new();
        let mut size = self.minbytes;
        while size <= self.maxbytes {
            sizes.push(size);
            size = match self.stepbytes {
                Some(step) => size + step.max(1),
                None => (size * self.stepfactor as usize).max(1),
            };
        }
        sizes
    }

    fn specs(&self) -> Result<Vec<Spec>> {
        let dtype = self.dtype()?;
        let op = match self.op.as_str() {
            "sum" => ReduceOp::Sum,
            "prod" => ReduceOp::Product,
            "min" => ReduceOp::Min,
            "max" => ReduceOp::Max,
            "avg" => ReduceOp::Avg,
            other => {
                return Err(wrong_usage(format!("{other:?} is no reduction: sum, prod, min, max or avg")));
            }
        };
        let mut collectives = Vec::new();
        for name in &self.collectives {
            if name == "all" {
                collectives.extend(Collective::ALL);
            } else {
                collectives.push(name.parse().map_err(wrong_usage)?);
            }
        }
        let spec = |collective| Spec {
            collective,
            dtype,
            op,
            root: self.root,
            iterations: self.iters,
            warmup: self.warmup_iters,
            check: self.check == 1,
        };
        Ok(collectives.into_iter().map(spec).collect())
    }

    fn dtype(&self) -> Result<DType> {
        let known = || TYPES.map(|(name, _)| name).join(", ");
        let found = TYPES.iter().find(|(name, _)| *name == self.datatype);
        found
            .map(|(_, dtype)| *dtype)
            .ok_or_else(|| wrong_usage(format!("{:?} is no element type: {}", self.datatype, known())))
    }
}

/// Runs `ff reduce perf`: as a rank of the job that the environment describes, else on ranks that it
/// starts on this machine.
pub fn run(args: &PerfArgs, global: &Global) -> Result<ExitCode> {
    args.specs()?; // wrong usage is said once, before any rank is there
    match std::env::var_os("WORLD_SIZE") {
        Some(_) => rank(args, global),
        None => start(args),
    }
}

/// Starts the ranks on this machine with this command's own arguments.
fn start(args: &PerfArgs) -> Result<ExitCode> {
    if args.nodes > args.ranks {
        return Err(wrong_usage(format!("{} ranks cannot be spread over {} nodes", args.ranks, args.nodes)));
    }
    // Consecutive ranks share a node, as launchers place them.
    let per_node = args.ranks.div_ceil(args.nodes);
    ranks::start(args.ranks, |rank| (args.nodes > 1).then(|| format!("perf node {}", rank / per_node)))
}

/// One rank of the group.
fn rank(args: &PerfArgs, global: &Global) -> Result<ExitCode> {
    let group = Communicator::from_env()?;
    let wrong = match &args.tune {
        Some(path) => {
            let table = tune(&group, &args.sizes(), args.iters)?;
            if group.rank() == 0 {
                write_table(path, &table, global.json)?;
            }
            0
        }
        None => perf(args, global, &group)?,
    };
    // Nobody leaves while another still reads.
    group.barrier()?;
    if wrong > 0 {
        bail!("{wrong} elements are wrong: memory, a network card or this build is broken");
    }
    Ok(ExitCode::SUCCESS)
}

fn write_table(path: &std::path::Path, table: &Cutoffs, json: bool) -> Result<()> {
    std::fs::write(path, table.to_file()).with_context(|| format!("cannot write {}", path.display()))?;
    if json {
        let rows: Vec<_> = table
            .rows()
            .iter()
            .map(|(most, algorithm)| json!({"up_to_bytes": most, "algorithm": algorithm.name()}))
            .collect();
        println!("{}", serde_json::to_string_pretty(&json!({"file": path, "rows": rows}))?);
    } else {
        print!("{}", table.to_file());
        println!("# use it: FIREFLY_REDUCE_TUNING={}", path.display());
    }
    Ok(())
}

/// Measures and prints on rank 0; the number of wrong elements.
fn perf(args: &PerfArgs, global: &Global, group: &Communicator) -> Result<u64> {
    let mut wrong = 0;
    let mut results = Vec::new();
    for spec in args.specs()? {
        let print = group.rank() == 0 && !global.json;
        if print {
            print!("{}", head(&spec, args, group));
        }
        let (mut bus, mut samples) = (0.0, 0u32);
        let mut rows = Vec::new();
        for bytes in args.sizes() {
            let row = measure(group, &spec, bytes)?;
            for sample in [Some(row.out_of_place), row.in_place].into_iter().flatten() {
                wrong += sample.wrong.unwrap_or(0);
                bus += sample.bus_bandwidth;
                samples += 1;
            }
            if print {
                println!("{}", line(&spec, &row));
            }
            rows.push(json!({
                "bytes": row.bytes,
                "count": row.count,
                "out_of_place": json_of(&row.out_of_place),
                "in_place": row.in_place.as_ref().map(json_of),
            }));
        }
        let average = bus / f64::from(samples.max(1)) / 1e9;
        if print {
            println!("# Out of bounds values : {wrong} {}", if wrong == 0 { "OK" } else { "FAILED" });
            println!("# Avg bus bandwidth    : {average:<10.6}\n#");
        }
        results.push(json!({
            "collective": spec.collective.name(),
            "type": args.datatype,
            "redop": spec.collective.reduces().then_some(&args.op),
            "root": spec.collective.rooted().then_some(args.root),
            "rows": rows,
            "average_bus_bandwidth_gb_per_s": average,
        }));
    }
    if group.rank() == 0 && global.json {
        let stats = group.stats();
        let value = json!({
            "ranks": group.size(),
            "local_peers": stats.local_peers,
            "remote_peers": stats.remote_peers,
            "results": results,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
    }
    Ok(wrong)
}

fn json_of(sample: &Sample) -> serde_json::Value {
    json!({
        "time_us": sample.time.as_secs_f64() * 1e6,
        "algbw_gb_per_s": sample.algorithm_bandwidth / 1e9,
        "busbw_gb_per_s": sample.bus_bandwidth / 1e9,
        "wrong": sample.wrong,
    })
}

fn head(spec: &Spec, args: &PerfArgs, group: &Communicator) -> String {
    let stats = group.stats();
    format!(
        "# {}_perf: {} ranks, {} reached through shared memory and {} through the network by rank 0; time is the \
         slowest rank's\n\
         # minBytes {} maxBytes {} warmup iters: {} iters: {} validation: {}\n#\n\
         # {:>12} {:>13} {:>9} {:>7} {:>7}  {:^31}  {:^31}\n\
         # {:>12} {:>13} {:>9} {:>7} {:>7}  {COLUMNS}  {COLUMNS}\n\
         # {:>12} {:>13} {:>9} {:>7} {:>7}  {UNITS}  {UNITS}\n",
        spec.collective,
        group.size(),
        stats.local_peers,
        stats.remote_peers,
        args.minbytes,
        args.maxbytes,
        spec.warmup,
        spec.iterations,
        u8::from(spec.check),
        "",
        "",
        "",
        "",
        "",
        "out-of-place",
        "in-place",
        "size",
        "count",
        "type",
        "redop",
        "root",
        "(B)",
        "(elements)",
        "",
        "",
        "",
    )
}

const COLUMNS: &str = "   time   algbw   busbw  #wrong";
const UNITS: &str = "   (us)  (GB/s)  (GB/s)        ";

fn line(spec: &Spec, row: &Row) -> String {
    let name = TYPES.iter().find(|(_, dtype)| *dtype == spec.dtype).map_or("?", |(name, _)| name);
    let redop = match spec.op {
        _ if !spec.collective.reduces() => "none",
        ReduceOp::Sum => "sum",
        ReduceOp::Product => "prod",
        ReduceOp::Min => "min",
        ReduceOp::Max => "max",
        ReduceOp::Avg => "avg",
        _ => "?",
    };
    let root = if spec.collective.rooted() { i64::from(spec.root) } else { -1 };
    let sample = |s: Option<&Sample>| match s {
        Some(s) => {
            let us = s.time.as_secs_f64() * 1e6;
            let time = if us < 1000.0 { format!("{us:.2}") } else { format!("{us:.0}") };
            let wrong = s.wrong.map_or("N/A".into(), |w| w.to_string());
            format!(
                "{time:>7} {:>7.2} {:>7.2} {wrong:>7}",
                s.algorithm_bandwidth / 1e9,
                s.bus_bandwidth / 1e9
            )
        }
        None => format!("{:>7} {:>7} {:>7} {:>7}", "N/A", "N/A", "N/A", "N/A"),
    };
    format!(
        "  {:>12} {:>13} {name:>9} {redop:>7} {root:>7}  {}  {}",
        row.bytes,
        row.count,
        sample(Some(&row.out_of_place)),
        sample(row.in_place.as_ref()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_stepped_as_nccl_tests_do() {
        assert_eq!(bytes("8"), Ok(8));
        assert_eq!(bytes("4K"), Ok(4096));
        assert_eq!(bytes("1MiB"), Ok(1 << 20));
        assert_eq!(bytes("2g"), Ok(2 << 30));
        assert!(bytes("x").is_err() && bytes("1T").is_err() && bytes("").is_err());
    }

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: PerfArgs,
    }

    fn parse(words: &[&str]) -> PerfArgs {
        <Line as clap::Parser>::parse_from([&["perf"], words].concat()).args
    }

    #[test]
    fn flags_are_those_of_nccl_tests() {
        let args =
            parse(&["all_gather_perf", "-b", "8", "-e", "64", "-f", "2", "-d", "half", "-n", "3", "-c", "0"]);
        assert_eq!(args.sizes(), [8, 16, 32, 64]);
        let specs = args.specs().unwrap();
        assert_eq!((specs[0].collective, specs[0].dtype), (Collective::AllGather, DType::F16));
        assert!(!specs[0].check && specs[0].iterations == 3);
        assert_eq!(parse(&["-b", "10", "-e", "40", "-i", "10"]).sizes(), [10, 20, 30, 40]);
        assert_eq!(parse(&["all"]).specs().unwrap().len(), Collective::ALL.len());
        for wrong in [&["-o", "xor"][..], &["-d", "string"], &["hypercube"]] {
            let error = parse(wrong).specs().unwrap_err();
            assert!(error.downcast_ref::<Usage>().is_some(), "{error}");
        }
    }

    #[test]
    fn a_line_has_the_columns_of_nccl_tests() {
        let sample = Sample {
            time: std::time::Duration::from_micros(100),
            algorithm_bandwidth: 1e9,
            bus_bandwidth: 1.5e9,
            wrong: Some(0),
        };
        let row = Row { bytes: 1024, count: 256, out_of_place: sample, in_place: None };
        let spec = parse(&[]).specs().unwrap()[0];
        let words = line(&spec, &row);
        let words: Vec<&str> = words.split_whitespace().collect();
        assert_eq!(
            words,
            ["1024", "256", "float", "sum", "-1", "100.00", "1.00", "1.50", "0", "N/A", "N/A", "N/A", "N/A"]
        );
    }
}
