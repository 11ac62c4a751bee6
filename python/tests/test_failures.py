"""Wrong use and lost peers end in an exception that says so, soon, on every rank; never in a hang.

The bounds are generous; what they must tell apart is "at once" from "after the group's timeout".
"""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from harness import OURS, error_of, kill_self, run, store_client

pytestmark = pytest.mark.skipif(not OURS, reason="these are ffreduce's promises")

LONG = 45.0  # a timeout that a test would notice
SOON = 10.0


def names(message: str, rank: int) -> bool:
    return f"rank {rank} " in message or f"ranks: {rank}" in message or message.endswith(f"rank {rank}")


def died(error, rank: int) -> None:
    kind, message, seconds = error
    assert kind == "DistBackendError", error
    assert names(message, rank), error
    assert seconds < SOON, error


def test_wrong_arguments_raise_and_leave_the_group_whole():
    def body(rank):
        kind, message, _ = error_of(lambda: dist.all_reduce(torch.ones(4, 4).t()[1:]))
        assert kind == "ValueError" and "contiguous" in message
        kind, message, _ = error_of(lambda: dist.all_reduce(torch.ones(3).to_sparse(), dist.ReduceOp.MAX))
        assert kind == "NotImplementedError" and "to_dense" in message
        kind, message, _ = error_of(lambda: dist.all_gather_into_tensor(torch.zeros(5), torch.zeros(4)))
        assert "8" in message or "elements" in message or "size" in message
        kind, message, _ = error_of(
            lambda: dist.all_to_all_single(torch.zeros(4), torch.zeros(4), [1, 1], [2, 2])
        )
        assert "split" in message.lower()
        kind, message, _ = error_of(lambda: dist.all_reduce(torch.ones(2, dtype=torch.float32), dist.ReduceOp.BAND))
        assert kind in ("NotImplementedError", "ValueError"), (kind, message)
        tensor = torch.ones(10)
        dist.all_reduce(tensor)
        assert tensor.tolist() == [2.0] * 10

    run(2, body)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_peer_is_named_on_every_rank(world, victim):
    def body(rank):
        dist.all_reduce(torch.ones(1000))
        if rank == victim:
            # In the middle of a collective: part of it is on its way.
            dist.all_reduce(torch.ones(4_000_000), async_op=True)
            kill_self()
        tensor = torch.ones(4_000_000)
        return [error_of(lambda: [dist.all_reduce(tensor) for _ in range(1000)]), error_of(lambda: dist.barrier())]

    for rank, errors in enumerate(run(world, body, timeout=LONG, expect_killed=[victim])):
        if rank != victim:
            died(errors[0], victim)
            assert errors[1][0] == "DistBackendError" and errors[1][2] < 1


def test_a_killed_peer_is_seen_while_waiting():
    def body(rank):
        dist.barrier()
        if rank == 1:
            time.sleep(0.5)
            kill_self()
        work = dist.all_reduce(torch.ones(10), async_op=True)
        future = work.get_future()
        first = error_of(work.wait)
        assert work.is_completed() and not work.is_success()
        second = error_of(future.wait)
        assert second[0] == "DistBackendError", second
        return first

    died(run(2, body, timeout=LONG, expect_killed=[1])[0], 1)


def test_a_killed_peer_is_seen_with_subprocesses_that_inherited_its_sockets():
    def body(rank):
        dist.barrier()
        if rank == 1:
            if os.fork() == 0:  # as a DataLoader's worker: keeps every descriptor open
                signal.alarm(20)
                time.sleep(20)
                os._exit(0)
            kill_self()
        return error_of(lambda: dist.all_reduce(torch.ones(10)))

    died(run(2, body, timeout=LONG, expect_killed=[1])[0], 1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_peer_raises_from_ddp_backward(victim):
    def body(rank):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(8)])
        ddp = torch.nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.25)

        def steps():
            for step in range(1000):
                if rank == victim and step == 3:
                    ddp(torch.randn(4, 256)).sum()
                    kill_self()
                ddp(torch.randn(4, 256)).sum().backward()

        return error_of(steps)

    results = run(2, body, timeout=LONG, expect_killed=[victim])
    died(results[1 - victim], victim)


def test_a_missing_rank_is_named_after_the_timeout():
    def body(rank):
        dist.barrier()
        if rank == 2:
            time.sleep(5)
            return None
        return error_of(lambda: dist.all_reduce(torch.ones(10)))

    results = run(3, body, timeout=2.0)
    for kind, message, seconds in results[:2]:
        assert kind == "DistBackendError" and names(message, 2), message
        assert 1.5 < seconds < SOON, message


