"""fs3 through its mount against the local disk below it: the same fio jobs, in turn.

    fs.py --mount DIR --local DIR [--ff ff] [--rounds 3] [--seconds 4] [--json FILE]

Both folders must be on the same disk in the end (fs3's storage servers keep their data there), or
the ratio says nothing. Client side direct=1 on both, so no page cache of the client is measured;
caches are dropped before every job when root. Writes end with fsync. fs3 writes every byte to
`--copies` targets of the one disk, so its writes cannot pass 1/copies of the disk's rate.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

from common import spread, table, text, write

JOBS = {
    # name: (fio arguments, the figure, its unit)
    "sequential write 1 MiB": (["--rw=write", "--bs=1m", "--numjobs=1", "--end_fsync=1"], "bw", "MB/s"),
    "sequential read 1 MiB": (["--rw=read", "--bs=1m", "--numjobs=1"], "bw", "MB/s"),
    "sequential write 1 MiB x 4": (["--rw=write", "--bs=1m", "--numjobs=4", "--end_fsync=1"], "bw", "MB/s"),
    "sequential read 1 MiB x 4": (["--rw=read", "--bs=1m", "--numjobs=4"], "bw", "MB/s"),
    "random read 4 KiB x 4": (["--rw=randread", "--bs=4k", "--numjobs=4"], "iops", "IOPS"),
    "random write 4 KiB x 4": (["--rw=randwrite", "--bs=4k", "--numjobs=4", "--end_fsync=1"], "iops", "IOPS"),
}


def drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    except OSError:
        return False


def fio(folder: Path, arguments: list[str], size: str, seconds: float) -> dict:
    command = [
        *["fio", "--name=bench", f"--directory={folder}", "--filename_format=bench.$jobnum", f"--size={size}"],
        *["--ioengine=psync", "--direct=1", "--group_reporting", "--output-format=json", "--time_based=0"],
        *[f"--runtime={seconds:g}", "--randrepeat=1", "--fallocate=none", *arguments],
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"fio failed in {folder}:\n{done.stdout}{done.stderr}")
    report = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = report["write" if "write" in arguments[0] else "read"]
    if report["error"]:
        raise SystemExit(f"fio reports error {report['error']} in {folder}")
    # Of a write, the final fsync counts: bytes over the whole run time of the job.
    elapsed = max(side["runtime"], report["job_runtime"] / max(1, int(arguments[2].split("=")[1]))) / 1000
    return {
        "bw": side["io_bytes"] / elapsed / 1e6,
        "iops": side["total_ios"] / elapsed,
        "bytes": side["io_bytes"],
        "p99_us": side["clat_ns"].get("percentile", {}).get("99.000000", 0) / 1000,
    }


def counters(ff: str | None, mount: Path) -> dict:
    """fs3's own counters of this mount, to show that the bytes went that way."""
    if ff is None:
        return {}
    done = subprocess.run([ff, "--json", "fs", "stats"], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"ff fs stats failed:\n{done.stderr}")
    for one in json.loads(done.stdout):
        if Path(one["mountpoint"]) == mount:
            return one["stats"]
    raise SystemExit(f"ff fs stats knows no mount at {mount}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mount", required=True, type=Path)
    parser.add_argument("--local", required=True, type=Path)
    parser.add_argument("--ff", help="the ff binary, to read fs3's counters with")
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="limit of one job")
    parser.add_argument("--size", default="128m", help="of each file")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    paths = {"local": args.local.resolve(), "fs3": args.mount.resolve()}
    if not os.path.ismount(paths["fs3"]):
        raise SystemExit(f"{args.mount} is no mount point: run `ff fs mount {args.mount}` first")
    folders = {name: path / "fio-bench" for name, path in paths.items()}
    before = counters(args.ff, paths["fs3"])
    samples = {job: {name: [] for name in folders} for job in JOBS}
    moved = {"read": 0, "write": 0}
    dropped = drop_caches()
    try:
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            # Every file is whole before it is measured: no job reads holes or allocates.
            done = fio(folder, ["--rw=write", "--bs=1m", "--numjobs=4", "--end_fsync=1"], args.size, 600)
            if folder is folders["fs3"]:
                moved["write"] += done["bytes"]
        for number in range(args.rounds):
            for job, (arguments, _, _) in JOBS.items():
                # ABBA, so that a drift of the machine meets both.
                for name in list(folders) if number % 2 == 0 else reversed(list(folders)):
                    drop_caches()
                    result = fio(folders[name], arguments, args.size, args.seconds)
                    samples[job][name].append(result)
                    if name == "fs3":
                        moved["write" if "write" in job else "read"] += result["bytes"]
        after = counters(args.ff, paths["fs3"])
    finally:
        for folder in folders.values():
            subprocess.run(["rm", "-rf", str(folder)], check=False)

    rows, figures = [], {}
    for job, (_, figure, unit) in JOBS.items():
        local, fs3 = (spread([s[figure] for s in samples[job][name]]) for name in ("local", "fs3"))
        ratio = spread([f[figure] / d[figure] for f, d in zip(samples[job]["fs3"], samples[job]["local"])])
        p99 = {name: spread([s["p99_us"] for s in samples[job][name]])["median"] for name in folders}
        rows.append([job, unit, text(fs3, 0), text(local, 0), text(ratio), f"{p99['fs3']:.0f}", f"{p99['local']:.0f}"])
        figures[job] = {"unit": unit, "fs3": fs3, "local": local, "ratio": ratio, "p99_us": p99}
    table(
        f"fs3 through {paths['fs3']} against {paths['local']} (fio psync, direct=1, caches "
        f"{'dropped' if dropped else 'NOT dropped: not root'}; fs3 keeps {args.copies} copies, all on the same disk)",
        ["job", "unit", "fs3", "local disk", "fs3/local", "fs3 p99 us", "local p99 us"],
        rows,
    )
    seen = {key: after[key] - before[key] for key in ("bytes_read", "bytes_written")} if args.ff else {}
    print(f"  through the mount by fio: {moved['write'] / 1e6:.0f} MB written, {moved['read'] / 1e6:.0f} MB read")
    if seen:
        print(
            f"  fs3's counters of it:     {seen['bytes_written'] / 1e6:.0f} MB written, {seen['bytes_read'] / 1e6:.0f} MB read"
        )
    write(args.json, {"bench": "fs", "copies": args.copies, "figures": figures, "fio_bytes": moved, "fs3_bytes": seen})


if __name__ == "__main__":
    main()
