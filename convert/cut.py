"""Cutting: each expert's least important neurons are dropped, so that F falls to a multiple of 256 instead of rising.

    kept neurons k of an expert: rows 2k, 2k+1 of gate_up and its bias, columns k of down

That is lossy by design, and said so: the file lists the dropped neurons under a key of ours, the certificate measures what it
costs, and reading gives the original widths with zeros where neurons were dropped. Importance by weights alone is

    ‖down column‖ · √(‖gate row‖² + ‖up row‖²)

which bounds what a neuron can add to the output for an input of unit length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.convert.names import DOWN, GATE_UP, layer_name
from gptoss_convert.convert.run import Workers
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.views import Stack, View
from gptoss_convert.kernels.chunks import Chunk, Rows
from gptoss_convert.kernels.codecs import FLOATS, encode_float

KEY_DROPPED = "gptoss-convert.cut.dropped"  # u16 [L·E·(F − F')]: the dropped neurons, ascending for each expert

Kept = NDArray[np.intp]  # [E, F'] ascending


def choose(source: Source, intermediate: int, threads: int) -> dict[int, Kept]:
    """The neurons to keep, by layer: the `intermediate` most important of each expert, ties to the lower index."""
    experts = source.config.experts
    kept = {layer: np.empty((experts, intermediate), np.intp) for layer in range(source.config.layers)}

    def decide(job: tuple[int, int]) -> None:
        layer, expert = job
        scores = _importance(source, layer, expert)
        order = np.argsort(-scores, kind="stable")[:intermediate]
        kept[layer][expert] = np.sort(order)

    workers = Workers()
    workers.each([(n, e) for n in kept for e in range(experts)], decide, threads)
    workers.join()
    return kept


def _importance(source: Source, layer: int, expert: int) -> NDArray[np.float32]:
    """f32 [F]; rounded to float32, so that the last bit of a sum decides nothing."""
    gate_up, down = (source.views[layer_name(layer, name)] for name in (GATE_UP, DOWN))
    rows = gate_up.read(expert, 0, gate_up.stack[1]).values().astype(np.float64)
    columns = down.read(expert, 0, down.stack[1]).values().astype(np.float64)
    into = (rows * rows).sum(axis=1)
    out = (columns * columns).sum(axis=0)
    scores: NDArray[np.float32] = np.sqrt(out * (into[0::2] + into[1::2])).astype(np.float32)
    return scores


def cut(source: Source, kept: Mapping[int, Kept]) -> Source:
    """The source with only these neurons."""
    width = next(iter(kept.values())).shape[1]
    views: dict[str, View] = dict(source.views)
    for layer, neurons in kept.items():
        for name in (GATE_UP, DOWN):
            full = layer_name(layer, name)
            views[full] = CutRows(views[full], neurons) if name == GATE_UP else CutColumns(views[full], neurons)
        bias = layer_name(layer, GATE_UP + "_bias")
        views[bias] = CutBias(views[bias], neurons)
    return replace(source, config=replace(source.config, intermediate=width), views=views)


def _pairs(neurons: NDArray[np.intp]) -> NDArray[np.intp]:
    """Neurons → the rows of gate_up that are theirs."""
    return np.stack([2 * neurons, 2 * neurons + 1], axis=-1).reshape(*neurons.shape[:-1], -1)


@dataclass(frozen=True)
class CutRows:
    """gate_up with the kept neurons' rows."""

    base: View
    kept: Kept

    @property
    def encoding(self) -> str:
        """As the base."""
        return self.base.encoding

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        return self.base.stack[0], 2 * self.kept.shape[1], self.base.stack[2]

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        rows = _pairs(self.kept[expert])[start:stop]
        if not len(rows):
            return self.base.read(expert, 0, 0)
        return self.base.read(expert, int(rows[0]), int(rows[-1]) + 1).select(rows - rows[0])


