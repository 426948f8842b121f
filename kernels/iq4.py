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
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gptoss_convert.kernels.floats import F32, U8
from gptoss_convert.kernels.lanes import (
    F0,
    F16_MAX,
    KERNEL,
    LANES,
    TINY,
    f16,
    first_above,
    gather,
    gather_cyclic,
    importance_blocks,
    nearest,
    peaks,
    refuse_size,
)

BLOCK, SUPER, PARTS = 32, 256, 8
NL_FIELDS = (2, 16)  # d, codes
XS_FIELDS = (2, 2, 4, 128)  # d, upper and lower bits of the scales, codes
REFITS = 2
_LEAST_SCALE, _MOST_SCALE = np.float32(-32), np.float32(31)


@cache
def levels() -> F32:
    """The 16 levels, f32, ascending."""
    import gguf.quants

    return np.array(gguf.quants.IQ4_NL.kvalues, np.float32)


def _table() -> tuple[Any, ...]:
    """The lowest level, then (bound, step): a value beyond the i-th bound is a step higher."""
    level = [float(v) for v in levels()]
    pairs = zip(level, level[1:], strict=False)
    return (np.float32(level[0]), *(np.float32(v) for a, b in pairs for v in ((a + b) / 2, b - a)))


def _places() -> F32:
    """Where the largest magnitude may lie: at each level, and around the outermost ones."""
    low, high = levels()[0], levels()[-1]
    around = np.array([0.9, 0.94, 0.98, 1.02, 1.06, 1.1], np.float32)
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
    return _decode(np.ascontiguousarray(blocks[:, :, 8:]).reshape(rows.shape[0], -1, 16), (d * scale).reshape(rows.shape[0], -1, 1))


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
    blocks = np.ascontiguousarray(values).reshape(-1, BLOCK)
    w, _ = importance_blocks(np.ones(values.shape[1], np.float32) if importance is None else importance, BLOCK)
    d, scale = np.zeros(len(blocks), np.float32), np.ones(len(blocks), np.int32)
    codes = np.empty((len(blocks), 16), np.uint8)
    limit = np.float32(127 * F16_MAX * (32 if scaled else 1))
    tiles, s = np.empty((2, BLOCK, LANES), np.float32), np.empty((14, LANES), np.float32)
    refuse_size(int(_encode(blocks, w, _table(), _places(), limit, scaled, tiles[0], tiles[1], s, d, scale, codes)), values, BLOCK)
    return d, scale, codes


@njit(**KERNEL)
def _encode(
    blocks: Any, importance: Any, table: Any, places: Any, limit: Any, scaled: Any,
    x: Any, w: Any, s: Any, d: Any, scale: Any, codes: Any,
) -> Any:  # fmt: skip
    for first in range(0, blocks.shape[0], LANES):
        gather(blocks, first, x)
        gather_cyclic(importance, first, w)
        over = first_above(x, limit)
        if over >= 0:
            return first + over
        _fit_lanes(x, w, table, places, not scaled, s)
        count = min(LANES, blocks.shape[0] - first)
        if scaled:
            _fit_scales(x, w, table, s)
            for k in range(count):
                scale[first + k] = np.int32(s[5, k])
        for k in range(count):
            d[first + k] = s[4, k]
            product = s[4, k] * np.float32(scale[first + k])
            inverse = F0 if abs(product) < TINY else np.float32(1) / product
            for j in range(16):
                low, high = _code(x[j, k] * inverse, table), _code(x[16 + j, k] * inverse, table)
                codes[first + k, j] = low | (high << 4)
    return -1


@njit(inline="always")
def _level(v: Any, t: Any) -> Any:
    """The level nearest to v."""
    q = t[0] + (t[2] if v > t[1] else F0) + (t[4] if v > t[3] else F0) + (t[6] if v > t[5] else F0)
    q += (t[8] if v > t[7] else F0) + (t[10] if v > t[9] else F0) + (t[12] if v > t[11] else F0)
    q += (t[14] if v > t[13] else F0) + (t[16] if v > t[15] else F0) + (t[18] if v > t[17] else F0)
    q += (t[20] if v > t[19] else F0) + (t[22] if v > t[21] else F0) + (t[24] if v > t[23] else F0)
    return q + (t[26] if v > t[25] else F0) + (t[28] if v > t[27] else F0) + (t[30] if v > t[29] else F0)


@njit(**KERNEL)
def _code(v: Any, t: Any) -> Any:
    """The number of the level nearest to v."""
    code = 0
    for i in range(1, 31, 2):
        code += v > t[i]
    return code


@njit(**KERNEL)
def _loss(x: Any, w: Any, table: Any, d: Any, inverse: Any, loss: Any) -> None:
    """Σ w (x − d·level)² of each lane at its d; leaves 1/d in `inverse`, 0 where d is 0."""
    for k in range(LANES):
        inverse[k] = F0 if abs(d[k]) < TINY else np.float32(1) / d[k]
        loss[k] = F0
    for j in range(BLOCK):
        for k in range(LANES):
            r = x[j, k] - _level(x[j, k] * inverse[k], table) * d[k]
            loss[k] += w[j, k] * r * r


