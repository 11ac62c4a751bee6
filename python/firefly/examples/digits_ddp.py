"""Trains a small CNN on handwritten digits with torch's own DistributedDataParallel.

    python -m firefly.examples.prepare_digits --out /mnt/fs3/digits
    torchrun --nproc-per-node 2 -m firefly.examples.digits_ddp \
        --data /mnt/fs3/digits --checkpoint /mnt/fs3/run1

Nothing in here is special to Firefly but the word "ffreduce" in `init_process_group`. Started
again, the program goes on from its last checkpoint. When a peer dies, `ffreduce` raises, and the
program ends with the traceback and a code other than 0, so whatever launched it can restart it.
The last line on rank 0 is one JSON object with what the run did.
"""

import argparse
import json
import math
import os
import time
from datetime import timedelta
from multiprocessing import Value
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

SIDE = 8


class Digits(Dataset):
    """The samples of one part, each read from the file system whenever it is asked for.

    `files` reads one image file per sample; `packed` reads the sample's row of digits.npy.
    """

    def __init__(self, root: Path, part: str, layout: str):
        self.bytes_read = Value("q", 0)  # shared with the loader's worker processes
        self.train = part == "train"
        self.layout = layout
        if layout == "files":
            self.paths = sorted((root / part).glob("*.pgm"))
            self.labels = [int(path.stem.split("_")[1]) for path in self.paths]
        else:
            split = np.load(root / "split.npy")
            self.rows = np.flatnonzero(split == (0 if self.train else 1))
            self.labels = np.load(root / "labels.npy")[self.rows].tolist()
            self.pack = open(root / "digits.npy", "rb")
            np.lib.format.read_magic(self.pack)
            shape, _, dtype = np.lib.format.read_array_header_1_0(self.pack)
            if dtype != np.uint8 or shape[1:] != (SIDE * SIDE,):
                raise ValueError(f"{root}/digits.npy holds {dtype} {shape}, not uint8 [samples, {SIDE * SIDE}]")
            self.first_row = self.pack.tell()
        if not self.labels:
            raise FileNotFoundError(f"no {part} samples under {root}: run firefly.examples.prepare_digits first")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.layout == "files":
            raw = self.paths[index].read_bytes()
        else:
            offset = self.first_row + int(self.rows[index]) * SIDE * SIDE
            raw = os.pread(self.pack.fileno(), SIDE * SIDE, offset)
        with self.bytes_read:
            self.bytes_read.value += len(raw)
        image = torch.frombuffer(bytearray(raw[-SIDE * SIDE :]), dtype=torch.uint8)
        image = image.to(torch.float32).view(1, SIDE, SIDE) / 16
        if self.train:  # shift by up to one pixel: the set is small
            down, right = torch.randint(-1, 2, (2,)).tolist()
            image = torch.roll(image, (down, right), (1, 2))
        return image, self.labels[index]


class ResumableSampler(DistributedSampler):
    """A DistributedSampler that can begin an epoch after the samples a former run has used."""

    skip = 0

    def __iter__(self):
        return iter(list(super().__iter__())[self.skip :])


def model(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 4, 4 * width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(4 * width, 10),
    )


class Checkpoints:
    """Checkpoints `step-00000042.pt` in a folder; each file is whole or does not exist."""

    def __init__(self, root: Path | None, keep: int = 2):
        self.root, self.keep, self.bytes_written = root, keep, 0
        if root:
            root.mkdir(parents=True, exist_ok=True)

    def files(self) -> list[Path]:
        return sorted(self.root.glob("step-*.pt")) if self.root else []

    def save(self, step: int, state: dict) -> None:
        if not self.root:
            return
        path = self.root / f"step-{step:08d}.pt"
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
            self.bytes_written += file.tell()
        os.rename(temporary, path)
        folder = os.open(self.root, os.O_RDONLY)  # makes the new name durable
        os.fsync(folder)
        os.close(folder)
        for old in self.files()[: -self.keep]:
            old.unlink(missing_ok=True)

    def load(self) -> dict | None:
        files = self.files()
        return torch.load(files[-1], weights_only=True) if files else None


@torch.no_grad()
def accuracy(net: nn.Module, loader: DataLoader) -> float:
    """Share of held-out samples that all ranks together get right."""
    net.eval()
    counts = torch.zeros(2, dtype=torch.float64)
    for images, labels in loader:
        counts += torch.tensor([(net(images).argmax(1) == labels).sum(), len(labels)])
    net.train()
    dist.all_reduce(counts)
    return (counts[0] / counts[1]).item()


