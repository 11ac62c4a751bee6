"""Time from calling `ff job submit` to the first instruction of the job's process, by the same clock.

    submit.py --ff ff [--repeats 15] [--json FILE]

The job writes the time to a file. The denominator is the same command started without a scheduler.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

from common import spread, table, text, write


def begun(path: Path, limit: float = 30.0) -> float:
    """The time that the job has written, in seconds since the epoch."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if path.exists() and (content := path.read_text()).endswith("\n"):
            return float(content)
        time.sleep(0.002)
    raise SystemExit(f"the job did not begin within {limit} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ff", required=True)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    samples = {"ff job submit": [], "two ranks on two nodes": [], "without a scheduler": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.repeats):
            for kind, nodes in (("ff job submit", 1), ("two ranks on two nodes", 2), ("without a scheduler", 0)):
                paths = [Path(folder) / f"{kind[:3]}-{nodes}-{number}-{rank}" for rank in range(max(nodes, 1))]
                script = f'date +%s.%N > "{folder}/{kind[:3]}-{nodes}-{number}-${{RANK:-0}}"'
                if nodes:
                    command = [args.ff, "--json", "job", "submit", "-n", str(nodes), "--", "/bin/sh", "-c", script]
                else:
                    command = ["/bin/sh", "-c", script]
                started = time.time()
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
                samples[kind].append((max(begun(path) for path in paths) - started) * 1000)
                if nodes:  # the next one must find the nodes free
                    job = json.loads(done.stdout)["job"]
                    while True:
                        status = subprocess.run(
                            [args.ff, "--json", "job", "status", job], capture_output=True, text=True, check=True
                        )
                        status = json.loads(status.stdout)
                        status = status[0] if isinstance(status, list) else status
                        if status["state"] == "succeeded":
                            break
                        if status["state"] in ("failed", "stopped"):
                            raise SystemExit(f"{job} {status['state']}: {status.get('reason')}")
                        time.sleep(0.01)
    figures = {kind: spread(times) for kind, times in samples.items()}
    table(
        f"submit to running, {args.repeats} jobs, ms (the last rank's first instruction)",
        ["how", "ms"],
        [[kind, text(s, 1)] for kind, s in figures.items()],
    )
    write(args.json, {"bench": "submit", "ms": figures})


if __name__ == "__main__":
    main()
