"""Reading every value of a source: what is not finite, where, and which scale bytes MXFP4 has.

Values are streamed through the source's views by a few threads, a bounded number of rows at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.convert.names import as_stack, canonical_shapes
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.views import Transposed, View
from gptoss_convert.convert.workers import Workers
from gptoss_convert.kernels.chunks import Chunk, Mxfp4
from gptoss_convert.kernels.codecs import CODECS

STEP_VALUES = 6 << 20  # read at once by a thread
MAX_COLUMNS = 64 << 20  # a row is read whole; the release's longest has 5760
NAN_SCALE = 255


@dataclass
class Tally:
    """What is not finite in one tensor, and the first place of it: (expert, row, column)."""

    nan: int = 0
    infinite: int = 0
    scales: int = 0  # blocks with scale byte 255
    overflowing: int = 0  # blocks with a lower scale byte and a code that takes them out of float32's range
    first: tuple[int, int, int] | None = None

    def add(self, chunk: Chunk, at: tuple[int, int, int]) -> None:
        """Count a chunk whose first bad value is at `at`."""
        self.first = at if self.first is None else min(self.first, at)
        if isinstance(chunk, Mxfp4):
            finite = np.isfinite(chunk.values()).reshape(*chunk.scales.shape, -1).all(axis=-1)
            nan = chunk.scales == NAN_SCALE
            self.scales += int(nan.sum())
            self.overflowing += int((~finite & ~nan).sum())
        else:
            values = chunk.values()
            self.nan += int(np.isnan(values).sum())
            self.infinite += int(np.isinf(values).sum())

    def __str__(self) -> str:
        counts = {
            "NaN": self.nan,
            "infinite": self.infinite,
            "scale bytes 255": self.scales,
            "blocks beyond float32's range": self.overflowing,
        }
        expert, row, column = self.first or (0, 0, 0)
        what = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return f"{what}; the first at expert {expert}, row {row}, column {column}"


@dataclass
class Values:
    """What reading the values told. scales: how many MXFP4 blocks have each scale byte; bad: by canonical name."""

    tensors: int = 0
    unread: int = 0
    nbytes: int = 0
    scales: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    bad: dict[str, Tally] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        used = np.flatnonzero(self.scales)
        return {
            "tensors": self.tensors,
            "unread_tensors": self.unread,
            "bytes": self.nbytes,
            "mxfp4": {
                "blocks": int(self.scales.sum()),
                "blocks_with_scale_0": int(self.scales[0]),
                "lowest_scale": int(used[0]),
                "highest_scale": int(used[-1]),
                "blocks_by_scale": {int(scale): int(self.scales[scale]) for scale in used},
            }
            if used.size
            else None,
        }


def readable(source: Source) -> dict[str, View]:
    """The views of the right shape; a transposed one as it is stored, for reading it in order costs nothing."""
    views: dict[str, View] = {}
    for name, shape in canonical_shapes(source.config).items():
        view = source.views.get(name)
        if view is not None and view.stack == as_stack(shape):
            view = view.base if isinstance(view, Transposed) else view
            if view.stack[2] <= MAX_COLUMNS:
                views[name] = view
    return views


def value_bytes(source: Source) -> int:
    """How many bytes `read_values` will read."""
    return sum(_nbytes(view, view.stack[0] * view.stack[1]) for view in readable(source).values())


def read_values(source: Source, threads: int, progress: Callable[[int], None]) -> Values:
    """Look at every value of every tensor of the right shape."""
    views = readable(source)
    result = Values(tensors=len(views), unread=len(canonical_shapes(source.config)) - len(views))
    lock = threading.Lock()

    def look(step: tuple[str, View, int, int, int]) -> None:
        """Count what one run of rows holds."""
        name, view, expert, start, stop = step
        chunk = view.read(expert, start, stop)
        bad, nbytes = chunk.first_bad(), _nbytes(view, stop - start)
        scales = np.bincount(chunk.scales.reshape(-1), minlength=256) if isinstance(chunk, Mxfp4) else None
        with lock:
            result.nbytes += nbytes
            if scales is not None:
                result.scales += scales
            if bad is not None:
                row, column = start + bad[0], bad[1]
                swapped = isinstance(source.views[name], Transposed)
                at = (expert, column, row) if swapped else (expert, row, column)
                result.bad.setdefault(name, Tally()).add(chunk, at)
        progress(nbytes)

    workers = Workers()
    workers.each(_steps(views), look, threads)
    workers.join()
    source.check_unchanged()
    return result


def _steps(views: Mapping[str, View]) -> Iterator[tuple[str, View, int, int, int]]:
    for name, view in views.items():
        experts, rows, columns = view.stack
        height = max(STEP_VALUES // columns, 2) // 2 * 2  # even: gate and up rows come in pairs
        for expert in range(experts):
            for start in range(0, rows, height):
                yield name, view, expert, start, min(start + height, rows)


def _nbytes(view: View, rows: int) -> int:
    return rows * CODECS[view.encoding].row_bytes(view.stack[2])