@dataclass(frozen=True)
class CutColumns:
    """down with the kept neurons' columns, as float32 values: blocks do not survive a gap."""

    base: View
    kept: Kept

    @property
    def encoding(self) -> str:
        """The base's where it has no blocks."""
        return self.base.encoding if self.base.encoding in FLOATS else "f32"

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        return self.base.stack[0], self.base.stack[1], self.kept.shape[1]

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        values = np.ascontiguousarray(self.base.read(expert, start, stop).values()[:, self.kept[expert]])
        return Rows(self.encoding, encode_float(values, self.encoding))


@dataclass(frozen=True)
class CutBias:
    """gate_up's bias [E, 2F] with the kept neurons' entries."""

    base: View
    kept: Kept

    @property
    def encoding(self) -> str:
        """The base's where it has no blocks."""
        return self.base.encoding if self.base.encoding in FLOATS else "f32"

    @property
    def stack(self) -> Stack:
        """(1, E, 2F')."""
        return 1, self.base.stack[1], 2 * self.kept.shape[1]

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        values = self.base.read(expert, start, stop).values()
        taken = np.take_along_axis(values, _pairs(self.kept[start:stop]), axis=1)
        return Rows(self.encoding, encode_float(np.ascontiguousarray(taken), self.encoding))


# --- back --------------------------------------------------------------------------------------------------------------


def dropped_list(kept: Mapping[int, Kept], intermediate: int) -> list[int]:
    """What KEY_DROPPED holds."""
    everything = np.arange(intermediate)
    return [int(i) for n in sorted(kept) for row in kept[n] for i in np.setdiff1d(everything, row)]


def kept_from(dropped: Sequence[int], layers: int, experts: int, intermediate: int) -> dict[int, Kept] | None:
    """The inverse; None for a list that cannot be one."""
    count, rest = divmod(len(dropped), layers * experts)
    if rest or not 0 < count < intermediate or min(dropped) < 0 or max(dropped) >= intermediate:
        return None
    table = np.array(dropped, np.intp).reshape(layers, experts, count)
    everything = np.arange(intermediate)
    kept = {n: [np.setdiff1d(everything, row) for row in table[n]] for n in range(layers)}
    if any(len(row) != intermediate - count for rows in kept.values() for row in rows):
        return None
    return {n: np.stack(rows) for n, rows in kept.items()}


def restore(source: Source, kept: Mapping[int, Kept], intermediate: int) -> Source:
    """The cut model in its original width: zeros where neurons were dropped."""
    views: dict[str, View] = dict(source.views)
    for layer, neurons in kept.items():
        for name, axis in ((GATE_UP, "rows"), (DOWN, "columns"), (GATE_UP + "_bias", "bias")):
            full = layer_name(layer, name)
            views[full] = Restored(views[full], neurons, intermediate, axis)
    return replace(source, config=replace(source.config, intermediate=intermediate), views=views)


@dataclass(frozen=True)
class Restored:
    """A cut tensor with zeros in the place of what was dropped; `axis`: rows, columns or bias."""

    base: View
    kept: Kept
    intermediate: int
    axis: str

    @property
    def encoding(self) -> str:
        """As the base: what the file holds."""
        return self.base.encoding

    @property
    def stack(self) -> Stack:
        """(E, R, C) of the original."""
        experts, rows, columns = self.base.stack
        if self.axis == "rows":
            return experts, 2 * self.intermediate, columns
        return experts, rows, self.intermediate if self.axis == "columns" else 2 * self.intermediate

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        values = np.zeros((stop - start, self.stack[2]), np.float32)
        if self.axis == "rows":
            rows = _pairs(self.kept[expert])
            first, last = (int(i) for i in np.searchsorted(rows, (start, stop)))
            if last > first:
                values[rows[first:last] - start] = self.base.read(expert, first, last).values()
        elif self.axis == "columns":
            values[:, self.kept[expert]] = self.base.read(expert, start, stop).values()
        else:
            found = self.base.read(expert, start, stop).values()
            np.put_along_axis(values, _pairs(self.kept[start:stop]), found, axis=1)
        return Rows("f32", encode_float(values, "f32"))


def describe(true: int, width: int) -> str:
    """The loss in words."""
    return f"{true - width} of each expert's {true} neurons are dropped, the least important by weight norm"
