"""Every collective against what it should give, on 2 and 3 ranks, for every element type."""

import pytest
import torch
import torch.distributed as dist
from harness import OURS, run
from torch.distributed import ReduceOp

WORLDS = [2, 3]
SIZES = [0, 1, 7, 1000, 300_001]

INTEGERS = [torch.uint8, torch.int8, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
if OURS:
    INTEGERS += [torch.int16, torch.uint16, torch.uint32, torch.uint64]
    FLOATS += [torch.float8_e4m3fn, torch.float8_e5m2]
NUMBERS = INTEGERS + FLOATS + COMPLEX
ANY = NUMBERS + ([torch.bool] if OURS else [])  # gloo gathers no bool


def values(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers, different per rank and place, exact in every type."""
    plain = (torch.arange(size) * 7 + rank * 3) % 5 + 1
    if dtype == torch.bool:
        return plain > 3
    if dtype.is_complex:
        return torch.complex(plain.double(), (plain % 3).double()).to(dtype)
    return plain.to(dtype)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In a type that every operation is defined for."""
    if tensor.dtype.is_complex:
        return tensor.to(torch.complex128)
    if tensor.dtype.is_floating_point:
        return tensor.to(torch.float64)
    return tensor.to(torch.int64)


def same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape, what
    assert torch.equal(wide(got), wide(want)), f"{what}: got {wide(got)[:8]}, want {wide(want)[:8]}"


def reduced(world: int, size: int, dtype: torch.dtype, op) -> torch.Tensor:
    """The reduction over all ranks, calculated here."""
    total = None
    for rank in range(world):
        one = wide(values(rank, size, dtype))
        if total is None:
            total = one.clone()
        elif op in (ReduceOp.SUM, ReduceOp.AVG):
            total += one
        elif op == ReduceOp.PRODUCT:
            total *= one
        elif op == ReduceOp.MIN:
            total = torch.minimum(total, one)
        elif op == ReduceOp.MAX:
            total = torch.maximum(total, one)
        elif op == ReduceOp.BAND:
            total &= one
        elif op == ReduceOp.BOR:
            total |= one
        elif op == ReduceOp.BXOR:
            total ^= one
    if op == ReduceOp.AVG:
        total = total / world if total.is_floating_point() or total.is_complex() else total // world
    if dtype == torch.bool:
        return total != 0
    return total.to(dtype)


def ops_for(dtype: torch.dtype) -> list:
    if dtype == torch.bool:
        return [ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.BAND, ReduceOp.BOR] if OURS else []
    ops = [ReduceOp.SUM]
    if OURS:
        ops.append(ReduceOp.AVG)
    if not dtype.is_complex:
        ops += [ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX]
    if not (dtype.is_floating_point or dtype.is_complex):
        ops += [ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR]
    return ops


# Thirds are not exact, so an average over 3 ranks is compared with a tolerance of one rounding.
def close(got, want, dtype, op, what):
    if op == ReduceOp.AVG and (dtype.is_floating_point or dtype.is_complex):
        torch.testing.assert_close(wide(got), wide(want), rtol=0.13 if dtype.itemsize == 1 else 8e-3, atol=0)
    else:
        same(got, want, what)


@pytest.mark.parametrize("world", WORLDS)
def test_allreduce(world):
    def body(rank):
        for dtype in ANY:
            for op in ops_for(dtype):
                for size in SIZES if dtype == torch.float32 else [5, 1000]:
                    tensor = values(rank, size, dtype)
                    dist.all_reduce(tensor, op)
                    close(tensor, reduced(world, size, dtype, op), dtype, op, f"{dtype} {op} {size}")

    run(world, body)


@pytest.mark.parametrize("world", WORLDS)
def test_allreduce_shapes_async_and_coalesced(world):
    def body(rank):
        grid = values(rank, 24, torch.float32).view(2, 3, 4)
        dist.all_reduce(grid)
        same(grid, reduced(world, 24, torch.float32, ReduceOp.SUM).view(2, 3, 4), "grid")
        image = values(rank, 120, torch.float32).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
        dist.all_reduce(image)
        same(image, reduced(world, 120, torch.float32, ReduceOp.SUM).view(2, 3, 4, 5), "channels last")

        tensors = [values(rank, 1000 + i, torch.float32) for i in range(16)]
        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in reversed(works):
            assert work.wait()
            assert work.is_completed() and work.is_success()
        for i, tensor in enumerate(tensors):
            same(tensor, reduced(world, 1000 + i, torch.float32, ReduceOp.SUM), f"async {i}")

        tensor = values(rank, 100, torch.float32)
        future = dist.all_reduce(tensor, async_op=True).get_future()
        doubled = future.then(lambda done: done.value()[0] * 2).wait()
        same(doubled, 2 * reduced(world, 100, torch.float32, ReduceOp.SUM), "future")

        some = [values(rank, n, torch.float64) for n in (3, 0, 5000)]
        dist.all_reduce_coalesced(some)
        for tensor in some:
            same(tensor, reduced(world, tensor.numel(), torch.float64, ReduceOp.SUM), "coalesced")
        with dist._coalescing_manager():
            some = [values(rank, n, torch.float32) for n in (3, 50)]
            for tensor in some:
                dist.all_reduce(tensor)
        for tensor in some:
            same(tensor, reduced(world, tensor.numel(), torch.float32, ReduceOp.SUM), "coalescing manager")

    run(world, body)


@pytest.mark.skipif(not OURS, reason="gloo has no PREMUL_SUM")
def test_premul_sum():
    def body(rank):
        for factor in (0.5, torch.tensor([0.5])):
            tensor = values(rank, 100, torch.float32)
            dist.all_reduce(tensor, dist._make_nccl_premul_sum(factor))
            same(tensor, reduced(2, 100, torch.float32, ReduceOp.SUM) / 2, "premul")

    run(2, body)


@pytest.mark.parametrize("world", WORLDS)
def test_broadcast_and_reduce(world):
    def body(rank):
        for dtype in ANY:
            for root in range(world):
                for size in SIZES if dtype == torch.float32 else [5, 1000]:
                    tensor = values(rank, size, dtype)
                    dist.broadcast(tensor, root)
                    same(tensor, values(root, size, dtype), f"broadcast {dtype} {size} from {root}")
                    if dtype == torch.bool:
                        continue
                    tensor = values(rank, size, dtype)
                    dist.reduce(tensor, root)
                    if rank == root:
                        same(tensor, reduced(world, size, dtype, ReduceOp.SUM), f"reduce {dtype} {size} to {root}")

    run(world, body)


@pytest.mark.parametrize("world", WORLDS)
def test_allgather(world):
    def body(rank):
        for dtype in ANY:
            for size in SIZES if dtype == torch.float32 else [5, 1000]:
                mine = values(rank, size, dtype)
                everyone = [values(r, size, dtype) for r in range(world)]
                outputs = [torch.zeros_like(mine) for _ in range(world)]
                dist.all_gather(outputs, mine)
                for got, want in zip(outputs, everyone):
                    same(got, want, f"list {dtype} {size}")
                flat = torch.zeros(world * size, dtype=dtype)
                dist.all_gather_into_tensor(flat, mine)
                same(flat, torch.cat(everyone), f"single {dtype} {size}")
        # The input may be a strided view: it is only read.
        strided = values(rank, 200, torch.float32)[::2]
        outputs = [torch.zeros(100) for _ in range(world)]
        dist.all_gather(outputs, strided)
        same(outputs[1], values(1, 200, torch.float32)[::2], "strided input")
        # In place: the input is this rank's block of the output.
        flat = torch.zeros(world * 10)
        flat[rank * 10 : rank * 10 + 10] = values(rank, 10, torch.float32)
        dist.all_gather_into_tensor(flat, flat[rank * 10 : rank * 10 + 10])
        same(flat, torch.cat([values(r, 10, torch.float32) for r in range(world)]), "in place")
        with dist._coalescing_manager():
            flats = [torch.zeros(world * n) for n in (4, 9)]
            for flat in flats:
                dist.all_gather_into_tensor(flat, values(rank, flat.numel() // world, torch.float32))
        for flat in flats:
            n = flat.numel() // world
            same(flat, torch.cat([values(r, n, torch.float32) for r in range(world)]), "coalesced")

    run(world, body)


@pytest.mark.parametrize("world", WORLDS)
def test_reduce_scatter(world):
    def body(rank):
        for dtype in NUMBERS:
            for op in ops_for(dtype)[:3]:
                for size in SIZES if dtype == torch.float32 else [5, 1000]:
                    whole = values(rank, world * size, dtype)
                    want = reduced(world, world * size, dtype, op)[rank * size : (rank + 1) * size]
                    out = torch.zeros(size, dtype=dtype)
                    dist.reduce_scatter(out, list(whole.split(size)) if size else [whole] * world, op)
                    close(out, want, dtype, op, f"list {dtype} {op} {size}")
                    out = torch.zeros(size, dtype=dtype)
                    dist.reduce_scatter_tensor(out, whole, op)
                    close(out, want, dtype, op, f"single {dtype} {op} {size}")

    run(world, body)


@pytest.mark.parametrize("world", WORLDS)
def test_gather_and_scatter(world):
    def body(rank):
        for dtype in ANY if OURS else INTEGERS + FLOATS:
            for root in range(world):
                for size in (0, 5, 1000):
                    mine = values(rank, size, dtype)
                    outputs = [torch.zeros_like(mine) for _ in range(world)] if rank == root else None
                    dist.gather(mine, outputs, dst=root)
                    if rank == root:
                        for r, got in enumerate(outputs):
                            same(got, values(r, size, dtype), f"gather {dtype} {size}")
                    inputs = [values(10 * root + r, size, dtype) for r in range(world)] if rank == root else None
                    out = torch.zeros_like(mine)
                    dist.scatter(out, inputs, src=root)
                    same(out, values(10 * root + rank, size, dtype), f"scatter {dtype} {size}")

    run(world, body)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.skipif(not OURS, reason="gloo refuses uneven sizes")
def test_alltoall(world):
    def body(rank):
        def block(source, target, n, dtype):
            return values(7 * source + target, n, dtype)

        def count(source, target):  # uneven, some are zero
            return (source + 2 * target) % 3 * 4

        for dtype in ANY:
            for n in (1, 500):
                equal = torch.cat([block(rank, target, n, dtype) for target in range(world)])
                out = torch.zeros_like(equal)
                dist.all_to_all_single(out, equal)
                same(out, torch.cat([block(source, rank, n, dtype) for source in range(world)]), "equal")

            sends = [count(rank, target) for target in range(world)]
            takes = [count(source, rank) for source in range(world)]
            data = torch.cat([block(rank, target, n, dtype) for target, n in enumerate(sends)])
            out = torch.zeros(sum(takes), dtype=dtype)
            dist.all_to_all_single(out, data, takes, sends)
            want = torch.cat([block(source, rank, n, dtype) for source, n in enumerate(takes)])
            same(out, want, f"uneven {dtype}")

            outputs = [torch.zeros(n, dtype=dtype) for n in takes]
            dist.all_to_all(outputs, [block(rank, target, n, dtype) for target, n in enumerate(sends)])
            same(torch.cat(outputs), want, f"list {dtype}")
        # Rows of several elements, and nothing at all.
        rows = torch.arange(world * 6, dtype=torch.float32).view(world * 2, 3) + 100 * rank
        out = torch.zeros(world * 2, 3)
        dist.all_to_all_single(out, rows, [2] * world, [2] * world)
        for source in range(world):
            want = torch.arange(world * 6, dtype=torch.float32).view(world * 2, 3) + 100 * source
            same(out[2 * source : 2 * source + 2], want[2 * rank : 2 * rank + 2], "rows")
        dist.all_to_all_single(torch.zeros(0), torch.zeros(0), [0] * world, [0] * world)

    run(world, body)


@pytest.mark.parametrize("world", WORLDS)
def test_point_to_point(world):
    def body(rank):
        after, before = (rank + 1) % world, (rank - 1) % world
        for dtype in ANY:
            for size in (0, 5, 300_001) if dtype == torch.float32 else (5, 1000):
                out = torch.zeros(size, dtype=dtype)
                work = dist.isend(values(rank, size, dtype), after)
                dist.recv(out, before)
                work.wait()
                same(out, values(before, size, dtype), f"ring {dtype} {size}")
        # Messages match by tag, not by arrival.
        one, two = torch.zeros(4), torch.zeros(4)
        works = [dist.isend(torch.full((4,), 1.0), after, tag=1), dist.isend(torch.full((4,), 2.0), after, tag=2)]
        dist.recv(two, before, tag=2)
        dist.recv(one, before, tag=1)
        [work.wait() for work in works]
        assert one.tolist() == [1.0] * 4 and two.tolist() == [2.0] * 4
        # Receives that are posted before anything is sent.
        out = torch.zeros(1000)
        receive = dist.irecv(out, before)
        dist.barrier()
        send = dist.isend(values(rank, 1000, torch.float32), after)
        receive.wait(), send.wait()
        same(out, values(before, 1000, torch.float32), "early receive")
        # From anyone.
        if rank == 0:
            sources = []
            for _ in range(world - 1):
                out = torch.zeros(3)
                source = dist.recv(out)
                assert out.tolist() == [float(source)] * 3
                sources.append(source)
            assert sorted(sources) == list(range(1, world))
        else:
            dist.send(torch.full((3,), float(rank)), 0)
        # What follows has the same tag: a receive from anyone that is still open would take it.
        dist.barrier()
        # A batch, as pipeline parallelism issues it.
        out = torch.zeros(5)
        batch = [dist.P2POp(dist.isend, values(rank, 5, torch.float32), after), dist.P2POp(dist.irecv, out, before)]
        [work.wait() for work in dist.batch_isend_irecv(batch)]
        same(out, values(before, 5, torch.float32), "batch")
        if not OURS:  # gloo's receive is complete only after wait()
            return
        # Polling completes, too.
        work = dist.irecv(out, before)
        dist.send(values(rank, 5, torch.float32), after)
        while not work.is_completed():
            pass
        same(out, values(before, 5, torch.float32), "polled")

    run(world, body)


@pytest.mark.parametrize("world", WORLDS)
def test_objects_groups_and_barriers(world):
    def body(rank):
        got = [None] * world
        dist.all_gather_object(got, {"rank": rank, "text": "x" * (100 * rank)})
        assert [one["rank"] for one in got] == list(range(world))
        boxes = [f"from {rank}", rank]
        dist.broadcast_object_list(boxes, src=1)
        assert boxes == ["from 1", 1]
        out = [None]
        dist.scatter_object_list(out, [[r, "s"] for r in range(world)] if rank == 0 else None, src=0)
        assert out[0] == [rank, "s"]
        some = [None] * world if rank == 1 else None
        dist.gather_object(rank * rank, some, dst=1)
        if rank == 1:
            assert some == [r * r for r in range(world)]
        dist.barrier()
        if OURS:
            dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).monitored_barrier()

        pair = dist.new_group([0, world - 1])
        alone = dist.new_group([0])
        if rank in (0, world - 1):
            tensor = values(rank, 1000, torch.float32)
            dist.all_reduce(tensor, group=pair)
            same(tensor, values(0, 1000, torch.float32) + values(world - 1, 1000, torch.float32), "pair")
        if rank == 0:
            tensor = values(0, 10, torch.float32)
            dist.all_reduce(tensor, group=alone)
            same(tensor, values(0, 10, torch.float32), "alone")
        # Crossed groups: neither may wait for the other's turn.
        halves = [dist.new_group([0, 1]), dist.new_group([0, 1])]
        if rank < 2:
            tensors = [torch.ones(1000), torch.ones(1000)]
            order = [0, 1] if rank == 0 else [1, 0]
            works = [dist.all_reduce(tensors[i], group=halves[i], async_op=True) for i in order]
            [work.wait() for work in works]
            assert all(tensor.eq(2).all() for tensor in tensors)
        sequence = dist.distributed_c10d._get_default_group()._get_sequence_number_for_group()
        dist.all_reduce(torch.ones(1))
        assert dist.distributed_c10d._get_default_group()._get_sequence_number_for_group() == sequence + 1

    run(world, body)


def test_functional_collectives():
    def body(rank):
        import torch.distributed._functional_collectives as functional

        group = dist.group.WORLD
        one = values(rank, 100, torch.float32)
        same(functional.all_reduce(one, "sum", group) + 0, reduced(2, 100, torch.float32, ReduceOp.SUM), "all_reduce")
        gathered = functional.all_gather_tensor(one, 0, group) + 0
        same(gathered, torch.cat([values(r, 100, torch.float32) for r in range(2)]), "all_gather_tensor")
        scattered = functional.reduce_scatter_tensor(one, "sum", 0, group) + 0
        same(scattered, reduced(2, 100, torch.float32, ReduceOp.SUM).chunk(2)[rank], "reduce_scatter_tensor")

    run(2, body)


def test_group_is_rebuilt_in_the_same_process():
    def body(rank):
        store = dist.distributed_c10d._get_default_store()
        for attempt in range(3):
            dist.destroy_process_group()
            dist.init_process_group(
                __import__("harness").BACKEND,
                store=dist.PrefixStore(f"again{attempt}", store),
                rank=rank,
                world_size=2,
            )
            tensor = torch.ones(10)
            dist.all_reduce(tensor)
            assert tensor.tolist() == [2.0] * 10

    run(2, body)