@njit(**KERNEL)
def _sums(x: Any, w: Any, table: Any, inverse: Any, qx: Any, qq: Any) -> None:
    """Σ w q x and Σ w q² of each lane, q the nearest level."""
    for k in range(LANES):
        qx[k] = F0
        qq[k] = F0
    for j in range(BLOCK):
        for k in range(LANES):
            q = _level(x[j, k] * inverse[k], table)
            qx[k] += w[j, k] * q * x[j, k]
            qq[k] += w[j, k] * q * q


@njit(**KERNEL)
def _fit_lanes(x: Any, w: Any, table: Any, places: Any, rounded: Any, s: Any) -> None:
    """The best d of each lane by itself → s[4], `rounded` to float16 or real; its Σ w q² → s[7]."""
    size, peak, inverse, trial, best, loss, least, qq, qx = s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]
    peaks(x, size, peak)
    for k in range(LANES):
        best[k] = F0
    _loss(x, w, table, best, inverse, least)
    for turn in range(places.size + REFITS):
        if turn >= places.size:
            for k in range(LANES):
                inverse[k] = F0 if abs(best[k]) < TINY else np.float32(1) / best[k]
            _sums(x, w, table, inverse, qx, qq)
        for k in range(LANES):
            trial[k] = peak[k] / places[turn] if turn < places.size else qx[k] / max(qq[k], TINY)
        if rounded:
            for k in range(LANES):
                trial[k] = f16(trial[k])
        _loss(x, w, table, trial, inverse, loss)
        for k in range(LANES):
            better = loss[k] < least[k]
            best[k] = trial[k] if better else best[k]
            least[k] = min(loss[k], least[k])


@njit(**KERNEL)
def _first_d(s: Any, start: Any, d: Any) -> None:
    """d of the super-block of lanes `start` … : the real scales s[4], weighed by s[7], closest to its multiples."""
    widest = F0
    for k in range(start, start + PARTS):
        if abs(s[4, k]) > abs(widest):
            widest = s[4, k]
    least, best = np.float32(np.inf), F0
    for i in range(-32, 32):
        unit = f16(widest / np.float32(i)) if i else F0
        inverse = F0 if unit == F0 else np.float32(1) / unit
        miss = F0
        for k in range(start, start + PARTS):
            r = s[4, k] - unit * min(max(nearest(s[4, k] * inverse), _LEAST_SCALE), _MOST_SCALE)
            miss += s[7, k] * r * r
        if miss < least:
            least, best = miss, unit
    d[start : start + PARTS] = best


@njit(**KERNEL)
def _fit_scales(x: Any, w: Any, table: Any, s: Any) -> None:
    """The real scales s[4] → d of each super-block, repeated, in s[4], and the lanes' scales in s[5]."""
    total, inverse, trial, real, kept, loss = s[0], s[2], s[3], s[4], s[5], s[6]
    d, scale, least, best = s[9], s[10], s[11], s[12]
    for start in range(0, LANES, PARTS):
        _first_d(s, start, d)
    total[:] = np.inf
    for turn in range(REFITS):
        least[:] = np.inf
        for offset in range(-1, 2) if turn == 0 else range(1):
            for k in range(LANES):
                if turn == 0:
                    ratio = nearest(F0 if d[k] == F0 else real[k] / d[k]) + np.float32(offset)
                    loss[k] = min(max(ratio, _LEAST_SCALE), _MOST_SCALE)
                else:
                    loss[k] = scale[k]
                trial[k] = loss[k] * d[k]
                s[13, k] = loss[k]
            _loss(x, w, table, trial, inverse, loss)
            for k in range(LANES):
                better = loss[k] < least[k]
                scale[k] = s[13, k] if better else scale[k]
                least[k] = min(loss[k], least[k])
        for start in range(0, LANES, PARTS):
            _settle(least[start : start + PARTS], d, scale, total, best, kept, start)
        for k in range(LANES):
            product = d[k] * scale[k]
            inverse[k] = F0 if abs(product) < TINY else np.float32(1) / product
        _sums(x, w, table, inverse, s[8], s[7])
        for start in range(0, LANES, PARTS):
            _refit(s[8], s[7], scale, start, d)
    real[:] = best


@njit(**KERNEL)
def _settle(loss: Any, d: Any, scale: Any, total: Any, best: Any, kept: Any, start: Any) -> None:
    """Keep d and the scales of a super-block in `best` and `kept` where its loss is less than `total`."""
    whole = F0
    for p in range(PARTS):
        whole += loss[p]
    if whole < total[start]:
        for k in range(start, start + PARTS):
            total[k], best[k], kept[k] = whole, d[k], scale[k]


@njit(**KERNEL)
def _refit(qx: Any, qq: Any, scale: Any, start: Any, d: Any) -> None:
    """d of a super-block by least squares from its lanes' sums."""
    above, below = F0, F0
    for k in range(start, start + PARTS):
        above += scale[k] * qx[k]
        below += scale[k] * scale[k] * qq[k]
    d[start : start + PARTS] = f16(above / below) if below > F0 else F0
