"""ggml's blocks of 32 with one float16 scale, or a scale and a minimum: Q4_0, Q5_0, Q8_0, Q4_1, Q5_1.

    Q4_0, 18 bytes: d, 16 bytes nibbles;                        value = d · (q − 8)
    Q5_0, 22 bytes: d, 4 bytes fifth bits, 16 bytes nibbles;    value = d · (q − 16)
    Q8_0, 34 bytes: d, 32 × int8;                               value = d · q
    Q4_1, 20 bytes: d, m, 16 bytes nibbles;                     value = d · q + m
    Q5_1, 24 bytes: d, m, 4 bytes fifth bits, 16 bytes;         value = d · q + m

d and m are float16. Nibbles: byte j holds element j low and j+16 high; fifth bit of element j: bit j, little-endian.

A block that was decoded from the same type comes back exactly (`recover`); not always, where all its values and the scale
have two significant bits at most, or d · q and m are further apart than float32's precision.

The encoders minimise Σ w (x − decoded)² of each block, w the importance of the column or 1. Candidates for d put the value of
largest magnitude at −f for a list of f (`_Layout.fast`, `wide`), or spread the block's range over f steps; each is rounded to
float16 before it is judged, the best is refitted by least squares, and what loses least is kept, the earliest on ties. The
lists hold the f that make MXFP4-valued blocks exact in Q8_0, Q5_0 and Q5_1 (12 and 8 times a power of two: the magnitudes of
MXFP4 are 2^k and 3·2^k). With importance an offset is tried as float16 holds it and next to it, each with its best scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.block_bytes import pack, unpack
from gptoss_convert.kernels.block_search import (
    all_zero,
    by_loss,
    few_bits_affine,
    search_affine,
    search_symmetric,
    settle_affine,
)
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.inputs import prepare, refuse_size
from gptoss_convert.kernels.lane_sums import affine_error, symmetric_error
from gptoss_convert.kernels.lanes import (
    F0,
    F16_MAX,
    KERNEL,
    LANES,
    bounds,
    coarse,
    f16_bits,
    gather,
    gather_cyclic,
    invert,
    nearest,
    peaks,
)
from gptoss_convert.kernels.recover import recover

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
    exact: tuple[float, ...] = ()

    @property
    def block_bytes(self) -> int:
        """Head, fifth bits, codes."""
        return self.head + (4 if self.bits == 5 else 0) + (32 if self.bits == 8 else 16)


def _around(centre: float, step: float, count: int) -> tuple[float, ...]:
    return tuple(centre + step * i for i in range(-count, count + 1) if i)


# `exact` puts the largest magnitude f steps from zero in all of them, and is tried on blocks of few significant bits alone.
Q4_0 = _Layout(2, 4, -8, 7, (8, 7.3, 8.6), (8, 7, *_around(8, 0.1, 12)))
Q5_0 = _Layout(2, 5, -16, 15, (16, 15, 16.5), (16, 15, *_around(16, 0.15, 14)), (12, 8))
Q8_0 = _Layout(2, 8, -128, 127, (127, 125), (127, 125, 123.2), (96, 64))
Q4_1 = _Layout(4, 4, 0, 15, (15,), (15, 14, *_around(15, 0.3, 7)))
Q5_1 = _Layout(4, 5, 0, 31, (31,), (31, 30, *_around(31, 0.6, 6)), (12, 8))
_SHIFTS = (0, -0.5, 0.5, 1)  # of the least value's code, with importance


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
    values, w, tile = prepare(values, importance, BLOCK)
    blocks = values.reshape(-1, BLOCK)
    out = np.empty((len(blocks), layout.block_bytes), np.uint8)
    factors = np.array(layout.fast if importance is None else layout.wide, np.float32)
    low, high, limit = np.float32(layout.low), np.float32(layout.high), np.float32(-layout.low * F16_MAX)
    x, s, q = np.empty((BLOCK, LANES), np.float32), np.empty((9, LANES), np.float32), np.empty((BLOCK, LANES), np.uint8)
    bad = _symmetric(
        blocks, w, factors, np.array(layout.exact, np.float32), 0 if importance is None else 2, low, high, limit,
        layout.bits, x, tile, s, s.view(np.uint32), np.empty(LANES, np.bool_), q, out,
    )  # fmt: skip
    refuse_size(bad, values, BLOCK)
    thorough = importance is not None and not layout.exact
    recover(blocks, layout.bits, low, high, thorough, x, s, s.view(np.uint32), np.empty(LANES, np.bool_), q, out)
    return out.reshape(values.shape[0], -1)


@njit(**KERNEL)
def _symmetric(
    blocks: Any, importance: Any, factors: Any, exact: Any, rounds: Any, low: Any, high: Any, limit: Any, bits: Any,
    x: Any, w: Any, s: Any, words: Any, flag: Any, q: Any, out: Any,
) -> Any:  # fmt: skip
    peak, best, inverse = s[1], s[2], s[3]
    for first in range(0, blocks.shape[0], LANES):
        gather(blocks, first, x)
        if importance is not None:
            gather_cyclic(importance, first, w)
        peaks(x, s[0], peak)
        for k in range(LANES):
            if not s[0, k] <= limit:
                return first + k
        some = exact.size > 0 and coarse(x, flag)
        if some:
            by_loss(x, w, exact, low, high, peak, best, inverse, s[4], s[5], s[6])
        if not some or not all_zero(s[4], flag):
            search_symmetric(x, w, factors, rounds, bits, low, high, peak, s[7], inverse, s[8], s[5], s[6])
            if some:
                invert(s[7], inverse)
                symmetric_error(x, w, s[7], inverse, low, high, s[8])
            for k in range(LANES):
                best[k] = best[k] if some and flag[k] and s[4, k] <= s[8, k] else s[7, k]
        invert(best, inverse)
        zero = F0 if bits == 8 else low
        for j in range(32):
            for k in range(LANES):
                q[j, k] = np.int32(nearest(min(max(x[j, k] * inverse[k], low), high)) - zero)
        count = min(LANES, blocks.shape[0] - first)
        for k in range(count):
            word = f16_bits(best[k], words[2, k])
            out[first + k, 0], out[first + k, 1] = word & np.uint16(255), word >> np.uint16(8)
        pack(q, bits, 2, first, count, out)
    return -1


def q4_1_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], importance f32 [C] or None → uint8 [R, C/32·20]; ValueError beyond float16's range."""
    return _encode_affine(values, importance, Q4_1)