def reduce_stats() -> dict:
    """What the collectives moved, as far as the backend counts it."""
    try:
        import firefly

        stats = firefly.stats()
    except (ImportError, ValueError):  # another backend than ffreduce
        return {}
    reduces = stats["operations"].get("allreduce", {"calls": 0, "bytes": 0, "seconds": 0.0})
    seconds = reduces["seconds"]
    return {
        "transport": stats["transport"],
        "allreduce_calls": reduces["calls"],
        "allreduce_bytes": reduces["bytes"],
        "allreduce_seconds": round(seconds, 4),
        "allreduce_gb_per_s": round(reduces["bytes"] / seconds / 1e9, 4) if seconds else None,
        "shm_bytes": stats["shm_bytes_sent"] + stats["shm_bytes_received"],
        "tcp_bytes": stats["tcp_bytes_sent"] + stats["tcp_bytes_received"],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder written by prepare_digits")
    parser.add_argument("--checkpoint", type=Path, help="folder for checkpoints; none are written without it")
    parser.add_argument("--layout", choices=["files", "packed"], default="packed", help="how to read the samples")
    parser.add_argument("--backend", default="ffreduce")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16, help="samples per rank and step")
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=0, help="loader processes per rank")
    parser.add_argument("--threads", type=int, default=1, help="compute threads per rank")
    parser.add_argument("--checkpoint-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--log-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="of each collective")
    return parser.parse_args()


@record  # under torchrun or ff: an exception is also written to the launcher's error file
def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    dist.init_process_group(args.backend, timeout=timedelta(seconds=args.timeout))
    rank, world = dist.get_rank(), dist.get_world_size()

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    torch.manual_seed(0)
    net = model(args.width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
    train, test = (Digits(args.data, part, args.layout) for part in ("train", "test"))
    sampler = ResumableSampler(train, world, rank, drop_last=True)
    loader = DataLoader(train, args.batch, sampler=sampler, num_workers=args.workers, drop_last=True)
    held_out = DataLoader(test, 64, sampler=range(rank, len(test), world))
    per_epoch = len(loader)
    total = per_epoch * args.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / total, 1)))
    )

    checkpoints = Checkpoints(args.checkpoint)
    step = 0
    if state := checkpoints.load():
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step = state["step"]
        say(f"resuming at step {step} from {checkpoints.files()[-1]}")
    resumed_at = step
    ddp = DistributedDataParallel(net)

    def save() -> None:
        if rank == 0:
            checkpoints.save(
                step,
                {
                    "step": step,
                    "model": net.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                },
            )
            say(f"checkpoint of step {step} saved")

    say(f"{world} ranks on {args.backend}, {total} steps of {world} x {args.batch} digits")
    started = last_time = time.monotonic()
    last_step = step
    for epoch in range(step // per_epoch, args.epochs):
        sampler.set_epoch(epoch)
        sampler.skip = step % per_epoch * args.batch
        torch.manual_seed(step * world + rank)
        for images, labels in loader:
            loss = nn.functional.cross_entropy(ddp(images), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step % args.log_every == 0:
                now = time.monotonic()
                say(
                    f"step {step}/{total} epoch {epoch + 1}/{args.epochs} loss {loss.item():.4f} "
                    f"step/s {(step - last_step) / (now - last_time):.2f}"
                )
                last_step, last_time = step, now
            if step % args.checkpoint_every == 0:
                save()
            if step % per_epoch == 0:  # also ends an epoch that was begun by a former run
                break
        say(f"epoch {epoch + 1}/{args.epochs} held-out accuracy {accuracy(net, held_out):.4f}")
    if total > resumed_at and total % args.checkpoint_every:
        save()

    seconds = time.monotonic() - started
    final = accuracy(net, held_out)
    report = {
        "accuracy": round(final, 4),
        "steps": total,
        "steps_this_run": step - resumed_at,
        "resumed_at": resumed_at,
        "seconds": round(seconds, 3),
        "steps_per_s": round((step - resumed_at) / seconds, 2),
        "world_size": world,
        "backend": args.backend,
        "restart_count": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "bytes_read": train.bytes_read.value + test.bytes_read.value,
        "bytes_written": checkpoints.bytes_written,
        **reduce_stats(),
    }
    say(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
