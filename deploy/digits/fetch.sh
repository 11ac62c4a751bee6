#!/bin/sh
# Gets scikit-learn's handwritten digits, digits.csv.gz (1,797 lines of 64 pixels 0..16 and the
# label), without torch or numpy: pip fetches scikit-learn's wheel, one file of it is kept.
#
#   deploy/digits/fetch.sh CACHE_FOLDER      prints the path of the file
#
# Nothing is fetched when the file is there. pip asks the index that it is configured for.
set -eu

if [ $# -ne 1 ]; then
    echo "usage: $0 CACHE_FOLDER" >&2
    exit 2
fi
cache=$1
file=$cache/digits.csv.gz
if [ -s "$file" ]; then
    echo "$file"
    exit 0
fi

python=${PYTHON:-python3}
if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "fetch.sh: $python has no pip, which fetches the data; install it (on Debian: apt install python3-pip) or set PYTHON" >&2
    exit 1
fi
mkdir -p "$cache"
work=$(mktemp -d "$cache/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --dest "$work" scikit-learn >&2
"$python" - "$work" <<'PY'
import glob, gzip, sys, zipfile

folder = sys.argv[1]
(wheel,) = glob.glob(f"{folder}/scikit_learn-*.whl")
data = zipfile.ZipFile(wheel).read("sklearn/datasets/data/digits.csv.gz")
lines = gzip.decompress(data).decode().split()
if len(lines) != 1797 or any(line.count(",") != 64 for line in lines):
    sys.exit(f"fetch.sh: {wheel} holds other digits than expected ({len(lines)} lines)")
with open(f"{folder}/digits.csv.gz", "wb") as file:
    file.write(data)
PY
mv "$work/digits.csv.gz" "$file"
echo "$file"
