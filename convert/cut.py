"""Cutting: each expert's least important neurons are dropped, so that F falls to a multiple of 256 instead of rising.

    kept neurons k of an expert: rows 2k, 2k+1 of gate_up and its bias, columns k of down

That is lossy by design, and said so: the file lists the dropped neurons under a key of ours, the certificate measures what it
costs, and reading gives the original widths with zeros where neurons were dropped. Importance by weights alone is

    ‖down column‖ · √(‖gate row‖² + ‖up row‖²)

which bounds what a neuron can add to the output for an input of unit length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.convert.names import DOWN, GATE_UP, layer_name
from gptoss_convert.convert.plan import (
    ENCODED_BYTES_PER_VALUE,
    LEAF_ROWS,
    WHOLE_BYTES_PER_VALUE,
    threads_within,
)
from gptoss_convert.convert.source import Source
from gptoss_convert.convert.views import Stack, View, read_encoding, reads_whole
from gptoss_convert.convert.workers import Workers
from gptoss_convert.errors import BadInput
from gptoss_convert.kernels.chunks import ROWS_AT_ONCE, Chunk, Rows
from gptoss_convert.kernels.codecs import FLOATS, encode_float
from gptoss_convert.kernels.floats import F32

KEY_DROPPED = "gptoss-convert.cut.dropped"  # u16 [L·E·(F − F')]: the dropped neurons, ascending for each expert

MOST_NEURONS = 1 << 16  # that it can number
Kept = NDArray[np.uint16]  # [E, F'] ascending


def first_ones(source: Source, intermediate: int) -> Mapping[int, Kept]:
    """As many neurons as are kept, any: for a dry run, which needs their number only and reads no weights."""
    row = np.arange(intermediate, dtype=np.uint16)
    return dict.fromkeys(range(source.config.layers), np.broadcast_to(row, (source.config.experts, intermediate)))


def is_cut_to(source: Source, intermediate: int) -> bool:
    """Whether the source is a file of ours that was cut to this width, and loses nothing more by it."""
    return source.kept is not None and source.kept[0].shape[1] == intermediate


def choose(
    source: Source, intermediate: int, threads: int, activations: Mapping[str, F32] | None = None
) -> Mapping[int, Kept]:
    """The neurons to keep, by layer: the `intermediate` most important of each expert, ties to the lower index.

    activations: of each layer's down, the mean squares f32 [E, F] of its inputs, as calibrated. A neuron's importance then is
    √(its mean square · ‖its column of down‖²), what it adds to the output on that text, and not a norm of weights alone.

    A source that was cut to this width keeps what it kept. Otherwise every expert is read, some rows at a time.
    """
    if source.kept is not None and is_cut_to(source, intermediate):
        return source.kept
    experts = source.config.experts
    kept = {layer: np.empty((experts, intermediate), np.uint16) for layer in range(source.config.layers)}

    def decide(job: tuple[int, int]) -> None:
        layer, expert = job
        known = None if activations is None else activations.get(layer_name(layer, DOWN))
        scores = _importance(source, layer, expert, None if known is None else known[expert])
        if np.isnan(scores).any():  # would be dropped, and never be seen
            raise BadInput(
                "a value is not a finite number", file=source.path, tensor=layer_name(layer, "mlp.experts"),
                found=f"in expert {expert}, neuron {int(np.isnan(scores).argmax())}",
                remedy="the file is corrupt; run verify and fetch it again",
            )  # fmt: skip
        order = np.argsort(-scores, kind="stable")[:intermediate]
        kept[layer][expert] = np.sort(order)

    workers = Workers()
    largest = max(map(_bytes_at_once, (source.views[layer_name(n, name)] for n in kept for name in (GATE_UP, DOWN))))
    workers.each([(n, e) for n in kept for e in range(experts)], decide, threads_within(largest, threads))
    workers.join()
    return kept


def _importance(source: Source, layer: int, expert: int, activation: F32 | None) -> NDArray[np.float32]:
    """f32 [F]; rounded to float32, so that the last bit of a sum decides nothing."""
    gate_up, down = (source.views[layer_name(layer, name)] for name in (GATE_UP, DOWN))
    into = np.zeros(gate_up.stack[1])
    for start, values in _by_rows(gate_up, expert):
        into[start : start + len(values)] = np.einsum("rc,rc->r", values, values, dtype=np.float64)
    size = into[0::2] + into[1::2] if activation is None else activation + 0 * into[0::2]  # a NaN is seen either way
    out = np.zeros(down.stack[2])
    for _, values in _by_rows(down, expert):
        out += np.einsum("rc,rc->c", values, values, dtype=np.float64)
    scores: NDArray[np.float32] = np.sqrt(out * size).astype(np.float32)
    return scores


def _rows_at_once(view: View) -> int:
    return view.stack[1] if reads_whole(view) else LEAF_ROWS


def _bytes_at_once(view: View) -> int:
    each = WHOLE_BYTES_PER_VALUE if reads_whole(view) else ENCODED_BYTES_PER_VALUE
    return _rows_at_once(view) * view.stack[2] * each


def _by_rows(view: View, expert: int) -> Iterator[tuple[int, F32]]:
    """(first row, values f32 [r, C]) for all rows of an expert's matrix, few of them decoded at a time."""
    rows, height = view.stack[1], _rows_at_once(view)
    for start in range(0, rows, height):
        chunk = view.read(expert, start, min(start + height, rows))
        for first in range(0, chunk.shape[0], ROWS_AT_ONCE):
            yield start + first, chunk.select(slice(first, first + ROWS_AT_ONCE)).values()


