"""Writes scikit-learn's 1,797 handwritten digits (8x8, UCI) as a data set on disk.

    python -m firefly.examples.prepare_digits --out /mnt/fs3/digits

Under the folder afterwards:

    digits.npy            uint8 [1797, 64], one row per sample, values 0..16
    labels.npy            uint8 [1797]
    split.npy             uint8 [1797], 0 = train, 1 = held out
    train/00017_3.pgm     the same samples as one small image file each; the digit is
    test/00005_8.pgm      the number behind the underscore

The split is fixed (every fifth sample is held out), so accuracies of different runs compare.
`--csv digits.csv.gz` reads the samples from that file instead of an installed scikit-learn.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SIDE = 8
LEVELS = 16
WRITERS = 16


def load(csv: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [1797, 64] and labels [1797], both uint8."""
    if csv:
        table = np.loadtxt(csv, delimiter=",").astype(np.uint8)
        return table[:, :-1], table[:, -1]
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit(
            "scikit-learn, which carries the digits, is not installed here: "
            "run `pip install scikit-learn`, or pass --csv digits.csv.gz (deploy/digits/fetch.sh gets that file)"
        ) from None
    digits = load_digits()
    return digits.data.astype(np.uint8), digits.target.astype(np.uint8)


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` so that `path` either does not exist or is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def npy(array: np.ndarray) -> bytes:
    from io import BytesIO

    out = BytesIO()
    np.save(out, array)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder to write, made when missing")
    parser.add_argument("--csv", help="digits.csv or digits.csv.gz instead of scikit-learn")
    parser.add_argument("--packed-only", action="store_true", help="no single image files")
    args = parser.parse_args()

    pixels, labels = load(args.csv)
    split = (np.arange(len(labels)) % 5 == 4).astype(np.uint8)
    args.out.mkdir(parents=True, exist_ok=True)
    count = 0
    if not args.packed_only:
        for part in ("train", "test"):
            (args.out / part).mkdir(exist_ok=True)

        def write_image(index: int) -> None:
            path = args.out / ("test" if split[index] else "train") / f"{index:05d}_{labels[index]}.pgm"
            path.write_bytes(f"P5 {SIDE} {SIDE} {LEVELS}\n".encode() + pixels[index].tobytes())

        # A new file on a distributed file system is a round trip or two: many at a time.
        with ThreadPoolExecutor(WRITERS) as pool:
            for _ in pool.map(write_image, range(len(labels))):
                count += 1
                if sys.stderr.isatty() and count % 50 == 0:
                    print(f"\r  {count}/{len(labels)} files", end="", file=sys.stderr, flush=True)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    # The packed files come last: where they are, the data set is whole.
    write_file(args.out / "labels.npy", npy(labels))
    write_file(args.out / "split.npy", npy(split))
    write_file(args.out / "digits.npy", npy(pixels))
    print(f"  {len(labels)} digits in {args.out}: digits.npy and {count} image files", flush=True)


if __name__ == "__main__":
    main()
