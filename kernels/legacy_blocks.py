"""ggml's blocks of 32 with one float16 scale, or a scale and a minimum: Q4_0, Q5_0, Q8_0, Q4_1, Q5_1.

    Q4_0, 18 bytes: d, 16 bytes nibbles;                        value = d · (q − 8)
    Q5_0, 22 bytes: d, 4 bytes fifth bits, 16 bytes nibbles;    value = d · (q − 16)
    Q8_0, 34 bytes: d, 32 × int8;                               value = d · q
    Q4_1, 20 bytes: d, m, 16 bytes nibbles;                     value = d · q + m
    Q5_1, 24 bytes: d, m, 4 bytes fifth bits, 16 bytes;         value = d · q + m

d and m are float16. Nibbles: byte j holds element j low and j+16 high; fifth bit of element j: bit j, little-endian.

The encoders minimise Σ w (x − decoded)² of each block, w the importance of the column or 1. Candidates for d put the
value of largest magnitude at −f for a list of f (`_Symmetric.factors`), or spread the block's range over f steps; each is
rounded to float16 before it is judged, the best is refitted by least squares, and what loses least is kept, the earliest
on ties. The lists hold the f that make MXFP4-valued blocks exact in Q8_0, Q5_0 and Q5_1 (12 and 8 times a power of two: the
magnitudes of MXFP4 are 2^k and 3·2^k), and those that give back a block that was decoded from the same type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.lanes import (
    F0,
    F16_MAX,
    KERNEL,
    LANES,
    affine_error,
    affine_sums,
    bounds,
    f16,
    f16_bits,
    gather,
    gather_cyclic,
    nearest,
    peaks,
    symmetric_error,
    symmetric_sums,
    importance_blocks,
    refuse_size,
)

BLOCK = 32


@dataclass(frozen=True)
class _Layout:
    """One type. `fast`: the candidates without importance, `wide`: with; `offset` is added to q before it is stored."""

    head: int  # bytes before the fifth bits or codes: d, or d and m
    bits: int
    low: int
    high: int
    fast: tuple[float, ...]
    wide: tuple[float, ...]

    @property
    def block_bytes(self) -> int:
        """Head, fifth bits, codes."""
        return self.head + (4 if self.bits == 5 else 0) + (32 if self.bits == 8 else 16)


def _around(centre: float, step: float, count: int) -> tuple[float, ...]:
    return tuple(centre + step * i for i in range(-count, count + 1) if i)


Q4_0 = _Layout(2, 4, -8, 7, (8, 7.5, 8.5, 7), (8, 7, *_around(8, 0.1, 12)))
Q5_0 = _Layout(2, 5, -16, 15, (16, 12, 8, 15), (16, 15, 12, 8, *_around(16, 0.15, 14)))
Q8_0 = _Layout(2, 8, -128, 127, (127, 96, 64, 128), (127, 96, 64, 128, *_around(124, 0.55, 8)))
Q4_1 = _Layout(4, 4, 0, 15, (15, 16), (15, 14, *_around(15, 0.1, 12)))
Q5_1 = _Layout(4, 5, 0, 31, (31, 12, 8), (31, 30, *_around(31, 0.15, 14)))


def q4_0_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], importance f32 [C] or None → uint8 [R, C/32·18]; ValueError beyond float16's range."""
    return _encode_symmetric(values, importance, Q4_0)


def q5_0_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], importance f32 [C] or None → uint8 [R, C/32·22]; exact on MXFP4-valued blocks."""
    return _encode_symmetric(values, importance, Q5_0)


def q8_0_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], importance f32 [C] or None → uint8 [R, C/32·34]; exact on MXFP4-valued blocks."""
    return _encode_symmetric(values, importance, Q8_0)


