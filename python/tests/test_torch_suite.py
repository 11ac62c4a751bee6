"""The fast part of torch's own suite, and the runner's judgement. `make torch-suite` runs all of it."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from harness import OURS

RUNNER = Path(__file__).parent.parent / "suite" / "torch_suite.py"


@pytest.mark.skipif(not OURS, reason="runs under ffreduce's names only")
def test_the_fast_part_passes():
    pytest.importorskip("expecttest", reason="torch's test helpers need it; deploy/setup.sh torch installs it")
    command = [sys.executable, str(RUNNER), "--fast", "--as", "gloo", "--world", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 executed, 20 passed" in done.stdout, done.stdout


def runner():
    spec = importlib.util.spec_from_file_location("torch_suite", RUNNER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_runner_tells_what_the_table_does_not():
    suite = runner()
    table = tomllib.loads(suite.TABLE.read_text())
    known = table["failure"][0]

    def judged(outcomes, whole=False):
        return suite.judge(table, "gloo", 3, outcomes, whole)

    def outcome(test, kind, text=""):
        return {"test": test, "outcome": kind, "text": text, "seconds": 0}

    fails = outcome(known["test"], "fail", f"... {known['says']} ...")
    assert judged([outcome("test_x", "pass"), fails, outcome("test_y", "skip", "no torchvision")]) == []
    assert "test_x failed" in judged([outcome("test_x", "fail", "boom")])[0]
    assert "otherwise" in judged([outcome(known["test"], "fail", "boom")])[0]
    assert "passes now" in judged([outcome(known["test"], "pass")])[0]
    assert "does not explain" in judged([outcome("test_x", "skip", "because")])[0]
    # A failure that the table allows only under our own name.
    other = next(f for f in table["failure"] if f.get("as") == ["ffreduce"])
    assert judged([outcome(other["test"], "fail", other["says"])])
    # Tests that vanish are noticed by the counts, and by their names in the table.
    counted = judged([outcome("test_x", "pass")], whole=True)
    assert any("executed: 1, the table says" in line for line in counted)
    assert any("torch has no more" in line for line in counted)