def q5_1_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], importance f32 [C] or None → uint8 [R, C/32·24]; exact on MXFP4-valued blocks."""
    return _encode_affine(values, importance, Q5_1)


def _encode_affine(values: F32, importance: F32 | None, layout: _Layout) -> U8:
    values, w, tile = prepare(values, importance, BLOCK)
    blocks = values.reshape(-1, BLOCK)
    out = np.empty((len(blocks), layout.block_bytes), np.uint8)
    pairs = [(f, 0) for f in layout.fast] if importance is None else [(f, c) for c in _SHIFTS for f in layout.wide]
    factors = np.array(pairs, np.float32)
    high, limit = np.float32(layout.high), np.float32(F16_MAX)
    x, s, q = (
        np.empty((BLOCK, LANES), np.float32),
        np.empty((20, LANES), np.float32),
        np.empty((BLOCK, LANES), np.uint8),
    )
    bad = _affine(
        blocks, w, factors, np.array(layout.exact, np.float32), 0 if importance is None else 1, high, limit,
        layout.bits, x, tile, s, s.view(np.uint32), np.empty(LANES, np.bool_), q, out,
    )  # fmt: skip
    refuse_size(bad, values, BLOCK)
    thorough = importance is not None and not layout.exact
    recover(blocks, layout.bits, F0, high, thorough, x, s, s.view(np.uint32), np.empty(LANES, np.bool_), q, out)
    return out.reshape(values.shape[0], -1)


@njit(**KERNEL)
def _affine(
    blocks: Any, importance: Any, factors: Any, exact: Any, rounds: Any, high: Any, limit: Any, bits: Any,
    x: Any, w: Any, s: Any, words: Any, flag: Any, q: Any, out: Any,
) -> Any:  # fmt: skip
    for first in range(0, blocks.shape[0], LANES):
        gather(blocks, first, x)
        if importance is not None:
            gather_cyclic(importance, first, w)
        low, span, best, base, inverse = s[0], s[1], s[2], s[3], s[4]
        bounds(x, low, span)
        for k in range(LANES):
            if not max(-low[k], span[k]) <= limit:
                return first + k
        some = exact.size > 0 and coarse(x, flag)
        if some:
            few_bits_affine(x, w, exact, high, low, span, s[5], s[6], inverse, s[7], s[8], s[9])
        if some and all_zero(s[7], flag):
            best[:], base[:] = s[5], s[6]
        else:
            search_affine(x, w, factors, rounds, high, low, span, best, base, inverse, s[8:])
            if importance is not None:
                settle_affine(x, w, high, best, base, inverse, s[8:])
            if some:
                invert(best, inverse)
                affine_error(x, w, best, inverse, base, high, s[8])
                for k in range(LANES):
                    if flag[k] and s[7, k] <= s[8, k]:
                        best[k], base[k] = s[5, k], s[6, k]
        invert(best, inverse)
        for j in range(32):
            for k in range(LANES):
                q[j, k] = np.int32(nearest(min(max((x[j, k] - base[k]) * inverse[k], F0), high)))
        count = min(LANES, blocks.shape[0] - first)
        for k in range(count):
            for i in range(2):
                word = f16_bits(s[2 + i, k], words[2 + i, k])
                out[first + k, 2 * i], out[first + k, 2 * i + 1] = word & np.uint16(255), word >> np.uint16(8)
        pack(q, bits, 4, first, count, out)
    return -1


def q4_0_decode(rows: U8) -> F32:
    """uint8 [R, G·18] → f32 [R, G·32]; bit-equal to ggml's dequantize_row_q4_0."""
    return _decode(rows, Q4_0, -8)


def q4_1_decode(rows: U8) -> F32:
    """uint8 [R, G·20] → f32 [R, G·32]; bit-equal to ggml's dequantize_row_q4_1."""
    return _decode(rows, Q4_1, 0)


def q5_1_decode(rows: U8) -> F32:
    """uint8 [R, G·24] → f32 [R, G·32]; bit-equal to ggml's dequantize_row_q5_1."""
    return _decode(rows, Q5_1, 0)


def _decode(rows: U8, layout: _Layout, zero: int) -> F32:
    blocks = np.ascontiguousarray(rows).reshape(-1, layout.block_bytes)
    heads = np.ascontiguousarray(blocks[:, : layout.head]).view("<f2").astype(np.float32)
    out = np.empty((len(blocks), BLOCK), np.float32)
    unpack(blocks[:, layout.head :], heads, layout.bits, np.float32(zero), out)
    return out.reshape(rows.shape[0], -1)
