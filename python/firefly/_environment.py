"""Settings that trainers make for other backends: what is honoured, by whom, and a warning for the rest.

    honoured by the core     NCCL_SOCKET_IFNAME, NCCL_SOCKET_FAMILY, GLOO_SOCKET_IFNAME, NCCL_SHM_DISABLE
    honoured here            NCCL_DEBUG=INFO|TRACE (a line per group), NCCL_DEBUG_FILE
    honoured by torch        what its flight recorder reads
    always so with ffreduce  errors are raised, waits block
    everything else          has no effect, and is named once
"""

import os
import socket
import sys
import warnings

CORE = {"NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY", "GLOO_SOCKET_IFNAME", "NCCL_SHM_DISABLE"}
HERE = {"NCCL_DEBUG", "NCCL_DEBUG_FILE"}
TORCH = {
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_PIPE_FILE",
}
ALWAYS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_NCCL_BLOCKING_WAIT",
    "NCCL_BLOCKING_WAIT",
    "NCCL_COMM_BLOCKING",
}
# What to set instead, where there is something.
INSTEAD = {"TORCH_NCCL_NAN_CHECK": "TORCH_DIST_NAN_CHECK=1"}

_warned = False


def without_effect(environment) -> list[str]:
    """The settings in `environment` that ffreduce does not follow, sorted."""
    known = CORE | HERE | TORCH | ALWAYS
    return sorted(
        name
        for name, value in environment.items()
        if value and name.startswith(("NCCL_", "TORCH_NCCL_", "GLOO_")) and name not in known
    )


def warn_once() -> None:
    """Names the settings without effect, at the first group of the process."""
    global _warned
    if _warned:
        return
    _warned = True
    names = without_effect(os.environ)
    if names:
        hints = "".join(f"; instead of {name} set {INSTEAD[name]}" for name in names if name in INSTEAD)
        warnings.warn(f"these settings have no effect on ffreduce: {', '.join(names)}{hints}", stacklevel=4)


def announce(backend, name: str, group: str, seconds: float) -> None:
    """One line about a new group, where NCCL_DEBUG asks for it."""
    if os.environ.get("NCCL_DEBUG", "").upper() not in ("INFO", "TRACE"):
        return
    stats = backend.stats()
    line = (
        f"{socket.gethostname()}:{os.getpid()} ffreduce INFO rank {backend.rank()} of {backend.size()} in group "
        f"{group!r} asked for as {name!r}: transport {stats['transport']}, {stats['local_peers']} ranks through "
        f"shared memory, {stats['remote_peers']} through the network, formed in {seconds:.3f} s"
    )
    path = os.environ.get("NCCL_DEBUG_FILE")
    if path:
        path = path.replace("%h", socket.gethostname()).replace("%p", str(os.getpid()))
        with open(path, "a") as file:
            print(line, file=file)
    else:
        print(line, file=sys.stderr, flush=True)
