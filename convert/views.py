"""Views: a canonical tensor as it lies in somebody's files, readable by expert and rows.

Each view answers `read(expert, start, stop)` with rows start … stop of one expert's matrix [R, C] (a plain matrix is
expert 0; a vector is one row), in canonical order and in the encoding they are stored in. A view holds no data. What a
layout does to a tensor (interleave, transpose, rotate, fold a factor in) is undone here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gptoss_convert.formats.files import SourceFile
from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.chunks import Chunk, Mxfp4, Rows, interleave
from gptoss_convert.kernels.codecs import CODECS, FLOATS, encode_float
from gptoss_convert.kernels.floats import U8, transpose

Stack = tuple[int, int, int]


class View(Protocol):
    """A tensor in place. `stack`: (E, R, C); `encoding`: a codec's name."""

    @property
    def stack(self) -> Stack: ...
    @property
    def encoding(self) -> str: ...
    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """Rows start … stop of one expert's matrix."""
        ...


@dataclass(frozen=True)
class Stored:
    """Rows that lie one after the other in a file, in a row codec; ggml's MXFP4 comes out in release order."""

    file: SourceFile
    offset: int
    encoding: str
    stack: Stack

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        _, rows, columns = self.stack
        size = CODECS[self.encoding].row_bytes(columns)
        data = _bytes(self.file, self.offset + (expert * rows + start) * size, stop - start, size)
        return Mxfp4(*mxfp4.from_ggml(data)) if self.encoding == "mxfp4" else Rows(self.encoding, data)


@dataclass(frozen=True)
class Packed:
    """MXFP4 in release order: blocks [E, R, G, 16] and scales [E, R, G] apart; strides in bytes from expert to expert.

    `bias` is what the layout adds to every scale byte (metal: 14).
    """

    blocks_file: SourceFile
    blocks_offset: int
    scales_file: SourceFile
    scales_offset: int
    stack: Stack
    blocks_stride: int
    scales_stride: int
    bias: int = 0

    encoding = "mxfp4"

    def read(self, expert: int, start: int, stop: int) -> Mxfp4:
        """See View."""
        groups = self.stack[2] // mxfp4.BLOCK
        count, size = stop - start, groups * mxfp4.CODE_BYTES
        blocks_at = self.blocks_offset + expert * self.blocks_stride + start * size
        scales_at = self.scales_offset + expert * self.scales_stride + start * groups
        blocks = _bytes(self.blocks_file, blocks_at, count, size).reshape(count, groups, mxfp4.CODE_BYTES)
        scales = _bytes(self.scales_file, scales_at, count, groups)
        return Mxfp4(blocks, scales - np.uint8(self.bias) if self.bias else scales)


@dataclass(frozen=True)
class RowRange:
    """Part of a taller matrix's rows: q, k or v out of qkv, or a vector out of a longer one (`columns=True`).

    `total`: how many rows (or columns) the base must have.
    """

    base: View
    first: int
    count: int
    total: int
    columns: bool = False

    @property
    def encoding(self) -> str:
        """As the base; float32 where columns are cut out of blocks."""
        return _divisible(self.base.encoding) if self.columns else self.base.encoding

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        experts, rows, columns = self.base.stack
        return (experts, rows, self.count) if self.columns else (experts, self.count, columns)

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        if not self.columns:
            return self.base.read(expert, self.first + start, self.first + stop)
        values = self.base.read(expert, start, stop).values()[:, self.first : self.first + self.count]
        return Rows(self.encoding, encode_float(np.ascontiguousarray(values), self.encoding))


@dataclass(frozen=True)
class Transposed:
    """Floats stored as [E, in, out]; read as [out, in]. A read takes one expert whole: C·R values."""

    base: Stored  # of stack (E, C, R)

    @property
    def encoding(self) -> str:
        """As the base."""
        return self.base.encoding

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        experts, columns, rows = self.base.stack
        return experts, rows, columns

    def read(self, expert: int, start: int, stop: int) -> Rows:
        """See View."""
        _, rows, columns = self.stack
        stored = self.base.read(expert, 0, columns)
        assert isinstance(stored, Rows)
        width = CODECS[self.encoding].row_bytes(1)
        words = stored.data.view(f"<u{width}").reshape(columns, rows)
        return Rows(self.encoding, transpose(words[:, start:stop]).view(np.uint8))


@dataclass(frozen=True)
class PerExpert:
    """One stored matrix for each expert."""

    experts: Sequence[View]

    @property
    def encoding(self) -> str:
        """As the experts; float32 where they differ."""
        return _common([view.encoding for view in self.experts])

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        return (len(self.experts), *self.experts[0].stack[1:])

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        chunk = self.experts[expert].read(0, start, stop)
        return chunk if chunk.encoding == self.encoding else Rows("f32", encode_float(chunk.values(), "f32"))


@dataclass(frozen=True)
class RowPerExpert:
    """One stored vector for each expert; read as the rows of a matrix [E, C]: per-expert biases."""

    experts: Sequence[View]

    @property
    def encoding(self) -> str:
        """As the experts; float32 where they differ."""
        return _common([view.encoding for view in self.experts])

    @property
    def stack(self) -> Stack:
        """(1, E, C)."""
        return 1, len(self.experts), self.experts[0].stack[2]

    def read(self, expert: int, start: int, stop: int) -> Rows:
        """See View."""
        values = np.concatenate([view.read(0, 0, 1).values() for view in self.experts[start:stop]])
        return Rows(self.encoding, encode_float(values, self.encoding))


