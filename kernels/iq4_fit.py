"""The search of IQ4_NL's and IQ4_XS's encoders, on tiles of 64 blocks of 32 values (see `lanes`); `iq4` says what it does.

`table` is the lowest level, then bound and step of each further one: a value beyond the bound is a step higher. `s` is
scratch, f32 [14, 64]: rows of one number a lane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.lanes import (
    F0,
    KERNEL,
    LANES,
    TINY,
    f16,
    first_above,
    gather,
    gather_cyclic,
    nearest,
    peaks,
)

BLOCK, PARTS = 32, 8
REFITS = 2
_LEAST_SCALE, _MOST_SCALE = np.float32(-32), np.float32(31)


@njit(**KERNEL)
def encode(
    blocks: Any, importance: Any, table: Any, places: Any, limit: Any, scaled: Any,
    x: Any, w: Any, s: Any, d: Any, scale: Any, codes: Any,
) -> Any:  # fmt: skip
    """blocks f32 [N, 32], importance f32 [G, 32] → d, scale [N], codes [N, 16]; −1, or the first block beyond the limit."""
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
