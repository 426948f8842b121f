"""What the proof asks of a file in other widths than its model's, beyond comparing the model's own values.

A widened file computes the same function because of zeros (widen.py). Those that reach the residual stream or an activation
must be there: the embedding's padding columns, the gains' padding, the padding rows of attention's output, of down, of gate and
up, and the biases of all these. Columns that only ever meet such zeros may hold anything finite: there an encoder is free.

A cut file is compared with the source whose dropped neurons are zeroed, by the bounds of its codecs; what the dropped neurons
held is told apart from that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gptoss_convert.convert.cut import Kept, cut, pairs
from gptoss_convert.convert.names import DOWN, EMBEDDING, GATE_UP, HEAD, split_name
from gptoss_convert.convert.plan import LEAF_ROWS
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.widen import GAIN_ROUNDING, Gain, Widening, is_gain, widen
from gptoss_convert.convert.workers import Workers
from gptoss_convert.errors import ProofFailed
from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.chunks import Chunk, Mxfp4, Rows
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.floats import F32

REMEDY = "this is a fault of the conversion; nothing was written. Please report it"
_LEAST = 2.0**-149  # the least float32


def as_made(source: Source, artifact: Source) -> Source:
    """The source as the steps that made the artifact read it: cut and widened to its widths."""
    if artifact.wide is None:
        return source
    made = source if artifact.kept is None else cut(source, artifact.kept)
    return widen(made, Widening(artifact.wide.hidden, artifact.wide.intermediate))


def kept_only(kept: Mapping[int, Kept], name: str, expert: int, start: int, values: F32) -> F32:
    """Rows from `start` on of an expert's matrix of the source, with zeros in the place of what a cut file has dropped."""
    layer, inner = split_name(name)
    if layer is None or inner not in (GATE_UP, DOWN, GATE_UP + "_bias"):
        return values
    neurons, result = kept[layer], np.zeros_like(values)
    if inner == GATE_UP:
        rows = pairs(neurons[expert]) - start
        rows = rows[(rows >= 0) & (rows < len(values))]
        result[rows] = values[rows]
    elif inner == DOWN:
        result[:, neurons[expert]] = values[:, neurons[expert]]
    else:
        columns = pairs(neurons[start : start + len(values)])
        np.put_along_axis(result, columns, np.take_along_axis(values, columns, axis=1), axis=1)
    return result


def require_gains(source: Source, artifact: Source) -> None:
    """Every gain that could only be rounded to float32 is the source's but for that."""
    for name, view in artifact.views.items():
        if not (isinstance(view, Gain) and view.encoding == "f32"):
            continue
        want, found = (s.views[name].read(0, 0, 1).values()[0].astype(np.float64) for s in (source, artifact))
        off = np.abs(found - want) - (GAIN_ROUNDING * (1 + GAIN_ROUNDING) * np.abs(want) + _LEAST)
        worst = int(np.argmax(off))
        if not off[worst] <= 0:
            raise ProofFailed(
                "a norm's gain is not the source's", file=artifact.path, tensor=_stored_name(artifact, name, worst),
                found=f"{found[worst]!r} at {worst}", expected=f"{want[worst]!r}, but for float32's rounding", remedy=REMEDY,
            )  # fmt: skip


# --- padding -----------------------------------------------------------------------------------------------------------


_MEETING_ZEROS = (*(f"self_attn.{part}_proj.weight" for part in "qkv"), "mlp.router.weight", HEAD)


@dataclass(frozen=True)
class _Region:
    """Of each expert's matrix the rows and columns from these on; zero, or else only finite."""

    row: int = 0
    column: int = 0
    zero: bool = True


def _padding(name: str, hidden: int, intermediate: int) -> _Region | None:
    """What must hold of a tensor's padding beyond the model's own widths.

    The columns of gate, up and down meet the witnesses' probes, which anything infinite there would spoil.
    """
    inner = split_name(name)[1]
    if inner in (EMBEDDING, "self_attn.o_proj.bias", DOWN + "_bias") or is_gain(name):
        return _Region(column=hidden)
    if inner in ("self_attn.o_proj.weight", DOWN):
        return _Region(row=hidden)
    if inner in (GATE_UP, GATE_UP + "_bias"):
        return _Region(row=2 * intermediate) if inner == GATE_UP else _Region(column=2 * intermediate)
    return _Region(column=hidden, zero=False) if inner in _MEETING_ZEROS else None


def require_padding(artifact: Source, threads: int) -> None:
    """ProofFailed, with the tensor, where a widened file's padding is not what it must be."""
    if artifact.wide is None:
        return
    true, wide = artifact.config, artifact.wide
    workers = Workers()
    jobs = _jobs(artifact, true.hidden, min(true.intermediate, wide.intermediate))
    workers.each(jobs, lambda job: _check(artifact, *job), threads)
    workers.join()


def _jobs(artifact: Source, hidden: int, intermediate: int) -> Iterator[tuple[str, _Region, int, int, int]]:
    for name, view in artifact.wide_views.items():
        region = _padding(name, hidden, intermediate)
        experts, rows, columns = view.stack
        if region is None or region.row >= rows or region.column >= columns:
            continue
        for expert in range(experts):
            for start in range(region.row, rows, LEAF_ROWS):
                yield name, region, expert, start, min(start + LEAF_ROWS, rows)


def _check(artifact: Source, name: str, region: _Region, expert: int, start: int, stop: int) -> None:
    values = _columns_from(artifact.wide_views[name].read(expert, start, stop), region.column)
    bad = values != 0 if region.zero else ~np.isfinite(values)
    if not bad.any():
        return
    row, column = (int(i) for i in np.argwhere(bad)[0])
    at = (start + row, region.column + column)
    what = "is not zero, so that the file computes something else" if region.zero else "is not a finite number"
    raise ProofFailed(
        f"what widening has added {what}", file=artifact.path,
        tensor=_stored_name(artifact, name, at[1] if name.endswith("_bias") else at[0]),
        found=f"{values[row, column]:g} at expert {expert}, row {at[0]}, column {at[1]} of the widened tensor",
        expected="zeros" if region.zero else "anything finite", remedy=REMEDY,
    )  # fmt: skip


def _columns_from(chunk: Chunk, first: int) -> F32:
    """The values of a chunk's columns from `first` on; only their blocks are decoded."""
    if isinstance(chunk, Mxfp4):
        skipped = first // mxfp4.BLOCK
        part: Chunk = Mxfp4(*(np.ascontiguousarray(half[:, skipped:]) for half in (chunk.blocks, chunk.scales)))
        return part.values()[:, first - skipped * mxfp4.BLOCK :]
    codec = CODECS[chunk.encoding]
    skipped = first // codec.block
    part = Rows(chunk.encoding, np.ascontiguousarray(chunk.data[:, skipped * codec.block_bytes :]))
    return part.values()[:, first - skipped * codec.block :]


def _stored_name(artifact: Source, name: str, index: int) -> str:
    """What a canonical tensor is called in the file: of gate and up, which alternate, the one that `index` belongs to."""
    names = artifact.names[name]
    return names[index % len(names)]
