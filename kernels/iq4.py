"""ggml's IQ4_NL and IQ4_XS: 4-bit codes into a table of 16 uneven levels, −127 … 113.

    IQ4_NL, 18 bytes for 32 values: d (f16), 16 bytes codes;     value = d · level[code]
    IQ4_XS, 136 bytes for 256 values: d (f16), 2 bytes upper and 4 bytes lower bits of 8 scales, 128 bytes codes;
          value = d · (scale − 32) · level[code], a scale of 6 bits for each 32 values

Codes: byte j of 16 holds element j low and j + 16 high. Scale i: nibble i of the lower bits, bits 2i and 2i + 1 of the upper
ones. The levels come from the gguf package (`IQ4_NL.kvalues`). None is zero, nor are they symmetric: d may be negative.

The encoders minimise Σ w (x − decoded)² of each block, w the column's importance or 1. IQ4_NL: the value of largest
magnitude at each of many places (`_places`) gives a d, rounded to float16 before it is judged; the best is refitted by
least squares. IQ4_XS: each part alike with a real scale; then d so that these scales are closest to its multiples, the
largest one being −32 … 31 times d; the true loss at the three scales next to each real one; and d refitted once.

decode(encode(x)) comes back exactly from IQ4_NL, since every level is among the places. So it does from IQ4_XS unless all
values of a part have one magnitude, which leaves that part's scale open.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.inputs import prepare, refuse_size
from gptoss_convert.kernels.iq4_fit import BLOCK, PARTS, encode
from gptoss_convert.kernels.lanes import F16_MAX, KERNEL, LANES

SUPER = 256
# Relative to the mean: what has no importance at all is still encoded as well as the rest allows.
_LEAST_WEIGHT = np.float32(1e-9)
NL_FIELDS = (2, 16)  # d, codes
XS_FIELDS = (2, 2, 4, 128)  # d, upper and lower bits of the scales, codes


@cache
def levels() -> F32:
    """The 16 levels, f32, ascending."""
    import gguf.quants

    return np.array(gguf.quants.IQ4_NL.kvalues, np.float32)


def _table() -> tuple[Any, ...]:
    """The lowest level, then (bound, step): a value beyond the i-th bound is a step higher."""
    level = [float(v) for v in levels()]
    return (np.float32(level[0]), *(np.float32(v) for a, b in pairwise(level) for v in ((a + b) / 2, b - a)))


def _places() -> F32:
    """Where the largest magnitude may lie: at each level, and around the outermost ones."""
    low, high = levels()[0], levels()[-1]
    around = np.linspace(0.78, 1.14, 18)
    return np.concatenate([levels(), low * around, high * around]).astype(np.float32)


def iq4_nl_decode(rows: U8) -> F32:
    """uint8 [R, B·18] → f32 [R, B·32]; bit-equal to ggml's dequantize_row_iq4_nl."""
    blocks = rows.reshape(rows.shape[0], -1, sum(NL_FIELDS))
    d = np.ascontiguousarray(blocks[:, :, :2]).view("<f2").astype(np.float32)
    return _decode(np.ascontiguousarray(blocks[:, :, 2:]), d)


def iq4_xs_decode(rows: U8) -> F32:
    """uint8 [R, B·136] → f32 [R, B·256]; bit-equal to ggml's dequantize_row_iq4_xs."""
    blocks = rows.reshape(rows.shape[0], -1, sum(XS_FIELDS))
    d = np.ascontiguousarray(blocks[:, :, :2]).view("<f2").astype(np.float32)
    upper = np.ascontiguousarray(blocks[:, :, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    lower = np.stack([blocks[:, :, 4:8] & 15, blocks[:, :, 4:8] >> 4], axis=-1).reshape(*upper.shape)
    scale = (lower.astype(np.float32) + 16 * upper.astype(np.float32)) - np.float32(32)
    codes = np.ascontiguousarray(blocks[:, :, 8:]).reshape(rows.shape[0], -1, 16)
    return _decode(codes, (d * scale).reshape(rows.shape[0], -1, 1))


def _decode(codes: U8, scale: F32) -> F32:
    """Codes [R, B, 16] and scales f32 [R, B, 1] → f32 [R, B·32]."""
    out = np.empty((codes.shape[0], codes.shape[1] * BLOCK), np.float32)
    _expand(codes, scale, levels(), out)
    return out


@njit(**KERNEL)
def _expand(codes: Any, scale: Any, level: Any, out: Any) -> None:
    for r in range(codes.shape[0]):
        for b in range(codes.shape[1]):
            for j in range(16):
                out[r, b * 32 + j] = scale[r, b, 0] * level[codes[r, b, j] & np.uint8(15)]
                out[r, b * 32 + 16 + j] = scale[r, b, 0] * level[codes[r, b, j] >> np.uint8(4)]


def iq4_nl_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], C a multiple of 32, importance f32 [C] or None → uint8 [R, C/32·18]; ValueError beyond float16's range."""
    d, _, codes = _fit(values, importance, False)
    head = d.astype("<f2").view(np.uint8).reshape(-1, 2)
    return np.concatenate([head, codes], axis=1).reshape(values.shape[0], -1)


def iq4_xs_encode(values: F32, importance: F32 | None = None) -> U8:
    """f32 [R, C], C a multiple of 256, importance f32 [C] or None → uint8 [R, C/256·136]; ValueError beyond the range."""
    d, scale, codes = _fit(values, importance, True)
    stored = (scale.reshape(-1, PARTS) + 32).astype(np.uint16)
    upper = (stored >> 4 << np.arange(0, 16, 2, dtype=np.uint16)).sum(axis=1, dtype="<u2")[:, None]
    lower = (stored[:, 0::2] & 15 | (stored[:, 1::2] & 15) << 4).astype(np.uint8)
    head = d[::PARTS].astype("<f2").view(np.uint8).reshape(-1, 2)
    blocks = np.concatenate([head, upper.view(np.uint8), lower, codes.reshape(-1, SUPER // 2)], axis=1)
    return blocks.reshape(values.shape[0], -1)


def _fit(values: F32, importance: F32 | None, scaled: bool) -> tuple[F32, NDArray[np.int32], U8]:
    """d f32 and scale int32 (1 unless `scaled`) of each 32 values, codes uint8 [·, 16]."""
    importance = np.ones(values.shape[1], np.float32) if importance is None else importance
    values, w, _ = prepare(values, importance, BLOCK, SUPER if scaled else BLOCK)
    blocks = values.reshape(-1, BLOCK)
    assert w is not None
    w = np.maximum(w, _LEAST_WEIGHT)
    d, scale = np.zeros(len(blocks), np.float32), np.ones(len(blocks), np.int32)
    codes = np.empty((len(blocks), 16), np.uint8)
    limit = np.float32(127 * F16_MAX * (32 if scaled else 1))
    tiles, s = np.empty((2, BLOCK, LANES), np.float32), np.empty((14, LANES), np.float32)
    bad = encode(blocks, w, _table(), _places(), limit, scaled, tiles[0], tiles[1], s, d, scale, codes)
    refuse_size(int(bad), values, BLOCK)
    return d, scale, codes
