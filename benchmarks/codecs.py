"""Every rounding codec beside ggml's encoder of the same type: error and speed, in one process, on the same arrays.

    python benchmarks/codecs.py [CODEC …] [--rows N] [--seconds S] [--first-use] [--json]

Data, rows of 2880 values (3072 for blocks of 256): Gaussian with a spread over rows, Student's t with 3.5 degrees of
freedom, Gaussian with one value of every 32 twelve times larger, and MXFP4-valued (the Gaussian rounded). Each is encoded
without importance and with a log-normal one per column. Errors are relative RMS, √(Σ w (x − y)² / Σ w x²), w the
importance or 1, of what ggml's decoder reads from the bytes of either side. Speeds are of one thread, by its processor
time, which other load disturbs less: rounds alternate between the two sides and the fastest of each counts; Mw/s is
million weights a second. `ratio` is ours over ggml's: of an error below 1, of a speed above 1 is better. Some of ggml's
encoders ignore importance (q8_0, mxfp4, nvfp4, q2_0).

--first-use adds the processor seconds each codec takes on its first call with an empty compilation cache, in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "lib"))

from support import ggml

from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.codecs import CODECS, Codec

DATA = ("gaussian", "heavy", "outlier", "mxfp4")
NEEDS_IMPORTANCE = {"iq2_xxs", "iq2_xs", "iq1_s"}
_FIRST_USE = """
import json, time
import numpy as np
from gptoss_convert.kernels.codecs import CODECS
codec, times = CODECS["{name}"], []
values = np.random.default_rng(0).standard_normal((2, 12 * codec.block)).astype(np.float32)
for importance in (None, np.ones(12 * codec.block, np.float32)):
    start = time.process_time()
    try:
        codec.encode(values, importance)
    except ValueError:
        pass
    times.append(time.process_time() - start)
print(json.dumps(times))
"""


@dataclass(frozen=True)
class Result:
    """One codec on one data set."""

    codec: str
    data: str
    importance: bool
    error: float
    ggml_error: float
    mws: float
    ggml_mws: float

    @property
    def error_ratio(self) -> float | None:
        """Ours over ggml's; None where ggml's is zero."""
        return self.error / self.ggml_error if self.ggml_error else None

    @property
    def speed_ratio(self) -> float:
        """Ours over ggml's."""
        return self.mws / self.ggml_mws


def make(kind: str, rows: int, columns: int) -> NDArray[np.float32]:
    """A data set, the same on every run."""
    random = np.random.default_rng(0)
    values = random.standard_normal((rows, columns)) * 0.02 * np.exp(0.3 * random.standard_normal((rows, 1)))
    if kind == "heavy":
        values = random.standard_t(3.5, (rows, columns)) * 0.02
    if kind == "outlier":
        groups = values.reshape(rows, -1, 32)
        at = random.integers(0, 32, groups.shape[:2])[..., None]
        np.put_along_axis(groups, at, 12 * np.take_along_axis(groups, at, 2), 2)
    result = values.astype(np.float32)
    return mxfp4.decode(*mxfp4.encode(result)) if kind == "mxfp4" else result


def relative_rms(values: NDArray[np.float32], read: NDArray[np.float32], weight: NDArray[np.float32] | None) -> float:
    """√(Σ w (x − y)² / Σ w x²)."""
    w = 1.0 if weight is None else weight.astype(np.float64)
    x = values.astype(np.float64)
    return float(np.sqrt((w * (x - read) ** 2).sum() / (w * x**2).sum()))


def fastest(sides: tuple[Callable[[], object], ...], seconds: float) -> list[float]:
    """The least time of each side; rounds alternate until `seconds` are spent, at least three."""
    best = [float("inf")] * len(sides)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for number, side in enumerate(sides):
            start = time.thread_time()
            side()
            best[number] = min(best[number], time.thread_time() - start)
        rounds += 1
    return best


def compare(codec: Codec, kind: str, weighted: bool, rows: int, seconds: float) -> Result:
    """One codec on one data set, ours and ggml's."""
    encode = codec.encode
    assert encode is not None
    columns = 3072 if codec.block == 256 else 2880
    values = make(kind, rows, columns)
    importance = np.exp(np.random.default_rng(9).standard_normal(columns)).astype(np.float32) if weighted else None
    ours, theirs = encode(values, importance), ggml.encode(codec.name, values, importance)
    errors = [relative_rms(values, ggml.decode(codec.name, data, columns), importance) for data in (ours, theirs)]
    times = fastest(
        (
            lambda: encode(values, importance),
            lambda: ggml.encode_into(codec.name, values, importance, theirs),
        ),
        seconds,
    )
    return Result(codec.name, kind, weighted, *errors, *(values.size / time_ / 1e6 for time_ in times))


def results(names: list[str], rows: int, seconds: float) -> Iterator[Result]:
    """Every pair of codec and data set that both sides take."""
    for name in names:
        for weighted in (False, True):
            if not weighted and name in NEEDS_IMPORTANCE:
                continue
            for kind in DATA:
                yield compare(CODECS[name], kind, weighted, rows, seconds)


def first_use(name: str) -> tuple[float, float]:
    """Seconds of the first call without and with importance, compilation and all."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
        command = [sys.executable, "-P", "-c", _FIRST_USE.format(name=name)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    plain, weighted = json.loads(done.stdout)
    return plain, weighted


def line(result: Result) -> str:
    """One row of the table."""
    ratio = "    –" if result.error_ratio is None else f"{result.error_ratio:5.3f}"
    return (
        f"{result.codec:8} {result.data:9} {'yes' if result.importance else 'no':4}"
        f"{result.error:9.5f} {result.ggml_error:9.5f} {ratio}  "
        f"{result.mws:8.1f} {result.ggml_mws:8.1f} {result.speed_ratio:6.2f}"
    )


def main() -> None:
    """Run and print."""
    known = [codec.name for codec in CODECS.values() if codec.encode is not None and codec.name in ggml.TYPES]
    parser = argparse.ArgumentParser(description="Errors and speeds of the codecs beside ggml's.")
    parser.add_argument("codecs", nargs="*", metavar="CODEC", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.25, help="spent on timing each line")
    parser.add_argument("--first-use", action="store_true", help="also time the first call, compilation included")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.codecs) - set(known):
        parser.error(f"no such codec: {', '.join(sorted(unknown))}")
    names = options.codecs or known
    if not options.json:
        print("codec    data      imp.     error    ggml's ratio      Mw/s   ggml's  ratio", flush=True)
    rows = []
    for result in results(names, options.rows, options.seconds):
        rows.append({**asdict(result), "error_ratio": result.error_ratio, "speed_ratio": result.speed_ratio})
        if not options.json:
            print(line(result), flush=True)
    first = {name: first_use(name) for name in names} if options.first_use else {}
    if options.json:
        print(json.dumps({"results": rows, "first_use_seconds": first}, indent=1))
    for name, (plain, weighted) in first.items() if not options.json else ():
        print(f"first use of {name:8} {plain:5.1f} s, with importance {weighted:5.1f} s more")


if __name__ == "__main__":
    main()
