"""Ranks of real trainers die or stop in mid-step, while their DataLoader workers and subprocesses live on:
every survivor gets an exception that names the rank, from DDP's backward and from FSDP2 alike.

A sample drawn by a seed, which a failure shows; FIREFLY_TORCH_KILLS=COUNT:SEED draws another one. All cases
without torch are in reduce/tests/kill_matrix.rs.
"""

import os
import random
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import OURS, error_of, run, store_client

pytestmark = pytest.mark.skipif(not OURS, reason="these are ffreduce's promises")

LONG = 100.0  # far beyond what a death takes to be noticed
COUNT, SEED = (int(n) for n in os.environ.get("FIREFLY_TORCH_KILLS", "6:20261125").split(":"))


def cases():
    draw = random.Random(SEED)
    for _ in range(COUNT):
        world = draw.choice([2, 3, 4])
        yield (
            draw.choice(["ddp", "fsdp2"]),
            draw.choice(["kill", "stop"]),
            world,
            draw.randrange(world),
            draw.choice(["before the step", "in the backward", "after the step"]),
        )


def names(message: str, rank: int) -> bool:
    missing = [part.split(";")[0].split("\n")[0] for part in message.split("missing ranks: ")[1:]]
    return (
        f"rank {rank} " in message
        or message.splitlines()[0].endswith(f"rank {rank}")
        or any(str(rank) in part.replace(" ", "").split(",") for part in missing)
    )


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return torch.full((64,), float(index))


def make_model(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


@pytest.mark.parametrize("kind, how, world, victim, when", list(cases()))
def test_survivors_name_the_rank(kind, how, world, victim, when):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def strike():
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)

    def body(rank):
        client = store_client(store.port)
        client.set(f"pid {rank}", str(os.getpid()))
        dist.init_process_group(
            "ffreduce", store=client, rank=rank, world_size=world, timeout=timedelta(seconds=LONG)
        )
        model = make_model(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, num_workers=1)
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        batches = iter(loader)

        def step(strikes):
            if strikes and when == "before the step":
                strike()
            loss = model(next(batches)).sum()
            if strikes and when == "in the backward":
                # In an early layer: the gradients of the later ones are on their way already.
                layers = model.module if kind == "ddp" else model
                layers[1].register_full_backward_hook(lambda *_: strike())
            loss.backward()
            if strikes and when == "after the step":
                strike()
            optimizer.step()
            optimizer.zero_grad()

        try:
            for _ in range(3):
                step(False)
            if how == "stop":
                dist.barrier()
                dist.set_timeout(timedelta(seconds=5))
            error = error_of(lambda: [step(rank == victim) for _ in range(200)])
            if rank != victim and how == "stop":
                client.add("failed", 1)
                if client.add("failed", 0) == world - 1:
                    os.kill(int(client.get(f"pid {victim}")), signal.SIGCONT)
            return error
        finally:
            other.kill()
            del batches

    expect = [victim] if how == "kill" else []
    results = run(world, body, init=False, expect_killed=expect, watchdog=150)
    context = f"seed {SEED}: {kind} {how} {world} {victim} {when}"
    for rank, error in enumerate(results):
        if rank == victim and how == "kill":
            continue
        kind_of_error, message, _ = error
        assert kind_of_error == "DistBackendError", f"{context}: {error}"
        if rank != victim:
            assert names(message, victim), f"{context}: {error}"
