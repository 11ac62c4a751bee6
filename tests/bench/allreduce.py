"""Allreduce of ffreduce, through shared memory and through TCP, against gloo: in turn, in the same processes.

    allreduce.py [--ranks 2] [--rounds 7] [--json FILE]

One sample is the time of k allreduces in a row (float32, in place), by the slowest rank, over k.
algbw = message bytes / time. Results are checked.
"""

import argparse
import multiprocessing
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from common import spread, table, text, write

import firefly

# bytes: allreduces per sample
SIZES = {4 << 10: 200, 1 << 20: 20, 16 << 20: 3, 64 << 20: 1}
NAMES = ["gloo", "ffreduce shm", "ffreduce tcp"]


def rank_main(rank: int, ranks: int, port: int, rounds: int, out) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    everyone = list(range(ranks))
    groups = {"gloo": dist.group.WORLD, "ffreduce shm": dist.new_group(everyone, backend="ffreduce")}
    # Ranks with different node ids do not share memory.
    os.environ["FIREFLY_NODE_ID"] = f"bench-{rank}"
    os.environ["FIREFLY_BIND_ADDR"] = "127.0.0.1"
    groups["ffreduce tcp"] = dist.new_group(everyone, backend="ffreduce")

    samples = {}
    for size, k in SIZES.items():
        tensor = torch.ones(size // 4)
        for number in range(rounds + 1):
            for name in NAMES if number % 2 == 0 else reversed(NAMES):
                tensor.fill_(1.0)
                dist.barrier()
                started = time.perf_counter()
                for _ in range(k):
                    dist.all_reduce(tensor, dist.ReduceOp.SUM, groups[name])
                elapsed = time.perf_counter() - started
                want = float(ranks) ** k if k < 20 else float("inf") if k > 127 else float(ranks) ** k
                got = tensor[[0, -1]].tolist()
                assert got == [want] * 2, f"{name} at {size}: got {got}, want {want}"
                slowest = torch.tensor([elapsed / k], dtype=torch.float64)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                if number:  # the first round warms up
                    samples.setdefault((size, name), []).append(slowest.item())
    stats = {name: firefly.stats(group) for name, group in groups.items() if name != "gloo"}
    if rank == 0:
        out.send((samples, stats))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    context = multiprocessing.get_context("fork")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    receive, send = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=rank_main, args=(rank, args.ranks, store.port, args.rounds, send), daemon=True)
        for rank in range(args.ranks)
    ]
    [rank.start() for rank in ranks]
    send.close()
    try:
        samples, stats = receive.recv()
    except EOFError:
        raise SystemExit("allreduce bench: a rank failed, see above") from None
    [rank.join() for rank in ranks]

    rows, figures = [], {}
    for size in SIZES:
        us = {name: spread([t * 1e6 for t in samples[size, name]]) for name in NAMES}
        speedup = {
            name: spread([g / f for g, f in zip(samples[size, "gloo"], samples[size, name])]) for name in NAMES[1:]
        }
        label = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        for name in NAMES:
            gbps = size / us[name]["median"] / 1e3
            rows.append([label, name, text(us[name], 0), f"{gbps:.2f}", text(speedup[name]) if name != "gloo" else "1"])
        figures[label] = {"us": us, "gloo_time_over_ours": speedup}
    table(
        f"allreduce, float32, {args.ranks} ranks on {os.cpu_count()} cores, {args.rounds} interleaved rounds",
        ["size", "backend", "time us", "algbw GB/s", "times faster than gloo"],
        rows,
    )
    for name, s in stats.items():
        print(
            f"  {name}: transport {s['transport']}; rank 0 sent {s['shm_bytes_sent'] / 1e6:.0f} MB through shared memory "
            f"and {s['tcp_bytes_sent'] / 1e6:.0f} MB through the network, reduced {s['reduced_bytes'] / 1e6:.0f} MB"
        )
    write(args.json, {"bench": "allreduce", "ranks": args.ranks, "figures": figures, "counters_of_rank_0": stats})


if __name__ == "__main__":
    main()
