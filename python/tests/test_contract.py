"""What a trainer may rely on beyond the collectives themselves: groups out of groups, a group again after
a failure, an init that ends, hooks and debug modes of torch, settings made for other backends."""

import gc
import json
import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import OURS, error_of, kill_self, run, store_client
from torch.distributed import distributed_c10d

pytestmark = pytest.mark.skipif(not OURS, reason="these are ffreduce's promises")

LONG = 45.0  # a timeout that a test would notice


def backend(group=None):
    return (group or dist.group.WORLD)._get_backend(torch.device("cpu"))


def names(message: str, rank: int) -> bool:
    return f"rank {rank} " in message or f"ranks: {rank}" in message or message.endswith(f"rank {rank}")


# ---- groups out of groups --------------------------------------------------------------------------


def test_split_group_forms_all_parts_at_once():
    def body(rank):
        part = dist.split_group(split_ranks=[[2, 0], [1]])
        assert type(backend(part)).__name__ == "FireflyBackend"
        tensor = torch.tensor([float(rank)])
        dist.all_reduce(tensor, group=part)
        gathered = [torch.zeros(1) for _ in range(part.size())]
        dist.all_gather(gathered, torch.tensor([float(rank)]), group=part)
        again = dist.split_group(split_ranks=[[0, 1]])  # rank 2 takes no part
        if rank == 2:
            assert again == dist.GroupMember.NON_GROUP_MEMBER
        else:
            dist.barrier(again)
        # The parts live apart from their parent, which is whole.
        dist.all_reduce(tensor)
        return part.rank(), tensor.item(), [t.item() for t in gathered]

    results = run(3, body)
    assert [r[0] for r in results] == [1, 0, 0]
    assert [r[2] for r in results] == [[2.0, 0.0], [1.0], [2.0, 0.0]]
    assert {r[1] for r in results} == {2.0 + 1.0 + 2.0}


def test_new_group_of_a_bound_device_needs_no_store():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def body(rank):
        dist.init_process_group(
            "ffreduce",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=3,
            timeout=timedelta(seconds=LONG),
            device_id=torch.device("cpu:0"),
        )
        group = dist.new_group([0, 2])  # rank 1 is asked to take part without joining
        if rank != 1:
            tensor = torch.ones(3)
            dist.all_reduce(tensor, group=group)
            assert tensor.tolist() == [2.0] * 3
        dist.barrier()

    run(3, body, init=False)


def test_ranks_that_split_differently_are_told_so():
    def body(rank):
        mine = {0: [0, 1], 1: [0, 1], 2: [2, 1]}[rank]
        wrong = error_of(lambda: backend()._split(mine, timedelta(seconds=LONG), "ffreduce", "part"))
        dist.barrier()  # the parent is whole
        return wrong

    def checked(rank):
        if rank == 2:
            return body(rank)
        formed = backend()._split([0, 1], timedelta(seconds=LONG), "ffreduce", "part")
        dist.barrier()
        return formed.size()

    results = run(3, checked)
    assert results[:2] == [2, 2]
    kind, message, _ = results[2]
    assert kind == "DistBackendError" and "disagree about a split" in message and "ranks 1" in message


# ---- a group again after a failure ------------------------------------------------------------------


def resources():
    gc.collect()
    maps = sum("firefly-reduce" in line for line in open("/proc/self/maps"))
    return len(os.listdir("/proc/self/fd")), maps, len(os.listdir("/proc/self/task"))


def test_survivors_form_a_new_group_in_the_same_process():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def body(rank):
        model = torch.nn.Linear(4, 4)
        client = store_client(store.port)
        world, me, lost = 4, rank, []
        for generation in range(3):
            prefix = dist.PrefixStore(f"generation {generation}", client)
            dist.init_process_group(
                "ffreduce", store=prefix, rank=me, world_size=world, timeout=timedelta(seconds=LONG)
            )
            trainer = torch.nn.parallel.DistributedDataParallel(model)
            trainer(torch.ones(2, 4)).sum().backward()
            if generation == 2:
                break
            victim = world - 1
            if me == victim:
                kill_self()
            kind, message, _ = error_of(lambda: [dist.all_reduce(torch.ones(1000)) for _ in range(100_000)])
            lost.append((kind, names(message, victim)))
            del trainer
            dist.destroy_process_group()
            world -= 1
        return lost, dist.get_world_size(), model.weight.grad.sum().item()

    results = run(4, body, init=False, expect_killed=[2, 3])
    assert results[0] == results[1]
    lost, world, _ = results[0]
    assert lost == [("DistBackendError", True)] * 2 and world == 2


