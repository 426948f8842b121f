"""Chunks: some rows of one matrix, in the encoding they are stored in. What flows from a reader to a writer.

A chunk is decoded only where a target needs values; MXFP4 goes from release to ggml order, and back, as bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.kernels import mxfp4
from gptoss_convert.kernels.codecs import CODECS, FLOATS
from gptoss_convert.kernels.floats import F32, U8, first_nonfinite

ROWS_AT_ONCE = 64  # decoded at a time where values are needed: 64 rows of 2880 f32 fit a core's cache


@dataclass(frozen=True)
class Mxfp4:
    """Rows in the release's order: blocks uint8 [R, G, 16], scales uint8 [R, G]; C = 32·G columns."""

    blocks: U8
    scales: U8

    encoding = "mxfp4"

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return self.scales.shape[0], self.scales.shape[1] * mxfp4.BLOCK

    def select(self, rows: slice | NDArray[np.intp]) -> Mxfp4:
        """The rows named, in that order."""
        return Mxfp4(self.blocks[rows], self.scales[rows])

    def values(self) -> F32:
        """f32 [R, C]."""
        return mxfp4.decode(self.blocks, self.scales)

    def first_bad(self) -> tuple[int, int] | None:
        """(row, column) of the first value that is not finite, or None."""
        found = mxfp4.first_bad_scale(self.blocks, self.scales)
        return None if found is None else (found[0], found[1] * mxfp4.BLOCK)

    def same_bytes(self, other: Chunk) -> bool:
        """Whether the other chunk holds the very same bits."""
        return (
            isinstance(other, Mxfp4)
            and np.array_equal(self.scales, other.scales)
            and np.array_equal(self.blocks, other.blocks)
        )


@dataclass(frozen=True)
class Rows:
    """Rows in a row codec: data uint8 [R, row bytes]."""

    encoding: str
    data: U8

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        return self.data.shape[0], CODECS[self.encoding].columns(self.data.shape[1])

    def select(self, rows: slice | NDArray[np.intp]) -> Rows:
        """The rows named, in that order."""
        return Rows(self.encoding, self.data[rows])

    def values(self) -> F32:
        """f32 [R, C]."""
        return CODECS[self.encoding].decode(self.data)

    def first_bad(self) -> tuple[int, int] | None:
        """(row, column) of the first value that is not finite, or None."""
        if self.encoding in FLOATS:
            bits = np.ascontiguousarray(self.data).view("<u4" if self.encoding == "f32" else "<u2")
            at = first_nonfinite(bits, self.encoding)
        else:
            values = self.values()
            at = first_nonfinite(values.view(np.uint32), "f32")
        return None if at < 0 else divmod(at, self.shape[1])

    def same_bytes(self, other: Chunk) -> bool:
        """Whether the other chunk holds the very same bits."""
        return isinstance(other, Rows) and self.encoding == other.encoding and np.array_equal(self.data, other.data)


Chunk = Mxfp4 | Rows


def interleave(even: Chunk, odd: Chunk) -> Chunk:
    """Rows 0, 2, 4 … from the first, 1, 3, 5 … from the second; both of the same encoding and shape."""
    if isinstance(even, Mxfp4) and isinstance(odd, Mxfp4):
        return Mxfp4(_weave(even.blocks, odd.blocks), _weave(even.scales, odd.scales))
    assert isinstance(even, Rows)
    assert isinstance(odd, Rows)
    if even.encoding != odd.encoding:
        return Rows("f32", _weave(even.values(), odd.values()).view(np.uint8))
    return Rows(even.encoding, _weave(even.data, odd.data))


def _weave(even: NDArray[Any], odd: NDArray[Any]) -> NDArray[Any]:
    out = np.empty((2 * even.shape[0], *even.shape[1:]), even.dtype)
    out[0::2], out[1::2] = even, odd
    return out
