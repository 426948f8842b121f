"""An artifact's tensors beside its source's: relative RMS, and the block that differs most, rows at a time on a few threads."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptoss_convert.convert.names import DOWN, EMBEDDING, GATE_UP, HEAD, as_stack, canonical_shapes, split_name
from gptoss_convert.convert.plan import rows_per_step
from gptoss_convert.convert.progress import ShowProgress
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.workers import Workers
from gptoss_convert.kernels.experts import differences
from gptoss_convert.kernels.floats import F32

BLOCK = 32  # columns of the blocks among which the worst is looked for


@dataclass
class _Sums:
    """Of one tensor: squares of the source's values and of the differences, and the block that differs most."""

    square: float = 0.0
    error: float = 0.0
    different: int = 0
    worst: tuple[float, int, int, int] = (0.0, 0, 0, 0)  # squares of the difference, expert, row, first column


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
    if count:
        lost = np.square(a - b)
        width = lost.shape[1] - lost.shape[1] % BLOCK
        blocks = lost[:, :width].reshape(len(lost), -1, BLOCK).sum(axis=2) if width else lost.sum(axis=1, keepdims=True)
        row, block = divmod(int(blocks.argmax()), blocks.shape[1])
        found.worst = (float(blocks[row, block]), expert, start + row, block * BLOCK)
    return found


def _tensor(
    source: Source, artifact: Source, name: str, shape: tuple[int, ...], sums: Sequence[_Sums]
) -> dict[str, Any]:
    layer, inner = split_name(name)
    square, error = math.fsum(s.square for s in sums), math.fsum(s.error for s in sums)
    values = math.prod(shape)
    columns = min(BLOCK, shape[-1])
    worst = max((s.worst for s in sums), key=lambda w: (w[0], -w[1], -w[2], -w[3]))
    mean = square / values
    return {
        "name": name,
        "layer": layer,
        "part": part_of(inner),
        "shape": list(shape),
        "source_encoding": source.views[name].encoding,
        "artifact_encoding": artifact.views[name].encoding,
        "bytes": stored_bytes(artifact, name),
        "relative_rms": math.sqrt(error / square) if square else float(error > 0),
        "equal": not any(s.different for s in sums),
        "worst": None
        if not worst[0]
        else {
            "relative_rms": math.sqrt(worst[0] / columns / mean) if mean else 1.0,
            "expert": worst[1], "row": worst[2], "column": worst[3], "columns": columns,
        },
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
