"""Runs torch's own distributed_test.py, from the installed wheel, against ffreduce.

    torch_suite.py [--as ffreduce gloo] [--world 2 3 4] [--only REGEX] [--fast] [--record FILE]

Each combination of name and world size is one run of the whole file: under our own name, and with
FIREFLY_INSTALL_AS=gloo, so that tests which ask for that name run too. The suite's gates are opened
(see `open_gates`); what is left skipped, and what fails, must be explained in torch_suite.toml next
to this file, or the run fails. An explanation that explains nothing any more is an error as well.

The suite spawns an interpreter per rank and test; here ranks are forked, which is about ten times
faster and tests the backend's behaviour after a fork on the way.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

TABLE = Path(__file__).with_suffix(".toml")
NAMES = ["ffreduce", "gloo"]
WORLDS = [2, 3, 4]
# A test that takes longer hangs: the slowest takes about ten seconds on a busy machine.
TEST_SECONDS = 120

# One test per kind of thing, for the Python tests of every build: each takes under a second.
FAST = r"""test_(all_reduce_sum|all_reduce_complex_unsupported_ops|allreduce_coalesced_sum_async|reduce_max|broadcast
|all_gather|all_gather_coalesced_simple|all_gather_object_default_pg|gather|scatter|reduce_scatter_tensor_cuda
|all_to_all|all_to_all_single_unequal_split|isend|irecv|send_recv_any_source|batch_isend_irecv_gloo|barrier
|sparse_all_reduce_sum|monitored_barrier_gloo|monitored_barrier_allreduce_hang|new_subgroups
|DistributedDataParallelCPU|ddp_python_error_logged|broadcast_object_list|get_future)""".replace("\n", "")


# ---- in the process that runs the suite ---------------------------------------------------------


def open_gates(backend: str, world: int) -> None:
    """Lets the tests run that torch keeps for the backends it knows.

    Three kinds of gate: sets of backends that have a feature; skips whose reason names another CPU
    backend ("Only MPI supports all_to_all", "to be one of {'gloo'}"); and `skip_if_small_worldsize`, which asks for eight ranks
    of every backend but MPI although three are enough for what it guards.
    """
    from torch.testing._internal import common_distributed, common_utils

    for feature in ("gpu", "cuda", "ddp", "subgroup", "plugin"):
        common_distributed.DistTestCases.backend_feature[feature].add(backend)

    closed = common_utils.skip_but_pass_in_sandcastle_if
    about_cpu_backends = re.compile(r"\b(gloo|mpi)\b", re.IGNORECASE)

    def gate(condition, reason):
        return closed(condition and not about_cpu_backends.search(reason), reason)

    common_utils.skip_but_pass_in_sandcastle_if = gate

    closed_always = common_utils.skip_but_pass_in_sandcastle
    only_gloo = re.compile(r"Test requires backend \w+ to be one of \{[^}]*'gloo'[^}]*\}")

    def gate_always(reason):
        return (lambda test: test) if only_gloo.fullmatch(reason) else closed_always(reason)

    common_utils.skip_but_pass_in_sandcastle = gate_always
    if world >= 3:
        common_distributed.skip_if_small_worldsize = lambda test: test


def worker(backend: str, world: int, only: str, out: Path) -> None:
    """Runs the suite in this process and writes one line per test."""
    import unittest

    open_gates(backend, world)
    import torch
    from torch.testing._internal import common_distributed
    from torch.testing._internal.distributed import distributed_test

    distributed_test.PROFILING_SUPPORTED_BACKENDS.append(backend)
    distributed_test.SEND_RECV_PROFILING_SUPPORTED_BACKENDS.append(backend)
    common_distributed.get_timeout = lambda test: TEST_SECONDS

    class Suite(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
        def setUp(self):
            super().setUp()
            self._start_processes(torch.multiprocessing.get_context("fork").Process)

    lines = out.open("w", buffering=1)

    class Outcomes(unittest.TestResult):
        def startTest(self, test):
            super().startTest(test)
            self.started = time.monotonic()
            print(f"==== {test._testMethodName}", flush=True)

        def note(self, test, outcome, text=""):
            seconds = round(time.monotonic() - self.started, 2)
            line = {"test": test._testMethodName, "outcome": outcome, "text": text, "seconds": seconds}
            lines.write(json.dumps(line) + "\n")

        def addSuccess(self, test):
            self.note(test, "pass")

        def addSkip(self, test, reason):
            self.note(test, "skip", reason)

        def addFailure(self, test, error):
            text = self._exc_info_to_string(error, test)
            print(text, flush=True)
            self.note(test, "fail", text)

        addError = addFailure

    tests = unittest.TestSuite(
        Suite(name) for name in unittest.TestLoader().getTestCaseNames(Suite) if re.fullmatch(only, name)
    )
    tests.run(Outcomes())
    lines.write(json.dumps({"end": tests.countTestCases()}) + "\n")


# ---- the run as a whole ---------------------------------------------------------------------------


class SuiteError(Exception):
    """The run itself went wrong, whatever the tests say."""


def environment(backend: str, world: int, folder: Path) -> dict:
    """What the suite reads, without what could lead this machine's settings into it."""
    for name in ("barrier", "test_dir"):
        (folder / name).mkdir()
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FIREFLY_", "NCCL_", "GLOO_", "TORCH_"))}
    keep.update(
        BACKEND=backend,
        WORLD_SIZE=str(world),
        TEMP_DIR=str(folder),
        INIT_METHOD="env://",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    if backend != "ffreduce":
        keep["FIREFLY_INSTALL_AS"] = backend
    return keep


WHOSE = """
import torch.distributed as dist, os, torch
dist.init_process_group(os.environ["BACKEND"], store=dist.HashStore(), rank=0, world_size=1)
print(type(dist.group.WORLD._get_backend(torch.device("cpu"))).__name__)
"""


def run(backend: str, world: int, only: str = ".*") -> list[dict]:
    """Every test's outcome."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = environment(backend, world, folder)
        # Not from this folder: the installed package is what is tested.
        asked = subprocess.run([sys.executable, "-c", WHOSE], env=env, cwd=folder, capture_output=True, text=True)
        if asked.stdout.strip() != "FireflyBackend":
            raise SuiteError(f"{backend!r} is not served by ffreduce: {asked.stdout}{asked.stderr}")
        out, log = folder / "outcomes", folder / "log"
        command = [sys.executable, __file__, "--worker", backend, str(world), only, str(out)]
        with log.open("w") as text:
            code = subprocess.run(command, env=env, cwd=folder, stdout=text, stderr=text).returncode
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        keep = os.environ.get("FIREFLY_SUITE_LOGS")
        if keep:
            (Path(keep) / f"{backend}-{world}.log").write_text(log.read_text(errors="replace"))
        if not lines or "end" not in lines[-1] or code:
            raise SuiteError(f"the suite ended early with code {code}:\n{log.read_text(errors='replace')[-4000:]}")
        if lines[-1]["end"] != len(lines) - 1:
            raise SuiteError(f"{lines[-1]['end']} tests were to run, {len(lines) - 1} said how they ended")
        return lines[:-1]


def counts(outcomes: list[dict]) -> dict:
    by = collections.Counter(o["outcome"] for o in outcomes)
    return {
        "executed": by["pass"] + by["fail"],
        "passed": by["pass"],
        "failed": by["fail"],
        "skipped": by["skip"],
    }


def failures_of(table: dict, backend: str, world: int) -> dict:
    """The table's failures of one run, by test."""
    return {
        f["test"]: f for f in table["failure"] if backend in f.get("as", NAMES) and world in f.get("world", WORLDS)
    }


def explained(table: dict, backend: str, world: int, outcome: dict) -> bool:
    """Whether the table holds this failure."""
    failure = failures_of(table, backend, world).get(outcome["test"])
    return failure is not None and failure["says"] in outcome["text"]


def judge(table: dict, backend: str, world: int, outcomes: list[dict], whole: bool) -> list[str]:
    """What the table does not explain, and, for a whole run, what it explains in vain."""
    wrong = []
    here = {"as": backend, "world": world}
    failures = failures_of(table, backend, world)
    reasons = [re.compile(s["reason"]) for s in table["skip"]]
    for outcome in outcomes:
        test, text = outcome["test"], outcome["text"]
        if outcome["outcome"] == "skip":
            if test in failures:
                wrong.append(f"{test} is in the table as a failure, but was skipped: {text}")
            if not any(r.fullmatch(text) for r in reasons):
                wrong.append(f"{test} was skipped for a reason that the table does not explain: {text}")
        elif outcome["outcome"] == "fail":
            if test not in failures:
                wrong.append(f"{test} failed:\n{text}")
            elif not explained(table, backend, world, outcome):
                wrong.append(f"{test} failed otherwise than the table says ({failures[test]['says']!r}):\n{text}")
        elif test in failures:
            wrong.append(f"{test} passes now: take it out of the table")
    if whole:
        wanted = next((r for r in table["run"] if {k: r[k] for k in here} == here), None)
        if wanted is None:
            return [*wrong, f"the table has no run as {backend} at {world} ranks"]
        got = counts(outcomes)
        for what, number in got.items():
            if wanted[what] != number:
                wrong.append(f"{what}: {number}, the table says {wanted[what]}")
        ran = {o["test"] for o in outcomes}
        wrong += [f"the table speaks of {test}, which torch has no more" for test in failures if test not in ran]
    return wrong


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        backend, world, only, out = sys.argv[2:]
        worker(backend, int(world), only, Path(out))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--as", dest="names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--world", nargs="+", type=int, choices=WORLDS, default=WORLDS)
    parser.add_argument("--only", default=".*", help="regular expression of whole test names")
    parser.add_argument("--fast", action="store_true", help="one test per kind of thing")
    parser.add_argument("--record", type=Path, help="write all outcomes to this file (JSON)")
    args = parser.parse_args()

    only = FAST if args.fast else args.only
    table = tomllib.loads(TABLE.read_text())
    import torch

    if torch.__version__.split("+")[0] != table["torch"]:
        print(f"torch {torch.__version__}: the table is about {table['torch']}; counts may differ", file=sys.stderr)
    record, bad = {}, 0
    for backend in args.names:
        for world in args.world:
            started = time.monotonic()
            outcomes = run(backend, world, only)
            again = [o["test"] for o in outcomes if o["outcome"] == "fail" and not explained(table, backend, world, o)]
            if again:
                # Some tests give a group one second, which a busy machine may miss: once more, alone.
                print(f"  once more: {', '.join(again)}", flush=True)
                second = {o["test"]: o for o in run(backend, world, "|".join(again))}
                outcomes = [second.get(o["test"], o) for o in outcomes]
            record[f"{backend} {world}"] = outcomes
            c = counts(outcomes)
            print(
                f"as {backend:8} {world} ranks: {c['executed']} executed, {c['passed']} passed, {c['failed']} failed, "
                f"{c['skipped']} skipped, {time.monotonic() - started:.0f} s",
                flush=True,
            )
            for line in judge(table, backend, world, outcomes, whole=only == ".*"):
                bad += 1
                print(f"  {line}", flush=True)
    if only == ".*" and set(args.names) == set(NAMES) and set(args.world) == set(WORLDS):
        texts = {o["text"] for outcomes in record.values() for o in outcomes if o["outcome"] == "skip"}
        for skip in table["skip"]:
            if not any(re.fullmatch(skip["reason"], text) for text in texts):
                bad += 1
                print(f"  the table explains a skip that nothing has any more: {skip['reason']}")
    if args.record:
        args.record.write_text(json.dumps(record, indent=1))
    print("the outcome is what the table says" if not bad else f"{bad} differences from {TABLE.name}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
