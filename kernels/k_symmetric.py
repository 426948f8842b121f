"""Encoding super-blocks of 256 values whose parts of 16 have a signed scale and no minimum: Q3_K, Q6_K.

    value = (d · scale) · q      d: float16, one a super-block; scale: a signed integer of a part; low ≤ q ≤ high

Minimised is Σ w (x − decoded)² over each super-block, w the column's importance or 1:

1. each part by itself, real-valued: the value of largest magnitude at −f for several f, with least-squares scales;
2. d puts the largest scale at the negative end of its integers' range, which reaches one further; where another of the
   opposite sign does not fit then, also at the positive end; with importance, also just inside the negative end;
3. for this d, each part's scale among the neighbours of the rounded real one (and of its negative: the integers q are
   not symmetric), judged by the loss itself;
4. d refitted by least squares to all integers at once, rounded to float16, and 3 repeated close to the last scales, with
   importance twice; a super-block keeps the round that lost least.

Lanes of a tile (see `lanes`) are parts; sixteen consecutive ones make a super-block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gptoss_convert.kernels.lane_sums import symmetric_error, symmetric_sums
from gptoss_convert.kernels.lanes import F0, KERNEL, LANES, TINY, coarse, f16, invert, lower, nearest, peaks, take

F1 = np.float32(1)
PARTS = 16  # lanes a super-block
_KEEP_1 = np.float32(2**23 + 1)
# What several factors do exactly, rounding must not decide: parts of one kind get one scale, which the others share.
_MORE = np.float32(1 + 2**-14)
_SIXTEENTH, _TWENTY_FOURTH = np.float32(1 / 16), np.float32(1 / 24)


@njit(**KERNEL)
def fit_parts(x: Any, w: Any, low: Any, high: Any, factors: Any, s: Any, scale: Any) -> None:
    """Step 1: the real-valued scale of each lane."""
    size, peak, inverse, qx, qq, most = s[0], s[1], s[2], s[3], s[4], s[5]
    peaks(x, size, peak)
    most[:] = F0
    for k in range(LANES):
        scale[k] = peak[k] / low
    for i in range(factors.size):
        factor = -factors[i]
        for k in range(LANES):
            inverse[k] = factor / peak[k] if size[k] > TINY else F0
        symmetric_sums(x, w, inverse, low, high, qx, qq)
        for k in range(LANES):
            # With the best scale qx/qq, the loss is Σ w x² − qx²/qq.
            quotient = qx[k] / qq[k] if qq[k] > F0 else F0
            better = quotient * qx[k] > most[k] * _MORE
            most[k] = quotient * qx[k] if better else most[k]
            scale[k] = quotient if better else scale[k]


@njit(**KERNEL)
def power_of_two_parts(x: Any, low: Any, high: Any, flag: Any, s: Any, scale: Any) -> None:
    """Scales that are powers of two, in the lanes whose values are then integers: MXFP4's, whose magnitudes 3·2^k and 2^k
    become 24 and 16. They leave the other parts of a super-block a common d."""
    if not coarse(x, flag):
        return
    size, peak, d, inverse, error = s[0], s[1], s[2], s[3], s[4]
    peaks(x, size, peak)
    for k in range(LANES):
        spread = size[k] * _KEEP_1
        d[k] = size[k] * (_SIXTEENTH if spread - (spread - size[k]) == size[k] else _TWENTY_FOURTH)
        inverse[k] = F1 / d[k] if size[k] > TINY else F0
    symmetric_error(x, None, d, inverse, low, high, error)
    for k in range(LANES):
        scale[k] = d[k] if flag[k] and error[k] == F0 else scale[k]


@njit(**KERNEL)
def first_scale(scale: Any, end: Any, flag: Any, d: Any) -> None:
    """Step 2; d of every super-block with a flag, repeated in each of its lanes. The widest scale becomes `end`."""
    for start in range(0, LANES, PARTS):
        widest, some = F0, False
        for k in range(start, start + PARTS):
            some |= flag[k]
            if abs(scale[k]) > abs(widest):
                widest = scale[k]
        if some:
            d[start : start + PARTS] = f16(widest / end)


@njit(**KERNEL)
def first_integers(scale: Any, d: Any, ends: Any, flag: Any, a0: Any) -> Any:
    """The integer nearest to each real scale. Where it is beyond the positive end, as only the negative one reaches as far
    as d was made for, the integers q change their signs instead; these lanes are flagged; whether there are any."""
    some = False
    for k in range(LANES):
        a0[k] = nearest(max(scale[k] / d[k], ends[0])) if d[k] != F0 else F0
        flag[k] = a0[k] > ends[1]
        if flag[k]:
            a0[k] = max(-a0[k], ends[0])
            some = True
    return some


@njit(**KERNEL)
def search_scales(
    x: Any, w: Any, low: Any, high: Any, ends: Any, d: Any, steps: Any, signs: Any, s: Any, a0: Any, a: Any, loss: Any
) -> None:
    """Step 3: the best integer scale of each lane among ±a0 + steps (`signs` 2) or a0 + steps (1), and its loss."""
    trial, unit, inverse, error = s[0], s[1], s[2], s[3]
    least, largest = ends[0], ends[1]
    loss[:] = np.float32(np.inf)
    for sign in range(signs):
        for i in range(steps.size):
            step, turn = steps[i], F1 if sign == 0 else -F1
            for k in range(LANES):
                trial[k] = min(max(turn * a0[k] + step, least), largest)
            for k in range(LANES):
                unit[k] = d[k] * trial[k]
            invert(unit, inverse)
            symmetric_error(x, w, unit, inverse, low, high, error)
            take(error, loss, trial, a)
            lower(error, loss)


@njit(**KERNEL)
def refit(x: Any, w: Any, low: Any, high: Any, a: Any, s: Any, d: Any) -> None:
    """Step 4's least squares: d in place, for the integers that it and a give."""
    inverse, qx, qq = s[0], s[1], s[2]
    for k in range(LANES):
        inverse[k] = F1 / (d[k] * a[k]) if d[k] * a[k] != F0 else F0
    symmetric_sums(x, w, inverse, low, high, qx, qq)
    for start in range(0, LANES, PARTS):
        top, bottom = 0.0, 0.0
        for k in range(start, start + PARTS):
            top += a[k] * qx[k]
            bottom += a[k] * a[k] * qq[k]
        if bottom > 0:
            d[start : start + PARTS] = f16(np.float32(top / bottom))