@pytest.mark.parametrize("how", ["abort", "destroy", "shutdown"])
def test_a_group_that_ends_gives_everything_back(how):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def body(rank):
        client = store_client(store.port)

        def cycle(number):
            prefix = dist.PrefixStore(f"{how} {number}", client)
            dist.init_process_group(
                "ffreduce", store=prefix, rank=rank, world_size=2, timeout=timedelta(seconds=LONG)
            )
            dist.all_reduce(torch.ones(100_000))
            if how == "abort":
                # Either rank may be the first, while the other is still in it.
                kind, message, _ = error_of(
                    lambda: [dist.irecv(torch.zeros(5), 1 - rank), backend().abort()][0].wait()
                )
                assert kind == "DistBackendError" and "aborted the group" in message
            elif how == "shutdown":
                dist.barrier()
                backend().shutdown()
            dist.destroy_process_group()

        for number in range(3):
            cycle(number)
        before = resources()
        for number in range(3, 9):
            cycle(number)
        after = resources()
        assert after == before, f"descriptors, mappings, threads: {before} -> {after}"
        assert after[1] == 0

    run(2, body, init=False)


# ---- an init that ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_init_names_who_did_not_come(absent):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def body(rank):
        if rank == absent:
            return None
        client = store_client(store.port)
        return error_of(
            lambda: dist.init_process_group(
                "ffreduce", store=client, rank=rank, world_size=3, timeout=timedelta(seconds=2)
            )
        )

    for rank, error in enumerate(run(3, body, init=False)):
        if rank != absent:
            kind, message, _ = error
            assert kind == "DistBackendError", error
            assert message.splitlines()[0].endswith(f"missing ranks: {absent}"), error


def test_init_ends_when_the_store_is_gone():
    def body(rank):
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        client = store_client(server.port)
        del server
        gc.collect()
        return error_of(
            lambda: dist.init_process_group(
                "ffreduce", store=client, rank=1, world_size=2, timeout=timedelta(seconds=2)
            )
        )

    kind, message, _ = run(1, body, init=False)[0]
    assert kind == "DistBackendError" and "store" in message, message


# ---- time limits, coalescing, sparse tensors ---------------------------------------------------------


def test_the_timeout_of_a_group_can_be_changed():
    def body(rank):
        dist.barrier()
        dist.set_timeout(timedelta(seconds=1))
        assert backend().options._timeout == timedelta(seconds=1)
        if rank == 1:
            return dist.group.WORLD.size()  # does not come; ends when the other has given up
        kind, message, _ = error_of(lambda: dist.all_reduce(torch.ones(10)))
        assert kind == "DistBackendError" and names(message, 1) and "1s" in message, message

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def staying(rank):
        client = store_client(store.port)
        try:
            return body(rank)
        finally:
            client.set(f"done {rank}", "1")
            client.wait(["done 0", "done 1"])

    run(2, staying, timeout=LONG)


def test_operations_between_start_and_end_of_coalescing_are_one_work():
    def body(rank):
        peer = 1 - rank
        mine, theirs = torch.full((5,), float(rank)), torch.zeros(5)
        everyone = torch.ones(3)
        with dist.distributed_c10d._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
            dist.isend(mine, peer)
            dist.irecv(theirs, peer)
            dist.broadcast(everyone, 0, async_op=True)
        manager.wait()
        assert theirs.tolist() == [float(peer)] * 5
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.irecv, theirs, peer), dist.P2POp(dist.isend, everyone.repeat(2)[:5], peer)]
        )
        [work.wait() for work in works]
        assert theirs.tolist() == [1.0] * 5
        future = works[0].get_future()
        future.wait()
        assert works[0].is_completed() and works[0].is_success()

    run(2, body)


def test_an_error_in_a_coalesced_operation_is_raised_by_its_wait():
    def body(rank):
        dist.barrier()
        if rank == 1:
            kill_self()
        with dist.distributed_c10d._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
            dist.irecv(torch.zeros(5), 1)
        return error_of(manager.wait)

    kind, message, _ = run(2, body, timeout=LONG, expect_killed=[1])[0]
    assert kind == "DistBackendError" and names(message, 1), message


def test_receive_from_any_source():
    def body(rank):
        if rank != 0:
            dist.send(torch.tensor([float(rank)]), 0, tag=rank % 2)
            return None
        got = {}
        for tag in (1, 0):
            tensor = torch.zeros(1)
            source = dist.recv(tensor, tag=tag)
            got[source] = tensor.item()
        return got

    assert run(3, body)[0] == {1: 1.0, 2: 2.0}


