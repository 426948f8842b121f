"""Where a codec keeps its codes: what GPTQ needs to round one value at a time onto scales that are already chosen.

    a codec's row ──► codes (`get_codes`) and, of each element, value = slope · level[code] + offset (`lines`)
    codes ──► the same row with these codes, scales untouched (`put_codes`)

A Grid is a codec's layout as data: the values that its codes stand for, and the bit of the block in which bit b of element j's
code lies. The formulas are those of the codecs' own modules; a test holds each against the codec's decoder. Lattice types
(iq2, iq3) have no grid: their codes name eight or four values at once; see `gptq_lattice`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels import iq4
from gptoss_convert.kernels.codecs import CODECS
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.mxfp4 import TWICE_E2M1

F64 = NDArray[np.float64]
Bits = NDArray[np.int32]


@dataclass(frozen=True)
class Grid:
    """A codec whose codes can be set one by one. `levels` f32 [n] by code; `bits` int32 [block, b], least bit first."""

    codec: str
    levels: F32
    bits: Bits

    @property
    def block(self) -> int:
        """Values of a block."""
        return int(self.bits.shape[0])

    @property
    def ends(self) -> tuple[int, int]:
        """The codes of the least and of the largest level."""
        return int(self.levels.argmin()), int(self.levels.argmax())


def grid(codec: str) -> Grid | None:
    """The grid of a codec, or None for one that rounds whole groups of values to lattice points, or does not round."""
    return _grids().get(codec)


def _two_halves(head: int) -> Bits:
    """32 nibbles: byte j holds element j low and j + 16 high."""
    j = np.arange(32)
    first = (head + j % 16) * 8 + 4 * (j // 16)
    return first[:, None] + np.arange(4)


def _with_fifth(nibbles: Bits, fifth: NDArray[np.int64]) -> Bits:
    return np.concatenate([nibbles, fifth[:, None]], axis=1)


def _pairs(head: int) -> Bits:
    """256 pairs of bits: element 128h + 32t + i in byte 32h + i from bit 2t on."""
    e = np.arange(256)
    h, t, i = e // 128, e // 32 % 4, e % 32
    return ((head + 32 * h + i) * 8 + 2 * t)[:, None] + np.arange(2)


def _chunks(head: int) -> Bits:
    """256 nibbles: of each 64, byte i holds element i low and i + 32 high."""
    e = np.arange(256)
    return ((head + 32 * (e // 64) + e % 32) * 8 + 4 * (e // 32 % 2))[:, None] + np.arange(4)


def _high(head: int) -> NDArray[np.int64]:
    """One more bit of 256 elements: element 32t + i in byte i, bit t."""
    e = np.arange(256)
    return (head + e % 32) * 8 + e // 32


def _six() -> Bits:
    e = np.arange(256)
    low = (64 * (e // 128) + e % 64) * 8 + 4 * (e // 64 % 2)
    return np.concatenate([low[:, None] + np.arange(4), _pairs(128)], axis=1)


def _nvfp4() -> Bits:
    e = np.arange(64)
    return ((4 + 8 * (e // 16) + e % 8) * 8 + 4 * (e // 8 % 2))[:, None] + np.arange(4)


def _in_order(head: int, count: int, width: int) -> Bits:
    """Codes of `width` bits one after the other, from the least bit of a byte on."""
    return (8 * head + width * np.arange(count))[:, None] + np.arange(width)


def _integers(low: int, count: int) -> F32:
    return np.arange(low, low + count, dtype=np.float32)


_BYTES = np.arange(256, dtype=np.uint8)
_LAYOUTS: dict[str, tuple[Callable[[], F32], Callable[[], Bits]]] = {
    "q4_0": (lambda: _integers(-8, 16), lambda: _two_halves(2)),
    "q4_1": (lambda: _integers(0, 16), lambda: _two_halves(4)),
    "q5_0": (lambda: _integers(-16, 32), lambda: _with_fifth(_two_halves(6), 16 + np.arange(32))),
    "q5_1": (lambda: _integers(0, 32), lambda: _with_fifth(_two_halves(8), 32 + np.arange(32))),
    "q8_0": (lambda: _BYTES.view(np.int8).astype(np.float32), lambda: _in_order(2, 32, 8)),
    "iq4_nl": (iq4.levels, lambda: _two_halves(2)),
    "iq4_xs": (iq4.levels, lambda: np.concatenate([_two_halves(8 + 16 * b) for b in range(8)])),
    "mxfp4": (lambda: TWICE_E2M1.astype(np.float32), lambda: _two_halves(1)),
    "nvfp4": (lambda: TWICE_E2M1.astype(np.float32), _nvfp4),
    "q2_0": (lambda: _integers(-1, 4), lambda: _in_order(2, 64, 2)),
    "q2_k": (lambda: _integers(0, 4), lambda: _pairs(16)),
    "q3_k": (lambda: _integers(-4, 8), lambda: _with_fifth(_pairs(32), _high(0))),
    "q4_k": (lambda: _integers(0, 16), lambda: _chunks(16)),
    "q5_k": (lambda: _integers(0, 32), lambda: _with_fifth(_chunks(48), _high(16))),
    "q6_k": (lambda: _integers(-32, 64), _six),
    "int4_g32": (lambda: _integers(-8, 16), lambda: _in_order(2, 32, 4)),
    "int8_g32": (lambda: _integers(-128, 256), lambda: _in_order(2, 32, 8)),
}


@cache
def _grids() -> dict[str, Grid]:
    known = {name: layout for name, layout in _LAYOUTS.items() if name in CODECS}
    return {name: Grid(name, levels(), bits().astype(np.int32)) for name, (levels, bits) in known.items()}


def get_codes(grid: Grid, rows: U8) -> U8:
    """uint8 [R, row bytes] → codes uint8 [R, C]."""
    blocks = np.ascontiguousarray(rows).reshape(-1, CODECS[grid.codec].block_bytes)
    out = np.zeros((len(blocks), grid.block), np.uint8)
    _get(blocks, grid.bits, out)
    return out.reshape(rows.shape[0], -1)


def put_codes(grid: Grid, rows: U8, codes: U8) -> U8:
    """Rows uint8 [R, row bytes] with the codes uint8 [R, C] in the place of their own; a new array."""
    blocks = rows.reshape(-1, CODECS[grid.codec].block_bytes).copy()
    _put(blocks, grid.bits, codes.reshape(len(blocks), grid.block))
    return blocks.reshape(rows.shape)


def lines(grid: Grid, rows: U8) -> tuple[F32, F32]:
    """Slope and offset f32 [R, C] of each element, from what the codec's own decoder makes of the two outermost codes."""
    codec = CODECS[grid.codec]
    columns = rows.shape[1] // codec.block_bytes * codec.block
    low, high = (
        codec.decode(put_codes(grid, rows, np.full((rows.shape[0], columns), code, np.uint8))).astype(np.float64)
        for code in grid.ends
    )
    first, last = (float(grid.levels[code]) for code in grid.ends)
    slope = (high - low) / (last - first)
    return slope.astype(np.float32), (low - slope * first).astype(np.float32)


@njit(cache=True, nogil=True)
def _get(blocks: Any, bits: Any, out: Any) -> None:
    for s in range(blocks.shape[0]):
        for j in range(bits.shape[0]):
            code = np.int64(0)
            for b in range(bits.shape[1]):
                code |= ((np.int64(blocks[s, bits[j, b] >> 3]) >> (bits[j, b] & 7)) & 1) << b
            out[s, j] = code


@njit(cache=True, nogil=True)
def _put(blocks: Any, bits: Any, codes: Any) -> None:
    for s in range(blocks.shape[0]):
        for j in range(bits.shape[0]):
            for b in range(bits.shape[1]):
                at, bit = bits[j, b] >> 3, np.uint8(1) << np.uint8(bits[j, b] & 7)
                if (codes[s, j] >> np.uint8(b)) & np.uint8(1):
                    blocks[s, at] |= bit
                else:
                    blocks[s, at] &= np.uint8(255) ^ bit
