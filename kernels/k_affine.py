"""Encoding super-blocks of 256 values whose parts have a scale and a minimum: Q2_K, Q4_K, Q5_K.

    value = (d · scale) · q − (dmin · min)      d, dmin: float16, one each a super-block; scale, min: integers of a part

Minimised is Σ w (x − decoded)² over each super-block, w the column's importance or 1, by descent from a good start:

1. each part by itself, real-valued: several step widths, each with its integers' least-squares scale and minimum;
2. d and dmin put the largest of these at the top of the integers' range;
3. for these d and dmin, each part's (scale, min) among the neighbours of the rounded real ones, judged by the loss itself;
4. d and dmin refitted by least squares to all integers at once, rounded to float16, and 3 repeated around the last pair;
   a super-block keeps the round that lost least.

Lanes of a tile (see `lanes`) are parts; consecutive lanes make a super-block.
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
    affine_error,
    affine_sums,
    bounds,
    coarse,
    f16,
    invert,
    lower,
    means,
    moments,
    nearest,
    sizes,
    take,
)

F1 = np.float32(1)
F2 = np.float32(2)
_KEEP_1 = np.float32(2**23 + 1)
_EIGHTH, _TWELFTH = np.float32(1 / 8), np.float32(1 / 12)


@njit(**KERNEL)
def fit_parts(x: Any, w: Any, high: Any, spreads: Any, s: Any, scale: Any, minimum: Any) -> None:
    """Step 1: real-valued scale ≥ 0 and minimum ≥ 0 (what is subtracted) of each lane.

    `spreads` f32 [M, 2]: the range takes (high + the first) steps, and the least value gets minus the second as its code.
    `s`: f32 [14, 64] of room.
    """
    low, span, inverse, q1, qx, qq, least, sw, sv, svv, base, a, b, error = (
        s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13],
    )  # fmt: skip
    bounds(x, low, span)
    for k in range(LANES):
        low[k] = min(low[k], F0)
    for k in range(LANES):
        span[k] = max(span[k] - low[k], F0)
    moments(x, w, low, sw, sv, svv)
    least[:] = np.float32(np.inf)
    for i in range(spreads.shape[0]):
        width, shift = high + spreads[i, 0], spreads[i, 1]
        for k in range(LANES):
            inverse[k] = width / span[k] if span[k] > TINY else F0
        for k in range(LANES):
            base[k] = low[k] + shift * (span[k] / width)
        affine_sums(x, w, inverse, base, high, q1, qx, qq)
        _line(low, base, sw, sv, q1, qx, qq, a, b)
        _losses(a, b, sw, sv, svv, q1, qx, qq, error)
        take(error, least, a, scale)
        take(error, least, b, minimum)
        lower(error, least)
    for k in range(LANES):
        scale[k] = max(scale[k], F0)
    for k in range(LANES):
        minimum[k] = max(-(low[k] + minimum[k]), F0)


@njit(**KERNEL)
def _line(low: Any, base: Any, sw: Any, sv: Any, q1: Any, qx: Any, qq: Any, a: Any, b: Any) -> None:
    """Least squares x − low ≈ a q + b from the sums over x − base for q and over x − low for 1; low + b ≤ 0.

    `qx` is turned into the sum over x − low. Where the q are all equal, a is NaN or infinite and so is the loss.
    """
    for k in range(LANES):
        qx[k] += (base[k] - low[k]) * q1[k]
    for k in range(LANES):
        b[k] = min((qq[k] * sv[k] - q1[k] * qx[k]) / (sw[k] * qq[k] - q1[k] * q1[k]), -low[k])
    for k in range(LANES):
        a[k] = (qx[k] - b[k] * q1[k]) / qq[k]


@njit(**KERNEL)
def _losses(a: Any, b: Any, sw: Any, sv: Any, svv: Any, q1: Any, qx: Any, qq: Any, error: Any) -> None:
    """Σ w (x − low − a q − b)² of each lane."""
    for k in range(LANES):
        error[k] = svv[k] + a[k] * (a[k] * qq[k] - F2 * qx[k])
    for k in range(LANES):
        error[k] += b[k] * (b[k] * sw[k] - F2 * sv[k] + F2 * a[k] * q1[k])


@njit(**KERNEL)
def first_scales(scale: Any, minimum: Any, parts: Any, top: Any, d: Any, dmin: Any) -> None:
    """Step 2; d and dmin of every super-block, repeated in each of its lanes."""
    for start in range(0, LANES, parts):
        a, b = F0, F0
        for k in range(start, start + parts):
            a, b = max(a, scale[k]), max(b, minimum[k])
        d[start : start + parts] = f16(a / top)
        dmin[start : start + parts] = f16(b / top)


@njit(**KERNEL)
def _scales(step: Any, top: Any, d: Any, a0: Any, trial: Any, unit: Any, inverse: Any) -> None:
    for k in range(LANES):
        trial[k] = min(max(a0[k] + step, F0), top)
    for k in range(LANES):
        unit[k] = d[k] * trial[k]
    invert(unit, inverse)


@njit(**KERNEL)
def search_pairs(
    x: Any, w: Any, high: Any, top: Any, d: Any, dmin: Any, moves: Any, s: Any, a0: Any, b0: Any, a: Any, b: Any, least: Any
) -> None:
    """Step 3: the best integers (a, b) of each lane among (a0, b0) moved by `moves` f32 [M, 2], and their loss."""
    ta, tb, unit, inverse, base, error = s[0], s[1], s[2], s[3], s[4], s[5]
    least[:] = np.float32(np.inf)
    for i in range(moves.shape[0]):
        step = moves[i, 1]
        _scales(moves[i, 0], top, d, a0, ta, unit, inverse)
        for k in range(LANES):
            tb[k] = min(max(b0[k] + step, F0), top)
        for k in range(LANES):
            base[k] = -(dmin[k] * tb[k])
        affine_error(x, w, unit, inverse, base, high, error)
        take(error, least, ta, a)
        take(error, least, tb, b)
        lower(error, least)


@njit(**KERNEL)
def scan_scales(
    x: Any, w: Any, high: Any, top: Any, d: Any, dmin: Any, steps: Any, s: Any, a0: Any, b0: Any, a: Any, b: Any, least: Any
) -> None:
    """Step 3, first half: for each scale a0 + step, the minimum refitted by least squares; the best pair and its loss."""
    ta, tb, unit, inverse, base, error, q1, start, sw, sv = s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9]
    error[:] = F0
    means(x, w, error, sw, sv)
    least[:] = np.float32(np.inf)
    for k in range(LANES):
        start[k] = -(dmin[k] * b0[k])
    for i in range(steps.size):
        _scales(steps[i], top, d, a0, ta, unit, inverse)
        affine_q1(x, w, inverse, start, high, q1)
        for k in range(LANES):
            tb[k] = (unit[k] * q1[k] - sv[k]) / sw[k] if sw[k] > F0 else F0
        for k in range(LANES):
            tb[k] = nearest(min(max(tb[k] / dmin[k], F0), top)) if dmin[k] > F0 else F0
        for k in range(LANES):
            base[k] = -(dmin[k] * tb[k])
        affine_error(x, w, unit, inverse, base, high, error)
        take(error, least, ta, a)
        take(error, least, tb, b)
        lower(error, least)


@njit(**KERNEL)
def affine_q1(x: Any, w: Any, inverse: Any, base: Any, high: Any, q1: Any) -> None:
    for k in range(LANES):
        q1[k] = F0
    for j in range(x.shape[0]):
        for k in range(LANES):
            q = nearest(min(max((x[j, k] - base[k]) * inverse[k], F0), high))
            q1[k] += q if w is None else w[j, k] * q


@njit(**KERNEL)
def refit(x: Any, w: Any, high: Any, parts: Any, a: Any, b: Any, s: Any, d: Any, dmin: Any) -> None:
    """Step 4's least squares: d and dmin in place, for the integers that they, a and b give."""
    inverse, base, q1, qx, qq, sw, sv = s[0], s[1], s[2], s[3], s[4], s[5], s[6]
    for k in range(LANES):
        unit = d[k] * a[k]
        inverse[k] = F1 / unit if unit > F0 else F0
    for k in range(LANES):
        base[k] = -(dmin[k] * b[k])
    affine_sums(x, w, inverse, base, high, q1, qx, qq)
    means(x, w, base, sw, sv)
    for start in range(0, LANES, parts):
        # Corrections to d and dmin, as the residual is fitted: r = x − base = (d + Δ) a q − Δmin b.
        aa, ab, bb, ra, rb = 0.0, 0.0, 0.0, 0.0, 0.0
        for k in range(start, start + parts):
            aa += a[k] * a[k] * qq[k]
            ab += a[k] * b[k] * q1[k]
            bb += b[k] * b[k] * sw[k]
            ra += a[k] * qx[k]
            rb += b[k] * sv[k]
        det = aa * bb - ab * ab
        new, change = np.float64(d[start]), 0.0
        if det > 1e-9 * aa * bb:
            new, change = (ra * bb - ab * rb) / det, (ab * ra - aa * rb) / det
        elif aa > 0:
            new = ra / aa
        d[start : start + parts] = f16(np.float32(max(new, 0.0)))
        dmin[start : start + parts] = f16(np.float32(max(dmin[start] + change, 0.0)))