def test_a_mismatch_names_both_operations():
    def body(rank):
        tensor = torch.ones(100)
        if rank == 0:
            return error_of(lambda: dist.all_reduce(tensor))
        return error_of(lambda: dist.broadcast(tensor, 0))

    for kind, message, seconds in run(2, body, timeout=LONG):
        assert kind == "DistBackendError", message
        assert "allreduce" in message.lower().replace("_", "") and "broadcast" in message.lower(), message
        assert seconds < SOON


def test_a_size_mismatch_is_an_error():
    def body(rank):
        return error_of(lambda: dist.all_reduce(torch.ones(100 + rank)))

    for kind, message, seconds in run(2, body, timeout=LONG):
        assert kind == "DistBackendError" and seconds < SOON, message


def test_abort_wakes_the_waiter_and_tells_the_peer():
    def body(rank):
        import threading

        dist.barrier()
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        if rank == 0:
            threading.Timer(0.5, backend.abort).start()
            return error_of(lambda: dist.all_reduce(torch.ones(10)))
        time.sleep(1.5)
        return error_of(lambda: dist.all_reduce(torch.ones(10)))

    for kind, message, seconds in run(2, body, timeout=LONG):
        assert kind == "DistBackendError" and seconds < SOON, message


def test_shutdown_ends_the_group_cleanly():
    def body(rank):
        tensor = torch.ones(100_000)
        works = [dist.all_reduce(tensor, async_op=True) for _ in range(10)]
        [work.wait() for work in works]
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        backend.shutdown()
        backend.shutdown()
        kind, message, _ = error_of(lambda: dist.all_reduce(tensor))
        assert kind == "DistBackendError" and "shut down" in message

    run(2, body)


def test_wait_with_a_limit_gives_up_and_the_operation_goes_on():
    from datetime import timedelta

    def body(rank):
        dist.barrier()
        tensor = torch.ones(10)
        if rank == 1:
            time.sleep(1)
        work = dist.all_reduce(tensor, async_op=True)
        if rank == 0:
            kind, message, _ = error_of(lambda: work.wait(timedelta(milliseconds=100)))
            assert kind == "DistBackendError" and "100 ms" in message
        work.wait()
        assert tensor.tolist() == [2.0] * 10

    run(2, body)


def test_monitored_barrier_names_the_missing_rank():
    from datetime import timedelta

    def body(rank):
        dist.barrier()
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        if rank == 1:
            time.sleep(3)
            return None
        return error_of(lambda: backend.monitored_barrier(timedelta(seconds=1)))

    results = run(3, body, timeout=LONG)
    kind, message, _ = results[0]
    assert kind == "DistBackendError" and "1 failed to pass" in message, message


def test_rank_0_that_holds_the_store_may_die():
    from datetime import timedelta

    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def body(rank):
        dist.init_process_group(
            "ffreduce",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=LONG),
        )
        dist.barrier()
        if rank == 0:
            kill_self()
        return error_of(lambda: dist.all_reduce(torch.ones(10)))

    died(run(2, body, init=False, expect_killed=[0])[1], 0)


def test_a_rank_that_never_comes_is_a_timeout_of_the_group():
    from datetime import timedelta

    def body(rank):
        if rank == 1:
            return None
        store = dist.HashStore()
        return error_of(
            lambda: dist.init_process_group(
                "ffreduce", store=store, rank=0, world_size=2, timeout=timedelta(seconds=2)
            )
        )

    kind, message, seconds = run(2, body, init=False)[0]
    assert kind in ("DistBackendError", "DistStoreError") and seconds < SOON, message


def test_keys_of_a_dead_attempt_in_the_store_do_no_harm():
    # torchrun keeps its store across restarts; so does the harness's parent across these runs.
    from datetime import timedelta

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def body(rank, dies):
        client = store_client(store.port)
        dist.init_process_group(
            "ffreduce", store=client, rank=rank, world_size=2, timeout=timedelta(seconds=LONG)
        )
        dist.barrier()
        if dies:
            kill_self()
        tensor = torch.ones(10)
        dist.all_reduce(tensor)
        return tensor.tolist()

    for _ in range(3):
        run(2, lambda rank: body(rank, True), init=False, expect_killed=[0, 1])
        assert run(2, lambda rank: body(rank, False), init=False) == [[2.0] * 10] * 2
