"""ggml's super-blocks of 256 values: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

    Q2_K,  84 bytes: 16 × (scale | min << 4), 64 codes, d, dmin     16 parts of 16;  d · scale · q − dmin · min,  q 0 … 3
    Q3_K, 110 bytes: 32 high bits, 64 codes, 12 scales, d           16 parts of 16;  d · (scale − 32) · (q − 4),  q 0 … 7
    Q4_K, 144 bytes: d, dmin, 12 scales and mins, 128 codes          8 parts of 32;  d · scale · q − dmin · min,  q 0 … 15
    Q5_K, 176 bytes: d, dmin, 12 scales and mins, 32 high, 128       8 parts of 32;  as Q4_K,                     q 0 … 31
    Q6_K, 210 bytes: 128 low, 64 high, 16 × int8 scale, d           16 parts of 16;  d · scale · (q − 32),        q 0 … 63

d and dmin are float16. Where the bits of element e lie (h = e // 128, i = e % 128; "byte b, bits s…" of the array named):

    2-bit codes of Q2_K, Q3_K; high bits of Q6_K    byte 32h + i % 32, bits 2·(i // 32) …
    high bit of Q3_K                                byte e % 32, bit e // 32
    nibbles of Q4_K, Q5_K                           byte 32·(e // 64) + e % 32, high if e % 64 ≥ 32
    high bit of Q5_K                                byte e % 32, bit e // 32
    nibbles of Q6_K                                 byte 64h + i % 64, high if i ≥ 64

Twelve bytes hold the 6-bit numbers of a super-block. Q4_K, Q5_K: scale p < 4 in the low 6 bits of byte p, min p < 4 of byte
4 + p; for p ≥ 4 the low 4 bits of the scale low and of the min high in byte 4 + p, their high 2 bits on top of bytes p − 4
and p. Q3_K: low 4 bits of scale p in byte p % 8 (high nibble if p ≥ 8), high 2 bits in byte 8 + p % 4, bits 2·(p // 4) ….

The searches are in `k_affine` and `k_symmetric`, the bytes in `k_bytes`; a super-block that was decoded from the same type
comes back exactly, see `k_recover` for when it does not. Errors: ValueError where a value exceeds what the
type's scales can hold (the limit of each type below), naming row and column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels import k_affine, k_symmetric
from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.inputs import prepare, refuse_size
from gptoss_convert.kernels.k_bytes import pack, unpack
from gptoss_convert.kernels.k_recover import recover
from gptoss_convert.kernels.lanes import (
    F0,
    F16_MAX,
    KERNEL,
    LANES,
    f16_bits,
    first_above,
    gather,
    gather_cyclic,
    nearest,
)

BLOCK = 256


def _nearest_first(count: int) -> NDArray[np.float32]:
    return np.array(sorted(range(-count, count + 1), key=abs), np.float32)


def _moves(scale: int, minimum: int) -> NDArray[np.float32]:
    pairs = [(a, b) for a in range(-scale, scale + 1) for b in range(-minimum, minimum + 1)]
    return np.array(sorted(pairs, key=lambda pair: abs(pair[0]) + abs(pair[1])), np.float32)


@dataclass(frozen=True)
class _Affine:
    """`bits` of q, the largest integer scale `top`, values a part; what is tried, see `k_affine`, without and with
    importance: spreads, starts, scales, pairs."""

    bits: int
    top: int
    size: int
    block_bytes: int
    tried: tuple[tuple[NDArray[np.float32], ...], tuple[NDArray[np.float32], ...]]


@dataclass(frozen=True)
class _Symmetric:
    """`bits` of q, the least integer scale; what is tried, see `k_symmetric`: factors, starts, scales, scales again;
    signs."""

    bits: int
    least: int
    block_bytes: int
    tried: tuple[tuple[NDArray[np.float32], ...], tuple[NDArray[np.float32], ...]]
    signs: tuple[int, int]


def _f32(*numbers: float) -> NDArray[np.float32]:
    return np.array(numbers, np.float32)


_WIDTHS = [(width, 0) for width in (0, -0.25, 0.25, -0.5, 0.5, -0.75, 0.75, -1, 1)]
_SHIFTED = [(width, shift) for shift in (0.5, 1, -0.5) for width in (0, -0.5, 0.5, -1, 1)]
_FEW, _MANY = np.array(_WIDTHS, np.float32), np.array([*_WIDTHS, (-1.5, 0), (-2, 0), *_SHIFTED], np.float32)
_2_BITS = ((_FEW, _f32(1), _nearest_first(6), _moves(2, 2)), (_MANY, _f32(1, 0.75), _nearest_first(6), _moves(2, 2)))
_4_BITS = ((_MANY, _f32(1), _nearest_first(12), _moves(2, 2)), (_MANY, _f32(1), _nearest_first(12), _moves(3, 3)))
_5_BITS = ((_MANY, _f32(1), _nearest_first(12), _moves(2, 2)), (_MANY, _f32(1), _nearest_first(12), _moves(3, 3)))
_3_FACTORS = _f32(4, 3.5, 4.5, -3.5, 3, 5, -3, 3.75, 4.25, 2.5, 3.9, 4.1, 4.35)
_3_BITS = (
    (_f32(4, 3.5, 4.5, -3.5, 3), _f32(1), _nearest_first(4), _nearest_first(1)),
    (_3_FACTORS, _f32(1, 0.985, 0.97, 0.955), _nearest_first(8), _nearest_first(8)),
)
_6_FACTORS = _f32(32, *(32 + 0.64 * i for i in range(-6, 7) if i))
_6_BITS = (
    (_6_FACTORS, _f32(1), _nearest_first(8), _nearest_first(2)),
    (_6_FACTORS, _f32(1), _nearest_first(8), _nearest_first(2)),
)

Q2_K = _Affine(2, 15, 16, 84, _2_BITS)
Q4_K = _Affine(4, 63, 32, 144, _4_BITS)
Q5_K = _Affine(5, 63, 32, 176, _5_BITS)
Q3_K = _Symmetric(3, -32, 110, _3_BITS, (1, 2))
Q6_K = _Symmetric(6, -128, 210, _6_BITS, (1, 1))


def q2_k_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], importance f32 [C] or None → uint8 [R, C/256·84]; |values| to 15 · 65504."""
    return _encode_affine(values, importance, Q2_K)