def sparse(rank, nnz=5, rows=1000):
    generator = torch.Generator().manual_seed(rank)
    indices = torch.randint(rows, (1, nnz), generator=generator)
    return torch.sparse_coo_tensor(indices, torch.randn(nnz, 3, generator=generator), (rows, 3))


@pytest.mark.parametrize("world", [2, 3])
def test_sparse_all_reduce_between_dense_ones(world):
    def body(rank):
        tensors = [sparse(rank, 400), sparse(10 + rank, 0 if rank == 0 else 7), sparse(20 + rank, 30)]
        dense = [torch.full((4,), float(rank)) for _ in range(3)]
        works = []
        for s, d in zip(tensors, dense):
            works += [dist.all_reduce(s, async_op=True), dist.all_reduce(d, async_op=True)]
        [work.wait() for work in works]
        assert all(d.tolist() == [sum(range(world))] * 4 for d in dense)
        assert works[0].get_future().wait()[0] is not None
        return [t.to_dense() for t in tensors]

    results = run(world, body)
    for i, counts in enumerate([[400] * world, [0 if r == 0 else 7 for r in range(world)], [30] * world]):
        wanted = sum(sparse(10 * i + r, counts[r]).to_dense() for r in range(world))
        for result in results:
            torch.testing.assert_close(result[i], wanted)
            assert torch.equal(result[i], results[0][i])


def test_sparse_tensors_of_different_shape_are_an_error_on_every_rank():
    def body(rank):
        error = error_of(lambda: dist.all_reduce(sparse(rank, rows=10 + rank)))
        dist.barrier()  # and the group is whole
        return error

    for kind, message, _ in run(2, body):
        assert kind == "DistBackendError" and "different shape" in message
    only_sum = run(2, lambda rank: error_of(lambda: dist.all_reduce(sparse(rank), dist.ReduceOp.MAX)))
    assert only_sum[0][0] == "NotImplementedError" and "to_dense" in only_sum[0][1]


# ---- torch's own eyes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ffreduce", "gloo"])
def test_the_flight_recorder_keeps_what_was_issued_and_what_was_done(name):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def body(rank):
        import firefly

        firefly.install_as("gloo")
        client = store_client(store.port)
        dist.init_process_group(name, store=client, rank=rank, world_size=2, timeout=timedelta(seconds=LONG))
        for _ in range(3):
            dist.all_reduce(torch.ones(10))
        dist.barrier()
        if rank == 1:
            kill_self()
        error_of(lambda: [dist.all_reduce(torch.ones(10)) for _ in range(100)])
        from torch._C._distributed_c10d import _dump_fr_trace_json

        return json.loads(_dump_fr_trace_json(True, False, "ffreduce"))["entries"]

    entries = run(2, body, init=False, expect_killed=[1])[0]
    reduces = [e for e in entries if "all_reduce" in e["profiling_name"]]
    assert [e["state"] for e in reduces[:3]] == ["completed"] * 3, reduces
    assert reduces[-1]["state"] != "completed", "who looks after a failure must see what never finished"


def test_detail_debug_mode_works_and_finds_what_differs():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def body(rank):
        os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
        dist.set_debug_level_from_env()
        client = store_client(store.port)
        dist.init_process_group(
            "ffreduce", store=client, rank=rank, world_size=2, timeout=timedelta(seconds=LONG)
        )
        assert type(backend()).__name__ == "_ProcessGroupWrapper"
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()
        dist.batch_isend_irecv(
            [dist.P2POp(dist.irecv, torch.zeros(2), 1 - rank), dist.P2POp(dist.isend, torch.ones(2), 1 - rank)]
        )[0].wait()
        import firefly

        assert firefly.stats()["operations"]["allreduce"]["calls"] >= 1
        return error_of(lambda: dist.all_reduce(torch.ones(2 + rank)))

    for kind, message, _ in run(2, body, init=False):
        assert kind == "RuntimeError" and "mismatch" in message.lower(), message


def test_the_error_file_says_why(tmp_path):
    def body(rank):
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / f"error{rank}.json")
        dist.barrier()
        if rank == 1:
            kill_self()
        return error_of(lambda: [dist.all_reduce(torch.ones(10)) for _ in range(100)])

    run(3, body, timeout=LONG, expect_killed=[1])
    from torch.distributed.elastic.multiprocessing.api import ProcessFailure

    for rank in (0, 2):
        failure = ProcessFailure(rank, 1, 1, str(tmp_path / f"error{rank}.json"))
        text = failure.message["message"]
        assert names(text, 1), text
        assert failure.timestamp > 1_700_000_000
    assert not (tmp_path / "error1.json").exists()


