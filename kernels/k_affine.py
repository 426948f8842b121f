"""Encoding super-blocks of 256 values whose parts have a scale and a minimum: Q2_K, Q4_K, Q5_K.

    value = (d · scale) · q − (dmin · min)      d, dmin: float16, one each a super-block; scale, min: integers of a part

Minimised is Σ w (x − decoded)² over each super-block, w the column's importance or 1, by descent from a good start:

1. each part by itself, real-valued: several spreads of its values over the codes, each with its integers' least-squares
   scale and minimum (`fit_parts`);
2. d and dmin put the largest of these at the top of the integers' range, or beyond it (`first_scales`);
3. for these d and dmin, each part's scale is tried at and around the rounded real one, with the least-squares minimum for
   each (`scan_scales`); of several d and dmin a super-block keeps those that lose least;
4. d and dmin are refitted by least squares to all integers at once, rounded to float16, and each part's pair of scale and
   min is sought among the neighbours of the last (`refit`, `search_pairs`), before the refit and after; again a
   super-block keeps what lost least.

With importance, step 1 is done without it as well: where few values have nearly all of it, the parts' scales have little in
common by themselves.

Lanes of a tile (see `lanes`) are parts; consecutive lanes make a super-block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.k_parts import fit_parts
from gptoss_convert.kernels.lane_sums import affine_error, affine_sums, means
from gptoss_convert.kernels.lanes import F0, KERNEL, LANES, coarse, f16, invert, lower, nearest, sizes, take

F1 = np.float32(1)
F2 = np.float32(2)
_PLAIN = 9  # spreads that are tried without importance
_KEEP_1 = np.float32(2**23 + 1)
_EIGHTH, _TWELFTH = np.float32(1 / 8), np.float32(1 / 12)


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
    x: Any,
    w: Any,
    high: Any,
    top: Any,
    d: Any,
    dmin: Any,
    moves: Any,
    s: Any,
    a0: Any,
    b0: Any,
    a: Any,
    b: Any,
    least: Any,
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
    x: Any,
    w: Any,
    high: Any,
    top: Any,
    d: Any,
    dmin: Any,
    steps: Any,
    s: Any,
    a0: Any,
    b0: Any,
    a: Any,
    b: Any,
    least: Any,
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
        new, change = 1.0 * d[start], 0.0
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
    x: Any,
    w: Any,
    high: Any,
    top: Any,
    parts: Any,
    spreads: Any,
    starts: Any,
    wide: Any,
    near: Any,
    flag: Any,
    s: Any,
    best: Any,
) -> None:
    """Steps 1 to 4 of one tile. `best` f32 [4, 64] receives d, dmin and the integers of scale and min of each lane."""
    room, scale, minimum, d, dmin, a, b, least, a0, b0, total = (
        s[:14], s[14], s[15], s[16], s[17], s[18], s[19], s[20], s[21], s[22], s[23],
    )  # fmt: skip
    fit_parts(x, w, high, spreads, room, scale, minimum)
    for i in range(starts.size + (0 if w is None else 1)):
        share = starts[i] if i < starts.size else F1
        if i == starts.size:
            fit_parts(x, None, high, spreads[:_PLAIN], room, scale, minimum)
        first_scales(scale, minimum, parts, top / share, d, dmin)
        for k in range(LANES):
            a0[k] = nearest(min(scale[k] / d[k], top)) if d[k] > F0 else F0
        for k in range(LANES):
            b0[k] = nearest(min(minimum[k] / dmin[k], top)) if dmin[k] > F0 else F0
        scan_scales(x, w, high, top, d, dmin, wide, room, a0, b0, a, b, least)
        keep(parts, i == 0, least, total, d, dmin, a, b, best)
    d[:], dmin[:], a[:], b[:] = best[0], best[1], best[2], best[3]
    for turn in range(2):
        if turn == 1:
            refit(x, w, high, parts, a, b, room, d, dmin)
        a0[:], b0[:] = a, b
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