def _encode_symmetric(values: F32, importance: F32 | None, layout: _Layout) -> U8:
    values = np.ascontiguousarray(values)
    blocks = values.reshape(-1, BLOCK)
    out = np.empty((len(blocks), layout.block_bytes), np.uint8)
    factors = np.array(layout.fast if importance is None else layout.wide, np.float32)
    w, tile = importance_blocks(importance, BLOCK)
    low, high, limit = np.float32(layout.low), np.float32(layout.high), np.float32(-layout.low * F16_MAX)
    x, s, q = np.empty((BLOCK, LANES), np.float32), np.empty((8, LANES), np.float32), np.empty((BLOCK, LANES), np.uint8)
    refuse_size(_symmetric(blocks, w, factors, low, high, limit, layout.bits, x, tile, s, s.view(np.uint32), q, out), values, BLOCK)
    return out.reshape(values.shape[0], -1)


@njit(**KERNEL)
def _symmetric(
    blocks: Any, importance: Any, factors: Any, low: Any, high: Any, limit: Any, bits: Any,
    x: Any, w: Any, s: Any, words: Any, q: Any, out: Any,
) -> Any:  # fmt: skip
    for first in range(0, blocks.shape[0], LANES):
        gather(blocks, first, x)
        if importance is not None:
            gather_cyclic(importance, first, w)
        peaks(x, s[0], s[1])
        for k in range(LANES):
            if not s[0, k] <= limit:
                return first + k
        best = s[2]
        _search_symmetric(x, w, factors, low, high, s[0], s[1], best, s[3], s[4], s[5], s[6], s[7])
        _invert(best, s[3])
        zero = F0 if bits == 8 else low
        for j in range(32):
            for k in range(LANES):
                q[j, k] = np.int32(nearest(min(max(x[j, k] * s[3, k], low), high)) - zero)
        count = min(LANES, blocks.shape[0] - first)
        for k in range(count):
            word = f16_bits(best[k], words[2, k])
            out[first + k, 0], out[first + k, 1] = word & np.uint16(255), word >> np.uint16(8)
        _pack(q, bits, 2, first, count, out)
    return -1


@njit(**KERNEL)
def _invert(d: Any, inverse: Any) -> None:
    for k in range(LANES):
        inverse[k] = F0 if d[k] == F0 else np.float32(1) / d[k]


@njit(**KERNEL)
def _search_symmetric(
    x: Any, w: Any, factors: Any, low: Any, high: Any, size: Any, peak: Any,
    best: Any, inverse: Any, error: Any, least: Any, d: Any, qq: Any,
) -> None:  # fmt: skip
    for i in range(factors.size + 1):
        if i == factors.size:  # the best so far, refitted
            _invert(best, inverse)
            symmetric_sums(x, w, inverse, low, high, d, qq)
            for k in range(LANES):
                d[k] = f16(d[k] / qq[k] if qq[k] > F0 else best[k])
        else:
            scale = np.float32(-1) / factors[i]
            for k in range(LANES):
                d[k] = f16(peak[k] * scale)
        _invert(d, inverse)
        symmetric_error(x, w, d, inverse, low, high, error)
        for k in range(LANES):
            better = i == 0 or error[k] < least[k]
            best[k] = d[k] if better else best[k]
            least[k] = error[k] if better else least[k]


@njit(**KERNEL)
def _pack(q: Any, bits: Any, head: Any, first: Any, count: Any, out: Any) -> None:
    """Codes uint8 [32, 64] → the bytes after the head of `count` blocks; nibbles and fifth bits are folded in place."""
    at = head
    if bits == 8:
        for k in range(count):
            for j in range(32):
                out[first + k, at + j] = q[j, k]
        return
    if bits == 5:
        for i in range(4):
            for k in range(count):
                fifth = np.uint8(0)
                for j in range(8):
                    fifth |= ((q[8 * i + j, k] >> np.uint8(4)) & np.uint8(1)) << np.uint8(j)
                out[first + k, at + i] = fifth
        at += 4
    for j in range(16):
        for k in range(LANES):
            q[j, k] = (q[j, k] & np.uint8(15)) | (q[j + 16, k] << np.uint8(4))
    for k in range(count):
        for j in range(16):
            out[first + k, at + j] = q[j, k]