@njit(**KERNEL)
def exact_parts(
    x: Any, w: Any, high: Any, parts: Any, flag: Any, s: Any, d: Any, dmin: Any, a: Any, b: Any, least: Any
) -> Any:
    """MXFP4-valued super-blocks in 5 bits: every value an integer −12 … 12 times the part's power of two u, so code − 16.

    d = u₀/32 and dmin = u₀/2 for the largest u₀ make scale and min 32 u/u₀, exact down to u₀/32. False if no lane is so.
    """
    if not coarse(x, flag):
        return False
    unit, inverse, base = s[0], s[1], s[2]
    sizes(x, unit)
    for k in range(LANES):
        spread = unit[k] * _KEEP_1
        unit[k] *= _EIGHTH if spread - (spread - unit[k]) == unit[k] else _TWELFTH
    for start in range(0, LANES, parts):
        largest = F0
        for k in range(start, start + parts):
            largest = max(largest, unit[k])
        for k in range(start, start + parts):
            d[k], dmin[k] = f16(largest / np.float32(32)), f16(largest / F2)
            a[k] = nearest(min(unit[k] / d[k], np.float32(32))) if d[k] > F0 else F0
            b[k] = a[k]
            unit[k] = d[k] * a[k]
            inverse[k] = F1 / unit[k] if unit[k] > F0 else F0
            base[k] = -(dmin[k] * b[k])
    affine_error(x, w, unit, inverse, base, high, least)
    for k in range(LANES):
        least[k] = least[k] if flag[k] else np.float32(np.inf)
    return True