@dataclass(frozen=True)
class Alternating:
    """Gate rows and up rows stored apart; read alternating. For biases (`columns=True`) the columns alternate."""

    gate: View
    up: View
    columns: bool = False

    @property
    def encoding(self) -> str:
        """As both; float32 where they differ, or where the columns of blocks alternate."""
        same = self.gate.encoding if self.gate.encoding == self.up.encoding else "f32"
        return _divisible(same) if self.columns else same

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        experts, rows, columns = self.gate.stack
        return (experts, rows, 2 * columns) if self.columns else (experts, 2 * rows, columns)

    def read(self, expert: int, start: int, stop: int) -> Chunk:
        """See View."""
        if self.columns:
            gate, up = self.gate.read(expert, start, stop).values(), self.up.read(expert, start, stop).values()
            woven = np.stack([gate, up], axis=-1).reshape(stop - start, -1)
            return Rows(self.encoding, encode_float(woven, self.encoding))
        first, last = start // 2, (stop + 1) // 2
        both = interleave(self.gate.read(expert, first, last), self.up.read(expert, first, last))
        return both.select(slice(start - 2 * first, stop - 2 * first))


@dataclass(frozen=True)
class Halves:
    """The upper half of the rows stored in one tensor and the lower half in another (columns: of a bias)."""

    first: View
    second: View
    columns: bool = False

    @property
    def encoding(self) -> str:
        """As both."""
        return self.first.encoding

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        experts, rows, columns = self.first.stack
        return (experts, rows, 2 * columns) if self.columns else (experts, 2 * rows, columns)

    def read(self, expert: int, start: int, stop: int) -> Rows:
        """See View."""
        if self.columns:
            return Rows(self.encoding, np.concatenate([_rows(v, expert, start, stop) for v in self._both], axis=1))
        half = self.first.stack[1]
        upper = _rows(self.first, expert, min(start, half), min(stop, half))
        lower = _rows(self.second, expert, max(start - half, 0), max(stop - half, 0))
        return Rows(self.encoding, np.concatenate([upper, lower]))

    @property
    def _both(self) -> tuple[View, View]:
        return self.first, self.second


@dataclass(frozen=True)
class Rotated:
    """Metal's q and k: within each head row 2i+j holds row (hd/2)·j + i, and a power of two is folded in.

    `factor` takes the power out again: exact in bfloat16, but for results below its normal range. As a vector
    (`columns=True`) the same holds of a bias's entries.
    """

    base: View
    head_dim: int
    factor: float
    columns: bool = False

    @property
    def encoding(self) -> str:
        """As the base."""
        return self.base.encoding

    @property
    def stack(self) -> Stack:
        """(E, R, C)."""
        return self.base.stack

    def read(self, expert: int, start: int, stop: int) -> Rows:
        """See View."""
        _, rows, columns = self.stack
        heads = (columns if self.columns else rows) // self.head_dim
        there = np.arange(heads * self.head_dim).reshape(heads, self.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
        if self.columns:
            values = self.base.read(expert, start, stop).values()[:, there]
        else:
            whole = self.base.read(expert, 0, rows)
            values = whole.select(there[start:stop]).values()
        return Rows(self.encoding, encode_float(values * np.float32(self.factor), self.encoding))


def read_encoding(view: View) -> str:
    """The encoding of what a view's reads give: `encoding`, but for views that decode what their file holds."""
    return "f32" if getattr(view, "as_values", False) else view.encoding


def held_encodings(view: View) -> frozenset[str]:
    """The encodings that the values of a view are stored in; several where gate and up differ."""
    if isinstance(view, Alternating):
        return held_encodings(view.gate) | held_encodings(view.up)
    base = getattr(view, "base", None)
    return held_encodings(base) if base is not None and base.encoding == view.encoding else frozenset({view.encoding})


def reads_whole(view: View) -> bool:
    """Whether every read of the view costs a whole matrix, however few rows are asked for."""
    base = getattr(view, "base", None)
    return isinstance(view, Transposed) or (base is not None and not isinstance(view, Stored) and reads_whole(base))


def misfit(view: View) -> str | None:
    """What does not fit together in a view made of several tensors: found sizes, in words; None if all is well."""
    stacks: list[Stack] = []
    if isinstance(view, PerExpert | RowPerExpert):
        stacks = [part.stack for part in view.experts]
    elif isinstance(view, Alternating):
        stacks = [view.gate.stack, view.up.stack]
        return misfit(view.gate) or misfit(view.up) or _unequal(stacks)
    elif isinstance(view, Halves):
        stacks = [view.first.stack, view.second.stack]
        return misfit(view.first) or misfit(view.second) or _unequal(stacks)
    elif isinstance(view, RowRange):
        _, rows, columns = view.base.stack
        unit, size = ("columns", columns) if view.columns else ("rows", rows)
        return f"[{rows}, {columns}] in the fused tensor, not of {view.total} {unit}" if size != view.total else None
    return _unequal(stacks)


def _unequal(stacks: Sequence[Stack]) -> str | None:
    odd = next((stack for stack in stacks if stack != stacks[0]), None)
    return f"{list(stacks[0])} beside {list(odd)}" if odd is not None else None


def _common(encodings: Sequence[str]) -> str:
    """The one encoding of several views, or float32, which holds the values of all."""
    return encodings[0] if len(set(encodings)) == 1 else "f32"


def _divisible(encoding: str) -> str:
    return encoding if encoding in FLOATS else "f32"


def _bytes(file: SourceFile, offset: int, rows: int, row_bytes: int) -> U8:
    return file.read_array(offset, rows * row_bytes).reshape(rows, row_bytes)


def _rows(view: View, expert: int, start: int, stop: int) -> U8:
    chunk = view.read(expert, start, stop)
    assert isinstance(chunk, Rows)
    return chunk.data
