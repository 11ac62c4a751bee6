"""ffreduce against gloo where allreduce.py does not look: ranks, types, CPU time, and a whole training step.

    reduce.py [--rounds 5] [--json FILE]

Both backends in the same processes, in turn. CPU is user and system time of all ranks per GB of message. The
training step is DDP on a model whose share of communication with gloo is measured first and shown.
"""

import argparse
import multiprocessing
import os
import resource
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from common import spread, table, text, write

SIZES = {1 << 20: 10, 16 << 20: 3, 64 << 20: 1}
NAMES = ["gloo", "ffreduce"]
# Hidden width and layers of the model, batch: from little to much communication.
MODELS = {"wide batch": (512, 4, 512), "middle": (768, 4, 128), "narrow batch": (1024, 4, 16)}


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def agreed(seconds: float, op) -> float:
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, op)
    return value.item()


def collectives(groups, rounds: int) -> dict:
    samples = {}
    for dtype in (torch.float32, torch.bfloat16):
        for size, k in SIZES.items():
            tensor = torch.ones(size // dtype.itemsize, dtype=dtype)
            for number in range(rounds + 1):
                for name in NAMES if number % 2 == 0 else reversed(NAMES):
                    tensor.fill_(1.0)
                    dist.barrier()
                    began, busy = time.perf_counter(), cpu()
                    for _ in range(k):
                        dist.all_reduce(tensor, dist.ReduceOp.SUM, groups[name])
                    elapsed, used = time.perf_counter() - began, cpu() - busy
                    want = float(dist.get_world_size()) ** k
                    assert tensor[[0, -1]].tolist() == [want] * 2, f"{name}: {tensor[[0, -1]]}, not {want}"
                    row = (agreed(elapsed / k, dist.ReduceOp.MAX), agreed(used, dist.ReduceOp.SUM) / k / size * 1e9)
                    if number:  # the first round warms up
                        samples.setdefault((str(dtype).split(".")[1], size, name), []).append(row)
    return samples


def steps(groups, rounds: int) -> dict:
    samples = {}
    for label, (width, layers, batch) in MODELS.items():
        trainers = {}
        for name in [*NAMES, "alone"]:
            torch.manual_seed(0)
            model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)])
            if name != "alone":
                model = torch.nn.parallel.DistributedDataParallel(model, process_group=groups[name])
            trainers[name] = model
        data = torch.randn(batch, width)
        for number in range(rounds + 2):
            for name in trainers if number % 2 == 0 else reversed(list(trainers)):
                dist.barrier()
                began = time.perf_counter()
                for _ in range(3):
                    trainers[name].zero_grad()
                    trainers[name](data).square().mean().backward()
                elapsed = agreed((time.perf_counter() - began) / 3, dist.ReduceOp.MAX)
                if number > 1:  # DDP rebuilds its buckets in the first steps
                    samples.setdefault((label, name), []).append(elapsed)
    return samples


def rank_main(rank: int, ranks: int, port: int, rounds: int, out) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    groups = {"gloo": dist.group.WORLD, "ffreduce": dist.new_group(list(range(ranks)), backend="ffreduce")}
    result = (collectives(groups, rounds), steps(groups, rounds) if ranks == 2 else {})
    if rank == 0:
        out.send(result)
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: int, rounds: int):
    context = multiprocessing.get_context("fork")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    receive, send = context.Pipe(duplex=False)
    processes = [
        context.Process(target=rank_main, args=(rank, ranks, store.port, rounds, send), daemon=True)
        for rank in range(ranks)
    ]
    [process.start() for process in processes]
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        raise SystemExit("reduce bench: a rank failed, see above") from None
    [process.join() for process in processes]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = {}
    for ranks in args.ranks:
        moved, trained = measure(ranks, args.rounds)
        rows = []
        for dtype, size, name in moved:
            if name != "ffreduce":
                continue
            ours, theirs = moved[dtype, size, name], moved[dtype, size, "gloo"]
            faster = spread([g[0] / f[0] for f, g in zip(ours, theirs)])
            busy = spread([f[1] / g[1] for f, g in zip(ours, theirs)])
            gbps = spread([size / f[0] / 1e9 for f in ours])
            rows.append([dtype, f"{size >> 20} MiB", text(gbps), text(faster), text(busy)])
            figures[f"{ranks} {dtype} {size >> 20} MiB"] = {"gbps": gbps, "faster": faster, "cpu_ratio": busy}
        table(
            f"allreduce within a node, {ranks} ranks on {os.cpu_count()} cores, {args.rounds} interleaved rounds",
            ["type", "size", "ffreduce GB/s", "times faster than gloo", "CPU per GB / gloo's"],
            rows,
        )
        rows = []
        for label in MODELS if trained else []:
            alone, gloo, ours = (trained[label, name] for name in ("alone", "gloo", "ffreduce"))
            share = spread([1 - a / g for a, g in zip(alone, gloo)])
            ratio = spread([f / g for f, g in zip(ours, gloo)])
            rows.append([label, text(share), text(spread([g * 1e3 for g in gloo])), text(ratio)])
            figures[f"ddp {label}"] = {"gloo_communication_share": share, "time_ratio": ratio}
        if rows:
            table(
                "a DDP step, two ranks, one thread each",
                ["model", "gloo's communication share", "step with gloo ms", "time / gloo's"],
                rows,
            )
    write(args.json, {"bench": "reduce", "figures": figures})


if __name__ == "__main__":
    main()
