"""An artifact's tensors beside its source's: relative RMS, and the block that differs most, rows at a time on a few threads."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.convert.names import DOWN, EMBEDDING, GATE_UP, HEAD, as_stack, canonical_shapes, split_name
from gptoss_convert.convert.plan import rows_per_step
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.workers import Workers
from gptoss_convert.kernels.experts import differences
from gptoss_convert.kernels.floats import F32

BLOCK = 32  # columns of the blocks among which the worst is looked for
FAINT = 1e-30  # squares of differences below this have lost digits in float32


@dataclass
class _Sums:
    """Of one tensor: squares of the source's values and of the differences, the block that differs most, what is not finite."""

    square: float = 0.0
    error: float = 0.0
    different: int = 0
    worst: tuple[float, int, int, int] = (0.0, 0, 0, 0)  # squares of the difference, expert, row, first column
    bad: tuple[int, int] = (0, 0)  # values of the source and of the artifact that are not finite
    first: tuple[int, int, int] | None = None  # expert, row, column of the first of them


def compare_tensors(source: Source, artifact: Source, threads: int, show: ShowProgress) -> list[dict[str, Any]]:
    """Every canonical tensor, in the order of the forward pass."""
    shapes = canonical_shapes(source.config)
    sums = {name: defaultdict[tuple[int, int], _Sums](_Sums) for name in shapes}
    jobs = []
    for name, shape in shapes.items():
        experts, rows, columns = as_stack(shape)
        height = min(rows_per_step(columns), 1024)
        jobs += [(name, e, at, min(at + height, rows)) for e in range(experts) for at in range(0, rows, height)]
    total = sum((stop - start) * as_stack(shapes[name])[2] * 4 for name, _, start, stop in jobs)
    with show("compare tensors", total) as advance:

        def work(job: tuple[str, int, int, int]) -> None:
            name, expert, start, stop = job
            a, b = (side.views[name].read(expert, start, stop).values() for side in (source, artifact))
            sums[name][expert, start] = _of_rows(a, b, expert, start)
            advance(a.nbytes)

        workers = Workers()
        workers.each(jobs, work, threads)
        workers.join()
    return [_tensor(source, artifact, name, shape, list(sums[name].values())) for name, shape in shapes.items()]


def _of_rows(a: F32, b: F32, expert: int, start: int) -> _Sums:
    count, error, square, _ = differences(a, b)
    found = _Sums(square, error, count)
    if not (math.isfinite(square) and math.isfinite(error)):  # else every value of both is finite
        odd = [~np.isfinite(side) for side in (a, b)]
        row, column = divmod(int((odd[0] | odd[1]).argmax()), a.shape[1])
        found.bad = int(odd[0].sum()), int(odd[1].sum())
        found.first = (expert, start + row, column)
    elif count:
        blocks = _blocks(a, b)
        if not FAINT < blocks.max() < math.inf:  # squares beyond float32's range
            blocks = _blocks(a.astype(np.float64), b.astype(np.float64))
        row, block = divmod(int(blocks.argmax()), blocks.shape[1])
        found.worst = (float(blocks[row, block]), expert, start + row, block * BLOCK)
    return found


def _blocks(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Squares of the differences, summed over blocks of columns; the last may be narrower."""
    with np.errstate(over="ignore", under="ignore"):
        lost: NDArray[Any] = np.square(a - b)
        width = lost.shape[1] - lost.shape[1] % BLOCK
        blocks: NDArray[Any] = lost[:, :width].reshape(len(lost), -1, BLOCK).sum(axis=2)
        if width < lost.shape[1]:
            blocks = np.concatenate([blocks, lost[:, width:].sum(axis=1, keepdims=True)], axis=1)
    return blocks


def _tensor(
    source: Source, artifact: Source, name: str, shape: tuple[int, ...], sums: Sequence[_Sums]
) -> dict[str, Any]:
    layer, inner = split_name(name)
    odd = _not_finite(sums)
    return {
        "name": name,
        "layer": layer,
        "part": part_of(inner),
        "shape": list(shape),
        "source_encoding": source.views[name].encoding,
        "artifact_encoding": artifact.views[name].encoding,
        "bytes": stored_bytes(artifact, name),
        "relative_rms": relative(math.fsum(s.error for s in sums), math.fsum(s.square for s in sums), odd is not None),
        "equal": not any(s.different for s in sums),
        "not_finite": odd,
        "worst": _worst(sums, shape) if odd is None else None,
    }


def relative(error: float, square: float, spoilt: bool = False) -> float:
    """√(error / square) of two sums of squares; infinite where something is lost of nothing, NaN where `spoilt`."""
    if spoilt:
        return math.nan
    if not square:
        return math.inf if error else 0.0
    return math.sqrt(error / square)


def _not_finite(sums: Sequence[_Sums]) -> dict[str, int] | None:
    """How many values of each side are not finite, and where the first of them is; None where all are."""
    places = [s.first for s in sums if s.first is not None]
    if not places:
        return None
    expert, row, column = min(places)
    mine, theirs = (sum(s.bad[side] for s in sums) for side in (0, 1))
    return {"source": mine, "artifact": theirs, "expert": expert, "row": row, "column": column}


def _worst(sums: Sequence[_Sums], shape: tuple[int, ...]) -> dict[str, Any] | None:
    lost, expert, row, column = max((s.worst for s in sums), key=lambda w: (w[0], -w[1], -w[2], -w[3]))
    if not lost:
        return None
    columns = min(BLOCK, shape[-1] - column)
    mean = math.fsum(s.square for s in sums) / math.prod(shape)
    return {
        "relative_rms": relative(lost / columns, mean), "expert": expert, "row": row, "column": column, "columns": columns,
    }  # fmt: skip


def part_of(inner: str) -> str:
    """The part of a model that a tensor belongs to."""
    if inner.endswith((GATE_UP, DOWN)):
        return "gate_up" if inner.endswith(GATE_UP) else "down"
    if inner in (EMBEDDING, HEAD):
        return "embedding" if inner == EMBEDDING else "head"
    if "router" in inner:
        return "router"
    if "norm" in inner:
        return "norm"
    if "sinks" in inner:
        return "sinks"
    return "attention" if inner.endswith("proj.weight") else "bias"


def stored_bytes(source: Source, name: str) -> int:
    """Bytes that a tensor takes in the files; of a tensor that shares a stored one with others, its part by shape."""
    sizes = {stored.name: stored.nbytes for stored in source.stored}
    names = source.names.get(name, ())
    return sum(sizes.get(n, 0) for n in names)
