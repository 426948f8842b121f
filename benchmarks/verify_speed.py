"""How fast `verify` hashes, over `openssl dgst -sha256` on the same files in the same run.

    python benchmarks/verify_speed.py [--dir FOLDER] [--json]

Without --dir, random files are made in a temporary folder. The files are read once beforehand, so that both sides read
from memory; rounds alternate between the two, and each figure is the median of its rounds. The openssl process hashes
one file after the other; `verify` runs once with one thread and once with its default, each including the whole of the
comparison, not only the hashing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gptoss_convert.convert.verify import DEFAULT_THREADS, verify
from gptoss_convert.formats.tree import walk

FILES, FILE_BYTES = 4, 512 << 20


def make_files(folder: Path) -> None:
    """Random files: nothing that a reader, a file system or a page cache could shorten."""
    for number in range(FILES):
        with (folder / f"part-{number}.safetensors.bench").open("wb") as file:
            for _ in range(FILE_BYTES >> 24):
                file.write(os.urandom(1 << 24))


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(folder: Path, rounds: int) -> dict[str, object]:
    """GB/s of each side, and the ratio to openssl."""
    paths = [str(file.path) for file in walk(folder)]
    size = sum(Path(path).stat().st_size for path in paths)
    sides: dict[str, Callable[[], object]] = {
        "openssl dgst -sha256": lambda: subprocess.run(
            ["openssl", "dgst", "-sha256", *paths], check=True, stdout=subprocess.DEVNULL
        ),
        "verify, 1 thread": lambda: verify(folder, repo="none", threads=1),
        f"verify, {DEFAULT_THREADS} threads": lambda: verify(folder, repo="none", threads=DEFAULT_THREADS),
    }
    sides["verify, 1 thread"]()  # brings the files into memory
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, action in sides.items():
            times[name].append(seconds(action))
    speeds = {name: size / 1e9 / statistics.median(taken) for name, taken in times.items()}
    baseline = speeds["openssl dgst -sha256"]
    return {
        "files": len(paths),
        "bytes": size,
        "rounds": rounds,
        "openssl": subprocess.run(["openssl", "version"], check=True, capture_output=True, text=True).stdout.strip(),
        "rows": [{"side": name, "gb_per_s": speed, "ratio": speed / baseline} for name, speed in speeds.items()],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="hash the files of this folder instead of random ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    options = parser.parse_args()
    if options.dir is not None:
        result = measure(options.dir, options.rounds)
    else:
        with tempfile.TemporaryDirectory(prefix="verify-speed-") as name:
            make_files(Path(name))
            result = measure(Path(name), options.rounds)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    rows = result["rows"]
    assert isinstance(rows, list)
    print(f"{result['files']} files, {int(str(result['bytes'])) / 1e9:.2f} GB, {result['openssl']}", file=sys.stderr)
    print(f"{'':<24}{'GB/s':>8}{'ratio':>8}")
    for row in rows:
        print(f"{row['side']:<24}{row['gb_per_s']:>8.2f}{row['ratio']:>8.2f}")


if __name__ == "__main__":
    main()
