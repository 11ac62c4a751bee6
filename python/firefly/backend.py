"""The torch.distributed backend `ffreduce`: registration, names, counters."""

import atexit
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from . import _environment

NAME = "ffreduce"


def _native():
    """The compiled part, loaded at the first group and not before: it is tied to one torch version."""
    try:
        from ._build import TORCH_VERSION
    except ImportError:
        raise ImportError(
            "firefly's native part is missing: this is a source folder, or an incomplete installation. "
            "Run `pip install ./python` in Firefly's repository"
        ) from None
    if torch.__version__ != TORCH_VERSION:
        raise ImportError(
            f"firefly was built for torch {TORCH_VERSION}, but torch {torch.__version__} is installed now. "
            "Run `pip install --force-reinstall --no-deps ./python` in Firefly's repository"
        )
    first = "_C" not in globals()
    from . import _C

    if first:
        globals()["_C"] = _C
        # Progress threads end before the interpreter does.
        atexit.register(_C.shutdown_all)
    return _C


def _serving(group, native):
    """The backend of ours that serves another device of this process group already, if there is one.

    "cpu:gloo,cuda:nccl" asks for two backends by two names; where both are ours, one serves both, as
    torch wants it of backends of one type."""
    for device in getattr(group, "_device_types", ()):
        backend = group._get_backend(device)
        backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL
        if isinstance(backend, native.FireflyBackend):
            return backend
    return None


def _creator(name: str):
    def create(options, backend_options):
        if backend_options is not None:
            warnings.warn(
                f"ffreduce takes no pg_options; the {type(backend_options).__name__} given for {name!r} has no effect",
                stacklevel=2,
            )
        if options.enable_reconfigure:
            raise NotImplementedError("ffreduce cannot reconfigure a group; make a new one instead")
        _environment.warn_once()
        timeout = options.timeout
        if not isinstance(timeout, timedelta):
            timeout = timedelta(seconds=float(timeout))
        started = time.monotonic()
        native = _native()
        backend = _serving(options.process_group, native)
        if backend is not None:
            return backend
        if isinstance(options.split_from, native.FireflyBackend):
            # The world is there already: the group is formed through it, and needs no store.
            ranks = [int(rank) for rank in options.global_ranks_in_group]
            backend = options.split_from._split(ranks, timeout, name, options.group_id)
        else:
            backend = native.FireflyBackend(
                options.store, options.group_rank, options.group_size, timeout, name, options.group_id
            )
        _environment.announce(backend, name, options.group_id, time.monotonic() - started)
        return backend

    return create


def register() -> None:
    """Registers `ffreduce` with torch.distributed; torch calls this through the package's entry point."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, _creator(NAME), extended_api=True, devices=["cpu"])


def install_as(*names: str) -> None:
    """Serves further backend names, `install_as("nccl", "gloo")`: groups made from now on under such a
    name are ffreduce's, and `get_backend()` still answers the name. Only CPU tensors are served."""
    for name in names:
        name = name.lower()
        if not name.isidentifier():
            raise ValueError(f"{name!r} cannot be the name of a torch.distributed backend")
        # As a custom backend, whatever the name: for the types GLOO and NCCL torch casts to its own
        # classes (DDP's logger) and makes device tensors (barrier).
        dist.Backend.register_backend(name, _creator(name), extended_api=True, devices=["cpu"])
        # torch takes gloo for a backend that feeds the flight recorder by itself; this one does not.
        getattr(distributed_c10d, "_FR_SELF_RECORDING_BACKENDS", set()).discard(name)


def stats(group: dist.ProcessGroup | None = None) -> dict:
    """Counters of one group (default: all ranks) since it was made, on this rank.

    transport                 "shm", "rdma", "tcp", several with "+" between, or "none" (a group of one)
    shm_bytes_*, tcp_bytes_*, rdma_bytes_*  bytes moved through shared memory, TCP and RDMA
    copied_bytes  payload bytes copied in user space on their way through the network
    reduced_bytes             input bytes that this rank has reduced
    ops_*                     operations submitted, completed, failed
    operations                per kind: calls, bytes (of the larger side of each call on this rank) and
                              seconds during which at least one operation of the kind was in flight
    """
    group = group or dist.group.WORLD
    if group is None:
        raise ValueError("no process group: call torch.distributed.init_process_group first")
    backend = group._get_backend(torch.device("cpu"))
    backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL
    if not isinstance(backend, _native().FireflyBackend):
        raise ValueError(f"the group's backend is {backend.name()!r}, not ffreduce, which alone has these counters")
    return backend.stats()