@njit(**KERNEL)
def encode_parts(
    x: Any,
    w: Any,
    low: Any,
    high: Any,
    ends: Any,
    factors: Any,
    starts: Any,
    wide: Any,
    near: Any,
    signs: Any,
    rounds: Any,
    flag: Any,
    s: Any,
    best: Any,
) -> None:
    """Steps 1 to 4 of one tile. `ends` f32 [2]: least and largest scale; `best` f32 [2, 64] receives d and the scales.

    `starts`: shares of the least scale at which the widest one is put; the first is 1, the others are searched less.
    """
    room, scale, d, a, loss, a0, total = s[:6], s[6], s[7], s[8], s[9], s[10], s[11]
    fit_parts(x, w, low, high, factors, room, scale)
    if high > 24:
        power_of_two_parts(x, low, high, flag, room, scale)
    flag[:] = True
    first_scale(scale, ends[0], flag, d)
    beyond = first_integers(scale, d, ends, flag, a0)
    search_scales(x, w, low, high, ends, d, wide, signs, room, a0, a, loss)
    keep(True, loss, total, d, a, best)
    if beyond:  # both signs reach as far
        first_scale(scale, ends[1], flag, d)
        first_integers(scale, d, ends, flag, a0)
        search_scales(x, w, low, high, ends, d, wide, signs, room, a0, a, loss)
        keep(False, loss, total, d, a, best)
    for i in range(1, starts.size):
        flag[:] = True
        first_scale(scale, ends[0] * starts[i], flag, d)
        first_integers(scale, d, ends, flag, a0)
        search_scales(x, w, low, high, ends, d, wide[:3], 1, room, a0, a, loss)
        keep(False, loss, total, d, a, best)
    for turn in range(rounds):
        if turn == 0:
            d[:], a[:] = best[0], best[1]
        refit(x, w, low, high, a, room, d)
        a0[:] = a
        search_scales(x, w, low, high, ends, d, near, 1, room, a0, a, loss)
        keep(False, loss, total, d, a, best)


@njit(**KERNEL)
def keep(first: Any, loss: Any, total: Any, d: Any, a: Any, best: Any) -> None:
    """Take over the super-blocks that lose less than `total`, which is updated."""
    for start in range(0, LANES, PARTS):
        sum_ = F0
        for k in range(start, start + PARTS):
            sum_ += loss[k]
        if first or sum_ < total[start]:
            total[start] = sum_
            for k in range(start, start + PARTS):
                best[0, k], best[1, k] = d[k], a[k]
