"""Runs a function on N ranks in N processes, with a watchdog: a hang is a failure with stacks.

Ranks are forked, so a test function may be a closure, and a test costs a fraction of a second. The
parent must not have used torch's threads before, which is why no test computes in the parent.
FIREFLY_TEST_BACKEND=gloo runs the tests against gloo instead, to test the tests.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

BACKEND = os.environ.get("FIREFLY_TEST_BACKEND", "ffreduce")
OURS = BACKEND == "ffreduce"
WATCHDOG_SECONDS = 60


class RankFailed(AssertionError):
    """A rank raised, died or hung; the text holds every rank's end."""


def store_client(port, timeout=300):
    """A client of the store at `port`. One that torch's server does not answer is made anew."""
    for attempt in range(3):
        try:
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
            store.set_timeout(timedelta(seconds=timeout))
            return store
        except dist.DistError:
            if attempt == 2:
                raise


def _rank_main(function, rank, world, port, timeout, out, stderr_path):
    # What the parent left to its collector (stores with threads, kept by a failed test's traceback) is
    # not this process's to end: the threads are not here.
    gc.freeze()
    stderr = open(stderr_path, "w")
    os.dup2(stderr.fileno(), 2)
    faulthandler.enable(stderr)
    faulthandler.register(signal.SIGUSR1, stderr, all_threads=True)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        if port is not None:
            store = store_client(port, timeout=30)
            dist.init_process_group(
                BACKEND, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
            )
        result = ("ok", function(rank))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:  # noqa: BLE001 - everything goes to the parent
        result = ("error", (type(error).__name__, str(error), traceback.format_exc()))
    out.send_bytes(pickle.dumps(result))
    out.close()
    sys.stderr.flush()
    os._exit(0)


def run(world, function, timeout=20.0, watchdog=WATCHDOG_SECONDS, expect_killed=(), init=True):
    """Results of `function(rank)` on every rank, in order; None for ranks in `expect_killed`."""
    context = multiprocessing.get_context("fork")
    # The parent holds the store, so that it outlives any rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if init else None
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world):
            receive, send = context.Pipe(duplex=False)
            stderr = f"{folder}/{rank}.err"
            process = context.Process(
                target=_rank_main, args=(function, rank, world, store and store.port, timeout, send, stderr)
            )
            process.start()
            send.close()
            ranks.append((process, receive, stderr))
        results, ends, failed = [None] * world, [], False
        deadline = time.monotonic() + watchdog
        for rank, (process, receive, stderr) in enumerate(ranks):
            if failed:  # the others have no reason to stay long
                deadline = min(deadline, time.monotonic() + 10)
            try:
                # A process that a rank left behind may hold the pipe open: the rank's own end counts, too.
                while not receive.poll(0.05) and process.is_alive() and time.monotonic() < deadline:
                    pass
                if not process.is_alive() and not receive.poll():
                    raise EOFError
                if not receive.poll():
                    failed, end = True, f"hangs after {watchdog} s"
                    os.kill(process.pid, signal.SIGUSR1)  # dump the stacks
                    time.sleep(1)
                    process.kill()
                else:
                    kind, value = pickle.loads(receive.recv_bytes())
                    if kind == "ok":
                        results[rank], end = value, "returned"
                    else:
                        failed, end = True, value[2]
            except EOFError:
                process.join(5)
                end = f"died with exit code {process.exitcode}"
                failed = failed or not (rank in expect_killed and process.exitcode == -signal.SIGKILL)
            ends.append((rank, end))
        for process, _, _ in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        if failed:
            text = ""
            for rank, end in ends:
                text += f"\n--- rank {rank}: {end}\n{open(ranks[rank][2]).read()[-6000:]}"
            raise RankFailed(text)
    return results


def error_of(function):
    """(exception type name, message, seconds) that `function` raised."""
    started = time.monotonic()
    try:
        function()
    except Exception as error:  # noqa: BLE001 - the caller looks at it
        return type(error).__name__, str(error), time.monotonic() - started
    raise AssertionError("no exception was raised")


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