def cut(source: Source, kept: Mapping[int, Kept]) -> Source:
    """The source with only these neurons."""
    width = next(iter(kept.values())).shape[1]
    views: dict[str, View] = dict(source.views)
    for layer, neurons in kept.items():
        for name in (GATE_UP, DOWN):
            full = layer_name(layer, name)
            views[full] = _cut(views[full], neurons, CutRows if name == GATE_UP else CutColumns)
        bias = layer_name(layer, GATE_UP + "_bias")
        views[bias] = _cut(views[bias], neurons, CutBias)
    return replace(source, config=replace(source.config, intermediate=width), views=views)


def _cut(view: View, neurons: Kept, make: Callable[[View, Kept], View]) -> View:
    """What was cut so already is as it was."""
    return view.base if isinstance(view, Restored) and np.array_equal(view.kept, neurons) else make(view, neurons)


def pairs(neurons: Kept) -> NDArray[np.intp]:
    """Neurons → the rows of gate_up that are theirs."""
    first = 2 * neurons.astype(np.intp)
    return np.stack([first, first + 1], axis=-1).reshape(*neurons.shape[:-1], -1)


@dataclass(frozen=True)
class CutRows:
    """gate_up with the kept neurons' rows."""

    base: View
    kept: Kept

    @property
    def encoding(self) -> str:
        """As the base is read."""
        return read_encoding(self.base)

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        return self.base.stack[0], 2 * self.kept.shape[1], self.base.stack[2]

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        rows = pairs(self.kept[expert])[start:stop]
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
        taken = np.take_along_axis(values, pairs(self.kept[start:stop]), axis=1)
        return Rows(self.encoding, encode_float(np.ascontiguousarray(taken), self.encoding))


# --- back --------------------------------------------------------------------------------------------------------------


def dropped_list(kept: Mapping[int, Kept], intermediate: int) -> list[int]:
    """What KEY_DROPPED holds."""
    dropped: list[int] = []
    for layer in sorted(kept):
        gone = np.ones((len(kept[layer]), intermediate), np.bool_)
        np.put_along_axis(gone, kept[layer].astype(np.intp), False, axis=1)
        dropped += np.nonzero(gone)[1].tolist()
    return dropped


def kept_from(dropped: Sequence[int], layers: int, experts: int, intermediate: int) -> dict[int, Kept] | None:
    """The inverse; None for a list that cannot be one."""
    count, rest = divmod(len(dropped), layers * experts)
    if rest or not 0 < count < intermediate <= MOST_NEURONS or min(dropped) < 0 or max(dropped) >= intermediate:
        return None
    table = np.array(dropped, np.uint16).reshape(layers, experts, count)
    everything = np.arange(intermediate, dtype=np.uint16)
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

    as_values = True  # read as float32, whatever the file holds

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
            rows = pairs(self.kept[expert])
            first, last = (int(i) for i in np.searchsorted(rows, (start, stop)))
            if last > first:
                values[rows[first:last] - start] = self.base.read(expert, first, last).values()
        elif self.axis == "columns":
            values[:, self.kept[expert]] = self.base.read(expert, start, stop).values()
        else:
            found = self.base.read(expert, start, stop).values()
            np.put_along_axis(values, pairs(self.kept[start:stop]), found, axis=1)
        return Rows("f32", encode_float(values, "f32"))


def describe(true: int, width: int) -> str:
    """The loss in words."""
    return f"{true - width} of each expert's {true} neurons are dropped, the least important ones"