@njit(**KERNEL)
def encode_parts(
    x: Any, w: Any, high: Any, top: Any, parts: Any, spreads: Any, wide: Any, near: Any, rounds: Any, flag: Any, s: Any, best: Any
) -> None:
    """Steps 1 to 4 of one tile. `best` f32 [4, 64] receives d, dmin and the integers of scale and min of each lane."""
    room, scale, minimum, d, dmin, a, b, least, a0, b0, total = (
        s[:14], s[14], s[15], s[16], s[17], s[18], s[19], s[20], s[21], s[22], s[23],
    )  # fmt: skip
    fit_parts(x, w, high, spreads, room, scale, minimum)
    first_scales(scale, minimum, parts, top, d, dmin)
    for k in range(LANES):
        a0[k] = nearest(min(scale[k] / d[k], top)) if d[k] > F0 else F0
        b0[k] = nearest(min(minimum[k] / dmin[k], top)) if dmin[k] > F0 else F0
    scan_scales(x, w, high, top, d, dmin, wide, room, a0, b0, a, b, least)
    a0[:] = a
    b0[:] = b
    search_pairs(x, w, high, top, d, dmin, near, room, a0, b0, a, b, least)
    keep(parts, True, least, total, d, dmin, a, b, best)
    for _ in range(rounds):
        refit(x, w, high, parts, a, b, room, d, dmin)
        a0[:] = a
        b0[:] = b
        search_pairs(x, w, high, top, d, dmin, near, room, a0, b0, a, b, least)
        keep(parts, False, least, total, d, dmin, a, b, best)
    if high > 24 and exact_parts(x, w, high, parts, flag, room, d, dmin, a, b, least):
        keep(parts, False, least, total, d, dmin, a, b, best)


@njit(**KERNEL)
def keep(parts: Any, first: Any, least: Any, total: Any, d: Any, dmin: Any, a: Any, b: Any, best: Any) -> None:
    """Take over the super-blocks that lose less than `total`, which is updated."""
    for start in range(0, LANES, parts):
        loss = F0
        for k in range(start, start + parts):
            loss += least[k]
        if first or loss < total[start]:
            total[start] = loss
            for k in range(start, start + parts):
                best[0, k], best[1, k], best[2, k], best[3, k] = d[k], dmin[k], a[k], b[k]