# ---- names and settings of other backends -------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"backend": "cpu:gloo,cuda:nccl"},
        {"backend": "nccl", "device_id": torch.device("cpu:0")},
        {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cpu:0")},
    ],
    ids=["no name", "two names", "bound", "two names, bound"],
)
def test_what_trainers_ask_for(asked):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def body(rank):
        import firefly

        firefly.install_as("nccl", "gloo")
        client = store_client(store.port)
        dist.init_process_group(
            store=client, rank=rank, world_size=2, timeout=timedelta(seconds=LONG), **asked
        )
        assert type(backend()).__name__ == "FireflyBackend"
        for group in (dist.group.WORLD, dist.new_group([1, 0]), dist.split_group(split_ranks=[[0, 1]])):
            tensor = torch.ones(3)
            dist.all_reduce(tensor, group=group)
            assert tensor.tolist() == [2.0] * 3
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        model(torch.ones(2, 4)).sum().backward()

    run(2, body, init=False)


def test_settings_without_effect_are_named_once():
    def body(rank):
        import warnings

        os.environ.update(
            NCCL_IB_HCA="mlx5",
            TORCH_NCCL_NAN_CHECK="1",
            NCCL_ALGO="Ring",
            TORCH_NCCL_ASYNC_ERROR_HANDLING="1",
            NCCL_SOCKET_IFNAME="lo",
            NCCL_DEBUG="INFO",
        )
        store = dist.HashStore()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                dist.init_process_group("ffreduce", store=store, rank=0, world_size=1)
                dist.destroy_process_group()
        return [str(w.message) for w in caught if "no effect on ffreduce" in str(w.message)]

    texts = run(1, body, init=False)[0]
    assert len(texts) == 1, texts
    assert "NCCL_ALGO, NCCL_IB_HCA, TORCH_NCCL_NAN_CHECK" in texts[0] and "TORCH_DIST_NAN_CHECK=1" in texts[0]
    assert "ASYNC" not in texts[0] and "IFNAME" not in texts[0]


def test_settings_with_effect():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def body(rank, attempt, **settings):
        import firefly

        os.environ.update(settings)
        client = dist.PrefixStore(attempt, store_client(store.port))
        dist.init_process_group(
            "ffreduce", store=client, rank=rank, world_size=2, timeout=timedelta(seconds=LONG)
        )
        dist.all_reduce(torch.ones(1000))
        return firefly.stats()["transport"]

    def transports(attempt, **settings):
        return run(2, lambda rank: body(rank, attempt, **settings), init=False)

    assert transports("a") == ["shm", "shm"]
    assert transports("b", NCCL_SHM_DISABLE="1") == ["tcp", "tcp"]
    assert transports("c", NCCL_SHM_DISABLE="1", NCCL_SOCKET_IFNAME="=lo") == ["tcp", "tcp"]
    assert transports("d", FIREFLY_REDUCE_CHECKSUM="1") == ["shm", "shm"]

    def refused(rank):
        return error_of(lambda: body(rank, "e", NCCL_SOCKET_IFNAME="nosuch"))

    for kind, message, _ in run(2, refused, init=False):
        assert kind == "ValueError" and "NCCL_SOCKET_IFNAME=nosuch" in message and "lo (127.0.0.1)" in message


# ---- the negative control of the whole file: signals do arrive ------------------------------------------------


def test_a_stopped_rank_that_goes_on_gets_an_error():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def body(rank):
        client = store_client(store.port)
        client.set(f"pid {rank}", str(os.getpid()))
        dist.barrier()
        if rank == 1:
            client.wait(["stop me"])
            os.kill(os.getpid(), signal.SIGSTOP)
            return error_of(lambda: [dist.all_reduce(torch.ones(10)) for _ in range(100)])
        victim = int(client.get("pid 1"))
        client.set("stop me", "1")
        while open(f"/proc/{victim}/stat").read().rsplit(")", 1)[1].split()[0] != "T":
            time.sleep(0.01)  # polling a state of the kernel, which nothing announces
        dist.set_timeout(timedelta(seconds=2))
        error = error_of(lambda: dist.all_reduce(torch.ones(10)))
        os.kill(victim, signal.SIGCONT)
        return error

    first, second = run(2, body, timeout=LONG)
    assert first[0] == "DistBackendError" and names(first[1], 1), first
    assert second[0] == "DistBackendError" and "rank 0" in second[1], second
