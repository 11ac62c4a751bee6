//! What RPC and channels cost over the bare socket, on loopback: `cargo bench -p firefly-net`, or one
//! part of it: `cargo bench -p firefly-net -- latency` (`stream`, `kernel`). Each figure stands next
//! to its peer's, measured in the same rounds by turns, so that load from elsewhere falls on both;
//! printed are the medians over the rounds, of the ratio too.

mod bare;
mod channel;
mod iperf;
mod kernel;
mod rpc;

use std::time::Instant;

const ROUNDS: usize = 9;
const PINGS: usize = 2000;
const VOLUME: usize = 256 << 20;
const MIB: usize = 1 << 20;

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn micros(since: Instant, n: usize) -> f64 {
    since.elapsed().as_secs_f64() * 1e6 / n as f64
}

fn gigabytes(since: Instant, bytes: usize) -> f64 {
    bytes as f64 / 1e9 / since.elapsed().as_secs_f64()
}

/// One thing to measure: its name and one round of it.
type Measure<'a> = (&'a str, Box<dyn FnMut() -> f64 + 'a>);

/// Measures all by turns. Returns for each the median and the median of its ratio to the first.
fn by_turns(measures: &mut [Measure]) -> Vec<(f64, f64)> {
    let mut rounds: Vec<Vec<f64>> = Vec::new();
    for round in 0..=ROUNDS {
        let one = measures.iter_mut().map(|(_, measure)| measure()).collect();
        // The first warms up: connections, pools, page faults.
        if round > 0 {
            rounds.push(one);
        }
    }
    (0..measures.len())
        .map(|i| {
            let mut values: Vec<f64> = rounds.iter().map(|r| r[i]).collect();
            let mut ratios: Vec<f64> = rounds.iter().map(|r| r[i] / r[0]).collect();
            (median(&mut values), median(&mut ratios))
        })
        .collect()
}

fn print_all(unit: &str, measures: &mut [Measure]) {
    for ((value, ratio), (name, _)) in by_turns(measures).into_iter().zip(measures.iter()) {
        println!("{name:44} {value:8.2} {unit}  {ratio:5.2} x");
    }
}

fn latency() {
    let (mut bare, mut pair) = (bare::Pair::new(), channel::Pair::new(1));
    let rpc = rpc::Pair::new(2, 1);
    print_all(
        "us",
        &mut [
            ("64 B echo, blocking sockets", Box::new(|| bare.ping())),
            ("64 B echo, channel", Box::new(|| pair.ping())),
            ("call without payload, from a task", Box::new(|| rpc.ping(0, true))),
            ("call without payload, from another thread", Box::new(|| rpc.ping(0, false))),
            ("call with 4 KiB reply, from a task", Box::new(|| rpc.ping(4096, true))),
        ],
    );
}

fn stream() {
    let mut bare = bare::Pair::new();
    let [mut one, mut two, mut four] = [1, 2, 4].map(channel::Pair::new);
    print_all(
        "GB/s",
        &mut [
            ("1 MiB one way, blocking sockets", Box::new(|| bare.stream())),
            ("1 MiB one way, channel over 1 socket", Box::new(|| one.stream())),
            ("1 MiB one way, channel over 2 sockets", Box::new(|| two.stream())),
            ("1 MiB one way, channel over 4 sockets", Box::new(|| four.stream())),
        ],
    );
    for streams in [1, 2, 4] {
        let rpc = rpc::Pair::new(2, streams);
        let mut iperf = iperf::Iperf::new(streams);
        let base = match &mut iperf {
            Ok(iperf) => iperf,
            Err(why) => {
                println!("no comparison with iperf3: {why}");
                return;
            }
        };
        let before = rpc.stats();
        print_all(
            "GB/s",
            &mut [
                (&format!("iperf3, {streams} streams"), Box::new(|| base.run())),
                (
                    &format!("replies of 1 MiB, {streams} lanes, 2 calls each"),
                    Box::new(|| rpc.stream(false, 2)),
                ),
                (
                    &format!("requests of 1 MiB, {streams} lanes, 2 calls each"),
                    Box::new(|| rpc.stream(true, 2)),
                ),
                (
                    &format!("replies of 1 MiB, {streams} lanes, 8 calls each"),
                    Box::new(|| rpc.stream(false, 8)),
                ),
                (
                    &format!("requests of 1 MiB, {streams} lanes, 8 calls each"),
                    Box::new(|| rpc.stream(true, 8)),
                ),
            ],
        );
        rpc.account(before);
    }
}

fn kernel() {
    use kernel::Way;
    let ways = [
        ("blocking calls", Way::Blocking),
        ("epoll", Way::Epoll),
        ("io_uring", Way::Uring),
        ("MSG_ZEROCOPY", Way::ZeroCopy),
    ];
    let mut pairs = Vec::new();
    for (name, way) in ways {
        match kernel::Pair::new(way) {
            Ok(pair) => pairs.push((name, std::cell::RefCell::new(pair))),
            Err(why) => println!("{name}: not here ({why})"),
        }
    }
    type Round = fn(&mut kernel::Pair) -> f64;
    for (unit, what, round) in [
        ("us", "64 B echo", kernel::Pair::ping as Round),
        ("GB/s", "1 MiB one way", kernel::Pair::stream as Round),
    ] {
        println!("{what}");
        let mut measures: Vec<Measure> = pairs
            .iter()
            .map(|(name, pair)| -> Measure { (name, Box::new(move || round(&mut pair.borrow_mut()))) })
            .collect();
        print_all(unit, &mut measures);
    }
    for (name, pair) in &pairs {
        if let Some((copied, sent)) = pair.borrow().copied() {
            println!("{name}: the kernel copied {copied} of {sent} sends all the same");
        }
    }
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    for (name, part) in [("latency", latency as fn()), ("stream", stream), ("kernel", kernel)] {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            println!("-- {name}");
            part();
        }
    }
}