def q3_k_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], importance f32 [C] or None → uint8 [R, C/256·110]; |values| to 4 · 32 · 65504."""
    return _encode_symmetric(values, importance, Q3_K)


def q4_k_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], importance f32 [C] or None → uint8 [R, C/256·144]; |values| to 63 · 65504."""
    return _encode_affine(values, importance, Q4_K)


def q5_k_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], importance f32 [C] or None → uint8 [R, C/256·176]; |values| to 63 · 65504.

    Exact on MXFP4-valued super-blocks whose scales lie within five binades.
    """
    return _encode_affine(values, importance, Q5_K)


def q6_k_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], importance f32 [C] or None → uint8 [R, C/256·210]; |values| to 32 · 128 · 65504.

    Exact on MXFP4-valued super-blocks whose scales lie within seven binades.
    """
    return _encode_symmetric(values, importance, Q6_K)


def _encode_affine(values: F32, importance: F32 | None, kind: _Affine) -> U8:
    values, w, tile = prepare(values, importance, kind.size, BLOCK)
    parts = values.reshape(-1, kind.size)
    out = np.empty((parts.size // BLOCK, kind.block_bytes), np.uint8)
    x, q = np.empty((kind.size, LANES), np.float32), np.empty((kind.size, LANES), np.uint8)
    s, best = np.empty((24, LANES), np.float32), np.empty((4, LANES), np.float32)
    high, top, limit = np.float32(2**kind.bits - 1), np.float32(kind.top), np.float32(kind.top * F16_MAX)
    bad = _affine(
        parts, w, high, top, limit, *kind.tried[importance is not None],
        x, tile, s, best, best.view(np.uint32), np.empty(LANES, np.bool_), q, out,
    )  # fmt: skip
    refuse_size(bad, values, kind.size)
    recover(parts, F0, high, F0, top, out)
    return out.reshape(values.shape[0], -1)


@njit(**KERNEL)
def _affine(
    blocks: Any, importance: Any, high: Any, top: Any, limit: Any, spreads: Any, starts: Any, wide: Any, near: Any,
    x: Any, w: Any, s: Any, best: Any, words: Any, flag: Any, q: Any, out: Any,
) -> Any:  # fmt: skip
    parts = BLOCK // blocks.shape[1]
    for first in range(0, blocks.shape[0], LANES):
        gather(blocks, first, x)
        if importance is not None:
            gather_cyclic(importance, first, w)
        bad = first_above(x, limit)
        if bad >= 0:
            return first + bad
        k_affine.encode_parts(x, w, high, top, parts, spreads, starts, wide, near, flag, s, best)
        for k in range(LANES):
            unit = best[0, k] * best[2, k]
            s[0, k] = np.float32(1) / unit if unit > F0 else F0
            s[1, k] = best[1, k] * best[3, k]
        for j in range(x.shape[0]):
            for k in range(LANES):
                q[j, k] = np.int32(nearest(min(max((x[j, k] + s[1, k]) * s[0, k], F0), high)))
        for k in range(0, min(LANES, blocks.shape[0] - first), parts):
            d, dmin = f16_bits(best[0, k], words[0, k]), f16_bits(best[1, k], words[1, k])
            pack(
                q[:, k : k + parts], best[2, k : k + parts], best[3, k : k + parts], d, dmin, out[(first + k) // parts]
            )
    return -1


def _encode_symmetric(values: F32, importance: F32 | None, kind: _Symmetric) -> U8:
    values, w, tile = prepare(values, importance, 16, BLOCK)
    parts = values.reshape(-1, 16)
    out = np.empty((parts.size // BLOCK, kind.block_bytes), np.uint8)
    x, q = np.empty((16, LANES), np.float32), np.empty((16, LANES), np.uint8)
    s, best = np.empty((12, LANES), np.float32), np.empty((2, LANES), np.float32)
    half, weighted = 2 ** (kind.bits - 1), importance is not None
    ends, limit = np.array([kind.least, -kind.least - 1], np.float32), np.float32(-kind.least * half * F16_MAX)
    bad = _symmetric(
        parts, w, np.float32(-half), ends, limit, *kind.tried[weighted], kind.signs[weighted], 1 + weighted,
        x, tile, s, best, best.view(np.uint32), np.empty(LANES, np.bool_), q, out,
    )  # fmt: skip
    refuse_size(bad, values, 16)
    recover(parts, np.float32(-half), np.float32(half - 1), ends[0], ends[1], out)
    return out.reshape(values.shape[0], -1)


@njit(**KERNEL)
def _symmetric(
    blocks: Any, importance: Any, low: Any, ends: Any, limit: Any, factors: Any, starts: Any, wide: Any, near: Any,
    signs: Any, rounds: Any, x: Any, w: Any, s: Any, best: Any, words: Any, flag: Any, q: Any, out: Any,
) -> Any:  # fmt: skip
    high = -low - np.float32(1)
    for first in range(0, blocks.shape[0], LANES):
        gather(blocks, first, x)
        if importance is not None:
            gather_cyclic(importance, first, w)
        bad = first_above(x, limit)
        if bad >= 0:
            return first + bad
        k_symmetric.encode_parts(x, w, low, high, ends, factors, starts, wide, near, signs, rounds, flag, s, best)
        for k in range(LANES):
            unit = best[0, k] * best[1, k]
            s[0, k] = np.float32(1) / unit if unit != F0 else F0
        for j in range(16):
            for k in range(LANES):
                q[j, k] = np.int32(nearest(min(max(x[j, k] * s[0, k], low), high)) - low)
        for k in range(0, min(LANES, blocks.shape[0] - first), 16):
            d = f16_bits(best[0, k], words[0, k])
            pack(q[:, k : k + 16], best[1, k : k + 16], best[1, k : k + 16], d, d, out[(first + k) // 16])
    return -1


def q2_k_decode(rows: U8) -> F32:
    """uint8 [R, S·84] → f32 [R, S·256]; bit-equal to ggml's dequantize_row_q2_K."""
    return _decode(rows, Q2_K.block_bytes, 80, 82)


def q3_k_decode(rows: U8) -> F32:
    """uint8 [R, S·110] → f32 [R, S·256]; bit-equal to ggml's dequantize_row_q3_K."""
    return _decode(rows, Q3_K.block_bytes, 108, 108)


def q4_k_decode(rows: U8) -> F32:
    """uint8 [R, S·144] → f32 [R, S·256]; bit-equal to ggml's dequantize_row_q4_K."""
    return _decode(rows, Q4_K.block_bytes, 0, 2)


def q5_k_decode(rows: U8) -> F32:
    """uint8 [R, S·176] → f32 [R, S·256]; bit-equal to ggml's dequantize_row_q5_K."""
    return _decode(rows, Q5_K.block_bytes, 0, 2)


def q6_k_decode(rows: U8) -> F32:
    """uint8 [R, S·210] → f32 [R, S·256]; bit-equal to ggml's dequantize_row_q6_K."""
    return _decode(rows, Q6_K.block_bytes, 208, 208)


def _decode(rows: U8, size: int, d_at: int, dmin_at: int) -> F32:
    blocks = np.ascontiguousarray(rows).reshape(-1, size)
    d, dmin = (
        np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")[:, 0].astype(np.float32) for at in (d_at, dmin_at)
    )
    out = np.empty((len(blocks), BLOCK), np.float32)
    unpack(blocks, d, dmin, out)
    return out.reshape(rows.shape[0], -1)
