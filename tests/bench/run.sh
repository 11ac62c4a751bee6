#!/usr/bin/env bash
# All benches on this machine: starts a cluster of its own, measures, takes it down.
#
#   tests/bench/run.sh FF PYTHON [OUT_FOLDER]      tables on stdout, JSON files in OUT_FOLDER
#
# Every figure stands beside its denominator from the same run. Quiet machines only: the load
# average is printed, and other work on the cores makes the figures worthless.
set -euo pipefail

ff=$(realpath "$1")
python=$(realpath -s "$2")
out=${3:-.cache/bench}
here=$(dirname "$(realpath "$0")")
mkdir -p "$out"
out=$(realpath "$out")
work=$(mktemp -d "$out/run.XXXXXX")
export FIREFLY_STATE=$work/state

finish() {
    "$ff" fs umount "$work/mnt" >/dev/null 2>&1 || true
    "$ff" down >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap finish EXIT

echo "load average before: $(cut -d' ' -f1-3 /proc/loadavg)"
"$python" "$here/allreduce.py" --json "$out/allreduce.json"
"$python" "$here/reduce.py" --json "$out/reduce.json"
"$ff" reduce perf -b 8 -e 64M -f 8 | tee "$out/perf-shm.txt"
"$ff" reduce perf -b 8 -e 64M -f 8 -g 2 --nodes 2 | tee "$out/perf-tcp.txt"

"$ff" up --port-base 0 >/dev/null
"$python" "$here/submit.py" --ff "$ff" --json "$out/submit.json"
if "$ff" fs mount "$work/mnt" >/dev/null; then
    mkdir "$work/local"
    "$python" "$here/fs.py" --mount "$work/mnt" --local "$work/local" --ff "$ff" --json "$out/fs.json"
else
    echo "no mount on this machine (needs root and /dev/fuse): the file system was not measured" >&2
fi
echo
echo "load average after: $(cut -d' ' -f1-3 /proc/loadavg)"
