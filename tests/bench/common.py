"""What the benches share: medians, tables, and the state of the machine beside the figures."""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path


def spread(samples: list[float]) -> dict:
    """Median and extremes of some repeats."""
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "repeats": len(samples)}


def text(s: dict, digits: int = 2) -> str:
    return f"{s['median']:.{digits}f} [{s['min']:.{digits}f}-{s['max']:.{digits}f}]"


def table(title: str, head: list[str], rows: list[list]) -> None:
    cells = [head] + [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    print(f"\n{title}")
    for number, row in enumerate(cells):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        if number == 0:
            print("  " + "  ".join("-" * width for width in widths))
    sys.stdout.flush()


def machine() -> dict:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {"cores": os.cpu_count(), "cpu": model, "kernel": platform.release(), "load": os.getloadavg()[0]}


def write(path: Path | None, result: dict) -> None:
    """The result as a JSON file, with the machine it is from."""
    if path is None:
        return
    result = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(), **result}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"  -> {path}")
